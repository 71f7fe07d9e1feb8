"""Every mapping of an Amplify plan to a Recurly plan, and every reason against one."""

import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from billingd.domain.catalog import (
    UNLIMITED_TO,
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
from billingd.domain.money import decimals, minor_digits, plain, shown
from billingd.domain.pricing import (
    AddOnSpec,
    Inexpressible,
    MeasuredUnitSpec,
    NotOurs,
    PlanSpec,
    TierSpec,
    translate,
)

PLAN_ID = "8ac9aa00aa000001aa000001aa000001"
QUOTA_ID = "8ac9cc00aa000001aa000001aa000001"
PLAN = ProductPlan(
    id=PLAN_ID,
    name="weather-pro-metered",
    title="Weather Pro",
    product_name="weather-pro",
    product_id="8ac9bb00aa000001aa000001aa000001",
    state="active",
    type="paid",
    approval="manual",
    currency="USD",
    interval="monthly",
    price=Decimal("10"),
    setup_price=Decimal("25.00"),
    term=None,
    renewal=None,
    cycles=None,
)


PAY_PER_USE = PerUnit(Decimal(1))


def quota(pricing: Pricing, **changes: Any) -> Quota:
    made = Quota(id=QUOTA_ID, name="calls", title="API calls", unit="transactions", pricing=pricing)
    return replace(made, **changes)


def tiers(*rows: tuple[int, int, str, str]) -> tuple[Tier, ...]:
    return tuple(Tier(start, end, Decimal(cost), Decimal(fee)) for start, end, cost, fee in rows)


def recurly_tiers(*rows: tuple[int | None, str]) -> tuple[TierSpec, ...]:
    return tuple(TierSpec(end, Decimal(amount)) for end, amount in rows)


def spec(pricing: Pricing = PAY_PER_USE, plan: ProductPlan = PLAN, **changes: Any) -> PlanSpec:
    made = translate(replace(plan, **changes), (quota(pricing),))
    assert isinstance(made, PlanSpec), made
    return made


def add_on(pricing: Pricing, **changes: Any) -> AddOnSpec:
    (made,) = spec(pricing, **changes).add_ons
    return made


def reasons(*pricings: Pricing, **changes: Any) -> tuple[str, ...]:
    made = translate(replace(PLAN, **changes), tuple(quota(pricing) for pricing in pricings))
    assert isinstance(made, Inexpressible), made
    return made.reasons


def reason(pricing: Pricing = PAY_PER_USE, **changes: Any) -> str:
    (only,) = reasons(pricing, **changes)
    return only


DOCUMENTED = tiers((1, 500, "2.0", "0"), (501, 5000, "1.0", "10"), (5001, UNLIMITED_TO, "0.5", "20"))
BY_COST = tuple(replace(tier, flat_fee=Decimal(0)) for tier in DOCUMENTED)
BY_FEE = tuple(replace(tier, cost=Decimal(0)) for tier in DOCUMENTED)


def test_a_whole_plan() -> None:
    assert translate(PLAN, (quota(PerUnit(Decimal("0.0025"))),)) == PlanSpec(
        plan_id=PLAN_ID,
        code=f"amplify-plan-{PLAN_ID}",
        name="Weather Pro",
        description=PLAN_ID,
        currency="USD",
        interval_unit="months",
        interval_length=1,
        unit_amount=Decimal(10),
        setup_fee=Decimal(25),
        total_billing_cycles=None,
        auto_renew=True,
        add_ons=(
            AddOnSpec(
                quota_id=QUOTA_ID,
                code=f"amplify-quota-{QUOTA_ID}",
                name="API calls",
                measured_unit=MeasuredUnitSpec("amplify-unit-transactions", "Transactions"),
                unit="transactions",
                tier_type="flat",
                unit_amount=Decimal("0.0025"),
            ),
        ),
    )


# --- which plans are ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "free"}, 'is of type "free"'),
        ({"type": "custom"}, 'is of type "custom"'),
        ({"approval": "automatic"}, '"automatic" approval'),
    ],
)
def test_other_plans_are_not_ours(changes: dict[str, Any], words: str) -> None:
    made = translate(replace(PLAN, **changes), (quota(PAY_PER_USE),))
    assert isinstance(made, NotOurs)
    assert words in made.reason
    assert '"Weather Pro"' in made.reason


