"""Which Amplify resource is which at Recurly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.charges import Prices
from billingd.domain.delivery import OVER
from billingd.domain.errors import NotFound
from billingd.store.engine import Tx
from billingd.store.rows import upsert
from billingd.store.schema import add_on_links, plan_links, subscription_links

LIVING: Final = ("ended", "ending", "created", "active")
"""States of a link, the one that a name most likely means last."""


@dataclass(frozen=True, slots=True)
class PlanLink:
    """A product plan and its Recurly plan; `state` active | deprecated | removed."""

    plan_id: str
    name: str
    title: str
    product_name: str
    plan_code: str
    currency: str
    state: str
    resource_version: str | None


@dataclass(frozen=True, slots=True)
class AddOnLink:
    """A quota and its add-on."""

    quota_id: str
    plan_id: str
    add_on_code: str
    title: str
    unit: str
    tier_type: str
    prices: Prices | None = None


IDS_MAX: Final = 10_000
"""Ids in one statement: both databases bound its parameters."""


@dataclass(frozen=True, slots=True)
class SubscriptionLink:
    """A subscription and its Recurly subscription `uuid`.

    `created`: exists at Recurly; `active`: approved at Amplify; `ending`: usage counts until `usage_until`,
    then it ends at Recurly; `ended`. `billed_state` is Recurly's own word as of `seen_at`, and so is
    `unit_amount`: what one of its periods costs without add-ons, in its plan's currency. `served_at` is when
    Amplify last showed it as approved and not over.
    """

    subscription_id: str
    name: str
    title: str
    plan_id: str
    organization_id: str
    account_code: str
    uuid: str
    state: str
    resource_version: str | None
    usage_from: datetime
    approved_at: datetime | None
    usage_until: datetime | None
    period_started_at: datetime | None
    period_ends_at: datetime | None
    linked_at: datetime
    billed_state: str | None = None
    seen_at: datetime | None = None
    unit_amount: Decimal | None = None
    served_at: datetime | None = None

    @property
    def adopted(self) -> bool:
        """Whether another program billed it until it was linked: it was approved before."""
        return self.approved_at is not None and self.approved_at < self.linked_at


_PLANS: Final = sa.select(*(plan_links.c[name] for name in PlanLink.__slots__))
_PLAN: Final = _PLANS.where(plan_links.c.plan_id == sa.bindparam("of_plan"))
_ADD_ONS: Final = sa.select(*(add_on_links.c[name] for name in AddOnLink.__slots__))
_ADD_ON: Final = _ADD_ONS.where(add_on_links.c.quota_id == sa.bindparam("of_quota"))
_ADD_ONS_OF: Final = _ADD_ONS.where(add_on_links.c.plan_id == sa.bindparam("of_plan")).order_by(
    add_on_links.c.quota_id
)
_SUBSCRIPTIONS: Final = sa.select(*(subscription_links.c[name] for name in SubscriptionLink.__slots__))
_SUBSCRIPTION: Final = _SUBSCRIPTIONS.where(subscription_links.c.subscription_id == sa.bindparam("of_id"))
_SUBSCRIPTION_BY_UUID: Final = _SUBSCRIPTIONS.where(subscription_links.c.uuid == sa.bindparam("of_uuid"))
_SUBSCRIPTIONS_IN_ORDER: Final = _SUBSCRIPTIONS.order_by(subscription_links.c.subscription_id)
_MAY_BE_BILLED: Final = sa.or_(
    subscription_links.c.billed_state.is_(None), subscription_links.c.billed_state.not_in(sorted(OVER))
)
_BILLING: Final = _SUBSCRIPTIONS_IN_ORDER.where(_MAY_BE_BILLED)
_NEXT_PERIOD_END: Final = sa.select(sa.func.min(subscription_links.c.period_ends_at)).where(
    subscription_links.c.period_ends_at > sa.bindparam("after"), _MAY_BE_BILLED
)
"""Made once, for these are asked often: making one takes longer than running it."""


async def save_plan(tx: Tx, link: PlanLink, add_ons: tuple[AddOnLink, ...], *, now: datetime) -> None:
    """Link a product plan and its quotas, or bring the link up to date."""
    row: dict[str, Any] = {name: getattr(link, name) for name in PlanLink.__slots__}
    await upsert(
        tx, plan_links, row | {"linked_at": now, "ended_at": None}, keep=["linked_at", "resource_version"]
    )
    for add_on in add_ons:
        values = {name: getattr(add_on, name) for name in AddOnLink.__slots__}
        values["prices"] = None if add_on.prices is None else add_on.prices.document()
        await upsert(tx, add_on_links, values | {"linked_at": now}, keep=["linked_at"])


async def find_plan(tx: Tx, plan_id: str) -> PlanLink | None:
    """The link of a product plan."""
    row = (await tx.execute(_PLAN, {"of_plan": plan_id})).one_or_none()
    return None if row is None else PlanLink(*row)


async def find_plans_by_name(tx: Tx, name: str) -> list[PlanLink]:
    """The links of every product plan that has or had this name, removed ones left out."""
    statement = _PLANS.where(plan_links.c.name == name, plan_links.c.state != "removed")
    return [PlanLink(*row) for row in await tx.execute(statement)]


async def plans_of_product(tx: Tx, product_name: str) -> list[PlanLink]:
    """Every plan of a product that is or was linked, by the product's name."""
    statement = _PLANS.where(plan_links.c.product_name == product_name).order_by(plan_links.c.plan_id)
    return [PlanLink(*row) for row in await tx.execute(statement)]


