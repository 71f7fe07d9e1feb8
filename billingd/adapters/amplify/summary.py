"""Traffic from summaries: complete, knows success, one call per window (amplify.md 6.2)."""

from collections import defaultdict
from collections.abc import Collection
from datetime import datetime, timedelta
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
from billingd.adapters.amplify.encoding import Json, epoch_ms
from billingd.domain.errors import Permanent, Refused
from billingd.domain.usage import Reading
from billingd.domain.windows import Window, windows

log = structlog.get_logger(__name__)

UNIT_DEFAULT: Final = "transactions"
FIX: Final = "Set traffic.source=metrics"
GROUPINGS: Final = ("subscriptionId", "quotaId")


class SummaryTraffic:
    """`summary`: complete and able to tell success, but one call per window, and blind to custom units."""

    name = "summary"
    keeps: timedelta | None = None
    """Two years (amplify.md 6.1): longer than anything is open here."""

    def __init__(self, amplify: Traceability, billable: Billable) -> None:
        self._amplify = amplify
        self._count = {"total": "totalCount", "success": "successCount"}[billable]
        self._grouped: set[str] = set()  # groupings Amplify has been seen to honour
        self._units_told: set[str] = set()

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
        """One call per window."""
        for unit in sorted(set(units) - {UNIT_DEFAULT} - self._units_told):
            self._units_told.add(unit)
            log.error("traffic.unit_not_counted", unit=unit, source=self.name, fix="traffic.source=metrics")

        async def summary(window: Window) -> dict[Key, int]:
            params = [("from", str(epoch_ms(window.start))), ("to", str(epoch_ms(window.end)))]
            params += [("groupBy", field) for field in GROUPINGS]
            try:
                answer = await self._amplify.ask_traceability("summary", params=params)
            except Refused as error:  # these groupings are in no specification (open question 2)
                raise Refused(f"{error}. {FIX}", code=error.code) from None
            return self._counted(answer, window)

        read = await each_of(summary, list(windows(start, end, length=length)))
        return readings({key: count for answer in read for key, count in answer.items()})

    def _counted(self, answer: Json, window: Window) -> dict[Key, int]:
        rows = rows_of(answer, "summary")
        self._grouped |= {
            field for row in rows for field in ("subscriptionId", "quotaId") if id_of(row, field)
        }
        units: dict[Key, int] = defaultdict(int)
        for row in rows:
            count = count_of(row, self._count)
            for field in GROUPINGS:
                # A row may lack it as unattributed traffic; when all do, the grouping was not understood.
                if count and field not in self._grouped:
                    raise Permanent(
                        f"Amplify's traffic summary carries no {field}: it does not group by it, so nothing "
                        f"could be billed. {FIX}"
                    )
            units[id_of(row, "subscriptionId"), id_of(row, "quotaId"), window.start] += count
        return units