@pytest.mark.parametrize(
    "pricing",
    [
        Unlimited(),
        Strict(100, "monthly"),
        Loose(100, "monthly", None),
        Loose(100, "monthly", Decimal("0.00")),
        Loose(100, "daily", None),
        UnknownPricing("matrix"),
    ],
)
def test_a_plan_that_charges_for_no_usage_is_not_ours(pricing: Pricing) -> None:
    assert isinstance(translate(PLAN, (quota(pricing),)), NotOurs)
    assert isinstance(translate(PLAN, ()), NotOurs)


@pytest.mark.parametrize("state", ["draft", "active", "deprecated", "archived", "other"])
def test_the_state_is_the_callers_concern(state: str) -> None:
    assert spec(state=state) == spec()


def test_quotas_that_charge_nothing_get_no_add_on() -> None:
    made = translate(
        PLAN,
        (
            quota(Unlimited(), id="a", unit=None),
            quota(Strict(10, "daily"), id="b", unit=None),
            quota(Loose(10, "daily", None), id="c", unit=None),
            quota(PAY_PER_USE, id="d"),
        ),
    )
    assert isinstance(made, PlanSpec)
    assert [one.quota_id for one in made.add_ons] == ["d"]


# --- pricing models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pricing", "tier_type", "expected"),
    [
        (Graduated(BY_COST), "tiered", recurly_tiers((500, "2"), (5000, "1"), (None, "0.5"))),
        (Volume(BY_COST), "volume", recurly_tiers((500, "2"), (5000, "1"), (None, "0.5"))),
        (Graduated(BY_FEE), "stairstep", recurly_tiers((500, "0"), (5000, "10"), (None, "30"))),
        (Volume(BY_FEE), "stairstep", recurly_tiers((500, "0"), (5000, "10"), (None, "20"))),
        (
            Volume(tiers((1, 10, "0", "30"), (11, UNLIMITED_TO, "0", "5"))),
            "stairstep",
            recurly_tiers((10, "30"), (None, "5")),
        ),
        (Graduated(tiers((1, UNLIMITED_TO, "0", "7"))), "stairstep", recurly_tiers((None, "7"))),
        (Graduated(tiers((1, UNLIMITED_TO, "7", "0"))), "tiered", recurly_tiers((None, "7"))),
        (Graduated(tiers((0, 9, "0", "0"), (10, UNLIMITED_TO, "0", "0"))), "tiered",
         recurly_tiers((9, "0"), (None, "0"))),
        (Volume(tiers((0, UNLIMITED_TO, "0", "0"))), "volume", recurly_tiers((None, "0"))),
        (Loose(1000, "monthly", Decimal("0.02")), "tiered", recurly_tiers((1000, "0"), (None, "0.02"))),
    ],
)  # fmt: skip
def test_tiers(pricing: Pricing, tier_type: str, expected: tuple[TierSpec, ...]) -> None:
    made = add_on(pricing)
    assert (made.tier_type, made.unit_amount, made.tiers) == (tier_type, None, expected)


@pytest.mark.parametrize("cost", ["0", "0.000000001", "1000000", "2.5"])
def test_pay_per_use_is_flat(cost: str) -> None:
    made = add_on(PerUnit(Decimal(cost)))
    assert (made.tier_type, made.unit_amount, made.tiers) == ("flat", Decimal(cost), ())


def test_a_tier_with_unit_price_and_flat_fee_has_no_equivalent() -> None:
    for pricing in (Graduated(DOCUMENTED), Volume(DOCUMENTED)):
        assert reasons(pricing) == (
            'Plan "Weather Pro", quota "API calls": tier 2 has unit price 1 and flat fee 10; '
            "Recurly has no tier with both. Price the tier by one of the two.",
            'Plan "Weather Pro", quota "API calls": tier 3 has unit price 0.5 and flat fee 20; '
            "Recurly has no tier with both. Price the tier by one of the two.",
        )


