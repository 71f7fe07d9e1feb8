"""Drift of links: plans, prices and subscriptions that one side has otherwise than another, or not at all."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from billingd.domain.agreement import Uncharged
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription, SubscribedAddOn
from billingd.domain.catalog import ProductPlan, Subscription
from billingd.domain.charges import Prices
from billingd.domain.drift_links import LinkedPlan, LinkedSubscription, Sides, compare_links
from billingd.domain.pricing import AddOnSpec, MeasuredUnitSpec, PlanSpec

CODE, QUOTA = "amplify-plan-p1", "amplify-quota-q1"
PRICE = Decimal("0.5")
FLAT = Prices("flat", PRICE)

PLAN = ProductPlan(
    id="p1",
    name="metered",
    title="Metered",
    product_name="weather",
    product_id=None,
    state="active",
    type="paid",
    approval="manual",
    currency="USD",
    interval="monthly",
    price=Decimal(10),
    setup_price=Decimal(0),
    term=None,
    renewal="automatic",
    cycles=None,
)
ADD_ON_SPEC = AddOnSpec("q1", QUOTA, "calls", MeasuredUnitSpec("u", "U"), "calls", "flat", PRICE)
SPEC = PlanSpec(
    "p1", CODE, "Metered", "p1", "USD", "months", 1, Decimal(10), Decimal(0), None, True, (ADD_ON_SPEC,)
)
SUBSCRIPTION = Subscription(
    id="s1",
    name="acme",
    title="Acme",
    plan_name="metered",
    plan_id="p1",
    product_name="weather",
    approval="approved",
    state="active",
    state_at=None,
    owner_user_id=None,
    owner_team_id=None,
    owner_org_id=None,
    created_by=None,
    marketplace_id=None,
    migrated_from=None,
)
LINKED_PLAN = LinkedPlan("p1", "metered", CODE, "active")
LINKED = LinkedSubscription("s1", "Acme", CODE, "account", "u1", "active")
BILLED_PLAN = BilledPlan("1", CODE, "active", "months", 1, None, True, {"USD": Decimal(10)}, {})
ADD_ON = BilledAddOn(
    "2", QUOTA, "active", "usage", "price", "cumulative", "billing_period", "flat", None, PRICE, ()
)
BILLED = BilledSubscription(
    uuid="u1",
    plan_code=CODE,
    account_code="account",
    marker="s1",
    state="active",
    add_on_codes=(QUOTA,),
    activated_at=None,
    period_started_at=None,
    period_ends_at=None,
    add_ons=(SubscribedAddOn("3", QUOTA, FLAT, None),),
    unit_amount=Decimal(10),
    currency="USD",
)
AGREEING = Sides(
    plans={"p1": PLAN},
    specs={"p1": SPEC},
    subscriptions={"s1": SUBSCRIPTION},
    linked_plans=[LINKED_PLAN],
    linked=[LINKED],
    billed_plans={CODE: BILLED_PLAN},
    add_ons={CODE: {QUOTA: ADD_ON}},
    billed={"u1": BILLED},
    busy=(),
)


def told(**changes: Any) -> list[tuple[str, str]]:
    found = list(compare_links(replace(AGREEING, **changes)))
    assert all(one.units == 0 and one.cause and one.fix and not one.repairable for one in found)
    return [(one.kind, one.subject) for one in found]


def test_what_agrees_is_no_drift() -> None:
    assert told() == []


PLAN_SUBJECT, ADD_ON_SUBJECT, S1 = f"plan:{CODE}", f"add_on:{QUOTA}", "subscription:s1"
DEARER = Decimal("0.6")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"billed_plans": {}, "add_ons": {}}, [("link_missing", PLAN_SUBJECT)]),
        (
            {"linked_plans": [], "linked": [], "billed": {}, "subscriptions": {}},
            [("link_missing", PLAN_SUBJECT)],
        ),
        ({"plans": {}, "specs": {}}, [("link_orphaned", PLAN_SUBJECT)]),
        ({"plans": {}, "specs": {}, "absent": {"p1"}}, []),
        ({"plans": {}, "specs": {}, "unread": {"p1"}}, []),
        ({"plans": {}, "specs": {}, "unread": {"p1"}, "linked_plans": []}, []),
        ({"plans": {}, "specs": {}, "deleted": {"p1"}, "absent": {"p1"}}, [("link_orphaned", PLAN_SUBJECT)]),
        ({"plans": {"p1": replace(PLAN, state="archived")}, "specs": {}}, [("link_orphaned", PLAN_SUBJECT)]),
        (
            {"billed_plans": {CODE: BILLED_PLAN, "amplify-plan-x": BILLED_PLAN}},
            [("link_orphaned", "plan:amplify-plan-x")],
        ),
        (
            {"billed_plans": {CODE: replace(BILLED_PLAN, unit_amounts={"USD": Decimal(12)})}},
            [("price_differs", PLAN_SUBJECT), ("price_differs", "subscription:s1:plan")],
        ),
        (
            {"add_ons": {CODE: {QUOTA: replace(ADD_ON, unit_amount=DEARER)}}},
            [("price_differs", ADD_ON_SUBJECT), ("price_differs", f"subscription:s1:{QUOTA}")],
        ),
        ({"add_ons": {CODE: {}}}, [("link_missing", ADD_ON_SUBJECT)]),
        ({"add_ons": {CODE: {QUOTA: replace(ADD_ON, state="inactive")}}}, [("link_missing", ADD_ON_SUBJECT)]),
    ],
)
def test_plans(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert told(**changes) == expected


X = "amplify-quota-x"
FREE = Uncharged(X, "Extra", gone=False)
FOR_NOTHING = replace(ADD_ON, code=X, unit_amount=Decimal(0))
WITH_IT = {"u1": replace(BILLED, add_ons=(*BILLED.add_ons, SubscribedAddOn("4", X, FLAT, None)))}


@pytest.mark.parametrize(
    ("free", "at_plan", "billed", "expected"),
    [
        (FREE, replace(ADD_ON, code=X), WITH_IT, [("price_differs", f"add_on:{X}")]),
        (FREE, replace(ADD_ON, code=X), {"u1": BILLED}, [("price_differs", f"add_on:{X}")]),
        (FREE, FOR_NOTHING, WITH_IT, [("price_differs", f"subscription:s1:{X}")]),
        (FREE, FOR_NOTHING, {"u1": BILLED}, [("link_missing", f"subscription:s1:{X}")]),
        (FREE, replace(FOR_NOTHING, state="inactive"), WITH_IT, [("price_differs", f"subscription:s1:{X}")]),
        (FREE, replace(FOR_NOTHING, state="inactive"), {"u1": BILLED}, []),
        (replace(FREE, gone=True), replace(ADD_ON, code=X), WITH_IT, []),
        (replace(FREE, gone=True), replace(ADD_ON, code=X), {"u1": BILLED}, []),
        (replace(FREE, gone=True), replace(ADD_ON, code=X, state="inactive"), WITH_IT, []),
    ],
)
def test_what_amplify_charges_nothing_for(
    free: Uncharged, at_plan: BilledAddOn, billed: Any, expected: list[tuple[str, str]]
) -> None:
    """New subscriptions, and those that are there, charged for it at Recurly."""
    changes = {"add_ons": {CODE: {QUOTA: ADD_ON, X: at_plan}}, "billed": billed}
    assert told(linked_plans=[replace(LINKED_PLAN, uncharged=(free,))], **changes) == expected


ENDED = replace(LINKED, state="ended")
OVER: dict[str, Any] = {"subscriptions": {"s1": replace(SUBSCRIPTION, state="archived")}}


def test_only_what_was_deleted_is_said_to_be_over() -> None:
    """What Amplify shows no more may be there all the same."""
    causes = {
        one.cause.split(",")[0]
        for deleted in ((), ("s1",))
        for one in compare_links(replace(AGREEING, subscriptions={}, deleted=deleted))
    }
    assert causes == {"Acme is not found at Amplify", "Acme is over at Amplify"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"billed": {}}, [("link_missing", S1)]),
        ({"billed": {"u1": replace(BILLED, state="expired")}}, [("link_missing", S1)]),
        ({"billed": {"u1": replace(BILLED, account_code="b")}}, [("link_missing", f"{S1}:account")]),
        ({"billed": {"u1": replace(BILLED, plan_code="other")}}, [("link_missing", f"{S1}:plan")]),
        ({"billed": {"u1": replace(BILLED, marker="s9")}}, [("link_missing", f"{S1}:marker")]),
        ({"billed": {"u1": replace(BILLED, marker=None)}}, []),
        ({"billed": {"u1": replace(BILLED, add_ons=())}}, [("link_missing", f"{S1}:{QUOTA}")]),
        ({"linked": [], "billed": {}}, [("link_missing", S1)]),
        ({"linked": [], "billed": {}, "busy": {S1}}, []),
        ({"subscriptions": {}}, [("link_orphaned", S1)]),
        ({"subscriptions": {"s1": replace(SUBSCRIPTION, state="archived")}}, [("link_orphaned", S1)]),
        ({"subscriptions": {"s1": replace(SUBSCRIPTION, approval="rejected")}}, [("link_orphaned", S1)]),
        ({"subscriptions": {}, "busy": {"end:s1"}}, []),
        ({"subscriptions": {}, "deleted": {"s1"}}, [("link_orphaned", S1)]),
        ({"subscriptions": {}, "deleted": {"s1"}, "absent": {"s1"}}, [("link_orphaned", S1)]),
        ({"subscriptions": {}, "absent": {"s1"}}, []),
        ({"subscriptions": {}, "unread": {"s1"}}, []),
        ({"subscriptions": {}, "unread": {"s1"}, "billed": {}}, []),
        (
            {"subscriptions": {}, "unread": {"s1"}, "billed": {"u1": replace(BILLED, account_code="b")}},
            [("link_missing", f"{S1}:account")],
        ),
        ({"linked": [], "billed": {}, "busy": {"adopt:s1"}}, []),
        ({"linked": [], "billed": {}, "specs": {}}, [("link_missing", S1)]),
        ({"linked": [], "billed": {}, "specs": {}, "linked_plans": [], "billed_plans": {}}, []),
        ({"linked": [ENDED]}, [("link_missing", S1)]),
        ({"linked": [ENDED], "billed": {}}, [("link_missing", S1)]),
        ({"linked": [ENDED], **OVER}, [("link_orphaned", S1)]),
        ({"linked": [ENDED], "subscriptions": {}}, [("link_orphaned", S1)]),
        ({"linked": [ENDED], **OVER, "billed": {"u1": replace(BILLED, state="canceled")}}, []),
        ({"linked": [replace(LINKED, state="ending")], "busy": {"end:s1"}}, []),
        ({"linked": [ENDED], "billed": {}, "subscriptions": {}}, []),
        (
            {"billed": {"u1": BILLED, "u2": replace(BILLED, uuid="u2")}},
            [("link_orphaned", "subscription:u2")],
        ),
        (
            {"billed": {"u1": BILLED, "u2": replace(BILLED, uuid="u2", marker=None)}},
            [("link_orphaned", "subscription:u2")],
        ),
        (
            {"billed": {"u1": BILLED, "u2": replace(BILLED, uuid="u2", marker="s9")}},
            [("link_orphaned", "subscription:u2")],
        ),
        (
            {"billed": {"u1": BILLED, "u2": replace(BILLED, uuid="u2", marker="PO 9", plan_code="gold")}},
            [],
        ),
        (
            {"billed": {"u1": BILLED, "u2": replace(BILLED, uuid="u2", marker=None, state="expired")}},
            [],
        ),
    ],
)
def test_subscriptions(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert told(**changes) == expected
