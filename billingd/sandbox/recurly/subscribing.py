"""Creating a subscription: whom, to what, at which prices, from when (4.6)."""

from bisect import insort
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.accounts import new_account
from billingd.sandbox.recurly.billing import begin, schedule
from billingd.sandbox.recurly.checks import (
    check_currency,
    check_custom_fields,
    check_minor_unit,
    check_tiers,
    price_of,
)
from billingd.sandbox.recurly.errors import RefusalError, invalid, unprocessable
from billingd.sandbox.recurly.fields import Body, duplicates
from billingd.sandbox.recurly.model import (
    Account,
    AddOn,
    Cycle,
    Plan,
    Price,
    Subscription,
    SubscriptionAddOn,
    SubscriptionTier,
)
from billingd.sandbox.recurly.periods import boundary
from billingd.sandbox.recurly.state import State

GUARD: Final = timedelta(seconds=60)
GUARD_MESSAGE: Final = (
    "To avoid accidental duplicate subscriptions, a short delay is required between subscriptions. "
    "Please wait 60 seconds before subscribing again."
)


def create_subscription(state: State, body: Body) -> Subscription:
    """A subscription, its account too if the code is new; nothing is kept of a refused one."""
    given = schemas.SUBSCRIPTION_CREATE.read(body)
    plan = _plan(state, given)
    currency = given["currency"]
    check_currency(state, currency, "currency")
    if currency not in plan.prices:
        raise invalid(("currency", "is not a currency of the plan"))
    check_custom_fields(state, given)
    account = state.account_by_code.get(given["account"]["code"])
    if account is not None:
        _check_account(state, account, plan, given)
    now = state.now()
    _read_dates(plan, given, now)
    attached = _add_ons(state, plan, currency, given.get("add_ons") or [])
    if _needs_billing_info(state, plan, account, given):
        raise invalid(("account.billing_info", "can't be blank"))
    if given.get("unit_amount") is not None:
        check_minor_unit(given["unit_amount"], currency, "unit_amount")
    account = account or new_account(state, given["account"])
    subscription = _new(state, plan, account, given)
    subscription.add_ons = {each.add_on.id: each for each in attached}
    _keep(state, subscription)
    starts_at: datetime = given.get("starts_at") or now
    if starts_at > now:
        subscription.cycles.append(Cycle(0, "before", now, starts_at))
        schedule(state, subscription, now)
    else:
        begin(state, subscription, now)
    state.announce(subscription, "created")
    return subscription


def _plan(state: State, given: Body) -> Plan:
    try:
        plan = state.plan(given.get("plan_id") or f"code-{given['plan_code']}")
    except RefusalError:
        raise invalid(("plan_code", "is invalid")) from None
    if plan.deleted_at:
        raise invalid(("plan_code", "is inactive"))
    return plan


def _check_account(state: State, account: Account, plan: Plan, given: Body) -> None:
    """Closed accounts, the 60-second guard (per account: the harsher source), one subscription per plan."""
    if account.deleted_at:
        raise invalid(("account.code", "is closed"))  # whether it would be opened again is not documented
    made = [each for each in account.subscriptions if state.now() - each.created_at < GUARD]
    if state.settings.sixty_second_guard and made and not given.get("bulk"):
        raise unprocessable(GUARD_MESSAGE, ("base", "wait 60 seconds before subscribing again"))
    several = state.settings.allow_multiple_subscriptions_per_plan
    if not several and any(each.live and each.plan is plan for each in account.subscriptions):
        raise unprocessable(
            "You already have a subscription to this plan.", ("plan_code", "is subscribed to")
        )


def _needs_billing_info(state: State, plan: Plan, account: Account | None, given: Body) -> bool:
    """Automatic collection does, except for a free trial of a plan that says so (DOC create-subscription)."""
    if not state.settings.require_billing_info_for_automatic or given.get("collection_method") == "manual":
        return False
    free = given.get("trial_ends_at") is not None and not plan.trial_requires_billing_info
    return not free and (account is None or not account.billing_info)


def _read_dates(plan: Plan, given: Body, now: datetime) -> None:
    """Settles `trial_ends_at`: the one given, else the plan's trial; a past one means none.

    A start in the past is refused; whether Recurly would backdate it is not documented.
    """
    starts_at = given.get("starts_at") or now
    for name in ("starts_at", "trial_ends_at", "next_bill_date"):
        if given.get(name) is not None:
            given[name] = given[name].replace(microsecond=0)
    if starts_at.replace(microsecond=0) < now:
        raise invalid(("starts_at", "must not be in the past"))
    next_bill_date = given.get("next_bill_date")
    if next_bill_date is not None and next_bill_date <= starts_at:
        raise invalid(("next_bill_date", "must be in the future"))
    if given.get("trial_ends_at") is None and plan.trial_length:
        given["trial_ends_at"] = boundary(starts_at, plan.trial_unit, plan.trial_length, 1)
    if given.get("trial_ends_at") is not None and given["trial_ends_at"] <= starts_at:
        given["trial_ends_at"] = None
    if given.get("trial_ends_at") is not None and next_bill_date is not None:
        given["trial_ends_at"] = given.pop("next_bill_date")  # "this will change when the trial expires"


