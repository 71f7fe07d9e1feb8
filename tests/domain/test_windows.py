"""Windows: aligned to the epoch, half-open, without gap or overlap."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.windows import EPOCH, Window, floor, next_length, settled_end, shared_edge, windows

HOUR = timedelta(hours=1)
TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
SETTLE = 2 * HOUR

moments = st.datetimes(timezones=st.just(UTC)).filter(lambda at: 1970 <= at.year < 2200)
lengths = st.integers(1, 7 * 86_400).map(lambda seconds: timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("moment", "length", "start"),
    [
        (TEN, HOUR, TEN),
        (TEN + timedelta(microseconds=1), HOUR, TEN),
        (TEN - timedelta(microseconds=1), HOUR, TEN - HOUR),
        (TEN, timedelta(days=1), TEN.replace(hour=0)),
        (TEN, timedelta(seconds=7), datetime(2026, 3, 2, 9, 59, 58, tzinfo=UTC)),
        (TEN.astimezone(), HOUR, TEN),
    ],
)
def test_where_a_window_begins(moment: datetime, length: timedelta, start: datetime) -> None:
    """Counted from the epoch in UTC, whatever the machine's zone."""
    assert floor(moment, length) == start


@given(moments, lengths)
def test_every_moment_lies_in_one_window(moment: datetime, length: timedelta) -> None:
    """The one that begins at its floor, which is an edge."""
    start = floor(moment, length)
    assert start <= moment < start + length
    assert (start - EPOCH) % length == timedelta(0)
    assert floor(start, length) == start


@pytest.mark.parametrize(
    ("now", "end"),
    [
        (TEN, TEN),
        (TEN + SETTLE, TEN),
        (TEN + 3 * HOUR - timedelta(microseconds=1), TEN),
        (TEN + 3 * HOUR, TEN + HOUR),
        (TEN + 4 * HOUR - timedelta(seconds=1), TEN + HOUR),
        (TEN + 102 * HOUR, TEN + 100 * HOUR),
        (TEN - 50 * HOUR, TEN),  # the clock went back
    ],
)
def test_what_has_settled(now: datetime, end: datetime) -> None:
    """A window may be read when it ended `settle` ago; the watermark never goes back."""
    assert settled_end(TEN, now, length=HOUR, settle=SETTLE) == end


@given(
    moments,
    st.timedeltas(timedelta(0), timedelta(days=400)),
    lengths,
    st.timedeltas(timedelta(0), timedelta(days=5)),
)
def test_the_settled_end_is_the_last_edge_that_has_settled(
    start: datetime, passed: timedelta, length: timedelta, settle: timedelta
) -> None:
    """Reachable in whole windows, settled, and the next one is not."""
    watermark, now = floor(start, length), start + passed
    end = settled_end(watermark, now, length=length, settle=settle)
    assert (end - watermark) % length == timedelta(0)
    assert end == watermark or end + settle <= now
    assert end + length + settle > now


@given(moments, lengths, st.integers(0, 50))
def test_windows_leave_no_gap_and_no_overlap(start: datetime, length: timedelta, count: int) -> None:
    """Each begins where the one before it ends."""
    begun = floor(start, length)
    found = list(windows(begun, begun + count * length, length=length))
    assert len(found) == count
    assert all(window.length == length for window in found)
    assert all(one.end == other.start for one, other in pairwise(found))
    assert [window.start for window in found[:1]] == [begun][:count]


@pytest.mark.parametrize(
    ("moment", "one", "other", "edge"),
    [
        (TEN, HOUR, HOUR, TEN),
        (TEN + HOUR, 2 * HOUR, HOUR, TEN + 2 * HOUR),
        (TEN, HOUR, HOUR / 4, TEN),
        (TEN, 2 * HOUR, 3 * HOUR, TEN + 2 * HOUR),
        (TEN, HOUR, 24 * HOUR, TEN + 14 * HOUR),
    ],
)
def test_where_two_lengths_both_begin(
    moment: datetime, one: timedelta, other: timedelta, edge: datetime
) -> None:
    """A changed length comes into force there, so that nothing is read in two sizes."""
    assert shared_edge(moment, one, other) == shared_edge(moment, other, one) == edge


@given(moments, lengths, lengths)
def test_a_shared_edge_is_an_edge_of_both(moment: datetime, one: timedelta, other: timedelta) -> None:
    """And it is not behind us."""
    edge = shared_edge(moment, one, other)
    assert moment <= edge
    assert floor(edge, one) == floor(edge, other) == edge


minutes = st.sampled_from([10, 15, 20, 30, 40, 60, 90, 120, 180]).map(lambda each: timedelta(minutes=each))


@given(
    st.lists(minutes, min_size=1, max_size=3),
    minutes,
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
    st.randoms(use_true_random=False),
)
def test_no_window_cuts_what_was_recorded_in_another_length(
    lived: list[timedelta], wanted: timedelta, spans: list[int], random: Random
) -> None:
    """A life of the store that is forgotten changed the length; some of its windows were cut by a bill."""
    at = end = shared_edge(TEN, lived[0], lived[0])
    pieces: list[Window] = []
    for here, (length, span) in enumerate(zip(lived, spans, strict=False)):
        changes = end + span * length
        if here + 1 < len(lived):
            changes = shared_edge(changes, length, lived[here + 1])
        for one in windows(end, changes, length=length):
            cut = one.start + timedelta(seconds=random.randrange(int(length.total_seconds())))
            whole = cut == one.start or random.random() < 0.7
            parts = [one] if whole else [Window(one.start, cut), Window(cut, one.end)]
            pieces += [each for each in parts if random.random() < 0.6]
        end = changes
    read: list[Window] = []
    length = lived[0]
    while (change := next_length(at, length, wanted, [one for one in pieces if one.start >= at])) is not None:
        read += windows(at, change[0], length=length)
        assert (change[0] - EPOCH) % length == (change[0] - EPOCH) % change[1] == timedelta(0)
        at, length = change
    assert length == wanted
    last = max(at, end)
    read += windows(at, last + (at - last) % length, length=length)
    for one in pieces:
        assert sum(each.start <= one.start and one.end <= each.end for each in read) == 1
