"""The comparison of the three sides, one case a row: which steps it makes, and which it does not."""

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from billingd.domain import resync
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import (
    PerUnit,
    Product,
    ProductPlan,
    Quota,
    Subscription,
    Term,
    UnknownPricing,
    Unlimited,
)
from billingd.domain.charges import Prices
from billingd.domain.pricing import translate
from billingd.domain.resync import Billed, Compared, Known, Listed, Standing, Step


@dataclass(frozen=True)
class Plan:
    """A plan's link."""

    plan_id: str = "p1"
    name: str = "metered"
    title: str = "Metered"
    product_name: str = "weather"
    plan_code: str = "amplify-plan-p1"
    state: str = "active"


PRICES = Prices("flat", Decimal("0.5"))


@dataclass(frozen=True)
class AddOn:
    """A quota's link."""

    quota_id: str = "q1"
    plan_id: str = "p1"
    add_on_code: str = "amplify-quota-q1"
    title: str = "Calls"
    prices: Prices | None = PRICES


@dataclass(frozen=True)
class Link:
    """A subscription's link."""

    subscription_id: str = "s1"
    name: str = "acme"
    title: str = "Acme"
    plan_id: str = "p1"
    uuid: str = "u1"
    state: str = "active"
    billed_state: str | None = "active"


PRODUCT = Product("w1", "weather", "Weather", "active", "recurly")
PLAN = ProductPlan(
    id="p1",
    name="metered",
    title="Metered",
    product_name="weather",
    product_id="w1",
    state="active",
    type="paid",
    approval="manual",
    currency="USD",
    interval="monthly",
    price=Decimal(10),
    setup_price=Decimal(0),
    term=Term("months", 1),
    renewal="automatic",
    cycles=None,
)
QUOTA = Quota("q1", "calls", "Calls", "transactions", PerUnit(Decimal("0.5")))
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
    owner_team_id="t1",
    owner_org_id="o1",
    created_by=None,
    marketplace_id=None,
    migrated_from=None,
)
BILLED_PLAN = BilledPlan(
    id="1",
    code="amplify-plan-p1",
    state="active",
    interval_unit="months",
    interval_length=1,
    total_billing_cycles=1,
    auto_renew=True,
    unit_amounts={"USD": Decimal(10)},
    setup_fees={},
)
BILLED_ADD_ON = BilledAddOn(
    id="2",
    code="amplify-quota-q1",
    state="active",
    add_on_type="usage",
    usage_type="price",
    usage_calculation_type="cumulative",
    usage_timeframe="billing_period",
    tier_type="flat",
    measured_unit_id="3",
    unit_amount=Decimal("0.5"),
    tiers=(),
)
BILLED = BilledSubscription(
    uuid="u1",
    plan_code="amplify-plan-p1",
    account_code="amplify-team-t1",
    marker="s1",
    state="active",
    add_on_codes=("amplify-quota-q1",),
    activated_at=None,
    period_started_at=None,
    period_ends_at=None,
)


@dataclass(frozen=True)
class World:
    """All three sides; by default they agree."""

    products: tuple[Product, ...] = (PRODUCT,)
    plans: tuple[ProductPlan, ...] = (PLAN,)
    quotas: tuple[Quota, ...] | None = (QUOTA,)
    subscriptions: tuple[Subscription, ...] = (SUBSCRIPTION,)
    unread: frozenset[str] = frozenset()
    linked_plans: tuple[Plan, ...] = (Plan(),)
    linked_add_ons: tuple[AddOn, ...] = (AddOn(),)
    links: tuple[Link, ...] = (Link(),)
    before: frozenset[str] = frozenset({"p1", "s1"})
    waiting: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    dead: tuple[str, ...] = ()
    held: tuple[tuple[str, str, str], ...] = ()
    billed_plans: tuple[BilledPlan, ...] = (BILLED_PLAN,)
    billed_add_ons: tuple[BilledAddOn, ...] = (BILLED_ADD_ON,)
    billed: tuple[BilledSubscription, ...] = (BILLED,)

    def compared(self) -> Compared:
        quotas = {} if self.quotas is None else {plan.id: self.quotas for plan in self.plans}
        codes = ("q1", "q2")
        return resync.compare(
            Listed(self.products, self.plans, quotas, self.subscriptions, self.unread),
            Known(
                plans=self.linked_plans,
                add_ons=dict(zip(codes, self.linked_add_ons, strict=False)),
                subscriptions={one.subscription_id: one for one in self.links},
                before=self.before,
                waiting=self.waiting,
                dead=dict.fromkeys(self.dead, "action 7 is a dead letter: boom"),
                held={
                    subject: Standing(kind, reason, subject.split(":")[1], self.refused)
                    for subject, kind, reason in self.held
                },
                gone=self.gone,
            ),
            Billed(
                {one.code: one for one in self.billed_plans},
                {one.code: self.billed_add_ons for one in self.billed_plans},
                self.billed,
            ),
            because="resync:now",
        )


