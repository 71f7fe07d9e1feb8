"""The outbox on both databases: claims, fences, order, and what an operator may do."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import ManualClock

from billingd.domain.attempts import Action, Leased, State, Verdict
from billingd.store import outbox
from billingd.store.engine import Store
from billingd.store.schema import outbox as table

LEASE = timedelta(minutes=2)


async def add(store: Store, clock: ManualClock, *actions: Action) -> None:
    async with store.write() as tx:
        await outbox.insert(tx, actions, now=clock.now())


async def claim(store: Store, clock: ManualClock, limit: int = 10) -> list[Leased]:
    async with store.write() as tx:
        return await outbox.claim(tx, now=clock.now(), lease=LEASE, limit=limit)


async def settle(store: Store, clock: ManualClock, leased: Leased, state: State, **verdict: Any) -> None:
    async with store.write() as tx:
        due_at = verdict.pop("due_at", clock.now())
        await outbox.settle(tx, leased, Verdict(state, due_at, **verdict), now=clock.now())


def action(key: str, subject: str = "a") -> Action:
    return Action("kind", subject, key, {"n": 1})


async def test_actions_of_one_subject_run_in_order_one_at_a_time(store: Store, clock: ManualClock) -> None:
    """The second action of a subject is not claimed before the first has finished; others are."""
    await add(store, clock, action("1"), action("2"), action("3", "b"))
    first = await claim(store, clock)
    assert [leased.key for leased in first] == ["1", "3"]
    assert await claim(store, clock) == []
    await settle(store, clock, first[0], State.DONE)
    assert [leased.key for leased in await claim(store, clock)] == ["2"]


async def test_an_action_that_waits_holds_back_its_subject_and_a_dead_one_does_not(
    store: Store, clock: ManualClock
) -> None:
    """Backoff keeps the order; a dead letter does not block its neighbours."""
    await add(store, clock, action("1"), action("2"))
    [first] = await claim(store, clock)
    await settle(store, clock, first, State.PENDING, due_at=clock.now() + timedelta(minutes=1), error="later")
    assert await claim(store, clock) == []
    clock.advance(timedelta(minutes=1))
    [again] = await claim(store, clock)
    assert (again.key, again.attempt, again.fence) == ("1", 2, 2)
    await settle(store, clock, again, State.DEAD, error="gave up")
    assert [leased.key for leased in await claim(store, clock)] == ["2"]


async def test_a_lease_that_ran_out_is_due_again_and_the_old_holder_may_not_settle(
    store: Store, clock: ManualClock
) -> None:
    """The fence of a new claim shuts the old holder out, although both hold the same action."""
    await add(store, clock, action("1"))
    [old] = await claim(store, clock)
    clock.advance(LEASE)
    [new] = await claim(store, clock)
    assert new.id == old.id
    with pytest.raises(outbox.LeaseLost):
        await settle(store, clock, old, State.DONE)
    await settle(store, clock, new, State.DONE)
    with pytest.raises(outbox.LeaseLost):
        await settle(store, clock, old, State.DEAD, error="late")


async def test_renewing_keeps_an_action_from_others_and_reports_a_lost_lease(
    store: Store, clock: ManualClock
) -> None:
    """A renewed lease lasts from the renewal; one that was lost is not renewed."""
    await add(store, clock, action("1"))
    [held] = await claim(store, clock)
    clock.advance(LEASE / 2)
    async with store.write() as tx:
        assert await outbox.renew(tx, [held], now=clock.now(), lease=LEASE) == {held.id}
    clock.advance(LEASE * 3 / 4)
    assert await claim(store, clock) == []
    clock.advance(LEASE)
    await claim(store, clock)
    async with store.write() as tx:
        assert await outbox.renew(tx, [held], now=clock.now(), lease=LEASE) == set()


async def test_waiting_on_purpose_costs_no_attempt(store: Store, clock: ManualClock) -> None:
    """`waited` sets the attempts back but never the fence."""
    await add(store, clock, action("1"))
    for fence in range(1, 4):
        [held] = await claim(store, clock)
        assert (held.attempt, held.fence) == (1, fence)
        await settle(store, clock, held, State.PENDING, error="not yet", waited=True)


async def test_a_key_is_taken_once_for_ever(store: Store, clock: ManualClock) -> None:
    """The same key again changes nothing, even after the first was done."""
    await add(store, clock, action("1"))
    [held] = await claim(store, clock)
    await settle(store, clock, held, State.DONE)
    async with store.write() as tx:
        assert await outbox.insert(tx, [action("1"), action("2")], now=clock.now()) == 1


async def test_operators_may_retry_dead_and_waiting_actions_and_nothing_else(
    store: Store, clock: ManualClock
) -> None:
    """Retry gives a dead action all its attempts back; a done or leased one is left alone."""
    await add(store, clock, action("1", "a"), action("2", "b"), action("3", "c"))
    one, two, _three = await claim(store, clock)
    await settle(store, clock, one, State.DEAD, error="x")
    await settle(store, clock, two, State.DONE)
    async with store.write() as tx:
        assert await outbox.retry(tx, [one.id, two.id, _three.id], now=clock.now()) == 1
    [again] = await claim(store, clock)
    assert (again.id, again.attempt) == (one.id, 1)


async def test_a_discarded_action_keeps_its_last_error_and_the_reason(
    store: Store, clock: ManualClock
) -> None:
    """What was given up says why, and can't be discarded twice."""
    await add(store, clock, action("1"))
    [held] = await claim(store, clock)
    await settle(store, clock, held, State.DEAD, error="boom")
    async with store.write() as tx:
        assert await outbox.discard(tx, held.id, reason="billed by hand", now=clock.now())
        assert not await outbox.discard(tx, held.id, reason="again", now=clock.now())
        row = await outbox.find(tx, held.id)
    assert row is not None
    assert row["state"] == "discarded"
    assert row["error"] == "discarded: billed by hand; last error: boom"


