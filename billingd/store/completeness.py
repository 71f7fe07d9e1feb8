"""How much of each billing period reached its invoice, or still will."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.delivery import OVER
from billingd.store.engine import Tx
from billingd.store.schema import billing_periods, subscription_links, usage_records

NEWEST: Final = 2
"""Periods looked at of each subscription: the current one and the one before."""

Key = tuple[str, datetime]
"""(subscription id, start of the period)"""


@dataclass(frozen=True, slots=True)
class CurrentPeriod:
    """A billing period that is not over, by what is recorded of it so far.

    `unreported_units` will still be sent; `held_units` miss the invoice unless a person releases them. Units
    written off are recorded, and none of the others.
    """

    started_at: datetime
    ends_at: datetime
    trial: bool
    recorded_units: int
    reported_units: int
    unreported_units: int
    held_units: int

    @property
    def complete(self) -> bool:
        """Nothing that is recorded of it waits; traffic that was not read yet is not known here."""
        return not self.unreported_units and not self.held_units


@dataclass(frozen=True, slots=True)
class ClosedPeriod:
    """The newest billing period that is over.

    `corrected_units` reached Recurly after its end, and come as a correction on the next invoice;
    `missed_units` have not reached it: held, or still to be sent. Units written off are among `units` alone.
    """

    started_at: datetime
    ends_at: datetime
    trial: bool
    units: int
    corrected_units: int
    missed_units: int

    @property
    def complete(self) -> bool:
        """Every unit was there when its invoice was made, or a person wrote it off."""
        return not self.corrected_units and not self.missed_units


@dataclass(frozen=True, slots=True)
class Completeness:
    """The periods of one subscription; None where none is known."""

    current: CurrentPeriod | None = None
    last: ClosedPeriod | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """All subscriptions together: `open` periods, of these `incomplete`, and when the next of them ends.

    `missed_units` are those of the last closed periods; a trial has no invoice that they could miss.
    """

    open: int
    incomplete: int
    ends_next: datetime | None
    missed_units: int


async def of_all(tx: Tx, *, now: datetime) -> dict[str, Completeness]:
    """The periods of every subscription of which one is known, by its id.

    A record belongs to the period that its usage timestamp lies in. A period is over when its end has come,
    when a later one is known, or when the subscription is over at Recurly: what is sent after that is late.
    """
    reported: dict[Key, tuple[int, int]] = {}
    for row in await tx.execute(_reported()):
        reported[row.subscription_id, row.started_at] = int(row.units), int(row.late)
    return await _put_together(tx, reported, now)


async def summary(tx: Tx, *, now: datetime) -> Summary:
    """What `of_all` says in four numbers, without a look at what is reported, which is most of the ledger."""
    known = (await _put_together(tx, {}, now)).values()
    current = [one.current for one in known if one.current is not None]
    return Summary(
        open=len(current),
        incomplete=sum(not one.complete for one in current),
        ends_next=min((one.ends_at for one in current), default=None),
        missed_units=sum(one.last.missed_units for one in known if one.last and not one.last.trial),
    )


async def _put_together(
    tx: Tx, reported: Mapping[Key, tuple[int, int]], now: datetime
) -> dict[str, Completeness]:
    waiting: dict[Key, dict[str, int]] = defaultdict(dict)
    for row in await tx.execute(_not_reported()):
        waiting[row.subscription_id, row.started_at][row.state] = int(row.units)
    current: dict[str, CurrentPeriod] = {}
    last: dict[str, ClosedPeriod] = {}
    for row in await tx.execute(_periods()):
        name, key = row.subscription_id, (row.subscription_id, row.started_at)
        waits, (there, late) = waiting[key], reported.get(key, (0, 0))
        recorded = there + sum(waits.values())
        unreported, held = waits.get("recorded", 0), waits.get("held", 0)
        period = (row.started_at, row.ends_at, row.trial)
        if row.newness == 1 and row.ends_at > now and row.billed_state not in OVER:
            current[name] = CurrentPeriod(*period, recorded, there, unreported, held)
        elif name not in last:
            last[name] = ClosedPeriod(*period, recorded, late, unreported + held)
    return {
        name: Completeness(current.get(name), last.get(name)) for name in sorted(current.keys() | last.keys())
    }


def _newest() -> sa.Subquery:
    """The newest periods of each subscription, the newest as number 1."""
    columns = billing_periods.c
    newness = sa.func.row_number().over(
        partition_by=columns.subscription_id, order_by=columns.started_at.desc()
    )
    ranked = sa.select(billing_periods, newness.label("newness")).subquery()
    return sa.select(ranked).where(ranked.c.newness <= NEWEST).subquery()


def _periods() -> sa.Select[Any]:
    """They themselves, each subscription's newest first, with the state that Recurly shows."""
    newest = _newest()
    return (
        sa.select(newest, subscription_links.c.billed_state)
        .join(subscription_links, subscription_links.c.subscription_id == newest.c.subscription_id)
        .order_by(newest.c.subscription_id, newest.c.newness)
    )


def _not_reported() -> sa.Select[Any]:
    """Units in them that Recurly does not have, by state."""
    newest = _newest()
    state = usage_records.c.state
    units = sa.func.sum(usage_records.c.units).label("units")
    return (
        sa.select(newest.c.subscription_id, newest.c.started_at, state, units)
        .join(usage_records, _lies_in(newest))
        .where(sa.text("usage_records.state <> 'reported'"))  # as the partial index has it
        .group_by(newest.c.subscription_id, newest.c.started_at, state)
    )


def _reported() -> sa.Select[Any]:
    """Units in them that Recurly has, and how many of these it has only since the period was over."""
    newest = _newest()
    columns = usage_records.c
    late = sa.case((columns.reported_at >= newest.c.ends_at, columns.units), else_=0)
    return (
        sa.select(
            newest.c.subscription_id,
            newest.c.started_at,
            sa.func.sum(columns.units).label("units"),
            sa.func.sum(late).label("late"),
        )
        .join(usage_records, _lies_in(newest))
        .where(columns.state == "reported")
        .group_by(newest.c.subscription_id, newest.c.started_at)
    )


def _lies_in(period: sa.Subquery) -> sa.ColumnElement[bool]:
    return sa.and_(
        usage_records.c.subscription_id == period.c.subscription_id,
        usage_records.c.usage_timestamp >= period.c.started_at,
        usage_records.c.usage_timestamp < period.c.ends_at,
    )
