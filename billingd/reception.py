"""Takes connections for the webhook listener, and bounds what each may cost: time, memory, descriptors.

Anybody may connect. Who has not shown the secret gets one request, a small head and little time, and is the
first to go when there are too many; who has shown it may keep the connection.
"""

import asyncio
import errno
import json
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiohttp import hdrs, web

log = structlog.get_logger()

BACKLOG: Final = 4_096
ACCEPTED_AT_ONCE: Final = 64
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
REST_SECONDS: Final = 0.1
"""How long nothing is accepted when the system has no descriptor left."""

PIECE: Final = 16_384
"""What is parsed at once: small, so that one read cannot become thousands of requests."""

NOT_HTTP: Final = "the request is not HTTP/1.1 as it should be"

TELL_SECONDS: Final = 60.0
"""How often at most the log says that there are too many connections."""


@dataclass(frozen=True)
class Limits:
    """What one connection may cost, and how many there may be."""

    connections: int = 512
    head_bytes: int = 32_768
    head_seconds: float = 10.0
    """From the connection to the end of the first request's head; a TLS handshake has as long, before it."""
    idle_seconds: float = 75.0
    """Between two requests of one who has shown the secret: longer than proxies keep theirs."""
    lingering_seconds: float = 2.0
    """How long the rest of a refused body is read, so that the answer arrives."""
    quiet_seconds: float = 2.0
    """At the end, a connection that was quiet for so long is not waited for."""
    close_seconds: float = 2.0
    """At the end, how long requests under way may take."""


