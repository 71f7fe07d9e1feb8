"""Adoption: takes over what another integration made at Recurly, from an explicit moment on, once.

Plans are linked by their own handler, which finds them by their codes. A subscription is linked first, then
Amplify's attributes say from when on its usage counts, and it is marked last: were it marked first, another
handler might find it by its marker, and bill again what the other integration billed since it was made.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol

import structlog

from billingd.domain.agreement import add_on_differences, differences
from billingd.domain.attempts import UNFINISHED, Action, Leased, Wait
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription, BilledUsage
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota, Subscription, Unreadable
from billingd.domain.errors import BillingdError, NotFound, Permanent, Replaced
from billingd.domain.events import ADOPT_SUBSCRIPTION, adopt_action, plan_action
from billingd.domain.foreign import untagged
from billingd.domain.notices import provider_notice
from billingd.domain.pricing import PLAN_CODES, Inexpressible, NotOurs, PlanSpec, translate
from billingd.domain.windows import floor
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.provisioning.linking import USAGE_FROM, Linker
from billingd.provisioning.owner import candidates
from billingd.provisioning.pricecheck import add_ons_at
from billingd.store import held, links, outbox, usage, watermarks
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import PlanLink, SubscriptionLink
from billingd.store.watermarks import Watermark

log = structlog.get_logger()

REFUSED: Final = "adoption_refused"
"""Kind of the held item that says why a subscription was not adopted after all."""

AHEAD_MAX: Final = timedelta(days=1)
"""How far ahead a cut-over may be named."""

TRAILING: Final = timedelta(hours=1)
"""How long after the cut-over the other integration's last records may lie: it posts what it read minutes
after it has read it, with the time of posting."""

LOOKS_AT_ONCE_MAX: Final = 4
"""How many subscriptions' usage is listed at a time."""

SERVED: Final = frozenset({"active", "archivalScheduled", "migrationScheduled"})
"""States of a subscription that Amplify serves."""

SOON: Final = timedelta(seconds=2)
"""How long to wait for a plan that is being linked."""

Op = Literal["+", "~", "!", "="]
What = Literal["plan", "subscription", "recurly"]


