"""What a scrape is told of the store, without reading whole tables each time (they are kept for ever)."""

from datetime import datetime, timedelta
from typing import Any, Final

from billingd.domain.attempts import State
from billingd.store import completeness, drift, held, intents, outbox, usage, watermarks
from billingd.store.engine import Store

OVERLAP: Final = 10_000
"""The newest records, summed anew each time: on PostgreSQL a lower id may be committed after a higher one."""

SETTLED_EVERY: Final = timedelta(minutes=5)
"""How old the numbers of done and discarded actions may be."""

PERIODS_EVERY: Final = timedelta(minutes=1)
"""How old the units that missed an invoice may be."""

SETTLED: Final = (State.DONE, State.DISCARDED)


class Figures:
    """Reads what changes, and keeps what does not: records of usage are only ever added."""

    def __init__(self, store: Store, source: str) -> None:
        self._store = store
        self._source = source
        self._summed = 0
        self._summed_up_to = 0
        self._settled: dict[tuple[str, str], int] = {}
        self._settled_at: datetime | None = None
        self._missed = 0
        self._missed_at: datetime | None = None

    async def read(self, now: datetime) -> tuple[dict[str, Any], dict[tuple[str, str], int]]:
        """The part of the status document that metrics are made of, and actions by (state, kind)."""
        async with self._store.read() as tx:
            recorded, newest = await usage.added(tx, after=self._summed_up_to)
            recorded += self._summed
            if newest - OVERLAP > self._summed_up_to:
                more, _ = await usage.added(tx, after=self._summed_up_to, up_to=newest - OVERLAP)
                self._summed, self._summed_up_to = self._summed + more, newest - OVERLAP
            unreported, written_off = await usage.not_reported(tx)
            if _old(self._settled_at, now, SETTLED_EVERY):
                counts = await outbox.count(tx)
                self._settled = {key: number for key, number in counts.items() if key[0] in SETTLED}
                self._settled_at = now
            waiting = await outbox.count_waiting(tx)
            if _old(self._missed_at, now, PERIODS_EVERY):
                self._missed = (await completeness.summary(tx, now=now)).missed_units
                self._missed_at = now
            oldest = await outbox.oldest_pending(tx)
            mark = await watermarks.find(tx, self._source)
            unknown = await intents.count_open(tx)
            held_counts = await held.count(tx)
            drifting = await drift.summary(tx)
        document = {
            "outbox": {
                "oldest_pending_seconds": None if oldest is None else int((now - oldest).total_seconds())
            },
            "traffic": {
                "lag_seconds": None if mark is None else int((now - mark.at).total_seconds()),
                "recorded_units": recorded,
                "reported_units": recorded - unreported,
                "unreported_units": unreported,
                "written_off_units": written_off,
                "unknown_outcomes": unknown,
            },
            "periods": {"missed_units": self._missed},
            "drift": drifting,
            "held": held_counts,
        }
        return document, self._settled | waiting


def _old(at: datetime | None, now: datetime, age_max: timedelta) -> bool:
    return at is None or not timedelta(0) <= now - at < age_max
