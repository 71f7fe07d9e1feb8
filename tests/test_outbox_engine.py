"""The engine under every flow: what each outcome of a handler leads to, on both databases."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from manual_clock import ManualClock

from billingd.domain.attempts import Action, Leased, Patience, Wait
from billingd.domain.errors import Permanent, Retryable
from billingd.outbox import IDLE_MAX, RENEWALS, Outbox
from billingd.store import outbox
from billingd.store.engine import Store, StoreUnavailable, Tx

LEASE = timedelta(minutes=2)
MINUTE = timedelta(minutes=1)
PATIENCE = Patience(attempts_max=4, backoff=timedelta(seconds=2), backoff_max=timedelta(minutes=10))

Doing = Callable[[Leased], Awaitable[Wait | None]]


class Away(Store):
    """A store that can be away, for writing."""

    away = 0

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        if self.away > 0:
            self.away -= 1
            raise StoreUnavailable("away")
        async with super().write() as tx:
            yield tx


class Bench:
    """An engine whose only kind of action, `work`, does what the test says."""

    def __init__(self, store: Away, clock: ManualClock, *, workers: int = 4) -> None:
        self.store = store
        self.clock = clock
        self.ran: list[Leased] = []
        self.outcomes: dict[str, list[Wait | Exception | None]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0
        self.engine = self.another(workers=workers)

    def another(self, *, workers: int = 4) -> Outbox:
        """An engine on the same store: a restart, or a second process."""
        return Outbox(
            self.store,
            self.clock,
            {"work": self.work},
            workers=workers,
            lease=LEASE,
            patience=PATIENCE,
            rng=Random(1),
        )

    async def work(self, leased: Leased) -> Wait | None:
        self.ran.append(leased)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        left = self.outcomes.get(leased.key, [])
        outcome = left.pop(0) if left else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def add(self, *keys: str, subject: str | None = None, kind: str = "work") -> None:
        actions = [Action(kind, subject or key, key, {}) for key in keys]
        async with self.store.write() as tx:
            await outbox.insert(tx, actions, now=self.clock.now())

    async def turn(self) -> bool:
        """One step of the loop, and the attempts it started."""
        started = await self.engine.run_once()
        await self.finish()
        return started

    async def finish(self) -> None:
        if self.engine._under_way:
            await asyncio.wait(list(self.engine._under_way))
        await asyncio.sleep(0)

    async def drain(self) -> None:
        while await self.turn():
            pass

    async def row(self, key: str) -> dict[str, Any]:
        async with self.store.read() as tx:
            [row] = [row for row in await outbox.select(tx) if row["key"] == key]
        return row

    def started(self) -> list[str]:
        return [leased.key for leased in self.ran]


@pytest.fixture
async def bench(store_url: str, clock: ManualClock) -> AsyncIterator[Bench]:
    async with Away(store_url) as store:
        made = Bench(store, clock)
        yield made
        made.store.away = 0
        made.gate.set()
        await made.engine.drain(at_most=timedelta(seconds=5))


async def test_what_is_done_is_done_once(bench: Bench) -> None:
    """Settled as done; later turns find nothing."""
    await bench.add("1", "2")
    await bench.drain()
    assert sorted(bench.started()) == ["1", "2"]
    assert (await bench.row("1"))["state"] == "done"
    assert not await bench.turn()


async def test_actions_of_one_subject_run_in_order_and_never_at_once(bench: Bench) -> None:
    """Others run beside them."""
    await bench.add("1", "2", "3", subject="a")
    await bench.add("other")
    bench.gate.clear()
    await bench.engine.run_once()
    await asyncio.sleep(0)
    assert sorted(bench.started()) == ["1", "other"]
    assert not await bench.engine.run_once()
    bench.gate.set()
    await bench.finish()
    await bench.drain()
    assert [key for key in bench.started() if key != "other"] == ["1", "2", "3"]


async def test_workers_are_bounded(bench: Bench) -> None:
    """No more attempts at once than workers; the rest comes as they get free, and the loop is woken."""
    bench.engine = bench.another(workers=2)
    await bench.add(*"12345")
    bench.gate.clear()
    assert await bench.engine.run_once()
    assert not await bench.engine.run_once()
    await asyncio.sleep(0)
    assert bench.at_once == 2
    bench.gate.set()
    await bench.finish()
    assert bench.engine.wake.is_set()
    await bench.drain()
    assert (len(bench.ran), bench.most_at_once) == (5, 2)


async def test_waiting_costs_no_attempt(bench: Bench) -> None:
    """A handler that waits for the world does so for ever, with its reason shown."""
    await bench.add("1")
    bench.outcomes["1"] = [Wait(MINUTE, "no account yet")] * 10
    for _ in range(10):
        assert await bench.turn()
        assert not await bench.turn()
        row = await bench.row("1")
        assert (row["state"], row["attempt"], row["error"]) == ("pending", 0, "no account yet")
        bench.clock.advance(MINUTE)
    await bench.drain()
    assert (await bench.row("1"))["state"] == "done"


async def test_a_failure_is_tried_again_after_a_growing_wait_and_then_given_up(bench: Bench) -> None:
    """Attempts are counted; the last error is kept with its class."""
    await bench.add("1")
    bench.outcomes["1"] = [Retryable(f"away {n}") for n in range(1, 5)]
    waits = []
    for _ in range(3):
        await bench.turn()
        row = await bench.row("1")
        assert row["state"] == "pending"
        waits.append(row["due_at"] - bench.clock.now())
        bench.clock.at = row["due_at"]
    for wait, doubled in zip(waits, (2, 4, 8), strict=True):
        assert timedelta(seconds=doubled / 2) <= wait <= timedelta(seconds=doubled)
    await bench.turn()
    row = await bench.row("1")
    assert (row["state"], row["error"], row["attempt"]) == ("dead", "Retryable: away 4", 4)


async def test_the_far_sides_own_wish_is_obeyed(bench: Bench) -> None:
    """Not before Retry-After has passed, even when the backoff is shorter."""
    await bench.add("1")
    bench.outcomes["1"] = [Retryable("429", retry_after=timedelta(minutes=5))]
    await bench.turn()
    bench.clock.advance(timedelta(minutes=5) - timedelta(seconds=1))
    assert not await bench.turn()
    bench.clock.advance(timedelta(seconds=1))
    assert await bench.turn()
    assert (await bench.row("1"))["state"] == "done"


async def test_what_can_never_succeed_is_dead_at_once_and_blocks_nobody(bench: Bench) -> None:
    """The next action of its subject runs; the dead letter keeps what it died of."""
    await bench.add("1", "2", subject="a")
    bench.outcomes["1"] = [Permanent("no such plan")]
    await bench.drain()
    row = await bench.row("1")
    assert (row["state"], row["error"]) == ("dead", "Permanent: no such plan")
    assert (await bench.row("2"))["state"] == "done"


@pytest.mark.parametrize("bug", [KeyError("x"), RecursionError(), ValueError("\x00 and \ud800")])
async def test_a_bug_is_bounded_logged_and_stops_nobody(bench: Bench, bug: Exception) -> None:
    """Whatever a handler raises, and whatever stands in it, ends as a dead letter and not in a circle."""
    await bench.add("1", "2")
    bench.outcomes["1"] = [bug] * 4
    for _ in range(4):
        await bench.drain()
        bench.clock.advance(timedelta(minutes=10))
    row = await bench.row("1")
    assert row["state"] == "dead"
    assert type(bug).__name__ in row["error"]
    assert (await bench.row("2"))["state"] == "done"


async def test_an_unknown_kind_is_parked_and_blocks_only_its_own_subject(bench: Bench) -> None:
    """A newer billingd left it here: not dropped, not dead, and a program that knows it does it."""
    await bench.add("new", subject="a", kind="from the future")
    await bench.add("1", subject="a")
    await bench.add("2", subject="b")
    for _ in range(6):
        await bench.drain()
        bench.clock.advance(PATIENCE.backoff_max)
    row = await bench.row("new")
    assert row["state"] == "pending"
    assert "does not know" in row["error"]
    assert bench.started() == ["2"]
    bench.engine._handlers = {"work": bench.work, "from the future": bench.work}
    await bench.drain()
    assert bench.started() == ["2", "new", "1"]


async def test_the_lease_of_a_long_attempt_is_renewed(bench: Bench) -> None:
    """Ten minutes of work are not given to anybody else, and settles."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    second = bench.another()
    for _ in range(10 * RENEWALS):
        bench.clock.advance(MINUTE / RENEWALS)
        await bench.engine.run_once()
        assert not await second.run_once()
    bench.gate.set()
    await bench.finish()
    row = await bench.row("1")
    assert (row["state"], row["fence"], len(bench.ran)) == ("done", 1, 1)


