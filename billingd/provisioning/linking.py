"""Linking a subscription to what was made of it at Recurly: the link and what it needs at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.catalog import Subscription
from billingd.domain.errors import NotFound, Permanent, Retryable
from billingd.domain.events import attach_action
from billingd.domain.foreign import by_whom
from billingd.domain.notices import provider_notice
from billingd.domain.windows import floor
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.owner import candidates
from billingd.store import held, links, outbox, periods
from billingd.store.engine import Store, Tx
from billingd.store.links import PlanLink, SubscriptionLink

log = structlog.get_logger()

SECOND: Final = timedelta(seconds=1)
"""Recurly's clock counts whole seconds."""


USAGE_FROM: Final = "recurlyUsageFrom"
"""The attribute of an adopted subscription that says from when on its usage is billingd's to bill.

It outlives the store: one that is linked again after a restore does not bill what was billed before it. It
goes with the subscription: then what stands at Recurly must tell.
"""

ORGANIZATIONS: Final = "amplify-org-"
"""How the code of an organisation's account begins."""


class Billing(Protocol):
    """What is read at Recurly."""

    async def list_subscriptions(self, account_code: str) -> tuple[BilledSubscription, ...]: ...
    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...


class ReadBack(Protocol):
    """Usage that Recurly holds already of a subscription that is only now linked, or linked again."""

    async def list(
        self, made: BilledSubscription, plan: PlanLink
    ) -> Mapping[str, tuple[BilledUsage, ...]]: ...

    """What it holds, by add-on code."""

    async def keep(
        self, tx: Tx, link: SubscriptionLink, found: Mapping[str, tuple[BilledUsage, ...]], *, now: datetime
    ) -> None: ...

    """Write it down, in the transaction that writes the link."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A subscription that Amplify has no longer: only what it was called is known."""

    id: str
    name: str


