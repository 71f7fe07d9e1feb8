"""Linkage: reads plans and subscriptions on all sides, for their links to be compared."""

from collections.abc import Awaitable
from typing import Protocol, TypeVar

from billingd.domain.attempts import UNFINISHED
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota, Subscription
from billingd.domain.drift import Drift
from billingd.domain.drift_links import LinkedPlan, LinkedSubscription, Sides, compare_links
from billingd.domain.errors import NotFound
from billingd.domain.pricing import PlanSpec, translate
from billingd.store import held, links, outbox
from billingd.store.drift import Run
from billingd.store.engine import Store

T = TypeVar("T")


class Catalog(Protocol):
    """What is read at Amplify."""

    async def list_products(self, billing_system: str | None = None) -> tuple[Product, ...]: ...
    async def list_product_plans(self, product_id: str | None = None) -> tuple[ProductPlan, ...]: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def list_subscriptions(self) -> tuple[Subscription, ...]: ...


class Billing(Protocol):
    """What is read at Recurly."""

    async def list_plans(self) -> tuple[BilledPlan, ...]: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...


class Linkage:
    """Compares; changes nothing."""

    def __init__(self, store: Store, catalog: Catalog, billing: Billing) -> None:
        self._store = store
        self._catalog = catalog
        self._billing = billing

    async def compare(self, run: Run) -> list[Drift]:
        """Every difference of links; of one subscription and its plan, when the run is about one."""
        found = list(compare_links(await self._sides()))
        if run.subscription_id is None:
            return found
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, run.subscription_id)
            add_ons = [] if link is None else await links.add_ons_of(tx, link.plan_id)
            plan = None if link is None else await links.find_plan(tx, link.plan_id)
        subjects = {f"add_on:{one.add_on_code}" for one in add_ons}
        if plan is not None:
            subjects.add(f"plan:{plan.plan_code}")
        return [one for one in found if one.subscription_id == run.subscription_id or one.subject in subjects]

    async def _sides(self) -> Sides:
        """First what is under way, then both far sides, then the links: nothing is missed between them.

        Links that were made or changed meanwhile are not judged by what was listed before.
        """
        busy, standing = await self._busy()
        async with self._store.read() as tx:
            plans_before = {one.plan_id: one.state for one in await links.plans(tx)}
            before = {one.subscription_id: one.state for one in await links.subscriptions(tx)}
        labelled = {one.name for one in await self._catalog.list_products(BILLING_SYSTEM)}
        plans = {one.id: one for one in await self._catalog.list_product_plans()}
        specs: dict[str, PlanSpec] = {}
        for plan in plans.values():
            if plan.product_name in labelled and plan.state == "active" and not plan.deleting:
                quotas = await _or_nothing(self._catalog.list_quotas(plan.name))
                spec = translate(plan, quotas)
                if isinstance(spec, PlanSpec):
                    specs[plan.id] = spec
        subscriptions = {one.id: one for one in await self._catalog.list_subscriptions()}
        billed_plans = {one.code: one for one in await self._billing.list_plans()}
        billed = {one.uuid: one for one in await self._billing.list_live_subscriptions()}
        async with self._store.read() as tx:
            linked_plans = await links.plans(tx)
            linked = await links.subscriptions(tx)
        codes = {one.plan_id: one.plan_code for one in linked_plans}
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
        busy_now, standing_now = await self._busy()
        return Sides(
            plans,
            specs,
            subscriptions,
            [LinkedPlan(one.plan_id, one.name, one.plan_code, one.state) for one in linked_plans],
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
        )

    async def _busy(self) -> tuple[set[str], set[str]]:
        """What actions are still to come for, and what is held: plans and subscriptions."""
        async with self._store.read() as tx:
            rows = await outbox.subjects(tx, states=UNFINISHED)
            items = {item["subject"] for item in await held.standing(tx)}
        return rows, items


async def _or_nothing(listing: Awaitable[tuple[T, ...]]) -> tuple[T, ...]:
    try:
        return await listing
    except NotFound:  # it went between two calls
        return ()