def plan(**changes: Any) -> tuple[ProductPlan, ...]:
    return (replace(PLAN, **changes),)


def subscription(**changes: Any) -> tuple[Subscription, ...]:
    return (replace(SUBSCRIPTION, **changes),)


NEW_PLAN: dict[str, Any] = {
    "linked_plans": (),
    "linked_add_ons": (),
    "links": (),
    "subscriptions": (),
    "billed": (),
}
NEW: dict[str, Any] = {"links": (), "billed": ()}
UNLABELLED = replace(PRODUCT, billing_system=None)
ODD = (replace(QUOTA, pricing=UnknownPricing("odd")), QUOTA)
ODD_REASON = " ".join(
    translate(PLAN, ODD).reasons  # type: ignore[union-attr]
)
DEAR = replace(BILLED_PLAN, unit_amounts={"USD": Decimal(11)})
DEAR_REASON = 'Plan "amplify-plan-p1" costs 11 USD per period at Recurly; Amplify says 10.'
OTHER_QUOTA = Quota("q2", "maps", "Maps", "transactions", PerUnit(Decimal(1)))
THIRD = Quota("q3", "tiles", "Tiles", "transactions", PerUnit(Decimal(1)))

FREE = (QUOTA, replace(OTHER_QUOTA, pricing=Unlimited()))
FREE_REASON = (
    'Add-on "amplify-quota-q2" charges for quota "Maps" at Recurly; Amplify charges nothing for it. '
    "Set its price to 0 there, in every tier."
)
FREE_ADD_ON = replace(BILLED_ADD_ON, code="amplify-quota-q2")
FOR_NOTHING = replace(FREE_ADD_ON, unit_amount=Decimal(0))
TWO: dict[str, Any] = {
    "linked_add_ons": (AddOn(), AddOn("q2", "p1", "amplify-quota-q2", "Maps")),
    "billed_add_ons": (BILLED_ADD_ON, FREE_ADD_ON),
}
FREED: dict[str, Any] = {
    **TWO,
    "quotas": FREE,
    "linked_add_ons": (AddOn(), AddOn("q2", "p1", "amplify-quota-q2", "Maps", Prices("flat", Decimal(0)))),
}

ID = "8ac9dd00aa000001aa000001aa000001"
ORPHAN: dict[str, Any] = {"links": (), "billed": (replace(BILLED, marker=ID),)}
OVER = subscription(state="archived")
ENDED = Link(state="ended")
CANCELED = replace(BILLED, state="canceled")
SERVED = ("subscription:s1:served", "ended_but_served", "So.")
MOVED: dict[str, Any] = {
    "products": (UNLABELLED,),
    "subscriptions": (*subscription(state="migrated"), replace(SUBSCRIPTION, id="s2", migrated_from="acme")),
}