async def test_one_missed_renewal_loses_nothing(bench: Bench) -> None:
    """The store is away when a lease is to be renewed; the next turn is in time."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    bench.clock.advance(LEASE / RENEWALS)
    bench.store.away = 1
    with pytest.raises(StoreUnavailable):
        await bench.engine.run_once()
    bench.clock.advance(LEASE / RENEWALS)
    await bench.engine.run_once()
    bench.clock.advance(LEASE - timedelta(seconds=1))
    assert not await bench.another().run_once()
    bench.gate.set()
    await bench.finish()
    assert (await bench.row("1"))["state"] == "done"


async def test_whoever_lost_its_lease_writes_nothing(bench: Bench) -> None:
    """A process that slept too long comes back after another has taken over: its verdict moves nothing."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    slept = bench.engine
    bench.clock.advance(LEASE)
    bench.engine = bench.another()
    assert await bench.engine.run_once()
    await asyncio.sleep(0)
    assert [leased.fence for leased in bench.ran] == [1, 2]
    bench.outcomes["1"] = [Permanent("the sleeper's verdict"), None]
    while bench.at_once < 2:  # noqa: ASYNC110 - both attempts wait at the gate
        await asyncio.sleep(0)
    bench.gate.set()
    await asyncio.wait(list(slept._under_way))
    await bench.finish()
    row = await bench.row("1")
    assert (row["state"], row["fence"], row["error"]) == ("done", 2, None)


