"""Subscriptions, usage, invoices and line items over HTTP."""

from collections.abc import Callable, Sequence

from billingd.sandbox.recurly import billing_views as views
from billingd.sandbox.recurly import changing, lifecycle, metering, subscribing
from billingd.sandbox.recurly.errors import not_found
from billingd.sandbox.recurly.listing import answer, choice, listed
from billingd.sandbox.recurly.model import Invoice, Line, Subscription, SubscriptionAddOn, Usage
from billingd.sandbox.recurly.paging import Entry, read_query
from billingd.sandbox.recurly.usage_book import UsageBook
from billingd.sandbox.recurly.wire import Call, Reply, reply

USAGE_SORTS = ("usage_timestamp", "recorded_timestamp")
"""So spelt, while the field is `recording_timestamp` (4.7)."""


def list_subscriptions(call: Call) -> Reply:
    """All of them; no filter by plan or custom field exists."""
    keep = _in_state(call)
    query = read_query(call.path, call.query, shown_until=call.shown_until)
    if query.sort != "created_at":
        return listed(call, call.state.subscriptions.values(), views.subscription, keep)
    in_order, by_id = call.state.subscriptions_in_order, call.state.subscriptions
    return answer(call, query, in_order, by_id, views.subscription, keep)


def list_account_subscriptions(call: Call) -> Reply:
    """Those of an account."""
    account = call.state.account(call.names["account"])
    return listed(call, account.subscriptions, views.subscription, _in_state(call))


def create_subscription(call: Call) -> Reply:
    """201."""
    return reply(201, views.subscription(subscribing.create_subscription(call.state, call.body())))


def get_subscription(call: Call) -> Reply:
    """By id or `uuid-…`."""
    return reply(200, views.subscription(call.seen(_subscription(call))))


def update_subscription(call: Call) -> Reply:
    """200."""
    changed = lifecycle.update_subscription(call.state, _subscription(call), call.body())
    return reply(200, views.subscription(changed))


def change_subscription(call: Call) -> Reply:
    """201."""
    changed = changing.change(call.state, _subscription(call), call.body())
    return reply(201, views.subscription_change(changed))


def terminate_subscription(call: Call) -> Reply:
    """Defaults: no refund, charge what is unbilled."""
    refund, charge = call.query.get("refund", "none"), call.query.get("charge", "true")
    ended = lifecycle.terminate(call.state, _subscription(call), refund, charge)
    return reply(200, views.subscription(ended))


def cancel_subscription(call: Call) -> Reply:
    """The body is optional."""
    changed = lifecycle.cancel(call.state, _subscription(call), call.body(optional=True))
    return reply(200, views.subscription(changed))


def reactivate_subscription(call: Call) -> Reply:
    """200."""
    return reply(200, views.subscription(lifecycle.reactivate(call.state, _subscription(call))))


def pause_subscription(call: Call) -> Reply:
    """From the next bill date on."""
    return reply(200, views.subscription(lifecycle.pause(call.state, _subscription(call), call.body())))


def resume_subscription(call: Call) -> Reply:
    """At once."""
    return reply(200, views.subscription(lifecycle.resume_now(call.state, _subscription(call))))


def list_usage(call: Call) -> Reply:
    """`billing_status` is `unbilled` unless given: a record billed a minute ago is not in it."""
    status = choice(call, "billing_status", "unbilled", "billed", "all") or "unbilled"
    query = read_query(call.path, call.query, sorts=USAGE_SORTS, shown_until=call.shown_until)
    book, by_usage = _attached(call).book, query.sort == "usage_timestamp"
    known = {}
    for id_ in query.ids or ():
        usage = _usage_if_any(call, id_)
        if usage is not None and usage.add_on.book is book:
            known[id_] = usage
    if status == "unbilled" and query.ids is None:
        kept = book.unbilled_by_usage if by_usage else book.unbilled_by_recording
        return answer(call, query, _with_removed(call, book, kept, by_usage), known, views.usage)
    kept = book.all_by_usage if by_usage else book.all_by_recording
    entries = _with_removed(call, book, kept, by_usage)
    billed_only = status == "billed"
    return answer(
        call, query, entries, known, views.usage, lambda usage: not billed_only or usage.billed_at is not None
    )


def create_usage(call: Call) -> Reply:
    """201."""
    subscription, attached = _subscription(call), _attached(call)
    return reply(201, views.usage(metering.create_usage(call.state, subscription, attached, call.body())))


