"""Subscriptions: what is taken, what is refused, how they end."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from recurly_side import (
    START,
    RecurlySide,
    add_on,
    lines,
    path_of,
    recurly_side,
    stamp,
    subscription,
    tier,
    usage_path,
)

SUBSCRIPTIONS = "/subscriptions"


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan()
        yield side


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"plan_code": None}, 422, "plan_code"),
        ({"plan_code": "unknown"}, 422, "plan_code"),
        ({"currency": None}, 422, "currency"),
        ({"currency": "EUR"}, 422, "currency"),
        ({"currency": "ZWL"}, 422, "currency"),
        ({"account": None}, 422, "account"),
        ({"account": {}}, 422, "account.code"),
        ({"account": {"code": "ann", "nick": "a"}}, 400, "account.nick"),
        ({"add_ons": [{"code": "unknown"}]}, 422, "add_ons.add_on"),
        ({"add_ons": [{"code": "calls"}, {"code": "calls"}]}, 422, "add_ons.code"),
        ({"add_ons": [{"code": "calls", "quantity": 2}]}, 422, "add_ons.quantity"),
        ({"add_ons": [{"code": "calls", "tiers": [{"unit_amount": 1}]}]}, 422, "add_ons.tiers"),
        ({"add_ons": [{"code": "calls", "amount": 1}]}, 400, "add_ons.amount"),
        ({"po_number": "x" * 51}, 422, "po_number"),
        ({"collection_method": "cash"}, 422, "collection_method"),
        ({"collection_method": None}, 422, "account.billing_info"),
        ({"total_billing_cycles": 0}, 422, "total_billing_cycles"),
        ({"starts_at": stamp(START - timedelta(days=1))}, 422, "starts_at"),
        ({"starts_at": "tomorrow"}, 400, "starts_at"),
        ({"next_bill_date": stamp(START)}, 422, "next_bill_date"),
        ({"custom_fields": [{"name": "marker", "value": "x"}]}, 422, "custom_fields.name"),
        ({"coupon_codes": ["x"]}, 422, "coupon_codes"),
    ],
)
async def test_a_wrong_subscription_is_refused_and_named(
    far: RecurlySide, changes: dict[str, Any], status: int, param: str
) -> None:
    """Required and unknown fields, currency, add-ons, billing info (4.6); no account is left behind."""
    body = subscription() | changes
    answer = await far.call("POST", SUBSCRIPTIONS, body, status=status)
    assert param in [each["param"] for each in answer["error"]["params"]]
    assert not far.site.subscriptions
    assert not far.site.accounts


async def test_a_new_account_is_made_and_an_old_one_is_used_again(far: RecurlySide) -> None:
    """By `account.code` (4.6)."""
    far.site.create_account("bob", email="bob@example.com")
    first, second = await far.subscribe(), await far.subscribe(account="bob")
    assert first["account"]["code"] == "ann"
    assert second["account"]["email"] == "bob@example.com"
    assert len(far.site.accounts) == 2


async def test_add_ons_are_never_attached_by_themselves(far: RecurlySide) -> None:
    """Not even those that are not optional: usage for them is a 404 (4.4)."""
    made = await far.subscribe(add_ons=[])
    assert made["add_ons"] == []
    await far.refused("POST", usage_path(made), {"amount": 1}, status=404, type_="not_found")


async def test_the_sixty_second_guard_holds_per_account(far: RecurlySide) -> None:
    """422 within 60 s, whatever the plan, unless `bulk` or the setting says otherwise (4.6)."""
    await far.make_plan(code="other")
    await far.subscribe()
    error = await far.refused("POST", SUBSCRIPTIONS, subscription(plan_code="other"))
    assert "wait 60 seconds" in error["message"]
    await far.subscribe(account="bob", plan_code="other")
    await far.subscribe(plan_code="other", bulk=True)
    far.pass_(seconds=59)
    await far.make_plan(code="third")
    await far.refused("POST", SUBSCRIPTIONS, subscription(plan_code="third"))
    far.pass_(seconds=1)
    await far.subscribe(plan_code="third")
    await far.make_plan(code="fourth")
    far.site.configure(sixty_second_guard=False)
    await far.subscribe(plan_code="fourth")


async def test_a_second_subscription_to_a_plan_is_a_site_option(far: RecurlySide) -> None:
    """422 "You already have a subscription to this plan." while one lives (OAS:20995 ff.)."""
    made = await far.subscribe()
    far.pass_(minutes=2)
    error = await far.refused("POST", SUBSCRIPTIONS, subscription())
    assert error["message"] == "You already have a subscription to this plan."
    far.site.configure(allow_multiple_subscriptions_per_plan=True)
    second = await far.subscribe()
    far.site.configure(allow_multiple_subscriptions_per_plan=False)
    far.pass_(minutes=2)
    await far.call("DELETE", path_of(made))
    await far.refused("POST", SUBSCRIPTIONS, subscription())
    await far.call("DELETE", path_of(second))
    await far.subscribe()


async def test_automatic_collection_needs_billing_info(far: RecurlySide) -> None:
    """Automatic is the default and is refused without; with it, or if the site does not mind, taken (4.6)."""
    far.site.create_account("rich", billing_info=True)
    assert (await far.subscribe(account="rich", collection_method=None))["collection_method"] == "automatic"
    far.site.configure(require_billing_info_for_automatic=False)
    await far.subscribe(account="poor", collection_method="automatic")


async def test_removed_plans_and_add_ons_cannot_be_subscribed_to(far: RecurlySide) -> None:
    """Their subscriptions renew, but cannot be edited (DOC plans.md)."""
    made = await far.subscribe()
    await far.call("DELETE", "/plans/code-basic/add_ons/code-calls")
    await far.refused("POST", SUBSCRIPTIONS, subscription(account="bob"))
    await far.call("DELETE", "/plans/code-basic")
    await far.refused("POST", SUBSCRIPTIONS, subscription(account="bob", add_ons=[]))
    await far.refused("PUT", path_of(made), {"po_number": "m2"}, type_="immutable_subscription")
    await far.use(made, 3)
    far.pass_(days=29)
    assert lines(far.invoices(made)[1]) == [("calls", 3, "0.30"), ("plan", 1, "20.00")]


async def test_prices_are_copied_when_subscribing(far: RecurlySide) -> None:
    """Price changes reach new subscriptions only (4.3); a price can be overridden."""
    made = await far.subscribe()
    price = [{"currency": "USD", "unit_amount": 9}]
    await far.call("PUT", "/plans/code-basic/add_ons/code-calls", {"currencies": price}, status=201)
    await far.call("PUT", "/plans/code-basic", {"currencies": price}, status=201)
    newer = await far.subscribe(account="bob")
    special = await far.subscribe(account="eve", unit_amount=3, add_ons=[{"code": "calls", "unit_amount": 2}])
    assert (made["unit_amount"], newer["unit_amount"], special["unit_amount"]) == (20.0, 9.0, 3.0)
    for each, amount in ((made, "0.10"), (newer, "9.00"), (special, "2.00")):
        await far.use(each, 1)
        far.site.renew(each["uuid"])
        assert lines(far.invoices(each)[-1], usage=True) == [("calls", 1, amount)]


async def test_tiers_can_be_overridden(far: RecurlySide) -> None:
    """By the subscription's own tiers, in its currency; a unit amount is refused for tiered (4.6)."""
    await far.make_plan(code="tiers", add_ons=[add_on(tier_type="tiered", tiers=[tier(None, "1")])])
    body = subscription(plan_code="tiers", add_ons=[{"code": "calls", "unit_amount": 1}])
    await far.refused("POST", SUBSCRIPTIONS, body)
    own = [{"ending_quantity": 2, "unit_amount": 5}, {"unit_amount_decimal": "0.001"}]
    made = await far.subscribe(plan_code="tiers", add_ons=[{"code": "calls", "tiers": own}])
    assert [each["unit_amount"] for each in made["add_ons"][0]["tiers"]] == [5.0, None]


