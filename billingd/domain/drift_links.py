"""Drift of links: plans, add-ons, prices and subscriptions, as each side has them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from billingd.domain.agreement import Uncharged, add_on_differences, costs_nothing, differences, same_prices
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import ProductPlan, Subscription
from billingd.domain.drift import LINK_MISSING, LINK_ORPHANED, PRICE_DIFFERS, Drift
from billingd.domain.pricing import PLAN_CODES, PlanSpec

RESYNC: Final = "`billingd resync` asks for it"
KEEP_PRICES: Final = (
    "existing subscriptions keep their price at Recurly; change it there, or end and subscribe anew"
)
FOUND_AGAIN: Final = (
    "`billingd resync` looks again and asks a person, should much be missing: a lost role of the service "
    "account, or deleted and nobody told billingd"
)
NEW_PRICES: Final = (
    "change it at Recurly, where it holds for new subscriptions only, or put Amplify's price back"
)


@dataclass(frozen=True, slots=True)
class LinkedPlan:
    """A product plan's link; `state` active | deprecated | removed."""

    plan_id: str
    name: str
    code: str
    state: str
    uncharged: tuple[Uncharged, ...] = ()
    """Its add-ons that Amplify charges nothing for, as far as that is known."""


@dataclass(frozen=True, slots=True)
class LinkedSubscription:
    """A subscription's link; `state` created | active | ending | ended."""

    subscription_id: str
    title: str
    plan_code: str
    account_code: str
    uuid: str
    state: str


@dataclass(frozen=True, slots=True)
class Sides:
    """All three: `specs` has what the active, labelled plans of Amplify translate to, by plan id.

    `busy` are the subjects of actions that are still to come, and `held` of what is held: nothing of those is
    drift yet, or a person knows of it already. `fresh` are the ids of links that were made or changed while
    the far sides were read: they are for the next run to judge.

    What is in none of Amplify's lists may be there all the same: `unread` are the ids of what is and cannot
    be understood, `deleted` of what Amplify or a person said to be deleted, `absent` of what is noted as
    missing.
    """

    plans: Mapping[str, ProductPlan]
    specs: Mapping[str, PlanSpec]
    subscriptions: Mapping[str, Subscription]
    linked_plans: Sequence[LinkedPlan]
    linked: Sequence[LinkedSubscription]
    billed_plans: Mapping[str, BilledPlan]
    add_ons: Mapping[str, Mapping[str, BilledAddOn]]
    billed: Mapping[str, BilledSubscription]
    busy: Collection[str]
    held: Collection[str] = ()
    fresh: Collection[str] = ()
    unread: Collection[str] = ()
    deleted: Collection[str] = ()
    absent: Collection[str] = ()


def compare_links(sides: Sides) -> Iterator[Drift]:
    """Every difference of plans, then of subscriptions; each has 0 units."""
    for plan in sides.linked_plans:
        if plan.state == "removed" or plan.plan_id in sides.fresh:
            continue
        found = list(_linked_plan(sides, plan))
        if f"plan:{plan.name}" in sides.held:  # why a plan is held may be that its price differs
            found = [one for one in found if one.kind == PRICE_DIFFERS]
        elif f"plan:{plan.name}" in sides.busy:
            found = []
        yield from found
    yield from _unlinked_plans(sides)
    for link in sides.linked:
        if link.subscription_id not in sides.fresh and not _busy(sides, link.subscription_id):
            yield from _linked_subscription(sides, link)
    yield from _unlinked_subscriptions(sides)
    yield from _strangers(sides)


def _drift(
    kind: str,
    subject: str,
    cause: str,
    fix: str,
    *,
    subscription_id: str | None = None,
    add_on_code: str | None = None,
) -> Drift:
    return Drift(kind, subject, subscription_id, add_on_code, None, 0, cause, fix)


