"""Asking: the actions that mend what a run found."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime

from billingd.domain.attempts import Action
from billingd.domain.drift import AUDIT, READ
from billingd.domain.events import REPAIR_USAGE
from billingd.store import outbox
from billingd.store.drift import Found
from billingd.store.engine import Tx


async def ask(tx: Tx, found: Sequence[Found], *, now: datetime) -> int:
    """Ask for the repair of these findings; return the units of those that can be mended.

    What can only be shown to a person (late usage that no bill takes, billed extra records) is read or
    audited too, so that it is held.
    """
    await outbox.insert(tx, list(_actions(found)), now=now)
    return sum(one.drift.units for one in found if one.drift.repairable)


def _actions(found: Iterable[Found]) -> Iterable[Action]:
    """One for each record to mend; one for each subscription to read again, or to audit."""
    reading: dict[str, list[Found]] = defaultdict(list)
    auditing: dict[str, Found] = {}
    for one in found:
        how, name = one.drift.detail.get("how"), one.drift.subscription_id
        if how is None or name is None:
            continue
        if how == READ:
            reading[name].append(one)
        elif how == AUDIT:
            auditing.setdefault(name, one)
        else:
            yield Action(
                REPAIR_USAGE,
                f"usage:{name}:{one.drift.detail['quota']}",
                f"{REPAIR_USAGE}:{one.run_id}:{one.id}",
                {"how": how, "run": one.run_id, "finding": one.id},
            )
    for name, late in reading.items():
        starts = [one.drift.window_start for one in late if one.drift.window_start is not None]
        args = {
            "how": READ,
            "run": late[0].run_id,
            "subscription": name,
            "since": min(starts).isoformat(),
            "until": max(one.drift.detail["until"] for one in late),
        }
        subject = f"usage:{name}:{late[0].drift.detail['quota']}"
        yield Action(REPAIR_USAGE, subject, f"{REPAIR_USAGE}:{late[0].run_id}:read:{late[0].id}", args)
    for name, first in auditing.items():
        args = {"how": AUDIT, "run": first.run_id, "subscription": name}
        subject = f"audit:{name}:run {first.run_id}"
        yield Action(REPAIR_USAGE, subject, f"{REPAIR_USAGE}:{first.run_id}:audit:{name}", args)
