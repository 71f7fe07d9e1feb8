"""`status`: of the daemon, of the store without it, of neither."""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web
from cli_bench import Bench, document
from page_bench import reconciled

from billingd.cli.output import plain
from billingd.cli.status import COLUMNS, _row, lines
from billingd.domain.drift import Drift
from billingd.store import drift, schema
from billingd.store.engine import Store


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
    assert told["webhooks"] == {"accepted": 0, "duplicates": 1, "rejected": 2, "unauthorized": 0}
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
    assert "does not answer" not in shown.stdout, "it is told once"
    assert "held      1 item: 0 plans, 0 subscriptions, 12 units" in shown.stdout


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
    assert (await bench.ask("status", "--check")).exit_code == 4, "no daemon works on it"
    assert (await bench.ask("status")).exit_code == 0
    async with bench.reached("unix"):
        assert (await bench.ask("status", "--check")).exit_code == 0


@pytest.mark.parametrize("over", ["unix", "store"])
async def test_check_is_3_while_drift_stands(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    """Also where no unit differs, and when nobody knows, for the latest reconciliation failed."""
    bench = Bench(tmp_path)
    shutil.copy(sqlite_template, bench.path)
    async with Store(bench.url) as store:
        await reconciled(
            store, Drift("price_differs", "plan:p1", None, None, None, 0, "It differs.", "Mend it.")
        )
    async with bench.reached(over):
        assert (await bench.ask("status", "--check")).exit_code == 3
        async with Store(bench.url) as store, store.write() as tx:
            run = await drift.latest(tx)
            assert run is not None
            await drift.gone(tx, [one.id for one in await drift.of(tx, run.id)], "gone")
        assert (await bench.ask("status", "--check")).exit_code == (4 if over == "store" else 0)
        async with Store(bench.url) as store, store.write() as tx:
            await tx.execute(sa.update(schema.reconciliations).values(state="failed", error="404"))
        assert (await bench.ask("status", "--check")).exit_code == 3


@pytest.mark.parametrize("over", ["tcp", "unix", "store"])
async def test_each_subscription_says_whether_its_period_is_complete(
    over: str, tmp_path: Path, sqlite_template: Path
) -> None:
    """What the current invoice will have, and what missed the last one."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        told = document(await bench.ask("status", "--subscriptions", "--json"))
        shown = await bench.ask("status", "--subscriptions")
        without = document(await bench.ask("status", "--json"))
        checked = await bench.ask("status", "--subscriptions", "--check")
    [row] = told["subscriptions"]
    assert (row["subscription"], row["billed_state"]) == ("sub-1", "active")
    assert row["period"] == {
        "started_at": "2026-03-02T11:00:00Z",
        "ends_at": "9000-01-01T00:00:00Z",
        "trial": False,
        "recorded_units": 12,
        "reported_units": 0,
        "unreported_units": 0,
        "held_units": 12,
        "complete": False,
    }
    assert row["last_period"] == {
        "started_at": "2026-03-02T09:00:00Z",
        "ends_at": "2026-03-02T11:00:00Z",
        "trial": False,
        "units": 30,
        "corrected_units": 0,
        "missed_units": 30,
        "complete": False,
    }
    summary = {"open": 1, "incomplete": 1, "ends_next": "9000-01-01T00:00:00Z", "missed_units": 30}
    assert told["periods"] == without["periods"] == summary
    assert "subscriptions" not in without
    [line] = [line for line in shown.stdout.splitlines() if line.startswith("periods")]
    assert line == (
        "periods   1 open, 1 of them not complete, the next ends 9000-01-01T00:00:00Z; "
        "30 units missed the last invoice"
    )
    [*_, titles, values] = shown.stdout.splitlines()
    assert titles.split()[:3] == ["SUBSCRIPTION", "NAME", "STATE"]
    assert values.split() == [
        *("sub-1", "sub", "active", "9000-01-01T00:00:00Z", "12", "0", "0", "12", "no"),
        *("2026-03-02T11:00:00Z", "30", "0", "30"),
    ]
    assert checked.exit_code == 3


@pytest.mark.parametrize(
    ("period", "last", "shown"),
    [
        (None, None, ["-"] * 10),
        ({"trial": True, "complete": True, "ends_at": "E"}, None, ["E (trial)", *"----", "yes", *"----"]),
        ({"trial": False, "complete": False, "ends_at": "E"}, None, ["E", *"----", "no", *"----"]),
    ],
)
def test_a_period_that_is_not_known_is_left_open(period: Any, last: Any, shown: list[str]) -> None:
    row = {"subscription": "s", "name": "n", "state": "active", "period": period, "last_period": last}
    assert ["-" if cell is None else cell for cell in _row(row)] == ["s", "n", "active", *shown]
    assert len(COLUMNS) == 3 + len(shown)


def test_an_older_daemon_says_nothing_of_periods() -> None:
    """As while the program is being replaced under it: what it does say is shown."""
    told = {
        "version": "0.0.9",
        "ready": True,
        "reasons": [],
        "webhooks": {"accepted": 0, "duplicates": 0, "rejected": 0},
        "outbox": {"pending": 0, "leased": 0, "dead": 0, "done": 0, "oldest_pending_seconds": None},
        "traffic": {
            "watermark": None,
            "lag_seconds": None,
            "recorded_units": 7,
            "reported_units": 7,
            "unreported_units": 0,
            "unknown_outcomes": 0,
        },
        "held": {"plans": 0, "subscriptions": 0, "units": 0},
        "links": {"plans": 0, "subscriptions": 0},
    }
    written = lines(told)
    assert any(line.startswith("usage     7 units recorded, 7 reported") for line in written)
    assert not any(line.startswith("periods") for line in written)


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
