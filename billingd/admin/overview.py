"""What the page says, read in one view of the store and within bounds (`store.glance`)."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from billingd.admin.chart import STATES, Stretches, chart, stretches
from billingd.admin.happened import SETTLED_READ, happened
from billingd.admin.operations import FACTS, ends
from billingd.admin.status import WARNINGS, Watched, feed_state
from billingd.domain.delivery import OVER
from billingd.domain.money import shown
from billingd.store import drift, feed, glance, watermarks
from billingd.store import glance_subscriptions as subscribed
from billingd.store.engine import Store, Tx
from billingd.store.glance import Sum
from billingd.store.glance_subscriptions import Linked, Waiting

_OF_SUBSCRIPTION: Final = re.compile(r"(?:subscription|usage|window):(?!bd1:)([^:]+)")

LISTED: Final = 20
"""Dead letters, held items and subscriptions on one page."""

NEXT_LISTED: Final = 5
"""Actions that wait for their time, on the page."""

FINDINGS_LISTED: Final = 10
RECORDS_READ: Final = 500
"""The newest records, of which the latest report is looked for."""

REPORT_PATIENCE: Final = timedelta(minutes=15)
"""A record that waits longer for its report is told of, though it is tried again by itself."""

FAILING_PATIENCE: Final = timedelta(hours=1)
"""What has failed for longer is told of, though it is tried again by itself."""

NOTHING_LINKED: Final = "no subscription is linked: `billingd resync --dry-run` tells what Amplify has"

LAG_SLACK: Final = timedelta(minutes=5)
"""How much more than usual the lag may be before it counts as trouble."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the process itself knows: why it is not ready, which loops are stuck, what is usual.

    `usual_lag` is how far behind the watermark is right before a poll that works.
    """

    now: datetime
    source: str
    reasons: Sequence[str]
    stuck: Sequence[str]
    watched: Watched
    usual_lag: timedelta


@dataclass(frozen=True, slots=True)
class Where:
    """From where on each list is shown: after a dead letter, a held item (ids), a subscription."""

    dead_after: int = 0
    held_after: int = 0
    after: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why not; `part` is the part of the page that says more."""

    text: str
    part: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Is money flowing: `tone` flowing | look | stopped | idle, and why not."""

    tone: str
    headline: str
    reasons: tuple[Reason, ...]


async def read(store: Store, seen: Seen, where: Where) -> dict[str, Any]:
    """The page's document."""
    now = seen.now
    async with store.snapshot() as tx:
        mark = await watermarks.find(tx, seen.source)
        place = await feed.find(tx, seen.watched.topic) if seen.watched.topic else None
        unreported = await glance.unreported(tx)
        unseen = Sum(more=any(one.more for one in unreported.values()))
        document = {
            "now": now,
            "source": seen.source,
            "dead": await _dead(tx, where),
            "held": await _held(tx, where),
            "waiting": {
                "count": await glance.unfinished(tx),
                "listed": await glance.next_due(tx, limit=NEXT_LISTED),
            },
            "unreported": unreported.get("recorded", unseen),
            "held_units": unreported.get("held", unseen),
            "failing": await glance.failing(tx, before=now - FAILING_PATIENCE),
            "doubtful": await glance.doubtful(tx),
            "unanswered": await glance.unanswered(tx, before=now - FAILING_PATIENCE),
            "unlinked": await glance.unlinked(tx),
            "traffic": {
                "watermark": None if mark is None else mark.at,
                "lag": None if mark is None else now - mark.at,
                "usual_lag": seen.usual_lag,
                "read_at": await glance.read_at(tx, seen.source),
            },
            "feed": {
                "state": feed_state(seen.watched, place, now),
                "read_at": None if place is None else place.read_at,
            },
            "events_lately": await glance.events_since(tx, now - timedelta(hours=1)),
            "drift": await _drift(tx),
            "warnings": await glance.standing_of(tx, WARNINGS, limit=LISTED),
            "linked": await subscribed.linked(tx),
        }
        _told_above(document)
        length = timedelta(hours=1) if mark is None else mark.length
        document["subscriptions"] = await _subscriptions(tx, where, stretches(now, length), document, now)
        settled = await glance.settled(tx, limit=SETTLED_READ)
        document["last_report"] = _latest(
            await glance.last_report(tx, among=RECORDS_READ),
            *(
                row["settled_at"]
                for row in settled
                if (row["kind"], row["state"]) == ("report_usage", "done")
            ),
        )
        document["happened"] = happened(
            await glance.last_events(tx, limit=SETTLED_READ),
            settled,
            await glance.last_history(tx, limit=SETTLED_READ),
        )
        document["names"] = await _named(tx, document)
    document["verdict"] = verdict(document, seen)
    return document


