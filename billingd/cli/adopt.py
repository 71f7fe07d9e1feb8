"""`adopt`: take over what the original integration made at Recurly, from a cut-over instant on."""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import ask_or_change, settings_of
from billingd.cli.talk import Daemon
from billingd.cli.traffic import parse_time
from billingd.domain.errors import Misconfigured, ReadingBack, Retryable

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.command(short_help="Take over what the original integration made at Recurly.")
@click.option(
    "--since",
    required=True,
    callback=parse_time,
    metavar="TIME",
    help="The cut-over: traffic before it was billed by the original, from it on billingd bills (RFC 3339).",
)
@click.option("--dry-run", is_flag=True, help="Only show it; exit with 3 when there is something to do.")
@output.json_option
@click.pass_context
def adopt(ctx: click.Context, since: datetime, dry_run: bool, as_json: bool) -> None:
    """Link the plans and subscriptions that the original integration made at Recurly, without doubling any.

    Stop the original first, and name the moment up to which its last run read traffic. Plans must charge at
    Recurly what Amplify says; of a subscription there must be exactly one at Recurly, and the original must
    have told it nothing later than an hour after that moment. What is not so is a problem, listed with what
    to do; it is left alone. Adopting again only does what is left.

    Each line begins with what is done: + link a plan, ~ mark and link a subscription, ! a problem, = nothing.

    \b
    Example:
      billingd adopt --since 2026-11-22T00:00:00Z --dry-run
      billingd adopt --since 2026-11-22T00:00:00Z
    """
    if since.microsecond:
        whole = "must be a whole second: Recurly's times know no others"
        raise click.BadParameter(whole, ctx, param_hint="--since")
    config: Path | None = ctx.obj
    found = asyncio.run(_adopt(settings_of(config), since, dry_run, quiet=as_json))
    if as_json:
        output.document(found)
    else:
        for line in lines(found):
            output.say(line)
    if found["problems"] or (dry_run and found["to_do"]):
        ctx.exit(output.LOOK)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The document for people."""
    rows = [
        (f"  {step['op']} {step['what']}", f"{step['title']} ({step['id']})", step) for step in found["steps"]
    ]
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for kind, title, step in rows:
        yield f"{kind:<{first}}  {title:<{second}}  {step['reason']}"
    if rows:
        yield ""
    yield (
        f"From {found['since']} on: {found['to_do']} to adopt, {found['problems']} problem(s), "
        f"{found['adopted']} subscription(s) linked already."
    )
    if found["to_do"] and not found["dry_run"]:
        yield f"{found['to_do']} action(s) enqueued; `billingd outbox list` shows them."


async def _adopt(settings: "Settings", since: datetime, dry_run: bool, *, quiet: bool) -> dict[str, Any]:
    """Let the daemon do it, or do it here while no daemon has the store."""

    async def ask(daemon: Daemon) -> dict[str, Any]:
        wanted = {"since": since.isoformat(), "dry_run": dry_run}
        return await daemon.let_read("/adopt", wanted, key="steps")

    async def here(store: "Store") -> dict[str, Any]:
        from billingd import daemon as root
        from billingd.loops import Clock
        from billingd.settings import ConfigurationError, missing_for_run

        if faults := missing_for_run(settings):
            raise ConfigurationError(faults)
        async with root.build(settings, store, Clock()) as parts:
            try:
                return await parts.adoption.told(since, dry_run=dry_run)
            except (Misconfigured, ReadingBack):  # it was reached, and refuses us
                raise
            except Retryable as error:
                raise Unreachable(str(error)) from None
            finally:
                await parts.recurly.close(deadline=timedelta(0))

    return await ask_or_change(settings, ask, here, quiet=quiet)
