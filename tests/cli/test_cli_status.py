"""`status`: of the daemon, of the store without it, of neither."""

import sqlite3
from pathlib import Path

import pytest
from aiohttp import web
from cli_bench import Bench, document

from billingd.cli.output import plain


@pytest.mark.parametrize("over", ["tcp", "unix"])
async def test_the_daemon_tells(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    """Its own counts are in the document, and nobody is told that it was read from the store."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        told = document(await bench.ask("status", "--json"))
        shown = await bench.ask("status")
    assert told["daemon"] is True
    assert told["ready"] is True
    assert told["webhooks"] == {"accepted": 0, "duplicates": 1, "rejected": 2}
    assert told["outbox"]["dead"] == 2
    assert shown.stderr == ""
    assert "1 pending, 0 leased, 2 dead, 1 done" in shown.stdout
    assert "read up to 2026-03-02T12:00:00Z, 3:00:00 ago" in shown.stdout


async def test_without_a_daemon_the_store_is_read(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    told = document(await bench.ask("status", "--json"))
    shown = await bench.ask("status")
    assert told["daemon"] is False
    assert told["ready"] is False
    assert told["reasons"] == ["the daemon does not answer; read from the store"]
    assert told["links"] == {"plans": 1, "subscriptions": 1}
    assert shown.exit_code == 0
    assert shown.stderr == "the daemon does not answer; read from the store\n"
    assert "held      1 items: 0 plans, 0 subscriptions, 12 units" in shown.stdout


def test_with_neither_it_says_what_to_do_and_makes_no_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for words in (("status",), ("outbox", "list"), ("held", "release", "1"), ("traffic", "windows")):
        result = bench.run(*words)
        assert result.exit_code == 4
        assert result.stdout == ""
        assert f"there is no store at {bench.path}" in result.stderr
        assert "`billingd run`" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [bench.config.name]


async def test_check_is_3_while_something_waits_for_a_person(tmp_path: Path, sqlite_template: Path) -> None:
    """Dead letters, then only a held item, then nothing."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    found = await bench.ask("status", "--check", "--json")
    assert (found.exit_code, document(found)["outbox"]["dead"]) == (3, 2)
    await bench.ask("outbox", "replay")
    assert (await bench.ask("status", "--check")).exit_code == 3
    await bench.ask("held", "release", "1")
    assert (await bench.ask("status", "--check")).exit_code == 0
    assert (await bench.ask("status")).exit_code == 0


async def test_an_older_schema_is_1_and_a_newer_one_5(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    sqlite3.connect(bench.path).close()
    older = await bench.ask("status")
    assert older.exit_code == 1
    assert "run `billingd db upgrade`" in older.stderr
    await bench.fill(sqlite_template)
    connection = sqlite3.connect(bench.path)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    newer = await bench.ask("outbox", "list")
    assert newer.exit_code == 5
    assert "newer than this program" in newer.stderr


def test_a_file_that_is_no_store_leaves_no_traceback(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.path.write_bytes(b"not a database at all" * 100)
    result = bench.run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the store ")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("status", "body"), [(200, '{"status": "UP"}'), (404, "<html>"), (302, ""), (200, "[]"), (500, "{}")]
)
async def test_another_program_at_that_address_is_no_daemon(
    status: int, body: str, tmp_path: Path, sqlite_template: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"Location": "/"})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    async with bench.listening(application, "tcp"):
        assert document(await bench.ask("status", "--json"))["daemon"] is False


def test_nothing_printed_steers_the_terminal() -> None:
    assert plain("a\x1b[31mb\x07c\u202e\nd\u00e9") == "a\\x1b[31mb\\x07c\\u202e\nd\u00e9"
