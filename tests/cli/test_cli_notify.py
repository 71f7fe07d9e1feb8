"""`notify test`: every channel, and no URL in what is said of them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestServer
from cli_bench import Bench, document


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
        "notifications.provider[0] (json): sent",
        "notifications.provider[1] (json): sent",
        "notifications.subscriber: sent",
    ]
    assert "hidden" not in result.output


async def test_a_channel_that_fails_is_named_and_is_4(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with far([]) as url:
        bench.configure("127.0.0.1:1", f'[notifications]\nprovider = ["{url}/a", "{url}/broken-hidden"]\n')
        result = await bench.ask("notify", "test")
        told = await bench.ask("notify", "test", "--json")
    assert result.exit_code == told.exit_code == 4
    assert result.stdout.splitlines() == [
        "notifications.provider[0] (json): sent",
        "notifications.provider[1] (json): did not take the message (HTTP 500)",
    ]
    assert [one["sent"] for one in json.loads(told.stdout)["channels"]] == [True, False]
    assert "hidden" not in result.output + told.output


def test_nobody_to_tell_is_a_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run("notify", "test").exit_code == 2
    bench.configure("127.0.0.1:1", '[notifications]\nprovider = ["json://127.0.0.1:1"]\n')
    assert bench.run("notify", "test", "--email", "ann@example.com").exit_code == 2


def test_templates_that_cannot_be_written_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = Bench(tmp_path).run("notify", "templates", "--write", str(tmp_path / "file" / "own"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: cannot write {tmp_path / 'file' / 'own'}: Not a directory; name")


def test_a_template_that_cannot_be_used_is_a_fault(tmp_path: Path) -> None:
    """Each with its file and why; what is sound is listed as in use."""
    bench = Bench(tmp_path)
    own = tmp_path / "own"
    bench.configure("127.0.0.1:1", f'[notifications]\ntemplates = "{own}"\n')
    assert f": notifications.templates: {own} cannot be read" in bench.run("check-config").stderr
    written = bench.run("notify", "templates", "--write", str(own))
    assert written.exit_code == 0
    assert bench.run("check-config").exit_code == 0
    (own / "held.txt").write_text("Look: {{ title }}\n{{ body }}")
    (own / "digest.txt").write_text("{{ nothing_such }}")
    (own / "far_side_begun.txt").write_text("{% if %}")
    (own / "sheld.txt").write_text("x")
    result = bench.run("check-config")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split(": ")[2].rpartition("/")[2] for line in lines] == [
        "digest.txt",
        "far_side_begun.txt",
        "sheld.txt",
    ]
    assert "it may use notices" in lines[0]
    assert "line 1" in lines[1]
    topics = {row["topic"]: row for row in document(bench.run("notify", "templates", "--json"))["templates"]}
    assert topics["held"]["from"] == str(own / "held.txt")
    assert topics["drift"]["from"] == "packaged (notice)"
