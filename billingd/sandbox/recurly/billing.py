"""The bill run: closes a cycle, invoices it, opens the next one or ends the subscription."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from heapq import heappop, heappush
from typing import Final

from billingd.sandbox.recurly.invoicing import Draft, issue, period_drafts, trial_drafts, usage_drafts
from billingd.sandbox.recurly.model import Cycle, Subscription
from billingd.sandbox.recurly.periods import boundary
from billingd.sandbox.recurly.state import State

NOTICE: Final = timedelta(days=1)
"""How long before a bill date `renewal.scheduled` comes; days configurable at the real one (4.10)."""


def run_due_bills(state: State) -> int:
    """Bills and announces all that is due, as of each date and in that order; returns how many bills.

    With `bill_run_lag_seconds` a bill runs that much later, still as of its date.
    """
    now, count = state.now(), 0
    lag = timedelta(seconds=state.settings.bill_run_lag_seconds)
    while True:
        bill_at = state.due[0][0] + lag if state.due else None
        if state.reminders and (bill_at is None or state.reminders[0][0] <= bill_at):
            if state.reminders[0][0] > now:
                return count
            remind_at, _, subscription, ends_at = heappop(state.reminders)
            if subscription.live and subscription.cycle.ends_at == ends_at:
                state.announce(subscription, "renewal.scheduled", remind_at)
        elif bill_at is not None and bill_at <= now:
            at, _, subscription = heappop(state.due)
            if subscription.live and subscription.cycle.ends_at == at:  # else it was moved meanwhile
                bill(state, subscription, at)
                count += 1
        else:
            return count


def bring_up(state: State, subscription: Subscription) -> None:
    """Bills what is due on one subscription without waiting for the bill run."""
    while subscription.live and subscription.cycle.ends_at <= state.now():
        bill(state, subscription, subscription.cycle.ends_at)


def bill(state: State, subscription: Subscription, at: datetime) -> None:
    """Closes the current cycle at `at`; earlier than planned, the later bill dates count from there."""
    cycle, ends = subscription.cycle, over(subscription)
    if at != cycle.ends_at:
        subscription.anchor, subscription.periods, cycle.ends_at = at, 0, at
    if at < state.now() and not ends:
        _carry_over(subscription, at)
    if subscription.status == "future":
        begin(state, subscription, at)
        state.announce(subscription, "updated", at)
    elif ends:
        expire(state, subscription, at, "canceled" if subscription.canceled_at else "nonrenewing")
    elif cycle.kind == "paused":
        _after_pause(state, subscription, at)
    elif cycle.kind == "trial":
        _first_payment(state, subscription, at)
        state.announce(subscription, "renewed", at)
    else:
        _renew(state, subscription, at)
    state.touch(subscription)


def begin(state: State, subscription: Subscription, at: datetime) -> None:
    """Starts a subscription with its trial or its first paid cycle.

    Usage logged between the creation and a future start is on the first invoice (UBB, "First invoice").
    """
    subscription.status, subscription.activated_at, subscription.anchor = "active", at, at
    early = usage_drafts(subscription, subscription.cycle, at, zeros=False) if subscription.cycles else []
    trial_ends_at: datetime | None = subscription.given.get("trial_ends_at")
    if trial_ends_at is None:
        _first_payment(state, subscription, at, early)
        return
    cycle = _open(state, subscription, "trial", at, trial_ends_at)
    issue(state, subscription, [*early, *trial_drafts(subscription, cycle)], origin="purchase", at=at)


def expire(state: State, subscription: Subscription, at: datetime, reason: str) -> None:
    """Ends it for good; the final invoice has the usage add-ons even at 0 (UBB:150)."""
    cycle = subscription.cycle
    cycle.ends_at = min(cycle.ends_at, at)
    drafts = usage_drafts(subscription, cycle, at)
    issue(state, subscription, drafts, origin="termination", at=at)
    subscription.status, subscription.expires_at, subscription.expiration_reason = "expired", at, reason
    subscription.pause_cycles = 0
    for attached in subscription.add_ons.values():
        attached.expired_at = at
    state.touch(subscription)
    state.announce(subscription, "expired", at)


def resume(state: State, subscription: Subscription, at: datetime) -> None:
    """Ends a pause at once: a new cycle begins, billed in advance; the pause itself is never billed."""
    subscription.status, subscription.pause_cycles = "active", 0
    subscription.cycle.ends_at = subscription.anchor = at
    subscription.periods = 0
    cycle = _open(state, subscription, "paid", at)
    issue(state, subscription, period_drafts(subscription, cycle), origin="renewal", at=at)
    state.touch(subscription)
    state.announce(subscription, "resumed", at)


def move_bill_date(state: State, subscription: Subscription, to: datetime) -> None:
    """The current cycle ends at `to`, and later ones count from there."""
    if subscription.expires_at == subscription.cycle.ends_at:
        subscription.expires_at = to
    subscription.cycle.ends_at = subscription.anchor = to
    subscription.periods = 0
    schedule(state, subscription, state.now())


def schedule(state: State, subscription: Subscription, at: datetime) -> None:
    """Puts the current cycle's end on the heap of bill dates, and announces it a day before, or at once."""
    ends_at, order = subscription.cycle.ends_at, state.identifiers.order()
    heappush(state.due, (ends_at, order, subscription))
    if subscription.cycle.kind == "before":
        return
    if ends_at - NOTICE <= at:
        state.announce(subscription, "renewal.scheduled", at)
    else:
        heappush(state.reminders, (ends_at - NOTICE, order, subscription, ends_at))


