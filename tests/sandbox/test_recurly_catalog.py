"""Measured units, plans, add-ons, accounts: what Recurly takes and what it refuses."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from recurly_side import RecurlySide, add_on, plan, recurly_side, tier

USD = {"currency": "USD", "unit_amount": 1}


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"code": None}, 422, "code"),
        ({"code": "Upper"}, 422, "code"),
        ({"code": "x" * 51}, 422, "code"),
        ({"name": ""}, 422, "name"),
        ({"name": "x" * 256}, 422, "name"),
        ({"currencies": []}, 422, "currencies"),
        ({"currencies": [{"currency": "USD"}]}, 422, "currencies.unit_amount"),
        ({"currencies": [USD, USD]}, 422, "currencies.currency"),
        ({"currencies": [USD | {"currency": "ZWL"}]}, 422, "currencies.currency"),
        ({"currencies": [USD | {"unit_amount": 0.001}]}, 422, "currencies.unit_amount"),
        ({"currencies": [USD | {"unit_amount": 1_000_000.01}]}, 422, "currencies.unit_amount"),
        ({"currencies": [USD | {"unit_amount": -1}]}, 422, "currencies.unit_amount"),
        ({"currencies": [USD | {"unit_amount": "1.00"}]}, 400, "currencies.unit_amount"),
        ({"currencies": [USD | {"unit_amount_decimal": "1"}]}, 400, "currencies.unit_amount_decimal"),
        ({"currencies": [{"currency": "JPY", "unit_amount": 0.5}]}, 422, "currencies.unit_amount"),
        ({"setup_fees": [{"currency": "EUR", "unit_amount": 1}]}, 422, "setup_fees.currency"),
        ({"setup_fees": [USD], "currencies": [USD | {"setup_fee": 1}]}, 422, "currencies.setup_fee"),
        ({"interval_unit": "weeks"}, 422, "interval_unit"),
        ({"interval_length": 0}, 422, "interval_length"),
        ({"interval_length": "1"}, 400, "interval_length"),
        ({"total_billing_cycles": 0}, 422, "total_billing_cycles"),
        ({"accounting_code": "x" * 21}, 422, "accounting_code"),
        ({"code": "a-code-of-more-than-20-characters"}, 422, "accounting_code"),
        ({"custom_fields": [{"name": "undefined", "value": "x"}]}, 422, "custom_fields.name"),
        ({"colour": "red"}, 400, "colour"),
        ({"add_ons": [add_on(colour="red")]}, 400, "add_ons.colour"),
        ({"add_ons": [add_on(), add_on()]}, 422, "add_ons.code"),
    ],
)
async def test_a_wrong_plan_is_refused_and_named(
    far: RecurlySide, changes: dict[str, Any], status: int, param: str
) -> None:
    """Limits, patterns, enums, required and unknown fields of 4.1 and 4.3; nothing is kept of it."""
    await far.call("POST", "/measured_units", {"name": "call", "display_name": "Call"}, status=201)
    error = await far.refused("POST", "/plans", plan() | changes, status=status)
    assert param in [each["param"] for each in error["params"]]
    assert not far.site.plans
    assert not far.site.add_ons


async def test_unpermitted_fields_are_listed_in_the_message(far: RecurlySide) -> None:
    """In the words of recurly-client-node#314."""
    error = await far.refused("POST", "/plans", plan(one=1, two=2), status=400)
    told = "Please remove the following unpermitted parameters from your request: one, two."
    assert error["message"] == told


async def test_a_plan_reads_back_as_written_without_its_add_ons(far: RecurlySide) -> None:
    """Add-ons are a resource of their own (4.3)."""
    await far.make_plan(setup_fees=[{"currency": "USD", "unit_amount": 5}], trial_length=0)
    read = await far.call("GET", "/plans/code-basic")
    assert read["currencies"][0]["unit_amount"] == 20.0
    assert read["setup_fees"] == [{"currency": "USD", "unit_amount": 5.0}]
    assert "add_ons" not in read
    listed = await far.call("GET", "/plans/code-basic/add_ons")
    assert [each["code"] for each in listed["data"]] == ["calls"]
    assert listed["data"][0]["currencies"] == [
        {"currency": "USD", "unit_amount": None, "unit_amount_decimal": "0.1"}
    ]


