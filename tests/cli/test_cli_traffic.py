"""`traffic`: strict times, and what needs the daemon."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_bench import HOUR, Bench, document
from manual_clock import START

from billingd.domain.errors import Misconfigured, Retryable
from billingd.domain.usage import book
from billingd.domain.windows import Window
from billingd.store import marks, usage
from billingd.store.engine import Store

RANGE = ("--since", "2026-11-22T10:00:00+02:00", "--until", "2026-11-23T00:00:00Z")


@pytest.mark.parametrize(
    "time",
    [
        "2026-11-22",
        "2026-11-22T10:00:00",
        "2026-11-22 10:00:00Z",
        "2026-11-22T10:00Z",
        "20261122T100000Z",
        "2026-11-22T10:00:00+0200",
        "2026-11-31T10:00:00Z",
        "2026-11-22T25:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "\u0662026-11-22T10:00:00Z",
        "yesterday",
    ],
)
def test_a_time_that_is_not_rfc_3339_is_refused(time: str, tmp_path: Path) -> None:
    result = Bench(tmp_path).run("traffic", "backfill", "--since", time, "--until", "2026-12-01T00:00:00Z")
    assert result.exit_code == 2
    assert "'--since'" in result.stderr


def test_a_range_that_ends_before_it_begins_is_refused(tmp_path: Path) -> None:
    result = Bench(tmp_path).run("traffic", "backfill", "--since", RANGE[3], "--until", RANGE[3])
    assert result.exit_code == 2


async def test_after_a_restore_only_a_daemon_goes_on(tmp_path: Path, sqlite_template: Path) -> None:
    """To try again later would not help."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with Store(bench.url) as store, store.write() as tx:
        await marks.note(tx, marks.RESTORED, at=START, detail={"copied_at": None, "file": "copy.db"})
    result = await bench.ask("traffic", "poll")
    assert result.exit_code == 4
    assert "the daemon does that, and none runs; start it with `billingd run`" in result.stderr


@pytest.mark.parametrize(("words", "code"), [(("poll",), 4), (("backfill", *RANGE), 0)])
async def test_without_the_daemon_the_command_reads_itself(
    words: tuple[str, ...], code: int, tmp_path: Path, sqlite_template: Path
) -> None:
    """A far side that is away is 4; a range that was never read has nothing to book."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    nobody = 'central_url = "http://127.0.0.1:9"\nlogin_url = "http://127.0.0.1:9/auth"\n'
    bench.configure(f"unix:{bench.socket}", nobody)
    result = await bench.ask("traffic", *words)
    assert result.exit_code == code, result.stderr
    assert ("done on the store itself" in result.stderr) == (code == 0)
    assert "Traceback" not in result.stderr


async def test_a_subscription_that_is_not_linked_is_no_success(tmp_path: Path, sqlite_template: Path) -> None:
    """A slip in an id is said, not taken for nothing to book."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    result = await bench.ask("traffic", "backfill", *RANGE, "--subscription", "nobody")
    assert result.exit_code == 1
    assert "no linked subscription has the id, name or Recurly uuid nobody" in result.stderr


@pytest.mark.parametrize("over", ["tcp", "unix"])
async def test_the_daemon_reads(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        polled = document(await bench.ask("traffic", "poll", "--json"))
        booked = document(await bench.ask("traffic", "backfill", *RANGE, "--json"))
        shown = await bench.ask("traffic", "backfill", *RANGE, "--subscription", "sub-1")
    assert polled == {"polled": True}
    assert bench.poller.polls == 1
    assert booked == {"booked_units": 42}
    assert shown.stdout == "42 unit(s) booked\n"
    assert bench.poller.ranges[0] == (
        datetime(2026, 11, 22, 8, tzinfo=UTC),
        datetime(2026, 11, 23, tzinfo=UTC),
    )


async def test_a_far_side_that_is_away_is_4_in_its_own_words(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.poller.fault = Retryable("Amplify did not answer")
    async with bench.reached("unix"):
        result = await bench.ask("traffic", "poll")
    assert result.exit_code == 4
    assert result.stderr == "Error: Amplify did not answer\n"


async def test_a_far_side_that_refuses_us_is_1(tmp_path: Path, sqlite_template: Path) -> None:
    """It was reached; the same again would be refused again."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.poller.fault = Misconfigured("Amplify refuses the client secret")
    async with bench.reached("unix"):
        result = await bench.ask("traffic", "poll")
    assert (result.exit_code, result.stderr) == (1, "Error: Amplify refuses the client secret\n")


@pytest.mark.parametrize("over", ["unix", "store"])
async def test_windows_are_shown(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        found = document(await bench.ask("traffic", "windows", "--limit", "1", "--json"))
        shown = await bench.ask("traffic", "windows")
    assert found == {
        "source": "metrics",
        "watermark": "2026-03-02T12:00:00Z",
        "windows": [
            {
                "window_start": "2026-03-02T11:00:00Z",
                "window_end": "2026-03-02T12:00:00Z",
                "records": 1,
                "recorded_units": 12,
                "reported_units": 0,
            }
        ],
    }
    assert len(shown.stdout.splitlines()) == 4


@pytest.mark.parametrize("over", ["unix", "store"])
async def test_pieces_of_a_window_are_rows_of_their_own(
    over: str, tmp_path: Path, sqlite_template: Path
) -> None:
    """As a billing period cuts it: each with its units, none of them merged with a whole window."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    start, edge, end = (START + hours * HOUR for hours in (5, 5.25, 6))
    counts = {Window(start, edge): 3, Window(edge, end): 4}
    async with Store(bench.url) as store, store.write() as tx:
        await usage.insert(tx, list(book("sub-1", "q", counts, {}, before=end)), now=START)
    async with bench.reached(over):
        found = document(await bench.ask("traffic", "windows", "--limit", "3", "--json"))["windows"]
        shown = await bench.ask("traffic", "windows")
    assert [(row["window_start"], row["window_end"], row["recorded_units"]) for row in found] == [
        ("2026-03-02T15:15:00Z", "2026-03-02T16:00:00Z", 4),
        ("2026-03-02T15:00:00Z", "2026-03-02T15:15:00Z", 3),
        ("2026-03-02T11:00:00Z", "2026-03-02T12:00:00Z", 12),
    ]
    assert len(shown.stdout.splitlines()) == 2 + 4