def _add_ons(state: State, plan: Plan, currency: str, given: list[Body]) -> list[SubscriptionAddOn]:
    """The listed ones only: nothing is attached by itself, not even what is not optional."""
    if duplicates([each["code"] for each in given]):
        raise invalid(("add_ons.code", "has already been taken"))
    return [attach(state, plan, currency, each) for each in given]


def attach(state: State, plan: Plan, currency: str, given: Body) -> SubscriptionAddOn:
    """A plan's add-on for a subscription, at the plan's prices of now unless it has others of its own."""
    add_on = plan.add_ons.get(given["code"])
    if add_on is None or add_on.deleted_at:
        raise invalid(("add_ons.add_on", "is invalid"))
    quantity = 1 if given.get("quantity") is None else given["quantity"]
    if add_on.add_on_type == "usage" and quantity != 1:
        raise invalid(("add_ons.quantity", "must be 1 for usage add-ons"))
    return SubscriptionAddOn(
        **state.stamps(),
        add_on=add_on,
        quantity=quantity,
        price=own_price(add_on, currency, given) if add_on.tier_type == "flat" else None,
        tiers=own_tiers(add_on, currency, given) if add_on.tier_type != "flat" else (),
        usage_calculation_type=add_on.usage_calculation_type,
    )


def own_price(add_on: AddOn, currency: str, given: Body) -> Price:
    """Of a flat add-on: the one given, else the plan's."""
    if given.get("tiers"):
        raise invalid(("add_ons.tiers", "must be blank if the tier type is flat"))
    if given.get("unit_amount") is not None or given.get("unit_amount_decimal") is not None:
        return price_of(given, currency, "add_ons")
    if currency not in add_on.prices:
        raise invalid(("add_ons.currency", "has no price for the add-on"))
    return add_on.prices[currency]


def own_tiers(add_on: AddOn, currency: str, given: Body) -> tuple[SubscriptionTier, ...]:
    """Of any other: those given, else the plan's."""
    if given.get("unit_amount") is not None or given.get("unit_amount_decimal") is not None:
        raise invalid(("add_ons.unit_amount", f"must be blank if the tier type is {add_on.tier_type}"))
    if given.get("tiers"):
        check_tiers([tier.get("ending_quantity") for tier in given["tiers"]], "add_ons.tiers")
        return tuple(
            SubscriptionTier(tier.get("ending_quantity"), price_of(tier, currency, "add_ons.tiers"))
            for tier in given["tiers"]
        )
    if currency not in add_on.tiers[0].prices:
        raise invalid(("add_ons.currency", "has no price for the add-on"))
    return tuple(SubscriptionTier(tier.ending_quantity, tier.prices[currency]) for tier in add_on.tiers)


def _new(state: State, plan: Plan, account: Account, given: Body) -> Subscription:
    cycles = given.get("total_billing_cycles") or plan.total_billing_cycles or 1
    auto_renew = plan.auto_renew if given.get("auto_renew") is None else given["auto_renew"]
    unit_amount: Decimal = (
        plan.prices[given["currency"]] if given.get("unit_amount") is None else given["unit_amount"]
    )
    kept: dict[str, Any] = {key: value for key, value in given.items() if key not in ("add_ons", "account")}
    return Subscription(
        **state.stamps(),
        uuid=state.identifiers.uuid(),
        plan=plan,
        account=account,
        currency=given["currency"],
        status="future",
        unit_amount=unit_amount,
        quantity=1 if given.get("quantity") is None else given["quantity"],
        collection_method=given.get("collection_method") or "automatic",
        given=kept,
        anchor=given.get("starts_at") or state.now(),
        cycles=[],
        total_billing_cycles=cycles,
        renewal_billing_cycles=given.get("renewal_billing_cycles") or plan.total_billing_cycles or 1,
        remaining_billing_cycles=cycles - 1,
        auto_renew=auto_renew,
    )


def _keep(state: State, subscription: Subscription) -> None:
    state.subscriptions[subscription.id] = subscription
    state.subscription_by_uuid[subscription.uuid] = subscription
    insort(
        state.subscriptions_in_order,
        (subscription.created_at, subscription.order, subscription),
        key=lambda entry: entry[:2],
    )
    subscription.account.subscriptions.append(subscription)
