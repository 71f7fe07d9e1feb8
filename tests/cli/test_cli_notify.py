"""`notify test`: every channel, and no URL in what is said of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestServer
from cli_bench import Bench


@asynccontextmanager
async def far(taken: list[str]) -> AsyncIterator[str]:
    """A server that takes JSON posts, all but those to /broken; yields the start of its Apprise URL."""

    async def take(request: web.Request) -> web.Response:
        taken.append(request.path)
        return web.Response(status=500 if request.path == "/broken-hidden" else 200)

    application = web.Application()
    application.router.add_post("/{path:.*}", take)
    async with TestServer(application) as server:
        yield f"json://hidden:hidden@127.0.0.1:{server.port}"


async def test_each_channel_gets_one_message(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    taken: list[str] = []
    async with far(taken) as url:
        bench.configure(
            "127.0.0.1:1",
            f'[notifications]\nprovider = ["{url}/a-hidden", "{url}/b-hidden"]\n'
            f'subscriber = "{url}/c/{{email}}"\n',
        )
        without = await bench.ask("notify", "test")
        result = await bench.ask("notify", "test", "--email", "ann@example.com")
    assert sorted(taken[:2]) == ["/a-hidden", "/b-hidden"]
    assert "not tried; name an address with --email" in without.stderr
    assert len(taken) == 5
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "notifications.provider[0]: sent",
        "notifications.provider[1]: sent",
        "notifications.subscriber: sent to ann@example.com",
    ]
    assert "hidden" not in result.output


async def test_a_channel_that_fails_is_named_and_is_1(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with far([]) as url:
        bench.configure("127.0.0.1:1", f'[notifications]\nprovider = ["{url}/a", "{url}/broken-hidden"]\n')
        result = await bench.ask("notify", "test")
    assert result.exit_code == 1
    assert "notifications.provider[1]" in result.stderr
    assert "hidden" not in result.output


def test_nobody_to_tell_is_a_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run("notify", "test").exit_code == 2
    bench.configure("127.0.0.1:1", '[notifications]\nprovider = ["json://127.0.0.1:1"]\n')
    assert bench.run("notify", "test", "--email", "ann@example.com").exit_code == 2
