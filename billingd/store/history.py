"""History: what was tried and what was decided, appended and never changed.

A write that took effect at its first try leaves its trace in its intent; what went otherwise (no answer, a
refusal, a record found), and what an operator did, is told here. An intent is what was sent last: before
anything takes its place, all that it says is appended here (`sent`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.sending import Intent, idempotency_key
from billingd.store.engine import Tx
from billingd.store.schema import history

CORRECTED: Final = "corrected"
"""A repair posted `units` under a `tag` of their own, beside a record that was billed already."""

CORRECTION_READ_BACK: Final = "correction_read_back"
"""The same, learnt of from Recurly, which mostly says when it was `posted_at`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened to a subject (an intent's name, a held item's subject, an action's)."""

    at: datetime
    subject: str
    kind: str
    detail: Mapping[str, Any]


async def append(tx: Tx, subject: str, kind: str, *, now: datetime, **detail: Any) -> None:
    """Say what happened to a subject. `detail` is JSON: text, numbers; a time as `text_of` writes it."""
    await append_all(tx, [(subject, kind, detail)], now=now)


async def append_all(tx: Tx, entries: Sequence[tuple[str, str, Mapping[str, Any]]], *, now: datetime) -> None:
    """Say what happened to several subjects: (subject, kind, detail) of each."""
    rows = [
        {"at": now, "subject": subject[:200], "kind": kind, "detail": dict(detail)}
        for subject, kind, detail in entries
    ]
    if rows:
        await tx.execute(sa.insert(history), rows)


def text_of(moment: datetime | None) -> str | None:
    """A time as it stands in a detail: RFC 3339 in UTC, with a Z."""
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")


def posted_at(entry: Entry) -> datetime:
    """When Recurly took what an entry tells of."""
    said = entry.detail.get("posted_at")
    return entry.at if said is None else datetime.fromisoformat(said)


def sent(intent: Intent | None) -> dict[str, Any]:
    """All that is known of a sending, for a detail: nothing when nothing was sent from here."""
    if intent is None or not intent.body_hash:
        return {}
    said = {
        "key": idempotency_key(intent.name, intent.epoch, intent.body_hash),
        "epoch": intent.epoch,
        "sends": intent.sends,
        "outcome": intent.state,
        "first_sent_at": text_of(intent.first_sent_at),
        "last_sent_at": text_of(intent.last_sent_at),
        "unanswered_since": text_of(intent.gave_up_at),
        "result": intent.result,
    }
    return {name: value for name, value in said.items() if value is not None}


async def beginning(tx: Tx, prefix: str, kind: str, *, since: datetime) -> list[Entry]:
    """What of a kind happened since a moment to subjects that begin so, the oldest first."""
    columns = history.c
    statement = (
        sa.select(history)
        .where(columns.subject.startswith(prefix, autoescape=True), columns.kind == kind, columns.at >= since)
        .order_by(columns.id)
    )
    return [Entry(row.at, row.subject, row.kind, row.detail) for row in await tx.execute(statement)]


async def of(tx: Tx, *subjects: str) -> list[Entry]:
    """All that happened to these subjects, the oldest first."""
    statement = sa.select(history).where(history.c.subject.in_(subjects)).order_by(history.c.id)
    return [Entry(row.at, row.subject, row.kind, row.detail) for row in await tx.execute(statement)]
