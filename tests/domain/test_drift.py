"""Drift: each difference has a kind, units, a cause, and says honestly whether it can be mended."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billingd.domain.billing import BilledUsage
from billingd.domain.drift import Drift, WrittenOff, accepted, decides_on, held_subject
from billingd.domain.drift_usage import Entry, Place, compare_billed, compare_served
from billingd.domain.periods import Period
from billingd.domain.usage import UsageRecord, corrected_tag, correction_tag, merchant_tag
from billingd.domain.windows import Window

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
WINDOW = Window(TEN, TEN + HOUR)
AT = WINDOW.end - SECOND
BILLED = (Period(TEN - DAY, TEN + 2 * HOUR), Period(TEN + 2 * HOUR, TEN + DAY))
"""Periods of which the window's is over."""
OPEN = (Period(TEN - DAY, TEN + DAY),)


def place(tier_type: str = "flat", state: str = "active", periods: tuple[Period, ...] = OPEN) -> Place:
    return Place("s1", "q1", "amplify-quota-q1", tier_type, state, periods)


def entry(units: int = 7, state: str = "reported", *, under_way: bool = False, revision: int = 1) -> Entry:
    tag = merchant_tag("s1", "q1", WINDOW, revision)
    return Entry(revision, UsageRecord("s1", "q1", WINDOW, revision, units, AT, tag), state, under_way)


def usage(
    id_: str,
    units: int = 7,
    *,
    at: datetime = AT,
    billed: bool = False,
    tag: str | None = merchant_tag("s1", "q1", WINDOW, 1),
) -> BilledUsage:
    return BilledUsage(id_, units, tag, at, TEN + DAY if billed else None)


def billed(
    entries: list[Entry], there: dict[str, list[BilledUsage]], where: Place | None = None
) -> list[Drift]:
    ledger = {one.record.merchant_tag: one for one in entries}
    found = compare_billed(where or place(), ledger, there, foreign_from=TEN, length=HOUR)
    return list(found)


def told(found: list[Drift]) -> list[tuple[str, int, bool, Any]]:
    return [(one.kind, one.units, one.repairable, one.detail.get("how")) for one in found]


@pytest.mark.parametrize(
    ("served", "recorded", "again_from", "expected"),
    [
        (5, 5, TEN, None),
        (9, 5, TEN, ("missing_record", 4, True, "read")),
        (9, 5, TEN + HOUR, ("late_beyond_horizon", 4, True, "read")),
        (0, 5, TEN, ("wrong_amount", 5, False, None)),
        (3, 5, TEN + HOUR, ("wrong_amount", 2, False, None)),
    ],
)
def test_served_against_recorded(served: int, recorded: int, again_from: datetime, expected: Any) -> None:
    found = compare_served(place(), WINDOW, served=served, recorded=recorded, read_again_from=again_from)
    assert (None if found is None else told([found])[0]) == expected


@pytest.mark.parametrize(
    ("tier_type", "state", "periods", "repairable"),
    [
        ("flat", "active", BILLED, True),
        ("tiered", "active", BILLED, True),
        ("volume", "active", OPEN, True),
        ("volume", "active", BILLED, False),
        ("stairstep", "active", BILLED, False),
        ("flat", "expired", BILLED, False),
        ("flat", "missing", OPEN, False),
        ("flat", "paused", OPEN, True),
    ],
)
def test_late_usage_is_mended_where_a_bill_still_takes_it(
    tier_type: str, state: str, periods: tuple[Period, ...], repairable: bool
) -> None:
    found = compare_served(
        place(tier_type, state, periods), WINDOW, served=3, recorded=1, read_again_from=TEN + DAY
    )
    assert found is not None
    assert (found.kind, found.units, found.repairable) == ("late_beyond_horizon", 2, repairable)
    assert ("held" in found.fix) is not repairable


@pytest.mark.parametrize(
    ("state", "under_way", "expected"),
    [
        ("reported", False, [("missing_record", 7, True, "post")]),
        ("reported", True, []),
        ("recorded", False, [("missing_record", 7, True, "post")]),
        ("recorded", True, []),
        ("held", False, []),
        ("written_off", False, []),
    ],
)
def test_a_record_that_is_not_at_recurly(state: str, under_way: bool, expected: Any) -> None:
    assert told(billed([entry(state=state, under_way=under_way)], {})) == expected


def test_a_record_is_not_posted_again_where_its_cycle_takes_no_corrections() -> None:
    [found] = billed([entry()], {}, place("volume", periods=BILLED))
    assert (found.kind, found.repairable, found.detail) == ("missing_record", False, {})
    assert "by hand" in found.fix


TAG = entry().record.merchant_tag
FLAT_BILLED, VOLUME_BILLED = place(periods=BILLED), place("volume", periods=BILLED)


