"""What several checks look at, read once from Amplify: billed products, their active plans, subscriptions."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota, Subscription
from billingd.domain.pricing import Inexpressible, NotOurs, PlanSpec, translate

T = TypeVar("T")


class Catalog(Protocol):
    """Where they are."""

    async def list_products(self, billing_system: str | None = None) -> tuple[Product, ...]: ...
    async def list_product_plans(self, product_id: str | None = None) -> tuple[ProductPlan, ...]: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...
    async def list_subscriptions(
        self,
        *,
        plan_id: str | None = None,
        product_id: str | None = None,
        approval: str | None = None,
        state: str | None = None,
    ) -> tuple[Subscription, ...]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """An active plan of a product that is billed here, and what Recurly would have to hold."""

    plan: ProductPlan
    quotas: tuple[Quota, ...]
    meaning: PlanSpec | Inexpressible | NotOurs


class Facts:
    """Each is read at most once, whoever asks first; who asks later gets the same answer, or failure."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._products = _Read(self._read_products)
        self._plans = _Read(self._read_plans)
        self._pending = _Read(self._read_pending)
        self._active = _Read(self._read_active)

    async def products(self) -> tuple[Product, ...]:
        """Products whose attribute says that they are billed here."""
        return await self._products.value()

    async def plans(self) -> tuple[Plan, ...]:
        """Their active plans."""
        return await self._plans.value()

    async def pending(self) -> tuple[Subscription, ...]:
        """Subscriptions to these plans that wait for their approval."""
        return await self._pending.value()

    async def active(self) -> tuple[Subscription, ...]:
        """Subscriptions to these plans that are served."""
        return await self._active.value()

    async def _read_products(self) -> tuple[Product, ...]:
        return await self._catalog.list_products(BILLING_SYSTEM)

    async def _read_plans(self) -> tuple[Plan, ...]:
        plans = []
        for product in await self.products():
            for plan in await self._catalog.list_product_plans(product.id):
                if plan.state == "active" and not plan.deleting:
                    quotas = await self._catalog.list_quotas(plan.name)
                    plans.append(Plan(plan, quotas, translate(plan, quotas)))
        return tuple(plans)

    async def _billed(self) -> set[str]:
        return {each.plan.id for each in await self.plans() if isinstance(each.meaning, PlanSpec)}

    async def _read_pending(self) -> tuple[Subscription, ...]:
        billed = await self._billed()
        waiting = await self._catalog.list_subscriptions(approval="pending") if billed else ()
        return tuple(each for each in waiting if each.plan_id in billed and not each.deleting)

    async def _read_active(self) -> tuple[Subscription, ...]:
        billed = await self._billed()
        served = await self._catalog.list_subscriptions(state="active") if billed else ()
        return tuple(each for each in served if each.plan_id in billed)


class _Read(Generic[T]):
    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._task: asyncio.Future[T] | None = None

    async def value(self) -> T:
        if self._task is None:
            self._task = asyncio.ensure_future(self._read())
        return await asyncio.shield(self._task)
