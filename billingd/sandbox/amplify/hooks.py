"""Delivery of events to webhooks: in the background, once, never again (amplify.md 4.3)."""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final
from urllib.parse import urlencode

import aiohttp

from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.tenant import Tenant

TIMEOUT_SECONDS: Final = 10
KEPT: Final = 20_000
AT_ONCE: Final = 20


@dataclass(slots=True)
class Hook:
    """Somebody who wants events, and what goes wrong on the way there."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    kinds: frozenset[str] = frozenset()
    """Kinds to deliver; none means all."""
    drop_every: int = 0
    """Loses every nth event; 1 loses all."""
    duplicate: bool = False
    reorder: bool = False
    """Swaps each two events that follow one another."""
    delay_seconds: float = 0
    id: int = 0
    seen: int = 0
    held: Event | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One try: what was sent where, and the status code got back (0: lost or not reached)."""

    event: str
    type: str
    kind: str
    name: str
    subresource: str | None
    url: str
    status: int
    note: str


class Webhooks:
    """Hands every event to the configured hooks and to the tenant's own ResourceHooks."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._ids = count(1)
        self.hooks: dict[int, Hook] = {}
        self.deliveries: deque[Delivery] = deque(maxlen=KEPT)
        tenant.journal.listeners.append(self._offer)

    def add(self, hook: Hook) -> Hook:
        """Takes on a hook and numbers it."""
        hook.id = next(self._ids)
        self.hooks[hook.id] = hook
        return hook

    async def idle(self) -> None:
        """Returns when every event so far has been delivered or lost."""
        for hook in self.hooks.values():
            if hook.held is not None:
                event, hook.held = hook.held, None
                self._send(hook, event)
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Drops what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _offer(self, event: Event) -> None:
        for hook in self.hooks.values():
            if hook.kinds and event.payload["kind"] not in hook.kinds:
                continue
            hook.seen += 1
            if hook.drop_every and hook.seen % hook.drop_every == 0:
                self._note(hook, event, 0, "dropped")
                continue
            if hook.reorder and hook.held is None:
                hook.held = event
                continue
            self._send(hook, event)
            if hook.held is not None:
                held, hook.held = hook.held, None
                self._send(hook, held)
        if self._tenant.settings.resource_hooks:
            for hook in self._stored(event):
                self._send(hook, event)

    def _send(self, hook: Hook, event: Event) -> None:
        for _ in range(2 if hook.duplicate else 1):
            task = asyncio.get_running_loop().create_task(self._post(hook, event))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _post(self, hook: Hook, event: Event) -> None:
        if hook.delay_seconds:
            await asyncio.sleep(hook.delay_seconds)
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout)
        try:
            async with (
                self._gate,
                self._session.post(
                    hook.url, json=event.envelope(), headers=hook.headers, allow_redirects=False
                ) as answer,
            ):
                await answer.read()
                self._note(hook, event, answer.status, "")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._note(hook, event, 0, f"not reached: {type(error).__name__}")

    def _note(self, hook: Hook, event: Event, status: int, note: str) -> None:
        kind, name = event.payload["kind"], event.payload["name"]
        self.deliveries.append(
            Delivery(event.id, event.type, kind, name, event.subresource, hook.url, status, note)
        )

    def _stored(self, event: Event) -> Iterator[Hook]:
        """The Webhooks of every ResourceHook the event fires, with the Secret's value as it is now."""
        resources = self._tenant.resources
        for rule in resources.of_kind("ResourceHook"):
            if not any(event.fires(trigger) for trigger in rule.body["spec"]["triggers"]):
                continue
            for name in rule.body["spec"]["webhooks"]:
                webhook = resources.find("Webhook", name, rule.scope)
                if webhook is not None and webhook.body["spec"].get("enabled", True):
                    yield self._as_hook(webhook)

    def _as_hook(self, webhook: Resource) -> Hook:
        spec: Json = webhook.body["spec"]
        headers, url = dict(spec.get("headers", {})), str(spec["url"])
        if auth := spec.get("auth"):
            secret = self._tenant.resources.find("Secret", auth["secret"]["name"], webhook.scope)
            data = {} if secret is None else secret.body["spec"]["data"]
            value = data.get(auth["secret"]["key"])
            location = auth.get("location", {"in": "header"})
            if value is not None and location["in"] == "header":
                headers[location.get("name", "Authorization")] = value
            elif value is not None:  # without its secret a webhook goes on, unauthenticated
                url += f"{'&' if '?' in url else '?'}{urlencode({location['name']: value})}"
        return Hook(url, headers)
