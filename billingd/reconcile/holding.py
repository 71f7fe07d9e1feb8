"""Holding: what nothing mends waits for a person, until it is gone, or written off."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from billingd.domain.attempts import Action
from billingd.domain.drift import (
    AUDIT,
    AUDITED,
    CORRECT,
    HELD,
    READ,
    WRONG_PERIOD,
    Drift,
    WrittenOff,
    accepted,
    decides_on,
    held_subject,
)
from billingd.domain.notices import provider_notice
from billingd.reconcile.scope import Scope
from billingd.store import drift, held, links
from billingd.store.drift import Run, Totals
from billingd.store.engine import Tx
from billingd.store.held import Hold


async def hold(tx: Tx, found: Drift, now: datetime, *, stands: bool = False) -> None:
    """What nothing mends, or what stands, waits for a person, who may write it off.

    Late usage is held by its report once it is read, what is in the open cycle by the audit. A reading that
    shrank is held as the poll does it, which reads only so far back.
    """
    if (found.detail.get("how") == READ and not stands) or await _audited(tx, found):
        return
    if found.subscription_id is not None and found.detail.get("how") == AUDIT and found.kind != WRONG_PERIOD:
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


async def hold_standing(tx: Tx, run_id: int, before: set[tuple[str, str]], now: datetime) -> None:
    """What two runs over everything have found, one after the other, and nothing has mended."""
    after = 0
    while page := await drift.of(tx, run_id, after=after):
        after = page[-1].id
        for one in page:
            if one.mended is None and (one.drift.kind, one.drift.subject) in before:
                await hold(tx, one.drift, now, stands=True)


async def close_gone(tx: Tx, scope: Scope, now: datetime) -> None:
    """What was held of a difference that this run looked for and found no more needs nobody.

    Nor does what an audit holds by now.
    """
    for item in await held.standing(tx):
        if not item["subject"].startswith(HELD):
            continue
        kind, _, subject = item["subject"].removeprefix(HELD).partition(":")
        said = await drift.last_said(tx, kind, subject)
        if said is None:
            continue
        if await _audited(tx, said.drift):
            why = "the audit of its subscription holds it"
        elif said.run_id != scope.run.id and scope.covers(said.drift):
            why = "it was reconciled, and is no more"
        else:
            continue
        await held.close_one(tx, item["id"], resolution=why, now=now)


async def _audited(tx: Tx, found: Drift) -> bool:
    """Whether an audit holds just this: one difference is one item."""
    if not found.subject.startswith("usage:"):
        return False
    about = f"{AUDITED}{found.subject.removeprefix('usage:')}"
    return bool(await held.standing(tx, subject=about, kind=found.kind))


async def not_accepted(tx: Tx, found: Sequence[Drift]) -> list[Drift]:
    """What no person has seen and written off.

    A billed record that a person has closed an item of, be it the audit's or a run's, may be refunded by
    hand: it is shown, but not corrected a second time.
    """
    known: dict[str | None, list[WrittenOff]] = {}
    decided: dict[str | None, set[str]] = {}
    for name in {one.subscription_id for one in found}:
        known[name] = [_written_off(row) for row in await held.written_off(tx, name)]
        decided[name] = await held.by_person(tx, name)
    left = []
    for one in found:
        if accepted(one, known[one.subscription_id]):
            continue
        its = decided[one.subscription_id] if one.detail.get("how") == CORRECT else ()
        by_hand = any(decides_on(subject, one.tag or "") for subject in its)
        left.append(_decided(one) if by_hand else one)
    return left


def _written_off(row: Mapping[str, Any]) -> WrittenOff:
    usages = ((row["action"] or {}).get("args") or {}).get("usages") or {}
    known = usages if isinstance(usages, Mapping) else dict.fromkeys(usages)
    return WrittenOff(row["kind"], row["subject"], row["reason"], row["units"], known)


def _decided(one: Drift) -> Drift:
    fix = (
        "a person closed what was held of it, so it is not corrected from here: refund or charge the "
        "difference at Recurly if that is not done yet, then write the held item off"
    )
    return replace(one, fix=fix, repairable=False, detail={**one.detail, "how": AUDIT})


def notice(run: Run, totals: Totals, unread: int) -> Action:
    """What people are told when a run changes from clean to drifting, or back."""
    span = f"between {run.since.isoformat()} and {run.until.isoformat()}"
    if totals.drifting or unread:
        title = "Amplify, the ledger and Recurly differ"
        body = (
            f"{totals.findings} difference(s) of {totals.units} unit(s) {span}. `billingd reconcile` shows "
            "them, `billingd reconcile --repair` mends what is safe. What two runs find is held: write it "
            "off if it is meant."
        )
        if unread:
            body += (
                f" {unread} subscription(s) or plan(s) could not be compared: `billingd reconcile` says why."
            )
    else:
        title = "Amplify, the ledger and Recurly agree again"
        body = f"Nothing differs {span}."
    return provider_notice(f"drift:{run.id}", title, body)


def failure_notice(run: Run, error: str) -> Action:
    """What people are told when a run over everything cannot be finished."""
    body = f"Between {run.since.isoformat()} and {run.until.isoformat()}: {error}"
    title = "Amplify, the ledger and Recurly were not compared"
    return provider_notice(f"drift:{run.id}:failed", title, body)
