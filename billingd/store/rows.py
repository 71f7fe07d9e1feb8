"""Insert-unless-there, the one statement that both databases spell through their own dialects."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from billingd.store.engine import Tx

PARAMETERS_MAX = 30_000
"""Bound parameters in one statement: SQLite takes 32,766, PostgreSQL's protocol 32,767."""


def insert(tx: Tx, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, in the dialect of the transaction."""
    return sqlite.insert(table) if tx.dialect.name == "sqlite" else postgresql.insert(table)


async def insert_new(tx: Tx, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that break no unique constraint, many in one statement; return how many were new."""
    new = 0
    size = max(1, PARAMETERS_MAX // len(table.columns))
    for start in range(0, len(rows), size):
        chunk = [dict(row) for row in rows[start : start + size]]
        result = await tx.execute(insert(tx, table).values(chunk).on_conflict_do_nothing())
        new += result.rowcount
    return new


async def upsert(tx: Tx, table: sa.Table, row: Mapping[str, Any], *, keep: Sequence[str] = ()) -> None:
    """Insert a row, or bring the one with its primary key up to date, all but the `keep` columns."""
    key = [column.name for column in table.primary_key.columns]
    statement = insert(tx, table).values(**row)
    changed = {name: statement.excluded[name] for name in row if name not in key and name not in keep}
    await tx.execute(statement.on_conflict_do_update(index_elements=key, set_=changed))
