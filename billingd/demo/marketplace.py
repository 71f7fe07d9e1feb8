"""The marketplace of the demo: three APIs, six plans, a dozen subscribers; and what Amplify would charge."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

Json = dict[str, Any]

NO_END: Final = 999_999_999
"""The `to` of a last tier."""

WITHOUT_CENTS: Final = frozenset({"JPY", "KRW"})
YEARLY: Final = {"interval": {"type": "years", "length": 1}}
WEEKLY: Final = {"interval": {"type": "days", "length": 7}}
DAYS: Final = {"interval": {"type": "days", "length": 30}}


@dataclass(frozen=True, slots=True)
class Quota:
    """What is counted, in which unit, at which price: `pricing` is Amplify's own document."""

    name: str
    title: str
    pricing: Mapping[str, Any]
    unit: str = "transactions"


@dataclass(frozen=True, slots=True)
class Plan:
    """A product plan; `model` says in a word how it prices."""

    name: str
    title: str
    product: str
    model: str
    currency: str
    price: float
    interval: str
    quotas: tuple[Quota, ...]
    setup: float = 0
    terms: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> Json:
        """As the sandbox's control interface takes it."""
        billing: Json = {"currency": self.currency, "price": self.price, "interval": self.interval}
        if self.setup:
            billing["setup"] = {"price": self.setup}
        quotas = [
            {"name": each.name, "title": each.title, "unit": each.unit, "pricing": dict(each.pricing)}
            for each in self.quotas
        ]
        return {
            "name": self.name,
            "title": self.title,
            "product": self.product,
            "billing": billing,
            "subscription": dict(self.terms),
            "quotas": quotas,
        }


@dataclass(frozen=True, slots=True)
class Subscriber:
    """Who subscribes to what; `account` is user, team or org: which of them has one at Recurly."""

    name: str
    person: str
    account: str
    plan: str
    pace: int
    """Most units in one burst of traffic."""
    organization: str | None = None

    @property
    def subscription(self) -> str:
        """The name of the subscription."""
        return f"{self.name.lower().replace(' ', '-')}-{self.plan}"


def _tiers(*steps: tuple[int | None, float, float]) -> Json:
    """Tiers from (last unit, unit price, flat fee), each beginning where the one before ended."""
    tiers, start = [], 1
    for to, cost, fee in steps:
        end = NO_END if to is None else to
        tiers.append({"from": start, "to": end, "cost": cost, "flatFee": fee})
        start = end + 1
    return {"type": "tiered", "tiers": tiers}


PRODUCTS: Final = {
    "nimbus-weather": "Nimbus Weather",
    "harbour-payments": "Harbour Payments",
    "atlas-maps": "Atlas Maps",
}
"""All labelled billingSystem=recurly."""

PER_UNIT: Final = Plan(
    "weather-per-call",
    "Weather per call",
    "nimbus-weather",
    "per unit",
    "USD",
    5,
    "monthly",
    (
        Quota("calls", "API calls", {"type": "perunit", "cost": 0.0025}),
        Quota("radar", "Radar tiles", {"type": "perunit", "cost": 0.0375}, "x-tiles"),
    ),
    setup=25,
)
GRADUATED: Final = Plan(
    "weather-forecast",
    "Weather forecast",
    "nimbus-weather",
    "graduated",
    "EUR",
    120,
    "annually",
    (
        Quota(
            "forecasts",
            "Forecasts",
            {
                "type": "graduated",
                "limit": _tiers((500, 0.02, 0), (2000, 0.015, 0), (None, 0.0095, 0)),
            },
        ),
    ),
    terms=YEARLY,
)
VOLUME: Final = Plan(
    "payments-volume",
    "Payments by volume",
    "harbour-payments",
    "volume",
    "GBP",
    9.5,
    "weekly",
    (
        Quota(
            "payments",
            "Payments",
            {"type": "volume", "limit": _tiers((400, 0.1, 0), (900, 0.08, 0), (None, 0.045, 0))},
        ),
    ),
    terms=WEEKLY,
)
STAIRSTEP: Final = Plan(
    "payments-packages",
    "Payment packages",
    "harbour-payments",
    "flat fees",
    "CHF",
    0,
    "daily",
    (
        Quota(
            "payouts",
            "Payouts (packages)",
            {"type": "graduated", "limit": _tiers((300, 0, 10), (1200, 0, 25), (None, 0, 60.5))},
        ),
    ),
    terms=DAYS,
)
LOOSE: Final = Plan(
    "maps-included",
    "Maps, 800 included",
    "atlas-maps",
    "overage",
    "JPY",
    3000,
    "monthly",
    (
        Quota(
            "routes",
            "Routes",
            {
                "type": "fixed",
                "interval": "monthly",
                "limit": {"type": "loose", "value": 800, "overages": {"value": 1.25}},
            },
        ),
    ),
)
INEXPRESSIBLE: Final = Plan(
    "maps-enterprise",
    "Maps enterprise",
    "atlas-maps",
    "inexpressible",
    "USD",
    500,
    "monthly",
    (
        Quota(
            "routes",
            "Routes",
            {"type": "volume", "limit": _tiers((10_000, 0.01, 0), (None, 0.008, 40))},
        ),
    ),
)
PLANS: Final = (PER_UNIT, GRADUATED, VOLUME, STAIRSTEP, LOOSE, INEXPRESSIBLE)
BILLED: Final = tuple(plan for plan in PLANS if plan is not INEXPRESSIBLE)
BY_NAME: Final = {plan.name: plan for plan in PLANS}

