"""Explain: one usage record back to what made it and what was sent; a subscription forward to all of it."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from billingd.admin.status import plain, timestamp
from billingd.domain.attempts import UNFINISHED, State
from billingd.domain.delivery import CORRECTABLE, OVER
from billingd.domain.errors import NotFound
from billingd.domain.events import PROVISION_SUBSCRIPTION
from billingd.domain.money import shown
from billingd.domain.periods import Period, period_of
from billingd.domain.sending import Intent
from billingd.domain.usage import TAG_PREFIX, corrected_tag, correction_tag, usage_intent
from billingd.store import held, history, intents, ledger, links, outbox, periods, stakes, usage
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
    """A record, or the correction that a repair posted beside one.

    A reading of traffic that booked nothing leaves no trace: `readings` are those that booked something, each
    with the time at which billingd booked it and what Amplify had counted of the window by then.
    """
    corrects = corrected_tag(tag)
    known = (await usage.by_tags(tx, [corrects or tag])).get(corrects or tag)
    corrections = [] if known is None else await _corrections(tx, known.record.merchant_tag)
    correction = next((one for one in corrections if one["tag"] == tag), None)
    if known is None or (corrects is not None and correction is None):
        raise NotFound(
            f"the ledger has no usage record tagged {tag}; if Recurly has one, `billingd reconcile` says more"
        )
    found = await usage.find(tx, known.id)
    record, window = found.record, found.record.window
    lines = await ledger.revisions(tx, record.subscription_id, record.quota_id, window)
    action = None if corrects is not None else await ledger.action_of(tx, found)
    counted, told = 0, []
    for one in lines:
        counted += one.units
        told.append(
            {
                "booked_at": timestamp(one.recorded_at),
                "units": counted,
                "revision": one.revision,
                "tag": one.tag,
            }
        )
    happened = await history.of(tx, usage_intent(tag))
    this = {
        "units": record.units,
        "state": found.state,
        "recorded_at": timestamp(found.recorded_at),
        "reported_at": plain(found.reported_at),
        "recurly_usage_id": found.usage_id,
    }
    if correction is not None:
        this |= {name: value for name, value in correction.items() if name != "tag"}
    return {
        "tag": tag,
        "corrects": corrects,
        "subscription": _who(found.link),
        "add_on": {"code": found.add_on.add_on_code, "title": found.add_on.title, "quota": record.quota_id},
        "window": {"start": timestamp(window.start), "end": timestamp(window.end)},
        "revision": record.revision,
        "usage_timestamp": timestamp(record.usage_timestamp),
        **this,
        "period": _period(period_of(await periods.of(tx, record.subscription_id), record.usage_timestamp)),
        "readings": told,
        "corrections": corrections if correction is None else [],
        **_sendings(await intents.find(tx, usage_intent(tag)), happened),
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


async def _corrections(tx: Tx, tag: str) -> list[dict[str, Any]]:
    """What repairs posted, or are about to, beside that record; units are known once one is there."""
    entries = await history.of(tx, usage_intent(tag))
    kinds = {history.CORRECTED, history.CORRECTION_READ_BACK}
    posted = {entry.detail["tag"]: entry for entry in entries if entry.kind in kinds}
    found: list[dict[str, Any]] = []
    while True:
        name = correction_tag(tag, len(found) + 1)
        intent = await intents.find(tx, usage_intent(name))
        entry = posted.get(name)
        if intent is None and entry is None:
            return found
        state = "reported" if intent is None or intent.state == "done" else "recorded"
        found.append(
            {
                "tag": name,
                "units": None if entry is None else entry.detail["units"],
                "state": state,
                "recorded_at": None if intent is None else timestamp(intent.first_sent_at),
                "reported_at": None if entry is None else timestamp(history.posted_at(entry)),
                "recurly_usage_id": None if entry is None else entry.detail["usage_id"],
            }
        )


def _sendings(intent: Intent | None, happened: Sequence[Entry]) -> dict[str, Any]:
    """Every sending with its key and what became of it, and what is known of the last one.

    What an intent said before another sending took its place, or before it was found gone at Recurly, is in
    the history. `sends` numbers them; a write that was found and never sent from here counts for none.
    """
    attempts: dict[int, dict[str, Any]] = {}
    unsent = 0
    for entry in happened:
        if "key" in entry.detail and "sends" in entry.detail:
            attempts.setdefault(entry.detail["sends"], {name: entry.detail.get(name) for name in _SENDING})
        elif entry.kind == intents.SUPERSEDED:
            unsent += 1
    if intent is None:
        return {"sending": None, "attempts": list(attempts.values())}
    said = history.sent(intent)
    if said:
        attempts.setdefault(intent.sends, {name: said.get(name) for name in _SENDING})
    last = {"state": intent.state, **{name: said.get(name) for name in _SENDING if name != "outcome"}}
    return {
        "sending": last | {"sends": intent.sends - unsent if said else 0, "result": intent.result},
        "attempts": list(attempts.values()),
    }


_SENDING: Final = (
    "key",
    "epoch",
    "outcome",
    "first_sent_at",
    "last_sent_at",
    "unanswered_since",
    "result",
)


async def _subscription(tx: Tx, about: str, now: datetime, limit: int) -> dict[str, Any]:
    link, others = await _find(tx, about)
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
        "others": others,
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


async def _find(tx: Tx, about: str) -> tuple[SubscriptionLink, list[str]]:
    """The link, and the ids of the others that have or had its name.

    Of several of that name the one that lives is meant, else the one that was linked last.
    """
    try:
        link = await links.meant(tx, about)
    except NotFound as error:
        await _not_linked(tx, about)
        raise NotFound(f"{error}; a tag of ours begins with {TAG_PREFIX}") from None
    others = [one for one in await links.named(tx, link.name) if one != link]
    return link, [one.subscription_id for one in reversed(others)]


async def _not_linked(tx: Tx, about: str) -> None:
    """Raise NotFound when it is to be linked, and waits, is held or failed: with what stands for it."""
    waiting = await outbox.select(tx, states=[*UNFINISHED, State.DEAD], kind=PROVISION_SUBSCRIPTION)
    for action in reversed(waiting):
        if action["subject"] == f"subscription:{about}" or action["args"].get("name") == about:
            stands = [
                f"held item {item['id']}: {item['reason']}"
                for item in await held.standing(tx, subject=action["subject"])
            ]
            raise NotFound(
                f"{about} is not linked yet: `billingd outbox show {action['id']}` tells of the action that "
                f"does it{''.join(f'; {one}' for one in stands)}"
            )
    for item in await held.standing(tx, subject=f"subscription:{about}"):
        raise NotFound(f"{about} is not linked: held item {item['id']}: {item['reason']}")


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
    """What the open period adds up to so far, before taxes and discounts; None: no period is open.

    Units that wait count, held ones do not. Corrections of cycles that were billed before are lines of
    their own at Recurly, and told apart here. An amount that is not known is None, `why` says so, and the
    total is None then, too. Amounts are at the prices that the plan has now.
    """
    current = next((one for one in known if one.started_at <= now < one.ends_at), None)
    if current is None:
        return None
    counted = await ledger.units_of_cycle(tx, link.subscription_id, current.started_at, current.ends_at)
    quotas = [one.quota_id for one in add_ons]
    late = await ledger.corrections(tx, link.subscription_id, quotas, since=current.started_at)
    corrected: dict[tuple[str, Period | None], int] = defaultdict(int)
    for each in late:
        corrected[each.quota_id, period_of(known, each.usage_timestamp)] += each.units
    base = _base_price(link)
    others = await stakes.other_prices(tx, link.subscription_id)
    amounts, lines = [base], []
    for add_on in add_ons:
        units = counted.get(add_on.quota_id, 0)
        why = _not_known(link, add_on, current, others)
        amount: Decimal | None = None
        if add_on.prices is not None and why is None:
            amount = Decimal(0) if current.trial else add_on.prices.charge(units)
        costs: list[Decimal | None] = [
            None if add_on.add_on_code in others else await _correction(tx, link, add_on, period, extra)
            for (quota_id, period), extra in corrected.items()
            if quota_id == add_on.quota_id
        ]
        more = _sum(costs)
        amounts += [amount, more]
        lines.append(
            {
                "add_on": add_on.add_on_code,
                "title": add_on.title,
                "units": units,
                "amount": _money(amount),
                "why": why,
                "currency": currency,
                "corrected_units": sum(one.units for one in late if one.quota_id == add_on.quota_id),
                "corrected_amount": _money(more),
            }
        )
    return {
        "period_started_at": timestamp(current.started_at),
        "period_ends_at": timestamp(current.ends_at),
        "trial": current.trial,
        "base_price": _money(base),
        "lines": lines,
        "total": _money(_sum(amounts)),
        "currency": currency,
    }


def _not_known(
    link: SubscriptionLink, add_on: AddOnLink, current: Period, others: Collection[str]
) -> str | None:
    """Why nobody here can tell what the usage of an add-on will cost."""
    if add_on.prices is None:
        return "the prices of its plan are not known yet"
    if current.trial:
        return None
    if add_on.add_on_code in others:
        return "its plan has other prices by now; this subscription keeps those of the day it began"
    if stakes.shared(link, current):
        return (
            f"what another integration reported before {timestamp(link.usage_from)} is on the same invoice, "
            "and not in these units"
        )
    return None


def _base_price(link: SubscriptionLink) -> Decimal | None:
    """What the next period costs by itself, billed when it begins; nothing when there is none."""
    if link.state in {"ending", "ended"} or link.billed_state in {"canceled", *OVER}:
        return Decimal(0)
    return link.unit_amount if link.billed_state == "active" else None


async def _correction(
    tx: Tx, link: SubscriptionLink, add_on: AddOnLink, period: Period | None, units: int
) -> Decimal | None:
    """What units cost that came on top of a billed cycle: what it costs now, less what it cost without."""
    if period is not None and period.trial:
        return Decimal(0)
    if add_on.prices is None or add_on.tier_type not in CORRECTABLE:
        return None
    if add_on.tier_type == "flat":
        return units * (add_on.prices.unit_amount or Decimal(0))
    if period is None or stakes.shared(link, period):
        return None
    cycle = await ledger.units_of_cycle(tx, link.subscription_id, period.started_at, period.ends_at)
    return add_on.prices.at_stake(units, on_top_of=cycle.get(add_on.quota_id, 0) - units)


def _sum(amounts: Iterable[Decimal | None]) -> Decimal | None:
    known = list(amounts)
    return None if None in known else sum((one for one in known if one is not None), Decimal(0))


def _money(amount: Decimal | None) -> str | None:
    return None if amount is None else shown(amount)


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
