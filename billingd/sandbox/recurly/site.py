"""A Recurly site with what its owner can do beside the API: accounts, bill runs, pauses, the oracle."""

from collections.abc import Callable
from typing import Any, TypeVar

from billingd.sandbox.recurly import accounts, lifecycle, views
from billingd.sandbox.recurly.billing import bill, expire, run_due_bills
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
        run_due_bills(self)
        bill(self, self._live(subscription_uuid), self.now())

    def pause(self, subscription_uuid: str, cycles: int = 1) -> None:
        """A pause that begins now, as if now were the bill date."""
        run_due_bills(self)
        _allowed(lambda: lifecycle.pause_now(self, self._live(subscription_uuid), cycles))

    def resume(self, subscription_uuid: str) -> None:
        """The end of a pause."""
        run_due_bills(self)
        _allowed(lambda: lifecycle.resume_now(self, self._live(subscription_uuid)))

    def expire(self, subscription_uuid: str, reason: str = "nonpayment") -> None:
        """The end of a subscription without anyone asking for it, as dunning does it."""
        run_due_bills(self)
        expire(self, self._live(subscription_uuid), self.now(), reason)

    def oracle(self) -> dict[str, Any]:
        """What was reported, billed and charged, per subscription and add-on; JSON-able."""
        run_due_bills(self)
        return oracle(self)

    def _live(self, uuid: str) -> Subscription:
        subscription = self.subscription_by_uuid.get(uuid)
        if subscription is None:
            raise ValueError(f"no subscription {uuid!r}")
        if not subscription.live:
            raise ValueError(f"subscription {uuid!r} is {subscription.status}")
        return subscription


def _allowed(act: Callable[[], T]) -> T:
    try:
        return act()
    except RefusalError as refusal:
        raise ValueError(refusal.message) from refusal
