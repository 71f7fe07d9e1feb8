"""The token endpoint and the check of bearers (amplify.md 1.1)."""

import base64
import binascii
import hmac
import json
import secrets
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.times import EPOCH
from billingd.sandbox.clock import SandboxClock

PATH: Final = "/auth/realms/Broker/protocol/openid-connect/token"


class Tokens:
    """Issues bearers that expire on the sandbox's clock."""

    def __init__(self, clock: SandboxClock, client_id: str, client_secret: str, organization_id: str) -> None:
        self.client_id = client_id
        self.client_secret = client_secret
        self._clock = clock
        self._organization_id = organization_id
        self._expires: dict[str, datetime] = {}

    def issue(self, seconds: int) -> str:
        """A new bearer: a JWT in form, signed by nobody."""
        expires = self._clock.now() + timedelta(seconds=seconds)
        self._expires = {token: at for token, at in self._expires.items() if at > self._clock.now()}
        claims = {
            "org_guid": self._organization_id,
            "azp": self.client_id,
            "exp": (expires - EPOCH) // timedelta(seconds=1),
            "jti": secrets.token_hex(16),
        }
        token = f"{_part({'alg': 'RS256', 'typ': 'JWT'})}.{_part(claims)}.{secrets.token_urlsafe(32)}"
        self._expires[token] = expires
        return token

    def revoke(self) -> None:
        """Makes every bearer unknown, as a restart of the login server would."""
        self._expires.clear()

    def check(self, request: web.Request) -> None:
        """Refused(401) without a valid bearer; Refused(403) for another tenant's header."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        expires = self._expires.get(token)
        if scheme.lower() != "bearer" or expires is None or expires <= self._clock.now():
            raise Refused(401, "The bearer token is missing, unknown or expired")
        if request.headers.get("X-Axway-Tenant-Id", self._organization_id) != self._organization_id:
            raise Refused(403, "X-Axway-Tenant-Id names another tenant")

    async def grant(self, request: web.Request, seconds: int) -> web.Response:
        """Answers a client-credentials request; credentials by Basic or in the form."""
        if request.content_type != "application/x-www-form-urlencoded":
            return _no(415, "invalid_request", "the body must be form-encoded")
        form = {key: str(value) for key, value in (await request.post()).items()}
        if form.get("grant_type") != "client_credentials":
            return _no(400, "unsupported_grant_type", "grant_type must be client_credentials")
        given = _basic(request.headers.get("Authorization", "")) or (
            form.get("client_id", ""),
            form.get("client_secret", ""),
        )
        wanted = (self.client_id, self.client_secret)
        if not all(hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(given, wanted, strict=True)):
            return _no(401, "invalid_client", "Invalid client or Invalid client credentials")
        return web.json_response(
            {
                "access_token": self.issue(seconds),
                "expires_in": seconds,
                "refresh_expires_in": 0,
                "token_type": "bearer",
                "not-before-policy": 0,
                "scope": "email profile",
            }
        )


def _part(content: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _basic(header: str) -> tuple[str, str] | None:
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(coded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ("", "")
    return (user, password)


def _no(status: int, error: str, description: str) -> web.Response:
    return web.json_response({"error": error, "error_description": description}, status=status)
