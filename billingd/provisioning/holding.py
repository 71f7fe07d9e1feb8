"""Holding what cannot be billed honestly: written down once, told once, until it is mended."""

from datetime import datetime

import structlog

from billingd.domain.attempts import Action
from billingd.store import held, outbox
from billingd.store.engine import Tx
from billingd.store.held import Hold

log = structlog.get_logger()


async def hold(tx: Tx, item: Hold, notice: Action, *, now: datetime) -> None:
    """Hold something, and tell the provider when it was not held before."""
    if await held.add(tx, item, now=now):
        log.warning("held", held_kind=item.kind, about=item.subject, reason=item.reason)
        await outbox.insert(tx, [notice], now=now)