class Linker:
    """Writes the link of a subscription. `window` is the length of a traffic window.

    `organization_id` is the provider's own: a subscription that names no owner's is counted there.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        once: Once,
        *,
        organization_id: str,
        window: timedelta,
        read_back: ReadBack | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._organization_id = organization_id
        self._window = window
        self._read_back = read_back

    async def link(
        self,
        subscription: Subscription | Gone,
        plan: PlanLink,
        made: BilledSubscription,
        *,
        usage_from: datetime | None = None,
        approved_at: datetime | None = None,
    ) -> SubscriptionLink:
        """Link it, close what was held of it, and ask for the add-ons that it lacks.

        `usage_from` is when its usage begins to count, if that is not when it was made at Recurly.
        `approved_at` adopts one that another program billed until then: it is `active` at once, and what it
        was served before `usage_from` is not ours to bill.
        """
        now = self._clock.now()
        if usage_from is None:
            usage_from = self._begins(subscription, made, now)
        if isinstance(subscription, Subscription) and (since := _adopted_from(subscription)) is not None:
            usage_from = max(usage_from, since)
            if subscription.approval == "approved":
                approved_at = approved_at or now  # adopted in a life of the store that is forgotten
        link = SubscriptionLink(
            subscription_id=subscription.id,
            name=subscription.name,
            title=subscription.title if isinstance(subscription, Subscription) else subscription.name,
            plan_id=plan.plan_id,
            organization_id=self._organization(subscription, made),
            account_code=made.account_code,
            uuid=made.uuid,
            state="created" if approved_at is None else "active",
            resource_version=None,
            usage_from=usage_from,
            approved_at=None if approved_at is None else min(approved_at, now - SECOND),
            usage_until=None,
            period_started_at=made.period_started_at,
            period_ends_at=made.period_ends_at,
            linked_at=now,
        )
        found = {} if self._read_back is None else await self._read_back.list(made, plan)
        if isinstance(subscription, Gone):
            link = await self._as_used(link, found)
        async with self._store.write() as tx:
            await links.create_subscription(tx, link)
            shown, price = made.period, made.unit_amount
            await periods.seen(
                tx, link.subscription_id, state=made.state, current=shown, now=now, unit_amount=price
            )
            subject = f"subscription:{link.subscription_id}"
            await held.close(tx, subject=subject, resolution="created at Recurly", now=now)
            # the plan may have gained a quota since this was made; their handler leaves out what is free
            add_ons = {one.add_on_code for one in await links.add_ons_of(tx, plan.plan_id)}
            lacking = add_ons - set(made.add_on_codes)
            if lacking and isinstance(subscription, Subscription):
                await outbox.insert(tx, [attach_action(link.subscription_id, lacking)], now=now)
            if self._read_back is not None:
                await self._read_back.keep(tx, link, found, now=now)
        return link

    async def find_lost(
        self,
        name: str,
        subscription_id: str,
        subscription: Subscription | None,
        *,
        seen: str | None = None,
    ) -> SubscriptionLink | None:
        """Link what was made at Recurly (or may have been) of one that was over before its link was written.

        Without a link it would be billed for ever. One that was deleted does not say any more which account
        to look in: then all that are live are looked through. `seen` is one that a resync saw at Recurly and
        that this store knows nothing of: it was served for as long as Amplify had it, as far as can be told.
        """

        async def find() -> str | None:
            if subscription is None:
                theirs = await self._billing.list_live_subscriptions()
            else:
                theirs = ()
                for code in candidates(subscription):
                    theirs += await self.listed(code)
            return next((one.uuid for one in theirs if one.marker == subscription_id and one.live), None)

        uuid = await self._once.look(f"subscription:{subscription_id}", find=find) or seen
        if uuid is None:
            return None
        made = await self.made(uuid)
        async with self._store.read() as tx:
            plan = await links.find_plan_by_code(tx, made.plan_code)
        if not made.live or plan is None or made.marker != subscription_id:
            return None
        now = self._clock.now()
        return await self.link(
            subscription or Gone(subscription_id, name),
            plan,
            made,
            usage_from=floor(self._made_at(made, now), self._window),
            approved_at=now if uuid == seen and subscription is None else None,
        )

    def _organization(self, subscription: Subscription | Gone, made: BilledSubscription) -> str:
        """Where its traffic is counted; "" where nobody can tell any more."""
        if isinstance(subscription, Subscription):
            return subscription.owner_org_id or self._organization_id
        code = made.account_code
        return code.removeprefix(ORGANIZATIONS) if code.startswith(ORGANIZATIONS) else ""

    async def _as_used(
        self, link: SubscriptionLink, found: Mapping[str, tuple[BilledUsage, ...]]
    ) -> SubscriptionLink:
        """The link of one that is gone, after what its usage at Recurly says of it.

        Any usage shows that it was approved. Usage that is not ours shows that another program billed it
        before: up to when is forgotten, and the first of ours is the earliest moment that certainly lies
        behind that. What lies between is not held, for its units cannot be told from those already billed.
        """
        if not any(found.values()):
            return link
        now = self._clock.now()
        if link.approved_at is None:
            link = replace(link, state="active", approved_at=now - SECOND)
        async with self._store.read() as tx:
            quotas = {one.add_on_code: one.quota_id for one in await links.add_ons_of(tx, link.plan_id)}
        told = by_whom(link.subscription_id, quotas, found)
        if not told.others:
            return link
        counts_from = told.ours_from or now.replace(microsecond=0)
        last = max(one.usage_timestamp for one in told.others)
        log.warning(
            "subscription.billed_by_another_before",
            subscription=link.subscription_id,
            others=len(told.others),
            others_until=last.isoformat(),
            usage_from=counts_from.isoformat(),
        )
        notice = provider_notice(
            f"gone-adopted:{link.subscription_id}",
            "A deleted subscription was billed by another program before",
            f"Recurly's subscription {link.uuid} bills {link.name}, which Amplify has no longer. "
            f"{len(told.others)} of its usage records, the newest of {last.isoformat()}, are not billingd's, "
            f"and from when on billingd was to bill it is forgotten: its usage counts from "
            f"{counts_from.isoformat()} on. Charge by hand what was served between and told by nobody.",
        )
        async with self._store.write() as tx:
            await outbox.insert(tx, [notice], now=now)
        return replace(link, usage_from=counts_from)

    async def made(self, uuid: str) -> BilledSubscription:
        """The subscription that Recurly said it has; what it does not show yet, it will show later."""
        try:
            return await self._billing.get_subscription(uuid)
        except NotFound as error:
            raise Retryable(f"Recurly does not show it yet: {error}") from error

    async def listed(self, account: str) -> tuple[BilledSubscription, ...]:
        """An account's subscriptions; none of an account that does not exist."""
        try:
            return await self._billing.list_subscriptions(account)
        except NotFound:
            return ()

    def _begins(self, subscription: Subscription | Gone, made: BilledSubscription, now: datetime) -> datetime:
        """From when on its usage counts.

        Before its approval a pending subscription has no access, so all traffic of the window in which it
        was made at Recurly is billed. One that somebody approved before had access: what counts is from the
        moment on at which it was made, for Recurly takes no usage of before (recurly.md 5.3).
        """
        begun = self._made_at(made, now)
        if isinstance(subscription, Subscription) and subscription.approval != "pending":
            return begun.replace(microsecond=0)  # Recurly's times are whole seconds, and so are edges
        return floor(begun, self._window)

    @staticmethod
    def _made_at(made: BilledSubscription, now: datetime) -> datetime:
        return min(made.activated_at or now, now)


def _adopted_from(subscription: Subscription) -> datetime | None:
    """From when on the usage of an adopted subscription counts; None for any other."""
    if (text := subscription.attributes.get(USAGE_FROM)) is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("it names no zone")
        return moment.astimezone(UTC)
    except ValueError:
        raise Permanent(
            f"subscription {subscription.name}: its attribute {USAGE_FROM} is {text[:40]!r}, not a time such "
            "as 2026-11-22T10:00:00Z"
        ) from None
