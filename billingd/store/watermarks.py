"""How far each traffic source has been read. What was read is not yet told: that is the outbox's business."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.errors import Retryable
from billingd.store.engine import Tx
from billingd.store.rows import insert_new, upsert
from billingd.store.schema import watermarks


@dataclass(frozen=True, slots=True)
class Watermark:
    """Everything before `at` has been read. Windows have been `length` long since `regular_since`."""

    source: str
    at: datetime
    length: timedelta
    regular_since: datetime


class WatermarkMoved(Retryable):
    """Somebody else read the same windows meanwhile: read again from where they left off."""


_FIND: Final = sa.select(watermarks).where(watermarks.c.source == sa.bindparam("of_source"))
_FURTHEST: Final = sa.select(watermarks).order_by(watermarks.c.at.desc(), watermarks.c.source).limit(1)
_ADVANCE: Final = (
    sa.update(watermarks)
    .where(
        watermarks.c.source == sa.bindparam("seen_source"),
        watermarks.c.at == sa.bindparam("seen_at"),
        watermarks.c.window_seconds == sa.bindparam("seen_seconds"),
    )
    .values(at=sa.bindparam("to"), read_at=sa.bindparam("now"))
)
"""Made once, for each poll needs them: making one takes longer than running it."""


async def find(tx: Tx, source: str) -> Watermark | None:
    """The watermark of a source, or None before its first reading."""
    return _watermark((await tx.execute(_FIND, {"of_source": source})).one_or_none())


def _watermark(row: sa.Row[Any] | None) -> Watermark | None:
    if row is None:
        return None
    return Watermark(row.source, row.at, timedelta(seconds=row.window_seconds), row.regular_since)


async def begin(tx: Tx, source: str, at: datetime, length: timedelta, *, now: datetime) -> None:
    """Start reading a source at a window edge; changes nothing when it was begun before."""
    seconds = int(length.total_seconds())
    row = {"source": source, "at": at, "window_seconds": seconds, "regular_since": at, "read_at": now}
    await insert_new(tx, watermarks, [row])


async def furthest(tx: Tx) -> Watermark | None:
    """The watermark that is ahead of all others, whatever its source."""
    return _watermark((await tx.execute(_FURTHEST)).one_or_none())


async def take_over(tx: Tx, source: str, mark: Watermark, *, now: datetime) -> None:
    """Let a source go on from where another one is, in its windows."""
    row = {
        "source": source,
        "at": mark.at,
        "window_seconds": int(mark.length.total_seconds()),
        "regular_since": mark.regular_since,
        "read_at": now,
    }
    await upsert(tx, watermarks, row)


async def advance(tx: Tx, seen: Watermark, to: datetime, *, now: datetime) -> None:
    """Move from where it was seen to `to` (which may be the same). Raises WatermarkMoved."""
    given = {
        "seen_source": seen.source,
        "seen_at": seen.at,
        "seen_seconds": int(seen.length.total_seconds()),
        "to": to,
        "now": now,
    }
    if (await tx.execute(_ADVANCE, given)).rowcount != 1:
        raise WatermarkMoved(f"the watermark of {seen.source} is no longer at {seen.at.isoformat()}")


async def change_length(tx: Tx, seen: Watermark, length: timedelta, *, now: datetime) -> None:
    """From here on windows are `length` long; earlier ones are not read again. Raises WatermarkMoved."""
    moved = await tx.execute(
        sa.update(watermarks)
        .where(watermarks.c.source == seen.source, watermarks.c.at == seen.at)
        .values(window_seconds=int(length.total_seconds()), regular_since=seen.at, read_at=now)
    )
    if moved.rowcount != 1:
        raise WatermarkMoved(f"the watermark of {seen.source} is no longer at {seen.at.isoformat()}")


async def go_back(tx: Tx, to: datetime, *, now: datetime) -> None:
    """Read everything from a window edge on again, or for the first time: the ledger books what it lacks.

    Whoever is reading meanwhile finds that the watermark moved, and begins anew.
    """
    earlier = sa.case((watermarks.c.regular_since < to, watermarks.c.regular_since), else_=to)
    await tx.execute(
        sa.update(watermarks).where(watermarks.c.at > to).values(at=to, regular_since=earlier, read_at=now)
    )
