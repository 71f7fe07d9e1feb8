"""Traffic sources: every unit in its window once, and a loud word where counts cannot be trusted."""

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from amplify_bench import sample
from structlog.testing import capture_logs

from billingd.adapters.amplify import TrafficSource, traffic_source
from billingd.adapters.amplify.counts import CALLS_AT_ONCE_MAX
from billingd.adapters.amplify.encoding import Json, decode
from billingd.adapters.amplify.metrics import BUCKETS_PER_CALL_MAX, bucket_of, interval_of
from billingd.domain.errors import Permanent, Refused, Retryable
from billingd.domain.usage import Reading

START = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)  # 1772438400000
HOUR = timedelta(hours=1)


class Far:
    """Answers Traceability calls in order (the last for ever), or by a function of the call."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, list[tuple[str, str]], dict[str, Any]]] = []
        self.at_once = self.most = 0

    async def ask_traceability(
        self, path: str, *, params: Sequence[tuple[str, str]] = (), body: Mapping[str, object] | None = None
    ) -> Json:
        """See `Amplify.ask_traceability`."""
        self.asked.append((path, list(params), dict(body or {})))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(dict(body or {}))
        return decode(answer if isinstance(answer, bytes) else json.dumps(answer).encode())


async def read(source: TrafficSource, hours: int = 1, **changes: Any) -> list[tuple[str, str, int, int]]:
    """The readings as (subscription, quota, hour, units)."""
    asked: dict[str, Any] = {
        "organizations": ["200000000000002"],
        "units": ["transactions"],
        "subscriptions": ["8ac9dd00", "8ac9dd01"],
        "quotas": ["8ac9cc00"],
        "start": START,
        "end": START + hours * HOUR,
        "length": HOUR,
        **changes,
    }
    found = await source.read(**asked)
    assert all(isinstance(each, Reading) and each.window_start.tzinfo is UTC for each in found)
    return [(r.subscription_id, r.quota_id, (r.window_start - START) // HOUR, r.units) for r in found]


# Metrics


async def test_metrics_put_buckets_into_windows() -> None:
    """Rows of one pair add up, the bucket at `to` belongs to the next reading, "unknown" is nobody's."""
    far = Far(sample("chart_grouped_by.json"))
    assert await read(traffic_source("metrics", far, "total"), hours=2) == [
        ("", "", 0, 3),
        ("8ac9dd00", "8ac9cc00", 0, 413),
        ("8ac9dd00", "8ac9cc00", 1, 388),
    ]
    path, _, body = far.asked[0]
    assert path == "consumer/v2/chartGroupedBy"
    assert body == {
        "tenantId": "200000000000002",
        "from": 1772438400000,
        "to": 1772445600000,
        "interval": "1h",
        "unitId": "transactions",
        "groupBy": ["subscriptionId", "quotaId"],
    }


async def test_metrics_ask_once_per_organization_and_unit() -> None:
    """However long the range and however many subscriptions."""
    far = Far([])
    await read(
        traffic_source("metrics", far, "total"),
        hours=72,
        organizations=["1", "2", "2"],
        units=["transactions", "x-messages"],
        subscriptions=[str(n) for n in range(500)],
    )
    assert [(body["tenantId"], body["unitId"]) for _, _, body in far.asked] == [
        ("1", "transactions"),
        ("1", "x-messages"),
        ("2", "transactions"),
        ("2", "x-messages"),
    ]


async def test_metrics_of_an_unknown_organization() -> None:
    """The summary, which needs to name none, tells in which of them the subscriptions were served."""

    def where(body: dict[str, Any]) -> Any:
        if not body:
            return [
                {"subscriptionId": "8ac9dd00", "consumerOrgId": 300000000000003, "totalCount": 2},
                {"subscriptionId": "another", "consumerOrgId": "4", "totalCount": 2},
                {"subscriptionId": "unknown", "consumerOrgId": "unknown", "totalCount": 2},
            ]
        usage = [{"time": 1772438400000, "total": 2 if body["tenantId"] == "300000000000003" else 1}]
        of = "8ac9dd00" if body["tenantId"] == "300000000000003" else "8ac9dd01"
        return [{"subscriptionId": of, "quotaId": "8ac9cc00", "usage": usage}]

    far = Far(where)
    with capture_logs() as logs:
        found = await read(traffic_source("metrics", far, "total"), hours=2, organizations=["1", ""])
    assert found == [("8ac9dd00", "8ac9cc00", 0, 2), ("8ac9dd01", "8ac9cc00", 0, 1)]
    assert far.asked[0][:2] == (
        "summary",
        [
            ("from", "1772438400000"),
            ("to", "1772445600000"),
            ("groupBy", "subscriptionId"),
            ("groupBy", "consumerOrgId"),
        ],
    )
    assert sorted(body["tenantId"] for _, _, body in far.asked[1:]) == ["1", "300000000000003"]
    assert logs == []


