"""A scripted Recurly on a real socket: each request meets the script's next action, then good answers."""

import asyncio
import json
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from billingd.adapters.recurly import Recurly
from billingd.domain.billing import NewUsage

API_KEY = "k3y-of-the-site-never-to-be-seen"
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
JSON = "application/json; charset=utf-8"
HTML = "text/html"

Action = Callable[["FarSide", "Request", asyncio.StreamWriter], Awaitable[bool]]


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FarSide:
    script: deque[Action] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    slams: int = 0
    port: int = 0
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.hang_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def asked(self) -> None:
        """Wait for the first request."""
        async with asyncio.timeout(5):
            await self._asked.wait()

    def hang_up(self) -> None:
        """Close every connection, as a server does with idle ones."""
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            if self.slams:
                self.slams -= 1
                reset(writer)
                return
            while (request := await self._read(reader)) is not None:
                self.requests.append(request)
                self._asked.set()
                action = self.script.popleft() if self.script else good
                if not await action(self, request, writer):
                    return
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Request(method, target, headers, body)


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def raw(data: bytes, *, keep: bool = False) -> Action:
    async def act(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(data)
        await writer.drain()
        return keep

    return act


def message(status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> bytes:
    lines = {"Content-Length": str(len(body)), "X-Request-Id": "req-1", "X-RateLimit-Reset": "99999999999999"}
    if body:
        lines["Content-Type"] = kind
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value != "none")
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body


def reply(status: int, body: Any = b"", kind: str = JSON, **headers: str) -> Action:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return raw(message(status, data, kind, named), keep=True)


def error(
    status: int, code: str, words: str = "Something is wrong", params: Any = (), **headers: str
) -> Action:
    body = {"error": {"type": code, "message": words, "params": list(params)}}
    return reply(status, body, **headers)


async def lose(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Read the request, then hang up without a word."""
    return False


async def reset_after(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
    reset(writer)
    return False


async def silent(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(60)
    return False


async def trickle(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Always a little more, always in time for a timeout per socket operation."""
    writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


def account(code: str) -> dict[str, Any]:
    return {"id": "a1", "object": "account", "code": code, "state": "active"}


def usage(
    amount: Any = 1, tag: str | None = "bd1:t", at: str = "2026-11-22T10:59:59Z", id_: str = "u1"
) -> Any:
    return {
        "id": id_,
        "object": "usage",
        "amount": amount,
        "merchant_tag": tag,
        "usage_timestamp": at,
        "billed_at": None,
        "unit_amount": 0.5,
    }


def listing(items: list[Any], following: str | None = None) -> dict[str, Any]:
    return {"object": "list", "has_more": following is not None, "next": following, "data": items}


async def good(far: FarSide, request: Request, writer: asyncio.StreamWriter) -> bool:
    """What a healthy Recurly would say."""
    path = request.target.partition("?")[0]
    if found := re.fullmatch(r"/accounts/code-([^/]+)", path):
        act = reply(200, account(found[1]))
    elif request.method == "POST" and path.endswith("/usage"):
        sent = request.json
        act = reply(
            201,
            usage(
                sent["amount"], sent["merchant_tag"], sent["usage_timestamp"], f"id-{sent['merchant_tag']}"
            ),
        )
    elif request.method == "DELETE" and path.startswith("/usage/"):
        act = reply(204)
    else:
        act = reply(200, listing([]))
    return await act(far, request, writer)


def new_usage(tag: str = "bd1:t", units: int = 1) -> NewUsage:
    at = datetime(2026, 11, 22, 10, 59, 59, tzinfo=UTC)
    return NewUsage("s" * 32, "amplify-quota-q", units, tag, at, NOW)


class FakeTime:
    """Monotonic time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@dataclass
class World:
    far: FarSide
    recurly: Recurly
    time: FakeTime
    observed: list[tuple[str, float]]


@asynccontextmanager
async def world(
    *,
    timeout: timedelta = timedelta(seconds=5),  # noqa: ASYNC109  (of one socket operation)
    threads: int = 2,
    requests_per_minute: int = 100_000,
) -> AsyncIterator[World]:
    far, time, observed = FarSide(), FakeTime(), list[tuple[str, float]]()
    await far.start()
    recurly = Recurly(
        api_key=API_KEY,
        base_url=f"http://127.0.0.1:{far.port}",
        region="us",
        timeout=timeout,
        requests_per_minute=requests_per_minute,
        threads=threads,
        observe=lambda outcome, seconds: observed.append((outcome, seconds)),
        clock=lambda: NOW,
        monotonic=time.monotonic,
        sleep=time.sleep,
    )
    try:
        yield World(far, recurly, time, observed)
    finally:
        await recurly.close(deadline=timedelta(seconds=1))
        await far.stop()
