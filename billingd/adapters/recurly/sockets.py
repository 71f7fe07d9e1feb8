"""Connections that cannot poison a later call, and that tell what one call really did.

The SDK keeps one `http.client` connection for ever. After a timeout, or a POST on a socket the server has
closed, such a connection only raises `CannotSendRequest`; so here each write gets a fresh socket, and so
does whatever follows an idle gap or an error.
"""

import http.client
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final

IDLE_SECONDS_MAX: Final = 5.0

KEPT_HEADERS: Final = (
    "content-type",
    "date",
    "idempotency-prior",
    "retry-after",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-request-id",
)
# The SDK turns these into numbers and dates after a write has taken effect, and may raise (an absurd value;
# on 3.12+ a DeprecationWarning made an error). We read them ourselves.
HIDDEN_HEADERS: Final = (
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "recurly-total-records",
)


class Abandoned(Exception):
    """The task that waited gave up before the request left, so it may not leave any more."""


class Flight:
    """One request under way, as the thread that makes it and the task that waits for it both see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._left = False
        self._abandoned = False

    @property
    def left(self) -> bool:
        """Whether a byte of the request may have reached the far side."""
        return self._left

    @property
    def abandoned(self) -> bool:
        """Whether the waiting task gave this flight up."""
        return self._abandoned

    def board(self, sock: socket.socket | None) -> None:
        """Name the socket in use, for `abandon` to wake whoever reads from it."""
        self._socket = sock

    def leave(self) -> None:
        """Called right before the first byte; after `abandon` no byte may follow."""
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self._left = True

    def abandon(self) -> bool:
        """Forbid sending, wake a thread that waits for the answer; say whether the request had left."""
        with self._lock:
            self._abandoned = True
        if (sock := self._socket) is not None:
            with suppress(OSError):  # closed in the meantime
                # not SSLSocket.shutdown, which takes the TLS object away from under the reading thread
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        return self._left


class GuardedConnection(http.client.HTTPSConnection):
    """Fresh socket for each write, after an idle gap and after any error; keeps what it saw as evidence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._used_at = float("-inf")
        self._response: http.client.HTTPResponse | None = None
        self.begin(Flight())

    def begin(self, flight: Flight) -> None:
        """Forget the previous call's evidence."""
        self.flight = flight
        self.status: int | None = None
        self.kept: dict[str, str] = {}
        self.reused = False

    def connect(self) -> None:
        super().connect()
        self.flight.board(self.sock)

    def send(self, data: Any) -> None:
        if self.sock is None:  # TCP and TLS first: what fails in there was never sent
            self.connect()
        self.flight.leave()
        super().send(data)

    def request(self, method: str, *args: Any, **kwargs: Any) -> None:
        if method not in ("GET", "HEAD") or time.monotonic() - self._used_at > IDLE_SECONDS_MAX:
            self.close()
        self.reused = self.sock is not None
        self.flight.board(self.sock)
        try:
            super().request(method, *args, **kwargs)
        except BaseException:  # whatever it was, this socket may hold half a request
            self.close()
            raise

    def getresponse(self) -> http.client.HTTPResponse:
        try:
            response = super().getresponse()
        except BaseException:  # whatever it was, half an answer may be left on this socket
            self.close()
            raise
        self._response = response
        self._used_at = time.monotonic()
        self.status = response.status
        for name in KEPT_HEADERS:
            if (value := response.headers.get(name)) is not None:
                self.kept[name] = value
        for name in HIDDEN_HEADERS:
            del response.headers[name]
        if "x-request-id" not in self.kept:  # the SDK cannot build an error's text without one (TypeError)
            response.headers["X-Request-Id"] = "-"
        return response

    def close(self) -> None:
        super().close()
        # http.client keeps the head of a request that it could not finish, and would send it with the next.
        self._buffer: list[bytes] = []
        # After `Connection: close` http.client no longer knows the response that still holds the socket.
        if self._response is not None:
            self._response.close()
            self._response = None


class PlainConnection(GuardedConnection):
    """The same without TLS: for a sandbox on loopback only."""

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.flight.board(self.sock)
