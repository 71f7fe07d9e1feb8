"""Drift: where Amplify, the ledger and Recurly differ, why that probably is, and what mends it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

MISSING_RECORD: Final = "missing_record"
DOUBLE_RECORD: Final = "double_record"
FOREIGN_RECORD: Final = "foreign_record"
WRONG_AMOUNT: Final = "wrong_amount"
WRONG_PERIOD: Final = "wrong_period"
LATE_BEYOND_HORIZON: Final = "late_beyond_horizon"
PRICE_DIFFERS: Final = "price_differs"
LINK_MISSING: Final = "link_missing"
LINK_ORPHANED: Final = "link_orphaned"

READ: Final = "read"
"""Amplify is read again, and only the difference booked."""
POST: Final = "post"
"""The record is reported again, once a look at Recurly has shown that it is not there."""
REPLACE: Final = "replace"
"""The unbilled record is removed, and the ledger's posted in its place."""
AUDIT: Final = "audit"
"""The audit of the subscription removes unbilled extra records, and holds what it cannot."""
CORRECT: Final = "correct"
"""The cycle that was billed wrongly gets the difference, negative too, as a record with its own tag."""
ACCEPT: Final = "accept"
"""The ledger takes for reported what Recurly has after all."""

HELD: Final = "drift:"
"""How the subjects of held items begin that come of a finding."""

REPAIR_IT: Final = "`billingd reconcile --repair`"


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference. `subject` says what it is about, `units` how many are at stake (never negative).

    `detail["how"]` says how a repair goes about it; without it there is nothing to do from here.
    """

    kind: str
    subject: str
    subscription_id: str | None
    add_on_code: str | None
    window_start: datetime | None
    units: int
    cause: str
    fix: str
    tag: str | None = None
    repairable: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WrittenOff:
    """A held item that a person has written off."""

    kind: str
    subject: str
    reason: str
    units: int | None


def held_subject(drift: Drift) -> str:
    """What is held of a finding that nothing mends."""
    return f"{HELD}{drift.kind}:{drift.subject}"


def accepted(drift: Drift, written_off: Iterable[WrittenOff]) -> bool:
    """Whether a person has seen just this difference, and wrote it off: then it is drift no more.

    The poll, the audit and reconciling each have a subject of their own for it.
    """
    subjects = {held_subject(drift)}
    if drift.tag is not None:
        subjects.add(f"audit:{drift.tag}")
        subjects.add(f"audit:{drift.subject.removeprefix('usage:')}")
    for item in written_off:
        named = drift.subject.removeprefix("foreign:") in item.reason
        if item.kind == drift.kind == FOREIGN_RECORD and item.subject.startswith("foreign:") and named:
            return True
        shrank = item.kind == "reading_shrank" and item.subject == drift.detail.get("reading")
        same = item.kind == drift.kind and item.subject in subjects
        if (shrank or same) and item.units == drift.units:
            return True
    return False
