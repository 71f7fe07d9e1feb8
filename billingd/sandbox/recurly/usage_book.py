"""The usage records of one add-on on one subscription, kept in order for paging and by cycle for billing."""

from bisect import bisect_left, insort
from collections import Counter
from datetime import datetime
from typing import Generic, Protocol, TypeVar


class Recorded(Protocol):
    """What the book needs to know of a record."""

    order: int
    amount: int
    merchant_tag: str | None
    usage_timestamp: datetime
    recording_timestamp: datetime
    cycle: int
    billed_at: datetime | None


R = TypeVar("R", bound=Recorded)

Entry = tuple[datetime, int, R]
"""Sort time, unique order, record: compares without looking at the record."""


class UsageBook(Generic[R]):
    """Insertion and removal are a bisection; a bill run touches only what is open in its cycles."""

    def __init__(self) -> None:
        self.all_by_usage: list[Entry[R]] = []
        self.all_by_recording: list[Entry[R]] = []
        self.unbilled_by_usage: list[Entry[R]] = []
        self.unbilled_by_recording: list[Entry[R]] = []
        self.open: dict[int, dict[int, R]] = {}
        """Unbilled records by cycle, then by `order`."""
        self.units = 0
        """The sum of all amounts."""
        self.tags: Counter[str | None] = Counter()
        self.removed: list[R] = []
        """What was deleted, for lists that lag behind."""

    def add(self, record: R) -> None:
        """Takes in a record, wherever its times put it."""
        for entries, at in self._places(record):
            insort(entries, (at, record.order, record), key=_position)
        if record.billed_at is None:
            self.open.setdefault(record.cycle, {})[record.order] = record
        self.units += record.amount
        self.tags[record.merchant_tag] += 1

    def remove(self, record: R) -> None:
        """Takes a record out; to change one, remove it, change it, add it again."""
        for entries, at in self._places(record):
            del entries[bisect_left(entries, (at, record.order), key=_position)]
        if record.billed_at is None:
            del self.open[record.cycle][record.order]
        self.units -= record.amount
        self.tags[record.merchant_tag] -= 1
        if not self.tags[record.merchant_tag]:
            del self.tags[record.merchant_tag]

    def move(self, record: R, cycle: int) -> None:
        """Puts an unbilled record into another cycle."""
        del self.open[record.cycle][record.order]
        record.cycle = cycle
        self.open.setdefault(cycle, {})[record.order] = record

    def take(self, cycle: int, billed_at: datetime) -> list[R]:
        """Marks what is open in a cycle as billed and returns it; `settle` must follow."""
        taken = list(self.open.pop(cycle, {}).values())
        for record in taken:
            record.billed_at = billed_at
        return taken

    def settle(self) -> None:
        """Drops what has been billed from the unbilled lists."""
        self.unbilled_by_usage = [entry for entry in self.unbilled_by_usage if entry[2].billed_at is None]
        self.unbilled_by_recording = [
            entry for entry in self.unbilled_by_recording if entry[2].billed_at is None
        ]

    def _places(self, record: R) -> list[tuple[list[Entry[R]], datetime]]:
        places = [
            (self.all_by_usage, record.usage_timestamp),
            (self.all_by_recording, record.recording_timestamp),
        ]
        if record.billed_at is None:
            places += [
                (self.unbilled_by_usage, record.usage_timestamp),
                (self.unbilled_by_recording, record.recording_timestamp),
            ]
        return places


def _position(entry: Entry[R]) -> tuple[datetime, int]:
    return entry[0], entry[1]