def test_tiers_of_both_kinds_have_no_equivalent() -> None:
    assert reason(Volume(tiers((1, 10, "0", "5"), (11, UNLIMITED_TO, "0.1", "0")))) == (
        'Plan "Weather Pro", quota "API calls": tier 2 has unit price 0.1 while tier 1 has flat fee 5; '
        "Recurly has no add-on with both. Price all tiers by one of the two."
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "it has no tier"),
        ([(2, UNLIMITED_TO)], "tier 1 starts at unit 2"),
        ([(-1, UNLIMITED_TO)], "tier 1 starts at unit -1"),
        ([(1, 5000)], "tier 1 is the last and ends at unit 5000; Recurly's last tier is always open"),
        ([(1, 10), (12, UNLIMITED_TO)], "tier 2 starts at unit 12, but tier 1 ends at 10. Start it at 11"),
        ([(1, 10), (10, UNLIMITED_TO)], "tier 2 starts at unit 10, but tier 1 ends at 10. Start it at 11"),
        ([(1, UNLIMITED_TO), (1, UNLIMITED_TO)], "tier 2 starts at unit 1"),
        ([(1, UNLIMITED_TO + 1)], "tier 1 ends at unit 1000000000, above Recurly's limit of 999999999"),
        ([(0, 0), (1, UNLIMITED_TO)], "tier 1 runs from 0 to 0 and holds no unit"),
        ([(1, 10), (11, 10), (11, UNLIMITED_TO)], "tier 2 runs from 11 to 10 and holds no unit"),
    ],
)
@pytest.mark.parametrize("model", [Graduated, Volume])
def test_bounds_that_do_not_fit(
    model: type[Graduated] | type[Volume], rows: list[tuple[int, int]], words: str
) -> None:
    said = reason(model(tiers(*((start, end, "1", "0") for start, end in rows))))
    assert said.startswith('Plan "Weather Pro", quota "API calls": ')
    assert words in said


def test_tiers_out_of_order_do_not_fit() -> None:
    said = reasons(Graduated(tiers((11, UNLIMITED_TO, "1", "0"), (1, 10, "2", "0"))))
    assert len(said) == 3


def test_flat_fees_that_add_up_beyond_recurlys_limit() -> None:
    rows = tiers((1, 10, "0", "600000"), (11, 20, "0", "600000"), (21, UNLIMITED_TO, "0", "1"))
    assert "the flat fees up to tier 2 add up to 1200000, above" in reason(Graduated(rows))
    assert add_on(Volume(rows)).tier_type == "stairstep"


@pytest.mark.parametrize("quota_interval", ["daily", "weekly", "annually"])
def test_a_loose_limit_per_another_interval_has_no_equivalent(quota_interval: str) -> None:
    said = reason(Loose(100, quota_interval, Decimal("0.1")))
    assert f'starts anew "{quota_interval}" while the plan is billed "monthly"' in said


@pytest.mark.parametrize("limit", [-1, 0, UNLIMITED_TO])
def test_a_loose_limit_out_of_range(limit: int) -> None:
    assert f"its limit of {limit} " in reason(Loose(limit, "monthly", Decimal("0.1")))


@pytest.mark.parametrize("interval", ["daily", "weekly", "monthly", "annually"])
def test_a_loose_limit_per_billing_period(interval: str) -> None:
    assert add_on(Loose(1, interval, Decimal("0.1")), interval=interval).tier_type == "tiered"


def test_unknown_pricing_beside_a_billable_quota_is_held() -> None:
    (said,) = reasons_of(quota(UnknownPricing("matrix"), id="a"), quota(PAY_PER_USE, id="b"))
    assert 'does not know the pricing type "matrix"' in said


def reasons_of(*quotas: Quota, plan: ProductPlan = PLAN) -> tuple[str, ...]:
    made = translate(plan, quotas)
    assert isinstance(made, Inexpressible), made
    return made.reasons


# --- money ------------------------------------------------------------------------------------------------

PRICES: list[tuple[str, str, bool, bool]] = [
    # currency, amount, fits a base price, fits a price of usage
    ("USD", "0", True, True),
    ("USD", "0.01", True, True),
    ("USD", "10.500", True, True),
    ("USD", "1E+2", True, True),
    ("USD", "-0", True, True),
    ("USD", "10.005", False, True),
    ("USD", "0.123456789", False, True),
    ("USD", "0.1234567891", False, False),
    ("USD", "1000000", True, True),
    ("USD", "1000000.01", False, False),
    ("USD", "-0.01", False, False),
    ("USD", "NaN", False, False),
    ("USD", "sNaN", False, False),
    ("USD", "Infinity", False, False),
    ("USD", "1E+999999", False, False),
    ("USD", "1E-999999", False, False),
    ("JPY", "100", True, True),
    ("JPY", "100.0", True, True),
    ("JPY", "0.5", False, True),
    ("KRW", "0.01", False, True),
    ("KWD", "1.25", True, True),
    ("KWD", "1.250", True, True),
    ("KWD", "1.255", False, False),
    ("BHD", "0.001", False, False),
    ("OMR", "0.001", False, False),
    ("JOD", "0.001", False, False),
    ("IQD", "0.001", False, False),
    ("LYD", "0.001", False, False),
    ("TND", "0.001", False, False),
    ("CLF", "0.001", False, False),
]


