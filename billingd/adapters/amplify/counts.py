"""What the traffic sources share: exact counts, ids, and a few calls at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal, Protocol, TypeVar

from billingd.adapters.amplify.encoding import Json
from billingd.adapters.amplify.reader import Reader, dig
from billingd.domain.errors import Permanent
from billingd.domain.usage import Reading

CALLS_AT_ONCE_MAX: Final = 4
ID_LENGTH_MAX: Final = 64
COUNT_MAX: Final = 10**15
"""More than any gateway serves in a window; thousands of such rows still add up to what a database keeps."""

Billable = Literal["total", "success"]
Key = tuple[str, str, datetime]
"""Subscription, quota, start of the window."""
A = TypeVar("A")
T = TypeVar("T")


class Traceability(Protocol):
    """What a source needs of Amplify."""

    async def ask_traceability(
        self, path: str, *, params: Sequence[tuple[str, str]] = (), body: Mapping[str, object] | None = None
    ) -> Json:
        """One read; see `Amplify.ask_traceability`."""


def rows_of(answer: Json, what: str) -> list[Json]:
    """The rows of an answer, bare or under `summary` (TRC names the model so)."""
    rows = answer.get("summary") if isinstance(answer, dict) else answer
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Permanent(f"Amplify's traffic answer ({what}) is not a list of rows")
    return rows


def id_of(row: Json, field: str) -> str:
    return known(Reader("traffic row", row).text(field) or "")


def known(text: str) -> str:
    """Gateways write "unknown" where they cannot tell the consumer (amplify.md 6.4).

    What can be no id of Amplify's is as good: no database could keep it, and it is linked to nothing.
    """
    return "" if text == "unknown" or len(text) > ID_LENGTH_MAX or not text.isprintable() else text


def count_of(row: Json, field: str) -> int:
    return whole(dig(row, field), f"traffic row: {field}")


def whole(value: Json, what: str) -> int:
    """A count; 412.0 is one (Elasticsearch sums in doubles), everything else that is no count is a fault."""
    if (
        not isinstance(value, bool)
        and isinstance(value, int | Decimal)
        and 0 <= value <= COUNT_MAX
        and value == int(value)
    ):
        return int(value)
    raise Permanent(f"Amplify's {what} is not a count: {str(value)[:40]}")


def readings(units: Mapping[Key, int]) -> tuple[Reading, ...]:
    return tuple(Reading(*key, count) for key, count in sorted(units.items()) if count)


async def each_of(call: Callable[[A], Awaitable[T]], asked: Sequence[A]) -> list[T]:
    """The result for each thing asked, in order; a few calls at a time, the first failure stops the rest."""
    gate = asyncio.Semaphore(CALLS_AT_ONCE_MAX)

    async def one(each: A) -> T:
        async with gate:
            return await call(each)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in asked]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