async def test_codes_stay_taken_even_after_removal(far: RecurlySide) -> None:
    """422 "has already been taken" for plan and add-on codes; a removed plan reads as inactive."""
    await far.make_plan()
    error = await far.refused("POST", "/plans", plan())
    assert error["message"] == "Code has already been taken"
    assert error["params"] == [{"param": "code", "message": "has already been taken"}]
    await far.refused("POST", "/plans/code-basic/add_ons", add_on())
    await far.call("DELETE", "/plans/code-basic/add_ons/code-calls")
    await far.refused("POST", "/plans/code-basic/add_ons", add_on())
    assert (await far.call("DELETE", "/plans/code-basic"))["state"] == "inactive"
    assert (await far.call("GET", "/plans/code-basic"))["state"] == "inactive"
    await far.refused("POST", "/plans", plan())
    await far.refused("POST", "/plans/code-basic/add_ons", add_on("other"))
    await far.refused("PUT", "/plans/code-basic", {"name": "New"})


FLAT = {"currencies": [USD]}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (add_on(usage_type=None), 422, "usage_type"),
        (add_on(measured_unit_name=None), 422, "measured_unit_id"),
        (add_on(measured_unit_name="unknown"), 422, "measured_unit_name"),
        (add_on(code="Upper"), 422, "code"),
        (add_on(tiers=[tier(None, "1")]), 422, "tiers"),
        (add_on(currencies=None), 422, "currencies"),
        (add_on(tier_type="tiered") | FLAT, 422, "currencies"),
        (add_on(tier_type="tiered", tiers=[tier(5, "1")]), 422, "tiers"),
        (add_on(tier_type="tiered", tiers=[tier(5, "1"), tier(5, "1"), tier(None, "1")]), 422, "ending"),
        (add_on(tier_type="tiered", tiers=[tier(None, "1"), tier(5, "1")]), 422, "tiers"),
        (add_on(tier_type="volume", tiers=[tier(0, "1"), tier(None, "1")]), 422, "tiers.ending_quantity"),
        (add_on(tier_type="tiered", tiers=[tier(5, "1"), tier(None, "1", "EUR")]), 422, "tiers.currencies"),
        (add_on(currencies=[USD | {"unit_amount_decimal": "1"}]), 422, "currencies.unit_amount"),
        (add_on(currencies=[{"currency": "USD"}]), 422, "currencies.unit_amount"),
        (add_on(amount="0.0000000001"), 422, "currencies.unit_amount_decimal"),
        (add_on(amount="1000000.1"), 422, "currencies.unit_amount_decimal"),
        (add_on(amount="1e3"), 422, "currencies.unit_amount_decimal"),
        (add_on(currencies=[{"currency": "USD", "unit_amount_decimal": 0.1}]), 400, "currencies.unit"),
        (add_on(currencies=[{"currency": "EUR", "unit_amount": 1}]), 422, "currencies.currency"),
        (add_on(add_on_type="fixed"), 422, "usage_type"),
        (add_on(usage_timeframe="subscription_term"), 422, "usage_timeframe"),
        (add_on(usage_timeframe="year"), 422, "usage_timeframe"),
    ],
)
async def test_a_wrong_add_on_is_refused_and_named(
    far: RecurlySide, body: dict[str, Any], status: int, param: str
) -> None:
    """`currencies` or `tiers` by tier type, one of the two amounts, 9 decimals, an existing unit (4.4)."""
    await far.make_plan(add_ons=[])
    error = await far.refused("POST", "/plans/code-basic/add_ons", body, status=status)
    assert any(each["param"].startswith(param) or param in each["param"] for each in error["params"]), error
    assert not far.site.add_ons


async def test_features_the_sandbox_lacks_are_refused_not_ignored(far: RecurlySide) -> None:
    """Percentage usage, items, ramps, coupons: 422 `missing_feature`."""
    await far.make_plan()
    for path, body in (
        ("/plans/code-basic/add_ons", add_on("x", usage_type="percentage")),
        ("/plans/code-basic/add_ons", add_on("x", item_code="x")),
        ("/plans", plan("x", pricing_model="ramp")),
        ("/accounts", {"code": "x", "billing_info": {"token_id": "x"}}),
    ):
        await far.refused("POST", path, body, type_="missing_feature")


