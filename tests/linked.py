"""Links and readings for tests that need a linked world and no far side."""

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription, SubscribedAddOn
from billingd.domain.charges import Prices
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
        self.plans: dict[str, BilledPlan] = {}
        self.add_ons: dict[str, dict[str, BilledAddOn]] = {}
        """By the plan's code, then their own."""
        self.sent: dict[str, tuple[Any, ...]] = {}
        """What was written, by key."""
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
        if uuid not in self.shown:  # nothing is said of it: it is there, and in no period
            self.show(None, subscription=uuid.removeprefix("uuid-"))
        return self.shown[uuid]

    async def list_billed_edges(self, uuid: str, *, since: datetime) -> frozenset[datetime]:
        if self.away:
            raise Retryable("away")
        return frozenset(one for one in self.edges.get(uuid, ()) if one >= since)

    async def list_plans(self) -> tuple[BilledPlan, ...]:
        if self.away:
            raise Retryable("away")
        return tuple(self.plans.values())

    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]:
        if plan_code not in self.add_ons:
            raise NotFound(f"{plan_code} in {currency}")
        return tuple(self.add_ons[plan_code].values())

    async def rename_plan(self, code: str, name: str, *, key: str, retried: bool = False) -> None:
        self._write(key, "rename_plan", code, name)
        if code not in self.plans:
            raise NotFound(code)
        self.plans[code] = replace(self.plans[code], name=name)

    async def rename_add_on(
        self, plan_code: str, add_on_code: str, name: str, *, key: str, retried: bool = False
    ) -> None:
        self._write(key, "rename_add_on", plan_code, add_on_code, name)
        if add_on_code not in self.add_ons.get(plan_code, {}):
            raise NotFound(add_on_code)
        of_plan = self.add_ons[plan_code]
        of_plan[add_on_code] = replace(of_plan[add_on_code], name=name)

    async def add_to_subscription(
        self, uuid: str, add_on_codes: Sequence[str], *, key: str, retried: bool = False
    ) -> None:
        shown = await self.get_subscription(uuid)
        self._write(key, "add_to_subscription", uuid, *add_on_codes)
        of_plan = self.add_ons.get(shown.plan_code, {})
        for code in add_on_codes:
            if code not in shown.add_on_codes:
                prices = of_plan[code].prices if code in of_plan else Prices("flat")
                made = SubscribedAddOn(f"id-{code}", code, prices, self.clock.now())
                shown = replace(
                    shown, add_ons=(*shown.add_ons, made), add_on_codes=(*shown.add_on_codes, code)
                )
        self.shown[uuid] = shown

    async def mark_subscription(self, uuid: str, marker: str, *, key: str, retried: bool = False) -> None:
        shown = await self.get_subscription(uuid)
        self._write(key, "mark_subscription", uuid, marker)
        self.shown[uuid] = replace(shown, marker=marker)

    def _write(self, key: str, *what: str) -> None:
        if self.away:
            raise Retryable("away")
        self.sent[key] = what

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
