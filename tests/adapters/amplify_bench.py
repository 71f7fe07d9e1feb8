"""What the tests of the Amplify adapter share: a client with a clock of its own, and recorded answers."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from aioresponses import CallbackResult, aioresponses

from billingd.adapters.amplify import Amplify

CENTRAL = "http://central.test"
LOGIN = "http://login.test/auth"
PLATFORM = "http://platform.test"
TOKEN_URL = f"{LOGIN}/realms/Broker/protocol/openid-connect/token"
SECRET = "s3cret-never-shown"
NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SAMPLES = Path(__file__).parent / "samples" / "amplify"


def sample(name: str) -> bytes:
    """A recorded-style answer, made from the shapes in amplify.md."""
    return (SAMPLES / name).read_bytes()


class Bench:
    """An Amplify in front of scripted answers; `asked` lists what went out."""

    def __init__(self, amplify: Amplify, far: aioresponses) -> None:
        self.amplify = amplify
        self.far = far
        self.now = NOW
        self.seen: list[tuple[str, float]] = []
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def answer(
        self,
        method: str,
        url: str,
        body: bytes | str = b"",
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        exception: Exception | None = None,
        times: int = 1,
    ) -> None:
        """Scripts the next answers to a method and the start of a URL (`*`: any path or query behind it)."""

        def reply(url_: object, **sent: Any) -> CallbackResult:
            self.asked.append((method, str(url_), sent))
            return CallbackResult(method=method, status=status, body=body, headers=headers)

        pattern = re.compile("^" + re.escape(url).replace(r"\*", ".*") + "$")
        for _ in range(times):
            if exception is not None:
                self.far.add(pattern, method=method, exception=exception)
            else:
                self.far.add(pattern, method=method, callback=reply)

    def token(self, value: str = "token-1", *, seconds: int = 1800, times: int = 1) -> None:
        """Scripts a good answer of the login."""
        self.answer("POST", TOKEN_URL, f'{{"access_token": "{value}", "expires_in": {seconds}}}', times=times)

    def sent(self, method: str) -> list[dict[str, Any]]:
        """The keyword arguments of the requests with that method, the login's left out."""
        return [sent for way, url, sent in self.asked if way == method and url != TOKEN_URL]

    def paths(self) -> list[str]:
        """`METHOD path` of each request but the login's."""
        return [f"{method} {url.removeprefix(CENTRAL)}" for method, url, _ in self.asked if url != TOKEN_URL]


@asynccontextmanager
async def a_bench(api_version: Any = "v1") -> AsyncIterator[Bench]:
    """A bench without any answer scripted yet."""
    with aioresponses() as far:
        async with aiohttp.ClientSession() as session:
            bench: Bench
            amplify = Amplify(
                session,
                central_url=CENTRAL,
                login_url=LOGIN,
                platform_url=PLATFORM,
                api_version=api_version,
                organization_id="100000000000001",
                client_id="DOSA_1",
                client_secret=SECRET,
                timeout=timedelta(seconds=5),
                clock=lambda: bench.now,
                observe=lambda outcome, seconds: bench.seen.append((outcome, seconds)),
            )
            bench = Bench(amplify, far)
            yield bench
