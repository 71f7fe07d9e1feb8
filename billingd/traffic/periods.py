"""Periods: the state of each subscription as Recurly shows it, and where one bill ends."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Leased
from billingd.domain.billing import BilledAddOn, BilledSubscription
from billingd.domain.delivery import MISSING
from billingd.domain.errors import BillingdError, NotFound
from billingd.domain.periods import Period, between
from billingd.loops import Clock
from billingd.store import links, marks, periods
from billingd.store.engine import Store, Tx
from billingd.store.links import SubscriptionLink
from billingd.traffic import far_ends

log = structlog.get_logger()

REFRESH_EVERY: Final = timedelta(minutes=10)
"""How old the list of live subscriptions may be: a person may move a bill date at any time."""

UNSEEN_MAX: Final = timedelta(hours=2)
"""How long one subscription's next period may be unseen, while Recurly answers for others, before traffic is
read all the same: nobody else shall wait for it longer."""

AWAY_MAX: Final = timedelta(days=1)
"""The same while Recurly answers for none: then nothing could be reported anyway."""

REFRESH_SOONEST: Final = timedelta(seconds=30)
"""How soon to ask again while a period is over and Recurly shows no next one: its bill run takes time."""


class Billing(Protocol):
    """What is read at Recurly."""

    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def list_billed_edges(self, uuid: str, *, since: datetime) -> frozenset[datetime]: ...
    def far_now(self) -> datetime: ...


class PeriodWatch:
    """Keeps the links' states and billing periods as Recurly shows them."""

    def __init__(self, store: Store, clock: Clock, billing: Billing) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self.read_first: Callable[[SubscriptionLink], Awaitable[str]] | None = None
        """Reads back one that Recurly did not show after a restore, before it counts as there again."""
        self._refreshed_at: datetime | None = None
        self._unseen: dict[str, datetime] = {}
        """Since when this process waits to see the period after one that is over, by subscription."""

    def now(self) -> datetime:
        """The time that decides when a period ends: Recurly's."""
        return self._billing.far_now()

    async def refresh(self) -> None:
        """Read the periods of all subscriptions that bill, when what is known may be out of date.

        One list for all that are live, one call for each that is in no such list (paused, or just over).
        """
        now = self._clock.now()
        async with self._store.read() as tx:
            watched = await links.billing(tx)
        if not watched or not self._due(watched, now):
            return
        live = {one.uuid: one for one in await self._billing.list_live_subscriptions()}
        for link in watched:
            theirs = live.get(link.uuid)
            try:
                if theirs is None:
                    await self.look_at(link)
                elif _differs(link, theirs) or _unseen_since_its_end(link, now):
                    await self.keep(link, theirs)
            except BillingdError as error:  # of one; the others must not wait for it
                log.warning("subscription.not_seen", subscription=link.subscription_id, error=str(error))
        self._refreshed_at = now
        await self._learn_prices()

    async def handle(self, action: Leased) -> None:
        """Look at one subscription again, which a webhook of Recurly's was about."""
        async with self._store.read() as tx:
            link = await links.find_subscription_by_uuid(tx, action.args["uuid"])
        if link is not None:
            await self.look_at(link)

    async def look_at(self, link: SubscriptionLink) -> str:
        """The subscription's state as Recurly shows it now, which is also kept; MISSING when it has none."""
        try:
            theirs = await self._billing.get_subscription(link.uuid)
        except NotFound as error:
            return await self.missing(link, error)
        return await self.keep(link, theirs)

    async def missing(self, link: SubscriptionLink, error: NotFound) -> str:
        """Write down that Recurly does not show it; return MISSING."""
        if link.billed_state != MISSING:
            log.error("subscription.missing", subscription=link.subscription_id, error=str(error))
        async with self._store.write() as tx:
            now = self._clock.now()
            await periods.seen(tx, link.subscription_id, state=MISSING, current=None, now=now)
            await far_ends.heed(tx, link, MISSING, ends_at=None, now=now)
        return MISSING

    async def keep(
        self,
        link: SubscriptionLink,
        theirs: BilledSubscription,
        *,
        along: Callable[[Tx], Awaitable[None]] | None = None,
    ) -> str:
        """Write down what was seen; where renewals were missed meanwhile, read from the invoices when.

        Without their dates, windows of that time would not be cut where they were billed. What was read back
        of it is written `along` with that; until it was, one that a restore left unread is still MISSING.
        Returns the state that counts.
        """
        current = theirs.period
        async with self._store.read() as tx:
            known = await periods.of(tx, link.subscription_id)
            unread = along is None and await marks.find(tx, marks.unread(link.subscription_id)) is not None
        if unread:
            return MISSING if self.read_first is None else await self.read_first(link)
        last = max(known, default=None)
        missed: list[Period] = []
        if current is not None and last is not None and last.ends_at < current.started_at:
            billed = await self._billing.list_billed_edges(link.uuid, since=last.ends_at)
            missed = between(last.ends_at, billed, current.started_at)
        now = self._clock.now()
        async with self._store.write() as tx:
            for one in (*missed, current):
                await periods.seen(
                    tx,
                    link.subscription_id,
                    state=theirs.state,
                    current=one,
                    now=now,
                    unit_amount=theirs.unit_amount,
                )
            if along is not None:
                await along(tx)
            ends_at = None if current is None else current.ends_at
            await far_ends.heed(tx, link, theirs.state, ends_at=ends_at, now=now)
        log.info(
            "subscription.seen",
            subscription=link.subscription_id,
            state=theirs.state,
            period_ends_at=None if current is None else current.ends_at.isoformat(),
        )
        return theirs.state

    async def known_until(self) -> datetime | None:
        """From when on some subscription's period is not known, because it is over and was not seen since.

        A window beyond that moment may have to be cut where nobody knows yet. None: all are known, or have
        been waited for long enough.
        """
        now = self._clock.now()
        async with self._store.read() as tx:
            unseen = [link for link in await links.billing(tx) if _unseen_since_its_end(link, now)]
        # From when the waiting began, not from the end: whoever was away for days has not looked yet.
        self._unseen = {one.subscription_id: self._unseen.get(one.subscription_id, now) for one in unseen}
        ends = [
            one.period_ends_at
            for one in unseen
            if one.period_ends_at is not None and not self._given_up(self._unseen[one.subscription_id], now)
        ]
        return min(ends, default=None)

    def _given_up(self, since: datetime, now: datetime) -> bool:
        """Whether a period that is unseen since a moment has been waited for long enough."""
        for_others = self._refreshed_at is not None and self._refreshed_at >= since + UNSEEN_MAX
        return for_others or now >= since + AWAY_MAX

    async def _learn_prices(self) -> None:
        """What add-ons cost that were linked by a release that did not keep it; for what is at stake."""
        async with self._store.read() as tx:
            unpriced = {
                one.add_on_code: one for one in (await links.add_ons(tx)).values() if one.prices is None
            }
            plans = [
                await links.find_plan(tx, plan_id) for plan_id in {one.plan_id for one in unpriced.values()}
            ]
        for plan in plans:
            if plan is None or plan.state == "removed":
                continue
            try:
                theirs = await self._billing.list_add_ons(plan.plan_code, plan.currency)
            except NotFound:
                continue  # removed by hand; what it cost is not known any more
            async with self._store.write() as tx:
                for add_on in theirs:
                    if add_on.code in unpriced:
                        await links.priced(tx, unpriced[add_on.code].quota_id, add_on.prices)

    def _due(self, watched: list[SubscriptionLink], now: datetime) -> bool:
        last = self._refreshed_at
        if last is None or not last <= now < last + REFRESH_EVERY:
            return True
        return now >= last + REFRESH_SOONEST and any(
            link.period_ends_at is not None and link.period_ends_at <= now for link in watched
        )


def _differs(link: SubscriptionLink, theirs: BilledSubscription) -> bool:
    known = (link.billed_state, link.period_started_at, link.period_ends_at)
    if theirs.unit_amount is not None and theirs.unit_amount != link.unit_amount:
        return True
    return known != (theirs.state, theirs.period_started_at, theirs.period_ends_at)


def _unseen_since_its_end(link: SubscriptionLink, now: datetime) -> bool:
    ends_at = link.period_ends_at
    return ends_at is not None and ends_at <= now and (link.seen_at is None or link.seen_at < ends_at)