CASES: list[tuple[str, dict[str, Any], str]] = [
    # (what is so, how the world differs, the steps in short)
    ("all agrees", {}, ""),
    # Plans.
    ("a new plan", NEW_PLAN, "+plan"),
    ("a removed link is none", {**NEW_PLAN, "linked_plans": (Plan(state="removed"),)}, "+plan"),
    ("its action waits", {**NEW_PLAN, "waiting": frozenset({"plan:metered"})}, ""),
    ("its action is a dead letter", {**NEW_PLAN, "dead": ("plan:metered",)}, "note"),
    ("a draft", {**NEW_PLAN, "plans": plan(state="draft")}, ""),
    ("free", {**NEW_PLAN, "plans": plan(type="free")}, ""),
    ("of an unknown type", {**NEW_PLAN, "plans": plan(type="custom")}, ""),
    ("approved automatically", {**NEW_PLAN, "plans": plan(approval="automatic")}, ""),
    ("of no labelled product", {**NEW_PLAN, "products": (UNLABELLED,)}, ""),
    ("being deleted", {**NEW_PLAN, "plans": plan(deleting=True)}, ""),
    ("quotas that cannot be read", {**NEW_PLAN, "quotas": None}, "+plan"),
    ("deprecated and nobody's", {**NEW_PLAN, "plans": plan(state="deprecated"), "billed_plans": ()}, ""),
    ("deprecated and at Recurly", {**NEW_PLAN, "plans": plan(state="deprecated")}, "+plan"),
    ("inexpressible", {**NEW_PLAN, "quotas": ODD}, "+plan"),
    (
        "inexpressible, and held for it",
        {**NEW_PLAN, "quotas": ODD, "held": (("plan:metered", "plan_inexpressible", ODD_REASON),)},
        "",
    ),
    (
        "inexpressible for another reason",
        {**NEW_PLAN, "quotas": ODD, "held": (("plan:metered", "plan_inexpressible", "It was odd."),)},
        "+plan",
    ),
    (
        "expressible now",
        {**NEW_PLAN, "held": (("plan:metered", "plan_inexpressible", ODD_REASON),)},
        "+plan",
    ),
    ("refused", {**NEW_PLAN, "held": (("plan:metered", "plan_refused", "No such currency."),)}, ""),
    (
        "held, and a draft again",
        {**NEW_PLAN, "plans": plan(state="draft"), "held": (("plan:metered", "plan_refused", "No."),)},
        "~plan",
    ),
    (
        "held, and gone",
        {**NEW_PLAN, "plans": (), "held": (("plan:metered", "plan_refused", "No."),)},
        "~plan absent",
    ),
    (
        "held, and perhaps what could not be read",
        {
            **NEW_PLAN,
            "plans": (),
            "unread": frozenset({"x"}),
            "held": (("plan:metered", "plan_refused", "No."),),
        },
        "",
    ),
    ("retitled", {"plans": plan(title="Metered anew")}, "~plan"),
    ("the same title on one line", {"plans": plan(title=" Metered\n")}, ""),
    ("a quota more", {"quotas": (QUOTA, OTHER_QUOTA)}, "~plan"),
    ("a quota more that costs nothing", {"quotas": (QUOTA, replace(OTHER_QUOTA, pricing=Unlimited()))}, ""),
    ("a quota retitled", {"quotas": (replace(QUOTA, title="Requests"),)}, "~plan"),
    ("deprecated", {"plans": plan(state="deprecated")}, "~plan"),
    (
        "deprecated, known",
        {"plans": plan(state="deprecated"), "linked_plans": (Plan(state="deprecated"),)},
        "",
    ),
    (
        "deprecated, known, at another price",
        {
            "plans": plan(state="deprecated"),
            "linked_plans": (Plan(state="deprecated"),),
            "billed_plans": (DEAR,),
        },
        "",
    ),
    ("active again", {"linked_plans": (Plan(state="deprecated"),)}, "~plan"),
    ("archived", {"plans": plan(state="archived")}, "-plan"),
    ("linked and being deleted", {"plans": plan(deleting=True)}, "-plan"),
    ("absent", {"plans": ()}, "-plan absent"),
    ("absent, linked since the listing", {"plans": (), "before": frozenset({"s1"})}, ""),
    ("absent, for it cannot be read", {"plans": (), "unread": frozenset({"p1"})}, ""),
    ("dearer at Recurly", {"billed_plans": (DEAR,)}, "~plan"),
    (
        "dearer, and held for it",
        {"billed_plans": (DEAR,), "held": (("plan:metered", "plan_differs", DEAR_REASON + " So."),)},
        "",
    ),
    (
        "dearer, held for it, and retitled",
        {
            "billed_plans": (DEAR,),
            "plans": plan(title="New"),
            "held": (("plan:metered", "plan_differs", DEAR_REASON),),
        },
        "~plan",
    ),
    (
        "a quota more whose add-on is there and dearer, held for it",
        {
            "quotas": (QUOTA, OTHER_QUOTA),
            "billed_add_ons": (
                BILLED_ADD_ON,
                replace(BILLED_ADD_ON, code="amplify-quota-q2", unit_amount=Decimal(3)),
            ),
            "held": (
                (
                    "plan:metered",
                    "plan_differs",
                    'Add-on "amplify-quota-q2" has unit price 3 at Recurly; Amplify says 1.',
                ),
            ),
        },
        "",
    ),
    ("no longer dearer", {"held": (("plan:metered", "plan_differs", DEAR_REASON),)}, "~plan"),
    ("not listed at Recurly", {"billed_plans": ()}, "~plan"),
    (
        "not listed at Recurly, and held for it",
        {"billed_plans": (), "held": (("plan:metered", "plan_differs", "It is inactive."),)},
        "",
    ),
    (
        "an add-on that charges otherwise",
        {"billed_add_ons": (replace(BILLED_ADD_ON, unit_amount=Decimal(1)),)},
        "~plan",
    ),
    ("an add-on removed at Recurly", {"billed_add_ons": ()}, "note"),
    ("a quota that became free, and charges at Recurly", {**TWO, "quotas": FREE}, "~plan"),
    (
        "a quota that became free, held for it",
        {**TWO, "quotas": FREE, "held": (("plan:metered", "plan_differs", FREE_REASON),)},
        "",
    ),
    (
        "a quota that became free at Recurly too, held for what it was",
        {
            **TWO,
            "quotas": FREE,
            "billed_add_ons": (BILLED_ADD_ON, FOR_NOTHING),
            "billed": (replace(BILLED, add_on_codes=("amplify-quota-q1", "amplify-quota-q2")),),
            "held": (("plan:metered", "plan_differs", FREE_REASON),),
        },
        "~plan",
    ),
    # Labels.
    ("no longer labelled", {"products": (UNLABELLED,)}, "~product"),
    (
        "no longer labelled, and told",
        {"products": (UNLABELLED,), "held": (("product:weather", "product_unlabelled", "So."),)},
        "",
    ),
    ("labelled again", {"held": (("product:weather", "product_unlabelled", "So."),)}, "~product"),
    (
        "told of, and gone",
        {**NEW_PLAN, "products": (), "plans": (), "held": (("product:weather", "x", "So."),)},
        "~product absent",
    ),
    # Subscriptions.
    ("a new subscription", NEW | {"subscriptions": subscription(approval="pending", state=None)}, "+sub"),
    ("approved elsewhere", NEW, "+sub"),
    ("not asked for yet", NEW | {"subscriptions": subscription(approval="", state=None)}, ""),
    ("its action waits", NEW | {"waiting": frozenset({"subscription:s1"})}, ""),
    ("its action is a dead letter", NEW | {"dead": ("subscription:s1",)}, "note"),
    ("held without an action", NEW | {"held": (("subscription:s1", "subscription_refused", "No."),)}, ""),
    (
        "held, and over",
        NEW
        | {
            "subscriptions": subscription(state="archived"),
            "held": (("subscription:s1", "subscription_refused", "No."),),
        },
        "~sub",
    ),
    (
        "held, and gone",
        NEW | {"subscriptions": (), "held": (("subscription:s1", "subscription_refused", "No."),)},
        "~sub absent",
    ),
    ("with its plan", {**NEW_PLAN, "subscriptions": (SUBSCRIPTION,)}, "+plan +sub"),
    ("to a plan of nobody's", {**NEW_PLAN, "subscriptions": (SUBSCRIPTION,), "plans": plan(type="free")}, ""),
    ("to a plan that is not there", {**NEW_PLAN, "subscriptions": (SUBSCRIPTION,), "plans": ()}, ""),
    ("of an unlabelled product", NEW | {"products": (UNLABELLED,)}, "~product"),
    ("moved within an unlabelled product", MOVED, "~product -sub +sub"),
    ("moved there from elsewhere", {**MOVED, "links": (Link(name="other"),)}, "~product -sub"),
    (
        "moved there to a plan that was removed",
        {**MOVED, "plans": (), "linked_plans": (Plan(state="removed"),)},
        "-sub",
    ),
    ("that names no plan", NEW | {"subscriptions": subscription(plan_id=None)}, "+sub"),
    ("not approved yet", {"links": (Link(state="created"),)}, "~sub"),
    ("cancelled", {"subscriptions": subscription(state="archived")}, "-sub"),
    ("migrated", {"subscriptions": subscription(state="migrated")}, "-sub"),
    ("an end to come", {"subscriptions": subscription(state="archivalScheduled")}, ""),
    ("rejected later", {"subscriptions": subscription(approval="rejected")}, "-sub"),
    (
        "rejected before it was approved",
        {"subscriptions": subscription(approval="rejected"), "links": (Link(state="created"),)},
        "-sub",
    ),
    ("in deletion", {"subscriptions": subscription(deleting=True)}, "-sub"),
    ("missing", {"subscriptions": ()}, "-sub absent"),
    ("missing, linked since the listing", {"subscriptions": (), "before": frozenset({"p1"})}, ""),
    ("missing, for it cannot be read", {"subscriptions": (), "unread": frozenset({"s1"})}, ""),
    ("ending", {"subscriptions": (), "links": (Link(state="ending"),)}, ""),
    ("ended", {"subscriptions": OVER, "links": (ENDED,), "billed": ()}, ""),
    ("ended, and runs out", {"subscriptions": OVER, "links": (ENDED,), "billed": (CANCELED,)}, ""),
    ("ended, and reactivated at Recurly", {"subscriptions": OVER, "links": (ENDED,)}, "-sub"),
    ("ended, gone, and reactivated at Recurly", {"subscriptions": (), "links": (ENDED,)}, "-sub"),
    ("ended, and served again", {"links": (ENDED,), "billed": ()}, "~sub"),
    ("ended, served again, and held for it", {"links": (ENDED,), "billed": (), "held": (SERVED,)}, ""),
    (
        "ended, held for being served, and over",
        {"subscriptions": OVER, "links": (ENDED,), "billed": (), "held": (SERVED,)},
        "~sub",
    ),
    (
        "ended, and waits for approval again",
        {"subscriptions": subscription(approval="pending"), "links": (ENDED,), "billed": ()},
        "~sub",
    ),
    ("not live at Recurly", {"billed": ()}, "~sub"),
    ("lacks what is charged", {**TWO, "quotas": (QUOTA, OTHER_QUOTA)}, "~plan ~sub"),
    ("lacks what charges for a free quota", {**TWO, "quotas": FREE}, "~plan"),
    (
        "lacks the add-on of a free quota that costs nothing",
        {**FREED, "billed_add_ons": (BILLED_ADD_ON, FOR_NOTHING)},
        "~sub",
    ),
    (
        "lacks that of a free quota that was removed",
        {**FREED, "billed_add_ons": (BILLED_ADD_ON,)},
        "",
    ),
    (
        "a quota became free, and its add-on was removed",
        {**TWO, "quotas": FREE, "billed_add_ons": (BILLED_ADD_ON,)},
        "~plan",
    ),
    ("a linked quota is just not listed, and its add-on lacking", TWO, "~plan"),
    ("a linked quota is not listed, and another is new", {**TWO, "quotas": (QUOTA, THIRD)}, "~plan"),
    ("lacks that of a quota that is gone", {**TWO, "gone": frozenset({"q2"})}, ""),
    ("not live, known", {"billed": (), "links": (Link(billed_state="expired"),)}, ""),
    ("paused", {"billed": (), "links": (Link(billed_state="paused"),)}, ""),
    ("not live, linked since the listing", {"billed": (), "before": frozenset({"p1"})}, ""),
    ("lacks an add-on", {"billed": (replace(BILLED, add_on_codes=()),)}, "~sub"),
    (
        "lacks an add-on, and is held for it",
        {
            "billed": (replace(BILLED, add_on_codes=()),),
            "held": (("subscription:s1:add_ons", "attach_refused", "No."),),
            "refused": frozenset({"amplify-quota-q1"}),
        },
        "",
    ),
    (
        "lacks an add-on, and is held for another",
        {
            "billed": (replace(BILLED, add_on_codes=()),),
            "held": (("subscription:s1:add_ons", "attach_refused", "No."),),
            "refused": frozenset({"amplify-quota-q9"}),
        },
        "~sub",
    ),
    (
        "lacks an add-on, and waits for it",
        {"billed": (replace(BILLED, add_on_codes=()),), "waiting": frozenset({"add_ons:s1"})},
        "",
    ),
    # Orphans.
    ("billed, marked, absent", {**ORPHAN, "subscriptions": ()}, "-sub absent"),
    ("billed, marked, over", {**ORPHAN, "subscriptions": subscription(id=ID, state="archived")}, "-sub"),
    ("billed, marked, served", {**ORPHAN, "subscriptions": subscription(id=ID)}, "+sub"),
    ("billed, marked, unreadable", {**ORPHAN, "subscriptions": (), "unread": frozenset({ID})}, ""),
    (
        "billed, marked with a UUID, absent",
        {**ORPHAN, "subscriptions": (), "billed": (replace(BILLED, marker=str(UUID(ID))),)},
        "-sub absent",
    ),
    (
        "billed, marked, on somebody else's account",
        {**ORPHAN, "subscriptions": (), "billed": (replace(BILLED, marker=ID, account_code="acme"),)},
        "note",
    ),
    (
        "billed, unmarked",
        {"subscriptions": (), "links": (), "billed": (replace(BILLED, marker=None),)},
        "",
    ),
    (
        "billed, with a PO number of another shape",
        {**ORPHAN, "subscriptions": (), "billed": (replace(BILLED, marker="PO 4711 / x"),)},
        "note",
    ),
    (
        "billed, with the customer's own PO number",
        {**ORPHAN, "subscriptions": (), "billed": (replace(BILLED, marker="PO-4711"),)},
        "note",
    ),
    (
        "billed, with 33 hexadecimal digits",
        {**ORPHAN, "subscriptions": (), "billed": (replace(BILLED, marker=ID + "0"),)},
        "note",
    ),
    (
        "billed, to somebody else's plan",
        {"subscriptions": (), "links": (), "billed": (replace(BILLED, plan_code="gold"),)},
        "",
    ),
    (
        "billed a second time, and missing",
        {"subscriptions": (), "billed": (BILLED, replace(BILLED, uuid="u2"))},
        "-sub absent",
    ),
    ("billed a second time", {"billed": (BILLED, replace(BILLED, uuid="u2"))}, ""),
]


