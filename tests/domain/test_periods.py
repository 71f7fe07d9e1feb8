"""Billing periods: what is learnt of them, and where they cut windows."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.billing import BilledSubscription
from billingd.domain.periods import Period, between, cut, edges, learn, period_of
from billingd.domain.windows import Window

TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def at(hours: float) -> datetime:
    return TEN + hours * HOUR


def period(start: float, end: float, *, trial: bool = False) -> Period:
    return Period(at(start), at(end), trial)


def test_the_first_sight_is_learnt_and_the_same_again_is_nothing_new() -> None:
    """Recurly is asked every few minutes, and mostly says the same."""
    assert learn([], period(0, 10)) == [period(0, 10)]
    assert learn([period(0, 10)], period(0, 10)) == []
    assert learn([period(0, 10)], period(10, 20)) == [period(10, 20)]


@pytest.mark.parametrize("end", [5, 15])
def test_a_bill_date_that_was_moved_moves_the_end(end: int) -> None:
    """Nearer or later: the period with that start takes its new end."""
    assert learn([period(0, 10)], period(0, end)) == [period(0, end)]


def test_a_period_that_was_cut_short_ends_where_the_next_begins() -> None:
    """A pause that was resumed, a bill run by hand; its being a trial stays."""
    assert learn([period(0, 10, trial=True), period(20, 30)], period(7, 17)) == [
        period(7, 17),
        period(0, 7, trial=True),
    ]


def test_periods_that_nobody_saw_are_told_from_where_bills_began() -> None:
    """Dates outside of the gap, and the same date twice, make no period."""
    assert between(at(0), [at(20), at(10), at(10), at(0), at(30), at(40)], at(30)) == [
        period(0, 10),
        period(10, 20),
        period(20, 30),
    ]
    assert between(at(0), [], at(30)) == [period(0, 30)]


def test_a_moment_lies_in_the_period_that_begins_there() -> None:
    """Start in, end out; before the first and after the last there is none."""
    known = [period(0, 10), period(10, 20)]
    assert period_of(known, at(0)) == period(0, 10)
    assert period_of(known, at(10) - SECOND) == period(0, 10)
    assert period_of(known, at(10)) == period(10, 20)
    assert period_of(known, at(20)) is period_of(known, at(0) - SECOND) is None


def test_edges_are_where_one_bill_ends_and_the_next_begins() -> None:
    """The first start is none, for no bill ends there; a gap has two."""
    assert edges([]) == set()
    assert edges([period(20, 30), period(0, 10)]) == {at(10), at(20), at(30)}


def test_a_window_is_cut_only_strictly_inside() -> None:
    """At its own ends there is nothing to cut off."""
    window = Window(at(0), at(2))
    assert cut(window, []) == (window,)
    assert cut(window, [at(-1), at(0), at(2), at(3)]) == (window,)
    assert cut(window, [at(1.5), at(1), at(1)]) == (
        Window(at(0), at(1)),
        Window(at(1), at(1.5)),
        Window(at(1.5), at(2)),
    )


@given(moments=st.lists(st.integers(-5, 20)), length=st.integers(1, 15))
def test_pieces_cover_their_window_without_gap_or_overlap(moments: list[int], length: int) -> None:
    """And no piece has a moment strictly inside it."""
    window = Window(TEN, at(length))
    pieces = cut(window, [at(one) for one in moments])
    assert pieces[0].start == window.start
    assert pieces[-1].end == window.end
    assert all(one.end == other.start for one, other in itertools.pairwise(pieces))
    assert not any(piece.start < at(one) < piece.end for piece in pieces for one in moments)
    assert all(piece.start < piece.end for piece in pieces)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=8))
def test_whatever_was_seen_no_two_periods_overlap_at_the_last_seen(seen: list[tuple[int, int]]) -> None:
    """Periods that are seen one after the other end at the latest where a later one begins."""
    known: dict[datetime, Period] = {}
    for start, length in sorted(seen):
        for one in learn(list(known.values()), period(start, start + length)):
            known[one.started_at] = one
    ordered = sorted(known.values())
    assert all(one.ends_at <= other.started_at for one, other in itertools.pairwise(ordered))


def _billed(start: float | None, end: float | None, trial_end: float | None = None) -> BilledSubscription:
    return BilledSubscription(
        uuid="u",
        plan_code="p",
        account_code="a",
        marker=None,
        state="active",
        add_on_codes=(),
        activated_at=None,
        period_started_at=None if start is None else at(start),
        period_ends_at=None if end is None else at(end),
        trial_ends_at=None if trial_end is None else at(trial_end),
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (_billed(0, 10), period(0, 10)),
        (_billed(None, 10), None),
        (_billed(0, None), None),
        (_billed(10, 10), None),
        (_billed(0, 10, 10), period(0, 10, trial=True)),
        (_billed(0, 10, 12), period(0, 10, trial=True)),
        (_billed(10, 20, 10), period(10, 20)),
    ],
)
def test_the_period_that_recurly_shows(shown: BilledSubscription, expected: Period | None) -> None:
    """A subscription that has not begun has none; what ends with the trial is the trial."""
    assert shown.period == expected