def term_ends_at(subscription: Subscription) -> datetime:
    """The end of the current term, by the plan's interval and the cycles that remain."""
    plan, cycles = subscription.plan, subscription.periods + subscription.remaining_billing_cycles
    if subscription.cycle.kind != "paid":
        cycles += 1
    return boundary(subscription.anchor, plan.interval_unit, plan.interval_length, cycles)


def over(subscription: Subscription) -> bool:
    """Whether it ends with its current cycle."""
    cycle = subscription.cycle
    if subscription.status == "canceled":
        return subscription.expires_at is not None and subscription.expires_at <= cycle.ends_at
    term_over = subscription.remaining_billing_cycles == 0 and not subscription.auto_renew
    return cycle.kind == "paid" and term_over


def _carry_over(subscription: Subscription, at: datetime) -> None:
    """Usage from after the end of the cycle, taken before the bill run came, is of the next one."""
    number = subscription.cycle.number
    for attached in subscription.add_ons.values():
        for record in list(attached.book.open.get(number, {}).values()):
            if record.usage_timestamp >= at:
                attached.book.move(record, number + 1)


def _first_payment(
    state: State, subscription: Subscription, at: datetime, early: Sequence[Draft] = ()
) -> None:
    """The first invoice has no usage line: nothing has been used yet (UBB:114)."""
    subscription.term_started_at = at
    next_bill_date: datetime | None = subscription.given.pop("next_bill_date", None)
    cycle = _open(state, subscription, "paid", at, next_bill_date)
    rate = _proration(subscription, cycle) if next_bill_date else Decimal(1)
    drafts = [*early, *period_drafts(subscription, cycle, rate)]
    issue(state, subscription, drafts, origin="purchase", at=at)


def _renew(state: State, subscription: Subscription, at: datetime) -> None:
    drafts = usage_drafts(subscription, subscription.cycle, at)
    if subscription.pause_cycles and subscription.status == "active":
        subscription.status = "paused"
        _open(state, subscription, "paused", at)
    else:
        _next_in_term(subscription, at)
        drafts += period_drafts(subscription, _open(state, subscription, "paid", at))
    issue(state, subscription, drafts, origin="renewal", at=at)
    state.announce(subscription, "paused" if subscription.status == "paused" else "renewed", at)


def _after_pause(state: State, subscription: Subscription, at: datetime) -> None:
    subscription.pause_cycles -= 1
    if subscription.pause_cycles > 0:
        _open(state, subscription, "paused", at)
        return
    subscription.status = "active"
    _next_in_term(subscription, at)
    cycle = _open(state, subscription, "paid", at)
    issue(state, subscription, period_drafts(subscription, cycle), origin="renewal", at=at)
    state.announce(subscription, "resumed", at)


def _next_in_term(subscription: Subscription, at: datetime) -> None:
    """Counts the term down; at its end, a renewal begins another."""
    if subscription.remaining_billing_cycles > 0:
        subscription.remaining_billing_cycles -= 1
        return
    subscription.total_billing_cycles = subscription.renewal_billing_cycles
    subscription.remaining_billing_cycles = subscription.renewal_billing_cycles - 1
    subscription.term_started_at = at
    for attached in subscription.add_ons.values():
        attached.term_units = 0


def _open(
    state: State, subscription: Subscription, kind: str, at: datetime, ends_at: datetime | None = None
) -> Cycle:
    """The next cycle; an `ends_at` of its own becomes the anchor of those that follow."""
    plan = subscription.plan
    if ends_at is None:
        subscription.periods += 1
        ends_at = boundary(
            subscription.anchor, plan.interval_unit, plan.interval_length, subscription.periods
        )
    else:
        subscription.anchor, subscription.periods = ends_at, 0
    cycle = Cycle(len(subscription.cycles), kind, at, ends_at)
    subscription.cycles.append(cycle)
    schedule(state, subscription, at)
    return cycle


def _proration(subscription: Subscription, cycle: Cycle) -> Decimal:
    plan = subscription.plan
    whole = boundary(cycle.started_at, plan.interval_unit, plan.interval_length, 1) - cycle.started_at
    return Decimal((cycle.ends_at - cycle.started_at).total_seconds()) / Decimal(whole.total_seconds())
