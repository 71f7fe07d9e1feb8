"""The closing lines of the chaos programme: what was tried, counted over all workers, and the planted bugs.

A test says what it did with `record_property("chaos", {"kills": 20, ...})`, and which planted bug it found
with `record_property("planted", {"bug": ..., "found_by": ..., "tries": ...})`. This is registered by
tests/conftest.py because under xdist the controller, which prints, loads no conftest of a sub-folder.
"""

import os
from collections import Counter
from collections.abc import Generator, Mapping
from typing import Any

import pytest

FOLDER = "tests/chaos/"
WORDS = {
    "points": ("crash point", "crash points"),
    "pairs": ("pair of them", "pairs of them"),
    "kills": ("kill", "kills"),
    "postgres_kills": ("kill of PostgreSQL", "kills of PostgreSQL"),
    "faults": ("fault", "faults"),
    "seeds": ("seed", "seeds"),
    "units": ("unit", "units"),
    "cells": ("cell", "cells"),
    "spared": ("of them could not be struck", "of them could not be struck"),
}
"""What is counted, in the order in which it is told; other counts follow under their own names."""


class ChaosSummary:
    """Sums what the tests report, and prints it after everything else."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._full = os.environ.get("BILLINGD_CHAOS", "") == "full"
        self._counts: Counter[str] = Counter()
        self._planted: list[Mapping[str, Any]] = []
        self._failed: set[str] = set()
        self._seen = False
        self._seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of one test; properties come with each, and count once."""
        if not report.nodeid.startswith(FOLDER):
            return
        self._seen = True
        self._seconds += report.duration
        if report.failed:
            self._failed.add(report.nodeid)
            if self._full and (reporter := self._reporter()) is not None:  # hours before the end
                reporter.ensure_newline()
                reporter.write_line(f"{report.nodeid.removeprefix(FOLDER)}: {report.longreprtext}")
        if report.when != "teardown":
            return
        told: Counter[str] = Counter()
        for name, value in report.user_properties:
            if name == "chaos" and isinstance(value, Mapping):
                told.update(value)
            if name == "planted" and isinstance(value, Mapping):
                self._planted.append(value)
        self._counts.update(told)
        reporter = self._reporter()
        if self._full and told and reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"{report.nodeid.removeprefix(FOLDER)}: {_told(told)}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> Generator[None, None, None]:
        """Print after the failures and the short summary, just before pytest's own last line."""
        result = yield
        if self._seen:
            for line in self._lines():
                terminalreporter.write_line(line)
        return result

    def _lines(self) -> list[str]:
        scale = "full" if self._full else "quick"
        failures = f"{len(self._failed)} failure{'' if len(self._failed) == 1 else 's'}"
        told = _told(self._counts) or "nothing counted"
        closing = f"chaos ({scale}): {told}; {failures} ({self._seconds:,.0f} s of work)"
        return [*_table(self._planted), closing]

    def _reporter(self) -> pytest.TerminalReporter | None:
        found = self._config.pluginmanager.get_plugin("terminalreporter")
        return found if isinstance(found, pytest.TerminalReporter) else None


def _told(counts: Mapping[str, int]) -> str:
    names = [*WORDS, *sorted(counts.keys() - WORDS.keys())]
    parts = []
    for name in names:
        if number := counts.get(name, 0):
            one, many = WORDS.get(name, (name, name))
            parts.append(f"{number:,} {one if number == 1 else many}")
    return ", ".join(parts)


def _table(planted: list[Mapping[str, Any]]) -> list[str]:
    """The planted bugs, each with what found it and after how many tries."""
    if not planted:
        return []
    head = ("planted bug", "found by", "tries")
    rows = sorted((str(one["bug"]), str(one["found_by"]), f"{one['tries']}") for one in planted)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    return [
        f"{bug:<{widths[0]}}  {found_by:<{widths[1]}}  {tries:>{widths[2]}}"
        for bug, found_by, tries in (head, *rows)
    ]
