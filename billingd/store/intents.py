"""What is durably known of each write to Recurly, before, while and after it is sent."""

from datetime import datetime
from typing import Final

import sqlalchemy as sa

from billingd.domain.sending import Intent
from billingd.store import history
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import intents

_FIND: Final = sa.select(*(intents.c[name] for name in Intent.__slots__)).where(
    intents.c.name == sa.bindparam("of_name")
)
_OF_NAME: Final = sa.update(intents).where(intents.c.name == sa.bindparam("of_name"))
_SENT: Final = _OF_NAME.where(intents.c.state == "open", intents.c.sends == sa.bindparam("at_sends"))
"""Made once, for each write needs them. An update sets what it is given by its column's name."""


SUPERSEDED: Final = "superseded"
"""How the history calls an earlier sending, which another one takes the place of."""


async def find(tx: Tx, name: str) -> Intent | None:
    """The intent of that name, or None when nothing was ever sent under it."""
    row = (await tx.execute(_FIND, {"of_name": name})).one_or_none()
    return None if row is None else Intent(*row)


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

    False, and nothing changes, when it is no longer as it was `seen`: somebody else got hold of it. What was
    seen goes into the history.
    """
    row = {
        "name": name,
        "epoch": epoch,
        "idempotency_key": key,
        "body_hash": body_hash,
        "state": "open",
        "burnt": False,
        "sends": 1 if seen is None else seen.sends + 1,
        "first_sent_at": first_sent_at,
        "last_sent_at": now,
        "gave_up_at": None,
        "missed_at": None,
        "result": None,
    }
    if seen is None:
        return await insert_new(tx, intents, [row]) == 1
    moved = await tx.execute(
        sa.update(intents)
        .where(intents.c.name == name, intents.c.state == seen.state, intents.c.sends == seen.sends)
        .values(**row)
    )
    if moved.rowcount != 1:
        return False
    await history.append(tx, name, SUPERSEDED, now=now, **history.sent(seen))
    return True


async def done(tx: Tx, name: str, *, result: str) -> None:
    """It took effect; `result` is the far side's id for it. The name need not have been sent from here."""
    await tx.execute(_OF_NAME, {"of_name": name, "state": "done", "result": result, "burnt": False})


async def reopen(tx: Tx, name: str, *, key: str, now: datetime) -> None:
    """What was done is no more: nothing of it is under way since `now`, and its key can help no more.

    So two look-ups that find nothing, and then a new epoch, come before it is sent again. Where nothing was
    ever sent from here, `key` stands in for the key it may have been sent under. Whoever calls
    this tells the history what was known of it (`history.sent`), for some of it is gone then.
    """
    again = {"state": "open", "result": None, "burnt": True, "gave_up_at": now, "missed_at": None}
    first = {"epoch": 1, "idempotency_key": key, "body_hash": "", "sends": 1}
    times = {"first_sent_at": now, "last_sent_at": now}
    if await insert_new(tx, intents, [{"name": name, **first, **times, **again}]) == 0:
        await tx.execute(_OF_NAME, {"of_name": name, **again})


async def refused(tx: Tx, name: str, *, sends: int) -> bool:
    """That sending clearly did not take effect. False, and nothing changes, when it was sent since."""
    moved = await tx.execute(_SENT, {"of_name": name, "at_sends": sends, "state": "refused"})
    return moved.rowcount == 1


async def gave_up(tx: Tx, name: str, *, sends: int, burnt: bool, now: datetime) -> None:
    """That sending got no clear answer; from `now` on nothing of it is under way here.

    `burnt`: its key cannot help again, only a look-up can tell. When it was sent since, only that is kept.
    """
    await tx.execute(_SENT, {"of_name": name, "at_sends": sends, "gave_up_at": now})
    if burnt:
        await tx.execute(_OF_NAME.where(intents.c.state == "open"), {"of_name": name, "burnt": True})


async def end_sendings(tx: Tx, *, now: datetime) -> None:
    """Every sending that seemed to run has ended: a new start on SQLite knows that no sender is left."""
    running = sa.and_(sa.text("intents.state = 'open'"), intents.c.gave_up_at.is_(None))  # by its index
    await tx.execute(sa.update(intents).where(running).values(gave_up_at=now))


async def missed(tx: Tx, name: str, *, sends: int, now: datetime) -> None:
    """A look-up after the settling time found nothing of it."""
    await tx.execute(_SENT, {"of_name": name, "at_sends": sends, "missed_at": now})


async def count_open(tx: Tx) -> int:
    """How many outcomes are unknown."""
    statement = sa.select(sa.func.count()).select_from(intents).where(sa.text("intents.state = 'open'"))
    return int((await tx.execute(statement)).scalar_one())