async def test_selecting_by_cause_takes_the_text_literally(store: Store, clock: ManualClock) -> None:
    """A cause with a percent sign is no wildcard."""
    await add(store, clock, action("1", "a"), action("2", "b"))
    one, two = await claim(store, clock)
    await settle(store, clock, one, State.DEAD, error="100% wrong")
    await settle(store, clock, two, State.DEAD, error="1000 wrong")
    async with store.read() as tx:
        rows = await outbox.select(tx, states=["dead"], cause="100%")
    assert [row["key"] for row in rows] == ["1"]


async def test_next_due_ignores_what_is_due_already(store: Store, clock: ManualClock) -> None:
    """What waits behind its subject is due but cannot start: it may not keep the engine spinning."""
    await add(store, clock, action("1"), action("2"))
    [held] = await claim(store, clock)
    async with store.read() as tx:
        assert await outbox.next_due(tx, after=clock.now()) == clock.now() + LEASE
    assert held.key == "1"


@pytest.mark.parametrize(
    "values",
    [
        {"state": "lost"},
        {"attempt": -1},
        {"attempt": 2, "fence": 1},
        {"state": "done"},  # settled, but without a time
        {"state": "dead", "settled_at": "now"},  # dead, but without an error
    ],
)
async def test_the_table_refuses_impossible_rows(
    store: Store, clock: ManualClock, values: dict[str, Any]
) -> None:
    """CHECK constraints hold what the state machine promises."""
    row = {
        "kind": "k",
        "subject": "s",
        "key": "1",
        "args": {},
        "state": "pending",
        "due_at": clock.now(),
        "attempt": 0,
        "fence": 0,
        "created_at": clock.now(),
    } | {name: clock.now() if value == "now" else value for name, value in values.items()}
    with pytest.raises(sa.exc.IntegrityError):
        async with store.write() as tx:
            await tx.execute(sa.insert(table).values(**row))


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_no_claim_reads_the_whole_backlog(store: Store, clock: ManualClock) -> None:
    """SQLite uses a partial index only for constants: with a bound state each claim would scan every row."""
    await add(store, clock, action("1"), action("2"))
    hot: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "outbox" in statement and not statement.startswith("EXPLAIN"):
            hot.append((statement, parameters))

    engines = [store._writer.sync_engine, store._reader.sync_engine]
    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", note)
    await claim(store, clock)
    async with store.read() as tx:
        await outbox.next_due(tx, after=clock.now())
        await outbox.oldest_pending(tx)
        await outbox.select(tx, states=["dead"], limit=1)
    for engine in engines:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert len(hot) == 4
    async with store.read() as tx:
        for statement, parameters in hot:
            rows = await tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plan = [row[-1] for row in rows]
            assert any("INDEX ix_outbox_" in step for step in plan), plan
            assert not [step for step in plan if step in {"SCAN outbox", "SCAN other"}], plan