class Visitor(web.RequestHandler):
    """One connection."""

    __slots__ = ("_head", "_heard_at", "_limits", "_on_gone", "_seen", "_tail", "_timer", "proven", "waiting")

    def __init__(self, manager: web.Server, limits: Limits, on_gone: Callable[[], None]) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.idle_seconds,
            access_log=None,  # type: ignore[arg-type]  # none at all
            lingering_time=limits.lingering_seconds,
            auto_decompress=False,  # a body is as large as it was sent
        )
        self._limits = limits
        self._head: int | None = 0
        """Bytes of the head that is being received; None once it is whole."""
        self._tail = b""
        self._seen = False
        self._heard_at = asyncio.get_running_loop().time()
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self.proven = False
        """Whether it has shown the secret."""
        self.waiting = True
        """Whether the next request's head is still to come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there; the head must follow in time."""
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        self._timer = loop.call_later(self._limits.head_seconds, self._too_slow)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)
        self._on_gone()

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they are a head's they are counted."""
        self._heard_at = asyncio.get_running_loop().time()
        self._seen = True
        for start in range(0, len(data), PIECE):
            if self.transport is None or self.transport.is_closing():
                return
            piece = data[start : start + PIECE]
            if self._head is not None and not self._counted(piece):
                self._answer_rudely(431, "head_too_large", "the request's head is too large")
                return
            try:
                super().data_received(piece)
            except ValueError:  # an address such as http://[ gets through the parser's own net
                self._answer_rudely(400, "not_http", NOT_HTTP)
                return

    def _counted(self, piece: bytes) -> bool:
        """Whether the head is still as small as it must be, or over."""
        assert self._head is not None
        joined = self._tail + piece
        end = joined.find(b"\r\n\r\n")
        self._head += len(piece) if end < 0 else max(0, end + 4 - len(self._tail))
        self._tail = joined[-3:]
        within = self._head <= self._limits.head_bytes
        if end >= 0:
            self._head = None
        return within

    def begin(self) -> None:
        """A head is whole, and the request is handled now."""
        self._stop_timer()
        self._head, self.waiting = None, False
        self._heard_at = asyncio.get_running_loop().time()

    def end(self) -> None:
        """Its answer leaves now."""
        self._head, self._tail, self.waiting = 0, b"", True
        self._heard_at = asyncio.get_running_loop().time()

    def quiet(self, seconds: float) -> bool:
        """Whether nothing is under way, and nothing was heard for so long."""
        return self.waiting and asyncio.get_running_loop().time() - self._heard_at >= seconds

    def heard_at(self) -> float:
        """When anything last happened, on the loop's clock."""
        return self._heard_at

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP, in the contract's words; our own faults are answered before they get here."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        if status == 500:
            log.error("webhook.failed", error=repr(exc))
            body = _document("failed", "a fault of billingd's own; nothing is acknowledged")
        else:
            body = _document("not_http", NOT_HTTP)
        response = web.Response(body=body, status=status, content_type="application/json")
        response.force_close()
        return response

    def _too_slow(self) -> None:
        if not self._seen:
            self.force_close()
        else:
            self._answer_rudely(408, "too_slow", "the request's head took too long")

    def _answer_rudely(self, status: int, code: str, message: str) -> None:
        """Answer what never became a request, and hang up."""
        if self.transport is not None:
            body = _document(code, message)
            head = (
                f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def visitor_of(request: web.Request) -> Visitor | None:
    """The connection a request came by; None where no Reception took it (in a test of the answers alone)."""
    protocol = request.protocol
    return protocol if isinstance(protocol, Visitor) else None


class _Guest:
    """A connection from the moment it is accepted, a TLS handshake included."""

    __slots__ = ("since", "socket", "task", "visitor")

    def __init__(self, accepted: socket.socket, since: float) -> None:
        self.socket = accepted
        self.since = since
        self.visitor: Visitor | None = None
        self.task: asyncio.Task[None] | None = None

    def rank(self) -> tuple[bool, bool, float]:
        """Who goes first when there is no room: strangers by age, then the quiet, then the quietest."""
        if self.visitor is None or not self.visitor.proven:
            return (False, False, self.since)
        return (True, not self.visitor.waiting, self.visitor.heard_at())

    def turn_out(self) -> None:
        """Hang up at once."""
        if self.visitor is not None and self.visitor.transport is not None:
            self.visitor.transport.abort()
        elif self.task is not None:
            self.task.cancel()


class Reception:
    """Accepts from listening sockets and hands each connection to the application."""

    def __init__(
        self, application: web.Application, limits: Limits | None = None, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._limits = limits or Limits()
        self._tls = tls
        application.on_response_prepare.append(self._prepare)
        self._runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=self._limits.close_seconds
        )
        self._sockets: list[tuple[socket.socket, bool]] = []
        self._guests: dict[_Guest, None] = {}
        self._emptied = asyncio.Event()
        self._closing = False
        self._told_at: float | None = None
        self._turned_out = 0
        self._resting: set[asyncio.TimerHandle] = set()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._guests)

    def use_tls(self, tls: ssl.SSLContext | None) -> None:
        """Encrypt the connections from now on like this, None for not at all."""
        self._tls = tls

    async def start(self, sockets: Sequence[socket.socket], *, inherited: bool = False) -> None:
        """Accept from these. An inherited one lives on without us: what waits in it is the next process's."""
        await self._runner.setup()
        for one in sockets:
            one.setblocking(False)
            self._sockets.append((one, inherited))
            self._watch(one)

    def _watch(self, listening: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Take what waits. Nothing is awaited here, so that no connection is lost when we stop."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    self._make_room()
                    self._rest(listening)
                    return
                log.warning("webhook.not_accepted", error=error.strerror)
                return
            self._welcome(accepted)

    def _rest(self, listening: socket.socket) -> None:
        """Look again a little later, for the socket stays readable."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())

        def again() -> None:
            self._resting.discard(handle)
            if not self._closing:
                self._watch(listening)

        handle = loop.call_later(REST_SECONDS, again)
        self._resting.add(handle)

    def _welcome(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        if len(self._guests) >= self._limits.connections:
            self._make_room()
        loop = asyncio.get_running_loop()
        guest = _Guest(accepted, loop.time())
        self._guests[guest] = None
        guest.task = loop.create_task(self._lead_in(guest))
        guest.task.add_done_callback(lambda _: self._led_in(guest))

    async def _lead_in(self, guest: _Guest) -> None:

        def factory() -> Visitor:
            assert self._runner.server is not None
            return Visitor(self._runner.server, self._limits, lambda: self._gone(guest))

        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {
                "ssl": self._tls,
                "ssl_handshake_timeout": self._limits.head_seconds,
                "ssl_shutdown_timeout": self._limits.close_seconds,
            }
        try:
            loop = asyncio.get_running_loop()
            _, guest.visitor = await loop.connect_accepted_socket(factory, guest.socket, **options)
        except OSError as error:  # a handshake that failed or took too long, a peer that left
            log.debug("webhook.no_connection", error=str(error))

    def _led_in(self, guest: _Guest) -> None:
        """It is in, and says itself when it goes; or it never came in."""
        if guest.visitor is None:
            guest.socket.close()
            self._gone(guest)

    def _gone(self, guest: _Guest) -> None:
        self._guests.pop(guest, None)
        if not self._guests:
            self._emptied.set()

    def _make_room(self) -> None:
        """Hang up on whoever is missed least."""
        if not self._guests:
            return
        guest = min(self._guests, key=_Guest.rank)
        guest.turn_out()
        self._gone(guest)
        self._turned_out += 1
        now = asyncio.get_running_loop().time()
        if self._told_at is None or now - self._told_at > TELL_SECONDS:
            log.warning("webhook.crowded", connections=len(self._guests), turned_out=self._turned_out)
            self._told_at, self._turned_out = now, 0

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """One more request only for who has shown the secret, and none once we are leaving."""
        response.headers[hdrs.SERVER] = "billingd"
        visitor = visitor_of(request)
        if self._closing or (visitor is not None and not visitor.proven):
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # said too, for the headers are made before this
        if visitor is not None:
            visitor.end()

    async def close(self) -> None:
        """Accept no more, answer what has come or is about to, and leave."""
        self._closing = True
        loop = asyncio.get_running_loop()
        for handle in self._resting:
            handle.cancel()
        sockets, self._sockets = self._sockets, []
        for listening, inherited in sockets:
            loop.remove_reader(listening.fileno())
            if not inherited:
                self._accept(listening)
                loop.remove_reader(listening.fileno())
            listening.close()
        for guest in list(self._guests):
            if guest.visitor is not None and guest.visitor.quiet(self._limits.quiet_seconds):
                guest.visitor.force_close()
        if self._guests:
            self._emptied.clear()
            try:
                async with asyncio.timeout(self._limits.quiet_seconds):
                    await self._emptied.wait()
            except TimeoutError:
                for guest in list(self._guests):
                    if guest.visitor is None:
                        guest.turn_out()
        await self._runner.cleanup()


def _document(code: str, message: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message}}).encode()
