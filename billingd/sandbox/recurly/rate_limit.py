"""Requests per sliding five minutes, per site (OAS:160-180)."""

from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Final

from billingd.sandbox.recurly.errors import RefusalError
from billingd.sandbox.recurly.state import State

WINDOW: Final = timedelta(minutes=5)
MINUTES: Final = 5
READS: Final = frozenset({"GET", "HEAD"})


class RateLimit:
    """Sandbox sites count everything, usage too; production sites only GET and HEAD (V2:853).

    Refused requests count as well: nothing says they do not, and a client that waits for
    `X-RateLimit-Reset` does not notice.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: deque[datetime] = deque()

    def check(self, method: str) -> None:
        """Counts a request; raises the 429 if it is one too many."""
        now = self._state.clock.now()
        while self._seen and self._seen[0] <= now - WINDOW:
            self._seen.popleft()
        if method not in READS and self._state.settings.production:
            return
        self._seen.append(now)
        if len(self._seen) > self._limit():
            raise RefusalError(
                429, "rate_limited", "You have made too many API requests in the last 5 minutes"
            )

    def headers(self) -> dict[str, str]:
        """`X-RateLimit-Reset`: when the window is clear, if no more calls come."""
        last = self._seen[-1] if self._seen else self._state.clock.now() - WINDOW
        return {
            "X-RateLimit-Limit": str(self._limit()),
            "X-RateLimit-Remaining": str(max(0, self._limit() - len(self._seen))),
            "X-RateLimit-Reset": str(int((last.astimezone(UTC) + WINDOW).timestamp()) + 1),
        }

    def _limit(self) -> int:
        return self._state.settings.per_minute * MINUTES
