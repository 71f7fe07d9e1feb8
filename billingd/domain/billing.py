"""Recurly's resources as billingd understands them: accounts, plans, add-ons, subscriptions, usage."""

import re
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

from billingd.domain.charges import Prices
from billingd.domain.periods import Period
from billingd.domain.pricing import TierSpec

AMPLIFY_ID: Final = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
"""What a `metadata.id` looks like (amplify.md 3); a PO number of any other shape is somebody's own."""

OUR_ACCOUNTS: Final = "amplify-"
"""How the code of every account begins that pays for something of Amplify's."""


@dataclass(frozen=True, slots=True)
class Site:
    """A Recurly site: `mode` is development, sandbox or production."""

    subdomain: str
    mode: str
    currencies: frozenset[str]
    """ISO 4217 codes it accepts; none: it does not say."""
    features: frozenset[str]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a site's rate limit, in requests per five minutes (recurly.md 3)."""

    limit: int
    remaining: int
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class Account:
    """An account at Recurly."""

    code: str
    state: str


@dataclass(frozen=True, slots=True)
class SubscribedAddOn:
    """An add-on on a subscription: the prices are its own, those of the day it was attached."""

    id: str
    code: str
    prices: Prices
    """In the subscription's currency; the open last tier may end with None or 999999999."""
    created_at: datetime | None
    """Since when it takes usage."""


@dataclass(frozen=True, slots=True)
class BilledSubscription:
    """A subscription at Recurly, as far as billingd cares. Times are aware UTC, whole seconds."""

    uuid: str
    plan_code: str
    account_code: str
    marker: str | None
    """`po_number`: the Amplify subscription's `metadata.id`."""
    state: str
    """active | canceled | expired | failed | future | paused"""
    add_on_codes: tuple[str, ...]
    activated_at: datetime | None
    period_started_at: datetime | None
    period_ends_at: datetime | None
    trial_ends_at: datetime | None = None
    add_ons: tuple[SubscribedAddOn, ...] = ()
    unit_amount: Decimal | None = None
    """What one period costs, without its add-ons."""
    currency: str | None = None

    @property
    def marked(self) -> bool:
        """Whether its PO number can be an Amplify id at all: else a person typed it, for their own use."""
        return self.marker is not None and AMPLIFY_ID.fullmatch(self.marker) is not None

    @property
    def period(self) -> Period | None:
        """The current billing period, if it has one; whatever ends with the trial is the trial."""
        start, end = self.period_started_at, self.period_ends_at
        if start is None or end is None or end <= start:
            return None
        return Period(start, end, trial=self.trial_ends_at is not None and end <= self.trial_ends_at)

    @property
    def live(self) -> bool:
        """Whether it still bills, now or later."""
        return self.state in {"active", "canceled", "future", "paused"}


@dataclass(frozen=True, slots=True)
class BilledUsage:
    """One usage record as Recurly holds it; `billed_at` is None while it is unbilled."""

    id: str
    units: int
    merchant_tag: str | None
    usage_timestamp: datetime
    billed_at: datetime | None
    created_at: datetime | None = None
    """When Recurly took it."""


@dataclass(frozen=True, slots=True)
class BilledPlan:
    """A plan at Recurly. `unit_amounts` and `setup_fees` are per currency; `state` active | inactive."""

    id: str
    code: str
    state: str
    interval_unit: str
    interval_length: int
    total_billing_cycles: int | None
    auto_renew: bool
    unit_amounts: dict[str, Decimal]
    setup_fees: dict[str, Decimal]
    name: str = ""
    trial_unit: str = "months"
    trial_length: int = 0
    """How long a new subscription is charged nothing; 0: no trial."""


@dataclass(frozen=True, slots=True)
class BilledAddOn:
    """A plan's add-on at Recurly, its prices in `currency` only.

    `unit_amount` is set for `flat`, `tiers` for the others; the open last tier has `ending_quantity` None
    (Recurly may also say 999999999).
    """

    id: str
    code: str
    state: str
    add_on_type: str
    usage_type: str | None
    usage_calculation_type: str | None
    usage_timeframe: str | None
    tier_type: str
    measured_unit_id: str | None
    unit_amount: Decimal | None
    tiers: tuple[TierSpec, ...]
    name: str = ""

    @property
    def prices(self) -> Prices:
        """What it charges."""
        return Prices(self.tier_type, self.unit_amount, self.tiers)


@dataclass(frozen=True, slots=True)
class NewSubscription:
    """What to create at Recurly; `marker` goes into `po_number`."""

    plan_code: str
    account_code: str
    currency: str
    collection_method: str
    marker: str
    add_on_codes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NewUsage:
    """One usage record to create: 1 to 999,999,999 units (or their negative) at one explicit time."""

    subscription_uuid: str
    add_on_code: str
    units: int
    merchant_tag: str
    usage_timestamp: datetime
    recorded_at: datetime
