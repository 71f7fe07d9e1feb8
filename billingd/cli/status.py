"""`status`: how things stand."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_read, settings_of

if TYPE_CHECKING:
    from billingd.cli.talk import Daemon
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.command(short_help="Tell how things stand.")
@click.option("--check", is_flag=True, help="Exit with 3 when there are dead letters or held items.")
@output.json_option
@click.pass_context
def status(ctx: click.Context, check: bool, as_json: bool) -> None:
    """Ask the running daemon how things stand; without one, read the store and say so.

    \b
    Example:
      billingd status
      billingd status --check --json
    """
    config: Path | None = ctx.obj
    found = asyncio.run(_read(settings_of(config), as_json))
    if as_json:
        output.document(found)
    else:
        for line in lines(found):
            output.say(line)
    if check and needs_a_person(found):
        ctx.exit(output.LOOK)


async def _read(settings: "Settings", as_json: bool) -> dict[str, Any]:
    from billingd.admin import status as admin

    async def ask(daemon: "Daemon") -> dict[str, Any]:
        return {"daemon": True} | await daemon.get("/status", key="outbox")

    async def read(store: "Store") -> dict[str, Any]:
        return {"daemon": False} | await admin.read(
            store,
            source=settings.traffic.source,
            now=datetime.now(UTC),
            reasons=["the daemon does not answer; read from the store"],
            webhooks={},
        )

    return await ask_or_read(settings, ask, read, quiet=as_json)


def needs_a_person(found: Mapping[str, Any]) -> bool:
    """Whether anything waits for one."""
    held = found["held"]
    return bool(found["outbox"]["dead"] or held.get("items") or held["plans"] or held["subscriptions"])


def lines(found: Mapping[str, Any]) -> list[str]:
    """The document for people."""
    outbox, traffic, held, links = found["outbox"], found["traffic"], found["held"], found["links"]
    webhooks = found["webhooks"]
    waits = outbox["oldest_pending_seconds"]
    lag = traffic["lag_seconds"]
    items = held.get("items", [])
    written = [
        f"billingd  {found['version']}, {'ready' if found['ready'] else 'not ready'}",
        *(f"          {reason}" for reason in found["reasons"]),
        f"webhooks  {webhooks['accepted']} accepted, {webhooks['duplicates']} duplicates, "
        f"{webhooks['rejected']} rejected",
        f"outbox    {outbox['pending']} pending, {outbox['leased']} leased, {outbox['dead']} dead, "
        f"{outbox['done']} done" + ("" if waits is None else f"; the oldest waits for {_length(waits)}"),
        "traffic   nothing read yet"
        if traffic["watermark"] is None
        else f"traffic   read up to {traffic['watermark']}, {_length(lag)} ago",
        f"usage     {traffic['recorded_units']} units recorded, {traffic['reported_units']} reported, "
        f"{traffic['unreported_units']} to report, {traffic['unknown_outcomes']} calls of unknown outcome",
        f"held      {len(items)} items: {held['plans']} plans, {held['subscriptions']} subscriptions, "
        f"{held['units']} units",
        f"links     {links['plans']} plans, {links['subscriptions']} subscriptions",
    ]
    if outbox["dead"]:
        written.append("look      `billingd outbox list --state dead` shows the dead letters")
    if items:
        written.append("look      `billingd held list` shows what is held, and why")
    return written


def _length(seconds: float) -> str:
    """Seconds as people say them."""
    return str(timedelta(seconds=int(seconds)))
