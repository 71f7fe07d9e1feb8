"""What the page shows of the store. Every read here ends at a limit or within an index range, so that a page
costs the same however long the ledger is; where a limit was met, the numbers say "at least".
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.drift import PRICE_DIFFERS
from billingd.store.engine import Tx
from billingd.store.schema import (
    drift,
    events,
    held,
    history,
    intents,
    outbox,
    unlinked_traffic,
    usage_records,
    watermarks,
)

COUNT_MAX: Final = 10_000
"""Rows that are counted or added up; of more it is known only that there are more."""

_UNFINISHED: Final = sa.text("outbox.state IN ('pending', 'leased')")
_DEAD: Final = sa.text("outbox.state = 'dead'")
_OPEN: Final = sa.text("intents.state = 'open'")
UNREPORTED: Final = sa.text("usage_records.state <> 'reported'")
"""Written out as the partial indexes have them: with bound words SQLite would not use these."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Rows and the units in them; `since` is the time of the oldest. `more`: there are more than that."""

    rows: int = 0
    units: int = 0
    since: datetime | None = None
    more: bool = False


async def count(tx: Tx, table: sa.Table, where: sa.ColumnElement[bool] | sa.TextClause) -> Sum:
    """How many rows of a table are so, up to the limit."""
    some = sa.select(sa.literal(1)).select_from(table).where(where).limit(COUNT_MAX + 1).subquery()
    return _capped(int((await tx.execute(sa.select(sa.func.count()).select_from(some))).scalar_one()))


def _capped(rows: int, units: int = 0, since: datetime | None = None) -> Sum:
    return Sum(min(rows, COUNT_MAX), units, since, rows > COUNT_MAX)


async def unfinished(tx: Tx) -> Sum:
    """Actions that are not settled, the earliest due first; `since` is when the oldest of them was made."""
    columns = outbox.c
    some = (
        sa.select(columns.created_at)
        .where(_UNFINISHED)
        .order_by(columns.due_at, columns.id)
        .limit(COUNT_MAX + 1)
        .subquery()
    )
    rows, since = (await tx.execute(sa.select(sa.func.count(), sa.func.min(some.c.created_at)))).one()
    return _capped(int(rows), since=since)


async def failing(tx: Tx, *, before: datetime) -> Sum:
    """Actions made before a moment that fail again and again; what only waits for something does not count.

    Of those due last, for a failure puts its action off: so they are found behind any backlog.
    """
    columns = outbox.c
    some = (
        sa.select(columns.created_at, columns.attempt, columns.error)
        .where(_UNFINISHED)
        .order_by(columns.due_at.desc(), columns.id.desc())
        .limit(COUNT_MAX + 1)
        .subquery()
    )
    fails = sa.and_(some.c.attempt > 1, some.c.error.is_not(None), some.c.created_at < before)
    counted = sa.select(sa.func.count(), sa.func.min(some.c.created_at)).where(fails)
    rows, since = (await tx.execute(counted)).one()
    return _capped(int(rows), since=since)


