"""Insert-unless-there, the one statement that both databases spell through their own dialects."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection as Tx

PARAMETERS_MAX = 30_000
"""Bound parameters in one statement: SQLite takes 32,766, PostgreSQL's protocol 32,767."""


async def insert_new(tx: Tx, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that break no unique constraint, many in one statement; return how many were new."""
    if len(rows) == 1:  # mostly
        return (await tx.execute(_insert_new(tx.dialect.name, table), dict(rows[0]))).rowcount
    new = 0
    size = max(1, PARAMETERS_MAX // len(table.columns))
    for start in range(0, len(rows), size):
        chunk = [dict(row) for row in rows[start : start + size]]
        new += (await tx.execute(_insert_new(tx.dialect.name, table).values(chunk))).rowcount
    return new


async def upsert(tx: Tx, table: sa.Table, row: Mapping[str, Any], *, keep: Sequence[str] = ()) -> None:
    """Insert a row, or bring the one with its primary key up to date, all but the `keep` columns."""
    await tx.execute(_upsert(tx.dialect.name, table, tuple(row), tuple(keep)), dict(row))


# A statement is made once for each table and way to use it: making one takes longer than running it.


@cache
def _insert_new(dialect: str, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    return _insert(dialect, table).inline().on_conflict_do_nothing()


@cache
def _upsert(
    dialect: str, table: sa.Table, names: tuple[str, ...], keep: tuple[str, ...]
) -> postgresql.Insert | sqlite.Insert:
    key = [column.name for column in table.primary_key.columns]
    statement = _insert(dialect, table)
    changed = {name: statement.excluded[name] for name in names if name not in key and name not in keep}
    return statement.inline().on_conflict_do_update(index_elements=key, set_=changed)


def _insert(dialect: str, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT."""
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
