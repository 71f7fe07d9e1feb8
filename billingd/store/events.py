"""Recorded events, each once, whichever way it came."""

from collections.abc import Collection
from datetime import datetime
from typing import Final, Literal

import sqlalchemy as sa

from billingd.domain.events import Event
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import add_on_links, events, outbox, plan_links, subscription_links

_LINKED: Final = (
    sa.exists().where(
        events.c.kind == "Subscription",
        subscription_links.c.subscription_id == events.c.resource_id,
        subscription_links.c.state != "ended",
    ),
    sa.exists().where(
        events.c.kind == "ProductPlan",
        plan_links.c.plan_id == events.c.resource_id,
        plan_links.c.state != "removed",
    ),
    sa.exists().where(
        events.c.kind == "Product",
        plan_links.c.product_name == events.c.name,
        plan_links.c.state != "removed",
    ),
    sa.exists().where(events.c.kind == "Quota", add_on_links.c.quota_id == events.c.resource_id),
)
"""That what an event is about is linked."""

Via = Literal["webhook", "feed"]
"""The way an event came; what came by webhook after the feed had shown it is kept as `both`."""


async def insert(tx: Tx, event: Event, *, now: datetime, via: Via = "webhook") -> bool:
    """Record an event; False when its id is known already, which changes nothing."""
    row = {
        "source": event.source,
        "id": event.id,
        "type": event.type,
        "kind": event.kind,
        "name": event.name,
        "resource_id": event.resource_id,
        "subresource": event.subresource,
        "correlation_id": event.correlation_id,
        "via": via,
        "happened_at": None if event.happened_at is None else min(event.happened_at, now),
        "received_at": now,
    }
    return await insert_new(tx, events, [row]) == 1


async def delivered(tx: Tx, event: Event) -> bool:
    """Note that a webhook brought what the feed had shown before; False when one had brought it already."""
    moved = await tx.execute(
        sa.update(events)
        .where(events.c.source == event.source, events.c.id == event.id, events.c.via == "feed")
        .values(via="both")
    )
    return moved.rowcount == 1


async def known(tx: Tx, source: str, ids: Collection[str]) -> set[str]:
    """Which of these ids are recorded."""
    statement = sa.select(events.c.id).where(events.c.source == source, events.c.id.in_(ids))
    return set((await tx.execute(statement)).scalars())


async def count(tx: Tx) -> int:
    """How many events webhooks have brought."""
    statement = sa.select(sa.func.count()).select_from(events).where(events.c.via != "feed")
    return int((await tx.execute(statement)).scalar_one())


async def count_caught_up(tx: Tx) -> int:
    """How many events only the feed has shown: webhooks lost them, or were slower."""
    statement = sa.select(sa.func.count()).select_from(events).where(events.c.via == "feed")
    return int((await tx.execute(statement)).scalar_one())


async def latest(tx: Tx, *, limit: int) -> list[dict[str, object]]:
    """The newest deliveries, newest first."""
    statement = sa.select(events).order_by(events.c.received_at.desc()).limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def first_change(tx: Tx, subscription_id: str, *, after: datetime) -> datetime | None:
    """When the state or approval of a subscription first changed after a moment, as far as events tell."""
    statement = (
        sa.select(sa.func.min(events.c.happened_at))
        .where(events.c.source == "amplify", events.c.kind == "Subscription")
        .where(events.c.resource_id == subscription_id, events.c.subresource.in_(["approval", "state"]))
        .where(events.c.happened_at > after)
    )
    changed: datetime | None = (await tx.execute(statement)).scalar_one()
    return changed


async def forget(tx: Tx, *, before: datetime) -> int:
    """Drop deliveries received before a moment; their ids may then be accepted anew.

    One that told of a deletion stays while what was deleted is linked: nothing else tells when it was over.
    So does whatever an action is still to heed.
    """
    waits = sa.text("outbox.state IN ('pending', 'leased')")  # as the partial indexes have it
    heeded = sa.select(outbox.c.event_id).where(waits, outbox.c.event_id.is_not(None))
    deletion = sa.and_(events.c.type == "ResourceDeleted", sa.or_(*_LINKED))
    old = sa.delete(events).where(events.c.received_at < before)
    return (await tx.execute(old.where(events.c.id.not_in(heeded), ~deletion))).rowcount
