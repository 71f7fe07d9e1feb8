"""A subscription that Amplify serves and Recurly does not bill any more: told once, held till mended."""

from datetime import datetime
from typing import Final

import structlog

from billingd.domain.attempts import UNFINISHED
from billingd.domain.delivery import AFTER_END, MISSING, NOT_THERE, OVER
from billingd.domain.notices import provider_notice
from billingd.store import absences, held, links, marks, outbox
from billingd.store.engine import Tx
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink
from billingd.store.marks import RECOVERING, RESTORED
from billingd.store.stakes import release_usage

log = structlog.get_logger()

ENDED: Final = "ended_at_recurly"
CANCELED: Final = "canceled"

SERVED: Final = frozenset({"created", "active"})
"""States of a link whose subscription nobody has ended at Amplify."""


async def heed(
    tx: Tx, link: SubscriptionLink, state: str, *, ends_at: datetime | None, now: datetime
) -> None:
    """Recurly shows this `state` of a link as it was before; tell of an end that nobody here asked for.

    A first 404 may come from a read that lags, so that only a second one counts. What is seen live again is
    held no longer, and its usage is sent.
    """
    if link.billed_state == MISSING and state not in {MISSING, *OVER}:
        shown = f"Recurly shows it as {state} again"
        of = link.subscription_id
        await release_usage(tx, of, AFTER_END, saying=NOT_THERE, resolution=shown, now=now)
    served = await links.find_subscription(tx, link.subscription_id)
    if served is None or served.state not in SERVED:
        return
    if state in OVER or (state == MISSING and link.billed_state == MISSING):
        if not await _recovering(tx):
            await _hold(tx, link, state, now)
        return
    if state == MISSING:
        return
    if link.billed_state in {MISSING, CANCELED, *OVER}:
        subject = f"subscription:{link.subscription_id}:ended"
        await held.close(tx, subject=subject, resolution=f"Recurly shows it as {state} again", now=now)
    if state == CANCELED and link.billed_state != CANCELED and not await _recovering(tx):
        await _tell_of_cancellation(tx, link, ends_at, noticed_at=now, now=now)


async def tell_again(tx: Tx, *, since: datetime, now: datetime) -> bool:
    """After the restore at `since`, tell of what is over, or will be, and still served.

    What is absent at Amplify, or is being brought in line with it, is waited for: what this store asked for
    in the life that is forgotten is no news. True when nothing is waited for.
    """
    waits = False
    for link in await links.subscriptions(tx):
        if link.state not in SERVED:
            continue
        subject = f"subscription:{link.subscription_id}"
        if link.billed_state == CANCELED or link.billed_state in OVER:
            under_way = await outbox.select(tx, states=UNFINISHED, subject=subject, limit=1)
            if under_way or await absences.find(tx, "subscription", link.subscription_id) is not None:
                waits = True
            elif link.billed_state in OVER:
                await _hold(tx, link, link.billed_state, now)
            else:
                await _tell_of_cancellation(tx, link, link.period_ends_at, noticed_at=since, now=now)
    return not waits


async def _recovering(tx: Tx) -> bool:
    """Whether this store was restored, and `tell_again` is still to come: it may have ended this itself."""
    restored = await marks.find(tx, RESTORED) or await marks.find(tx, RECOVERING)
    return restored is not None


async def _tell_of_cancellation(
    tx: Tx, link: SubscriptionLink, ends_at: datetime | None, *, noticed_at: datetime, now: datetime
) -> None:
    until = "its bill date" if ends_at is None else ends_at.isoformat()
    body = (
        f"Somebody canceled Recurly's subscription {link.uuid}; Amplify still serves {link.title} "
        f"({link.name}). Its usage is billed until {until}, and nothing after that. Reactivate it at "
        "Recurly before then, or cancel the subscription in the Marketplace."
    )
    key = f"canceled-at-recurly:{link.uuid}:{noticed_at.isoformat()}"
    notice = provider_notice(key, f"{link.title} will end at Recurly", body)
    await outbox.insert(tx, [notice], now=now)


async def _hold(tx: Tx, link: SubscriptionLink, state: str, now: datetime) -> None:
    billed = "nothing of it is billed, and its usage is held"
    if state == MISSING:
        if await marks.find(tx, marks.unread(link.subscription_id)) is not None:
            billed = (
                "since the store was restored nothing of it is recorded or billed. Its usage is counted, and "
                "billed once Recurly shows it again; held, if it is over at Amplify before"
            )
        what = f"Recurly has no subscription {link.uuid} any more"
        mend = "Should Recurly show it again, billing goes on by itself. If not, cancel"
    else:
        why = "unpaid, ended by a person, or its term is over"
        what = f"Recurly's subscription {link.uuid} is {state} for good ({why})"
        mend = "Cancel"
    reason = (
        f"{what}, but Amplify still serves {link.title} ({link.name}): {billed}. "
        f"{mend} the subscription in the Marketplace; whoever wants to go on subscribes anew."
    )
    item = Hold(ENDED, f"subscription:{link.subscription_id}:ended", reason, None, link.subscription_id)
    if await held.add(tx, item, now=now):
        log.warning("held", held_kind=ENDED, about=item.subject, reason=reason)
        key = f"held:{ENDED}:{link.subscription_id}:{now.isoformat()}"
        title = f"{link.title} is served, and not billed any more"
        await outbox.insert(tx, [provider_notice(key, title, reason)], now=now)
