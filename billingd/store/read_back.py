"""Usage that Recurly holds and the ledger does not know (any more), and what follows from learning of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from billingd.domain.sending import idempotency_key
from billingd.domain.usage import UsageRecord, usage_intent
from billingd.domain.windows import BRIDGE_MAX, floor
from billingd.store import intents
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import subscription_links, unlinked_traffic, usage_records, watermarks


@dataclass(frozen=True, slots=True)
class Waiting:
    """A record of the ledger that is not known to be at Recurly."""

    quota_id: str
    usage_timestamp: datetime


async def waiting(tx: Tx, subscription_id: str) -> list[Waiting]:
    """The records of a subscription that are not reported (held and written-off ones too), in time."""
    columns = usage_records.c
    statement = (
        sa.select(columns.quota_id, columns.usage_timestamp)
        .where(
            columns.subscription_id == subscription_id,
            sa.text("usage_records.state <> 'reported'"),  # as the partial index has it
        )
        .order_by(columns.usage_timestamp)
    )
    return [Waiting(*row) for row in await tx.execute(statement)]


@dataclass(frozen=True, slots=True)
class Taken:
    """A record that Recurly has, its id there, and since when."""

    record: UsageRecord
    usage_id: str
    at: datetime


async def insert(tx: Tx, taken: Sequence[Taken], *, now: datetime) -> int:
    """Put records into the ledger as reported; return how many were new."""
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
            "state": "reported",
            "recorded_at": now,
            "reported_at": one.at,
            "usage_id": one.usage_id,
        }
        for one in taken
        for record in [one.record]
    ]
    return await insert_new(tx, usage_records, rows) if rows else 0


async def learn_correction(tx: Tx, tag: str, usage_id: str, *, now: datetime) -> bool:
    """Recurly has the correction with that tag: its intent is done, whoever sent it. False: known already."""
    name = usage_intent(tag)
    intent = await intents.find(tx, name)
    if intent is not None and intent.state == "done":
        return False
    if intent is None:  # no body: it was not sent from here
        key = idempotency_key(name, 1, "")
        await intents.opened(tx, name, None, epoch=1, key=key, body_hash="", first_sent_at=now, now=now)
    await intents.done(tx, name, result=usage_id)
    return True


async def begin_earlier(tx: Tx, subscription_id: str, usage_from: datetime) -> None:
    """Usage of this subscription counts from that moment on, if it did not before."""
    columns = subscription_links.c
    await tx.execute(
        sa.update(subscription_links)
        .where(columns.subscription_id == subscription_id, columns.usage_from > usage_from)
        .values(usage_from=usage_from)
    )


async def read_again(
    tx: Tx, subscription_id: str, since: datetime, *, horizon: timedelta, now: datetime
) -> datetime | None:
    """Let traffic since a moment be read again, of which this subscription's may have been nobody's.

    What lies within `horizon` of a watermark is read again anyhow, where its windows have their length since
    then. Else all is read from there on, also what was read in another length or never: the poll reads each
    window that is recorded as a whole (`domain.windows.next_length`). Returns the earliest moment that is
    read again because of this, None when none is.
    """
    moved: list[datetime] = []
    first = since
    for row in (await tx.execute(sa.select(watermarks).with_for_update())).all():
        length = timedelta(seconds=row.window_seconds)
        edge = floor(since, length)
        first = min(first, edge)
        if edge < max(row.regular_since, row.at - horizon) and edge < row.at:
            while (cut := await _cut_at(tx, edge)) is not None:  # no record may be left out in part
                edge = floor(cut, length)
            since_then = min(row.regular_since, edge)
            mine = sa.update(watermarks).where(watermarks.c.source == row.source)
            await tx.execute(mine.values(at=edge, regular_since=since_then, read_at=now))
            moved.append(edge)
    columns = unlinked_traffic.c
    await tx.execute(
        sa.delete(unlinked_traffic).where(
            columns.subscription_id == subscription_id, columns.window_start >= first
        )
    )
    return min(moved, default=None)


async def _cut_at(tx: Tx, moment: datetime) -> datetime | None:
    """Where the earliest window begins of which something is recorded and that lies on either side."""
    columns = usage_records.c
    statement = sa.select(sa.func.min(columns.window_start)).where(
        columns.window_start >= moment - BRIDGE_MAX,  # none is longer
        columns.window_start < moment,
        columns.window_end > moment,
    )
    begins: datetime | None = (await tx.execute(statement)).scalar_one()
    return begins


async def read_from(tx: Tx, *, horizon: timedelta, now: datetime) -> datetime:
    """From where on every poll reads traffic now."""
    rows = (await tx.execute(sa.select(watermarks))).all()
    return min((max(row.regular_since, row.at - horizon) for row in rows), default=now)
