"""What happens to a subscription after its creation: update, cancel, pause, terminate (6)."""

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.billing import bill, bring_up, expire, move_bill_date, resume, term_ends_at
from billingd.sandbox.recurly.checks import check_custom_fields
from billingd.sandbox.recurly.errors import bad_values, invalid, unprocessable
from billingd.sandbox.recurly.fields import Body
from billingd.sandbox.recurly.invoicing import issue, refund_drafts
from billingd.sandbox.recurly.metering import waive
from billingd.sandbox.recurly.model import Subscription
from billingd.sandbox.recurly.state import State


def update_subscription(state: State, subscription: Subscription, body: Body) -> Subscription:
    """Notes, terms and bill date; not once it has ended, nor when its plan was removed (DOC plans.md)."""
    given = schemas.SUBSCRIPTION_UPDATE.read(body)
    bring_up(state, subscription)
    if not subscription.live or subscription.plan.deleted_at:
        raise unprocessable("The subscription cannot be changed", type_="immutable_subscription")
    check_custom_fields(state, given)
    to = given.pop("next_bill_date", None)
    if to is not None and (to <= state.now() or subscription.status not in {"active", "canceled"}):
        raise invalid(("next_bill_date", "is invalid"))
    for name in ("collection_method", "remaining_billing_cycles", "renewal_billing_cycles", "auto_renew"):
        if given.get(name) is not None:
            setattr(subscription, name, given.pop(name))
    subscription.given |= given
    if to is not None:
        move_bill_date(state, subscription, to.replace(microsecond=0))
    state.touch(subscription)
    state.announce(subscription, "updated")
    return subscription


def cancel(state: State, subscription: Subscription, body: Body) -> Subscription:
    """Ends it with the cycle or, by default, the term; a future one fails at once."""
    timeframe = schemas.SUBSCRIPTION_CANCEL.read(body).get("timeframe") or "term_end"
    bring_up(state, subscription)
    if subscription.status not in {"active", "future"}:
        raise unprocessable("Only active and future subscriptions can be canceled")
    subscription.canceled_at = state.now()
    subscription.pause_cycles = 0
    if subscription.status == "future":
        subscription.status, subscription.expires_at = "failed", state.now()
    else:
        in_trial = subscription.cycle.kind == "trial"
        at_bill_date = timeframe == "bill_date" or in_trial
        subscription.expires_at = subscription.cycle.ends_at if at_bill_date else term_ends_at(subscription)
        subscription.status = "canceled"
    state.touch(subscription)
    state.announce(subscription, "canceled")
    return subscription


def reactivate(state: State, subscription: Subscription) -> Subscription:
    """Takes a cancellation back."""
    bring_up(state, subscription)
    if subscription.status != "canceled":
        raise unprocessable("Only canceled subscriptions can be reactivated")
    subscription.status, subscription.canceled_at, subscription.expires_at = "active", None, None
    state.touch(subscription)
    state.announce(subscription, "reactivated")
    return subscription


def pause(state: State, subscription: Subscription, body: Body) -> Subscription:
    """From the next bill date on, for so many cycles; 0 takes a pause back."""
    cycles = schemas.SUBSCRIPTION_PAUSE.read(body)["remaining_pause_cycles"]
    bring_up(state, subscription)
    if subscription.status not in {"active", "paused"}:
        raise unprocessable("Only active subscriptions can be paused")
    if cycles == 0 and subscription.status == "paused":
        return resume_now(state, subscription)
    subscription.pause_cycles = cycles
    state.touch(subscription)
    state.announce(subscription, "updated")
    return subscription


def pause_now(state: State, subscription: Subscription, cycles: int) -> None:
    """The sandbox's own: as if the next bill date were now."""
    pause(state, subscription, {"remaining_pause_cycles": cycles})
    if subscription.status == "active":
        bill(state, subscription, state.now())


def resume_now(state: State, subscription: Subscription) -> Subscription:
    """Back to active at once."""
    bring_up(state, subscription)
    if subscription.status != "paused":
        raise unprocessable(f"Unable to resume {subscription.status} subscription")
    resume(state, subscription, state.now())
    return subscription


def terminate(state: State, subscription: Subscription, refund: str, charge: str) -> Subscription:
    """Expires it at once; unbilled usage goes on the final invoice, with charge=false at zero."""
    if refund not in {"none", "partial", "full"}:
        raise bad_values(["refund"], status=422)
    if charge not in {"true", "false"}:
        raise bad_values(["charge"], status=422)
    bring_up(state, subscription)
    if subscription.status not in {"active", "canceled", "paused"}:
        raise unprocessable("Cannot expire an inactive subscription.")
    now = state.now()
    if charge == "false":
        for attached in subscription.add_ons.values():
            waive(state, subscription, attached)
    credits_ = refund_drafts(subscription, now, refund)
    expire(state, subscription, now, "terminated")
    issue(state, subscription, credits_, origin="refund", at=now)
    return subscription
