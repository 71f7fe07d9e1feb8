"""Poll: reads windows of traffic from Amplify and records what is new as usage, once."""

import asyncio
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Action, Leased
from billingd.domain.errors import BillingdError, Retryable
from billingd.domain.events import audit_action
from billingd.domain.periods import cut, edges
from billingd.domain.usage import Booked, Reading
from billingd.domain.windows import Window, floor, next_length, settled_end
from billingd.loops import Clock
from billingd.once import DOUBTED
from billingd.store import held, links, marks, outbox, periods, usage, watermarks
from billingd.store.engine import Store, Tx
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.usage import Pair
from billingd.store.watermarks import Watermark
from billingd.traffic.keep import Keeper, Key
from billingd.traffic.periods import REFRESH_EVERY, PeriodWatch

log = structlog.get_logger()

WINDOWS_MAX: Final = 24
"""Windows in one reading: bounds the size of an answer, of a transaction, and the memory for both."""

FLUSH_LEADS: Final = (timedelta(minutes=10), timedelta(minutes=3))
"""How long before a billing period ends its usage is read up to the present, not only what has settled."""

HOUR: Final = timedelta(hours=1)

AUDIT_LEAD: Final = timedelta(seconds=90)
"""How long before a billing period ends its records are compared with Recurly's, while both can be mended."""

