"""Resync: lists Amplify, compares it with the links and with Recurly, and asks for what was missed."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol, TypeVar

import structlog

from billingd.domain import resync
from billingd.domain.attempts import UNFINISHED, Leased, State
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import (
    BILLING_SYSTEM,
    Marketplace,
    Product,
    ProductPlan,
    Quota,
    Subscription,
    Unreadable,
)
from billingd.domain.errors import Misconfigured, NotFound, Permanent
from billingd.domain.events import (
    ATTACH_ADD_ONS,
    PROVISION_PLAN,
    PROVISION_PRODUCT,
    PROVISION_SUBSCRIPTION,
    REFRESH_SUBSCRIPTION,
)
from billingd.domain.notices import provider_notice
from billingd.domain.pricing import PLAN_CODES
from billingd.domain.resync import (
    NATIVE_BILLING,
    Billed,
    Compared,
    Known,
    Listed,
    Standing,
    Step,
)
from billingd.loops import Clock
from billingd.provisioning import absence
from billingd.provisioning.absence import LIVE
from billingd.provisioning.holding import hold
from billingd.store import absences, held, links, marks, outbox
from billingd.store.absences import Absence, Kind
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold

log = structlog.get_logger()

T = TypeVar("T")

LOOK_EVERY: Final = timedelta(minutes=1)
"""How often the loop looks whether a resync was asked for, should a wake-up have come before its commit."""

KINDS: Final = (
    PROVISION_PRODUCT,
    PROVISION_PLAN,
    PROVISION_SUBSCRIPTION,
    REFRESH_SUBSCRIPTION,
    ATTACH_ADD_ONS,
)
"""The kinds of action that a step may have."""


class Catalog(Protocol):
    """What is listed at Amplify."""

    async def list_products(self) -> tuple[Product, ...]: ...
    async def survey_product_plans(self) -> tuple[ProductPlan | Unreadable, ...]: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def survey_subscriptions(self) -> tuple[Subscription | Unreadable, ...]: ...
    async def has_subscription(self, subscription_id: str) -> bool: ...
    async def list_marketplaces(self) -> tuple[Marketplace, ...]: ...


class Billing(Protocol):
    """What is listed at Recurly."""

    async def list_plans(self) -> tuple[BilledPlan, ...]: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a look at all sides found. `steps` are to be done, `withheld` are not until a person says so."""

    began_at: datetime
    steps: tuple[Step, ...]
    withheld: tuple[Step, ...]
    notes: tuple[str, ...]
    """What an operator has to settle first: dead letters."""
    unread: tuple[str, ...]
    """What is at Amplify and cannot be understood."""
    marketplaces: tuple[Marketplace, ...] | None
    """All of them; None when they could not be listed."""
    counts: Mapping[str, int]
    served: tuple[str, ...]
    """Ids of the subscriptions that Amplify shows as approved and not over."""
    over: tuple[Absence, ...] = ()
    """What was noted as absent and is not any more."""
    enqueued: int = 0

    @property
    def charging(self) -> tuple[Marketplace, ...] | None:
        """Marketplaces whose own billing is on; None when they could not be listed."""
        if self.marketplaces is None:
            return None
        return tuple(one for one in self.marketplaces if one.payment_type is not None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know of, in sentences."""
        gone = [step for step in self.withheld if step.op == "-"]
        absent = (resync.mass_reason(gone),) if gone else ()
        return (*absent, *map(_charges_too, self.charging or ()), *self.unread)


class Resync:
    """Runs at the first start, after `ask`, and `every` so often; webhooks and feed only make it rarer."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        amplify: Catalog,
        recurly: Billing,
        *,
        every: timedelta,
        wake_outbox: asyncio.Event,
    ) -> None:
        self._store = store
        self._clock = clock
        self._amplify = amplify
        self._recurly = recurly
        self._every = every
        self._wake_outbox = wake_outbox
        self._turn = asyncio.Lock()
        self._asked = 0
        self.wake = asyncio.Event()

    async def ask(self, tx: Tx, because: str) -> None:
        """A resync is due from the commit of this transaction on."""
        log.info("resync.asked", because=because)
        await marks.clear(tx, marks.RESYNCED)
        self._asked += 1
        self.wake.set()

    async def run_once(self) -> bool:
        """Resync when it is due; False when it was not."""
        if await self._due_in() > timedelta(0):
            return False
        await self.run(dry_run=False)
        return True

    async def idle(self) -> timedelta:
        """How long nothing is due, unless somebody asks."""
        return min(await self._due_in(), LOOK_EVERY)

    async def handle(self, action: Leased) -> None:
        """Handles `resync`: a person has confirmed that the plans and subscriptions it names are gone."""
        async with self._store.write() as tx:
            await absence.confirmed(tx, action.args, self._clock.now())
        await self.run(dry_run=False)

    async def run(self, *, dry_run: bool) -> Comparison:
        """Compare, and unless it is a dry run enqueue every step, in one transaction with the mark."""
        async with self._turn:
            asked = self._asked
            found = await self.compare()
            if dry_run:
                return found
            now = self._clock.now()
            async with self._store.write() as tx:
                enqueued = await outbox.insert(tx, [step.action for step in found.steps], now=now)
                await self._tell_of_absence(tx, found, now)
                await self._tell_of_charging(tx, found, now)
                await links.served(tx, found.served, at=found.began_at)
                if asked == self._asked:  # else of what may have been listed already: another is due
                    await marks.note(tx, marks.RESYNCED, at=found.began_at, detail=dict(found.counts))
            if asked != self._asked:  # also by whom did not see the mark yet, while it was being committed
                async with self._store.write() as tx:
                    await marks.clear(tx, marks.RESYNCED)
            self._wake_outbox.set()
        log.info("resync.done", enqueued=enqueued, withheld=len(found.withheld), **found.counts)
        for warning in found.unread:
            log.warning("resync.unreadable", error=warning)
        return replace(found, enqueued=enqueued)

    async def told(self, *, dry_run: bool) -> dict[str, Any]:
        """The same as a document: what POST /resync answers, and `billingd resync --json` prints."""
        return document(await self.run(dry_run=dry_run), dry_run=dry_run)

    async def compare(self) -> Comparison:
        """List Amplify, then Recurly, then read the store: what was linked meanwhile is known by then."""
        began_at = self._clock.now()
        async with self._store.read() as tx:
            plans, subscriptions = await links.plans(tx), await links.subscriptions(tx)
        before = {one.plan_id for one in plans} | {one.subscription_id for one in subscriptions}
        listed, unread = await self._list_amplify()
        marketplaces = await self._list_marketplaces()
        billed = await self._list_recurly(listed)
        known, newest = await self._read_store(frozenset(before))
        because = f"resync:{began_at.isoformat()}:{newest}"  # unique even on a clock that stands still
        found = resync.compare(listed, known, billed, because=because)
        withheld, over = await self._withheld(found, listed, known, began_at)
        waits = {(step.what, step.id) for step in withheld}
        steps = tuple(step for step in found.steps if (step.what, step.id) not in waits)
        steps = tuple([step for step in steps if not await self._is_there_after_all(step)])
        by_op = {word: sum(step.op == op for step in steps) for op, word in OPS.items()}
        counts = {
            "products": len(listed.products),
            "plans": len(listed.plans),
            "subscriptions": len(listed.subscriptions),
            **by_op,
            "dead_letters": found.dead_letters,
        }
        served = tuple(
            one.id for one in listed.subscriptions if one.approval == "approved" and not resync.over(one)
        )
        return Comparison(began_at, steps, withheld, found.notes, unread, marketplaces, counts, served, over)

    async def _withheld(
        self, found: Compared, listed: Listed, known: Known, began_at: datetime
    ) -> tuple[tuple[Step, ...], tuple[Absence, ...]]:
        """The steps that a person has to confirm first, and what of the absences noted is none any more.

        Only absences that no event explains and nobody has confirmed yet; those of which a person is asked
        already, and all of them when they are too many, with those that handlers are waiting for. Nor is
        anything made under the name of one of these before that is known: all may be another environment's.
        """
        absent = (*found.missing, *(step for step in found.steps if step.absent and step.op != "-"))
        plan_of = {one.subscription_id: one.plan_id for one in known.subscriptions.values()}
        ids = {what: [step.id for step in absent if step.what == what] for what in ("plan", "subscription")}
        async with self._store.read() as tx:
            noted = await absences.everything(tx)
            explained: dict[str, datetime] = dict(
                await absence.deletions(tx, dict.fromkeys(ids["plan"]), "plan")
            )
            asked = {one: plan_of.get(one) for one in ids["subscription"]}
            explained |= await absence.deletions(tx, asked, "subscription")
        live = {one.plan_id for one in known.plans if one.state != "removed"}
        plans = len(live)
        live |= {one.subscription_id for one in known.subscriptions.values() if one.state in LIVE}
        here = {one.id for one in listed.plans} | {one.id for one in listed.subscriptions} | listed.unread
        over = [
            one
            for one in noted
            if not began_at < one.since <= self._clock.now()  # a clock may have been ahead
            and (one.id in here or (one.id in known.before and one.id not in live))
        ]
        missing = {one.id: one for one in noted if one not in over}
        settled = explained.keys() | {one.id for one in missing.values() if one.confirmed_at is not None}
        held_already = {one.id for one in missing.values() if one.held}
        open_ = [step for step in absent if step.id not in settled]
        counted: dict[str, resync.Missing] = {step.id: step for step in open_ if step.op == "-"}
        counted |= {one.id: one for one in missing.values() if one.id not in settled}
        if not resync.is_mass(counted.values(), plans=plans, subscriptions=len(live) - plans):
            open_ = [step for step in open_ if step.id in held_already]
        names = {(step.what, step.name) for step in open_ if step.op == "-"}
        instead = (step for step in found.steps if step.op == "+" and (step.what, step.name) in names)
        due = {step.id for step in found.steps}
        new = (step for step in open_ if step.id in due or step.id not in held_already)
        return (*new, *instead), tuple(over)

    async def _is_there_after_all(self, step: Step) -> bool:
        """Whether what nobody here knows of, and whose name nobody knows, is at Amplify all the same.

        Its handler cannot ask for it by name, as it does for all else that is absent.
        """
        if not step.absent or "uuid" not in step.action.args:
            return False
        there = await self._amplify.has_subscription(step.id)
        if there:
            log.warning("resync.absence_contradicted", subscription=step.id)
        return there

    async def _due_in(self) -> timedelta:
        async with self._store.read() as tx:
            mark = await marks.find(tx, marks.RESYNCED)
        now = self._clock.now()
        if mark is None or mark.at > now:  # by a clock that was ahead
            return timedelta(0)
        return mark.at + self._every - now

    async def _list_amplify(self) -> tuple[Listed, tuple[str, ...]]:
        """What Amplify has, and what of it cannot be understood, in sentences."""
        products = await self._amplify.list_products()
        labelled = frozenset(one.name for one in products if one.billing_system == BILLING_SYSTEM)
        plans, strange_plans = _sorted_out(await self._amplify.survey_product_plans())
        quotas: dict[str, tuple[Quota, ...]] = {}
        unread = [one.why for one in strange_plans]
        for plan in plans:
            if not resync.to_translate(plan, labelled):
                continue
            try:
                quotas[plan.id] = await self._amplify.list_quotas(plan.name)
            except NotFound:
                log.info("resync.plan_went_meanwhile", plan=plan.name)
            except Permanent as error:
                unread.append(str(error))
        subscriptions, strange = _sorted_out(await self._amplify.survey_subscriptions())
        unread += [one.why for one in strange]
        there = frozenset(one.id for one in (*strange_plans, *strange))
        return Listed(products, plans, quotas, subscriptions, there), tuple(unread)

    async def _list_marketplaces(self) -> tuple[Marketplace, ...] | None:
        """All Marketplaces; None when we may not see them."""
        try:
            return await self._amplify.list_marketplaces()
        except (Misconfigured, NotFound) as error:
            log.warning("resync.marketplaces_hidden", error=str(error))
            return None

    async def _list_recurly(self, listed: Listed) -> Billed:
        """What Recurly has; add-ons only of the plans whose prices are compared, as the provisioner asks."""
        plans = {one.code: one for one in await self._recurly.list_plans()}
        async with self._store.read() as tx:
            linked = {one.plan_id: one for one in await links.plans(tx) if one.state != "removed"}
        add_ons: dict[str, tuple[BilledAddOn, ...]] = {}
        currencies = {one.id: one.currency for one in listed.plans}
        for plan_id in listed.quotas:
            link = linked.get(plan_id)
            code = PLAN_CODES + plan_id if link is None else link.plan_code
            currency = currencies.get(plan_id) or (None if link is None else link.currency)
            if code not in plans or currency is None:
                continue
            try:
                add_ons[code] = await self._recurly.list_add_ons(code, currency)
            except NotFound:
                del plans[code]  # removed meanwhile
        return Billed(plans, add_ons, await self._recurly.list_live_subscriptions())

    async def _read_store(self, before: frozenset[str]) -> tuple[Known, int]:
        """What the store has, and the id of its newest action."""
        async with self._store.read() as tx:
            plans, add_ons = await links.plans(tx), await links.add_ons(tx)
            subscriptions = {one.subscription_id: one for one in await links.subscriptions(tx)}
            rows: list[dict[str, Any]] = []
            for kind in KINDS:
                rows += await outbox.select(tx, states=[*UNFINISHED, State.DEAD], kind=kind)
            items = await held.standing(tx)
            gone = await absence.all_gone_quotas(tx, add_ons.values())
            newest = await outbox.newest(tx)
            letters = {row["id"]: row["subject"] for row in rows if row["state"] == State.DEAD}
            done = await outbox.newest_done(tx, letters.values(), after=min(letters, default=0))
        waiting: set[str] = set()
        dead: dict[str, str] = {}
        for row in rows:
            if row["state"] == State.DEAD:
                if done.get((row["kind"], row["subject"]), 0) > row["id"]:
                    continue  # a later one has done what this one could not
                dead[row["subject"]] = f"action {row['id']} is a dead letter: {row['error']}"
            else:
                waiting.add(row["subject"])
        stands = {
            item["subject"]: Standing(item["kind"], item["reason"], _name(item), _add_ons(item))
            for item in items
            if item["subject"].startswith(("product:", "plan:", "subscription:"))
        }
        waits = frozenset(waiting)
        return Known(plans, add_ons, subscriptions, before, waits, dead, stands, frozenset(gone)), newest

    async def _tell_of_absence(self, tx: Tx, found: Comparison, now: datetime) -> None:
        kinds: tuple[Kind, ...] = ("plan", "subscription")
        for kind in kinds:
            await absences.clear(tx, kind, [one.id for one in found.over if one.kind == kind])
            steps = [step for step in found.withheld if step.what == kind and step.op == "-"]
            for step in steps:
                await absences.note(tx, Absence(kind, step.id, step.name, step.title, found.began_at))
            await absences.hold(tx, kind, [step.id for step in steps])
        await absence.tell(tx, now)

    async def _tell_of_charging(self, tx: Tx, found: Comparison, now: datetime) -> None:
        off = set()
        for marketplace in found.marketplaces or ():
            subject = f"marketplace:{marketplace.name}"
            if marketplace.payment_type is None:
                off.add(subject)
                continue
            reason = _charges_too(marketplace)
            notice = provider_notice(
                f"held:{NATIVE_BILLING}:{marketplace.name}:{now.isoformat()}",
                f"Marketplace {marketplace.title} bills by itself",
                reason,
            )
            await hold(tx, Hold(NATIVE_BILLING, subject, reason), notice, now=now)
        for item in await held.standing(tx, kind=NATIVE_BILLING):
            if item["subject"] in off:  # one that is not listed may only be hidden
                await held.close_one(tx, item["id"], resolution="its own billing is off", now=now)


