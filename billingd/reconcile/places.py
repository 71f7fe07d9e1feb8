"""Places: which subscriptions and add-ons a comparison is about, and what is known of their billing."""

from collections.abc import Iterable
from datetime import datetime

from billingd.domain.drift_usage import Place
from billingd.store import periods
from billingd.store.engine import Tx
from billingd.store.links import AddOnLink, SubscriptionLink


async def place_of(tx: Tx, link: SubscriptionLink, add_on: AddOnLink) -> Place:
    """One add-on of one subscription."""
    known = await periods.of(tx, link.subscription_id)
    return Place(
        link.subscription_id,
        add_on.quota_id,
        add_on.add_on_code,
        add_on.tier_type,
        link.billed_state,
        tuple(known),
    )


def overlapping(
    linked: Iterable[SubscriptionLink], since: datetime, until: datetime
) -> list[SubscriptionLink]:
    """Subscriptions that may have usage in [since, until)."""
    return [
        one
        for one in linked
        if one.usage_from < until
        and not (
            one.state == "ended"
            and one.usage_until is not None
            and max(one.usage_until, one.period_ends_at or one.usage_until) < since
        )
    ]
