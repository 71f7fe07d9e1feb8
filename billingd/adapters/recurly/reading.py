"""SDK resources -> domain values. A resource has only the attributes its JSON had, so each is looked for.

What lacks its kind or identity is `Unreadable`: a 200 that says nothing is not a success.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal

import recurly
import structlog

from billingd.domain.billing import (
    Account,
    BilledAddOn,
    BilledPlan,
    BilledSubscription,
    BilledUsage,
    Site,
    SubscribedAddOn,
)
from billingd.domain.charges import Prices
from billingd.domain.pricing import TierSpec

log = structlog.get_logger(__name__)


class Unreadable(Exception):
    """An answer that is not what the call asked for."""


def identity(resource: object, kind: str) -> str:
    """The id of a resource of this kind."""
    return required(_of_kind(resource, kind), "id")


def nothing(resource: object) -> None:
    """The answer of a removal that has none."""
    if not isinstance(resource, recurly.resource.Empty):
        raise Unreadable("expected an empty answer")


def account(resource: object) -> Account:
    """An account."""
    _of_kind(resource, "account")
    return Account(code=required(resource, "code"), state=required(resource, "state"))


def site(resource: object) -> Site:
    """A site."""
    _of_kind(resource, "site")
    given = getattr(resource, "settings", None)
    return Site(
        subdomain=required(resource, "subdomain"),
        mode=optional(resource, "mode") or "unknown",
        currencies=frozenset(map(str, listed(given, "accepted_currencies"))),
        features=frozenset(map(str, listed(resource, "features"))),
    )


def made(resource: object) -> tuple[str, datetime]:
    """The id of a resource of any kind, and when it was made."""
    at = moment(resource, "created_at")
    if at is None:
        raise Unreadable("created_at is missing")
    return required(resource, "id"), at


def measured_unit(resource: object) -> str | None:
    """The id of a measured unit that is still in use."""
    found = identity(resource, "measured_unit")
    return None if optional(resource, "state") == "inactive" else found


def plan(resource: object) -> BilledPlan:
    """A plan, whatever its state."""
    _of_kind(resource, "plan")
    cycles = getattr(resource, "total_billing_cycles", None)
    trial = getattr(resource, "trial_length", None)
    prices = listed(resource, "currencies")
    fees = {c: a for each in prices if (c := optional(each, "currency")) and (a := money(each, "setup_fee"))}
    fees |= _amounts(listed(resource, "setup_fees"))
    return BilledPlan(
        id=required(resource, "id"),
        code=required(resource, "code"),
        state=required(resource, "state"),
        interval_unit=required(resource, "interval_unit"),
        interval_length=whole(resource, "interval_length"),
        total_billing_cycles=None if cycles is None else whole(resource, "total_billing_cycles"),
        auto_renew=bool(getattr(resource, "auto_renew", None)),
        unit_amounts=_amounts(prices),
        setup_fees=fees,
        name=optional(resource, "name") or "",
        trial_unit=optional(resource, "trial_unit") or "months",
        trial_length=0 if trial is None else whole(resource, "trial_length"),
    )


def plan_of(resource: object, prefix: str) -> BilledPlan | None:
    """A plan whose code begins like this; None for any other, and for one that cannot be read."""
    if not (optional(resource, "code") or "").startswith(prefix):
        return None
    try:
        return plan(resource)
    except (Unreadable, ArithmeticError) as error:
        log.warning("recurly.plan_not_readable", plan=optional(resource, "code"), error=str(error))
        return None


def add_on(resource: object, currency: str) -> BilledAddOn:
    """A plan's add-on, priced in one currency."""
    _of_kind(resource, "add_on")
    tier_type = optional(resource, "tier_type") or "flat"
    return BilledAddOn(
        id=required(resource, "id"),
        code=required(resource, "code"),
        state=required(resource, "state"),
        add_on_type=required(resource, "add_on_type"),
        usage_type=optional(resource, "usage_type"),
        usage_calculation_type=optional(resource, "usage_calculation_type"),
        usage_timeframe=optional(resource, "usage_timeframe"),
        tier_type=tier_type,
        measured_unit_id=optional(resource, "measured_unit_id"),
        unit_amount=_price(resource, currency) if tier_type == "flat" else None,
        tiers=tuple(_tiers(resource, currency)) if tier_type != "flat" else (),
        name=optional(resource, "name") or "",
    )


def subscription(resource: object) -> BilledSubscription:
    """A subscription; its add-ons' codes each once, in Recurly's order."""
    _of_kind(resource, "subscription")
    own = listed(resource, "add_ons")
    codes = [_add_on_code(each) for each in own]
    return BilledSubscription(
        uuid=required(resource, "uuid"),
        plan_code=required(getattr(resource, "plan", None), "code"),
        account_code=required(getattr(resource, "account", None), "code"),
        marker=optional(resource, "po_number"),
        state=required(resource, "state"),
        add_on_codes=tuple(dict.fromkeys(code for code in codes if code)),
        activated_at=moment(resource, "activated_at"),
        period_started_at=moment(resource, "current_period_started_at"),
        period_ends_at=moment(resource, "current_period_ends_at"),
        trial_ends_at=moment(resource, "trial_ends_at"),
        add_ons=tuple(each for each in map(_subscribed, own) if each is not None),
        unit_amount=money(resource, "unit_amount"),
        currency=optional(resource, "currency"),
    )


