"""The access token: asked for once, shared by all, renewed before it ends (amplify.md 1.1)."""

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from billingd.adapters.amplify.encoding import Json
from billingd.domain.errors import Misconfigured

FORM: Final = "grant_type=client_credentials"
LIFETIME_UNSTATED: Final = timedelta(minutes=5)
LIFETIME_MAX: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A bearer token and when to replace it; without a repr, so that it cannot land in a log."""

    value: str
    renew_at: datetime


class Tokens:
    """Hands out the current token; however many wait for a new one, one request is made."""

    def __init__(self, fetch: Callable[[], Awaitable[Token]], clock: Callable[[], datetime]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._token: Token | None = None
        self._flight: asyncio.Task[Token] | None = None

    async def current(self) -> str:
        """The token to use now."""
        if self._token is not None and self._clock() < self._token.renew_at:
            return self._token.value
        if self._flight is None:
            self._flight = asyncio.create_task(self._renew())
            self._flight.add_done_callback(self._landed)
        # Shielded: one waiter that gives up must not take the token away from the others.
        return (await asyncio.shield(self._flight)).value

    def remaining(self) -> timedelta:
        """How long the token is still used; nothing when there is none."""
        return timedelta(0) if self._token is None else self._token.renew_at - self._clock()

    def refused(self, value: str) -> None:
        """Forget this token, unless somebody has replaced it already."""
        if self._token is not None and self._token.value == value:
            self._token = None

    async def _renew(self) -> Token:
        self._token = await self._fetch()
        return self._token

    def _landed(self, flight: asyncio.Task[Token]) -> None:
        self._flight = None
        if not flight.cancelled():
            flight.exception()  # seen, also when every waiter has gone


def basic(client_id: str, client_secret: str) -> str:
    """The Authorization header of the token request (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{client_id}:{client_secret}".encode()).decode("ascii")


def token_from(answer: Json, asked_at: datetime) -> Token:
    """The token in a login answer, to be renewed at 4/5 of its lifetime like Axway's SDK does."""
    value = answer.get("access_token") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or not isinstance(value, str) or not value:
        raise Misconfigured("Amplify's login gave no access_token: check amplify.login_url")
    seconds = answer.get("expires_in")
    if isinstance(seconds, bool) or not isinstance(seconds, int | Decimal):
        lifetime = LIFETIME_UNSTATED
    else:
        lifetime = timedelta(seconds=int(max(0, min(seconds, int(LIFETIME_MAX.total_seconds())))))
    return Token(value, asked_at + lifetime * 4 / 5)


def login_refused(status: int, answer: Json) -> Misconfigured:
    """What to tell an operator whose credentials the login does not take; names keys, never values."""
    word = answer.get("error") if isinstance(answer, dict) else None
    shown = f", {word}" if isinstance(word, str) and re.fullmatch(r"[a-z_]{1,40}", word) else ""
    return Misconfigured(
        f"Amplify's login refused amplify.client_id / client_secret (HTTP {status}{shown}): "
        "check both, and that the service account exists and is enabled"
    )
