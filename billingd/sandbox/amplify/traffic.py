"""What the gateways counted: metrics in per-series order, visible once they have arrived (amplify.md 6)."""

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import count
from operator import attrgetter
from typing import Final

from billingd.sandbox.amplify.times import epoch_ms, from_ms
from billingd.sandbox.clock import SandboxClock

STATUSES: Final = ("Success", "Failure", "Exception")


@dataclass(frozen=True, slots=True)
class Series:
    """What tells one count from another; ids are catalog `metadata.id`s."""

    org: str
    unit: str
    subscription: str
    quota: str
    plan: str
    product: str
    application: str
    status: str


SERIES_FIELDS: Final = tuple(field.name for field in fields(Series))


@dataclass(slots=True)
class Counts:
    """One series: start times in order and the units counted from each."""

    times: list[int]
    units: list[int]

    def add(self, at: int, units: int) -> None:
        """Takes up one metric; metrics of the same start are one."""
        if not self.times or at > self.times[-1]:
            self.times.append(at)
            self.units.append(units)
            return
        place = bisect_left(self.times, at)
        if self.times[place] == at:
            self.units[place] += units
        else:
            self.times.insert(place, at)
            self.units.insert(place, units)

    def between(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Metrics that started in [start, end)."""
        low, high = bisect_left(self.times, start), bisect_left(self.times, end)
        return zip(self.times[low:high], self.units[low:high], strict=True)


class Traffic:
    """All metrics, indexed by organisation and unit, then by subscription."""

    def __init__(self, clock: SandboxClock) -> None:
        self._clock = clock
        self._arrived: dict[tuple[str, str], dict[str, dict[Series, Counts]]] = {}
        self._on_the_way: list[tuple[int, int, Series, int, int]] = []
        self._order = count()
        self._served: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.sampled: dict[Series, Counts] = {}
        self.metrics = 0

    def count(self, series: Series, at: datetime, units: int, arrives: datetime, sample_percent: int) -> None:
        """A gateway counted `units` from `at` on and reports them at `arrives`."""
        self.metrics += 1
        self._served[series.subscription, series.quota] += units
        start = epoch_ms(at)
        sampled = units * sample_percent // 100
        if sampled:
            self.sampled.setdefault(series, Counts([], [])).add(start, sampled)
        if arrives > self._clock.now():
            entry = (epoch_ms(arrives), next(self._order), series, start, units)
            heapq.heappush(self._on_the_way, entry)
        else:
            self._take_up(series, start, units)

    def served(self) -> dict[tuple[str, str], int]:
        """Units per (subscription, quota), whether they have arrived or not: the ledger's truth."""
        return dict(self._served)

    def pending_units(self) -> int:
        """Units that no reader can see yet."""
        self._arrivals()
        return sum(entry[4] for entry in self._on_the_way)

    def series(
        self, *, org: str | None = None, unit: str | None = None, subscriptions: Collection[str] | None = None
    ) -> Iterator[tuple[Series, Counts]]:
        """The series that have arrived, narrowed by organisation, unit and subscriptions."""
        self._arrivals()
        for (of_org, of_unit), by_subscription in self._arrived.items():
            if org not in (None, of_org) or unit not in (None, of_unit):
                continue
            wanted = by_subscription if subscriptions is None else dict.fromkeys(subscriptions)
            for subscription in wanted:
                yield from by_subscription.get(subscription, {}).items()

    def _arrivals(self) -> None:
        now = epoch_ms(self._clock.now())
        while self._on_the_way and self._on_the_way[0][0] <= now:
            _, _, series, start, units = heapq.heappop(self._on_the_way)
            self._take_up(series, start, units)

    def _take_up(self, series: Series, start: int, units: int) -> None:
        by_subscription = self._arrived.setdefault((series.org, series.unit), {})
        by_series = by_subscription.setdefault(series.subscription, {})
        counts = by_series.get(series)
        if counts is None:
            counts = by_series[series] = Counts([], [])
        counts.add(start, units)


def grouped(
    found: Iterator[tuple[Series, Counts]], names: tuple[str, ...]
) -> dict[tuple[str, ...], list[tuple[Series, Counts]]]:
    """Series by the values of the named fields, in order of first sight."""
    if not names:
        everything = list(found)
        return {(): everything} if everything else {}
    keys = [attrgetter(name) for name in names]
    groups: dict[tuple[str, ...], list[tuple[Series, Counts]]] = {}
    for series, counts in found:
        groups.setdefault(tuple(key(series) for key in keys), []).append((series, counts))
    return groups


def bucket_start(at: int, length: int, unit: str) -> int:
    """Start of the bucket that holds `at` (ms); aligned to the UTC epoch, months to the calendar."""
    if unit != "M":
        size = length * BUCKET_MS[unit]
        return at - at % size
    instant = from_ms(at)
    months = (instant.year - 1970) * 12 + instant.month - 1
    months -= months % length
    first = instant.replace(
        year=1970 + months // 12, month=months % 12 + 1, day=1, hour=0, minute=0, second=0, microsecond=0
    )
    return epoch_ms(first)


BUCKET_MS: Final = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