def _linked_plan(sides: Sides, plan: LinkedPlan) -> Iterator[Drift]:
    theirs, ours = sides.billed_plans.get(plan.code), sides.plans.get(plan.plan_id)
    told = ours is not None or plan.plan_id in sides.deleted
    if plan.plan_id in sides.unread:
        pass  # it is there, whatever it is
    elif ours is None or ours.deleting or ours.state not in {"active", "deprecated"}:
        what = "is gone" if ours is None or ours.deleting else f"is {ours.state}"
        if theirs is not None and (told or plan.plan_id not in sides.absent):
            yield _drift(
                LINK_ORPHANED,
                f"plan:{plan.code}",
                f"product plan {plan.name} {what if told else 'is not found'} at Amplify, and its plan "
                f"{plan.code} is active at Recurly",
                RESYNC if told else FOUND_AGAIN,
            )
        return
    if theirs is None:
        yield _drift(
            LINK_MISSING,
            f"plan:{plan.code}",
            f"plan {plan.code} of product plan {plan.name} is missing or inactive at Recurly: removed there",
            "restore it at Recurly, or copy the product plan: a removed code cannot be used again",
        )
        return
    spec = sides.specs.get(plan.plan_id)
    if spec is None:
        return
    if wrong := differences(spec, theirs):
        yield _drift(PRICE_DIFFERS, f"plan:{plan.code}", " ".join(wrong), NEW_PRICES)
    there = sides.add_ons.get(plan.code, {})
    for add_on in spec.add_ons:
        found = there.get(add_on.code)
        if found is None or found.state != "active":
            yield _drift(
                LINK_MISSING,
                f"add_on:{add_on.code}",
                f"add-on {add_on.code} ({add_on.name}) is missing or inactive on plan {plan.code} at Recurly",
                RESYNC,
                add_on_code=add_on.code,
            )
        elif wrong := add_on_differences(add_on, found):
            yield _drift(
                PRICE_DIFFERS,
                f"add_on:{add_on.code}",
                " ".join(wrong),
                NEW_PRICES,
                add_on_code=add_on.code,
            )
    for free in plan.uncharged:
        if wrong := free.differences(there.get(free.code)):
            yield _drift(
                PRICE_DIFFERS, f"add_on:{free.code}", " ".join(wrong), NEW_PRICES, add_on_code=free.code
            )


def _unlinked_plans(sides: Sides) -> Iterator[Drift]:
    """Plans that should be linked and are not, and plans of ours that nobody links."""
    linked = {plan.code for plan in sides.linked_plans if plan.state != "removed"}
    expected = {spec.code: sides.plans[plan_id] for plan_id, spec in sides.specs.items()}
    for code, plan in expected.items():
        if code not in linked and not _plan_busy(sides, plan.name):
            cause = f"product plan {plan.name} is active, its product labelled, and nothing was made of it"
            yield _drift(LINK_MISSING, f"plan:{code}", cause, RESYNC)
    for code in sides.billed_plans:
        if code in linked or code in expected:
            continue
        plan_id = code.removeprefix(PLAN_CODES)
        known = sides.plans.get(plan_id)
        if plan_id in sides.unread or (known is not None and _plan_busy(sides, known.name)):
            continue
        yield _drift(
            LINK_ORPHANED,
            f"plan:{code}",
            f"plan {code} is active at Recurly, and no product plan that is billed here belongs to it",
            "`billingd adopt` takes over what the original integration made; else deactivate it at Recurly",
        )


def _linked_subscription(sides: Sides, link: LinkedSubscription) -> Iterator[Drift]:
    theirs, ours = sides.billed.get(link.uuid), sides.subscriptions.get(link.subscription_id)
    live = theirs is not None and theirs.live
    subject = f"subscription:{link.subscription_id}"
    if link.state == "ended":
        yield from _ended(link, theirs, ours)
        return
    if ours is None and link.state != "ending" and link.subscription_id not in sides.deleted:
        yield from _not_found(sides, link, theirs)
        return
    if link.state == "ending" or _over(ours):
        if live and not (link.state == "ending" and theirs is not None and theirs.state == "canceled"):
            what = "is ending here" if link.state == "ending" else "is over at Amplify"
            yield _drift(
                LINK_ORPHANED,
                subject,
                f"{link.title} {what}, and its subscription {link.uuid} goes on at Recurly",
                "`billingd outbox replay` what is dead of its end" if link.state == "ending" else RESYNC,
                subscription_id=link.subscription_id,
            )
        return
    if theirs is None or not live:
        state = "missing" if theirs is None else theirs.state
        yield _drift(
            LINK_MISSING,
            subject,
            f"{link.title} is served at Amplify, and its subscription {link.uuid} is {state} at Recurly: "
            "ended there by dunning or by hand",
            "cancel it at Amplify, or subscribe anew: what is served now reaches no invoice",
            subscription_id=link.subscription_id,
        )
        return
    yield from _as_linked(sides, link, theirs)


