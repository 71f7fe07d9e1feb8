"""What Recurly charges for a translated plan is what Amplify's rules charge, to the currency's smallest unit.

Amplify's side is written here from amplify.md 3.3 on the raw tiers, in fractions, unit by unit and tier by
tier. Recurly's side is the sandbox's, which shares no code with it or with the translation.
"""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from billingd.domain.agreement import add_on_differences
from billingd.domain.billing import BilledAddOn
from billingd.domain.catalog import (
    Graduated,
    Loose,
    PerUnit,
    Pricing,
    ProductPlan,
    Quota,
    Strict,
    Term,
    Tier,
    UnknownPricing,
    Unlimited,
    Volume,
)
from billingd.domain.pricing import (
    AddOnSpec,
    Inexpressible,
    MeasuredUnitSpec,
    NotOurs,
    PlanSpec,
    TierSpec,
    TierType,
    translate,
)
from billingd.sandbox.recurly import charges

EVERY_TIME_THE_SAME = settings(max_examples=300, derandomize=True, deadline=None)

UNLIMITED = 999_999_999
DIGITS = {"USD": 2, "EUR": 2, "MYR": 2, "JPY": 0, "KWD": 3, "BHD": 3, "OMR": 3, "JOD": 3}

PLAN = ProductPlan(
    id="8ac9aa00aa000001aa000001aa000001",
    name="weather-pro",
    title="Weather Pro",
    product_name="weather",
    product_id=None,
    state="active",
    type="paid",
    approval="manual",
    currency="USD",
    interval="monthly",
    price=Decimal(0),
    setup_price=Decimal(0),
    term=None,
    renewal=None,
    cycles=None,
)
QUOTA = Quota("8ac9cc00aa000001aa000001aa000001", "calls", "API calls", "transactions", Unlimited())


# --- Amplify's side ---------------------------------------------------------------------------------------


def tier_of(tiers: tuple[Tier, ...], unit: int) -> Tier:
    """The tier that the unit of that number falls in; a `to` of 999999999 has no end."""
    (found,) = (tier for tier in tiers if tier.from_ <= unit and (unit <= tier.to or tier.to == UNLIMITED))
    return found


def unit_by_unit(pricing: Pricing, units: int) -> Fraction:
    """Amplify's charge in units of the currency, counting every single unit."""
    total = Fraction(0)
    reached: list[Tier] = []
    for unit in range(1, units + 1):
        match pricing:
            case PerUnit(cost=cost):
                total += Fraction(cost)
            case Loose(limit=limit, overage=overage):
                total += Fraction(overage or 0) if unit > limit else 0
            case Graduated(tiers=tiers):
                tier = tier_of(tiers, unit)
                total += Fraction(tier.cost)
                if tier not in reached:
                    reached.append(tier)
                    total += Fraction(tier.flat_fee)
            case Volume(tiers=tiers):
                total += Fraction(tier_of(tiers, units).cost)
                if unit == units:
                    total += Fraction(tier_of(tiers, units).flat_fee)
            case _:
                raise AssertionError(pricing)
    return total


def tier_by_tier(pricing: Pricing, units: int) -> Fraction:
    """The same for large quantities."""
    match pricing:
        case PerUnit(cost=cost):
            return units * Fraction(cost)
        case Loose(limit=limit, overage=overage):
            return Fraction(overage or 0) * (units - limit if units > limit else 0)
        case Graduated(tiers=tiers):
            total = Fraction(0)
            for tier in tiers:
                first = tier.from_ or 1
                last = units if tier.to == UNLIMITED or units < tier.to else tier.to
                if first <= last:
                    total += (last - first + 1) * Fraction(tier.cost) + Fraction(tier.flat_fee)
            return total
        case Volume(tiers=tiers):
            if units == 0:
                return Fraction(0)
            final = tier_of(tiers, units)
            return units * Fraction(final.cost) + Fraction(final.flat_fee)
        case _:
            raise AssertionError(pricing)


