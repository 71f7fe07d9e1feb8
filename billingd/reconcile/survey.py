"""Survey: reads both far sides piece by piece, and compares each piece with the ledger."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from billingd.domain.attempts import UNFINISHED
from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.drift import Drift, Entry, Place, compare_billed, compare_served
from billingd.domain.errors import NotFound
from billingd.domain.events import REPORT_USAGE
from billingd.domain.usage import Reading, corrected_tag
from billingd.domain.windows import Window, floor
from billingd.loops import Clock
from billingd.store import links, outbox, periods, usage
from billingd.store.drift import Run
from billingd.store.engine import Store, Tx
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.usage import Known
from billingd.store.watermarks import Watermark

SLICE_WINDOWS: Final = 5_000
"""Windows of one add-on that are compared with Recurly at once: what bounds the memory."""

PAGE: Final = 200
"""Usage records in one answer of Recurly's (recurly.md 4.7)."""

AROUND: Final = timedelta(seconds=1)
BEFORE: Final = timedelta(hours=1)
"""How long before its link a subscription's usage is looked for: it exists a little longer."""

READS_MAX: Final = 3

Key = tuple[str, str, Window]
"""(subscription id, quota id, window)"""


class Traffic(Protocol):
    """Where traffic is counted."""

    name: str

    async def read(
        self,
        *,
        organizations: Collection[str],
        units: Collection[str],
        subscriptions: Collection[str],
        quotas: Collection[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> tuple[Reading, ...]: ...


class Billing(Protocol):
    """What is read at Recurly."""

    async def list_usage(
        self,
        subscription_uuid: str,
        add_on_code: str,
        *,
        begin: datetime,
        end: datetime,
        status: Literal["all", "unbilled"] = "all",
    ) -> tuple[BilledUsage, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    def far_now(self) -> datetime: ...


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What was found of one subscription, in how many records, and how many calls it took."""

    found: list[Drift]
    records: int = 0
    held_units: int = 0
    calls: int = 0


class Survey:
    """Compares; changes nothing."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        source: Traffic,
        billing: Billing,
        *,
        horizon: timedelta,
        settling: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._source = source
        self._billing = billing
        self._horizon = horizon
        self._settling = settling

    async def served(self, run: Run, mark: Watermark, start: datetime, end: datetime) -> list[Drift]:
        """Windows of [start, end) as Amplify counts them now, for all subscriptions at once.

        The ledger is looked at before and after: what a poll books meanwhile is no drift.
        """
        async with self._store.read() as tx:
            linked = {
                one.subscription_id: one
                for one in await links.subscriptions(tx)
                if run.subscription_id in {None, one.subscription_id} and one.usage_from < end
            }
            add_ons = await links.add_ons(tx)
        if not linked or not add_ons:
            return []
        for _ in range(READS_MAX):
            before = await self._recorded(start, end, mark.length, linked)
            counted = await self._counted(linked, add_ons, set(linked), set(add_ons), start, end, mark.length)
            after = await self._recorded(start, end, mark.length, linked)
            if before == after:
                break
        differing = {}
        for key in counted.keys() | before.keys() | after.keys():
            link, add_on = linked.get(key[0]), add_ons.get(key[1])
            if link is None or add_on is None or add_on.plan_id != link.plan_id:
                continue  # traffic of nobody: counted as such by the poll
            served, low, high = counted.get(key, 0), before.get(key, 0), after.get(key, 0)
            if not min(low, high) <= served <= max(low, high) and key[2].end > link.usage_from:
                differing[key] = served
        again_from = _ceil(mark.at - self._horizon, mark.length)
        found = []
        for key, served in sorted(differing.items(), key=lambda item: (item[0][2], item[0][:2])):
            link, add_on, window = linked[key[0]], add_ons[key[1]], key[2]
            if window.start < link.usage_from:  # the link began in it: only what came after is billed here
                served = await self._since_link(link, add_on, window)
            async with self._store.read() as tx:
                place = await _place(tx, link, add_on)
            recorded = after.get(key, 0) if served > after.get(key, 0) else before.get(key, 0)
            drift = compare_served(
                place, window, served=served, recorded=recorded, read_again_from=again_from
            )
            if drift is not None:
                found.append(drift)
        return found

    async def _recorded(
        self, start: datetime, end: datetime, length: timedelta, linked: Collection[str]
    ) -> dict[Key, int]:
        """What the ledger has, by regular window."""
        recorded: dict[Key, int] = defaultdict(int)
        async with self._store.read() as tx:
            sums = await usage.sums(tx, start, end)
        for (subscription_id, quota_id), pieces in sums.items():
            if subscription_id in linked:
                for piece, booked in pieces.items():
                    at = floor(piece.start, length)
                    recorded[subscription_id, quota_id, Window(at, at + length)] += booked.units
        return dict(recorded)

    async def _counted(
        self,
        linked: dict[str, SubscriptionLink],
        add_ons: dict[str, AddOnLink],
        subscriptions: set[str],
        quotas: set[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> dict[Key, int]:
        """What Amplify counts, by window; a source may answer in several rows."""
        readings = await self._source.read(
            organizations={linked[one].organization_id for one in subscriptions} - {""},
            units={add_ons[one].unit for one in quotas},
            subscriptions=subscriptions,
            quotas=quotas,
            start=start,
            end=end,
            length=length,
        )
        counted: dict[Key, int] = defaultdict(int)
        for one in readings:
            window = Window(one.window_start, one.window_start + length)
            counted[one.subscription_id, one.quota_id, window] += one.units
        return dict(counted)

    async def _since_link(self, link: SubscriptionLink, add_on: AddOnLink, window: Window) -> int:
        """What was counted in the part of a window that came after the link."""
        counted = await self._counted(
            {link.subscription_id: link},
            {add_on.quota_id: add_on},
            {link.subscription_id},
            {add_on.quota_id},
            link.usage_from,
            window.end,
            window.end - link.usage_from,
        )
        pair = (link.subscription_id, add_on.quota_id)
        return sum(units for key, units in counted.items() if key[:2] == pair)

    async def billed(self, run: Run, mark: Watermark, link: SubscriptionLink) -> Surveyed:
        """Every usage record of one subscription at Recurly, billed or not, against the ledger."""
        async with self._store.read() as tx:
            add_ons = await links.add_ons_of(tx, link.plan_id)
        found: list[Drift] = []
        records = held_units = calls = 0
        since = max(run.since, floor(link.usage_from, mark.length))
        for add_on in add_ons:
            for start, end in _slices(since, run.until, mark.length * SLICE_WINDOWS):
                one = await self._slice(link, add_on, start, end, mark.length)
                found += one.found
                records += one.records
                held_units += one.held_units
                calls += one.calls
        return Surveyed(found, records, held_units, calls)

    async def _slice(
        self, link: SubscriptionLink, add_on: AddOnLink, start: datetime, end: datetime, length: timedelta
    ) -> Surveyed:
        """Records of one add-on with a time in [start, end): first the ledger's, then Recurly's.

        In this order, what is reported meanwhile is seen as still under way.
        """
        async with self._store.read() as tx:
            place = await _place(tx, link, add_on)
            known = await usage.of_add_on(tx, link.subscription_id, add_on.quota_id, start, end)
            sending = await self._sending(tx, link, add_on)
        given_up = sum(one.record.units for one in known if one.state in {"held", "written_off"})
        ledger = {one.record.merchant_tag: self._entry(one, sending) for one in known}
        try:
            there = await self._billing.list_usage(link.uuid, add_on.add_on_code, begin=start, end=end)
        except NotFound:
            return Surveyed(await self._nowhere(link, place, ledger, length), len(known), given_up, 2)
        by_tag: dict[str, dict[str, BilledUsage]] = defaultdict(dict)
        for one in there:
            if start <= one.usage_timestamp < end:
                by_tag[one.merchant_tag or ""][one.id] = one
        calls = 1 + len(there) // PAGE
        async with self._store.read() as tx:
            bases = {corrected_tag(tag) or tag for tag in by_tag}
            others = await usage.by_tags(tx, sorted(bases - ledger.keys() - {""}))
        for tag, other in others.items():
            pair = (other.record.subscription_id, other.record.quota_id)
            if pair == (link.subscription_id, add_on.quota_id):  # moved here, or recorded just now
                ledger[tag] = self._entry(other, {other.id})
                at = other.record.usage_timestamp
                if not start <= at < end:
                    calls += await self._look(link, add_on, at - AROUND, at + AROUND, {tag}, by_tag)
        if missing := {
            tag
            for tag, entry in ledger.items()
            if tag not in by_tag and not entry.under_way and entry.state in {"recorded", "reported"}
        }:  # somebody may have moved them: they are looked for wherever they may be
            begin, now = min(link.usage_from, link.linked_at) - BEFORE, self._billing.far_now()
            for one_start, one_end in _slices(begin, now, length * SLICE_WINDOWS):
                calls += await self._look(link, add_on, one_start, one_end, missing, by_tag)
        records = {tag: list(ones.values()) for tag, ones in by_tag.items()}
        found = compare_billed(place, ledger, records, foreign_from=link.usage_from, length=length)
        return Surveyed(list(found), len(known), given_up, calls)

    async def _look(
        self,
        link: SubscriptionLink,
        add_on: AddOnLink,
        begin: datetime,
        end: datetime,
        tags: Collection[str],
        by_tag: dict[str, dict[str, BilledUsage]],
    ) -> int:
        """Add what carries one of these tags in a stretch of time; how many calls it took."""
        there = await self._billing.list_usage(link.uuid, add_on.add_on_code, begin=begin, end=end)
        for one in there:
            if one.merchant_tag is not None and one.merchant_tag in tags:
                by_tag[one.merchant_tag][one.id] = one
        return 1 + len(there) // PAGE

    async def _nowhere(
        self, link: SubscriptionLink, place: Place, ledger: dict[str, Entry], length: timedelta
    ) -> list[Drift]:
        """Recurly has no such add-on on the subscription; where it has no such subscription, links tell."""
        try:
            await self._billing.get_subscription(link.uuid)
        except NotFound:
            return []
        why = "the subscription has no such add-on at Recurly"
        fix = f"{why}: `billingd resync` attaches it; then `billingd reconcile --repair`"
        missing = compare_billed(place, ledger, {}, foreign_from=link.usage_from, length=length)
        return [replace(one, cause=why, fix=fix, repairable=False, detail={}) for one in missing]

    @staticmethod
    async def _sending(tx: Tx, link: SubscriptionLink, add_on: AddOnLink) -> set[int]:
        """The records of an add-on whose reports are still to come."""
        subject = f"usage:{link.subscription_id}:{add_on.quota_id}"
        rows = await outbox.select(tx, states=UNFINISHED, kind=REPORT_USAGE, subject=subject)
        return {int(row["args"]["record"]) for row in rows}

    def _entry(self, one: Known, sending: Collection[int]) -> Entry:
        """Lists may lag behind writes: what has just been reported is not missed yet."""
        fresh = one.reported_at is not None and one.reported_at > self._clock.now() - self._settling
        under_way = fresh if one.state == "reported" else one.id in sending
        return Entry(one.id, one.record, one.state, under_way)


async def _place(tx: Tx, link: SubscriptionLink, add_on: AddOnLink) -> Place:
    known = await periods.of(tx, link.subscription_id)
    return Place(
        link.subscription_id,
        add_on.quota_id,
        add_on.add_on_code,
        add_on.tier_type,
        link.billed_state,
        tuple(known),
    )


def _slices(start: datetime, end: datetime, step: timedelta) -> Iterator[tuple[datetime, datetime]]:
    while start < end:
        yield start, min(start + step, end)
        start += step


def overlapping(
    linked: Iterable[SubscriptionLink], since: datetime, until: datetime
) -> list[SubscriptionLink]:
    """Subscriptions that may have usage in [since, until)."""
    return [
        one
        for one in linked
        if one.usage_from < until
        and not (
            one.state == "ended"
            and one.usage_until is not None
            and max(one.usage_until, one.period_ends_at or one.usage_until) < since
        )
    ]


def _ceil(moment: datetime, length: timedelta) -> datetime:
    edge = floor(moment, length)
    return edge if edge == moment else edge + length
