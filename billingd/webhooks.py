"""The webhook listener: verify, record the event and its actions in one transaction, answer.

Nothing is acknowledged before it is durable. What the event asks for happens later, in the outbox.
"""

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from aiohttp import hdrs, web

from billingd.domain.errors import Rejected
from billingd.domain.events import Event, parse_amplify, parse_recurly
from billingd.intake import Intake
from billingd.loops import Clock
from billingd.reception import UNPROVEN_BODY_BYTES_MAX, visitor_of
from billingd.settings import SCHEMES
from billingd.store.engine import StoreDamaged, StoreUnavailable
from billingd.throttle import Throttle, source_of

log = structlog.get_logger()

RETRY_AFTER_SECONDS: Final = 5
SIGNATURE_AGE_MAX: Final = timedelta(minutes=5)
"""Recurly's own tolerance for the time in its signature (recurly.md 4.10)."""

BODY_SECONDS: Final = 20.0
"""How long a body may take to arrive."""

STORE_SECONDS: Final = 10.0
"""How long an event may take to be stored, before its sender is told to send it again: below what proxies
wait, above what SQLite waits for a lock. Recurly waits 5 s only, and sends again in either case."""

SIGNATURES_MAX: Final = 4
"""Recurly sends one, and two for 24 h after its secret was changed (recurly.md 4.10): this is enough for two
changes in a day, and one to spare. A header with more of them is refused."""

TELL_SECONDS: Final = 60.0
"""How often the log has a line about refusals that have no line of their own."""

PROVEN: Final = "billingd.proven"
"""Set in a request that has shown the secret; its connection tells nothing: behind a proxy all share it."""

_SIGNATURE: Final = re.compile(r"\s*([0-9a-f]{64})\s*")

AMPLIFY_PATHS: Final = ("/webhooks/amplify", "/provisionplan", "/provisionsubscription")
"""The last two are what the original integration's hooks post to."""


@dataclass
class Tally:
    """Deliveries since this process started, by what became of them."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    unavailable: int = 0
    unauthorized: int = 0
    """Of those rejected, the ones without the right secret."""
    observers: list[Callable[[str], None]] = field(default_factory=list)

    def add(self, outcome: str) -> None:
        """Count one delivery: accepted, duplicates, rejected or unavailable."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        for observer in self.observers:
            observer(outcome)


class Authenticator:
    """Says whether a request carries one of our secrets, in time that does not depend on the answer.

    `auth` is `header:NAME`, `basic`, `query:NAME` or `none`. `secrets` holds one or, while rotating, two
    values separated by a space; a scheme word such as Bearer in front of a value counts for nothing.
    """

    def __init__(self, auth: str, secrets: str) -> None:
        self._how, _, self._name = auth.partition(":")
        self._secrets = [value for value in secrets.split() if value.lower() not in SCHEMES]
        if self._how != "none" and not self._secrets:
            raise ValueError("webhooks.secret is needed unless webhooks.auth is none")
        self._digests = [hashlib.sha256(value.encode()).digest() for value in self._secrets]

    def admits(self, request: web.Request) -> bool:
        """Whether the request may be believed."""
        if self._how == "none":
            return True
        digest = hashlib.sha256(self._presented(request)).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all are compared
        return any(matches)

    def signed(self, body: bytes, header: str, *, now: datetime) -> bool:
        """Whether a `recurly-signature` header (`ts,hex[,hex...]`, ts in Unix ms or s) signs this body."""
        stamp, *signatures = header.split(",", SIGNATURES_MAX + 1)
        if len(signatures) > SIGNATURES_MAX or not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 13):
            return False
        signatures = [found[1] for one in signatures if (found := _SIGNATURE.fullmatch(one))]
        seconds = int(stamp) / 1000 if len(stamp) > 10 else int(stamp)
        if abs(now - datetime.fromtimestamp(seconds, UTC)) > SIGNATURE_AGE_MAX:
            return False
        # once for each secret: a body is large, and whoever sends it may be anybody
        expected = [
            hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
            for secret in self._secrets
        ]
        matches = [hmac.compare_digest(one, signature) for one in expected for signature in signatures]
        return any(matches)

    def _presented(self, request: web.Request) -> bytes:
        if self._how == "query":
            return request.query.get(self._name, "").encode(errors="surrogateescape")
        name = hdrs.AUTHORIZATION if self._how == "basic" else self._name
        value = request.headers.get(name, "").strip()
        scheme, _, rest = value.partition(" ")
        if self._how == "basic":
            try:
                return base64.b64decode(rest, validate=True) if scheme.lower() == "basic" else b""
            except ValueError:  # not base64, or not even ASCII
                return b""
        bare = rest.strip() if scheme.lower() in SCHEMES else value
        return bare.encode(errors="surrogateescape")


