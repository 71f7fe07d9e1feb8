"""Catching up on lost webhooks: the watch-topic feed, read from a durable position with a small overlap.

A webhook is a hint that makes billingd fast; the feed has the same events for seven days. What it no longer
has, or was never told, a resync finds.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.errors import Gone, NotFound, Permanent, Retryable
from billingd.domain.feed import PAGE_SIZE, FeedPage
from billingd.intake import Intake
from billingd.loops import Clock
from billingd.store import feed
from billingd.store.engine import Store, Tx
from billingd.store.feed import Place

log = structlog.get_logger()

KEPT: Final = timedelta(days=7)
"""How long Amplify keeps an event (amplify.md 4.5)."""


class Topics(Protocol):
    """What is read at Amplify."""

    async def find_watch_topic(self, name: str) -> str | None: ...
    async def newest_position(self, topic: str) -> int | None: ...
    async def recent_positions(self, topic: str) -> tuple[int, ...]: ...
    async def read_feed(self, topic: str, after: int) -> FeedPage: ...


class Resync(Protocol):
    """Who lists and compares everything when the feed cannot tell what happened."""

    @property
    def wake(self) -> asyncio.Event: ...

    async def ask(self, tx: Tx, because: str) -> None: ...

    """Ask for one within a transaction; `wake` is set once that is committed."""


class CatchUp:
    """Reads one watch topic. Every turn takes in what happened since the one before, each event once."""

    def __init__(
        self, store: Store, clock: Clock, amplify: Topics, intake: Intake, topic: str, resync: Resync
    ) -> None:
        self._store = store
        self._clock = clock
        self._amplify = amplify
        self._intake = intake
        self._topic = topic
        self._resync = resync
        self._missing: bool | None = None

    @property
    def missing(self) -> bool:
        """Whether Amplify had no such topic when last asked: a resync is the only way then."""
        return self._missing is True

    async def run_once(self) -> bool:
        """Read the feed to its end; False, for the next turn can wait.

        1. No place yet, another topic of that name, or a place older than what is kept: begin anew.
        2. Read from the place, page by page, each kept in one transaction with the position it reaches.
        3. When Amplify says that the place is too old (410): begin anew, and read from there.
        """
        try:
            topic_id = await self._amplify.find_watch_topic(self._topic)
            if topic_id is None:
                self._found(missing=True)
                return False
            async with self._store.read() as tx:
                place = await feed.find(tx, self._topic)
            if place is None:
                place = await self._begin(topic_id, None, "the feed is read for the first time")
            elif why := _outdated(place, topic_id, self._clock.now()):
                place = await self._begin(topic_id, place, why)
            try:
                await self._read(place)
            except Gone as error:
                place = await self._begin(topic_id, place, str(error), floor=error.max_sequence)
                await self._read(place)
        except NotFound:
            self._found(missing=True)
            return False
        self._found(missing=False)
        return False

    async def _begin(
        self, topic_id: str, before: Place | None, why: str, *, floor: int | None = None
    ) -> Place:
        """Go on from the newest position as it is before the resync that is asked for here.

        The newest page is read again all the same: what lies hidden below the newest position may be hidden
        from the resync too. None is asked for when nothing can have been missed.
        """
        recent = await self._amplify.recent_positions(self._topic)
        position = max(recent, default=floor or 0)
        now = self._clock.now()
        idle = before is not None and _nothing_missed(before, topic_id, recent, now)
        async with self._store.write() as tx:
            place = await feed.begin(
                tx,
                self._topic,
                topic_id,
                position=position,
                read_from=_behind(recent, position),
                now=now,
            )
            if not idle:
                await self._resync.ask(tx, why)
        log.warning("feed.begun_anew", topic=self._topic, position=position, because=why, resync=not idle)
        if not idle:
            self._resync.wake.set()
        return place

    async def _read(self, place: Place) -> None:
        """Every page from the place on to the end of the feed."""
        began = self._clock.now()
        after, position = place.read_from, place.position
        while True:
            page = await self._amplify.read_feed(self._topic, after)
            if page.topic_ids - {place.topic_id}:
                raise Retryable(f"watch topic {self._topic} was made anew while it was read")
            if page.highest is None and page.last and await self._numbered_anew(after):
                raise Gone(f"watch topic {self._topic} counts its events from lower numbers than before")
            _tell_unread(page, place)
            position = max(position, page.highest or 0)
            new, actions = await self._keep(page, place, position, began)
            if new:
                log.info("feed.caught_up", topic=self._topic, events=new, actions=actions, position=position)
            if page.last:
                return
            if page.highest is None or page.highest <= after:
                raise Permanent(
                    f"watch topic {self._topic}: {PAGE_SIZE} items behind {after}, none with a higher number"
                )
            after = page.highest

    async def _keep(self, page: FeedPage, place: Place, position: int, began: datetime) -> tuple[int, int]:
        finished_at = self._clock.now() if page.last else None

        async def keep(tx: Tx) -> None:
            await feed.advance(tx, place, position=position, began=began, finished_at=finished_at)

        return await self._intake.take_all([one.event for one in page.events], keep)

    async def _numbered_anew(self, after: int) -> bool:
        """Whether the newest number is lower than one that was there: then nothing new would ever be seen."""
        newest = await self._amplify.newest_position(self._topic) if after else None
        return newest is not None and newest < after

    def _found(self, *, missing: bool) -> None:
        """Log the change."""
        if missing and self._missing is not True:
            log.warning(
                "feed.topic_missing",
                topic=self._topic,
                fix="`billingd hooks apply` makes it; until then lost webhooks are found by the next resync",
            )
        elif not missing and self._missing:
            log.info("feed.topic_found", topic=self._topic)
        self._missing = missing


def _outdated(place: Place, topic_id: str, now: datetime) -> str | None:
    """Why a place says nothing about the feed any more."""
    if place.topic_id != topic_id:
        return f"watch topic {place.topic} was made anew: what happened in between is in neither"
    if now - place.read_at >= KEPT:
        return f"the feed was last read at {place.read_at.isoformat()}, and keeps events for {KEPT.days} days"
    return None


def _nothing_missed(before: Place, topic_id: str, recent: Sequence[int], now: datetime) -> bool:
    """Whether the same topic, read lately, has told of nothing since: an idle one may still be 410."""
    lately = before.topic_id == topic_id and now - before.read_at < KEPT
    return lately and (not recent or max(recent) == before.position)


def _behind(recent: Sequence[int], position: int) -> int:
    """From where the newest page is read again; 0 when it is all there is."""
    return min(recent, default=position) if len(recent) >= PAGE_SIZE or not recent else 0


def _tell_unread(page: FeedPage, place: Place) -> None:
    """Log what could not be understood, when it is seen first: its number counts all the same."""
    for number, why in page.unread:
        if number is None or number > place.position:
            log.warning("feed.item_not_understood", topic=place.topic, sequence=number, error=why)
