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
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from billingd.domain.errors import Rejected

log = structlog.get_logger()

BACKLOG: Final = 4_096
ACCEPTED_AT_ONCE: Final = 64
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
REST_SECONDS: Final = 0.1
"""How long nothing is accepted when the system has no descriptor left."""

PIECE: Final = 4_096
"""What is parsed at once: small, for nothing is parsed behind a whole request until that is answered."""

UNPROVEN_BODY_BYTES_MAX: Final = 65_536
"""Of a body that must be read before its signature can be checked; Recurly's have a few hundred bytes."""

FRAMING: Final = 2
"""How many times its size a body may take on its way, for it may come in small chunks."""

NOT_HTTP: Final = "the request is not HTTP/1.1 as it should be"

TELL_SECONDS: Final = 60.0
"""How often at most the log says that there are too many connections."""


@dataclass(frozen=True)
class Limits:
    """What one connection may cost, and how many there may be."""

    connections: int = 512
    head_bytes: int = 32_768
    head_seconds: float = 10.0
    """From the connection, later from a request's first byte, to the end of its head; a TLS handshake has as
    long, before it."""
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

    __slots__ = (
        "_allowance",
        "_answered",
        "_deaf",
        "_head_whole",
        "_heard_at",
        "_limits",
        "_on_gone",
        "_payload",
        "_seen",
        "_spent",
        "_tail",
        "_timer",
        "proven",
        "waiting",
    )

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
        self._spent = 0
        """Bytes of the request that is being received, its head, its body and what frames that."""
        self._allowance = 0
        """How many it may have; of its head alone, the limits tell."""
        self._head_whole = False
        self._tail = b""
        self._payload: StreamReader = EMPTY_PAYLOAD
        """The body of the newest request."""
        self._answered = False
        """Whether the last answer of this connection has left."""
        self._deaf = False
        """Whether nothing more is parsed: what still comes is dropped, and the next answer is the last."""
        self._seen = False
        self._heard_at = asyncio.get_running_loop().time()
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self.proven = False
        """Whether a request on it has shown the secret."""
        self.waiting = True
        """Whether the next request's head is still to come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there; the head must follow in time."""
        super().connection_made(transport)
        self._heard_at = asyncio.get_running_loop().time()
        self._start_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)
        self._on_gone()

    def data_received(self, data: bytes) -> None:
        """Bytes came; those of a request are counted, and no more of them are parsed than it may have."""
        self._heard_at = asyncio.get_running_loop().time()
        self._seen = True
        if self.waiting and self._timer is None:
            self._start_timer()
        # Only once it is handled is it known who sends it: so a read is judged by those before it.
        if not self.waiting and self._spent > self._allowance:
            self._hear_no_more(Rejected("the request is too large", status=413, code="too_large"))
        for start in range(0, len(data), PIECE):
            if self._deaf or self.transport is None or self.transport.is_closing():
                return
            if self._payload.is_eof() and (self._messages or not self.waiting):
                self._deaf = True  # sent ahead of the answer to a whole request
                return
            self._parse(data[start : start + PIECE])

    def _parse(self, piece: bytes) -> None:
        known, before = len(self._messages), self._spent
        self._spent += len(piece)
        if not self._head_whole:
            end = (self._tail + piece).find(b"\r\n\r\n")
            head = self._spent if end < 0 else before + max(0, end + 4 - len(self._tail))
            self._tail = (self._tail + piece)[-3:]
            if head > self._limits.head_bytes:
                self._answer_rudely(431, "head_too_large", "the request's head is too large")
                return
        try:
            super().data_received(piece)
        except ValueError:  # an address such as http://[ gets through the parser's own net
            self._answer_rudely(400, "not_http", NOT_HTTP)
            return
        if len(self._messages) == known:
            return
        message, payload = self._messages[-1]
        if isinstance(message, RawRequestMessage):
            self._head_whole, self._payload = True, payload
            return
        # The parser failed. It would do so again at each piece, and queue an answer for each.
        if not self._payload.is_eof():  # within a body: whoever waits for that must know
            self._messages.pop()
        self._hear_no_more(web.RequestPayloadError(NOT_HTTP))

    def _hear_no_more(self, why: Exception) -> None:
        """Drop what still comes; whoever waits for more of a body is told why it does not come."""
        self._deaf = True
        if self._answered:
            if not self.proven:  # a friend hears the answer out, for as long as is lingered
                self.force_close()
        elif not self._payload.is_eof():
            self._payload.set_exception(why)

    def begin(self) -> None:
        """A head is whole, and the request is handled now, as a stranger's until it is proven."""
        self._stop_timer()
        self._head_whole, self.waiting = True, False
        self._allowance = self._limits.head_bytes + FRAMING * UNPROVEN_BODY_BYTES_MAX
        self._heard_at = asyncio.get_running_loop().time()

    def prove(self, body_bytes_max: int) -> None:
        """The request has shown the secret, and may have a body of so many bytes."""
        self.proven = True
        self._allowance = self._limits.head_bytes + FRAMING * body_bytes_max

    def end(self, *, whole: bool) -> bool:
        """A request's answer leaves now; whether another may follow. Not when its body is still to come."""
        self._heard_at = asyncio.get_running_loop().time()
        if not self.proven or not whole or (self._deaf and not self._messages):
            self._answered = True
            return False
        self._spent, self._head_whole, self._tail, self.waiting = 0, False, b"", True
        return True

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
        if self.transport is not None and not self.transport.is_closing():
            body = _document(code, message)
            head = (
                f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()

    def _start_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limits.head_seconds, self._too_slow)

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
        another = visitor is None or visitor.end(whole=request.content.is_eof())
        if self._closing or not another:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # said too, for the headers are made before this

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