class WebhookListener:
    """The aiohttp application behind `webhooks.listen`."""

    def __init__(
        self,
        intake: Intake,
        clock: Clock,
        authenticator: Authenticator,
        *,
        body_bytes_max: int,
        tally: Tally,
        body_seconds: float = BODY_SECONDS,
        store_seconds: float = STORE_SECONDS,
    ) -> None:
        self._intake = intake
        self._clock = clock
        self._authenticator = authenticator
        self._body_bytes_max = body_bytes_max
        self._body_seconds = body_seconds
        self._store_seconds = store_seconds
        self._tally = tally
        self._throttle = Throttle(clock.elapsed)
        self._unsaid = 0
        self._said_at: float | None = None

    def configure(self, authenticator: Authenticator, *, body_bytes_max: int) -> None:
        """Judge the requests from now on like this."""
        self._authenticator, self._body_bytes_max = authenticator, body_bytes_max

    def application(self) -> web.Application:
        """The routes, each answering errors as JSON."""
        application = web.Application(
            middlewares=[self._answer],
            handler_args={"auto_decompress": False},  # a body is as large as it was sent
        )
        for path in AMPLIFY_PATHS:
            application.router.add_post(path, self._amplify)
        application.router.add_post("/webhooks/recurly", self._recurly)
        return application

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Turn what a handler raises into the answers of the contract."""
        if (visitor := visitor_of(request)) is not None:
            visitor.begin()
        try:
            return await handler(request)
        except _Unauthorized as error:
            return self._turn_away(request, error)
        except Rejected as error:
            return self._refuse(request, error.status, error.code, str(error))
        except (StoreUnavailable, StoreDamaged) as error:
            return self._not_stored(str(error), "nothing of it was kept, send it again")
        except web.HTTPMethodNotAllowed as error:
            allow = {"Allow": ", ".join(sorted(error.allowed_methods))}
            return self._refuse(request, 405, "method_not_allowed", "webhooks are sent by POST", allow)
        except (ConnectionError, web.RequestPayloadError):
            return self._refuse(request, 400, "broken_off", "the body broke off")
        except web.HTTPNotFound:
            known = ", ".join([*AMPLIFY_PATHS, "/webhooks/recurly"])
            return self._refuse(request, 404, "not_found", f"webhooks are taken at {known}")
        except Exception:  # a bug: said here, for aiohttp's own log also has every broken request of anybody
            log.exception("webhook.failed", path=request.path)
            return _error(500, "failed", "a fault of billingd's own; nothing is acknowledged")

    def _refuse(
        self,
        request: web.Request,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
    ) -> web.Response:
        self._say(request, status, code, PROVEN in request or self._within(request))
        return _error(status, code, message, headers)

    def _not_stored(self, why: str, then: str) -> web.Response:
        self._tally.add("unavailable")
        log.error("webhook.not_stored", error=why)
        headers: dict[str, str] = {hdrs.RETRY_AFTER: str(RETRY_AFTER_SECONDS)}
        return _error(503, "store_unavailable", f"the event could not be stored; {then}", headers)

    def _turn_away(self, request: web.Request, error: Rejected) -> web.Response:
        """A 401, or from a source that had too many of them a 429."""
        within = self._within(request)
        self._say(request, error.status, error.code, within)
        if within:
            return _error(error.status, error.code, str(error))
        wait = self._throttle.wait_seconds(source_of(request.remote))
        message = "the secret is missing or wrong, again and again; with the right one you are let in at once"
        return _error(429, "too_many_failures", message, {hdrs.RETRY_AFTER: str(wait)})

    def _within(self, request: web.Request) -> bool:
        return self._throttle.failed(source_of(request.remote))

    def _say(self, request: web.Request, status: int, code: str, aloud: bool) -> None:
        """Count a refusal; a line for each in the log, or one a minute for those of a source with many."""
        self._tally.add("rejected")
        self._tally.unauthorized += status == 401
        if aloud:
            log.warning("webhook.rejected", path=request.path[:100], status=status, code=code)
            return
        self._unsaid += 1
        now = self._clock.elapsed()
        if self._said_at is None or now - self._said_at >= TELL_SECONDS:
            log.warning("webhook.many_rejected", source=source_of(request.remote), unsaid=self._unsaid)
            self._said_at, self._unsaid = now, 0

    async def _amplify(self, request: web.Request) -> web.Response:
        if not self._authenticator.admits(request):
            raise _Unauthorized
        self._prove(request)
        body = await self._body(request, self._body_bytes_max)
        return await self._accept(parse_amplify(body))

    async def _recurly(self, request: web.Request) -> web.Response:
        signature = request.headers.get("recurly-signature")
        if signature is not None:
            body = await self._body(request, min(self._body_bytes_max, UNPROVEN_BODY_BYTES_MAX))
            if not self._authenticator.signed(body, signature, now=self._clock.now()):
                raise _Unauthorized
            self._prove(request)
        else:
            if not self._authenticator.admits(request):
                raise _Unauthorized
            self._prove(request)
            body = await self._body(request, self._body_bytes_max)
        return await self._accept(parse_recurly(body, request.headers.get("recurly-notification-id")))

    def _prove(self, request: web.Request) -> None:
        """Note that this request has shown the secret, and its connection once."""
        request[PROVEN] = True
        if (visitor := visitor_of(request)) is not None:
            visitor.prove(self._body_bytes_max)

    async def _body(self, request: web.Request, bytes_max: int) -> bytes:
        """The body, never more of it than allowed, and only when it claims to be JSON."""
        if request.content_type != "application/json":
            raise Rejected("the content type must be application/json", status=415, code="not_json_content")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower() != "identity":
            raise Rejected("the body must not be compressed", status=415, code="encoded")
        too_large = Rejected(
            f"the body is larger than {bytes_max} bytes (webhooks.body_bytes_max)",
            status=413,
            code="too_large",
        )
        if request.content_length is not None and request.content_length > bytes_max:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_seconds):
                async for piece in request.content.iter_any():
                    body += piece
                    if len(body) > bytes_max:
                        raise too_large
        except TimeoutError:
            raise Rejected("the body took too long", status=408, code="too_slow") from None
        return bytes(body)

    async def _accept(self, event: Event) -> web.Response:
        try:
            async with asyncio.timeout(self._store_seconds):
                taken = await self._intake.take(event)
        except TimeoutError:  # cut off within the commit it may be kept all the same: then it is a duplicate
            return self._not_stored("it took too long", "that took too long, send it again")
        self._tally.add("duplicates" if taken.repeated else "accepted")
        log.info(
            "webhook.accepted",
            event_id=event.id,
            resource=f"{event.kind}/{event.name}",
            correlation=event.correlation_id or event.id,
            duplicate=not taken.new,
            actions=taken.actions,
        )
        answer = {"event": event.id, "duplicate": not taken.new, "actions": taken.actions}
        return web.json_response(answer, status=202)


class _Unauthorized(Rejected):
    """Nothing shows that we know the sender."""

    def __init__(self) -> None:
        super().__init__("the secret is missing or wrong", status=401, code="unauthorized")


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=headers)
