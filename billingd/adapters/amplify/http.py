"""Calls to Amplify: the line that touches the network, and the token that goes with each."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

import aiohttp
import structlog
from yarl import URL

from billingd import __version__
from billingd.adapters.amplify.answers import (
    Call,
    Reply,
    error_for,
    json_of,
    lenient,
    lost,
    outcome_of,
    true_status,
)
from billingd.adapters.amplify.encoding import Json, date_of
from billingd.adapters.amplify.token import FORM, Token, Tokens, basic, login_refused, token_from
from billingd.domain.errors import BillingdError, Misconfigured, Permanent, Retryable

log = structlog.get_logger(__name__)

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
CONNECT_SECONDS_MAX: Final = 10.0

Observe = Callable[[str, float], None]


class Http:
    """Sends calls with a token, and remembers when Amplify last answered."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        login_url: str,
        organization_id: str,
        client_id: str,
        client_secret: str,
        timeout: timedelta,
        clock: Callable[[], datetime],
        observe: Observe | None,
    ) -> None:
        seconds = timeout.total_seconds()
        self._session = session
        self._clock = clock
        self._observe = observe or (lambda _outcome, _seconds: None)
        self._timeout = aiohttp.ClientTimeout(
            total=seconds, sock_connect=min(seconds / 2, CONNECT_SECONDS_MAX)
        )
        self._headers = {"Accept": "application/json", "User-Agent": f"billingd/{__version__}"}
        self._tenant = {"X-Axway-Tenant-Id": organization_id} if organization_id else {}
        self._login = Call(
            "POST",
            f"{login_url.rstrip('/')}/realms/Broker/protocol/openid-connect/token",
            "the request for a token",
            FORM,
            "application/x-www-form-urlencoded",
        )
        self._basic = basic(client_id, client_secret)
        self._tokens = Tokens(self._fetch_token, clock)
        self.last_reached_at: datetime | None = None
        self.last_error: str | None = None
        self.skew: timedelta | None = None
        """How far Amplify's clock is ahead of ours by the `Date` of its latest answer, to a second or two."""

    async def log_in(self) -> timedelta:
        """Make sure of a token; how long it is still used before it is replaced."""
        try:
            await self._tokens.current()
        except Retryable as error:
            self.last_error = str(error)
            raise
        return self._tokens.remaining()

    async def send(self, call: Call) -> Reply:
        """The answer, or the error it stands for. A refused token is replaced once (amplify.md 1.1)."""
        try:
            reply = await self._send_authorized(call)
            if not reply.ok and reply.status not in call.handles:
                raise self.error(call, reply)
        except Retryable as error:
            self.last_error = str(error)
            raise
        except Permanent:
            self._reached()
            raise
        self._reached()
        return reply

    async def send_for_json(self, call: Call) -> Json:
        """The JSON of a good answer."""
        return json_of(call, await self.send(call))

    def error(self, call: Call, reply: Reply) -> BillingdError:
        """The error an answer stands for that the caller does not handle after all."""
        return error_for(call, reply, self._clock())

    def _reached(self) -> None:
        self.last_reached_at = self._clock()
        self.last_error = None

    async def _send_authorized(self, call: Call) -> Reply:
        token = await self._tokens.current()
        reply = await self._exchange(call, self._tenant | {"Authorization": f"Bearer {token}"})
        if reply.status != 401:
            return reply
        self._tokens.refused(token)
        token = await self._tokens.current()
        return await self._exchange(call, self._tenant | {"Authorization": f"Bearer {token}"})

    async def _fetch_token(self) -> Token:
        asked_at = self._clock()
        reply = await self._exchange(self._login, {"Authorization": self._basic})
        if reply.status in (400, 401, 403):
            raise login_refused(reply.status, lenient(reply.body))
        if reply.status == 404:
            raise Misconfigured("there is no Amplify login at amplify.login_url (HTTP 404)")
        if not reply.ok:
            raise self.error(self._login, reply)
        return token_from(json_of(self._login, reply), asked_at)

    async def _exchange(self, call: Call, headers: Mapping[str, str]) -> Reply:
        """The only place that touches the network; counts and times what happened there."""
        headers = {**self._headers, **headers}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        clock = asyncio.get_running_loop().time
        began = clock()
        outcome = "abandoned"
        try:
            async with self._session.request(
                call.method,
                URL(call.url, encoded=True),
                data=None if call.body is None else call.body.encode(),
                headers=headers,
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                if (date := date_of(response.headers.get("Date"))) is not None:
                    self.skew = date - self._clock()
                reply = Reply(response.status, response.headers, await _read(response))
            reply = true_status(reply) if call.platform else reply
            outcome = outcome_of(reply.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome = "timeout" if isinstance(error, TimeoutError) else "unreachable"
            raise lost(call, error) from None  # aiohttp's errors carry the request headers, token and all
        finally:
            seconds = clock() - began
            (log.info if call.writes else log.debug)(
                "amplify.call",
                method=call.method,
                path=URL(call.url, encoded=True).path,  # without what is asked: that may hold addresses
                outcome=outcome,
                seconds=round(seconds, 3),
            )
            self._observe(outcome, seconds)
        return reply


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise Permanent(f"Amplify answered with more than {BODY_BYTES_MAX} bytes")
    return bytes(body)