@pytest.mark.parametrize(
    "answer", [Refused("groupBy: no such grouping"), [{"subscriptionId": "8ac9dd00", "totalCount": 2}]]
)
async def test_metrics_of_an_organization_that_cannot_be_found(answer: Any) -> None:
    """The others are read all the same; the log says it once, and what to do."""
    usage = [{"time": 1772438400000, "total": 1}]
    rows = [{"subscriptionId": "8ac9dd01", "quotaId": "8ac9cc00", "usage": usage}]
    source = traffic_source("metrics", Far(answer, rows, answer, rows), "total")
    with capture_logs() as logs:
        for _ in range(2):
            assert await read(source, organizations=["1", ""]) == [("8ac9dd01", "8ac9cc00", 0, 1)]
    assert [(entry["event"], entry["fix"]) for entry in logs] == [
        ("traffic.organization_not_found", "traffic.source=summary")
    ]


async def test_metrics_cut_very_long_ranges() -> None:
    """A year of hours is asked for in parts that meet exactly."""
    far = Far([])
    await read(traffic_source("metrics", far, "total"), hours=2 * BUCKETS_PER_CALL_MAX + 1)
    spans = [(body["from"], body["to"]) for _, _, body in far.asked]
    assert len(spans) == 3
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("minute", "minutes", "interval", "buckets"),
    [(45, 15, "15m", 1), (0, 45, "15m", 3), (0, 60, "1h", 1), (7, 53, "1m", 53), (12, 12, "12m", 1)],
)
async def test_metrics_are_asked_for_a_piece_of_a_window_in_buckets_that_fit(
    minute: int, minutes: int, interval: str, buckets: int
) -> None:
    """Buckets are counted from the epoch: the longest whose edges are those of the piece; summed to one."""
    start = START + timedelta(minutes=minute)

    def each_bucket(body: dict[str, Any]) -> Any:
        step = (body["to"] - body["from"]) // buckets
        usage = [{"time": body["from"] + number * step, "total": 2} for number in range(buckets + 1)]
        return [{"subscriptionId": "s", "quotaId": "q", "usage": usage}]

    far = Far(each_bucket)
    length = timedelta(minutes=minutes)
    found = await traffic_source("metrics", far, "total").read(
        organizations=["1"],
        units=["transactions"],
        subscriptions=["s"],
        quotas=["q"],
        start=start,
        end=start + length,
        length=length,
    )
    [(_, _, body)] = far.asked
    assert body["interval"] == interval
    assert found == (Reading("s", "q", start, 2 * buckets),), "the bucket at the end is another's"


@pytest.mark.parametrize(("second", "length", "bucket"), [(0, 3600, 3600), (17, 3583, 1), (30, 90, 30)])
def test_the_longest_bucket_that_fits(second: int, length: int, bucket: int) -> None:
    """By the second, where a bill is."""
    seconds = timedelta(seconds=1)
    assert bucket_of(START + second * seconds, length * seconds) == bucket * seconds


async def test_metrics_whose_buckets_straddle_a_piece_are_refused() -> None:
    """Amplify ignored the interval: no number in it could be trusted."""
    start, length = START + timedelta(minutes=45), timedelta(minutes=15)
    usage = [{"time": int((start - timedelta(minutes=5)).timestamp()) * 1000, "total": 2}]
    far = Far([{"subscriptionId": "s", "quotaId": "q", "usage": usage}])
    with pytest.raises(Permanent, match="straddles"):
        await read(traffic_source("metrics", far, "total"), start=start, end=start + length, length=length)


async def test_metrics_count_a_subscription_once_when_the_tenant_is_ignored() -> None:
    """A subscription has one organization: the same pair in two answers is one traffic (open question 3)."""

    def everything(body: dict[str, Any]) -> Any:
        units = 5 if body["tenantId"] == "1" else 6
        return [
            {"subscriptionId": "s", "quotaId": "q", "usage": [{"time": 1772438400000, "total": units}]},
            {"subscriptionId": None, "usage": [{"time": 1772438400000, "total": 1}]},
        ]

    with capture_logs() as logs:
        found = await read(traffic_source("metrics", Far(everything), "total"), organizations=["1", "2"])
    assert found == [("", "", 0, 2), ("s", "q", 0, 6)]
    assert [entry["event"] for entry in logs] == ["traffic.filter_ignored"]


