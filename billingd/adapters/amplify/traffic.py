"""The three ways to ask Amplify what was served (amplify.md 6), behind one protocol."""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Literal, Protocol

from billingd.adapters.amplify.counts import Billable, Traceability
from billingd.adapters.amplify.metrics import MetricsTraffic
from billingd.adapters.amplify.search import SearchTraffic
from billingd.adapters.amplify.summary import SummaryTraffic
from billingd.domain.usage import Reading

SourceName = Literal["metrics", "summary", "search"]


class TrafficSource(Protocol):
    """Counts of one range. `organizations` are those that own subscriptions, `units` the quotas' units.

    "" among the organizations: nobody knows whose some of the subscriptions are, and they are counted all the
    same.

    A source may return readings for subscriptions and quotas nobody asked about; traffic Amplify could not
    attribute has "" for an id. Windows without traffic are left out. Asking again gives the numbers as they
    are then: they only grow (amplify.md 6.4).
    """

    name: str
    keeps: timedelta | None
    """How long what was counted can be asked for; None: for longer than anything is open here."""

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
        """What was served in [start, end), both window edges, per window of that length."""


def traffic_source(name: SourceName, amplify: Traceability, billable: Billable) -> TrafficSource:
    """The source that `traffic.source` names."""
    match name:
        case "metrics":
            return MetricsTraffic(amplify, billable)
        case "summary":
            return SummaryTraffic(amplify, billable)
        case "search":
            return SearchTraffic(amplify, billable)
    raise ValueError(f"traffic.source: {name!r} is none of metrics, summary, search")
