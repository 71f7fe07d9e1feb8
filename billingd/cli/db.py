"""`db`: the store's schema, its soundness, and safety copies."""

import asyncio
import sqlite3
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.reach import opened, settings_of
from billingd.domain.errors import BillingdError

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.copies import Copy, Restored, Tell
    from billingd.store.engine import Store

REDRAW_SECONDS: Final = 0.2


@click.group()
def db() -> None:
    """Look after the store.

    \b
    Example:
      billingd db backup /var/backups/billingd.db
      billingd db upgrade
    """


@db.command()
@click.option("--dry-run", is_flag=True, help="Say what would be done; beside a running daemon too.")
@output.json_option
@click.pass_obj
def upgrade(config: Path | None, dry_run: bool, as_json: bool) -> None:
    """Bring the schema up to date (`run` does so by itself); on SQLite a verified copy is made first.

    On PostgreSQL make one with `billingd db backup`, or with its own means.

    \b
    Example:
      billingd db upgrade --dry-run
      billingd db upgrade
    """
    if dry_run:
        _print_plan(asyncio.run(_planned(settings_of(config))), as_json=as_json)
        return
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
        output.note("what is damaged: keep a copy, then `billingd db restore FILE` with the newest backup")
        ctx.exit(output.LOOK)


@db.command()
@click.argument("to", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@output.json_option
@click.pass_obj
def backup(config: Path | None, to: Path | None, as_json: bool) -> None:
    """Copy the store, beside a running daemon too, and verify the copy by opening it.

    The copy is one SQLite file whichever database the store is in, and can be restored into either. Without
    FILE it lies beside a SQLite store, else in the current directory, named after the time.

    \b
    Example:
      billingd db backup /var/backups/billingd.db
    """
    copy = asyncio.run(_backup(settings_of(config), to))
    if as_json:
        output.document({"backup": str(copy)})
    else:
        output.say(f"backup: {copy}")


@db.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.json_option
@click.pass_obj
def restore(config: Path | None, file: Path, yes: bool, as_json: bool) -> None:
    """Put a safety copy in the store's place; stop the daemon first.

    The store as it is now is kept under another name. The next start of the daemon reads back from Recurly
    what was sent since the copy was made, before it sends anything: nothing is billed twice. Forgotten is
    what people decided since (held items released or written off, actions discarded), and some notices may
    be sent again.

    \b
    Example:
      billingd db restore /var/backups/billingd.db
    """
    settings = settings_of(config)
    copy = _inspected(file)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise click.UsageError("it replaces the store: add --yes, or answer on a terminal")
        output.note(_meaning(copy, settings.store.url))
        click.confirm("Put it in the store's place?", abort=True, err=True)
    done = asyncio.run(_restore(settings, file))
    if as_json:
        output.document(_restored(done))
        return
    output.say(f"restored: {file} ({_made_at(done.copy.copied_at)})")
    if done.set_aside is not None:
        output.say(f"the store that was there: {done.set_aside}")
    output.note("the next start reads Recurly back before it sends anything; `billingd status` says when")


async def _planned(settings: "Settings") -> dict[str, Any]:
    """What an upgrade would do; nothing is made or locked for it, not even a store that is missing."""
    from billingd.store import migrate

    there, before = True, None
    async with opened(settings, may_be_missing=True, current=False) as store:
        if store.path is not None:
            there = store.path.exists()
        if there:
            before = await migrate.check_known(store)
        steps = migrate.steps_from(before)
        backup = bool(steps) and there and store.path is not None
        database = store.url.get_backend_name()
    return {
        "dry_run": True,
        "before": before,
        "after": migrate.newest(),
        "revisions": [{"revision": step.revision, "about": step.about} for step in steps],
        "backup": backup,
        "database": database,
    }


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.document(plan)
        return
    output.say(f"schema: {plan['before'] or 'empty'} -> {plan['after']}")
    if not plan["revisions"]:
        output.say("nothing to do")
        return
    if plan["backup"]:
        output.say("first: a verified copy of the store beside it")
    elif plan["database"] != "sqlite" and plan["before"] is not None:
        output.say("first: no copy is made on PostgreSQL; `billingd db backup` makes one")
    for step in plan["revisions"]:
        output.say(f"  {step['revision']}: {step['about']}")
    output.note("nothing was changed")


async def _upgrade(settings: "Settings") -> dict[str, Any]:
    """Lock, copy when there is something to lose, migrate."""
    from billingd.store import copies, migrate

    copy = None
    async with opened(settings, lock=True, may_be_missing=True, current=False) as store:
        there = store.path is not None and store.path.exists()
        try:
            await migrate.check(store)
        except migrate.SchemaBehind:
            if there:
                copy = copies.before_upgrade(store, now=datetime.now(UTC))
        with copies.one_kept(store, copy):
            before, after = await migrate.upgrade(store)
    return {"before": before, "after": after, "backup": None if copy is None else str(copy)}


async def _current(settings: "Settings") -> dict[str, Any]:
    from billingd.store import migrate

    async with opened(settings, current=False) as store:
        return {"current": await migrate.current(store), "newest": migrate.newest()}


async def _check(settings: "Settings") -> list[str]:
    """What is wrong with the store, in the database's words."""
    from billingd.store import integrity
    from billingd.store.engine import StoreDamaged
    from billingd.store.migrate import SchemaBehind

    try:
        async with opened(settings) as store:
            return await integrity.problems(store)
    except (StoreDamaged, SchemaBehind) as error:
        return [str(error)]


async def _backup(settings: "Settings", to: Path | None) -> Path:
    from billingd.store import copies

    async with opened(settings, current=False) as store:
        try:
            return await copies.backup(store, to, now=datetime.now(UTC), tell=_tell())
        except (sqlite3.Error, OSError) as error:
            raise _not_copied(store, to, error) from error


def _not_copied(store: "Store", to: Path | None, error: Exception) -> BillingdError:
    name = store.path or store.url.render_as_string(hide_password=True)
    if to is not None and not to.parent.is_dir():
        return BillingdError(f"there is no directory {to.parent}; make it first")
    return BillingdError(f"cannot copy {name} to {to or 'a file beside it'}: {error}")


def _inspected(file: Path) -> "Copy":
    from billingd.store import copies

    return copies.inspect(file)


async def _restore(settings: "Settings", file: Path) -> "Restored":
    from billingd.store import copies

    async with opened(settings, lock=True, may_be_missing=True, current=False) as store:
        try:
            return await copies.restore(store, file, now=datetime.now(UTC), tell=_tell())
        except (sqlite3.Error, OSError) as error:
            name = store.path or store.url.render_as_string(hide_password=True)
            raise BillingdError(f"cannot put {file} in the place of {name}: {error}") from error


def _meaning(copy: "Copy", url: str) -> str:
    """What a restore does, for whoever decides on it."""
    import sqlalchemy as sa

    rows = sum(number for name, number in copy.rows.items() if name != "alembic_version")
    store = sa.make_url(url).render_as_string(hide_password=True)
    return (
        f"{copy.path} was copied {_made_at(copy.copied_at)}; schema {copy.revision}, {rows} rows, "
        f"{copy.rows.get('usage_records', 0)} of them usage records.\n"
        f"It takes the place of {store}, which is kept under another name.\n"
        "What was sent to Recurly since is read back at the next start, before anything else is sent.\n"
        "Lost is what people decided since (held items released or written off, actions discarded); notices "
        "may be sent again."
    )


def _made_at(copied_at: datetime | None) -> str:
    from billingd.admin.status import timestamp

    return "at an unknown time" if copied_at is None else f"at {timestamp(copied_at)}"


def _restored(done: "Restored") -> dict[str, Any]:
    from billingd.admin.status import timestamp

    copied_at = done.copy.copied_at
    return {
        "restored": str(done.copy.path),
        "copied_at": None if copied_at is None else timestamp(copied_at),
        "schema": done.copy.revision,
        "rows": {name: number for name, number in done.copy.rows.items() if name != "alembic_version"},
        "set_aside": None if done.set_aside is None else str(done.set_aside),
    }


def _tell() -> "Tell":
    """A line on the terminal that says how far it got; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda _what, _done: None
    last = 0.0

    def tell(what: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last > REDRAW_SECONDS:
            last = time.monotonic()
            click.echo(f"\x1b[K{what}: {done:,}\r", nl=False, err=True)

    return tell
