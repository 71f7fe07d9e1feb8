"""What Amplify shows no more without having said that it was deleted, and the deletions that it told of."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import absences, events, plan_links, usage_records

Kind = Literal["plan", "subscription"]

IDS_MAX: Final = 10_000
"""Ids in one statement: both databases bound its parameters."""

_DELETED: Final = sa.text("events.type = 'ResourceDeleted'")
"""Spelt out, or SQLite would not know that the index of deletions serves."""

_AT: Final = sa.func.coalesce(events.c.happened_at, events.c.received_at)
_EVENT_KINDS: Final[Mapping[str, str]] = {
    "plan": "ProductPlan",
    "quota": "Quota",
    "subscription": "Subscription",
}


@dataclass(frozen=True, slots=True)
class Absence:
    """A plan or subscription that is not found at Amplify since a look at it.

    `held`: a person is asked; `confirmed_at`: a person has said that this one is gone.
    """

    kind: str
    id: str
    name: str
    title: str
    since: datetime
    held: bool = False
    confirmed_at: datetime | None = None

    @property
    def what(self) -> str:
        """The same word as `kind`, which is what a step of a resync calls it."""
        return self.kind


_ALL: Final = sa.select(*(absences.c[name] for name in Absence.__slots__)).order_by(
    absences.c.kind, absences.c.id
)
_ONE: Final = _ALL.where(absences.c.kind == sa.bindparam("of_kind"), absences.c.id == sa.bindparam("of_id"))
"""Made once, for it is asked of whatever is looked at: making it takes longer than running it."""


async def find(tx: Tx, kind: Kind, id_: str) -> Absence | None:
    """What is noted of one."""
    row = (await tx.execute(_ONE, {"of_kind": kind, "of_id": id_})).one_or_none()
    return None if row is None else Absence(*row)


async def everything(tx: Tx) -> list[Absence]:
    """All that is noted."""
    return [Absence(*row) for row in await tx.execute(_ALL)]


async def note(tx: Tx, absence: Absence) -> None:
    """One is absent; what is noted of it already stays as it is, unless by a clock that was ahead."""
    row: dict[str, Any] = {name: getattr(absence, name) for name in Absence.__slots__}
    if not await insert_new(tx, absences, [row]):
        this = sa.and_(absences.c.kind == absence.kind, absences.c.id == absence.id)
        ahead = sa.update(absences).where(this, absences.c.since > absence.since)
        await tx.execute(ahead.values(since=absence.since))


async def hold(tx: Tx, kind: Kind, ids: Collection[str]) -> None:
    """A person is asked about these."""
    await _set(tx, kind, ids, held=True)


async def confirm(tx: Tx, kind: Kind, ids: Collection[str], *, now: datetime) -> None:
    """A person has said that these are gone; nothing is said of one that has been seen again."""
    await _set(tx, kind, ids, confirmed_at=now)


async def clear(tx: Tx, kind: Kind, ids: Collection[str]) -> int:
    """These were seen again, or are dealt with; how many were noted."""
    cleared = 0
    for some in _chunks(ids):
        gone = sa.delete(absences).where(absences.c.kind == kind, absences.c.id.in_(some))
        cleared += (await tx.execute(gone)).rowcount
    return cleared


async def _set(tx: Tx, kind: Kind, ids: Collection[str], **values: Any) -> None:
    for some in _chunks(ids):
        these = sa.and_(absences.c.kind == kind, absences.c.id.in_(some))
        await tx.execute(sa.update(absences).where(these).values(**values))


async def deleted(tx: Tx, kind: Kind | Literal["quota"], ids: Collection[str]) -> dict[str, datetime]:
    """When Amplify said that these were deleted, of those of which it did: never later than it told."""
    found: dict[str, datetime] = {}
    for some in _chunks(ids):
        told = (
            sa.select(events.c.resource_id, sa.func.min(_AT))
            .where(events.c.kind == _EVENT_KINDS[kind], events.c.resource_id.in_(some), _DELETED)
            .where(events.c.source == "amplify")
            .group_by(events.c.resource_id)
        )
        found |= {row[0]: row[1] for row in await tx.execute(told)}
    return found


async def deleted_with_product(tx: Tx, plan_ids: Collection[str]) -> dict[str, datetime]:
    """When the product of these linked plans was deleted, of those of which Amplify said so.

    A name may be used again: one that was deleted before the plan was linked was another product.
    """
    found: dict[str, datetime] = {}
    for some in _chunks(plan_ids):
        told = (
            sa.select(plan_links.c.plan_id, sa.func.min(events.c.happened_at))
            .join(events, events.c.name == plan_links.c.product_name)
            .where(plan_links.c.plan_id.in_(some), events.c.kind == "Product", _DELETED)
            .where(events.c.source == "amplify", events.c.happened_at >= plan_links.c.linked_at)
            .group_by(plan_links.c.plan_id)
        )
        found |= {row[0]: row[1] for row in await tx.execute(told)}
    return found


async def served_until(tx: Tx, subscription_id: str) -> datetime | None:
    """The end of the last window in which a subscription was counted to be served; None: never was."""
    statement = sa.select(sa.func.max(usage_records.c.window_end)).where(
        usage_records.c.subscription_id == subscription_id
    )
    until: datetime | None = (await tx.execute(statement)).scalar_one()
    return until


def _chunks(ids: Collection[str]) -> list[list[str]]:
    listed = list(ids)
    return [listed[start : start + IDS_MAX] for start in range(0, len(listed), IDS_MAX)]
