"""Billing periods at Recurly, and how they cut a window so that no usage record straddles a bill."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from billingd.domain.windows import Window


@dataclass(frozen=True, slots=True, order=True)
class Period:
    """One billing cycle of a subscription, [started_at, ends_at); usage in a `trial` is never billed."""

    started_at: datetime
    ends_at: datetime
    trial: bool = False


def learn(known: Sequence[Period], seen: Period) -> list[Period]:
    """The periods that change when Recurly shows `seen` as the current one.

    A bill date that was moved changes the period's end; a period that was cut short (a resumed pause, say)
    ends where the next begins.
    """
    changed = [] if seen in known else [seen]
    cut_short = (one for one in known if one.started_at < seen.started_at < one.ends_at)
    return changed + [Period(one.started_at, seen.started_at, one.trial) for one in cut_short]


def between(start: datetime, moments: Iterable[datetime], end: datetime) -> list[Period]:
    """The periods from `start` to `end` that nobody saw, told apart by where bills are known to begin."""
    inside = sorted({moment for moment in moments if start < moment < end})
    return [Period(one, other) for one, other in pairwise([start, *inside, end])]


def period_of(periods: Iterable[Period], moment: datetime) -> Period | None:
    """The known period that a moment lies in."""
    return next((one for one in periods if one.started_at <= moment < one.ends_at), None)


def edges(periods: Sequence[Period]) -> set[datetime]:
    """Where one bill ends and the next begins: the start of the first known period is no such edge."""
    found = {one.ends_at for one in periods}
    found.update(one.started_at for one in sorted(periods)[1:])
    return found


def cut(window: Window, moments: Iterable[datetime]) -> tuple[Window, ...]:
    """The window in pieces, cut at each of the moments that lies strictly inside it."""
    inside = sorted({moment for moment in moments if window.start < moment < window.end})
    return tuple(Window(start, end) for start, end in pairwise([window.start, *inside, window.end]))
