"""Whole listings out of pages that may shift while they are read (amplify.md 2.3)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from billingd.adapters.amplify.encoding import Json
from billingd.adapters.amplify.resources import created_at, identity
from billingd.domain.errors import Permanent, Retryable

T = TypeVar("T")

PAGE_SIZE: Final = 100
PAGES_MAX: Final = 1_000
ROUNDS_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Page:
    """The rows of one page by `metadata.id`, their number, and the total if Amplify states it."""

    rows: dict[str, dict[str, Json]]
    length: int
    total: int | None

    @classmethod
    def of(cls, kind: str, answer: Json, total: str | None) -> "Page":
        """A list answer is a bare JSON array (amplify.md 2.2)."""
        if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
            raise Permanent(f"Amplify's list of {kind} is not a list of resources")
        rows = {identity(kind, row): row for row in answer if isinstance(row, dict)}
        digits = (total or "").strip()
        stated = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None
        return cls(rows, len(answer), stated)


async def read_all(
    what: str, page: Callable[[int], Awaitable[Page]], read: Callable[[dict[str, Json]], T]
) -> tuple[T, ...]:
    """What is read of every row, oldest first, each once.

    A row deleted meanwhile moves the rows behind it up, so one of them can slip between two pages. When
    the stated total shrank or was not met, the list is read again, until it is whole or two readings agree.
    """
    before: set[str] | None = None
    for _ in range(ROUNDS_MAX):
        rows, whole = await _read_round(what, page, read)
        if whole or rows.keys() == before:
            return tuple(rows[id_][1] for id_ in sorted(rows, key=lambda id_: (rows[id_][0], id_)))
        before = set(rows)
    raise Retryable(f"Amplify's list of {what} kept changing while it was read")


async def _read_round(
    what: str, page: Callable[[int], Awaitable[Page]], read: Callable[[dict[str, Json]], T]
) -> tuple[dict[str, tuple[datetime, T]], bool]:
    """Rows by id, with the time each was made, and whether they are all there are."""
    rows: dict[str, tuple[datetime, T]] = {}
    totals: list[int] = []
    for number in range(1, PAGES_MAX + 1):
        got = await page(number)
        fresh = got.rows.keys() - rows.keys()
        rows |= {id_: (created_at(row), read(row)) for id_, row in got.rows.items()}
        if got.total is not None:
            totals.append(got.total)
            if len(rows) >= got.total or not fresh:
                return rows, len(rows) >= got.total and got.total >= max(totals)
        elif got.length < PAGE_SIZE or not fresh:
            # Without a total a short page is the end.
            return rows, True
    raise Permanent(f"Amplify's list of {what} has more than {PAGES_MAX} pages")
