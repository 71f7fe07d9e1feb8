"""A plan or quota that was retitled at Amplify is renamed at Recurly; nothing else is touched."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import structlog

from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.catalog import ProductPlan
from billingd.domain.errors import NotFound, Refused
from billingd.domain.notices import provider_notice
from billingd.domain.pricing import AddOnSpec, PlanSpec
from billingd.loops import Clock
from billingd.once import Once
from billingd.store import outbox
from billingd.store.engine import Store
from billingd.store.links import AddOnLink, PlanLink

log = structlog.get_logger()


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def rename_plan(self, code: str, name: str, *, key: str, retried: bool = False) -> None: ...
    async def rename_add_on(
        self, plan_code: str, add_on_code: str, name: str, *, key: str, retried: bool = False
    ) -> None: ...


class Sender(Protocol):
    """Sends a rename under a key."""

    def __call__(self, *, key: str, retried: bool) -> Awaitable[None]: ...


class Renamer:
    """Renames what was linked under another title."""

    def __init__(self, store: Store, clock: Clock, billing: Billing, once: Once) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once

    async def retitle(
        self,
        linked: PlanLink,
        known: Mapping[str, AddOnLink],
        plan: ProductPlan,
        spec: PlanSpec,
        add_ons: Sequence[AddOnSpec],
        action_id: int,
    ) -> None:
        """Rename what Amplify has renamed since it was linked (`known`: add-ons by quota).

        A name that a person gave it at Recurly stays until then.
        """
        if linked.title != plan.title:
            await self._rename_plan(spec, action_id)
        for one in add_ons:
            if one.quota_id in known and known[one.quota_id].title != one.name:
                await self._rename_add_on(spec, one, action_id)

    async def _rename_plan(self, spec: PlanSpec, action_id: int) -> None:
        async def send(*, key: str, retried: bool) -> None:
            await self._billing.rename_plan(spec.code, spec.name, key=key, retried=retried)

        async def name() -> str | None:
            found = await self._billing.find_plan(spec.code)
            return None if found is None else found.name

        await self._rename(spec.code, spec.name, action_id, send, name)

    async def _rename_add_on(self, spec: PlanSpec, add_on: AddOnSpec, action_id: int) -> None:
        async def send(*, key: str, retried: bool) -> None:
            await self._billing.rename_add_on(spec.code, add_on.code, add_on.name, key=key, retried=retried)

        async def name() -> str | None:
            listed = await self._billing.list_add_ons(spec.code, spec.currency)
            return next((one.name for one in listed if one.code == add_on.code), None)

        await self._rename(add_on.code, add_on.name, action_id, send, name)

    async def _rename(
        self, code: str, name: str, action_id: int, rename: Sender, found: Callable[[], Awaitable[str | None]]
    ) -> None:
        """Rename it, once for this action: a name may come back. Billing never waits for a refused one."""

        async def send(key: str, *, retried: bool) -> str:
            await rename(key=key, retried=retried)
            return code

        async def find() -> str | None:
            return code if await found() == name else None

        named = hashlib.sha256(name.encode()).hexdigest()[:16]
        intent = f"rename:{code}:{named}:{action_id}"
        try:
            await self._once.write(intent, {"name": name}, send=send, find=find, look_first=True)
        except (Refused, NotFound) as error:
            log.warning("plan.not_renamed", code=code, name=name, error=str(error))
            notice = provider_notice(
                f"not-renamed:{code}:{named}",
                f"{code} keeps its old name at Recurly",
                f'Amplify calls it "{name}" now, and Recurly refused that name: {error}. Only the name on '
                "invoices is concerned; rename it there if you want to.",
            )
            async with self._store.write() as tx:
                await outbox.insert(tx, [notice], now=self._clock.now())