@pytest.mark.parametrize(("currency", "amount", "base", "usage"), PRICES)
@pytest.mark.parametrize("field", ["price", "setup_price"])
def test_base_and_setup_price(currency: str, amount: str, base: bool, usage: bool, field: str) -> None:
    made = translate(
        replace(PLAN, currency=currency, **{field: Decimal(amount)} | kept(field)),
        (quota(PAY_PER_USE),),
    )
    assert isinstance(made, PlanSpec if base else Inexpressible), made
    if isinstance(made, Inexpressible):
        (said,) = made.reasons
        word = {"price": "base", "setup_price": "setup"}[field]
        assert said.startswith(f'Plan "Weather Pro": the {word} price is ')


def kept(field: str) -> dict[str, Any]:
    """The other of the two prices, set to one that fits every currency."""
    return {"setup_price" if field == "price" else "price": Decimal(1)}


@pytest.mark.parametrize(("currency", "amount", "base", "usage"), PRICES)
@pytest.mark.parametrize(
    "model",
    [
        lambda amount: PerUnit(amount),
        lambda amount: Loose(5, "monthly", amount),
        lambda amount: Graduated((Tier(1, UNLIMITED_TO, amount, Decimal(0)),)),
        lambda amount: Graduated((Tier(1, UNLIMITED_TO, Decimal(0), amount),)),
        lambda amount: Volume((Tier(1, UNLIMITED_TO, amount, Decimal(0)),)),
        lambda amount: Volume((Tier(1, UNLIMITED_TO, Decimal(0), amount),)),
    ],
    ids=["per_unit", "loose", "graduated_cost", "graduated_fee", "volume_cost", "volume_fee"],
)
def test_price_of_usage(currency: str, amount: str, base: bool, usage: bool, model: Any) -> None:
    plan = replace(PLAN, currency=currency, price=Decimal(1), setup_price=Decimal(1))
    made = translate(plan, (quota(model(Decimal(amount))),))
    if isinstance(made, NotOurs):
        assert Decimal(amount) == 0  # an overage price of 0
        return
    assert isinstance(made, PlanSpec if usage else Inexpressible), made
    if isinstance(made, Inexpressible):
        assert len(made.reasons) == 1


def test_three_decimals_of_a_dinar_say_why() -> None:
    assert reason(PerUnit(Decimal("0.005")), currency="KWD") == (
        'Plan "Weather Pro", quota "API calls": the unit price is 0.005 with 3 decimals; '
        "Recurly charges at most 2, so totals in KWD, which has 3, would be cut. Round it to 2 decimals."
    )


def test_yen_have_no_decimals() -> None:
    assert reason(currency="JPY", price=Decimal("10.5")) == (
        'Plan "Weather Pro": the base price is 10.5 with 1 decimal; JPY has none. Round it to a whole number.'
    )


def test_prices_lose_needless_zeros() -> None:
    """So that the same price always compares and prints the same."""
    made = spec(PerUnit(Decimal("2.50")), price=Decimal("1E+2"), setup_price=Decimal("-0.00"))
    assert str(made.unit_amount) == "100"
    assert str(made.setup_fee) == "0"
    assert str(made.add_ons[0].unit_amount) == "2.5"


@pytest.mark.parametrize("currency", [None, "", "usd", "US", "EURO", "U$D"])
def test_a_currency_is_needed(currency: str | None) -> None:
    assert "currency" in reason(currency=currency)


@pytest.mark.parametrize(
    ("amount", "canonical", "count"),
    [("1.50", "1.5", 1), ("1E+3", "1000", 0), ("-0.0", "0", 0), ("0E+5", "0", 0), ("1E-9", "1E-9", 9),
     ("1" * 40 + ".10", "1" * 40 + ".1", 1), ("-2.0", "-2", 0)],
)  # fmt: skip
def test_canonical_amounts(amount: str, canonical: str, count: int) -> None:
    assert str(plain(Decimal(amount))) == canonical
    assert decimals(Decimal(amount)) == count


