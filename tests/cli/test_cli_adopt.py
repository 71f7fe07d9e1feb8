"""`adopt`: the plan for people and programs, exit codes, and what needs no daemon."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_bench import Bench, document

from billingd.adoption import CannotAdopt
from billingd.domain.errors import Retryable

SINCE = ("--since", "2026-11-22T10:00:30+02:00")
AT = datetime(2026, 11, 22, 8, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize("since", ["2026-11-22", "2026-11-22T10:00:00", "2026-11-22T10:00:00.5Z", "now"])
def test_the_cut_over_is_a_whole_second_with_its_zone(since: str, tmp_path: Path) -> None:
    result = Bench(tmp_path).run("adopt", "--since", since)
    assert result.exit_code == 2
    assert "--since" in result.stderr
    assert Bench(tmp_path).run("adopt").exit_code == 2, "it is never guessed"


@pytest.mark.parametrize(
    ("ops", "dry", "code"),
    [
        ("+~!=", True, 3),
        ("+", True, 3),
        ("!", True, 3),
        ("=", True, 0),
        ("", True, 0),
        ("+~=", False, 0),
        ("!", False, 3),
        ("", False, 0),
    ],
)
async def test_3_says_that_there_is_something_to_do_or_to_look_at(
    ops: str, dry: bool, code: int, tmp_path: Path, sqlite_template: Path
) -> None:
    """A dry run also when all would go well; a real one only for a problem."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.adopter.ops = ops
    async with bench.reached("unix"):
        result = await bench.ask("adopt", *SINCE, *(["--dry-run"] if dry else []))
    assert result.exit_code == code, result.output
    assert bench.adopter.asked == [(AT, dry)]


async def test_each_finding_is_a_line_and_the_document_is_the_daemons(
    tmp_path: Path, sqlite_template: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached("tcp"):
        shown = await bench.ask("adopt", *SINCE)
        found = document(await bench.ask("adopt", *SINCE, "--json"))
    lines = shown.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["+", "plan"],
        ["~", "subscription"],
        ["!", "recurly"],
        ["=", "subscription"],
    ]
    assert lines[0].endswith("Title + (id-+)  because of +")
    assert "2 to adopt, 1 problem(s), 5 subscription(s) linked already" in shown.stdout
    assert "2 action(s) enqueued" in shown.stdout
    assert [step["op"] for step in found["steps"]] == ["+", "~", "!", "="]
    assert (found["to_do"], found["problems"]) == (2, 1)


@pytest.mark.parametrize(
    ("fault", "code"), [(Retryable("Amplify is away"), 4), (CannotAdopt("it is too early"), 1)]
)
async def test_what_the_daemon_says_is_said(
    fault: Exception, code: int, tmp_path: Path, sqlite_template: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.adopter.fault = fault
    async with bench.reached("unix"):
        result = await bench.ask("adopt", *SINCE)
    assert result.exit_code == code
    assert result.stderr == f"Error: {fault}\n"


async def test_without_the_daemon_the_command_asks_the_far_sides_itself(
    tmp_path: Path, sqlite_template: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    nobody = 'central_url = "http://127.0.0.1:9"\nlogin_url = "http://127.0.0.1:9/auth"\n'
    bench.configure(f"unix:{bench.socket}", nobody)
    result = await bench.ask("adopt", "--since", "2026-03-02T12:00:00Z", "--dry-run")
    assert result.exit_code == 4
    assert "Amplify gave no answer" in result.stderr
    assert "Traceback" not in result.stderr
