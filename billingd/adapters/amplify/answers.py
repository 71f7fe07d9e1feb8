"""Requests and answers as values, and what each kind of answer means. No I/O (amplify.md 2.2, 2.8, 7)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import aiohttp

from billingd.adapters.amplify.encoding import Json, decode, retry_after
from billingd.domain.errors import (
    BillingdError,
    Conflict,
    Misconfigured,
    NotDone,
    NotFound,
    Refused,
    Retryable,
    Unknown,
)

DETAIL_LENGTH_MAX: Final = 300


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `what` completes "Amplify refused …" for an operator."""

    method: str
    url: str
    what: str
    body: str | None = None
    content_type: str = "application/json"
    writes: bool = False
    """It changes something, so a lost answer leaves the outcome unknown."""
    handles: frozenset[int] = frozenset()
    """Statuses the caller judges itself; they are returned, not raised."""
    platform: bool = False
    """The Platform API: its true status is in the body (amplify.md 7)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """2xx."""
        return 200 <= self.status < 300


def true_status(reply: Reply) -> Reply:
    """The Platform API answers HTTP 400 with the real status in `code`; check both (amplify.md 7)."""
    answer = lenient(reply.body)
    if (
        not isinstance(answer, dict)
        or answer.get("success") is not False
        or not (reply.ok or reply.status == 400)
    ):
        return reply
    code = answer.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return replace(reply, status=code)
    return replace(reply, status=400) if reply.ok else reply


def lost(call: Call, error: BaseException) -> BillingdError:
    """What a failed exchange means: nothing was sent, or (for a write) nobody knows (style.md 2.11)."""
    # Only a failed connection says more than its name or number without quoting what was sent.
    connecting = isinstance(error, aiohttp.ClientConnectorError)
    name = type(error).__name__
    broken = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else name
    shown = str(error) if connecting else broken
    message = f"Amplify gave no answer to {call.what}: {shown}"
    if not call.writes:
        return Retryable(message)
    if connecting or isinstance(error, aiohttp.ConnectionTimeoutError):
        return NotDone(message)
    return Unknown(f"{message}; it may or may not have happened")


def error_for(call: Call, reply: Reply, now: datetime) -> BillingdError:
    """The error a bad answer stands for, typed by what the caller does next (amplify.md 2.2, 2.8)."""
    status = reply.status
    detail = detail_of(reply.body)
    said = f"{call.what}: {detail} (HTTP {status})" if detail else f"{call.what} (HTTP {status})"
    match status:
        case 401:
            return Misconfigured(
                f"Amplify takes no token for {call.what} (HTTP 401), not even a new one: check that the "
                "service account of amplify.client_id belongs to amplify.organization_id and amplify.region"
            )
        case 403:
            role = "Administrator (platform role)" if call.platform else "Engage Admin (Central role)"
            return Misconfigured(
                f"Amplify forbids {said}: give the service account of amplify.client_id the role {role}"
            )
        case 404 if not isinstance(lenient(reply.body), dict):
            # Amplify says "not found" in JSON; this is a gateway or a wrong address speaking.
            return Retryable(
                f"something before Amplify answered HTTP 404 to {call.what}: check amplify.central_url"
            )
        case 404:
            return NotFound(f"Amplify has no such thing: {said}")
        case 409 | 412 | 428:
            return Conflict(f"changed meanwhile at Amplify: {said}")
        case 408 | 429:
            wish = retry_after(reply.headers.get("Retry-After"), now)
            if status == 408 and call.writes:
                return Unknown(f"Amplify timed out on {said}", retry_after=wish)
            kind = NotDone if call.writes else Retryable
            return kind(f"Amplify asks to wait with {said}", retry_after=wish)
        case _ if status >= 500:
            # Also 503 for a write: envoy says 503 when the connection broke after the request was passed on.
            wish = retry_after(reply.headers.get("Retry-After"), now)
            return (Unknown if call.writes else Retryable)(f"Amplify failed on {said}", retry_after=wish)
        case _ if status < 400:
            return Misconfigured(
                f"Amplify redirects {said}: check amplify.central_url and amplify.platform_url"
            )
    return Refused(f"Amplify refused {said}", code=str(status))


def json_of(call: Call, reply: Reply) -> Json:
    """The JSON of a good answer; anything else was not Amplify speaking."""
    try:
        return decode(reply.body)
    except ValueError:
        message = f"the answer to {call.what} is not JSON (HTTP {reply.status}, {len(reply.body)} bytes)"
        raise (Unknown if call.writes else Retryable)(message) from None


def detail_of(body: bytes) -> str:
    """Amplify's own words about a refusal (amplify.md 2.8, and 7 for the platform), or nothing."""
    answer = lenient(body)
    if not isinstance(answer, dict):
        return ""
    errors = answer.get("errors")
    rows: list[Json] = [*errors, answer] if isinstance(errors, list) else [answer]
    words = [
        word
        for row in rows
        if isinstance(row, dict)
        if isinstance(
            word := row.get("detail") or row.get("title") or row.get("description") or row.get("message"), str
        )
    ]
    return " ".join("; ".join(words).split())[:DETAIL_LENGTH_MAX]


def outcome_of(status: int) -> str:
    """The word a metric counts an answer under."""
    words = {
        401: "unauthorized",
        403: "forbidden",
        404: "not_found",
        408: "failed",
        428: "conflict",
        429: "throttled",
    }
    return words.get(status) or ("ok" if 200 <= status < 300 else "failed" if status >= 500 else "refused")


def lenient(body: bytes) -> Json:
    try:
        return decode(body)
    except ValueError:
        return None
