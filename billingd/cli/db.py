"""`db`: the store's schema, its soundness, and safety copies."""

import asyncio
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import opened, settings_of
from billingd.domain.errors import BillingdError

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.group()
def db() -> None:
    """Look after the store.

    \b
    Example:
      billingd db backup /var/backups/billingd.db
      billingd db upgrade
    """


@db.command()
@output.json_option
@click.pass_obj
def upgrade(config: Path | None, as_json: bool) -> None:
    """Bring the schema up to date (`run` does so by itself); on SQLite a copy is made first.

    \b
    Example:
      billingd db upgrade
    """
    done = asyncio.run(_upgrade(settings_of(config)))
    if as_json:
        output.document(done)
        return
    if done["backup"]:
        output.say(f"backup: {done['backup']}")
    output.say(f"schema: {done['before'] or 'empty'} -> {done['after']}")


@db.command()
@output.json_option
@click.pass_obj
def current(config: Path | None, as_json: bool) -> None:
    """Print the schema's revision, and the one this program works with.

    \b
    Example:
      billingd db current
    """
    found = asyncio.run(_current(settings_of(config)))
    if as_json:
        output.document(found)
        return
    output.say(f"store:   {found['current'] or 'empty'}\nprogram: {found['newest']}")


@db.command()
@output.json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Check that the store is sound and that its tables are what this program expects.

    Exits with 3 when they are not.

    \b
    Example:
      billingd db check
    """
    config: Path | None = ctx.obj
    problems = asyncio.run(_check(settings_of(config)))
    if as_json:
        output.document({"sound": not problems, "problems": problems})
    else:
        for problem in problems or ["the store is sound"]:
            output.say(problem)
    if problems:
        output.note("keep a copy of the store as it is, then go back to the newest sound backup")
        ctx.exit(output.LOOK)


@db.command()
@click.argument("to", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@output.json_option
@click.pass_obj
def backup(config: Path | None, to: Path | None, as_json: bool) -> None:
    """Copy a SQLite store, beside a running daemon too, and verify the copy.

    Without FILE the copy lies beside the store, named after the time.

    \b
    Example:
      billingd db backup /var/backups/billingd.db
    """
    copy = asyncio.run(_backup(settings_of(config), to))
    if as_json:
        output.document({"backup": str(copy)})
    else:
        output.say(f"backup: {copy}")


async def _upgrade(settings: "Settings") -> dict[str, Any]:
    """Lock, copy when there is something to lose, migrate."""
    from billingd.store import migrate

    copy = None
    async with opened(settings, lock=True, may_be_missing=True, current=False) as store:
        there = store.path is not None and store.path.exists()
        try:
            await migrate.check(store)
        except migrate.SchemaBehind:
            if there:
                copy = _copy(store, None)
        before, after = await migrate.upgrade(store)
    return {"before": before, "after": after, "backup": None if copy is None else str(copy)}


async def _current(settings: "Settings") -> dict[str, Any]:
    from billingd.store import migrate

    async with opened(settings, current=False) as store:
        return {"current": await migrate.current(store), "newest": migrate.newest()}


async def _check(settings: "Settings") -> list[str]:
    """What is wrong with the store, in the database's words."""
    import sqlalchemy as sa

    from billingd.store import migrate

    problems: list[str] = []
    async with opened(settings) as store:
        if store.sqlite:
            async with store.read() as tx:
                verdicts = (await tx.execute(sa.text("PRAGMA integrity_check"))).scalars().all()
                strays = (await tx.execute(sa.text("PRAGMA foreign_key_check"))).all()
            problems += [str(verdict) for verdict in verdicts if verdict != "ok"]
            problems += [
                f"row {row[1]} of {row[0]} refers to a row of {row[2]} that is missing" for row in strays
            ]
        problems += [f"schema: {difference}" for difference in await migrate.differences(store)]
    return problems


async def _backup(settings: "Settings", to: Path | None) -> Path:
    async with opened(settings, current=False) as store:
        copy = _copy(store, to)
    if copy is None:
        raise BillingdError("`db backup` copies SQLite stores only; use pg_dump for PostgreSQL")
    return copy


def _copy(store: "Store", to: Path | None) -> Path | None:
    from billingd.store import migrate

    try:
        return migrate.backup(store, to, now=datetime.now(UTC))
    except (sqlite3.Error, OSError) as error:
        raise BillingdError(f"cannot copy {store.path} to {to or 'a file beside it'}: {error}") from error
