"""The end of a subscription: the last usage is reported, then it is over at Recurly too."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

import structlog

from billingd.domain.attempts import Action, Leased, Wait
from billingd.domain.billing import BilledSubscription
from billingd.domain.delivery import OVER, PAUSED
from billingd.domain.errors import NotFound, Refused, Retryable
from billingd.domain.events import END_SUBSCRIPTION
from billingd.domain.notices import provider_notice
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.store import links, outbox, usage, watermarks
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink

log = structlog.get_logger()

CANCELED: Final = "canceled"
EXPIRED: Final = "expired"

LAST_LOOK: Final = timedelta(minutes=1)
"""How long before a renewal one that waits to end is looked at once more."""

LINES_SHOWN: Final = timedelta(minutes=2)
"""How long after a renewal its line items may be missing in a list."""


def end_action(subscription_id: str) -> Action:
    """End a subscription at Recurly, once its last usage has been reported."""
    return Action(
        END_SUBSCRIPTION,
        f"end:{subscription_id}",
        f"{END_SUBSCRIPTION}:{subscription_id}",
        {"id": subscription_id},
    )


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def list_charged_starts(self, uuid: str, *, since: datetime) -> frozenset[datetime]: ...
    def far_now(self) -> datetime: ...
    async def cancel_subscription(
        self, uuid: str, *, key: str, retried: bool = False
    ) -> BilledSubscription: ...
    async def terminate_subscription(
        self,
        uuid: str,
        *,
        refund: Literal["none", "full"],
        charge: bool = True,
        key: str,
        retried: bool = False,
    ) -> BilledSubscription: ...


class SubscriptionEnder:
    """Handles `end_subscription`; `on_cancel`: `terminate` bills at once, `cancel` at the bill date."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        once: Once,
        *,
        on_cancel: str,
        traffic_source: str,
        look_again: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._on_cancel = on_cancel
        self._traffic_source = traffic_source
        self._look_again = look_again

    async def end(self, action: Leased) -> Wait | None:
        """End it only when every window up to its end has been read and everything in them reported.

        A terminated subscription takes no usage afterwards, so ending first would lose units for ever. When
        it renews meanwhile, the base price of that period is somebody's to refund. One that is only cancelled
        takes usage until its bill date, so that waits for nothing.
        """
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, action.args["id"])
            watermark = await watermarks.find(tx, self._traffic_source)
            unreported = await usage.unreported_of(tx, action.args["id"])
        if link is None or link.state != "ending" or link.usage_until is None:
            return None
        theirs = await self._seen(link)
        how = self._ended_as(link, theirs.state)
        if how == EXPIRED and link.approved_at is not None:  # what was never approved was never served
            # A pass that reads past `linked_at` began after the link was there: it read older windows again.
            all_read = watermark is not None and watermark.at >= max(link.usage_until, link.linked_at)
            if not all_read:
                return Wait(self._pause(theirs), "waits until all traffic before its end has been read")
            if unreported:
                reason = f"waits until {unreported} usage record(s) are reported"
                return Wait(self._pause(theirs), reason)
        await self._once.write(
            f"end:{link.uuid}",
            {"ends": how},
            send=lambda key, *, retried: self._send(link, how, key, retried=retried),
            find=lambda: self._find(link, how),
            look_first=True,
        )
        now = self._clock.now()
        notice = provider_notice(
            f"subscription-ended:{link.subscription_id}",
            f"{link.title} has ended",
            f"Subscription {link.title} ({link.name}) is over at Amplify; Recurly's subscription {link.uuid} "
            + _told(link, how),
        )
        charged = await self._charged_since(link, link.usage_until)
        async with self._store.write() as tx:
            if charged:
                await hold(tx, *_renewed(link, charged, now), now=now)
            await links.end(tx, link.subscription_id, billed_state=how, now=now)
            await outbox.insert(tx, [notice], now=now)
        return None

    async def _seen(self, link: SubscriptionLink) -> BilledSubscription:
        """It as it is now. A 404 may come from a read that lags, and ends nothing."""
        try:
            return await self._billing.get_subscription(link.uuid)
        except NotFound as error:
            raise Retryable(f"Recurly does not show it: {error}") from error

    async def _charged_since(self, link: SubscriptionLink, until: datetime) -> list[datetime]:
        """The renewals after its end at Amplify whose base price was charged, the oldest first.

        Only Recurly's invoices know: its state now may be another than it was at the renewal, and a pause is
        not charged. One that was never approved has all of it refunded.
        """
        if link.approved_at is None:
            return []
        # Also when it renewed between the look and the end; one that ended at once has a period of no length.
        began = (await self._seen(link)).period_started_at
        if began is not None and began <= until:
            return []
        try:
            starts = await self._billing.list_charged_starts(link.uuid, since=until)
        except NotFound as error:
            raise Retryable(f"Recurly does not show its line items: {error}") from error
        if began is not None and began not in starts:
            left = began + LINES_SHOWN - self._billing.far_now()
            if left > timedelta(0):
                raise Retryable("it renewed just now, and its invoice may not show yet", retry_after=left)
        return sorted(start for start in starts if start > until)

    def _pause(self, theirs: BilledSubscription) -> timedelta:
        """How long to wait before the next look: a renewal is near enough to be worth an earlier one."""
        if theirs.period is None:
            return self._look_again
        left = theirs.period.ends_at - LAST_LOOK - self._billing.far_now()
        return min(self._look_again, left) if left > timedelta(0) else self._look_again

    async def _send(self, link: SubscriptionLink, how: str, key: str, *, retried: bool) -> str:
        try:
            if how == CANCELED:
                await self._billing.cancel_subscription(link.uuid, key=key, retried=retried)
            else:
                # One that was never approved was never used: its first invoice is taken back in full.
                refund: Literal["none", "full"] = "none" if link.approved_at is not None else "full"
                await self._billing.terminate_subscription(link.uuid, refund=refund, key=key, retried=retried)
        except Refused:
            if await self._find(link, how) is None:
                raise
            log.info("subscription.ended_already", uuid=link.uuid)
        return link.uuid

    def _ended_as(self, link: SubscriptionLink, state: str) -> str:
        """What Recurly shall call it then: CANCELED or EXPIRED.

        One that was never approved has no period to run out, and a paused one cannot be cancelled.
        """
        runs_out = self._on_cancel == "cancel" and link.approved_at is not None
        return CANCELED if runs_out and state not in {PAUSED, *OVER} else EXPIRED

    async def _find(self, link: SubscriptionLink, how: str) -> str | None:
        state = (await self._seen(link)).state
        return link.uuid if state in OVER or state == how else None


def _renewed(link: SubscriptionLink, renewals: Sequence[datetime], now: datetime) -> tuple[Hold, Action]:
    """It was over at Amplify, and renewed at Recurly before all its usage could be reported."""
    times = ", ".join(one.isoformat() for one in renewals)
    reason = (
        f"Subscription {link.title} was over at {link.usage_until}, but Recurly renewed {link.uuid} "
        f"({times}) before its last usage was reported, and charged the base price each time. Refund that "
        "there, then release this."
    )
    subject = f"subscription:{link.subscription_id}:renewed"
    item = Hold("renewed_after_end", subject, reason, None, link.subscription_id)
    return item, provider_notice(
        f"held:{subject}:{now.isoformat()}", f"{link.title} renewed too late", reason
    )


def _told(link: SubscriptionLink, how: str) -> str:
    """What was done, and is left to do: Recurly refunds what was paid, and an open invoice stays open."""
    if link.approved_at is None:
        return (
            "was terminated. It was never approved: what was paid of its first invoice was refunded; "
            "mark the invoice as failed at Recurly if it is still open."
        )
    return (
        "was terminated after its last usage."
        if how == EXPIRED
        else "was cancelled, and ends with its billing period."
    )
