"""What goes wrong for a while: told when it begins, grows, and is over; remembered in the store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from billingd.domain.notices import (
    DEAD_LETTERS,
    FAR_SIDE,
    HELD,
    LOOPS,
    STORE,
    Standing,
    Trouble,
    grouped,
    next_step,
    trouble_notice,
)
from billingd.loops import Clock, Progress
from billingd.notify import moment
from billingd.store import held, marks, outbox
from billingd.store.engine import Store, StoreDamaged, StoreUnavailable, Tx

log = structlog.get_logger()

GATHER: Final = timedelta(minutes=1)
"""How long dead letters are gathered before the first notice: an outage makes many within a short time."""

AWAY_FOR: Final = timedelta(minutes=10)
"""How long a far side may be away before anybody is told."""

UNWRITABLE_FOR: Final = timedelta(minutes=1)
"""How long the store may fail before anybody is told."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

CAUSES_MAX: Final = 5_000
"""Dead letters whose causes are read for a notice."""


class FarSide(Protocol):
    """What an adapter knows of the side it talks to."""

    @property
    def last_reached_at(self) -> datetime | None: ...
    @property
    def last_error(self) -> str | None: ...


class Teller(Protocol):
    """Tells people what cannot be stored first."""

    async def now(self, topic: str, facts: Mapping[str, Any]) -> bool: ...


@dataclass
class _Unwritable:
    since: datetime
    error: str
    told: bool = False


class TroubleWatch:
    """Looks at how things are and tells what changed: notice and memory are kept in one transaction."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        sides: Mapping[str, FarSide],
        progress: Progress,
        teller: Teller,
        wake_outbox: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._sides = sides
        self._progress = progress
        self._teller = teller
        self._wake_outbox = wake_outbox
        self._since = clock.now()
        self._unwritable: _Unwritable | None = None

    async def run_once(self) -> bool:
        """Look once; False, for the next look is due after a rest."""
        now = self._clock.now()
        error = self._store.write_error
        if error is None:
            try:
                await self._look(now)
                if self._unwritable is not None:
                    await self._can_be_written(self._unwritable, now)
                    self._unwritable = None
            except (StoreUnavailable, StoreDamaged) as failed:  # nor can any other part work with it
                error = str(failed)
        if error is not None:
            await self._cannot_be_written(error, now)
        return False

    async def _look(self, now: datetime) -> None:
        for name, side in self._sides.items():
            await self._see(Trouble(FAR_SIDE, name), self._away(name, side, now), AWAY_FOR, now)
        stuck = self._progress.stuck(now)
        hangs = Trouble(LOOPS, size=len(stuck), facts={"loops": stuck}) if stuck else None
        await self._see(Trouble(LOOPS), hangs, timedelta(0), now)
        async with self._store.read() as tx:
            dead = await self._dead(tx)
            waits = bool(await held.standing(tx))
        await self._see(Trouble(DEAD_LETTERS), dead, GATHER, now)
        await self._see(Trouble(HELD), Trouble(HELD) if waits else None, timedelta(0), now)

    def _away(self, name: str, side: FarSide, now: datetime) -> Trouble | None:
        at = side.last_reached_at
        if at is not None and side.last_error is None:
            return None
        if at is None and side.last_error is None:  # nobody has called it yet
            return None
        since = moment(at or self._since)
        return Trouble(FAR_SIDE, name, facts={"side": name, "error": side.last_error, "since": since})

    async def _dead(self, tx: Tx) -> Trouble | None:
        """`size` is when the last of them gave up (µs): it grows with each further one, whatever its id."""
        number, first, last = await outbox.dead(tx)
        if first is None or last is None:
            return None
        size = (last - EPOCH) // timedelta(microseconds=1)
        return Trouble(DEAD_LETTERS, size=size, facts={"total": number, "since": moment(first)})

    async def _see(self, name: Trouble, trouble: Trouble | None, patience: timedelta, now: datetime) -> None:
        async with self._store.read() as tx:
            known = _standing(await marks.find(tx, name.mark))
        step = next_step(trouble, known, now=now, patience=patience)
        if step.standing == known and step.tell is None:
            return
        since = known.since if known is not None else now
        facts: dict[str, Any] = {"since": moment(since), "side": name.about, "until": moment(now)}
        facts |= {} if trouble is None else trouble.facts
        async with self._store.write() as tx:
            if step.standing is None:
                await marks.clear(tx, name.mark)
            else:
                await marks.note(tx, name.mark, at=step.standing.since, detail=_detail(step.standing))
            # each thing that is held has a notice of its own
            if step.tell is None or (name.name == HELD and step.tell != "over"):
                return
            if name.name == DEAD_LETTERS and trouble is not None:
                facts["groups"] = grouped(await outbox.dead_causes(tx, limit=CAUSES_MAX))
            notice = trouble_notice(name.name, name.about, step.tell, facts, now=now)
            await outbox.insert(tx, [notice], now=now)
        log.warning("trouble.told", trouble=name.name, about=name.about or None, what=step.tell)
        self._wake_outbox()

    async def _cannot_be_written(self, error: str, now: datetime) -> None:
        """Nothing can be stored, so this one notice goes out at once; it is tried until somebody hears it."""
        if self._unwritable is None:
            self._unwritable = _Unwritable(now, error)
        seen = self._unwritable
        if not seen.told and now - seen.since >= UNWRITABLE_FOR:
            facts = {"since": moment(seen.since), "error": error, "grown": False}
            seen.told = await self._teller.now(f"{STORE}_begun", facts)

    async def _can_be_written(self, seen: _Unwritable, now: datetime) -> None:
        if now - seen.since < UNWRITABLE_FOR:
            return
        facts = {"since": moment(seen.since), "until": moment(now), "error": seen.error}
        async with self._store.write() as tx:
            await outbox.insert(tx, [trouble_notice(STORE, "", "over", facts, now=now)], now=now)
        self._wake_outbox()


def _standing(mark: marks.Mark | None) -> Standing | None:
    if mark is None:
        return None
    told = mark.detail.get("told_at")
    return Standing(mark.at, None if told is None else datetime.fromisoformat(told), mark.detail["size"])


def _detail(standing: Standing) -> dict[str, Any]:
    told = standing.told_at
    return {"told_at": None if told is None else told.isoformat(), "size": standing.size}