async def test_an_add_on_keeps_its_kind_of_pricing(far: RecurlySide) -> None:
    """AddOnUpdate has no tier type; prices may change, and 201 answers the PUT (4.3, 4.4)."""
    await far.make_plan()
    path = "/plans/code-basic/add_ons/code-calls"
    await far.refused("PUT", path, {"tier_type": "tiered"}, status=400)
    await far.refused("PUT", path, {"tiers": [tier(None, "1")]})
    changed = await far.call("PUT", path, {"currencies": [USD], "name": "Renamed"}, status=201)
    assert changed["name"] == "Renamed"
    assert changed["currencies"] == [{"currency": "USD", "unit_amount": 1.0, "unit_amount_decimal": None}]


async def test_the_open_tier_reads_back_as_999999999(far: RecurlySide) -> None:
    """ "The default": whoever compares must take it for the same as none (4.4)."""
    await far.make_plan(add_ons=[add_on(tier_type="tiered")])
    read = await far.call("GET", "/plans/code-basic/add_ons/code-calls")
    assert [each["ending_quantity"] for each in read["tiers"]] == [100, 999_999_999]
    assert read["currencies"] is None


async def test_a_plans_interval_cannot_be_changed(far: RecurlySide) -> None:
    """It is absent from PlanUpdate (4.3)."""
    await far.make_plan()
    await far.refused("PUT", "/plans/code-basic", {"interval_unit": "days"}, status=400)
    changed = await far.call("PUT", "/plans/code-basic", {"name": "New"}, status=201)
    assert changed["name"] == "New"
    assert changed["currencies"][0]["unit_amount"] == 20.0


@pytest.mark.parametrize(
    "display_name", ["API-calls", "v1.0", "a/b", "x" * 51, "", "Anfragen ü"], ids=str.__repr__
)
async def test_a_display_name_takes_words_only(far: RecurlySide, display_name: str) -> None:
    r"""At most 50 characters of `[\w ]` (4.1)."""
    body = {"name": "n", "display_name": display_name}
    await far.refused("POST", "/measured_units", body)


async def test_measured_units_are_unique_and_kept_while_in_use(far: RecurlySide) -> None:
    """Unique by name, found by `name-`, removed only when no active plan uses them (4.2)."""
    await far.make_plan()
    body = {"name": "call", "display_name": "Call"}
    assert (await far.refused("POST", "/measured_units", body))["params"][0]["param"] == "name"
    await far.refused("DELETE", "/measured_units/name-call")
    await far.call("DELETE", "/plans/code-basic")
    assert (await far.call("DELETE", "/measured_units/name-call"))["state"] == "inactive"


@pytest.mark.parametrize("code", ["x" * 51, "Upper", ".a", "-a", "a b", "", None])
async def test_account_codes_have_a_pattern(far: RecurlySide, code: str | None) -> None:
    """At most 50 of `a-z 0-9 @ - _ .`, not beginning with `.` or `-` (4.1)."""
    assert (await far.refused("POST", "/accounts", {"code": code}))["params"][0]["param"] == "code"


async def test_accounts_are_unique_by_code_closed_and_opened(far: RecurlySide) -> None:
    """404 before, 201, 422 taken; a closed one is inactive until it is opened."""
    error = await far.refused("GET", "/accounts/code-ann", status=404, type_="not_found")
    assert error["message"] == "Couldn't find Account with code = ann"
    made = await far.call("POST", "/accounts", {"code": "ann", "email": "a@b.example"}, status=201)
    assert made["state"] == "active"
    await far.refused("POST", "/accounts", {"code": "ann"})
    await far.refused("PUT", "/accounts/code-ann", {"code": "bob"}, status=400)
    assert (await far.call("DELETE", f"/accounts/{made['id']}"))["state"] == "inactive"
    await far.refused("DELETE", "/accounts/code-ann")
    assert (await far.call("PUT", "/accounts/code-ann/reactivate"))["state"] == "active"


async def test_the_long_default_of_an_accounting_code_can_be_cut_instead(far: RecurlySide) -> None:
    """By the setting; the harsher way is the default."""
    far.site.configure(long_accounting_code_default="cut")
    made = await far.make_plan(code="a-code-of-more-than-20-characters")
    assert made["accounting_code"] == "a-code-of-more-than-"
