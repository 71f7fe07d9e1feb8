"""Invoices: which lines a bill run puts on them, and what each comes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

from billingd.sandbox.recurly.charges import charge, round_line
from billingd.sandbox.recurly.model import (
    Cycle,
    Invoice,
    Line,
    Price,
    Subscription,
    SubscriptionAddOn,
    Usage,
)
from billingd.sandbox.recurly.state import State

NUMBER_FIRST: Final = 1_000


@dataclass(frozen=True, slots=True)
class Draft:
    """A line before it is on an invoice; `amount` is exact."""

    origin: str
    amount: Decimal
    units: int
    cycle: Cycle
    description: str
    add_on: SubscriptionAddOn | None = None
    price: Price | None = None
    correction: bool = False


def period_drafts(subscription: Subscription, cycle: Cycle, rate: Decimal = Decimal(1)) -> list[Draft]:
    """What is charged in advance: the plan, its setup fee once, fixed add-ons. `rate` prorates."""
    plan, quantity = subscription.plan, subscription.quantity
    amount = subscription.unit_amount * quantity
    drafts = [Draft("plan", amount * rate, quantity, cycle, plan.name, price=Price(subscription.unit_amount))]
    fee = plan.setup_fees.get(subscription.currency)
    if subscription.setup_fee_due and fee:
        drafts.append(Draft("setup_fee", fee, 1, cycle, f"{plan.name} setup fee", price=Price(fee)))
    subscription.setup_fee_due = False
    for attached in subscription.add_ons.values():
        if not attached.metered:
            fixed = charge(attached.pricing, attached.quantity) * rate
            drafts.append(_add_on_draft(attached, fixed, attached.quantity, cycle))
    return drafts


def trial_drafts(subscription: Subscription, cycle: Cycle) -> list[Draft]:
    """A trial's invoice shows plan and usage add-ons at nothing (UBB, "First invoice behavior")."""
    drafts = [Draft("plan_trial", Decimal(0), subscription.quantity, cycle, subscription.plan.name)]
    return drafts + [
        Draft("add_on_trial", Decimal(0), 0, cycle, attached.add_on.name, add_on=attached)
        for attached in subscription.add_ons.values()
        if attached.metered
    ]


def usage_drafts(
    subscription: Subscription,
    cycle: Cycle,
    at: datetime,
    *,
    zeros: bool = True,
    of: Sequence[SubscriptionAddOn] | None = None,
) -> list[Draft]:
    """Bills the cycle's usage in arrears, and the corrections of earlier cycles, each cycle on its own line.

    A line appears even at 0 (UBB:114-122), except for usage from before a future start and on a change
    (`zeros=False`). `of`: these add-ons only.
    Usage of a trial stays unbilled for ever.
    """
    drafts: list[Draft] = []
    for attached in subscription.add_ons.values() if of is None else of:
        if not attached.metered:
            continue
        if cycle.kind in {"paid", "before"} and (zeros or attached.book.open.get(cycle.number)):
            drafts.append(_usage_draft(attached, cycle, attached.book.take(cycle.number, at)))
        for number in sorted(each for each in attached.book.open if each < cycle.number):
            earlier = subscription.cycles[number]
            if earlier.kind in {"paid", "before"}:
                taken = attached.book.take(number, at)
                drafts += [_usage_draft(attached, earlier, taken, correction=True)] if taken else []
        attached.book.settle()
    return drafts


def refund_drafts(subscription: Subscription, at: datetime, refund: str) -> list[Draft]:
    """Credits for the last paid invoice: usage fees are left out; `partial` by the time that remains."""
    paid = [invoice for invoice in subscription.invoices if invoice.kind == "charge"]
    if refund == "none" or not paid or paid[-1].status != "paid":
        return []
    cycle = subscription.cycle
    whole = Decimal((cycle.ends_at - cycle.started_at).total_seconds())
    left = Decimal((cycle.ends_at - at).total_seconds())
    rate = Decimal(1) if refund == "full" else left / whole
    return [
        Draft(line.origin, -line.amount * rate, -line.units, cycle, line.description, line.add_on, line.price)
        for line in paid[-1].lines
        if line.amount > 0 and not (line.add_on is not None and line.add_on.metered)
    ]


def issue(
    state: State,
    subscription: Subscription,
    drafts: Sequence[Draft],
    *,
    origin: str,
    at: datetime,
    credit: bool = False,
) -> Invoice | None:
    """Puts drafts on a new invoice, rounding each line once; no drafts, no invoice."""
    if not drafts:
        return None
    number = str(NUMBER_FIRST + len(state.invoices))
    stamps = state.stamps(at)
    invoice = Invoice(
        **stamps,
        uuid=state.identifiers.uuid(),
        number=number,
        kind="credit" if credit or origin == "refund" else "charge",
        origin=origin,
        status="pending",
        subscription=subscription,
        lines=[],
    )
    for draft in drafts:
        line = _line(state, invoice, draft, at)
        invoice.lines.append(line)
        state.lines[line.id] = line
    if subscription.collection_method == "automatic" or invoice.total <= 0:
        invoice.status = "paid" if invoice.kind == "charge" else "closed"
    state.invoices[invoice.id] = state.invoice_by_number[number] = invoice
    subscription.invoices.append(invoice)
    return invoice


def _usage_draft(
    attached: SubscriptionAddOn, cycle: Cycle, taken: list[Usage], *, correction: bool = False
) -> Draft:
    """A correction is priced on top of what its cycle has been billed for (UBB:425-429)."""
    units = _units(attached, taken)
    by_term = attached.add_on.usage_timeframe == "subscription_term"
    already = attached.term_units if by_term else attached.billed_units.get(cycle.number, 0)
    amount = charge(attached.pricing, units, already)
    attached.billed_units[cycle.number] = attached.billed_units.get(cycle.number, 0) + units
    attached.term_units += units
    return _add_on_draft(attached, amount, units, cycle, correction=correction)


def _units(attached: SubscriptionAddOn, taken: list[Usage]) -> int:
    """`last_in_period` counts the most recent record alone: by usage timestamp, then by when it came."""
    if attached.usage_calculation_type == "last_in_period" and taken:
        return max(taken, key=lambda record: (record.usage_timestamp, record.order)).amount
    return sum(record.amount for record in taken)


def _add_on_draft(
    attached: SubscriptionAddOn, amount: Decimal, units: int, cycle: Cycle, *, correction: bool = False
) -> Draft:
    name = attached.add_on.name
    text = f"{name} usage correction" if correction else name
    return Draft("add_on", amount, units, cycle, text, attached, attached.price, correction)


def _line(state: State, invoice: Invoice, draft: Draft, at: datetime) -> Line:
    return Line(
        **state.stamps(at),
        uuid=state.identifiers.uuid(),
        origin=draft.origin,
        add_on=draft.add_on,
        units=draft.units,
        price=draft.price,
        amount=round_line(draft.amount, invoice.subscription.currency),
        description=draft.description[:255],
        start_date=draft.cycle.started_at,
        end_date=draft.cycle.ends_at,
        correction=draft.correction,
        invoice=invoice,
    )
