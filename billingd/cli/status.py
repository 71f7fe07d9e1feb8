"""`status`: how things stand."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_read, settings_of

if TYPE_CHECKING:
    from billingd.cli.talk import Daemon
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.command(short_help="Tell how things stand.")
@click.option(
    "--check",
    is_flag=True,
    help="Exit with 3 when there are dead letters, held items or drift, else 4 if the daemon is not ready.",
)
@click.option(
    "--subscriptions",
    "each",
    is_flag=True,
    help="Also each subscription, and whether its billing period is complete.",
)
@output.json_option
@click.pass_context
def status(ctx: click.Context, check: bool, each: bool, as_json: bool) -> None:
    """Ask the running daemon how things stand; without one, read the store and say so.

    \b
    Example:
      billingd status
      billingd status --subscriptions
      billingd status --check --json
    """
    config: Path | None = ctx.obj
    found = asyncio.run(_read(settings_of(config), each, as_json))
    if as_json:
        output.document(found)
    else:
        for line in lines(found):
            output.say(line)
        if each:
            output.say("")
            output.table(COLUMNS, map(_row, found["subscriptions"]))
    if check and needs_a_person(found):
        ctx.exit(output.LOOK)
    if check and not found["ready"]:
        ctx.exit(output.UNREACHABLE)


async def _read(settings: "Settings", each: bool, as_json: bool) -> dict[str, Any]:
    from billingd.admin import status as admin

    async def ask(daemon: "Daemon") -> dict[str, Any]:
        told = {"daemon": True} | await daemon.get("/status", key="outbox")
        return told | (await daemon.get("/subscriptions", key="subscriptions") if each else {})

    async def read(store: "Store") -> dict[str, Any]:
        now = datetime.now(UTC)
        told = {"daemon": False} | await admin.read(
            store,
            source=settings.traffic.source,
            now=now,
            reasons=["the daemon does not answer; read from the store"],
            webhooks={},
            watched=admin.Watched(settings.catch_up.watch_topic, settings.catch_up.every),
        )
        return told | ({"subscriptions": await admin.subscriptions(store, now=now)} if each else {})

    return await ask_or_read(settings, ask, read, quiet=as_json)


def needs_a_person(found: Mapping[str, Any]) -> bool:
    """Whether anything waits for one.

    Units that missed an invoice do as held items or dead letters; the others go on the next by themselves.
    """
    held, drift = found["held"], found.get("drift") or {}
    waits = found["outbox"]["dead"] or held.get("items") or held["plans"] or held["subscriptions"]
    return bool(waits or drift.get("findings") or drift.get("error"))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The document for people."""
    outbox, traffic, held, links = found["outbox"], found["traffic"], found["held"], found["links"]
    webhooks = found["webhooks"]
    waits = outbox["oldest_pending_seconds"]
    lag = traffic["lag_seconds"]
    items = held.get("items", [])
    written = [
        f"billingd  {found['version']}, {'ready' if found['ready'] else 'not ready'}",
        *(f"          {reason}" for reason in found["reasons"] if found.get("daemon", True)),  # else a note
        f"webhooks  {webhooks['accepted']} accepted, {webhooks['duplicates']} duplicates, "
        f"{webhooks['rejected']} rejected",
        *_feed(found.get("catch_up")),
        f"outbox    {outbox['pending']} pending, {outbox['leased']} leased, {outbox['dead']} dead, "
        f"{outbox['done']} done" + ("" if waits is None else f"; the oldest waits for {_length(waits)}"),
        "traffic   nothing read yet"
        if traffic["watermark"] is None
        else f"traffic   read up to {traffic['watermark']}, {_length(lag)} ago",
        f"usage     {traffic['recorded_units']} units recorded, {traffic['reported_units']} reported, "
        f"{traffic['unreported_units']} not ({traffic.get('written_off_units', 0)} of them written off), "
        f"{traffic['unknown_outcomes']} calls of unknown outcome",
        *_periods(found.get("periods")),
        *_drift(found.get("drift")),
        f"held      {_many(len(items), 'item')}: {_many(held['plans'], 'plan')}, "
        f"{_many(held['subscriptions'], 'subscription')}, {_many(held['units'], 'unit')}",
        f"links     {_many(links['plans'], 'plan')}, {_many(links['subscriptions'], 'subscription')}",
    ]
    written += [f"warning   {warning}" for warning in found.get("warnings", [])]
    if outbox["dead"]:
        written.append("look      `billingd outbox list --state dead` shows the dead letters")
    if items:
        written.append("look      `billingd held list` shows what is held, and why")
    return written


COLUMNS: Final = (
    *("SUBSCRIPTION", "NAME", "STATE", "PERIOD ENDS", "RECORDED", "REPORTED", "TO REPORT", "HELD"),
    *("COMPLETE", "LAST ENDED", "UNITS", "CORRECTED", "MISSED"),
)


def _row(subscription: Mapping[str, Any]) -> list[Any]:
    """One subscription in the table: its current period, then the one before."""
    period, last = subscription["period"] or {}, subscription["last_period"] or {}
    complete = {True: "yes", False: "no"}.get(period.get("complete", ""))
    return [
        *(subscription[name] for name in ("subscription", "name", "state")),
        f"{period['ends_at']} (trial)" if period.get("trial") else period.get("ends_at"),
        *(period.get(name) for name in ("recorded_units", "reported_units")),
        *(period.get(name) for name in ("unreported_units", "held_units")),
        complete,
        *(last.get(name) for name in ("ends_at", "units", "corrected_units", "missed_units")),
    ]


def _periods(periods: Mapping[str, Any] | None) -> list[str]:
    """The line about billing periods; a daemon that is still the release before has none."""
    if periods is None:
        return []
    ends = f"the next ends {periods['ends_next']}" if periods["ends_next"] else "no end known"
    return [
        f"periods   {periods['open']} open, {periods['incomplete']} of them not complete, {ends}; "
        f"{periods['missed_units']} units missed the last invoice"
    ]


def _drift(drift: Mapping[str, Any] | None) -> list[str]:
    """The line about the latest reconciliation; a daemon that is still the release before has none."""
    if drift is None:
        return []
    running = "; one is running" if drift["running"] else ""
    if drift.get("error"):
        running += f"; the latest failed: {drift['error']}"
    if drift["checked_at"] is None:
        return [f"drift     never reconciled{running}"]
    return [
        f"drift     {_many(drift['findings'], 'difference')} of {_many(drift['units'], 'unit')}, reconciled "
        f"{drift['checked_at']}{running}"
    ]


def _feed(feed: Mapping[str, Any] | None) -> list[str]:
    """The line about the watch topic; a daemon that is still the release before has none."""
    if feed is None:
        return []
    told = {
        "off": "off: lost webhooks are found by the next resync",
        "missing": f"watch topic {feed['topic']} is missing: `billingd hooks apply` makes it",
        "never": f"watch topic {feed['topic']} was never read",
        "behind": f"watch topic {feed['topic']} is behind: last read to its end {feed['read_at']}",
        "ok": f"watch topic {feed['topic']} read to {feed['position']}, last {feed['read_at']}",
    }
    return [f"feed      {told[feed['state']]}; {_many(feed['events'], 'event')} came by it alone"]


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _length(seconds: float) -> str:
    """Seconds as people say them."""
    return str(timedelta(seconds=int(seconds)))