class CannotAdopt(BillingdError):
    """Nothing can be adopted from that moment on; the message says from which one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One finding: `+` link a plan, `~` mark and link a subscription, `!` a problem, `=` nothing to do.

    `uuid` is the Recurly subscription it is about.
    """

    op: Op
    what: What
    id: str
    name: str
    title: str
    reason: str
    uuid: str | None = None
    action: Action | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything there is to adopt, and what cannot be; `adopted`: subscriptions linked before."""

    since: datetime
    steps: tuple[Step, ...]
    adopted: int

    @property
    def to_do(self) -> int:
        """How many plans and subscriptions are adopted by this."""
        return sum(step.op in {"+", "~"} for step in self.steps)

    @property
    def problems(self) -> int:
        """How much a person must look at."""
        return sum(step.op == "!" for step in self.steps)


@dataclass(frozen=True, slots=True)
class FoundPlan:
    """A labelled product plan: `linked` (or about to be), `wrong` (why it is not adopted), or `absent`."""

    state: Literal["linked", "wrong", "absent"]
    code: str
    add_on_codes: frozenset[str] = frozenset()
    reason: str = ""


class Marketplace(Protocol):
    """What is read and written at Amplify."""

    async def list_products(self, billing_system: str | None = None) -> tuple[Product, ...]: ...
    async def survey_product_plans(self) -> tuple[ProductPlan | Unreadable, ...]: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def survey_subscriptions(self) -> tuple[Subscription | Unreadable, ...]: ...
    async def find_product(self, name: str) -> Product | None: ...
    async def find_subscription(self, name: str) -> Subscription | None: ...
    async def set_attributes(
        self,
        kind: Literal["subscriptions"],
        name: str,
        attributes: Mapping[str, str],
        *,
        resource_id: str | None = None,
    ) -> str | None: ...


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def list_plans(self) -> tuple[BilledPlan, ...]: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None: ...
    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def list_usage(
        self, subscription_uuid: str, add_on_code: str, *, begin: datetime, end: datetime
    ) -> tuple[BilledUsage, ...]: ...
    async def mark_subscription(self, uuid: str, marker: str, *, key: str, retried: bool = False) -> None: ...


class Adoption:
    """Plans an adoption, and handles `adopt_subscription`.

    `may_find` raises Retryable while the store does not know yet what is linked: after a restore.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        marketplace: Marketplace,
        billing: Billing,
        once: Once,
        linker: Linker,
        *,
        traffic_source: str,
        window: timedelta,
        look_again: timedelta,
        wake_outbox: asyncio.Event,
        may_find: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._marketplace = marketplace
        self._billing = billing
        self._once = once
        self._linker = linker
        self._source = traffic_source
        self._window = window
        self._look_again = look_again
        self._wake_outbox = wake_outbox
        self._may_find = may_find

    async def told(self, since: datetime, *, dry_run: bool) -> dict[str, Any]:
        """The findings as a document."""
        findings = await self.run(since, dry_run=dry_run)
        return {
            "since": since.isoformat().replace("+00:00", "Z"),
            "dry_run": dry_run,
            "steps": [
                {
                    "op": step.op,
                    "what": step.what,
                    "id": step.id,
                    "name": step.name,
                    "title": step.title,
                    "recurly_uuid": step.uuid,
                    "reason": step.reason,
                }
                for step in findings.steps
            ],
            "to_do": findings.to_do,
            "problems": findings.problems,
            "adopted": findings.adopted,
        }

    async def run(self, since: datetime, *, dry_run: bool) -> Findings:
        """Find what there is to adopt and, unless it is a dry run, ask for all of it in one transaction.

        Usage counts from `since` on (whole seconds): what is earlier was the other integration's to bill.
        Raises CannotAdopt; Retryable while the store is read back after a restore.
        """
        if self._may_find is not None:
            await self._may_find()
        now = self._clock.now()
        if since.microsecond:
            raise CannotAdopt("the cut-over must be a whole second: Recurly's times know no others")
        if since > now + AHEAD_MAX:
            raise CannotAdopt(f"the cut-over {_utc(since)} is more than a day ahead")
        async with self._store.read() as tx:
            await self._check_traffic(tx, since)
        findings = await self._find(since, now)
        asked = [step.action for step in findings.steps if step.action is not None]
        if dry_run or not asked:
            return findings
        notice = provider_notice(
            f"adoption:{now.isoformat()}",
            "An adoption has begun",
            f"{findings.to_do} plan(s) and subscription(s) are being adopted from {_utc(since)} on; "
            f"{findings.problems} problem(s) are left to a person.",
        )
        async with self._store.write() as tx:
            await self._read_from(tx, since, now)
            await outbox.insert(tx, [*asked, notice], now=now)
        self._wake_outbox.set()
        log.info("adoption.asked", since=since.isoformat(), to_do=findings.to_do, problems=findings.problems)
        return findings

    # What there is to adopt.

    async def _find(self, since: datetime, now: datetime) -> Findings:
        async with self._store.read() as tx:
            linked = await links.subscriptions(tx)
            asked = {
                row["args"]["id"]: row["args"]["since"]
                for row in await outbox.select(tx, states=UNFINISHED, kind=ADOPT_SUBSCRIPTION)
            }
        ours = {link.subscription_id for link in linked}
        labelled = {one.name for one in await self._marketplace.list_products(BILLING_SYSTEM)}
        surveyed = await self._marketplace.survey_subscriptions()
        here = [one for one in surveyed if isinstance(one, Subscription) and one.product_name in labelled]
        wanted = sorted(
            (one for one in here if _served(one) and one.id not in ours), key=lambda one: (one.name, one.id)
        )
        steps = [
            Step(
                "!",
                "subscription",
                one.id,
                one.id,
                one.id,
                f"Amplify's answer for it cannot be read: {one.why}",
            )
            for one in surveyed
            if isinstance(one, Unreadable) and one.id not in ours
        ]
        plans, plan_steps = await self._plans(labelled, {one.plan_id for one in wanted}, now)
        matcher = _Matcher(plans, {one.id for one in here}, since, taken={link.uuid for link in linked})
        matcher.learn(await self._billing.list_live_subscriptions())
        for one in wanted:
            if not matcher.fitting(one) and _plan_of(plans, one).state == "linked":
                for code in candidates(one):  # a paused one may be in no list of those that are live
                    matcher.learn(await self._linker.listed(code))
        paired = [matcher.step(one, because=now.isoformat(), asked=asked) for one in wanted]
        looked_at = await self._told_after(matcher.contested(paired), matcher, since)
        orphans = matcher.orphans()
        return Findings(
            since,
            (*steps, *plan_steps, *looked_at, *orphans),
            adopted=sum(one.id in ours for one in here if _served(one)),
        )

    async def _plans(
        self, labelled: set[str], wanted: set[str | None], now: datetime
    ) -> tuple[dict[str, FoundPlan], list[Step]]:
        """Every labelled plan by its id, and what is to be done about those that are not linked."""
        async with self._store.read() as tx:
            linked = {link.plan_id: link for link in await links.plans(tx) if link.state != "removed"}
            codes: dict[str, set[str]] = defaultdict(set)
            for add_on in (await links.add_ons(tx)).values():
                codes[add_on.plan_id].add(add_on.add_on_code)
        there = {plan.code: plan for plan in await self._billing.list_plans()}
        found: dict[str, FoundPlan] = {}
        steps: list[Step] = []
        for plan in await self._marketplace.survey_product_plans():
            if isinstance(plan, Unreadable):
                if plan.id in wanted:
                    reason = f"Amplify's answer for it cannot be read: {plan.why}"
                    steps.append(Step("!", "plan", plan.id, plan.id, plan.id, reason))
                continue
            code = f"{PLAN_CODES}{plan.id}"
            if plan.product_name not in labelled or plan.deleting:
                continue
            if plan.id in linked:
                found[plan.id] = FoundPlan("linked", code, frozenset(codes[plan.id]))
            elif plan.state == "active" or (plan.state == "deprecated" and plan.id in wanted):
                found[plan.id] = await self._compare(plan, code, there.get(code))
                steps += _plan_step(plan, found[plan.id], there.get(code), because=now.isoformat())
        return found, sorted(steps, key=lambda step: (step.name, step.id))

    async def _compare(self, plan: ProductPlan, code: str, billed: BilledPlan | None) -> FoundPlan:
        """Whether Recurly charges for the plan what Amplify says."""
        if billed is None:
            return FoundPlan("absent", code)
        try:
            spec = translate(plan, await self._marketplace.list_quotas(plan.name))
        except Permanent as error:
            return FoundPlan("wrong", code, reason=f"Amplify's answer cannot be read: {error}")
        match spec:
            case NotOurs(reason):
                return FoundPlan(
                    "wrong", code, reason=f"Recurly has it, and billingd does not bill it: {reason}"
                )
            case Inexpressible(reasons):
                return FoundPlan("wrong", code, reason=" ".join(reasons))
            case PlanSpec():
                wrong = list(differences(spec, billed))
                asked = [one.code for one in spec.add_ons]
                add_ons = await add_ons_at(self._billing, code, spec.currency, asked)
                for add_on in spec.add_ons:
                    if add_on.code in add_ons:
                        wrong += add_on_differences(add_on, add_ons[add_on.code])
                if wrong:
                    return FoundPlan("wrong", code, reason=" ".join(wrong))
                return FoundPlan("linked", code, frozenset(one.code for one in spec.add_ons))

    # What the other integration told after the cut-over.

    async def _told_after(self, steps: Sequence[Step], matcher: "_Matcher", since: datetime) -> list[Step]:
        """The same, those with usage of another's after the cut-over as problems, or with a warning."""
        gate = asyncio.Semaphore(LOOKS_AT_ONCE_MAX)

        async def looked(step: Step) -> Step:
            if step.op != "~" or step.uuid is None:
                return step
            made = matcher.known(step.uuid)
            async with gate:
                others = await self._others(made, since)
            if not others:
                return step
            if (wrong := _billed_beyond(made, others, since)) is not None:
                return replace(step, op="!", action=None, reason=wrong)
            return replace(step, reason=f"{step.reason}; {_trailing(others)}")

        return list(await asyncio.gather(*map(looked, steps)))

    async def _others(self, made: BilledSubscription, since: datetime) -> list[BilledUsage]:
        """Usage without our tags from the moment on from which ours would count."""
        begin, end = _counts_from(made, since), self._clock.now() + AHEAD_MAX
        if begin >= end:
            return []
        found: list[BilledUsage] = []
        for code in made.add_on_codes:
            try:
                there = await self._billing.list_usage(made.uuid, code, begin=begin, end=end)
            except NotFound:
                continue  # an add-on that takes no usage
            found += [one for one in untagged(there) if one.usage_timestamp >= begin]
        return found

    # How far traffic was read.

    async def _check_traffic(self, tx: Tx, since: datetime) -> None:
        """Raises CannotAdopt when windows from `since` on cannot be read as they should be."""
        mark = await self._mark(tx)
        if mark is None or floor(since, mark.length) >= mark.regular_since:
            return
        if await usage.recorded_before(tx, mark.regular_since):
            begun = _utc(mark.regular_since)
            raise CannotAdopt(
                f"the cut-over {_utc(since)} is too early: traffic is read in windows of the present length "
                f"from {begun} on, and something was recorded in windows of another length before. Let the "
                f"other integration report up to {begun} or later, and take that as --since"
            )

    async def _read_from(self, tx: Tx, since: datetime, now: datetime) -> None:
        """Traffic is read from the window of `since` on at the latest, also by a daemon that began later."""
        await self._check_traffic(tx, since)
        mark = await self._mark(tx)
        if mark is None:
            begin = floor(min(since, now), self._window)
            await watermarks.begin(tx, self._source, begin, self._window, now=now)
        elif (start := floor(since, mark.length)) < mark.regular_since:
            await watermarks.go_back(tx, start, now=now)

    async def _mark(self, tx: Tx) -> Watermark | None:
        mark = await watermarks.find(tx, self._source)
        ahead = await watermarks.furthest(tx)
        # as the poller does: a source that is behind another one goes on where that one is
        return ahead if ahead is not None and (mark is None or mark.at < ahead.at) else mark

    # Adopting one.

    async def adopt(self, action: Leased) -> Wait | None:
        """Handle `adopt_subscription`: look at both sides again, link, then mark.

        What does not fit any more is held; whatever was done before a crash is not done again.
        """
        subscription_id, uuid = action.args["id"], action.args["uuid"]
        since = datetime.fromisoformat(action.args["since"])
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, subscription_id)
        if link is None:
            subscription = await self._marketplace.find_subscription(action.args["name"])
            if subscription is None or subscription.id != subscription_id or not _served(subscription):
                gone = f"Amplify does not serve it any more: end {uuid} at Recurly, which still bills it."
                await self._hold(action, action.args["name"], gone)
                return None
            plan = await self._plan(subscription)
            if isinstance(plan, Wait):
                return plan
            made = await self._find_made(uuid)
            if made is None:
                await self._hold(action, subscription.title, f"Recurly has no subscription {uuid} any more.")
                return None
            wrong = plan if isinstance(plan, str) else await self._unfit(subscription, plan, made, since)
            if isinstance(plan, str) or wrong is not None:
                await self._hold(action, subscription.title, str(wrong))
                return None
            served_since = subscription.state_at if subscription.state == "active" else None
            link = await self._linker.link(
                subscription,
                plan,
                made,
                usage_from=_counts_from(made, since),
                approved_at=served_since or since,
            )
        if link.uuid != uuid:
            log.info("adoption.linked_otherwise", subscription=subscription_id, uuid=link.uuid)
            await self._release(subscription_id, f"it is linked to {link.uuid}")
            return None
        await self._finish(link)
        return None

    async def _finish(self, link: SubscriptionLink) -> None:
        """Write the attributes, then mark it.

        Whoever finds it by its marker, after a restore say, then also finds from when on its usage counts.
        """

        async def send(key: str, *, retried: bool) -> str:
            await self._billing.mark_subscription(link.uuid, link.subscription_id, key=key, retried=retried)
            return link.uuid

        async def find() -> str | None:
            marker = (await self._billing.get_subscription(link.uuid)).marker
            if marker not in {None, link.subscription_id}:
                raise Permanent(
                    f"Recurly's subscription {link.uuid} of {link.title} carries the PO number {marker}; put "
                    f"{link.subscription_id} there, then retry this action"
                )
            return link.uuid if marker is not None else None

        try:
            await self._marketplace.set_attributes(
                "subscriptions",
                link.name,
                {
                    "recurlyAccountCode": link.account_code,
                    "recurlySubscriptionUuid": link.uuid,
                    USAGE_FROM: _utc(link.usage_from),
                },
                resource_id=link.subscription_id,
            )
        except (NotFound, Replaced):
            log.info("adoption.gone_meanwhile", subscription=link.subscription_id)
        await self._once.write(
            f"mark:{link.subscription_id}",
            {"uuid": link.uuid, "marker": link.subscription_id},
            send=send,
            find=find,
            look_first=True,
        )
        now = self._clock.now()
        async with self._store.write() as tx:
            for about in ("adopt", "subscription"):  # its own handler may have held it since it was linked
                subject = f"{about}:{link.subscription_id}"
                await held.close(tx, subject=subject, resolution="adopted", now=now)
        log.info("adoption.adopted", subscription=link.subscription_id, uuid=link.uuid)

    async def _plan(self, subscription: Subscription) -> PlanLink | Wait | str:
        """The linked plan; or wait for it, or why there is none."""
        product = await self._marketplace.find_product(subscription.product_name)
        if product is None or product.billing_system != BILLING_SYSTEM:
            return "its product is not labelled billingSystem=recurly any more."
        subject = f"plan:{subscription.plan_name}"
        async with self._store.read() as tx:
            plan = await links.find_plan(tx, subscription.plan_id or "")
            working = await outbox.select(tx, states=UNFINISHED, subject=subject, limit=1)
            standing = await held.standing(tx, subject=subject)
            dead = await outbox.select(tx, states=["dead"], subject=subject, limit=1)
        if plan is not None and plan.state != "removed":
            return plan
        if working:
            soon = SOON if working[0]["attempt"] <= 1 else self._look_again
            return Wait(soon, f"plan {subscription.plan_name} is being linked")
        why = standing[0]["reason"] if standing else dead[0]["error"] if dead else "nobody asked for it"
        return f"its plan {subscription.plan_name} is not linked: {why}"

    async def _find_made(self, uuid: str) -> BilledSubscription | None:
        try:
            return await self._billing.get_subscription(uuid)
        except NotFound:
            return None

    async def _unfit(
        self, subscription: Subscription, plan: PlanLink, made: BilledSubscription, since: datetime
    ) -> str | None:
        """Why that Recurly subscription is not the one after all."""
        uuid = made.uuid
        if made.plan_code != plan.plan_code or made.account_code not in candidates(subscription):
            return f"Recurly's {uuid} is of plan {made.plan_code} and account {made.account_code} now."
        if made.marker not in {None, subscription.id}:
            return f"Recurly's {uuid} carries the PO number {made.marker}."
        if wrong := _unusable(made, since) or _billed_beyond(made, await self._others(made, since), since):
            return wrong
        async with self._store.read() as tx:
            other = await links.find_subscription_by_uuid(tx, uuid)
        if other is not None:
            return f"Recurly's {uuid} is linked to subscription {other.subscription_id} already."
        beside = [
            one
            for one in await self._linker.listed(made.account_code)
            if one.uuid != uuid and one.plan_code == plan.plan_code and _runs_on(one) and one.marker is None
        ]
        if made.marker is None and beside:
            return _several(subscription, [made, *beside])
        return None

    async def _hold(self, action: Leased, title: str, reason: str) -> None:
        now = self._clock.now()
        subscription_id = action.args["id"]
        text = f"Subscription {title} was not adopted: {reason}"
        again = Action(action.kind, action.subject, "", action.args)
        item = Hold(REFUSED, action.subject, text, again, subscription_id)
        notice = provider_notice(
            f"held:{REFUSED}:{subscription_id}:{now.isoformat()}", "A subscription was not adopted", text
        )
        async with self._store.write() as tx:
            await hold(tx, item, notice, now=now)

    async def _release(self, subscription_id: str, why: str) -> None:
        async with self._store.write() as tx:
            await held.close(tx, subject=f"adopt:{subscription_id}", resolution=why, now=self._clock.now())


