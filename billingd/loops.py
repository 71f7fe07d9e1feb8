"""The clock, and how every loop turns: one step, then a wait that a wake-up may cut short."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from billingd.domain.errors import BillingdError, Retryable

log = structlog.get_logger()

RunOnce = Callable[[], Awaitable[bool]]

HELD_UP_PAUSE: Final = timedelta(seconds=1)
"""How long a loop rests at first when the far side or the store is away; doubled up to the next."""

HELD_UP_PAUSE_MAX: Final = timedelta(seconds=30)


class Clock:
    """The time as the daemon sees it; tests hand in their own."""

    def now(self) -> datetime:
        """Aware UTC."""
        return datetime.now(UTC)

    def elapsed(self) -> float:
        """Seconds on a clock that nobody sets; only differences mean anything."""
        return time.monotonic()

    async def wait(self, wake: asyncio.Event, at_most: timedelta) -> None:
        """Return when `wake` is set (and clear it) or after `at_most`, whichever is first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most.total_seconds()):
                await wake.wait()
        wake.clear()


class Progress:
    """When each loop last finished a step: what /healthz and the watchdog believe."""

    def __init__(self) -> None:
        self._turned: dict[str, tuple[datetime, timedelta]] = {}
        self._also: list[Callable[[datetime], list[str]]] = []

    def turned(self, loop: str, now: datetime, *, patience: timedelta) -> None:
        """A loop finished a step; the next may take up to `patience`."""
        self._turned[loop] = (now, patience)

    def watch(self, hung: Callable[[datetime], list[str]]) -> None:
        """Ask this too: it names what has been under way for longer than it should."""
        self._also.append(hung)

    def stuck(self, now: datetime) -> list[str]:
        """The loops that are overdue, and other work that hangs, by name."""
        loops = sorted(loop for loop, (at, patience) in self._turned.items() if now - at > patience)
        return loops + [name for hung in self._also for name in hung(now)]

    def ages(self, now: datetime) -> dict[str, tuple[float, float]]:
        """Seconds since each loop last turned, and how many it may take."""
        return {
            loop: ((now - at).total_seconds(), patience.total_seconds())
            for loop, (at, patience) in sorted(self._turned.items())
        }


async def forever(
    name: str,
    run_once: RunOnce,
    *,
    wake: asyncio.Event,
    clock: Clock,
    idle: Callable[[], Awaitable[timedelta]],
    progress: Progress,
    patience: timedelta = timedelta(minutes=5),
) -> None:
    """Turn a loop until it is cancelled. `run_once` returns False when nothing was due.

    A far side or store that is away or answers nonsense holds the loop up and is logged on the change;
    anything else ends the process, for a bug must not turn for ever in silence.
    """
    held_up = 0
    while True:
        progress.turned(name, clock.now(), patience=patience)
        pause = timedelta(0)
        try:
            if not await run_once():
                pause = await idle()
        except BillingdError as error:
            if held_up == 0:
                log.warning("loop.held_up", loop=name, error=str(error))
            wish = error.retry_after if isinstance(error, Retryable) else None
            pause = max(min(HELD_UP_PAUSE * 2**held_up, HELD_UP_PAUSE_MAX), wish or HELD_UP_PAUSE)
            held_up = min(held_up + 1, 10)
        else:
            if held_up:
                log.info("loop.recovered", loop=name)
            held_up = 0
        if pause > timedelta(0):
            progress.turned(name, clock.now(), patience=patience + pause)
            await clock.wait(wake, pause)


def every(pause: timedelta) -> Callable[[], Awaitable[timedelta]]:
    """The same rest after each step."""

    async def idle() -> timedelta:
        return pause

    return idle
