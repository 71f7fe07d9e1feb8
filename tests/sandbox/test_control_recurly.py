"""Control operations on Recurly: bill dates, pauses, ends, trials and webhooks."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from sandbox_side import Sandbox, sandbox_side


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with sandbox_side() as side:
        yield side


async def step(sandbox: Sandbox, key: str, name: str, body: Any = None, *, status: int = 200) -> Any:
    return await sandbox.control("POST", f"/recurly-subscriptions/{key}/{name}", body or {}, status=status)


async def test_a_bill_date_is_moved(sandbox: Sandbox) -> None:
    """By the Amplify subscription's name or by Recurly's uuid; later ones count from there."""
    uuid = await sandbox.provision(await sandbox.subscribed())
    moved = await step(sandbox, "acme", "bill_date", {"at": "2026-01-20T00:00:00Z"})
    assert (moved["uuid"], moved["current_period_ends_at"]) == (uuid, "2026-01-20T00:00:00Z")
    moved = await step(sandbox, uuid, "bill_date", {"at": "2026-01-18T00:00:00Z"})
    await sandbox.control("POST", "/clock", {"set": "2026-01-18T00:00:00Z"})
    told = await sandbox.recurly("GET", f"/subscriptions/uuid-{uuid}")
    assert told["current_period_ends_at"] == "2026-02-18T00:00:00Z"
    error = await step(sandbox, "acme", "bill_date", {"at": "2026-01-17T00:00:00Z"}, status=409)
    assert "Next bill date is invalid" in error["error"]["message"]


async def test_a_pause_and_its_end(sandbox: Sandbox) -> None:
    """Both at once."""
    await sandbox.provision(await sandbox.subscribed())
    paused = await step(sandbox, "acme", "pause", {"cycles": 2})
    assert (paused["state"], paused["remaining_pause_cycles"]) == ("paused", 2)
    assert (await step(sandbox, "acme", "resume"))["state"] == "active"
    await step(sandbox, "acme", "resume", status=409)


@pytest.mark.parametrize(
    ("name", "body", "state", "reason"),
    [
        ("expire", {}, "expired", "nonpayment"),
        ("expire", {"reason": "tax_location_invalid"}, "expired", "tax_location_invalid"),
        ("cancel", {"timeframe": "bill_date"}, "canceled", None),
    ],
)
async def test_it_ends_without_billingd(
    sandbox: Sandbox, name: str, body: dict[str, Any], state: str, reason: str | None
) -> None:
    """As dunning does it, or somebody in the admin page."""
    await sandbox.provision(await sandbox.subscribed())
    ended = await step(sandbox, "acme", name, body)
    assert (ended["state"], ended["expiration_reason"]) == (state, reason)
    if state == "expired":
        await step(sandbox, "acme", "pause", status=409)


async def test_a_plan_gets_a_trial_and_a_subscription_a_longer_one(sandbox: Sandbox) -> None:
    """The period is the trial while it lasts; who has none cannot have it moved."""
    made = await sandbox.subscribed()
    uuid = await sandbox.provision(made, trial_days=14)
    told = await sandbox.recurly("GET", f"/subscriptions/uuid-{uuid}")
    period = (told["current_period_started_at"], told["current_period_ends_at"])
    assert period == (told["trial_started_at"], told["trial_ends_at"])
    assert period == ("2026-01-15T12:00:00Z", "2026-01-29T12:00:00Z")
    longer = await step(sandbox, "acme", "trial", {"ends_at": "2026-02-10T00:00:00Z"})
    assert longer["trial_ends_at"] == longer["current_period_ends_at"] == "2026-02-10T00:00:00Z"
    await step(sandbox, "acme", "trial", {"ends_at": "2026-01-15T12:00:00Z"}, status=409)
    await sandbox.control("POST", "/clock", {"set": "2026-02-10T00:00:00Z"})
    told = await sandbox.recurly("GET", f"/subscriptions/uuid-{uuid}")
    assert told["current_period_started_at"] == told["trial_ends_at"] == "2026-02-10T00:00:00Z"
    error = await step(sandbox, "acme", "trial", {"ends_at": "2026-03-10T00:00:00Z"}, status=409)
    assert "is not in a trial" in error["error"]["message"]


@pytest.mark.parametrize(
    ("status", "field", "path", "body"),
    [
        (404, "step", "/recurly-subscriptions/acme/explode", {}),
        (404, "key", "/recurly-subscriptions/nope/resume", {}),
        (409, "key", "/recurly-subscriptions/acme/resume", {}),
        (400, "at", "/recurly-subscriptions/acme/bill_date", {}),
        (400, "cycles", "/recurly-subscriptions/acme/pause", {"cycles": 0}),
        (400, "timeframe", "/recurly-subscriptions/acme/cancel", {"timeframe": "now"}),
        (400, "x", "/recurly-subscriptions/acme/resume", {"x": 1}),
        (404, "plan", "/recurly-plans/p/trial", {"length": 1}),
        (400, "unit", "/recurly-plans/p/trial", {"length": 1, "unit": "weeks"}),
        (400, "url", "/recurly-hooks", {"url": "127.0.0.1", "secret": "s"}),
        (400, "secret", "/recurly-hooks", {"url": "http://127.0.0.1/"}),
        (400, "recurly", "/settings", {"recurly": {"list_lag_seconds": -1}}),
    ],
)
async def test_mistakes_name_the_field_and_the_fix(
    sandbox: Sandbox, status: int, field: str, path: str, body: dict[str, Any]
) -> None:
    """Nothing is done then."""
    await sandbox.subscribed()
    error = (await sandbox.control("POST", path, body, status=status))["error"]
    assert (error["field"], bool(error["fix"])) == (field, True)


async def test_lags_are_set(sandbox: Sandbox) -> None:
    """As every other setting, and shown."""
    body = {"recurly": {"list_lag_seconds": 5, "bill_run_lag_seconds": 60}}
    shown = (await sandbox.control("POST", "/settings", body))["recurly"]
    assert (shown["list_lag_seconds"], shown["bill_run_lag_seconds"]) == (5, 60)


async def test_recurlys_hooks_are_set_and_delivered_to(sandbox: Sandbox) -> None:
    """A hook is signed for with its secret, which is never shown; settling delivers what is due."""
    got: list[dict[str, str]] = []

    async def take(request: web.Request) -> web.Response:
        got.append(dict(request.headers))
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    made = await sandbox.subscribed()
    async with TestServer(app) as receiver:
        body = {"url": str(receiver.make_url("/")), "secret": "s3cret", "old_secret": "older"}
        await sandbox.control("POST", "/recurly-hooks", body)
        await sandbox.provision(made)
        settled = await sandbox.control("POST", "/recurly-hooks/settle", {})
        assert settled == {"delivered": 1, "waiting": 0}
    assert len(got[0]["recurly-signature"].split(",")) == 3
    listed = await sandbox.control("GET", "/recurly-hooks")
    assert [each["event_type"] for each in listed["deliveries"]] == ["created"]
    assert "s3cret" not in str(listed)
    assert await sandbox.control("DELETE", "/recurly-hooks") == {"removed": 1}


async def test_a_ticking_sandbox_delivers_by_itself() -> None:
    """Nobody asks for anything: the bill runs, and the notices come."""
    got: asyncio.Queue[str] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        got.put_nowait((await request.json())["event_type"])
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    async with TestServer(app) as receiver, sandbox_side(ticking=True) as sandbox:
        body = {"url": str(receiver.make_url("/")), "secret": "s3cret"}
        await sandbox.control("POST", "/recurly-hooks", body)
        await sandbox.provision(await sandbox.subscribed())
        sandbox.world.clock.advance(timedelta(days=31))
        async with asyncio.timeout(10):
            assert [await got.get() for _ in range(3)] == ["created", "renewal.scheduled", "renewed"]
