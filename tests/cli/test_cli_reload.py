"""`reload`: what the daemon took over, what waits, and what is wrong, in words and as JSON."""

import json
from pathlib import Path

import pytest
from cli_bench import Bench, document


@pytest.fixture
async def bench(tmp_path: Path, sqlite_template: Path) -> Bench:
    made = Bench(tmp_path)
    await made.fill(sqlite_template)
    return made


async def test_what_waits_for_a_restart_is_no_reload(bench: Bench) -> None:
    """And what was neither is nothing."""
    async with bench.reached("unix"):
        same = await bench.ask("reload")
        bench.configure(f"unix:{bench.socket}", '[accounts]\nmissing = "create"\n')
        waits = await bench.ask("reload")
        told = document(await bench.ask("reload", "--json"))
    assert (same.stdout, same.stderr) == ("reloaded: nothing had changed\n", "")
    assert "nothing had changed" not in waits.stdout
    assert waits.stderr == "waiting for a restart: accounts.missing (`systemctl restart billingd`)\n"
    assert told == {"reloaded": [], "restart": ["accounts.missing"], "faults": []}


async def test_a_fault_is_told_with_its_line_in_words_and_as_json(bench: Bench) -> None:
    async with bench.reached("unix"):
        bench.configure(f"unix:{bench.socket}", "[outbx]\nworkers = 3\n")
        words = await bench.ask("reload")
        said = await bench.ask("reload", "--json")
    assert (words.exit_code, said.exit_code) == (2, 2)
    assert f"{bench.config}:8: outbx: is not a known key" in words.stderr
    assert json.loads(said.stdout)["faults"] == [
        {
            "key": "outbx",
            "message": "is not a known key; did you mean outbox?",
            "place": f"{bench.config}:8",
        }
    ]


async def test_without_a_daemon_it_says_what_starts_one(bench: Bench) -> None:
    result = await bench.ask("reload")
    assert result.exit_code == 4
    assert "`billingd run` or `systemctl start billingd` starts it" in result.stderr
