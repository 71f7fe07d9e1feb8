"""The demo proves what it says, says no when the numbers differ, and leaves nothing behind."""

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from billingd.demo.marketplace import (
    BY_NAME,
    CORRECTED,
    CUT_SHORT,
    GRADUATED,
    LEAVING,
    LINKED,
    LOOSE,
    PER_UNIT,
    STAIRSTEP,
    VOLUME,
    amplify_price,
)
from billingd.demo.proof import Cycle, Injected, Line, Proof, Renewal, Row, renewal, row, show, worth

PATIENCE_SECONDS = 400


async def _demo(directory: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "billingd",
        "demo",
        *arguments,
        env=os.environ | {"TMPDIR": str(directory)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def _left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def _content(file: Path) -> bytes:
    return file.read_bytes()


async def test_every_unit_is_billed_once_whatever_goes_wrong(tmp_path: Path) -> None:
    """The real processes on SQLite: all sums agree, the faults struck, and nothing is left behind."""
    process = await _demo(tmp_path, "--seconds", "3", "--json")
    async with asyncio.timeout(PATIENCE_SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    document = json.loads(out)
    assert document["drift_units"] == 0
    assert document["served_units"] > 0
    assert document["served_units"] == document["recorded_units"]
    assert document["reported_units"] == document["billed_units"]
    kept = document["held_units"] + document["written_off_units"]
    assert document["served_units"] == document["billed_units"] + kept
    assert document["kills"] >= 2
    assert document["faults"] >= 10
    assert len(document["subscriptions"]) == len(LINKED) == 12
    for each in document["subscriptions"]:
        assert each["served"] == each["recorded"] == each["billed"] + each["held"] + each["written_off"]
        assert each["reported"] == each["billed"] > 0
        assert (each["held"] > 0) is (each["written_off"] > 0) is (each["subscriber"] == CUT_SHORT.name)
        assert each["priced_as_amplify"]
    renewals = {each["subscriber"]: each for each in document["renewals"]}
    complete = renewals.pop(LEAVING.name)
    assert complete["complete"]
    assert complete["served"] == complete["billed"] > 0
    for subscriber in CORRECTED:
        corrected = renewals.pop(subscriber.name)
        assert not corrected["complete"]
        assert corrected["served"] == corrected["billed"] + corrected["corrected"] > corrected["billed"]
    incomplete = renewals.pop(CUT_SHORT.name)
    assert not incomplete["complete"]
    assert incomplete["corrected"] == 0
    assert incomplete["held"] == document["held_units"] > 0
    assert incomplete["written_off"] == document["written_off_units"] > 0
    assert renewals == {}
    assert document["problems"] == []
    assert _left_in(tmp_path) == []


async def test_an_interrupted_demo_ends_its_processes_and_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while both run: exit 130, no daemon, no directory."""
    process = await _demo(tmp_path, "--seconds", "3")
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (page := re.search(rb"status page is (http://\S+)", await process.stderr.readline())):
            assert process.returncode is None
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    assert _left_in(tmp_path) == []
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(page[1].decode())


async def test_a_store_in_use_is_refused_before_a_daemon_touches_it(
    tmp_path: Path, sqlite_template: Path
) -> None:
    """On a real store the demo's daemon would tell the sandbox what was meant for Recurly."""
    before = _content(sqlite_template)
    process = await _demo(tmp_path, "--store", f"sqlite+aiosqlite:///{sqlite_template}")
    async with asyncio.timeout(PATIENCE_SECONDS):
        _, err = await process.communicate()
    assert process.returncode == 1
    assert b"the store is in use" in err
    assert _content(sqlite_template) == before


GOOD = Row(
    id="8ac9",
    subscriber="Maya Okafor",
    plan="Weather per call",
    model="per unit",
    currency="USD",
    served=100,
    counted=100,
    recorded=100,
    reported=100,
    billed=100,
    invoiced=Decimal("5.25"),
)
AT = datetime(2026, 11, 23, 8, 30, 1, tzinfo=UTC)
COMPLETE = Renewal(
    subscriber="Checkout Squad",
    at=AT,
    served=30,
    billed=30,
    corrected=0,
    held=0,
    written_off=0,
    complete=True,
)
INCOMPLETE = replace(
    COMPLETE,
    subscriber="Priya Raman",
    billed=20,
    corrected=3,
    held=5,
    written_off=2,
    complete=False,
)
PROOF = Proof(
    rows=(GOOD,),
    kills=2,
    injected=(Injected("the answer was lost", 3, 3),),
    held=(),
    renewals=(COMPLETE, INCOMPLETE),
)


def test_sums_that_agree_have_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert PROOF.problems() == []
    show(PROOF)
    assert capsys.readouterr().out.splitlines()[-1] == "served 100 = billed 100, drift 0"


@pytest.mark.parametrize(
    ("changes", "drift"),
    [
        ({"recorded": 99}, 1),
        ({"reported": 107}, 7),
        ({"billed": 90}, 10),
        ({"billed": 90, "reported": 120}, 20),
        ({"billed": 90, "reported": 90, "held": 9}, 1),
        ({"billed": 90, "held": 10}, 10),
        ({"held": 10}, 10),
        ({"written_off": 10}, 10),
        ({"counted": 101}, 0),
        ({"subscriptions": 2}, 0),
        ({"subscriptions": 0}, 0),
        ({"tags_twice": ("bd1:1",)}, 0),
        ({"mispriced": ("The invoice says 4.",)}, 0),
    ],
)
def test_a_subscription_that_disagrees_fails_the_proof(
    changes: dict[str, Any], drift: int, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = replace(PROOF, rows=(replace(GOOD, **changes), GOOD))
    assert proof.problems()
    assert proof.document()["drift_units"] == drift
    show(proof)
    shown = capsys.readouterr().out
    assert "wrong     " in shown
    if drift:
        closing = shown.splitlines()[-1]
        assert closing.startswith(f"served 200, billed {proof.total('billed')}")
        assert closing.endswith(f", drift {drift}")


@pytest.mark.parametrize(
    ("kept", "closing"),
    [
        ({"held": 10}, "served 100 = billed 90 + held 10, drift 0"),
        ({"held": 4, "written_off": 6}, "served 100 = billed 90 + held 4 + written off 6, drift 0"),
    ],
)
def test_units_that_are_known_not_to_be_billed_are_no_drift(
    kept: dict[str, Any], closing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = replace(PROOF, rows=(replace(GOOD, billed=90, reported=90, **kept),))
    assert proof.problems() == []
    assert proof.document()["held_units"] == kept["held"]
    show(proof)
    assert capsys.readouterr().out.splitlines()[-1] == closing


def test_differences_that_cancel_out_are_drift_all_the_same() -> None:
    """One subscription billed too much and another too little by as much is no agreement."""
    proof = replace(PROOF, rows=(replace(GOOD, billed=90), replace(GOOD, billed=110)))
    assert proof.total("billed") == proof.total("served")
    assert proof.drift == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"kills": 0},
        {"injected": ()},
        {"injected": (Injected("the answer was lost", 3, 2),)},
        {"rows": ()},
        {"faults": ("billingd gave up 1 action(s).",)},
        {"renewals": ()},
        {"renewals": (COMPLETE,)},
        {"renewals": (INCOMPLETE,)},
        {"renewals": (COMPLETE, replace(INCOMPLETE, held=4))},
        {"renewals": (COMPLETE, INCOMPLETE, replace(INCOMPLETE, complete=True))},
        {"renewals": (COMPLETE, INCOMPLETE, replace(COMPLETE, complete=False))},
    ],
)
def test_a_demo_whose_faults_did_not_strike_proves_nothing(changes: dict[str, Any]) -> None:
    assert replace(PROOF, **changes).problems()


@pytest.mark.parametrize(
    ("plan", "units", "price"),
    [
        (PER_UNIT.name, 1001, "2.50"),
        (PER_UNIT.name, 1002, "2.51"),
        (GRADUATED.name, 0, "0.00"),
        (GRADUATED.name, 500, "10.00"),
        (GRADUATED.name, 2101, "33.46"),
        (VOLUME.name, 400, "40.00"),
        (VOLUME.name, 401, "32.08"),
        (STAIRSTEP.name, 0, "0.00"),
        (STAIRSTEP.name, 300, "10.00"),
        (STAIRSTEP.name, 301, "35.00"),
        (STAIRSTEP.name, 99_999, "95.50"),
        (LOOSE.name, 800, "0"),
        (LOOSE.name, 802, "3"),
    ],
)
def test_the_price_that_amplify_would_charge(plan: str, units: int, price: str) -> None:
    pricing = BY_NAME[plan].quotas[0].pricing
    assert str(amplify_price(pricing, units, BY_NAME[plan].currency)) == price


def _told(subscriber: Any, lines: list[Line], cycles: list[Cycle]) -> Row:
    """A row about one quota, of which billingd and Amplify know all."""
    units = sum(line.units for line in lines)
    served = sum(sum(cycle.served.values()) for cycle in cycles)
    seen = {
        "id": "8ac9",
        "served_units": served,
        "reported_units": units,
        "billed_units": units,
        "recurly": [{}],
        "duplicate_tags": [],
        "quotas": [{"name": BY_NAME[subscriber.plan].quotas[0].name, "add_on": "amplify-quota-1"}],
        "invoices": [{"total": str(sum(line.amount for line in lines))}],
    }
    known = {"recorded_units": served, "held_units": served - units, "written_off_units": 0}
    return row(subscriber, seen, lines, cycles, known)


BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
NEXT = datetime(2026, 12, 23, tzinfo=UTC)


def _line(units: int, amount: str, *, starts: datetime = BEGAN, ends: datetime = AT) -> Line:
    return Line("amplify-quota-1", starts, ends, units, Decimal(amount))


def test_an_invoice_that_is_not_amplifys_price_is_told() -> None:
    """The prices are compared with the units the demo served, not with those the invoice names."""
    told = _told(CUT_SHORT, [_line(401, "40.10")], [Cycle({"payments": 401})])
    assert told.drift == 0
    assert len(told.mispriced) == 1
    assert "32.08" in told.mispriced[0]


def test_a_correction_is_priced_on_top_of_what_its_period_was_billed_for() -> None:
    """490 forecasts at 0.02, then 20 more of the same period: 10 at 0.02 and 10 at 0.015."""
    cycles = [Cycle({"forecasts": 510}, ends=AT), Cycle({"forecasts": 100}, starts=AT)]
    first, later = _line(490, "9.80"), _line(100, "2.00", starts=AT, ends=NEXT)
    told = _told(CORRECTED[1], [first, later, _line(20, "0.35")], cycles)
    assert told.drift == 0
    assert told.mispriced == ()
    bill = renewal(
        CORRECTED[1],
        cycles[0],
        [first, later, _line(20, "0.35")],
        {"held_units": 0, "written_off_units": 0},
        complete=False,
    )
    assert (bill.billed, bill.corrected) == (490, 20)
    assert list(bill.problems()) == []


@pytest.mark.parametrize(
    "line",
    [
        _line(20, "0.40"),
        _line(19, "0.34"),
        _line(20, "0.40", starts=AT, ends=NEXT),
        _line(20, "0.35", starts=BEGAN, ends=NEXT),
    ],
    ids=["at the price of fresh units", "a unit is missing", "in the wrong period", "in no period"],
)
def test_a_wrong_correction_is_told(line: Line) -> None:
    cycles = [Cycle({"forecasts": 510}, ends=AT), Cycle({"forecasts": 100}, starts=AT)]
    lines = [_line(490, "9.80"), _line(100, "2.00", starts=AT, ends=NEXT), line]
    assert _told(CORRECTED[1], lines, cycles).mispriced


def test_what_is_held_is_not_on_the_invoice_and_has_its_worth() -> None:
    """900 payments are billed at 0.08 each; with 10 more all would have cost 0.045."""
    cycle = Cycle({"payments": 910}, kept=10, ends=AT)
    assert _told(CUT_SHORT, [_line(900, "72.00")], [cycle]).mispriced == ()
    assert _told(CUT_SHORT, [_line(910, "40.95")], [cycle]).mispriced
    assert worth(CUT_SHORT, cycle) == Decimal("40.95") - Decimal("72")
