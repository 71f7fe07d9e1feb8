"""What the database says of itself: faults, strays, tables that differ, and the newest of past times."""

from datetime import datetime
from typing import Final

import sqlalchemy as sa

from billingd.store import migrate
from billingd.store.engine import Store
from billingd.store.schema import events, feed_positions, outbox, usage_records, watermarks

PAST: Final[tuple[sa.Column[datetime], ...]] = (
    events.c.received_at,
    outbox.c.created_at,
    usage_records.c.recorded_at,
    watermarks.c.read_at,
    feed_positions.c.read_at,
)
"""Columns that only ever held the time when a row was written."""


async def problems(store: Store) -> list[str]:
    """What is wrong with the store, in the database's words; nothing when all is well."""
    found: list[str] = []
    if store.sqlite:
        async with store.read() as tx:
            verdicts = (await tx.execute(sa.text("PRAGMA integrity_check"))).scalars().all()
            strays = (await tx.execute(sa.text("PRAGMA foreign_key_check"))).all()
        found += [str(verdict) for verdict in verdicts if verdict != "ok"]
        found += [f"row {row[1]} of {row[0]} refers to a row of {row[2]} that is missing" for row in strays]
    found += [f"schema: {difference}" for difference in await migrate.differences(store)]
    return found


async def newest_times(store: Store) -> dict[str, datetime | None]:
    """The newest of each of `PAST`, by `table.column`."""
    async with store.read() as tx:
        return {
            f"{column.table.name}.{column.name}": (
                await tx.execute(sa.select(sa.func.max(column, type_=column.type)))
            ).scalar_one()
            for column in PAST
        }