def _told_above(document: Mapping[str, Any]) -> None:
    """What waits, and is listed as held too, is given that item as `held`: its reason stands there."""
    held = {
        (row["action"]["kind"], row["subject"]): row["id"]
        for row in document["held"]["listed"]
        if row["action"] is not None
    }
    for row in document["waiting"]["listed"]:
        row["held"] = held.get((row["kind"], row["subject"]))


async def _named(tx: Tx, document: Mapping[str, Any]) -> dict[str, str]:
    """What people call what is listed, by its subject, where that is known; rows are given it as `named`."""
    rows = [row for part in ("dead", "held", "waiting") for row in document[part]["listed"]] + document[
        "drift"
    ]["listed"]
    subjects = {row["subject"]: row.get("subscription_id") for row in rows}
    subjects |= {one.about: None for one in document["happened"] if one.about not in subjects}
    ids = {}
    for subject, known in subjects.items():
        found = _OF_SUBSCRIPTION.match(subject)
        ids[subject] = known or (found[1] if found else "")
    titles = await subscribed.titles(tx, {one for one in ids.values() if one})
    names = {subject: titles.get(one, "") for subject, one in ids.items()}
    for row in rows:
        row["named"] = names[row["subject"]] or ((row.get("args") or {}).get("name") or "")
    return names


def _latest(*moments: datetime | None) -> datetime | None:
    return max((one for one in moments if one is not None), default=None)


async def _dead(tx: Tx, where: Where) -> dict[str, Any]:
    rows = await glance.dead(tx, after=where.dead_after, limit=LISTED + 1)
    return {"count": await glance.dead_count(tx), **_paged(rows, where.dead_after != 0)}


async def _held(tx: Tx, where: Where) -> dict[str, Any]:
    stakes, more = await glance.stakes(tx)
    amounts: dict[str, Decimal] = defaultdict(Decimal)
    for stake in stakes:
        for amount, currency in stake.amounts:
            amounts[currency] += Decimal(amount)
    rows = await glance.standing(tx, after=where.held_after, limit=LISTED + 1)
    for row in rows:
        record = (row["action"] or {"args": {}})["args"].get("record")
        row["for_writing_off"] = record is not None or row["kind"] in FACTS
        row["ends"] = ends(row)
    return {
        "count": Sum(sum(one.items for one in stakes), sum(one.units for one in stakes), more=more),
        "kinds": stakes,
        "amounts": [f"{shown(amounts[currency])} {currency}" for currency in sorted(amounts)],
        **_paged(rows, where.held_after != 0),
    }


def _paged(rows: list[dict[str, Any]], begun: bool) -> dict[str, Any]:
    """Up to a page of rows; `next` is the id after which the next page goes on."""
    listed = rows[:LISTED]
    return {"listed": listed, "next": listed[-1]["id"] if len(rows) > LISTED else None, "begun": begun}


async def _drift(tx: Tx) -> dict[str, Any]:
    run, last = await drift.latest(tx), await drift.ended(tx)
    listed: list[dict[str, Any]] = []
    found = Sum()
    if run is not None:
        listed, found = await glance.findings(tx, run.id, limit=FINDINGS_LISTED)
    return {
        "run": run,
        "error": None if last is None else last.error,
        "running": await drift.unfinished(tx),
        "found": found,
        "listed": listed,
    }


