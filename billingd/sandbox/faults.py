"""Faults on demand: rules say which requests of which side go wrong, and how, on the real socket.

A fault strikes either at the gateway, around the side's handler, or within it, where the side's own
idempotency store sees it. Kinds that say `commit` run the request to its end first, whether or not the client
still waits.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from billingd.sandbox import breakage
from billingd.sandbox.clock import SandboxClock

SIDES: Final = frozenset({"amplify", "recurly"})
KINDS: Final[Mapping[str, str]] = {
    "refuse": "the connection is reset before anything is done",
    "reset": "the connection is reset before anything is done",
    "outage": "every request: reset, or with args.status answered 503",
    "lost": "commit, then the connection is closed without an answer",
    "fin": "commit and answer, then the kept-alive connection is closed without a word",
    "cut": "commit, then an answer that ends before its Content-Length",
    "garbage": "commit, then something that is not HTTP",
    "not_json": "commit, then the right status with a body that is not JSON",
    "429": "rate limited; nothing done",
    "409": "an identical request is in flight; nothing done",
    "422": "a JSON error: another change is in progress; nothing done",
    "500": "a JSON error; nothing done",
    "500_committed": "commit, then a JSON error",
    "html_502": "a gateway's HTML page without a request id; nothing done",
    "html_502_committed": "commit, then a gateway's HTML page",
    "slow": "sleeps args.seconds, then commits and answers",
    "late": "no answer; committed once the sandbox's clock is args.seconds further",
    "stored_500": "a JSON error, kept under the Idempotency-Key; nothing done (recurly writes)",
    "key_expired": "commit, no answer, and the Idempotency-Key is forgotten at once",
    "list_lag": "reads do not show what is younger than args.seconds",
    "ignore_idempotency_key": "the Idempotency-Key is not looked at",
}
MODIFIERS: Final = frozenset({"list_lag", "ignore_idempotency_key"})
WITHIN: Final = frozenset({"slow", "late", "500", "500_committed", "stored_500"})
SLOW_SECONDS: Final = 5.0
LATE_SECONDS: Final = 30.0
_DELAYS: Final[Mapping[str, float]] = {"slow": SLOW_SECONDS, "late": LATE_SECONDS}

_LAG: Final = "sandbox.list_lag"
_NO_IDEMPOTENCY: Final = "sandbox.ignore_idempotency_key"
_FORGET: Final = "sandbox.forget_idempotency_key"
_WITHIN: Final = "sandbox.within"

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests (after the first `skip` that match) go wrong how often (`times` None: until cleared).

    In `path`, `*` stands for one segment or a part of it, `**` for anything; a lone `*` means every path.
    """

    side: str
    method: str
    path: str
    kind: str
    times: int | None = 1
    skip: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side is one of {sorted(SIDES)}, not {self.side!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {sorted(KINDS)}, not {self.kind!r}")

    def matches(self, side: str, method: str, path: str) -> bool:
        """Whether a request is one this rule is about."""
        return (
            side == self.side
            and self.method.upper() in ("*", method)
            and (self.path == "*" or _pattern(self.path).fullmatch(path) is not None)
        )


@dataclass(slots=True)
class Armed:
    """A rule with what it has seen and done so far."""

    rule: Rule
    id: int
    seen: int = 0
    fired: int = 0

    def fires(self, side: str, method: str, path: str) -> bool:
        """Counts the request, and says whether it is to go wrong."""
        rule = self.rule
        if rule.times is not None and self.fired >= rule.times:
            return False
        if not rule.matches(side, method, path):
            return False
        self.seen += 1
        if self.seen <= rule.skip:
            return False
        self.fired += 1
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Late:
    """A request whose client has been left without an answer, and which is still to be carried out."""

    at: datetime
    task: "asyncio.Task[Any]"
    go: asyncio.Event = field(default_factory=asyncio.Event)


class Faults:
    """The rules in force. `counts` says how often each kind has struck since the start."""

    def __init__(self, clock: SandboxClock | None = None, *, sleep: Sleep = asyncio.sleep) -> None:
        self._clock = clock or SandboxClock()
        self.counts: Counter[str] = Counter()
        self._armed: list[Armed] = []
        self._ids = 0
        self._sleep = sleep
        self._tasks: set[asyncio.Task[web.StreamResponse]] = set()
        self._turn = asyncio.Lock()
        self.late: list[Late] = []
        """Requests that wait for the clock to reach their time."""

    def add(self, rule: Rule) -> int:
        """Arms a rule; the number is for `remove`."""
        self._ids += 1
        self._armed.append(Armed(rule, self._ids))
        return self._ids

    def remove(self, id_: int) -> None:
        """Disarms one rule."""
        self._armed = [armed for armed in self._armed if armed.id != id_]

    def clear(self, side: str | None = None) -> None:
        """Disarms all rules, or those of one side; the counts stay."""
        self._armed = [armed for armed in self._armed if side not in (None, armed.rule.side)]

    def describe(self) -> list[dict[str, Any]]:
        """The rules in force, JSON-able."""
        return [
            {"id": armed.id, **asdict(armed.rule), "seen": armed.seen, "fired": armed.fired}
            for armed in self._armed
        ]

    def middleware(
        self, side_of: Callable[[web.Request], str | None], *, within: Collection[str] = ("recurly",)
    ) -> Middleware:
        """An aiohttp middleware; `side_of` None: never faulty. The sides of `within` call `carried_out`."""

        @web.middleware
        async def strike(request: web.Request, handler: Handler) -> web.StreamResponse:
            await self.carry_out_due()
            side = side_of(request)
            rule = self._struck(side, request) if side else None
            if rule is None or side is None:
                return await handler(request)
            if rule.kind not in WITHIN:
                return await self._at_gateway(rule, request, handler)
            faulty = handler if side in within else self._around(side, handler)
            if rule.kind == "late":
                return await self._held_back(rule, request, faulty)
            request[_WITHIN] = (rule, self._sleep)
            return await self._finished(request, faulty)

        return strike

    async def carry_out_due(self) -> int:
        """Carries out the late requests whose time has come, earliest first; every request asks for it too.

        What they do bears the time of this call, not the one that they waited for.
        """
        async with self._turn:
            now = self._clock.now()
            due = sorted((late for late in self.late if late.at <= now), key=lambda late: late.at)
            for late in due:
                self.late.remove(late)
                late.go.set()
                await asyncio.wait([late.task])
            return len(due)

    async def close(self) -> None:
        """Forgets the late requests that still wait."""
        waiting = [late.task for late in self.late]
        self.late.clear()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _struck(self, side: str, request: web.Request) -> Rule | None:
        """Notes modifiers on the request; the first other rule that fires is the one."""
        struck: Rule | None = None
        for armed in self._armed:
            modifier = armed.rule.kind in MODIFIERS
            if (modifier or struck is None) and armed.fires(side, request.method, request.path):
                self.counts[armed.rule.kind] += 1
                if modifier:
                    _modify(request, armed.rule)
                else:
                    struck = armed.rule
        return struck

    async def _at_gateway(self, rule: Rule, request: web.Request, handler: Handler) -> web.StreamResponse:
        blow = breakage.Blow(request, rule.side, rule.args, self._clock.now())
        if rule.kind in breakage.BEFORE:
            return breakage.BEFORE[rule.kind](blow)
        request[_FORGET] = rule.kind == "key_expired"
        return breakage.AFTER[rule.kind](blow, await self._finished(request, handler))

    def _around(self, side: str, handler: Handler) -> Handler:
        """For a side that has no idempotency store of its own."""

        async def broken() -> web.StreamResponse:
            return breakage.refusal(side, 500, "internal_server_error", "Internal Server Error")

        async def faulty(request: web.Request) -> web.StreamResponse:
            return await carried_out(request, lambda: handler(request), broken)

        return faulty

    async def _held_back(self, rule: Rule, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Hangs up on the client once its request waits; what never came to wait is answered as it was."""
        held = asyncio.get_running_loop().create_future()

        async def wait(seconds: float) -> None:
            task = asyncio.current_task()
            assert task is not None
            late = Late(self._clock.now() + timedelta(seconds=seconds), task)
            self.late.append(late)
            held.set_result(None)
            await late.go.wait()

        request[_WITHIN] = (rule, wait)
        task = await self._started(request, handler)
        await asyncio.wait({task, held}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return breakage.hung_up(breakage.Blow(request, rule.side, rule.args, self._clock.now()))

    async def _finished(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Runs the handler to its end, even if this request is cancelled meanwhile."""
        return await asyncio.shield(await self._started(request, handler))

    async def _started(self, request: web.Request, handler: Handler) -> "asyncio.Task[web.StreamResponse]":
        await request.read()
        task: asyncio.Task[web.StreamResponse] = asyncio.ensure_future(_awaited(handler, request))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[web.StreamResponse]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


async def carried_out(
    request: web.Request, perform: Callable[[], Awaitable[T]], broken: Callable[[], Awaitable[T]]
) -> T:
    """What a handler does instead of `perform()` alone, so that delays and `500`s strike within it."""
    if _WITHIN not in request:
        return await perform()
    rule, wait = request[_WITHIN]
    if rule.kind in _DELAYS:
        await wait(float(rule.args.get("seconds", _DELAYS[rule.kind])))
        return await perform()
    if rule.kind == "500_committed":
        await perform()
    return await broken()


def lag_seconds(request: web.Request) -> float:
    """How old a record must be for this request to see it."""
    return float(request.get(_LAG, 0.0))


def ignores_idempotency_key(request: web.Request) -> bool:
    """Whether this request's Idempotency-Key is to be overlooked."""
    return bool(request.get(_NO_IDEMPOTENCY, False))


def forgets_idempotency_key(request: web.Request) -> bool:
    """Whether this request's Idempotency-Key is to be forgotten as soon as it has been answered."""
    return bool(request.get(_FORGET, False))


async def _awaited(handler: Handler, request: web.Request) -> web.StreamResponse:
    return await handler(request)


def _modify(request: web.Request, rule: Rule) -> None:
    if rule.kind == "list_lag":
        request[_LAG] = float(rule.args.get("seconds", SLOW_SECONDS))
    else:
        request[_NO_IDEMPOTENCY] = True


def _pattern(path: str) -> re.Pattern[str]:
    parts = (re.escape(part).replace(r"\*", "[^/]*") for part in path.split("**"))
    return re.compile(".*".join(parts))