async def plans(tx: Tx) -> list[PlanLink]:
    """Every plan that is or was linked."""
    return [PlanLink(*row) for row in await tx.execute(_PLANS.order_by(plan_links.c.plan_id))]


async def find_plan_by_code(tx: Tx, plan_code: str) -> PlanLink | None:
    """The link of a Recurly plan."""
    row = (await tx.execute(_PLANS.where(plan_links.c.plan_code == plan_code))).one_or_none()
    return None if row is None else PlanLink(*row)


async def plan_moved(tx: Tx, plan_id: str, state: str, *, now: datetime) -> None:
    """The plan is deprecated now, or removed."""
    await tx.execute(
        sa.update(plan_links)
        .where(plan_links.c.plan_id == plan_id)
        .values(state=state, ended_at=now if state == "removed" else None)
    )


async def plan_written(tx: Tx, plan_id: str, resource_version: str | None) -> None:
    """Our own write to the product plan made this version: its event needs no action."""
    await tx.execute(
        sa.update(plan_links).where(plan_links.c.plan_id == plan_id).values(resource_version=resource_version)
    )


async def is_own_write(tx: Tx, *, kind: str, resource_id: str, resource_version: str) -> bool:
    """Whether the newest version billingd itself wrote to this resource is the given one."""
    if kind != "ProductPlan":
        return False
    statement = sa.select(sa.literal(1)).where(
        plan_links.c.plan_id == resource_id, plan_links.c.resource_version == resource_version
    )
    return (await tx.execute(statement)).first() is not None


async def add_ons_of(tx: Tx, plan_id: str) -> list[AddOnLink]:
    """The add-ons of a plan."""
    return [_add_on(row) for row in await tx.execute(_ADD_ONS_OF, {"of_plan": plan_id})]


async def add_ons(tx: Tx) -> dict[str, AddOnLink]:
    """Every add-on, by quota id."""
    return {row.quota_id: _add_on(row) for row in await tx.execute(_ADD_ONS)}


def _add_on(row: sa.Row[Any]) -> AddOnLink:
    prices = None if row.prices is None else Prices.of(row.prices)
    return AddOnLink(row.quota_id, row.plan_id, row.add_on_code, row.title, row.unit, row.tier_type, prices)


