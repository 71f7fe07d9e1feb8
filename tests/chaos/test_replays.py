"""The command that a failing part prints plays that one thing again; where there is none, it fails."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import test_disk
import test_kills
import test_network
import test_points
from points import Stage, quick_store

PLANTED = "planted by a test"
COMMAND = re.compile(r"((?:BILLINGD_CHAOS\w*=(?:'[^']*'|\S+) )*)\.venv/bin/python -m pytest -n0 (.+)")


async def planted(*_: object) -> list[str]:
    """What every look at the end then finds."""
    return [PLANTED]


def printed(failure: BaseException, request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables of the one command that is printed; it names the test that failed."""
    assert PLANTED in str(failure)
    [(variables, named)] = set(COMMAND.findall(str(failure).split("\nassert ")[0]))
    assert shlex.split(named) == [request.node.nodeid]
    return dict(each.split("=", 1) for each in shlex.split(variables))


class Played:
    """One test of a part, played on an empty store; keeps what it counted."""

    def __init__(self, test: Any, template: Path, request: pytest.FixtureRequest) -> None:
        self._test, self._template, self._request = test, template, request
        self.counts: dict[str, int] = {}

    async def again(self, what: str, *, url: bool = True, **more: Any) -> None:
        with quick_store(self._template) as made:
            place = {"url": made} if url else {"cell": (made, test_disk.FULL_AT_COMMIT)}
            self.counts = {}
            keep = {"request": self._request, "record_property": lambda _, counts: self.counts.update(counts)}
            await self._test(what, **place, **keep, **more)

    async def fails(self, what: str, **more: Any) -> dict[str, str]:
        """The variables of the command it prints."""
        with pytest.raises(AssertionError) as failure:
            await self.again(what, **more)
        return printed(failure.value, self._request)


async def test_of_a_point(
    sqlite_template: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a point, and of a pair; in the mode in which it failed."""
    test = Played(
        test_points.test_whichever_point_it_dies_at_each_unit_is_billed_once, sqlite_template, request
    )
    for asked in ("3", "3,5"):
        with monkeypatch.context() as patched:
            patched.setenv("BILLINGD_CHAOS", "quick")
            patched.setattr(test_points, "counted", _ten_points)
            patched.setattr(Stage, "faults", planted)
            patched.setenv("BILLINGD_CHAOS_POINT", asked)
            assert await test.fails("opening") == {"BILLINGD_CHAOS": "quick", "BILLINGD_CHAOS_POINT": asked}
            assert (test.counts["points"], test.counts["pairs"]) == ((1, 0) if asked == "3" else (0, 1))
    monkeypatch.setenv("BILLINGD_CHAOS_POINT", "11")
    monkeypatch.setattr(test_points, "counted", _ten_points)
    with pytest.raises(AssertionError, match="no point 11"):
        await test.again("opening")


async def _ten_points(_: object) -> list[str]:
    return ["a point"] * 10


async def test_of_a_cell(
    sqlite_template: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a cell of the network, by its name; a name that is misspelt plays nothing and says so."""
    test = Played(
        test_network.test_whatever_goes_wrong_on_the_wire_each_unit_is_billed_once, sqlite_template, request
    )
    monkeypatch.setenv("BILLINGD_CHAOS_CELL", "create_add_on lost first")
    with monkeypatch.context() as patched:
        patched.setattr(test_network, "wrong", planted)
        said = await test.fails("quotas", capsys=capsys)
    assert said["BILLINGD_CHAOS_CELL"] == "create_add_on lost first"
    assert test.counts["cells"] == 1
    monkeypatch.setenv("BILLINGD_CHAOS_CELL", "create_add_on last first")
    with pytest.raises(AssertionError, match="no cell create_add_on last first in quotas"):
        await test.again("quotas", capsys=capsys)


async def test_of_a_commit(
    sqlite_template: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a commit on a disk that is full."""
    test = Played(test_disk.test_a_store_that_takes_no_writes_loses_nothing, sqlite_template, request)
    monkeypatch.setenv("BILLINGD_CHAOS_COMMIT", "2")
    with monkeypatch.context() as patched:
        patched.setattr(test_disk.Delivery, "lost", planted)
        said = await test.fails("opening", url=False)
    assert said["BILLINGD_CHAOS_COMMIT"] == "2"
    assert test.counts["points"] == 1
    monkeypatch.setenv("BILLINGD_CHAOS_COMMIT", "1000")
    with pytest.raises(AssertionError, match="no commit 1000"):
        await test.again("opening", url=False)


@pytest.mark.parametrize("lost", [False, True], ids=["webhooks", "no webhooks"])
def test_of_kills(
    lost: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one round of kills, with as many of them."""

    def play(*_: object, **__: object) -> None:
        raise AssertionError(PLANTED)

    monkeypatch.setattr(test_kills, "play", play)
    monkeypatch.setenv("BILLINGD_CHAOS_KILLS", "20")
    test = test_kills.test_kills_while_no_webhook_comes if lost else test_kills.test_kills_at_random_moments
    with pytest.raises(AssertionError) as failure:
        test(True, tmp_path, request, lambda *_: None)
    assert printed(failure.value, request)["BILLINGD_CHAOS_KILLS"] == "20"
