"""Delivery of a site's notices to webhooks: signed, by the sandbox's clock, tried several times (4.10)."""

from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Final

import aiohttp

from billingd.sandbox.recurly.billing import run_due_bills
from billingd.sandbox.recurly.notices import Notice
from billingd.sandbox.recurly.state import State

TIMEOUT_SECONDS: Final = 5
RETRIES_MAX: Final = 10
KEPT: Final = 20_000


@dataclass(slots=True)
class Hook:
    """Where notices go; two secrets while one replaces the other."""

    url: str
    secrets: tuple[str, ...]
    events: frozenset[str] = frozenset()
    """Event types to deliver; none means all."""
    drop_every: int = 0
    """Loses every nth notice; 1 loses all."""
    duplicate: bool = False
    id: int = 0
    seen: int = 0


@dataclass(slots=True, eq=False)
class Waiting:
    """A notice on its way to one hook."""

    hook: Hook
    notice: Notice
    due: datetime
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One try, and the status code got back (0: lost or not reached)."""

    notice: str
    object_type: str
    event_type: str
    url: str
    status: int
    note: str


class Notifier:
    """Hands every notice of a site to the hooks that want it."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._ids = count(1)
        self._session: aiohttp.ClientSession | None = None
        self.hooks: dict[int, Hook] = {}
        self.waiting: list[Waiting] = []
        self.deliveries: deque[Delivery] = deque(maxlen=KEPT)
        state.listeners.append(self._offer)

    def add(self, hook: Hook) -> Hook:
        """Takes on a hook and numbers it; it gets what happens from now on."""
        hook.id = next(self._ids)
        self.hooks[hook.id] = hook
        return hook

    def clear(self) -> int:
        """Removes all hooks with what waits for them; answers how many."""
        removed = len(self.hooks)
        self.hooks.clear()
        self.waiting.clear()
        return removed

    def take_due(self) -> list[Waiting]:
        """Bills what is due, then gives out the notices whose time has come, and forgets them."""
        run_due_bills(self._state)
        now = self._state.clock.now()
        due = sorted((each for each in self.waiting if each.due <= now), key=lambda each: each.due)
        self.waiting = [each for each in self.waiting if each.due > now]
        return due

    async def run_due(self) -> int:
        """Delivers what is due by the sandbox's clock, in order; answers how many were taken in."""
        taken = 0
        for each in self.take_due():
            taken += await self._deliver(each)
        return taken

    async def close(self) -> None:
        """Ends the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _offer(self, notice: Notice) -> None:
        now = self._state.clock.now()
        for hook in self.hooks.values():
            if hook.events and notice.payload["event_type"] not in hook.events:
                continue
            hook.seen += 1
            if hook.drop_every and hook.seen % hook.drop_every == 0:
                self._note(Waiting(hook, notice, now), 0, "dropped")
                continue
            self.waiting += [Waiting(hook, notice, now) for _ in range(2 if hook.duplicate else 1)]

    async def _deliver(self, each: Waiting) -> bool:
        hook, notice = each.hook, each.notice
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS))
        headers = notice.headers(self._state.clock.now(), *hook.secrets)
        try:
            async with self._session.post(
                hook.url, data=notice.body, headers=headers, allow_redirects=False
            ) as answer:
                await answer.read()
                status, note = answer.status, ""
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            status, note = 0, f"not reached: {type(error).__name__}"
        self._note(each, status, note)
        if 200 <= status < 300:
            return True
        if each.tries < RETRIES_MAX and hook.id in self.hooks:
            pause = timedelta(seconds=10 + each.tries * 2 ** (each.tries + 5))
            due = self._state.clock.now() + pause
            self.waiting.append(Waiting(hook, notice, due, each.tries + 1))
        return False

    def _note(self, each: Waiting, status: int, note: str) -> None:
        payload = each.notice.payload
        self.deliveries.append(
            Delivery(
                each.notice.id, payload["object_type"], payload["event_type"], each.hook.url, status, note
            )
        )
