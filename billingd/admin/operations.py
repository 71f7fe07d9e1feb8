"""What an operator may do to the outbox and to held items, through the daemon or on the store itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from billingd.domain.attempts import Action, State
from billingd.domain.delivery import NOT_READ_BACK
from billingd.domain.drift import KINDS
from billingd.domain.errors import BillingdError
from billingd.domain.events import END_SUBSCRIPTION
from billingd.domain.resync import MASS_ABSENCE, NATIVE_BILLING
from billingd.domain.usage import usage_intent
from billingd.once import DOUBTED
from billingd.store import held, history, outbox, usage
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.stakes import usage_hold

IDS_MAX: Final = 10_000
"""Ids in one statement: both databases bound its parameters."""

FACTS: Final = frozenset({"reading_shrank", "before_link", NOT_READ_BACK, NATIVE_BILLING, *KINDS})
"""Kinds of held items that only tell of something: there is nothing of ours to send or to mend."""


class NotForWritingOff(BillingdError):
    """What is held can be mended, so it is not given up; the message says what to do instead."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which actions: by id, or by kind, subject and a text in their last error. `states` bounds them."""

    ids: tuple[int, ...] | None = None
    kind: str | None = None
    subject: str | None = None
    cause: str | None = None
    states: tuple[str, ...] = (State.DEAD,)


