"""Stands in for the daemon's reconciler: a run that is over at the second look, with one finding."""

from datetime import datetime
from typing import Any

FOUND: dict[str, Any] = {
    "kind": "missing_record",
    "subscription": "s1",
    "title": "Acme",
    "add_on": "amplify-quota-q1",
    "window_start": "2026-11-22T10:00:00Z",
    "units": 7,
    "repairable": True,
    "cause": "it was removed",
    "fix": "post it again",
    "tag": "bd1:1",
    "subject": "usage:bd1:1",
    "mended": None,
}


class Reconciling:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.looks = 0
        self.fault: Exception | None = None
        self.found: list[dict[str, Any]] = [FOUND]
        self.error: str | None = None
        self.held_up: str | None = None
        self.not_compared: list[dict[str, Any]] = []
        self.under_way = 0

    async def start(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        subscription: str | None = None,
        repair: bool = False,
    ) -> int:
        if self.fault is not None:
            raise self.fault
        self.asked.append({"since": since, "until": until, "subscription": subscription, "repair": repair})
        return 4

    async def document(self, run_id: int) -> dict[str, Any] | None:
        if run_id != 4:
            return None
        self.looks += 1
        going = self.looks < 2 or self.held_up is not None
        repair = self.asked[-1]["repair"]
        found = [] if going else [one | {"mended": "posted again" if repair else None} for one in self.found]
        return {
            "id": run_id,
            "state": "running" if going else "failed" if self.error else "done",
            "phase": "links",
            "error": self.error,
            "since": "2026-11-22T00:00:00Z",
            "until": "2026-11-23T00:00:00Z",
            "steps_done": 1 if self.held_up else self.looks,
            "held_up": self.held_up,
            "not_compared": self.not_compared,
            "steps": 2,
            "drift_units": sum(one["units"] for one in found),
            "findings": len(found),
            "left": sum(one["mended"] is None for one in found),
            "checked": {"subscriptions": 5, "records": 812},
            "held_units": 3,
            "under_way_units": self.under_way,
            "repair": repair,
            "repaired_units": sum(one["units"] for one in found) if repair else 0,
            "drift": found,
        }
