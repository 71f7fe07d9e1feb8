"""Run by test_recurly_sdk.py in a process of its own: the official SDK, strict, against a local port.

Strict mode is read when `recurly` is imported, and turns every attribute the SDK does not know into an error.
"""

import http.client
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import recurly

ADD_ON = {
    "code": "calls",
    "name": "Calls",
    "add_on_type": "usage",
    "usage_type": "price",
    "measured_unit_name": "call",
    "tier_type": "tiered",
    "tiers": [
        {"ending_quantity": 10, "currencies": [{"currency": "USD", "unit_amount": 1}]},
        {"currencies": [{"currency": "USD", "unit_amount_decimal": "0.0025"}]},
    ],
}
PLAN = {
    "code": "basic",
    "name": "Basic",
    "currencies": [{"currency": "USD", "unit_amount": 20.0}],
    "setup_fees": [{"currency": "USD", "unit_amount": 5.0}],
    "custom_fields": [{"name": "marker", "value": "p1"}],
}
SUBSCRIPTION = {
    "plan_code": "basic",
    "currency": "USD",
    "account": {"code": "ann"},
    "collection_method": "manual",
    "po_number": "m1",
    "custom_fields": [{"name": "marker", "value": "s1"}],
    "add_ons": [{"code": "calls"}, {"code": "seats"}],
}


def connected(port: int) -> Any:
    """A client wired to the port without TLS (recurly.md 1.7)."""
    client = recurly.Client("sandbox-api-key", timeout=10.0)
    assert "_BaseClient__conn" in vars(client), "unsupported recurly SDK layout"
    client._BaseClient__conn.close()
    client._BaseClient__conn = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    return client


def catalog(client: Any) -> None:
    """Measured unit, plan, add-ons, account."""
    unit = client.create_measured_unit({"name": "call", "display_name": "Call"})
    assert client.get_measured_unit("name-call").id == unit.id
    plan = client.create_plan(PLAN)
    assert client.get_plan("code-basic").currencies[0].unit_amount == 20.0
    assert client.update_plan(plan.id, {"name": "Renamed"}).name == "Renamed"
    add_on = client.create_plan_add_on("code-basic", ADD_ON)
    assert [tier.ending_quantity for tier in add_on.tiers] == [10, 999_999_999]
    seats = {"code": "seats", "name": "Seats", "currencies": [{"currency": "USD", "unit_amount": 3}]}
    client.create_plan_add_on(plan.id, seats)
    assert client.get_plan_add_on(plan.id, "code-calls").measured_unit_id == unit.id
    client.update_plan_add_on(plan.id, "code-calls", {"name": "API calls"})
    assert client.list_plan_add_ons(plan.id).count() == 2
    client.create_account({"code": "ann", "email": "ann@example.com"})
    assert client.get_account("code-ann").state == "active"
    assert client.update_account("code-ann", {"company": "Ann Ltd"}).company == "Ann Ltd"
    for listed in (
        client.list_sites(),
        client.list_plans(),
        client.list_accounts(),
        client.list_measured_unit(),
    ):
        assert listed.count() == len(list(listed.items())) == 1


def usage(client: Any) -> str:
    """A subscription with 25 records over several pages; returns its UUID."""
    made = client.create_subscription(SUBSCRIPTION)
    assert (made.state, made.po_number) == ("active", "m1")
    key = f"uuid-{made.uuid}"
    assert isinstance(client.get_subscription(key).current_period_ends_at, datetime)
    assert client.update_subscription(key, {"po_number": "m2"}).po_number == "m2"
    calls, seats = made.add_ons
    own = [{"unit_amount_decimal": "0.5"}]
    entries = [{"id": calls.id, "tiers": own}, {"id": seats.id}]
    change = client.create_subscription_change(key, {"timeframe": "now", "add_ons": entries})
    assert (change.activated, type(change)) == (True, recurly.resources.SubscriptionChange)
    assert change.add_ons[0].tiers[0].unit_amount_decimal == "0.5"
    for number in range(25):
        body = {"amount": number, "merchant_tag": f"t{number}", "usage_timestamp": made.created_at}
        headers = {"Idempotency-Key": f"k{number}"}
        first = client.create_usage(key, "code-calls", body, headers=headers)
        again = client.create_usage(key, "code-calls", body, headers=headers)
        assert first.id == again.id
        assert (first.amount, type(first)) == (float(number), recurly.resources.Usage)
    params = {"billing_status": "all", "sort": "usage_timestamp", "order": "asc", "limit": 10}
    found = list(client.list_usage(key, "code-calls", params=params).items())
    assert [record.merchant_tag for record in found] == [f"t{number}" for number in range(25)]
    assert client.get_usage(found[1].id).amount == 1.0
    assert client.update_usage(found[1].id, {"amount": 2, "merchant_tag": "t1"}).amount == 2.0
    client.remove_usage(found[0].id)
    assert client.list_usage(key, "code-calls").count() == 24
    return key


