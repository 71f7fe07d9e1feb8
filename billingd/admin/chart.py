"""The small chart of a subscription: stretches of time, and bars of units in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from billingd.domain.windows import floor

BARS: Final = 14
WINDOWS_MAX: Final = 1_000
"""Windows of one add-on in one chart: what bounds the work where windows are short."""

WIDTH: Final = 140
HEIGHT: Final = 32
SEEN: Final = 3.0
"""The least height of what is drawn at all: as high as can be seen, and its colour told."""

_STEPS: Final = {
    timedelta(minutes=1): "minute",
    timedelta(minutes=5): "5 minutes",
    timedelta(minutes=15): "15 minutes",
    timedelta(hours=1): "hour",
    timedelta(hours=6): "6 hours",
    timedelta(days=1): "day",
}
STATES: Final = ("reported", "recorded", "held", "written_off")
"""From the bottom of a bar to its top."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """Where the stretches of a chart begin, the running one last, and what each is: `day`, `hour`."""

    starts: tuple[datetime, ...]
    step: timedelta

    @property
    def each(self) -> str:
        """What one bar stands for, in words."""
        return _STEPS[self.step]

    @property
    def span(self) -> str:
        """What all of them stand for, in words."""
        whole = self.step * BARS
        days, hours, minutes = whole.days, whole.seconds // 3600, whole.seconds // 60 % 60
        parts = ((days, "days"), (hours, "h"), (minutes, "min"))
        return " ".join(f"{number} {word}" for number, word in parts if number)


def stretches(now: datetime, window: timedelta) -> Stretches:
    """The last days; something shorter where windows are so short that days hold too many of them."""
    step = max((one for one in _STEPS if one * BARS <= window * WINDOWS_MAX), default=min(_STEPS))
    begun = floor(now, step)
    return Stretches(tuple(begun - step * back for back in reversed(range(BARS))), step)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a bar, in the units of the drawing."""

    state: str
    x: float
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn, and the same in words for who cannot see it."""

    blocks: tuple[Block, ...]
    bar: float
    peak: int
    said: str


def chart(units: Mapping[tuple[int, str], int], over: Stretches) -> Chart:
    """Bars of units by (number of the stretch, state). What is negative in all is drawn as nothing."""
    number = len(over.starts)
    whole = [sum(max(units.get((at, state), 0), 0) for state in STATES) for at in range(number)]
    peak = max(whole, default=0)
    pitch = WIDTH / number
    blocks = []
    for at in range(number):
        y = float(HEIGHT)
        for state, height in _heights({state: units.get((at, state), 0) for state in STATES}, peak).items():
            y -= height
            blocks.append(Block(state, round(at * pitch, 2), round(y, 2), round(height, 2)))
    return Chart(tuple(blocks), round(pitch - 2, 2), peak, _said(whole, over))


def _heights(here: Mapping[str, int], peak: int) -> dict[str, float]:
    """How high each part of a bar is: a single unit beside a million is seen too, at the largest's cost."""
    heights = {state: max(units / peak * (HEIGHT - 2), SEEN) for state, units in here.items() if units > 0}
    if (over := sum(heights.values()) - (HEIGHT - 2)) > 0:
        largest = max(heights, key=lambda state: heights[state])
        heights[largest] -= over
    return heights


def _said(whole: Sequence[int], over: Stretches) -> str:
    day = over.step == timedelta(days=1)
    first, last = (f"{one:%d %b}" if day else f"{one:%H:%M}" for one in (over.starts[0], over.starts[-1]))
    numbers = ", ".join(f"{one:,}" for one in whole) if any(whole) else "none"
    return f"Units recorded per {over.each} from {first} to {last} UTC: {numbers}"
