"""What the demo says to the sandbox and to the daemon, over HTTP like anybody else."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp

from billingd.demo.failure import DemoFailed, InVain
from billingd.demo.processes import Stage

Json = dict[str, Any]
T = TypeVar("T")

ANSWER_SECONDS: Final = 30.0
WAIT_SECONDS: Final = 90.0
"""How long anything may take on a machine that is busy with other things too."""
STEP_SECONDS: Final = 0.1
RECURLY_ACCEPT: Final = "application/vnd.recurly.v2021-02-25"


class Talk:
    """Requests to the sandbox's control interface, its Recurly, and the daemon's admin listener."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        # A connection each: one kept alive may be closed just when traffic is sent, and did that arrive?
        connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def control(self, method: str, path: str, body: Json | None = None) -> Json:
        """One operation of the control interface; what it refuses ends the demo."""
        try:
            status, answer = await self._ask(method, f"{self._stage.sandbox_url}/control/{path}", json=body)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._stage.check()
            raise DemoFailed(f"the sandbox did not answer {method} /control/{path}: {error!r}") from None
        if status != 200:
            raise DemoFailed(f"the sandbox refused {method} /control/{path}: {answer['error']['message']}")
        return answer

    async def admin(self, path: str) -> Json | None:
        """What the daemon says, None while it says nothing."""
        try:
            status, answer = await self._ask("GET", f"{self._stage.admin_url}{path}")
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        return answer if status == 200 else None

    async def act(self, path: str, body: Json) -> Json:
        """What an operator does, through the admin listener; what the daemon refuses ends the demo."""
        url, headers = f"{self._stage.admin_url}{path}", {"X-Billingd": "1"}
        try:
            status, answer = await self._ask("POST", url, json=body, headers=headers)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise DemoFailed(f"the daemon did not answer POST {path}: {error!r}") from None
        if status != 200:
            raise DemoFailed(f"the daemon refused POST {path}: {answer['error']['message']}")
        return answer

    async def subscriptions(self) -> dict[str, Json]:
        """What the daemon knows of each linked subscription, by its name."""
        found = await self.until("the daemon's subscriptions", lambda: self.admin("/subscriptions"))
        return {each["name"]: each for each in found["subscriptions"]}

    async def held(self) -> list[Json]:
        """What `billingd held list` shows."""
        return list((await self.until("what the daemon holds", lambda: self.admin("/held")))["held"])

    async def recurly_lines(self, uuid: str) -> list[Json]:
        """The usage lines of a subscription's invoices as Recurly lists them, the oldest invoice first."""
        found = await self.until(
            "a subscription's invoice lines",
            lambda: self._recurly(f"/subscriptions/uuid-{uuid}/line_items?limit=200"),
        )
        if found["has_more"]:
            raise DemoFailed("a subscription has more invoice lines than the demo reads")
        return sorted(
            (line for line in found["data"] if line["add_on_code"] is not None),
            key=lambda line: int(line["invoice_number"]),
        )

    async def recurly_plans(self) -> dict[str, str]:
        """Plans by their code, as Recurly lists them; empty while it does not answer."""
        answer = await self._recurly("/plans?limit=200")
        return {} if answer is None else {plan["code"]: plan["name"] for plan in answer["data"]}

    async def deliver(self, body: bytes, headers: dict[str, str]) -> Json:
        """A webhook to the daemon; its answer."""
        try:
            status, answer = await self._ask("POST", self._stage.webhook_url, data=body, headers=headers)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise DemoFailed(f"the daemon did not answer a webhook: {error!r}") from None
        if status != 202:
            raise DemoFailed(f"the daemon answered a webhook with {status}")
        return answer

    async def until(
        self,
        what: str,
        probe: Callable[[], Awaitable[T | None]],
        *,
        seconds: float = WAIT_SECONDS,
        every: float = STEP_SECONDS,
    ) -> T:
        """The first answer of `probe` that is not None; InVain names what was waited for."""
        deadline = time.monotonic() + seconds
        while True:
            found = await probe()
            if found is not None:
                return found
            self._stage.check()
            if time.monotonic() > deadline:
                raise InVain(f"waited {seconds:g} s in vain for this: {what}")
            await asyncio.sleep(every)

    async def _recurly(self, path: str) -> Json | None:
        """What Recurly's own interface says, None while it says nothing."""
        headers = {"Accept": RECURLY_ACCEPT}
        auth = aiohttp.BasicAuth(self._stage.api_key)
        try:
            status, answer = await self._ask(
                "GET", f"{self._stage.sandbox_url}{path}", headers=headers, auth=auth
            )
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        return answer if status == 200 else None

    async def _ask(self, method: str, url: str, **request: Any) -> tuple[int, Json]:
        assert self._session is not None
        async with self._session.request(method, url, **request) as answer:
            return answer.status, await answer.json(content_type=None)


def instant(text: str) -> datetime:
    """An RFC 3339 time."""
    return datetime.fromisoformat(text)