@pytest.mark.parametrize(
    ("length", "interval"),
    [
        (timedelta(hours=1), "1h"),
        (timedelta(seconds=90), "90s"),
        (timedelta(minutes=15), "15m"),
        (timedelta(days=1), "1d"),
        (timedelta(hours=36), "36h"),
        (timedelta(seconds=1), "1s"),
        (timedelta(days=7), "7d"),
    ],
)
def test_intervals(length: timedelta, interval: str) -> None:
    """The largest unit that divides the window; no weeks and months, which are not epoch-aligned."""
    assert interval_of(length) == interval


@pytest.mark.parametrize("length", [timedelta(milliseconds=200), timedelta(0), timedelta(seconds=1.5)])
def test_no_interval(length: timedelta) -> None:
    """Contract section 3: whole seconds."""
    with pytest.raises(ValueError, match=r"traffic\.window"):
        interval_of(length)


@pytest.mark.parametrize(
    "usage",
    [
        [{"time": 1772438400000, "total": -1}],
        [{"time": 1772438400000, "total": 1.5}],
        [{"time": 1772438400000, "total": "1"}],
        [{"time": 1772438400000, "total": True}],
        [{"time": 1772438400000}],
        [{"total": 1}],
        [{"time": "noon", "total": 1}],
        [{"time": 10**20, "total": 1}],
        [{"time": 1772438400000 - 60_000, "total": 1}],
        None,
        {},
    ],
)
async def test_metrics_that_are_no_counts(usage: Any) -> None:
    """Nothing is guessed about numbers that become money."""
    far = Far([{"subscriptionId": "s", "quotaId": "q", "usage": usage}])
    with pytest.raises(Permanent):
        await read(traffic_source("metrics", far, "total"))


async def test_metrics_in_other_forms() -> None:
    """Times as text, buckets outside the range, finer buckets, no rows."""
    usage = [
        {"time": "2026-03-02T08:00:00.000+0000", "total": 1},
        {"time": "2026-03-02T08:59:00Z", "total": 2},
        {"time": "2026-03-02T07:00:00Z", "total": 7},
    ]
    far = Far([{"subscriptionId": "s", "quotaId": "q", "usage": usage}])
    assert await read(traffic_source("metrics", far, "total")) == [("s", "q", 0, 3)]
    assert await read(traffic_source("metrics", Far([]), "total")) == []
    with pytest.raises(Permanent):
        await read(traffic_source("metrics", Far({"error": 1}), "total"))


def test_metrics_cannot_tell_success() -> None:
    """`usage[].total` knows no status (amplify.md 6.2)."""
    with pytest.raises(ValueError, match=r"traffic\.billable"):
        traffic_source("metrics", Far([]), "success")
    with pytest.raises(ValueError, match=r"traffic\.source"):
        traffic_source("crystal ball", Far([]), "total")  # type: ignore[arg-type]


async def test_calls_are_bounded_and_the_first_failure_is_the_answer() -> None:
    """A failed call fails the reading with its own error, not with a group of errors."""

    class Slow(Far):
        async def ask_traceability(
            self,
            path: str,
            *,
            params: Sequence[tuple[str, str]] = (),
            body: Mapping[str, object] | None = None,
        ) -> Json:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            await asyncio.sleep(0)
            self.at_once -= 1
            return await super().ask_traceability(path, params=params, body=body)

    slow = Slow([])
    await read(traffic_source("metrics", slow, "total"), organizations=[str(n) for n in range(20)])
    assert slow.most == CALLS_AT_ONCE_MAX
    far = Far([], Retryable("away"))
    with pytest.raises(Retryable, match="away"):
        await read(traffic_source("metrics", far, "total"), organizations=["1", "2", "3"])


# Summary


@pytest.mark.parametrize(("billable", "units"), [("total", 412), ("success", 400)])
async def test_summary_asks_once_per_window(billable: Any, units: int) -> None:
    """Rows without ids are unattributed traffic as long as others have them."""
    far = Far(sample("summary.json"))
    assert await read(traffic_source("summary", far, billable), hours=2) == [
        ("", "", 0, 3),
        ("", "", 1, 3),
        ("8ac9dd00", "8ac9cc00", 0, units),
        ("8ac9dd00", "8ac9cc00", 1, units),
        ("8ac9dd00", "8ac9cc01", 0, 5),
        ("8ac9dd00", "8ac9cc01", 1, 5),
    ]
    assert far.asked[0][:2] == (
        "summary",
        [
            ("from", "1772438400000"),
            ("to", "1772442000000"),
            ("groupBy", "subscriptionId"),
            ("groupBy", "quotaId"),
        ],
    )
    assert far.asked[1][1][:2] == [("from", "1772442000000"), ("to", "1772445600000")]


