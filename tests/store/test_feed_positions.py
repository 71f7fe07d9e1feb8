"""Places in the feed on both databases: forward only, and two marks behind."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from billingd.store import feed, schema
from billingd.store.engine import Store
from billingd.store.feed import OVERLAP, Place, PlaceLost

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
BEGUN = Place("t", "t1", 100, 100, 40, NOON, NOON)


async def begin(store: Store, topic_id: str = "t1", position: int = 100) -> None:
    async with store.write() as tx:
        await feed.begin(tx, "t", topic_id, position=position, read_from=40, now=NOON)


async def find(store: Store) -> Place:
    async with store.read() as tx:
        found = await feed.find(tx, "t")
    assert found is not None
    return found


async def read(store: Store, position: int, began: datetime) -> Place:
    """A whole reading."""
    seen = await find(store)
    async with store.write() as tx:
        await feed.advance(tx, seen, position=position, began=began, finished_at=began)
    return await find(store)


async def test_a_topic_is_begun_and_begun_anew(store: Store) -> None:
    """Whatever was read of it before, also at a lower position; topics do not share."""
    async with store.read() as tx:
        assert await feed.find(tx, "t") is None
    await begin(store)
    assert await find(store) == BEGUN
    await begin(store, "t2", 50)
    assert await find(store) == Place("t", "t2", 50, 50, 40, NOON, NOON)
    await begin(store, "t2", 20)
    assert (await find(store)).read_from == 20, "never behind its own position"


async def test_a_position_never_moves_back(store: Store) -> None:
    """A page of the overlap has lower numbers than were reached before; only the last page ends a reading."""
    await begin(store)
    for position, reached in ((150, 150), (60, 150), (151, 151)):
        async with store.write() as tx:
            await feed.advance(tx, BEGUN, position=position, began=NOON + 9 * MINUTE, finished_at=None)
        assert await find(store) == replace(BEGUN, position=reached)


async def test_a_reading_begins_where_the_feed_was_an_overlap_ago(store: Store) -> None:
    """For each number: it is read again at least once, an overlap after it was first passed."""
    await begin(store)
    assert await read(store, 110, NOON + MINUTE) == replace(BEGUN, position=110, read_at=NOON + MINUTE)
    at = NOON + OVERLAP
    assert await read(store, 120, at) == Place("t", "t1", 120, 110, 100, at, at)
    at += OVERLAP - MINUTE / 60
    assert await read(store, 130, at) == Place("t", "t1", 130, 110, 100, NOON + OVERLAP, at)
    at += MINUTE
    assert await read(store, 140, at) == Place("t", "t1", 140, 130, 110, at, at)


async def test_any_gap_below_a_position_is_read_again_after_the_overlap(store: Store) -> None:
    """Turned at odd moments: no reading that is an overlap later than the passing of a number skips it."""
    await begin(store)
    passed: dict[int, datetime] = {}
    covered: set[int] = set()
    at = NOON
    for turn in range(60):
        at += timedelta(seconds=7 + turn * 13 % 90)
        read_from = (await find(store)).read_from
        covered |= {number for number, when in passed.items() if at >= when + OVERLAP and number > read_from}
        top = 101 + turn
        passed[top] = at
        after = await read(store, top, at)
        assert {number for number in passed if number <= after.read_from} <= covered
    assert len(covered) > 40


async def test_a_clock_that_was_set_back_makes_it_wait_anew(store: Store) -> None:
    """By the new clock the overlap has not passed; it passes all the same."""
    await begin(store)
    early = NOON - timedelta(hours=5)
    assert await read(store, 110, early) == replace(BEGUN, position=110, marked_at=early, read_at=early)
    found = await read(store, 120, early + OVERLAP)
    assert (found.read_from, found.mark) == (100, 110)


async def test_whoever_reads_a_topic_that_was_begun_anew_keeps_nothing(store: Store) -> None:
    """Its page belongs to another topic."""
    await begin(store)
    seen = await find(store)
    await begin(store, "t2", 50)
    with pytest.raises(PlaceLost):
        async with store.write() as tx:
            await feed.advance(tx, seen, position=120, began=NOON, finished_at=NOON)
    assert (await find(store)).position == 50


async def test_of_two_readers_one_turns_the_marks(store: Store) -> None:
    """Two processes on one store: the slower has not seen what the faster has, and moves no mark."""
    await begin(store)
    slower = await find(store)
    await read(store, 120, NOON + OVERLAP)
    async with store.write() as tx:
        began = NOON + OVERLAP + MINUTE
        await feed.advance(tx, slower, position=115, began=began, finished_at=began)
    assert await find(store) == Place("t", "t1", 120, 100, 100, NOON + OVERLAP, began)


@pytest.mark.parametrize("changed", [{"read_from": 101}, {"mark": 101}, {"read_from": -1}, {"mark": 39}])
async def test_impossible_places_are_refused(store: Store, changed: dict[str, int]) -> None:
    """read_from <= mark <= position."""
    await begin(store)
    with pytest.raises(sa.exc.IntegrityError, match="ck_feed_positions_position"):
        async with store.write() as tx:
            await tx.execute(sa.update(schema.feed_positions).values(**changed))