@pytest.mark.parametrize(
    ("there", "where", "expected"),
    [
        ([usage("a")], None, []),
        ([usage("a", billed=True)], FLAT_BILLED, []),
        ([usage("a"), usage("b")], None, [("double_record", 7, True, "audit")]),
        ([usage("a", billed=True), usage("b")], None, [("double_record", 7, True, "audit")]),
        (
            [usage("a", billed=True), usage("b", billed=True)],
            FLAT_BILLED,
            [("double_record", 7, True, "correct")],
        ),
        (
            [usage("a", billed=True), usage("b", billed=True)],
            VOLUME_BILLED,
            [("double_record", 7, False, "audit")],
        ),
        ([usage("a", 9)], None, [("wrong_amount", 2, True, "replace")]),
        ([usage("a", 4)], VOLUME_BILLED, [("wrong_amount", 3, False, "audit")]),
        ([usage("a", 4, billed=True)], FLAT_BILLED, [("wrong_amount", 3, True, "correct")]),
        ([usage("a", 4, billed=True)], VOLUME_BILLED, [("wrong_amount", 3, False, "audit")]),
        (
            [usage("a", 4, billed=True)],
            place(state="expired", periods=BILLED),
            [("wrong_amount", 3, False, "audit")],
        ),
        ([usage("a", at=AT - DAY)], None, [("wrong_period", 7, True, "replace")]),
        ([usage("a", at=AT + SECOND)], None, [("wrong_period", 7, True, "replace")]),
        ([usage("a", at=AT + SECOND, billed=True)], FLAT_BILLED, [("wrong_period", 7, False, "audit")]),
        ([usage("a", -7)], None, [("wrong_amount", 14, True, "replace")]),
    ],
)
def test_a_record_that_is_at_recurly(
    there: list[BilledUsage], where: Place | None, expected: list[Any]
) -> None:
    """Once, with its units, at its time: else it is drift; unbilled it is replaced, billed only corrected."""
    assert told(billed([entry()], {TAG: there}, where)) == expected


def test_which_period_a_moved_record_lies_in_is_said() -> None:
    [other] = billed([entry()], {TAG: [usage("a", at=AT + 3 * HOUR)]}, FLAT_BILLED)
    [same] = billed([entry()], {TAG: [usage("a", at=AT + SECOND)]}, FLAT_BILLED)
    assert "another billing period" in other.cause
    assert "same billing period" in same.cause


@pytest.mark.parametrize("state", ["held", "written_off"])
def test_what_was_given_up_and_is_there_all_the_same(state: str) -> None:
    assert told(billed([entry(state=state)], {TAG: [usage("a")]})) == [("foreign_record", 7, True, "accept")]


@pytest.mark.parametrize(
    ("corrections", "expected"),
    [
        ([-7], []),
        ([-6], [("wrong_amount", 1, True, "correct")]),
        ([-7, -7], [("wrong_amount", 7, True, "correct")]),
        ([-9, 2], []),
    ],
)
def test_what_was_corrected_is_right(corrections: list[int], expected: list[Any]) -> None:
    """All corrections of a tag count, whatever their number."""
    there = {TAG: [usage("a", billed=True), usage("b", billed=True)]}
    for number, units in enumerate(corrections, 1):
        there[correction_tag(TAG, number)] = [usage(f"c{number}", units)]
    assert told(billed([entry()], there, FLAT_BILLED)) == expected


def test_an_unbilled_extra_beside_a_correction_is_still_removed() -> None:
    there = {
        TAG: [usage("a", billed=True), usage("b", billed=True), usage("c")],
        correction_tag(TAG, 1): [usage("d", -7)],
    }
    assert told(billed([entry()], there, FLAT_BILLED)) == [("double_record", 7, True, "audit")]


def test_corrections_have_tags_of_their_own() -> None:
    longest = merchant_tag("s", "q", Window(TEN, TEN + timedelta(days=99)), 999_999)
    assert len(correction_tag(longest, 99)) <= 64
    assert corrected_tag(correction_tag(TAG, 3)) == TAG
    for other in (TAG, "", "~1", "x~1", f"{TAG}~", f"{TAG}~x"):
        assert corrected_tag(other) is None


def test_foreign_records_are_told_from_the_link_on() -> None:
    """Without a tag, with one of ours that nobody recorded, or a correction of nothing."""
    there = {
        "": [usage("a", 3), usage("b", 4, at=TEN - SECOND)],
        "bd1:x": [usage("c", 5, tag="bd1:x")],
        "bd1:x~1": [usage("d", -6, tag="bd1:x~1")],
    }
    found = billed([], there)
    assert [(one.subject, one.units, one.repairable) for one in found] == [
        ("foreign:a", 3, False),
        ("foreign:c", 5, False),
        ("foreign:d", 6, False),
    ]
    assert {one.window_start for one in found} == {TEN}


def test_what_a_person_wrote_off_is_accepted_as_it_was() -> None:
    [foreign] = billed([], {"": [usage("a", 3)]})
    seen = WrittenOff("foreign_record", "foreign:u:c:1", "1 usage record(s) that ... (a) are in ...", 3)
    assert accepted(foreign, [seen])
    assert not accepted(foreign, [WrittenOff("foreign_record", "foreign:u:c:1", "(z)", 3)])
    [wrong] = billed([entry()], {TAG: [usage("a", 4, billed=True)]}, VOLUME_BILLED)
    assert accepted(wrong, [WrittenOff("wrong_amount", f"audit:{TAG}", "", 3)])
    assert accepted(wrong, [WrittenOff("wrong_amount", held_subject(wrong), "", 3)])
    assert not accepted(wrong, [WrittenOff("wrong_amount", f"audit:{TAG}", "", 2)])
    less = compare_served(place(), WINDOW, served=1, recorded=3, read_again_from=TEN)
    assert less is not None
    assert accepted(less, [WrittenOff("reading_shrank", f"reading:s1:q1:{TEN.isoformat()}", "", 2)])
    assert not accepted(less, [])


@pytest.mark.parametrize(
    ("subject", "decides"),
    [
        (f"audit:{TAG}", True),
        (f"audit:{TAG}:usage9", True),
        (f"drift:wrong_amount:usage:{TAG}", True),
        (f"drift:double_record:usage:{TAG}:usage9", True),
        (f"audit:{TAG}0", False),
        (f"drift:double_record:usage:{TAG}0:usage9", False),
        (f"foreign:{TAG}", False),
        (f"drift:foreign_record:foreign:{TAG}", False),
    ],
)
def test_a_decision_is_about_a_whole_tag(subject: str, decides: bool) -> None:
    assert decides_on(subject, TAG) is decides
