"""Poll: windows into usage records, exactly once, on both databases; the source is a fake."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linked import HOUR, PLAN, TEN, Bills, Counted, add_on, link, subscription
from manual_clock import ManualClock

from billingd.domain.errors import Retryable
from billingd.domain.periods import Period
from billingd.domain.usage import Reading
from billingd.domain.windows import Window
from billingd.store import held, links, schema, usage, watermarks
from billingd.store.engine import Store, StoreUnavailable, Tx
from billingd.store.watermarks import Watermark, WatermarkMoved
from billingd.traffic.periods import PeriodWatch
from billingd.traffic.poll import (
    AUDIT_LEAD,
    WINDOWS_MAX,
    TrafficPoller,
    audit_due,
    audit_hour,
    audit_spread,
)


@pytest.fixture
def source() -> Counted:
    return Counted()


def a_poller(
    store: Store, clock: ManualClock, source: Counted, bills: Bills | None = None, **changes: Any
) -> TrafficPoller:
    terms = {"length": HOUR, "settle": 2 * HOUR, "horizon": timedelta(days=1)} | changes
    watch = PeriodWatch(store, clock, bills or Bills(clock))
    return TrafficPoller(store, clock, source, watch, wake_outbox=asyncio.Event(), **terms)


async def rows(store: Store, table: sa.Table) -> list[dict[str, Any]]:
    async with store.read() as tx:
        return [dict(row) for row in (await tx.execute(sa.select(table))).mappings()]


async def records(store: Store) -> list[tuple[int, int, int, str]]:
    """(hours after ten, revision, units, state) of each usage record, in order."""
    found = sorted(await rows(store, schema.usage_records), key=lambda row: int(row["id"]))
    return [
        ((row["window_start"] - TEN) // HOUR, row["revision"], row["units"], row["state"]) for row in found
    ]


async def held_now(store: Store) -> dict[str, Any]:
    async with store.read() as tx:
        return {row["kind"]: row for row in await held.standing(tx)}


async def unlinked(store: Store) -> int:
    async with store.read() as tx:
        return await usage.unlinked_units(tx)


async def test_a_window_is_read_when_it_has_settled_and_not_before(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """The first reading begins with the present window; each is read once `settle` after its end."""
    poller = a_poller(store, clock, source)
    clock.advance(timedelta(minutes=20))
    await poller.run_once()
    await link(store, subscription())
    source.serve(5)
    clock.at = TEN + 3 * HOUR - timedelta(seconds=1)
    await poller.run_once()
    assert (source.asked, await records(store)) == ([], [])
    clock.at = TEN + 3 * HOUR
    await poller.run_once()
    assert await records(store) == [(0, 1, 5, "recorded")]
    [mark] = await rows(store, schema.watermarks)
    assert (mark["source"], mark["at"]) == ("metrics", TEN + HOUR)


async def test_each_record_has_an_action_a_tag_and_a_time_inside_its_window(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """What Recurly will be told is fixed here; the outbox is woken."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription())
    source.serve(5)
    clock.advance(3 * HOUR)
    await poller.run_once()
    [record] = await rows(store, schema.usage_records)
    [action] = await rows(store, schema.outbox)
    assert record["usage_timestamp"] == TEN + HOUR - timedelta(seconds=1)
    assert record["merchant_tag"].startswith("bd1:")
    assert (action["kind"], action["subject"]) == ("report_usage", "usage:s1:q1")
    assert action["key"] == f"report_usage:{record['merchant_tag']}"
    assert action["args"] == {"record": record["id"]}
    assert poller._wake_outbox.is_set()


