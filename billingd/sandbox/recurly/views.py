"""Catalogue and accounts as Recurly's JSON: `object` on every item, whole-second Z times, nulls spelt out."""

from datetime import datetime
from decimal import Decimal
from typing import Any

from billingd.sandbox.recurly.charges import UNBOUNDED
from billingd.sandbox.recurly.model import Account, AddOn, MeasuredUnit, Plan, Price, Record
from billingd.sandbox.recurly.state import State

Json = dict[str, Any]


def time(at: datetime | None) -> str | None:
    """Whole seconds: the SDK cannot read fractions."""
    return None if at is None else at.isoformat(timespec="seconds")[:19] + "Z"  # much cheaper than strftime


def amount(value: Decimal) -> float:
    """A JSON number; only here does money leave Decimal."""
    return float(value)


def price(value: Price | None) -> Json:
    """`unit_amount` reads null if the price was given as a decimal (4.4)."""
    if value is None:
        return {"unit_amount": None, "unit_amount_decimal": None}
    if value.exact:
        return {"unit_amount": None, "unit_amount_decimal": f"{value.amount:f}"}
    return {"unit_amount": amount(value.amount), "unit_amount_decimal": None}


def ending_quantity(value: int | None) -> int:
    """The open last tier reads back as 999999999, "the default" (4.4)."""
    return UNBOUNDED if value is None else value


def stamps(record: Record) -> Json:
    """When it was made, changed, removed."""
    return {
        "created_at": time(record.created_at),
        "updated_at": time(record.updated_at),
        "deleted_at": time(record.deleted_at),
    }


def site(state: State) -> Json:
    """OAS: Site."""
    settings = state.settings
    return {
        "id": state.record.id,
        "object": "site",
        "subdomain": "sandbox",
        "public_api_key": None,
        "mode": "production" if settings.production else "sandbox",
        "address": None,
        "settings": {
            "billing_address_requirement": "none",
            "accepted_currencies": sorted(settings.currencies),
            "default_currency": "USD",
        },
        "features": ["credit_memos", "manual_invoicing", "only_bill_what_changed", "subscription_terms"],
        **stamps(state.record),
    }


def measured_unit(unit: MeasuredUnit) -> Json:
    """OAS: MeasuredUnit."""
    return {
        "id": unit.id,
        "object": "measured_unit",
        "name": unit.name,
        "display_name": unit.display_name,
        "state": unit.state,
        "description": unit.description,
        **stamps(unit),
    }


def plan_mini(plan: Plan) -> Json:
    """OAS: PlanMini."""
    return {"id": plan.id, "object": "plan", "code": plan.code, "name": plan.name}


def plan(plan: Plan) -> Json:
    """OAS: Plan. Add-ons are not in it."""
    given = plan.given
    return {
        **plan_mini(plan),
        "state": plan.state,
        "pricing_model": "fixed",
        "currencies": [
            {
                "currency": currency,
                "setup_fee": amount(plan.setup_fees.get(currency, Decimal(0))),
                "unit_amount": amount(unit_amount),
                "tax_inclusive": False,
            }
            for currency, unit_amount in plan.prices.items()
        ],
        "setup_fees": [
            {"currency": currency, "unit_amount": amount(fee)} for currency, fee in plan.setup_fees.items()
        ],
        "interval_unit": plan.interval_unit,
        "interval_length": plan.interval_length,
        "description": given.get("description"),
        "accounting_code": plan.accounting_code,
        "setup_fee_accounting_code": given.get("setup_fee_accounting_code"),
        "revenue_schedule_type": given.get("revenue_schedule_type") or "evenly",
        "setup_fee_revenue_schedule_type": given.get("setup_fee_revenue_schedule_type") or "at_range_start",
        "trial_unit": plan.trial_unit,
        "trial_length": plan.trial_length,
        "trial_requires_billing_info": plan.trial_requires_billing_info,
        "total_billing_cycles": plan.total_billing_cycles,
        "auto_renew": plan.auto_renew,
        "custom_fields": custom_fields(given),
        "tax_code": None,
        "tax_exempt": bool(given.get("tax_exempt")),
        "hosted_pages": given.get("hosted_pages") or {},
        "allow_any_item_on_subscriptions": bool(given.get("allow_any_item_on_subscriptions")),
        "dunning_campaign_id": None,
        **stamps(plan),
    }


