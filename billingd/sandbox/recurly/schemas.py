"""Request bodies as tables of fields (OAS: *Create, *Update). `unavailable`: real, but not in the sandbox."""

import re
from typing import Final

from billingd.sandbox.recurly.charges import UNBOUNDED
from billingd.sandbox.recurly.fields import (
    CODE,
    Reader,
    Spec,
    boolean,
    fields,
    integer,
    list_of,
    number,
    one_of,
    text,
    timestamp,
    unavailable,
    unit_amount,
    unit_amount_decimal,
)

CYCLES_MAX: Final = 9_999
AVALARA: Final = ("avalara_transaction_type", "avalara_service_type", "tax_code", "harmonized_system_code")
LEDGER: Final = ("liability_gl_account_id", "revenue_gl_account_id", "performance_obligation_id")
REVENUE: Final = one_of("at_range_end", "at_range_start", "evenly", "never")
CURRENCY: Final = text(3, re.compile(r"[A-Z]{3}"))
ACCOUNTING_CODE: Final = text(20, CODE)
DISPLAY_NAME: Final = text(50, re.compile(r"[\w ]+", re.ASCII))
ACCOUNT_CODE: Final = text(50, re.compile(r"[a-z0-9@_][a-z0-9@_.-]*"))
"""The V2 reference's characters (V2:4580); the V3 one gives the length only."""
EMAIL: Final = text(255, re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+"))
CUSTOM_FIELD: Final = Spec(
    {"name": text(50, re.compile(r"[a-z0-9_-]+", re.IGNORECASE)), "value": text(255)}, ("name",)
)
CUSTOM_FIELDS: Final = list_of(CUSTOM_FIELD)

AMOUNTS: Final[dict[str, Reader]] = {
    "unit_amount": unit_amount,
    "unit_amount_decimal": unit_amount_decimal,
}
PRICE: Final = Spec({"currency": CURRENCY, "tax_inclusive": unavailable, **AMOUNTS}, ("currency",))
TIER_PRICE: Final = Spec({"currency": CURRENCY, **AMOUNTS}, ("currency",))
ENDING_QUANTITY: Final = integer(1, UNBOUNDED)
TIER: Final = Spec(
    {
        "ending_quantity": ENDING_QUANTITY,
        "usage_percentage": unavailable,
        "currencies": list_of(TIER_PRICE, least=1),
    },
    ("currencies",),
)

MEASURED_UNIT: Final = {"name": text(255), "display_name": DISPLAY_NAME, "description": text()}
MEASURED_UNIT_CREATE: Final = Spec(MEASURED_UNIT, ("name", "display_name"))
MEASURED_UNIT_UPDATE: Final = Spec(MEASURED_UNIT)

ADD_ON: Final[dict[str, Reader]] = {
    "code": text(50, CODE),  # no pattern in the reference: the plan's is the safe one
    "name": text(255),
    "usage_percentage": unavailable,
    "usage_calculation_type": one_of("cumulative", "last_in_period"),
    "measured_unit_id": text(13),
    "measured_unit_name": text(),
    "accounting_code": ACCOUNTING_CODE,
    "revenue_schedule_type": REVENUE,
    "display_quantity": boolean,
    "default_quantity": integer(0),
    "optional": boolean,
    "currencies": list_of(PRICE, least=1),
    "tiers": list_of(TIER, least=1),
    "percentage_tiers": unavailable,
    **fields(unavailable, *AVALARA, *LEDGER),
}
ADD_ON_UPDATE: Final = Spec({**ADD_ON, "id": text(13)})
ADD_ON_CREATE: Final = Spec(
    {
        **ADD_ON,
        "plan_id": text(13),
        "add_on_type": one_of("fixed", "usage"),
        "usage_type": one_of("price", "percentage"),
        "tier_type": one_of("flat", "tiered", "stairstep", "volume"),
        "usage_timeframe": one_of("billing_period", "subscription_term"),
        **fields(unavailable, "item_code", "item_id"),
    },
    ("code", "name"),
)

PLAN: Final[dict[str, Reader]] = {
    "code": text(50, CODE),
    "name": text(255),
    "description": text(),
    "accounting_code": ACCOUNTING_CODE,
    "setup_fee_accounting_code": ACCOUNTING_CODE,
    "trial_unit": one_of("days", "months"),
    "trial_length": integer(0, CYCLES_MAX),
    "trial_requires_billing_info": boolean,
    # The schema allows 0, the text says "null for continuous": 0 says neither, so it is refused.
    "total_billing_cycles": integer(1, CYCLES_MAX),
    "auto_renew": boolean,
    "custom_fields": CUSTOM_FIELDS,
    "tax_exempt": boolean,
    "currencies": list_of(
        Spec(
            {
                "currency": CURRENCY,
                "unit_amount": unit_amount,
                "setup_fee": unit_amount,
                **fields(unavailable, "price_segment_id", "tax_inclusive"),
            },
            ("currency", "unit_amount"),
        ),
        least=1,
    ),
    "setup_fees": list_of(
        Spec({"currency": CURRENCY, "unit_amount": unit_amount}, ("currency", "unit_amount"))
    ),
    "hosted_pages": Spec(
        {**fields(text(), "success_url", "cancel_url"), **fields(boolean, "bypass_confirmation")}
        | fields(boolean, "display_quantity")
    ),
    "allow_any_item_on_subscriptions": boolean,
    **fields(REVENUE, "revenue_schedule_type", "setup_fee_revenue_schedule_type"),
    **fields(unavailable, "ramp_intervals", "dunning_campaign_id", "vertex_transaction_type"),
    **fields(unavailable, *AVALARA, *LEDGER, *(f"setup_fee_{name}" for name in LEDGER)),
}
PLAN_UPDATE: Final = Spec({**PLAN, "id": text(13)})
PLAN_CREATE: Final = Spec(
    {
        **PLAN,
        "pricing_model": one_of("fixed", "ramp"),
        "interval_unit": one_of("days", "months"),
        "interval_length": integer(1, CYCLES_MAX),
        "add_ons": list_of(ADD_ON_CREATE),
    },
    ("code", "name", "currencies"),
)

ADDRESS: Final = Spec(
    {
        **fields(text(50), "street1", "street2"),
        **fields(text(), "phone", "city", "region", "postal_code"),
        "country": text(2),
        "geo_code": text(20),
    }
)
ACCOUNT: Final[dict[str, Reader]] = {
    "email": EMAIL,
    "company": text(100),
    "vat_number": text(20),
    "tax_exempt": boolean,
    "exemption_certificate": text(30),
    "bill_to": one_of("parent", "self"),
    "address": ADDRESS,
    "custom_fields": CUSTOM_FIELDS,
    **fields(text(255), "username", "cc_emails", "first_name", "last_name"),
    **fields(text(), "preferred_locale", "preferred_time_zone", "entity_use_code"),
    **fields(unavailable, "override_business_entity_id", "parent_account_code", "parent_account_id"),
    **fields(unavailable, "transaction_type", "dunning_campaign_id", "invoice_template_id"),
    **fields(unavailable, "billing_info", "bill_date"),
}
ACCOUNT_UPDATE: Final = Spec(ACCOUNT)
ACCOUNT_CREATE: Final = Spec(
    {
        **ACCOUNT,
        "code": ACCOUNT_CODE,
        **fields(unavailable, "acquisition", "external_accounts", "shipping_addresses"),
    },
    ("code",),
)

SUBSCRIPTION_ADD_ON: Final = Spec(
    {
        "code": text(50),
        "add_on_source": one_of("plan_add_on"),
        "quantity": integer(0),
        **AMOUNTS,
        "tiers": list_of(
            Spec({"ending_quantity": ENDING_QUANTITY, "usage_percentage": unavailable, **AMOUNTS}), least=1
        ),
        "percentage_tiers": unavailable,
        "usage_percentage": unavailable,
        "revenue_schedule_type": REVENUE,
    },
    ("code",),
)
SUBSCRIPTION: Final[dict[str, Reader]] = {
    "collection_method": one_of("automatic", "manual"),
    "custom_fields": CUSTOM_FIELDS,
    "renewal_billing_cycles": integer(1, CYCLES_MAX),
    "auto_renew": boolean,
    "next_bill_date": timestamp,
    "revenue_schedule_type": REVENUE,
    "terms_and_conditions": text(),
    "customer_notes": text(),
    "po_number": text(50),
    "net_terms": integer(0),
    "net_terms_type": one_of("net", "eom"),
    "transaction_descriptor_suffix": text(255),
    **fields(unavailable, "price_segment_id", "credit_application_policy", "gateway_code", "tax_inclusive"),
    **fields(unavailable, "shipping", "billing_info_id"),
}
SUBSCRIPTION_UPDATE: Final = Spec({**SUBSCRIPTION, "remaining_billing_cycles": integer(0, CYCLES_MAX)})
SUBSCRIPTION_CREATE: Final = Spec(
    {
        **SUBSCRIPTION,
        "plan_code": text(50),
        "plan_id": text(13),
        "account": ACCOUNT_CREATE,
        "currency": CURRENCY,
        "unit_amount": unit_amount,
        "quantity": integer(0),
        "add_ons": list_of(SUBSCRIPTION_ADD_ON),
        "starts_at": timestamp,
        "trial_ends_at": timestamp,
        "total_billing_cycles": integer(1, CYCLES_MAX),
        "credit_customer_notes": text(),
        "bulk": boolean,
        **fields(unavailable, "business_entity_id", "business_entity_code", "coupon_codes"),
        **fields(unavailable, "ramp_intervals", "transaction_type", "gift_card_redemption_code"),
        "proration_settings": unavailable,
    },
    ("plan_code", "currency", "account"),  # plan_id wins if both are there, but OAS:35214 requires the code
)
SUBSCRIPTION_CHANGE: Final = Spec(
    {
        "timeframe": one_of("bill_date", "now", "renewal", "term_end"),
        "unit_amount": unit_amount,
        "add_ons": list_of(Spec({**SUBSCRIPTION_ADD_ON.fields, "id": text(13)})),
        "collection_method": one_of("automatic", "manual"),
        "revenue_schedule_type": REVENUE,
        "custom_fields": CUSTOM_FIELDS,
        "po_number": text(50),
        "net_terms": integer(0),
        "net_terms_type": one_of("net", "eom"),
        **fields(unavailable, "plan_id", "plan_code", "quantity", "next_bill_date", "proration_settings"),
        **fields(unavailable, "business_entity_id", "business_entity_code", "price_segment_id"),
        **fields(unavailable, "tax_inclusive", "shipping", "coupon_codes", "transaction_type"),
        **fields(unavailable, "billing_info", "ramp_intervals"),
    }
)
SUBSCRIPTION_CANCEL: Final = Spec({"timeframe": one_of("bill_date", "term_end")})
SUBSCRIPTION_PAUSE: Final = Spec({"remaining_pause_cycles": integer(0)}, ("remaining_pause_cycles",))

USAGE_FIELDS: Final[dict[str, Reader]] = {
    "merchant_tag": text(255),  # no limit given: that of a short text column
    "amount": number,
    "recording_timestamp": timestamp,
    "usage_timestamp": timestamp,
}
USAGE_CREATE: Final = Spec(USAGE_FIELDS, ("amount",))  # nothing required in V3's schema, V2 requires it
USAGE_UPDATE: Final = Spec(USAGE_FIELDS)