UNLABELLED: Final = ("status-page", "Status Page")
"""A product without the label; its plan is none of billingd's business."""
IGNORED: Final = Plan(
    "status-page-pro",
    "Status page pro",
    UNLABELLED[0],
    "ignored",
    "USD",
    1,
    "monthly",
    (Quota("views", "Views", {"type": "perunit", "cost": 0.01}),),
)

CORRECTED: Final = (
    Subscriber("Maya Okafor", "Maya Okafor", "user", PER_UNIT.name, 40),
    Subscriber("Jonas Lindqvist", "Jonas Lindqvist", "user", GRADUATED.name, 60),
)
"""Billed while units are still to come: their prices take corrections."""
CUT_SHORT: Final = Subscriber("Priya Raman", "Priya Raman", "user", VOLUME.name, 35)
"""Billed while units are still to come: volume prices take none."""

FIRST: Final = (
    *CORRECTED,
    CUT_SHORT,
    Subscriber("Kenji Watanabe", "Kenji Watanabe", "user", LOOSE.name, 12),
    Subscriber("Alpine Rescue", "Lena Hofer", "team", GRADUATED.name, 15),
    Subscriber("Kiosk Crew", "Tom Baker", "team", STAIRSTEP.name, 45),
    Subscriber("Tanaka Travel", "Yui Tanaka", "org", LOOSE.name, 55, "300000000000017"),
)
"""They subscribe before the traffic begins."""

LEAVING: Final = Subscriber("Checkout Squad", "Ines Duarte", "team", VOLUME.name, 70)
"""Falls silent before its bill date, so that its bill is complete; cancels before the end."""
WITHOUT_ACCOUNT: Final = Subscriber("Sofia Rossi", "Sofia Rossi", "user", STAIRSTEP.name, 25)
"""Has no account at Recurly at first."""
ANNOUNCED_TWICE: Final = Subscriber("Ferry Dispatch", "Nils Berg", "team", PER_UNIT.name, 50)
"""The webhooks about this one come twice."""
UNHEARD: Final = Subscriber("Citybikes GmbH", "Eva Klein", "org", LOOSE.name, 30, "300000000000031")
"""The answers to the webhooks about this one are lost."""
INTERRUPTED: Final = Subscriber("Blue Lantern", "Amir Haddad", "org", PER_UNIT.name, 65, "300000000000048")
"""The daemon dies while this one is made at Recurly."""
HELD: Final = Subscriber("Rosa Jimenez", "Rosa Jimenez", "user", INEXPRESSIBLE.name, 1)
"""Wants the plan that Recurly cannot express: stays pending."""

RENEWED: Final = (LEAVING, *CORRECTED, CUT_SHORT)
"""Their bill date comes while traffic flows."""

LINKED: Final = (*FIRST, LEAVING, WITHOUT_ACCOUNT, ANNOUNCED_TWICE, UNHEARD, INTERRUPTED)
"""The dozen that are billed in the end."""

BURST_UNITS_LEAST: Final = 1


def amplify_charge(pricing: Mapping[str, Any], units: int) -> Decimal:
    """What Amplify's rules charge for so many units in one period, not rounded.

    Written from amplify.md 3.3 alone and shares nothing with billingd's translation: per unit; graduated
    charges each unit at its own tier's price and each tier reached its fee; volume all units at the tier
    reached and its fee once; a loose fixed limit what lies beyond it.
    """
    total = Decimal(0)
    match pricing["type"]:
        case "perunit":
            total = units * _exact(pricing["cost"])
        case "graduated":
            for tier in pricing["limit"]["tiers"]:
                within = min(units, tier["to"]) - tier["from"] + 1
                if within > 0:
                    total += within * _exact(tier["cost"]) + _exact(tier["flatFee"])
        case "volume":
            for tier in pricing["limit"]["tiers"]:
                if tier["from"] <= units <= tier["to"]:
                    total = units * _exact(tier["cost"]) + _exact(tier["flatFee"])
        case "fixed":
            beyond = max(0, units - pricing["limit"]["value"])
            total = beyond * _exact(pricing["limit"]["overages"]["value"])
        case other:
            raise ValueError(f"no price for {other}")
    return total


def amplify_price(pricing: Mapping[str, Any], units: int, currency: str, *, on_top_of: int = 0) -> Decimal:
    """The same in the currency's smallest unit; what so many more cost when some of the period are billed."""
    charge = amplify_charge(pricing, on_top_of + units) - amplify_charge(pricing, on_top_of)
    smallest = Decimal(1) if currency in WITHOUT_CENTS else Decimal("0.01")
    return charge.quantize(smallest, rounding=ROUND_HALF_UP)


def _exact(amount: float) -> Decimal:
    return Decimal(str(amount))
