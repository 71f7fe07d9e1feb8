"""Billed: every usage record at Recurly, billed or not, against the ledger; one subscription at a time."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from billingd.domain.attempts import UNFINISHED
from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.delivery import NOT_READ_BACK
from billingd.domain.drift import Drift
from billingd.domain.drift_usage import Entry, Place, compare_billed
from billingd.domain.errors import NotFound, Permanent, Retryable
from billingd.domain.events import REPORT_USAGE
from billingd.domain.usage import corrected_tag
from billingd.domain.windows import floor
from billingd.loops import Clock
from billingd.reconcile.places import place_of
from billingd.reconcile.scope import UNREAD, billed_since
from billingd.store import held, links, marks, outbox, usage
from billingd.store.drift import Run
from billingd.store.engine import Store, Tx
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.usage import Known
from billingd.store.watermarks import Watermark

SLICE_WINDOWS: Final = 5_000
"""Windows of one add-on that are compared with Recurly at once: what bounds the memory."""

PAGE: Final = 200
"""Usage records in one answer of Recurly's (recurly.md 4.7)."""

ASKED: Final = 3
"""How many others are asked for before it is believed that nobody answers."""

AROUND: Final = timedelta(seconds=1)
BEFORE: Final = timedelta(hours=1)
"""How long before its link a subscription's usage is looked for: it exists a little longer."""


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
    async def find_usage(self, usage_id: str) -> BilledUsage | None: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    def far_now(self) -> datetime: ...


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What was found of one subscription, in how many records, and how many calls it took."""

    found: list[Drift]
    records: int = 0
    held_units: int = 0
    calls: int = 0


class BilledSurvey:
    """Compares; changes nothing."""

    def __init__(self, store: Store, clock: Clock, billing: Billing, *, settling: timedelta) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._settling = settling

    async def compare(self, run: Run, mark: Watermark, link: SubscriptionLink) -> Surveyed:
        """Every usage record of one subscription at Recurly, billed or not, against the ledger.

        Raises Permanent where a restore left the ledger without what is there. What ended before it was read
        back, and is not there any more, is held: that is counted.
        """
        async with self._store.read() as tx:
            add_ons = await links.add_ons_of(tx, link.plan_id)
            unread = await marks.find(tx, marks.unread(link.subscription_id)) is not None
            sums = await held.standing(tx, kind=NOT_READ_BACK)
        if unread and (link.state != "ended" or await self._is_there(link)):
            raise Permanent(UNREAD)
        found: list[Drift] = []
        held_units = sum(one["units"] for one in sums if one["subscription_id"] == link.subscription_id)
        records = calls = 0
        since = max(billed_since(run, link, mark.length), floor(link.usage_from, mark.length))
        for add_on in add_ons:
            for start, end in _slices(since, run.until, mark.length * SLICE_WINDOWS):
                one = await self._slice(link, add_on, start, end, mark.length)
                found += one.found
                records += one.records
                held_units += one.held_units
                calls += one.calls
        async with self._store.read() as tx:
            marked = await marks.find(tx, marks.unread(link.subscription_id)) is not None
        if marked != unread or (unread and found):
            raise Permanent(UNREAD)
        return Surveyed(found, records, held_units, calls)

    async def answers(self, others: Sequence[SubscriptionLink]) -> bool:
        """Whether Recurly says anything of these, or the first few of them: then it is not away."""
        for other in others[:ASKED]:
            try:
                await self._billing.get_subscription(other.uuid)
            except Permanent:
                return True
            except Retryable:
                continue
            return True
        return False

    async def _slice(
        self, link: SubscriptionLink, add_on: AddOnLink, start: datetime, end: datetime, length: timedelta
    ) -> Surveyed:
        """Records of one add-on with a time in [start, end): first the ledger's, then Recurly's.

        In this order, what is reported meanwhile is seen as still under way.
        """
        async with self._store.read() as tx:
            place = await place_of(tx, link, add_on)
            known = await usage.of_add_on(tx, link.subscription_id, add_on.quota_id, start, end)
            sending = await self._sending(tx, link, add_on)
        given_up = sum(one.record.units for one in known if one.state in {"held", "written_off"})
        ledger = {one.record.merchant_tag: self._entry(one, sending) for one in known}
        ids = {one.record.merchant_tag: one.usage_id for one in known}
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
                ids[tag] = other.usage_id
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
        for tag in sorted(missing - by_tag.keys()):  # its tag may have been changed
            if (usage_id := ids.get(tag)) is not None:
                calls += 1
                if (its := await self._billing.find_usage(usage_id)) is not None:
                    by_tag[its.merchant_tag or ""].pop(its.id, None)
                    by_tag[tag][its.id] = its
        records = {tag: list(ones.values()) for tag, ones in by_tag.items() if ones}
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
        if not await self._is_there(link):
            return []
        why = "the subscription has no such add-on at Recurly"
        fix = f"{why}: `billingd resync` attaches it; then `billingd reconcile --repair`"
        missing = compare_billed(place, ledger, {}, foreign_from=link.usage_from, length=length)
        return [replace(one, cause=why, fix=fix, repairable=False, detail={}) for one in missing]

    async def _is_there(self, link: SubscriptionLink) -> bool:
        try:
            await self._billing.get_subscription(link.uuid)
        except NotFound:
            return False
        return True

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


def _slices(start: datetime, end: datetime, step: timedelta) -> Iterator[tuple[datetime, datetime]]:
    while start < end:
        yield start, min(start + step, end)
        start += step
