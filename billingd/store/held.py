"""What waits for a person because it cannot be billed honestly."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.attempts import Action
from billingd.domain.drift import AUDITED, HELD
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import held

RELEASED: Final = "released by an operator"
"""The resolution of what a person released."""

WRITTEN_OFF: Final = "written off: "
"""How the resolution of what was written off begins; the operator's reason follows."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Something held: `kind` says which sort, `subject` what, `reason` why, in a sentence for a person.

    `action` is what to do when it is released. `units`, `amount` (decimal text) and `currency` say what is
    at stake, where that is known.
    """

    kind: str
    subject: str
    reason: str
    action: Action | None = None
    subscription_id: str | None = None
    add_on_code: str | None = None
    units: int | None = None
    amount: str | None = None
    currency: str | None = None


async def add(tx: Tx, hold: Hold, *, now: datetime) -> bool:
    """Hold something; True when it was not held already (then somebody should be told).

    What is held already keeps its beginning and takes the newest reason. What was written off stays so for
    as long as the same is said of it, in units and in words: other units, or other records, are new.
    """
    action = hold.action
    row: dict[str, Any] = {
        "kind": hold.kind,
        "subject": hold.subject,
        "subscription_id": hold.subscription_id,
        "add_on_code": hold.add_on_code,
        "units": hold.units,
        "amount": hold.amount,
        "currency": hold.currency,
        "reason": hold.reason,
        "action": None
        if action is None
        else {"kind": action.kind, "subject": action.subject, "args": dict(action.args)},
    }
    standing = sa.and_(held.c.kind == hold.kind, held.c.subject == hold.subject, held.c.closed_at.is_(None))
    moved = await tx.execute(sa.update(held).where(standing).values(**row))
    if moved.rowcount or await _written_off(tx, hold):
        return False
    return await insert_new(tx, held, [row | {"since": now}]) == 1


async def _written_off(tx: Tx, hold: Hold) -> bool:
    """Whether this was the last that was held of its subject, and a person wrote it off."""
    statement = (
        sa.select(held.c.units, held.c.reason, held.c.resolution)
        .where(held.c.kind == hold.kind, held.c.subject == hold.subject)
        .order_by(held.c.id.desc())
        .limit(1)
    )
    last = (await tx.execute(statement)).one_or_none()
    if last is None or not (last.resolution or "").startswith(WRITTEN_OFF):
        return False
    return bool(last.units == hold.units and last.reason == hold.reason)


_STANDING: Final = sa.select(held).where(held.c.closed_at.is_(None)).order_by(held.c.id)
_STANDING_OF_SUBJECT: Final = _STANDING.where(held.c.subject == sa.bindparam("of_subject"))
_STANDING_OF_KIND: Final = _STANDING.where(held.c.kind == sa.bindparam("of_kind"))
_CLOSE: Final = sa.update(held).where(
    held.c.subject == sa.bindparam("of_subject"),
    held.c.closed_at.is_(None),
    held.c.kind != sa.bindparam("but_kind"),
)
"""Made once, for these are asked often: making one takes longer than running it."""


async def close(tx: Tx, *, subject: str, resolution: str, now: datetime, but_kind: str | None = None) -> int:
    """Whatever was held of a subject (but for one kind) is no longer; return how many."""
    given = {"of_subject": subject, "but_kind": but_kind or "", "closed_at": now, "resolution": resolution}
    return (await tx.execute(_CLOSE, given)).rowcount


async def close_one(tx: Tx, held_id: int, *, resolution: str, now: datetime) -> bool:
    """One held item is no longer; False when it was not standing."""
    moved = await tx.execute(
        sa.update(held)
        .where(held.c.id == held_id, held.c.closed_at.is_(None))
        .values(closed_at=now, resolution=resolution)
    )
    return moved.rowcount == 1


async def write_off(tx: Tx, held_id: int, *, reason: str, now: datetime) -> bool:
    """A person gives one held item up, and says why; False when it was not standing."""
    return await close_one(tx, held_id, resolution=WRITTEN_OFF + reason, now=now)


async def find(tx: Tx, held_id: int) -> Mapping[str, Any] | None:
    """One held item."""
    row = (await tx.execute(sa.select(held).where(held.c.id == held_id))).mappings().one_or_none()
    return None if row is None else dict(row)


async def standing(tx: Tx, *, subject: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Everything held now, the oldest first."""
    if subject is not None:
        found = await tx.execute(_STANDING_OF_SUBJECT, {"of_subject": subject})
    elif kind is not None:
        found = await tx.execute(_STANDING_OF_KIND, {"of_kind": kind})
    else:
        found = await tx.execute(_STANDING)
    return [dict(row) for row in found.mappings() if kind is None or row["kind"] == kind]


async def written_off(tx: Tx, subscription_id: str | None) -> list[dict[str, Any]]:
    """What a person has given up of a subscription; None: of what belongs to no subscription."""
    statement = sa.select(held).where(
        held.c.subscription_id == subscription_id, held.c.resolution.startswith(WRITTEN_OFF)
    )
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def decided(tx: Tx, subscription_id: str, kind: str, *, since: datetime) -> list[dict[str, Any]]:
    """What a person released or wrote off of a subscription since a moment."""
    columns = held.c
    by_hand = sa.or_(columns.resolution == RELEASED, columns.resolution.startswith(WRITTEN_OFF))
    of_it = sa.and_(columns.subscription_id == subscription_id, columns.kind == kind)
    statement = sa.select(held).where(of_it, columns.closed_at >= since, by_hand)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def by_person(tx: Tx, subscription_id: str | None) -> set[str]:
    """Subjects of what an audit or a run found of a subscription, and a person wrote off.

    Who releases one has it looked at again, and decides nothing.
    """
    found = sa.or_(*(held.c.subject.startswith(prefix) for prefix in (AUDITED, HELD)))
    by_hand = held.c.resolution.startswith(WRITTEN_OFF)
    statement = sa.select(held.c.subject).where(held.c.subscription_id == subscription_id, found, by_hand)
    return set((await tx.execute(statement)).scalars())


async def count(tx: Tx) -> dict[str, int]:
    """How many things are held, how many of them plans and subscriptions, and how many units are at stake."""
    part = sa.func.substr(held.c.subject, 1, 5)
    plans = sa.func.sum(sa.case((part == "plan:", 1), else_=0))
    subscriptions = sa.func.sum(sa.case((part == "subsc", 1), else_=0))
    units = sa.func.sum(sa.func.abs(sa.func.coalesce(held.c.units, 0)))  # too much and too little, both are
    statement = sa.select(sa.func.count(), plans, subscriptions, units).where(held.c.closed_at.is_(None))
    numbers = (await tx.execute(statement)).one()
    names = ("standing", "plans", "subscriptions", "units")
    return {name: int(number or 0) for name, number in zip(names, numbers, strict=True)}
