"""`reconcile`: a table for people, the contract's document for programs, 3 while anything is left."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_bench import Bench, document

from billingd.domain.errors import NotFound

RANGE = ("--since", "2026-11-22T10:00:00+02:00", "--until", "2026-11-23T00:00:00Z")


@pytest.mark.parametrize("over", ["tcp", "unix"])
async def test_drift_is_shown_and_exits_with_3(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    """Beside the daemon, which takes the run; the command looks on until it is over."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        shown = await bench.ask("reconcile", *RANGE, "--subscription", "s1")
        told = await bench.ask("reconcile", "--json")
    assert bench.reconciler.asked == [
        {
            "since": datetime(2026, 11, 22, 8, tzinfo=UTC),
            "until": datetime(2026, 11, 23, tzinfo=UTC),
            "subscription": "s1",
            "repair": False,
        },
        {"since": None, "until": None, "subscription": None, "repair": False},
    ]
    assert (shown.exit_code, told.exit_code) == (3, 3)
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["KIND", "SUBSCRIPTION", "ADD-ON", "WINDOW", "UNITS", "MENDS", "CAUSE", "FIX"]
    assert lines[1].split()[:6] == [
        "missing_record",
        "Acme",
        "amplify-quota-q1",
        "2026-11-22T10:00:00Z",
        "7",
        "yes",
    ]
    assert lines[2].startswith("1 difference(s), 7 unit(s), in 5 subscription(s), 812 record(s)")
    assert "--repair" in lines[-1]
    found = document(told)
    assert (found["drift_units"], found["checked"]) == (7, {"subscriptions": 5, "records": 812})
    assert found["drift"][0]["kind"] == "missing_record"


async def test_what_is_mended_is_not_left(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached("unix"):
        result = await bench.ask("reconcile", "--repair")
    assert result.exit_code == 0, result.stderr
    assert bench.reconciler.asked[0]["repair"] is True
    assert "7 unit(s) were given to the outbox to mend; 0 difference(s) are left" in result.stdout
    assert "posted again" in result.stdout


async def test_nothing_differs(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.found = []
    async with bench.reached("unix"):
        result = await bench.ask("reconcile")
    assert result.exit_code == 0
    assert result.stdout.startswith("no drift: 5 subscription(s), 812 record(s) agree")


async def test_what_is_still_on_its_way_does_not_agree_yet(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.found, bench.reconciler.under_way = [], 42
    async with bench.reached("unix"):
        shown = await bench.ask("reconcile")
        told = await bench.ask("reconcile", "--json")
    assert (shown.exit_code, document(told)["under_way_units"]) == (0, 42)
    first, second = shown.stdout.splitlines()[:2]
    assert first.startswith("no drift: 5 subscription(s), 812 record(s) were compared")
    assert second.startswith("42 unit(s) are still on their way to Recurly")


async def test_a_run_that_failed_says_why(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.error = "Amplify's Quota is unreadable"
    async with bench.reached("unix"):
        result = await bench.ask("reconcile")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Quota is unreadable" in result.stderr


async def test_what_is_not_compared_is_said_and_exits_with_3_when_it_was_asked_for(
    tmp_path: Path, sqlite_template: Path
) -> None:
    """Not every day for what nobody asked about; but always where one could not be read."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.found = []
    told = {"since": "2026-11-22T00:00:00Z", "until": "2026-11-22T12:00:00Z", "reason": "too old"}
    bench.reconciler.not_compared = [told | {"subscription": None}]
    async with bench.reached("unix"):
        by_itself = await bench.ask("reconcile")
        asked = await bench.ask("reconcile", *RANGE)
        bench.reconciler.not_compared = [told | {"subscription": "s1"}]
        unread = await bench.ask("reconcile")
    assert (by_itself.exit_code, asked.exit_code, unread.exit_code) == (0, 3, 3)
    assert "not compared: 2026-11-22T00:00:00Z to 2026-11-22T12:00:00Z: too old" in by_itself.stdout
    assert "not compared of s1" in unread.stdout


async def test_a_run_that_stands_still_is_left_to_the_daemon(
    tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what holds it up."""
    module = sys.modules["billingd.cli.reconcile"]  # the package has the command under that name
    monkeypatch.setattr(module, "PATIENCE", timedelta(0))
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.held_up = "Recurly is away"
    async with bench.reached("unix"):
        result = await bench.ask("reconcile")
    assert result.exit_code == 4, result.stderr
    assert "Recurly is away" in result.stderr
    assert "goes on" in result.stderr


async def test_a_subscription_that_is_not_linked_is_no_success(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.reconciler.fault = NotFound("no subscription with the id nobody is linked")
    async with bench.reached("unix"):
        result = await bench.ask("reconcile", "--subscription", "nobody")
    assert result.exit_code == 1
    assert "nobody is linked" in result.stderr


async def test_without_the_daemon_a_far_side_that_is_away_is_4(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    nobody = 'central_url = "http://127.0.0.1:9"\nlogin_url = "http://127.0.0.1:9/auth"\n'
    bench.configure(f"unix:{bench.socket}", nobody + '[recurly]\nbase_url = "http://127.0.0.1:9"\n')
    result = await bench.ask("reconcile")
    assert result.exit_code == 4, result.stderr
    assert "goes on from here" in result.stderr


@pytest.mark.parametrize("words", [("--since", RANGE[3], "--until", RANGE[3]), ("--since", "yesterday")])
def test_a_range_that_makes_no_sense_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    assert Bench(tmp_path).run("reconcile", *words).exit_code == 2
