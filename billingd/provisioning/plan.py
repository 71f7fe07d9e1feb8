"""Provision plan: a product plan's measured units, plan and add-ons at Recurly, as Amplify prices them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, Literal, Protocol

import structlog

from billingd.domain.agreement import add_on_differences, differences, uncharged
from billingd.domain.attempts import Action, Leased, Wait
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledUsage
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota
from billingd.domain.charges import Prices
from billingd.domain.errors import NotFound, Permanent, Refused, Retryable
from billingd.domain.events import PROVISION_PLAN, attach_action, subscription_action
from billingd.domain.notices import provider_notice
from billingd.domain.pricing import AddOnSpec, Inexpressible, MeasuredUnitSpec, NotOurs, PlanSpec, translate
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning import absence, renaming
from billingd.provisioning.absence import Absences
from billingd.provisioning.holding import hold
from billingd.provisioning.pricecheck import add_ons_at
from billingd.provisioning.renaming import Renamer
from billingd.store import held, links, outbox
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, PlanLink, SubscriptionLink

log = structlog.get_logger()

LIVE: Final = ("created", "active")
"""States of the links of subscriptions that go on."""

NOTHING: Final = Prices("flat", Decimal(0))
"""What a quota costs that became free."""

GONE: Final = "gone"
"""The result of a removal: there is no id to keep."""


class Catalog(Protocol):
    """What is read and written at Amplify."""

    async def find_product(self, name: str) -> Product | None: ...
    async def find_product_plan(self, name: str) -> ProductPlan | None: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def set_attributes(
        self,
        kind: Literal["productplans"],
        name: str,
        attributes: Mapping[str, str],
        *,
        resource_id: str | None = None,
    ) -> str | None: ...


class Billing(renaming.Billing, Protocol):
    """What is read and written at Recurly."""

    async def find_measured_unit(self, name: str) -> str | None: ...
    async def create_measured_unit(
        self, spec: MeasuredUnitSpec, *, key: str, retried: bool = False
    ) -> str: ...
    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def create_plan(self, spec: PlanSpec, *, key: str, retried: bool = False) -> str: ...
    async def remove_plan(self, code: str, *, key: str, retried: bool = False) -> None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None: ...
    async def create_add_on(
        self, plan_code: str, spec: AddOnSpec, currency: str, *, key: str, retried: bool = False
    ) -> str: ...


Found = Mapping[str, tuple[BilledUsage, ...]]
"""Usage of a subscription at Recurly, by add-on code."""


class ReadBack(Protocol):
    """Usage that Recurly holds already of add-ons that a linked plan gains, or gains again."""

    async def list_gained(
        self, plan_id: str, add_on_codes: Sequence[str]
    ) -> Sequence[tuple[SubscriptionLink, Found]]: ...

    """What it holds of each subscription that has any."""

    async def keep(self, tx: Tx, link: SubscriptionLink, found: Found, *, now: datetime) -> None: ...

    """Write it down, in the transaction that writes the add-ons' links."""


@dataclass(frozen=True, slots=True)
class Ensured:
    """What is at Recurly: how it charges otherwise than it should, and the add-ons that agree."""

    wrong: tuple[str, ...]
    add_ons: tuple[AddOnSpec, ...]
    free: tuple[AddOnLink, ...] = ()
    """Linked ones for which nobody new is charged, as Amplify has it now."""


