"""The end of a subscription: the last usage is reported, then it is over at Recurly too."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

import structlog

from billingd.domain.attempts import Action, Leased, State, Wait
from billingd.domain.billing import BilledSubscription
from billingd.domain.catalog import Subscription
from billingd.domain.delivery import AFTER_END, MISSING, OVER, PAUSED
from billingd.domain.errors import NotFound, Refused, Retryable
from billingd.domain.events import END_SUBSCRIPTION, REPORT_USAGE, subscription_action
from billingd.domain.notices import provider_notice
from billingd.domain.resync import over
from billingd.domain.sending import body_hash, idempotency_key
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.store import held, history, intents, links, marks, outbox, usage, watermarks
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink
from billingd.store.stakes import release_usage

log = structlog.get_logger()

CANCELED: Final = "canceled"
EXPIRED: Final = "expired"

NAMED: Final = 5
"""How many dead letters are named at most."""

LAST_LOOK: Final = timedelta(minutes=1)
"""How long before a renewal one that waits to end is looked at once more."""

LINES_SHOWN: Final = timedelta(minutes=2)
"""How long after a renewal its line items may be missing in a list."""

GONE_FOR: Final = timedelta(minutes=1)
"""How far apart two 404s of a subscription are that are believed: a read may lag."""

BLOCKED_AFTER: Final = timedelta(days=1)
"""How long after its last windows were read an end may wait before a person is told."""

BLOCKED: Final = "end_blocked"
SERVED: Final = "ended_but_served"
"""Kinds of held items: an end that cannot come, and one that came although Amplify goes on serving."""


def end_action(
    subscription_id: str, *, since: datetime | None = None, served_until: datetime | None = None
) -> Action:
    """End a subscription at Recurly, once its last usage has been reported.

    `since` is when that was asked for: a subscription that was served again may end a second time.
    `served_until` is when it was certainly served the last time, if nobody knows since when it is over.
    """
    args = {"id": subscription_id}
    if served_until is not None:
        args["served_until"] = served_until.isoformat()
    key = f"{END_SUBSCRIPTION}:{subscription_id}"
    return Action(
        END_SUBSCRIPTION,
        f"end:{subscription_id}",
        key if since is None else f"{key}:{since.isoformat()}",
        args,
    )


HELD_SERVED: Final = ("approved", "pending")
"""Approvals at which one that was ended at Recurly is held: it is served, or asks to be, and never billed."""


async def hold_served(tx: Tx, link: SubscriptionLink, approval: str, *, now: datetime) -> None:
    """Hold one that Amplify serves, or may, although it is ended at Recurly: nothing bills it any more."""
    subject = served_subject(link.subscription_id)
    ended = f"Subscription {link.title} ({link.name}) was ended at Recurly ({link.uuid}) when it was over at "
    if approval == "pending":
        title = f"{link.title} asks for approval, and was ended at Recurly"
        reason = (
            f"{ended}Amplify, and asks for approval again: what has ended cannot be billed. Reject it in the "
            "Marketplace, and let the subscriber subscribe anew; then this closes by itself."
        )
    else:
        title = f"{link.title} is served, and was ended at Recurly"
        reason = (
            f"{ended}Amplify, which serves it again by now: nothing of it is billed. Cancel it in the "
            "Marketplace, and let the subscriber subscribe anew; then this closes by itself."
        )
    notice = provider_notice(f"held:{subject}:{now.isoformat()}", title, reason)
    await hold(tx, Hold(SERVED, subject, reason, None, link.subscription_id), notice, now=now)


def served_subject(subscription_id: str) -> str:
    """The subject of what is held of an ended subscription that Amplify serves."""
    return f"subscription:{subscription_id}:served"


async def end_again(tx: Tx, link: SubscriptionLink, *, now: datetime) -> None:
    """Somebody reactivated it at Recurly after its end, and it is over at Amplify: end it once more."""
    if not await links.end_again(tx, link.subscription_id):
        return
    name = f"end:{link.uuid}"
    before = await intents.find(tx, name)
    await history.append(tx, name, "reopened", now=now, **history.sent(before))
    await intents.reopen(tx, name, key=idempotency_key(name, 1, body_hash({"ends": EXPIRED})), now=now)
    body = (
        f"Somebody reactivated Recurly's subscription {link.uuid}, which was ended there because "
        f"{link.title} ({link.name}) is over at Amplify: nobody is served, but each renewal is charged. "
        "It is ended again. Whoever wants to go on subscribes anew in the Marketplace."
    )
    notice = provider_notice(
        f"reactivated:{link.uuid}:{now.isoformat()}", f"{link.title} is ended again", body
    )
    await outbox.insert(tx, [end_action(link.subscription_id, since=now), notice], now=now)
    log.warning("subscription.reactivated", subscription=link.subscription_id, uuid=link.uuid)


class Marketplace(Protocol):
    """What is read at Amplify."""

    async def find_subscription(self, name: str) -> Subscription | None: ...


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
        marketplace: Marketplace,
        billing: Billing,
        once: Once,
        *,
        on_cancel: str,
        traffic_source: str,
        look_again: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._marketplace = marketplace
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

        Amplify is asked once more right before: one that it serves again goes on, and nothing is ended.
        """
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, action.args["id"])
            watermark = await watermarks.find(tx, self._traffic_source)
            unreported = await usage.unreported_of(tx, action.args["id"])
            used_at = await usage.last_served(tx, action.args["id"])
            unread = await marks.find(tx, marks.unread(action.args["id"]))
        if link is None or link.state != "ending" or link.usage_until is None:
            return None
        theirs = await self._seen_if_there(link)
        if isinstance(theirs, Wait):
            return theirs
        if theirs is not None and unread is not None:
            return Wait(self._pause(theirs), "waits until what Recurly has of its usage is read back")
        how = MISSING if theirs is None else self._ended_as(link, theirs.state)
        if how != CANCELED and link.approved_at is not None:  # what was never approved was never served
            # A pass that reads past `linked_at` began after the link was there: it read older windows again.
            last = max(link.usage_until, link.linked_at)
            if watermark is None or watermark.at < last:
                return Wait(self._pause(theirs), "waits until all traffic before its end has been read")
            if unreported:
                reason = f"waits until {unreported} usage record(s) are reported"
                await self._tell_if_blocked(link, unreported, since=last, read_until=watermark.at)
                return Wait(self._pause(theirs), reason)
        name = f"end:{link.uuid}"
        served = await self._served(link)
        if (
            served is not None
            and theirs is not None
            and theirs.state not in OVER
            # an answer may have been lost, and its end be at Recurly already
            and await self._once.look(name, find=lambda: self._find(link, how)) is None
        ):
            await self._resume(link, served)
            return None
        if theirs is not None:
            await self._once.write(
                name,
                {"ends": how},
                send=lambda key, *, retried: self._send(link, how, key, retried=retried),
                find=lambda: self._find(link, how),
                look_first=True,
            )
        now = self._clock.now()
        known = [moment for moment in (_served_until(action) or link.usage_until, used_at) if moment]
        served_until = min(link.usage_until, max(known))
        charged = [] if theirs is None else await self._charged_since(link, served_until)
        async with self._store.write() as tx:
            if charged:
                await hold(tx, *_renewed(link, charged, served_until, now), now=now)
            if not await links.end(tx, link.subscription_id, billed_state=how, now=now):
                return None
            await held.close(tx, subject=_blocked(link), resolution="it has ended", now=now)
            if served is not None and served.approval in HELD_SERVED:
                await hold_served(tx, link, served.approval, now=now)
            await outbox.insert(tx, [_notice(link, how, unread=unread is not None)], now=now)
        return None

    async def _served(self, link: SubscriptionLink) -> Subscription | None:
        """What Amplify has of it now, unless it is over there: a rejection may have been taken back."""
        there = await self._marketplace.find_subscription(link.name)
        if there is None or there.id != link.subscription_id or over(there):
            return None
        return there

    async def _resume(self, link: SubscriptionLink, served: Subscription) -> None:
        """It goes on as before, what was counted meanwhile is billed, and it is looked at once more."""
        now = max(self._clock.now(), link.linked_at)
        id_, until = link.subscription_id, link.usage_until
        approved_at = (link.approved_at or now) if served.approval == "approved" else None
        subject = f"subscription:{id_}"
        body = (
            f"Subscription {link.title} ({link.name}) was over at Amplify at {until}, and is "
            f"{served.approval or 'there'} again: Recurly's subscription {link.uuid} goes on."
        )
        notice = provider_notice(
            f"subscription-resumed:{id_}:{now.isoformat()}", f"{link.title} goes on after all", body
        )
        # what happened since the look at it was no news to a link that was ending
        again = subscription_action(link.name, id_, because=f"resumed:{now.isoformat()}")
        async with self._store.write() as tx:
            if not await links.resume(tx, id_, approved_at=approved_at):
                return
            await history.append(tx, subject, "resumed", now=now, was_over_at=history.text_of(until))
            await held.close(tx, subject=_blocked(link), resolution="it goes on", now=now)
            await release_usage(tx, id_, AFTER_END, resolution="Amplify serves it again", now=now)
            await outbox.insert(tx, [notice, again], now=now)
        log.warning("subscription.resumed", subscription=id_, uuid=link.uuid)

    async def _tell_if_blocked(
        self, link: SubscriptionLink, unreported: int, *, since: datetime, read_until: datetime
    ) -> None:
        """Hold an end that waits for what will not come by itself: it goes on being billed meanwhile."""
        now = self._clock.now()
        async with self._store.write() as tx:
            dead = [
                row
                for add_on in await links.add_ons_of(tx, link.plan_id)
                for row in await outbox.select(
                    tx,
                    states=[State.DEAD],
                    kind=REPORT_USAGE,
                    subject=f"usage:{link.subscription_id}:{add_on.quota_id}",
                )
            ]
            if not dead and read_until < since + BLOCKED_AFTER:
                return
            why = "They were not reported within a day: `billingd outbox list` tells why they wait."
            if dead:
                named = ", ".join(str(row["id"]) for row in dead[:NAMED])
                why = (
                    f"Their reports are dead letters, action {named}: {dead[0]['error']}. Mend that, then "
                    f"`billingd outbox retry {dead[0]['id']}`, or discard it."
                )
            reason = (
                f"Subscription {link.title} ({link.name}) is over at Amplify, and Recurly's {link.uuid} does "
                f"not end before {unreported} usage records are reported: it renews until then. {why} Then "
                "it ends by itself, and this closes."
            )
            subject = _blocked(link)
            notice = provider_notice(
                f"held:{subject}:{now.isoformat()}", f"{link.title} cannot end at Recurly", reason
            )
            await hold(tx, Hold(BLOCKED, subject, reason, None, link.subscription_id), notice, now=now)

    async def _seen_if_there(self, link: SubscriptionLink) -> BilledSubscription | Wait | None:
        """It as it is now; None when Recurly did not have it a while ago either: a first 404 may be a lag."""
        try:
            return await self._billing.get_subscription(link.uuid)
        except NotFound as error:
            if link.billed_state != MISSING or link.seen_at is None:
                raise Retryable(f"Recurly does not show it: {error}", retry_after=GONE_FOR) from error
            left = link.seen_at + GONE_FOR - self._clock.now()
            return Wait(left, f"Recurly does not show it: {error}") if left > timedelta(0) else None

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

    def _pause(self, theirs: BilledSubscription | None) -> timedelta:
        """How long to wait before the next look: a renewal is near enough to be worth an earlier one."""
        if theirs is None or theirs.period is None:
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


