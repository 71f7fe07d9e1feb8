"""Amplify's resources as billingd understands them: products, product plans, quotas, subscriptions.

Field names and enumerations follow Amplify's catalog API. Prices are `Decimal`, parsed from the JSON
text and never through float.
"""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal

UNLIMITED_TO = 999_999_999
"""A tier's `to` that means "no end" in Amplify."""

BILLING_SYSTEM = "recurly"
"""What the attribute `billingSystem` of a product says when its plans are billed here."""

Interval = Literal["daily", "weekly", "monthly", "annually"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier, `from_` to `to` units inclusive: `cost` per unit and `flat_fee` once."""

    from_: int
    to: int
    cost: Decimal
    flat_fee: Decimal


@dataclass(frozen=True, slots=True)
class Unlimited:
    """Included in the base price."""


@dataclass(frozen=True, slots=True)
class Strict:
    """`limit` units per interval, then the gateway stops: nothing to bill."""

    limit: int
    interval: str


@dataclass(frozen=True, slots=True)
class Loose:
    """`limit` units included per `interval`; each further one costs `overage` (None: no price set)."""

    limit: int
    interval: str
    overage: Decimal | None


@dataclass(frozen=True, slots=True)
class PerUnit:
    """Units x `cost`."""

    cost: Decimal


@dataclass(frozen=True, slots=True)
class Graduated:
    """Each unit at its own tier's cost, plus the flat fee of every tier reached."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """All units at the cost of the tier the total falls in, plus that tier's flat fee only."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class UnknownPricing:
    """A pricing type this program does not know."""

    type: str


Pricing = Unlimited | Strict | Loose | PerUnit | Graduated | Volume | UnknownPricing


@dataclass(frozen=True, slots=True)
class Quota:
    """One metered quota of a product plan. `unit` is None when the unit was deleted."""

    id: str
    name: str
    title: str
    unit: str | None
    pricing: Pricing


@dataclass(frozen=True, slots=True)
class Term:
    """Length of a subscription term: `length` of `type` (`days`, `months`, `years`)."""

    type: str
    length: int


@dataclass(frozen=True, slots=True)
class Product:
    """A product; `billing_system` is its attribute `billingSystem`."""

    id: str
    name: str
    title: str
    state: str
    billing_system: str | None


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A product plan as it is now. Billing fields are None on plans without a price."""

    id: str
    name: str
    title: str
    product_name: str
    product_id: str | None
    state: str
    """draft | active | deprecated | archived, or a word this program does not know."""
    type: str
    """paid | free, or a word this program does not know (custom plans)."""
    approval: str
    """manual | automatic"""
    currency: str | None
    interval: str | None
    price: Decimal
    setup_price: Decimal
    term: Term | None
    renewal: str | None
    """automatic, or None: the subscription ends with its term."""
    cycles: int | None
    """Number of terms after which Amplify archives the subscription; None: no end."""
    attributes: dict[str, str] = field(default_factory=dict)
    resource_version: str | None = None
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription as it is now. Ids are Amplify `metadata.id`s, guids of people and teams."""

    id: str
    name: str
    title: str
    plan_name: str
    plan_id: str | None
    product_name: str
    approval: str
    """pending | approved | rejected"""
    state: str | None
    """active | migrated | migrationScheduled | archived | archivalScheduled; None until approved."""
    state_at: datetime | None
    """`state.when.timestamp`: when that state took or takes effect."""
    owner_user_id: str | None
    owner_team_id: str | None
    owner_org_id: str | None
    created_by: str | None
    """User id of whoever subscribed."""
    marketplace_id: str | None
    migrated_from: str | None
    """Name of the subscription this one replaces after a plan migration."""
    attributes: dict[str, str] = field(default_factory=dict)
    resource_version: str | None = None
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class Marketplace:
    """A Marketplace; where `payment_type` is set, Amplify's own billing charges the consumers too."""

    name: str
    title: str
    payment_type: str | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A resource that is there and cannot be understood: whatever else it is, it is not absent."""

    id: str
    why: str


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody at Amplify's platform; `email` may be missing, and that is normal."""

    id: str
    name: str
    email: str | None
