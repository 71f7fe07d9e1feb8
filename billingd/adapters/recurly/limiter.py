"""One limit on requests for all threads; only the event loop waits here, never a thread."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from billingd.adapters.recurly.outcomes import integer
from billingd.domain.errors import NotDone

MINUTE: Final = 60.0
WINDOW_SECONDS: Final = 300.0  # Recurly counts over five minutes, so no reset is further away
LOW_PAUSE_SECONDS_MAX: Final = 30.0
PATIENCE_SECONDS: Final = 60.0
BACKOFF_SECONDS_MAX: Final = 60.0


class Limiter:
    """Up to a minute's worth at once, then an even pace; slower when Recurly's own headers say so.

    A 429 stops every call until the limit is whole again. A count that runs low is only a warning, for
    Recurly's window slides and gives room back all the time: then we hold still for half a minute at most.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int,
        low: int,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        if requests_per_minute < 1:
            raise ValueError("requests_per_minute must be at least 1")
        self._interval = MINUTE / requests_per_minute
        self._low = low
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        self._full_at = float("-inf")  # when the bucket is full again
        self._still_until = float("-inf")
        self._refusals = 0

    async def turn(self) -> None:
        """Wait for this request's turn; raises NotDone rather than wait longer than PATIENCE_SECONDS."""
        now = self._monotonic()
        latest = now + PATIENCE_SECONDS
        full_at = max(self._full_at, now) + self._interval
        wait = self._bearable(full_at - MINUTE, latest)
        self._full_at = full_at
        while wait > 0:
            await self._sleep(wait)
            wait = self._bearable(self._still_until, latest)

    def _bearable(self, until: float, latest: float) -> float:
        until = max(until, self._still_until)
        wait = until - self._monotonic()
        if wait > 0 and until > latest:
            raise NotDone(
                f"Recurly's rate limit is used up for another {wait:.0f} s; nothing was sent",
                retry_after=timedelta(seconds=wait),
            )
        return wait

    def heed(self, status: int | None, headers: Mapping[str, str]) -> None:
        """Learn from an answer."""
        if status is None:
            return
        if status == 429:
            self._refusals += 1
            self._hold(self._asked(headers) or self._backoff())
            return
        self._refusals = 0
        remaining = integer(headers.get("x-ratelimit-remaining", ""))
        if remaining is not None and remaining <= self._low_of(headers):
            self._hold(min(self._until_reset(headers), LOW_PAUSE_SECONDS_MAX))

    def _low_of(self, headers: Mapping[str, str]) -> int:
        limit = integer(headers.get("x-ratelimit-limit", ""))
        return self._low if limit is None else min(self._low, limit // 10)

    def _asked(self, headers: Mapping[str, str]) -> float:
        after = integer(headers.get("retry-after", "")) or 0
        return min(float(after) or self._until_reset(headers), WINDOW_SECONDS)

    def _until_reset(self, headers: Mapping[str, str]) -> float:
        reset = integer(headers.get("x-ratelimit-reset", ""))
        return 0.0 if reset is None else max(0.0, min(reset - self._clock().timestamp(), WINDOW_SECONDS))

    def _backoff(self) -> float:
        # also when the reset lies in the past: one of the two clocks is wrong
        return float(min(2.0 ** min(self._refusals - 1, 10), BACKOFF_SECONDS_MAX))

    def _hold(self, seconds: float) -> None:
        self._still_until = max(self._still_until, self._monotonic() + seconds)
