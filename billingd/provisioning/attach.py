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
from billingd.domain.events import attach_action, plan_action
from billingd.domain.notices import provider_notice
from billingd.loops import Clock
from billingd.once import Once
from billingd.provisioning.holding import hold
from billingd.provisioning.pricecheck import IN_LINE, PriceCheck
from billingd.store import held, intents, links, outbox
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, PlanLink, SubscriptionLink

log = structlog.get_logger()

REFUSED: Final = "attach_refused"
DIFFERS: Final = "attach_differs"


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
        by itself: one that Recurly refuses, or that waits, keeps no other off.
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
        held_already = await self._refused_by(action, link, lacking)
        refused: list[tuple[AddOnLink, str]] = []
        for one in lacking:
            code = one.add_on_code
            if code in checked.unfit or code not in checked.add_on_codes or code in held_already:
                continue
            try:
                await self._put_on(link, code, action.id)
            except Refused as error:
                refused.append((one, str(error)))
            else:
                log.info("subscription.add_on_attached", subscription=link.subscription_id, add_on=code)
        if refused:
            await self._hold(link, refused)
        unfit = [one for one in lacking if one.add_on_code in checked.unfit]
        if unfit:
            why = " ".join(dict.fromkeys(checked.unfit[one.add_on_code] for one in unfit))
            return await self._wait(action, link, plan, unfit, why)
        await self._release(link, but_kind=REFUSED if refused or held_already else None)
        return None

    async def _refused_by(
        self, action: Leased, link: SubscriptionLink, lacking: Sequence[AddOnLink]
    ) -> set[str]:
        """What Recurly refused to this very action, and is held for it still: another one may try again."""
        async with self._store.read() as tx:
            standing = await held.standing(tx, subject=_subject(link), kind=REFUSED)
            named = {code for item in standing for code in item["action"]["args"]["add_ons"]}
            asked = [one.add_on_code for one in lacking if one.add_on_code in named]
            tried = {code: await intents.find(tx, _intent(link, code, action.id)) for code in asked}
        return {code for code, one in tried.items() if one is not None and one.state == "refused"}

    async def _wait(
        self, action: Leased, link: SubscriptionLink, plan: PlanLink, unfit: Sequence[AddOnLink], why: str
    ) -> Wait:
        """Wait until its plan was brought in line; tell of it, where nothing held of the plan does."""
        now = self._clock.now()
        codes = [one.add_on_code for one in unfit]
        because = f"add_ons:{link.subscription_id}:{action.id}"
        titles = ", ".join(one.title for one in unfit)
        reason = (
            f"Subscription {link.title} lacks the add-on(s) for {titles}, which its plan gained since, so "
            f"that usage cannot be billed: {why} {', '.join(codes)} is put on once both sides agree."
        )
        again = attach_action(link.subscription_id, codes)
        item = Hold(DIFFERS, _subject(link), reason, again, link.subscription_id)
        notice = provider_notice(
            f"held:{DIFFERS}:{link.subscription_id}:{now.isoformat()}",
            f"Subscription {link.title} lacks an add-on",
            reason,
        )
        async with self._store.write() as tx:
            if await outbox.insert(tx, [plan_action(plan.name, plan.plan_id, because=because)], now=now):
                return Wait(IN_LINE, f"plan {plan.title} is looked at again: {why}")
            if not await held.standing(tx, subject=f"plan:{plan.name}"):
                await hold(tx, item, notice, now=now)
        return Wait(self._look_again, why)

    async def _put_on(self, link: SubscriptionLink, code: str, action_id: int) -> None:
        async def send(key: str, *, retried: bool) -> str:
            await self._billing.add_to_subscription(link.uuid, [code], key=key, retried=retried)
            return link.uuid

        async def find() -> str | None:
            return link.uuid if code in (await self._seen(link)).add_on_codes else None

        await self._once.write(
            _intent(link, code, action_id),
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

    async def _release(self, link: SubscriptionLink, *, but_kind: str | None = None) -> None:
        now = self._clock.now()
        async with self._store.write() as tx:
            why = "it has them all" if but_kind is None else "it has all others"
            await held.close(tx, subject=_subject(link), resolution=why, now=now, but_kind=but_kind)

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


def _intent(link: SubscriptionLink, code: str, action_id: int) -> str:
    """The name of the write that puts one on: what was taken off again may be put on again."""
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    return f"attach:{link.uuid}:{digest}:{action_id}"


def _subject(link: SubscriptionLink) -> str:
    return f"subscription:{link.subscription_id}:add_ons"