def short(step: Step) -> str:
    return f"{step.op}{step.what[:3] if step.what == 'subscription' else step.what}" + (
        " absent" if step.absent else ""
    )


@pytest.mark.parametrize(("so", "changes", "steps"), CASES, ids=[case[0] for case in CASES])
def test_the_steps_of_each_case(so: str, changes: dict[str, Any], steps: str) -> None:
    """Exactly these, and a note where an operator has to settle something first."""
    found = World(**changes).compared()
    shown = " ".join(map(short, found.steps)) or ("note" if found.notes else "")
    assert shown == steps, so
    assert all(step.reason for step in found.steps)
    keys = [step.action.key for step in found.steps]
    assert all(key.endswith("resync:now") for key in keys)
    assert len(set(keys)) == len(keys)


def test_a_dead_letter_is_named_with_its_number() -> None:
    [note] = World(**NEW_PLAN, dead=("plan:metered",)).compared().notes
    assert note == "plan Metered (p1): active and not linked, but action 7 is a dead letter: boom"


def test_an_orphan_is_told_to_its_handler() -> None:
    """By its Recurly id: no store knows of it."""
    [step] = World(**ORPHAN, subscriptions=()).compared().steps
    assert step.action.args == {"name": ID, "id": ID, "uuid": "u1"}


