"""Changing a subscription: which add-ons it has from now on, at which prices, and what is invoiced for it."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from recurly_side import START, Json, RecurlySide, add_on, lines, path_of, recurly_side, tier, usage_path

from billingd.sandbox.faults import Rule


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan(add_ons=[add_on(), add_on("mails"), add_on("steps", tier_type="stairstep")])
        yield side


async def change(far: RecurlySide, made: Json, **body: Any) -> Json:
    """A change that is taken."""
    answer: Json = await far.call("POST", path_of(made, "/change"), body, status=201)
    return answer


async def use(far: RecurlySide, made: Json, code: str, amount: int, *, status: int = 201) -> Any:
    """Usage of an add-on now."""
    return await far.call("POST", usage_path(made, code), {"amount": amount}, status=status)


def codes(told: Json) -> list[str]:
    """The add-ons of an answer."""
    return [each["add_on"]["code"] for each in told["add_ons"]]


def ids(told: Json) -> list[Json]:
    """What keeps each add-on as it is."""
    return [{"id": each["id"]} for each in told["add_ons"]]


async def test_an_add_on_is_attached_from_now_on(far: RecurlySide) -> None:
    """What is there stays as it is, usage and all; the new one takes no usage from before it was there."""
    made = await far.subscribe()
    price = {"currencies": [{"currency": "USD", "unit_amount": 9}]}
    await far.call("PUT", "/plans/code-basic/add_ons/code-calls", price, status=201)
    await far.use(made, 5, far.clock.now())
    at = far.pass_(days=3)
    answer = await change(far, made, timeframe="now", add_ons=[*ids(made), {"code": "mails"}])
    assert (answer["object"], answer["activated"], codes(answer)) == (
        "subscription_change",
        True,
        ["calls", "mails"],
    )
    assert answer["invoice_collection"]["charge_invoice"] is None
    shown = await far.call("GET", path_of(made))
    assert shown["add_ons"][0]["id"] == made["add_ons"][0]["id"]
    assert shown["add_ons"][0]["unit_amount_decimal"] == "0.1"
    assert shown["add_ons"][1]["created_at"] == at.isoformat(timespec="seconds").replace("+00:00", "Z")
    body = {"amount": 1, "usage_timestamp": (at - timedelta(seconds=1)).isoformat()}
    await far.refused("POST", usage_path(made, "mails"), body)
    await use(far, made, "mails", 3)
    far.pass_(days=40)
    told = lines(far.invoices(made)[1], usage=True)
    assert told == [("calls", 5, "0.50"), ("mails", 3, "0.30")]


async def test_what_is_left_out_is_removed_and_invoiced_at_once(far: RecurlySide) -> None:
    """Its unbilled usage alone, each unit once, whatever its tiers; then it takes no more usage."""
    made = await far.subscribe(add_ons=[{"code": "calls"}, {"code": "mails"}, {"code": "steps"}])
    for code, amount in (("calls", 10), ("mails", 20), ("steps", 7)):
        await use(far, made, code, amount)
    far.pass_(days=1)
    answer = await change(far, made, add_ons=ids(made)[:1])
    assert codes(answer) == ["calls"]
    assert answer["invoice_collection"]["charge_invoice"]["origin"] == "immediate_change"
    assert lines(far.invoices(made)[1]) == [("mails", 20, "2.00"), ("steps", 7, "1.00")]
    await far.refused("POST", usage_path(made, "mails"), {"amount": 1}, status=404, type_="not_found")
    far.pass_(days=40)
    assert lines(far.invoices(made)[2], usage=True) == [("calls", 10, "1.00")]
    told = far.told(made)["add_ons"]
    assert (told["mails"]["reported_units"], told["mails"]["billed_units"]) == (20, 20)


async def test_all_add_ons_can_be_removed_and_attached_again(far: RecurlySide) -> None:
    """An empty list removes all; attached again it is another, at the plan's price of then."""
    made = await far.subscribe()
    await far.use(made, 5)
    far.pass_(hours=1)
    assert codes(await change(far, made, add_ons=[])) == []
    price = {"currencies": [{"currency": "USD", "unit_amount": 1}]}
    await far.call("PUT", "/plans/code-basic/add_ons/code-calls", price, status=201)
    again = await change(far, made, add_ons=[{"code": "calls"}])
    assert again["add_ons"][0]["id"] != made["add_ons"][0]["id"]
    await far.use(made, 2)
    far.pass_(days=40)
    assert [lines(each, usage=True) for each in far.invoices(made)[1:3]] == [
        [("calls", 5, "0.50")],
        [("calls", 2, "2.00")],
    ]
    told = far.told(made)["add_ons"]["calls"]
    assert (told["reported_units"], told["billed_units"], told["records"]) == (7, 7, 2)


