"""`POST /traceability/search`: Lexus 0.2 over sampled transactions only (amplify.md 6.3)."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

from aiohttp import web

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.matching import dig
from billingd.sandbox.amplify.settings import SAMPLE_DAYS
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.amplify.times import api_time, epoch_ms, from_ms
from billingd.sandbox.amplify.traffic import Series

GROUPS_MAX: Final = 100
"""String groups keep the top 100 values and silently drop the rest."""
FIND_LIMIT: Final = 10

Document = dict[str, Any]
Test = Callable[[Document], bool]
_RANGES: Final[dict[str, Callable[[int, int], bool]]] = {
    "gt": int.__gt__,
    "gte": int.__ge__,
    "lt": int.__lt__,
    "lte": int.__le__,
}


class Search:
    """Handler of `/search`."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def search(self, request: web.Request) -> web.Response:
        """count and find; a count is a bare number or a bare object."""
        try:
            body = json.loads(await request.read())
        except ValueError as error:
            raise Refused(400, f"The body is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("version") != "0.2":
            raise Refused(400, "version: must be '0.2'")
        if unknown := set(body) - {"version", "id", "filters", "invoke", "group_by"}:
            raise Refused(400, f"{min(unknown)}: unknown property")
        wanted = _test(body.get("filters", {}))
        found = [(document, units) for document, units in self._documents() if wanted(document)]
        invoke = body.get("invoke") or {}
        if not isinstance(invoke, dict) or invoke.get("method") not in ("count", "find"):
            raise Refused(400, "invoke.method: the sandbox knows count and find")
        if invoke["method"] == "find":
            return self._answer(_find(found, invoke.get("params") or {}))
        groups = body.get("group_by") or []
        if not isinstance(groups, list):
            raise Refused(400, "group_by: must be a list")
        return self._answer(_count(found, [_group(each) for each in groups]))

    def _answer(self, result: Any) -> web.Response:
        wrapped = [{"version": "0.2", "id": None, "result": result}]
        return web.json_response(wrapped if self._tenant.settings.lexus_wrapped else result)

    def _documents(self) -> Iterator[tuple[Document, int]]:
        oldest = epoch_ms(self._tenant.clock.now() - timedelta(days=SAMPLE_DAYS))
        for series, counts in self._tenant.traffic.sampled.items():
            for at, units in counts.between(oldest, epoch_ms(self._tenant.clock.now()) + 1):
                yield _document(series, at), units


def _document(series: Series, at: int) -> Document:
    consumer = {
        "marketplace": {"consumerOrgId": series.org},
        "application": {"id": series.application},
        "subscription": {"id": series.subscription},
    }
    summary = {
        "status": series.status,
        "statusDetail": {"Success": "200", "Failure": "404"}.get(series.status, "500"),
        "proxy": {"id": "remoteApiId_42", "name": "Forecast", "revision": 1},
        "application": {"id": series.application},
        "product": {"id": series.product},
        "productPlan": {"id": series.plan},
        "quota": {"id": series.quota},
        "consumerDetails": consumer,
    }
    return {
        "@event_time": at,
        "type": "transactionSummary",
        "version": "1.0",
        "timestamp": at,
        "transactionSummary": summary,
    }


def _test(filters: object) -> Test:
    if not isinstance(filters, dict):
        raise Refused(400, "filters: must be an object")
    tests = [_one(operator, argument) for operator, argument in filters.items()]
    return lambda document: all(test(document) for test in tests)


def _one(operator: str, argument: Any) -> Test:
    if operator in ("$and", "$or") and isinstance(argument, list):
        tests = [_test(each) for each in argument]
        together = all if operator == "$and" else any
        return lambda document: together(test(document) for test in tests)
    if operator == "$not":
        test = _test(argument)
        return lambda document: not test(document)
    if operator == "$exists" and isinstance(argument, str):
        return lambda document: bool(dig(document, argument))
    if operator not in ("$match", "$prefix", "$suffix", "$range") or not isinstance(argument, dict):
        raise Refused(400, f"filters: '{operator}' is not a filter")
    tests = [_field(operator, path, value) for path, value in argument.items()]
    return lambda document: all(test(document) for test in tests)


def _field(operator: str, path: str, value: Any) -> Test:
    if operator == "$range":
        if not isinstance(value, dict) or not set(value) <= set(_RANGES):
            raise Refused(400, f"filters.$range.{path}: takes gt, gte, lt, lte")
        if not all(isinstance(limit, int) for limit in value.values()):
            raise Refused(400, f"filters.$range.{path}: times are epoch milliseconds")
        return lambda document: any(
            all(_RANGES[name](found, limit) for name, limit in value.items())
            for found in dig(document, path)
            if isinstance(found, int)
        )
    wanted = [str(each) for each in (value if isinstance(value, list) else [value])]
    compare: dict[str, Callable[[str, str], bool]] = {
        "$match": str.__eq__,
        "$prefix": str.startswith,
        "$suffix": str.endswith,
    }
    holds = compare[operator]
    return lambda document: any(holds(str(found), each) for found in dig(document, path) for each in wanted)


def _group(asked: object) -> tuple[str, int]:
    if isinstance(asked, str):
        return asked, GROUPS_MAX
    if not isinstance(asked, dict) or not isinstance(asked.get("field"), str):
        raise Refused(400, "group_by: a field name, or {field, type, params}")
    if asked.get("type", "string") != "string":
        raise Refused(400, "group_by.type: the sandbox groups by string only")
    return asked["field"], _whole(asked.get("params") or {}, "limit", GROUPS_MAX)


def _count(found: list[tuple[Document, int]], groups: list[tuple[str, int]]) -> Any:
    if not groups:
        return sum(units for _, units in found)
    path, limit = groups[0]
    totals: Counter[str] = Counter()
    members: dict[str, list[tuple[Document, int]]] = {}
    for document, units in found:
        for value in map(str, dig(document, path)):
            totals[value] += units
            members.setdefault(value, []).append((document, units))
    return {value: _count(members[value], groups[1:]) for value, _ in totals.most_common(limit)}


def _find(found: list[tuple[Document, int]], params: dict[str, Any]) -> list[Document]:
    offset, limit = _whole(params, "offset", 0), _whole(params, "limit", FIND_LIMIT)
    calls = [document for document, units in found for _ in range(min(units, offset + limit))]
    return [
        {"@event_time": api_time(from_ms(each["@event_time"])), "body": each}
        for each in calls[offset : offset + limit]
    ]


def _whole(params: Any, name: str, default: int) -> int:
    value = params.get(name, default) if isinstance(params, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Refused(400, f"params.{name}: must be a whole number")
    return value
