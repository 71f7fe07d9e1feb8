"""Booking a window that bills cut: whatever becomes known when, no unit twice, none over a bill."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.periods import cut
from billingd.domain.usage import UNITS_MAX, Booked, UsageRecord, book
from billingd.domain.windows import Window

TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
MINUTES = 12
WINDOW = Window(TEN, TEN + MINUTES * MINUTE)


def at(minutes: float) -> datetime:
    return TEN + minutes * MINUTE


def recorded(records: list[UsageRecord]) -> dict[Window, Booked]:
    """As the ledger sums them."""
    units = Counter[Window]()
    revisions: dict[Window, int] = {}
    for record in records:
        units[record.window] += record.units
        revisions[record.window] = max(revisions.get(record.window, 0), record.revision)
    return {window: Booked(units[window], revisions[window]) for window in revisions}


@dataclass(frozen=True)
class Turn:
    """One reading: units that arrived since by minute, cuts that are known by now, what may have a time."""

    arrived: dict[int, int]
    cuts: frozenset[int]
    before: int


UNITS = st.integers(1, 50) | st.integers(UNITS_MAX - 2, 3 * UNITS_MAX)
TURNS = st.lists(
    st.builds(
        Turn,
        arrived=st.dictionaries(st.integers(0, MINUTES - 1), UNITS, max_size=4),
        cuts=st.frozensets(st.integers(0, MINUTES), max_size=2),
        before=st.integers(1, MINUTES),
    ),
    min_size=1,
    max_size=6,
)


def play(turns: list[Turn], always: frozenset[int] = frozenset()) -> tuple[list[UsageRecord], Counter[int]]:
    """Every turn in order, and a last one when all has settled; the records and what was counted."""
    truth, known, records = Counter[int](), set(always), list[UsageRecord]()
    for turn in [*turns, Turn({}, frozenset(), MINUTES)]:
        truth.update(turn.arrived)
        known |= turn.cuts
        read = {
            piece: sum(units for minute, units in truth.items() if piece.start <= at(minute) < piece.end)
            for piece in cut(WINDOW, map(at, known))
        }
        before = at(turn.before)
        new = list(book("s", "q", read, recorded(records), before=before))
        for record in new:
            assert record.window in read
            assert not any(record.window.start < at(moment) < record.window.end for moment in known)
            assert record.window.start <= record.usage_timestamp < min(record.window.end, before)
            assert 1 <= record.units <= UNITS_MAX
        records += new
        assert sum(record.units for record in records) <= sum(truth.values())
        assert len({record.merchant_tag for record in records}) == len(records)
        again = list(book("s", "q", read, recorded(records), before=before))
        assert again == [], "what was booked is not booked again"
    return records, truth


@given(TURNS)
def test_whatever_is_learnt_when_nothing_is_booked_twice(turns: list[Turn]) -> None:
    """In all never more than was read, each tag once, and no record over a cut that was known by then."""
    play(turns)


@given(turns=TURNS, cuts=st.frozensets(st.integers(1, MINUTES - 1), max_size=3))
def test_with_cuts_known_from_the_start_each_piece_is_exact(turns: list[Turn], cuts: frozenset[int]) -> None:
    """However the units come in: each side of a bill gets its own, to the unit."""
    turns = [Turn(turn.arrived, frozenset(), turn.before) for turn in turns]
    records, truth = play(turns, cuts)
    booked = recorded(records)
    for piece in cut(WINDOW, map(at, cuts)):
        counted = sum(units for minute, units in truth.items() if piece.start <= at(minute) < piece.end)
        assert (booked[piece].units if piece in booked else 0) == counted


@given(TURNS)
def test_in_the_end_all_that_was_read_is_booked(turns: list[Turn]) -> None:
    """Also when a cut becomes known after units of both its sides were booked as one."""
    records, truth = play(turns)
    assert sum(record.units for record in records) == sum(truth.values())


def test_a_cut_learnt_late_moves_no_unit() -> None:
    """Seven were booked as one; five of them lie before the cut: what is new is booked, and nothing else."""
    early, late = Window(TEN, at(6)), Window(at(6), WINDOW.end)
    known = {WINDOW: Booked(7, 1)}
    assert list(book("s", "q", {early: 5, late: 2}, known, before=WINDOW.end)) == []
    [more] = book("s", "q", {early: 5, late: 3}, known, before=WINDOW.end)
    assert (more.window, more.units, more.revision) == (late, 1, 1)


def test_what_has_no_time_yet_waits() -> None:
    """A piece that begins at the moment or later is told of by a later reading."""
    early, late = Window(TEN, at(6)), Window(at(6), WINDOW.end)
    records = list(book("s", "q", {early: 5, late: 2}, {}, before=at(6)))
    assert [(one.window, one.units, one.usage_timestamp) for one in records] == [(early, 5, at(6) - SECOND)]
    [one, other] = book("s", "q", {early: 5, late: 2}, {}, before=at(6) + SECOND)
    assert (one.usage_timestamp, other.usage_timestamp) == (at(6) - SECOND, at(6))


def test_a_piece_that_was_cut_again_keeps_what_it_had() -> None:
    """What was booked of a longer one counts for the piece it ends in; what is new goes where it was read."""
    first, second, third = Window(TEN, at(3)), Window(at(3), at(6)), Window(at(6), WINDOW.end)
    known = {Window(TEN, at(6)): Booked(5, 1), third: Booked(3, 2)}
    [more] = book("s", "q", {first: 0, second: 5, third: 4}, known, before=WINDOW.end)
    assert (more.window, more.units, more.revision) == (third, 1, 3)