def test_amounts_for_people() -> None:
    assert shown(Decimal("1E-9")) == "0.000000001"
    assert shown(Decimal("1E+40")) == "1E+40"
    assert shown(Decimal("NaN")) == "NaN"


def test_minor_digits() -> None:
    assert [minor_digits(currency) for currency in ("USD", "JPY", "BHD", "CLF", "XXX")] == [2, 0, 3, 4, 2]


# --- intervals and terms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ("daily", ("days", 1)),
        ("weekly", ("days", 7)),
        ("monthly", ("months", 1)),
        ("annually", ("months", 12)),
    ],
)
def test_intervals(interval: str, expected: tuple[str, int]) -> None:
    made = spec(interval=interval)
    assert (made.interval_unit, made.interval_length) == expected


@pytest.mark.parametrize("interval", [None, "", "quarterly", "hourly", "Monthly"])
def test_other_intervals_have_no_equivalent(interval: str | None) -> None:
    assert "daily, weekly, monthly or annually" in reason(interval=interval)


@pytest.mark.parametrize(
    ("interval", "term", "renewal", "cycles", "expected"),
    [
        ("monthly", None, None, None, (None, True)),
        ("monthly", None, "automatic", None, (None, True)),
        ("monthly", None, "automatic", 6, (6, False)),
        ("monthly", None, None, 6, (6, False)),
        ("monthly", ("months", 1), "automatic", None, (1, True)),
        ("monthly", ("months", 1), None, None, (1, False)),
        ("monthly", ("months", 12), "automatic", None, (12, True)),
        ("monthly", ("years", 2), None, None, (24, False)),
        ("monthly", ("months", 3), "automatic", 4, (12, False)),
        ("monthly", ("months", 3), None, 4, (12, False)),
        ("annually", ("years", 1), "automatic", None, (1, True)),
        ("annually", ("years", 3), "automatic", 2, (6, False)),
        ("annually", ("months", 24), None, None, (2, False)),
        ("daily", ("days", 30), "automatic", None, (30, True)),
        ("weekly", ("days", 28), "automatic", None, (4, True)),
    ],
)
def test_terms(
    interval: str,
    term: tuple[str, int] | None,
    renewal: str | None,
    cycles: int | None,
    expected: tuple[int | None, bool],
) -> None:
    made = spec(interval=interval, term=term and Term(*term), renewal=renewal, cycles=cycles)
    assert (made.total_billing_cycles, made.auto_renew) == expected


@pytest.mark.parametrize(
    ("interval", "term"),
    [
        ("weekly", ("days", 30)),
        ("weekly", ("days", 6)),
        ("weekly", ("months", 7)),
        ("daily", ("months", 1)),
        ("daily", ("years", 1)),
        ("monthly", ("days", 30)),
        ("annually", ("days", 365)),
        ("annually", ("months", 18)),
        ("annually", ("months", 6)),
    ],
)
def test_terms_that_hold_no_whole_number_of_periods(interval: str, term: tuple[str, int]) -> None:
    said = reason(interval=interval, term=Term(*term), renewal="automatic")
    counted = f"1 {term[0].removesuffix('s')}" if term[1] == 1 else f"{term[1]} {term[0]}"
    assert f"a term of {counted} is not a whole number of billing periods" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"term": Term("months", 0)}, "the term is 0 months long"),
        ({"term": Term("months", -12)}, "the term is -12 months long"),
        ({"term": Term("weeks", 4)}, 'the term is counted in "weeks" instead of days, months or years'),
        ({"cycles": 0}, "it ends after 0 terms"),
        ({"term": Term("months", 1), "renewal": "optional"}, 'renewal "optional"'),
    ],
)
def test_terms_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    assert words in reason(**changes)


# --- names and codes --------------------------------------------------------------------------------------


def test_names_fit_recurly() -> None:
    made = translate(
        replace(PLAN, title="p" * 350), (quota(PAY_PER_USE, title="q" * 350, unit="x-" + "u" * 350),)
    )
    assert isinstance(made, PlanSpec)
    assert made.name == "p" * 255
    assert made.add_ons[0].name == "q" * 255
    assert len(made.add_ons[0].measured_unit.name) == 255
    assert made.add_ons[0].measured_unit.display_name == "U" + "u" * 49


