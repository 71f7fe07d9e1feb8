"""Price check: a linked plan as both sides have it now, right before somebody is charged by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from billingd.domain.agreement import add_on_differences, differences, uncharged
from billingd.domain.billing import BilledAddOn, BilledPlan
from billingd.domain.catalog import ProductPlan, Quota
from billingd.domain.errors import NotFound, Retryable
from billingd.domain.pricing import Inexpressible, NotOurs, translate
from billingd.store.links import AddOnLink, PlanLink


class Catalog(Protocol):
    """What is read at Amplify."""

    async def find_product_plan(self, name: str) -> ProductPlan | None: ...
    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]: ...


class Billing(Protocol):
    """What is read at Recurly."""

    async def find_plan(self, code: str) -> BilledPlan | None: ...
    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]: ...


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

    def __init__(self, catalog: Catalog, billing: Billing) -> None:
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
        spec = translate(there, quotas)
        if isinstance(spec, NotOurs):
            return _none((spec.reason,), linked)
        if isinstance(spec, Inexpressible):
            return _none(spec.reasons, linked)
        if spec.currency != plan.currency:
            changed = f"Amplify charges in {spec.currency}, and it was linked in {plan.currency}."
            return _none((changed,), linked)
        billed = await self._billing.find_plan(plan.plan_code)
        if billed is None:
            return _none((f"Recurly does not show plan {plan.plan_code}.",), linked)
        faults = list(differences(spec, billed))
        if billed.state != "active":
            return _none(tuple(faults), linked)
        add_ons = {one.code: one for one in await self._billing.list_add_ons(plan.plan_code, spec.currency)}
        wrong: dict[str, tuple[str, ...]] = {}
        for one in spec.add_ons:
            if one.code not in add_ons:
                faults.append(f'Recurly does not show add-on "{one.code}".')
            else:
                wrong[one.code] = add_on_differences(one, add_ons[one.code])
        free = uncharged(spec, quotas, linked)
        for each in free:
            wrong[each.code] = each.differences(add_ons.get(each.code))
        kept = (each.code for each in free if each.belongs(add_ons.get(each.code)))
        return Checked(
            (*faults, *(sentence for those in wrong.values() for sentence in those)),
            (*(one.code for one in spec.add_ons), *kept),
            # one that is not there, or is removed, charges nobody: Recurly refuses it
            {
                code: " ".join(those)
                for code, those in wrong.items()
                if those and add_ons[code].state == "active"
            },
        )


def _none(faults: tuple[str, ...], linked: Sequence[AddOnLink]) -> Checked:
    """What is so while nothing can be said of the single add-ons."""
    return Checked(faults, unfit={one.add_on_code: " ".join(faults) for one in linked})