@pytest.mark.parametrize("by", ["id", "code"])
async def test_a_price_that_changes_bills_what_is_unbilled_at_the_old_one(far: RecurlySide, by: str) -> None:
    """By id with a price of its own, or by code, which takes the plan's price of now (4.6)."""
    made = await far.subscribe()
    await far.use(made, 10)
    price = {"currencies": [{"currency": "USD", "unit_amount": 3}]}
    await far.call("PUT", "/plans/code-basic/add_ons/code-calls", price, status=201)
    entry = {"code": "calls"} if by == "code" else {**ids(made)[0], "unit_amount": 3}
    answer = await change(far, made, add_ons=[entry])
    assert (answer["add_ons"][0]["id"], answer["add_ons"][0]["unit_amount"]) == (ids(made)[0]["id"], 3.0)
    await far.use(made, 1)
    far.pass_(days=40)
    assert [lines(each, usage=True) for each in far.invoices(made)[1:3]] == [
        [("calls", 10, "1.00")],
        [("calls", 1, "3.00")],
    ]


async def test_tiers_can_be_changed_by_id(far: RecurlySide) -> None:
    """Those given take the place of those there; a unit amount is refused."""
    await far.make_plan(code="tiers", add_ons=[add_on(tier_type="tiered", tiers=[tier(None, "1")])])
    made = await far.subscribe(plan_code="tiers")
    own = [{"ending_quantity": 2, "unit_amount": 5}, {"unit_amount_decimal": "0.001"}]
    answer = await change(far, made, add_ons=[{**ids(made)[0], "tiers": own}])
    assert [each["unit_amount"] for each in answer["add_ons"][0]["tiers"]] == [5.0, None]
    body = {"add_ons": [{**ids(made)[0], "unit_amount": 1}]}
    await far.refused("POST", path_of(made, "/change"), body)


async def test_a_base_price_is_prorated(far: RecurlySide) -> None:
    """What is left of the period is given back at the old price and charged at the new one."""
    made = await far.subscribe()  # 31 January at noon to 28 February at noon, for 20
    far.pass_(days=7)
    answer = await change(far, made, unit_amount=40, po_number="m2")
    assert (answer["unit_amount"], codes(answer)) == (40.0, ["calls"])
    assert [each["total"] for each in far.invoices(made)] == ["20.00", "30.00", "-15.00"]
    shown = await far.call("GET", path_of(made))
    assert (shown["unit_amount"], shown["po_number"]) == (40.0, "m2")
    far.pass_(days=21)
    assert lines(far.invoices(made)[3], usage=False) == [("plan", 1, "40.00")]


@pytest.mark.parametrize(
    ("body", "status", "type_", "param"),
    [
        ({}, 422, "validation", "base"),
        ({"timeframe": "now", "add_ons": [{"id": "ID"}]}, 422, "validation", "base"),
        ({"add_ons": [{"code": "calls"}]}, 422, "validation", "base"),
        ({"po_number": "m1"}, 422, "validation", "base"),
        ({"add_ons": [{"id": "ID"}, {"code": "unknown"}]}, 422, "validation", "add_ons.add_on"),
        ({"add_ons": [{"id": "ID"}, {"code": "gone"}]}, 422, "validation", "add_ons.add_on"),
        ({"add_ons": [{"id": "ID"}, {"code": "calls"}]}, 422, "validation", "add_ons.code"),
        ({"add_ons": [{"code": "mails"}, {"code": "mails"}]}, 422, "validation", "add_ons.code"),
        ({"add_ons": [{"id": "unknown"}]}, 422, "validation", "add_ons.id"),
        ({"add_ons": [{"id": "ID", "code": "mails"}]}, 422, "validation", "add_ons.id"),
        ({"add_ons": [{}]}, 422, "validation", "add_ons.code"),
        ({"add_ons": [{"id": "ID", "quantity": 2}]}, 422, "validation", "add_ons.quantity"),
        ({"add_ons": [{"id": "ID", "amount": 2}]}, 400, "validation", "add_ons.amount"),
        ({"add_ons": {"id": "ID"}}, 400, "validation", "add_ons"),
        ({"add_on": []}, 400, "validation", "add_on"),
        ({"timeframe": "later", "add_ons": []}, 422, "validation", "timeframe"),
        ({"timeframe": "bill_date", "add_ons": []}, 422, "missing_feature", "timeframe"),
        ({"timeframe": "term_end", "add_ons": []}, 422, "missing_feature", "timeframe"),
        ({"plan_code": "other"}, 422, "missing_feature", "plan_code"),
        ({"quantity": 2}, 422, "missing_feature", "quantity"),
        ({"add_ons": [{"id": "ID"}, {"code": "seats"}]}, 422, "missing_feature", "add_ons"),
    ],
)
async def test_a_wrong_change_is_refused_and_named(
    far: RecurlySide, body: Json, status: int, type_: str, param: str
) -> None:
    """Nothing of it happens, also when it would have removed something."""
    seats = {"code": "seats", "name": "Seats", "currencies": [{"currency": "USD", "unit_amount": 3}]}
    for each in (seats, add_on("gone")):
        await far.call("POST", "/plans/code-basic/add_ons", each, status=201)
    await far.call("DELETE", "/plans/code-basic/add_ons/code-gone")
    made = await far.subscribe()
    await far.use(made, 5)
    for entry in body.get("add_ons") or () if isinstance(body.get("add_ons"), list) else ():
        entry |= ids(made)[0] if entry.get("id") == "ID" else {}
    error = await far.refused("POST", path_of(made, "/change"), body, status=status, type_=type_)
    assert param in [each["param"] for each in error["params"]]
    assert codes(await far.call("GET", path_of(made))) == ["calls"]
    assert len(far.invoices(made)) == 1