async def find_add_on(tx: Tx, quota_id: str) -> AddOnLink | None:
    """The add-on of a quota."""
    row = (await tx.execute(_ADD_ON, {"of_quota": quota_id})).one_or_none()
    return None if row is None else _add_on(row)


async def priced(tx: Tx, quota_id: str, prices: Prices) -> None:
    """What an add-on costs, learnt from Recurly."""
    await tx.execute(
        sa.update(add_on_links).where(add_on_links.c.quota_id == quota_id).values(prices=prices.document())
    )


async def create_subscription(tx: Tx, link: SubscriptionLink) -> None:
    """Link a subscription."""
    row = {name: getattr(link, name) for name in SubscriptionLink.__slots__}
    row["unit_amount"] = None if link.unit_amount is None else str(link.unit_amount)
    await tx.execute(sa.insert(subscription_links).values(**row))


def subscription_of(row: Sequence[Any]) -> SubscriptionLink:
    """The link in a row of its columns, in their order."""
    link = SubscriptionLink(*row)  # an amount is kept as text
    return link if link.unit_amount is None else replace(link, unit_amount=Decimal(link.unit_amount))


async def find_subscription_by_uuid(tx: Tx, uuid: str) -> SubscriptionLink | None:
    """The link of a Recurly subscription."""
    row = (await tx.execute(_SUBSCRIPTION_BY_UUID, {"of_uuid": uuid})).one_or_none()
    return None if row is None else subscription_of(row)


async def is_linked_name(tx: Tx, name: str) -> bool:
    """Whether a subscription that has or had this name is or was linked."""
    statement = sa.select(sa.literal(1)).where(subscription_links.c.name == name).limit(1)
    return (await tx.execute(statement)).first() is not None


async def find_subscription(tx: Tx, subscription_id: str) -> SubscriptionLink | None:
    """The link of a subscription."""
    row = (await tx.execute(_SUBSCRIPTION, {"of_id": subscription_id})).one_or_none()
    return None if row is None else subscription_of(row)


async def named(tx: Tx, name: str) -> list[SubscriptionLink]:
    """Those that have or had this name, the likeliest last: one that lives, else the one linked last."""
    statement = _SUBSCRIPTIONS_IN_ORDER.where(subscription_links.c.name == name)
    found = [subscription_of(row) for row in await tx.execute(statement)]
    return sorted(found, key=lambda one: (LIVING.index(one.state), one.linked_at))


async def meant(tx: Tx, about: str) -> SubscriptionLink:
    """The one of this id, Recurly uuid or name, as people give it. Raises NotFound."""
    link = await find_subscription(tx, about) or await find_subscription_by_uuid(tx, about)
    if link is None:
        of_name = await named(tx, about)
        if not of_name:
            raise NotFound(
                f"no linked subscription has the id, name or Recurly uuid {about}; "
                "`billingd status --subscriptions` lists them"
            )
        link = of_name[-1]
    return link


async def subscriptions(
    tx: Tx, *, plan_id: str | None = None, states: tuple[str, ...] = ()
) -> list[SubscriptionLink]:
    """Subscriptions by plan and state."""
    statement = _SUBSCRIPTIONS_IN_ORDER
    if plan_id is not None:
        statement = statement.where(subscription_links.c.plan_id == plan_id)
    if states:
        statement = statement.where(subscription_links.c.state.in_(states))
    return [subscription_of(row) for row in await tx.execute(statement)]


async def approving(tx: Tx, subscription_id: str, *, now: datetime) -> None:
    """About to be approved at Amplify: from here on it may be served, whatever becomes of the answer."""
    await _move(tx, subscription_id, ("created",), approved_at=now)


async def not_approved(tx: Tx, subscription_id: str) -> None:
    """Amplify says that it was never approved, whatever was intended: it was never served."""
    await _move(tx, subscription_id, ("created",), approved_at=None)


