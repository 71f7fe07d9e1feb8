"""The ledger of usage on both databases: recorded once, moved only forward, summed to the unit."""

from datetime import timedelta

import pytest
import sqlalchemy as sa
from linked import HOUR, TEN, add_on, link, subscription

from billingd.domain.usage import UsageRecord, book
from billingd.domain.windows import Window
from billingd.store import usage
from billingd.store.engine import Store

WINDOW = Window(TEN, TEN + HOUR)


def booked(
    units: int,
    *,
    subscription_id: str = "s1",
    quota: str = "q1",
    hours: int = 0,
    recorded: int = 0,
    revisions: int = 0,
) -> list[UsageRecord]:
    window = Window(TEN + hours * HOUR, TEN + (hours + 1) * HOUR)
    return list(book(subscription_id, quota, window, read=units, recorded=recorded, revisions=revisions))


@pytest.fixture
async def ledger(store: Store) -> Store:
    await link(store, subscription("s1"), subscription("s2"), add_ons=[add_on("q1"), add_on("q2")])
    return store


async def insert(store: Store, records: list[UsageRecord], state: str = "recorded") -> list[int]:
    async with store.write() as tx:
        return [id_ for id_, _ in await usage.insert(tx, records, now=TEN, state=state)]


async def test_a_record_comes_back_as_it_was_recorded(ledger: Store) -> None:
    """With where it belongs at Recurly."""
    [record] = booked(5)
    [record_id] = await insert(ledger, [record])
    async with ledger.read() as tx:
        found = await usage.find(tx, record_id)
    assert (found.record, found.state, found.usage_id, found.recorded_at) == (record, "recorded", None, TEN)


async def test_many_records_are_placed_in_order_whatever_their_number(ledger: Store) -> None:
    """More than one statement can carry; ids and records belong together."""
    records = [record for hour in range(2500) for record in booked(hour + 1, hours=hour)]
    async with ledger.write() as tx:
        placed = await usage.insert(tx, records, now=TEN)
    assert [record for _, record in placed] == records
    assert [id_ for id_, _ in placed] == sorted({id_ for id_, _ in placed})
    async with ledger.read() as tx:
        assert (await usage.find(tx, placed[2000][0])).record == records[2000]


async def test_the_same_record_twice_is_refused(ledger: Store) -> None:
    """By its tag and by its place, and nothing of that transaction is kept."""
    await insert(ledger, booked(5))
    with pytest.raises(sa.exc.IntegrityError):
        await insert(ledger, booked(7, hours=1) + booked(5))
    async with ledger.read() as tx:
        assert await usage.totals(tx) == {"recorded": 5}


async def test_sums_are_by_window_with_the_newest_revision(ledger: Store) -> None:
    """What was recorded, held records too: a second reading books only the difference."""
    await insert(ledger, booked(2_000_000_000))
    await insert(ledger, booked(2_000_000_007, recorded=2_000_000_000, revisions=3), state="held")
    await insert(ledger, booked(1, subscription_id="s2", quota="q2"))
    await insert(ledger, booked(9, hours=1))
    async with ledger.read() as tx:
        assert await usage.sums(tx, TEN, TEN + HOUR) == {
            ("s1", "q1", WINDOW): usage.Sum(2_000_000_007, 4),
            ("s2", "q2", WINDOW): usage.Sum(1, 1),
        }
        assert await usage.sums(tx, TEN - HOUR, TEN) == {}
        assert await usage.totals(tx) == {"recorded": 2_000_000_010, "held": 7}
        assert await usage.totals_by_subscription(tx) == {
            "s1": {"recorded": 2_000_000_009, "held": 7},
            "s2": {"recorded": 1},
        }


async def test_a_record_moves_only_where_it_may(ledger: Store) -> None:
    """recorded > held > recorded > reported, and from reported nowhere."""
    [one] = await insert(ledger, booked(5))
    async with ledger.write() as tx:
        assert not await usage.release(tx, one)
        assert await usage.hold(tx, one)
        assert not await usage.hold(tx, one)
        assert await usage.release(tx, one)
        await usage.reported(tx, one, usage_id="u1", now=TEN + HOUR)
        assert not await usage.hold(tx, one)
        assert not await usage.release(tx, one)
        await usage.reported(tx, one, usage_id="u2", now=TEN + 2 * HOUR)
        found = await usage.find(tx, one)
    assert (found.state, found.usage_id) == ("reported", "u1"), "the first report stands"


async def test_what_is_unreported_is_counted_by_subscription(ledger: Store) -> None:
    """Held records wait for a person and do not count."""
    one, two = await insert(ledger, booked(5) + booked(6, hours=1))
    await insert(ledger, booked(7, subscription_id="s2"), state="held")
    async with ledger.write() as tx:
        assert await usage.unreported_of(tx, "s1") == 2
        await usage.reported(tx, one, usage_id="u1", now=TEN)
        assert await usage.unreported_of(tx, "s1") == 1
        await usage.hold(tx, two)
        assert [await usage.unreported_of(tx, id_) for id_ in ("s1", "s2", "s3")] == [0, 0, 0]


async def test_windows_are_shown_newest_first(ledger: Store) -> None:
    """Records and units, recorded and reported."""
    one, *_ = await insert(ledger, booked(5) + booked(6, quota="q2") + booked(9, hours=1))
    async with ledger.write() as tx:
        await usage.reported(tx, one, usage_id="u1", now=TEN)
        shown = await usage.by_window(tx, limit=2)
        assert await usage.by_window(tx, limit=1) == shown[:1]
    assert [
        (row["window_start"], row["records"], row["recorded_units"], row["reported_units"]) for row in shown
    ] == [
        (TEN + HOUR, 1, 9, 0),
        (TEN, 2, 11, 5),
    ]


async def test_traffic_of_nobody_is_kept_as_it_is_read_last(ledger: Store) -> None:
    """Reading a window again replaces the number, it does not add up."""
    async with ledger.write() as tx:
        assert await usage.unlinked_units(tx) == 0
        for units in (5, 8):
            await usage.set_unlinked(tx, "x", "q", TEN, units, now=TEN)
        await usage.set_unlinked(tx, "x", "q", TEN + HOUR, 2**40, now=TEN + timedelta(days=1))
        assert await usage.unlinked_units(tx) == 8 + 2**40
