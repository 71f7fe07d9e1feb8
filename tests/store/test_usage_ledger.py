"""The ledger of usage on both databases: recorded once, moved only forward, summed to the unit."""

from datetime import timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa
from linked import HOUR, TEN, add_on, link, subscription

from billingd.domain.attempts import Action, State, Verdict
from billingd.domain.charges import Prices
from billingd.domain.events import REPORT_USAGE
from billingd.domain.periods import Period
from billingd.domain.tiers import TierSpec
from billingd.domain.usage import Booked, UsageRecord, book
from billingd.domain.windows import Window
from billingd.store import outbox, periods, usage
from billingd.store.engine import Store
from billingd.store.stakes import at_stake, usage_hold

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
    known = {window: Booked(recorded, revisions)} if recorded else {}
    return list(book(subscription_id, quota, {window: units}, known, before=window.end))


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


async def test_what_is_under_way_is_what_still_has_a_report_to_come(ledger: Store) -> None:
    """Neither what is reported, nor what gave up, nor what is outside of what was asked about."""
    sent, waiting, dead, elsewhere = (
        *await insert(ledger, [one for hour in range(3) for one in booked(10**hour, hours=hour)]),
        *await insert(ledger, booked(1000, subscription_id="s2")),
    )
    later = TEN + 3 * HOUR
    async with ledger.write() as tx:
        ids = (sent, waiting, dead, elsewhere)
        reports = [Action(REPORT_USAGE, f"usage:{one}", f"{one}", {"record": one}) for one in ids]
        await outbox.insert(tx, [Action("provision_plan", "plan:p1", "p"), *reports], now=TEN)
        by_record = {
            one.args.get("record"): one for one in await outbox.claim(tx, now=TEN, lease=HOUR, limit=9)
        }
        await usage.reported(tx, sent, usage_id="u", now=TEN)
        for one, state in ((sent, State.DONE), (dead, State.DEAD), (elsewhere, State.PENDING)):
            await outbox.settle(tx, by_record[one], Verdict(state, TEN, "so"), now=TEN)
    async with ledger.read() as tx:
        every = await usage.units_under_way(tx, subscription_id=None, start=None, end=later)
        of_one = await usage.units_under_way(tx, subscription_id="s1", start=None, end=later)
        after = await usage.units_under_way(tx, subscription_id=None, start=TEN + 2 * HOUR, end=later)
        before = await usage.units_under_way(tx, subscription_id=None, start=None, end=TEN)
    assert (every, of_one, after, before) == (1010, 10, 0, 0)


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
            ("s1", "q1"): {WINDOW: Booked(2_000_000_007, 4)},
            ("s2", "q2"): {WINDOW: Booked(1, 1)},
        }
        assert await usage.sums(tx, TEN - HOUR, TEN) == {}
        assert await usage.totals(tx) == {"recorded": 2_000_000_010, "held": 7}
        assert await usage.totals_by_subscription(tx) == {
            "s1": {"recorded": 2_000_000_009, "held": 7},
            "s2": {"recorded": 1},
        }


async def test_a_record_moves_only_where_it_may(ledger: Store) -> None:
    """recorded > held > recorded > reported, and from reported nowhere; held may be written off."""
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


async def test_a_held_record_may_be_written_off_and_then_only_be_found_reported(ledger: Store) -> None:
    """It is billed no more; but when it turns out to be at Recurly, the ledger says so."""
    one, two = await insert(ledger, booked(5) + booked(6, hours=1))
    async with ledger.write() as tx:
        assert not await usage.write_off(tx, one), "it is not held"
        assert await usage.hold(tx, one)
        assert await usage.write_off(tx, one)
        assert not await usage.write_off(tx, one)
        assert not await usage.release(tx, one)
        assert not await usage.hold(tx, one)
        assert await usage.totals(tx) == {"written_off": 5, "recorded": 6}
        assert (await usage.sums(tx, TEN, TEN + HOUR))["s1", "q1"] == {WINDOW: Booked(5, 1)}
        await usage.reported(tx, one, usage_id="u1", now=TEN)
        assert (await usage.find(tx, one)).state == "reported"
        assert not await usage.write_off(tx, two)


async def test_units_of_a_cycle_are_those_before_by_their_time(ledger: Store) -> None:
    """Of the same add-on, recorded earlier, inside the cycle, and not written off."""
    start, end = TEN, TEN + 2 * HOUR
    ids = await insert(
        ledger,
        booked(1)
        + booked(2, hours=1)
        + booked(4, hours=2)
        + booked(8, hours=-1)
        + booked(16, quota="q2")
        + booked(32, subscription_id="s2"),
    )
    last = max(ids) + 1
    async with ledger.write() as tx:
        assert await usage.units_in(tx, "s1", "q1", start, end, before_id=last) == 3
        assert await usage.units_in(tx, "s1", "q1", start, end, before_id=ids[1]) == 1
        assert await usage.units_in(tx, "s1", "q1", start, end, before_id=ids[0]) == 0
        await usage.hold(tx, ids[0])
        assert await usage.units_in(tx, "s1", "q1", start, end, before_id=last) == 3, "held ones count"
        await usage.write_off(tx, ids[0])
        assert await usage.units_in(tx, "s1", "q1", start, end, before_id=last) == 2


async def test_records_are_found_by_their_tags(ledger: Store) -> None:
    """However many are asked for; strangers are left out."""
    [one], [two] = booked(5), booked(6, hours=1)
    first, second = await insert(ledger, [one, two])
    async with ledger.write() as tx:
        await usage.hold(tx, second)
        found = await usage.by_tags(tx, [one.merchant_tag, "bd1:stranger"])
        assert found == {one.merchant_tag: usage.Known(first, "recorded", None, one)}
        many = [f"bd1:{number}" for number in range(40_000)]
        found = await usage.by_tags(tx, [*many, two.merchant_tag])
        assert found == {two.merchant_tag: usage.Known(second, "held", None, two)}
        assert await usage.by_tags(tx, []) == {}


async def test_a_held_record_says_what_is_at_stake_of_its_cycle(store: Store) -> None:
    """On top of what its cycle had before it; in the plan's currency; unknown without prices."""
    tiers = (TierSpec(10, Decimal(2)), TierSpec(None, Decimal(1)))
    await link(
        store,
        subscription("s1"),
        add_ons=[add_on("q1", tier="volume", prices=Prices("volume", None, tiers)), add_on("q2")],
    )
    ids = await insert(store, booked(100, hours=-1) + booked(5) + booked(4, hours=1) + booked(3, quota="q2"))
    async with store.write() as tx:
        await periods.seen(tx, "s1", state="active", current=Period(TEN, TEN + 30 * HOUR), now=TEN)
        recorded = await usage.find(tx, ids[2])
        assert await at_stake(tx, recorded) == Decimal(8)
        hold = await usage_hold(tx, recorded, "late_usage", "why", Action("k", "s", "key", {}))
        assert (hold.amount, hold.currency, hold.units) == ("8", "USD", 4)
        bare = await usage.find(tx, ids[3])
        assert await at_stake(tx, bare) is None
        hold = await usage_hold(tx, bare, "late_usage", "why", Action("k", "s", "key", {}))
        assert (hold.amount, hold.currency) == (None, None)