def _not_found(sides: Sides, link: LinkedSubscription, theirs: BilledSubscription | None) -> Iterator[Drift]:
    """One that Amplify does not list and has not said to be deleted: nobody can tell that it is over."""
    if theirs is None or not theirs.live:
        return
    if link.subscription_id in sides.unread:
        yield from _as_linked(sides, link, theirs)
    elif link.subscription_id not in sides.absent:
        yield _drift(
            LINK_ORPHANED,
            f"subscription:{link.subscription_id}",
            f"{link.title} is not found at Amplify, and its subscription {link.uuid} goes on at Recurly",
            FOUND_AGAIN,
            subscription_id=link.subscription_id,
        )


def _ended(
    link: LinkedSubscription, theirs: BilledSubscription | None, ours: Subscription | None
) -> Iterator[Drift]:
    """One that billingd has ended: taken back at Amplify, or at Recurly? Canceled there, it runs out."""
    subject = f"subscription:{link.subscription_id}"
    if ours is not None and not _over(ours) and ours.approval == "approved":
        yield _drift(
            LINK_MISSING,
            subject,
            f"{link.title} was over at Amplify, so subscription {link.uuid} was ended at Recurly; Amplify "
            "serves it again: its rejection was taken back",
            "cancel it at Amplify and subscribe anew: what is served now reaches no invoice",
            subscription_id=link.subscription_id,
        )
    elif theirs is not None and theirs.live and theirs.state != "canceled":
        yield _drift(
            LINK_ORPHANED,
            subject,
            f"{link.title} is over at Amplify and was ended here, and subscription {link.uuid} goes on at "
            "Recurly: reactivated there",
            "`billingd resync` ends it again",
            subscription_id=link.subscription_id,
        )


def _as_linked(sides: Sides, link: LinkedSubscription, theirs: BilledSubscription) -> Iterator[Drift]:
    """A live subscription: the account, plan, add-ons and prices that it should have?"""
    about = f"{link.title} ({link.uuid})"
    for what, here, there in (
        ("account", link.account_code, theirs.account_code),
        ("plan", link.plan_code, theirs.plan_code),
        ("marker", link.subscription_id, theirs.marker),
    ):
        if here != there and not (what == "marker" and there is None):
            yield _drift(
                LINK_MISSING,
                f"subscription:{link.subscription_id}:{what}",
                f"{about} has {what} {there} at Recurly and {here} here: changed there",
                f"change the {what} back at Recurly",
                subscription_id=link.subscription_id,
            )
    if link.plan_code != theirs.plan_code:
        return
    own = {one.code: one for one in theirs.add_ons}
    at_plan = {
        code: one
        for code, one in sides.add_ons.get(link.plan_code, {}).items()
        if one.state == "active" and one.add_on_type == "usage"
    }
    uncharged = {
        one.code: one for plan in sides.linked_plans if plan.code == link.plan_code for one in plan.uncharged
    }
    for code, add_on in at_plan.items():
        attached = own.get(code)
        if attached is None and code in uncharged and not uncharged[code].belongs(add_on):
            continue
        if attached is None:
            yield _drift(
                LINK_MISSING,
                f"subscription:{link.subscription_id}:{code}",
                f"{about} lacks add-on {code}, which its plan has: a quota came later, or it was removed",
                "`billingd resync` attaches it",
                subscription_id=link.subscription_id,
                add_on_code=code,
            )
        elif not same_prices(attached.prices, add_on.prices):
            yield _drift(
                PRICE_DIFFERS,
                f"subscription:{link.subscription_id}:{code}",
                f"{about} pays other prices for {code} than its plan has now: they changed after it began",
                KEEP_PRICES,
                subscription_id=link.subscription_id,
                add_on_code=code,
            )
    for code, free in uncharged.items():
        if free.gone or code in at_plan or code not in own:
            continue
        if not costs_nothing(own[code].prices):
            yield _drift(
                PRICE_DIFFERS,
                f"subscription:{link.subscription_id}:{code}",
                f"{about} pays for {code}, and Amplify charges nothing for it now: it changed after it began",
                KEEP_PRICES,
                subscription_id=link.subscription_id,
                add_on_code=code,
            )
    plan = sides.billed_plans.get(link.plan_code)
    if plan is None or theirs.unit_amount is None or theirs.currency is None:
        return
    price = plan.unit_amounts.get(theirs.currency)
    if price is not None and price != theirs.unit_amount:
        yield _drift(
            PRICE_DIFFERS,
            f"subscription:{link.subscription_id}:plan",
            f"{about} pays {theirs.unit_amount} {theirs.currency} per period, its plan costs {price} now",
            KEEP_PRICES,
            subscription_id=link.subscription_id,
        )


