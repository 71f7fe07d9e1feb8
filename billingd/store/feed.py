"""How far each watch topic has been read, and where the next reading begins."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from billingd.domain.errors import Retryable
from billingd.store.engine import Tx
from billingd.store.rows import upsert
from billingd.store.schema import UtcDateTime, feed_positions

OVERLAP: Final = timedelta(minutes=2)
"""An event may become visible so long after one with a higher number (amplify.md 10, question 14)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the reading of a topic stands.

    `position` is the highest number seen, `read_from` where the next reading begins, `mark` what it will be
    next: the position as of `marked_at`. `read_at` is when a reading last came to the end of the feed.
    """

    topic: str
    topic_id: str
    position: int
    mark: int
    read_from: int
    marked_at: datetime
    read_at: datetime

    def overlapped(self, began: datetime) -> bool:
        """Whether a reading begun then has seen all that lay hidden below the mark when that was set."""
        return began >= self.marked_at + OVERLAP


class PlaceLost(Retryable):
    """Somebody else began the topic anew while it was read: nothing of this page was kept."""


_FIND: Final = sa.select(*(feed_positions.c[name] for name in Place.__slots__)).where(
    feed_positions.c.topic == sa.bindparam("of_topic")
)
_SEEN: Final = sa.and_(
    feed_positions.c.topic == sa.bindparam("seen_topic"),
    feed_positions.c.topic_id == sa.bindparam("seen_topic_id"),
)
_TO: Final = sa.bindparam("to", type_=sa.BigInteger())
_MOVE: Final = (
    sa.update(feed_positions)
    .where(_SEEN)
    .values(
        position=sa.case((feed_positions.c.position < _TO, _TO), else_=feed_positions.c.position),
        read_at=sa.func.coalesce(
            sa.bindparam("finished_at", type_=UtcDateTime()), feed_positions.c.read_at, type_=UtcDateTime()
        ),
    )
)
_AT_THE_MARK: Final = feed_positions.c.marked_at == sa.bindparam("seen_marked_at", type_=UtcDateTime())
_TURN: Final = (
    sa.update(feed_positions)
    .where(_SEEN, _AT_THE_MARK)
    .values(
        read_from=feed_positions.c.mark,
        mark=sa.bindparam("to_mark", type_=sa.BigInteger()),
        marked_at=sa.bindparam("began", type_=UtcDateTime()),
    )
)
_WAIT_ANEW: Final = (
    sa.update(feed_positions)
    .where(_SEEN, _AT_THE_MARK)
    .values(marked_at=sa.bindparam("began", type_=UtcDateTime()))
)


async def find(tx: Tx, topic: str) -> Place | None:
    """Where a topic's reading stands, or None before the first."""
    row = (await tx.execute(_FIND, {"of_topic": topic})).one_or_none()
    return None if row is None else Place(*row)


async def begin(tx: Tx, topic: str, topic_id: str, *, position: int, read_from: int, now: datetime) -> Place:
    """Read a topic from `read_from` on, whatever was read of it before."""
    place = Place(topic, topic_id, position, position, min(read_from, position), now, now)
    await upsert(tx, feed_positions, {name: getattr(place, name) for name in Place.__slots__})
    return place


async def advance(
    tx: Tx, seen: Place, *, position: int, began: datetime, finished_at: datetime | None
) -> None:
    """A page was read up to `position`, which never moves back. Raises PlaceLost.

    `seen` is the place before this reading, which began at `began`; `finished_at` is set with its last page.
    Two marks follow one another, so that each reading begins at a position that was reached `OVERLAP` before
    the reading before it began: what became visible late was seen by then. When the clock was set back the
    wait begins anew.
    """
    topic = {"seen_topic": seen.topic, "seen_topic_id": seen.topic_id}
    moved = await tx.execute(_MOVE, topic | {"to": position, "finished_at": finished_at})
    if moved.rowcount != 1:
        raise PlaceLost(f"watch topic {seen.topic} was begun anew while it was read")
    if finished_at is None:
        return
    at_the_mark = topic | {"seen_marked_at": seen.marked_at, "began": began}
    if began < seen.marked_at:
        await tx.execute(_WAIT_ANEW, at_the_mark)
    elif seen.overlapped(began):
        await tx.execute(_TURN, at_the_mark | {"to_mark": seen.position})
