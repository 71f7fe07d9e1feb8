"""What each kind of fault does on the socket: resets, truncated answers, gateway pages, refusals."""

import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from aiohttp import web

from billingd.sandbox.clock import http_date

RETRY_AFTER_SECONDS: Final = 1
RESET_SECONDS: Final = 60
LIMIT: Final = 2_000
MISSING_BYTES: Final = 64
GATEWAY_PAGE: Final = (
    "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
)


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault that strikes one request of a side."""

    request: web.Request
    side: str
    args: Mapping[str, Any]
    now: datetime


def refusal(side: str, status: int, type_: str, message: str) -> web.Response:
    """A JSON error in the words of a side."""
    if side == "recurly":
        body: dict[str, Any] = {"error": {"type": type_, "message": message, "params": []}}
        return web.json_response(body, status=status, headers=_recurly_headers())
    error = {"status": status, "title": message, "detail": message}
    return web.json_response({"errors": [error]}, status=status)


def _reset(blow: Blow) -> web.StreamResponse:
    """An RST instead of a FIN, so that the client sees a reset and not an end."""
    transport = blow.request.transport
    if transport is not None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()  # goes nowhere


def _outage(blow: Blow) -> web.StreamResponse:
    if "status" not in blow.args:
        return _reset(blow)
    status = int(blow.args["status"])
    return refusal(blow.side, status, "service_not_available", "Service Unavailable")


def _rate_limited(blow: Blow) -> web.StreamResponse:
    """Recurly names the time to wait for in `X-RateLimit-Reset` only; Amplify's side says Retry-After."""
    seconds = int(blow.args.get("seconds", RESET_SECONDS))
    response = refusal(blow.side, 429, "rate_limited", "Too many requests")
    if blow.side == "recurly":
        reset = blow.now + timedelta(seconds=seconds)
        response.headers["X-RateLimit-Remaining"] = "0"
        response.headers["X-RateLimit-Reset"] = str(int(reset.timestamp()))
    else:
        response.headers["Retry-After"] = str(seconds)
    return response


def _in_flight(blow: Blow) -> web.StreamResponse:
    """Recurly documents three headers of its 409 and no body (OAS:194-196): it has none here."""
    if blow.side != "recurly":
        return refusal(blow.side, 409, "conflict", "Conflict")
    seconds = blow.args.get("seconds", RETRY_AFTER_SECONDS)
    headers = {"Recurly-Should-Retry": "true", "Retry-After": str(seconds)}
    return web.Response(status=409, headers=headers | _recurly_headers())


def _in_progress(blow: Blow) -> web.StreamResponse:
    message = "A change for this subscription is already in progress."
    return refusal(blow.side, 422, "simultaneous_request", message)


def _gateway_page(_: Blow) -> web.StreamResponse:
    return web.Response(status=502, text=GATEWAY_PAGE, content_type="text/html")


def hung_up(blow: Blow) -> web.StreamResponse:
    """The connection is closed without an answer."""
    return _sent(blow, b"")


def _lost(blow: Blow, _: web.StreamResponse) -> web.StreamResponse:
    return hung_up(blow)


def _garbage(blow: Blow, _: web.StreamResponse) -> web.StreamResponse:
    return _sent(blow, b"\x16\x03\x01\x02 this is not HTTP\r\n\r\n")


def _cut(blow: Blow, answer: web.StreamResponse) -> web.StreamResponse:
    """Half of the body under a Content-Length that promises more than there ever was."""
    body = _body(answer)
    return _sent(blow, _head(blow, answer, len(body) + MISSING_BYTES) + body[: len(body) // 2])


def _fin(blow: Blow, answer: web.StreamResponse) -> web.StreamResponse:
    """A whole answer that announces nothing: the client keeps the connection, and it is gone."""
    body = _body(answer)
    return _sent(blow, _head(blow, answer, len(body)) + body)


def _not_json(_: Blow, answer: web.StreamResponse) -> web.StreamResponse:
    kept = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
    return web.Response(status=answer.status, body=GATEWAY_PAGE.encode(), headers=kept)


def _gateway_page_after(blow: Blow, _: web.StreamResponse) -> web.StreamResponse:
    return _gateway_page(blow)


def _sent(blow: Blow, raw: bytes) -> web.StreamResponse:
    """Writes bytes as they are and closes; the response that is returned then goes nowhere."""
    transport = blow.request.transport
    if transport is not None:
        transport.write(raw)
        transport.close()
    return web.Response()


def _head(blow: Blow, answer: web.StreamResponse, length: int) -> bytes:
    kept = (item for item in answer.headers.items() if item[0].lower() not in ("content-length", "date"))
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", f"Content-Length: {length}"]
    lines.append(f"Date: {http_date(blow.now)}")
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in kept), "", ""]).encode()


def _body(answer: web.StreamResponse) -> bytes:
    body = answer.body if isinstance(answer, web.Response) else None
    return body if isinstance(body, bytes) else b""


def _recurly_headers() -> dict[str, str]:
    return {
        "X-Request-Id": uuid4().hex,
        "X-RateLimit-Limit": str(LIMIT),
        "X-RateLimit-Remaining": str(LIMIT),
        "X-RateLimit-Reset": "0",
    }


BEFORE: Final[Mapping[str, Callable[[Blow], web.StreamResponse]]] = {
    "refuse": _reset,
    "reset": _reset,
    "outage": _outage,
    "429": _rate_limited,
    "409": _in_flight,
    "422": _in_progress,
    "html_502": _gateway_page,
}
"""Kinds that strike before anything is done."""

AFTER: Final[Mapping[str, Callable[[Blow, web.StreamResponse], web.StreamResponse]]] = {
    "lost": _lost,
    "key_expired": _lost,
    "fin": _fin,
    "cut": _cut,
    "garbage": _garbage,
    "not_json": _not_json,
    "html_502_committed": _gateway_page_after,
}
"""Kinds that strike once the request has been carried out."""
