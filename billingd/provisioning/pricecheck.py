"""Price check: a linked plan as both sides have it now, right before somebody is charged by it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Protocol

from billingd.domain.agreement import (
    add_on_differences,
    differences,
    not_listed,
    uncharged,
    unseen,
)
from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.catalog import ProductPlan, Quota
from billingd.domain.errors import NotFound, Retryable
from billingd.domain.pricing import Inexpressible, NotOurs, expressible, translate
from billingd.provisioning import absence
from billingd.store.engine import Store
from billingd.store.links import AddOnLink, PlanLink

IN_LINE: Final = timedelta(minutes=1)
"""How long a plan may take to be brought in line with Amplify before it is held against a subscription."""


class Catalog(Protocol):
    """What is read at Amplify."""

    async def find_product_plan(self, name: str) -> ProductPlan | None: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...


class Billing(Protocol):
    """What is read at Recurly."""

    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None: ...


class AddOns(Protocol):
    """What is read of a plan's add-ons at Recurly."""

    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...
    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None: ...


async def add_ons_at(
    billing: AddOns, plan_code: str, currency: str, codes: Iterable[str]
) -> dict[str, BilledAddOn]:
    """A plan's add-ons by code: those listed, and of `codes` those that the list only lacks."""
    found = {one.code: one for one in await billing.list_add_ons(plan_code, currency)}
    for code in dict.fromkeys(codes):
        if code not in found:
            there = await billing.find_add_on(plan_code, code, currency)
            if there is not None:
                found[code] = there
    return found


@dataclass(frozen=True, slots=True)
class Checked:
    """How a new subscription would be charged otherwise than Amplify says, and the add-ons it is to have.

    `unfit`: the add-ons for which Recurly would charge otherwise, or may, and how.
    """

    faults: tuple[str, ...]
    add_on_codes: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)


class PriceCheck:
    """Compares what Amplify charges with what Recurly would charge a new subscription.

    A link says what was so when the plan was last looked at. Its prices may have changed since at either
    side, and Recurly never changes those of a subscription that exists (recurly.md 4.6).
    """

    def __init__(self, store: Store, catalog: Catalog, billing: Billing) -> None:
        self._store = store
        self._catalog = catalog
        self._billing = billing

    async def check(self, plan: PlanLink, linked: Sequence[AddOnLink]) -> Checked:
        """Sentences, none if both sides agree; `linked` are the plan's add-ons.

        Raises Retryable while Amplify does not show what is linked: that says nothing of its prices.
        """
        there = await self._catalog.find_product_plan(plan.name)
        if there is None or there.id != plan.plan_id:
            raise Retryable(f"Amplify does not show plan {plan.title} ({plan.name})")
        try:
            quotas = await self._catalog.list_quotas(plan.name)
        except NotFound as error:
            raise Retryable(f"Amplify does not show the quotas of plan {plan.title}: {error}") from error
        async with self._store.read() as tx:
            gone = await absence.gone_quotas(tx, plan.plan_id, [one.quota_id for one in linked])
        faults: list[str] = []
        unfit = {one.add_on_code: not_listed(one) for one in unseen(quotas, linked, gone)}
        faults += unfit.values()
        spec = translate(there, quotas)
        if isinstance(spec, Inexpressible):  # that says nothing of the others
            faults += spec.reasons
            fit = expressible(there, quotas)
            others = {one.id for one in quotas} - {one.id for one in fit}
            unfit |= {one.add_on_code: " ".join(spec.reasons) for one in linked if one.quota_id in others}
            spec = translate(there, fit)
        if isinstance(spec, NotOurs):
            return _none((*faults, spec.reason), linked)
        if isinstance(spec, Inexpressible):
            return _none(spec.reasons, linked)
        if spec.currency != plan.currency:
            changed = f"Amplify charges in {spec.currency}, and it was linked in {plan.currency}."
            return _none((changed,), linked)
        billed = await self._billing.find_plan(plan.plan_code)
        if billed is None:
            return _none((f"Recurly does not show plan {plan.plan_code}.",), linked)
        faults += differences(spec, billed)
        if billed.state != "active":
            return _none(tuple(faults), linked)
        asked = [*(one.code for one in spec.add_ons), *(one.add_on_code for one in linked)]
        add_ons = await add_ons_at(self._billing, plan.plan_code, spec.currency, asked)
        wrong: dict[str, tuple[str, ...]] = {}
        for one in spec.add_ons:
            if one.code not in add_ons:
                faults.append(f'Recurly does not show add-on "{one.code}".')
            else:
                wrong[one.code] = add_on_differences(one, add_ons[one.code])
        free = uncharged(spec, quotas, [one for one in linked if one.add_on_code not in unfit])
        for each in free:
            wrong[each.code] = each.differences(add_ons.get(each.code))
        kept = (each.code for each in free if each.belongs(add_ons.get(each.code)))
        return Checked(
            (*faults, *(sentence for those in wrong.values() for sentence in those)),
            (*(one.code for one in spec.add_ons), *kept),
            # one that is not there, or is removed, charges nobody: Recurly refuses it
            unfit
            | {
                code: " ".join(those)
                for code, those in wrong.items()
                if those and add_ons[code].state == "active"
            },
        )


def _none(faults: tuple[str, ...], linked: Sequence[AddOnLink]) -> Checked:
    """What is so while nothing can be said of the single add-ons."""
    return Checked(faults, unfit={one.add_on_code: " ".join(faults) for one in linked})
