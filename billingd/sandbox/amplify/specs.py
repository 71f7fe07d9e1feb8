"""What each kind's spec and subresources may hold (amplify.md 3 and 4.4)."""

from collections.abc import Mapping
from typing import Final

from billingd.sandbox.amplify.schema import (
    Check,
    by_type,
    flag,
    free_object,
    items,
    number,
    one_of,
    struct,
    text,
    text_map,
)

NAME: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"

_price = number()
_name = text(max_length=100, min_length=1, pattern=NAME)
_prose = text(max_length=10_000)
_intervals = ("annually", "monthly", "weekly", "daily")

_tier = struct(
    {"from": number(1, whole=True), "to": number(1, whole=True), "cost": _price, "flatFee": _price},
    "from",
    "to",
    "cost",
    "flatFee",
)
_tiered = by_type({"tiered": ({"tiers": items(_tier, least=1)}, ("tiers",))})
_counted = by_type(
    {
        "strict": ({"value": number(1, whole=True)}, ("value",)),
        "loose": (
            {"value": number(1, whole=True), "overages": struct({"value": _price})},
            ("value", "overages"),
        ),
    }
)
PRICING: Final = by_type(
    {
        "unlimited": ({}, ()),
        "fixed": ({"interval": one_of(*_intervals), "limit": _counted}, ("interval", "limit")),
        "perunit": ({"cost": _price}, ("cost",)),
        "graduated": ({"limit": _tiered}, ("limit",)),
        "volume": ({"limit": _tiered}, ("limit",)),
    }
)

QUOTA: Final = struct(
    {
        "description": _prose,
        "unit": text(max_length=100, min_length=1),
        "resources": items(
            struct({"kind": one_of("AssetResource"), "name": text(min_length=1)}, "kind", "name")
        ),
        "pricing": PRICING,
        "usage": struct(
            {"limit": number(whole=True), "interval": one_of(*_intervals, "hourly", "minute")},
            "limit",
            "interval",
        ),
    },
    "unit",
    "pricing",
    "resources",
)

_billing = struct(
    {
        "currency": text(pattern=r"[A-Z]{3}"),
        "price": _price,
        "cycle": one_of("recurring"),
        "interval": one_of(*_intervals),
        "setup": struct({"price": _price}, "price"),
        "invoices": struct(
            {
                "actions": items(
                    struct(
                        {
                            "when": struct(
                                {"state": one_of("pastDue"), "trigger": one_of("archiveSubscription")},
                                "state",
                                "trigger",
                            )
                        },
                        "when",
                    )
                )
            }
        ),
    },
    "currency",
    "interval",
)

PLAN: Final = struct(
    {
        "product": _name,
        "description": _prose,
        "type": one_of("free", "paid", "custom"),  # "custom": the wire value is a guess (amplify.md 3.2)
        "billing": _billing,
        "features": items(struct({"name": text(min_length=1), "description": _prose}, "name")),
        "subscription": struct(
            {
                "interval": struct(
                    {"type": one_of("days", "months", "years"), "length": number(1)}, "type", "length"
                ),
                "renewal": one_of("automatic"),
                "approval": one_of("automatic", "manual"),
                "cycles": number(1, whole=True),
                "definition": text(min_length=1),
            }
        ),
    },
    "product",
    "type",
)

PRODUCT: Final = free_object
"""Description, assets, terms: nothing billing reads (amplify.md 3.1)."""

UNIT: Final = struct({"description": _prose})

SUBSCRIPTION: Final = struct(
    {"product": _name, "plan": struct({"name": _name}, "name"), "data": free_object, "schema": free_object},
    "product",
    "plan",
)

_trigger = struct(
    {
        "group": text(min_length=1),
        "kind": text(min_length=1),
        "name": text(min_length=1),
        "type": items(one_of("created", "updated", "deleted"), least=1),
        "scope": struct({"kind": text(min_length=1), "name": text(min_length=1)}, "kind", "name"),
    },
    "group",
    "kind",
    "name",
    "type",
)
_header_name = text(pattern=r"[A-Za-z]+[_\-\w]+", max_length=64)

INTEGRATION: Final = struct({"description": _prose})
SECRET: Final = struct({"data": text_map}, "data")
WEBHOOK: Final = struct(
    {
        "enabled": flag,
        "url": text(pattern=r"https?://.+"),
        "headers": text_map,
        "auth": struct(
            {
                "secret": struct({"name": _name, "key": text(min_length=1)}, "name", "key"),
                "location": struct({"in": one_of("header", "query"), "name": _header_name}, "in"),
            },
            "secret",
        ),
    },
    "url",
)
RESOURCE_HOOK: Final = struct(
    {"triggers": items(_trigger, least=1), "webhooks": items(_name, least=1)}, "triggers", "webhooks"
)
WATCH_TOPIC: Final = struct({"description": _prose, "filters": items(_trigger, least=1)}, "filters")

STATUS: Final = struct(
    {"level": one_of("Success", "Pending", "Error"), "reasons": items(free_object)}, "level"
)
STAGE: Final = one_of("draft", "active", "deprecated", "archived")
_approvals = one_of("approved", "rejected", "pending")
APPROVAL: Final = struct(
    {
        "state": _approvals,
        "reason": _prose,
        "userId": text(max_length=52),
        "previousState": _approvals,  # read-only: what a client sends is overwritten
    },
    "state",
)
SUBSCRIPTION_STATE: Final = struct(
    {
        "name": one_of("active", "migrated", "migrationScheduled", "archived", "archivalScheduled"),
        "reason": _prose,
        "when": struct({"timestamp": text(min_length=1)}),
    },
    "name",
)
PAYMENT: Final = struct(
    {"payment": struct({"type": one_of("stripe", "custom", "myFatoorah")}, "type")},
)
MARKETPLACE_PAYMENT: Final = struct({"payment": struct({"type": text(min_length=1)}, "type")})
MARKETPLACE: Final = struct({"name": text(min_length=1), "resource": free_object}, "name")

SUBRESOURCES: Final[Mapping[str, Mapping[str, Check]]] = {
    "Product": {
        "state": STAGE,
        "status": STATUS,
        "references": free_object,
        "icon": free_object,
        "latestrelease": free_object,
    },
    "ProductPlan": {"state": STAGE, "status": STATUS, "references": free_object},
    "Quota": {"status": STATUS},
    "Subscription": {
        "approval": APPROVAL,
        "state": SUBSCRIPTION_STATE,
        "status": STATUS,
        "billing": PAYMENT,
        "marketplace": MARKETPLACE,
        "references": struct({"subscription": _name}),
    },
    "Marketplace": {"billing": MARKETPLACE_PAYMENT},
}