def add_on_mini(add_on: AddOn) -> Json:
    """OAS: AddOnMini."""
    return {
        "id": add_on.id,
        "object": "add_on",
        "code": add_on.code,
        "name": add_on.name,
        "add_on_type": add_on.add_on_type,
        "usage_type": add_on.usage_type,
        "usage_percentage": None,
        "measured_unit_id": add_on.measured_unit.id if add_on.measured_unit else None,
        "item_id": None,
        "external_sku": None,
        "accounting_code": add_on.accounting_code,
    }


def add_on(add_on: AddOn) -> Json:
    """OAS: AddOn."""
    given, mini = add_on.given, add_on_mini(add_on)
    del mini["item_id"]
    return {
        **mini,
        "plan_id": add_on.plan_id,
        "state": add_on.state,
        "usage_calculation_type": add_on.usage_calculation_type,
        "usage_timeframe": add_on.usage_timeframe,
        "revenue_schedule_type": given.get("revenue_schedule_type") or "evenly",
        "display_quantity": bool(given.get("display_quantity")),
        "default_quantity": 1 if given.get("default_quantity") is None else given["default_quantity"],
        "optional": bool(given.get("optional")),
        "tax_code": None,
        # null, not empty: the schema has `minItems: 1`
        "currencies": [_priced(currency, each) for currency, each in add_on.prices.items()] or None,
        "item": None,
        "tier_type": add_on.tier_type,
        "tiers": [
            {
                "ending_quantity": ending_quantity(tier.ending_quantity),
                "currencies": [_priced(currency, each) for currency, each in tier.prices.items()],
            }
            for tier in add_on.tiers
        ],
        "percentage_tiers": [],
        **stamps(add_on),
    }


def account_mini(account: Account) -> Json:
    """OAS: AccountMini."""
    return {
        "id": account.id,
        "object": "account",
        "code": account.code,
        **{name: account.given.get(name) for name in ("email", "first_name", "last_name", "company")},
        "parent_account_id": None,
        "bill_to": account.given.get("bill_to") or "self",
        "dunning_campaign_id": None,
    }


def account(account: Account) -> Json:
    """OAS: Account."""
    given = account.given
    states = {subscription.status for subscription in account.subscriptions}
    texts = (
        "username",
        "preferred_locale",
        "preferred_time_zone",
        "cc_emails",
        "vat_number",
        "exemption_certificate",
        "address",
        "entity_use_code",
    )
    return {
        **account_mini(account),
        "state": account.state,
        "hosted_login_token": account.id.ljust(32, "0"),
        "shipping_addresses": [],
        "has_live_subscription": bool(states & {"active", "canceled", "future", "paused"}),
        "has_active_subscription": "active" in states,
        "has_future_subscription": "future" in states,
        "has_canceled_subscription": "canceled" in states,
        "has_paused_subscription": "paused" in states,
        "has_past_due_invoice": False,
        **{name: given.get(name) for name in texts},
        "override_business_entity_id": None,
        "tax_exempt": bool(given.get("tax_exempt")),
        "external_accounts": [],
        "invoice_template_id": None,
        "billing_info": None,
        "bill_date": None,
        "custom_fields": custom_fields(given),
        **stamps(account),
    }


def custom_fields(given: Json) -> list[Json]:
    """Name and value only: with `object`, the SDK's strict mode refuses them."""
    fields = given.get("custom_fields") or ()
    return [{"name": each["name"], "value": each["value"]} for each in fields if each.get("value")]


def _priced(currency: str, value: Price) -> Json:
    return {"currency": currency, **price(value)}
