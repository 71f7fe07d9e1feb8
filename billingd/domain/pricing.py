"""Amplify product plan and quotas -> Recurly plan and add-ons, or why not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

from billingd.domain.catalog import (
    Graduated,
    Loose,
    PerUnit,
    Pricing,
    ProductPlan,
    Quota,
    UnknownPricing,
    Volume,
)
from billingd.domain.charges import Prices
from billingd.domain.money import Limit, amount_fault, plain, price_limit, usage_limit
from billingd.domain.terms import INTERVALS, Terms, translate_terms
from billingd.domain.tiers import (
    TierSpec,
    TierType,
    loose_faults,
    tier_faults,
    translate_loose,
    translate_tiers,
)

__all__ = [
    "AddOnSpec",
    "Inexpressible",
    "MeasuredUnitSpec",
    "NotOurs",
    "PlanSpec",
    "TierSpec",
    "TierType",
    "expressible",
    "translate",
]

CODE_CHARS_MAX: Final = 50
PLAN_CODES: Final = "amplify-plan-"
"""How the codes of our plans begin."""
NAME_CHARS_MAX: Final = 255
DISPLAY_NAME_CHARS_MAX: Final = 50
CODE: Final = re.compile(rf"[a-z0-9_+-]{{1,{CODE_CHARS_MAX}}}")
"""Plan and add-on codes Recurly takes (recurly.md 4.1)."""


@dataclass(frozen=True, slots=True)
class MeasuredUnitSpec:
    """A measured unit as Recurly should have it, found again by `name`."""

    name: str
    display_name: str


@dataclass(frozen=True, slots=True)
class AddOnSpec:
    """A usage add-on as Recurly should have it: `unit_amount` for flat, `tiers` for the others."""

    quota_id: str
    code: str
    name: str
    measured_unit: MeasuredUnitSpec
    unit: str
    """Amplify's unit name, such as `transactions`."""
    tier_type: TierType
    unit_amount: Decimal | None = None
    tiers: tuple[TierSpec, ...] = ()

    @property
    def prices(self) -> Prices:
        """What it charges."""
        return Prices(self.tier_type, self.unit_amount, self.tiers)


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """A plan as Recurly should have it. `total_billing_cycles` None: continuous."""

    plan_id: str
    code: str
    name: str
    description: str
    currency: str
    interval_unit: Literal["days", "months"]
    interval_length: int
    unit_amount: Decimal
    setup_fee: Decimal
    total_billing_cycles: int | None
    auto_renew: bool
    add_ons: tuple[AddOnSpec, ...]


@dataclass(frozen=True, slots=True)
class Inexpressible:
    """Why Recurly cannot charge exactly what Amplify charges: sentences, one per fault."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotOurs:
    """Why this plan is none of billingd's business."""

    reason: str


def translate(plan: ProductPlan, quotas: tuple[Quota, ...]) -> PlanSpec | Inexpressible | NotOurs:
    """What Recurly must hold to charge exactly what Amplify charges, or every reason why it cannot.

    Rules: recurly.md 8, amplify.md 3.2, 3.3 and 9. The plan's state is the caller's concern. A loose limit
    without an overage price (absent or 0) is not billable, nor are strict limits and unlimited quotas: the
    base price covers them. Prices keep their value but lose needless zeros; they are in units of the
    currency. Terms and cycles: see `translate_terms`.
    """
    title = _title(plan.title, plan.name, plan.id)
    if plan.type != "paid":
        return NotOurs(f'Plan "{title}" is of type "{plan.type}"; only paid plans are billed.')
    if plan.approval != "manual":
        return NotOurs(
            f'Plan "{title}" has "{plan.approval}" approval of subscriptions; billing needs manual approval.'
        )
    if not any(_billable(quota.pricing) for quota in quotas):
        return NotOurs(
            f'Plan "{title}" has no quota that charges for usage; its base price needs no metering.'
        )
    terms = translate_terms(plan)
    faults = [f'Plan "{title}": {clause}' for clause in _plan_faults(plan)]
    if not isinstance(terms, Terms):
        faults += [f'Plan "{title}": {clause}' for clause in terms]
    quotas, repeated = _distinct(quotas)
    limit = usage_limit(plan.currency or "")
    interval = plan.interval if plan.interval in INTERVALS else None
    for quota in quotas:
        named = f'Plan "{title}", quota "{_quota_title(quota, quotas)}"'
        faults += [f"{named}: {clause}" for clause in _quota_faults(quota, interval, limit)]
        if quota.id in repeated:
            faults.append(f"{named}: its id {quota.id} stands for quotas that differ. Read the plan again.")
    if faults or not isinstance(terms, Terms) or plan.currency is None:
        return Inexpressible(tuple(faults))
    return PlanSpec(
        plan_id=plan.id,
        code=_plan_code(plan),
        name=title[:NAME_CHARS_MAX],
        description=plan.id,
        currency=plan.currency,
        interval_unit=terms.interval_unit,
        interval_length=terms.interval_length,
        unit_amount=plain(plan.price),
        setup_fee=plain(plan.setup_price),
        total_billing_cycles=terms.total_billing_cycles,
        auto_renew=terms.auto_renew,
        add_ons=tuple(_add_on(quota) for quota in quotas if _billable(quota.pricing)),
    )