async def test_summary_that_does_not_group_is_refused() -> None:
    """An ignored grouping would bill nobody: better an error that names the fix (open question 2)."""
    with pytest.raises(Permanent, match=r"quotaId.*traffic\.source=metrics"):
        await read(traffic_source("summary", Far(sample("summary_ungrouped.json")), "total"))
    with pytest.raises(Permanent, match=r"groupBy.*traffic\.source=metrics"):
        await read(traffic_source("summary", Far(Refused("groupBy: no")), "total"))


async def test_summary_once_seen_to_group_may_be_all_unattributed() -> None:
    """A window with nothing but unattributed traffic is no sign of an ignored grouping any more."""
    far = Far(sample("summary.json"), [{"totalCount": 3, "successCount": 3}])
    assert (await read(traffic_source("summary", far, "total"), hours=2))[:2] == [
        ("", "", 0, 3),
        ("", "", 1, 3),
    ]


async def test_summary_says_which_units_it_cannot_count() -> None:
    """It knows no units: a quota in messages would silently stay at zero."""
    source = traffic_source("summary", Far([]), "total")
    with capture_logs() as logs:
        await read(source, units=["transactions", "x-messages"])
        await read(source, units=["transactions", "x-messages"])
    assert [(entry["event"], entry["unit"]) for entry in logs] == [("traffic.unit_not_counted", "x-messages")]


# Search


@pytest.mark.parametrize("form", ["search_bare.json", "search_wrapped.json"])
async def test_search_takes_both_answer_forms(form: str) -> None:
    """A bare object as Amplify answers, or wrapped as Lexus documents it (amplify.md 6.3)."""
    far = Far(sample(form))
    with capture_logs() as logs:
        source = traffic_source("search", far, "success")
    assert [entry["event"] for entry in logs] == ["traffic.sampled"]
    assert await read(source) == [("8ac9dd00", "8ac9cc00", 0, 12), ("8ac9dd01", "8ac9cc00", 0, 3)]
    path, _, body = far.asked[-1]
    assert path == "search"
    assert body["version"] == "0.2"
    assert body["invoke"] == {"method": "count", "field": "@event_time"}
    assert body["filters"] == {
        "$and": [
            {"$match": {"type": ["transactionSummary"]}},
            {"$match": {"transactionSummary.quota.id": ["8ac9cc00"]}},
            {"$match": {"transactionSummary.status": ["Success"]}},
        ],
        "$range": {"@event_time": {"gte": 1772438400000, "lt": 1772442000000}},
    }
    (group,) = body["group_by"]
    assert group["field"] == "transactionSummary.consumerDetails.subscription.id"
    assert group["params"]["limit"] > 2


async def test_search_asks_per_window_and_quota() -> None:
    """And never with fewer groups than there are subscriptions."""
    far = Far({})
    source = traffic_source("search", far, "total")
    assert await read(source, hours=3, quotas=["a", "b"], subscriptions=[str(n) for n in range(3000)]) == []
    assert len(far.asked) == 6
    assert all(body["group_by"][0]["params"]["limit"] == 6000 for _, _, body in far.asked)
    assert await read(source, quotas=[]) == []


@pytest.mark.parametrize(
    "answer", [7, True, "x", [], [{"result": 7}], {"s": -1}, {str(n): 1 for n in range(1000)}, None]
)
async def test_search_that_cannot_be_trusted(answer: Any) -> None:
    """Not grouped, not counted, or cut off at the limit."""
    with pytest.raises(Permanent):
        await read(traffic_source("search", Far(answer), "total"))


async def test_search_without_hits() -> None:
    """Zero, bare or grouped."""
    answers: list[Any] = [0, {}, [{"result": 0}], [{"result": {}}]]
    for answer in answers:
        assert await read(traffic_source("search", Far(answer), "total")) == []


@pytest.mark.parametrize("odd", ["x" * 65, "a\x00b", "a\ud800"])
async def test_what_can_be_no_id_is_nobodys(odd: str) -> None:
    """No database could keep it: it is counted as unattributed, and holds up no other row."""
    usage = [{"time": 1772438400000, "total": 3}]
    rows = [{"subscriptionId": each, "quotaId": "8ac9cc00", "usage": usage} for each in (odd, "8ac9dd00")]
    assert await read(traffic_source("metrics", Far(rows), "total")) == [
        ("", "8ac9cc00", 0, 3),
        ("8ac9dd00", "8ac9cc00", 0, 3),
    ]
