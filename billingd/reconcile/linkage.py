"""Linkage: reads plans and subscriptions on all sides, for their links to be compared."""

from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from billingd.domain.agreement import Uncharged, not_listed, uncharged, unseen
from billingd.domain.attempts import UNFINISHED
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota, Subscription, Unreadable
from billingd.domain.drift import Drift
from billingd.domain.drift_links import LinkedPlan, LinkedSubscription, Sides, compare_links
from billingd.domain.errors import NotFound, Permanent
from billingd.domain.events import ADOPT_SUBSCRIPTION
from billingd.domain.pricing import PlanSpec, translate
from billingd.domain.resync import to_translate
from billingd.provisioning import absence
from billingd.reconcile.scope import LINKS, not_compared
from billingd.store import absences, held, links, outbox
from billingd.store.drift import Run
from billingd.store.engine import Store, Tx
from billingd.store.links import PlanLink, SubscriptionLink

T = TypeVar("T")
Resource = TypeVar("Resource", ProductPlan, Subscription)


class Catalog(Protocol):
    """What is read at Amplify."""

    async def list_products(self, billing_system: str | None = None) -> tuple[Product, ...]: ...
    async def survey_product_plans(self) -> tuple[ProductPlan | Unreadable, ...]: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def survey_subscriptions(self) -> tuple[Subscription | Unreadable, ...]: ...


class Billing(Protocol):
    """What is read at Recurly."""

    async def list_plans(self) -> tuple[BilledPlan, ...]: ...
    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None: ...
    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...


class Linkage:
    """Compares; changes nothing."""

    def __init__(self, store: Store, catalog: Catalog, billing: Billing) -> None:
        self._store = store
        self._catalog = catalog
        self._billing = billing

    async def compare(self, run: Run) -> tuple[list[Drift], list[dict[str, Any]]]:
        """Every difference of links, and what was not compared, for Amplify's side of it makes no sense.

        Of one subscription and its plan, when the run is about one.
        """
        unread: dict[str, str] = {}
        found = list(compare_links(await self._sides(unread)))
        async with self._store.read() as tx:
            told = await _told(tx, run, unread)
        if run.subscription_id is None:
            return found, told
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, run.subscription_id)
            add_ons = [] if link is None else await links.add_ons_of(tx, link.plan_id)
            plan = None if link is None else await links.find_plan(tx, link.plan_id)
        subjects = {f"add_on:{one.add_on_code}" for one in add_ons}
        if plan is not None:
            subjects.add(f"plan:{plan.plan_code}")
        mine = [one for one in found if one.subscription_id == run.subscription_id or one.subject in subjects]
        names = {run.subscription_id, *subjects}
        return mine, [one for one in told if one["subscription"] in names or names & set(one["subjects"])]

    async def _sides(self, unread: dict[str, str]) -> Sides:
        """First what is under way, then both far sides, then the links: nothing is missed between them.

        Links that were made or changed meanwhile are not judged by what was listed before. `unread` takes why
        something at Amplify cannot be understood, by its id: it is there all the same.
        """
        busy, standing = await self._busy()
        async with self._store.read() as tx:
            plans_before = {one.plan_id: one.state for one in await links.plans(tx)}
            before = {one.subscription_id: one.state for one in await links.subscriptions(tx)}
        labelled = {one.name for one in await self._catalog.list_products(BILLING_SYSTEM)}
        plans = _understood(await self._catalog.survey_product_plans(), unread)
        specs: dict[str, PlanSpec] = {}
        free: dict[str, tuple[Uncharged, ...]] = {}
        for plan in plans.values():
            if to_translate(plan, labelled):
                try:
                    quotas = await _or_nothing(self._catalog.list_quotas(plan.name))
                except Permanent as error:
                    unread[plan.id] = str(error)
                    continue
                async with self._store.read() as tx:
                    add_ons_of = await links.add_ons_of(tx, plan.id)
                    gone = await absence.all_gone_quotas(tx, add_ons_of)
                if missing := unseen(quotas, add_ons_of, gone):
                    unread[plan.id] = " ".join(map(not_listed, missing))
                    free[plan.id] = tuple(Uncharged(one.add_on_code, one.title, True) for one in add_ons_of)
                    continue
                spec = translate(plan, quotas)
                if isinstance(spec, PlanSpec):
                    if plan.state == "active":
                        specs[plan.id] = spec
                    free[plan.id] = uncharged(spec, quotas, add_ons_of)
        subscriptions = _understood(await self._catalog.survey_subscriptions(), unread)
        billed_plans = {one.code: one for one in await self._billing.list_plans()}
        billed = {one.uuid: one for one in await self._billing.list_live_subscriptions()}
        async with self._store.read() as tx:
            linked_plans = await links.plans(tx)
            linked = await links.subscriptions(tx)
            deleted, absent = await _missing(tx, linked_plans, linked, plans.keys() | subscriptions.keys())
        codes = {one.plan_id: one.plan_code for one in linked_plans}
        for each in linked_plans:  # a list lags behind what was made just now
            if each.state != "removed" and each.plan_code not in billed_plans:
                there = await self._billing.find_plan(each.plan_code)
                if there is not None and there.state == "active":
                    billed_plans[there.code] = there
        for link in linked:  # paused ones are in no list; those that are over are asked for once more
            if link.uuid not in billed and link.state in {"created", "active", "ending"}:
                try:
                    billed[link.uuid] = await self._billing.get_subscription(link.uuid)
                except NotFound:
                    continue
        fresh = {one.plan_id for one in linked_plans if plans_before.get(one.plan_id) != one.state}
        fresh |= {one.subscription_id for one in linked if before.get(one.subscription_id) != one.state}
        add_ons = {
            one.plan_code: {
                each.code: each
                for each in await _or_nothing(self._billing.list_add_ons(one.plan_code, one.currency))
            }
            for one in linked_plans
            if one.plan_code in billed_plans
        }
        for one in linked_plans:
            wanted, listed = specs.get(one.plan_id), add_ons.get(one.plan_code)
            if wanted is None or listed is None:
                continue
            nothing = {each.code for each in free.get(one.plan_id, ()) if not each.gone}
            for code in ({each.code for each in wanted.add_ons} | nothing) - listed.keys():
                if (its := await self._billing.find_add_on(one.plan_code, code, one.currency)) is not None:
                    listed[code] = its
        busy_now, standing_now = await self._busy()
        return Sides(
            plans,
            specs,
            subscriptions,
            [
                LinkedPlan(one.plan_id, one.name, one.plan_code, one.state, free.get(one.plan_id, ()))
                for one in linked_plans
            ],
            [
                LinkedSubscription(
                    one.subscription_id,
                    one.title,
                    codes[one.plan_id],
                    one.account_code,
                    one.uuid,
                    one.state,
                )
                for one in linked
            ],
            billed_plans,
            add_ons,
            billed,
            busy | busy_now,
            standing | standing_now,
            fresh,
            unread.keys(),
            deleted,
            absent,
        )

    async def _busy(self) -> tuple[set[str], set[str]]:
        """What actions are still to come for, and what is held: plans and subscriptions."""
        async with self._store.read() as tx:
            rows = await outbox.subjects(tx, states=UNFINISHED)
            for row in await outbox.select(tx, states=UNFINISHED, kind=ADOPT_SUBSCRIPTION):
                rows.add(f"adopt:{row['args']['uuid']}")  # it has no marker before it is taken over
            items = {item["subject"] for item in await held.standing(tx)}
        return rows, items


