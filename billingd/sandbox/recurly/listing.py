"""Answers to list requests and HEAD counts, the same for every kind of record."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from billingd.sandbox.recurly.errors import bad_values
from billingd.sandbox.recurly.model import Record
from billingd.sandbox.recurly.paging import Entry, Query, by_ids, page, read_query, total
from billingd.sandbox.recurly.wire import Call, Reply, reply

R = TypeVar("R", bound=Record)
View = Callable[[R], dict[str, Any]]


def listed(call: Call, records: Iterable[R], view: View[R], keep: Callable[[R], bool] | None = None) -> Reply:
    """Any records by `created_at` or `updated_at`."""
    query = read_query(call.path, call.query, shown_until=call.shown_until)
    if query.ids is not None:
        known = {record.id: record for record in records}
        return answer(call, query, (), known, view)
    entries = sorted(_entry(record, query.sort) for record in records)
    return answer(call, query, entries, {}, view, keep)


def answer(
    call: Call,
    query: Query,
    entries: Sequence[Entry[R]],
    known: Mapping[str, R],
    view: View[R],
    keep: Callable[[R], bool] | None = None,
) -> Reply:
    """One page, or the count a HEAD request asks for; `known` by id serves `ids`."""
    if query.ids is not None:
        found = by_ids(query, (known.get(id_) for id_ in query.ids))
        count = len(found.items)
    elif call.method == "HEAD":
        return Reply(200, headers={"Recurly-Total-Records": str(total(query, entries, keep))})
    else:
        return reply(200, page(query, entries, keep).body(view))
    if call.method == "HEAD":
        return Reply(200, headers={"Recurly-Total-Records": str(count)})
    return reply(200, found.body(view))


def choice(call: Call, name: str, *values: str) -> str | None:
    """A query parameter that must be one of `values`, if it is there."""
    value = call.query.get(name)
    if value is not None and value not in values:
        raise bad_values([name])
    return value


def _entry(record: R, sort: str) -> tuple[datetime, int, R]:
    return (record.updated_at if sort == "updated_at" else record.created_at, record.order, record)