def to_smallest_unit(amount: Fraction, currency: str) -> int:
    """In the currency's smallest units, half up."""
    scale: int = 10 ** DIGITS[currency]
    return floor(amount * scale + Fraction(1, 2))


# --- Recurly's side ---------------------------------------------------------------------------------------


def at_recurly(add_on: AddOnSpec) -> charges.AddOnPrice:
    return charges.AddOnPrice(
        add_on.tier_type,
        add_on.unit_amount,
        tuple(charges.Tier(tier.ending_quantity, tier.amount) for tier in add_on.tiers),
    )


def translated(pricing: Pricing, currency: str = "USD") -> AddOnSpec:
    made = translate(replace(PLAN, currency=currency), (replace(QUOTA, pricing=pricing),))
    assert isinstance(made, PlanSpec), made
    (add_on,) = made.add_ons
    return add_on


# --- plans ------------------------------------------------------------------------------------------------


def prices(currency: str, *, at_most: int) -> st.SearchStrategy[Decimal]:
    """Prices with as many decimals as the currency's usage may have: 9, or 2 where it has three digits."""
    exponents = st.integers(0, 2 if DIGITS[currency] == 3 else 9)
    return exponents.flatmap(
        lambda exponent: st.integers(0, at_most * 10**exponent).map(
            lambda digits: Decimal(digits).scaleb(-exponent)
        )
    )


def ends(highest: int) -> st.SearchStrategy[list[int]]:
    """Where the tiers but the last end, ascending."""
    return st.lists(st.integers(1, highest), unique=True, max_size=5).map(sorted)


@st.composite
def tiers_of(draw: st.DrawFn, currency: str, *, by: str, highest: int) -> tuple[Tier, ...]:
    """Contiguous tiers priced by `cost` or by `fee` alone."""
    made = []
    start = draw(st.sampled_from([0, 1]))
    for end in [*draw(ends(highest)), UNLIMITED]:
        amount = draw(prices(currency, at_most=1_000_000 if by == "cost" else 150_000))
        cost, fee = (amount, Decimal(0)) if by == "cost" else (Decimal(0), amount)
        made.append(Tier(start, end, cost, fee))
        start = end + 1
    return tuple(made)


MODELS = ["per_unit", "graduated_cost", "graduated_fee", "volume_cost", "volume_fee", "loose"]


@st.composite
def plans(draw: st.DrawFn, model: str) -> tuple[str, Pricing]:
    """A currency and an expressible pricing of that model, of small tiers or of large ones."""
    currency = draw(st.sampled_from(sorted(DIGITS)))
    highest = draw(st.sampled_from([12, 60, UNLIMITED - 1]))
    kind, _, by = model.partition("_")
    if model == "per_unit":
        return currency, PerUnit(draw(prices(currency, at_most=1_000_000)))
    if model == "loose":
        overage = draw(prices(currency, at_most=1_000_000).filter(bool))
        return currency, Loose(draw(st.integers(1, highest)), "monthly", overage)
    tiers = draw(tiers_of(currency, by=by, highest=highest))
    return currency, Graduated(tiers) if kind == "graduated" else Volume(tiers)


def boundaries(pricing: Pricing) -> set[int]:
    """Quantities at, just below and just above each end of a tier."""
    match pricing:
        case Graduated(tiers=tiers) | Volume(tiers=tiers):
            edges = {0, 1, *(tier.from_ for tier in tiers), *(tier.to for tier in tiers)}
        case Loose(limit=limit):
            edges = {0, 1, limit}
        case _:
            edges = {0, 1, UNLIMITED}
    return {edge + step for edge in edges for step in (-1, 0, 1) if edge + step >= 0}


