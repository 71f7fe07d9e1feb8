"""Two processes claim at once on PostgreSQL: never the same action, never two of one subject."""

import asyncio
from collections import Counter
from datetime import timedelta

import pytest
from manual_clock import ManualClock

from billingd.domain.attempts import Action, Leased, State, Verdict
from billingd.store import outbox
from billingd.store.engine import Store

POSTGRES = pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
LEASE = timedelta(minutes=2)


async def add(store: Store, clock: ManualClock, *actions: Action) -> None:
    async with store.write() as tx:
        await outbox.insert(tx, actions, now=clock.now())


async def claim(store: Store, clock: ManualClock, limit: int = 10) -> list[Leased]:
    async with store.write() as tx:
        return await outbox.claim(tx, now=clock.now(), lease=LEASE, limit=limit)


@POSTGRES
async def test_what_one_is_claiming_the_other_passes_by(store_url: str, clock: ManualClock) -> None:
    """While the first has not committed the second takes other subjects, and waits for nobody."""
    async with Store(store_url) as one, Store(store_url) as two:
        await add(one, clock, *(Action("k", f"s{n % 3}", str(n), {}) for n in range(6)))
        async with one.write() as tx:
            first = await outbox.claim(tx, now=clock.now(), lease=LEASE, limit=2)
            second = await claim(two, clock)
        assert [leased.key for leased in first] == ["0", "1"]
        assert [leased.key for leased in second] == ["2"]
        assert await claim(two, clock) == []


@POSTGRES
async def test_many_claims_at_once_share_the_work_without_overlap(store_url: str, clock: ManualClock) -> None:
    """Each action is done once, in the order of its subject, by whichever process."""
    subjects, each = 5, 6
    done: list[str] = []
    running: Counter[str] = Counter()
    async with Store(store_url) as one, Store(store_url) as two:
        actions = [Action("k", f"s{n % subjects}", f"{n % subjects}:{n}", {}) for n in range(subjects * each)]
        await add(one, clock, *actions)

        async def worker(store: Store) -> None:
            while len(done) < len(actions):
                for leased in await claim(store, clock, limit=2):
                    running[leased.subject] += 1
                    assert running[leased.subject] == 1
                    await asyncio.sleep(0)
                    async with store.write() as tx:
                        verdict = Verdict(State.DONE, clock.now())
                        await outbox.settle(tx, leased, verdict, now=clock.now())
                        done.append(leased.key)
                        running[leased.subject] -= 1

        await asyncio.gather(*(worker(store) for store in (one, two, one, two)))
    assert sorted(done) == sorted(action.key for action in actions)
    for subject in range(subjects):
        mine = [int(key.split(":")[1]) for key in done if key.startswith(f"{subject}:")]
        assert mine == sorted(mine)


@POSTGRES
async def test_an_older_action_that_is_committed_later_waits_for_the_younger_under_way(
    store_url: str, clock: ManualClock
) -> None:
    """Ids are given before commits: the younger one was claimed while nobody could see the older."""
    async with Store(store_url) as one, Store(store_url) as two:
        async with one.write() as tx:
            await outbox.insert(tx, [Action("k", "s", "older", {})], now=clock.now())
            await add(two, clock, Action("k", "s", "younger", {}))
            [younger] = await claim(two, clock)
        assert younger.key == "younger"
        assert await claim(two, clock) == [], "one at a time"
        async with two.write() as tx:
            await outbox.settle(tx, younger, Verdict(State.DONE, clock.now()), now=clock.now())
        assert [leased.key for leased in await claim(two, clock)] == ["older"]


@POSTGRES
async def test_a_key_that_two_insert_at_once_is_there_once(store_url: str, clock: ManualClock) -> None:
    """The second waits for the first, and then finds it taken."""
    async with Store(store_url) as one, Store(store_url) as two:

        async def insert(store: Store) -> int:
            async with store.write() as tx:
                return await outbox.insert(tx, [Action("k", "s", "same", {})], now=clock.now())

        assert sorted(await asyncio.gather(insert(one), insert(two))) == [0, 1]
