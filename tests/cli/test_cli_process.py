"""The program as a process: its outputs, its exit codes, its signals."""

import asyncio
import os
import re
import signal
import sys
import tomllib
from pathlib import Path

import aiohttp
from aiohttp import web
from cli_bench import Bench

from billingd.store.engine import Store


async def start(
    bench: Bench, *words: str, stdout: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    env = {**os.environ, **bench.environment()}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "billingd", "--config", str(bench.config), *words),
        env={name: value for name, value in env.items() if value is not None},
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    out, err = await process.communicate()
    return process.returncode, (out or b"").decode(), err.decode()


async def test_the_document_stands_alone_on_standard_output(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    code, out, err = await ended(await start(bench, "status", "--check", "--json"))
    assert code == 3
    assert out.startswith('{\n  "daemon": false,')
    assert err == ""


async def test_a_reader_that_left_is_no_traceback(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    for words in (("outbox", "list"), ("config", "show", "--json"), ("--help",)):
        there, here = os.pipe()
        os.close(there)
        process = await start(bench, *words, stdout=here)
        os.close(here)
        code, _, err = await ended(process)
        assert code == 1
        assert "Traceback" not in err
        assert "Broken" not in err


async def test_ctrl_c_is_130(tmp_path: Path) -> None:
    """Also while it waits for the daemon."""
    bench = Bench(tmp_path)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def poll(_: web.Request) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response()

    async def well(_: web.Request) -> web.Response:
        return web.json_response({"stuck": []})

    application = web.Application()
    application.router.add_post("/traffic/poll", poll)
    application.router.add_get("/healthz", well)
    async with bench.listening(application, "unix"):
        process = await start(bench, "traffic", "poll")
        await asked.wait()
        process.send_signal(signal.SIGINT)
        code, out, err = await ended(process)
        go_on.set()
    assert (code, out, err) == (130, "", "interrupted\n")


async def test_run_of_a_held_store_is_5(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with Store(bench.url) as store:
        store.lock()
        code, out, err = await ended(await start(bench, "run"))
    assert (code, out) == (5, "")
    assert re.search("is held by (another process|process [0-9]+) ", err)
    assert "`systemctl stop billingd.socket billingd`" in err
    assert "Traceback" not in err


async def test_the_sandbox_prints_the_configuration_for_billingd(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    process = await start(bench, "sandbox", "--listen", "127.0.0.1:0")
    assert process.stdout is not None
    lines: list[bytes] = []
    while not (lines and lines[-1].startswith(b"# export BILLINGD_WEBHOOKS__SECRET")):
        lines.append(await process.stdout.readline())
        assert lines[-1], lines
    base = tomllib.loads(b"".join(lines).decode())["recurly"]["base_url"]
    async with aiohttp.ClientSession() as session, session.post(f"{base}/control/shutdown") as answer:
        assert answer.status < 300
    code, _, err = await ended(process)
    assert code == 0, err


async def test_the_sandbox_says_when_its_port_is_taken(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.listening(web.Application(), "tcp"):
        listen = tomllib.loads(bench.config.read_text())["admin"]["listen"]
        code, _, err = await ended(await start(bench, "sandbox", "--listen", listen))
    assert code == 1
    assert err.startswith(f"Error: cannot listen on {listen}: ")
