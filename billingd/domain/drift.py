"""Drift: where Amplify, the ledger and Recurly differ, why that probably is, and what mends it."""

import re
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

KINDS: Final = frozenset(
    {
        MISSING_RECORD,
        DOUBLE_RECORD,
        FOREIGN_RECORD,
        WRONG_AMOUNT,
        WRONG_PERIOD,
        LATE_BEYOND_HORIZON,
        PRICE_DIFFERS,
        LINK_MISSING,
        LINK_ORPHANED,
    }
)

READ: Final = "read"
"""Amplify is read again, and only the difference booked."""
POST: Final = "post"
"""The record is reported again, once a look at Recurly has shown that it is not there."""
REPLACE: Final = "replace"
"""The unbilled record is set to what the ledger has of it."""
AUDIT: Final = "audit"
"""The audit of the subscription removes unbilled extra records, and holds what it cannot."""
CORRECT: Final = "correct"
"""The cycle that was billed wrongly gets the difference, negative too, as a record with its own tag."""
ACCEPT: Final = "accept"
"""The ledger takes for reported what Recurly has after all."""

HELD: Final = "drift:"
"""How the subjects of held items begin that come of a finding."""

AUDITED: Final = "audit:"
"""The same of those that come of an audit."""

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
    """A held item that a person has written off; `usages` are the records at Recurly that it names.

    Each with its units, as the person saw them; None where an earlier release did not keep them.
    """

    kind: str
    subject: str
    reason: str
    units: int | None
    usages: Mapping[str, int | None] = field(default_factory=dict)


def held_subject(drift: Drift) -> str:
    """What is held of a finding that nothing mends."""
    return f"{HELD}{drift.kind}:{drift.subject}"


def decided_subjects(drift: Drift) -> list[str]:
    """Under which subjects a person decides about a finding: the run's own, and the audit's."""
    subjects = [held_subject(drift)[:200]]
    if drift.subject.startswith("usage:"):
        subjects.append(f"{AUDITED}{drift.subject.removeprefix('usage:')}")
        if drift.tag is not None and drift.subject != f"usage:{drift.tag}":
            subjects.append(f"{AUDITED}{drift.tag}")
    return subjects


def decides_on(subject: str, tag: str) -> bool:
    """Whether what is held under a subject is about a tag or one of its records.

    What a person decided about one of them holds for all: a correction posts the difference of the whole tag.
    """
    about = subject.removeprefix(AUDITED)
    if subject.startswith(HELD):
        about = subject.removeprefix(HELD).partition(":usage:")[2]
    return about == tag or about.startswith(f"{tag}:")


def accepted(drift: Drift, written_off: Iterable[WrittenOff]) -> bool:
    """Whether a person has seen just this difference, and wrote it off: then it is drift no more.

    The poll, the audit and reconciling each have a subject of their own for it. What has no units is the
    same while the same is said of it.
    """
    subjects = set(decided_subjects(drift))
    for item in written_off:
        if item.kind == drift.kind == FOREIGN_RECORD and item.subject.startswith("foreign:"):
            named = item.usages or dict.fromkeys(_WORD.findall(item.reason))
            usage_id = drift.subject.removeprefix("foreign:")
            if usage_id in named and ((seen := named[usage_id]) is None or abs(seen) == drift.units):
                return True
        shrank = item.kind == "reading_shrank" and item.subject == drift.detail.get("reading")
        same = item.kind == drift.kind and item.subject in subjects
        if not (shrank or same) or abs(item.units or 0) != drift.units:
            continue
        if drift.units or item.reason.startswith(drift.cause):
            return True
    return False


_WORD: Final = re.compile(r"\w+")
"""Items of an earlier release name their records in the text alone."""
