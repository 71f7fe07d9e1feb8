"""Whether a usage record can reach an invoice, by what Recurly last showed of its subscription."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from billingd.domain.periods import Period, period_of

CORRECTABLE: Final = frozenset({"flat", "tiered"})
"""Tier types that take usage of a cycle that was billed already, as a correction (recurly.md 5.2)."""

OVER: Final = frozenset({"expired", "failed"})
"""States in which no invoice follows any more."""

PAUSED: Final = "paused"
MISSING: Final = "missing"
"""Not Recurly's word: it says that it has no such subscription."""

NOT_THERE: Final = "Recurly has no such subscription"
"""Why usage is held of one that is MISSING; by these words it is found when Recurly shows it again."""

LATE: Final = "late_usage"
AFTER_END: Final = "usage_after_end"
NOT_READ_BACK: Final = "usage_not_read_back"
"""Kind of the held sum of one that ended while what Recurly has of it was unknown after a restore."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why it cannot: `kind` is PAUSED (for now), LATE or AFTER_END (as things stand)."""

    kind: str
    reason: str


def obstacle(
    usage_timestamp: datetime, *, state: str | None, periods: Sequence[Period], tier_type: str
) -> Obstacle | None:
    """What stands in the way of a record with that time; None: send it.

    A cycle counts as billed once Recurly shows a later one as current. Usage of a trial is never billed, so
    it is never too late either.
    """
    if state == MISSING:
        return Obstacle(AFTER_END, NOT_THERE)
    if state in OVER:
        return Obstacle(AFTER_END, f"the Recurly subscription is {state}, and no invoice follows")
    if state == PAUSED:
        return Obstacle(PAUSED, "the Recurly subscription is paused; its usage waits")
    if tier_type in CORRECTABLE or not periods:
        return None
    current, its_own = max(periods), period_of(periods, usage_timestamp)
    if usage_timestamp >= current.started_at or (its_own is not None and its_own.trial):
        return None
    return Obstacle(
        LATE,
        f"its billing cycle was invoiced before it was known, and Recurly takes no corrections of "
        f"{tier_type} prices",
    )
