"""Scope: what a run really looked at. Whatever else was found before is neither gone nor agreed upon."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from billingd.domain.drift import Drift
from billingd.domain.usage import parse_tag
from billingd.domain.windows import floor
from billingd.reconcile.document import time_text
from billingd.store import links, marks
from billingd.store.drift import Run
from billingd.store.engine import Tx
from billingd.store.links import SubscriptionLink
from billingd.store.watermarks import Watermark

SERVED: Final = "served"
BILLED: Final = "billed"
LINKS: Final = "links"
REPAIR: Final = "repair"

UNREAD: Final = "restored, and not read back yet"
"""Why nothing is compared of a subscription that Recurly has not shown since: what it lacks is no drift."""


def not_compared(
    phase: str,
    since: datetime,
    until: datetime,
    reason: str,
    *,
    subscription: str | None = None,
    subjects: Collection[str] = (),
) -> dict[str, Any]:
    """An entry of `not_compared`: what one phase could not look at, of one subscription or of all.

    `subjects`: of the links, those alone, and what belongs to them.
    """
    span = {"since": time_text(since), "until": time_text(until), "subscription": subscription}
    told = {**span, "reason": reason, "phase": phase}
    return told | {"subjects": sorted(subjects)} if subjects else told


def is_open(link: SubscriptionLink) -> bool:
    """Whether it still bills, as far as is known."""
    return link.state != "ended" and link.billed_state not in {"expired", "failed"}


def billed_since(run: Run, link: SubscriptionLink, length: timedelta) -> datetime:
    """From where on a subscription's usage is compared with Recurly: all of its open period, however long."""
    if not run.whole_periods or not is_open(link) or link.period_started_at is None:
        return run.since
    return min(run.since, floor(link.period_started_at, length))


@dataclass(frozen=True, slots=True)
class Scope:
    """A run and what bounded it."""

    run: Run
    mark: Watermark
    linked: Mapping[str, SubscriptionLink]
    unread: Collection[str] = ()
    """What is yet to be read back: its usage is compared with nothing."""

    @classmethod
    async def of(cls, tx: Tx, run: Run, mark: Watermark) -> "Scope":
        """The scope of a run as it stands."""
        linked = {one.subscription_id: one for one in await links.subscriptions(tx)}
        return cls(run, mark, linked, await marks.unread_ones(tx))

    def covers(self, found: Drift) -> bool:
        """Whether the run would have found this, were it still so."""
        if self.run.subscription_id not in {None, found.subscription_id} or self.hides(found):
            return False
        if found.window_start is None:
            return True
        begin, until = self.run.since, self.run.until
        link = self.linked.get(found.subscription_id or "")
        if _phase(found) == SERVED:
            until = min(until, self.mark.at)
        elif link is not None:
            begin = billed_since(self.run, link, self.mark.length)
        tag = parse_tag(found.tag or "")
        end = found.window_start + self.mark.length if tag is None else tag.window.end
        return begin <= found.window_start and end <= until

    def hides(self, found: Drift) -> bool:
        """Whether it lies in what the run could not compare."""
        if found.window_start is not None and found.subscription_id in self.unread:
            return True
        return any(_hidden(one, found) for one in self.run.not_compared)


def _phase(found: Drift) -> str:
    """Which phase finds it."""
    if found.window_start is None:
        return LINKS
    return SERVED if found.subject.startswith("window:") else BILLED


def _hidden(told: Mapping[str, Any], found: Drift) -> bool:
    """An earlier release named no phase: what is served, or of one subscription what is billed."""
    phase = told.get("phase") or (SERVED if told["subscription"] is None else BILLED)
    if phase != _phase(found) or told["subscription"] not in {None, found.subscription_id}:
        return False
    if found.window_start is None:
        subjects = told.get("subjects")
        return not subjects or any(
            found.subject == one or found.subject.startswith(f"{one}:") for one in subjects
        )
    return datetime.fromisoformat(told["since"]) <= found.window_start < datetime.fromisoformat(told["until"])