@pytest.mark.parametrize("title", ["", "  \n"])
def test_an_empty_title_gives_way_to_the_name(title: str) -> None:
    made = translate(replace(PLAN, title=title), (quota(PAY_PER_USE, title=title),))
    assert isinstance(made, PlanSpec)
    assert (made.name, made.add_ons[0].name) == ("weather-pro-metered", "calls")


@pytest.mark.parametrize(
    ("unit", "display_name"),
    [
        ("transactions", "Transactions"),
        ("x-messages", "Messages"),
        ("x-gb.per-hour", "Gb per hour"),
        ("x-größe", "Gr e"),
        ("x-", "Units"),
        ("日本", "Units"),
        ("x-" + "a" * 49 + "-b", "A" + "a" * 48),
    ],
)
def test_display_names_are_ascii_words(unit: str, display_name: str) -> None:
    made = translate(PLAN, (quota(PAY_PER_USE, unit=unit),))
    assert isinstance(made, PlanSpec)
    assert made.add_ons[0].measured_unit == MeasuredUnitSpec(f"amplify-unit-{unit}", display_name)
    assert re.fullmatch(r"[\w ]{1,50}", display_name, re.ASCII)


def test_quotas_may_share_a_unit_and_a_title() -> None:
    made = translate(PLAN, (quota(PAY_PER_USE, id="a"), quota(PerUnit(Decimal(2)), id="b")))
    assert isinstance(made, PlanSpec)
    assert [one.code for one in made.add_ons] == ["amplify-quota-a", "amplify-quota-b"]
    assert len({one.measured_unit for one in made.add_ons}) == 1
    assert {one.name for one in made.add_ons} == {"API calls"}


def test_quotas_of_one_title_are_told_apart_by_name() -> None:
    said = reasons_of(
        quota(PerUnit(Decimal(-1)), id="a", name="calls-eu"), quota(PAY_PER_USE, id="b", name="calls")
    )
    assert len(said) == 1
    assert 'quota "API calls (calls-eu)"' in said[0]


@pytest.mark.parametrize("unit", [None, ""])
def test_a_deleted_unit_is_held(unit: str | None) -> None:
    (said,) = reasons_of(quota(PAY_PER_USE, unit=unit))
    assert "it has no unit" in said


def test_a_quota_read_twice_counts_once() -> None:
    """Paging over a changing list may repeat rows."""
    made = translate(PLAN, (quota(PAY_PER_USE), quota(PAY_PER_USE)))
    assert made == spec()


def test_two_quotas_of_one_id_are_held() -> None:
    (said,) = reasons(PerUnit(Decimal(1)), PerUnit(Decimal(2)))
    assert f"its id {QUOTA_ID} stands for quotas that differ" in said


@pytest.mark.parametrize("length", [36, 37])
def test_codes_are_at_most_50_characters(length: int) -> None:
    made = translate(PLAN, (quota(PAY_PER_USE, id="a" * length),))
    assert isinstance(made, PlanSpec if length == 36 else Inexpressible)


@pytest.mark.parametrize("bad", ["8AC9", "a.b", "a b", "a\n", "ä", "a" * 38])
def test_codes_recurly_does_not_take_are_held(bad: str) -> None:
    assert f'would be "amplify-plan-{bad}"' in reason(id=bad)
    (said,) = reasons_of(quota(PAY_PER_USE, id=bad))
    assert f'would be "amplify-quota-{bad}"' in said


# --- all faults at once -----------------------------------------------------------------------------------


def test_every_fault_is_named() -> None:
    plan = replace(
        PLAN, interval="hourly", currency="usd", price=Decimal("1.234"), term=Term("weeks", 0), cycles=0
    )
    said = reasons_of(
        quota(Graduated(tiers((2, 10, "1", "0"), (12, 20, "0", "-3"))), id="A", title="One", unit=None),
        quota(Loose(0, "daily", Decimal("-1")), id="b", title="Two"),
        quota(UnknownPricing("matrix"), id="c", title="Three"),
        plan=plan,
    )
    assert [sentence.split(":")[0] for sentence in said] == (
        ['Plan "Weather Pro"'] * 6
        + ['Plan "Weather Pro", quota "One"'] * 7
        + ['Plan "Weather Pro", quota "Two"'] * 2
        + ['Plan "Weather Pro", quota "Three"']
    )
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in said)
