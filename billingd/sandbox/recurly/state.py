"""What a site holds and how it is set; the rules are functions over it, one file per resource."""

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar

from billingd.sandbox.clock import SandboxClock
from billingd.sandbox.recurly.errors import not_found
from billingd.sandbox.recurly.identifiers import Identifiers
from billingd.sandbox.recurly.model import (
    Account,
    AddOn,
    Invoice,
    Line,
    MeasuredUnit,
    Plan,
    Record,
    Subscription,
    SubscriptionAddOn,
    Usage,
)
from billingd.sandbox.recurly.notices import Notice, notice

T = TypeVar("T", bound=Record)

# fmt: off
CURRENCIES: Final = frozenset({
    "USD", "EUR", "JPY", "GBP", "AUD", "CAD", "CHF", "CNY", "SGD", "HKD", "BRL", "KWD", "SAR", "BHD", "AED",
    "QAR", "OMR", "JOD", "EGP", "PHP", "IDR", "MYR", "BND",
})
# fmt: on
SANDBOX_PER_MINUTE: Final = 400
PRODUCTION_PER_MINUTE: Final = 1_000
"""OAS:160-165."""
NOTICES_KEPT: Final = 20_000


@dataclass(slots=True)
class Settings:
    """What a site's owner can switch; the defaults are those that refuse more."""

    api_keys: set[str] = field(default_factory=lambda: {"sandbox-api-key"})
    read_only_api_keys: set[str] = field(default_factory=set)
    production: bool = False
    """Production sites limit only reads, sandbox sites everything."""
    rate_limit_per_minute: int | None = None
    """None: 400 for a sandbox site, 1,000 for a production one."""
    currencies: frozenset[str] = CURRENCIES
    allow_multiple_subscriptions_per_plan: bool = False
    sixty_second_guard: bool = True
    require_billing_info_for_automatic: bool = True
    long_accounting_code_default: str = "refuse"
    """refuse | cut: what happens if an accounting code defaults to a code of more than 20 characters."""
    custom_field_names: frozenset[str] = frozenset()
    """Custom fields defined in the admin UI; any other name is refused."""
    list_lag_seconds: float = 0
    """How long lists, and single usage records, do not show what was written; the delay is not documented."""
    bill_run_lag_seconds: float = 0
    """How long after `current_period_ends_at` a subscription is billed; until then the old period is open."""

    @property
    def per_minute(self) -> int:
        """The rate limit in force."""
        if self.rate_limit_per_minute is not None:
            return self.rate_limit_per_minute
        return PRODUCTION_PER_MINUTE if self.production else SANDBOX_PER_MINUTE

    def configure(self, **changes: Any) -> None:
        """Sets several by name; an unknown name is a ValueError."""
        known = {field.name for field in dataclasses.fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"a Recurly site has no setting {name!r}")
            if name.endswith("_seconds") and (type(value) not in (int, float) or value < 0):
                raise ValueError(f"{name!r} takes a number of seconds from 0 on, not {value!r}")
        for name, value in changes.items():
            current = getattr(self, name)
            setattr(self, name, type(current)(value) if isinstance(current, set | frozenset) else value)


