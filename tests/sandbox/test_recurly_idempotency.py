"""`Idempotency-Key`: what is replayed, for how long, and what no key saves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import BasicAuth, ClientError
from recurly_side import RecurlySide, recurly_side, usage_path

from billingd.sandbox.faults import Rule

KEY = "Idempotency-Key"


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


async def test_a_key_replays_the_answer_for_an_hour(far: RecurlySide) -> None:
    """Same key, method, path, API key: the old answer, `Idempotency-Prior`, nothing done again (2)."""
    body, options = {"code": "ann"}, {"headers": {KEY: "k1"}}
    first = await far.call("POST", "/accounts", body, status=201, **options)
    async with await far.send("POST", "/accounts", {"code": "bob"}, **options) as again:
        assert again.headers["Idempotency-Prior"] == "true"
        assert await again.json() == first
    far.pass_(minutes=59, seconds=59)
    assert await far.call("POST", "/accounts", body, status=201, **options) == first
    far.pass_(seconds=1)
    await far.call("POST", "/accounts", body, status=422, **options)


async def test_the_identity_of_a_key(far: RecurlySide) -> None:
    """Another method, path, key or API key is another request; another body or query is not (2)."""
    far.site.configure(api_keys={"sandbox-api-key", "second"})
    headers: Any = {"headers": {KEY: "k1"}}
    await far.call("POST", "/accounts", {"code": "ann"}, status=201, **headers)
    await far.call("POST", "/accounts?x=1", {"code": "bob"}, status=201, **headers)
    await far.call("POST", "/accounts", {"code": "cid"}, status=201, headers={KEY: "k2"})
    await far.call("POST", "/accounts", {"code": "dan"}, status=201, auth=BasicAuth("second", ""), **headers)
    await far.call("PUT", "/accounts/code-ann", {"email": "a@b.example"}, **headers)
    await far.call("PUT", "/accounts/code-cid", {"email": "c@b.example"}, **headers)
    assert set(far.site.account_by_code) == {"ann", "cid", "dan"}


async def test_refusals_are_kept_too(far: RecurlySide) -> None:
    """A stored 422, 404 or 500 comes back though its cause has gone; a 429 is never stored (2)."""
    for code, status in (("unknown", 404), ("basic", 500)):
        if status == 500:
            far.faults.add(Rule("recurly", "DELETE", "/plans/*", "500"))
        path, options = f"/plans/code-{code}", {"headers": {KEY: code}}
        await far.call("DELETE", path, status=status, **options)
        await far.make_plan(code=code)
        async with await far.send("DELETE", path, **options) as again:
            assert (again.status, again.headers["Idempotency-Prior"]) == (status, "true")
        await far.call("DELETE", path)
    far.site.configure(rate_limit_per_minute=0)
    await far.call("POST", "/accounts", {"code": "ann"}, status=429, headers={KEY: "k"})
    far.site.configure(rate_limit_per_minute=400)
    await far.call("POST", "/accounts", {"code": "ann"}, status=201, headers={KEY: "k"})


async def test_a_key_in_flight_is_a_409_with_advice(far: RecurlySide) -> None:
    """`Recurly-Should-Retry` and `Retry-After`, and no body to lean on (OAS:194-196)."""
    gate, entered = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        entered.set()
        await gate.wait()

    far.faults._sleep = sleep
    far.faults.add(Rule("recurly", "POST", "/accounts", "slow"))
    options = {"headers": {KEY: "k"}}
    slow = asyncio.create_task(far.call("POST", "/accounts", {"code": "ann"}, status=201, **options))
    await entered.wait()
    async with await far.send("POST", "/accounts", {"code": "ann"}, **options) as refused:
        assert refused.status == 409
        assert (refused.headers["Recurly-Should-Retry"], refused.headers["Retry-After"]) == ("true", "1")
        assert await refused.read() == b""
    gate.set()
    first = await slow
    assert await far.call("POST", "/accounts", {"code": "ann"}, status=201, **options) == first


@pytest.mark.parametrize("kind", ["lost", "cut", "garbage", "html_502_committed", "reset", "html_502"])
async def test_a_key_saves_what_the_gateway_lost(far: RecurlySide, kind: str) -> None:
    """Whatever became of the first answer, the retry gets it, and there is one record only."""
    await far.make_plan()
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "POST", "/subscriptions/*/add_ons/*/usage", kind))
    path, options = usage_path(made), {"headers": {KEY: "k"}}
    with contextlib.suppress(ClientError):
        (await far.send("POST", path, {"amount": 5}, **options)).release()
    record = await far.call("POST", path, {"amount": 5}, status=201, **options)
    listed = await far.call("GET", path)
    assert [each["id"] for each in listed["data"]] == [record["id"]]


async def test_a_500_after_the_commit_is_replayed_as_such(far: RecurlySide) -> None:
    """For an hour the key says 500, though the record is there: only a look-up tells (2)."""
    await far.make_plan()
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "POST", "**", "500_committed"))
    for _ in range(2):
        error = await far.call("POST", usage_path(made), {"amount": 5}, status=500, headers={KEY: "k"})
        assert error["error"]["type"] == "internal_server_error"
    assert far.told(made)["add_ons"]["calls"]["records"] == 1


async def test_a_site_may_ignore_keys(far: RecurlySide) -> None:
    """The fault switches the header off: then only a look-up protects."""
    await far.make_plan()
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "POST", "**", "ignore_idempotency_key", times=None))
    for _ in range(2):
        async with await far.send("POST", usage_path(made), {"amount": 1}, headers={KEY: "k"}) as answer:
            assert (answer.status, "Idempotency-Prior" in answer.headers) == (201, False)
    assert far.told(made)["add_ons"]["calls"]["reported_units"] == 2
