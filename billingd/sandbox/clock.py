"""The sandbox's time: the real one plus an offset, or one that stands still until it is moved."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from aiohttp import web


class SandboxClock:
    """Real time plus an offset, aware UTC. Moving it moves every rule that looks at the time."""

    def __init__(self, start: datetime | None = None) -> None:
        self._offset = timedelta(0)
        if start is not None:
            self.set(start)

    def now(self) -> datetime:
        """The sandbox's time now."""
        return self._real() + self._offset

    def advance(self, by: timedelta) -> None:
        """Moves the clock on (or back, if negative)."""
        self._offset += by

    def set(self, to: datetime) -> None:
        """Moves the clock to `to`, which must be aware."""
        if to.tzinfo is None:
            raise ValueError("the sandbox's clock takes aware times only")
        self._offset = to.astimezone(UTC) - self._real()

    def _real(self) -> datetime:
        return datetime.now(UTC)


class ManualClock(SandboxClock):
    """Stands still unless moved; for tests."""

    def __init__(self, start: datetime = datetime(2026, 1, 15, 12, tzinfo=UTC)) -> None:
        self._standing = start.astimezone(UTC)
        super().__init__()

    def _real(self) -> datetime:
        return self._standing


def http_date(at: datetime) -> str:
    """As HTTP writes times: whole seconds."""
    return format_datetime(at.astimezone(UTC), usegmt=True)


def dating(clock: SandboxClock) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For an application's `on_response_prepare`: its `Date` headers tell the sandbox's time."""

    async def date(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["Date"] = http_date(clock.now())

    return date
