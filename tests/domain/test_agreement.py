"""Which differences between a plan found at Recurly and the wanted one are told, and which are not."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from billingd.domain.agreement import Uncharged, add_on_differences, costs_nothing, differences
from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.charges import Prices
from billingd.domain.pricing import AddOnSpec, MeasuredUnitSpec, PlanSpec, TierSpec

SPEC = PlanSpec(
    plan_id="8ac9aa00",
    code="amplify-plan-8ac9aa00",
    name="Weather Pro",
    description="8ac9aa00",
    currency="USD",
    interval_unit="months",
    interval_length=1,
    unit_amount=Decimal("10.5"),
    setup_fee=Decimal(25),
    total_billing_cycles=12,
    auto_renew=True,
    add_ons=(),
)
PLAN = BilledPlan(
    id="p1",
    code="amplify-plan-8ac9aa00",
    state="active",
    interval_unit="months",
    interval_length=1,
    total_billing_cycles=12,
    auto_renew=True,
    unit_amounts={"USD": Decimal("10.50"), "EUR": Decimal(9)},
    setup_fees={"USD": Decimal("25.00")},
)
TIERED_SPEC = AddOnSpec(
    quota_id="8ac9cc00",
    code="amplify-quota-8ac9cc00",
    name="API calls",
    measured_unit=MeasuredUnitSpec("amplify-unit-transactions", "Transactions"),
    unit="transactions",
    tier_type="tiered",
    tiers=(TierSpec(500, Decimal(2)), TierSpec(5000, Decimal(1)), TierSpec(None, Decimal("0.5"))),
)
TIERED = BilledAddOn(
    id="a1",
    code="amplify-quota-8ac9cc00",
    state="active",
    add_on_type="usage",
    usage_type="price",
    usage_calculation_type="cumulative",
    usage_timeframe="billing_period",
    tier_type="tiered",
    measured_unit_id="some-unit",
    unit_amount=None,
    tiers=(TierSpec(500, Decimal("2.00")), TierSpec(5000, Decimal("1.0")), TierSpec(None, Decimal("0.50"))),
)
FLAT_SPEC = replace(TIERED_SPEC, tier_type="flat", tiers=(), unit_amount=Decimal("0.0025"))
FLAT = replace(TIERED, tier_type="flat", tiers=(), unit_amount=Decimal("0.002500000"))


def test_equal_plans_agree() -> None:
    assert differences(SPEC, PLAN) == ()
    assert add_on_differences(TIERED_SPEC, TIERED) == ()
    assert add_on_differences(FLAT_SPEC, FLAT) == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state": "inactive"}, "is inactive at Recurly."),
        ({"unit_amounts": {"USD": Decimal("10.51")}},
         "costs 10.51 USD per period at Recurly; Amplify says 10.5."),
        ({"unit_amounts": {"EUR": Decimal("10.5")}}, "has no price in USD at Recurly; Amplify says 10.5."),
        ({"setup_fees": {"USD": Decimal(0)}}, "has a setup fee of 0 USD at Recurly; Amplify says 25."),
        ({"setup_fees": {}}, "has a setup fee of 0 USD at Recurly; Amplify says 25."),
        ({"interval_length": 12}, "is billed every 12 months at Recurly; Amplify says 1 months."),
        ({"interval_unit": "days"}, "is billed every 1 days at Recurly; Amplify says 1 months."),
        ({"total_billing_cycles": 6},
         "renews after 6 periods at Recurly; Amplify says it renews after 12 periods."),
        ({"total_billing_cycles": None},
         "renews every period at Recurly; Amplify says it renews after 12 periods."),
        ({"auto_renew": False}, "ends after 12 periods at Recurly; Amplify says it renews after 12 periods."),
        ({"auto_renew": False, "total_billing_cycles": None},
         "has no set term and does not renew at Recurly; Amplify says it renews after 12 periods."),
        ({"trial_length": 30, "trial_unit": "days"},
         "begins with a free trial of 30 days at Recurly, whose usage is never billed; Amplify has none."),
    ],
)  # fmt: skip
def test_differences_of_plans(changes: dict[str, Any], sentence: str) -> None:
    assert differences(SPEC, replace(PLAN, **changes)) == (f'Plan "amplify-plan-8ac9aa00" {sentence}',)


def test_all_differences_are_told() -> None:
    other = replace(
        PLAN, state="inactive", unit_amounts={}, setup_fees={}, interval_length=3, auto_renew=False
    )
    assert len(differences(SPEC, other)) == 5


@pytest.mark.parametrize(("here", "there"), [(None, 1), (1, None), (None, None), (1, 1)])
def test_renewing_every_period_is_continuous(here: int | None, there: int | None) -> None:
    """Plans of the original integration have a term of one period that renews; nobody pays more or less."""
    spec, plan = replace(SPEC, total_billing_cycles=here), replace(PLAN, total_billing_cycles=there)
    assert differences(spec, plan) == ()
    assert differences(spec, replace(plan, auto_renew=False)) != ()


def test_no_setup_fee_may_be_left_out() -> None:
    assert differences(replace(SPEC, setup_fee=Decimal(0)), replace(PLAN, setup_fees={})) == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state": "inactive"}, "is inactive at Recurly."),
        ({"add_on_type": "fixed"}, 'has add_on_type "fixed" at Recurly; it must be "usage".'),
        ({"usage_type": "percentage"}, 'has usage_type "percentage" at Recurly; it must be "price".'),
        ({"usage_type": None}, 'has usage_type "none" at Recurly; it must be "price".'),
        ({"usage_calculation_type": "last_in_period"},
         'has usage_calculation_type "last_in_period" at Recurly; it must be "cumulative".'),
        ({"usage_timeframe": "subscription_term"},
         'has usage_timeframe "subscription_term" at Recurly; it must be "billing_period".'),
        ({"tier_type": "volume"}, 'has tier_type "volume" at Recurly; it must be "tiered".'),
        ({"tier_type": "flat", "tiers": (), "unit_amount": Decimal(1)},
         'has tier_type "flat" at Recurly; it must be "tiered".'),
        ({"tiers": (*TIERED.tiers[:2], TierSpec(None, Decimal("0.51")))},
         "charges 0.51 in tier 3 at Recurly; Amplify says 0.5."),
        ({"tiers": (TierSpec(499, Decimal(2)), *TIERED.tiers[1:])},
         "ends tier 1 at unit 499 at Recurly; Amplify says at unit 500."),
        ({"tiers": (*TIERED.tiers[:2], TierSpec(9999, Decimal("0.5")))},
         "ends tier 3 at unit 9999 at Recurly; Amplify says nowhere (open)."),
        ({"tiers": TIERED.tiers[2:]},
         "has the tiers 0.5 beyond at Recurly; Amplify says 2 to 500, 1 to 5000, 0.5 beyond."),
        ({"tiers": ()},
         "has the tiers none at Recurly; Amplify says 2 to 500, 1 to 5000, 0.5 beyond."),
    ],
)  # fmt: skip
def test_differences_of_add_ons(changes: dict[str, Any], sentence: str) -> None:
    said = add_on_differences(TIERED_SPEC, replace(TIERED, **changes))
    assert said == (f'Add-on "amplify-quota-8ac9cc00" {sentence}',)


@pytest.mark.parametrize(
    ("amount", "sentence"),
    [
        (Decimal("0.0026"), "has unit price 0.0026 at Recurly; Amplify says 0.0025."),
        (Decimal("0.0000001"), "has unit price 0.0000001 at Recurly; Amplify says 0.0025."),
        (None, "has unit price none at Recurly; Amplify says 0.0025."),
    ],
)
def test_differences_of_flat_prices(amount: Decimal | None, sentence: str) -> None:
    said = add_on_differences(FLAT_SPEC, replace(FLAT, unit_amount=amount))
    assert said == (f'Add-on "amplify-quota-8ac9cc00" {sentence}',)


@pytest.mark.parametrize(
    "changes",
    [
        {"tiers": (*TIERED.tiers[:2], TierSpec(999_999_999, Decimal("0.5")))},
        {"tiers": (TierSpec(100, Decimal(2)), *TIERED.tiers)},
        {"measured_unit_id": None},
        {"usage_calculation_type": None},
        {"usage_timeframe": None},
        {"id": "other"},
    ],
    ids=["open", "split", "measured_unit", "calculation", "timeframe", "id"],
)
def test_what_changes_no_money_is_not_told(changes: dict[str, Any]) -> None:
    assert add_on_differences(TIERED_SPEC, replace(TIERED, **changes)) == ()


NOUGHT, ONE = Decimal("0.00"), Decimal(1)


@pytest.mark.parametrize(
    ("prices", "nothing"),
    [
        (Prices("flat", NOUGHT), True),
        (Prices("flat", ONE), False),
        (Prices("flat", None), False),
        (Prices("tiered", None, (TierSpec(5, NOUGHT), TierSpec(None, NOUGHT))), True),
        (Prices("volume", None, (TierSpec(5, NOUGHT), TierSpec(None, ONE))), False),
        (Prices("stairstep"), False),
    ],
)
def test_costing_nothing(prices: Prices, nothing: bool) -> None:
    """Not what has no price in the currency: Recurly sells none of it."""
    assert costs_nothing(prices) is nothing


def test_a_quota_that_is_free_at_amplify_is_free_at_recurly_or_a_difference() -> None:
    free = Uncharged(FLAT.code, "API calls", gone=False)
    [told] = free.differences(FLAT)
    assert told.startswith(f'Add-on "{FLAT.code}" charges for quota "API calls" at Recurly')
    for one in (replace(FLAT, unit_amount=NOUGHT), replace(FLAT, state="inactive"), None):
        assert free.differences(one) == ()
    assert replace(free, gone=True).differences(FLAT) == ()