class _Matcher:
    """Finds the Recurly subscription that the other integration made for an Amplify subscription.

    `ids` are those of all subscriptions at Amplify; `taken` the Recurly subscriptions that are linked.
    """

    def __init__(
        self, plans: Mapping[str, FoundPlan], ids: set[str], since: datetime, *, taken: set[str]
    ) -> None:
        self._plans = plans
        self._ids = ids
        self._since = since
        self._taken = taken
        self._billed: dict[str, BilledSubscription] = {}
        self._named: set[str] = set()

    def learn(self, billed: Iterable[BilledSubscription]) -> None:
        """Subscriptions at Recurly, those that are linked already left out."""
        self._billed.update({one.uuid: one for one in billed if one.live and one.uuid not in self._taken})

    def known(self, uuid: str) -> BilledSubscription:
        """One that was learned."""
        return self._billed[uuid]

    def fitting(self, subscription: Subscription) -> list[BilledSubscription]:
        """Those marked with it; else the unmarked ones of its plan, of the first of its accounts with any.

        One that is canceled runs to the end of its term without anybody using it, so another one goes first.
        """
        code = _plan_of(self._plans, subscription).code
        of_plan = [one for one in self._billed.values() if one.plan_code == code]
        if marked := [one for one in of_plan if one.marker == subscription.id]:
            return marked
        for account in candidates(subscription):
            theirs = [one for one in of_plan if one.account_code == account and one.marker is None]
            if theirs:
                return [one for one in theirs if _runs_on(one)] or theirs
        return []

    def _elsewhere_marked(self, subscription: Subscription) -> list[BilledSubscription]:
        """Those of its plan and accounts whose PO number is a person's own, no subscription's id."""
        code, accounts = _plan_of(self._plans, subscription).code, candidates(subscription)
        found = [
            one
            for one in self._billed.values()
            if one.plan_code == code and one.account_code in accounts and one.marker not in self._ids
        ]
        self._named.update(one.uuid for one in found)
        return found

    def step(self, subscription: Subscription, *, because: str, asked: Mapping[str, str]) -> Step:
        """What is to be done about a subscription that is not linked."""
        plan = _plan_of(self._plans, subscription)
        fitting = self.fitting(subscription)
        self._named.update(one.uuid for one in fitting)

        def said(op: Op, reason: str, uuid: str | None = None, action: Action | None = None) -> Step:
            id_, name, title = subscription.id, subscription.name, subscription.title
            return Step(op, "subscription", id_, name, title, reason, uuid, action)

        if (under_way := asked.get(subscription.id)) is not None:
            if datetime.fromisoformat(under_way) == self._since:
                return said("=", "is being adopted already")
            return said("!", f"is being adopted already, from {_utc(datetime.fromisoformat(under_way))} on")
        if plan.state == "wrong":
            return said("!", f"its plan {subscription.plan_name} is not adopted")
        if not fitting and (foreign := self._elsewhere_marked(subscription)):
            uuid, marker = foreign[0].uuid, foreign[0].marker
            return said(
                "!",
                f"{uuid} may be its, and carries the PO number {marker}, where billingd keeps the id of the "
                f"subscription: put {subscription.id} there, then adopt again",
                uuid,
            )
        if not fitting:
            return said("=", "has nothing at Recurly: it is created there as any other, from now on")
        if plan.state == "absent":
            return said("!", f"is billed by {fitting[0].uuid}, and Recurly lists no plan {plan.code}")
        if len(fitting) > 1:
            return said("!", _several(subscription, fitting))
        [made] = fitting
        if wrong := _unusable(made, self._since):
            return said("!", wrong, made.uuid)
        lacking = len(plan.add_on_codes - set(made.add_on_codes))
        more = f"; {lacking} add-on(s) that it lacks are attached" if lacking else ""
        reason = f"is billed by {made.uuid} on {made.account_code}; counts from {_utc(self._since)} on{more}"
        action = adopt_action(subscription.id, subscription.name, made.uuid, self._since, because=because)
        return said("~", reason, made.uuid, action)

    @staticmethod
    def contested(steps: Sequence[Step]) -> list[Step]:
        """The same, with those as problems that want the same Recurly subscription."""
        wanting: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            if step.op == "~" and step.uuid is not None:
                wanting[step.uuid].append(step)
        return [
            step
            if len(wanting[step.uuid or ""]) < 2
            else replace(
                step,
                op="!",
                action=None,
                reason=f"{step.uuid} at Recurly may be of any of "
                f"{', '.join(each.name for each in wanting[step.uuid or ''])}: put the id of the one it is "
                f"({step.id} for this) into its PO number there, then adopt again",
            )
            for step in steps
        ]

    def orphans(self) -> list[Step]:
        """What bills on, to labelled plans, and belongs to no subscription that Amplify has."""
        codes = {plan.code for plan in self._plans.values()}
        return [
            Step(
                "!",
                "recurly",
                one.uuid,
                one.uuid,
                one.uuid,
                f"bills account {one.account_code} for {one.plan_code}, and Amplify serves no subscription "
                "that it belongs to: end it at Recurly, or see whether its subscription is pending",
                one.uuid,
            )
            for one in self._billed.values()
            if one.uuid not in self._named and one.plan_code in codes and _runs_on(one)
            if one.marker is None or one.marker not in self._ids
        ]


