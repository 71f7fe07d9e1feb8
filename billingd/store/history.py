"""History: what was tried and what was decided, appended and never changed.

A write that took effect at its first try leaves its trace in its intent; what went otherwise (no answer, a
refusal, a new epoch, a record found), and what an operator did, is told here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billingd.store.engine import Tx
from billingd.store.schema import history


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened to a subject (an intent's name, a held item's subject, an action's)."""

    at: datetime
    subject: str
    kind: str
    detail: Mapping[str, Any]


async def append(tx: Tx, subject: str, kind: str, *, now: datetime, **detail: Any) -> None:
    """Say what happened to a subject. `detail` is JSON: text, numbers, no times."""
    await tx.execute(
        sa.insert(history), {"at": now, "subject": subject[:200], "kind": kind, "detail": detail}
    )


async def of(tx: Tx, *subjects: str) -> list[Entry]:
    """All that happened to these subjects, the oldest first."""
    statement = sa.select(history).where(history.c.subject.in_(subjects)).order_by(history.c.id)
    return [Entry(row.at, row.subject, row.kind, row.detail) for row in await tx.execute(statement)]
