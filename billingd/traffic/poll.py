"""Poll: reads windows of traffic from Amplify and records what is new as usage, once."""

import asyncio
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.errors import NotFound
from billingd.domain.usage import Reading
from billingd.domain.windows import Window, floor, settled_end, shared_edge
from billingd.loops import Clock
from billingd.store import links, usage, watermarks
from billingd.store.engine import Store
from billingd.store.watermarks import Watermark
from billingd.traffic.keep import Keeper, Key

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

        Returns the units booked (`traffic backfill`). Raises NotFound when that subscription is not linked.
        """
        async with self._store.read() as tx:
            if subscription is not None and await links.find_subscription(tx, subscription) is None:
                raise NotFound(f"no subscription with the id {subscription} is linked")
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
            keeper = Keeper(tx, linked, add_ons, now)
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
