"""List requests: limit, order, sort, begin_time, end_time, ids, cursor (OAS: Pagination)."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, Protocol, TypeVar
from urllib.parse import urlencode

from billingd.sandbox.recurly.errors import bad_values
from billingd.sandbox.recurly.fields import parsed_time

LIMIT_DEFAULT: Final = 20
LIMIT_MAX: Final = 200
IDS_MAX: Final = 200
PAGING: Final = frozenset({"ids", "limit", "order", "sort", "begin_time", "end_time", "cursor"})
TIMESTAMPS: Final = ("created_at", "updated_at")


class Listed(Protocol):
    """What a list needs to know of its items."""

    @property
    def order(self) -> int: ...
    @property
    def committed_at(self) -> datetime: ...


T = TypeVar("T", bound=Listed)
Entry = tuple[datetime, int, T]


@dataclass(frozen=True, slots=True)
class Query:
    """A list request as checked. `shown_until`: what was committed later is not to be seen yet."""

    path: str
    given: Mapping[str, str]
    ids: tuple[str, ...] | None
    limit: int
    descending: bool
    sort: str
    begin: datetime | None
    end: datetime | None
    after: tuple[datetime, int] | None
    shown_until: datetime | None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list."""

    items: list[T]
    has_more: bool
    next: str | None

    def body(self, view: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
        """The JSON answer."""
        return {
            "object": "list",
            "has_more": self.has_more,
            "next": self.next,
            "data": [view(item) for item in self.items],
        }


def read_query(
    path: str,
    given: Mapping[str, str],
    *,
    sorts: Sequence[str] = TIMESTAMPS,
    shown_until: datetime | None = None,
) -> Query:
    """Checks the parameters of a list request; the first of `sorts` is the default.

    `ids` excludes every other parameter (OAS: ids); whatever is wrong is a 400 that names it.
    """
    wrong: list[str] = []
    ids = tuple(given["ids"].split(",")) if "ids" in given else None
    if ids is not None and (len(ids) > IDS_MAX or len(given) > 1):
        wrong.append("ids")
    limit = given.get("limit", str(LIMIT_DEFAULT))
    if not re.fullmatch(r"[0-9]{1,3}", limit, re.ASCII) or not 1 <= int(limit) <= LIMIT_MAX:
        wrong.append("limit")
    if given.get("order", "desc") not in ("asc", "desc"):
        wrong.append("order")
    if given.get("sort", sorts[0]) not in sorts:
        wrong.append("sort")
    begin, end = _time(given, "begin_time", wrong), _time(given, "end_time", wrong)
    after = _cursor(given.get("cursor"), wrong)
    if wrong:
        raise bad_values(wrong)
    return Query(
        path=path,
        given={name: value for name, value in given.items() if name != "cursor"},
        ids=ids,
        limit=int(limit),
        descending=given.get("order", "desc") == "desc",
        sort=given.get("sort", sorts[0]),
        begin=begin,
        end=end,
        after=after,
        shown_until=shown_until,
    )


def page(query: Query, entries: Sequence[Entry[T]], keep: Callable[[T], bool] | None = None) -> Page[T]:
    """One page out of entries sorted by time and order; looks at no more of them than it must."""
    found: list[Entry[T]] = []
    for entry in _walk(query, entries, keep):
        if len(found) == query.limit:
            at, order, _ = found[-1]
            return Page([item for _, _, item in found], True, _next(query, at, order))
        found.append(entry)
    return Page([item for _, _, item in found], False, None)


def total(query: Query, entries: Sequence[Entry[T]], keep: Callable[[T], bool] | None = None) -> int:
    """How many a HEAD request counts: all pages of it."""
    return sum(1 for _ in _walk(query, entries, keep))


def by_ids(query: Query, found: Iterable[T | None]) -> Page[T]:
    """The items of an `ids` request; unknown ones are left out, and there is one page only."""
    items = [item for item in found if item is not None and _shown(query, item)]
    return Page(items, False, None)


def _walk(query: Query, entries: Sequence[Entry[T]], keep: Callable[[T], bool] | None) -> Iterator[Entry[T]]:
    low, high = 0, len(entries)
    if query.begin is not None:
        low = bisect_left(entries, query.begin, key=lambda entry: entry[0])
    if query.end is not None:
        high = bisect_right(entries, query.end, key=lambda entry: entry[0])
    if query.after is not None and query.descending:
        high = min(high, bisect_left(entries, query.after, key=lambda entry: entry[:2]))
    elif query.after is not None:
        low = max(low, bisect_right(entries, query.after, key=lambda entry: entry[:2]))
    for index in range(high - 1, low - 1, -1) if query.descending else range(low, high):
        entry = entries[index]
        if _shown(query, entry[2]) and (keep is None or keep(entry[2])):
            yield entry


def _shown(query: Query, item: Listed) -> bool:
    return query.shown_until is None or item.committed_at <= query.shown_until


def _time(given: Mapping[str, str], name: str, wrong: list[str]) -> datetime | None:
    if name not in given:
        return None
    try:
        return parsed_time(given[name])
    except ValueError:
        wrong.append(name)
        return None


def _cursor(value: str | None, wrong: list[str]) -> tuple[datetime, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,12}):(-?[0-9]{1,11})", value, re.ASCII)
    if match is None:
        wrong.append("cursor")
        return None
    order, seconds = int(match[1]), int(match[2])
    return datetime.fromtimestamp(seconds, UTC), order


def _next(query: Query, at: datetime, order: int) -> str:
    """A relative path, as the SDK's own tests have it."""
    return f"{query.path}?{urlencode({'cursor': f'{order}:{int(at.timestamp())}', **query.given})}"
