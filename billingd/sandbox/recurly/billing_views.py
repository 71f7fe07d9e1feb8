"""Subscriptions, usage, invoices and lines as Recurly's JSON."""

from decimal import Decimal
from typing import Any

from billingd.sandbox.recurly.billing import term_ends_at
from billingd.sandbox.recurly.changing import Change
from billingd.sandbox.recurly.charges import charge
from billingd.sandbox.recurly.model import Invoice, Line, Subscription, SubscriptionAddOn, Usage
from billingd.sandbox.recurly.views import (
    Json,
    account_mini,
    add_on_mini,
    amount,
    custom_fields,
    ending_quantity,
    plan_mini,
    price,
    time,
)

LINES_SHOWN_MAX = 500
"""`line_items` of an invoice; the rest by /invoices/{id}/line_items."""


def subscription(subscription: Subscription) -> Json:
    """OAS: Subscription."""
    given, add_ons_total = subscription.given, _add_ons_total(subscription)
    subtotal = subscription.unit_amount * subscription.quantity + add_ons_total
    return {
        "id": subscription.id,
        "object": "subscription",
        "uuid": subscription.uuid,
        "account": account_mini(subscription.account),
        "plan": plan_mini(subscription.plan),
        "state": subscription.status,
        "shipping": None,
        "coupon_redemptions": [],
        "pending_change": None,
        **_dates(subscription),
        **_terms(subscription),
        "currency": subscription.currency,
        "revenue_schedule_type": given.get("revenue_schedule_type") or "evenly",
        "unit_amount": amount(subscription.unit_amount),
        "tax_inclusive": False,
        "quantity": subscription.quantity,
        "add_ons": [subscription_add_on(subscription, each) for each in subscription.add_ons.values()],
        "add_ons_total": amount(add_ons_total),
        "subtotal": amount(subtotal),
        "tax": 0.0,
        "tax_info": None,
        "total": amount(subtotal),
        "collection_method": subscription.collection_method,
        "po_number": given.get("po_number"),
        "net_terms": given.get("net_terms") or 0,
        "net_terms_type": given.get("net_terms_type") or "net",
        "terms_and_conditions": given.get("terms_and_conditions"),
        "customer_notes": given.get("customer_notes"),
        "expiration_reason": subscription.expiration_reason,
        "custom_fields": custom_fields(given),
        "gateway_code": None,
        "billing_info_id": None,
        "active_invoice_id": subscription.invoices[-1].id if subscription.invoices else None,
        "business_entity_id": None,
        "started_with_gift": False,
        "converted_at": None,
        "action_result": None,
    }


def subscription_add_on(subscription: Subscription, attached: SubscriptionAddOn) -> Json:
    """OAS: SubscriptionAddOn."""
    return {
        "id": attached.id,
        "object": "subscription_add_on",
        "subscription_id": subscription.id,
        "add_on": add_on_mini(attached.add_on),
        "add_on_source": "plan_add_on",
        "quantity": attached.quantity,
        **price(attached.price),
        "revenue_schedule_type": "evenly",
        "tier_type": attached.add_on.tier_type,
        "usage_calculation_type": attached.usage_calculation_type,
        "usage_timeframe": attached.add_on.usage_timeframe,
        "tiers": _tiers(attached) or None,  # null, not empty: the schema has `minItems: 1`
        "percentage_tiers": None,
        "usage_percentage": None,
        "created_at": time(attached.created_at),
        "updated_at": time(attached.updated_at),
        "expired_at": time(attached.expired_at),
    }


def subscription_change(change: Change) -> Json:
    """OAS: SubscriptionChange; one that has taken effect already."""
    subscription, at = change.subscription, time(change.at)
    return {
        "id": change.id,
        "object": "subscription_change",
        "subscription_id": subscription.id,
        "plan": plan_mini(subscription.plan),
        "add_ons": [subscription_add_on(subscription, each) for each in subscription.add_ons.values()],
        "unit_amount": amount(subscription.unit_amount),
        "tax_inclusive": False,
        "quantity": subscription.quantity,
        "shipping": None,
        "activate_at": at,
        "activated": True,
        "revenue_schedule_type": subscription.given.get("revenue_schedule_type") or "evenly",
        "invoice_collection": {
            "object": "invoice_collection",
            "charge_invoice": invoice(change.charge) if change.charge else None,
            "credit_invoices": [invoice(change.credit)] if change.credit else [],
        },
        "business_entity": None,
        "custom_fields": custom_fields(subscription.given),
        "billing_info": None,
        "ramp_intervals": [],
        "created_at": at,
        "updated_at": at,
        "deleted_at": None,
    }


def usage(usage: Usage) -> Json:
    """OAS: Usage."""
    attached = usage.add_on
    unit = attached.add_on.measured_unit
    return {
        "id": usage.id,
        "object": "usage",
        "merchant_tag": usage.merchant_tag,
        "amount": usage.amount,
        "usage_type": attached.add_on.usage_type,
        "tier_type": attached.add_on.tier_type,
        "tiers": _tiers(attached),
        "percentage_tiers": [],
        "measured_unit_id": unit.id if unit else None,
        "recording_timestamp": time(usage.recording_timestamp),
        "usage_timestamp": time(usage.usage_timestamp),
        "usage_percentage": None,
        **price(attached.price),
        "billed_at": time(usage.billed_at),
        "created_at": time(usage.created_at),
        "updated_at": time(usage.updated_at),
    }


