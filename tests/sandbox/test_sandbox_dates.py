"""The `Date` of every answer is the sandbox's, not this machine's."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from aiohttp import BasicAuth
from sandbox_side import ACCEPT, Sandbox, sandbox_side

from billingd.sandbox import server
from billingd.sandbox.faults import Rule

NOON = "Thu, 15 Jan 2026 12:00:00 GMT"


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with sandbox_side() as side:
        side.world.clock.advance(timedelta(milliseconds=900))
        yield side


async def date_of(sandbox: Sandbox, path: str) -> str:
    """The header of an answer, whatever its status."""
    auth = BasicAuth(server.API_KEY, "")
    async with sandbox.client.get(path, headers=ACCEPT, auth=auth) as answer:
        return answer.headers["Date"]


@pytest.mark.parametrize("path", ["/plans", "/unknown", "/apis/catalog/v1/products", "/auth/x", "/control"])
async def test_answers_and_refusals_bear_the_sandboxs_time(sandbox: Sandbox, path: str) -> None:
    """Whole seconds, and it moves with the clock."""
    assert await date_of(sandbox, path) == NOON
    sandbox.world.clock.advance(timedelta(days=30, seconds=1))
    assert await date_of(sandbox, path) == "Sat, 14 Feb 2026 12:00:01 GMT"


@pytest.mark.parametrize("kind", ["429", "409", "500", "not_json", "html_502", "html_502_committed"])
async def test_faulty_answers_do_too(sandbox: Sandbox, kind: str) -> None:
    """A gateway has the same clock."""
    for side in ("recurly", "amplify"):
        sandbox.world.faults.add(Rule(side, "*", "*", kind))
    assert [await date_of(sandbox, path) for path in ("/plans", "/apis/catalog/v1/products")] == [NOON] * 2


@pytest.mark.parametrize("kind", ["cut", "fin"])
async def test_answers_written_by_hand_do_too(sandbox: Sandbox, kind: str) -> None:
    """Once, in the head of an answer that is cut short."""
    sandbox.world.faults.add(Rule("recurly", "*", "*", kind))
    reader, writer = await asyncio.open_connection("127.0.0.1", sandbox.client.port)
    writer.write(b"GET /plans HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert [line for line in head.split(b"\r\n") if line.lower().startswith(b"date:")] == [
        f"Date: {NOON}".encode()
    ]
