"""Explain: one usage record back to what made it and what was sent; a subscription forward to all of it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from billingd.admin.status import plain, timestamp
from billingd.domain.errors import NotFound
from billingd.domain.events import REPORT_USAGE
from billingd.domain.money import shown
from billingd.domain.periods import Period, period_of
from billingd.domain.sending import idempotency_key
from billingd.domain.usage import TAG_PREFIX, usage_intent
from billingd.store import history, intents, ledger, links, periods, usage
from billingd.store.engine import Store, Tx
from billingd.store.history import Entry
from billingd.store.ledger import Line
from billingd.store.links import AddOnLink, SubscriptionLink

RECORDS_SHOWN: Final = 200
"""Records of a subscription in one answer, the newest, unless more are asked for."""


async def explain(store: Store, about: str, *, now: datetime, records: int = RECORDS_SHOWN) -> dict[str, Any]:
    """The document about a merchant tag, or about a subscription (its id, name, or Recurly's uuid).

    Raises NotFound when the ledger has neither.
    """
    async with store.read() as tx:
        if about.startswith(TAG_PREFIX):
            return await _record(tx, about)
        return await _subscription(tx, about, now, records)


async def _record(tx: Tx, tag: str) -> dict[str, Any]:
    known = (await usage.by_tags(tx, [tag])).get(tag)
    if known is None:
        raise NotFound(
            f"the ledger has no usage record tagged {tag}; if Recurly has one, `billingd reconcile` says more"
        )
    found = await usage.find(tx, known.id)
    record, window = found.record, found.record.window
    lines = await ledger.revisions(tx, record.subscription_id, record.quota_id, window)
    this = next(one for one in lines if one.tag == tag)
    intent = await intents.find(tx, usage_intent(tag))
    action = await ledger.action_of(tx, f"{REPORT_USAGE}:{tag}")
    counted, told = 0, []
    for one in lines:
        counted += one.units
        told.append(
            {
                "read_at": timestamp(one.recorded_at),
                "units": counted,
                "revision": one.revision,
                "tag": one.tag,
            }
        )
    happened = await history.of(tx, usage_intent(tag))
    return {
        "tag": tag,
        "subscription": _who(found.link),
        "add_on": {"code": found.add_on.add_on_code, "title": found.add_on.title, "quota": record.quota_id},
        "window": {"start": timestamp(window.start), "end": timestamp(window.end)},
        "revision": record.revision,
        "units": record.units,
        "usage_timestamp": timestamp(record.usage_timestamp),
        "state": this.state,
        "recorded_at": timestamp(this.recorded_at),
        "reported_at": plain(this.reported_at),
        "recurly_usage_id": this.usage_id,
        "period": _period(period_of(await periods.of(tx, record.subscription_id), record.usage_timestamp)),
        "readings": told,
        "sending": None
        if intent is None
        else {
            "state": intent.state,
            "key": idempotency_key(intent.name, intent.epoch, intent.body_hash),
            "epoch": intent.epoch,
            "sends": intent.sends,
            "first_sent_at": timestamp(intent.first_sent_at),
            "last_sent_at": timestamp(intent.last_sent_at),
            "unanswered_since": plain(intent.gave_up_at),
            "result": intent.result,
        },
        "action": None
        if action is None
        else {
            "id": action["id"],
            "state": action["state"],
            "attempt": action["attempt"],
            "due_at": plain(action["due_at"]),
            "error": action["error"],
        },
        "history": [_happened(entry) for entry in happened],
        "held": [_held(item) for item in await ledger.ever_held(tx, subject=usage_intent(tag))],
    }


async def _subscription(tx: Tx, about: str, now: datetime, limit: int) -> dict[str, Any]:
    link = await _find(tx, about)
    add_ons = await links.add_ons_of(tx, link.plan_id)
    plan = await links.find_plan(tx, link.plan_id)
    assert plan is not None
    known = await periods.of(tx, link.subscription_id)
    records = await ledger.newest(tx, link.subscription_id, limit=limit)
    titles = {one.quota_id: one for one in add_ons}
    items = await ledger.ever_held(tx, subscription_id=link.subscription_id)
    # What was done about one record is told with its tag.
    about_it = {f"subscription:{link.subscription_id}", *(item["subject"] for item in items)}
    subjects = sorted(one for one in about_it if not one.startswith(f"usage:{TAG_PREFIX}"))
    return {
        "subscription": _who(link)
        | {
            "plan": plan.name,
            "account": link.account_code,
            "state": link.state,
            "billed_state": link.billed_state,
            "linked_at": timestamp(link.linked_at),
            "approved_at": plain(link.approved_at),
            "usage_from": timestamp(link.usage_from),
            "usage_until": plain(link.usage_until),
        },
        "periods": [_period(one) for one in known],
        "next_invoice": await _next_invoice(tx, link, add_ons, plan.currency, known, now),
        "totals": await _totals(tx, link, titles),
        "held": [_held(item) for item in items],
        "history": [_happened(entry) for entry in await history.of(tx, *subjects)],
        "records": [_line(one, titles) for one in records],
    }


def _line(line: Line, add_ons: Mapping[str, AddOnLink]) -> dict[str, Any]:
    return {
        "tag": line.tag,
        "add_on": add_ons[line.quota_id].add_on_code if line.quota_id in add_ons else line.quota_id,
        "window_start": timestamp(line.window.start),
        "window_end": timestamp(line.window.end),
        "revision": line.revision,
        "units": line.units,
        "state": line.state,
        "recurly_usage_id": line.usage_id,
    }


async def _find(tx: Tx, about: str) -> SubscriptionLink:
    link = await links.find_subscription(tx, about) or await links.find_subscription_by_uuid(tx, about)
    if link is not None:
        return link
    named = [one for one in await links.subscriptions(tx) if one.name == about]
    if not named:
        raise NotFound(
            f"no linked subscription has the id, name or Recurly uuid {about}, and a tag of ours begins with "
            f"{TAG_PREFIX}; `billingd status --subscriptions` lists them"
        )
    return named[-1]


async def _totals(tx: Tx, link: SubscriptionLink, add_ons: Mapping[str, AddOnLink]) -> list[dict[str, Any]]:
    totals = await ledger.totals(tx, link.subscription_id)
    rows = []
    for quota_id in sorted(totals):
        add_on = add_ons.get(quota_id)
        units = totals[quota_id]
        rows.append(
            {
                "add_on": quota_id if add_on is None else add_on.add_on_code,
                "title": None if add_on is None else add_on.title,
                "recorded_units": sum(units.values()),
                "reported_units": units.get("reported", 0),
                "unreported_units": units.get("recorded", 0),
                "held_units": units.get("held", 0),
                "written_off_units": units.get("written_off", 0),
            }
        )
    return rows


async def _next_invoice(
    tx: Tx,
    link: SubscriptionLink,
    add_ons: Sequence[AddOnLink],
    currency: str,
    known: Sequence[Period],
    now: datetime,
) -> dict[str, Any] | None:
    """The usage lines that the open period adds up to so far; the base price comes on top.

    Units that wait count, held ones do not. Corrections of cycles that were billed before are lines of
    their own at Recurly, and told apart here.
    """
    current = next((one for one in known if one.started_at <= now < one.ends_at), None)
    if current is None:
        return None
    counted = await ledger.units_of_cycle(tx, link.subscription_id, current.started_at, current.ends_at)
    late = await ledger.corrections(tx, link.subscription_id, since=current.started_at)
    lines = []
    for add_on in add_ons:
        units = counted.get(add_on.quota_id, 0)
        amount: Decimal | None = None
        if add_on.prices is not None:
            amount = Decimal(0) if current.trial else add_on.prices.charge(units)
        lines.append(
            {
                "add_on": add_on.add_on_code,
                "title": add_on.title,
                "units": units,
                "amount": None if amount is None else shown(amount),
                "currency": currency,
                "corrected_units": late.get(add_on.quota_id, 0),
            }
        )
    return {
        "period_started_at": timestamp(current.started_at),
        "period_ends_at": timestamp(current.ends_at),
        "trial": current.trial,
        "lines": lines,
    }


def _who(link: SubscriptionLink) -> dict[str, Any]:
    return {
        "id": link.subscription_id,
        "name": link.name,
        "title": link.title,
        "recurly_uuid": link.uuid,
    }


def _period(period: Period | None) -> dict[str, Any] | None:
    if period is None:
        return None
    return {
        "started_at": timestamp(period.started_at),
        "ends_at": timestamp(period.ends_at),
        "trial": period.trial,
    }


def _happened(entry: Entry) -> dict[str, Any]:
    return {"at": timestamp(entry.at), "kind": entry.kind, **entry.detail}


def _held(item: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "kind", "units", "amount", "currency", "reason", "resolution")
    return {name: item[name] for name in names} | {
        "since": timestamp(item["since"]),
        "closed_at": plain(item["closed_at"]),
    }
