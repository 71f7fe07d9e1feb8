"""`resync`: list Amplify, compare, and ask for what was missed."""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import ask_or_change, settings_of
from billingd.cli.talk import Daemon
from billingd.domain.errors import Misconfigured, ReadingBack, Retryable

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store

WORDS: Final = {"+": "create", "~": "change", "-": "end"}


@click.command(short_help="Find what was missed at Amplify, and ask for it.")
@click.option("--dry-run", is_flag=True, help="Only show it; exit with 3 when there is something to do.")
@output.json_option
@click.pass_context
def resync(ctx: click.Context, dry_run: bool, as_json: bool) -> None:
    """List plans and subscriptions at Amplify, compare them with the links and with Recurly, and enqueue
    what is missing or differs. The daemon does so by itself at its first start, after a gap in the feed, and
    every `catch_up.resync_every`.

    Each line begins with what is done: + create, ~ change, - end. Nothing is ended before Amplify, asked
    again by name, says that it is gone. When much is missing there at once, all of that is held instead.
    What a dead letter is in the way of, or what is held so, is left to a person: that, too, exits with 3.

    \b
    Example:
      billingd resync --dry-run
      billingd resync --json
    """
    config: Path | None = ctx.obj
    found = asyncio.run(_resync(settings_of(config), dry_run, quiet=as_json))
    if as_json:
        output.document(found)
    else:
        for line in lines(found):
            output.say(line)
    if found["withheld"] or found["counts"].get("dead_letters") or (dry_run and found["steps"]):
        ctx.exit(output.LOOK)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The document for people."""
    steps, counts = found["steps"], found["counts"]
    dead_letters = counts.get("dead_letters", 0)
    rows = [(f"  {step['op']} {step['what']}", f"{step['title']} ({step['id']})", step) for step in steps]
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for kind, title, step in rows:
        yield f"{kind:<{first}}  {title:<{second}}  {step['reason']}"
    for warning in found["warnings"]:
        yield f"  ! {warning}"
    for note in found["notes"]:
        yield f"  ! {note}"
    if rows or found["warnings"] or found["notes"]:
        yield ""
    if steps:
        sums = (f"{sum(step['op'] == op for step in steps)} to {word}" for op, word in WORDS.items())
        yield f"Plan: {', '.join(sums)}."
    else:
        nothing = "Nothing that can be done as it is" if dead_letters else "Nothing to do"
        yield (
            f"{nothing}. {counts['plans']} plan(s) and {counts['subscriptions']} subscription(s) at "
            "Amplify were compared."
        )
    if found["withheld"]:
        yield f"{len(found['withheld'])} step(s) are withheld; `billingd held list` shows why after a run."
    if dead_letters:
        yield (
            f"{dead_letters} step(s) wait until a dead letter is replayed or discarded; "
            "`billingd outbox list --state dead` shows them."
        )
    if steps and not found["dry_run"]:
        yield f"{found['enqueued']} action(s) enqueued; `billingd outbox list` shows them."


async def _resync(settings: "Settings", dry_run: bool, *, quiet: bool) -> dict[str, Any]:
    """Let the daemon do it, or do it here while no daemon has the store."""

    async def ask(daemon: Daemon) -> dict[str, Any]:
        return await daemon.let_read("/resync", {"dry_run": dry_run}, key="steps")

    async def here(store: "Store") -> dict[str, Any]:
        from billingd import daemon as root
        from billingd.loops import Clock
        from billingd.settings import ConfigurationError, missing_for_run

        if faults := missing_for_run(settings):
            raise ConfigurationError(faults)
        async with root.build(settings, store, Clock()) as parts:
            try:
                return await parts.resync.told(dry_run=dry_run)
            except (Misconfigured, ReadingBack):  # it was reached, and refuses us
                raise
            except Retryable as error:
                raise Unreachable(str(error)) from None
            finally:
                await parts.recurly.close(deadline=timedelta(0))

    return await ask_or_change(settings, ask, here, quiet=quiet)
