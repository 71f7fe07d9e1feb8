"""An event loop without threads, sockets or real time: the seed alone decides what runs when."""

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final

from billingd.loops import Clock
from billingd.sandbox.clock import SandboxClock

OWNER: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("owner", default=0)
"""Whose task this is: 0 the simulation's and the far sides', else the number of a daemon's life."""

TURNS_MAX: Final = 4_000_000
"""So many turns without an end are a loop that spins: the seed fails instead of hanging."""


class Crash(BaseException):
    """The process is dead: whatever it still does has no effect."""


class Stalled(AssertionError):
    """Nothing is ready and nothing is due: everybody waits for ever."""


class Spinning(AssertionError):
    """Virtual time does not get on."""


class _NoSelector:
    """What BaseEventLoop wants to close."""

    def close(self) -> None:
        return None


class SimLoop(asyncio.BaseEventLoop):
    """Runs what is ready in an order drawn from the seed, and jumps to the next timer when nothing is."""

    _ready: Any
    _scheduled: list[Any]
    _stopping: bool

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._selector = _NoSelector()
        self._rng = rng
        self._virtual = 0.0
        self._turns = 0
        self.owned: dict[int, list[asyncio.Task[Any]]] = {}
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._unhandled)
        self.unhandled: list[str] = []

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._virtual

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """There is one thread only."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Threads would run in an order of their own."""
        raise AssertionError(f"the simulation has no threads, and something wants one for {func!r}")

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            gone = heapq.heappop(scheduled)
            gone._scheduled = False
            self._timer_cancelled_count -= 1
        if not ready and not self._stopping:
            if not scheduled:
                raise Stalled("nothing is ready and no timer is set")
            self._virtual = max(self._virtual, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._virtual:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if handle._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(handle)
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise Spinning(f"{TURNS_MAX} turns, and still only {self._virtual:.0f} s")
        batch = [handle for handle in ready if not handle._cancelled]
        ready.clear()
        if len(batch) > 1:
            self._rng.shuffle(batch)
        for handle in batch:
            if not handle._cancelled:
                handle._run()

    def _process_events(self, event_list: Any) -> None:
        return None

    def _write_to_self(self) -> None:
        return None

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timer_cancelled_count += 1

    _timer_cancelled_count = 0

    def _make_task(self, loop: Any, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        context = kwargs.get("context")
        owner = OWNER.get() if context is None else context.get(OWNER, 0)
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
        if owner:
            owned = self.owned.setdefault(owner, [])
            if len(owned) > 64 and len(owned) % 64 == 0:
                owned[:] = [one for one in owned if not one.done()]
            owned.append(task)
        return task

    def _unhandled(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, asyncio.CancelledError) and not _is_death(error):
            self.unhandled.append(f"{context.get('message')}: {error!r}")


def _is_death(error: BaseException | None) -> bool:
    """Whether this is the crash itself, or what a task of the dead process made of it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Crash)[1] is None
    while error is not None and not isinstance(error, Crash):
        error = error.__cause__
    return error is not None


def spawn(coro: Coroutine[Any, Any, Any], *, owner: int = 0, name: str | None = None) -> asyncio.Task[Any]:
    """A task of this owner's; without one, a task that no crash of the daemon ends."""
    context = contextvars.copy_context()
    context.run(OWNER.set, owner)
    return asyncio.get_running_loop().create_task(coro, name=name, context=context)


class FarClock(SandboxClock):
    """The far sides' time: the loop's."""

    def __init__(self, loop: SimLoop, start: datetime) -> None:
        self._loop = loop
        self._start = start.astimezone(UTC)
        super().__init__()

    def elapsed(self) -> float:
        """Virtual seconds, whatever any clock says."""
        return self._loop.time()

    def _real(self) -> datetime:
        return self._start + timedelta(microseconds=round(self._loop.time() * 1e6))


class OwnClock(Clock):
    """billingd's time: the far sides' and an offset that the seed moves."""

    def __init__(self, far: FarClock) -> None:
        self._far = far
        self.offset = timedelta(0)

    def now(self) -> datetime:
        return self._far.now() + self.offset

    def elapsed(self) -> float:
        return self._far.elapsed()


def run(make: Callable[[SimLoop], Coroutine[Any, Any, Any]], rng: Random) -> Any:
    """Run one life on a loop of its own."""
    loop = SimLoop(rng)
    try:
        return loop.run_until_complete(make(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
