"""HTTP as Recurly speaks it: credentials, version, limits, idempotency, errors, headers on every answer."""

import binascii
import json
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, TypeVar
from uuid import uuid4

from aiohttp import web

from billingd.sandbox.faults import (
    carried_out,
    forgets_idempotency_key,
    ignores_idempotency_key,
    lag_seconds,
)
from billingd.sandbox.recurly.billing import run_due_bills
from billingd.sandbox.recurly.errors import RefusalError, not_found, unpermitted
from billingd.sandbox.recurly.idempotency import (
    IN_FLIGHT_RETRY_SECONDS,
    KEY_LENGTH_MAX,
    METHODS,
    Answer,
    IdempotencyStore,
)
from billingd.sandbox.recurly.model import Record
from billingd.sandbox.recurly.rate_limit import RateLimit
from billingd.sandbox.recurly.state import State

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/vnd.recurly."
VERSION: Final = "v2021-02-25"
KNOWN_VERSIONS: Final = (
    "v2016-03-01",
    "v2016-04-27",
    "v2016-07-27",
    "v2016-12-15",
    "v2017-01-12",
    "v2017-09-30",
    "v2018-01-24",
    "v2018-05-10",
    "v2018-06-06",
    "v2018-08-09",
    "v2019-10-10",
    VERSION,
)
"""OAS, "Unsupported Versions"."""

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Call:
    """A request as an endpoint sees it. `shown_until`: what was committed later is not seen by reads."""

    state: State
    method: str
    path: str
    names: Mapping[str, str]
    query: Mapping[str, str]
    raw: bytes
    content_type: str
    shown_until: datetime | None

    def body(self, *, optional: bool = False) -> dict[str, Any]:
        """The JSON object of the body, fractions as Decimal."""
        if not self.raw and optional:
            return {}
        if self.content_type != "application/json":
            raise RefusalError(400, "invalid_content_type", "The Content-Type must be application/json")
        try:
            body = json.loads(self.raw, parse_float=Decimal, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise RefusalError(400, "bad_request", "The request body is not valid JSON") from None
        if not isinstance(body, dict):
            raise RefusalError(400, "bad_request", "The request body must be a JSON object")
        return body

    def seen(self, record: R) -> R:
        """The record, or a 404 if a lagging read does not show it yet."""
        if self.shown_until is not None and record.committed_at > self.shown_until:
            raise not_found(type(record).__name__, "id", record.id)
        return record


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint answers; `total` is for HEAD."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Endpoint = Callable[[Call], Reply]


def reply(status: int, body: Mapping[str, Any]) -> Reply:
    """A JSON answer."""
    return Reply(status, json.dumps(body).encode())


class Wire:
    """Serves endpoints over one site."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._limit = RateLimit(state)
        self._kept = IdempotencyStore(state.clock)

    def serve(
        self, endpoint: Endpoint, query: frozenset[str] = frozenset(), *, lags: bool = False
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """An aiohttp handler for an endpoint that knows these query parameters.

        `lags`: what it shows lags behind by the site's `list_lag_seconds`.
        """

        async def handle(request: web.Request) -> web.Response:
            try:
                answer = await self._answer(request, endpoint, query, lags=lags)
            except RefusalError as refusal:
                answer = _refused(refusal)
            except web.HTTPRequestEntityTooLarge as error:
                answer = _refused(RefusalError(error.status, "bad_request", "The request body is too large"))
            return self._response(answer)

        return handle

    async def _answer(
        self, request: web.Request, endpoint: Endpoint, query: frozenset[str], *, lags: bool
    ) -> Reply:
        api_key = self._authenticated(request)
        _check_version(request.headers.get("Accept", ""))
        self._limit.check(request.method)
        raw = await request.read()

        async def perform() -> Reply:
            return self._perform(request, raw, endpoint, query, lags=lags)

        async def carry_out() -> Reply:
            return await carried_out(request, perform, _broken)

        key = request.headers.get("Idempotency-Key")
        if not key or request.method not in METHODS or ignores_idempotency_key(request):
            return await carry_out()
        if len(key) > KEY_LENGTH_MAX:
            raise RefusalError(400, "bad_request", "Idempotency-Key must be 255 characters or fewer")
        identity = (key, request.method, request.path, api_key)
        answer = await self._once(identity, carry_out)
        if forgets_idempotency_key(request):
            self._kept.forget(identity)
        return answer

    async def _once(
        self, identity: tuple[str, str, str, str], carry_out: Callable[[], Awaitable[Reply]]
    ) -> Reply:
        """Replays the answer of an identical request, or refuses while it is in flight."""
        earlier = self._kept.earlier(identity)
        if earlier is not None:
            return _replayed(earlier)
        if self._kept.in_flight(identity):
            # Only the headers are documented, so the body is empty: nothing for a client to lean on.
            retry = {"Recurly-Should-Retry": "true", "Retry-After": str(IN_FLIGHT_RETRY_SECONDS)}
            return Reply(409, headers=retry)
        self._kept.begin(identity)
        answer: Reply | None = None
        try:
            answer = await carry_out()
        finally:
            self._kept.end(identity, answer.status if answer else None, answer.body if answer else b"")
        return answer

    def _perform(
        self, request: web.Request, raw: bytes, endpoint: Endpoint, query: frozenset[str], *, lags: bool
    ) -> Reply:
        """The whole of a request's effect, without an await: no other request comes in between."""
        run_due_bills(self._state)
        lag = max(lag_seconds(request), self._state.settings.list_lag_seconds if lags else 0)
        try:
            strange = [name for name in request.query if name not in query]
            if strange:
                raise unpermitted(strange)
            return endpoint(
                Call(
                    state=self._state,
                    method=request.method,
                    path=request.path,
                    names=request.match_info,
                    query=dict(request.query),
                    raw=raw,
                    content_type=request.content_type,
                    shown_until=self._state.clock.now() - timedelta(seconds=lag) if lag else None,
                )
            )
        except RefusalError as refusal:
            return _refused(refusal)
        except Exception:  # a bug of the sandbox's: logged, and a 500 as the real Recurly would give
            log.exception("the sandbox's Recurly broke on %s %s", request.method, request.path)
            return _refused(_internal_error())

    def _authenticated(self, request: web.Request) -> str:
        """The API key of HTTP Basic, the user name of it."""
        scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
        try:
            api_key = b64decode(encoded, validate=True).decode("ascii").partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            api_key = ""
        if scheme.lower() != "basic" or not api_key:
            raise RefusalError(
                401, "unauthorized", "Please provide your API key by HTTP Basic authentication"
            )
        settings = self._state.settings
        if api_key not in settings.api_keys | settings.read_only_api_keys:
            raise RefusalError(403, "invalid_api_key", "The API key is not valid for this site")
        if api_key not in settings.api_keys and request.method in METHODS:
            raise RefusalError(403, "invalid_permissions", "The API key is read-only")
        return api_key

    def _response(self, answer: Reply) -> web.Response:
        headers = {"X-Request-Id": uuid4().hex, **self._limit.headers(), **answer.headers}
        if answer.status != 204:
            headers["Content-Type"] = "application/json; charset=utf-8"
        return web.Response(status=answer.status, body=answer.body, headers=headers)


def _check_version(accept: str) -> None:
    """406 in its three kinds; only the current version is served here (OAS, "Versioning")."""
    media_type = accept.partition(";")[0].strip().removesuffix("+json")
    version = media_type.removeprefix(MEDIA_TYPE)
    if version in (VERSION, "latest") and media_type != version:
        return
    if media_type == version:
        type_, message = "invalid_api_version", "That accept header isn't in the format we use"
    elif version in KNOWN_VERSIONS:
        type_, message = "unavailable_in_api_version", "This is not available in that API version"
    else:
        type_, message = "unknown_api_version", "We don't know that API version"
    headers = [MEDIA_TYPE + known for known in KNOWN_VERSIONS]
    message += " to specify an API version. Try one of these instead:"
    raise RefusalError(406, type_, message, extra={"acceptable_accept_headers": headers})


def _refused(refusal: RefusalError) -> Reply:
    return Reply(refusal.status, json.dumps(refusal.body()).encode(), refusal.headers)


def _replayed(earlier: Answer) -> Reply:
    return Reply(earlier.status, earlier.body, {"Idempotency-Prior": "true"})


def _internal_error() -> RefusalError:
    return RefusalError(500, "internal_server_error", "An unexpected error occurred")


async def _broken() -> Reply:
    return _refused(_internal_error())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
