"""Whether a usage record can reach an invoice."""

from datetime import UTC, datetime, timedelta

import pytest

from billingd.domain.delivery import AFTER_END, LATE, PAUSED, obstacle
from billingd.domain.periods import Period

TEN = datetime(2026, 3, 2, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
TRIAL = Period(TEN - 20 * HOUR, TEN - 10 * HOUR, trial=True)
BILLED = Period(TEN - 10 * HOUR, TEN)
CURRENT = Period(TEN, TEN + 10 * HOUR)
KNOWN = [TRIAL, BILLED, CURRENT]
TIER_TYPES = ["flat", "tiered", "volume", "stairstep"]


def kind(
    at: datetime, tier_type: str, state: str | None = "active", known: list[Period] = KNOWN
) -> str | None:
    found = obstacle(at, state=state, periods=known, tier_type=tier_type)
    return None if found is None else found.kind


@pytest.mark.parametrize("tier_type", TIER_TYPES)
@pytest.mark.parametrize("state", [None, "active", "canceled", "future"])
def test_usage_of_the_open_cycle_is_sent(tier_type: str, state: str | None) -> None:
    """Its first second belongs to it; what lies beyond it waits for time, not for a person."""
    assert [kind(at, tier_type, state) for at in (CURRENT.started_at, CURRENT.ends_at)] == [None, None]


@pytest.mark.parametrize(
    ("tier_type", "expected"), [("flat", None), ("tiered", None), ("volume", LATE), ("stairstep", LATE)]
)
def test_usage_of_a_billed_cycle_is_a_correction_or_late(tier_type: str, expected: str | None) -> None:
    """Recurly corrects flat and tiered prices only."""
    assert kind(CURRENT.started_at - SECOND, tier_type) == expected
    assert kind(BILLED.started_at, tier_type) == expected
    assert kind(TEN - 99 * HOUR, tier_type) == expected, "before all that is known"


@pytest.mark.parametrize("tier_type", TIER_TYPES)
def test_usage_of_a_trial_is_never_late(tier_type: str) -> None:
    """Nothing of it is billed, so there is no bill to miss."""
    assert kind(TRIAL.ends_at - SECOND, tier_type) is None
    assert kind(TRIAL.started_at, tier_type) is None


@pytest.mark.parametrize("tier_type", TIER_TYPES)
@pytest.mark.parametrize(
    ("state", "expected"), [("expired", AFTER_END), ("failed", AFTER_END), ("paused", PAUSED)]
)
def test_what_its_state_forbids(tier_type: str, state: str, expected: str) -> None:
    """Whatever its time: after the end no invoice follows, while paused it waits."""
    for at in (CURRENT.started_at, BILLED.started_at, TRIAL.started_at):
        assert kind(at, tier_type, state) == expected


def test_while_no_period_is_known_recurly_decides() -> None:
    """It refuses what it cannot bill, and says so."""
    assert kind(TEN, "volume", known=[]) is None


def test_a_reason_says_what_the_matter_is() -> None:
    """For a person."""
    late = obstacle(BILLED.started_at, state="active", periods=KNOWN, tier_type="volume")
    over = obstacle(TEN, state="expired", periods=KNOWN, tier_type="flat")
    assert late is not None
    assert "volume" in late.reason
    assert over is not None
    assert "expired" in over.reason
