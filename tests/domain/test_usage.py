"""Readings -> usage records: exact sums, nine digits at most, one name each."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.usage import UNITS_MAX, Booked, UsageRecord, book, merchant_tag
from billingd.domain.windows import Window

TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
WINDOW = Window(TEN, TEN + timedelta(hours=1))


def booked(read: int, recorded: int = 0, revisions: int = 0) -> list[UsageRecord]:
    known = {WINDOW: Booked(recorded, revisions)} if recorded or revisions else {}
    return list(book("s", "q", {WINDOW: read}, known, before=WINDOW.end))


def test_a_first_reading_is_one_record() -> None:
    """Its time is the last whole second of its window, so that it lies inside."""
    [record] = booked(5)
    assert record == UsageRecord(
        "s", "q", WINDOW, 1, 5, WINDOW.end - timedelta(seconds=1), merchant_tag("s", "q", WINDOW, 1)
    )


def test_nothing_is_no_record() -> None:
    """Neither is a reading that agrees, nor one that shrank."""
    assert booked(0) == booked(5, 5, 1) == booked(3, 5, 1) == []


def test_what_grew_is_the_difference_under_the_next_number() -> None:
    """The first record stays as it is."""
    [record] = booked(8, 5, 1)
    assert (record.units, record.revision) == (3, 2)


def test_more_than_nine_digits_are_split() -> None:
    """At the bound, just above it, and far above."""
    assert [record.units for record in booked(UNITS_MAX)] == [999_999_999]
    assert [record.units for record in booked(UNITS_MAX + 1)] == [999_999_999, 1]
    assert [record.revision for record in booked(5 * UNITS_MAX, recorded=7, revisions=3)] == [4, 5, 6, 7, 8]


def test_a_tag_is_the_same_in_every_process_and_release() -> None:
    """A rebuilt store finds what was posted before: this literal may never change."""
    assert merchant_tag("s", "q", WINDOW, 1) == "bd1:6a753b8fef4a16453067cf01:20260302T100000Z:3600:1"


@given(
    read=st.integers(0, 20 * UNITS_MAX),
    recorded=st.integers(0, 20 * UNITS_MAX),
    revisions=st.integers(0, 1000),
)
def test_what_is_recorded_becomes_what_was_read(read: int, recorded: int, revisions: int) -> None:
    """To the unit; every part is one that Recurly takes; numbers and tags go on without a gap or a repeat."""
    records = booked(read, recorded, revisions)
    assert recorded + sum(record.units for record in records) == max(read, recorded)
    assert all(1 <= record.units <= UNITS_MAX for record in records)
    assert [record.revision for record in records] == list(range(revisions + 1, revisions + 1 + len(records)))
    assert len({record.merchant_tag for record in records}) == len(records)


NAMES = st.text(min_size=1, max_size=64)
KEYS = st.tuples(
    NAMES,
    NAMES,
    st.integers(0, 4_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    st.integers(1, 31 * 86_400),
    st.integers(1, 10_000_000),
)


def _tag(key: tuple[str, str, datetime, int, int]) -> str:
    subscription, quota, start, seconds, revision = key
    return merchant_tag(subscription, quota, Window(start, start + timedelta(seconds=seconds)), revision)


@given(KEYS, KEYS)
def test_a_tag_belongs_to_one_record_only(
    one: tuple[str, str, datetime, int, int], other: tuple[str, str, datetime, int, int]
) -> None:
    """Begins with bd1:, at most 64 ASCII characters, different whenever anything differs."""
    tag = _tag(one)
    assert tag.startswith("bd1:")
    assert len(tag) <= 64
    assert tag.isascii()
    assert tag.isprintable()
    assert (tag == _tag(other)) is (one == other)


def test_ids_do_not_run_into_each_other() -> None:
    """The same letters, divided otherwise."""
    assert merchant_tag("ab", "c", WINDOW, 1) != merchant_tag("a", "bc", WINDOW, 1)