async def selected(store: Store, selection: Selection, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The actions of a selection, in order."""
    async with store.read() as tx:
        rows = await outbox.select(
            tx,
            states=selection.states,
            kind=selection.kind,
            subject=selection.subject,
            cause=selection.cause,
            limit=limit if selection.ids is None else None,
        )
    return [row for row in rows if selection.ids is None or row["id"] in selection.ids]


async def replay(store: Store, selection: Selection, *, now: datetime) -> list[int]:
    """Give every dead action of the selection a new life; return their ids."""
    rows = await selected(store, selection)
    ids = [int(row["id"]) for row in rows]
    async with store.write() as tx:
        for start in range(0, len(ids), IDS_MAX):
            await outbox.retry(tx, ids[start : start + IDS_MAX], now=now)
        for row in rows:
            await _note(tx, row, "replayed", now=now)
    return ids


async def retry(store: Store, action_id: int, *, now: datetime) -> bool:
    """Try one dead action again, or a pending one at once; False when it is neither."""
    async with store.write() as tx:
        row = await outbox.find(tx, action_id)
        if row is None or await outbox.retry(tx, [action_id], now=now) != 1:
            return False
        await _note(tx, row, "retried", now=now)
        return True


async def _note(tx: Tx, row: Mapping[str, Any], what: str, *, now: datetime, **detail: Any) -> None:
    """An operator did this to an action: it is told with the record or the subject it is about."""
    subject = row["subject"]
    if (record_id := row["args"].get("record")) is not None:
        subject = usage_intent(await usage.tag_of(tx, record_id))
    await history.append(
        tx, subject, what, now=now, by="operator", action=row["id"], error=row["error"], **detail
    )


async def discard(store: Store, action_id: int, *, reason: str, now: datetime) -> bool:
    """Give one dead or pending action up for good; False when it is neither.

    The units of a discarded report are held, and so is the end of a subscription.
    """
    async with store.write() as tx:
        row = await outbox.find(tx, action_id)
        if row is None or not await outbox.discard(tx, action_id, reason=reason, now=now):
            return False
        await _note(tx, row, "discarded", now=now, reason=reason)
        record_id = row["args"].get("record")
        if record_id is not None and await usage.hold(tx, record_id):
            recorded = await usage.find(tx, record_id)
            why = f"{recorded.record.units} unit(s) are not reported: an operator discarded it: {reason}"
            again = Action(row["kind"], row["subject"], "", row["args"])
            item = await usage_hold(tx, recorded, "usage_discarded", why, again)
            await held.add(tx, item, now=now)
        if row["kind"] == END_SUBSCRIPTION:
            ended = str(row["args"]["id"])
            item = Hold(
                "end_discarded",
                f"subscription:{ended}:end",
                f"The Recurly subscription may go on being billed: an operator discarded its end: {reason}",
                Action(row["kind"], row["subject"], "", row["args"]),
                subscription_id=ended,
            )
            await held.add(tx, item, now=now)
        return True


async def release(store: Store, held_id: int, *, now: datetime) -> bool:
    """Try a held item again; False when nothing of that id is held."""
    async with store.write() as tx:
        item = await held.find(tx, held_id)
        if item is None or item["closed_at"] is not None:
            return False
        if not await held.close_one(tx, held_id, resolution=held.RELEASED, now=now):
            return False
        await history.append(tx, item["subject"], "released", now=now, by="operator", held=held_id)
        if (again := item["action"]) is not None:
            if (record_id := again["args"].get("record")) is not None:
                await usage.release(tx, record_id)
            # What looks again by itself is only made to look now.
            rows = await outbox.select(
                tx, states=[State.PENDING], kind=again["kind"], subject=again["subject"]
            )
            if waiting := [row["id"] for row in rows if row["args"] == again["args"]]:
                await outbox.retry(tx, waiting, now=now)
                return True
            key = f"{again['kind']}:released:{held_id}"
            await outbox.insert(tx, [Action(again["kind"], again["subject"], key, again["args"])], now=now)
        return True


def ends(item: Mapping[str, Any]) -> str | None:
    """What releasing a held item ends, for a person to confirm; None where it only tries again."""
    again = item["action"]
    if again is not None and again["kind"] == END_SUBSCRIPTION:
        return "This ends a subscription at Recurly, unless it has ended there, and cannot be taken back."
    if again is None or item["kind"] != MASS_ABSENCE:
        return None
    counts = [(len(again["args"].get(what, ())), what) for what in ("subscription", "plan")]
    told = " and ".join(f"{number:,} {what}{'s' * (number > 1)}" for number, what in counts if number)
    return (
        f"This ends {told} at Recurly, all that are named, and cannot be taken back. Do it only if you know "
        "that they were really deleted at Amplify: a service account that lost its role sees just the same."
    )


async def write_off(store: Store, held_id: int, *, reason: str, now: datetime) -> bool:
    """Give a held item up for good; False when nothing of that id is held. Raises NotForWritingOff.

    A usage record is never sent from here on. If one that was sent before without a clear answer turns out
    to be at Recurly after all, the ledger says so again (`store.usage.reported`): what is billed is reported.
    """
    async with store.write() as tx:
        item = await held.find(tx, held_id)
        if item is None or item["closed_at"] is not None:
            return False
        record_id = (item["action"] or {"args": {}})["args"].get("record")
        if record_id is None and item["kind"] not in FACTS:
            raise NotForWritingOff(_instead(item))
        if not await held.write_off(tx, held_id, reason=reason, now=now):
            return False
        await history.append(
            tx, item["subject"], "written_off", now=now, by="operator", held=held_id, reason=reason
        )
        if record_id is not None and not await usage.write_off(tx, record_id):
            state = (await usage.find(tx, record_id)).state
            raise NotForWritingOff(
                f"the usage record of held item {held_id} is {state}, so nothing of it is left to write off; "
                f"`billingd held release {held_id}` closes the item"
            )
        return True


def _instead(item: Mapping[str, Any]) -> str:
    """What to do about a held item that is not written off."""
    release_it = f"`billingd held release {item['id']}`"
    if item["kind"] == DOUBTED:
        return (
            f"a doubt is not written off: once you know that Recurly heeds idempotency keys, {release_it}, "
            "and they are relied on again"
        )
    return (
        f"{item['kind']} is not written off, for no usage record hangs on it: mend what its reason says, "
        f"then {release_it}"
    )
