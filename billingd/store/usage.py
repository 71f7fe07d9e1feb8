"""The ledger of usage records: recorded once, then reported or held; never rewritten."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billingd.domain.usage import UsageRecord
from billingd.domain.windows import Window
from billingd.store.engine import Tx
from billingd.store.rows import PARAMETERS_MAX, upsert
from billingd.store.schema import add_on_links, subscription_links, unlinked_traffic, usage_records

Pair = tuple[str, str]
"""(subscription id, quota id)"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A usage record with its place in the ledger, and where it belongs at Recurly.

    `state` recorded | reported | held.
    """

    id: int
    record: UsageRecord
    state: str
    usage_id: str | None
    recorded_at: datetime
    subscription_uuid: str
    subscription_state: str
    add_on_code: str


@dataclass(frozen=True, slots=True)
class Sum:
    """What is recorded of one (subscription, quota, window): units in all, and the newest revision."""

    units: int
    revisions: int


async def insert(
    tx: Tx, records: Sequence[UsageRecord], *, now: datetime, state: str = "recorded"
) -> list[tuple[int, UsageRecord]]:
    """Add records to the ledger; return them with their ids, in order."""
    placed: list[tuple[int, UsageRecord]] = []
    by_tag = {record.merchant_tag: record for record in records}
    size = PARAMETERS_MAX // len(usage_records.columns)
    rows = [
        {
            "subscription_id": record.subscription_id,
            "quota_id": record.quota_id,
            "window_start": record.window.start,
            "window_end": record.window.end,
            "revision": record.revision,
            "units": record.units,
            "usage_timestamp": record.usage_timestamp,
            "merchant_tag": record.merchant_tag,
            "state": state,
            "recorded_at": now,
        }
        for record in records
    ]
    for start in range(0, len(rows), size):
        statement = (
            sa.insert(usage_records)
            .values(rows[start : start + size])
            .returning(usage_records.c.id, usage_records.c.merchant_tag)
        )
        placed += [(row.id, by_tag[row.merchant_tag]) for row in await tx.execute(statement)]
    return sorted(placed, key=lambda pair: pair[0])


async def sums(tx: Tx, start: datetime, end: datetime) -> dict[tuple[str, str, Window], Sum]:
    """What is recorded of every (subscription, quota, window) that begins in [start, end)."""
    columns = usage_records.c
    statement = (
        sa.select(
            columns.subscription_id,
            columns.quota_id,
            columns.window_start,
            columns.window_end,
            sa.func.sum(columns.units).label("units"),
            sa.func.max(columns.revision).label("revisions"),
        )
        .where(columns.window_start >= start, columns.window_start < end)
        .group_by(columns.subscription_id, columns.quota_id, columns.window_start, columns.window_end)
    )
    return {
        (row.subscription_id, row.quota_id, Window(row.window_start, row.window_end)): Sum(
            int(row.units), row.revisions
        )
        for row in await tx.execute(statement)
    }


async def find(tx: Tx, record_id: int) -> Recorded:
    """A record by its id, which must exist."""
    statement = (
        sa.select(
            usage_records,
            subscription_links.c.uuid,
            subscription_links.c.state.label("link_state"),
            add_on_links.c.add_on_code,
        )
        .join(subscription_links, subscription_links.c.subscription_id == usage_records.c.subscription_id)
        .join(add_on_links, add_on_links.c.quota_id == usage_records.c.quota_id)
        .where(usage_records.c.id == record_id)
    )
    row = (await tx.execute(statement)).one()
    record = UsageRecord(
        row.subscription_id,
        row.quota_id,
        Window(row.window_start, row.window_end),
        row.revision,
        row.units,
        row.usage_timestamp,
        row.merchant_tag,
    )
    return Recorded(
        row.id, record, row.state, row.usage_id, row.recorded_at, row.uuid, row.link_state, row.add_on_code
    )


async def reported(tx: Tx, record_id: int, *, usage_id: str, now: datetime) -> None:
    """Recurly holds this record under `usage_id`."""
    await _move(tx, record_id, ("recorded", "held"), state="reported", usage_id=usage_id, reported_at=now)


async def hold(tx: Tx, record_id: int) -> bool:
    """This record cannot be reported honestly; False when it was not waiting."""
    return await _move(tx, record_id, ("recorded",), state="held")


async def release(tx: Tx, record_id: int) -> bool:
    """Try this held record again; False when it was not held."""
    return await _move(tx, record_id, ("held",), state="recorded")


async def _move(tx: Tx, record_id: int, leaves: tuple[str, ...], **values: Any) -> bool:
    moved = await tx.execute(
        sa.update(usage_records)
        .where(usage_records.c.id == record_id, usage_records.c.state.in_(leaves))
        .values(**values)
    )
    return moved.rowcount == 1


async def unreported_of(tx: Tx, subscription_id: str) -> int:
    """How many records of a subscription are still to be reported (held ones left out)."""
    statement = (
        sa.select(sa.func.count())
        .select_from(usage_records)
        .where(
            usage_records.c.subscription_id == subscription_id,
            usage_records.c.state == "recorded",
            sa.text("usage_records.state <> 'reported'"),  # as the partial index has it
        )
    )
    return int((await tx.execute(statement)).scalar_one())


async def totals(tx: Tx) -> dict[str, int]:
    """Units in the ledger by state."""
    statement = sa.select(usage_records.c.state, sa.func.sum(usage_records.c.units)).group_by(
        usage_records.c.state
    )
    return {state: int(units) for state, units in await tx.execute(statement)}


async def totals_by_subscription(tx: Tx) -> dict[str, dict[str, int]]:
    """Units in the ledger by subscription id and state."""
    columns = usage_records.c
    statement = sa.select(columns.subscription_id, columns.state, sa.func.sum(columns.units)).group_by(
        columns.subscription_id, columns.state
    )
    result: dict[str, dict[str, int]] = {}
    for subscription_id, state, units in await tx.execute(statement):
        result.setdefault(subscription_id, {})[state] = int(units)
    return result


async def by_window(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """The newest windows with their records and units, newest first."""
    columns = usage_records.c
    reported_units = sa.func.sum(sa.case((columns.state == "reported", columns.units), else_=0))
    statement = (
        sa.select(
            columns.window_start,
            columns.window_end,
            sa.func.count().label("records"),
            sa.func.sum(columns.units).label("recorded_units"),
            reported_units.label("reported_units"),
        )
        .group_by(columns.window_start, columns.window_end)
        .order_by(columns.window_start.desc())
        .limit(limit)
    )
    return [
        {
            "window_start": row.window_start,
            "window_end": row.window_end,
            "records": row.records,
            "recorded_units": int(row.recorded_units),
            "reported_units": int(row.reported_units),
        }
        for row in await tx.execute(statement)
    ]


async def set_unlinked(
    tx: Tx, subscription_id: str, quota_id: str, window_start: datetime, units: int, *, now: datetime
) -> None:
    """Traffic that belongs to no linked subscription: counted and shown, never dropped in silence."""
    row = {
        "subscription_id": subscription_id,
        "quota_id": quota_id,
        "window_start": window_start,
        "units": units,
        "read_at": now,
    }
    await upsert(tx, unlinked_traffic, row)


async def forget_unlinked(tx: Tx, keys: Sequence[tuple[str, str, datetime]]) -> None:
    """Traffic of (subscription, quota, window start) that belongs to a link after all."""
    if not keys:
        return
    starts = [start for _, _, start in keys]
    columns = unlinked_traffic.c
    statement = sa.select(columns.subscription_id, columns.quota_id, columns.window_start).where(
        columns.window_start.between(min(starts), max(starts))
    )
    standing = {tuple(row) for row in await tx.execute(statement)}
    for subscription_id, quota_id, start in standing.intersection(keys):
        await tx.execute(
            sa.delete(unlinked_traffic).where(
                columns.subscription_id == subscription_id,
                columns.quota_id == quota_id,
                columns.window_start == start,
            )
        )


async def unlinked_units(tx: Tx) -> int:
    """All units that belong to no linked subscription."""
    total = (await tx.execute(sa.select(sa.func.sum(unlinked_traffic.c.units)))).scalar_one()
    return int(total or 0)