async def next_due(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """The actions that are due first."""
    statement = sa.select(outbox).where(_UNFINISHED).order_by(outbox.c.due_at, outbox.c.id).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def dead_count(tx: Tx) -> Sum:
    """How many dead letters there are."""
    return await count(tx, outbox, _DEAD)


async def dead(tx: Tx, *, after: int, limit: int) -> list[dict[str, Any]]:
    """Dead letters in order, after an id."""
    statement = sa.select(outbox).where(_DEAD, outbox.c.id > after).order_by(outbox.c.id).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def settled(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """The actions that were settled last, the newest first."""
    columns = outbox.c
    statement = (
        sa.select(columns.kind, columns.subject, columns.state, columns.error, columns.settled_at)
        .where(columns.settled_at.is_not(None))
        .order_by(columns.settled_at.desc())
        .limit(limit)
    )
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


@dataclass(frozen=True, slots=True)
class Stake:
    """What stands held of one kind; `amounts` are decimal texts with their currency."""

    kind: str
    items: int
    units: int
    amounts: tuple[tuple[str, str], ...]


async def stakes(tx: Tx) -> tuple[list[Stake], bool]:
    """What stands held, by kind; and whether there is more than was looked at."""
    columns = held.c
    statement = (
        sa.select(columns.kind, columns.units, columns.amount, columns.currency)
        .where(columns.closed_at.is_(None))
        .order_by(columns.kind, columns.subject)
        .limit(COUNT_MAX + 1)
    )
    rows = (await tx.execute(statement)).all()
    found = []
    for kind in dict.fromkeys(row.kind for row in rows[:COUNT_MAX]):
        mine = [row for row in rows[:COUNT_MAX] if row.kind == kind]
        amounts = tuple((row.amount, row.currency) for row in mine if row.amount is not None)
        found.append(Stake(kind, len(mine), sum(row.units or 0 for row in mine), amounts))
    return found, len(rows) > COUNT_MAX


async def standing(tx: Tx, *, after: int, limit: int) -> list[dict[str, Any]]:
    """Held items by kind and subject, those that follow the item with an id (0: from the first)."""
    columns = held.c
    statement = (
        sa.select(held)
        .where(columns.closed_at.is_(None))
        .order_by(columns.kind, columns.subject)
        .limit(limit)
    )
    place = (await tx.execute(sa.select(columns.kind, columns.subject).where(columns.id == after))).first()
    if place is not None:
        statement = statement.where(sa.tuple_(columns.kind, columns.subject) > tuple(place))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def standing_of(tx: Tx, kinds: Collection[str], *, limit: int) -> list[str]:
    """The reasons of held items of these kinds."""
    statement = (
        sa.select(held.c.reason)
        .where(held.c.closed_at.is_(None), held.c.kind.in_(sorted(kinds)))
        .order_by(held.c.kind, held.c.subject)
        .limit(limit)
    )
    return list((await tx.execute(statement)).scalars())


async def unreported(tx: Tx) -> dict[str, Sum]:
    """Usage records that Recurly does not have, by state; `since` is when the oldest of them was recorded."""
    columns = usage_records.c
    some = (
        sa.select(columns.state, columns.units, columns.recorded_at)
        .where(UNREPORTED)
        .limit(COUNT_MAX + 1)
        .subquery()
    )
    statement = sa.select(
        some.c.state, sa.func.count(), sa.func.sum(some.c.units), sa.func.min(some.c.recorded_at)
    ).group_by(some.c.state)
    rows = (await tx.execute(statement)).all()
    more = sum(int(row[1]) for row in rows) > COUNT_MAX
    return {state: Sum(int(count), int(units), since, more) for state, count, units, since in rows}


async def last_report(tx: Tx, *, among: int) -> datetime | None:
    """When a usage record was last reported, of the newest records."""
    some = sa.select(usage_records.c.reported_at).order_by(usage_records.c.id.desc()).limit(among).subquery()
    found: datetime | None = (await tx.execute(sa.select(sa.func.max(some.c.reported_at)))).scalar_one()
    return found


async def doubtful(tx: Tx) -> Sum:
    """Writes to Recurly of which no clear outcome is known."""
    return await count(tx, intents, _OPEN)


async def unanswered(tx: Tx, *, before: datetime) -> Sum:
    """Those of them that nobody has been sending since a moment."""
    columns = intents.c
    idle = sa.or_(columns.gave_up_at.is_(None), columns.gave_up_at < before)
    return await count(tx, intents, sa.and_(_OPEN, columns.last_sent_at < before, idle))


async def unlinked(tx: Tx) -> Sum:
    """Traffic that belongs to no linked subscription."""
    some = sa.select(unlinked_traffic.c.units).limit(COUNT_MAX + 1).subquery()
    rows, units = (await tx.execute(sa.select(sa.func.count(), sa.func.sum(some.c.units)))).one()
    return _capped(int(rows), int(units or 0))


async def read_at(tx: Tx, source: str) -> datetime | None:
    """When a source was last read, successfully."""
    statement = sa.select(watermarks.c.read_at).where(watermarks.c.source == source)
    found: datetime | None = (await tx.execute(statement)).scalar_one_or_none()
    return found


async def events_since(tx: Tx, moment: datetime) -> Sum:
    """Events that came since a moment, whichever way."""
    return await count(tx, events, events.c.received_at >= moment)


async def last_events(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """The newest events, the newest first."""
    statement = sa.select(events).order_by(events.c.received_at.desc()).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def last_history(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """What was decided or tried last, the newest first."""
    statement = sa.select(history).order_by(history.c.id.desc()).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def findings(tx: Tx, run_id: int, *, limit: int) -> tuple[list[dict[str, Any]], Sum]:
    """Findings of a reconciliation that nothing has mended: the first of them, and how many.

    Prices that differ are shown last: existing subscriptions keep them for ever.
    """
    some = (
        sa.select(drift)
        .where(drift.c.reconciliation_id == run_id)
        .order_by(drift.c.id)
        .limit(COUNT_MAX + 1)
        .subquery()
    )
    unmended = some.c.mended.is_(None)
    counted = sa.select(
        sa.func.count(),
        sa.func.sum(sa.case((unmended, 1), else_=0)),
        sa.func.sum(sa.case((unmended, some.c.units), else_=0)),
    )
    looked_at, rows, units = (await tx.execute(counted)).one()
    last = sa.case((some.c.kind == PRICE_DIFFERS, 1), else_=0)
    statement = sa.select(some).where(unmended).order_by(last, some.c.id).limit(limit)
    found = [dict(row) for row in (await tx.execute(statement)).mappings()]
    return found, Sum(min(int(rows or 0), COUNT_MAX), int(units or 0), None, looked_at > COUNT_MAX)
