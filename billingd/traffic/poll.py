"""Poll: reads windows of traffic from Amplify and records what is new as usage, once."""

import asyncio
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Action
from billingd.domain.notices import provider_notice
from billingd.domain.usage import Reading, UsageRecord, book
from billingd.domain.windows import Window, floor, settled_end, shared_edge
from billingd.loops import Clock
from billingd.store import held, links, outbox, usage, watermarks
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.watermarks import Watermark
from billingd.traffic.report import report_action

log = structlog.get_logger()

WINDOWS_MAX: Final = 24
"""Windows in one reading: bounds the size of an answer, of a transaction, and the memory for both."""


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


class TrafficPoller:
    """Moves one source's watermark. What is read is recorded here and told to Recurly by the outbox."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        source: Traffic,
        *,
        length: timedelta,
        settle: timedelta,
        horizon: timedelta,
        wake_outbox: asyncio.Event,
    ) -> None:
        self._store = store
        self._clock = clock
        self._source = source
        self._length = length
        self._settle = settle
        self._horizon = horizon
        self._wake_outbox = wake_outbox
        self.wake = asyncio.Event()
        self._reading = asyncio.Lock()

    async def run_once(self) -> bool:
        """Read every settled window that is new, and trailing ones again for late traffic.

        Trailing windows reach back to `horizon` before the watermark, but never before the moment the
        current window length came into force. Returns False: the schedule says when to look again.
        """
        async with self._reading:
            await self._poll()
        return False

    async def _poll(self) -> None:
        mark = await self._begin()
        while mark.length != self._length:  # stop at the edge where the new length comes into force
            edge = shared_edge(mark.at, mark.length, self._length)
            mark = await self._read_settled(mark, before=edge)
            if mark.at < edge:
                return
            mark = await self._begin()
        await self._read_settled(mark)

    async def _read_settled(self, mark: Watermark, *, before: datetime | None = None) -> Watermark:
        now = self._clock.now()
        end = settled_end(mark.at, now, length=mark.length, settle=self._settle)
        end = end if before is None else min(end, before)
        start = max(mark.regular_since, _ceil(mark.at - self._horizon, mark.length))
        step = mark.length * WINDOWS_MAX
        while start < end:
            upto = min(start + step, end)
            mark = await self._read(mark, start, upto, advance_to=max(mark.at, upto))
            start = upto
        return mark

    async def read_range(self, since: datetime, until: datetime, *, subscription: str | None = None) -> int:
        """Read past windows again, of one subscription or of all, and book only differences.

        Returns the units booked (`traffic backfill`).
        """
        async with self._reading:
            mark = await self._begin()
            start = max(floor(since, mark.length), mark.regular_since)
            stop = min(_ceil(until, mark.length), mark.at)
            booked = 0
            while start < stop:
                upto = min(start + mark.length * WINDOWS_MAX, stop)
                before = await self._recorded_units(start, upto)
                mark = await self._read(mark, start, upto, advance_to=mark.at, only=subscription)
                booked += await self._recorded_units(start, upto) - before
                start = upto
            return booked

    async def _recorded_units(self, start: datetime, end: datetime) -> int:
        async with self._store.read() as tx:
            return sum(one.units for one in (await usage.sums(tx, start, end)).values())

    async def _begin(self) -> Watermark:
        """The watermark; on the first start it begins with the current window.

        A changed `traffic.window` comes into force at the first edge that both lengths share, so that no
        window is ever read in two sizes. A changed `traffic.source` goes on where the other one is, so that
        no window is left out, or read in another size.
        """
        now = self._clock.now()
        async with self._store.write() as tx:
            mark = await watermarks.find(tx, self._source.name)
            ahead = await watermarks.furthest(tx)
            if ahead is not None and (mark is None or mark.at < ahead.at):
                await watermarks.take_over(tx, self._source.name, ahead, now=now)
            await watermarks.begin(tx, self._source.name, floor(now, self._length), self._length, now=now)
            mark = await watermarks.find(tx, self._source.name)
            assert mark is not None
            if mark.length != self._length and shared_edge(mark.at, mark.length, self._length) == mark.at:
                await watermarks.change_length(tx, mark, self._length, now=now)
                log.warning(
                    "traffic.window_changed", at=mark.at.isoformat(), seconds=self._length.total_seconds()
                )
                mark = Watermark(mark.source, mark.at, self._length, mark.at)
        return mark

    async def _read(
        self,
        mark: Watermark,
        start: datetime,
        end: datetime,
        *,
        advance_to: datetime,
        only: str | None = None,
    ) -> Watermark:
        """Read [start, end) and keep what it says, in one transaction with the watermark.

        `only` bounds what is kept to one subscription.
        """
        async with self._store.read() as tx:
            linked = {one.subscription_id: one for one in await links.subscriptions(tx)}
            add_ons = await links.add_ons(tx)
        readings: tuple[Reading, ...] = ()
        if linked:
            readings = await self._source.read(
                organizations={one.organization_id for one in linked.values() if one.organization_id},
                units={one.unit for one in add_ons.values()},
                subscriptions=set(linked),
                quotas=set(add_ons),
                start=start,
                end=end,
                length=mark.length,
            )
        counted = _by_window(readings, mark.length)
        now = self._clock.now()
        async with self._store.write() as tx:
            await watermarks.advance(tx, mark, advance_to, now=now)  # first: it locks out a second reader
            linked = {one.subscription_id: one for one in await links.subscriptions(tx)}  # some ended since
            keeper = _Keeper(tx, linked, add_ons, now)
            recorded = await usage.sums(tx, start, end)
            if only is not None:
                counted = {key: units for key, units in counted.items() if key[0] == only}
                recorded = {key: known for key, known in recorded.items() if key[0] == only}
            await keeper.keep(counted, recorded)
        if keeper.records or advance_to > mark.at:
            log.info(
                "traffic.read",
                start=start.isoformat(),
                end=end.isoformat(),
                readings=len(readings),
                records=keeper.records,
                units=keeper.units,
                unlinked_units=keeper.unlinked_units,
            )
        if keeper.records:
            self._wake_outbox.set()
        return Watermark(mark.source, advance_to, mark.length, mark.regular_since)


Key = tuple[str, str, Window]
"""(subscription id, quota id, window)"""


def _by_window(readings: Iterable[Reading], length: timedelta) -> dict[Key, int]:
    """Readings summed by what they count, for a source may answer in several rows (one per application)."""
    counted: dict[Key, int] = {}
    for reading in readings:
        window = Window(reading.window_start, reading.window_start + length)
        key = (reading.subscription_id, reading.quota_id, window)
        counted[key] = counted.get(key, 0) + reading.units
    return counted


def _ceil(moment: datetime, length: timedelta) -> datetime:
    """The earliest window edge at or after `moment`."""
    edge = floor(moment, length)
    return edge if edge == moment else edge + length


def _reading_subject(key: Key) -> str:
    subscription_id, quota_id, window = key
    return f"reading:{subscription_id}:{quota_id}:{window.start.isoformat()}"


def _after_end(link: SubscriptionLink, window: Window) -> bool:
    """Whether nothing that was counted in that window may be billed any more without a person's word."""
    return link.state == "ended" or (link.usage_until is not None and window.start >= link.usage_until)


