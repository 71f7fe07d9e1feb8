"""The way between billingd and the far sides, in memory: latency, faults and deaths, but no sockets."""

import asyncio
import hashlib
import http.client
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from email.utils import format_datetime
from random import Random
from typing import Any, Final

import aiohttp
from aiohttp import web
from aiohttp.http import HttpVersion11, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy
from sim_loop import Crash, spawn
from sqlalchemy.util import await_only, greenlet_spawn
from yarl import URL

from billingd.adapters.recurly.sockets import Flight, GuardedConnection
from billingd.sandbox.clock import SandboxClock

CONNECTION_SECONDS: Final = 10.0


class FarTransport:
    """The server's end of a connection: what it writes by itself, and whether it hung up."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.closed = False
        self.aborted = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes) -> None:
        self.raw += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class _Protocol:
    ssl_context = None
    peername = ("127.0.0.1", 1)

    def __init__(self, transport: FarTransport) -> None:
        self.transport = transport


class Exchange:
    """What came back for one request: bytes, and how the connection was afterwards."""

    def __init__(self, raw: bytes, *, reset: bool, closed: bool) -> None:
        self.raw = raw
        self.reset = reset
        self.closed = closed


class Wire:
    """Carries requests of one life of the daemon to the sandbox's application and answers back."""

    def __init__(
        self,
        app: web.Application,
        far: SandboxClock,
        rng: Random,
        step: Callable[[str], Awaitable[None]],
        note: Callable[..., None],
    ) -> None:
        self._app = app
        self._far = far
        self._rng = rng
        self.step = step
        self._note = note
        self.dead = False
        self.requests = 0

    def alive(self) -> None:
        """Whatever a dead process sends does not leave."""
        if self.dead:
            raise Crash("the wire")

    async def exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Exchange:
        """One request to its end at the far side, whatever becomes of whoever asked."""
        self.alive()
        await self.step("before send")
        self.alive()
        self.requests += 1
        far = spawn(self._served(method, target, headers, body), name="far")
        await self.step("sent")  # whoever dies here has sent it
        self.alive()
        exchange: Exchange = await asyncio.shield(far)
        await self.step("answered")
        self.alive()
        return exchange

    async def _served(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Exchange:
        await asyncio.sleep(self._rng.uniform(0.005, 0.2))
        transport = FarTransport()
        request = self._request(method, target, headers, body, transport)
        try:
            response = await self._app._handle(request)
        except web.HTTPException as error:
            response = error
        raw = bytes(transport.raw) if transport.closed else _bytes(response, self._far.now())
        status = raw[9:12].decode("latin-1") if raw.startswith(b"HTTP/1.1 ") else f"{len(raw)} bytes"
        shown = "reset" if transport.aborted else status + (" closed" if transport.closed else "")
        digest = hashlib.sha256(body).hexdigest()[:8] if body else "-"
        self._note("http", method, target, digest, shown)
        await asyncio.sleep(self._rng.uniform(0.005, 0.1))
        return Exchange(raw, reset=transport.aborted, closed=transport.closed)

    def _request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        transport: FarTransport,
    ) -> web.Request:
        many: CIMultiDict[str] = CIMultiDict({**headers, "Host": "127.0.0.1:8010"})
        raw_headers = tuple((name.encode(), value.encode("latin-1")) for name, value in many.items())
        message = RawRequestMessage(
            method,
            target,
            HttpVersion11,
            CIMultiDictProxy(many),
            raw_headers,
            False,
            None,
            False,
            False,
            URL(target, encoded=True),
        )
        task = asyncio.current_task()
        protocol: Any = _Protocol(transport)
        nothing: Any = None
        request = web.Request(
            message,
            nothing,
            protocol,
            nothing,
            task,  # type: ignore[arg-type]
            asyncio.get_running_loop(),
            client_max_size=1 << 26,
        )
        request._read_bytes = body
        return request


