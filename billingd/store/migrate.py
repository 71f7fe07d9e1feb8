"""The schema's versions: bring a store up to date, tell which it has, refuse one that is newer."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from billingd.domain.errors import BillingdError, StoreBusy
from billingd.store.engine import Store, Tx
from billingd.store.schema import metadata

PACKAGE: Final = Path(__file__).parents[1]


class SchemaBehind(BillingdError):
    """The store's schema is older than this program: `billingd db upgrade` mends it."""


def _config() -> Config:
    """In a wheel the migrations lie inside the package, in a checkout beside it."""
    inside = PACKAGE / "migrations"
    config = Config()
    config.set_main_option(
        "script_location", str(inside if inside.is_dir() else PACKAGE.parent / "migrations")
    )
    return config


def newest() -> str:
    """The revision this program works with."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


async def current(store: Store) -> str | None:
    """The store's revision, or None when it is empty."""

    def revision(connection: sa.Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    async with store.read() as tx:
        return await tx.run_sync(revision)


async def check(store: Store) -> None:
    """Raise StoreBusy when the store is newer than this program, SchemaBehind when it is older."""
    at = await check_known(store)
    if at != newest():
        raise SchemaBehind(
            f"the store's schema is {at or 'empty'}, this program needs {newest()}; run `billingd db upgrade`"
        )


async def check_known(store: Store) -> str | None:
    """The store's revision. Raises StoreBusy, with the way back, when it is newer than this program."""
    at = await current(store)
    if at is not None and not is_known(at):
        raise StoreBusy(_newer(at, "the store") + _way_back(store))
    return at


def is_known(revision: str) -> bool:
    """Whether this program can work with a revision, after an upgrade perhaps."""
    return revision in {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def known(revision: str, whose: str) -> None:
    """Raise StoreBusy when this program does not know a revision, which then is newer."""
    if not is_known(revision):
        raise StoreBusy(_newer(revision, whose) + "install the billingd that wrote it")


def _newer(revision: str, whose: str) -> str:
    return (
        f"{whose} has the schema {revision}, which is newer than this program, which knows up to {newest()}; "
    )


def _way_back(store: Store) -> str:
    """What to do about a newer store: the newest copy from before its upgrade by name, when it lies there."""
    path = store.path
    if path is None:
        return (
            "install the billingd that wrote it, or restore a copy from before its upgrade into an empty "
            "database and set store.url to that"
        )
    for copy in sorted(path.parent.glob(f"{path.name}.*.backup"), reverse=True):  # they are named by time
        revision = _revision_in(copy)
        if revision is not None and is_known(revision):
            return (
                f"install the billingd that wrote it, or go back to schema {revision}: "
                f"billingd db restore {copy}"
            )
    return (
        "install the billingd that wrote it, or restore a copy from before its upgrade: "
        "billingd db restore FILE"
    )


def _revision_in(copy: Path) -> str | None:
    """A SQLite file's revision, or None when none can be read in it."""
    try:
        with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as file:
            row = file.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


@dataclass(frozen=True, slots=True)
class Revision:
    """A version of the schema, and in a sentence what it brings."""

    revision: str
    about: str


def steps_from(revision: str | None) -> list[Revision]:
    """What an upgrade from a revision this program knows (None: from nothing) would run, in order."""
    script = ScriptDirectory.from_config(_config())
    steps = []
    for each in script.walk_revisions("base", "heads"):
        if each.revision == revision:
            break
        steps.append(Revision(each.revision, (each.doc or "").partition("\n")[0].strip()))
    return steps[::-1]


async def upgrade(store: Store) -> tuple[str | None, str]:
    """Migrate to the newest revision in one transaction; return (before, after). Raises StoreBusy."""
    before = await current(store)
    try:
        await check(store)
    except SchemaBehind:
        async with store.write() as tx:
            await upgrade_to(tx, "head")
    return before, newest()


async def upgrade_to(tx: Tx, revision: str) -> None:
    """Migrate to a revision ("head": the newest), which must not be older, in this transaction."""
    config = _config()

    def run(connection: sa.Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    await tx.run_sync(run)


async def differences(store: Store) -> list[str]:
    """How the tables differ from what the program expects; nothing when all is well."""

    def compare(connection: sa.Connection) -> list[str]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(difference) for difference in compare_metadata(context, metadata)]

    async with store.read() as tx:
        return await tx.run_sync(compare)