def attached(resource: object) -> dict[str, str | None]:
    """The code of each add-on on a subscription, by its id there; none may be missing."""
    _of_kind(resource, "subscription")
    if not isinstance(getattr(resource, "add_ons", None), list):
        raise Unreadable("the subscription does not say which add-ons it has")
    return {required(each, "id"): _add_on_code(each) for each in listed(resource, "add_ons")}


def subscription_if_readable(resource: object) -> BilledSubscription | None:
    """The same, None where it lacks what one of ours has."""
    try:
        return subscription(resource)
    except (Unreadable, ArithmeticError) as error:
        log.warning("recurly.subscription_not_readable", error=str(error))
        return None


def line_dates(resource: object) -> tuple[datetime, ...]:
    """The cycle that a line item is for: where it starts and ends; nothing for a one-time charge."""
    _of_kind(resource, "line_item")
    start, end = moment(resource, "start_date"), moment(resource, "end_date")
    return () if start is None or end is None or end <= start else (start, end)


def charged_start(resource: object) -> datetime | None:
    """Where the cycle starts that a line item charges the plan's own price for; None for any other line.

    Usage is billed in arrears on lines of the same dates, with the origin `add_on`; a refund is a credit.
    """
    _of_kind(resource, "line_item")
    if (optional(resource, "origin"), optional(resource, "type")) != ("plan", "charge"):
        return None
    return None if money(resource, "subtotal") == 0 else moment(resource, "start_date")


def usage(resource: object) -> BilledUsage:
    """A usage record; units are whole, and never rounded to be so."""
    found = identity(resource, "usage")
    at = moment(resource, "usage_timestamp")
    if at is None:
        raise Unreadable(f"usage {found} has no usage_timestamp")
    return BilledUsage(
        id=found,
        units=whole(resource, "amount"),
        merchant_tag=optional(resource, "merchant_tag"),
        usage_timestamp=at,
        billed_at=moment(resource, "billed_at"),
        created_at=moment(resource, "created_at"),
    )


def required(resource: object, name: str) -> str:
    """A text that must be there."""
    if value := optional(resource, name):
        return value
    raise Unreadable(f"{type(resource).__name__} has no {name}")


def optional(resource: object, name: str) -> str | None:
    """A text, or None."""
    value = getattr(resource, name, None)
    return value if isinstance(value, str) and value else None


def listed(resource: object, name: str) -> list[object]:
    """A list, empty when absent."""
    value = getattr(resource, name, None)
    return list(value) if isinstance(value, list) else []


def moment(resource: object, name: str) -> datetime | None:
    """A time in UTC, or None."""
    value = getattr(resource, name, None)
    return value.astimezone(UTC) if isinstance(value, datetime) else None


def whole(resource: object, name: str) -> int:
    """A whole number, which the SDK may hold as a float."""
    value = getattr(resource, name, None)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise Unreadable(f"{type(resource).__name__}.{name} is {value!r}, not a whole number")


def money(resource: object, name: str) -> Decimal | None:
    """An amount as it was written: a float's shortest text is what the JSON said."""
    value = getattr(resource, name, None)
    if value is None:
        return None
    amount = Decimal(str(value))  # InvalidOperation is an ArithmeticError: unreadable like the rest
    if not amount.is_finite():
        raise Unreadable(f"{type(resource).__name__}.{name} is {value!r}")
    return amount


def _add_on_code(attached: object) -> str | None:
    return optional(getattr(attached, "add_on", None), "code")


def _subscribed(attached: object) -> SubscribedAddOn | None:
    """An add-on on a subscription; its tiers have one price each, without a currency."""
    id_, code = optional(attached, "id"), _add_on_code(attached)
    if id_ is None or code is None:
        return None
    tier_type = optional(attached, "tier_type") or "flat"
    tiers = () if tier_type == "flat" else tuple(_own_tiers(attached))
    prices = Prices(tier_type, _unit_amount(attached) if tier_type == "flat" else None, tiers)
    return SubscribedAddOn(id_, code, prices, moment(attached, "created_at"))


def _own_tiers(attached: object) -> Iterable[TierSpec]:
    for each in listed(attached, "tiers"):
        if (amount := _unit_amount(each)) is not None:
            yield TierSpec(_ending(each), amount)


def _ending(tier: object) -> int | None:
    return None if getattr(tier, "ending_quantity", None) is None else whole(tier, "ending_quantity")


def _of_kind(resource: object, kind: str) -> object:
    if not isinstance(resource, recurly.Resource) or getattr(resource, "object", None) != kind:
        raise Unreadable(f"expected {kind}, got {type(resource).__name__}")
    return resource


def _unit_amount(priced: object) -> Decimal | None:
    decimal = money(priced, "unit_amount_decimal")
    return money(priced, "unit_amount") if decimal is None else decimal


def _price(holder: object, currency: str) -> Decimal | None:
    for each in listed(holder, "currencies"):
        if optional(each, "currency") == currency:
            return _unit_amount(each)
    return None


def _tiers(resource: object, currency: str) -> Iterable[TierSpec]:
    for each in listed(resource, "tiers"):
        amount = _price(each, currency)
        if amount is None:  # not sold in this currency
            continue
        yield TierSpec(_ending(each), amount)


def _amounts(prices: list[object]) -> dict[str, Decimal]:
    return {c: a for p in prices if (c := optional(p, "currency")) and (a := _unit_amount(p)) is not None}