def _bytes(response: web.StreamResponse, now: datetime) -> bytes:
    body = response.body if isinstance(response, web.Response) else b""
    content = body if isinstance(body, bytes) else b""
    lines = [f"HTTP/1.1 {response.status} {response.reason}", f"Date: {format_datetime(now, usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items() if name != "Content-Length"]
    if response.status != 204:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


# Recurly's side: the SDK on http.client, on a socket of ours.


class SimSocket(socket.socket):
    """Looks like a connected socket; has no file descriptor at all."""

    def __init__(self, wire: Wire, timeout: float) -> None:
        # not super().__init__(): that would open a descriptor
        self._wire = wire
        self._seconds = timeout
        self._sent = bytearray()
        self._gone = False
        self._woken: asyncio.Future[None] | None = None

    def sendall(self, data: Any, flags: int = 0) -> None:
        self._sent += data

    def settimeout(self, value: float | None) -> None:
        return None

    def close(self) -> None:
        return None

    def wake(self) -> None:
        """What shutting a socket down does to whoever reads from it."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def makefile(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        request, self._sent = bytes(self._sent), bytearray()
        if self._gone:
            return io.BytesIO(b"")  # closed while it was idle: the end, and nothing before it
        exchange: Exchange = await_only(self._exchanged(request))
        self._gone = exchange.closed
        if exchange.reset:
            raise ConnectionResetError(104, "Connection reset by peer")
        return io.BytesIO(exchange.raw)

    async def _exchanged(self, request: bytes) -> Exchange:
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        self._woken = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(self._wire.exchange(method, target, headers, body))
        try:
            both: list[asyncio.Future[Any]] = [answer, self._woken]
            await asyncio.wait(both, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if self._woken.done():
                return Exchange(b"", reset=False, closed=True)
            raise TimeoutError("The read operation timed out")
        finally:
            answer.cancel()
            self._woken.cancel()


class SimConnection(GuardedConnection):
    """Connects to the wire of the current life."""

    wire: Wire | None = None

    def connect(self) -> None:
        assert self.wire is not None
        self.wire.alive()
        self.sock = SimSocket(self.wire, float(self.timeout or CONNECTION_SECONDS))
        self.flight.board(self.sock)


class SimFlight(Flight):
    """Wakes whoever waits, as a shutdown of a real socket does."""

    def abandon(self) -> bool:
        left = super().abandon()
        if isinstance(self._socket, SimSocket):
            self._socket.wake()
        return left


class _Job:
    """A concurrent future as far as `Workers` looks at it."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Any], None]] = []
        self._task: asyncio.Task[Any] | None = None

    def begin(self, task: asyncio.Task[Any], done: Callable[[], None]) -> None:
        self._task = task

        def finished(_: Any) -> None:
            done()
            for callback in self._callbacks:
                callback(self)

        task.add_done_callback(finished)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._task is not None and self._task.cancelled()

    def exception(self) -> BaseException | None:
        return self._task.exception() if self._task is not None else None

    def result(self) -> Any:
        assert self._task is not None
        return self._task.result()


class SimPool:
    """Takes a thread pool's place: each job is a task that the SDK's waiting suspends."""

    def __init__(self, threads: int, thread_name_prefix: str = "") -> None:
        self._names = [f"{thread_name_prefix}_{number}" for number in range(threads)]

    def submit(self, work: Callable[..., Any], /, *args: Any) -> _Job:
        name = self._names.pop()
        job = _Job()

        async def done_in_place() -> Any:
            THREAD.name = name  # until the first await; the work looks its client up before that
            return await greenlet_spawn(work, *args)

        job.begin(asyncio.ensure_future(done_in_place()), lambda: self._names.append(name))
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        return None


class _Thread:
    name = ""


THREAD: Final = _Thread()


class SimLocal:
    """threading.local, by the name of the place a job runs in."""

    def __init__(self) -> None:
        self.__dict__["of"] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.of[THREAD.name, name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.of[THREAD.name, name] = value


# Amplify's side: what the adapter needs of aiohttp's session.


class _Content:
    def __init__(self, body: bytes, *, cut: bool) -> None:
        self._body = body
        self._cut = cut

    async def iter_any(self) -> AsyncIterator[bytes]:
        if self._body:
            yield self._body
        if self._cut:
            raise aiohttp.ClientPayloadError("Response payload is not completed")


class _Answer:
    def __init__(self, status: int, headers: CIMultiDict[str], content: _Content) -> None:
        self.status = status
        self.headers = CIMultiDictProxy(headers)
        self.content = content


class _Asking:
    def __init__(self, ask: Callable[[], Awaitable[_Answer]]) -> None:
        self._ask = ask

    async def __aenter__(self) -> _Answer:
        return await self._ask()

    async def __aexit__(self, *error: object) -> None:
        return None


class SimSession:
    """aiohttp.ClientSession over the wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def request(
        self,
        method: str,
        url: URL,
        *,
        data: bytes | None,
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
        allow_redirects: bool,
    ) -> _Asking:
        async def ask() -> _Answer:
            async with asyncio.timeout(timeout.total):
                exchange = await self._wire.exchange(method, url.raw_path_qs, headers, data or b"")
            if exchange.reset:
                raise aiohttp.ClientOSError(104, "Connection reset by peer")
            return _parsed(method, exchange.raw)

        return _Asking(ask)


def _parsed(method: str, raw: bytes) -> _Answer:
    if not raw:
        raise aiohttp.ServerDisconnectedError
    stream: Any = _Readable(raw)
    response = http.client.HTTPResponse(stream, method=method)
    try:
        response.begin()
    except http.client.HTTPException as error:
        nothing: Any = None
        raise aiohttp.ClientResponseError(nothing, (), status=400, message=str(error)) from None
    cut = False
    try:
        body = response.read()
    except http.client.IncompleteRead as error:
        body, cut = error.partial, True
    return _Answer(response.status, CIMultiDict(response.getheaders()), _Content(body, cut=cut))


class _Readable:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)
