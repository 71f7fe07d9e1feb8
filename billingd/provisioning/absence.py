"""What is not found at Amplify any more: whether it was deleted, or only cannot be seen.

A service account that lost a role is told 404, and shown empty lists, of whatever it may see no more
(amplify.md 1.1), just as if all of that had been deleted. So nothing ends for its absence alone.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from billingd.domain import resync
from billingd.domain.attempts import Action, Wait
from billingd.domain.catalog import ProductPlan, Quota, Subscription, Unreadable
from billingd.domain.events import RESYNC
from billingd.domain.notices import provider_notice
from billingd.domain.resync import ABSENCE, MASS_ABSENCE
from billingd.loops import Clock
from billingd.provisioning.holding import hold
from billingd.store import absences, held, links, marks, outbox
from billingd.store.absences import Absence, Kind
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, PlanLink, SubscriptionLink

log = structlog.get_logger()

ABSENT_FOR: Final = timedelta(minutes=10)
"""How long one is absent at least before that may count: a second look comes then."""

LISTED_FOR: Final = timedelta(minutes=1)
"""How long a listing serves, so that many that are judged together are counted by one."""

LIVE: Final = ("created", "active")
"""States of the links of subscriptions that go on."""


class Marketplace(Protocol):
    """What is read at Amplify."""

    async def has_subscription(self, subscription_id: str) -> bool: ...
    async def has_product_plan(self, plan_id: str) -> bool: ...
    async def survey_subscriptions(self) -> tuple[Subscription | Unreadable, ...]: ...
    async def survey_product_plans(self) -> tuple[ProductPlan | Unreadable, ...]: ...


@dataclass(frozen=True, slots=True)
class Missing:
    """A plan or subscription that Amplify answered 404 for."""

    kind: Kind
    id: str
    name: str
    title: str
    plan_id: str | None = None
    """The plan of a subscription: it is deleted with it."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All of one kind that Amplify listed, and what was linked before it did."""

    began_at: datetime
    before: frozenset[str]
    here: frozenset[str]


