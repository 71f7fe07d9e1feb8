"""A daemon that takes connections and answers nothing, or nothing any more: stopped, say."""

import asyncio
import os
from pathlib import Path

import pytest
from aiohttp import web
from cli_bench import DEAD, Bench

from billingd.cli import reach, talk
from billingd.cli.output import Unreachable
from billingd.settings import load
from billingd.store.engine import Store, StoreUnavailable
from billingd.store.holder import LOCKS

SINCE = ("--since", "2026-03-01T00:00:00Z")
READING = {
    "/traffic/poll": ("traffic", "poll"),
    "/traffic/backfill": ("traffic", "backfill", *SINCE, "--until", "2026-03-02T00:00:00Z"),
    "/resync": ("resync",),
    "/adopt": ("adopt", *SINCE),
}
CHANGING = (
    ("outbox", "replay"),
    ("outbox", "retry", str(DEAD)),
    ("outbox", "discard", str(DEAD), "--reason", "x"),
    ("held", "release", "1"),
    ("reconcile",),
)


@pytest.fixture
async def bench(tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    await made.fill(sqlite_template)
    monkeypatch.setattr(talk, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(talk, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(talk, "HANG_SECONDS", 0.05)
    return made


def hanging(answers: int = 0) -> web.Application:
    """Says so often that it is well, and then nothing."""
    left = answers

    async def answer(request: web.Request) -> web.Response:
        nonlocal left
        if request.path == "/healthz" and left:
            left -= 1
            return web.json_response({"stuck": []})
        await asyncio.sleep(3_600)
        raise AssertionError

    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", answer)
    return application


@pytest.mark.parametrize("answers", [0, 2])
async def test_a_read_does_not_wait_for_a_daemon_that_hangs(answers: int, bench: Bench) -> None:
    """Nor does it when the daemon was well at first; with the store's lock held nothing is done beside it."""
    async with Store(bench.url) as store:
        store.lock()
        for words in READING.values():
            async with bench.listening(hanging(answers), "unix"):
                result = await bench.ask(*words)
            assert result.exit_code == 5, words
            assert "it hangs; `systemctl restart billingd`" in result.stderr
            assert "admin.listen" not in result.stderr


async def test_a_read_waits_for_a_daemon_that_is_well(bench: Bench) -> None:
    """Far longer than for an answer at once."""

    async def slow(_request: web.Request) -> web.Response:
        await asyncio.sleep(4 * talk.ANSWER_SECONDS)
        return web.json_response({"polled": True})

    async def well(_request: web.Request) -> web.Response:
        return web.json_response({"stuck": []})

    application = web.Application()
    application.router.add_post("/traffic/poll", slow)
    application.router.add_get("/healthz", well)
    async with bench.listening(application, "unix"):
        result = await bench.ask("traffic", "poll")
    assert (result.exit_code, result.stderr) == (0, "")


async def test_what_changes_something_names_what_ends_the_hang(bench: Bench) -> None:
    before = await bench.states()
    async with Store(bench.url) as store, bench.listening(hanging(), "unix"):
        store.lock()
        for words in CHANGING:
            result = await bench.ask(*words)
            assert result.exit_code == 5, words
            assert "it hangs; `systemctl restart billingd`" in result.stderr
            assert "`billingd doctor --only daemon`" in result.stderr
    assert await bench.states() == before


async def test_nothing_is_done_beside_a_hanging_daemon_on_a_database_without_a_lock(bench: Bench) -> None:
    env = {"BILLINGD_STORE__URL": "postgresql+asyncpg://billingd@127.0.0.1:1/ledger"}
    async with bench.listening(hanging(), "unix"):
        result = await asyncio.to_thread(bench.run, "traffic", "poll", env=env)
    assert result.exit_code == 4
    assert "it hangs; `systemctl restart billingd`" in result.stderr


async def test_what_is_read_beside_a_hanging_daemon_says_so(bench: Bench) -> None:
    async with Store(bench.url) as store, bench.listening(hanging(), "unix"):
        open_ = await bench.ask("status")
        store.lock()
        held = await bench.ask("outbox", "list")
    assert (open_.exit_code, held.exit_code) == (0, 0)
    assert "it hangs; `systemctl restart billingd`" in open_.stderr
    if LOCKS.exists():
        assert f"process {os.getpid()} holds the store; `systemctl restart billingd`" in held.stderr


async def test_a_locked_store_is_no_daemon_that_was_not_started(bench: Bench) -> None:
    """Starting one, or another configuration, would not help."""

    async def locked(_store: Store) -> None:
        raise StoreUnavailable("the store is not available: database is locked")

    async def nobody(_daemon: talk.Daemon) -> None:
        raise talk.DaemonAway("the daemon does not answer")

    settings = load(bench.config, {}).settings
    for whole in (reach.ask_or_read, reach.ask_or_change):
        with pytest.raises(Unreachable, match=r"locked; `billingd doctor --only store` tells more$"):
            await whole(settings, nobody, locked, quiet=True)


async def test_a_store_without_its_directory_says_so_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    env = {"BILLINGD_STORE__URL": f"sqlite+aiosqlite:///{tmp_path}/no/b.db"}
    shown = await asyncio.to_thread(bench.run, "status", env=env)
    assert (shown.exit_code, f"there is no directory {tmp_path}/no" in shown.stderr) == (4, True)
    async with Store(f"sqlite+aiosqlite:///{tmp_path}/no/b.db") as store:
        with pytest.raises(StoreUnavailable, match=f"there is no directory {tmp_path}/no; make it first"):
            store.lock()
