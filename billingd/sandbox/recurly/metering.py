"""Usage records: which are taken, where they belong, what may still be changed (4.7, 5)."""

from bisect import bisect_right
from datetime import datetime
from decimal import Decimal
from typing import Final

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.billing import over
from billingd.sandbox.recurly.errors import invalid, unprocessable
from billingd.sandbox.recurly.fields import Body
from billingd.sandbox.recurly.model import Cycle, Subscription, SubscriptionAddOn, Usage
from billingd.sandbox.recurly.state import State

UNITS_MAX: Final = 999_999_999
"""UBB:399-400."""
OUT_OF_RANGE: Final = "is not within valid date range for the subscription"
"""V2:22808."""
CORRECTABLE: Final = frozenset({"flat", "tiered"})
"""UBB:429-430."""


def create_usage(state: State, subscription: Subscription, attached: SubscriptionAddOn, body: Body) -> Usage:
    """A new record. Nothing about it is unique, `merchant_tag` least of all."""
    given = schemas.USAGE_CREATE.read(body)
    if not attached.metered:
        raise unprocessable("Usage can only be recorded for usage add-ons", ("add_on", "is invalid"))
    at = given.get("usage_timestamp") or state.now()
    cycle = _cycle_for(state, subscription, attached, at)
    return record(
        state,
        attached,
        subscription,
        cycle=cycle,
        units=_units(given["amount"]),
        merchant_tag=given.get("merchant_tag"),
        usage_timestamp=at,
        recording_timestamp=given.get("recording_timestamp") or at,
    )


def record(
    state: State,
    attached: SubscriptionAddOn,
    subscription: Subscription,
    *,
    cycle: Cycle,
    units: int,
    merchant_tag: str | None,
    usage_timestamp: datetime,
    recording_timestamp: datetime,
) -> Usage:
    """Keeps a record, its times cut to whole seconds."""
    usage = Usage(
        **state.stamps(),
        subscription=subscription,
        add_on=attached,
        amount=units,
        merchant_tag=merchant_tag,
        usage_timestamp=usage_timestamp.replace(microsecond=0),
        recording_timestamp=recording_timestamp.replace(microsecond=0),
        cycle=cycle.number,
    )
    state.usages[usage.id] = usage
    attached.book.add(usage)
    return usage


def waive(state: State, subscription: Subscription, attached: SubscriptionAddOn) -> Usage | None:
    """Terminating with charge=false: one negative, untagged record takes the open cycle down to zero.

    Corrections of earlier cycles are never zeroed (UBB:157). Under `last_in_period` a record of 0 has that
    effect; nothing is documented for it.
    """
    cycle, now = subscription.cycle, state.now()
    waived = sum(usage.amount for usage in attached.book.open.get(cycle.number, {}).values())
    if waived <= 0 or cycle.kind != "paid":
        return None
    last_only = attached.usage_calculation_type == "last_in_period"
    made = record(
        state,
        attached,
        subscription,
        cycle=cycle,
        units=0 if last_only else -waived,
        merchant_tag=None,
        usage_timestamp=now,
        recording_timestamp=now,
    )
    state.announce(made, "created")
    return made


def update_usage(state: State, usage: Usage, body: Body) -> Usage:
    """Everything while unbilled, `merchant_tag` alone once billed.

    Recurly's reference lets unbilled volume and stairstep records be edited, its training page does not:
    the page is followed here.
    """
    given = schemas.USAGE_UPDATE.read(body)
    others = [name for name in given if name != "merchant_tag" and given[name] is not None]
    if others and usage.billed_at:
        raise unprocessable(
            "Billed usage cannot be changed", *((name, "cannot be changed") for name in others)
        )
    if others and usage.add_on.add_on.tier_type not in CORRECTABLE:
        raise unprocessable(
            f"Usage of {usage.add_on.add_on.tier_type} add-ons cannot be changed",
            *((name, "cannot be changed") for name in others),
        )
    units = usage.amount if given.get("amount") is None else _units(given["amount"])
    at = given.get("usage_timestamp")
    cycle = _cycle_for(state, usage.subscription, usage.add_on, at).number if at else usage.cycle
    book = usage.add_on.book
    book.remove(usage)
    usage.amount, usage.cycle = units, cycle
    usage.usage_timestamp = (at or usage.usage_timestamp).replace(microsecond=0)
    recorded_at = given.get("recording_timestamp") or usage.recording_timestamp
    usage.recording_timestamp = recorded_at.replace(microsecond=0)
    usage.merchant_tag = given.get("merchant_tag", usage.merchant_tag)
    book.add(usage)
    state.touch(usage)
    return usage


def remove_usage(state: State, usage: Usage) -> None:
    """Only while unbilled."""
    if usage.billed_at:
        raise unprocessable("Billed usage cannot be deleted", ("usage_id", "is billed"))
    usage.add_on.book.remove(usage)
    usage.add_on.book.removed.append(usage)
    usage.removed_at = state.clock.now()
    state.removed_usages[usage.id] = state.usages.pop(usage.id)


def _cycle_for(state: State, subscription: Subscription, attached: SubscriptionAddOn, at: datetime) -> Cycle:
    """The cycle a timestamp lies in, or why usage at that time is refused (5.2, 5.3).

    The exact V3 errors are not known; after the end of a subscription all usage is refused, whatever its
    date, as no invoice would follow.
    """
    if at > state.clock.now():
        raise unprocessable(
            "Cannot create usage record with a usage timestamp in the future.",
            ("usage_timestamp", "is in the future"),
        )
    if not subscription.live:
        raise invalid(("usage_timestamp", OUT_OF_RANGE))
    if subscription.status == "paused":
        raise unprocessable(
            "Usage cannot be recorded while the subscription is paused", ("state", "is paused")
        )
    if at.replace(microsecond=0) < attached.created_at:
        raise invalid(("usage_timestamp", OUT_OF_RANGE))
    cycles = subscription.cycles
    cycle = cycles[bisect_right(cycles, at, key=lambda cycle: cycle.started_at) - 1]
    if cycle.kind == "paused" or (at >= cycle.ends_at and not _takes_usage_after(subscription)):
        raise invalid(("usage_timestamp", OUT_OF_RANGE))
    if cycle is not subscription.cycle and cycle.kind != "trial":
        _check_correction(attached)
    return cycle


def _takes_usage_after(subscription: Subscription) -> bool:
    """Whether the cycle after the current one will take usage: not if a pause or nothing follows."""
    paid = subscription.status == "active" and subscription.cycle.kind == "paid"
    return not (paid and subscription.pause_cycles) and not over(subscription)


def _check_correction(attached: SubscriptionAddOn) -> None:
    """Whether a cycle that has been billed takes usage still (UBB:425-431)."""
    add_on = attached.add_on
    reason = None
    if add_on.tier_type not in CORRECTABLE:
        reason = f"{add_on.tier_type} add-ons"
    elif add_on.usage_timeframe == "subscription_term":
        reason = "add-ons billed over the subscription term"
    elif attached.usage_calculation_type == "last_in_period":
        reason = "add-ons that bill the last record of a period"  # not documented: the harsher way
    if reason:
        message = f"Usage corrections are not accepted for {reason}"
        raise unprocessable(message, ("usage_timestamp", "is in a billing cycle that has been billed"))


def _units(amount: Decimal) -> int:
    """Digits after the point are stripped, without the Decimal Quantity feature (4.7)."""
    units = int(amount)
    if abs(units) > UNITS_MAX:
        raise invalid(("amount", f"must be between -{UNITS_MAX} and {UNITS_MAX}"))
    return units
