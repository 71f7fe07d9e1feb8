"""`held`: what waits for a person because it cannot be billed honestly."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_change, ask_or_read, settings_of
from billingd.cli.talk import Daemon, Declined

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.group(short_help="Look at what cannot be billed honestly; release it.")
def held() -> None:
    """Look at what cannot be billed honestly, and try it again once the cause is mended.

    Works over the running daemon, or without one on the store itself.

    \b
    Example:
      billingd held list
      billingd held release 3
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


@held.command()
@click.argument("held_id", metavar="ID", type=click.IntRange(min=1))
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
