"""Provision plan: a product plan's measured units, plan and add-ons at Recurly, as Amplify prices them."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Final, Literal, Protocol

import structlog

from billingd.domain.agreement import add_on_differences, differences
from billingd.domain.attempts import Action, Leased, Wait
from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.catalog import Product, ProductPlan, Quota
from billingd.domain.errors import NotFound, Permanent, Refused
from billingd.domain.events import PROVISION_PLAN, subscription_action
from billingd.domain.notices import provider_notice
from billingd.domain.pricing import AddOnSpec, Inexpressible, MeasuredUnitSpec, NotOurs, PlanSpec, translate
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.store import held, links, outbox
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, PlanLink

log = structlog.get_logger()

BILLING_SYSTEM: Final = "recurly"
"""What the attribute `billingSystem` of a product says when its plans are billed here."""

GONE: Final = "gone"
"""The result of a removal: there is no id to keep."""


class Catalog(Protocol):
    """What is read and written at Amplify."""

    async def find_product(self, name: str) -> Product | None: ...
    async def find_product_plan(self, name: str) -> ProductPlan | None: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def set_attributes(
        self, kind: Literal["productplans"], name: str, attributes: Mapping[str, str]
    ) -> str | None: ...


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def find_measured_unit(self, name: str) -> str | None: ...
    async def create_measured_unit(
        self, spec: MeasuredUnitSpec, *, key: str, retried: bool = False
    ) -> str: ...
    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def create_plan(self, spec: PlanSpec, *, key: str, retried: bool = False) -> str: ...
    async def remove_plan(self, code: str, *, key: str, retried: bool = False) -> None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def create_add_on(
        self, plan_code: str, spec: AddOnSpec, currency: str, *, key: str, retried: bool = False
    ) -> str: ...


class PlanProvisioner:
    """Handles `provision_plan`: brings Recurly in line with a product plan as it is now."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        catalog: Catalog,
        billing: Billing,
        once: Once,
        *,
        look_again: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._catalog = catalog
        self._billing = billing
        self._once = once
        self._look_again = look_again

    async def provision(self, action: Leased) -> Wait | None:
        """Read the plan as it is now, the event being only a hint.

        1. Whatever was linked under this name and is no longer there, or is archived, is removed.
        2. A deprecated plan only takes no new subscriptions.
        3. An active one of a product labelled for us is translated; what cannot be is held.
        4. Unit, plan and add-ons are ensured at Recurly; what is there and differs in price is held.
        5. The link is written, then the attributes at Amplify.
        """
        name = action.args["name"]
        plan = await self._catalog.find_product_plan(name)
        if wait := await self._remove_gone(name, plan):
            return wait
        if plan is None or plan.deleting or plan.state not in {"active", "deprecated"}:
            await self._release(name, "the plan is not active")
            return None
        if plan.state == "deprecated":
            await self._deprecate(plan)
            return None
        product = await self._catalog.find_product(plan.product_name)
        if product is None or product.billing_system != BILLING_SYSTEM:
            await self._release(name, "its product is not labelled billingSystem=recurly")
            return None
        translated = translate(plan, await self._catalog.list_quotas(name))
        match translated:
            case NotOurs(reason):
                log.info("plan.not_ours", plan=name, reason=reason)
                await self._release(name, reason)
            case Inexpressible(reasons):
                await self._hold(plan, "plan_inexpressible", reasons)
            case PlanSpec() as spec:
                await self._ensure(plan, product, spec)
        return None

    async def _ensure(self, plan: ProductPlan, product: Product, spec: PlanSpec) -> None:
        try:
            for unit in {one.measured_unit.name: one.measured_unit for one in spec.add_ons}.values():
                await self._ensure_unit(unit)
            wrong = await self._ensure_plan(spec)
        except Refused as error:
            reason = f'Plan "{plan.title}": Recurly refused it: {error}'
            await self._hold(plan, "plan_refused", (reason,))
            return
        if wrong:
            await self._hold(plan, "plan_differs", wrong)
            return
        await self._link(plan, product, spec)
        code = {"billingSystem": BILLING_SYSTEM, "recurlyPlanCode": spec.code}
        version = await self._catalog.set_attributes("productplans", plan.name, code)
        if version is not None:
            async with self._store.write() as tx:
                await links.plan_written(tx, plan.id, version)

    async def _ensure_unit(self, unit: MeasuredUnitSpec) -> None:
        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_measured_unit(unit, key=key, retried=retried)

        async def find() -> str | None:
            return await self._billing.find_measured_unit(unit.name)

        await self._once.write(f"unit:{unit.name}", asdict(unit), send=send, find=find, look_first=True)

    async def _ensure_plan(self, spec: PlanSpec) -> tuple[str, ...]:
        """The plan and its add-ons exist; returns how what was there already charges otherwise."""

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_plan(spec, key=key, retried=retried)

        async def find() -> str | None:
            existing = await self._billing.find_plan(spec.code)
            return None if existing is None else existing.id

        await self._once.write(f"plan:{spec.code}", asdict(spec), send=send, find=find, look_first=True)
        plan = await self._billing.find_plan(spec.code)
        if plan is None:
            raise Permanent(
                f"Recurly's plan {spec.code} was made and is gone; restore it there, or retry this action "
                "after the product plan was copied under a new id"
            )
        wrong = list(differences(spec, plan))
        if wrong:
            return tuple(wrong)
        there = {add_on.code: add_on for add_on in await self._billing.list_add_ons(spec.code, spec.currency)}
        for add_on in spec.add_ons:
            if add_on.code in there:
                wrong += add_on_differences(add_on, there[add_on.code])
            else:
                await self._ensure_add_on(spec, add_on)
        return tuple(wrong)

    async def _ensure_add_on(self, plan: PlanSpec, add_on: AddOnSpec) -> None:
        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_add_on(
                plan.code, add_on, plan.currency, key=key, retried=retried
            )

        async def find() -> str | None:
            listed = await self._billing.list_add_ons(plan.code, plan.currency)
            return next((one.id for one in listed if one.code == add_on.code), None)

        await self._once.write(f"add_on:{add_on.code}", asdict(add_on), send=send, find=find)

    async def _link(self, plan: ProductPlan, product: Product, spec: PlanSpec) -> None:
        link = PlanLink(
            plan_id=plan.id,
            name=plan.name,
            title=plan.title,
            product_name=product.name,
            plan_code=spec.code,
            currency=spec.currency,
            state="active",
            resource_version=None,
        )
        add_ons = tuple(
            AddOnLink(one.quota_id, plan.id, one.code, one.name, one.unit, one.tier_type, one.prices)
            for one in spec.add_ons
        )
        now = self._clock.now()
        notice = provider_notice(
            f"plan-linked:{plan.id}",
            f"Plan {plan.title} is billed by Recurly",
            f"Product plan {plan.title} ({plan.name}) of {product.title} is linked to Recurly's plan "
            f"{spec.code} with {len(add_ons)} usage add-on(s).",
        )
        async with self._store.write() as tx:
            await links.save_plan(tx, link, add_ons, now=now)
            await held.close(tx, subject=f"plan:{plan.name}", resolution="provisioned", now=now)
            await outbox.insert(tx, [notice], now=now)

    async def _remove_gone(self, name: str, plan: ProductPlan | None) -> Wait | None:
        """Remove at Recurly what Amplify no longer has, once its subscriptions have ended."""
        async with self._store.read() as tx:
            linked = await links.find_plans_by_name(tx, name)
        for link in linked:
            there = plan is not None and plan.id == link.plan_id
            if plan is not None and there and not plan.deleting and plan.state != "archived":
                continue
            if wait := await self._remove(link):
                return wait
        return None

    async def _remove(self, link: PlanLink) -> Wait | None:
        now = self._clock.now()
        async with self._store.write() as tx:
            open_ = await links.subscriptions(
                tx, plan_id=link.plan_id, states=("created", "active", "ending")
            )
            # Amplify removes a plan's subscriptions with it; the events come in any order, or never.
            ask = [
                subscription_action(one.name, one.subscription_id, because=f"plan-gone:{link.plan_id}")
                for one in open_
            ]
            await outbox.insert(tx, ask, now=now)
        if open_:
            return Wait(
                self._look_again,
                f"plan {link.title} is gone at Amplify; {len(open_)} subscription(s) must end first",
            )

        async def send(key: str, *, retried: bool) -> str:
            try:
                await self._billing.remove_plan(link.plan_code, key=key, retried=retried)
            except NotFound:
                log.info("plan.removed_already", plan=link.plan_code)
            return GONE

        async def find() -> str | None:
            there = await self._billing.find_plan(link.plan_code)
            return GONE if there is None or there.state != "active" else None

        await self._once.write(f"remove-plan:{link.plan_code}", {}, send=send, find=find, look_first=True)
        notice = provider_notice(
            f"plan-removed:{link.plan_id}",
            f"Plan {link.title} was removed at Recurly",
            f"Product plan {link.title} ({link.name}) is gone at Amplify; Recurly's plan {link.plan_code} "
            "was removed.",
        )
        async with self._store.write() as tx:
            await links.plan_moved(tx, link.plan_id, "removed", now=now)
            await outbox.insert(tx, [notice], now=now)
        return None

    async def _deprecate(self, plan: ProductPlan) -> None:
        async with self._store.write() as tx:
            if await links.find_plan(tx, plan.id) is not None:
                await links.plan_moved(tx, plan.id, "deprecated", now=self._clock.now())

    async def _hold(self, plan: ProductPlan, kind: str, reasons: tuple[str, ...]) -> None:
        reason = " ".join(reasons)
        now = self._clock.now()
        subject = f"plan:{plan.name}"
        again = Action(PROVISION_PLAN, subject, "", {"name": plan.name, "id": plan.id})
        notice = provider_notice(
            f"held:{kind}:{plan.id}:{now.isoformat()}", f"Plan {plan.title} is held, not billed", reason
        )
        async with self._store.write() as tx:
            await held.close(tx, subject=subject, resolution=f"now {kind}", now=now, but_kind=kind)
            await hold(tx, Hold(kind, subject, reason, again), notice, now=now)

    async def _release(self, name: str, why: str) -> None:
        async with self._store.write() as tx:
            await held.close(tx, subject=f"plan:{name}", resolution=why, now=self._clock.now())
