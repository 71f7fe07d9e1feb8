"""Who may ask the admin listener: no page of another origin, and nobody who gives it another name."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import page_bench
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from billingd.admin.guard import HEADERS, guard, protect
from billingd.domain.attempts import Action
from billingd.store import outbox
from billingd.store.engine import Store

SENT = {"X-Billingd": "1", "Content-Type": "application/json"}


def application() -> web.Application:
    async def done(_: web.Request) -> web.Response:
        return web.json_response({"done": True})

    made = web.Application(middlewares=[guard])
    made.on_response_prepare.append(protect)
    made.router.add_routes([web.get("/", done), web.post("/act", done)])
    return made


@pytest.fixture
async def client() -> AsyncIterator[TestClient[Any, Any]]:
    async with TestClient(TestServer(application())) as made:
        yield made


async def status(client: TestClient[Any, Any], method: str, **headers: str) -> int:
    path, sent = ("/act", SENT) if method == "POST" else ("/", {})
    data = b"{}" if method == "POST" else None
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.request(method, path, data=data, headers=sent | named) as answer:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
        return answer.status


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1:8081",
            "127.0.0.1",
            "localhost:9",
            "LOCALHOST",
            "localhost.:8081",
            "[::1]:8081",
            "[::1]",
        ),
        *("127.9.9.9:1",),
    ],
)
async def test_every_name_of_this_machine_is_answered(
    client: TestClient[Any, Any], method: str, host: str
) -> None:
    """With any port: a tunnel has its own."""
    assert await status(client, method, Host=host) == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8081", "127.0.0.1.evil.example:8081", "localhost.evil.example"),
        *("10.0.0.1:8081", "0.0.0.0:8081", "[::]:8081", "evil.example:x", "[::1", ":8081", "a@127.0.0.1:1"),
    ],
)
async def test_a_name_that_was_pointed_here_is_not(
    client: TestClient[Any, Any], method: str, host: str
) -> None:
    """DNS rebinding: to the browser it is the same origin, so only the name tells."""
    assert await status(client, method, Host=host, Sec_Fetch_Site="same-origin") == 421


@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("GET", {}, 200),
        ("POST", {}, 200),
        ("GET", {"Sec_Fetch_Site": "none"}, 200),
        ("POST", {"Sec_Fetch_Site": "same-origin", "Origin": "http://localhost:1"}, 200),
        ("POST", {"Origin": "http://localhost:1"}, 200),
        ("POST", {"Origin": "http://localhost:2"}, 403),
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("POST", {"Sec_Fetch_Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ("POST", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
        ("GET", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("GET", {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ("GET", {"Sec_Fetch_Site": "x"}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
    ],
)
async def test_other_origins_are_refused(
    client: TestClient[Any, Any], method: str, headers: dict[str, str], expected: int
) -> None:
    """Another port of this machine is another origin, too."""
    assert await status(client, method, Host="localhost:1", **headers) == expected


@pytest.mark.parametrize(("into", "expected"), [("document", 200), ("iframe", 403), ("object", 403)])
async def test_a_link_from_elsewhere_opens_the_page_and_a_frame_does_not(
    client: TestClient[Any, Any], into: str, expected: int
) -> None:
    """A person who clicks a link in a wiki means to look."""
    fetched = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": into}
    assert await status(client, "GET", **fetched) == expected


async def test_a_refusal_says_what_to_do(client: TestClient[Any, Any]) -> None:
    """As JSON, and without the name that was asked for."""
    async with client.get("/", headers={"Host": "evil.example"}) as answer:
        error = json.loads(await answer.text())["error"]
        assert error["code"] == "misdirected"
        assert "must set Host" in error["message"]
        assert "evil" not in await answer.text()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_name_that_was_pointed_at_a_tunnel_to_the_unix_socket_is_refused_too(
    store: Store, tmp_path: Path
) -> None:
    """`ssh -L 8081:/run/billingd/admin.sock` opens it to a browser, and plain http has no Sec-Fetch-Site."""
    behind = page_bench.behind(store)
    [letter] = await page_bench.dead(store, Action("report_usage", "u", "k"), error="no", at=page_bench.NOW)
    runner = web.AppRunner(behind.listener().application())
    await runner.setup()
    await web.UnixSite(runner, tmp_path / "admin.sock").start()
    evil = {"Host": "evil.example:8081"}
    posted = SENT | {"Origin": "http://evil.example:8081"}
    connector = aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
    async with aiohttp.ClientSession("http://localhost", connector=connector) as session:

        async def answered(method: str, path: str, **headers: str) -> int:
            data = b'{"reason": "x"}' if method == "POST" else None
            async with session.request(method, path, data=data, headers=headers) as answer:
                return answer.status

        discard = f"/outbox/{letter}/discard"
        assert await answered("GET", "/outbox", **evil) == 421
        assert await answered("POST", discard, **posted | evil) == 421
        assert await answered("POST", discard, **posted | {"Host": "billingd"}) == 421
        async with store.read() as tx:
            assert [row["state"] for row in await outbox.select(tx, states=["dead"])] == ["dead"]
        assert await answered("GET", "/", Host="127.0.0.1:8081") == 200
        assert await answered("POST", discard, **{"Content-Type": "application/json"}) == 403
        assert await answered("POST", discard, **SENT) == 200
    await runner.cleanup()
