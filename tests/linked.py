"""Links and readings for tests that need a linked world and no far side."""

import asyncio
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from billingd.domain.billing import BilledAddOn, BilledSubscription
from billingd.domain.errors import NotFound, Retryable
from billingd.domain.periods import Period
from billingd.domain.usage import Reading
from billingd.loops import Clock
from billingd.store import links
from billingd.store.engine import Store
from billingd.store.links import AddOnLink, PlanLink, SubscriptionLink

HOUR = timedelta(hours=1)
TEN = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
"""A window edge."""
PLAN = PlanLink("p1", "metered", "Metered", "weather", "amplify-plan-p1", "USD", "active", None)


def add_on(quota_id: str = "q1", plan_id: str = "p1", **changes: Any) -> AddOnLink:
    """A quota's add-on."""
    fields = {
        "code": f"amplify-quota-{quota_id}",
        "title": quota_id,
        "unit": "calls",
        "tier": "flat",
        "prices": None,
    } | changes
    return AddOnLink(
        quota_id,
        plan_id,
        fields["code"],
        fields["title"],
        fields["unit"],
        fields["tier"],
        fields["prices"],
    )


def subscription(subscription_id: str = "s1", **changes: Any) -> SubscriptionLink:
    """An active subscription, linked at ten."""
    fields: dict[str, Any] = {
        "subscription_id": subscription_id,
        "name": subscription_id,
        "title": subscription_id.upper(),
        "plan_id": "p1",
        "organization_id": "o1",
        "account_code": "amplify-org-o1",
        "uuid": f"uuid-{subscription_id}",
        "state": "active",
        "resource_version": None,
        "usage_from": TEN,
        "approved_at": TEN,
        "usage_until": None,
        "period_started_at": None,
        "period_ends_at": None,
        "linked_at": TEN,
    }
    return SubscriptionLink(**fields | changes)


async def link(
    store: Store,
    *subscriptions: SubscriptionLink,
    add_ons: Collection[AddOnLink] = (),
    plan: PlanLink = PLAN,
    now: datetime = TEN,
) -> None:
    """Writes a plan with its add-ons (one, unless said otherwise) and subscriptions to it."""
    async with store.write() as tx:
        await links.save_plan(tx, plan, tuple(add_ons) or (add_on(),), now=now)
        for each in subscriptions:
            await links.create_subscription(tx, each)


class Bills:
    """Recurly as far as billing periods go: what it shows of each subscription, unless it is away."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.shown: dict[str, BilledSubscription] = {}
        self.edges: dict[str, set[datetime]] = {}
        self.listed = 0
        self.away = False

    def show(self, period: Period | None, *, subscription: str = "s1", state: str = "active") -> None:
        """From now on the subscription is in this state and period."""
        uuid = f"uuid-{subscription}"
        self.shown[uuid] = BilledSubscription(
            uuid=uuid,
            plan_code=PLAN.plan_code,
            account_code="amplify-org-o1",
            marker=subscription,
            state=state,
            add_on_codes=(),
            activated_at=TEN,
            period_started_at=None if period is None else period.started_at,
            period_ends_at=None if period is None else period.ends_at,
            trial_ends_at=None if period is None or not period.trial else period.ends_at,
        )

    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]:
        self.listed += 1
        if self.away:
            raise Retryable("away")
        return tuple(one for one in self.shown.values() if one.live and one.state != "paused")

    async def get_subscription(self, uuid: str) -> BilledSubscription:
        if self.away:
            raise Retryable("away")
        if uuid not in self.shown:
            raise NotFound(uuid)
        return self.shown[uuid]

    async def list_billed_edges(self, uuid: str, *, since: datetime) -> frozenset[datetime]:
        if self.away:
            raise Retryable("away")
        return frozenset(one for one in self.edges.get(uuid, ()) if one >= since)

    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]:
        raise NotFound(f"{plan_code} in {currency}")

    def far_now(self) -> datetime:
        return self.clock.now()


class Counted:
    """A traffic source over a truth of moments, summed as it is asked; `asked` lists what it was asked."""

    name = "metrics"

    def __init__(self) -> None:
        self.units: dict[tuple[str, str, datetime], int] = {}
        self.asked: list[dict[str, Any]] = []
        self.before = asyncio.Event()
        self.before.set()

    async def read(self, **asked: Any) -> tuple[Reading, ...]:
        self.asked.append(asked)
        await self.before.wait()
        start, length = asked["start"], asked["length"]
        found = Counter[tuple[str, str, datetime]]()
        for (subscription_id, quota_id, at), units in self.units.items():
            if start <= at < asked["end"]:
                found[subscription_id, quota_id, start + (at - start) // length * length] += units
        return tuple(Reading(*key, units) for key, units in found.items())

    def serve(self, units: int, *, hours: float = 0, subscription: str = "s1", quota: str = "q1") -> None:
        """So many units in all at the moment `hours` after ten."""
        self.units[subscription, quota, TEN + hours * HOUR] = units
