"""Faults on the real socket: what the client gets, and what was done all the same."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientError, ClientOSError, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler

from billingd.sandbox.clock import ManualClock
from billingd.sandbox.faults import KINDS, Faults, Rule, lag_seconds


class Bench:
    """An application of two sides that counts what it does."""

    client: TestClient[Any, Any]

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.done: list[str] = []
        self.gone = asyncio.Event()
        """The server has noticed that a client has gone."""
        self.seen_lag = 0.0
        self.entered = asyncio.Event()

    async def commit(self, request: web.Request) -> web.Response:
        """The handler of every path."""
        self.entered.set()
        self.seen_lag = lag_seconds(request)
        self.done.append(f"{request.method} {request.path} {(await request.read()).decode()}")
        return web.json_response({"done": len(self.done)}, status=201, headers={"X-Request-Id": "r1"})

    async def post(self, path: str = "/x", body: str = "b", **options: Any) -> tuple[int, str, Any]:
        """Status, content type and body of a POST."""
        async with self.client.post(path, data=body, **options) as answer:
            return answer.status, answer.content_type, await answer.read()


@asynccontextmanager
async def bench(faults: Faults | None = None) -> AsyncIterator[Bench]:
    """Paths below /r are Recurly's, below /none nobody's, the rest Amplify's.

    TestServer cancels the handlers of clients that have gone, which must not undo what commits later.
    """
    here = Bench(faults or Faults(ManualClock()))

    def side_of(request: web.Request) -> str | None:
        if request.path.startswith("/none"):
            return None
        return "recurly" if request.path.startswith("/r") else "amplify"

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except asyncio.CancelledError:
            here.gone.set()
            raise

    app = web.Application(middlewares=[watch, here.faults.middleware(side_of, within=())])
    app.router.add_route("*", "/{path:.*}", here.commit)
    async with TestClient(TestServer(app)) as here.client:
        yield here


def rule(kind: str, side: str = "amplify", **changes: Any) -> Rule:
    return Rule(side, "*", "*", kind, **changes)


@pytest.mark.parametrize("kind", ["refuse", "reset", "outage"])
async def test_nothing_is_done_and_the_connection_is_reset(kind: str) -> None:
    """A TCP reset, not an answer."""
    async with bench() as far:
        far.faults.add(rule(kind))
        with pytest.raises(ClientOSError) as caught:
            await far.post()
        assert caught.value.errno == errno.ECONNRESET
        assert far.done == []
        assert (await far.post())[0] == 201


@pytest.mark.parametrize("kind", ["lost", "cut", "garbage"])
async def test_it_is_done_and_the_answer_does_not_come_whole(kind: str) -> None:
    """No answer, half of one, or something that is not HTTP; the request has been carried out."""
    async with bench() as far:
        far.faults.add(rule(kind))
        with pytest.raises(ClientError):
            await far.post()
        assert far.done == ["POST /x b"]
        assert far.faults.counts == {kind: 1}


async def test_a_cut_answer_promises_more_than_it_sends() -> None:
    """Status and headers are those of the answer; the body ends before its Content-Length."""
    async with bench() as far:
        far.faults.add(rule("cut"))
        reader, writer = await asyncio.open_connection("127.0.0.1", far.client.port)
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nb")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        whole = json.dumps({"done": 1}).encode()
        assert head.startswith(b"HTTP/1.1 201 Created\r\n")
        assert f"Content-Length: {len(whole) + 64}".encode() in head
        assert b"X-Request-Id: r1" in head
        assert body == whole[: len(whole) // 2]


async def test_a_kept_connection_is_closed_without_a_word() -> None:
    """`fin`: a whole answer without `Connection: close`, then the end of the stream."""
    async with bench() as far:
        far.faults.add(rule("fin"))
        reader, writer = await asyncio.open_connection("127.0.0.1", far.client.port)
        writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.endswith(b'{"done": 1}')
        assert b"connection: close" not in answer.lower()


@pytest.mark.parametrize(
    ("kind", "side", "expected", "done"),
    [
        ("not_json", "amplify", (201, "application/json"), 1),
        ("429", "recurly", (429, "application/json"), 0),
        ("429", "amplify", (429, "application/json"), 0),
        ("409", "recurly", (409, "application/octet-stream"), 0),
        ("409", "amplify", (409, "application/json"), 0),
        ("422", "recurly", (422, "application/json"), 0),
        ("500", "amplify", (500, "application/json"), 0),
        ("500", "recurly", (500, "application/json"), 0),
        ("500_committed", "amplify", (500, "application/json"), 1),
        ("html_502", "recurly", (502, "text/html"), 0),
        ("html_502_committed", "recurly", (502, "text/html"), 1),
    ],
)
async def test_answers_that_refuse_or_mislead(
    kind: str, side: str, expected: tuple[int, str], done: int
) -> None:
    """By kind: the status, the content type, and whether it was done."""
    async with bench() as far:
        far.faults.add(rule(kind, side))
        status, type_, _ = await far.post("/r" if side == "recurly" else "/x")
        assert (status, type_, len(far.done)) == (*expected, done)


async def test_refusals_speak_the_language_of_their_side() -> None:
    """Recurly: `error`, X-RateLimit-Reset, no Retry-After on 429; Amplify: `errors`, Retry-After."""
    async with bench() as far:
        for side in ("amplify", "recurly"):
            far.faults.add(rule("429", side, args={"seconds": 30}))
        async with far.client.post("/r") as answer:
            body = await answer.json()
            assert (body["error"]["type"], "Retry-After" in answer.headers) == ("rate_limited", False)
            assert int(answer.headers["X-RateLimit-Reset"]) == 1_768_478_430
            assert answer.headers["X-Request-Id"]
        async with far.client.post("/x") as answer:
            assert (await answer.json())["errors"][0]["status"] == 429
            assert answer.headers["Retry-After"] == "30"


async def test_the_gateways_page_has_no_request_id() -> None:
    """Which the SDK's error path trips over."""
    async with bench() as far:
        far.faults.add(rule("html_502_committed"))
        async with far.client.post("/x") as answer:
            assert "X-Request-Id" not in answer.headers
            assert "<html>" in await answer.text()


