"""Runs: a reconciliation taken step by step, each of them durable, so that any start goes on with it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, time, timedelta
from typing import Any, Final, Protocol

import structlog

from billingd.domain.attempts import describe
from billingd.domain.drift import Drift
from billingd.domain.errors import BillingdError, Illegible, Permanent, Retryable
from billingd.domain.windows import floor, settled_end
from billingd.loops import Clock
from billingd.reconcile import document
from billingd.reconcile.asking import ask
from billingd.reconcile.billed import BilledSurvey, Surveyed
from billingd.reconcile.holding import (
    close_gone,
    failure_notice,
    hold,
    hold_standing,
    not_accepted,
    notice,
)
from billingd.reconcile.linkage import Linkage
from billingd.reconcile.places import overlapping
from billingd.reconcile.scope import BILLED, LINKS, REPAIR, SERVED, Scope, billed_since, is_open, not_compared
from billingd.reconcile.served import ServedSurvey
from billingd.store import drift, links, outbox, watermarks
from billingd.store.drift import Run
from billingd.store.engine import Store, Tx
from billingd.store.links import SubscriptionLink
from billingd.store.watermarks import Watermark

log = structlog.get_logger()

CHUNK_WINDOWS: Final = 24
"""Windows of all subscriptions in one step, as in a poll."""

REPAIR_PAGE: Final = 500
SINCE_MAX: Final = timedelta(days=31)
"""How far back a run goes for open periods by itself; at Recurly, to the beginning of each."""

UNSEEN_MAX: Final = timedelta(days=92)
"""How far back it goes for what no run has looked at yet."""

CUT_OFF: Final = timedelta(hours=1)
"""How old a run may have grown without a step, and still be gone on with: what it saw is from then."""

DAILY_AT: Final = time(3, 40)
"""When the daily run is due, in UTC."""

TOO_LONG: Final = (
    f"Amplify and the ledger are compared for {SINCE_MAX.days} days, and billing periods began earlier: "
    "`billingd reconcile --since` looks further"
)

STALE: Final = "it was cut off, and what it saw is too old to go on from; reconcile anew"

NOT_READ: Final = (
    "Amplify and the ledger are not compared: this traffic is settled and not read yet, or to be read again; "
    "`billingd traffic poll` reads it, or says why not"
)

GIVE_UP: Final = timedelta(days=1)
"""How long a run is tried while a far side is away."""

PASS_OVER: Final = timedelta(minutes=15)
"""How long it is tried to compare one subscription while Recurly answers for others."""


class Poller(Protocol):
    """Reads what has settled, so that ordinary lateness is no drift."""

    async def run_once(self) -> bool: ...
    async def read_range(
        self, since: datetime, until: datetime, *, subscription: str | None = None
    ) -> int: ...


class Reconciler:
    """Begins runs, takes their steps, and says what they found."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        served: ServedSurvey,
        billed: BilledSurvey,
        linkage: Linkage,
        poller: Poller,
        *,
        source: str,
        length: timedelta,
        settle: timedelta,
        late: timedelta,
        requests_per_minute: int,
        wake_outbox: asyncio.Event,
        may_read: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._clock = clock
        self._served_survey = served
        self._billed_survey = billed
        self._linkage = linkage
        self._poller = poller
        self._source = source
        self._length = length
        self._settle = settle
        self._late = late
        self._held_up: dict[int, str] = {}
        self._stuck: dict[str, tuple[int, datetime]] = {}
        self._seconds_per_call = 60 / requests_per_minute
        self._wake_outbox = wake_outbox
        self._may_read = may_read
        self._rest = timedelta(0)
        self.wake = asyncio.Event()

    async def start(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        subscription: str | None = None,
        repair: bool = False,
        daily: bool = False,
    ) -> int:
        """Begin a run, or join one that was asked for likewise and goes on; its id.

        Without `since`, from where the earliest open billing period began, a month ago at most, or from where
        the latest run over everything looked last, each less what traffic may be late; without `until`, all
        there is. What was cut off an hour ago or longer is not joined: it has failed. Raises NotFound when
        that subscription is not linked, Retryable until a restored store is read back: what it lacks is no
        drift.
        """
        await self._may_read()
        now = self._clock.now()
        async with self._store.write() as tx:
            if subscription is not None:
                subscription = (await links.meant(tx, subscription)).subscription_id
            asked = drift.DAILY if daily else f"{since or '-'}/{until or '-'}/{subscription or '-'}/{repair}"
            if (going := await drift.unfinished(tx, asked=asked)) is not None:
                if now - going.stepped_at < CUT_OFF:
                    return going.id
                await drift.fail(tx, going.id, now=now, error=STALE)
            linked = await links.subscriptions(tx)
            if subscription is not None:
                linked = [one for one in linked if one.subscription_id == subscription]
            mark = await self._mark(tx)
            stop = now if until is None else until
            begin = since
            if begin is None:
                begin = _earliest(linked, now)
                if (before := await drift.latest(tx)) is not None:
                    begin = max(min(begin, before.until), now - UNSEEN_MAX)
                begin -= self._late
            begin = floor(begin, mark.length)
            begin = min(begin, floor(stop, mark.length) - mark.length)
            unseen = self._served_survey.not_compared(linked, mark, begin, stop, now)
            opened = floor(_opened(linked, begin), mark.length)
            if since is None and opened < begin:
                unseen.insert(0, not_compared(SERVED, opened, begin, TOO_LONG))
            span = CHUNK_WINDOWS * mark.length
            served = max(0, -((begin - min(stop, self._settled(mark, stop, now))) // span))
            steps = served + len(overlapping(linked, begin, stop)) + 1 + int(repair)
            run_id = await drift.begin(
                tx,
                since=begin,
                until=stop,
                subscription_id=subscription,
                repair=repair,
                asked=asked,
                phase=SERVED,
                steps=steps,
                not_compared=unseen,
                now=now,
            )
        log.info("reconcile.started", run=run_id, since=begin.isoformat(), until=stop.isoformat())
        self.wake.set()
        return run_id

    async def finish(self, run_id: int) -> None:
        """Take all steps that are left."""
        while await self.step(run_id):
            pass

    async def step(self, run_id: int) -> bool:
        """Take the next step of a run; False when it is over. What a step found is kept with its progress."""
        await self._may_read()
        async with self._store.read() as tx:
            run = await drift.find(tx, run_id)
            if run is None or run.state != "running":
                return False
            mark = await self._mark(tx)
        try:
            await getattr(self, f"_{run.phase}")(run, mark)
        except Retryable as error:
            if self._clock.now() - run.started_at < GIVE_UP:
                await self._waits(run, error)
                raise
            await self._failed(run, str(error))
        except Permanent as error:
            await self._failed(run, str(error))
        except BillingdError:  # of the store: nothing can be written down
            raise
        except Exception as error:  # a bug: of one run, which may not end the daemon at each start anew
            log.exception("reconcile.broke", run=run.id, phase=run.phase)
            await self._failed(run, f"a bug, see the log: {describe(error)}")
        self._held_up.pop(run_id, None)
        return True

    async def _waits(self, run: Run, error: Retryable) -> None:
        """It cannot go on for now: it says why, and is not taken for cut off."""
        self._held_up[run.id] = str(error)
        async with self._store.write() as tx:
            await drift.touch(tx, run.id, now=self._clock.now())

    async def run_once(self) -> bool:
        """Take a step of the oldest run, or begin the daily one; False when nothing is due, or at rest.

        A step uses half of what Recurly lets through at most: reports must not wait for it.
        """
        self._rest = timedelta(0)
        async with self._store.read() as tx:
            run = await drift.unfinished(tx)
        if run is None:
            if not await self._daily_due():
                return False
            await self._poller.run_once()
            await self.start(daily=True)
            return True
        if self._clock.now() - run.stepped_at >= CUT_OFF:
            await self._failed(run, STALE)
            if run.asked == drift.DAILY:
                await self._poller.run_once()
                await self.start(daily=True)
            return True
        await self.step(run.id)
        return self._rest <= timedelta(0)

    async def idle(self) -> timedelta:
        """How long to rest after a step, or until the next daily run."""
        if self._rest > timedelta(0):
            return self._rest
        now = self._clock.now()
        return _due_at(now) + timedelta(days=1) - now

    async def _daily_due(self) -> bool:
        """Whether the latest daily run began before its hour came; the first waits for such an hour."""
        due_at = _due_at(self._clock.now())
        async with self._store.read() as tx:
            latest = await drift.latest(tx, asked=(drift.DAILY,), state=None)
            mark = await watermarks.find(tx, self._source)
        if latest is not None:
            return latest.started_at < due_at
        return mark is not None and mark.regular_since < due_at

    async def _mark(self, tx: Tx) -> Watermark:
        mark = await watermarks.find(tx, self._source)
        if mark is not None:
            return mark
        at = floor(self._clock.now(), self._length)
        return Watermark(self._source, at, self._length, at)

    async def _served(self, run: Run, mark: Watermark) -> None:
        """A chunk of windows of every subscription, up to the watermark; earlier sizes are not compared.

        A watermark that is behind what has settled (it was set back, or this is the first look after a while)
        is no reason to leave windows out: they are read first, and told of where that cannot be.
        """
        settled = self._settled(mark, run.until, run.started_at)
        start = _begins(run, mark)
        if mark.at < min(settled, start + CHUNK_WINDOWS * mark.length):
            await self._poller.run_once()
            async with self._store.read() as tx:
                mark = await self._mark(tx)
            start = _begins(run, mark)
        stop = min(floor(run.until, mark.length), mark.at)
        end = min(start + CHUNK_WINDOWS * mark.length, stop)
        found: list[Drift] = []
        unread: list[dict[str, Any]] = []
        start = max(start, self._served_survey.kept_from(mark, run.started_at))
        if start < end:
            found, unread = await self._served_survey.compare(run, mark, start, end)
        over = end >= stop
        if over and (missed := max(start, mark.at)) < settled:
            unread = [*unread, not_compared(SERVED, missed, settled, NOT_READ)]
        await self._keep(
            run,
            found,
            phase=BILLED if over else SERVED,
            cursor=None if over else end.isoformat(),
            not_compared=unread,
        )

    def _settled(self, mark: Watermark, until: datetime, now: datetime) -> datetime:
        """How far what a run looks at could have been read when it began."""
        return settled_end(mark.at, min(now, until + self._settle), length=mark.length, settle=self._settle)

    async def _billed(self, run: Run, mark: Watermark) -> None:
        """One subscription."""
        async with self._store.read() as tx:
            linked = await links.subscriptions(tx)
        every = overlapping(linked, run.since, run.until)
        left = [
            one
            for one in every
            if run.subscription_id in {None, one.subscription_id}
            and (run.cursor is None or one.subscription_id > run.cursor)
        ]
        if not left:
            await self._keep(run, [], phase=LINKS, cursor=None)
            return
        began = self._clock.elapsed()
        failed = []
        try:
            one = await self._billed_survey.compare(run, mark, left[0])
        except (Permanent, Retryable) as error:  # of this one alone: the others are looked at all the same
            if isinstance(error, Retryable) and not await self._passed_over(run, left[0], every, error):
                raise
            log.error("reconcile.not_compared", subscription=left[0].subscription_id, error=str(error))
            one = Surveyed([])
            name, begin = left[0].subscription_id, billed_since(run, left[0], mark.length)
            failed.append(not_compared(BILLED, begin, run.until, str(error), subscription=name))
        self._stuck.pop(left[0].subscription_id, None)
        last = len(left) == 1
        await self._keep(
            run,
            one.found,
            phase=LINKS if last else BILLED,
            cursor=None if last else left[0].subscription_id,
            subscriptions=1,
            records=one.records,
            held_units=one.held_units,
            not_compared=failed,
        )
        share = 2 * one.calls * self._seconds_per_call
        self._rest = timedelta(seconds=max(0.0, share - (self._clock.elapsed() - began)))

    async def _passed_over(
        self, run: Run, link: SubscriptionLink, every: Sequence[SubscriptionLink], error: Retryable
    ) -> bool:
        """Whether only this one cannot be read: told at once when it makes no sense, else after a while.

        Where Recurly says nothing of others either, it is away, and waited for.
        """
        name, now = link.subscription_id, self._clock.now()
        known = self._stuck.get(name)
        if known is None or known[0] != run.id:
            known = self._stuck[name] = (run.id, now)
        if not isinstance(error, Illegible) and now - known[1] < PASS_OVER:
            return False
        later = [one for one in every if one.subscription_id > name]
        before = [one for one in every if one.subscription_id < name]
        return await self._billed_survey.answers([*later, *before] or [link])

    async def _links(self, run: Run, mark: Watermark) -> None:
        """All plans and subscriptions at once."""
        found: Sequence[Drift] = ()
        try:
            found, unread = await self._linkage.compare(run)
        except Permanent as error:  # what is billed can be mended all the same
            log.error("reconcile.links_not_compared", error=str(error))
            unread = [not_compared(LINKS, run.since, run.until, f"links: {error}")]
        if run.repair:
            await self._keep(run, found, phase=REPAIR, cursor=None, not_compared=unread)
            return
        async with self._store.write() as tx:
            now = self._clock.now()
            if await drift.step(tx, run, phase=LINKS, cursor=None, now=now, not_compared=unread):
                await drift.add(tx, run.id, await not_accepted(tx, found))
                await self._over(tx, run, mark)

    async def _repair(self, run: Run, mark: Watermark) -> None:
        """A page of findings: what can be mended is asked for, the rest is held."""
        now = self._clock.now()
        async with self._store.write() as tx:
            after = int(run.cursor or 0)
            page = await drift.of(tx, run.id, after=after, limit=REPAIR_PAGE)
            units = await ask(tx, page, now=now) if page else 0
            cursor = str(page[-1].id) if page else run.cursor
            if not await drift.step(tx, run, phase=REPAIR, cursor=cursor, now=now, repaired_units=units):
                raise Retryable("another process takes the steps of this run")
            for one in page:
                if not one.drift.repairable:
                    await hold(tx, one.drift, now)
            if len(page) < REPAIR_PAGE:
                await self._over(tx, run, mark)
        self._wake_outbox.set()

    async def _keep(
        self,
        run: Run,
        found: Sequence[Drift],
        *,
        phase: str,
        cursor: str | None,
        not_compared: Sequence[dict[str, Any]] = (),
        **counts: int,
    ) -> None:
        """A step is done: what it found and how far the run is, in one transaction."""
        async with self._store.write() as tx:
            kept = await not_accepted(tx, found)
            if await drift.step(
                tx,
                run,
                phase=phase,
                cursor=cursor,
                now=self._clock.now(),
                not_compared=not_compared,
                **counts,
            ):
                await drift.add(tx, run.id, kept)

    async def _failed(self, run: Run, error: str) -> None:
        """It cannot go on; people hear of it once, until a run over everything gets through again."""
        log.error("reconcile.failed", run=run.id, error=error)
        now = self._clock.now()
        async with self._store.write() as tx:
            await drift.fail(tx, run.id, now=now, error=error)
            before = await drift.ended(tx, before=run.id)
            if run.asked in drift.WHOLE and error != STALE and (before is None or before.state == "done"):
                await outbox.insert(tx, [failure_notice(run, error)], now=now)
        self._held_up.pop(run.id, None)
        self._wake_outbox.set()

    async def _over(self, tx: Tx, run: Run, mark: Watermark) -> None:
        """The run is done; people are told when it changes from clean to drifting, or back.

        What the one before it found, and this one could not look at, still stands.
        """
        now = self._clock.now()
        latest = await drift.find(tx, run.id)
        assert latest is not None
        scope = await Scope.of(tx, latest, mark)
        before = await drift.latest(tx, before=run.id)
        lost = [] if before is None else await drift.not_again(tx, before.id, by=run.id)
        if run.asked in drift.WHOLE:
            unseen = [one.drift for one in lost if scope.hides(one.drift)]
            await drift.add(tx, run.id, await not_accepted(tx, unseen))
        totals = await drift.totals(tx, run.id)
        unseen_ones = {one["subscription"] for one in latest.not_compared} - {None}  # in one phase or several
        unread = len(unseen_ones) + sum(
            one["subscription"] is None and one.get("phase") == LINKS for one in latest.not_compared
        )
        missed = any(one["reason"] == NOT_READ for one in latest.not_compared)
        drifting = totals.drifting > 0 or unread > 0
        if missed and before is not None:  # nobody can say that they agree again
            drifting = drifting or before.drifting is True
        await drift.finish(tx, run.id, now=now, drifting=drifting)
        log.info("reconcile.done", run=run.id, units=totals.units, findings=totals.findings)
        await close_gone(tx, scope, now)
        if run.asked not in drift.WHOLE:
            mended = [one.id for one in lost if scope.covers(one.drift)]
            await drift.gone(tx, mended, f"run {run.id} found it no more")
            return
        if before is not None:
            await hold_standing(tx, run.id, await drift.found_by(tx, before.id), now)
        if drifting != (before is not None and before.drifting is True):
            await outbox.insert(tx, [notice(run, totals, unread)], now=now)
            self._wake_outbox.set()
        await drift.forget(tx)

    async def document(self, run_id: int) -> dict[str, Any] | None:
        """What a run found so far (contract section 2), None when there is no such run."""
        found = await document.of(self._store, run_id)
        return None if found is None else found | {"held_up": self._held_up.get(run_id)}


def _begins(run: Run, mark: Watermark) -> datetime:
    """Where its next chunk of windows begins."""
    if run.cursor is not None:
        return datetime.fromisoformat(run.cursor)
    return max(floor(run.since, mark.length), mark.regular_since)


def _earliest(linked: Sequence[SubscriptionLink], now: datetime) -> datetime:
    """Where the earliest open billing period began, a month ago at most."""
    return max(_opened(linked, now - SINCE_MAX), now - SINCE_MAX)


def _opened(linked: Sequence[SubscriptionLink], default: datetime) -> datetime:
    """Where the earliest open billing period began, or the usage of a subscription in it."""
    begins = [max(one.period_started_at or one.usage_from, one.usage_from) for one in linked if is_open(one)]
    return min(begins, default=default)


def _due_at(now: datetime) -> datetime:
    """When the last daily run fell due."""
    today = now.replace(hour=DAILY_AT.hour, minute=DAILY_AT.minute, second=0, microsecond=0)
    return today if today <= now else today - timedelta(days=1)