FLUSH_MARGIN: Final = timedelta(minutes=2)
"""How old the time of such usage is at least: Recurly takes none of the future, and clocks differ."""


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
        watch: PeriodWatch,
        *,
        length: timedelta,
        settle: timedelta,
        horizon: timedelta,
        wake_outbox: asyncio.Event,
        may_read: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._source = source
        self._watch = watch
        self._length = length
        self._settle = settle
        self._horizon = horizon
        self._wake_outbox = wake_outbox
        self._may_read = may_read
        self.wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._audited_at: datetime | None = None

    async def run_once(self) -> bool:
        """Read every settled window that is new, and trailing ones again for late traffic.

        Trailing windows reach back to `horizon` before the watermark, but never before the moment the
        current window length came into force. Subscriptions that are about to be billed are read up to the
        present; whether or not that succeeds, they are audited. Returns False: the schedule and `until_flush`
        say when to look again.
        """
        async with self._reading:
            await self._begins()
            due = await self._ask_for_audits()
            try:
                mark = await self._poll()
                await self._flush(mark)
            finally:
                now = self._clock.now()
                await self._ask({now: due}, now)
        return False

    async def look_again(self, action: Leased) -> None:
        """Handle `refresh_subscription`: its bill date may be nearer than was known."""
        await self._watch.handle(action)
        await self._wake_for_bills()

    async def watch_periods(self) -> bool:
        """See where bills end, between two polls too, so that none is near unseen. Returns False."""
        await self._watch.refresh()
        await self._wake_for_bills()
        return False

    async def _wake_for_bills(self) -> None:
        """Poll at once when a period is about to end; then `until_flush` knows how soon to poll again."""
        now = self._watch.now()
        async with self._store.read() as tx:
            ends_at = await links.next_period_end(tx, after=now)
        if ends_at is not None and ends_at <= now + FLUSH_LEADS[0] + REFRESH_EVERY:
            self.wake.set()

    async def until_flush(self) -> timedelta | None:
        """How long until a billing period is about to end; None when none is known to."""
        now = self._watch.now()
        async with self._store.read() as tx:
            ends = [(lead, await links.next_period_end(tx, after=now + lead)) for lead in FLUSH_LEADS]
        return min((ends_at - lead - now for lead, ends_at in ends if ends_at is not None), default=None)

    async def _begins(self) -> None:
        """See that windows may be booked at all, and where they are cut. Raises Retryable after a restore."""
        if self._may_read is not None:
            await self._may_read()
        await self._learn_periods()

    async def _learn_periods(self) -> None:
        """See where bills end. While Recurly is away, windows are read as far as that is known."""
        try:
            await self._watch.refresh()
        except BillingdError as error:
            log.warning("traffic.periods_not_seen", error=str(error))

    async def _poll(self) -> Watermark:
        mark = await self._begin()
        while (change := await self._next_length(mark)) is not None:  # stop where it comes into force
            edge, _ = change
            mark = await self._read_settled(mark, before=edge)
            if mark.at < edge:
                return mark
            mark = await self._begin()
        return await self._read_settled(mark)

    async def _next_length(self, mark: Watermark) -> tuple[datetime, timedelta] | None:
        async with self._store.read() as tx:
            pieces = await usage.pieces_from(tx, mark.at)
        return next_length(mark.at, mark.length, self._length, pieces)

    async def _read_settled(self, mark: Watermark, *, before: datetime | None = None) -> Watermark:
        now = self._clock.now()
        end = settled_end(mark.at, now, length=mark.length, settle=self._settle)
        end = end if before is None else min(end, before)
        if (known_until := await self._watch.known_until()) is not None:
            end = min(end, floor(known_until, mark.length))
        start = max(mark.regular_since, _ceil(mark.at - self._horizon, mark.length))
        step = mark.length * WINDOWS_MAX
        while start < end:
            upto = min(start + step, end)
            mark = await self._read(mark, start, upto, advance_to=max(mark.at, upto))
            start = upto
        return mark

    async def _flush(self, mark: Watermark) -> None:
        """Before a bill, read what has not settled yet too, so that as little as can be misses it.

        What Amplify counts later for the same windows is booked as a difference, as always.
        """
        now = self._watch.now()
        async with self._store.read() as tx:
            only = {link.subscription_id for link, _ in self._ending_soon(await links.billing(tx))}
        if not only:
            return
        start, end = mark.at, _ceil(now, mark.length)
        change = await self._next_length(mark)
        if change is not None and change[1] != self._length:  # beyond it, pieces that these windows would cut
            end = min(end, change[0])
        before = (now - FLUSH_MARGIN).replace(microsecond=0)
        while start < end:
            upto = min(start + mark.length * WINDOWS_MAX, end)
            await self._read(mark, start, upto, advance_to=mark.at, only=only, before=before)
            start = upto

    def _ending_soon(self, billing: Iterable[SubscriptionLink]) -> list[tuple[SubscriptionLink, datetime]]:
        """Those whose billing period is about to end, and when it does."""
        now = self._watch.now()
        return [
            (link, link.period_ends_at)
            for link in billing
            if link.linked_at < now - FLUSH_MARGIN
            and link.period_ends_at is not None
            and now < link.period_ends_at <= now + FLUSH_LEADS[0]
        ]

    async def _ask_for_audits(self) -> list[Action]:
        """Each open cycle is compared with the ledger right before its bill, and once a day.

        Returns those that are due before a bill already: they compare what is yet to be read. The daily ones
        come in an hour of their own for each subscription: all at once, thousands would hold up the reports.
        """
        now = self._clock.now()
        async with self._store.read() as tx:
            billing = await links.billing(tx)
            doubts = await held.standing(tx, kind=DOUBTED)
        due: list[Action] = []
        asked: dict[datetime, list[Action]] = defaultdict(list)
        for link, ends_at in self._ending_soon(billing):
            audit = audit_action(link.subscription_id, because=f"period:{ends_at:%Y%m%dT%H%M%S}")
            wait = ends_at - AUDIT_LEAD - self._watch.now()
            if wait > timedelta(0):
                asked[now + wait].append(audit)
            else:
                due.append(audit)
        # what was doubted may be over since, and only an audit ends a doubt
        doubted = {item["subscription_id"] for item in doubts} - {None}
        for about in {**dict.fromkeys(link.subscription_id for link in billing), **dict.fromkeys(doubted)}:
            at = audit_due(about, now)
            # Nobody knows when the process before this one asked; the outbox knows what it asked for.
            if self._audited_at is None or self._audited_at < at:
                spread = audit_spread(about) if self._audited_at is None else timedelta(0)
                asked[now + spread].append(audit_action(about, because=f"{at:%Y%m%dT%H}"))
        await self._ask(asked, now)
        self._audited_at = now
        return due

    async def _ask(self, audits: Mapping[datetime, Sequence[Action]], now: datetime) -> None:
        """Ask for audits by when they are due, all in one transaction; the outbox drops what it knows."""
        if not any(audits.values()):
            return
        async with self._store.write() as tx:
            new = [await outbox.insert(tx, each, now=now, due_at=at) for at, each in audits.items()]
        if any(new):
            self._wake_outbox.set()

    async def read_range(self, since: datetime, until: datetime, *, subscription: str | None = None) -> int:
        """Read past windows again, of one subscription or of all, and book only differences.

        Returns the units booked (`traffic backfill`). Raises NotFound when that subscription is not linked.
        """
        only = None
        if subscription is not None:
            async with self._store.read() as tx:
                only = {(await links.meant(tx, subscription)).subscription_id}
        async with self._reading:
            await self._begins()
            mark = await self._begin()
            start = max(floor(since, mark.length), mark.regular_since)
            stop = min(_ceil(until, mark.length), mark.at)
            booked = 0
            while start < stop:
                upto = min(start + mark.length * WINDOWS_MAX, stop)
                before = await self._recorded_units(start, upto)
                mark = await self._read(mark, start, upto, advance_to=mark.at, only=only)
                booked += await self._recorded_units(start, upto) - before
                start = upto
            return booked

    async def _recorded_units(self, start: datetime, end: datetime) -> int:
        async with self._store.read() as tx:
            recorded = (await usage.sums(tx, start, end)).values()
        return sum(one.units for pieces in recorded for one in pieces.values())

    async def _begin(self) -> Watermark:
        """The watermark; on the first start it begins with the current window.

        A changed `traffic.window` comes into force at the first edge that both lengths share, so that no
        window is ever read in two sizes; not before the end of what is recorded in another size. A changed
        `traffic.source` goes on where the other one is, so that no window is left out, or read in another
        size.
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
            pieces = await usage.pieces_from(tx, mark.at)
            while (change := next_length(mark.at, mark.length, self._length, pieces)) is not None:
                edge, length = change
                if edge != mark.at:
                    break
                await watermarks.change_length(tx, mark, length, now=now)
                log.warning("traffic.window_changed", at=mark.at.isoformat(), seconds=length.total_seconds())
                mark = Watermark(mark.source, mark.at, length, mark.at)
        return mark

    async def _read(
        self,
        mark: Watermark,
        start: datetime,
        end: datetime,
        *,
        advance_to: datetime,
        only: Collection[str] | None = None,
        before: datetime | None = None,
    ) -> Watermark:
        """Read [start, end) and keep what it says, in one transaction with the watermark.

        `only` bounds what is kept to some subscriptions; `before`: no record's time is that late or later.
        What is yet to be read back from Recurly is only counted, and read again then.
        """
        async with self._store.read() as tx:
            known = await self._known(tx, start, end, mark.length, only)
        readings: tuple[Reading, ...] = ()
        if known.linked:
            readings = await self._source.read(
                organizations=_organizations(known.linked.values(), start),
                units={one.unit for one in known.add_ons.values()},
                subscriptions=set(known.linked),
                quotas=set(known.add_ons),
                start=start,
                end=end,
                length=mark.length,
            )
        totals = _by_window(readings, mark.length)
        if only is not None:
            totals = {key: units for key, units in totals.items() if key[0] in only}
        counted = await self._cut(totals, known)
        now = self._clock.now()
        async with self._store.write() as tx:
            await watermarks.advance(tx, mark, advance_to, now=now)  # first: it locks out a second reader
            cuts = known.cuts
            known = await self._known(tx, start, end, mark.length, only)  # some ended since
            if any(known.cuts.get(name) != cuts.get(name) for name, _, _ in counted):
                raise Retryable("a bill date became known while traffic was read; it is read again")
            keeper = Keeper(tx, known.linked, known.add_ons, now, unread=await marks.unread_ones(tx))
            recorded = {  # one whose organization could not be found was not counted: that is no zero
                key: pieces
                for key, pieces in known.recorded.items()
                if key in totals or key[0] not in known.linked or known.linked[key[0]].organization_id
            }
            await keeper.keep(totals, counted, recorded, before=before or end)
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

    @staticmethod
    async def _known(
        tx: Tx, start: datetime, end: datetime, length: timedelta, only: Collection[str] | None
    ) -> "Known":
        linked = {
            one.subscription_id: one
            for one in await links.subscriptions(tx)
            if only is None or one.subscription_id in only
        }
        cuts = {name: edges(known) for name, known in (await periods.since(tx, start)).items()}
        for link in linked.values():
            cuts.setdefault(link.subscription_id, set()).add(link.usage_from)
        recorded: dict[Key, dict[Window, Booked]] = {}
        for (subscription_id, quota_id), pieces in (await usage.sums(tx, start, end)).items():
            if only is not None and subscription_id not in only:
                continue
            for piece, booked in pieces.items():
                window = floor(piece.start, length)
                key = (subscription_id, quota_id, Window(window, window + length))
                recorded.setdefault(key, {})[piece] = booked
        return Known(linked, await links.add_ons(tx), cuts, recorded)

    async def _cut(self, totals: dict[Key, int], known: "Known") -> dict[Key, dict[Window, int]]:
        """What was counted, by the pieces of its window. A window that a bill cuts is asked for by piece.

        That is only asked when there is something to book: all of it is recorded mostly.
        """
        counted: dict[Key, dict[Window, int]] = {}
        asked: dict[Window, set[Pair]] = {}
        for key, units in totals.items():
            subscription_id, quota_id, window = key
            pieces = cut(window, known.cuts.get(subscription_id, ()))
            if len(pieces) == 1:
                counted[key] = {window: units}
            elif units > sum(one.units for one in known.recorded.get(key, {}).values()):
                counted[key] = dict.fromkeys(pieces, 0)
                for piece in pieces:
                    asked.setdefault(piece, set()).add((subscription_id, quota_id))
        for piece, pairs in sorted(asked.items()):
            for (subscription_id, quota_id), units in (await self._piece(piece, pairs, known)).items():
                for key, pieces_ in counted.items():
                    if key[:2] == (subscription_id, quota_id) and piece in pieces_:
                        pieces_[piece] = units
        return counted

    async def _piece(self, piece: Window, pairs: set[Pair], known: "Known") -> dict[Pair, int]:
        """What was counted of some pairs in a piece of a window."""
        subscriptions = {subscription_id for subscription_id, _ in pairs if subscription_id in known.linked}
        quotas = {quota_id for _, quota_id in pairs if quota_id in known.add_ons}
        readings = await self._source.read(
            organizations=_organizations([known.linked[one] for one in subscriptions], piece.start),
            units={known.add_ons[one].unit for one in quotas},
            subscriptions=subscriptions,
            quotas=quotas,
            start=piece.start,
            end=piece.end,
            length=piece.length,
        )
        counted = dict.fromkeys(pairs, 0)
        for reading in readings:
            if (pair := (reading.subscription_id, reading.quota_id)) in counted:
                counted[pair] += reading.units
        return counted


def audit_hour(subscription_id: str) -> int:
    """The hour of the day in which a subscription is audited, the same each day."""
    return zlib.crc32(subscription_id.encode()) % 24


def audit_due(subscription_id: str, now: datetime) -> datetime:
    """When its last daily audit fell due: the latest beginning of its hour."""
    return floor(now, HOUR) - HOUR * ((now.hour - audit_hour(subscription_id)) % 24)


def audit_spread(subscription_id: str) -> timedelta:
    """How long after a start its daily audit waits, in whole minutes: all of them are asked for then."""
    return timedelta(minutes=zlib.crc32(subscription_id.encode()) // 24 % 60)


@dataclass(frozen=True, slots=True)
class Known:
    """What the store has about a range: links, where bills cut, and what is recorded of each window."""

    linked: dict[str, SubscriptionLink]
    add_ons: dict[str, AddOnLink]
    cuts: dict[str, set[datetime]]
    recorded: dict[Key, dict[Window, Booked]]


def _organizations(linked: Iterable[SubscriptionLink], start: datetime) -> set[str]:
    """Whose traffic is asked for; "" while there is one of whom that is not known.

    That takes more calls, so one that was over before `start` asks for nothing more.
    """
    return {
        one.organization_id
        for one in linked
        if one.organization_id or one.usage_until is None or one.usage_until > start
    }


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