def get_usage(call: Call) -> Reply:
    """By id."""
    id_ = call.names["usage"]
    return reply(200, views.usage(call.seen(_usage_if_any(call, id_) or call.state.usage(id_))))


def update_usage(call: Call) -> Reply:
    """200."""
    usage = call.state.usage(call.names["usage"])
    return reply(200, views.usage(metering.update_usage(call.state, usage, call.body())))


def remove_usage(call: Call) -> Reply:
    """204, and 404 the next time."""
    metering.remove_usage(call.state, call.state.usage(call.names["usage"]))
    return Reply(204)


def list_invoices(call: Call) -> Reply:
    """All of them."""
    return listed(call, call.state.invoices.values(), views.invoice, _of_kind(call))


def list_subscription_invoices(call: Call) -> Reply:
    """Those of a subscription."""
    return listed(call, _subscription(call).invoices, views.invoice, _of_kind(call))


def list_account_invoices(call: Call) -> Reply:
    """Those of an account."""
    account = call.state.account(call.names["account"])
    invoices = [invoice for each in account.subscriptions for invoice in each.invoices]
    return listed(call, invoices, views.invoice, _of_kind(call))


def get_invoice(call: Call) -> Reply:
    """By id or `number-…`."""
    return reply(200, views.invoice(call.seen(call.state.invoice(call.names["invoice"]))))


def list_line_items(call: Call) -> Reply:
    """All of them."""
    return listed(call, call.state.lines.values(), views.line, _of_type(call))


def list_invoice_line_items(call: Call) -> Reply:
    """Those of an invoice."""
    invoice = call.state.invoice(call.names["invoice"])
    return listed(call, invoice.lines, views.line, _of_type(call))


def list_subscription_line_items(call: Call) -> Reply:
    """Those of a subscription."""
    invoices = _subscription(call).invoices
    lines = [line for invoice in invoices for line in invoice.lines]
    return listed(call, lines, views.line, _of_type(call))


def get_line_item(call: Call) -> Reply:
    """By id."""
    found = call.state.lines.get(call.names["line"])
    if found is None:
        raise not_found("LineItem", "id", call.names["line"])
    return reply(200, views.line(call.seen(found)))


def _in_state(call: Call) -> Callable[[Subscription], bool]:
    """`live`: active, canceled, future or in trial (OAS: filter_subscription_state)."""
    state = choice(call, "state", "active", "canceled", "expired", "future", "in_trial", "live")
    if state is None:
        return lambda _: True
    if state == "in_trial":
        return lambda subscription: subscription.live and subscription.cycle.kind == "trial"
    wanted = {"active", "canceled", "future"} if state == "live" else {state}
    return lambda subscription: subscription.status in wanted


def _usage_if_any(call: Call, id_: str) -> Usage | None:
    """A record, a removed one too where this read does not know of the removal yet."""
    usage = call.state.usages.get(id_)
    if usage is None and (removed := call.state.removed_usages.get(id_)) and _still_shown(call, removed):
        return removed
    return usage


def _with_removed(
    call: Call, book: UsageBook[Usage], entries: Sequence[Entry[Usage]], by_usage: bool
) -> Sequence[Entry[Usage]]:
    removed = [usage for usage in book.removed if _still_shown(call, usage)]
    if not removed:
        return entries
    made = [
        (each.usage_timestamp if by_usage else each.recording_timestamp, each.order, each) for each in removed
    ]
    return sorted([*entries, *made], key=lambda entry: entry[:2])


def _still_shown(call: Call, removed: Usage) -> bool:
    at = removed.removed_at
    return call.shown_until is not None and at is not None and at > call.shown_until


def _of_kind(call: Call) -> Callable[[Invoice], bool]:
    states = ("pending", "processing", "past_due", "paid", "failed", "open", "closed", "voided")
    state = choice(call, "state", *states)
    kind = choice(call, "type", "charge", "credit", "legacy", "non-legacy")
    return lambda invoice: state in (None, invoice.status) and kind in (None, "non-legacy", invoice.kind)


def _of_type(call: Call) -> Callable[[Line], bool]:
    type_ = choice(call, "type", "charge", "credit")
    state = choice(call, "state", "invoiced", "pending")
    choice(call, "original", "true")
    return lambda line: state != "pending" and type_ in (None, views.line_type(line))


def _subscription(call: Call) -> Subscription:
    return call.state.subscription(call.names["subscription"])


def _attached(call: Call) -> SubscriptionAddOn:
    return call.state.subscription_add_on(_subscription(call), call.names["add_on"])
