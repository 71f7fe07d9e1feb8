"""A subscription that Amplify serves and Recurly does not bill any more: told once, held till mended."""

from datetime import datetime
from typing import Final

import structlog

from billingd.domain.delivery import MISSING, OVER
from billingd.domain.notices import provider_notice
from billingd.store import held, links, outbox
from billingd.store.engine import Tx
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink

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
    held no longer.
    """
    served = await links.find_subscription(tx, link.subscription_id)
    if served is None or served.state not in SERVED:
        return
    if state in OVER or (state == MISSING and link.billed_state == MISSING):
        await _hold(tx, link, state, now)
        return
    if state == MISSING:
        return
    if link.billed_state in {MISSING, CANCELED, *OVER}:
        subject = f"subscription:{link.subscription_id}:ended"
        await held.close(tx, subject=subject, resolution=f"Recurly shows it as {state} again", now=now)
    if state == CANCELED and link.billed_state != CANCELED:
        until = "its bill date" if ends_at is None else ends_at.isoformat()
        body = (
            f"Somebody canceled Recurly's subscription {link.uuid}; Amplify still serves {link.title} "
            f"({link.name}). Its usage is billed until {until}, and nothing after that. Reactivate it at "
            "Recurly before then, or cancel the subscription in the Marketplace."
        )
        key = f"canceled-at-recurly:{link.uuid}:{now.isoformat()}"
        notice = provider_notice(key, f"{link.title} will end at Recurly", body)
        await outbox.insert(tx, [notice], now=now)


async def _hold(tx: Tx, link: SubscriptionLink, state: str, now: datetime) -> None:
    if state == MISSING:
        what = f"Recurly has no subscription {link.uuid} any more"
        mend = "Should Recurly show it again, billing goes on by itself. If not, cancel"
    else:
        why = "unpaid, ended by a person, or its term is over"
        what = f"Recurly's subscription {link.uuid} is {state} for good ({why})"
        mend = "Cancel"
    reason = (
        f"{what}, but Amplify still serves {link.title} ({link.name}): nothing of it is billed, and its "
        f"usage is held. {mend} the subscription in the Marketplace; whoever wants to go on subscribes anew."
    )
    item = Hold(ENDED, f"subscription:{link.subscription_id}:ended", reason, None, link.subscription_id)
    if await held.add(tx, item, now=now):
        log.warning("held", held_kind=ENDED, about=item.subject, reason=reason)
        key = f"held:{ENDED}:{link.subscription_id}:{now.isoformat()}"
        title = f"{link.title} is served, and not billed any more"
        await outbox.insert(tx, [provider_notice(key, title, reason)], now=now)