class State:
    """All records of a site, each findable by id and by its friendly name."""

    def __init__(self, clock: SandboxClock, settings: Settings | None = None) -> None:
        self.clock = clock
        self.settings = settings or Settings()
        self.identifiers = Identifiers()
        self.record = Record(**self.stamps())
        self.plans: dict[str, Plan] = {}
        self.plan_by_code: dict[str, Plan] = {}
        self.add_ons: dict[str, AddOn] = {}
        self.measured_units: dict[str, MeasuredUnit] = {}
        self.accounts: dict[str, Account] = {}
        self.account_by_code: dict[str, Account] = {}
        self.subscriptions: dict[str, Subscription] = {}
        self.subscription_by_uuid: dict[str, Subscription] = {}
        self.subscriptions_in_order: list[tuple[datetime, int, Subscription]] = []
        """By `created_at`, so that a page of many costs no more than one of few."""
        self.usages: dict[str, Usage] = {}
        self.removed_usages: dict[str, Usage] = {}
        self.invoices: dict[str, Invoice] = {}
        self.invoice_by_number: dict[str, Invoice] = {}
        self.lines: dict[str, Line] = {}
        self.due: list[tuple[datetime, int, Subscription]] = []
        """A heap of bill dates; an entry whose date is not the subscription's any more is stale."""
        self.reminders: list[tuple[datetime, int, Subscription, datetime]] = []
        """A heap of times to announce a bill date, the last of the entry; stale as in `due`."""
        self.notices: deque[Notice] = deque(maxlen=NOTICES_KEPT)
        """What happened, oldest first, whether or not a webhook wants to know."""
        self.listeners: list[Callable[[Notice], None]] = []

    def now(self) -> datetime:
        """The time as Recurly stores it: whole seconds."""
        return self.clock.now().replace(microsecond=0)

    def stamps(self, at: datetime | None = None) -> dict[str, Any]:
        """The fields every new record begins with; `at`: when it counts as made, now if not given."""
        order = self.identifiers.order()
        at = at or self.now()
        return {
            "id": self.identifiers.internal(order),
            "order": order,
            "created_at": at,
            "updated_at": at,
            "committed_at": self.clock.now(),
        }

    def announce(self, about: Subscription | Usage, event: str, at: datetime | None = None) -> None:
        """Tells the webhooks of an event; `at`: when it happened, now if not given."""
        told = notice(self.record.id, about, event, at or self.now())
        self.notices.append(told)
        for listener in self.listeners:
            listener(told)

    def touch(self, record: Record) -> None:
        """Marks a record as changed now."""
        record.updated_at = self.now()

    def plan(self, key: str) -> Plan:
        """A plan by id or `code-…`, the removed ones too.

        Whether Recurly still shows a removed plan is not documented; here it stays visible as inactive and
        its code stays taken, so that nobody comes to rely on using it again.
        """
        return _found("Plan", key, "code", self.plans, self.plan_by_code)

    def plan_add_on(self, plan: Plan, key: str) -> AddOn:
        """A plan's add-on by id or `code-…`, the removed ones too."""
        by_id = {add_on.id: add_on for add_on in plan.add_ons.values()}
        return _found("AddOn", key, "code", by_id, plan.add_ons)

    def measured_unit(self, key: str) -> MeasuredUnit:
        """A measured unit by id or `name-…`."""
        by_name = {unit.name: unit for unit in self.measured_units.values()}
        return _found("MeasuredUnit", key, "name", self.measured_units, by_name)

    def account(self, key: str) -> Account:
        """An account by id or `code-…`."""
        return _found("Account", key, "code", self.accounts, self.account_by_code)

    def subscription(self, key: str) -> Subscription:
        """A subscription by id or `uuid-…`."""
        return _found("Subscription", key, "uuid", self.subscriptions, self.subscription_by_uuid)

    def subscription_add_on(self, subscription: Subscription, key: str) -> SubscriptionAddOn:
        """An add-on of a subscription by the plan add-on's id or `code-…`; attached ones only."""
        by_code = {attached.add_on.code: attached for attached in subscription.add_ons.values()}
        return _found("AddOn", key, "code", subscription.add_ons, by_code)

    def usage(self, key: str) -> Usage:
        """A usage record by id."""
        return _found("Usage", key, "", self.usages, {})

    def invoice(self, key: str) -> Invoice:
        """An invoice by id or `number-…`."""
        return _found("Invoice", key, "number", self.invoices, self.invoice_by_number)


def _found(kind: str, key: str, friendly: str, by_id: dict[str, T], by_name: dict[str, T]) -> T:
    prefix = f"{friendly}-"
    named = bool(friendly) and key.startswith(prefix)
    found = by_name.get(key.removeprefix(prefix)) if named else by_id.get(key)
    if found is None:
        raise not_found(kind, friendly if named else "id", key.removeprefix(prefix) if named else key)
    return found
