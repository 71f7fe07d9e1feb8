"""Reads of the whole ledger that only explaining needs: revisions, totals, what an invoice will hold."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billingd.domain.events import REPORT_USAGE
from billingd.domain.usage import TAG_PREFIX, corrected_tag, pair_hash, usage_intent
from billingd.domain.windows import Window
from billingd.store import history, usage
from billingd.store.engine import Tx
from billingd.store.schema import held, outbox, usage_records
from billingd.store.usage import Recorded


@dataclass(frozen=True, slots=True)
class Line:
    """One usage record as the ledger has it now."""

    tag: str
    quota_id: str
    window: Window
    revision: int
    units: int
    state: str
    recorded_at: datetime
    reported_at: datetime | None
    usage_id: str | None


@dataclass(frozen=True, slots=True)
class Correction:
    """Units of a cycle that was billed before they came; they go onto the next invoice."""

    quota_id: str
    usage_timestamp: datetime
    units: int


def _line(row: sa.Row[Any]) -> Line:
    return Line(
        row.merchant_tag,
        row.quota_id,
        Window(row.window_start, row.window_end),
        row.revision,
        row.units,
        row.state,
        row.recorded_at,
        row.reported_at,
        row.usage_id,
    )


async def revisions(tx: Tx, subscription_id: str, quota_id: str, window: Window) -> list[Line]:
    """Every record of one window (or piece of one), in the order in which they were booked."""
    columns = usage_records.c
    statement = (
        sa.select(usage_records)
        .where(
            columns.subscription_id == subscription_id,
            columns.quota_id == quota_id,
            columns.window_start == window.start,
            columns.window_end == window.end,
        )
        .order_by(columns.revision)
    )
    return [_line(row) for row in await tx.execute(statement)]


async def newest(tx: Tx, subscription_id: str, *, limit: int) -> list[Line]:
    """The newest records of a subscription, the newest first."""
    columns = usage_records.c
    statement = (
        sa.select(usage_records)
        .where(columns.subscription_id == subscription_id)
        .order_by(columns.window_start.desc(), columns.id.desc())
        .limit(limit)
    )
    return [_line(row) for row in await tx.execute(statement)]


async def totals(tx: Tx, subscription_id: str) -> dict[str, dict[str, int]]:
    """Units of a subscription by quota id and state."""
    columns = usage_records.c
    statement = (
        sa.select(columns.quota_id, columns.state, sa.func.sum(columns.units))
        .where(columns.subscription_id == subscription_id)
        .group_by(columns.quota_id, columns.state)
    )
    found: dict[str, dict[str, int]] = {}
    for quota_id, state, units in await tx.execute(statement):
        found.setdefault(quota_id, {})[state] = int(units)
    return found


async def units_of_cycle(tx: Tx, subscription_id: str, start: datetime, end: datetime) -> dict[str, int]:
    """Units by quota id, reported or about to be, with a time in [start, end)."""
    columns = usage_records.c
    statement = (
        sa.select(columns.quota_id, sa.func.sum(columns.units))
        .where(
            columns.subscription_id == subscription_id,
            columns.state.in_(["reported", "recorded"]),
            columns.usage_timestamp >= start,
            columns.usage_timestamp < end,
        )
        .group_by(columns.quota_id)
    )
    return {quota_id: int(units) for quota_id, units in await tx.execute(statement)}


async def corrections(
    tx: Tx, subscription_id: str, quota_ids: Iterable[str], *, since: datetime
) -> list[Correction]:
    """What reached Recurly only since a moment, or still will, with a time before that.

    Late records, and what repairs posted beside records that were billed already, in whichever life.
    """
    columns = usage_records.c
    late = (
        sa.select(columns.quota_id, columns.usage_timestamp, columns.units)
        .where(
            columns.subscription_id == subscription_id,
            columns.usage_timestamp < since,
            sa.or_(columns.state == "recorded", columns.reported_at >= since),
        )
        .order_by(columns.usage_timestamp, columns.id)
    )
    found = [Correction(*row) for row in await tx.execute(late)]
    for quota_id in quota_ids:
        begins = usage_intent(f"{TAG_PREFIX}{pair_hash(subscription_id, quota_id)}:")
        posted = await history.beginning(tx, begins, history.CORRECTED, since=since)
        read_back = await history.beginning(tx, begins, history.CORRECTION_READ_BACK, since=since)
        for entry in (*posted, *(one for one in read_back if history.posted_at(one) >= since)):
            tag = str(corrected_tag(entry.detail["tag"]))
            known = (await usage.by_tags(tx, [tag])).get(tag)
            if known is not None and known.record.usage_timestamp < since:
                found.append(Correction(quota_id, known.record.usage_timestamp, entry.detail["units"]))
    return found


async def action_of(tx: Tx, recorded: Recorded) -> Mapping[str, Any] | None:
    """The newest action that reports a record, while retention keeps it."""
    record = recorded.record
    statement = (
        sa.select(outbox)
        .where(
            outbox.c.kind == REPORT_USAGE,
            outbox.c.subject == f"usage:{record.subscription_id}:{record.quota_id}",
            outbox.c.args["record"].as_integer() == recorded.id,
        )
        .order_by(outbox.c.id.desc())
        .limit(1)
    )
    row = (await tx.execute(statement)).mappings().one_or_none()
    return None if row is None else dict(row)


async def ever_held(
    tx: Tx, *, subject: str | None = None, subscription_id: str | None = None
) -> list[dict[str, Any]]:
    """Everything that was ever held of a subject or of a subscription, the oldest first."""
    statement = sa.select(held).order_by(held.c.id)
    if subject is not None:
        statement = statement.where(held.c.subject == subject)
    if subscription_id is not None:
        statement = statement.where(held.c.subscription_id == subscription_id)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]
