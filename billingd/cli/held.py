"""`held`: what waits for a person because it cannot be billed honestly."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_change, ask_or_read, settings_of
from billingd.cli.talk import Daemon, Declined
from billingd.domain.money import shown

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.group(short_help="Look at what cannot be billed honestly; release it, or write it off.")
def held() -> None:
    """Look at what cannot be billed honestly; try it again once the cause is mended, or give it up.

    Works over the running daemon, or without one on the store itself.

    \b
    Example:
      billingd held list
      billingd held release 3
      billingd held write-off 4 --reason "credited by hand"
    """


@held.command("list")
@output.json_option
@click.pass_obj
def list_(config: Path | None, as_json: bool) -> None:
    """List what is held: kind, reason, units, and the money at stake.

    \b
    Example:
      billingd held list --json
    """
    items = asyncio.run(_list(settings_of(config), quiet=as_json))
    if as_json:
        output.document({"held": items})
        return
    columns = ("id", "kind", "subject", "units", "amount", "currency", "since", "reason")
    output.table([name.upper() for name in columns], ([item[name] for name in columns] for item in items))
    if output.terminal():
        output.say(_totals(items))


@held.command()
@click.argument("held_id", metavar="ID", type=output.ID)
@output.json_option
@click.pass_obj
def release(config: Path | None, held_id: int, as_json: bool) -> None:
    """Try a held item again; it is held anew when its cause still stands.

    \b
    Example:
      billingd held release 3
    """
    asyncio.run(_release(settings_of(config), held_id, quiet=as_json))
    if as_json:
        output.document({"released": held_id})
    else:
        output.say(f"held item {held_id} will be tried again")


@held.command("write-off")
@click.argument("held_id", metavar="ID", type=output.ID)
@click.option("--reason", required=True, metavar="TEXT", help="Why it is given up; kept with the item.")
@output.json_option
@click.pass_obj
def write_off(config: Path | None, held_id: int, reason: str, as_json: bool) -> None:
    """Give held usage up for good: it is never sent to Recurly.

    So are findings closed that there is nothing to send for: a reading that shrank, a record that billingd
    did not make or that was billed twice. They are held again only when the facts change.

    \b
    Example:
      billingd held write-off 3 --reason "below what a correction costs us"
    """
    if not reason.strip():
        raise click.BadParameter("say in a few words why this is written off", param_hint="--reason")
    asyncio.run(_write_off(settings_of(config), held_id, reason, quiet=as_json))
    if as_json:
        output.document({"written_off": held_id})
    else:
        output.say(f"held item {held_id} is written off")


def _totals(items: Sequence[Mapping[str, Any]]) -> str:
    """All that is held in one line: units, and money by currency."""
    money: dict[str, Decimal] = {}
    for item in items:
        if item["amount"] is not None:
            money[item["currency"]] = money.get(item["currency"], Decimal(0)) + Decimal(item["amount"])
    units = sum(item["units"] or 0 for item in items)
    at_stake = ", ".join(f"{shown(amount)} {currency}" for currency, amount in sorted(money.items()))
    return f"{len(items)} item(s), {units} unit(s); at stake: {at_stake or 'no amount known'}"


async def _list(settings: "Settings", *, quiet: bool) -> list[dict[str, Any]]:
    async def ask(daemon: Daemon) -> list[dict[str, Any]]:
        return list((await daemon.get("/held", key="held"))["held"])

    async def read(store: "Store") -> list[dict[str, Any]]:
        from billingd.admin import status
        from billingd.store import held as statements

        async with store.read() as tx:
            return [status.held_item(item) for item in await statements.standing(tx)]

    return await ask_or_read(settings, ask, read, quiet=quiet)


async def _release(settings: "Settings", held_id: int, *, quiet: bool) -> None:
    async def ask(daemon: Daemon) -> None:
        await daemon.post(f"/held/{held_id}/release", key="released")

    async def change(store: "Store") -> None:
        from billingd.admin import operations

        if not await operations.release(store, held_id, now=datetime.now(UTC)):
            raise Declined(f"there is no held item {held_id}; `billingd held list` shows those there are")

    await ask_or_change(settings, ask, change, quiet=quiet)


async def _write_off(settings: "Settings", held_id: int, reason: str, *, quiet: bool) -> None:
    async def ask(daemon: Daemon) -> None:
        await daemon.post(f"/held/{held_id}/write-off", {"reason": reason}, key="written_off")

    async def change(store: "Store") -> None:
        from billingd.admin import operations

        if not await operations.write_off(store, held_id, reason=reason, now=datetime.now(UTC)):
            raise Declined(f"there is no held item {held_id}; `billingd held list` shows those there are")

    await ask_or_change(settings, ask, change, quiet=quiet)
