"""The demo proves what it says, says no when the numbers differ, and leaves nothing behind."""

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from billingd.demo.marketplace import (
    BY_NAME,
    GRADUATED,
    LINKED,
    LOOSE,
    PER_UNIT,
    STAIRSTEP,
    VOLUME,
    amplify_price,
)
from billingd.demo.proof import Injected, Proof, Row, row, show

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
    """The real processes on SQLite: all four sums agree, the faults struck, and nothing is left behind."""
    process = await _demo(tmp_path, "--seconds", "3", "--json")
    async with asyncio.timeout(PATIENCE_SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    document = json.loads(out)
    assert document["drift_units"] == 0
    assert document["served_units"] > 0
    totals = {document[f"{stage}_units"] for stage in ("served", "recorded", "reported", "billed")}
    assert len(totals) == 1
    assert document["kills"] >= 2
    assert document["faults"] >= 10
    assert len(document["subscriptions"]) == len(LINKED) == 12
    for each in document["subscriptions"]:
        assert each["served"] == each["recorded"] == each["reported"] == each["billed"] > 0
        assert each["priced_as_amplify"]
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
PROOF = Proof(rows=(GOOD,), kills=2, injected=(Injected("the answer was lost", 3, 3),), held=())


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
        assert shown.splitlines()[-1] == f"served 200, billed {proof.total('billed')}, drift {drift}"


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


def test_an_invoice_that_is_not_amplifys_price_is_told() -> None:
    """The prices are compared with the units the demo served, not with those the invoice names."""
    subscriber = next(each for each in LINKED if each.plan == VOLUME.name)
    seen = {
        "id": "8ac9",
        "served_units": 401,
        "reported_units": 401,
        "billed_units": 401,
        "recurly": [{}],
        "duplicate_tags": [],
        "quotas": [{"name": "payments", "add_on": "amplify-quota-1"}],
        "invoices": [{"total": "40.10", "lines": [{"add_on": "amplify-quota-1", "amount": "40.10"}]}],
    }
    told = row(subscriber, seen, {"payments": 401}, 401)
    assert told.drift == 0
    assert len(told.mispriced) == 1
    assert "32.08" in told.mispriced[0]
