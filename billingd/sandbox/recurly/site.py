"""A Recurly site with what its owner can do beside the API: accounts, bill runs, pauses, the oracle."""

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from billingd.sandbox.recurly import accounts, lifecycle, plans, views
from billingd.sandbox.recurly.billing import bill, bring_up, expire, move_bill_date, run_due_bills
from billingd.sandbox.recurly.errors import RefusalError
from billingd.sandbox.recurly.model import Subscription
from billingd.sandbox.recurly.oracle import oracle
from billingd.sandbox.recurly.state import State

T = TypeVar("T")


class Site(State):
    """Subscriptions are named by their bare UUID here; a wrong name or state is a ValueError."""

    def create_account(self, code: str, *, billing_info: bool = False, **fields: Any) -> dict[str, Any]:
        """An account as the admin page makes it, by the API's rules; returns what the API would show."""
        account = _allowed(lambda: accounts.create_account(self, {"code": code, **fields}))
        account.billing_info = billing_info
        return views.account(account)

    def configure(self, **changes: Any) -> None:
        """Sets `Settings` by name."""
        self.settings.configure(**changes)

    def run_due_bills(self) -> int:
        """Bills all that is due by the clock; every request does so first, too."""
        return run_due_bills(self)

    def renew(self, subscription_uuid: str) -> None:
        """A bill run now: the current cycle ends, what was used in it is billed, the next one begins.

        As if `next_bill_date` had been brought forward to now, so later bill dates count from now.
        """
        bill(self, self._live(subscription_uuid), self.now())

    def pause(self, subscription_uuid: str, cycles: int = 1) -> None:
        """A pause that begins now, as if now were the bill date."""
        _allowed(lambda: lifecycle.pause_now(self, self._live(subscription_uuid), cycles))

    def resume(self, subscription_uuid: str) -> None:
        """The end of a pause."""
        _allowed(lambda: lifecycle.resume_now(self, self._live(subscription_uuid)))

    def expire(self, subscription_uuid: str, reason: str = "nonpayment") -> None:
        """The end of a subscription without anyone asking for it, as dunning does it."""
        expire(self, self._live(subscription_uuid), self.now(), reason)

    def move_bill_date(self, subscription_uuid: str, to: datetime) -> None:
        """`next_bill_date` as the admin page sets it; during a trial it ends the trial."""
        body = {"next_bill_date": to.isoformat()}
        subscription = self._live(subscription_uuid)
        _allowed(lambda: lifecycle.update_subscription(self, subscription, body))

    def cancel(self, subscription_uuid: str, timeframe: str = "term_end") -> None:
        """A cancellation that nobody asked for over the API."""
        subscription = self._live(subscription_uuid)
        _allowed(lambda: lifecycle.cancel(self, subscription, {"timeframe": timeframe}))

    def plan_trial(self, code: str, length: int, unit: str = "days") -> None:
        """Gives a plan a trial for the subscriptions to come; 0 takes it away."""
        body = {"trial_length": length, "trial_unit": unit, "trial_requires_billing_info": False}
        _allowed(lambda: plans.update_plan(self, self.plan(f"code-{code}"), body))

    def move_trial(self, subscription_uuid: str, ends_at: datetime) -> None:
        """Ends a trial later or earlier; a paid subscription has none to be moved."""
        subscription, to = self._live(subscription_uuid), ends_at.replace(microsecond=0)
        if to <= max(self.now(), subscription.cycle.started_at):
            raise ValueError("a trial cannot end in the past")
        if subscription.status == "future":
            subscription.given["trial_ends_at"] = to
        elif subscription.cycle.kind == "trial":
            move_bill_date(self, subscription, to)
        else:
            raise ValueError(f"subscription {subscription_uuid!r} is not in a trial; its plan can have one")
        self.touch(subscription)
        self.announce(subscription, "updated")

    def oracle(self) -> dict[str, Any]:
        """What was reported, billed and charged, per subscription and add-on; JSON-able."""
        run_due_bills(self)
        return oracle(self)

    def _live(self, uuid: str) -> Subscription:
        """A subscription that has not ended, after the bills that are due on it."""
        run_due_bills(self)
        subscription = self.subscription_by_uuid.get(uuid)
        if subscription is None:
            raise ValueError(f"no subscription {uuid!r}")
        bring_up(self, subscription)
        if not subscription.live:
            raise ValueError(f"subscription {uuid!r} is {subscription.status}")
        return subscription


def _allowed(act: Callable[[], T]) -> T:
    try:
        return act()
    except RefusalError as refusal:
        raise ValueError(refusal.message) from refusal
