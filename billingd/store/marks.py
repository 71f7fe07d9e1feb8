"""Marks: moments that one part leaves for another, or for the next start (a restore, the last resync)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.store.engine import Tx
from billingd.store.rows import upsert
from billingd.store.schema import marks

RESYNCED: Final = "resynced"
"""Amplify was listed and compared; `at` is when the listing began."""

RESTORED: Final = "restored"
"""The store was put back from a copy made at `detail.copied_at`: what happened since is read back first."""

RECOVERING: Final = "recovering"
"""Recurly was read back since; Amplify is yet to be listed, or what that leads to is under way."""

UNREAD: Final = "unread:"
"""How the mark begins of a subscription that Recurly did not show while all were read back."""

UNSEEN: Final = "unseen:"
"""How the mark begins of a plan of which Amplify does not list a quota that it should have."""

COPIED: Final = "copied"
"""Only in a safety copy: it was made at `at`, and held `detail.rows` rows of each table."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What was noted under a name, and when."""

    name: str
    at: datetime
    detail: Mapping[str, Any]


_FIND: Final = sa.select(marks).where(marks.c.name == sa.bindparam("of_name"))
"""Made once, for it is asked often: making it takes longer than running it."""


async def note(tx: Tx, name: str, *, at: datetime, detail: Mapping[str, Any] | None = None) -> None:
    """Leave a mark, in place of an earlier one of that name."""
    await upsert(tx, marks, {"name": name, "at": at, "detail": dict(detail or {})})


async def find(tx: Tx, name: str) -> Mark | None:
    """The mark of that name, if there is one."""
    row = (await tx.execute(_FIND, {"of_name": name})).one_or_none()
    return None if row is None else Mark(row.name, row.at, row.detail)


def unread(subscription_id: str) -> str:
    """The mark of a subscription that is yet to be read back (`detail.subscription` names it)."""
    return UNREAD + hashlib.sha256(subscription_id.encode()).hexdigest()[:24]


def unseen(plan_id: str) -> str:
    """The mark of a plan's quotas that are not listed since, and of those judged to be gone."""
    return UNSEEN + hashlib.sha256(plan_id.encode()).hexdigest()[:24]


async def all_unseen(tx: Tx) -> list[Mark]:
    """Those marks of all plans."""
    found = await tx.execute(sa.select(marks).where(marks.c.name.startswith(UNSEEN)))
    return [Mark(row.name, row.at, row.detail) for row in found]


async def unread_ones(tx: Tx) -> dict[str, Mark]:
    """What is yet to be read back, by subscription: until then nothing more is booked of it."""
    found = await tx.execute(sa.select(marks).where(marks.c.name.startswith(UNREAD)))
    return {row.detail["subscription"]: Mark(row.name, row.at, row.detail) for row in found}


async def clear(tx: Tx, name: str) -> None:
    """Take a mark away; nothing happens when there is none."""
    await tx.execute(sa.delete(marks).where(marks.c.name == name))
