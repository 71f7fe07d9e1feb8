"""Checks that the traffic source really counts, and that times mean the same on the way there and back."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from billingd.doctor.facts import Facts
from billingd.doctor.findings import Found, fine, look, skipped
from billingd.domain.errors import BillingdError
from billingd.domain.pricing import PlanSpec
from billingd.domain.usage import Reading
from billingd.domain.windows import EPOCH

DAY: Final = timedelta(days=1)
HOUR: Final = timedelta(hours=1)
UNIT_DEFAULT: Final = "transactions"
SourceName = Literal["metrics", "summary", "search"]
OTHER: Final[dict[SourceName, SourceName]] = {"metrics": "summary", "summary": "metrics", "search": "metrics"}
"""What a source is compared with: another that is complete."""


class Source(Protocol):
    """Counts of a range; see `adapters.amplify.traffic`."""

    async def read(
        self,
        *,
        organizations: set[str],
        units: set[str],
        subscriptions: set[str],
        quotas: set[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> tuple[Reading, ...]: ...


class TrafficChecks:
    """Looks at the last day that is settled, for subscriptions that are served now."""

    def __init__(
        self,
        source: Callable[[SourceName], Source],
        facts: Facts,
        *,
        name: SourceName,
        billable: str,
        settle: timedelta,
        now: Callable[[], datetime],
    ) -> None:
        self._source = source
        self._facts = facts
        self._name = name
        self._billable = billable
        until = now() - settle
        self._until = until - (until - EPOCH) % HOUR
        self._readings: tuple[Reading, ...] = ()

    async def counts(self) -> Sequence[Found]:
        """The configured source answers, is complete, and misses nothing that another one has."""
        found = []
        if self._name == "search":
            found.append(
                look(
                    'traffic.source "search" counts sampled traffic: gateways keep 0 % of their calls by '
                    "default, and at most 10 %, so that bills are too low, normally zero",
                    'traffic.source = "metrics"',
                )
            )
        if self._name == "summary" and (units := await self._custom_units()):
            found.append(
                look(
                    f'traffic.source "summary" counts calls only, and active plans charge for {units}',
                    'traffic.source = "metrics"',
                )
            )
        mine = await self._sum(self._name)
        range_ = f"from {self._until - DAY:%d %b %H:%M} to {self._until:%d %b %H:%M} UTC"
        other, theirs, why = await self._compare()
        if theirs is not None and mine < theirs and (mine := await self._sum(self._name)) < theirs:
            found.append(
                look(
                    f'traffic.source "{self._name}" counts {mine}, "{other}" {theirs} units of the same '
                    f"subscriptions {range_}",
                    f'traffic.source = "{other}"',
                )
            )
        if found:
            return found
        checked = f'"{other}" agrees' if why is None else f'"{other}" could not be compared: {why}'
        nothing = "" if mine else " (nothing was served, so this proves little)"
        return [
            fine(f'"{self._name}" counts {mine} units of billed subscriptions {range_}{nothing}; {checked}')
        ]

    async def _compare(self) -> tuple[SourceName, int | None, str | None]:
        other = OTHER[self._name]
        if self._billable == "success":
            return other, None, "traffic.billable is success"
        try:
            read = await self._read(other)
        except BillingdError as error:
            return other, None, str(error)
        return other, sum(one.units for one in read), None

    async def _sum(self, name: SourceName) -> int:
        self._readings = await self._read(name)
        return sum(one.units for one in self._readings)

    async def _custom_units(self) -> str:
        plans = [each.meaning for each in await self._facts.plans() if isinstance(each.meaning, PlanSpec)]
        return ", ".join(
            sorted({each.unit for plan in plans for each in plan.add_ons if each.unit != UNIT_DEFAULT})
        )

    async def times(self) -> Sequence[Found]:
        """An hour that Amplify counted in counts the same when it alone is asked for."""
        if self._name == "search" or not self._readings:
            return [skipped("nothing was served in that day to try it with")]
        hourly = await self._read(self._name, length=HOUR)
        if not hourly:
            return [skipped("nothing was served in that day to try it with")]
        start = max(one.window_start for one in hourly)
        whole = sum(one.units for one in hourly if one.window_start == start)
        again = await self._read(self._name, start=start, end=start + HOUR, length=HOUR)
        alone = sum(one.units for one in again)
        if alone == whole:
            return [fine(f"{start:%H:%M} to {start + HOUR:%H:%M} UTC counts {whole}, in a day and alone")]
        return [
            look(
                f"the hour from {start:%d %b %H:%M} UTC counts {whole} units within a day and {alone} alone: "
                "Amplify understands times otherwise than billingd writes them, or is still counting",
                "billingd doctor --only traffic    again in an hour; if it stays so, systemctl stop billingd "
                "and report this line",
            )
        ]

    async def _read(
        self,
        name: SourceName,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        length: timedelta = DAY,
    ) -> tuple[Reading, ...]:
        plans = [each.meaning for each in await self._facts.plans() if isinstance(each.meaning, PlanSpec)]
        plain = {each.quota_id for plan in plans for each in plan.add_ons if each.unit == UNIT_DEFAULT}
        active = await self._facts.active()
        subscriptions = {each.id for each in active}
        if not subscriptions or not plain:
            return ()
        read = await self._source(name).read(
            organizations={each.owner_org_id or "" for each in active},
            units={UNIT_DEFAULT},
            subscriptions=subscriptions,
            quotas=plain,
            start=start or self._until - DAY,
            end=end or self._until,
            length=length,
        )
        return tuple(one for one in read if one.subscription_id in subscriptions and one.quota_id in plain)
