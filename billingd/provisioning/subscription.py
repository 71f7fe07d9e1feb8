"""Provision subscription: account, Recurly subscription, link, approval; and the way back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol

import structlog

from billingd.domain.attempts import UNFINISHED, Action, Leased, State, Wait
from billingd.domain.billing import Account, BilledSubscription, NewSubscription
from billingd.domain.catalog import BILLING_SYSTEM, Person, Product, ProductPlan, Subscription
from billingd.domain.errors import NotDone, NotFound, Permanent, Refused, Retryable
from billingd.domain.events import plan_action, subscription_action
from billingd.domain.notices import provider_notice, subscriber_notice
from billingd.domain.sending import SECOND_LOOK
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning import absence
from billingd.provisioning.absence import Absences
from billingd.provisioning.account import MISSING, Accounts, NoAccount
from billingd.provisioning.ending import HELD_SERVED, end_action, end_again, hold_served
from billingd.provisioning.holding import hold
from billingd.provisioning.linking import SECOND, Linker
from billingd.provisioning.owner import candidates
from billingd.provisioning.pricecheck import IN_LINE, Checked, PriceCheck
from billingd.store import events, held, intents, links, outbox
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import PlanLink, SubscriptionLink

log = structlog.get_logger()

OVER: Final = frozenset({"archived", "migrated"})
"""States of a subscription that Amplify no longer serves."""

REFUSED: Final = "subscription_refused"

_LAGS: Final = "Amplify showed it a moment ago and does not find it now: deleted since, or a read that lags"

APPROVAL_LAGS: Final = timedelta(minutes=1)
"""How much later than billingd's own approval its event may be dated: no later change is that one."""

SOON: Final = timedelta(seconds=2)
"""How long to wait for another action that this one has asked for."""