def _plan_step(plan: ProductPlan, found: FoundPlan, billed: BilledPlan | None, *, because: str) -> list[Step]:
    if found.state == "absent" or billed is None:
        return []
    if found.state == "wrong":
        return [Step("!", "plan", plan.id, plan.name, plan.title, found.reason)]
    action = plan_action(plan.name, plan.id, because=f"adopt:{because}")
    reason = f"is {plan.state}, and agrees with Recurly's {found.code}"
    return [Step("+", "plan", plan.id, plan.name, plan.title, reason, action=action)]


def _plan_of(plans: Mapping[str, FoundPlan], subscription: Subscription) -> FoundPlan:
    unknown = FoundPlan("absent", f"{PLAN_CODES}{subscription.plan_id}")
    return plans.get(subscription.plan_id or "", unknown)


def _served(subscription: Subscription) -> bool:
    """Whether it is approved and goes on: the original made its Recurly subscription before it approved."""
    return subscription.approval == "approved" and subscription.state in SERVED and not subscription.deleting


def _runs_on(billed: BilledSubscription) -> bool:
    return billed.live and billed.state != "canceled"


def _unusable(made: BilledSubscription, since: datetime) -> str | None:
    """Why usage cannot be told to it from that moment on, and what to do."""
    if made.state != "active":
        return (
            f"{made.uuid} is {made.state} at Recurly: make it active there; once it is over, one is made anew"
        )
    if made.period_started_at is not None and _counts_from(made, since) < made.period_started_at:
        return (
            f"the billing period of {made.uuid} began at {_utc(made.period_started_at)}, after the cut-over, "
            "and what is earlier was billed: let the other integration report up to then, or later, and take "
            "that as --since"
        )
    return None