async def test_lists_filter_by_state(far: RecurlySide) -> None:
    """`live` is active, canceled, future or in trial; HEAD counts (OAS: filter_subscription_state)."""
    active, canceled = await far.subscribe(), await far.subscribe(account="bob")
    await far.call("PUT", path_of(canceled, "/cancel"))
    ended = await far.subscribe(account="eve")
    await far.call("DELETE", path_of(ended))
    for state, expected in (("active", {active["id"]}), ("live", {active["id"], canceled["id"]})):
        listed = await far.call("GET", f"/subscriptions?state={state}")
        assert {each["id"] for each in listed["data"]} == expected
        async with await far.send("HEAD", f"/subscriptions?state={state}") as answer:
            assert answer.headers["Recurly-Total-Records"] == str(len(expected))
    assert (await far.call("GET", "/accounts/code-eve/subscriptions?state=live"))["data"] == []
    await far.refused("GET", "/subscriptions?state=paused", status=400)


async def test_the_bill_date_can_be_moved(far: RecurlySide) -> None:
    """`next_bill_date` moves the end of the period, and later ones count from it."""
    made = await far.subscribe()
    await far.refused("PUT", path_of(made), {"next_bill_date": stamp(START)})
    moved = await far.call(
        "PUT", path_of(made), {"next_bill_date": "2026-02-10T00:00:00Z", "po_number": "m2"}
    )
    assert (moved["current_period_ends_at"], moved["po_number"]) == ("2026-02-10T00:00:00Z", "m2")
    far.pass_(days=10)
    assert (await far.call("GET", path_of(made)))["current_period_ends_at"] == "2026-03-10T00:00:00Z"


async def test_many_subscriptions_are_paged_in_order(far: RecurlySide) -> None:
    """By when they were made, each once, the live ones only: neither paused nor ended."""
    far.site.configure(sixty_second_guard=False, rate_limit_per_minute=10_000)
    made = [await far.subscribe(account=f"a{number}") for number in range(25)]
    for each in made[::5]:
        await far.call("DELETE", path_of(each))
    far.site.pause(made[1]["uuid"])
    await far.call("PUT", path_of(made[2], "/cancel"))
    wanted = [each["id"] for index, each in enumerate(made) if index % 5 and index != 1]
    for order in ("asc", "desc"):
        path, found = f"/subscriptions?state=live&limit=7&order={order}", []
        while path:
            page = await far.call("GET", path)
            found += [each["id"] for each in page["data"]]
            path = page["next"]
        assert found == (wanted if order == "asc" else wanted[::-1])
