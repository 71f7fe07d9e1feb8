"""A plan or add-on found at Recurly against the one there should be: every difference that changes money.

Not compared: names, descriptions, prices in other currencies, and measured units, which only label a count
(plans that the original integration made have their own). None and 999999999 both mean an open last tier
(recurly.md 4.4).
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol, TypeVar

from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.catalog import UNLIMITED_TO, Quota
from billingd.domain.charges import Prices
from billingd.domain.money import shown
from billingd.domain.pricing import AddOnSpec, PlanSpec, TierSpec


def differences(spec: PlanSpec, plan: BilledPlan) -> tuple[str, ...]:
    """How the plan at Recurly, add-ons aside, charges otherwise than `spec`: sentences, none if it agrees."""
    return tuple(f'Plan "{plan.code}" {clause}' for clause in _plan_clauses(spec, plan))


def add_on_differences(spec: AddOnSpec, add_on: BilledAddOn) -> tuple[str, ...]:
    """How the add-on at Recurly charges otherwise than `spec`: sentences, none if it agrees."""
    return tuple(f'Add-on "{add_on.code}" {clause}' for clause in _add_on_clauses(spec, add_on))


class LinkedAddOn(Protocol):
    """A linked quota."""

    @property
    def quota_id(self) -> str: ...
    @property
    def add_on_code(self) -> str: ...
    @property
    def title(self) -> str: ...


AnyLinkedAddOn = TypeVar("AnyLinkedAddOn", bound=LinkedAddOn)


def unseen(
    quotas: Iterable[Quota], linked: Iterable[AnyLinkedAddOn], gone: Collection[str]
) -> tuple[AnyLinkedAddOn, ...]:
    """What is linked and not among the plan's `quotas`, though nobody knows it to be `gone` (quota ids).

    Such a list says nothing of the plan's prices: whoever would be charged by it waits.
    """
    listed = {quota.id for quota in quotas}
    return tuple(one for one in linked if one.quota_id not in listed and one.quota_id not in gone)


def not_listed(one: LinkedAddOn) -> str:
    """What is said of an `unseen` one."""
    return f'Amplify does not list quota "{one.title}", and nothing says that it was deleted.'


@dataclass(frozen=True, slots=True)
class Uncharged:
    """A linked add-on for which Amplify charges nothing any more: its quota became free, or is `gone`.

    What is counted of a free quota is told to Recurly on, so new subscriptions have its add-on once it costs
    nothing there. Of one that is known to be gone nothing is counted: they do without.
    """

    code: str
    title: str
    gone: bool

    def differences(self, add_on: BilledAddOn | None) -> tuple[str, ...]:
        """How Recurly would charge a new subscription for it: sentences, none if it would not."""
        if self.gone or add_on is None or add_on.state != "active" or costs_nothing(add_on.prices):
            return ()
        return (
            f'Add-on "{self.code}" charges for quota "{self.title}" at Recurly; Amplify charges nothing for '
            "it. Set its price to 0 there, in every tier.",
        )

    def belongs(self, add_on: BilledAddOn | None) -> bool:
        """Whether subscriptions to the plan have it all the same."""
        there = add_on is not None and add_on.state == "active"
        return there and not self.gone and not self.differences(add_on)


def uncharged(
    spec: PlanSpec, quotas: Iterable[Quota], linked: Iterable[LinkedAddOn]
) -> tuple[Uncharged, ...]:
    """The linked add-ons of a plan that `spec` does not have; of `quotas` none is `unseen`."""
    charged = {one.code for one in spec.add_ons}
    listed = {quota.id for quota in quotas}
    return tuple(
        Uncharged(one.add_on_code, one.title, one.quota_id not in listed)
        for one in linked
        if one.add_on_code not in charged
    )


def costs_nothing(prices: Prices) -> bool:
    """Whether no usage costs anything, whatever there is of it."""
    if prices.tier_type == "flat":
        return prices.unit_amount is not None and prices.unit_amount.is_zero()
    return bool(prices.tiers) and all(tier.amount.is_zero() for tier in prices.tiers)


def same_prices(one: Prices, other: Prices) -> bool:
    """Whether two add-ons charge the same for any usage."""
    if one.tier_type != other.tier_type:
        return False
    if one.tier_type == "flat":
        return one.unit_amount == other.unit_amount
    return _charged(one.tiers) == _charged(other.tiers)


def _plan_clauses(spec: PlanSpec, plan: BilledPlan) -> Iterator[str]:
    currency = spec.currency
    if plan.state != "active":
        yield f"is {plan.state} at Recurly."
    if (price := plan.unit_amounts.get(currency)) is None:
        yield f"has no price in {currency} at Recurly; Amplify says {shown(spec.unit_amount)}."
    elif price != spec.unit_amount:
        yield (
            f"costs {shown(price)} {currency} per period at Recurly; Amplify says {shown(spec.unit_amount)}."
        )
    if (fee := plan.setup_fees.get(currency, Decimal(0))) != spec.setup_fee:
        yield f"has a setup fee of {shown(fee)} {currency} at Recurly; Amplify says {shown(spec.setup_fee)}."
    billed_every = (plan.interval_unit, plan.interval_length)
    if billed_every != (spec.interval_unit, spec.interval_length):
        yield (
            f"is billed every {plan.interval_length} {plan.interval_unit} at Recurly; "
            f"Amplify says {spec.interval_length} {spec.interval_unit}."
        )
    if plan.trial_length:
        yield (
            f"begins with a free trial of {plan.trial_length} {plan.trial_unit} at Recurly, whose usage is "
            "never billed; Amplify has none."
        )
    here = _term(spec.total_billing_cycles, auto_renew=spec.auto_renew)
    there = _term(plan.total_billing_cycles, auto_renew=plan.auto_renew)
    if here != there:
        yield f"{there} at Recurly; Amplify says it {here}."


def _term(cycles: int | None, *, auto_renew: bool) -> str:
    """A term in words. Renewing after one period is the same as being continuous (recurly.md 6)."""
    if auto_renew and (cycles is None or cycles == 1):
        return "renews every period"
    if cycles is None:
        return "has no set term and does not renew"
    return f"{'renews' if auto_renew else 'ends'} after {cycles} period{'' if cycles == 1 else 's'}"


def _add_on_clauses(spec: AddOnSpec, add_on: BilledAddOn) -> Iterator[str]:
    if add_on.state != "active":
        yield f"is {add_on.state} at Recurly."
    for what, found, wanted in (
        ("add_on_type", add_on.add_on_type, "usage"),
        ("usage_type", add_on.usage_type, "price"),
        # Recurly's documented defaults, should it leave these two out
        ("usage_calculation_type", add_on.usage_calculation_type or "cumulative", "cumulative"),
        ("usage_timeframe", add_on.usage_timeframe or "billing_period", "billing_period"),
        ("tier_type", add_on.tier_type, spec.tier_type),
    ):
        if found != wanted:
            yield f'has {what} "{found or "none"}" at Recurly; it must be "{wanted}".'
    if add_on.tier_type != spec.tier_type:
        return
    if spec.tier_type != "flat":
        yield from _tier_clauses(spec.tiers, add_on.tiers)
    elif add_on.unit_amount != spec.unit_amount:
        found, wanted = _amount(add_on.unit_amount), _amount(spec.unit_amount)
        yield f"has unit price {found} at Recurly; Amplify says {wanted}."


def _tier_clauses(wanted: tuple[TierSpec, ...], found: tuple[TierSpec, ...]) -> Iterator[str]:
    if _charged(wanted) == _charged(found):
        return
    if len(wanted) != len(found):
        yield (f"has the tiers {_listed(found)} at Recurly; Amplify says {_listed(wanted)}.")
        return
    for number, (here, there) in enumerate(zip(wanted, found, strict=True), 1):
        if _end(here) != _end(there):
            yield (f"ends tier {number} {_until(there)} at Recurly; Amplify says {_until(here)}.")
        if here.amount != there.amount:
            found_amount, wanted_amount = shown(there.amount), shown(here.amount)
            yield f"charges {found_amount} in tier {number} at Recurly; Amplify says {wanted_amount}."


def _charged(tiers: tuple[TierSpec, ...]) -> list[tuple[int, Decimal]]:
    """Ends and amounts, neighbours of equal amount taken together: what decides the charge."""
    merged: list[tuple[int, Decimal]] = []
    for tier in tiers:
        if merged and merged[-1][1] == tier.amount:
            merged.pop()
        merged.append((_end(tier), tier.amount))
    return merged


def _end(tier: TierSpec) -> int:
    return UNLIMITED_TO if tier.ending_quantity is None else tier.ending_quantity


def _until(tier: TierSpec) -> str:
    return "nowhere (open)" if _end(tier) == UNLIMITED_TO else f"at unit {_end(tier)}"


def _listed(tiers: tuple[TierSpec, ...]) -> str:
    return ", ".join(f"{shown(tier.amount)} {_reach(tier)}" for tier in tiers) or "none"


def _reach(tier: TierSpec) -> str:
    return "beyond" if _end(tier) == UNLIMITED_TO else f"to {_end(tier)}"


def _amount(amount: Decimal | None) -> str:
    return "none" if amount is None else shown(amount)