async def _subscriptions(
    tx: Tx, where: Where, over: Stretches, document: Mapping[str, Any], now: datetime
) -> dict[str, Any]:
    """A page of them; on the first come those that have units waiting."""
    rows = await subscribed.subscriptions(tx, after=where.after, limit=LISTED + 1)
    plain, further = rows[:LISTED], len(rows) > LISTED
    first = [] if where.after else await subscribed.waiting_subscriptions(tx, limit=LISTED // 2)
    ids = {one.link.subscription_id for one in first}
    listed = first + [one for one in plain if one.link.subscription_id not in ids]
    bars = await subscribed.bars(tx, listed, starts=over.starts)
    waiting = await subscribed.waiting(tx, listed, now=now)
    run = document["drift"]["run"]
    beyond = {} if run is None else await subscribed.served_beyond(tx, run.id, listed, since=over.starts[0])
    units: dict[str, dict[tuple[int, str], int]] = defaultdict(lambda: defaultdict(int))
    billed: dict[str, int] = defaultdict(int)
    for bar in bars:
        units[bar.subscription_id][bar.stretch, bar.state] += bar.units
        billed[bar.subscription_id] += bar.billed
    return {
        "over": over,
        "next": plain[-1].link.subscription_id if further else None,
        "begun": bool(where.after),
        "more_served": document["drift"]["found"].more,
        "listed": [
            _subscription(
                one,
                units[one.link.subscription_id],
                billed[one.link.subscription_id],
                beyond.get(one.link.subscription_id, 0),
                waiting[one.link.subscription_id],
                over,
                now,
            )
            for one in listed
        ],
    }


def _subscription(
    one: Linked,
    units: Mapping[tuple[int, str], int],
    billed: int,
    beyond: int,
    waiting: Waiting,
    over: Stretches,
    now: datetime,
) -> dict[str, Any]:
    link = one.link
    by_state = {state: sum(n for (_, of), n in units.items() if of == state) for state in STATES}
    recorded = sum(by_state.values())
    ends_at = link.period_ends_at
    is_open = ends_at is not None and ends_at > now and link.billed_state not in OVER
    return {
        "link": link,
        "plan": one.plan,
        "served": recorded + beyond,
        "recorded": recorded,
        "reported": by_state["reported"],
        "billed": billed,
        "written_off": by_state["written_off"],
        "waiting": waiting,
        "ends_at": ends_at if is_open else None,
        "chart": chart(units, over),
    }


def verdict(document: Mapping[str, Any], seen: Seen) -> Verdict:
    """Is money flowing right now, and if not, why."""
    stopped = [Reason(one) for one in seen.reasons]
    stopped += [Reason(f"the loop {name} has stopped making progress") for name in seen.stuck]
    lag, linked = document["traffic"]["lag"], document["linked"].rows
    if linked and lag is None:
        stopped.append(Reason("traffic has not been read yet", "traffic"))
    elif linked and lag > seen.usual_lag + LAG_SLACK:
        stopped.append(Reason("traffic is read later than usual", "traffic"))
    late = document["unreported"].since
    if late is not None and seen.now - late > REPORT_PATIENCE:
        stopped.append(Reason("units that were recorded a while ago are not reported yet", "after"))
    look = [
        *_number(document["dead"]["count"], "dead letter", "dead letters", "dead_after"),
        *_number(document["held"]["count"], "held item", "held items", "held_after"),
        *_number(document["failing"], "action keeps failing", "actions keep failing", "waiting"),
        *_number(document["unanswered"], "write is unanswered", "writes are unanswered", "figures"),
        *_number(document["drift"]["found"], "difference found", "differences found", "drift"),
    ]
    if document["drift"]["error"] is not None:
        look.append(Reason("the last reconciliation failed", "drift"))
    if document["feed"]["state"] in {"missing", "behind"}:
        look.append(Reason(f"the feed of Amplify's events is {document['feed']['state']}", "traffic"))
    flows = "Money is flowing" if document["last_report"] else "No usage was reported yet"
    if stopped:
        return Verdict("stopped", "Money is not flowing as it should", (*stopped, *look))
    if look:
        return Verdict("look", f"{flows}, and something waits for you", tuple(look))
    if not linked:
        return Verdict("idle", "Nothing to bill yet", (Reason(NOTHING_LINKED),))
    return Verdict("flowing" if document["last_report"] else "idle", flows, ())


def _number(counted: Sum, one: str, many: str, part: str) -> list[Reason]:
    if not counted.rows:
        return []
    more = "more than " if counted.more else ""
    return [Reason(f"{more}{counted.rows:,} {one if counted.rows == 1 else many}", part)]