@pytest.mark.parametrize("model", MODELS)
@EVERY_TIME_THE_SAME
@given(data=st.data())
def test_recurly_charges_what_amplify_charges(model: str, data: st.DataObject) -> None:
    """For any expressible plan and any quantity; at zero units only where Recurly documents the charge."""
    currency, pricing = data.draw(plans(model))
    add_on = translated(pricing, currency)
    assert (add_on.tier_type == "stairstep") <= (model in {"graduated_fee", "volume_fee"})
    quantities = boundaries(pricing) | {data.draw(st.integers(0, 100)), data.draw(st.integers(0, 10**10))}
    if add_on.tier_type == "stairstep":
        quantities.discard(0)
    for units in sorted(quantities):
        amplify = tier_by_tier(pricing, units)
        if units <= 100:
            assert amplify == unit_by_unit(pricing, units)
        recurly = charges.charge(at_recurly(add_on), units)
        assert Fraction(recurly) == amplify, units
        line = charges.round_line(recurly, currency)
        assert Fraction(line) * 10 ** DIGITS[currency] == to_smallest_unit(amplify, currency), units


@EVERY_TIME_THE_SAME
@given(data=st.data())
def test_tiers_are_held_or_charged_exactly(data: st.DataObject) -> None:
    """Contiguous tiers with any mixture of unit prices and fees, any decimals, any currency."""
    currency = data.draw(st.sampled_from(sorted(DIGITS)))
    fine = st.sampled_from(["0", "0", "0", "1", "2.5", "0.05", "0.005", "0.0005"]).map(Decimal)
    costs, fees = data.draw(st.sampled_from([(fine, fine), (fine, st.just(Decimal(0)))]))
    bounds = data.draw(ends(30))
    starts = [1, *(bound + 1 for bound in bounds)]
    tiers = tuple(
        Tier(start, end, data.draw(costs), data.draw(fees))
        for start, end in zip(starts, [*bounds, UNLIMITED], strict=True)
    )
    pricing: Pricing = Graduated(tiers) if data.draw(st.booleans()) else Volume(tiers)
    made = translate(replace(PLAN, currency=currency), (replace(QUOTA, pricing=pricing),))
    mixed = any(tier.cost for tier in tiers) and any(tier.flat_fee for tier in tiers)
    if isinstance(made, Inexpressible):
        assert mixed or DIGITS[currency] == 3, made
        return
    assert isinstance(made, PlanSpec)
    for units in range(1, 35):
        amplify = to_smallest_unit(unit_by_unit(pricing, units), currency)
        recurly = charges.round_line(charges.charge(at_recurly(made.add_ons[0]), units), currency)
        assert Fraction(recurly) * 10 ** DIGITS[currency] == amplify, units


DOCUMENTED = (
    Tier(1, 500, Decimal("2.0"), Decimal(0)),
    Tier(501, 5000, Decimal("1.0"), Decimal(10)),
    Tier(5001, UNLIMITED, Decimal("0.5"), Decimal(20)),
)
BY_COST = tuple(replace(tier, flat_fee=Decimal(0)) for tier in DOCUMENTED)
BY_FEE = tuple(replace(tier, cost=Decimal(0)) for tier in DOCUMENTED)


@pytest.mark.parametrize(
    ("whole", "by_cost", "by_fee", "costs", "fees", "documented"),
    [
        (Graduated(DOCUMENTED), Graduated(BY_COST), Graduated(BY_FEE), "5500.50", "30", "5530.50"),
        (Volume(DOCUMENTED), Volume(BY_COST), Volume(BY_FEE), "2500.50", "20", "2520.50"),
    ],
    ids=["graduated", "volume"],
)
def test_the_documented_example_of_5001_units(
    whole: Pricing, by_cost: Pricing, by_fee: Pricing, costs: str, fees: str, documented: str
) -> None:
    """Recurly has no add-on for the example as it stands, but for its unit prices and its fees apart."""
    assert tier_by_tier(whole, 5001) == unit_by_unit(whole, 5001) == Fraction(documented)
    charged = [charges.charge(at_recurly(translated(half)), 5001) for half in (by_cost, by_fee)]
    assert charged == [Decimal(costs), Decimal(fees)]
    assert sum(charged) == Decimal(documented)


