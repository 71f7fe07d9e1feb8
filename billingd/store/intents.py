"""What is durably known of each write to Recurly, before, while and after it is sent."""

from datetime import datetime

import sqlalchemy as sa

from billingd.domain.sending import Intent
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import intents


async def find(tx: Tx, name: str) -> Intent | None:
    """The intent of that name, or None when nothing was ever sent under it."""
    row = (await tx.execute(sa.select(intents).where(intents.c.name == name))).one_or_none()
    if row is None:
        return None
    return Intent(
        row.name,
        row.epoch,
        row.state,
        row.first_sent_at,
        row.last_sent_at,
        row.burnt,
        row.result,
        row.body_hash,
    )


async def opened(
    tx: Tx,
    name: str,
    seen: Intent | None,
    *,
    epoch: int,
    key: str,
    body_hash: str,
    first_sent_at: datetime,
    now: datetime,
) -> bool:
    """About to be sent: from here on its outcome is unknown until one is known.

    False, and nothing changes, when it is no longer as it was `seen`: somebody else got hold of it.
    """
    row = {
        "name": name,
        "epoch": epoch,
        "idempotency_key": key,
        "body_hash": body_hash,
        "state": "open",
        "burnt": False,
        "first_sent_at": first_sent_at,
        "last_sent_at": now,
        "result": None,
    }
    if seen is None:
        return await insert_new(tx, intents, [row]) == 1
    moved = await tx.execute(
        sa.update(intents)
        .where(
            intents.c.name == name,
            intents.c.state == seen.state,
            intents.c.epoch == seen.epoch,
            intents.c.last_sent_at == seen.last_sent_at,
        )
        .values(**row)
    )
    return moved.rowcount == 1


async def done(tx: Tx, name: str, *, result: str) -> None:
    """It took effect; `result` is the far side's id for it. The name need not have been sent from here."""
    await tx.execute(
        sa.update(intents).where(intents.c.name == name).values(state="done", result=result, burnt=False)
    )


async def refused(tx: Tx, name: str, *, epoch: int, last_sent_at: datetime) -> bool:
    """What was sent then clearly did not take effect. False, and nothing changes, when it was sent since."""
    moved = await tx.execute(
        sa.update(intents)
        .where(
            intents.c.name == name,
            intents.c.state == "open",
            intents.c.epoch == epoch,
            intents.c.last_sent_at == last_sent_at,
        )
        .values(state="refused")
    )
    return moved.rowcount == 1


async def burn(tx: Tx, name: str) -> None:
    """Its outcome is unknown and its key cannot help again: only a look-up can tell."""
    await tx.execute(
        sa.update(intents).where(intents.c.name == name, intents.c.state == "open").values(burnt=True)
    )


async def count_open(tx: Tx) -> int:
    """How many outcomes are unknown."""
    statement = sa.select(sa.func.count()).select_from(intents).where(sa.text("intents.state = 'open'"))
    return int((await tx.execute(statement)).scalar_one())