class Absences:
    """Judges one absence at a time; a person is asked about all that nothing else can settle, at once."""

    def __init__(
        self, store: Store, clock: Clock, marketplace: Marketplace, *, look_again: timedelta
    ) -> None:
        self._store = store
        self._clock = clock
        self._marketplace = marketplace
        self._look_again = look_again
        self._listings: dict[Kind, Listing] = {}
        self._turn = asyncio.Lock()

    async def judge(
        self, missing: Missing, *, replaced: bool = False, harmless: bool = False
    ) -> datetime | Wait:
        """When it was over at the latest; or that this is not known yet, and why.

        1. Amplify has said that it was deleted, or its plan, or its product: it is believed.
        2. A person has said so: too.
        3. It is missing in the list too, now and ten minutes ago, while others of its kind are shown to us,
           and not too many of all that are linked are missing with it: it was deleted. One that was
           `replaced`, for its name is another's now, needs neither the ten minutes nor the others; nor does
           a `harmless` one, of which nothing is at Recurly, need the others.
        4. Otherwise a person is asked.
        """
        now = self._clock.now()
        async with self._store.read() as tx:
            at = await deleted_at(tx, missing)
            noted = await absences.find(tx, missing.kind, missing.id)
        if at is not None:
            return min(at, now)
        if noted is not None and noted.confirmed_at is not None:
            return await self._over_since(noted, now)
        if await self._is_listed(missing):
            return await self._contradicted(missing)
        async with self._store.write() as tx:
            new = Absence(missing.kind, missing.id, missing.name, missing.title, now)
            await absences.note(tx, new)
            noted = await absences.find(tx, missing.kind, missing.id)
            assert noted is not None
            if noted.held:
                await tell(tx, now)
        left = noted.since + ABSENT_FOR - now
        if left > timedelta(0) and not noted.held and not replaced:
            return Wait(left, f"{missing.title} is not found at Amplify; a second look")
        if replaced or not noted.held:
            listing = await self._list(missing.kind)
            if missing.id in listing.here:
                return await self._contradicted(missing)
            async with self._store.write() as tx:
                linked = await _linked(tx, missing.kind)
                open_ = await _missing(tx, missing, linked, listing)
                many = resync.too_many(len(open_), len(linked))
                shown = not linked.keys().isdisjoint(listing.here)
                if (shown or replaced or harmless) and not many:
                    return await self._over_since(noted, now, tx)
                if many:
                    for one in open_.values():
                        await absences.note(tx, Absence(one.kind, one.id, one.name, one.title, now))
                await absences.hold(tx, missing.kind, [*open_] if many else [missing.id])
                await tell(tx, now)
        return Wait(self._look_again, f"{missing.title} is not found at Amplify: see {MASS_ABSENCE}")

    async def seen(self, kind: Kind, id_: str) -> None:
        """It is there (again): nothing is asked about it any more."""
        async with self._store.read() as tx:
            noted = await absences.find(tx, kind, id_)
        if noted is not None:
            async with self._store.write() as tx:
                await settled(tx, kind, [id_], self._clock.now())

    async def judge_quotas(
        self, plan: ProductPlan, expected: Collection[str], quotas: Iterable[Quota], *, asked_by: int
    ) -> Wait | None:
        """Wait while this list of a plan's quotas says nothing, for it lacks one of the `expected` (ids).

        Amplify tells of a deletion. Of one that nobody told, two lists say it that the same action
        (`asked_by`) was shown, ten minutes apart, and neither of them empty; until it is listed again.
        """
        now = self._clock.now()
        listed = {one.id for one in quotas}
        name = marks.unseen(plan.id)
        async with self._store.read() as tx:
            unseen = set(expected) - listed - await gone_quotas(tx, plan.id, expected)
            mark = await marks.find(tx, name)
        if not unseen and mark is None:
            return None
        before: Mapping[str, Any] = {} if mark is None else mark.detail
        judged = set(before.get("gone", ())) - listed
        since = now
        if mark is not None and mark.at <= now and before["by"] == asked_by:
            since = mark.at if unseen <= set(before["unseen"]) else now
        if unseen and listed and since + ABSENT_FOR <= now:
            log.warning("absence.quotas_gone", plan=plan.name, quotas=sorted(unseen))
            judged, unseen = judged | unseen, set()
        async with self._store.write() as tx:
            if unseen or judged:
                detail = {"by": asked_by, "unseen": sorted(unseen), "gone": sorted(judged)}
                await marks.note(tx, name, at=since, detail=detail)
            else:
                await marks.clear(tx, name)
        if not unseen:
            return None
        left = since + ABSENT_FOR - now
        delay = left if left > timedelta(0) else self._look_again
        return Wait(delay, f"Amplify does not list {len(unseen)} quota(s) of {plan.title}; a second look")

    async def _is_listed(self, missing: Missing) -> bool:
        if missing.kind == "plan":
            return await self._marketplace.has_product_plan(missing.id)
        return await self._marketplace.has_subscription(missing.id)

    async def _contradicted(self, missing: Missing) -> Wait:
        await self.seen(missing.kind, missing.id)
        log.warning("absence.contradicted", kind=missing.kind, id=missing.id)
        return Wait(ABSENT_FOR, f"Amplify lists {missing.title}, and does not find it by its name")

    async def _list(self, kind: Kind) -> Listing:
        """All of its kind, so that what is missing with it is counted, whether it was asked about or not."""
        async with self._turn:
            now = self._clock.now()
            last = self._listings.get(kind)
            if last is not None and last.began_at <= now < last.began_at + LISTED_FOR:
                return last
            async with self._store.read() as tx:
                before = frozenset(await _linked(tx, kind))
            listed: Sequence[ProductPlan | Subscription | Unreadable]
            if kind == "plan":
                listed = await self._marketplace.survey_product_plans()
            else:
                listed = await self._marketplace.survey_subscriptions()
            made = Listing(now, before, frozenset(one.id for one in listed))
            self._listings[kind] = made
            return made

    async def _over_since(self, noted: Absence, now: datetime, tx: Tx | None = None) -> datetime:
        """Since it was first missed, unless it was served later, which is counted in any case."""
        if noted.kind != "subscription":
            return now
        if tx is None:
            async with self._store.read() as reading:
                served = await absences.served_until(reading, noted.id)
        else:
            served = await absences.served_until(tx, noted.id)
        return min(max(noted.since, served or noted.since), now)


def of_plan(link: PlanLink) -> Missing:
    """A linked plan."""
    return Missing("plan", link.plan_id, link.name, link.title)


def of_subscription(subscription_id: str, name: str, link: SubscriptionLink | None) -> Missing:
    """A subscription, linked or not."""
    if link is None:
        return Missing("subscription", subscription_id, name, name)
    return Missing("subscription", subscription_id, link.name, link.title, link.plan_id)


async def deleted_at(tx: Tx, missing: Missing) -> datetime | None:
    """When Amplify said that it was deleted: it, or what it is deleted with (amplify.md 2.5)."""
    return (await deletions(tx, {missing.id: missing.plan_id}, missing.kind)).get(missing.id)


async def deletions(tx: Tx, asked: Mapping[str, str | None], kind: Kind) -> dict[str, datetime]:
    """The same of many: ids, each with the plan's where it is a subscription's."""
    own = await absences.deleted(tx, kind, list(asked))
    plan_ids = {one: one for one in asked} if kind == "plan" else dict(asked)
    wanted = {plan_id for one, plan_id in plan_ids.items() if plan_id is not None and one not in own}
    with_product = await absences.deleted_with_product(tx, wanted)
    with_plan = with_product | await absences.deleted(tx, "plan", wanted)
    inherited = {
        one: with_plan[plan_id]
        for one, plan_id in plan_ids.items()
        if plan_id is not None and plan_id in with_plan
    }
    return inherited | own


