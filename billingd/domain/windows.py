"""Windows of traffic: half-open stretches of UTC time, aligned to the epoch."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """[start, end), aware UTC."""

    start: datetime
    end: datetime

    @property
    def length(self) -> timedelta:
        """How long it is."""
        return self.end - self.start


def floor(moment: datetime, length: timedelta) -> datetime:
    """The latest start of a window of that length at or before `moment`."""
    return moment - (moment - EPOCH) % length


def shared_edge(moment: datetime, one: timedelta, other: timedelta) -> datetime:
    """The earliest moment at or after `moment` where windows of either length begin (whole seconds)."""
    both = math.lcm(int(one.total_seconds()), int(other.total_seconds()))
    return moment + (EPOCH - moment) % timedelta(seconds=both)


BRIDGE_MAX: Final = timedelta(days=31)
"""The longest windows that are tried to hold pieces of another length."""


def fits(piece: Window, length: timedelta) -> bool:
    """Whether a piece lies inside of one window of that length."""
    return piece.end <= floor(piece.start, length) + length


def next_length(
    at: datetime, length: timedelta, wanted: timedelta, pieces: Collection[Window]
) -> tuple[datetime, timedelta] | None:
    """Where windows of that length, read up to `at`, change their length next, and to which; None: nowhere.

    `pieces` are recorded from `at` on: a restored store learns of windows that another life read in another
    length. Each must lie in one window that is read, or its units would be booked again for the next one. So
    the `wanted` length waits for the end of the last piece that it would cut, and where the present one cuts
    any, a multiple of it comes first.
    """
    changes: list[tuple[datetime, bool, timedelta]] = []
    if length != wanted:
        whole_from = max((one.end for one in pieces if not fits(one, wanted)), default=at)
        changes.append((shared_edge(max(at, whole_from), length, wanted), False, wanted))
    if (odd := [one for one in pieces if not fits(one, length)]) and (bridge := _bridge(at, length, odd)):
        changes.append((min(floor(one.start, bridge) for one in odd if _held(one, at, bridge)), True, bridge))
    return None if not changes else (min(changes)[0], min(changes)[2])


def _held(piece: Window, at: datetime, length: timedelta) -> bool:
    return fits(piece, length) and floor(piece.start, length) >= at


def _bridge(at: datetime, length: timedelta, odd: Collection[Window]) -> timedelta | None:
    """The shortest multiple whose windows from `at` on hold all of these pieces, else the first of them."""
    multiples = [length * n for n in range(2, BRIDGE_MAX // length + 1)]
    for pieces in (odd, [min(odd)]):
        for each in multiples:
            if all(_held(one, at, each) for one in pieces):
                return each
    return None


def settled_end(watermark: datetime, now: datetime, *, length: timedelta, settle: timedelta) -> datetime:
    """The end of the last settled window after `watermark`, or `watermark` itself when none has settled."""
    if now - settle <= watermark:
        return watermark
    return watermark + ((now - settle - watermark) // length) * length


def windows(start: datetime, end: datetime, *, length: timedelta) -> Iterator[Window]:
    """The windows of that length from `start` up to `end`, both of which must be window edges."""
    while start < end:
        yield Window(start, start + length)
        start += length