def expressible(plan: ProductPlan, quotas: tuple[Quota, ...]) -> tuple[Quota, ...]:
    """Those quotas with which nothing is wrong, whatever is wrong with others of the plan."""
    return tuple(
        one
        for one in quotas
        if not isinstance(one.pricing, UnknownPricing)
        and not isinstance(translate(plan, (one,)), Inexpressible)
    )


def _billable(pricing: Pricing) -> bool:
    """Whether usage under this pricing costs anything beside the base price."""
    match pricing:
        case PerUnit() | Graduated() | Volume():
            return True
        case Loose(overage=overage):
            return overage is not None and not overage.is_zero()
        case _:
            return False


def _plan_faults(plan: ProductPlan) -> Iterator[str]:
    """What is wrong with the plan's code, currency and own prices: clauses."""
    if not CODE.fullmatch(code := _plan_code(plan)):
        yield _code_fault(code)
    if plan.currency is None:
        yield "it has no currency. Set one."
    elif not re.fullmatch(r"[A-Z]{3}", plan.currency):
        yield f'its currency "{plan.currency}" is not an ISO 4217 code such as USD. Set another.'
    limit = price_limit(plan.currency or "")
    for what, amount in (("base price", plan.price), ("setup price", plan.setup_price)):
        if fault := amount_fault(f"the {what}", amount, limit):
            yield fault


def _quota_faults(quota: Quota, interval: str | None, limit: Limit) -> Iterator[str]:
    """Why this quota cannot be an add-on: clauses; none for a quota that needs no add-on."""
    if isinstance(quota.pricing, UnknownPricing):
        yield (
            f'this program does not know the pricing type "{quota.pricing.type}", so it cannot tell '
            "what Amplify charges. Choose another type, or a newer billingd."
        )
    if not _billable(quota.pricing):
        return
    if not CODE.fullmatch(code := _add_on_code(quota)):
        yield _code_fault(code)
    if not quota.unit:
        yield "it has no unit, perhaps because that was deleted, so nothing says what to count. Set one."
    match quota.pricing:
        case PerUnit(cost=cost):
            if fault := amount_fault("the unit price", cost, limit):
                yield fault
        case Graduated() | Volume():
            yield from tier_faults(quota.pricing, limit)
        case Loose(overage=overage) if overage is not None:
            yield from loose_faults(quota.pricing, overage, interval, limit)
        case _:
            pass


def _add_on(quota: Quota) -> AddOnSpec:
    """The add-on of a billable quota without faults."""
    tier_type: TierType = "tiered"
    unit_amount: Decimal | None = None
    tiers: tuple[TierSpec, ...] = ()
    match quota.pricing:
        case PerUnit(cost=cost):
            tier_type, unit_amount = "flat", plain(cost)
        case Graduated() | Volume():
            tier_type, tiers = translate_tiers(quota.pricing)
        case Loose(overage=overage) if overage is not None:
            tiers = translate_loose(quota.pricing, overage)
        case _:
            raise AssertionError(quota.pricing)
    unit = quota.unit or ""
    return AddOnSpec(
        quota_id=quota.id,
        code=_add_on_code(quota),
        name=_title(quota.title, quota.name, quota.id)[:NAME_CHARS_MAX],
        measured_unit=_measured_unit(unit),
        unit=unit,
        tier_type=tier_type,
        unit_amount=unit_amount,
        tiers=tiers,
    )


def _measured_unit(unit: str) -> MeasuredUnitSpec:
    """One measured unit per Amplify unit; its display name is ASCII words only (recurly.md 4.1)."""
    words = re.sub(r"[^A-Za-z0-9_]+", " ", unit.removeprefix("x-")).strip()
    display_name = (words[:1].upper() + words[1:])[:DISPLAY_NAME_CHARS_MAX].strip() or "Units"
    return MeasuredUnitSpec(f"amplify-unit-{unit}"[:NAME_CHARS_MAX], display_name)


def _distinct(quotas: tuple[Quota, ...]) -> tuple[tuple[Quota, ...], frozenset[str]]:
    """Each quota once, for paging may repeat them, and the ids that stand for quotas that differ."""
    first: dict[str, Quota] = {}
    differing: set[str] = set()
    for quota in quotas:
        # repr, because comparing a signaling NaN raises
        if repr(first.setdefault(quota.id, quota)) != repr(quota):
            differing.add(quota.id)
    return tuple(first.values()), frozenset(differing)


def _plan_code(plan: ProductPlan) -> str:
    return f"{PLAN_CODES}{plan.id}"


def _add_on_code(quota: Quota) -> str:
    return f"amplify-quota-{quota.id}"


def _code_fault(code: str) -> str:
    return (
        f'its code at Recurly would be "{code}", but a code is 1 to {CODE_CHARS_MAX} characters of a-z, 0-9, '
        "_, + and -."
    )


def _title(title: str, name: str, id_: str) -> str:
    """What people call it, on one line."""
    return " ".join(title.split()) or name or id_


def _quota_title(quota: Quota, quotas: tuple[Quota, ...]) -> str:
    """The quota's title; with its name where another quota of the plan has the same title."""
    title = _title(quota.title, quota.name, quota.id)
    same = [other for other in quotas if _title(other.title, other.name, other.id) == title]
    return title if len(same) < 2 else f"{title} ({quota.name or quota.id})"
