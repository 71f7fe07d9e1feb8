"""Traffic from sampled transaction documents, asked for in Lexus (amplify.md 6.1, 6.3)."""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

import structlog

from billingd.adapters.amplify.counts import Billable, Key, Traceability, each_of, known, readings, whole
from billingd.adapters.amplify.encoding import Json, epoch_ms
from billingd.adapters.amplify.reader import dig
from billingd.domain.errors import Permanent
from billingd.domain.usage import Reading
from billingd.domain.windows import Window, windows

log = structlog.get_logger(__name__)

GROUPS_MIN: Final = 1_000


class SearchTraffic:
    """Lexus counts of transaction documents. Gateways keep a sample, normally none: for tests only."""

    name = "search"
    keeps: timedelta | None = timedelta(days=7)
    """Older documents are dropped (amplify.md 6.1): what is not found was counted all the same."""

    def __init__(self, amplify: Traceability, billable: Billable) -> None:
        self._amplify = amplify
        self._billable = billable
        log.warning(
            "traffic.sampled",
            source=self.name,
            meaning="gateways send a sample of their traffic, 0% by default: bills will be too low",
            fix="traffic.source=metrics",
        )

    async def read(
        self,
        *,
        organizations: Collection[str],
        units: Collection[str],
        subscriptions: Collection[str],
        quotas: Collection[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> tuple[Reading, ...]:
        """One call per window and quota."""
        limit = max(GROUPS_MIN, 2 * len(subscriptions))  # the default of 100 would cut silently

        async def count(asked: tuple[Window, str]) -> dict[Key, int]:
            window, quota = asked
            body = lexus(window, quota, billable=self._billable, limit=limit)
            groups = _groups(await self._amplify.ask_traceability("search", body=body))
            if len(groups) >= limit:
                raise Permanent(
                    f"Amplify's traffic search stopped at {limit} subscriptions for quota {quota}"
                )
            return {
                (known(subscription), quota, window.start): units for subscription, units in groups.items()
            }

        calls = [
            (each, quota) for each in windows(start, end, length=length) for quota in sorted(set(quotas))
        ]
        read = await each_of(count, calls)
        return readings({key: units for answer in read for key, units in answer.items()})


def lexus(window: Window, quota: str, *, billable: Billable, limit: int) -> dict[str, object]:
    """A Lexus 0.2 count of one quota's transactions by subscription (amplify.md 6.3)."""
    matches: list[dict[str, object]] = [
        {"$match": {"type": ["transactionSummary"]}},
        {"$match": {"transactionSummary.quota.id": [quota]}},
    ]
    if billable == "success":
        matches.append({"$match": {"transactionSummary.status": ["Success"]}})
    by = {
        "field": "transactionSummary.consumerDetails.subscription.id",
        "type": "string",
        "params": {"limit": limit},
    }
    span = {"gte": epoch_ms(window.start), "lt": epoch_ms(window.end)}
    return {
        "version": "0.2",
        "filters": {"$and": matches, "$range": {"@event_time": span}},
        "invoke": {"method": "count", "field": "@event_time"},
        "group_by": [by],
    }


def _groups(answer: Json) -> dict[str, int]:
    """A grouped count, bare (as Amplify answers) or wrapped in `[{"result": …}]` (as Lexus documents)."""
    if isinstance(answer, list):
        answer = dig(answer[0], "result") if len(answer) == 1 else None
    if answer == 0 and not isinstance(answer, bool):
        return {}
    if not isinstance(answer, dict):
        raise Permanent("Amplify's traffic search did not group its count by subscription")
    return {key: whole(count, f"traffic search: {key}") for key, count in answer.items()}
