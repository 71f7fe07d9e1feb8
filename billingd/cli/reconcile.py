"""`reconcile`: served, recorded and billed side by side; what differs, and what mends it."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import ask_or_change, settings_of
from billingd.cli.talk import Daemon
from billingd.cli.traffic import parse_time
from billingd.domain.errors import BillingdError, Retryable

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at a run that the daemon takes."""

PATIENCE: Final = timedelta(minutes=1)
"""How long a run that the daemon takes may stand still, held up, before the command leaves it to itself."""

PHASES: Final = {
    "served": "Amplify is read again",
    "billed": "Recurly is read",
    "links": "links are compared",
    "repair": "repairs are asked for",
}

Progress = Callable[[Mapping[str, Any]], None]


def _maybe_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    return None if value is None else parse_time(ctx, param, value)


@click.command(short_help="Compare Amplify, the ledger and Recurly, to the unit.")
@click.option(
    "--since",
    callback=_maybe_time,
    metavar="TIME",
    help="From this window on (RFC 3339); by default from where the earliest open billing period began.",
)
@click.option("--until", callback=_maybe_time, metavar="TIME", help="Up to this moment; by default now.")
@click.option("--subscription", metavar="ID", help="Only this subscription: its id at Amplify, or its name.")
@click.option("--repair", is_flag=True, help="Mend what is safe, through the outbox; hold the rest.")
@output.json_option
@click.pass_context
def reconcile(
    ctx: click.Context,
    since: datetime | None,
    until: datetime | None,
    subscription: str | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Compare what Amplify counts, what the ledger has, and what Recurly holds, per subscription and add-on;
    and the links between plans and subscriptions. The daemon does so by itself once a day.

    What only came late is booked on the way, as by any poll. With --repair, what is missing is posted,
    unbilled doubles are removed, what is not as recorded is set back while it is unbilled, and billed flat
    and tiered usage gets the difference as a correction; the rest is held. Exits with 3 while anything is
    left, or when a part of what --since asks for cannot be compared any more.

    A run that was cut off less than an hour ago goes on where it was when the same is asked again.

    \b
    Example:
      billingd reconcile
      billingd reconcile --since 2026-11-01T00:00:00Z --repair
      billingd reconcile --json
    """
    if since is not None and until is not None and until <= since:
        raise click.BadParameter("must be later than --since", param_hint="--until")
    if since is not None and since > datetime.now(UTC):
        raise click.BadParameter("is still to come", param_hint="--since")
    settings = settings_of(ctx.obj)
    found = asyncio.run(_reconcile(settings, since, until, subscription, repair, quiet=as_json))
    if found["state"] == "failed":
        raise BillingdError(f"the reconciliation failed: {found['error']}")
    if as_json:
        output.document(found)
    else:
        _show(found)
    missed = found["not_compared"]
    asked = since is not None
    if found["left"] or any(asked or one["subscription"] or one.get("phase") == "links" for one in missed):
        ctx.exit(output.LOOK)


def _show(found: Mapping[str, Any]) -> None:
    """A table of what differs, and a line that sums it up."""
    if found["drift"]:
        titles = ["KIND", "SUBSCRIPTION", "ADD-ON", "WINDOW", "UNITS", "MENDS", "CAUSE", "FIX"]
        output.table(titles, map(_row, found["drift"]))
    checked = found["checked"]
    over = f"{checked['subscriptions']} subscription(s), {checked['records']} record(s)"
    span = f"from {found['since']} to {found['until']}"
    under_way = found["under_way_units"]
    if not found["findings"]:
        output.say(f"no drift: {over} {'were compared' if under_way else 'agree'} {span}")
    else:
        output.say(f"{found['findings']} difference(s), {found['drift_units']} unit(s), in {over} {span}")
    if under_way:
        output.say(
            f"{under_way} unit(s) are still on their way to Recurly: `billingd outbox list` shows them; "
            "once they are reported, run it again to see that all agree"
        )
    for one in found["not_compared"]:
        whose = "" if one["subscription"] is None else f" of {one['subscription']}"
        output.say(f"not compared{whose}: {one['since']} to {one['until']}: {one['reason']}")
    if found["held_units"]:
        output.say(f"{found['held_units']} unit(s) are held or written off: no drift, but not billed")
    if found["repair"]:
        output.say(
            f"{found['repaired_units']} unit(s) were given to the outbox to mend; {found['left']} "
            "difference(s) are left. Run it again to see that all agree"
        )
    elif any(one["repairable"] for one in found["drift"]):
        output.say("`billingd reconcile --repair` mends what can be mended")


def _row(one: Mapping[str, Any]) -> list[Any]:
    return [
        one["kind"],
        one["title"] or one["subscription"],
        one["add_on"],
        one["window_start"],
        one["units"],
        "mended" if one["mended"] else "yes" if one["repairable"] else "no",
        one["cause"],
        one["mended"] or one["fix"],
    ]


async def _reconcile(
    settings: "Settings",
    since: datetime | None,
    until: datetime | None,
    subscription: str | None,
    repair: bool,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Let the daemon do it and look on, or do it here while no daemon has the store."""

    async def ask(daemon: Daemon) -> dict[str, Any]:
        wanted = {
            "since": None if since is None else since.isoformat(),
            "until": None if until is None else until.isoformat(),
            "subscription": subscription,
            "repair": repair,
        }
        begun = await daemon.post("/reconcile", wanted, key="id")
        steps, moved_at = None, time.monotonic()
        async with _bar() as show:
            while True:
                found = await daemon.get(f"/reconcile/{begun['id']}", key="drift")
                show(found)
                if found["state"] != "running":
                    return found
                if found["steps_done"] != steps or found["held_up"] is None:
                    steps, moved_at = found["steps_done"], time.monotonic()
                elif time.monotonic() - moved_at >= PATIENCE.total_seconds():
                    raise Unreachable(
                        f"{found['held_up']}; the daemon goes on with it once it can, and "
                        "`billingd reconcile` asked again looks on"
                    )
                await asyncio.sleep(LOOK_EVERY)

    async def here(store: "Store") -> dict[str, Any]:
        from billingd import daemon as root
        from billingd.loops import Clock
        from billingd.settings import ConfigurationError, missing_for_run

        if faults := missing_for_run(settings):
            raise ConfigurationError(faults)
        async with root.build(settings, store, Clock()) as parts, _bar() as show:
            reconciler = parts.reconciler
            try:
                run = await reconciler.start(
                    since=since, until=until, subscription=subscription, repair=repair
                )
                while await reconciler.step(run):
                    found = await reconciler.document(run)
                    assert found is not None
                    show(found)
            except Retryable as error:
                raise Unreachable(f"{error}; asked again, it goes on from here") from None
            finally:
                await parts.recurly.close(deadline=timedelta(0))
            found = await reconciler.document(run)
            assert found is not None
            return found

    return await ask_or_change(settings, ask, here, quiet=quiet)


@asynccontextmanager
async def _bar() -> AsyncIterator[Progress]:
    """A progress bar on standard error, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(PHASES["served"], total=None)

        def show(found: Mapping[str, Any]) -> None:
            what = PHASES.get(found["phase"], "")
            if found.get("held_up"):
                what = f"{what}: waiting ({found['held_up'][:60]})"
            bar.update(task, description=what, completed=found["steps_done"], total=found["steps"])

        yield show
