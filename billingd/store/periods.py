"""The billing periods of each subscription, as Recurly showed them."""

from collections import defaultdict
from collections.abc import Collection
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.periods import Period, learn
from billingd.store.engine import Tx
from billingd.store.rows import upsert
from billingd.store.schema import billing_periods, subscription_links


async def seen(
    tx: Tx,
    subscription_id: str,
    *,
    state: str,
    current: Period | None,
    now: datetime,
    unit_amount: Decimal | None = None,
) -> list[Period]:
    """Recurly shows the subscription in this state and period; return the periods that this changed.

    `unit_amount`, where Recurly says it, is what a period costs without add-ons.
    """
    known = await of(tx, subscription_id)
    changed = [] if current is None else learn(known, current)
    for period in changed:
        row = {
            "subscription_id": subscription_id,
            "started_at": period.started_at,
            "ends_at": period.ends_at,
            "trial": period.trial,
        }
        await upsert(tx, billing_periods, row)
    shown: dict[str, Any] = {"billed_state": state, "seen_at": now}
    if current is not None:
        shown |= {"period_started_at": current.started_at, "period_ends_at": current.ends_at}
    if unit_amount is not None:
        shown["unit_amount"] = str(unit_amount)
    link = subscription_links.c.subscription_id == subscription_id
    await tx.execute(sa.update(subscription_links).where(link).values(**shown))
    return changed


_OF: Final = (
    sa.select(billing_periods.c.started_at, billing_periods.c.ends_at, billing_periods.c.trial)
    .where(billing_periods.c.subscription_id == sa.bindparam("of_subscription"))
    .order_by(billing_periods.c.started_at)
)


async def of(tx: Tx, subscription_id: str) -> list[Period]:
    """The known periods of a subscription, the oldest first."""
    return [Period(*row) for row in await tx.execute(_OF, {"of_subscription": subscription_id})]


def _since() -> sa.Select[Any]:
    columns = billing_periods.c
    first = (
        sa.select(columns.subscription_id, sa.func.min(columns.started_at).label("started_at"))
        .group_by(columns.subscription_id)
        .subquery()
    )
    ends_after = columns.ends_at >= sa.bindparam("moment")
    return (
        sa.select(columns.subscription_id, columns.started_at, columns.ends_at, columns.trial)
        .join(first, first.c.subscription_id == columns.subscription_id)
        .where(sa.or_(ends_after, columns.started_at == first.c.started_at))
        .order_by(columns.subscription_id, columns.started_at)
    )


_SINCE: Final = _since()
"""Made once: each poll needs it, and making it takes longer than running it."""


async def since(tx: Tx, moment: datetime, *, only: Collection[str] | None = None) -> dict[str, list[Period]]:
    """The periods of every subscription that end after a moment, with the first one each ever had.

    (The start of the first is no edge between two bills, so it must be told from the others.)
    """
    found: dict[str, list[Period]] = defaultdict(list)
    for subscription_id, *period in await tx.execute(_SINCE, {"moment": moment}):
        if only is None or subscription_id in only:
            found[subscription_id].append(Period(*period))
    return found