def invoice(invoice: Invoice) -> Json:
    """OAS: Invoice."""
    total, given = amount(invoice.total), invoice.subscription.given
    paid = invoice.status in {"paid", "closed"}
    return {
        "id": invoice.id,
        "uuid": invoice.uuid,
        "object": "invoice",
        "type": invoice.kind,
        "origin": invoice.origin,
        "state": invoice.status,
        "account": account_mini(invoice.subscription.account),
        "billing_info_id": None,
        "subscription_ids": [invoice.subscription.id],
        "previous_invoice_id": None,
        "number": invoice.number,
        "collection_method": invoice.subscription.collection_method,
        "po_number": given.get("po_number"),
        "net_terms": given.get("net_terms") or 0,
        "net_terms_type": given.get("net_terms_type") or "net",
        "address": None,
        "shipping_address": None,
        "currency": invoice.subscription.currency,
        "discount": 0.0,
        "subtotal": total,
        "subtotal_after_discount": total,
        "tax": 0.0,
        "total": total,
        "refundable_amount": total if invoice.kind == "charge" and paid else None,
        "paid": total if paid else 0.0,
        "balance": 0.0 if paid else total,
        "tax_info": None,
        "used_tax_service": False,
        "line_items": [line(each) for each in invoice.lines[:LINES_SHOWN_MAX]],
        "has_more_line_items": len(invoice.lines) > LINES_SHOWN_MAX,
        "transactions": [],
        "credit_payments": [],
        "created_at": time(invoice.created_at),
        "updated_at": time(invoice.updated_at),
        "due_at": time(invoice.created_at),
        "closed_at": time(invoice.created_at) if paid else None,
        "dunning_campaign_id": None,
        "dunning_events_sent": 0,
        "final_dunning_event": False,
        "business_entity_id": None,
    }


def line(line: Line) -> Json:
    """OAS: LineItem. A credit has a positive quantity and negative amounts."""
    subscription, charged = line.invoice.subscription, line_type(line) == "charge"
    add_on = line.add_on.add_on if line.add_on else None
    return {
        "id": line.id,
        "object": "line_item",
        "uuid": line.uuid,
        "type": line_type(line),
        "state": "invoiced",
        "account": account_mini(subscription.account),
        "subscription_id": subscription.id,
        "plan_id": subscription.plan.id,
        "plan_code": subscription.plan.code,
        "add_on_id": add_on.id if add_on else None,
        "add_on_code": add_on.code if add_on else None,
        "invoice_id": line.invoice.id,
        "invoice_number": line.invoice.number,
        "origin": line.origin,
        "accounting_code": add_on.accounting_code if add_on else subscription.plan.accounting_code,
        "product_code": add_on.code if add_on else subscription.plan.code,
        "credit_reason_code": None if charged else "general",
        "currency": subscription.currency,
        "amount": amount(line.amount),
        "description": line.description,
        "quantity": abs(line.units),
        "quantity_decimal": None,
        **price(line.price),
        "subtotal": amount(line.amount),
        "discount": 0.0,
        "tax": 0.0,
        "taxable": False,
        "tax_exempt": False,
        "proration_rate": None,
        "refund": line.invoice.origin == "refund",
        "refunded_quantity": None,
        "credit_applied": None,
        "start_date": time(line.start_date),
        "end_date": time(line.end_date),
        "custom_fields": [],
        "created_at": time(line.created_at),
        "updated_at": time(line.updated_at),
    }


def line_type(line: Line) -> str:
    """A net-negative line is a credit."""
    return "charge" if line.amount >= 0 and line.units >= 0 else "credit"


def _dates(subscription: Subscription) -> Json:
    cycle, started = subscription.cycle, subscription.activated_at is not None
    trials = [each for each in subscription.cycles if each.kind == "trial"]
    paused = [each for each in subscription.cycles if each.kind == "paused"] or [cycle]
    pausing = bool(subscription.pause_cycles)
    starts, ends = (cycle.started_at, cycle.ends_at) if started else (cycle.ends_at, None)
    return {
        "current_period_started_at": time(starts),
        "current_period_ends_at": time(ends),
        "current_term_started_at": time(subscription.term_started_at),
        "current_term_ends_at": time(term_ends_at(subscription)) if subscription.term_started_at else None,
        "trial_started_at": time(trials[0].started_at) if trials else None,
        "trial_ends_at": time(trials[0].ends_at) if trials else None,
        "paused_at": time(paused[-1].started_at if cycle.kind == "paused" else ends) if pausing else None,
        "remaining_pause_cycles": subscription.pause_cycles if pausing else None,
        "resume_at": None,
        "created_at": time(subscription.created_at),
        "updated_at": time(subscription.updated_at),
        "activated_at": time(subscription.activated_at),
        "canceled_at": time(subscription.canceled_at),
        "expires_at": time(subscription.expires_at),
        "bank_account_authorized_at": None,
    }


def _terms(subscription: Subscription) -> Json:
    return {
        "remaining_billing_cycles": subscription.remaining_billing_cycles,
        "total_billing_cycles": subscription.total_billing_cycles,
        "renewal_billing_cycles": subscription.renewal_billing_cycles,
        "auto_renew": subscription.auto_renew,
    }


def _tiers(attached: SubscriptionAddOn) -> list[dict[str, Any]]:
    return [
        {"ending_quantity": ending_quantity(tier.ending_quantity), **price(tier.price)}
        for tier in attached.tiers
    ]


def _add_ons_total(subscription: Subscription) -> Decimal:
    """Usage add-ons are left out: their fees are not known yet."""
    fixed = (each for each in subscription.add_ons.values() if not each.metered)
    return sum((charge(each.pricing, each.quantity) for each in fixed), Decimal(0))
