"""What the page shows of subscriptions: a page of them, their units in the last days, and what waits.

As everything in `store.glance`, each read ends at a limit or within an index range.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import sqlalchemy as sa

from billingd.domain.delivery import OVER
from billingd.domain.drift import WRONG_AMOUNT
from billingd.store import glance, links
from billingd.store.engine import Tx
from billingd.store.glance import UNREPORTED, Sum, count
from billingd.store.links import SubscriptionLink
from billingd.store.schema import add_on_links, drift, plan_links, subscription_links, usage_records

QUOTAS_AT_ONCE: Final = 500
"""Quotas that one statement names, so that the database reads just some days of each in the index."""


async def linked(tx: Tx) -> Sum:
    """How many subscriptions are or were linked."""
    return await count(tx, subscription_links, sa.true())


@dataclass(frozen=True, slots=True)
class Linked:
    """A subscription and the title of its plan."""

    link: SubscriptionLink
    plan: str


_LINKED: Final = (
    sa.select(*(subscription_links.c[name] for name in SubscriptionLink.__slots__), plan_links.c.title)
    .join(plan_links, plan_links.c.plan_id == subscription_links.c.plan_id)
    .order_by(subscription_links.c.subscription_id)
)


async def _linked(tx: Tx, where: sa.ColumnElement[bool], limit: int) -> list[Linked]:
    rows = await tx.execute(_LINKED.where(where).limit(limit))
    return [Linked(links.subscription_of(row[:-1]), row[-1]) for row in rows]


async def subscriptions(tx: Tx, *, after: str, limit: int) -> list[Linked]:
    """Subscriptions in the order of their ids, after one."""
    return await _linked(tx, subscription_links.c.subscription_id > after, limit)


async def waiting_subscriptions(tx: Tx, *, limit: int) -> list[Linked]:
    """Subscriptions of which units are recorded or held, and not reported."""
    columns = usage_records.c
    some = (
        sa.select(columns.subscription_id)
        .where(UNREPORTED, columns.state.in_(["recorded", "held"]))
        .order_by(columns.subscription_id)
        .limit(glance.COUNT_MAX)
        .subquery()
    )
    ids = list((await tx.execute(sa.select(some.c.subscription_id).distinct().limit(limit))).scalars())
    return await _linked(tx, subscription_links.c.subscription_id.in_(ids), limit) if ids else []


async def titles(tx: Tx, ids: Collection[str]) -> dict[str, str]:
    """What people call these subscriptions, those that are linked."""
    columns = subscription_links.c
    named = sa.func.coalesce(sa.func.nullif(columns.title, ""), columns.name)
    statement = sa.select(columns.subscription_id, named).where(columns.subscription_id.in_(sorted(ids)))
    return {name: str(title) for name, title in await tx.execute(statement)}


@dataclass(frozen=True, slots=True)
class Bar:
    """Units of one subscription in one stretch of time, by state; `billed` of those that are reported.

    Where quotas are many, several of these are to be added up.
    """

    subscription_id: str
    stretch: int
    state: str
    units: int
    billed: int


async def bars(tx: Tx, shown: Sequence[Linked], *, starts: Sequence[datetime]) -> list[Bar]:
    """Units of these subscriptions, by the stretch that their window begins in: from one start to the next.

    Billed is what was reported before the period began that is open now, or of a subscription that is over.
    """
    columns, link, add_on = usage_records.c, subscription_links.c, add_on_links.c
    plans = sorted({one.link.plan_id for one in shown})
    named = sa.select(add_on.quota_id, add_on.plan_id).where(add_on.plan_id.in_(plans))
    quotas = (await tx.execute(named.order_by(add_on.plan_id))).all()
    stretch = sa.case(
        *((columns.window_start >= start, number) for number, start in reversed(list(enumerate(starts)))),
        else_=0,
    ).label("stretch")
    invoiced = sa.and_(
        columns.state == "reported",
        sa.or_(columns.reported_at < link.period_started_at, link.billed_state.in_(sorted(OVER))),
    )
    statement = (
        sa.select(
            columns.subscription_id,
            stretch,
            columns.state,
            sa.func.sum(columns.units),
            sa.func.sum(sa.case((invoiced, columns.units), else_=0)),
        )
        .join(subscription_links, link.subscription_id == columns.subscription_id)
        .where(columns.window_start >= starts[0])
        .group_by(columns.subscription_id, stretch, columns.state)
    )
    found = []
    for first in range(0, len(quotas), QUOTAS_AT_ONCE):
        some = dict(tuple(row) for row in quotas[first : first + QUOTAS_AT_ONCE])
        theirs = [one.link.subscription_id for one in shown if one.link.plan_id in some.values()]
        rows = await tx.execute(
            statement.where(columns.subscription_id.in_(theirs), columns.quota_id.in_(list(some)))
        )
        found += [
            Bar(name, int(at), state, int(units), int(billed)) for name, at, state, units, billed in rows
        ]
    return found


@dataclass(frozen=True, slots=True)
class Waiting:
    """Units of a subscription that Recurly does not have: of the open period, and of those before it.

    Where no period is open, all of them are `missed`. `more`: not all of them were added up.
    """

    unreported: int = 0
    held: int = 0
    missed: int = 0
    more: bool = False


async def waiting(tx: Tx, shown: Sequence[Linked], *, now: datetime) -> dict[str, Waiting]:
    """What of these subscriptions is recorded or held, and not reported, by their ids."""
    columns, link = usage_records.c, subscription_links.c
    open_ = sa.and_(
        columns.usage_timestamp >= link.period_started_at,
        link.period_ends_at > now,
        sa.or_(link.billed_state.is_(None), link.billed_state.not_in(sorted(OVER))),
    )
    some = (
        sa.select(
            columns.subscription_id,
            sa.case((open_, columns.units), else_=0).label("fits"),
            columns.units,
            columns.state,
            link.period_started_at,
        )
        .join(subscription_links, link.subscription_id == columns.subscription_id)
        .where(
            UNREPORTED,
            columns.state.in_(["recorded", "held"]),
            columns.subscription_id.in_([one.link.subscription_id for one in shown]),
        )
        .limit(glance.COUNT_MAX + 1)
        .subquery()
    )
    statement = sa.select(
        some.c.subscription_id,
        sa.func.count(),
        sa.func.sum(sa.case((some.c.state == "recorded", some.c.fits), else_=0)),
        sa.func.sum(sa.case((some.c.state == "held", some.c.fits), else_=0)),
        sa.func.sum(sa.case((some.c.period_started_at.is_(None), 0), else_=some.c.units - some.c.fits)),
    ).group_by(some.c.subscription_id)
    rows = (await tx.execute(statement)).all()
    more = sum(int(row[1]) for row in rows) > glance.COUNT_MAX
    found = {name: Waiting(int(a), int(b), int(c), more) for name, _, a, b, c in rows}
    return {one.link.subscription_id: Waiting(more=more) for one in shown} | found


async def served_beyond(tx: Tx, run_id: int, shown: Sequence[Linked], *, since: datetime) -> dict[str, int]:
    """What Amplify counted beyond the ledger (negative: less) in windows since a moment, by subscription id.

    As the reconciliation found it, and nothing has mended since.
    """
    some = (
        sa.select(drift)
        .where(drift.c.reconciliation_id == run_id)
        .order_by(drift.c.id)
        .limit(glance.COUNT_MAX)
        .subquery()
    )
    signed = sa.case((some.c.kind == WRONG_AMOUNT, -some.c.units), else_=some.c.units)
    statement = (
        sa.select(some.c.subscription_id, sa.func.sum(signed))
        .where(
            some.c.mended.is_(None),
            some.c.window_start >= since,
            some.c.subject.startswith("window:"),
            some.c.subscription_id.in_([one.link.subscription_id for one in shown]),
        )
        .group_by(some.c.subscription_id)
    )
    return {name: int(units) for name, units in await tx.execute(statement)}
