"""Traceability's counts over HTTP: metrics by window and by group (amplify.md 6.2)."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from aiohttp import web

from billingd.sandbox.amplify import matching, rsql
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.schema import Check, flag, items, number, struct, text
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.amplify.times import epoch_ms
from billingd.sandbox.amplify.traffic import Counts, Series, bucket_start, grouped

GROUPS: Final = {
    "subscriptionId": "subscription",
    "quotaId": "quota",
    "planId": "plan",
    "productId": "product",
    "applicationId": "application",
    "consumerOrgId": "org",
}
"""Grouping and filter names, and the part of a series each stands for."""
DOCUMENTED_GROUPS: Final = frozenset({"proxyId", "method", "virtualHost", "uri", "applicationId"})
_instant: Final = number(0, 10**15, whole=True)
_COMMON: Final[Mapping[str, Check]] = {
    "tenantId": text(min_length=1),
    "from": _instant,
    "to": _instant,
    "query": text(),
    "subscriptionIds": items(text(min_length=1)),
    "groupBy": items(text(among=frozenset(GROUPS))),
    "unitId": text(pattern=r"[a-z0-9-.]+"),
}
_SUMMARY: Final = struct({**_COMMON, "durationDetails": flag}, "tenantId")
_CHART: Final = struct({**_COMMON, "interval": text(pattern=r"[1-9]\d*[smhd]")}, "tenantId", "interval")
_GROUPED_CHART: Final = struct(
    {**_COMMON, "interval": text(pattern=r"[1-9]\d*[smhdwM]")}, "tenantId", "interval"
)

Found = Iterator[tuple[Series, Counts]]


class Traceability:
    """Handlers of `/api/traceability/v1/traceability/…`, `/search` excepted."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def chart_grouped_by(self, request: web.Request) -> web.Response:
        """`POST consumer/v2/chartGroupedBy`: counts per group and bucket."""
        body, found, (start, end) = await self._consumer(request, _GROUPED_CHART)
        names = tuple(dict.fromkeys(body.get("groupBy", ())))
        answer = []
        for key, members in grouped(found, tuple(GROUPS[name] for name in names)).items():
            usage = self._buckets(members, start, end, body["interval"])
            if usage:
                answer.append({**self._keys(names, key, members), "usage": usage})
        return web.json_response(answer)

    async def chart(self, request: web.Request) -> web.Response:
        """`POST consumer/v2/chart`: counts per bucket."""
        body, found, (start, end) = await self._consumer(request, _CHART)
        return web.json_response(self._buckets(found, start, end, body["interval"]))

    async def consumer_summary(self, request: web.Request) -> web.Response:
        """`POST consumer/v2/summary`: counts per group and status."""
        body, found, (start, end) = await self._consumer(request, _SUMMARY)
        names = tuple(dict.fromkeys(body.get("groupBy", ())))
        return web.json_response(self._summary(found, names, start, end))

    async def summary(self, request: web.Request) -> web.Response:
        """`GET /summary`: the same over all consumers; knows no units."""
        names = tuple(dict.fromkeys(request.query.getall("groupBy", [])))
        for name in names:
            known = name in GROUPS if self._tenant.settings.summary_groups else name in DOCUMENTED_GROUPS
            if not known or name not in GROUPS:
                raise Refused(400, f"groupBy: '{name}' is not a grouping")
        start, end = self._range(
            {name: _ms(name, request.query[name]) for name in ("from", "to") if name in request.query}
        )
        unit = "transactions" if self._tenant.settings.summary_units == "transactions" else None
        found = _filtered(self._tenant.traffic.series(unit=unit), request.query.get("query", ""))
        return web.json_response(self._summary(found, names, start, end))

    async def _consumer(
        self, request: web.Request, check: Check
    ) -> tuple[dict[str, Any], Found, tuple[int, int]]:
        if request.content_type != "application/json":
            raise Refused(400, "Content-Type must be application/json")
        try:
            body = json.loads(await request.read())
        except ValueError as error:
            raise Refused(400, f"The body is not JSON: {error}") from error
        if faults := [fault.removeprefix(".") for fault in check(body, "")]:
            raise Refused(400, "; ".join(faults))
        found = self._tenant.traffic.series(
            org=body["tenantId"],
            unit=body.get("unitId", "transactions"),
            subscriptions=body.get("subscriptionIds") or None,
        )
        return body, _filtered(found, body.get("query", "")), self._range(body)

    def _range(self, body: Mapping[str, Any]) -> tuple[int, int]:
        start, end = body.get("from", 0), body.get("to", epoch_ms(self._tenant.clock.now()))
        if start > end:
            raise Refused(400, "from: must not be later than to")
        return int(start), int(end)

    def _buckets(
        self, members: Iterable[tuple[Series, Counts]], start: int, end: int, interval: str
    ) -> list[dict[str, int]]:
        length, unit = int(interval[:-1]), interval[-1]
        totals: dict[int, int] = {}
        if self._tenant.settings.zero_buckets:
            totals = dict.fromkeys(_starts(start, end, length, unit), 0)
        for _, counts in members:
            for at, units in counts.between(start, end):
                bucket = bucket_start(at, length, unit)
                totals[bucket] = totals.get(bucket, 0) + units
        return [{"time": bucket, "total": totals[bucket]} for bucket in sorted(totals)]

    def _summary(self, found: Found, names: tuple[str, ...], start: int, end: int) -> list[dict[str, Any]]:
        answer = []
        for key, members in grouped(found, tuple(GROUPS[name] for name in names)).items():
            by_status = {"Success": 0, "Failure": 0, "Exception": 0}
            for series, counts in members:
                by_status[series.status] += sum(units for _, units in counts.between(start, end))
            if total := sum(by_status.values()):
                answer.append(
                    {
                        **self._keys(names, key, members),
                        "successCount": by_status["Success"],
                        "failureCount": by_status["Failure"],
                        "exceptionCount": by_status["Exception"],
                        "totalCount": total,
                        "avgDurationMs": 22,
                        "minDurationMs": 3,
                        "maxDurationMs": 210,
                    }
                )
        return answer

    def _keys(
        self, names: tuple[str, ...], key: tuple[str, ...], members: list[tuple[Series, Counts]]
    ) -> dict[str, str]:
        shown = dict(zip(names, key, strict=True))
        if "subscriptionId" in shown or "quotaId" in shown:  # either has one plan
            shown.setdefault("planId", members[0][0].plan)
        subscription = self._tenant.resources.by_id("Subscription", shown.get("subscriptionId", ""))
        if subscription is not None:
            shown["subscriptionName"] = subscription.name
        return shown


def _filtered(found: Found, query: str) -> Found:
    if not query:
        return found
    node = rsql.parse(query)
    for field in rsql.fields(node):
        if field not in GROUPS:
            raise Refused(400, f"query: cannot filter by '{field}'")
    return (pair for pair in found if matching.matches(node, _lookup(pair[0])))


def _lookup(series: Series) -> matching.Lookup:
    return lambda field: [getattr(series, GROUPS[field])]


def _ms(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,15}", value):
        raise Refused(400, f"{name}: must be epoch milliseconds; got '{value}'")
    return int(value)


def _starts(start: int, end: int, length: int, unit: str) -> Iterator[int]:
    bucket = bucket_start(start, length, unit)
    step = {"s": 1000, "m": 60_000, "h": 3_600_000}.get(unit, 86_400_000)
    at = bucket
    while at < end:
        if bucket_start(at, length, unit) == at:
            yield at
        at += step