# --- what is held -----------------------------------------------------------------------------------------


@EVERY_TIME_THE_SAME
@given(data=st.data())
def test_tiers_that_are_not_contiguous_are_held(data: st.DataObject) -> None:
    """Whichever bound is moved, tier dropped, repeated or swapped: nothing is guessed."""
    by = data.draw(st.sampled_from(["cost", "fee"]))
    tiers = list(data.draw(tiers_of("USD", by=by, highest=data.draw(st.sampled_from([6, UNLIMITED - 1])))))
    at = data.draw(st.integers(0, len(tiers) - 1))
    step = data.draw(st.integers(-10, 10).filter(bool) | st.integers(-UNLIMITED, UNLIMITED).filter(bool))
    match data.draw(st.sampled_from(["from", "to", "drop", "repeat", "swap"])):
        case "from":
            start = tiers[at].from_ + step
            tiers[at] = replace(tiers[at], from_=start if at or start not in (0, 1) else -1)
        case "to":
            tiers[at] = replace(tiers[at], to=tiers[at].to + step)
        case "drop":
            del tiers[at]
        case "repeat":
            tiers.insert(at, tiers[at])
        case "swap" if len(tiers) > 1:
            other = (at + 1) % len(tiers)
            tiers[at], tiers[other] = tiers[other], tiers[at]
        case _:
            tiers = []
    for pricing in (Graduated(tuple(tiers)), Volume(tuple(tiers))):
        made = translate(PLAN, (replace(QUOTA, pricing=pricing),))
        assert isinstance(made, Inexpressible), made
        assert all('quota "API calls"' in reason for reason in made.reasons)


words = st.text(max_size=60)
amounts = st.decimals() | st.sampled_from([Decimal(0), Decimal(1), Decimal("0.1"), Decimal("1E+999999")])
numbers = st.integers() | st.sampled_from([-1, 0, 1, 2, 10, 11, UNLIMITED, UNLIMITED + 1])
garbage_tiers = st.lists(st.builds(Tier, numbers, numbers, amounts, amounts), max_size=4).map(tuple)
intervals = st.sampled_from(["daily", "weekly", "monthly", "annually", "hourly", ""]) | words
garbage_pricing = st.one_of(
    st.builds(Unlimited),
    st.builds(Strict, numbers, intervals),
    st.builds(Loose, numbers, intervals, st.none() | amounts),
    st.builds(PerUnit, amounts),
    st.builds(Graduated, garbage_tiers),
    st.builds(Volume, garbage_tiers),
    st.builds(UnknownPricing, words),
)
ids = st.sampled_from(["a", "b", "A", ""]) | words
garbage_quotas = st.lists(
    st.builds(Quota, ids, words, words, st.none() | words, garbage_pricing), max_size=4
).map(tuple)
garbage_changes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "id": ids,
        "name": words,
        "title": words,
        "type": st.sampled_from(["paid", "free"]) | words,
        "approval": st.sampled_from(["manual", "automatic"]) | words,
        "currency": st.none() | st.sampled_from(["USD", "JPY", "KWD"]) | words,
        "interval": st.none() | intervals,
        "price": amounts,
        "setup_price": amounts,
        "term": st.none() | st.builds(Term, st.sampled_from(["days", "months", "years"]) | words, numbers),
        "renewal": st.none() | st.sampled_from(["automatic"]) | words,
        "cycles": st.none() | numbers,
    },
)