async def gone_quotas(tx: Tx, plan_id: str, ids: Collection[str]) -> set[str]:
    """Which of these quotas of a plan are known to be deleted: Amplify said so, or `judge_quotas`."""
    mark = await marks.find(tx, marks.unseen(plan_id))
    judged = set() if mark is None else set(mark.detail["gone"])
    return set(await absences.deleted(tx, "quota", ids)) | (judged & set(ids))


async def all_gone_quotas(tx: Tx, linked: Iterable[AddOnLink]) -> set[str]:
    """The same of the quotas of all plans."""
    ids = {one.quota_id for one in linked}
    judged = {id_ for mark in await marks.all_unseen(tx) for id_ in mark.detail["gone"]}
    return set(await absences.deleted(tx, "quota", ids)) | (judged & ids)


async def settled(tx: Tx, kind: Kind, ids: Collection[str], now: datetime) -> None:
    """These were seen again, or have ended: nothing is asked about them any more."""
    if await absences.clear(tx, kind, ids):
        await tell(tx, now)


async def tell(tx: Tx, now: datetime) -> None:
    """Hold all that a person is asked about as one item, which confirms just what it names."""
    asked = [one for one in await absences.everything(tx) if one.held and one.confirmed_at is None]
    standing = await held.standing(tx, subject=ABSENCE)
    if not asked:
        if standing:
            await held.close(tx, subject=ABSENCE, resolution="none of it is missing any more", now=now)
        return
    named = {kind: [one.id for one in asked if one.kind == kind] for kind in ("plan", "subscription")}
    for item in standing:
        before: Mapping[str, Collection[str]] = item["action"]["args"]
        if any(set(ids) - set(before.get(kind, ())) for kind, ids in named.items()):
            # who was shown the shorter list cannot release the longer one
            await held.close_one(tx, item["id"], resolution="more is missing by now", now=now)
    reason = resync.mass_reason(asked, examples=len(asked))
    again = Action(RESYNC, RESYNC, "", named)
    one_item = Hold(MASS_ABSENCE, ABSENCE, reason, again)
    if standing:
        await held.add(tx, one_item, now=now)
        return
    title = (
        "Much is missing at Amplify at once" if len(asked) > 1 else f"{asked[0].title} is missing at Amplify"
    )
    notice = provider_notice(f"held:{MASS_ABSENCE}:{now.isoformat()}", title, resync.mass_reason(asked))
    await hold(tx, one_item, notice, now=now)


async def confirmed(tx: Tx, named: Mapping[str, Collection[str]], now: datetime) -> None:
    """A person has released what `tell` held: what it named is gone, and whoever waits for that goes on."""
    await absences.confirm(tx, "plan", named.get("plan", ()), now=now)
    await absences.confirm(tx, "subscription", named.get("subscription", ()), now=now)
    ids = {*named.get("plan", ()), *named.get("subscription", ())}
    for kind in resync.ASKING:
        rows = await outbox.select(tx, states=["pending"], kind=kind)
        if waiting := [row["id"] for row in rows if row["args"].get("id") in ids]:
            await outbox.retry(tx, waiting, now=now)


async def _linked(tx: Tx, kind: Kind) -> dict[str, Missing]:
    """What is linked and live, by id."""
    if kind == "plan":
        return {one.plan_id: of_plan(one) for one in await links.plans(tx) if one.state != "removed"}
    live = await links.subscriptions(tx, states=LIVE)
    return {one.subscription_id: of_subscription(one.subscription_id, one.name, one) for one in live}


async def _missing(
    tx: Tx, missing: Missing, linked: Mapping[str, Missing], listing: Listing
) -> dict[str, Missing]:
    """Whatever of a kind is not listed, and is neither known nor said to be deleted; by id."""
    kind = missing.kind
    noted = {one.id: one for one in await absences.everything(tx) if one.kind == kind}
    gone = {id_: one for id_, one in linked.items() if id_ in listing.before and id_ not in listing.here}
    for id_, one in noted.items():
        if id_ not in listing.here:
            gone.setdefault(id_, Missing(kind, id_, one.name, one.title))
    gone[missing.id] = missing
    explained = await deletions(tx, {id_: one.plan_id for id_, one in gone.items()}, kind)
    settled_ = explained.keys() | {id_ for id_, one in noted.items() if one.confirmed_at is not None}
    return {id_: one for id_, one in gone.items() if id_ not in settled_}
