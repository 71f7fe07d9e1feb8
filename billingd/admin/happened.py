"""The last events as the page tells them: what came in, what was done, what a person did; newest first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

SETTLED_READ: Final = 60
"""Rows of each sort that are looked at."""

TOLD: Final = 20

_CAPITAL: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Happened:
    """One line. `sort` event | action | note; `times` it came in a row, the last of them `at`."""

    at: datetime
    sort: str
    what: str
    about: str
    outcome: str
    times: int = 1


def happened(
    events: Sequence[Mapping[str, Any]],
    settled: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
) -> list[Happened]:
    """The newest lines of all three; what came alike in a row is one line."""
    lines = [*map(_event, events), *map(_settled, settled), *map(_entry, history)]
    told: list[Happened] = []
    for line in sorted(lines, key=lambda one: one.at, reverse=True):
        last = told[-1] if told else None
        if last is not None and (last.sort, last.what, last.outcome) == (line.sort, line.what, line.outcome):
            about = last.about if last.about == line.about else ""
            told[-1] = replace(last, times=last.times + 1, about=about)
        elif len(told) == TOLD:
            break
        else:
            told.append(line)
    return told


def _event(row: Mapping[str, Any]) -> Happened:
    happened_to_it = _CAPITAL.sub(" ", row["type"].removeprefix("Resource")).lower()
    what = f"{row['kind']} {happened_to_it}".strip()
    came = {"webhook": "by webhook", "feed": "by the feed", "both": "by feed and webhook"}[row["via"]]
    return Happened(row["received_at"], "event", what, row["name"], came)


def _settled(row: Mapping[str, Any]) -> Happened:
    outcome = {"done": "done", "dead": f"dead: {row['error']}"}.get(row["state"], str(row["error"]))
    return Happened(row["settled_at"], "action", row["kind"], row["subject"], outcome)


def _entry(row: Mapping[str, Any]) -> Happened:
    detail = row["detail"]
    who = "by an operator" if detail.get("by") == "operator" else ""
    why = detail.get("reason") or (detail.get("error") if not who else None)
    outcome = ": ".join(str(one) for one in (who, why) if one)
    return Happened(row["at"], "note", row["kind"], row["subject"], outcome)
