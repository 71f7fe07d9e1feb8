"""What a site knows in the end: units and money per subscription and add-on, for checks from outside."""

from collections import Counter
from typing import Any

from billingd.sandbox.recurly.model import Invoice, Subscription, SubscriptionAddOn
from billingd.sandbox.recurly.state import State


def oracle(state: State) -> dict[str, Any]:
    """JSON-able; amounts are strings, times ISO 8601, tags without a name count under ""."""
    return {"subscriptions": [_subscription(each) for each in state.subscriptions.values()]}


def _subscription(subscription: Subscription) -> dict[str, Any]:
    return {
        "uuid": subscription.uuid,
        "id": subscription.id,
        "marker": subscription.given.get("po_number"),
        "account": subscription.account.code,
        "plan": subscription.plan.code,
        "state": subscription.status,
        "currency": subscription.currency,
        "current_period_started_at": subscription.cycle.started_at.isoformat(),
        "current_period_ends_at": subscription.cycle.ends_at.isoformat(),
        "add_ons": _add_ons(subscription),
        "invoices": [_invoice(each) for each in subscription.invoices],
    }


def _add_ons(subscription: Subscription) -> dict[str, Any]:
    """By code; one that was removed and attached again counts as one."""
    told: dict[str, Any] = {}
    for each in subscription.all_add_ons:
        code, one = each.add_on.code, _add_on(subscription, each)
        if code in told:
            one |= {name: told[code][name] + one[name] for name in one if name != "tags"}
            one["tags"] = dict(Counter(told[code]["tags"]) + Counter(one["tags"]))
        told[code] = one
    return told


def _add_on(subscription: Subscription, attached: SubscriptionAddOn) -> dict[str, Any]:
    """`reported` = `billed` + `unbilled` + `never_billed` (trial, failed start), if usage is cumulative."""
    billed = sum(attached.billed_units.values())
    never = unbilled = 0
    for number, records in attached.book.open.items():
        units = sum(record.amount for record in records.values())
        if subscription.cycles[number].kind == "trial" or not subscription.live:
            never += units
        else:
            unbilled += units
    return {
        "reported_units": attached.book.units,
        "unbilled_units": unbilled,
        "billed_units": billed,
        "never_billed_units": never,
        "records": len(attached.book.all_by_usage),
        "tags": {tag or "": count for tag, count in attached.book.tags.items()},
    }


def _invoice(invoice: Invoice) -> dict[str, Any]:
    return {
        "number": invoice.number,
        "origin": invoice.origin,
        "created_at": invoice.created_at.isoformat(),
        "total": str(invoice.total),
        "lines": [
            {
                "origin": line.origin,
                "add_on": line.add_on.add_on.code if line.add_on else None,
                "quantity": line.units,
                "amount": str(line.amount),
                "correction": line.correction,
                "start_date": line.start_date.isoformat(),
                "end_date": line.end_date.isoformat(),
            }
            for line in invoice.lines
        ],
    }