def _served_until(action: Leased) -> datetime | None:
    said = action.args.get("served_until")
    return None if said is None else datetime.fromisoformat(said)


def _renewed(
    link: SubscriptionLink, renewals: Sequence[datetime], served_until: datetime, now: datetime
) -> tuple[Hold, Action]:
    """It was over at Amplify, and renewed at Recurly before that was heard, or its usage reported."""
    assert link.usage_until is not None
    times = ", ".join(one.isoformat() for one in renewals)
    over, which = f"was over at {link.usage_until.isoformat()}", "that"
    if served_until < link.usage_until:
        over = (
            f"was over at some time between {served_until.isoformat()}, when it was still served, and "
            f"{link.usage_until.isoformat()}"
        )
        which = "what was charged after it was over"
    reason = (
        f"Subscription {link.title} {over}, but Recurly renewed {link.uuid} ({times}) and charged the base "
        f"price each time. Refund {which} there, then release this."
    )
    subject = f"subscription:{link.subscription_id}:renewed"
    item = Hold("renewed_after_end", subject, reason, None, link.subscription_id)
    return item, provider_notice(
        f"held:{subject}:{now.isoformat()}", f"{link.title} renewed too late", reason
    )


def _blocked(link: SubscriptionLink) -> str:
    """The subject of what is held of an end that cannot come."""
    return f"subscription:{link.subscription_id}:end_blocked"


def _notice(link: SubscriptionLink, how: str, *, unread: bool) -> Action:
    assert link.usage_until is not None
    return provider_notice(
        f"subscription-ended:{link.subscription_id}:{link.usage_until.isoformat()}",
        f"{link.title} has ended",
        f"Subscription {link.title} ({link.name}) is over at Amplify; Recurly's subscription {link.uuid} "
        + _told(link, how, unread=unread),
    )


def _told(link: SubscriptionLink, how: str, *, unread: bool) -> str:
    """What was done, and is left to do: Recurly refunds what was paid, and an open invoice stays open."""
    if how == MISSING and unread:
        return (
            "is not there any more, so nothing was ended. The store was restored, and this was never read "
            "back since: what is counted of it from then on is held, in one sum for each quota, also what "
            "Recurly may have billed before. Should it show up again, it is read back, and the next resync "
            "ends it."
        )
    if how == MISSING:
        return (
            "is not there any more, so nothing was ended. Usage that was not reported before is held. Should "
            "it show up again, the next resync ends it."
        )
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