async def test_a_process_that_died_leaves_its_actions_to_the_next_after_the_lease(bench: Bench) -> None:
    """No rescuer is needed: what was leased is due again, as the same attempt."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    for task in list(bench.engine._under_way):
        task.cancel()
    await asyncio.gather(*bench.engine._under_way, return_exceptions=True)
    bench.gate.set()
    bench.engine = bench.another()
    assert not await bench.turn()
    bench.clock.advance(LEASE)
    assert await bench.turn()
    row = await bench.row("1")
    assert (row["state"], row["attempt"], row["fence"]) == ("done", 1, 2)


async def test_a_drain_waits_for_what_is_under_way(bench: Bench) -> None:
    """It finishes and settles; nothing new is started."""
    await bench.add("1", "2", subject="a")
    bench.gate.clear()
    await bench.engine.run_once()
    drain = asyncio.create_task(bench.engine.drain(at_most=timedelta(seconds=30)))
    await asyncio.sleep(0)
    bench.gate.set()
    await drain
    assert (await bench.row("1"))["state"] == "done"
    assert (await bench.row("2"))["state"] == "pending"


async def test_a_drain_cuts_off_what_takes_too_long(bench: Bench) -> None:
    """It stays leased, unharmed, for the next start; other transactions go on."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    await bench.engine.drain(at_most=timedelta(0))
    assert (await bench.row("1"))["state"] == "leased"
    async with bench.store.write() as tx:
        assert await outbox.take_back_leases(tx, now=bench.clock.now()) == 1
    bench.gate.set()
    bench.engine = bench.another()
    await bench.drain()
    assert (await bench.row("1"))["state"] == "done"


async def test_a_store_that_is_away_holds_the_verdict_until_it_is_back(bench: Bench) -> None:
    """What was done is not forgotten, and not done again."""
    await bench.add("1")
    bench.gate.clear()
    await bench.engine.run_once()
    bench.store.away = 3
    bench.gate.set()
    await bench.finish()
    row = await bench.row("1")
    assert (row["state"], len(bench.ran), bench.store.away) == ("done", 1, 0)


async def test_a_store_that_is_away_claims_nothing(bench: Bench) -> None:
    """The error goes up to the loop, which slows down; afterwards all is as before."""
    await bench.add("1")
    bench.store.away = 1
    with pytest.raises(StoreUnavailable):
        await bench.engine.run_once()
    await bench.drain()
    assert (await bench.row("1"))["state"] == "done"


async def test_it_sleeps_until_the_next_action_is_due_and_never_long(bench: Bench) -> None:
    """Another process may have added something; what waits behind its subject does not keep it awake."""
    assert await bench.engine.idle() == IDLE_MAX
    await bench.add("1")
    bench.outcomes["1"] = [Wait(timedelta(milliseconds=300), "soon"), Wait(MINUTE, "later")]
    await bench.turn()
    assert await bench.engine.idle() == timedelta(milliseconds=300)
    bench.clock.advance(timedelta(milliseconds=300))
    await bench.turn()
    assert await bench.engine.idle() == IDLE_MAX