class _Keeper:
    """Keeps one reading in one transaction: usage records with their actions, and what does not fit."""

    def __init__(
        self, tx: Tx, linked: dict[str, SubscriptionLink], add_ons: dict[str, AddOnLink], now: datetime
    ) -> None:
        self._tx = tx
        self._linked = linked
        self._add_ons = add_ons
        self._now = now
        self.records = 0
        self.units = 0
        self.unlinked_units = 0

    async def keep(self, counted: dict[Key, int], recorded: dict[Key, usage.Sum]) -> None:
        """Book differences; hold readings that shrank; count traffic of nobody."""
        new: list[UsageRecord] = []
        late: list[UsageRecord] = []
        for key, units in sorted(counted.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])):
            subscription_id, quota_id, window = key
            link = self._linked.get(subscription_id)
            add_on = self._add_ons.get(quota_id)
            if not self._billable(link, add_on, window):
                if units:
                    self.unlinked_units += units
                    await usage.set_unlinked(
                        self._tx, subscription_id, quota_id, window.start, units, now=self._now
                    )
                continue
            assert link is not None
            known = recorded.get(key, usage.Sum(0, 0))
            records = book(
                subscription_id, quota_id, window, read=units, recorded=known.units, revisions=known.revisions
            )
            (late if _after_end(link, window) else new).extend(records)
        shrunk = [key for key, known in recorded.items() if counted.get(key, 0) < known.units]
        for key in shrunk:
            await self._hold_shrunk(key, read=counted.get(key, 0), recorded=recorded[key].units)
        await self._mended(recorded.keys() - set(shrunk))
        await self._record(new)
        await self._hold_late(late)

    @staticmethod
    def _billable(link: SubscriptionLink | None, add_on: AddOnLink | None, window: Window) -> bool:
        """Whether traffic of that window belongs to a link: from `usage_from` on, of the linked plan."""
        if link is None or add_on is None or add_on.plan_id != link.plan_id:
            return False
        return window.start >= link.usage_from

    async def _record(self, records: list[UsageRecord]) -> None:
        placed = await usage.insert(self._tx, records, now=self._now)
        await outbox.insert(self._tx, [report_action(id_, record) for id_, record in placed], now=self._now)
        self.records += len(placed)
        self.units += sum(record.units for _, record in placed)

    async def _hold_late(self, records: list[UsageRecord]) -> None:
        """Usage that shows up after its subscription ended at Recurly, where no invoice would ever carry it,
        or that was counted after its end at Amplify, where nothing should have been served.
        """
        for id_, record in await usage.insert(self._tx, records, now=self._now, state="held"):
            link = self._linked[record.subscription_id]
            when = "arrived after" if link.state == "ended" else "were counted after"
            where = "Recurly" if link.state == "ended" else "Amplify"
            reason = (
                f"{record.units} unit(s) of {self._add_ons[record.quota_id].title} in the window from "
                f"{record.window.start.isoformat()} {when} subscription {link.title} ended at {where}."
            )
            await self._hold("usage_after_end", record, report_action(id_, record), reason)

    async def _hold(self, kind: str, record: UsageRecord, action: Action, reason: str) -> None:
        item = Hold(
            kind,
            f"usage:{record.merchant_tag}",
            reason,
            action,
            subscription_id=record.subscription_id,
            add_on_code=self._add_ons[record.quota_id].add_on_code,
            units=record.units,
        )
        await self._tell(item)

    async def _hold_shrunk(self, key: Key, *, read: int, recorded: int) -> None:
        subscription_id, quota_id, window = key
        reason = (
            f"Amplify now counts {read} unit(s) for the window from {window.start.isoformat()}, where "
            f"{recorded} were recorded before. Totals of a past window only grow, so nothing was taken back. "
            "Compare both sides; credit the difference at Recurly if it was never served."
        )
        item = Hold(
            "reading_shrank",
            _reading_subject(key),
            reason,
            subscription_id=subscription_id,
            add_on_code=self._add_ons[quota_id].add_on_code if quota_id in self._add_ons else None,
            units=recorded - read,
        )
        await self._tell(item)

    async def _mended(self, agreeing: Collection[Key]) -> None:
        """Readings that had shrunk and have grown back are held no longer."""
        if not agreeing:
            return
        standing = {row["subject"] for row in await held.standing(self._tx, kind="reading_shrank")}
        for key in agreeing:
            if (subject := _reading_subject(key)) in standing:
                await held.close(self._tx, subject=subject, resolution="the reading grew back", now=self._now)

    async def _tell(self, item: Hold) -> None:
        if await held.add(self._tx, item, now=self._now):
            log.warning("held", held_kind=item.kind, about=item.subject, reason=item.reason)
            notice = provider_notice(
                f"held:{item.kind}:{item.subject}", "Usage is held, not billed", item.reason
            )
            await outbox.insert(self._tx, [notice], now=self._now)
