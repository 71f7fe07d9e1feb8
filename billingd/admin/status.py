"""The state of things in one document: what /status and `billingd status` say."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from billingd import __version__
from billingd.domain.attempts import State
from billingd.domain.resync import MASS_ABSENCE, NATIVE_BILLING
from billingd.store import completeness, drift, events, feed, held, intents, links, outbox, usage, watermarks
from billingd.store.completeness import ClosedPeriod, Completeness, CurrentPeriod
from billingd.store.engine import Store
from billingd.store.feed import Place

WARNINGS: Final = frozenset({NATIVE_BILLING, MASS_ABSENCE, "product_unlabelled"})
"""Kinds of held items that speak of more than one plan or subscription."""


@dataclass(frozen=True, slots=True)
class Watched:
    """The watch topic that is read `every` so often; "" is none. `missing`: Amplify has no such topic."""

    topic: str = ""
    every: timedelta = timedelta(minutes=1)
    missing: bool = False


FEED_TURNS: Final = 5
"""The feed is behind when its end was not reached for so many turns, ten minutes at least."""

FEED_BEHIND_MIN: Final = timedelta(minutes=10)


async def read(
    store: Store,
    *,
    source: str,
    now: datetime,
    reasons: Sequence[str],
    webhooks: Mapping[str, int],
    watched: Watched | None = None,
) -> dict[str, Any]:
    """The status document (contract section 4); `reasons` say why the daemon is not ready.

    `webhooks` are this process's counts; what was accepted is counted in the store, across restarts.
    """
    watched = watched or Watched()
    async with store.read() as tx:
        counts = await outbox.count(tx)
        oldest = await outbox.oldest_pending(tx)
        mark = await watermarks.find(tx, source)
        totals = await usage.totals(tx)
        unlinked = await usage.unlinked_units(tx)
        unknown = await intents.count_open(tx)
        plans, subscriptions = await links.count(tx)
        held_counts = await held.count(tx)
        held_items = await held.standing(tx)
        accepted = await events.count(tx)
        caught_up = await events.count_caught_up(tx)
        place = await feed.find(tx, watched.topic) if watched.topic else None
        periods = await completeness.summary(tx, now=now)
        drifting = await drift.summary(tx)
    by_state = {state: sum(n for (of, _), n in counts.items() if of == state) for state in State}
    recorded = sum(totals.values())
    reported = totals.get("reported", 0)
    return {
        "version": __version__,
        "ready": not reasons,
        "reasons": list(reasons),
        "webhooks": {
            "accepted": accepted,
            "duplicates": webhooks.get("duplicates", 0),
            "rejected": webhooks.get("rejected", 0),
            "unauthorized": webhooks.get("unauthorized", 0),
        },
        "catch_up": {
            "topic": watched.topic or None,
            "position": None if place is None else place.position,
            "read_at": None if place is None else timestamp(place.read_at),
            "events": caught_up,
            "state": feed_state(watched, place, now),
        },
        "outbox": {
            "pending": by_state[State.PENDING],
            "leased": by_state[State.LEASED],
            "dead": by_state[State.DEAD],
            "done": by_state[State.DONE],
            "discarded": by_state[State.DISCARDED],
            "oldest_pending_seconds": None if oldest is None else int((now - oldest).total_seconds()),
        },
        "traffic": {
            "source": source,
            "watermark": None if mark is None else timestamp(mark.at),
            "lag_seconds": None if mark is None else int((now - mark.at).total_seconds()),
            "recorded_units": recorded,
            "reported_units": reported,
            "unreported_units": recorded - reported,
            "unknown_outcomes": unknown,
            "unlinked_units": unlinked,
            "written_off_units": totals.get("written_off", 0),
        },
        "periods": {
            "open": periods.open,
            "incomplete": periods.incomplete,
            "ends_next": plain(periods.ends_next),
            "missed_units": periods.missed_units,
        },
        "drift": {name: plain(value) for name, value in drifting.items()},
        "warnings": [str(item["reason"]) for item in held_items if item["kind"] in WARNINGS],
        "held": {**held_counts, "items": [held_item(item) for item in held_items]},
        "links": {"plans": plans, "subscriptions": subscriptions},
    }


def feed_state(watched: Watched, place: Place | None, now: datetime) -> str:
    """off | missing | never | behind | ok"""
    if not watched.topic:
        return "off"
    if watched.missing:
        return "missing"
    if place is None:
        return "never"
    patience = max(FEED_TURNS * watched.every, FEED_BEHIND_MIN)
    return "behind" if now - place.read_at > patience else "ok"


async def subscriptions(store: Store, *, now: datetime) -> list[dict[str, Any]]:
    """Every linked subscription with its units: recorded in all, of these reported, of these held.

    `period` and `last_period` say the same of its billing periods; null where none is known.
    """
    async with store.read() as tx:
        linked = await links.subscriptions(tx)
        plans = {plan.plan_id: plan for plan in await links.plans(tx)}
        totals = await usage.totals_by_subscription(tx)
        periods = await completeness.of_all(tx, now=now)
    rows = []
    for link in linked:
        units = totals.get(link.subscription_id, {})
        known = periods.get(link.subscription_id, Completeness())
        rows.append(
            {
                "subscription": link.subscription_id,
                "name": link.name,
                "plan": plans[link.plan_id].name,
                "account": link.account_code,
                "recurly_uuid": link.uuid,
                "state": link.state,
                "billed_state": link.billed_state,
                "recorded_units": sum(units.values()),
                "reported_units": units.get("reported", 0),
                "held_units": units.get("held", 0),
                "period": _period(known.current),
                "last_period": _period(known.last),
            }
        )
    return rows


def _period(period: CurrentPeriod | ClosedPeriod | None) -> dict[str, Any] | None:
    if period is None:
        return None
    fields = {name: plain(value) for name, value in asdict(period).items()}
    return fields | {"complete": period.complete}


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, with a Z, fractions only where there are some."""
    return moment.isoformat().replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return timestamp(value) if isinstance(value, datetime) else value


def held_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """One held item as the contract's `held list --json` has it."""
    return {
        "id": item["id"],
        "kind": item["kind"],
        "subject": item["subject"],
        "subscription": item["subscription_id"],
        "add_on": item["add_on_code"],
        "units": item["units"],
        "amount": item["amount"],
        "currency": item["currency"],
        "reason": item["reason"],
        "since": timestamp(item["since"]),
    }


def action_item(row: Mapping[str, Any]) -> dict[str, Any]:
    """One action as `outbox list --json` has it."""
    names = ("id", "kind", "subject", "key", "args", "state", "attempt", "error", "event_id")
    times = ("due_at", "created_at", "settled_at")
    return {name: row[name] for name in names} | {name: plain(row[name]) for name in times}
