"""The engine under every flow: claim what is due, attempt it, judge what came of it, settle."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Final

import structlog

from billingd.domain.attempts import Leased, Patience, State, Wait, judge
from billingd.domain.errors import BillingdError, Retryable
from billingd.loops import Clock
from billingd.store import outbox
from billingd.store.engine import Store

log = structlog.get_logger()

Handler = Callable[[Leased], Awaitable[Wait | None]]
"""Does an action. Returning None means done, `Wait` not yet; raising is judged by the error's class."""

IDLE_MAX: Final = timedelta(seconds=1)
"""The longest the engine sleeps without looking: another process may have added actions."""

RENEWALS: Final = 4
"""How often a lease is renewed in its own time: one renewal may fail, and another come late."""

ATTEMPT_MAX: Final = timedelta(hours=1)
"""Each call of an attempt is bounded; an attempt that takes longer than this hangs all the same."""

SETTLE_AGAIN: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Nothing was due; the next action will be then, or there is none."""

    next_due: datetime | None


class Outbox:
    """Runs due actions with bounded workers. Whatever it held when it died is due again after the lease."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        handlers: Mapping[str, Handler],
        *,
        workers: int,
        lease: timedelta,
        patience: Patience,
        rng: Random,
    ) -> None:
        self._store = store
        self._clock = clock
        self._handlers = handlers
        self._workers = workers
        self._lease = lease
        self._patience = patience
        self._rng = rng
        self._under_way: dict[asyncio.Task[None], Leased] = {}
        self._began: dict[int, datetime] = {}
        self._renew_at = clock.now()
        self._claimed_at = -math.inf
        self._seen: _Seen | None = None
        self.wake = asyncio.Event()

    async def run_once(self) -> bool:
        """Start as many due actions as there are free workers; False when nothing was due.

        Soon after a claim it only looks at first: that is cheaper, locks nobody out, and mostly nothing is
        due. Once `IDLE_MAX` has passed it claims without, so that a store that cannot be written, or can
        again, is noticed while nothing is due as well.
        """
        self._seen = None
        await self._renew()
        free = self._workers - len(self._under_way)
        if free <= 0:
            return False
        now = self._clock.now()
        if self._clock.elapsed() - self._claimed_at < IDLE_MAX.total_seconds():
            async with self._store.read() as tx:
                earliest = await outbox.earliest_due(tx)
            if earliest is None or earliest > now:
                self._seen = _Seen(earliest)
                return False
        async with self._store.write() as tx:
            claimed = await outbox.claim(tx, now=now, lease=self._lease, limit=free)
        self._claimed_at = self._clock.elapsed()
        for leased in claimed:
            task = asyncio.create_task(self._attempt(leased), name=f"action-{leased.id}")
            self._under_way[task] = leased
            self._began[leased.id] = now
            task.add_done_callback(self._finished)
        return bool(claimed)

    async def idle(self) -> timedelta:
        """How long nothing more can be started, unless a worker comes free (which sets `wake`).

        What is due by now and was not claimed waits for an earlier action of its subject, or for a worker.
        When `run_once` just saw that nothing is due, it need not be asked again: what was added since then
        has set `wake`, or is another process's, which `IDLE_MAX` is for.
        """
        now = self._clock.now()
        longest = min(IDLE_MAX, self._lease / RENEWALS)
        seen, self._seen = self._seen, None
        if seen is None:
            async with self._store.read() as tx:
                seen = _Seen(await outbox.next_due(tx, after=now))
        due_at = seen.next_due
        return longest if due_at is None else min(due_at - now, longest)

    async def drain(self, *, at_most: timedelta) -> None:
        """Wait for the attempts under way; cancel those that take longer (their leases bring them back)."""
        tasks = list(self._under_way)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=at_most.total_seconds())
        for task in late:
            log.warning("action.cut_off", action=self._under_way[task].id, key=self._under_way[task].key)
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def hung(self, now: datetime) -> list[str]:
        """Actions whose attempt takes longer than any should: the loop turns all the same, a worker less."""
        return [
            f"action {leased.id} ({leased.kind})"
            for leased in self._under_way.values()
            if now - self._began[leased.id] > ATTEMPT_MAX
        ]

    def _finished(self, task: asyncio.Task[None]) -> None:
        if (leased := self._under_way.pop(task, None)) is not None:
            self._began.pop(leased.id, None)
        self.wake.set()

    async def _attempt(self, leased: Leased) -> None:
        handler = self._handlers.get(leased.kind)
        outbox.CAUSE.set(leased.event_id)  # of this task alone
        due_to = {"event_id": leased.event_id, "correlation": leased.correlation}
        with structlog.contextvars.bound_contextvars(
            action=leased.id,
            kind=leased.kind,
            subject=leased.subject,
            attempt=leased.attempt,
            **{name: value for name, value in due_to.items() if value is not None},
        ):
            outcome: Wait | BaseException | None
            if handler is None:
                reason = (
                    f"this billingd does not know actions of kind {leased.kind!r}: parked until one that does"
                )
                outcome = Wait(self._patience.backoff_max, reason)
            else:
                try:
                    outcome = await handler(leased)
                except BillingdError as error:
                    outcome = error
                except (
                    Exception
                ) as error:  # a bug in one handler may not stop the line: judged, bounded, logged
                    log.exception("action.failed_unexpectedly")
                    outcome = error
            await self._settle(leased, outcome)

    async def _settle(self, leased: Leased, outcome: Wait | BaseException | None) -> None:
        while True:
            now = self._clock.now()
            verdict = judge(leased.attempt, outcome, now=now, patience=self._patience, rng=self._rng)
            try:
                async with self._store.write() as tx:
                    await outbox.settle(tx, leased, verdict, now=now)
            except outbox.LeaseLost as error:
                log.warning("action.lease_lost", error=str(error))
            except Retryable as error:  # the store is away; meanwhile the lease is renewed, or lost
                log.warning("action.settle_held_up", error=str(error))
                await self._clock.wait(asyncio.Event(), SETTLE_AGAIN)
                continue
            else:
                level = "error" if verdict.state is State.DEAD else "debug" if verdict.waited else "info"
                getattr(log, level)("action.settled", state=verdict.state.value, error=verdict.error)
            return

    async def _renew(self) -> None:
        """Lengthen the leases of attempts under way, well before they end."""
        now = self._clock.now()
        if not self._under_way or now < self._renew_at:
            return
        async with self._store.write() as tx:
            kept = await outbox.renew(tx, list(self._under_way.values()), now=now, lease=self._lease)
        self._renew_at = now + self._lease / RENEWALS
        for task, leased in list(self._under_way.items()):
            if leased.id not in kept and not task.done():
                log.warning("action.lease_lost_under_way", action=leased.id, key=leased.key)
