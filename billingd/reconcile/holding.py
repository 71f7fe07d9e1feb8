"""Holding: what nothing mends waits for a person, until it is gone, or written off."""

from collections.abc import Sequence
from datetime import datetime

from billingd.domain.attempts import Action
from billingd.domain.drift import AUDIT, HELD, READ, WRONG_PERIOD, Drift, WrittenOff, accepted, held_subject
from billingd.domain.notices import provider_notice
from billingd.store import drift, held, links
from billingd.store.drift import Run, Totals
from billingd.store.engine import Tx
from billingd.store.held import Hold


async def hold(tx: Tx, found: Drift, now: datetime) -> None:
    """What nothing mends waits for a person.

    Late usage is held by its report, what is in the open cycle by the audit. A reading that shrank is held
    as the poll does it, which reads only so far back.
    """
    if found.subscription_id is None or found.detail.get("how") == READ:
        return
    if found.detail.get("how") == AUDIT and found.kind != WRONG_PERIOD:
        link = await links.find_subscription(tx, found.subscription_id)
        at = datetime.fromisoformat(found.detail["at"])
        if link is None or link.period_started_at is None or at >= link.period_started_at:
            return
    reading = found.detail.get("reading")
    item = Hold(
        found.kind if reading is None else "reading_shrank",
        held_subject(found)[:200] if reading is None else reading,
        f"{found.cause}. {found.fix}",
        subscription_id=found.subscription_id,
        add_on_code=found.add_on_code,
        units=found.units,
    )
    await held.add(tx, item, now=now)


async def close_gone(tx: Tx, run: Run, now: datetime) -> None:
    """What was held of a difference that this run looked for and found no more needs nobody."""
    for item in await held.standing(tx):
        if not item["subject"].startswith(HELD):
            continue
        if run.subscription_id not in {None, item["subscription_id"]}:
            continue
        kind, _, subject = item["subject"].removeprefix(HELD).partition(":")
        said = await drift.last_said(tx, kind, subject)
        if said is None or said[0] == run.id or said[1] is None or not run.since <= said[1] < run.until:
            continue
        await held.close_one(tx, item["id"], resolution="it was reconciled, and is no more", now=now)


async def not_accepted(tx: Tx, found: Sequence[Drift]) -> list[Drift]:
    """What no person has seen and written off."""
    known: dict[str, list[WrittenOff]] = {}
    for name in {one.subscription_id for one in found if one.subscription_id is not None}:
        rows = await held.written_off(tx, name)
        known[name] = [WrittenOff(row["kind"], row["subject"], row["reason"], row["units"]) for row in rows]
    return [one for one in found if not accepted(one, known.get(one.subscription_id or "", ()))]


def notice(run: Run, totals: Totals) -> Action:
    """What people are told when a run changes from clean to drifting, or back."""
    if totals.drifting:
        title = "Amplify, the ledger and Recurly differ"
        body = (
            f"{totals.findings} difference(s) of {totals.units} unit(s) between {run.since.isoformat()} and "
            f"{run.until.isoformat()}. `billingd reconcile` shows them, `billingd reconcile --repair` mends "
            "what is safe."
        )
    else:
        title = "Amplify, the ledger and Recurly agree again"
        body = f"Nothing differs between {run.since.isoformat()} and {run.until.isoformat()}."
    return provider_notice(f"drift:{run.id}", title, body)
