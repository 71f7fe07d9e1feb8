"""Recorded webhook deliveries."""

from datetime import datetime

import sqlalchemy as sa

from billingd.domain.events import Event
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import events


async def insert(tx: Tx, event: Event, *, now: datetime) -> bool:
    """Record a delivery; False when its id is known already, which changes nothing."""
    row = {
        "source": event.source,
        "id": event.id,
        "type": event.type,
        "kind": event.kind,
        "name": event.name,
        "resource_id": event.resource_id,
        "subresource": event.subresource,
        "correlation_id": event.correlation_id,
        "received_at": now,
    }
    return await insert_new(tx, events, [row]) == 1


async def count(tx: Tx) -> int:
    """How many deliveries are recorded."""
    return int((await tx.execute(sa.select(sa.func.count()).select_from(events))).scalar_one())


async def latest(tx: Tx, *, limit: int) -> list[dict[str, object]]:
    """The newest deliveries, newest first."""
    statement = sa.select(events).order_by(events.c.received_at.desc()).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def forget(tx: Tx, *, before: datetime) -> int:
    """Drop deliveries received before a moment; their ids may then be accepted anew."""
    return (await tx.execute(sa.delete(events).where(events.c.received_at < before))).rowcount