async def activate(tx: Tx, subscription_id: str, *, now: datetime) -> bool:
    """The subscription is approved at Amplify; False when it was not waiting for that."""
    return await _move(tx, subscription_id, ("created",), state="active", approved_at=now)


async def served(tx: Tx, subscription_ids: Sequence[str], *, at: datetime) -> None:
    """Amplify showed these as approved, and not over, at that moment; of others nothing is known."""
    for start in range(0, len(subscription_ids), IDS_MAX):
        some = subscription_ids[start : start + IDS_MAX]
        earlier = sa.or_(subscription_links.c.served_at.is_(None), subscription_links.c.served_at < at)
        await tx.execute(
            sa.update(subscription_links)
            .where(subscription_links.c.subscription_id.in_(some), earlier)
            .where(subscription_links.c.state == "active")
            .values(served_at=at)
        )


async def begin_ending(tx: Tx, subscription_id: str, *, usage_until: datetime) -> bool:
    """The subscription is over at Amplify: its usage counts until then; False when known already."""
    return await _move(tx, subscription_id, ("created", "active"), state="ending", usage_until=usage_until)


async def resume(tx: Tx, subscription_id: str, *, approved_at: datetime | None) -> bool:
    """Amplify serves it again before it was ended (None: it has yet to be approved). False: not ending."""
    values = {"state": "created" if approved_at is None else "active", "approved_at": approved_at}
    return await _move(tx, subscription_id, ("ending",), usage_until=None, **values)


async def end_again(tx: Tx, subscription_id: str) -> bool:
    """Somebody took its end at Recurly back: it is to be ended once more. False when it is not ended."""
    return await _move(tx, subscription_id, ("ended",), state="ending", ended_at=None)


async def end(tx: Tx, subscription_id: str, *, billed_state: str, now: datetime) -> bool:
    """The subscription was ended at Recurly, which calls it so from now on."""
    return await _move(
        tx, subscription_id, ("ending",), state="ended", ended_at=now, billed_state=billed_state, seen_at=now
    )


async def _move(tx: Tx, subscription_id: str, leaves: tuple[str, ...], **values: Any) -> bool:
    """Change a link only from the states named."""
    moved = await tx.execute(
        sa.update(subscription_links)
        .where(
            subscription_links.c.subscription_id == subscription_id, subscription_links.c.state.in_(leaves)
        )
        .values(**values)
    )
    return moved.rowcount == 1


async def billing(tx: Tx) -> list[SubscriptionLink]:
    """Subscriptions that Recurly may still invoice: all but those it showed as over."""
    return [subscription_of(row) for row in await tx.execute(_BILLING)]


async def billing_since(tx: Tx, moment: datetime) -> list[SubscriptionLink]:
    """Subscriptions that Recurly may still have billed after a moment: it showed the others as over before.

    Where nobody noted when an end was seen, it was long ago.
    """
    lately = sa.or_(_MAY_BE_BILLED, subscription_links.c.seen_at > moment)
    return [subscription_of(row) for row in await tx.execute(_SUBSCRIPTIONS_IN_ORDER.where(lately))]


async def next_period_end(tx: Tx, *, after: datetime) -> datetime | None:
    """When the next billing period ends after a moment, of all subscriptions that may still be invoiced."""
    ends_at: datetime | None = (await tx.execute(_NEXT_PERIOD_END, {"after": after})).scalar_one()
    return ends_at


async def count(tx: Tx) -> tuple[int, int]:
    """How many plans and subscriptions are linked now (removed and ended ones left out)."""
    plans = sa.select(sa.func.count()).select_from(plan_links).where(plan_links.c.state != "removed")
    subscriptions_ = (
        sa.select(sa.func.count())
        .select_from(subscription_links)
        .where(subscription_links.c.state != "ended")
    )
    return int((await tx.execute(plans)).scalar_one()), int((await tx.execute(subscriptions_)).scalar_one())
