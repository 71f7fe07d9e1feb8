"""A run as a document: what `reconcile --json` prints, and /status says of the latest."""

from datetime import datetime
from typing import Any, Final

from billingd.store import drift, links, usage
from billingd.store.drift import Found
from billingd.store.engine import Store

SHOWN_MAX: Final = 10_000
"""Findings in one document; the numbers count all of them."""


async def of(store: Store, run_id: int) -> dict[str, Any] | None:
    """The contract's keys and more; None when there is no such run. Findings come once it is over."""
    async with store.read() as tx:
        run = await drift.find(tx, run_id)
        if run is None:
            return None
        totals = await drift.totals(tx, run_id)
        running = run.state == "running"
        found = [] if running else await drift.of(tx, run_id, limit=SHOWN_MAX)
        under_way = (
            0
            if running
            else await usage.units_under_way(
                tx,
                subscription_id=run.subscription_id,
                start=None if run.whole_periods else run.since,
                end=run.until,
            )
        )
        names = {one.drift.subscription_id for one in found if one.drift.subscription_id is not None}
        titles = {one.subscription_id: one.title for one in await links.subscriptions(tx)} if names else {}
    return {
        "id": run.id,
        "state": run.state,
        "phase": run.phase,
        "error": run.error,
        "since": time_text(run.since),
        "until": time_text(run.until),
        "steps_done": min(run.steps_done, run.steps) if running else run.steps,
        "steps": run.steps,
        "drift_units": totals.units,
        "findings": totals.findings,
        "left": totals.open,
        "checked": {"subscriptions": run.subscriptions, "records": run.records},
        "not_compared": run.not_compared,
        "held_units": run.held_units,
        "under_way_units": under_way,
        "repair": run.repair,
        "repaired_units": run.repaired_units,
        "drift": [_finding(one, titles) for one in found],
    }


def _finding(one: Found, titles: dict[str, str]) -> dict[str, Any]:
    found = one.drift
    return {
        "kind": found.kind,
        "subscription": found.subscription_id,
        "title": titles.get(found.subscription_id or ""),
        "add_on": found.add_on_code,
        "window_start": time_text(found.window_start),
        "units": found.units,
        "repairable": found.repairable,
        "cause": found.cause,
        "fix": found.fix,
        "tag": found.tag,
        "subject": found.subject,
        "mended": one.mended,
    }


def time_text(moment: datetime | None) -> str | None:
    """A time as JSON has it."""
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")