def _counts_from(made: BilledSubscription, since: datetime) -> datetime:
    """From when on its usage counts: not before it began, where that is later than the cut-over."""
    return since if made.activated_at is None else max(since, made.activated_at.replace(microsecond=0))


def _billed_beyond(made: BilledSubscription, others: Sequence[BilledUsage], since: datetime) -> str | None:
    """Why it would be billed twice from the cut-over on, and what to do."""
    newest = max((one.usage_timestamp for one in others), default=None)
    if newest is None or newest <= _counts_from(made, since) + TRAILING:
        return None
    return (
        f"{_told(others)} on {made.uuid} after the cut-over: billed twice from {_utc(since)} on. Stop that "
        f"integration, and take a --since after {_utc(newest)}: the time up to which it read traffic then"
    )


def _trailing(others: Sequence[BilledUsage]) -> str:
    """What the other integration told shortly after the cut-over, and how it must be understood."""
    return (
        f"{_told(others)} after the cut-over: right only if that is traffic of before it, posted late; "
        "else it is billed twice, and --since must be later"
    )


def _told(others: Sequence[BilledUsage]) -> str:
    units = sum(one.units for one in others)
    newest = max(one.usage_timestamp for one in others)
    return f"another integration told {units} unit(s) in {len(others)} record(s), newest {_utc(newest)},"


def _several(subscription: Subscription, made: Sequence[BilledSubscription]) -> str:
    uuids = ", ".join(sorted(one.uuid for one in made))
    return (
        f"{len(made)} subscriptions at Recurly may be its: {uuids}. Put {subscription.id} into the PO number "
        "of the right one there, or end the others, then adopt again"
    )


def _utc(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
