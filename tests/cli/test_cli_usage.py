"""How the program presents itself: help, version, wrong usage, and how quickly."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_bench import Bench
from click import termui
from click.testing import CliRunner

from billingd import __version__
from billingd.cli import Program, program


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", [(), *commands(program)], ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    """Each example is shown line by line, and names the command itself."""
    result = CliRunner().invoke(program, [*path, "--help"], prog_name="billingd")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    example = lines.index("  Example:")
    assert " ".join(("billingd", *path[:1])) in re.sub(r"--config \S+ ", "", lines[example + 1])


def test_the_commands_of_this_release_are_all_there_are() -> None:
    """A command that cannot do its work yet is not listed."""
    assert {" ".join(path) for path in commands(program)} == {
        *(
            "run",
            "demo",
            "sandbox",
            "check-config",
            "doctor",
            "completion",
            "man",
            "config",
            "config show",
            "reload",
            "status",
        ),
        *("outbox", "outbox list", "outbox show", "outbox retry", "outbox replay", "outbox discard"),
        *("traffic", "traffic poll", "traffic windows", "traffic backfill", "resync"),
        *("held", "held list", "held release", "held write-off", "notify", "notify test"),
        *("notify templates", "metrics", "metrics dashboard", "metrics alerts"),
        *("db", "db upgrade", "db current", "db check", "db backup", "db restore"),
        *("reconcile", "explain", "adopt", "hooks", "hooks show", "hooks apply", "hooks remove"),
    }


def test_the_version_is_one_line() -> None:
    result = CliRunner().invoke(program, ["--version"], prog_name="billingd")
    assert result.stdout == f"billingd {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["hooks"],
        ["outbox", "show"],
        ["outbox", "show", "seven"],
        ["outbox", "list", "--state", "lost"],
        ["outbox", "list", "--limit", "0"],
        ["outbox", "discard", "7"],
        ["outbox", "discard", "7", "--reason", "  "],
        ["outbox", "replay", "--state", "done"],
        ["held", "write-off", "1"],
        ["held", "write-off", "1", "--reason", "  "],
        ["held", "write-off", "--reason", "why"],
        ["demo", "--seconds", "0"],
        ["sandbox", "--listen", "0.0.0.0:8010"],
        ["demo", "--store", "nonsense"],
        ["traffic", "backfill", "--since", "2999-01-01T00:00:00Z", "--until", "2999-01-02T00:00:00Z"],
        ["reconcile", "--since", "2999-01-01T00:00:00Z"],
        ["sandbox", "--listen", "8010"],
        ["sandbox", "--webhook-url", "nonsense"],
        ["status", "more"],
    ],
)
def test_wrong_usage_is_2(words: list[str], tmp_path: Path) -> None:
    result = Bench(tmp_path).run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: billingd" in result.stderr


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (EOFError(), 1, "Aborted!"),
        ("n", 1, "Aborted!"),
        ("y", 0, "done"),
    ],
    ids=repr,
)
def test_a_prompt_tells_an_interrupt_from_a_no(
    typed: BaseException | str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(_prompt: str) -> str:
        if isinstance(typed, BaseException):
            raise typed
        return typed

    @click.command()
    def ask() -> None:
        click.confirm("Sure?", abort=True, err=True)
        click.echo("done")

    monkeypatch.setattr(termui, "visible_prompt_func", answer)
    with pytest.raises(SystemExit) as ended:
        Program(commands={"ask": ask}).main(["ask"])
    shown = capsys.readouterr()
    assert ended.value.code == code
    assert (shown.out + shown.err).splitlines()[-1] == said


@pytest.mark.parametrize("words", [("db", "current"), ("db", "backup", "x"), ("status",), ("run",)])
def test_a_database_that_is_away_is_4_and_the_line_names_it(words: tuple[str, ...], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    url = "postgresql+asyncpg://billingd:hidden-password@127.0.0.1:1/ledger"
    result = bench.run(*words, env={"BILLINGD_STORE__URL": url})
    assert result.exit_code == 4
    assert "store.url postgresql+asyncpg://billingd:***@127.0.0.1:1/ledger" in result.stderr
    assert result.stderr.endswith("; see that its server runs and lets us in\n")


def test_help_loads_nothing_heavy() -> None:
    """What takes its time to import waits for a command that needs it."""
    code = (
        "import sys; import billingd.cli; "
        "heavy = {'aiohttp', 'sqlalchemy', 'pydantic', 'alembic', 'apprise', 'rich', 'structlog'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_demo_hands_its_options_on_and_its_exit_code_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    class Stub:
        @staticmethod
        async def run_demo(**options: object) -> int:
            asked.update(options)
            return 3

    monkeypatch.setitem(sys.modules, "billingd.demo", Stub)
    result = Bench(tmp_path).run("demo", "--seconds", "5", "--json", "--store", "sqlite+aiosqlite:////tmp/x")
    assert result.exit_code == 3
    assert asked == {"seconds": 5, "as_json": True, "store_url": "sqlite+aiosqlite:////tmp/x"}
