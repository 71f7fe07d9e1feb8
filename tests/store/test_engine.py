"""The store's transactions: what has returned is kept, what failed is not, and nobody harms a neighbour."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import ManualClock
from silent_postgres import reached_through

from billingd.domain.attempts import Action
from billingd.store import outbox, schema
from billingd.store.engine import Store, StoreUnavailable

SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


async def add(
    store: Store, clock: ManualClock, key: str, then: Callable[[], Awaitable[Any]] | None = None
) -> None:
    async with store.write() as tx:
        await outbox.insert(tx, [Action("kind", key, key, {})], now=clock.now())
        if then is not None:
            await then()


async def keys(store: Store) -> set[str]:
    async with store.read() as tx:
        return set((await tx.execute(sa.select(schema.outbox.c.key))).scalars())


async def test_many_at_once_are_all_kept(store: Store, clock: ManualClock) -> None:
    """Each block that returned is there, whoever shared a transaction with whom."""
    await asyncio.gather(*(add(store, clock, str(n)) for n in range(50)))
    assert await keys(store) == {str(n) for n in range(50)}


async def test_a_block_that_raises_keeps_nothing_and_harms_nobody(store: Store, clock: ManualClock) -> None:
    """Its own work is undone, its error goes up, and its neighbours are kept."""

    async def fail() -> None:
        raise KeyError("a bug")

    results = await asyncio.gather(
        add(store, clock, "before"),
        add(store, clock, "bad", fail),
        add(store, clock, "after"),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), KeyError, type(None)]
    assert await keys(store) == {"before", "after"}


async def test_an_impossible_row_harms_nobody(store: Store, clock: ManualClock) -> None:
    """A constraint that is violated undoes that block alone."""

    async def impossible() -> None:
        async with store.write() as tx:
            await outbox.insert(tx, [Action("kind", "gone", "gone", {})], now=clock.now())
            await tx.execute(sa.update(schema.outbox).values(state="lost"))

    results = await asyncio.gather(
        add(store, clock, "a"), impossible(), add(store, clock, "b"), return_exceptions=True
    )
    assert isinstance(results[1], sa.exc.IntegrityError)
    assert await keys(store) == {"a", "b"}


async def test_reading_keeps_nothing(store: Store, clock: ManualClock) -> None:
    """What is written in a reading is undone."""
    async with store.read() as tx:
        await outbox.insert(tx, [Action("kind", "a", "a", {})], now=clock.now())
    assert await keys(store) == set()


async def test_a_block_that_is_cancelled_harms_nobody(store: Store, clock: ManualClock) -> None:
    """Cut off in the middle of its block: it keeps nothing, its neighbours are kept, the next ones work."""
    inside, never = asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        inside.set()
        await never.wait()

    first = asyncio.create_task(add(store, clock, "first"))
    cut = asyncio.create_task(add(store, clock, "cut", stop))
    await inside.wait()
    behind = asyncio.create_task(add(store, clock, "behind"))
    await asyncio.sleep(0)
    cut.cancel()
    results = await asyncio.gather(first, cut, behind, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), asyncio.CancelledError, type(None)]
    assert await keys(store) == {"first", "behind"}


@pytest.mark.parametrize("waits", range(1, 12))
@SQLITE
async def test_a_statement_that_is_cancelled_harms_nobody(
    store: Store, clock: ManualClock, waits: int
) -> None:
    """Cut off at any of its waits, even in the middle of a statement: whoever returned is kept."""
    tasks = [asyncio.create_task(add(store, clock, str(n))) for n in range(4)]
    for _ in range(waits):
        await asyncio.sleep(0.0005)  # lets the store's thread answer; how far it gets does not matter
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = await keys(store)
    for number, result in enumerate(results):
        if result is None:
            assert str(number) in kept, "returned, and not kept"
        else:
            assert isinstance(result, asyncio.CancelledError | StoreUnavailable)
            assert number == 1 or isinstance(result, StoreUnavailable)
    await add(store, clock, "later")
    assert "later" in await keys(store)


@SQLITE
async def test_a_commit_that_fails_fails_all_who_shared_it(store: Store, clock: ManualClock) -> None:
    """None of them was told that it is kept, none is; the next one starts clean."""

    def fail(_: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, OSError("disk I/O error"))

    engine = store._writer.sync_engine
    sa.event.listen(engine, "commit", fail)
    results = await asyncio.gather(*(add(store, clock, str(n)) for n in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    sa.event.remove(engine, "commit", fail)
    assert await keys(store) == set()
    await asyncio.gather(*(add(store, clock, str(n)) for n in range(3)))
    assert len(await keys(store)) == 3


@SQLITE
async def test_those_who_wait_together_share_one_sync(store: Store, clock: ManualClock) -> None:
    """One commit for many: what makes SQLite fast enough, without giving durability up."""
    commits: list[int] = []
    sa.event.listen(store._writer.sync_engine, "commit", lambda _: commits.append(1))
    await asyncio.gather(*(add(store, clock, str(n)) for n in range(40)))
    assert len(commits) < 10


async def test_closing_waits_for_what_was_begun(store_url: str, clock: ManualClock) -> None:
    """A block whose waiter was cancelled after it had written is committed or undone, never half."""
    async with Store(store_url) as store:
        task = asyncio.create_task(add(store, clock, "a"))
        await asyncio.sleep(0)
        await task
    async with Store(store_url) as again:
        assert await keys(again) == {"a"}


async def test_times_come_back_as_they_went_in(store: Store, clock: ManualClock) -> None:
    """Aware, in UTC, to the microsecond; naive times are refused."""
    clock.at += timedelta(microseconds=123456)
    await add(store, clock, "a")
    async with store.read() as tx:
        [row] = await outbox.select(tx)
    assert row["due_at"] == clock.at
    assert row["due_at"].utcoffset() == timedelta(0)
    with pytest.raises(sa.exc.StatementError, match="without a zone"):
        async with store.write() as tx:
            await tx.execute(sa.update(schema.outbox).values(due_at=clock.at.replace(tzinfo=None)))


@SQLITE
async def test_a_stranger_sees_what_has_returned(store: Store, clock: ManualClock) -> None:
    """Another process, with nothing but the file, at the moment the block has returned."""
    for number in range(5):
        await add(store, clock, str(number))
        stranger = sqlite3.connect(str(store.path))
        assert stranger.execute("SELECT count(*) FROM outbox").fetchone() == (number + 1,)
        stranger.close()


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:"])
def test_a_store_in_memory_is_refused(url: str) -> None:
    """It would acknowledge what it cannot keep."""
    with pytest.raises(ValueError, match="not durable"):
        Store(url)


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
async def test_a_deadlock_is_tried_again(store: Store, clock: ManualClock) -> None:
    """PostgreSQL rolls one of the two back: nothing happened, so it is no bug to end the process over."""
    await add(store, clock, "a")
    await add(store, clock, "b")
    both = asyncio.Barrier(2)

    async def lock(*names: str) -> None:
        async with store.write() as tx:
            for name in names:
                moved = sa.update(schema.outbox).where(schema.outbox.c.key == name).values(error="x")
                await tx.execute(moved)
                if name == names[0]:
                    await both.wait()

    outcomes = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    [error] = [each for each in outcomes if each is not None]
    assert isinstance(error, StoreUnavailable)


@pytest.mark.parametrize("when", ["statement", "commit"])
async def test_a_postgres_that_falls_silent_is_not_waited_for_for_ever(
    postgres_migrated: str, when: str
) -> None:
    """Neither for a statement nor for a commit, which may have happened; a connection is not kept for it."""
    async with (
        reached_through(postgres_migrated) as (url, silent),
        Store(url, statement_seconds=0.1) as store,
    ):

        async def fall_silent() -> None:
            async with store.write() as tx:
                await tx.execute(sa.text("SELECT 1"))
                silent.set()
                if when == "statement":
                    await tx.execute(sa.text("SELECT 2"))

        with pytest.raises(StoreUnavailable, match="it did not answer in time"):
            await fall_silent()
        silent.clear()
        answers: list[int] = []
        for _ in range(50):  # a busy machine may take longer than the tenth of a second, once or twice
            with contextlib.suppress(StoreUnavailable):
                async with store.read() as tx:
                    answers.append((await tx.execute(sa.text("SELECT 3"))).scalar_one())
                break
        assert answers == [3]
