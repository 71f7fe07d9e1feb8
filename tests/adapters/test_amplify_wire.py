"""What only a real socket shows: silence, cut bodies, closed ports, redirects, prompt 401s."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from billingd.adapters.amplify import Amplify
from billingd.adapters.amplify import http as amplify_http
from billingd.domain.errors import BillingdError, Misconfigured, NotDone, Permanent, Retryable, Unknown

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler, *, seconds: float = 5.0) -> AsyncIterator[tuple[Amplify, list[str]]]:
    """An Amplify in front of a real server whose catalog is that handler; and the outcomes observed."""

    async def token(_request: web.Request) -> web.Response:
        return web.json_response({"access_token": "t", "expires_in": 1800})

    app = web.Application()
    app.router.add_post("/auth/realms/Broker/protocol/openid-connect/token", token)
    app.router.add_route("*", "/apis/{rest:.*}", handler)
    outcomes: list[str] = []
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        base = str(server.make_url("")).rstrip("/")
        yield an_amplify(session, base, seconds, outcomes), outcomes


def an_amplify(session: aiohttp.ClientSession, base: str, seconds: float, outcomes: list[str]) -> Amplify:
    """An Amplify with everything at one address."""
    return Amplify(
        session,
        central_url=base,
        login_url=f"{base}/auth",
        platform_url=base,
        api_version="v1",
        organization_id="1",
        client_id="id",
        client_secret="secret",
        timeout=timedelta(seconds=seconds),
        clock=lambda: NOW,
        observe=lambda outcome, _seconds: outcomes.append(outcome),
    )


async def both(amplify: Amplify) -> tuple[type[BaseException], type[BaseException]]:
    """The kinds of error a read and a write end in."""
    with pytest.raises(BillingdError) as read:
        await amplify.find_subscription("s")
    with pytest.raises(BillingdError) as write:
        await amplify.decide("s", "approved", "")
    return read.type, write.type


async def test_silence_is_bounded() -> None:
    """A far side that takes the request and says nothing: the write may have happened."""
    release = asyncio.Event()

    async def silent(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    async with served(silent, seconds=0.1) as (amplify, outcomes):
        assert await both(amplify) == (Retryable, Unknown)
        assert outcomes == ["ok", "timeout", "timeout"]
        release.set()


async def test_a_body_that_stops_is_bounded_too() -> None:
    """The bound is on the whole call, not only on the first byte."""
    release = asyncio.Event()

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{")
        await release.wait()
        return response

    async with served(drip, seconds=0.1) as (amplify, _):
        assert await both(amplify) == (Retryable, Unknown)
        release.set()


async def test_a_cut_body_is_a_lost_answer() -> None:
    """Status 200 and half a resource: nothing of it is used."""

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"name": "s"')
        assert request.transport is not None
        request.transport.close()
        return response

    async with served(cut) as (amplify, outcomes):
        assert await both(amplify) == (Retryable, Unknown)
        assert "unreachable" in outcomes


async def test_a_closed_port() -> None:
    """Nothing was sent; the error says where, and nothing of what."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with aiohttp.ClientSession() as session:
            amplify = an_amplify(session, base, 1, [])
            assert await both(amplify) == (Retryable, Retryable)
            assert str(taken.getsockname()[1]) in str(amplify.last_error)


async def test_central_closed_after_the_login() -> None:
    """A write that found nobody is clearly not done."""

    async def unused(_request: web.Request) -> web.Response:
        return web.Response()

    async with served(unused) as (amplify, _):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            amplify._catalog._base = f"http://127.0.0.1:{taken.getsockname()[1]}/apis/catalog"
            assert await both(amplify) == (Retryable, NotDone)


async def test_a_redirect_is_not_followed() -> None:
    """The token goes where it was configured to go, and nowhere else."""
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPFound("/apis/elsewhere")

    async with served(elsewhere) as (amplify, _):
        assert await both(amplify) == (Misconfigured, Misconfigured)
        assert "/apis/elsewhere" not in asked


async def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on everything (style.md 2.15)."""
    monkeypatch.setattr(amplify_http, "BODY_BYTES_MAX", 1000)

    async def endless(_request: web.Request) -> web.Response:
        return web.Response(body=b" " * 1001)

    async with served(endless) as (amplify, _):
        with pytest.raises(Permanent, match="more than 1000 bytes"):
            await amplify.find_subscription("s")


async def test_names_and_queries_arrive_as_they_left() -> None:
    """What the server decodes is what the caller meant, also where URLs have special characters."""
    seen: list[tuple[str, str]] = []

    async def note(request: web.Request) -> web.Response:
        seen.append((request.rel_url.raw_path, request.query.get("query", "")))
        return web.json_response([], headers={"X-Axway-Total-Count": "0"})

    async with served(note) as (amplify, _):
        await amplify.list_quotas("a/b c?d#e%2F;=")
        await amplify.list_subscriptions(plan_id="x' y;a===b", state="active")
        assert seen == [
            ("/apis/catalog/v1/productplans/a%2Fb%20c%3Fd%23e%252F%3B%3D/quotas", ""),
            (
                "/apis/catalog/v1/subscriptions",
                "metadata.references.id==='x\\' y;a===b';state.name===active",
            ),
        ]