class PlanProvisioner:
    """Handles `provision_plan`: brings Recurly in line with a product plan as it is now."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        catalog: Catalog,
        billing: Billing,
        once: Once,
        absences: Absences,
        *,
        look_again: timedelta,
        read_back: ReadBack | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._catalog = catalog
        self._billing = billing
        self._once = once
        self._renamer = Renamer(store, clock, billing, once)
        self._absences = absences
        self._look_again = look_again
        self._read_back = read_back

    async def provision(self, action: Leased) -> Wait | None:
        """Read the plan as it is now, the event being only a hint.

        1. Whatever was linked under this name and was deleted, or is archived, is removed; whether what is
           not found was deleted, `Absences` judges.
        2. A deprecated plan only takes no new subscriptions; it is made for nobody any more, but linked
           where it is at Recurly already.
        3. One of a product labelled for us is translated; what cannot be is held.
        4. Unit, plan and add-ons are ensured at Recurly; what is there and differs in price is held, as is a
           linked plan that Amplify does not charge for any more. A list of its quotas that lacks one which is
           not known to be deleted says nothing: all of this waits.
        5. What Amplify calls otherwise now is renamed.
        6. The link is written, then the attributes at Amplify; a new add-on goes to every subscription.
        """
        name = action.args["name"]
        plan = await self._catalog.find_product_plan(name)
        if wait := await self._remove_gone(name, plan):
            return wait
        if plan is None and (wait := await self._held_and_hidden(name)):
            return wait
        if plan is None or plan.deleting or plan.state not in {"active", "deprecated"}:
            await self._release(name, "the plan is not active")
            return None
        deprecated = plan.state == "deprecated"
        if deprecated:
            await self._deprecate(plan)
        product = await self._catalog.find_product(plan.product_name)
        if product is None:  # hidden, or deleted: then its plans go with it, and each is judged on its own
            log.info("plan.product_not_found", plan=name, product=plan.product_name)
            return None
        if product.billing_system != BILLING_SYSTEM:
            await self._release(name, "its product is not labelled billingSystem=recurly")
            return None
        try:
            quotas = await self._catalog.list_quotas(name)
        except NotFound as error:  # of a plan that was found a moment ago
            raise Retryable(f"Amplify does not show the quotas of plan {name}: {error}") from error
        linked = await self._is_linked(plan)
        expected = await self._expected(plan)
        wait = await self._absences.judge_quotas(plan, expected, quotas, asked_by=action.id)
        if wait is not None and (quotas or deprecated or not linked):
            return wait
        await self._tell_of_gone(plan, quotas)
        translated = translate(plan, quotas)
        shown = sorted({one.id for one in quotas} or expected)
        match translated:
            case NotOurs(reason) if not deprecated and linked:
                await self._hold(plan, "plan_differs", (reason, await self._meaning(plan)), shown)
            case NotOurs(reason):
                log.info("plan.not_ours", plan=name, reason=reason)
                await self._release(name, reason)
            case Inexpressible() if deprecated:
                await self._release(name, "the plan is deprecated")
            case Inexpressible(reasons):
                await self._hold(plan, "plan_inexpressible", reasons, shown)
            case PlanSpec() as spec:
                if deprecated and await self._billing.find_plan(spec.code) is None:
                    await self._release(name, "the plan is deprecated")
                else:
                    await self._ensure(plan, product, spec, quotas, action.id)
        return None

    async def _ensure(
        self,
        plan: ProductPlan,
        product: Product,
        spec: PlanSpec,
        quotas: tuple[Quota, ...],
        action_id: int,
    ) -> None:
        async with self._store.read() as tx:
            linked = await links.find_plan(tx, plan.id)
            known = {one.quota_id: one for one in await links.add_ons_of(tx, plan.id)}
        shown = sorted(one.id for one in quotas)
        try:
            for unit in {one.measured_unit.name: one.measured_unit for one in spec.add_ons}.values():
                await self._ensure_unit(unit)
            ensured = await self._ensure_plan(spec, quotas, known)
        except Refused as error:
            reason = f'Plan "{plan.title}": Recurly refused it: {error}'
            await self._hold(plan, "plan_refused", (reason,), shown)
            return
        if linked is not None:
            await self._renamer.retitle(linked, known, plan, spec, ensured.add_ons, action_id)
        if ensured.wrong and linked is None:
            await self._hold(plan, "plan_differs", ensured.wrong, shown)
            return
        if ensured.wrong and plan.state == "active":
            await self._hold(plan, "plan_differs", (*ensured.wrong, await self._meaning(plan)), shown)
            # subscriptions that exist go on in the currency they were made in
            assert linked is not None
            kept = replace(spec, currency=linked.currency)
            if kept != spec:  # its amounts would be of another currency
                ensured = Ensured(ensured.wrong, ())
            await self._link(plan, product, kept, ensured, resolution=None)
            return
        await self._link(plan, product, spec, ensured, resolution="provisioned")
        code = {"billingSystem": BILLING_SYSTEM, "recurlyPlanCode": spec.code}
        version = await self._catalog.set_attributes("productplans", plan.name, code, resource_id=plan.id)
        if version is not None:
            async with self._store.write() as tx:
                await links.plan_written(tx, plan.id, version)

    async def _meaning(self, plan: ProductPlan) -> str:
        """What other prices mean for those that subscribe already, and what to do."""
        async with self._store.read() as tx:
            there = await links.subscriptions(tx, plan_id=plan.id, states=LIVE)
        return (
            f"Recurly applies a changed price to new subscriptions only: the {len(there)} that exist keep "
            "the price they were made at, until they end. New ones wait. Make both sides agree, at Recurly "
            "or at Amplify, then run `billingd resync` (it also runs by itself): this is released then."
        )

    async def _expected(self, plan: ProductPlan) -> set[str]:
        """Ids of the quotas that a list of the plan's should have: those linked, and what was held for."""
        async with self._store.read() as tx:
            expected = {one.quota_id for one in await links.add_ons_of(tx, plan.id)}
            for item in await held.standing(tx, subject=f"plan:{plan.name}"):
                args = (item["action"] or {}).get("args", {})
                if args.get("id") == plan.id:
                    expected.update(args.get("quotas", ()))
        return expected

    async def _is_linked(self, plan: ProductPlan) -> bool:
        async with self._store.read() as tx:
            linked = await links.find_plan(tx, plan.id)
        return linked is not None and linked.state != "removed"

    async def _ensure_unit(self, unit: MeasuredUnitSpec) -> None:
        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_measured_unit(unit, key=key, retried=retried)

        async def find() -> str | None:
            return await self._billing.find_measured_unit(unit.name)

        await self._once.write(f"unit:{unit.name}", asdict(unit), send=send, find=find, look_first=True)

    async def _ensure_plan(
        self, spec: PlanSpec, quotas: tuple[Quota, ...], known: Mapping[str, AddOnLink]
    ) -> Ensured:
        """The plan and its add-ons exist; says how what was there already charges otherwise.

        `known` are the linked add-ons by quota, also those that Amplify charges for no more.
        """

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
        if plan.state != "active":
            return Ensured(tuple(wrong), ())
        asked = [*(one.code for one in spec.add_ons), *(one.add_on_code for one in known.values())]
        there = await add_ons_at(self._billing, spec.code, spec.currency, asked)
        agreeing: list[AddOnSpec] = []
        for add_on in spec.add_ons:
            if add_on.code not in there:
                await self._ensure_add_on(spec, add_on)
            elif differing := add_on_differences(add_on, there[add_on.code]):
                wrong += differing
                continue
            agreeing.append(add_on)
        free = {one.code: one for one in uncharged(spec, quotas, known.values())}
        for code, one in free.items():
            wrong += one.differences(there.get(code))
        for_nothing = tuple(
            replace(link, prices=NOTHING)
            for link in known.values()
            if (kept := free.get(link.add_on_code))
            and not kept.gone
            and not kept.differences(there.get(kept.code))
        )
        return Ensured(tuple(wrong), tuple(agreeing), for_nothing)

    async def _ensure_add_on(self, plan: PlanSpec, add_on: AddOnSpec) -> None:
        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_add_on(
                plan.code, add_on, plan.currency, key=key, retried=retried
            )

        async def find() -> str | None:
            listed = await self._billing.list_add_ons(plan.code, plan.currency)
            return next((one.id for one in listed if one.code == add_on.code), None)

        await self._once.write(f"add_on:{add_on.code}", asdict(add_on), send=send, find=find)

    async def _link(
        self,
        plan: ProductPlan,
        product: Product,
        spec: PlanSpec,
        ensured: Ensured,
        *,
        resolution: str | None,
    ) -> None:
        """Write the links; what was held of the plan is held no longer, if there is a `resolution`."""
        link = PlanLink(
            plan_id=plan.id,
            name=plan.name,
            title=plan.title,
            product_name=product.name,
            plan_code=spec.code,
            currency=spec.currency,
            state=plan.state,
            resource_version=None,
        )
        add_ons = tuple(
            AddOnLink(one.quota_id, plan.id, one.code, one.name, one.unit, one.tier_type, one.prices)
            for one in ensured.add_ons
        )
        now = self._clock.now()
        async with self._store.read() as tx:
            before = {one.add_on_code for one in await links.add_ons_of(tx, plan.id)}
        new = [one.add_on_code for one in add_ons if one.add_on_code not in before]
        told = await self._read_back.list_gained(plan.id, new) if self._read_back and new else ()
        async with self._store.write() as tx:
            linked = await links.find_plan(tx, plan.id)
            known = {one.add_on_code for one in await links.add_ons_of(tx, plan.id)}
            await links.save_plan(tx, link, (*add_ons, *ensured.free), now=now)
            for subscription, found in told:
                assert self._read_back is not None
                await self._read_back.keep(tx, subscription, found, now=now)
            if resolution is not None:
                await held.close(tx, subject=f"plan:{plan.name}", resolution=resolution, now=now)
            if linked is None:
                await outbox.insert(tx, [_linked_notice(plan, product, spec.code, len(add_ons))], now=now)
            elif gained := [one for one in add_ons if one.add_on_code not in known]:
                codes = [one.add_on_code for one in gained]
                subscribed = await links.subscriptions(tx, plan_id=plan.id, states=LIVE)
                attach = [attach_action(one.subscription_id, codes) for one in subscribed]
                await outbox.insert(tx, [*attach, _gained_notice(plan, gained, len(attach))], now=now)

    async def _tell_of_gone(self, plan: ProductPlan, quotas: tuple[Quota, ...]) -> None:
        """A quota that a plan lost: nothing is removed, for what was counted is billed still."""
        if not quotas:
            return  # no list at all is no evidence; then the plan itself is held
        there = {quota.id for quota in quotas}
        async with self._store.read() as tx:
            gone = [one for one in await links.add_ons_of(tx, plan.id) if one.quota_id not in there]
        if not gone:
            return
        notices = [
            provider_notice(
                f"quota-gone:{one.quota_id}",
                f"Quota {one.title} of {plan.title} is gone",
                f"Amplify has no quota {one.title} in plan {plan.title} ({plan.name}) any more. Its add-on "
                f"{one.add_on_code} stays at Recurly, on the plan and on its subscriptions, so that what was "
                "counted is billed; without usage it costs nothing. Nothing was removed; new ones do not get "
                "it.",
            )
            for one in gone
        ]
        async with self._store.write() as tx:
            await outbox.insert(tx, notices, now=self._clock.now())

    async def _remove_gone(self, name: str, plan: ProductPlan | None) -> Wait | None:
        """Remove at Recurly what Amplify no longer has, once its subscriptions have ended."""
        async with self._store.read() as tx:
            linked = await links.find_plans_by_name(tx, name)
        if plan is not None:
            await self._absences.seen("plan", plan.id)
        for link in linked:
            if plan is None or plan.id != link.plan_id:
                over = await self._absences.judge(absence.of_plan(link), replaced=plan is not None)
                if isinstance(over, Wait):
                    return over
            else:
                if not plan.deleting and plan.state != "archived":
                    continue
            if wait := await self._remove(link):
                return wait
        return None

    async def _held_and_hidden(self, name: str) -> Wait | None:
        """Wait while one that was never linked, and is held, may only not be shown."""
        async with self._store.read() as tx:
            standing = await held.standing(tx, subject=f"plan:{name}")
        for id_ in {(item["action"] or {}).get("args", {}).get("id") for item in standing} - {None}:
            over = await self._absences.judge(absence.Missing("plan", id_, name, name), harmless=True)
            if isinstance(over, Wait):
                return over
            async with self._store.write() as tx:
                await absence.settled(tx, "plan", [id_], self._clock.now())
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
            await absence.settled(tx, "plan", [link.plan_id], now)
            await outbox.insert(tx, [notice], now=now)
        return None

    async def _deprecate(self, plan: ProductPlan) -> None:
        async with self._store.write() as tx:
            if await links.find_plan(tx, plan.id) is not None:
                await links.plan_moved(tx, plan.id, "deprecated", now=self._clock.now())

    async def _hold(
        self, plan: ProductPlan, kind: str, reasons: tuple[str, ...], quotas: Sequence[str]
    ) -> None:
        """Hold it; `quotas` are the ids of those that it was judged with: one that a list lacks is missed."""
        reason = " ".join(reasons)
        now = self._clock.now()
        subject = f"plan:{plan.name}"
        again = Action(
            PROVISION_PLAN, subject, "", {"name": plan.name, "id": plan.id, "quotas": list(quotas)}
        )
        notice = provider_notice(
            f"held:{kind}:{plan.id}:{now.isoformat()}", f"Plan {plan.title} is held, not billed", reason
        )
        async with self._store.write() as tx:
            await held.close(tx, subject=subject, resolution=f"now {kind}", now=now, but_kind=kind)
            await hold(tx, Hold(kind, subject, reason, again), notice, now=now)

    async def _release(self, name: str, why: str) -> None:
        async with self._store.write() as tx:
            await held.close(tx, subject=f"plan:{name}", resolution=why, now=self._clock.now())


def _linked_notice(plan: ProductPlan, product: Product, code: str, add_ons: int) -> Action:
    return provider_notice(
        f"plan-linked:{plan.id}",
        f"Plan {plan.title} is billed by Recurly",
        f"Product plan {plan.title} ({plan.name}) of {product.title} is linked to Recurly's plan "
        f"{code} with {add_ons} usage add-on(s).",
    )


def _gained_notice(plan: ProductPlan, gained: Sequence[AddOnLink], subscriptions: int) -> Action:
    titles = ", ".join(one.title for one in gained)
    return provider_notice(
        f"quota-linked:{min(one.quota_id for one in gained)}",
        f"Plan {plan.title} gained {titles}",
        f"Plan {plan.title} ({plan.name}) has a Recurly add-on for {titles} now, which is put on its "
        f"{subscriptions} subscription(s) too.",
    )
