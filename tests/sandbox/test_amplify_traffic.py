"""Traceability: what was counted, by whom, when it became visible."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from amplify_side import AmplifySide, amplify_side

from billingd.sandbox.amplify.times import epoch_ms
from billingd.sandbox.amplify.traffic import Series

BASE = "/api/traceability/v1/traceability"
HOUR = 3_600_000
NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
START = epoch_ms(NOON) - 24 * HOUR


@pytest.fixture
async def amplify() -> AsyncIterator[AmplifySide]:
    async with amplify_side() as side:
        yield side


def count(
    amplify: AmplifySide,
    units: int,
    at_ms: int = START,
    *,
    subscription: str = "s1",
    quota: str = "q1",
    unit: str = "transactions",
    org: str = "org",
    status: str = "Success",
    late: timedelta = timedelta(0),
) -> None:
    """One metric."""
    series = Series(org, unit, subscription, quota, "plan", "product", f"app-{subscription}", status)
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    percent = amplify.tenant.settings.sample_percent
    amplify.tenant.traffic.count(series, at, units, amplify.clock.now() + late, percent)


async def chart(amplify: AmplifySide, **body: Any) -> Any:
    """chartGroupedBy for the whole day, by subscription and quota, unless told otherwise."""
    wanted = {"tenantId": "org", "from": START, "to": START + 24 * HOUR, "interval": "1h"}
    wanted["groupBy"] = ["subscriptionId", "quotaId"]
    return await amplify.json("POST", f"{BASE}/consumer/v2/chartGroupedBy", {**wanted, **body})


async def test_counts_fall_into_aligned_hours(amplify: AmplifySide) -> None:
    """Start inclusive, end exclusive, buckets on whole UTC hours, one series per subscription and quota."""
    for units, at in (
        (1, START - 1),
        (2, START),
        (4, START + HOUR - 1),
        (8, START + HOUR),
        (16, START + 2 * HOUR),
    ):
        count(amplify, units, at)
    count(amplify, 32, subscription="s2")
    found = await chart(amplify, to=START + 2 * HOUR)
    assert found == [
        {
            "subscriptionId": "s1",
            "quotaId": "q1",
            "planId": "plan",
            "usage": [{"time": START, "total": 6}, {"time": START + HOUR, "total": 8}],
        },
        {"subscriptionId": "s2", "quotaId": "q1", "planId": "plan", "usage": [{"time": START, "total": 32}]},
    ]


@pytest.mark.parametrize(
    ("body", "total"),
    [
        ({}, 1 + 2 + 32),
        ({"unitId": "x-mb"}, 4),
        ({"tenantId": "other"}, 8),
        ({"tenantId": "nobody"}, 0),
        ({"subscriptionIds": ["s2"]}, 2),
        ({"query": "subscriptionId===s1"}, 33),
        ({"to": START}, 0),
    ],
)
async def test_what_is_asked_for_is_counted(amplify: AmplifySide, body: dict[str, Any], total: int) -> None:
    """Organisation, unit, subscriptions, query and range select; every status counts."""
    count(amplify, 1)
    count(amplify, 32, status="Exception")
    count(amplify, 2, subscription="s2")
    count(amplify, 4, unit="x-mb", quota="q2")
    count(amplify, 8, org="other")
    found = await chart(amplify, **body)
    assert sum(point["total"] for each in found for point in each["usage"]) == total


@pytest.mark.parametrize(
    ("interval", "time_"),
    [
        ("15m", datetime(2026, 1, 14, 13, 45, tzinfo=UTC)),
        ("7h", datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=7) * 70174),
        ("1d", datetime(2026, 1, 14, tzinfo=UTC)),
        ("1w", datetime(2026, 1, 8, tzinfo=UTC)),
        ("1M", datetime(2026, 1, 1, tzinfo=UTC)),
        ("3M", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
async def test_buckets_are_aligned_to_the_epoch(amplify: AmplifySide, interval: str, time_: datetime) -> None:
    """The zero of every interval is 1970-01-01T00:00Z; months follow the calendar."""
    count(amplify, 1, epoch_ms(datetime(2026, 1, 14, 13, 59, tzinfo=UTC)))
    (found,) = await chart(amplify, interval=interval)
    assert found["usage"] == [{"time": epoch_ms(time_), "total": 1}]


@pytest.mark.parametrize(
    "body",
    [
        {"tenantId": None},
        {"interval": "0h"},
        {"interval": "1y"},
        {"unitId": "X_MB"},
        {"groupBy": ["colour"]},
        {"from": "2026-01-01"},
        {"from": START + 48 * HOUR},
        {"query": "colour==red"},
        {"surprise": 1},
    ],
)
async def test_faulty_questions_are_refused(amplify: AmplifySide, body: dict[str, Any]) -> None:
    """400 for anything the specification does not know."""
    wanted = {"tenantId": "org", "from": START, "to": START + HOUR, "interval": "1h", **body}
    await amplify.json("POST", f"{BASE}/consumer/v2/chartGroupedBy", wanted, status=400)


async def test_late_traffic_is_seen_when_it_arrives(amplify: AmplifySide) -> None:
    """A late metric keeps its own hour, and is invisible before its arrival."""
    count(amplify, 5)
    count(amplify, 7, late=timedelta(minutes=10))
    assert [each["usage"] for each in await chart(amplify)] == [[{"time": START, "total": 5}]]
    assert amplify.tenant.traffic.served() == {("s1", "q1"): 12}
    amplify.clock.advance(timedelta(minutes=10))
    assert [each["usage"] for each in await chart(amplify)] == [[{"time": START, "total": 12}]]


async def test_summaries_count_by_status(amplify: AmplifySide) -> None:
    """GET /summary and consumer/v2/summary group, filter and tell statuses apart; /summary knows no units."""
    for units, status in ((1, "Success"), (2, "Failure"), (4, "Exception")):
        count(amplify, units, status=status)
    count(amplify, 8, subscription="s2")
    count(amplify, 16, unit="x-mb", quota="q2")
    query = f"from={START}&to={START + HOUR}&groupBy=subscriptionId&groupBy=quotaId"
    found = await amplify.json("GET", f"{BASE}/summary?{query}")
    assert [(each["subscriptionId"], each["quotaId"], each["totalCount"]) for each in found] == [
        ("s1", "q1", 7),
        ("s2", "q1", 8),
    ]
    assert [found[0][f"{name}Count"] for name in ("success", "failure", "exception")] == [1, 2, 4]
    (only,) = await amplify.json("GET", f"{BASE}/summary?query=subscriptionId==s2")
    assert only["totalCount"] == 8
    body = {"tenantId": "org", "unitId": "x-mb", "groupBy": ["quotaId"]}
    (custom,) = await amplify.json("POST", f"{BASE}/consumer/v2/summary", body)
    assert (custom["quotaId"], custom["totalCount"]) == ("q2", 16)
    amplify.tenant.settings.summary_groups = False
    await amplify.json("GET", f"{BASE}/summary?{query}", status=400)


async def test_search_sees_the_sample_only(amplify: AmplifySide) -> None:
    """By default nothing is sampled, so a count is 0; groups stop at the top 100; seven days are kept."""
    search = {
        "version": "0.2",
        "filters": {"$match": {"type": ["transactionSummary"]}},
        "invoke": {"method": "count"},
    }
    count(amplify, 1000)
    assert await amplify.json("POST", f"{BASE}/search", search) == 0
    amplify.tenant.settings.sample_percent = 10
    for number in range(101):
        count(amplify, 1000 + 10 * number, subscription=f"s{number}")
    count(amplify, 10, status="Failure")
    ranged = {"$range": {"@event_time": {"gte": START, "lt": START + HOUR}}}
    by_status = {
        **search,
        "filters": ranged,
        "group_by": [{"field": "transactionSummary.status", "type": "string"}],
    }
    assert await amplify.json("POST", f"{BASE}/search", by_status) == {"Success": 15150, "Failure": 1}
    path = "transactionSummary.consumerDetails.subscription.id"
    grouped = await amplify.json("POST", f"{BASE}/search", {**search, "group_by": [path]})
    assert (len(grouped), "s0" in grouped) == (100, False)
    find = {**search, "invoke": {"method": "find", "params": {"limit": 3}}}
    assert len(await amplify.json("POST", f"{BASE}/search", find)) == 3
    amplify.clock.advance(timedelta(days=8))
    await amplify.log_in()
    assert await amplify.json("POST", f"{BASE}/search", search) == 0
    for faulty in ({**search, "version": "1"}, {**search, "invoke": {"method": "sum"}}, {"version": "0.2"}):
        await amplify.json("POST", f"{BASE}/search", faulty, status=400)


async def test_a_thousand_subscriptions_fit_one_call(amplify: AmplifySide) -> None:
    """1,000 subscriptions x 2 quotas x 24 windows are answered in one call, in about a second at most."""
    for number in range(1000):
        for hour in range(24):
            for quota in ("q1", "q2"):
                count(amplify, 1, START + hour * HOUR, subscription=f"s{number}", quota=quota)
    began = time.perf_counter()
    found = await chart(amplify)
    assert time.perf_counter() - began < 3
    assert len(found) == 2000
    assert sum(point["total"] for each in found for point in each["usage"]) == 48_000