async def test_one_reading_spans_many_windows_and_subscriptions(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Calls to Amplify do not grow with windows or subscriptions, but their span is bounded."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, *(subscription(f"s{n}") for n in range(1, 6)), add_ons=[add_on("q1"), add_on("q2")])
    for hour in range(30):
        for n in range(1, 6):
            source.serve(1, hours=hour, subscription=f"s{n}", quota=f"q{1 + n % 2}")
    clock.advance(32 * HOUR)
    await poller.run_once()
    assert [(asked["end"] - asked["start"]) / HOUR for asked in source.asked] == [WINDOWS_MAX, 6]
    assert source.asked[0]["subscriptions"] == {f"s{n}" for n in range(1, 6)}
    assert (source.asked[0]["organizations"], source.asked[0]["units"]) == ({"o1"}, {"calls"})
    found = await records(store)
    assert len(found) == 150
    assert {revision for _, revision, _, _ in found} == {1}


async def test_reading_again_books_only_what_arrived_late(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Trailing windows are read again up to the horizon; growth becomes the next revision."""
    poller = a_poller(store, clock, source, horizon=2 * HOUR)
    await poller.run_once()
    await link(store, subscription())
    source.serve(5)
    clock.advance(3 * HOUR)
    await poller.run_once()
    await poller.run_once()
    source.serve(8)
    clock.advance(HOUR)
    await poller.run_once()
    assert await records(store) == [(0, 1, 5, "recorded"), (0, 2, 3, "recorded")]
    clock.advance(3 * HOUR)
    await poller.run_once()
    source.serve(9)
    clock.advance(HOUR)
    await poller.run_once()
    assert len(await records(store)) == 2, "past the horizon"
    assert await poller.read_range(TEN, TEN + HOUR) == 1
    assert await poller.read_range(TEN, TEN + HOUR) == 0
    assert (await records(store))[2] == (0, 3, 1, "recorded")
    tags = [row["merchant_tag"] for row in await rows(store, schema.usage_records)]
    assert len(set(tags)) == 3


async def test_a_reading_that_shrank_is_held_told_once_and_never_refunded(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Nothing is taken back; when the numbers agree again it is held no longer."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription())
    source.serve(5)
    clock.advance(3 * HOUR)
    await poller.run_once()
    for less in (3, 0):
        source.serve(less)
        clock.advance(HOUR)
        await poller.run_once()
    assert await records(store) == [(0, 1, 5, "recorded")]
    hold = (await held_now(store))["reading_shrank"]
    assert (hold["units"], hold["subscription_id"]) == (5, "s1")
    actions = Counter(row["kind"] for row in await rows(store, schema.outbox))
    assert actions == {"report_usage": 1, "notify_provider": 1}
    source.serve(6)
    clock.advance(HOUR)
    await poller.run_once()
    assert await held_now(store) == {}
    assert await records(store) == [(0, 1, 5, "recorded"), (0, 2, 1, "recorded")]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_one_notice_tells_of_all_that_one_reading_holds(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """An empty answer from Amplify would else be a notice for each window of each subscription."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription())
    for hours in range(3):
        source.serve(5, hours=hours)
    clock.advance(6 * HOUR)
    await poller.run_once()
    source.units.clear()
    await poller.run_once()
    held_items = [row for row in await rows(store, schema.held) if row["kind"] == "reading_shrank"]
    assert len(held_items) == 3
    [notice] = [row for row in await rows(store, schema.outbox) if row["kind"] == "notify_provider"]
    assert notice["args"]["body"].startswith("3 things are held")


async def test_one_of_an_unknown_organization_is_asked_for_until_it_was_over(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """And a count that is missing is no zero, for its organization may only not have been found."""
    poller = a_poller(store, clock, source, horizon=2 * HOUR)
    await poller.run_once()
    await link(
        store,
        subscription("s1"),
        subscription("s2", organization_id="", usage_until=TEN + 3 * HOUR, state="ending"),
    )
    source.serve(5, subscription="s2")
    clock.advance(3 * HOUR)
    await poller.run_once()
    assert source.asked[-1]["organizations"] == {"o1", ""}
    assert await records(store) == [(0, 1, 5, "recorded")]
    source.units.clear()
    clock.advance(HOUR)
    await poller.run_once()
    assert "reading_shrank" not in await held_now(store)
    for _ in range(4):
        clock.advance(HOUR)
        await poller.run_once()
    assert source.asked[-1]["start"] >= TEN + 3 * HOUR
    assert source.asked[-1]["organizations"] == {"o1"}


async def test_only_traffic_from_the_link_on_is_billed(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """What was counted before `usage_from` is unlinked; the window in which it lies is cut there."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription(usage_from=TEN + HOUR / 2))
    source.serve(5)
    source.serve(3, hours=0.5)
    source.serve(7, hours=1)
    clock.advance(4 * HOUR)
    await poller.run_once()
    found = await rows(store, schema.usage_records)
    assert [(row["window_start"] - TEN, row["window_end"] - TEN, row["units"]) for row in found] == [
        (HOUR / 2, HOUR, 3),
        (HOUR, 2 * HOUR, 7),
    ]
    assert await unlinked(store) == 5


async def test_traffic_of_nobody_is_counted_not_dropped(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Unknown subscription, unknown quota, another plan's quota, no id at all; read twice, counted once."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    other = replace(PLAN, plan_id="p2", name="other", plan_code="amplify-plan-p2")
    await link(store, subscription())
    await link(store, plan=other, add_ons=[add_on("q2", "p2")])
    source.serve(1, subscription="stranger")
    source.serve(2, quota="stranger")
    source.serve(4, quota="q2")
    source.serve(8, subscription="", quota="")
    clock.advance(3 * HOUR)
    await poller.run_once()
    clock.advance(HOUR)
    await poller.run_once()
    assert await unlinked(store) == 15
    assert await records(store) == []


async def test_with_nothing_linked_amplify_is_not_asked(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """There is no organisation to ask about; the watermark moves on all the same."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    clock.advance(5 * HOUR)
    await poller.run_once()
    assert source.asked == []
    [mark] = await rows(store, schema.watermarks)
    assert mark["at"] == TEN + 3 * HOUR


async def test_more_than_nine_digits_are_split_over_several_records(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Recurly takes nine digits in one record; each part has a tag of its own."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription())
    source.serve(2_000_000_005)
    clock.advance(3 * HOUR)
    await poller.run_once()
    assert await records(store) == [
        (0, 1, 999_999_999, "recorded"),
        (0, 2, 999_999_999, "recorded"),
        (0, 3, 7, "recorded"),
    ]
    assert len(await rows(store, schema.outbox)) == 3


@pytest.mark.parametrize(
    ("state", "hour", "expected"),
    [
        ("ending", 0, "recorded"),
        ("ending", 1, "recorded"),  # the window in which it ended
        ("ending", 2, "held"),
        ("expired", 0, "held"),
        ("canceled", 0, "recorded"),  # an invoice follows
        ("canceled", 2, "held"),
    ],
)
async def test_usage_after_the_end_is_held(
    store: Store, clock: ManualClock, source: Counted, state: str, hour: int, expected: str
) -> None:
    """What shows up after the end is recorded and held with a reason, told once, and never reported."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    ending = subscription(state="ending", usage_until=TEN + 1.5 * HOUR)
    await link(store, ending)
    if state != "ending":
        async with store.write() as tx:
            await links.end(tx, "s1", billed_state=state, now=TEN + 2 * HOUR)
    source.serve(5, hours=hour)
    clock.advance(6 * HOUR)
    await poller.run_once()
    clock.advance(HOUR)
    await poller.run_once()
    assert await records(store) == [(hour, 1, 5, expected)]
    outbox_rows = await rows(store, schema.outbox)
    kinds = Counter(row["kind"] for row in outbox_rows if row["kind"] != "audit_usage")
    if expected == "recorded":
        assert (await held_now(store), kinds) == ({}, {"report_usage": 1})
    else:
        hold = (await held_now(store))["usage_after_end"]
        assert (hold["units"], hold["subscription_id"], hold["add_on_code"]) == (5, "s1", "amplify-quota-q1")
        assert hold["action"]["kind"] == "report_usage"
        assert kinds == {"notify_provider": 1}


class Failing(Store):
    """A store that fails at the end of a transaction, before it commits."""

    failing = False

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        async with super().write() as tx:
            yield tx
            if self.failing:
                raise StoreUnavailable("gone")


async def test_watermark_records_and_actions_are_one_transaction(
    store_url: str, clock: ManualClock, source: Counted
) -> None:
    """A crash before the commit leaves none of them, and the next start all of them."""
    async with Failing(store_url) as store:
        poller = a_poller(store, clock, source)
        await poller.run_once()
        await link(store, subscription())
        source.serve(5)
        source.serve(3, subscription="stranger")
        clock.advance(3 * HOUR)
        await poller._begin()
        store.failing = True
        with pytest.raises(StoreUnavailable):
            await poller._poll()
        store.failing = False
        [mark] = await rows(store, schema.watermarks)
        assert mark["at"] == TEN
        for table in (schema.usage_records, schema.outbox, schema.unlinked_traffic):
            assert await rows(store, table) == []
        await a_poller(store, clock, source).run_once()
        assert await records(store) == [(0, 1, 5, "recorded")]


async def test_a_source_that_fails_moves_nothing(store: Store, clock: ManualClock) -> None:
    """The windows stay due."""

    class Away(Counted):
        async def read(self, **asked: Any) -> Any:
            raise Retryable("away")

    poller = a_poller(store, clock, Away())
    await poller.run_once()
    await link(store, subscription())
    clock.advance(5 * HOUR)
    with pytest.raises(Retryable):
        await poller.run_once()
    [mark] = await rows(store, schema.watermarks)
    assert mark["at"] == TEN


async def test_two_pollers_that_read_the_same_windows_book_them_once(
    store_url: str, clock: ManualClock, source: Counted
) -> None:
    """Two processes on one store: the second to write finds the watermark moved, and books nothing."""
    async with Store(store_url) as one, Store(store_url) as two:
        first, second = a_poller(one, clock, source), a_poller(two, clock, source)
        await first.run_once()
        await link(one, subscription())
        source.serve(5)
        clock.advance(3 * HOUR)
        source.before.clear()
        tasks = [asyncio.create_task(poller.run_once()) for poller in (first, second)]
        while len(source.asked) < 2:  # noqa: ASYNC110 - both are at the source
            await asyncio.sleep(0)
        source.before.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {bool, WatermarkMoved}
        assert await records(one) == [(0, 1, 5, "recorded")]

        source.serve(6)
        source.before.clear()
        again = [asyncio.create_task(poller.read_range(TEN, TEN + HOUR)) for poller in (first, second)]
        while len(source.asked) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        source.before.set()
        await asyncio.gather(*again)
        assert await records(one) == [(0, 1, 5, "recorded"), (0, 2, 1, "recorded")]


@pytest.mark.parametrize(
    ("first", "then", "changes_at"),
    [
        (HOUR, 2 * HOUR, TEN + 2 * HOUR),
        (HOUR, HOUR / 4, TEN + HOUR),
        (2 * HOUR, 3 * HOUR, TEN + 2 * HOUR),  # 12:00, where both begin
    ],
)
async def test_a_new_window_length_comes_into_force_where_both_lengths_begin(
    store: Store, clock: ManualClock, source: Counted, first: timedelta, then: timedelta, changes_at: datetime
) -> None:
    """Also when the reading would jump over that edge; no unit is read in two sizes, none is skipped."""
    await a_poller(store, clock, source, length=first).run_once()
    await link(store, subscription())
    source.units = {("s1", "q1", TEN): 5}
    clock.at = TEN + first + 2 * HOUR
    await a_poller(store, clock, source, length=first).run_once()
    source.units = {("s1", "q1", TEN): 5, ("s1", "q1", changes_at): 7}
    clock.at = TEN + 15 * HOUR
    poller = a_poller(store, clock, source, length=then)
    await poller.run_once()
    await poller.run_once()
    [mark] = await rows(store, schema.watermarks)
    assert (mark["window_seconds"], mark["regular_since"]) == (then.total_seconds(), changes_at)
    assert mark["at"] == changes_at + (TEN + 13 * HOUR - changes_at) // then * then
    found = await rows(store, schema.usage_records)
    assert [(row["window_start"], row["window_end"], row["units"]) for row in found] == [
        (TEN, TEN + first, 5),
        (changes_at, changes_at + then, 7),
    ]
    assert await held_now(store) == {}


async def test_a_changed_length_never_reads_a_window_of_the_old_one_again(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """A backfill reaches back no further than the change."""
    await a_poller(store, clock, source).run_once()
    await link(store, subscription())
    source.serve(5)
    clock.advance(4 * HOUR)
    await a_poller(store, clock, source).run_once()
    poller = a_poller(store, clock, source, length=2 * HOUR)
    clock.advance(4 * HOUR)
    await poller.run_once()
    source.serve(50)
    assert await poller.read_range(TEN - 5 * HOUR, TEN + 9 * HOUR) == 0


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    growth=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["s1", "s2"]), st.integers(1, 3_000_000_000)),
        max_size=10,
    )
)
async def test_what_is_recorded_equals_what_was_served_however_it_arrives(
    store_url: str, growth: list[tuple[int, str, int]]
) -> None:
    """After any sequence of growing readings the ledger's sum is the last reading's, to the unit."""
    clock, source = ManualClock(), Counted()
    async with Store(store_url) as store:
        async with store.write() as tx:
            for table in reversed(schema.metadata.sorted_tables):
                await tx.execute(table.delete())
        poller = a_poller(store, clock, source)
        await poller.run_once()
        await link(store, subscription("s1"), subscription("s2"))
        for hour, subscription_id, units in growth:
            key = (subscription_id, "q1", TEN + hour * HOUR)
            source.units[key] = source.units.get(key, 0) + units
            clock.advance(HOUR)
            await poller.run_once()
        clock.advance(6 * HOUR)
        await poller.run_once()
        async with store.read() as tx:
            sums = await usage.sums(tx, TEN, TEN + 24 * HOUR)
            mark = await watermarks.find(tx, "metrics")
        booked = {
            (*pair, window): one.units for pair, pieces in sums.items() for window, one in pieces.items()
        }
        assert booked == {
            (sub, quota, Window(start, start + HOUR)): units
            for (sub, quota, start), units in source.units.items()
        }
        assert mark is not None
        assert await held_now(store) == {}


class Hours(Counted):
    """A source of any name, over one truth."""

    def __init__(self, name: str, truth: Counted) -> None:
        super().__init__()
        self.name, self.units = name, truth.units


async def test_another_source_goes_on_where_the_first_one_was(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """What had not settled yet when `traffic.source` was changed is read by the new one."""
    await link(store, subscription())
    await a_poller(store, clock, Hours("metrics", source)).run_once()
    for hour in range(10):
        source.serve(1, hours=hour)
    clock.at = TEN + 5 * HOUR
    await a_poller(store, clock, Hours("metrics", source)).run_once()
    for at in (5 * HOUR, 12 * HOUR):
        clock.at = TEN + at
        await a_poller(store, clock, Hours("summary", source)).run_once()
    assert [(hour, units) for hour, _, units, _ in await records(store)] == [(n, 1) for n in range(10)]
    assert await held_now(store) == {}


async def test_back_at_the_first_source_no_window_is_read_in_another_size(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Days by one source, then hours by the other, which was left behind: every unit once."""
    midnight = TEN - 10 * HOUR
    clock.at = midnight
    await link(store, subscription(usage_from=midnight))
    hourly, daily = Hours("metrics", source), Hours("summary", source)
    await a_poller(store, clock, hourly).run_once()
    await a_poller(store, clock, daily, length=24 * HOUR).run_once()
    for hour in range(10):
        source.serve(1, hours=hour)
    clock.at = midnight + 30 * HOUR
    await a_poller(store, clock, daily, length=24 * HOUR).run_once()
    await a_poller(store, clock, hourly).run_once()
    assert [units for _, _, units, _ in await records(store)] == [10]


async def test_what_ends_while_amplify_answers_is_judged_by_its_end(
    store: Store, clock: ManualClock, source: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units from after the end are a person's to decide, however the end and the reading overlap."""
    poller = a_poller(store, clock, source)
    await poller.run_once()
    await link(store, subscription())
    source.serve(5, hours=3)
    answer = source.read

    async def read(**asked: Any) -> tuple[Reading, ...]:
        async with store.write() as tx:
            assert await links.begin_ending(tx, "s1", usage_until=TEN + 2 * HOUR)
        return await answer(**asked)

    monkeypatch.setattr(source, "read", read)
    clock.at = TEN + 6 * HOUR
    await poller.run_once()
    assert await records(store) == [(3, 1, 5, "held")]
    assert set(await held_now(store)) == {"usage_after_end"}


async def pieces(store: Store) -> list[tuple[timedelta, timedelta, int]]:
    """(start, end, units) of each usage record, counted from ten, in order of their windows."""
    found = [
        (row["window_start"] - TEN, row["window_end"] - TEN, row["units"])
        for row in await rows(store, schema.usage_records)
    ]
    return sorted(found)


async def test_a_window_is_cut_where_the_bill_is(store: Store, clock: ManualClock, source: Counted) -> None:
    """Each side is asked for by itself; other subscriptions' windows stay whole."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    await link(store, subscription("s1"), subscription("s2"))
    bills.show(Period(TEN - 30 * HOUR, TEN + 5 * HOUR / 3))
    bills.show(Period(TEN - 30 * HOUR, TEN + 30 * HOUR), subscription="s2")
    for subscription_id in ("s1", "s2"):
        source.serve(5, hours=1, subscription=subscription_id)
        source.serve(7, hours=1.75, subscription=subscription_id)
    await poller.run_once()
    clock.advance(4 * HOUR)
    bills.show(Period(TEN + 5 * HOUR / 3, TEN + 30 * HOUR))
    await poller.run_once()
    cut_at = 5 * HOUR / 3
    assert await pieces(store) == [(HOUR, cut_at, 5), (HOUR, 2 * HOUR, 12), (cut_at, 2 * HOUR, 7)]
    assert [(asked["start"] - TEN, asked["end"] - TEN) for asked in source.asked[-2:]] == [
        (HOUR, cut_at),
        (cut_at, 2 * HOUR),
    ]
    asked = len(source.asked)
    clock.advance(HOUR)
    await poller.run_once()
    assert len(source.asked) == asked + 1, "what is recorded already is not asked for by piece again"
    assert await held_now(store) == {}


async def test_nothing_is_read_beyond_a_bill_that_nobody_has_seen(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Recurly is away when the period ends: where the next bill cuts is not known; nothing is lost by it."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    await link(store, subscription())
    bills.show(Period(TEN - 30 * HOUR, TEN + 1.5 * HOUR))
    await poller.run_once()
    for hour in range(6):
        source.serve(2**hour, hours=hour + 0.75)
    bills.away = True
    for _ in range(9):
        clock.advance(HOUR)
        await poller.run_once()
    assert await pieces(store) == [(0 * HOUR, HOUR, 1)]
    bills.away = False
    bills.show(Period(TEN + 1.5 * HOUR, TEN + 4.5 * HOUR))
    clock.at = TEN + 4 * HOUR  # the list says what was true then
    await poller.run_once()
    bills.show(Period(TEN + 4.5 * HOUR, TEN + 30 * HOUR))
    clock.at = TEN + 12 * HOUR
    await poller.run_once()
    assert await pieces(store) == [
        (0 * HOUR, HOUR, 1),
        (1.5 * HOUR, 2 * HOUR, 2),
        (2 * HOUR, 3 * HOUR, 4),
        (3 * HOUR, 4 * HOUR, 8),
        (4.5 * HOUR, 5 * HOUR, 16),
        (5 * HOUR, 6 * HOUR, 32),
    ]


async def test_before_a_bill_what_has_not_settled_is_read_too(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Ten and three minutes before its end: only of what is billed then, with times that have passed."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    await link(store, subscription("s1"), subscription("s2"), now=TEN - HOUR)
    bills.show(Period(TEN - 30 * HOUR, TEN + 2 * HOUR))
    bills.show(Period(TEN - 30 * HOUR, TEN + 60 * HOUR), subscription="s2")
    await poller.run_once()
    assert await poller.until_flush() == 2 * HOUR - timedelta(minutes=10)
    for subscription_id in ("s1", "s2"):
        source.serve(5, hours=0.5, subscription=subscription_id)
        source.serve(7, hours=1.5, subscription=subscription_id)
    clock.at = TEN + 2 * HOUR - timedelta(minutes=10)
    await poller.run_once()
    assert await poller.until_flush() == timedelta(minutes=7)
    source.serve(1, hours=1.9)
    clock.advance(timedelta(minutes=7))
    await poller.run_once()
    found = await rows(store, schema.usage_records)
    assert [(row["subscription_id"], row["revision"], row["units"]) for row in found] == [
        ("s1", 1, 5),
        ("s1", 1, 7),
        ("s1", 2, 1),
    ]
    assert [row["usage_timestamp"] - TEN for row in found] == [
        HOUR - timedelta(seconds=1),
        2 * HOUR - timedelta(minutes=12, seconds=1),
        2 * HOUR - timedelta(minutes=5, seconds=1),
    ]
    [mark] = await rows(store, schema.watermarks)
    assert mark["at"] == TEN, "what was read early will be read again when it has settled"
    audits = [row["key"] for row in await rows(store, schema.outbox) if row["kind"] == "audit_usage"]
    assert audits == [f"audit_usage:s1:period:{TEN + 2 * HOUR:%Y%m%dT%H%M%S}"]
    clock.at = TEN + 6 * HOUR
    bills.show(Period(TEN + 2 * HOUR, TEN + 60 * HOUR))
    source.serve(4, hours=1.99)
    await poller.run_once()
    found = await rows(store, schema.usage_records)
    assert sum(row["units"] for row in found if row["subscription_id"] == "s1") == 17
    assert found[-1]["usage_timestamp"] < TEN + 2 * HOUR


async def test_each_open_cycle_is_audited_once_a_day(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Whatever is over at Recurly is left alone; a second process of the day asks for none.

    Two audits are a day apart, also around midnight.
    """
    await link(store, subscription("s1"), subscription("s2", billed_state="expired"))
    for _ in range(2):
        poller = a_poller(store, clock, source)
        await poller.run_once()
        await poller.run_once()
    clock.advance(24 * HOUR)
    await poller.run_once()
    audits = [row["key"] for row in await rows(store, schema.outbox) if row["kind"] == "audit_usage"]
    last = audit_due("s1", clock.now())
    assert last.hour == audit_hour("s1")
    assert audits == [f"audit_usage:s1:{at:%Y%m%dT%H}" for at in (last - 24 * HOUR, last)]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("hour", [0, 11, 23])
async def test_daily_audits_are_a_day_apart_however_often_it_starts(
    store: Store, clock: ManualClock, source: Counted, monkeypatch: pytest.MonkeyPatch, hour: int
) -> None:
    """Polled every 20 minutes for three days, with a new process every seven hours."""
    monkeypatch.setattr("billingd.traffic.poll.audit_hour", lambda _: hour)
    await link(store, subscription("s1"))
    poller = a_poller(store, clock, source)
    for turn in range(3 * 72):
        if turn % 21 == 0:
            poller = a_poller(store, clock, source)
        await poller.run_once()
        clock.advance(timedelta(minutes=20))
    first, *later = [row for row in await rows(store, schema.outbox) if row["kind"] == "audit_usage"]
    assert first["due_at"] == TEN + audit_spread("s1")
    assert [row["due_at"].hour for row in later] == [hour] * 3
    assert all(one["due_at"] + 25 * HOUR > two["due_at"] for one, two in pairwise([first, *later]))
    keyed = [datetime.strptime(row["key"][-11:] + "Z", "%Y%m%dT%H%z") for row in (first, *later)]
    assert {two - one for one, two in pairwise(keyed)} == {24 * HOUR}


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_start_spreads_its_audits_over_an_hour(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """All subscriptions are asked for then, in one transaction."""
    await link(store, *(subscription(f"s{n}") for n in range(200)))
    await a_poller(store, clock, source).run_once()
    due = Counter(row["due_at"] for row in await rows(store, schema.outbox) if row["kind"] == "audit_usage")
    assert sum(due.values()) == 200
    assert all(TEN <= at < TEN + HOUR for at in due)
    assert len(due) > 40
    assert max(due.values()) <= 12


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_audits_before_bills_are_asked_for_in_one_transaction(
    store: Store, clock: ManualClock, source: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many subscriptions are about to be billed, now or a little later."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await link(store, *(subscription(f"s{n}") for n in range(9)))
    for n in range(9):
        bills.show(Period(TEN, TEN + HOUR + timedelta(minutes=n % 3)), subscription=f"s{n}")
    await poller.run_once()
    clock.at = TEN + 0.9 * HOUR
    await poller._learn_periods()
    writes = []
    write = Store.write

    def counted(store: Store) -> Any:
        writes.append(1)
        return write(store)

    monkeypatch.setattr(Store, "write", counted)
    assert await poller._ask_for_audits() == []
    assert len(writes) == 1
    audits = [row for row in await rows(store, schema.outbox) if ":period:" in row["key"]]
    assert len(audits) == 9
    assert {(row["due_at"] - TEN - HOUR + AUDIT_LEAD) / timedelta(minutes=1) for row in audits} == {0, 1, 2}


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_audit_that_is_due_waits_for_the_flush(
    store: Store, clock: ManualClock, source: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bill is a minute away: what is read before it is booked first, then compared."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    await link(store, subscription())
    bills.show(Period(TEN, TEN + HOUR))
    source.serve(5, hours=0.5)
    clock.at = TEN + HOUR - timedelta(minutes=1)

    async def audits() -> list[str]:
        return [row["key"] for row in await rows(store, schema.outbox) if ":period:" in row["key"]]

    flush, before = poller._flush, []

    async def flushed(mark: Watermark) -> None:
        await flush(mark)
        before.extend([await audits(), await records(store)])

    monkeypatch.setattr(poller, "_flush", flushed)
    await poller.run_once()
    assert before == [[], [(0, 1, 5, "recorded")]]
    assert await audits() == [f"audit_usage:s1:period:{TEN + HOUR:%Y%m%dT%H%M%S}"]
    [audit] = [row for row in await rows(store, schema.outbox) if row["kind"] == "audit_usage"]
    assert audit["due_at"] == clock.now()


async def test_an_audit_that_is_due_does_not_depend_on_amplify(store: Store, clock: ManualClock) -> None:
    """The bill comes whether or not what precedes it could be read."""

    class Away(Counted):
        async def read(self, **asked: Any) -> Any:
            raise Retryable("away")

    bills = Bills(clock)
    poller = a_poller(store, clock, Away(), bills)
    await poller.run_once()
    await link(store, subscription())
    bills.show(Period(TEN, TEN + HOUR))
    clock.at = TEN + HOUR - timedelta(minutes=1)
    with pytest.raises(Retryable, match="away"):
        await poller.run_once()
    audits = [row["key"] for row in await rows(store, schema.outbox) if ":period:" in row["key"]]
    assert audits == [f"audit_usage:s1:period:{TEN + HOUR:%Y%m%dT%H%M%S}"]


async def test_where_bills_are_is_asked_every_ten_minutes(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Sooner only while a period is over and no next one is shown, and then not at every turn."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    assert bills.listed == 0, "nothing is linked"
    await link(store, subscription())
    bills.show(Period(TEN - HOUR, TEN + HOUR))
    for minutes, listed in ((0, 1), (9, 1), (10, 2), (60, 3), (60.1, 3), (60.6, 4), (62, 5)):
        clock.at = TEN + timedelta(minutes=minutes)
        await poller.run_once()
        assert bills.listed == listed, minutes
    bills.show(Period(TEN + HOUR, TEN + 30 * HOUR))
    for minutes, listed in ((63, 6), (64, 6), (72, 6), (73, 7)):
        clock.at = TEN + timedelta(minutes=minutes)
        await poller.run_once()
        assert bills.listed == listed, minutes


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_one_that_is_gone_at_recurly_holds_nobody_else_up(
    store: Store, clock: ManualClock, source: Counted
) -> None:
    """Where its next bill would cut is never known; other subscriptions are read on all the same."""
    bills = Bills(clock)
    poller = a_poller(store, clock, source, bills)
    await poller.run_once()
    await link(store, subscription("s1"), subscription("s2"))
    for name in ("s1", "s2"):
        bills.show(Period(TEN - 30 * HOUR, TEN + 1.5 * HOUR), subscription=name)
    await poller.run_once()
    del bills.shown["uuid-s1"]
    bills.show(Period(TEN + 1.5 * HOUR, TEN + 90 * HOUR), subscription="s2")
    source.serve(5, hours=3, subscription="s2")
    clock.at = TEN + 8 * HOUR
    await poller.run_once()
    clock.at = TEN + 9 * HOUR
    await poller.run_once()
    assert await pieces(store) == [(3 * HOUR, 4 * HOUR, 5)]