async def test_an_outage_may_answer_instead() -> None:
    """With args.status, until it is cleared."""
    async with bench() as far:
        far.faults.add(rule("outage", times=None, args={"status": 503}))
        assert [(await far.post())[0] for _ in range(3)] == [503] * 3
        assert (await far.post("/r"))[0] == 201
        far.faults.clear()
        assert (await far.post())[0] == 201


@pytest.mark.parametrize("side", ["amplify", "recurly"])
async def test_slow_commits_though_the_client_has_gone(side: str) -> None:
    """The client times out first; the request is carried out all the same, later."""
    gate, asleep = asyncio.Event(), asyncio.Event()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        asleep.set()
        await gate.wait()

    async with bench(Faults(sleep=sleep)) as far:
        far.faults.add(rule("slow", side, args={"seconds": 7}))
        post = asyncio.create_task(far.post("/r" if side == "recurly" else "/x", "late"))
        await asleep.wait()
        post.cancel()
        with pytest.raises(asyncio.CancelledError):
            await post
        await far.gone.wait()
        assert (far.done, slept) == ([], [7.0])
        gate.set()
        async with asyncio.timeout(5):
            await far.entered.wait()
        await asyncio.gather(*far.faults._tasks)
        assert len(far.done) == 1
        assert far.done[0].endswith("late")


async def test_rules_count_skip_and_run_out() -> None:
    """`skip` matching requests pass first, then `times` go wrong; None: until cleared."""
    async with bench() as far:
        number = far.faults.add(rule("html_502", times=2, skip=1))
        assert [(await far.post())[0] for _ in range(5)] == [201, 502, 502, 201, 201]
        (told,) = far.faults.describe()
        assert (told["id"], told["fired"], told["times"], told["kind"]) == (number, 2, 2, "html_502")
        assert json.dumps(told)
        far.faults.remove(number)
        assert far.faults.describe() == []
        assert far.faults.counts == {"html_502": 2}


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("*", "/any/thing", True),
        ("**", "/any/thing", True),
        ("/subscriptions/*", "/subscriptions/1", True),
        ("/subscriptions/*", "/subscriptions/1/add_ons", False),
        ("/subscriptions/*/add_ons/*/usage", "/subscriptions/uuid-1/add_ons/code-x/usage", True),
        ("/subscriptions/**", "/subscriptions/1/add_ons", True),
        ("/plans/code-*", "/plans/code-x", True),
        ("/plans", "/plansx", False),
        ("/a.b", "/axb", False),
    ],
)
def test_paths_match_by_segment(pattern: str, path: str, hit: bool) -> None:
    """`*` within a segment, `**` across, everything else literally."""
    assert Rule("recurly", "POST", pattern, "lost").matches("recurly", "POST", path) is hit
    assert not Rule("recurly", "POST", pattern, "lost").matches("amplify", "POST", path)
    assert not Rule("recurly", "POST", pattern, "lost").matches("recurly", "GET", path)


async def test_modifiers_go_with_other_faults() -> None:
    """A lag is noted on the request beside whatever else strikes; clear() may spare a side."""
    async with bench() as far:
        far.faults.add(rule("list_lag", "recurly", times=None, args={"seconds": 9}))
        far.faults.add(rule("html_502_committed", "recurly"))
        assert (await far.post("/r"))[0] == 502
        assert far.seen_lag == 9.0
        far.faults.clear("amplify")
        assert len(far.faults.describe()) == 2
        far.faults.clear("recurly")
        assert far.faults.describe() == []


async def test_what_is_of_no_side_is_spared() -> None:
    """The control interface works during an outage of both."""
    async with bench() as far:
        for side in ("amplify", "recurly"):
            far.faults.add(rule("outage", side, times=None))
        assert (await far.post("/none"))[0] == 201


def test_wrong_rules_are_refused() -> None:
    """By name, with what there is."""
    with pytest.raises(ValueError, match="side is one of"):
        Rule("stripe", "*", "*", "lost")
    with pytest.raises(ValueError, match="kind is one of"):
        Rule("recurly", "*", "*", "flood")
    assert all(KINDS.values())