class Marketplace(Protocol):
    """What is read and written at Amplify."""

    async def find_subscription(self, name: str) -> Subscription | None: ...
    async def find_product(self, name: str) -> Product | None: ...
    async def find_product_plan(self, name: str) -> ProductPlan | None: ...
    async def find_person(self, user_id: str) -> Person | None: ...
    async def set_attributes(
        self,
        kind: Literal["subscriptions"],
        name: str,
        attributes: Mapping[str, str],
        *,
        resource_id: str | None = None,
    ) -> str | None: ...
    async def decide(
        self,
        subscription_name: str,
        state: Literal["approved", "rejected"],
        reason: str,
        *,
        resource_id: str | None = None,
    ) -> None: ...


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def find_account(self, code: str) -> Account | None: ...
    async def create_account(
        self, code: str, *, email: str | None = None, key: str, retried: bool = False
    ) -> str: ...
    async def list_subscriptions(self, account_code: str) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def create_subscription(
        self, new: NewSubscription, *, key: str, retried: bool = False
    ) -> BilledSubscription: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration decides; `look_again` is how often what is held looks by itself."""

    accounts_missing: str
    collection_method: str
    marketplace_url: str
    look_again: timedelta


class SubscriptionProvisioner:
    """Handles `provision_subscription`: brings Recurly in line with a subscription as it is now."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        marketplace: Marketplace,
        billing: Billing,
        once: Once,
        linker: Linker,
        absences: Absences,
        prices: PriceCheck,
        policy: Policy,
    ) -> None:
        self._store = store
        self._clock = clock
        self._marketplace = marketplace
        self._billing = billing
        self._once = once
        self._linker = linker
        self._absences = absences
        self._prices = prices
        self._policy = policy
        create = policy.accounts_missing == "create"
        self._accounts = Accounts(marketplace, billing, once, create_missing=create)

    async def provision(self, action: Leased) -> Wait | None:
        """Read the subscription as it is now, the event being only a hint.

        1. Over (deleted, archived, migrated, rejected): begin its end.
        2. Pending or approved, and not linked: find its plan and its account, or hold it.
        3. Create the Recurly subscription, once, if the prices at both sides agree; write the link, then the
           attributes.
        4. Approve what is still pending, then tell provider and subscriber.
        """
        name, subscription_id = action.args["name"], action.args["id"]
        now = self._clock.now()
        subscription = await self._marketplace.find_subscription(name)
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, subscription_id)
        until = None
        if subscription is not None and subscription.id == subscription_id:
            await self._absences.seen("subscription", subscription_id)
        else:
            replaced = subscription is not None  # the name is used again; ours was deleted
            gone = await self._gone(action.args, link, replaced=replaced, first=action.attempt <= 1)
            if isinstance(gone, Wait):
                return gone
            subscription, until = None, gone
        if subscription is None or _over(subscription):
            if link is None:
                link = await self._linker.find_lost(
                    name, subscription_id, subscription, seen=action.args.get("uuid")
                )
            await self._begin_end(link, subscription_id, subscription, now, until)
            if link is not None and link.state == "ended":
                await self._end_again_if_reactivated(link)
            return None
        if link is not None and link.state in {"ending", "ended"}:
            await self._served_after_all(subscription, link)
            return None
        if subscription.approval not in {"pending", "approved"}:
            return None  # Amplify has not asked yet (amplify.md 4.2); the event that asks will come
        if link is None:
            found = await self._link(subscription)
            if not isinstance(found, SubscriptionLink):
                return found
            link = found
        if link.state == "created":
            return await self._approve(subscription, link)
        if subscription.approval == "approved":
            async with self._store.write() as tx:
                await links.served(tx, [subscription_id], at=now)
        return None

    async def _gone(
        self, args: Mapping[str, Any], link: SubscriptionLink | None, *, replaced: bool, first: bool = False
    ) -> datetime | Wait | None:
        """When what is not found was over at the latest (None: not known), or that it may only be hidden."""
        if link is not None and link.state in {"ending", "ended"}:
            return None
        missing = absence.of_subscription(args["id"], args["name"], link)
        async with self._store.read() as tx:
            at = await absence.deleted_at(tx, missing)
            made = await intents.find(tx, f"subscription:{missing.id}")
            stands = await held.standing(tx, subject=f"subscription:{missing.id}")
        if at is not None:
            return at
        if link is None and "uuid" not in args and (made is None or made.state == "refused"):
            if first and not replaced:
                raise Retryable(
                    f"{args['name']} is not found at Amplify: a read may lag", retry_after=SECOND_LOOK
                )
            if not stands or replaced:
                return None  # there is nothing at Recurly to end
            return await self._absences.judge(missing, harmless=True)
        return await self._absences.judge(missing, replaced=replaced)

    async def _served_after_all(self, subscription: Subscription, link: SubscriptionLink) -> None:
        """Amplify serves what was over: its end looks again before it comes; one that came is held."""
        log.info("subscription.over_already", subscription=subscription.id, link=link.state)
        now = self._clock.now()
        async with self._store.write() as tx:
            if link.state == "ended":
                if subscription.approval in HELD_SERVED:
                    await hold_served(tx, link, subscription.approval, now=now)
                return
            waiting = [State.PENDING, State.DEAD]
            ends = await outbox.select(tx, states=waiting, subject=f"end:{subscription.id}")
            await outbox.retry(tx, [row["id"] for row in ends], now=now)

    async def _end_again_if_reactivated(self, link: SubscriptionLink) -> None:
        """What is over at Amplify is ended at Recurly once more when somebody took that back there."""
        try:
            theirs = await self._billing.get_subscription(link.uuid)
        except NotFound:
            return
        if theirs.state == "active":
            async with self._store.write() as tx:
                await end_again(tx, link, now=self._clock.now())

    async def _moved_here(self, subscription: Subscription) -> bool:
        """Whether it follows one that was billed here, to a plan that is: the label is for new ones only."""
        if subscription.migrated_from is None or subscription.plan_id is None:
            return False
        async with self._store.read() as tx:
            plan = await links.find_plan(tx, subscription.plan_id)
            known = await links.is_linked_name(tx, subscription.migrated_from)
        return known and plan is not None and plan.state != "removed"

    async def _link(self, subscription: Subscription) -> SubscriptionLink | Wait | None:
        """Create the Recurly subscription and write the link; otherwise why not (None: none of ours)."""
        product = await self._marketplace.find_product(subscription.product_name)
        ours = product is not None and product.billing_system == BILLING_SYSTEM
        if not ours and not await self._moved_here(subscription):
            return await self._not_ours(subscription, "its product is not labelled", hidden=product is None)
        plan = await self._plan(subscription)
        if not isinstance(plan, PlanLink):
            return plan
        account = await self._account(subscription)
        if not isinstance(account, str):
            return account
        return await self._create(subscription, plan, account)

    async def _plan(self, subscription: Subscription) -> PlanLink | Wait | None:
        """The linked plan; or hold, or wait while the plan is being provisioned; None: not ours."""
        plan_id = subscription.plan_id
        if plan_id is None:
            raise Permanent(
                f"subscription {subscription.name}: Amplify names no ProductPlan in its references"
            )
        subject = f"plan:{subscription.plan_name}"
        async with self._store.write() as tx:
            plan = await links.find_plan(tx, plan_id)
            asked = plan_action(subscription.plan_name, plan_id, because=f"subscription:{subscription.id}")
            if plan is None:
                await outbox.insert(tx, [asked], now=self._clock.now())
            standing = await held.standing(tx, subject=subject)
            working = await outbox.select(tx, states=UNFINISHED, subject=subject, limit=1)
            dead = await outbox.select(tx, states=["dead"], subject=subject, limit=1)
        if plan is not None and not _takes(plan, subscription):
            reason = (
                f"Subscription {subscription.title} asks for plan {plan.title}, which is {plan.state} and "
                "takes no new subscriptions. Reject it in the Marketplace, or move it to another plan."
            )
            return await self._hold(subscription, "plan_not_offered", reason)
        if standing:
            reason = (
                f"Subscription {subscription.title} asks for plan {subscription.plan_name}, which is held: "
                f"{standing[0]['reason']}"
            )
            return await self._hold(subscription, "plan_held", reason)
        if plan is not None:
            return plan
        if working:
            left = working[0]["due_at"] - self._clock.now()  # of its next attempt, should it need another
            soon = SOON if working[0]["attempt"] <= 1 else max(left, timedelta(0)) + SOON
            soon = min(soon, self._policy.look_again)
            return Wait(soon, f"plan {subscription.plan_name} is being provisioned")
        if dead:
            reason = (
                f"Subscription {subscription.title} asks for plan {subscription.plan_name}, which could not "
                f"be provisioned: {dead[0]['error']}. Mend the cause, then retry action {dead[0]['id']}; "
                "billingd looks again by itself."
            )
            return await self._hold(subscription, "plan_failed", reason)
        there = await self._marketplace.find_product_plan(subscription.plan_name)
        if there is not None and there.state == "deprecated" and subscription.approval == "pending":
            reason = (
                f"Subscription {subscription.title} asks for plan {there.title}, which was deprecated before "
                "it was ever linked. Reject it in the Marketplace, or move it to another plan."
            )
            return await self._hold(subscription, "plan_not_offered", reason)
        why = f"its plan {subscription.plan_name} is none that is billed"
        return await self._not_ours(subscription, why, hidden=there is None)

    async def _not_ours(self, subscription: Subscription, why: str, *, hidden: bool) -> Wait | None:
        """Let go of it, and of what is held of it. What is only not shown may be ours still, if it ever was.

        Whatever is ours again is asked for again, by its product or by the next resync.
        """
        subject = f"subscription:{subscription.id}"
        async with self._store.write() as tx:
            if not hidden:
                await held.close(tx, subject=subject, resolution=why, now=self._clock.now())
            standing = await held.standing(tx, subject=subject)
        if standing:
            return Wait(self._policy.look_again, f"{subscription.title}: {why}, or Amplify does not show it")
        log.info("subscription.not_ours", subscription=subscription.id, why=why)
        return None

    async def _account(self, subscription: Subscription) -> str | Wait | None:
        """The code of the account that pays; or hold, or None after rejecting for want of one."""
        found = await self._accounts.find(subscription)
        if not isinstance(found, NoAccount):
            return found
        refuse = found.kind == MISSING and self._policy.accounts_missing == "reject"
        if refuse and subscription.approval == "pending":
            await self._marketplace.decide(
                subscription.name,
                "rejected",
                "There is no billing account for this subscriber yet.",
                resource_id=subscription.id,
            )
            await self._tell_provider(
                f"rejected:{subscription.id}", "A subscription was rejected", found.reason
            )
            return None
        return await self._hold(subscription, found.kind, f"{found.reason} billingd looks again by itself.")

    async def _create(
        self, subscription: Subscription, plan: PlanLink, account: str
    ) -> SubscriptionLink | Wait | None:
        """Create at Recurly, after looking for the marker: no crash or lost answer makes two."""
        try:
            theirs = await self._billing.list_subscriptions(account)
        except NotFound as error:  # of an account that was found a moment ago
            raise Retryable(f"Recurly does not list account {account} yet: {error}") from error
        same = [one for one in theirs if one.plan_code == plan.plan_code and one.live]
        beside = [one for one in same if one.marker != subscription.id]
        if beside and beside == same and (why := await self._refused_before(subscription)):
            return await self._hold(subscription, REFUSED, why)
        unmarked = [one for one in beside if not one.marked]
        if unmarked:
            there = unmarked[0]
            mark = f"put {subscription.id} into its PO number, or end it, then release this."
            what = "that no Amplify subscription is marked on"
            if there.marker:
                what = f"whose PO number {there.marker} is somebody's own, and names no Amplify subscription"
                mend = f"If it is this one's, {mark}"
            else:
                mend = (
                    "If another integration made it, `billingd adopt --since TIME` takes it over once it is "
                    f"approved; else {mark}"
                )
            reason = (
                f"Subscription {subscription.title}: account {account} already has a Recurly subscription to "
                f"{plan.plan_code} ({there.uuid}) {what}. {mend}"
            )
            return await self._hold(subscription, "subscription_unmarked", reason)
        made_already = any(one.marker == subscription.id for one in theirs)
        async with self._store.read() as tx:
            add_ons = await links.add_ons_of(tx, plan.plan_id)
        # one that was made is only found, whatever the prices are now
        checked = Checked(()) if made_already else await self._prices.check(plan, add_ons)
        if checked.faults:
            return await self._priced_otherwise(subscription, plan, checked.faults)
        new = NewSubscription(
            plan_code=plan.plan_code,
            account_code=account,
            currency=plan.currency,
            collection_method=self._policy.collection_method,
            marker=subscription.id,
            add_on_codes=checked.add_on_codes,
        )

        async def send(key: str, *, retried: bool) -> str:
            return (await self._billing.create_subscription(new, key=key, retried=retried)).uuid

        async def find() -> str | None:
            # an earlier attempt may have been for another account, the only one that existed then
            places = dict.fromkeys([account, *candidates(subscription)])
            marked = [
                one for code in places for one in await self._linker.listed(code) if one.marker == new.marker
            ]
            if len([one for one in marked if one.live]) > 1:
                raise Permanent(
                    f"{len(marked)} subscriptions of {', '.join(places)} are marked {new.marker}; "
                    "end all but one"
                )
            return next((one.uuid for one in sorted(marked, key=lambda one: not one.live)), None)

        try:
            uuid = await self._once.write(
                f"subscription:{subscription.id}",
                asdict(new),
                send=send,
                find=find,
                look_first=True,
                about=subscription.id,
            )
        except Refused as error:
            reason = f"Subscription {subscription.title}: Recurly refused to create it: {error}"
            if beside:
                reason += (
                    f" The account has {beside[0].uuid} to the same plan already. Once that has ended, "
                    "billingd tries again by itself."
                )
                return await self._hold(subscription, REFUSED, reason)
            await self._hold(subscription, REFUSED, reason)
            return None
        except NotDone as error:
            if error.retry_after is None:
                raise
            # Recurly takes one new subscription of an account a minute (recurly.md 4.6): a queue, no failure
            return Wait(error.retry_after + SECOND, str(error))
        made = await self._linker.made(uuid)
        if not made.live:
            reason = (
                f"Subscription {subscription.title}: Recurly's subscription {uuid}, marked for it, is "
                f"{made.state}, and nothing can be billed on it. Reject the subscription in the Marketplace; "
                "the subscriber may then subscribe anew."
            )
            return await self._hold(subscription, "subscription_expired", reason)
        return await self._linker.link(subscription, plan, made)

    async def _priced_otherwise(
        self, subscription: Subscription, plan: PlanLink, faults: tuple[str, ...]
    ) -> Wait:
        """Wait until the plan was brought in line, or hold it: nobody new is charged what was not agreed."""
        asked = plan_action(plan.name, plan.plan_id, because=f"prices:{subscription.id}")
        async with self._store.write() as tx:
            first = await outbox.insert(tx, [asked], now=self._clock.now())
        if first:  # a quota may just be on its way, or a list lag
            return Wait(IN_LINE, f"plan {plan.title} is looked at again: {faults[0]}")
        reason = (
            f"Subscription {subscription.title} asks for plan {plan.title}, which would charge at Recurly "
            f"what Amplify does not say: {' '.join(faults)}"
        )
        return await self._hold(subscription, "plan_held", reason)

    async def _refused_before(self, subscription: Subscription) -> str | None:
        """Why Recurly refused it, if that is still held: it is not asked again while nothing has changed."""
        async with self._store.read() as tx:
            standing = await held.standing(tx, subject=f"subscription:{subscription.id}", kind=REFUSED)
        return next((str(item["reason"]) for item in standing if item["kind"] == REFUSED), None)

    async def _approve(self, subscription: Subscription, link: SubscriptionLink) -> Wait | None:
        """Write the attributes; approve only what is still pending; tell both sides once."""
        try:
            await self._marketplace.set_attributes(
                "subscriptions",
                subscription.name,
                {"recurlyAccountCode": link.account_code, "recurlySubscriptionUuid": link.uuid},
                resource_id=subscription.id,
            )
        except NotFound as error:
            raise Retryable(f"{_LAGS}: {error}") from error
        current = await self._marketplace.find_subscription(subscription.name)
        now = max(self._clock.now(), link.linked_at)  # the clock may have been set back
        if current is None or current.id != subscription.id:
            args = {"id": link.subscription_id, "name": link.name}
            until = await self._gone(args, link, replaced=current is not None)
            if isinstance(until, Wait):
                return until
            await self._begin_end(link, subscription.id, None, now, until)
            return None
        if _over(current):
            await self._begin_end(link, subscription.id, current, now)
            return None
        pending = current.approval == "pending"
        if pending:
            async with self._store.write() as tx:
                await links.approving(tx, subscription.id, now=now)
            try:
                await self._marketplace.decide(
                    subscription.name,
                    "approved",
                    f"Linked to Recurly subscription {link.uuid}",
                    resource_id=subscription.id,
                )
            except NotFound as error:
                raise Retryable(f"{_LAGS}: {error}") from error
        notices = [
            provider_notice(
                f"subscription-linked:{subscription.id}",
                f"{subscription.title} was approved",
                f"Subscription {subscription.title} ({subscription.name}) to {subscription.plan_name} is "
                f"billed to account {link.account_code} by Recurly subscription {link.uuid}."
                + ("" if pending else _served_before(current, link)),
            )
        ]
        if subscription.created_by is not None:
            notices.append(self._welcome(subscription, subscription.created_by))
        async with self._store.write() as tx:
            await links.activate(tx, subscription.id, now=max(now, self._clock.now()))
            await outbox.insert(tx, notices, now=now)
        return None

    def _welcome(self, subscription: Subscription, user_id: str) -> Action:
        facts = {
            "subscription": subscription.title,
            "plan": subscription.plan_name,
            "marketplace_url": self._policy.marketplace_url,
        }
        return subscriber_notice(f"subscription-approved:{subscription.id}", user_id, facts)

    async def _begin_end(
        self,
        link: SubscriptionLink | None,
        subscription_id: str,
        subscription: Subscription | None,
        now: datetime,
        until: datetime | None = None,
    ) -> None:
        """Usage counts up to the end that Amplify names, or up to now; ending at Recurly comes after it.

        `until`: when it was deleted, at the latest.
        """
        subject = f"subscription:{subscription_id}"
        until = now if until is None else min(until, now)
        if subscription is not None and subscription.state in OVER and subscription.state_at is not None:
            until = min(subscription.state_at, now)  # of any other state it is when access began
        async with self._store.write() as tx:
            await held.close(tx, subject=subject, resolution="the subscription is over at Amplify", now=now)
            await absence.settled(tx, "subscription", [subscription_id], now)
            if link is None:
                log.info("subscription.over_before_link", subscription=subscription_id)
                return
            if subscription is not None and (subscription.approval == "approved" or subscription.state):
                # approved before billingd wrote that down: it was served, so its first invoice stands
                await links.activate(tx, subscription_id, now=max(now, link.linked_at))
            elif subscription is not None:
                # an approval was intended at most: somebody's no came first, so nothing was served
                await links.not_approved(tx, subscription_id)
            until = max(until, min(link.usage_from, now))  # whatever time an event may name
            for what in ("ended", "add_ons", "served"):
                over = "the subscription is over at Amplify"
                await held.close(tx, subject=f"{subject}:{what}", resolution=over, now=now)
            served = await self._served_last(tx, link, subscription, until)
            if await links.begin_ending(tx, subscription_id, usage_until=until):
                asked = end_action(subscription_id, since=now, served_until=served)
                await outbox.insert(tx, [asked], now=now)
                log.info("subscription.ending", subscription=subscription_id, usage_until=until.isoformat())

    async def _served_last(
        self, tx: Tx, link: SubscriptionLink, subscription: Subscription | None, until: datetime
    ) -> datetime:
        """The last moment at which it was certainly served: what renewed later may be charged for nothing.

        Amplify tells since when one is archived, and an event when one was changed or deleted. Else that was
        when Amplify last showed it so.
        """
        if subscription is not None and subscription.state in OVER and subscription.state_at is not None:
            return until
        begun = max(link.approved_at or link.linked_at, link.served_at or link.linked_at)
        changed = await events.first_change(tx, link.subscription_id, after=begun + APPROVAL_LAGS)
        if changed is not None:
            return min(changed, until)
        missing = absence.of_subscription(link.subscription_id, link.name, link)
        if subscription is None and await absence.deleted_at(tx, missing) is not None:
            return until
        return min(until, begun)

    async def _hold(self, subscription: Subscription, kind: str, reason: str) -> Wait:
        now = self._clock.now()
        subject = f"subscription:{subscription.id}"
        again = subscription_action(subscription.name, subscription.id, because="released")
        notice = provider_notice(
            f"held:{kind}:{subscription.id}:{now.isoformat()}",
            f"Subscription {subscription.title} is held",
            reason,
        )
        async with self._store.write() as tx:
            if await links.find_subscription(tx, subscription.id) is not None:
                return Wait(SOON, "it was linked meanwhile")  # adopted, say
            await held.close(tx, subject=subject, resolution=f"now {kind}", now=now, but_kind=kind)
            await hold(tx, Hold(kind, subject, reason, again, subscription.id), notice, now=now)
        return Wait(self._policy.look_again, reason)

    async def _tell_provider(self, key: str, title: str, body: str) -> None:
        async with self._store.write() as tx:
            await outbox.insert(tx, [provider_notice(key, title, body)], now=self._clock.now())


def _takes(plan: PlanLink, subscription: Subscription) -> bool:
    """Whether it may be made to that plan: a deprecated one bills what Amplify serves already."""
    return plan.state == "active" or (plan.state == "deprecated" and subscription.approval == "approved")


def _served_before(subscription: Subscription, link: SubscriptionLink) -> str:
    """What it means that somebody approved it, or moved it to this plan, before it was at Recurly."""
    since = subscription.state_at
    if since is None or since >= link.usage_from:
        return ""
    return (
        f" It was served from {since.isoformat()} on, before Recurly had it at {link.usage_from.isoformat()}."
        " Recurly takes no usage of that time: what was counted in it is held as before_link, to be charged "
        "by hand or written off. What lies before the horizon, `billingd traffic backfill` counts."
    )


def _over(subscription: Subscription) -> bool:
    """Whether Amplify no longer serves it."""
    return subscription.deleting or subscription.approval == "rejected" or subscription.state in OVER