@pytest.mark.parametrize("end", ["cancel", "terminate", "pause", "future", "plan"])
async def test_only_an_active_subscription_of_a_live_plan_can_be_changed(far: RecurlySide, end: str) -> None:
    """`immutable_subscription`."""
    starts = {"starts_at": (START + timedelta(days=3)).isoformat()} if end == "future" else {}
    made = await far.subscribe(**starts)
    match end:
        case "cancel":
            await far.call("PUT", path_of(made, "/cancel"))
        case "terminate":
            await far.call("DELETE", path_of(made))
        case "pause":
            far.site.pause(made["uuid"])
        case "plan":
            await far.call("DELETE", "/plans/code-basic")
    body = {"add_ons": [*ids(made), {"code": "mails"}]}
    await far.refused("POST", path_of(made, "/change"), body, type_="immutable_subscription")


async def test_an_add_on_that_the_plan_lost_is_kept_by_id(far: RecurlySide) -> None:
    """And cannot be had by code any more."""
    made = await far.subscribe()
    await far.call("DELETE", "/plans/code-basic/add_ons/code-calls")
    await far.refused("POST", path_of(made, "/change"), {"add_ons": [{"code": "calls"}, {"code": "mails"}]})
    assert codes(await change(far, made, add_ons=[*ids(made), {"code": "mails"}])) == ["calls", "mails"]


async def test_a_change_is_repeated_under_its_key(far: RecurlySide) -> None:
    """The same answer, and one effect."""
    made = await far.subscribe()
    body, key = {"add_ons": [*ids(made), {"code": "mails"}]}, {"Idempotency-Key": "k1"}
    first = await far.call("POST", path_of(made, "/change"), body, status=201, headers=key)
    again = await far.call("POST", path_of(made, "/change"), body, status=201, headers=key)
    assert again == first
    await far.refused("POST", path_of(made, "/change"), body)


async def test_another_change_may_be_in_progress(far: RecurlySide) -> None:
    """`simultaneous_request`, and nothing is done (V2:1062)."""
    made = await far.subscribe()
    body = {"add_ons": [*ids(made), {"code": "mails"}]}
    far.faults.add(Rule("recurly", "POST", "/subscriptions/*/change", "422"))
    error = await far.refused("POST", path_of(made, "/change"), body, type_="simultaneous_request")
    assert "already in progress" in error["message"]
    assert codes(await far.call("GET", path_of(made))) == ["calls"]
    await change(far, made, **body)


async def test_a_new_name_shows_everywhere(far: RecurlySide) -> None:
    """Names change on subscriptions that exist too, and so do the lines of later invoices (4.3)."""
    made = await far.subscribe()
    await far.call("PUT", "/plans/code-basic", {"name": "New plan"}, status=201)
    await far.call("PUT", "/plans/code-basic/add_ons/code-calls", {"name": "New calls"}, status=201)
    shown = await far.call("GET", path_of(made))
    assert (shown["plan"]["name"], shown["add_ons"][0]["add_on"]["name"]) == ("New plan", "New calls")
    assert shown["unit_amount"] == 20.0
    far.pass_(days=40)
    listed = (await far.call("GET", path_of(made, "/line_items?order=asc")))["data"]
    assert [each["description"] for each in listed] == ["Basic", "New calls", "New plan"]