async def _told(tx: Tx, run: Run, unread: Mapping[str, str]) -> list[dict[str, Any]]:
    """What of ours cannot be compared; what is not linked is told by a resync."""
    told = []
    for plan in await links.plans(tx):
        if plan.plan_id in unread and plan.state != "removed":
            codes = [one.add_on_code for one in await links.add_ons_of(tx, plan.plan_id)]
            subjects = [f"plan:{plan.plan_code}", *(f"add_on:{code}" for code in codes)]
            for link in await links.subscriptions(tx, plan_id=plan.plan_id, states=("created", "active")):
                subjects += [f"subscription:{link.subscription_id}:{code}" for code in codes]
            why = unread[plan.plan_id]
            told.append(not_compared(LINKS, run.since, run.until, why, subjects=subjects))
    for link in await links.subscriptions(tx):
        if link.subscription_id in unread and link.state != "ended":
            name, why = link.subscription_id, unread[link.subscription_id]
            subjects = [f"subscription:{name}"]
            told.append(not_compared(LINKS, run.since, run.until, why, subscription=name, subjects=subjects))
    return told


async def _missing(
    tx: Tx, plans: Sequence[PlanLink], linked: Sequence[SubscriptionLink], listed: Collection[str]
) -> tuple[set[str], set[str]]:
    """Of what is in no list: ids of what Amplify or a person said to be deleted; of what is only missing."""
    noted = await absences.everything(tx)
    deleted = {one.id for one in noted if one.confirmed_at is not None}
    gone_plans: dict[str, str | None] = {one.plan_id: None for one in plans if one.plan_id not in listed}
    deleted |= set(await absence.deletions(tx, gone_plans, "plan"))
    gone = {one.subscription_id: one.plan_id for one in linked if one.subscription_id not in listed}
    deleted |= set(await absence.deletions(tx, gone, "subscription"))
    return deleted, {one.id for one in noted} - deleted


def _understood(found: Iterable[Resource | Unreadable], unread: dict[str, str]) -> dict[str, Resource]:
    """What can be understood, by id; the rest goes to `unread`."""
    unread |= {one.id: one.why for one in found if isinstance(one, Unreadable)}
    return {one.id: one for one in found if not isinstance(one, Unreadable)}


async def _or_nothing(listing: Awaitable[tuple[T, ...]]) -> tuple[T, ...]:
    try:
        return await listing
    except NotFound:  # it went between two calls
        return ()
