"""A plan gained a quota: its add-on is put on the subscriptions that were made without it."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Leased, Wait
from billingd.domain.billing import BilledSubscription
from billingd.domain.delivery import PAUSED
from billingd.domain.errors import NotFound, Refused, Retryable
from billingd.domain.events import attach_action
from billingd.domain.notices import provider_notice
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.provisioning.pricecheck import PriceCheck
from billingd.store import held, links
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, SubscriptionLink

log = structlog.get_logger()

REFUSED: Final = "attach_refused"


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def add_to_subscription(
        self, uuid: str, add_on_codes: Sequence[str], *, key: str, retried: bool = False
    ) -> None: ...


class AddOnAttacher:
    """Handles `attach_add_ons`: Recurly gives a plan's new add-on to new subscriptions only."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        once: Once,
        prices: PriceCheck,
        *,
        look_again: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._prices = prices
        self._look_again = look_again

    async def attach(self, action: Leased) -> Wait | None:
        """Put on the subscription what it lacks of its plan's add-ons now, whatever it lacked when asked.

        One that is over, here or there, needs nothing any more; a paused one takes no change. What Amplify
        charges nothing for any more is not put on, and what Recurly charges otherwise waits. Each is put on
        by itself: one that Recurly refuses keeps no other off.
        """
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, action.args["id"])
            plan = None if link is None else await links.find_plan(tx, link.plan_id)
            add_ons = [] if link is None else await links.add_ons_of(tx, link.plan_id)
        if link is None or plan is None or link.state not in {"created", "active"}:
            return None
        theirs = await self._seen(link)
        lacking = [one for one in add_ons if one.add_on_code not in theirs.add_on_codes]
        if not lacking or not theirs.live:
            await self._release(link)
            return None
        if theirs.state == PAUSED:
            return Wait(self._look_again, "the Recurly subscription is paused, and takes no add-on meanwhile")
        checked = await self._prices.check(plan, add_ons)
        refused: list[tuple[AddOnLink, str]] = []
        for one in lacking:
            code = one.add_on_code
            if code in checked.unfit or code not in checked.add_on_codes:
                continue
            try:
                await self._put_on(link, code, action.id)
            except Refused as error:
                refused.append((one, str(error)))
            else:
                log.info("subscription.add_on_attached", subscription=link.subscription_id, add_on=code)
        if refused:
            await self._hold(link, refused)
            return None
        unfit = dict.fromkeys(checked.unfit[c] for one in lacking if (c := one.add_on_code) in checked.unfit)
        if unfit:
            return Wait(self._look_again, " ".join(unfit))
        await self._release(link)
        return None

    async def _put_on(self, link: SubscriptionLink, code: str, action_id: int) -> None:
        async def send(key: str, *, retried: bool) -> str:
            await self._billing.add_to_subscription(link.uuid, [code], key=key, retried=retried)
            return link.uuid

        async def find() -> str | None:
            return link.uuid if code in (await self._seen(link)).add_on_codes else None

        digest = hashlib.sha256(code.encode()).hexdigest()[:16]
        await self._once.write(
            f"attach:{link.uuid}:{digest}:{action_id}",  # what was taken off again may be put on again
            {"add_ons": [code]},
            send=send,
            find=find,
            look_first=True,
            about=link.subscription_id,
        )

    async def _seen(self, link: SubscriptionLink) -> BilledSubscription:
        try:
            return await self._billing.get_subscription(link.uuid)
        except NotFound as error:
            raise Retryable(f"Recurly does not show it: {error}") from error

    async def _release(self, link: SubscriptionLink) -> None:
        async with self._store.write() as tx:
            await held.close(tx, subject=_subject(link), resolution="it has them all", now=self._clock.now())

    async def _hold(self, link: SubscriptionLink, refused: Sequence[tuple[AddOnLink, str]]) -> None:
        now = self._clock.now()
        codes = [one.add_on_code for one, _ in refused]
        titles = ", ".join(one.title for one, _ in refused)
        why = "; ".join(dict.fromkeys(said for _, said in refused))
        reason = (
            f"Subscription {link.title} lacks the add-on(s) for {titles}, which its plan gained since, so "
            f"that usage cannot be billed: Recurly refused to add {', '.join(codes)} to {link.uuid}: {why}."
            " Add them there, or mend the cause; then release this."
        )
        again = attach_action(link.subscription_id, codes)
        notice = provider_notice(
            f"held:{REFUSED}:{link.subscription_id}:{now.isoformat()}",
            f"Subscription {link.title} lacks an add-on",
            reason,
        )
        async with self._store.write() as tx:
            await hold(
                tx, Hold(REFUSED, _subject(link), reason, again, link.subscription_id), notice, now=now
            )


def _subject(link: SubscriptionLink) -> str:
    return f"subscription:{link.subscription_id}:add_ons"
