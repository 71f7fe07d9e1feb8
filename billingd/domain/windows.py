"""Windows of traffic: half-open stretches of UTC time, aligned to the epoch."""

import math
from collections.abc import Iterator
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