@EVERY_TIME_THE_SAME
@example(changes={}, quotas=tuple(replace(QUOTA, pricing=PerUnit(Decimal("sNaN"))) for _ in range(2)))
@given(changes=garbage_changes, quotas=garbage_quotas)
def test_translating_never_raises(changes: dict[str, Any], quotas: tuple[Quota, ...]) -> None:
    """Whatever Amplify sends, there is a plan within Recurly's limits, or a reason."""
    made = translate(replace(PLAN, **changes), quotas)
    match made:
        case NotOurs(reason=reason):
            assert reason.endswith(".")
        case Inexpressible(reasons=reasons):
            assert reasons
            assert all(reason.startswith('Plan "') for reason in reasons)
        case PlanSpec():
            assert_within_recurlys_limits(made)


@EVERY_TIME_THE_SAME
@given(pricing=st.builds(Graduated, garbage_tiers) | st.builds(Volume, garbage_tiers))
def test_garbage_tiers_are_held_or_within_limits(pricing: Pricing) -> None:
    made = translate(PLAN, (replace(QUOTA, pricing=pricing),))
    assert isinstance(made, PlanSpec | Inexpressible)
    if isinstance(made, PlanSpec):
        assert_within_recurlys_limits(made)


def assert_within_recurlys_limits(plan: PlanSpec) -> None:
    """recurly.md 4.1, 4.3 and 4.4."""
    assert len(plan.code) <= 50
    assert 1 <= len(plan.name) <= 255
    assert 0 <= plan.unit_amount <= 1_000_000
    assert 0 <= plan.setup_fee <= 1_000_000
    assert plan.total_billing_cycles is None or plan.total_billing_cycles >= 1
    assert plan.add_ons
    for add_on in plan.add_ons:
        assert len(add_on.code) <= 50
        assert 1 <= len(add_on.name) <= 255
        assert len(add_on.measured_unit.name) <= 255
        assert 1 <= len(add_on.measured_unit.display_name) <= 50
        assert (add_on.tier_type == "flat") == (add_on.unit_amount is not None) == (not add_on.tiers)
        for amount in (*(tier.amount for tier in add_on.tiers), add_on.unit_amount or Decimal(0)):
            assert 0 <= amount <= 1_000_000
            assert (amount * 10**9) % 1 == 0
        bounds = [tier.ending_quantity for tier in add_on.tiers]
        assert None not in bounds[:-1]
        assert bounds[-1:] in ([], [None])
        numbers = [bound for bound in bounds if bound is not None]
        assert numbers == sorted(set(numbers))
        assert all(1 <= number < UNLIMITED for number in numbers)


# --- agreement --------------------------------------------------------------------------------------------


@st.composite
def few_tiers(draw: st.DrawFn) -> tuple[TierSpec, ...]:
    """Tiers out of so few that two draws often charge the same."""
    bounds: list[int | None] = [*sorted(draw(st.sets(st.integers(1, 4), max_size=3)))]
    bounds.append(draw(st.sampled_from([None, UNLIMITED])))
    return tuple(TierSpec(bound, Decimal(draw(st.integers(0, 2)))) for bound in bounds)


@EVERY_TIME_THE_SAME
@given(tier_type=st.sampled_from(["tiered", "volume", "stairstep"]), wanted=few_tiers(), found=few_tiers())
def test_a_difference_is_told_exactly_when_the_charge_differs(
    tier_type: TierType, wanted: tuple[TierSpec, ...], found: tuple[TierSpec, ...]
) -> None:
    spec = AddOnSpec("q", "c", "n", MeasuredUnitSpec("m", "M"), "u", tier_type, None, wanted)
    billed = BilledAddOn(
        id="a",
        code="c",
        state="active",
        add_on_type="usage",
        usage_type="price",
        usage_calculation_type="cumulative",
        usage_timeframe="billing_period",
        tier_type=tier_type,
        measured_unit_id=None,
        unit_amount=None,
        tiers=found,
    )
    here, there = at_recurly(spec), at_recurly(replace(spec, tiers=found))
    same = all(charges.charge(here, units) == charges.charge(there, units) for units in range(1, 9))
    assert (add_on_differences(spec, billed) == ()) == same
