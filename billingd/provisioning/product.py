"""Provision product: its label decides whether its plans are billed, also when it is set after they exist."""

from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Action, Leased, State, Wait
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Subscription
from billingd.domain.events import (
    PROVISION_PRODUCT,
    PROVISION_SUBSCRIPTION,
    plan_action,
    subscription_action,
)
from billingd.domain.notices import provider_notice
from billingd.loops import Clock
from billingd.provisioning import absence
from billingd.provisioning.holding import hold
from billingd.store import held, links, outbox
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import PlanLink

log = structlog.get_logger()

UNLABELLED: Final = "product_unlabelled"
"""The kind of what is held while a product whose plans are linked says no more that they are billed here."""

OVER: Final = frozenset({"archived", "migrated"})
WANTED: Final = frozenset({"pending", "approved"})


class Catalog(Protocol):
    """What is read at Amplify."""

    async def find_product(self, name: str) -> Product | None: ...
    async def list_product_plans(self, product_id: str | None = None) -> tuple[ProductPlan, ...]: ...
    async def list_subscriptions(self, *, product_id: str | None = None) -> tuple[Subscription, ...]: ...


class ProductProvisioner:
    """Handles `provision_product`: asks for what the label of a product, as it is now, makes ours."""

    def __init__(self, store: Store, clock: Clock, catalog: Catalog) -> None:
        self._store = store
        self._clock = clock
        self._catalog = catalog

    async def provision(self, action: Leased) -> Wait | None:
        """Read the product as it is now, the event being only a hint.

        1. Gone: its plans go with it, in events that may come in any order, or never; each is asked for, and
           judged on its own, for a product may only be hidden from us.
        2. Labelled: whatever of its plans and subscriptions is not linked yet is asked for; after a time
           without its label the linked plans too, for they may have changed meanwhile.
        3. Not labelled while plans of it are linked: nothing is ended, for what was agreed is billed on. A
           person is told, until it is labelled again.
        """
        name = action.args["name"]
        because = f"product:{action.event_id or action.id}"
        product = await self._catalog.find_product(name)
        async with self._store.read() as tx:
            linked = [link for link in await links.plans_of_product(tx, name) if link.state != "removed"]
        if product is None:
            async with self._store.write() as tx:
                asked = [plan_action(link.name, link.plan_id, because=because) for link in linked]
                await outbox.insert(tx, asked, now=self._clock.now())
                ids = {link.plan_id: None for link in linked}
                if ids.keys() <= (await absence.deletions(tx, ids, "plan")).keys():
                    await self._close(tx, name, "the product is gone, and its plans with it")
        elif product.billing_system == BILLING_SYSTEM:
            await self._ask(product, linked, because)
        elif linked:
            await self._hold(product, linked)
        else:
            async with self._store.write() as tx:
                await self._close(tx, name, "none of its plans is linked any more")
        return None

    async def _ask(self, product: Product, linked: list[PlanLink], because: str) -> None:
        """Ask for what is not linked; what waits already looks again by itself."""
        there = {link.plan_id for link in linked}
        plans = await self._catalog.list_product_plans(product.id)
        fresh = [
            plan for plan in plans if plan.id not in there and plan.state == "active" and _may_be_ours(plan)
        ]
        ours = there | {plan.id for plan in fresh}
        subscriptions = [
            one
            for one in await self._catalog.list_subscriptions(product_id=product.id)
            if one.plan_id in ours and one.approval in WANTED and one.state not in OVER and not one.deleting
        ]
        async with self._store.write() as tx:
            again = await held.standing(tx, subject=f"product:{product.name}", kind=UNLABELLED)
            wanted = [*fresh, *(plan for plan in plans if again and plan.id in there)]
            await self._close(tx, product.name, "the product is labelled again")
            waiting = {
                row["subject"]
                for row in await outbox.select(tx, states=[State.PENDING], kind=PROVISION_SUBSCRIPTION)
            }
            asked = [plan_action(plan.name, plan.id, because=because) for plan in wanted]
            for one in subscriptions:
                ask = subscription_action(one.name, one.id, because=because)
                if ask.subject not in waiting and await links.find_subscription(tx, one.id) is None:
                    asked.append(ask)
            added = await outbox.insert(tx, asked, now=self._clock.now())
        if added:
            log.info("product.asked", product=product.name, plans=len(wanted), actions=added)

    async def _hold(self, product: Product, linked: list[PlanLink]) -> None:
        now = self._clock.now()
        subject = f"product:{product.name}"
        titles = ", ".join(sorted(link.title for link in linked))
        reason = (
            f"Product {product.title} no longer says billingSystem={BILLING_SYSTEM}, but plans of it are "
            f"linked: {titles}. Their subscriptions go on being billed; new ones are not provisioned. Label "
            "the product again, or end its subscriptions."
        )
        again = Action(PROVISION_PRODUCT, subject, "", {"name": product.name, "id": product.id})
        notice = provider_notice(
            f"held:{UNLABELLED}:{product.id}:{now.isoformat()}",
            f"Product {product.title} is no longer labelled",
            reason,
        )
        async with self._store.write() as tx:
            await hold(tx, Hold(UNLABELLED, subject, reason, again), notice, now=now)

    async def _close(self, tx: Tx, name: str, why: str) -> None:
        await held.close(tx, subject=f"product:{name}", resolution=why, now=self._clock.now())


def _may_be_ours(plan: ProductPlan) -> bool:
    """Whether its quotas decide (see `translate`); without them asking would be work for nothing."""
    return plan.type == "paid" and plan.approval == "manual"
