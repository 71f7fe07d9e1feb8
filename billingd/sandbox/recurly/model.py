"""What a Recurly site holds. Times are aware UTC, whole seconds as Recurly stores them; money is Decimal."""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from billingd.sandbox.recurly.charges import AddOnPrice, Tier, TierType
from billingd.sandbox.recurly.usage_book import UsageBook


@dataclass(slots=True, kw_only=True)
class Record:
    """What every kept thing has. `order` is unique and grows; `committed_at` is to the microsecond."""

    id: str
    order: int
    created_at: datetime
    updated_at: datetime
    committed_at: datetime
    deleted_at: datetime | None = None

    @property
    def state(self) -> str:
        """OAS: ActiveStateEnum."""
        return "active" if self.deleted_at is None else "inactive"


@dataclass(slots=True, kw_only=True)
class MeasuredUnit(Record):
    """What usage counts."""

    name: str
    display_name: str
    description: str | None


@dataclass(frozen=True, slots=True)
class Price:
    """An amount; `exact`: given as `unit_amount_decimal`, so that `unit_amount` reads back null."""

    amount: Decimal
    exact: bool = False


@dataclass(frozen=True, slots=True)
class PlanTier:
    """A tier of a plan's add-on with its price per currency."""

    ending_quantity: int | None
    prices: dict[str, Price]


@dataclass(frozen=True, slots=True)
class SubscriptionTier:
    """A tier of a subscription's add-on, in the subscription's currency."""

    ending_quantity: int | None
    price: Price


@dataclass(slots=True, kw_only=True)
class AddOn(Record):
    """A plan's add-on: `prices` for flat, `tiers` for the others; `given` the rest of the body as checked."""

    plan_id: str
    code: str
    name: str
    add_on_type: str
    usage_type: str | None
    usage_calculation_type: str | None
    usage_timeframe: str | None
    tier_type: TierType
    measured_unit: MeasuredUnit | None
    accounting_code: str
    prices: dict[str, Price]
    tiers: tuple[PlanTier, ...]
    given: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Plan(Record):
    """A plan. `add_ons` by code, the removed ones too: their codes stay taken."""

    code: str
    name: str
    interval_unit: str
    interval_length: int
    prices: dict[str, Decimal]
    setup_fees: dict[str, Decimal]
    total_billing_cycles: int | None
    auto_renew: bool
    trial_unit: str
    trial_length: int
    trial_requires_billing_info: bool
    accounting_code: str
    given: dict[str, Any]
    add_ons: dict[str, AddOn] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Account(Record):
    """An account with its subscriptions, oldest first."""

    code: str
    given: dict[str, Any]
    billing_info: bool = False
    subscriptions: list["Subscription"] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Usage(Record):
    """One usage record. `cycle` is the one its timestamp lies in; trial usage is never billed."""

    subscription: "Subscription"
    add_on: "SubscriptionAddOn"
    amount: int
    merchant_tag: str | None
    usage_timestamp: datetime
    recording_timestamp: datetime
    cycle: int
    billed_at: datetime | None = None
    removed_at: datetime | None = None
    """To the microsecond: a lagging list shows it for a while still."""


@dataclass(slots=True, kw_only=True)
class SubscriptionAddOn(Record):
    """An add-on on a subscription, its prices copied when it was attached."""

    add_on: AddOn
    quantity: int
    price: Price | None
    tiers: tuple[SubscriptionTier, ...]
    usage_calculation_type: str | None
    expired_at: datetime | None = None
    book: UsageBook[Usage] = field(default_factory=UsageBook)
    billed_units: dict[int, int] = field(default_factory=dict)
    """Units billed per cycle, corrections included."""
    term_units: int = 0
    """Units billed in the current term, for `usage_timeframe=subscription_term`."""

    @property
    def metered(self) -> bool:
        """Whether usage is recorded for it."""
        return self.add_on.add_on_type == "usage"

    @property
    def pricing(self) -> AddOnPrice:
        """What the charge is computed from."""
        tiers = tuple(Tier(tier.ending_quantity, tier.price.amount) for tier in self.tiers)
        return AddOnPrice(self.add_on.tier_type, self.price.amount if self.price else None, tiers)


@dataclass(slots=True)
class Cycle:
    """One billing period [started_at, ends_at). `kind`: before (a future start) | trial | paid | paused."""

    number: int
    kind: str
    started_at: datetime
    ends_at: datetime


@dataclass(slots=True, kw_only=True)
class Subscription(Record):
    """A subscription. `cycles[-1]` is the current one; bill dates count from `anchor`."""

    uuid: str
    plan: Plan
    account: Account
    currency: str
    status: str
    unit_amount: Decimal
    quantity: int
    collection_method: str
    given: dict[str, Any]
    anchor: datetime
    periods: int = 0
    """Whole plan intervals from `anchor` to the current cycle's end."""
    cycles: list[Cycle]
    add_ons: dict[str, SubscriptionAddOn] = field(default_factory=dict)
    """By the plan add-on's id."""
    removed_add_ons: list[SubscriptionAddOn] = field(default_factory=list)
    """Those that a change took away; their usage has been billed."""
    setup_fee_due: bool = True
    total_billing_cycles: int
    renewal_billing_cycles: int
    remaining_billing_cycles: int
    auto_renew: bool
    term_started_at: datetime | None = None
    activated_at: datetime | None = None
    canceled_at: datetime | None = None
    expires_at: datetime | None = None
    expiration_reason: str | None = None
    pause_cycles: int = 0
    """Cycles still to be paused; with the status not yet paused, from the next bill date on."""
    invoices: list["Invoice"] = field(default_factory=list)

    @property
    def cycle(self) -> Cycle:
        """The current (or, when it is over, the last) cycle."""
        return self.cycles[-1]

    @property
    def all_add_ons(self) -> list[SubscriptionAddOn]:
        """Those that were removed, then those it has."""
        return [*self.removed_add_ons, *self.add_ons.values()]

    @property
    def live(self) -> bool:
        """Whether it still bills, now or later."""
        return self.status in {"active", "canceled", "future", "paused"}


@dataclass(slots=True, kw_only=True)
class Line(Record):
    """An invoice line. `units` is signed; `amount` is rounded and has the sign of a charge or credit."""

    uuid: str
    origin: str
    add_on: SubscriptionAddOn | None
    units: int
    price: Price | None
    amount: Decimal
    description: str
    start_date: datetime
    end_date: datetime
    correction: bool = False
    invoice: "Invoice"


@dataclass(slots=True, kw_only=True)
class Invoice(Record):
    """An invoice over one subscription."""

    uuid: str
    number: str
    kind: str
    origin: str
    status: str
    subscription: Subscription
    lines: list[Line]

    @property
    def total(self) -> Decimal:
        """The sum of its lines."""
        return sum((line.amount for line in self.lines), Decimal(0))