OPS: Final[Mapping[str, str]] = {"+": "create", "~": "change", "-": "end"}
"""What each sign of a step means."""


def document(found: Comparison, *, dry_run: bool) -> dict[str, Any]:
    """A comparison as `resync --json` and POST /resync have it."""
    return {
        "dry_run": dry_run,
        "steps": [_shown(step) for step in found.steps],
        "enqueued": found.enqueued,
        "withheld": [_shown(step) for step in found.withheld],
        "warnings": list(found.warnings),
        "notes": list(found.notes),
        "counts": dict(found.counts),
    }


def _shown(step: Step) -> dict[str, str]:
    return {name: str(getattr(step, name)) for name in ("op", "what", "id", "name", "title", "reason")}


def _charges_too(marketplace: Marketplace) -> str:
    return (
        f"Marketplace {marketplace.title} ({marketplace.name}) has its own billing on "
        f"({marketplace.payment_type}): consumers are charged twice, by Amplify and by Recurly. Switch it "
        "off there."
    )


def _name(item: Mapping[str, Any]) -> str:
    """The name of the plan or subscription that is held, as far as the item tells."""
    args = (item["action"] or {}).get("args", {})
    return str(args.get("name") or item["subject"].split(":")[1])


def _add_ons(item: Mapping[str, Any]) -> frozenset[str]:
    """The add-ons that are held, where the item is of such."""
    return frozenset((item["action"] or {}).get("args", {}).get("add_ons", ()))


def _sorted_out(found: Sequence[T | Unreadable]) -> tuple[tuple[T, ...], tuple[Unreadable, ...]]:
    """What could be understood, and what could not."""
    strange = tuple(one for one in found if isinstance(one, Unreadable))
    return tuple(one for one in found if not isinstance(one, Unreadable)), strange