def test_a_reason_names_all_that_changed() -> None:
    found = World(plans=plan(title="New"), quotas=(QUOTA, OTHER_QUOTA), billed_plans=(DEAR,)).compared()
    [step] = found.steps
    assert step.reason == (f'{DEAR_REASON}; was "Metered" before; quota "Maps" has no add-on yet')


@pytest.mark.parametrize(
    ("linked", "absent", "mass"),
    [
        (1, 1, False),
        (2, 1, False),
        (2, 2, True),
        (3, 1, False),
        (3, 2, True),
        (3, 3, True),
        (4, 2, True),
        (4, 4, True),
        (5, 2, False),
        (6, 3, True),
        (7, 3, False),
        (7, 4, True),
        (30, 3, False),
        (30, 4, True),
        (50, 5, False),
        (50, 6, True),
        (0, 0, False),
    ],
)
def test_how_many_absences_are_too_many(linked: int, absent: int, mass: bool) -> None:
    """More than three, and more than one in ten; or half, but for one of two; plans or subscriptions."""
    [step] = World(subscriptions=()).compared().steps
    assert resync.is_mass([step] * absent, plans=1, subscriptions=linked) is mass
    [other] = World(plans=()).compared().steps
    assert resync.is_mass([other] * absent, plans=linked, subscriptions=100) is mass


def test_a_mass_absence_names_a_few_of_them() -> None:
    [step] = World(subscriptions=()).compared().steps
    reason = resync.mass_reason([replace(step, id=f"s{number}") for number in range(23)])
    assert reason.startswith("23 subscription(s) that are linked are not found at Amplify any more, and no ")
    assert reason.count("Acme (s") == 20
    assert "and others" in reason
