"""`held write-off`, and what `held list` adds up: the same over the daemon and on the store itself."""

from pathlib import Path

import pytest
from cli_bench import Bench, document
from manual_clock import START

from billingd.cli import output
from billingd.domain.attempts import Action
from billingd.store import held, usage
from billingd.store.engine import Store
from billingd.store.held import Hold

OVER = pytest.mark.parametrize("over", ["tcp", "unix", "store"])


@pytest.fixture
async def bench(tmp_path: Path, sqlite_template: Path) -> Bench:
    made = Bench(tmp_path)
    await made.fill(sqlite_template)
    return made


async def hold(bench: Bench, *items: Hold) -> None:
    async with Store(bench.url) as store, store.write() as tx:
        for item in items:
            await held.add(tx, item, now=START)


@OVER
async def test_held_usage_is_written_off_with_a_reason(over: str, bench: Bench) -> None:
    """Once; the reason is kept with the item, and the record is never sent."""
    async with bench.reached(over):
        written_off = document(await bench.ask("held", "write-off", "1", "--reason", "tiny", "--json"))
        left = document(await bench.ask("held", "list", "--json"))
        again = await bench.ask("held", "write-off", "1", "--reason", "tiny")
        told = document(await bench.ask("status", "--json"))
    assert written_off == {"written_off": 1}
    assert left == {"held": []}
    assert (again.exit_code, again.stdout) == (1, "")
    assert "there is no held item 1" in again.stderr
    assert told["traffic"]["written_off_units"] == 12
    async with Store(bench.url) as store, store.read() as tx:
        item = await held.find(tx, 1)
        assert item is not None
        assert item["resolution"] == "written off: tiny"
        assert (await usage.find(tx, 2)).state == "written_off"


@OVER
async def test_what_can_be_mended_is_declined_with_what_to_do(over: str, bench: Bench) -> None:
    await hold(bench, Hold("plan_differs", "plan:p", "why", Action("provision_plan", "plan:p", "", {})))
    async with bench.reached(over):
        result = await bench.ask("held", "write-off", "2", "--reason", "no more")
        left = document(await bench.ask("held", "list", "--json"))["held"]
    assert (result.exit_code, result.stdout) == (1, "")
    assert "`billingd held release 2`" in result.stderr
    assert [item["id"] for item in left] == [1, 2]


async def test_a_person_gets_the_sum_a_pipe_does_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of all that is held, money by currency, to the last digit."""
    at_stake = [("0.1", "USD"), ("0.20", "EUR"), ("100.0000001", "USD"), (None, None)]
    items = [
        Hold("late_usage", f"usage:{number}", "late", None, "sub-1", "q", 5, amount, currency)
        for number, (amount, currency) in enumerate(at_stake)
    ]
    await hold(bench, *items, Hold("plan_differs", "plan:p", "why"))
    piped = await bench.ask("held", "list")
    assert len(piped.stdout.splitlines()) == 1 + 6
    assert "at stake" not in piped.stdout
    monkeypatch.setattr(output, "terminal", lambda: True)
    shown = await bench.ask("held", "list")
    total = "6 item(s), 32 unit(s); at stake: 0.2 EUR, 101.3000001 USD"
    assert shown.stdout.splitlines()[-1] == total


async def test_nothing_held_is_nothing_at_stake(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.ask("held", "release", "1")
    monkeypatch.setattr(output, "terminal", lambda: True)
    shown = await bench.ask("held", "list")
    assert shown.stdout.splitlines()[-1] == "0 item(s), 0 unit(s); at stake: no amount known"
