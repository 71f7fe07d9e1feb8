"""Links and readings for tests that need a linked world and no far side."""

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from billingd.domain.usage import Reading
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
    } | changes
    return AddOnLink(quota_id, plan_id, fields["code"], fields["title"], fields["unit"], fields["tier"])


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


class Counted:
    """A traffic source that says what it is told to, window by window; `asked` lists what it was asked."""

    name = "metrics"

    def __init__(self) -> None:
        self.units: dict[tuple[str, str, datetime], int] = {}
        self.asked: list[dict[str, Any]] = []
        self.before = asyncio.Event()
        self.before.set()

    async def read(self, **asked: Any) -> tuple[Reading, ...]:
        self.asked.append(asked)
        await self.before.wait()
        return tuple(
            Reading(*key, units)
            for key, units in self.units.items()
            if asked["start"] <= key[2] < asked["end"]
        )

    def serve(self, units: int, *, hours: int = 0, subscription: str = "s1", quota: str = "q1") -> None:
        """So many units in all in the window that begins `hours` after ten."""
        self.units[subscription, quota, TEN + hours * HOUR] = units
