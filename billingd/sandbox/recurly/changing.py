"""Changing a subscription at once: which add-ons it has, and what it costs (4.6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.billing import bring_up
from billingd.sandbox.recurly.checks import check_custom_fields, check_minor_unit
from billingd.sandbox.recurly.errors import invalid, missing_feature, unprocessable
from billingd.sandbox.recurly.fields import Body, duplicates
from billingd.sandbox.recurly.invoicing import Draft, issue, usage_drafts
from billingd.sandbox.recurly.model import (
    Cycle,
    Invoice,
    Price,
    Subscription,
    SubscriptionAddOn,
    SubscriptionTier,
)
from billingd.sandbox.recurly.state import State
from billingd.sandbox.recurly.subscribing import attach, own_price, own_tiers

OTHERS = ("custom_fields", "po_number", "net_terms", "net_terms_type", "revenue_schedule_type")
"""What a change sets besides money and add-ons, kept as it was given."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change that was carried out, and what it made to be paid or given back."""

    id: str
    at: datetime
    subscription: Subscription
    charge: Invoice | None
    credit: Invoice | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An add-on as it is to be."""

    attached: SubscriptionAddOn
    price: Price | None
    tiers: tuple[SubscriptionTier, ...]
    usage_calculation_type: str | None

    @property
    def changed(self) -> bool:
        """Whether it is charged otherwise from now on."""
        attached = self.attached
        now = (attached.price, attached.tiers, attached.usage_calculation_type)
        return now != (self.price, self.tiers, self.usage_calculation_type)

    def take_effect(self, state: State) -> None:
        """Changes the add-on."""
        self.attached.price, self.attached.tiers = self.price, self.tiers
        self.attached.usage_calculation_type = self.usage_calculation_type
        state.touch(self.attached)


def change(state: State, subscription: Subscription, body: Body) -> Change:
    """Carries a change out at once; the sandbox does no other timeframe, plan or quantity.

    `add_ons` takes the place of the set. What is unbilled of an add-on that goes, or is charged otherwise
    from now on, is invoiced at once (UBB; DOC subscription-add-ons-guide).
    """
    given = schemas.SUBSCRIPTION_CHANGE.read(body)
    bring_up(state, subscription)
    if subscription.status != "active" or subscription.plan.deleted_at:
        raise unprocessable("The subscription cannot be changed", type_="immutable_subscription")
    if (given.get("timeframe") or "now") != "now":
        raise missing_feature(["timeframe"])
    check_custom_fields(state, given)
    amount: Decimal = subscription.unit_amount
    if given.get("unit_amount") is not None:
        amount = given["unit_amount"]
        check_minor_unit(amount, subscription.currency, "unit_amount")
    present = list(subscription.add_ons.values())
    wanted = [_as_it_is(each) for each in present]
    if given.get("add_ons") is not None:
        wanted = _wanted(state, subscription, given["add_ons"])
    kept = [each.attached for each in wanted]
    gone = [each for each in present if each not in kept]
    new = [each for each in kept if each not in present]
    repriced = [each for each in wanted if each.changed]
    others = {name: given[name] for name in OTHERS if name in given}
    collection = given.get("collection_method") or subscription.collection_method
    same = collection == subscription.collection_method and amount == subscription.unit_amount
    if same and not (gone or new or repriced) and others.items() <= subscription.given.items():
        raise unprocessable("Subscription hasn't been changed", ("base", "hasn't been changed"))
    for each in (*gone, *new, *(one.attached for one in repriced)):
        if not each.metered:
            raise missing_feature(["add_ons"])  # it would be prorated
    now = state.now()
    due = usage_drafts(
        subscription, subscription.cycle, now, zeros=False, of=[*gone, *(each.attached for each in repriced)]
    )
    credits_, charges = _prorated(subscription, amount, now)
    charge = issue(state, subscription, [*due, *charges], origin="immediate_change", at=now)
    credit = issue(state, subscription, credits_, origin="immediate_change", at=now, credit=True)
    for one in repriced:
        one.take_effect(state)
    for each in gone:
        each.expired_at = now
        state.touch(each)
    subscription.removed_add_ons += gone
    subscription.add_ons = {each.add_on.id: each for each in kept}
    subscription.unit_amount, subscription.collection_method = amount, collection
    subscription.given |= others
    state.touch(subscription)
    state.announce(subscription, "updated")
    return Change(state.identifiers.internal(state.identifiers.order()), now, subscription, charge, credit)


def _wanted(state: State, subscription: Subscription, given: list[Body]) -> list[_Wanted]:
    """By `id` what is there stays as it is, by `code` it is as the plan has it now, but for what is given."""
    wanted = [_one(state, subscription, each) for each in given]
    if duplicates([each.attached.add_on.id for each in wanted]):
        raise invalid(("add_ons.code", "has already been taken"))
    return wanted


def _one(state: State, subscription: Subscription, given: Body) -> _Wanted:
    if given.get("id") is not None:
        return _kept(subscription, given)
    if not given.get("code"):
        raise invalid(("add_ons.code", "can't be blank"))
    made = attach(state, subscription.plan, subscription.currency, given)
    here = subscription.add_ons.get(made.add_on.id, made)
    _check_quantity(here, made.quantity)
    return _Wanted(here, made.price, made.tiers, made.usage_calculation_type)


def _kept(subscription: Subscription, given: Body) -> _Wanted:
    attached = next((each for each in subscription.add_ons.values() if each.id == given["id"]), None)
    if attached is None or given.get("code") not in (None, attached.add_on.code):
        raise invalid(("add_ons.id", "is invalid"))
    _check_quantity(attached, given.get("quantity"))
    wanted = _as_it_is(attached)
    if not any(given.get(name) is not None for name in ("unit_amount", "unit_amount_decimal", "tiers")):
        return wanted
    add_on, currency = attached.add_on, subscription.currency
    if add_on.tier_type == "flat":
        return _Wanted(attached, own_price(add_on, currency, given), (), wanted.usage_calculation_type)
    return _Wanted(attached, None, own_tiers(add_on, currency, given), wanted.usage_calculation_type)


def _as_it_is(attached: SubscriptionAddOn) -> _Wanted:
    return _Wanted(attached, attached.price, attached.tiers, attached.usage_calculation_type)


def _check_quantity(attached: SubscriptionAddOn, quantity: Any) -> None:
    if quantity not in (None, attached.quantity):
        name = "add_ons.quantity"
        raise invalid((name, "must be 1 for usage add-ons")) if attached.metered else missing_feature([name])


def _prorated(
    subscription: Subscription, amount: Decimal, at: datetime
) -> tuple[Sequence[Draft], Sequence[Draft]]:
    """What is left of the period: given back at the old price, charged at the new one."""
    cycle, old = subscription.cycle, subscription.unit_amount
    if amount == old or cycle.kind != "paid":
        return (), ()
    left, quantity = Cycle(cycle.number, cycle.kind, at, cycle.ends_at), subscription.quantity
    whole = Decimal((cycle.ends_at - cycle.started_at).total_seconds())
    rate = quantity * Decimal((cycle.ends_at - at).total_seconds()) / whole
    name = subscription.plan.name
    back = Draft("plan", -old * rate, -quantity, left, name, price=Price(old))
    return [back], [Draft("plan", amount * rate, quantity, left, name, price=Price(amount))]
