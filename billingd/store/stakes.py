"""Holding a usage record: with what it would have earned, so that a person knows what it is about.

What is known here are the prices that its plan has now; a subscription keeps those of the day it began.
"""

from datetime import datetime
from decimal import Decimal

import sqlalchemy as sa

from billingd.domain.attempts import Action
from billingd.domain.drift import PRICE_DIFFERS
from billingd.domain.money import shown
from billingd.domain.periods import Period, period_of
from billingd.domain.tiers import ZERO
from billingd.store import drift, held, outbox, periods, usage
from billingd.store.engine import Tx
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink
from billingd.store.schema import drift as findings
from billingd.store.usage import Recorded


async def usage_hold(tx: Tx, recorded: Recorded, kind: str, reason: str, action: Action) -> Hold:
    """The held item of a usage record; `action` is what its release does."""
    amount = await at_stake(tx, recorded)
    return Hold(
        kind,
        f"usage:{recorded.record.merchant_tag}",
        reason,
        action,
        subscription_id=recorded.record.subscription_id,
        add_on_code=recorded.add_on.add_on_code,
        units=recorded.record.units,
        amount=None if amount is None else shown(amount),
        currency=None if amount is None else recorded.currency,
    )


async def release_usage(
    tx: Tx, subscription_id: str, kind: str, *, resolution: str, now: datetime, saying: str = ""
) -> int:
    """Try again what is held of a subscription's usage for a reason with these words; return how much."""
    released = 0
    for item in await held.standing(tx, kind=kind):
        again = item["action"]
        if item["subscription_id"] != subscription_id or saying not in item["reason"] or again is None:
            continue
        if not await usage.release(tx, again["args"]["record"]):
            continue
        await held.close_one(tx, item["id"], resolution=resolution, now=now)
        key = f"{again['kind']}:released:{item['id']}"
        await outbox.insert(tx, [Action(again["kind"], again["subject"], key, again["args"])], now=now)
        released += 1
    return released


async def at_stake(tx: Tx, recorded: Recorded) -> Decimal | None:
    """What the record adds to the charge of its billing cycle, on top of what else was reported.

    What waits or is held beside it counts where it is older. None where the prices are not known, or what
    else is in the cycle counts and is not.
    """
    record, add_on = recorded.record, recorded.add_on
    if add_on.prices is None:
        return None
    cycle = period_of(await periods.of(tx, record.subscription_id), record.usage_timestamp)
    others = 0
    if cycle is not None and cycle.trial:
        return ZERO  # usage of a trial is never billed
    if add_on.add_on_code in await other_prices(tx, record.subscription_id):
        return None
    if add_on.tier_type != "flat" and cycle is not None and shared(recorded.link, cycle):
        return None
    if cycle is not None:
        others = await usage.units_in(
            tx,
            record.subscription_id,
            record.quota_id,
            cycle.started_at,
            cycle.ends_at,
            before_id=recorded.id,
        )
    return add_on.prices.at_stake(record.units, on_top_of=others)


def shared(link: SubscriptionLink, cycle: Period) -> bool:
    """Whether another program reported usage of this cycle too: how much of it is not known here."""
    return link.adopted and cycle.started_at < link.usage_from


async def other_prices(tx: Tx, subscription_id: str) -> set[str]:
    """Add-ons whose plan has other prices now than this subscription pays, as far as a run has seen it."""
    last = await drift.latest(tx)
    found = sa.select(findings.c.add_on_code).where(
        findings.c.kind == PRICE_DIFFERS, findings.c.subscription_id == subscription_id
    )
    seen = found.where(findings.c.reconciliation_id == (0 if last is None else last.id))
    codes = set((await tx.execute(seen)).scalars())
    items = [*await held.standing(tx, kind=PRICE_DIFFERS), *await held.written_off(tx, subscription_id)]
    codes |= {
        item["add_on_code"]
        for item in items
        if item["kind"] == PRICE_DIFFERS and item["subscription_id"] == subscription_id
    }
    return {code for code in codes if code is not None}
