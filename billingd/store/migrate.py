"""The schema's versions: bring a store up to date, tell which it has, refuse one that is newer."""

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
    """The store's revision. Raises StoreBusy when it is newer than this program."""
    at = await current(store)
    if at is not None:
        known(at, "the store")
    return at


def known(revision: str, whose: str) -> None:
    """Raise StoreBusy when this program does not know a revision, which then is newer."""
    all_known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision not in all_known:
        raise StoreBusy(
            f"{whose} has the schema {revision}, which is newer than this program, which knows up to "
            f"{newest()}; install the billingd that wrote it, or restore the backup from before its upgrade"
        )


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