def _unlinked_subscriptions(sides: Sides) -> Iterator[Drift]:
    """Approved and active at Amplify, on a plan that is billed here, and not linked."""
    linked = {link.subscription_id for link in sides.linked}
    linked_plans = {plan.plan_id for plan in sides.linked_plans if plan.state != "removed"}
    for one in sides.subscriptions.values():
        billed_here = one.plan_id in sides.specs or one.plan_id in linked_plans
        served = one.approval == "approved" and one.state == "active" and not one.deleting
        if billed_here and served and one.id not in linked and not _busy(sides, one.id):
            yield _drift(
                LINK_MISSING,
                f"subscription:{one.id}",
                f"{one.title} is approved and served at Amplify, and nothing bills it: its webhook was lost, "
                "or it was approved by hand",
                RESYNC,
                subscription_id=one.id,
            )


def _strangers(sides: Sides) -> Iterator[Drift]:
    """Live subscriptions at Recurly that look like ours and are linked to nothing."""
    by_uuid = {link.uuid for link in sides.linked}
    by_id = {link.subscription_id: link for link in sides.linked}
    for one in sides.billed.values():
        if one.uuid in by_uuid or not one.live:
            continue
        ours, link = sides.subscriptions.get(one.marker or ""), by_id.get(one.marker or "")
        if link is not None and link.uuid != one.uuid:
            cause = f"it is a second one of {link.title}, beside {link.uuid}: billed twice"
        elif not one.plan_code.startswith(PLAN_CODES):
            continue
        elif one.marker is None:
            cause = f"it is on {one.plan_code} without a marker: made by hand, or by the original integration"
        elif ours is None:
            cause = f"its marker {one.marker} is of no subscription at Amplify"
        elif _over(ours):
            cause = f"{ours.title} is over at Amplify"
        else:
            continue  # under way, or told as not linked
        if one.marker in sides.unread or (one.marker is not None and _busy(sides, one.marker)):
            continue
        if f"adopt:{one.uuid}" in sides.busy:
            continue
        yield _drift(
            LINK_ORPHANED,
            f"subscription:{one.uuid}",
            f"subscription {one.uuid} of account {one.account_code} is live at Recurly: {cause}",
            "end it at Recurly, or take it over with `billingd adopt`",
            subscription_id=None if link is None and ours is None else one.marker,
        )


def _over(ours: Subscription | None) -> bool:
    if ours is None or ours.deleting or ours.approval == "rejected":
        return True
    return ours.state in {"archived", "migrated"}


def _busy(sides: Sides, subscription_id: str) -> bool:
    subjects = {f"{what}:{subscription_id}" for what in ("subscription", "end", "add_ons", "adopt")}
    return any(subject in sides.busy or subject in sides.held for subject in subjects)


def _plan_busy(sides: Sides, name: str) -> bool:
    return f"plan:{name}" in sides.busy or f"plan:{name}" in sides.held
