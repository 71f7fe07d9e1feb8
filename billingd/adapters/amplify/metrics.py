"""Traffic from metrics: complete, aware of units, one call for many windows (amplify.md 6.1, 6.2)."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from billingd.adapters.amplify.counts import (
    Billable,
    Key,
    Traceability,
    count_of,
    each_of,
    id_of,
    readings,
    rows_of,
)
from billingd.adapters.amplify.encoding import Json, epoch_ms, moment_of
from billingd.adapters.amplify.reader import Reader, dig
from billingd.domain.errors import Refused
from billingd.domain.usage import Reading
from billingd.domain.windows import EPOCH, Window

log = structlog.get_logger(__name__)

BUCKETS_PER_CALL_MAX: Final = 1_000
"""Longer ranges are cut: Amplify's store refuses answers of too many buckets (Elasticsearch's habit)."""


class MetricsTraffic:
    """`consumer/v2/chartGroupedBy`: complete, aware of units, put into intervals by Amplify."""

    name = "metrics"
    keeps: timedelta | None = None
    """Two years (amplify.md 6.1): longer than anything is open here."""

    def __init__(self, amplify: Traceability, billable: Billable) -> None:
        if billable != "total":
            raise ValueError(
                "traffic.billable=success needs traffic.source=summary: metrics only count totals"
            )
        self._amplify = amplify
        self._told = False
        self._not_found_told = False

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
        """One call per organization and unit for up to BUCKETS_PER_CALL_MAX buckets.

        And one more where an organization is not known.
        """
        bucket = bucket_of(start, length)
        asked_of = set(organizations) - {""}
        if "" in organizations:
            asked_of |= await self._organizations_of(subscriptions, start, end)

        async def chart(asked: tuple[str, str, Window]) -> dict[Key, int]:
            organization, unit, part = asked
            body: dict[str, object] = {
                "tenantId": organization,
                "from": epoch_ms(part.start),
                "to": epoch_ms(part.end),
                "interval": interval_of(bucket),
                "unitId": unit,
                "groupBy": ["subscriptionId", "quotaId"],
            }
            answer = await self._amplify.ask_traceability("consumer/v2/chartGroupedBy", body=body)
            return bucketed(rows_of(answer, "chartGroupedBy"), part, bucket, start=start, length=length)

        calls = [
            (organization, unit, part)
            for organization in sorted(asked_of)
            for unit in sorted(set(units))
            for part in _parts(start, end, bucket)
        ]
        answers = zip(calls, await each_of(chart, calls), strict=True)
        series: dict[tuple[str, str], dict[Key, int]] = defaultdict(lambda: defaultdict(int))
        for (organization, unit, _), answer in answers:
            for key, count in answer.items():
                series[organization, unit][key] += count
        return self._merge(series.values())

    async def _organizations_of(
        self, subscriptions: Collection[str], start: datetime, end: datetime
    ) -> set[str]:
        """The organizations in which any of them was served, by the one call that needs to name none.

        These groupings are in no specification (open question 2). Where they are refused, or not understood,
        the others must be counted all the same.
        """
        params = [("from", str(epoch_ms(start))), ("to", str(epoch_ms(end)))]
        params += [("groupBy", field) for field in ("subscriptionId", "consumerOrgId")]
        try:
            rows = rows_of(await self._amplify.ask_traceability("summary", params=params), "summary")
        except Refused as error:
            self._not_found(str(error))
            return set()
        told = any(id_of(row, "subscriptionId") for row in rows)
        theirs = [row for row in rows if not told or id_of(row, "subscriptionId") in subscriptions]
        found = {id_of(row, "consumerOrgId") for row in theirs}
        if "" in found:
            self._not_found("Amplify's traffic summary names no consumerOrgId")
        return found - {""}

    def _not_found(self, why: str) -> None:
        if not self._not_found_told:
            self._not_found_told = True
            log.error("traffic.organization_not_found", error=why, fix="traffic.source=summary")

    def _merge(self, answers: Iterable[Mapping[Key, int]]) -> tuple[Reading, ...]:
        """One reading per subscription, quota and window.

        A subscription has one organization and a quota one unit, so the same pair in two answers means that
        Amplify ignored a filter: it is counted once. Unattributed traffic has no such identity and adds up.
        """
        units: dict[Key, int] = defaultdict(int)
        for answer in answers:
            for key, count in answer.items():
                if not (key[0] and key[1]):
                    units[key] += count
                    continue
                if key in units and not self._told:
                    self._told = True
                    log.warning("traffic.filter_ignored", subscription=key[0], quota=key[1])
                units[key] = max(units[key], count)
        return readings(units)


def interval_of(length: timedelta) -> str:
    """A window's length in the largest unit that divides it (`^[1-9]\\d*[smhd]$`, amplify.md 6.2)."""
    seconds, rest = divmod(length, timedelta(seconds=1))
    if rest or seconds < 1:
        raise ValueError("traffic.window must be whole seconds")
    for size, letter in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{letter}"
    return f"{seconds}s"


def bucket_of(start: datetime, length: timedelta) -> timedelta:
    """The longest bucket whose edges, counted from the epoch, fall on those of windows from `start` on.

    Windows are aligned, so that is their length; the piece of one that a bill cuts off is not.
    """
    since_epoch = (start - EPOCH) // timedelta(seconds=1)
    return timedelta(seconds=math.gcd(since_epoch, length // timedelta(seconds=1)))


def bucketed(
    rows: Iterable[Json], part: Window, bucket_length: timedelta, *, start: datetime, length: timedelta
) -> dict[Key, int]:
    """Amplify's time buckets as windows of that length from `start` on.

    A bucket at or after the end is the start of a later window (whether `to` is inclusive is open
    question 5); that window's own reading will count it whole. One that begins inside the window before
    the first is misaligned, and no number in it could be trusted.
    """
    units: dict[Key, int] = defaultdict(int)
    for row in rows:
        for bucket in Reader("chartGroupedBy", row).each("usage"):
            at = _bucket_at(bucket)
            if part.start - bucket_length < at < part.start:
                bucket.fail(
                    "time",
                    f"{at.isoformat()} straddles the start of the range: Amplify's buckets do not align",
                )
            count = count_of(bucket.raw, "total")
            if part.start <= at < part.end and count:
                window_start = start + (at - start) // length * length
                units[id_of(row, "subscriptionId"), id_of(row, "quotaId"), window_start] += count
    return units


def _bucket_at(bucket: Reader) -> datetime:
    time = dig(bucket.raw, "time")
    try:
        if isinstance(time, str):
            return moment_of(time)
        if isinstance(time, int) and not isinstance(time, bool):
            return EPOCH + timedelta(milliseconds=time)
    except (ValueError, OverflowError):
        pass
    return bucket.fail("time", "is missing or no time")


def _parts(start: datetime, end: datetime, bucket: timedelta) -> Iterable[Window]:
    while start < end:
        stop = min(end, start + BUCKETS_PER_CALL_MAX * bucket)
        yield Window(start.astimezone(UTC), stop.astimezone(UTC))
        start = stop
