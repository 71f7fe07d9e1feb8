"""`traffic`: read now, show windows, read a past range again."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import ask_or_change, ask_or_read, settings_of
from billingd.cli.talk import Daemon
from billingd.domain.errors import Misconfigured, ReadingBack, Retryable

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store
    from billingd.traffic.poll import TrafficPoller

WINDOWS_MAX: Final = 1_000
"""Windows in one listing; the daemon lists no more at once."""

RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def parse_time(_ctx: click.Context, _param: click.Parameter, value: str) -> datetime:
    """An RFC 3339 time as aware UTC; one without a zone means something else on every machine."""
    if not RFC_3339.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is not an RFC 3339 time with its zone, as in 2026-11-22T10:00:00Z"
        )
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{value!r} is no time: {error}") from None


@click.group(short_help="Look at the traffic read from Amplify; read more.")
def traffic() -> None:
    """Look at the traffic that was read from Amplify, and read more.

    Without a running daemon, `poll` and `backfill` ask Amplify themselves; what they record is reported to
    Recurly once the daemon runs.

    \b
    Example:
      billingd traffic poll
      billingd traffic windows --limit 24
    """


@traffic.command()
@output.json_option
@click.pass_obj
def poll(config: Path | None, as_json: bool) -> None:
    """Read every settled window now instead of at the next time of the schedule.

    \b
    Example:
      billingd traffic poll
    """

    async def here(poller: "TrafficPoller") -> dict[str, Any]:
        await poller.run_once()
        return {"polled": True}

    answer = asyncio.run(_post(settings_of(config), "/traffic/poll", {}, here, key="polled", quiet=as_json))
    if as_json:
        output.document(answer)
    else:
        output.say("every settled window is read")


@traffic.command()
@click.option(
    "--limit", type=click.IntRange(1, WINDOWS_MAX), default=48, show_default=True, help="The newest."
)
@output.json_option
@click.pass_obj
def windows(config: Path | None, limit: int, as_json: bool) -> None:
    """Show the newest windows with what was recorded and reported of each, and how far has been read.

    \b
    Example:
      billingd traffic windows --limit 24 --json
    """
    found = asyncio.run(_windows(settings_of(config), limit, quiet=as_json))
    if as_json:
        output.document(found)
        return
    output.say(f"source {found['source']}, read up to {found['watermark'] or '(nothing read yet)'}")
    columns = ("window_start", "window_end", "records", "recorded_units", "reported_units")
    titles = [name.upper().replace("_", " ") for name in columns]
    output.table(titles, ([window[name] for name in columns] for window in found["windows"]))


@traffic.command()
@click.option(
    "--since", required=True, callback=parse_time, metavar="TIME", help="From this window on (RFC 3339)."
)
@click.option(
    "--until", required=True, callback=parse_time, metavar="TIME", help="Up to this moment (RFC 3339)."
)
@click.option("--subscription", metavar="ID", help="Only this subscription: its id at Amplify, or its name.")
@output.json_option
@click.pass_obj
def backfill(
    config: Path | None, since: datetime, until: datetime, subscription: str | None, as_json: bool
) -> None:
    """Read past windows again and book only what differs from the ledger.

    \b
    Example:
      billingd traffic backfill --since 2026-11-22T00:00:00Z --until 2026-11-23T00:00:00Z
    """
    if until <= since:
        raise click.BadParameter("must be later than --since", param_hint="--until")
    if since > datetime.now(UTC):
        raise click.BadParameter("is still to come", param_hint="--since")
    wanted = {"since": _written(since), "until": _written(until)}
    if subscription is not None:
        wanted["subscription"] = subscription

    async def here(poller: "TrafficPoller") -> dict[str, Any]:
        return {"booked_units": await poller.read_range(since, until, subscription=subscription)}

    answer = asyncio.run(
        _post(settings_of(config), "/traffic/backfill", wanted, here, key="booked_units", quiet=as_json)
    )
    if as_json:
        output.document(answer)
    else:
        output.say(f"{answer['booked_units']} unit(s) booked")


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


async def _post(
    settings: "Settings",
    path: str,
    body: Mapping[str, Any],
    here: "Callable[[TrafficPoller], Awaitable[dict[str, Any]]]",
    *,
    key: str,
    quiet: bool,
) -> dict[str, Any]:
    """Let the daemon read, or read here while no daemon has the store."""

    async def ask(daemon: Daemon) -> dict[str, Any]:
        return await daemon.let_read(path, body, key=key)

    async def read(store: "Store") -> dict[str, Any]:
        from billingd import daemon as root
        from billingd.loops import Clock
        from billingd.settings import ConfigurationError, missing_for_run

        if faults := missing_for_run(settings):
            raise ConfigurationError(faults)
        async with root.build(settings, store, Clock()) as parts:
            try:
                return await here(parts.poller)
            except (Misconfigured, ReadingBack):  # it was reached, and refuses us
                raise
            except Retryable as error:
                raise Unreachable(str(error)) from None
            finally:
                await parts.recurly.close(deadline=timedelta(0))

    return await ask_or_change(settings, ask, read, quiet=quiet)


async def _windows(settings: "Settings", limit: int, *, quiet: bool) -> dict[str, Any]:
    async def ask(daemon: Daemon) -> dict[str, Any]:
        return await daemon.get("/traffic/windows", key="windows", query=[("limit", str(limit))])

    async def read(store: "Store") -> dict[str, Any]:
        from billingd.admin.status import plain, timestamp
        from billingd.store import usage, watermarks

        async with store.read() as tx:
            mark = await watermarks.find(tx, settings.traffic.source)
            rows = await usage.by_window(tx, limit=limit)
        return {
            "source": settings.traffic.source,
            "watermark": None if mark is None else timestamp(mark.at),
            "windows": [{name: plain(value) for name, value in row.items()} for row in rows],
        }

    return await ask_or_read(settings, ask, read, quiet=quiet)
