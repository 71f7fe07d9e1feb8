"""A client of the running daemon's admin listener, over TCP or a unix socket."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.domain.errors import BillingdError

CONNECT_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 5.0
READING_SECONDS: Final = 3_600.0
"""A poll that catches up, or a backfill, reads weeks of windows from Amplify before it answers."""

WATCH_SECONDS: Final = 5.0
"""How often to see, while it reads, that it is alive."""

HANG_SECONDS: Final = 30.0
"""How long a daemon that reads may be silent: it was alive, and has much to do."""

FULL_ANSWERS: Final = frozenset({200, 422})
"""The second is of what was asked about: its faults are the answer."""

TELLS_ITS_FAR_SIDE: Final = frozenset({502, 503, 504})


class DaemonAway(Unreachable):
    """Nothing that is billingd answers at admin.listen."""


class DaemonHangs(DaemonAway):
    """Something listens at admin.listen, and does not answer in time."""


class Another(DaemonAway):
    """Something that is no billingd, or another release, answers at admin.listen."""


class Declined(BillingdError):
    """The daemon answered, and says no."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """The daemon that listens there: HOST:PORT or unix:/PATH."""

    listen: str

    async def get(self, path: str, *, key: str, query: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
        """Read a document, which has that key. Raises DaemonAway, Unreachable, Declined."""
        status, content = await self._ask("GET", path, query=query, body=None, seconds=None)
        return self._read(status, content, key)

    async def look(self, path: str, key: str, *, seconds: float | None = None) -> dict[str, Any]:
        """A document that has that key, whatever the status: health tells by it. Raises DaemonAway."""
        status, content = await self._ask("GET", path, query=(), body=None, seconds=seconds)
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if isinstance(document, dict) and key in document:
            return document
        raise Another(f"the daemon does not answer at {self.listen} (something else does: HTTP {status})")

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, key: str, seconds: float | None = None
    ) -> dict[str, Any]:
        """Change something; the answer has that key. Raises DaemonAway, Unreachable, Declined."""
        status, content = await self._ask("POST", path, query=(), body=body or {}, seconds=seconds)
        return self._read(status, content, key)

    async def let_read(self, path: str, body: Mapping[str, Any], *, key: str) -> dict[str, Any]:
        """As `post`, of what takes as long as its far sides; only a daemon that hangs is not waited for."""
        await self.look("/healthz", "stuck")
        if sys.stderr.isatty():
            output.note("the daemon reads; this may take minutes (Ctrl-C ends the wait, not its work)")
        answer = asyncio.create_task(self.post(path, body, key=key, seconds=READING_SECONDS))
        watch = asyncio.create_task(self._until_it_hangs())
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            return await (answer if answer.done() else watch)
        finally:
            answer.cancel()
            watch.cancel()
            await asyncio.gather(answer, watch, return_exceptions=True)

    async def _until_it_hangs(self) -> dict[str, Any]:
        """Ends with DaemonHangs only: a daemon that went away ends the waiting by itself."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self.look("/healthz", "stuck", seconds=HANG_SECONDS)
            except DaemonHangs:
                raise
            except DaemonAway:
                continue

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]],
        body: Mapping[str, Any] | None,
        seconds: float | None,
    ) -> tuple[int, bytes]:
        import aiohttp

        base, connector = self._door()
        patience = aiohttp.ClientTimeout(total=seconds or ANSWER_SECONDS, sock_connect=CONNECT_SECONDS)
        headers = {"X-Billingd": "1"}  # with a JSON body: what no web page can send
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=patience) as session,
                session.request(
                    method, base + path, params=query, json=body, headers=headers, allow_redirects=False
                ) as answer,
            ):
                return answer.status, await answer.read()
        except TimeoutError:
            raise DaemonHangs(f"the daemon does not answer at {self.listen} in time") from None
        except aiohttp.ClientResponseError:
            raise Another(
                f"the daemon does not answer at {self.listen} (something without HTTP does)"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            number = getattr(error, "errno", None)
            why = os.strerror(number) if number else str(error) or type(error).__name__
            raise DaemonAway(f"the daemon does not answer at {self.listen} ({why})") from None

    def _door(self) -> tuple[str, Any]:
        import aiohttp

        if self.listen.startswith("unix:"):
            return "http://localhost", aiohttp.UnixConnector(path=self.listen.removeprefix("unix:"))
        from billingd.settings import host_port

        host, port = host_port(self.listen)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}", aiohttp.TCPConnector()

    def _read(self, status: int, content: bytes, key: str) -> dict[str, Any]:
        """The document, or the daemon's own words for why there is none."""
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if isinstance(document, dict):
            if status in FULL_ANSWERS and key in document:
                return document
            fault = document.get("error")
            if isinstance(fault, dict) and "message" in fault:
                if status in TELLS_ITS_FAR_SIDE:
                    raise Unreachable(str(fault["message"]))
                raise Declined(str(fault["message"]))
        raise Another(f"the daemon does not answer at {self.listen} (something else does: HTTP {status})")
