"""A clock for tests: it stands still until it is moved."""

import asyncio
from datetime import UTC, datetime, timedelta

from billingd.loops import Clock

START = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)


class ManualClock(Clock):
    """A clock that stands still until it is moved; waiting moves it."""

    def __init__(self, at: datetime = START) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at

    def elapsed(self) -> float:
        return self.at.timestamp()

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self.at += by

    async def wait(self, wake: asyncio.Event, at_most: timedelta) -> None:
        """Nothing else happens meanwhile, so the whole time passes at once."""
        self.at += at_most
        wake.clear()
        await asyncio.sleep(0)