def errors(client: Any, key: str) -> None:
    """Each kind arrives as the class the SDK has for it."""
    taken = raised(recurly.errors.ValidationError, lambda: client.create_plan(PLAN))
    assert taken.error.get_response().status == 422
    assert taken.error.params[0]["message"] == "has already been taken"
    for expected, act in (
        (recurly.errors.NotFoundError, lambda: client.get_account("code-bob")),
        (recurly.errors.ValidationError, lambda: client.create_account({"code": "bob", "nick": "b"})),
        (recurly.errors.ValidationError, lambda: client.create_usage(key, "code-seats", {"amount": 1})),
        (recurly.errors.MissingFeatureError, lambda: client.create_plan(PLAN | {"pricing_model": "ramp"})),
        (recurly.errors.InvalidApiKeyError, lambda: wrong(client).get_plan("code-basic")),
    ):
        raised(expected, act)


def raised(expected: type[BaseException], act: Callable[[], object]) -> Any:
    """The error that `act` must raise."""
    try:
        act()
    except expected as error:
        return error
    raise AssertionError(f"{expected} was not raised")


def wrong(client: Any) -> Any:
    """A client with an API key the site does not know."""
    other = connected(client._BaseClient__conn.port)
    other._BaseClient__api_key = "wrong"
    return other


def billed(client: Any, key: str) -> None:
    """Invoices and lines after a bill run, and how it ends."""
    assert client.list_usage(key, "code-calls").count() == 0
    assert client.list_usage(key, "code-calls", params={"billing_status": "billed"}).count() == 24
    invoices = list(client.list_subscription_invoices(key, params={"order": "asc"}).items())
    assert [invoice.origin for invoice in invoices] == ["purchase", "renewal"]
    assert client.get_invoice(f"number-{invoices[1].number}").total == invoices[1].total
    lines = list(client.list_subscription_line_items(key).items())
    assert {line.origin for line in lines} == {"plan", "setup_fee", "add_on"}
    assert len(list(client.list_invoice_line_items(invoices[1].id).items())) == 3
    assert len(list(client.list_account_subscriptions("code-ann", params={"state": "live"}).items())) == 1
    assert client.pause_subscription(key, {"remaining_pause_cycles": 1}).remaining_pause_cycles == 1
    assert client.cancel_subscription(key, body={"timeframe": "bill_date"}).state == "canceled"
    assert client.reactivate_subscription(key).state == "active"
    assert client.cancel_subscription(key).state == "canceled"
    ended = client.terminate_subscription(key, params={"refund": "none", "charge": True})
    assert ended.state == "expired"
    assert client.list_subscriptions(params={"state": "expired"}).count() == 1
    assert client.remove_plan_add_on("code-basic", "code-seats").state == "inactive"
    assert client.remove_plan("code-basic").state == "inactive"


def main() -> None:
    """Waits for a line on stdin where the site's owner is to run the bills."""
    assert recurly.STRICT_MODE
    client = connected(int(sys.argv[1]))
    catalog(client)
    key = usage(client)
    errors(client, key)
    sys.stdout.write(f"{key.removeprefix('uuid-')}\n")
    sys.stdout.flush()
    sys.stdin.readline()
    billed(client, key)
    client._BaseClient__conn.close()
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
