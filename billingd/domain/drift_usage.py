"""Drift of usage: served against recorded, and recorded against billed; pure comparisons."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from billingd.domain.billing import BilledUsage
from billingd.domain.delivery import CORRECTABLE, PAUSED, Obstacle, obstacle
from billingd.domain.drift import (
    ACCEPT,
    AUDIT,
    CORRECT,
    DOUBLE_RECORD,
    FOREIGN_RECORD,
    LATE_BEYOND_HORIZON,
    MISSING_RECORD,
    POST,
    READ,
    REPAIR_IT,
    REPLACE,
    WRONG_AMOUNT,
    WRONG_PERIOD,
    Drift,
)
from billingd.domain.periods import Period, period_of
from billingd.domain.usage import UsageRecord, corrected_tag
from billingd.domain.windows import Window, floor


@dataclass(frozen=True, slots=True)
class Place:
    """One add-on of one subscription, with what decides whether a record still reaches an invoice."""

    subscription_id: str
    quota_id: str
    add_on_code: str
    tier_type: str
    state: str | None
    periods: tuple[Period, ...]

    def stop(self, at: datetime) -> Obstacle | None:
        """What stands in the way of usage with that time."""
        return obstacle(at, state=self.state, periods=self.periods, tier_type=self.tier_type)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as the ledger has it. `under_way`: its report is still to come, or has only just been made."""

    id: int
    record: UsageRecord
    state: str
    under_way: bool


def compare_served(
    place: Place, window: Window, *, served: int, recorded: int, read_again_from: datetime
) -> Drift | None:
    """What Amplify counts for a window against what the ledger has of it.

    Windows from `read_again_from` on are read again by every poll, and have just been so.
    """
    start = f"{window.start:%Y-%m-%dT%H:%MZ}"
    about: dict[str, Any] = {
        "subject": f"window:{place.subscription_id}:{place.quota_id}:{window.start:%Y%m%dT%H%M%S}",
        "subscription_id": place.subscription_id,
        "add_on_code": place.add_on_code,
        "window_start": window.start,
        "units": abs(served - recorded),
    }
    if served == recorded:
        return None
    counts = f"Amplify counts {served} unit(s), the ledger has {recorded}"
    if served < recorded:
        return Drift(
            WRONG_AMOUNT,
            cause=f"Amplify now counts less for {start} ({counts}): a fault, or traffic attributed anew",
            fix="nothing is taken back by itself: compare both, and credit at Recurly what was not served",
            detail={
                "reading": f"reading:{place.subscription_id}:{place.quota_id}:{window.start.isoformat()}"
            },
            **about,
        )
    detail = {"how": READ, "quota": place.quota_id, "until": window.end.isoformat()}
    if window.start >= read_again_from:
        return Drift(
            MISSING_RECORD,
            cause=f"it was read again, and the poll does not book it ({counts})",
            fix=f"`billingd traffic poll`, or {REPAIR_IT}; then look into the log",
            repairable=True,
            detail=detail,
            **about,
        )
    stop = place.stop(window.start)
    late = f"arrived after the horizon of re-reading ({counts})"
    if stop is None or stop.kind == PAUSED:
        fix = f"{REPAIR_IT} books and reports it, or `billingd traffic backfill` over {start}"
    else:
        fix = f"{stop.reason}: {REPAIR_IT} books it as a held item; charge it at Recurly, or write it off"
    repairable = stop is None or stop.kind == PAUSED
    return Drift(LATE_BEYOND_HORIZON, cause=late, fix=fix, repairable=repairable, detail=detail, **about)


def compare_billed(
    place: Place,
    ledger: Mapping[str, Entry],
    there: Mapping[str, Sequence[BilledUsage]],
    *,
    foreign_from: datetime,
    length: timedelta,
) -> Iterator[Drift]:
    """What the ledger has against every record at Recurly, both by merchant tag ("" for none).

    Where a tag is in both, `there` must have all of its records, wherever their time lies. Foreign records
    before `foreign_from` are nobody's business here; `length` is that of a window.
    """
    corrections: dict[str, list[BilledUsage]] = defaultdict(list)
    for tag, records in there.items():
        if (corrected := corrected_tag(tag)) in ledger and corrected is not None:
            corrections[corrected] += records
    for tag, entry in ledger.items():
        found = there.get(tag, ())
        if found:
            yield from _found(place, entry, found, corrections.get(tag, ()))
        elif (missing := _missing(place, entry)) is not None:
            yield missing
    for tag, records in there.items():
        if tag not in ledger and corrected_tag(tag) not in ledger:
            for one in records:
                if one.usage_timestamp >= foreign_from:
                    yield _foreign(place, one, floor(one.usage_timestamp, length))


def kept_first(records: Sequence[BilledUsage], units: int) -> list[BilledUsage]:
    """Records of one tag, the one that stays first: one that is billed, else one with the right units."""
    return sorted(records, key=lambda one: (one.billed_at is None, one.units != units, one.id))


def _about(place: Place, entry: Entry, subject: str = "") -> dict[str, Any]:
    record = entry.record
    return {
        "subject": subject or f"usage:{record.merchant_tag}",
        "subscription_id": place.subscription_id,
        "add_on_code": place.add_on_code,
        "window_start": record.window.start,
        "tag": record.merchant_tag,
    }


def _missing(place: Place, entry: Entry) -> Drift | None:
    """A record that should be at Recurly and is not; what is held or under way is where it should be."""
    if entry.under_way or entry.state not in {"recorded", "reported"}:
        return None
    stop = place.stop(entry.record.usage_timestamp)
    if entry.state == "recorded":
        cause = "it was never reported: its action is dead, discarded, or gone"
        mended = f"{REPAIR_IT}, or `billingd outbox replay`"
    else:
        cause = "it was removed at Recurly after it had been reported"
        mended = f"{REPAIR_IT} posts it again"
    possible = stop is None or stop.kind == PAUSED or entry.state == "recorded"
    if not possible:
        assert stop is not None
        mended = f"cannot be posted again ({stop.reason}): charge it at Recurly by hand, or let it go"
    return Drift(
        MISSING_RECORD,
        units=abs(entry.record.units),
        cause=cause,
        fix=mended,
        repairable=possible,
        detail={"how": POST, "record": entry.id, "quota": place.quota_id} if possible else {},
        **_about(place, entry),
    )


def _found(
    place: Place, entry: Entry, found: Sequence[BilledUsage], corrections: Sequence[BilledUsage]
) -> Iterator[Drift]:
    """A tag that is at Recurly: once, with its units, at its time, and known to the ledger as reported?

    What was billed wrongly and has been corrected is right, as far as the corrections go.
    """
    record = entry.record
    first, *extra = kept_first(found, record.units)
    if entry.state in {"held", "written_off"} or (entry.state == "recorded" and not entry.under_way):
        gave_up = "gave it up" if entry.state != "recorded" else "does not know it, and no report is to come"
        yield Drift(
            FOREIGN_RECORD,
            units=abs(first.units),
            cause=f"Recurly has it although the ledger {gave_up} ({entry.state}): a late answer, or a hand",
            fix=f"{REPAIR_IT} takes it for reported, and closes what is held",
            repairable=True,
            detail=_detail(ACCEPT, place, first, entry),
            **_about(place, entry),
        )
    billed = [one for one in extra if one.billed_at is not None]
    if (first.merchant_tag or "") != record.merchant_tag:
        yield _renamed(place, entry, first)
        return
    if corrections:
        extra = [one for one in extra if one.billed_at is None]
        rest = sum(one.units for one in (first, *billed, *corrections)) - record.units
        if rest:
            yield _wrong(
                WRONG_AMOUNT,
                place,
                entry,
                first,
                units=abs(rest),
                cause=f"its corrections leave {record.units + rest} unit(s) there, {record.units} recorded",
                corrected=(*billed, *corrections),
            )
    elif first.units != record.units:
        yield _wrong(
            WRONG_AMOUNT,
            place,
            entry,
            first,
            units=abs(first.units - record.units),
            cause=f"somebody changed it at Recurly: {first.units} unit(s) there, {record.units} recorded",
        )
    if first.units == record.units and first.usage_timestamp != record.usage_timestamp:
        its, theirs = (period_of(place.periods, at) for at in (record.usage_timestamp, first.usage_timestamp))
        where = "in another billing period" if its != theirs else "in the same billing period"
        yield _wrong(
            WRONG_PERIOD,
            place,
            entry,
            first,
            units=abs(first.units),
            cause=f"its time at Recurly is {first.usage_timestamp:%Y-%m-%dT%H:%M:%SZ}, {where}, and not "
            f"{record.usage_timestamp:%Y-%m-%dT%H:%M:%SZ}: somebody moved it",
        )
    for one in extra:
        how, fix = AUDIT, f"{REPAIR_IT} removes {one.id}"
        if one in billed:
            how, fix = _corrected(place, entry, one, first)
        yield Drift(
            DOUBLE_RECORD,
            units=abs(one.units),
            cause=f"Recurly has {one.id} beside {first.id} under the same tag: it was posted twice",
            fix=fix,
            repairable=one not in billed or how == CORRECT,
            detail=_detail(how, place, one, entry),
            **_about(place, entry, f"usage:{record.merchant_tag}:{one.id}"),
        )


def _renamed(place: Place, entry: Entry, found: BilledUsage) -> Drift:
    """A record that was found by its id alone: to everybody else it looks foreign, and its own missing."""
    mended = f"{REPAIR_IT} sets its tag back"
    possible = found.billed_at is None and place.stop(entry.record.usage_timestamp) is None
    if not possible:
        mended = f"change the tag of {found.id} back at Recurly"
    detail = _detail(REPLACE if possible else AUDIT, place, found, entry)
    return Drift(
        FOREIGN_RECORD,
        units=abs(found.units),
        cause=f"{found.id} is billingd's and lost its tag at Recurly: somebody changed it",
        fix=mended,
        repairable=possible,
        detail=detail,
        **_about(place, entry),
    )


def _wrong(
    kind: str,
    place: Place,
    entry: Entry,
    found: BilledUsage,
    *,
    units: int,
    cause: str,
    corrected: Sequence[BilledUsage] = (),
) -> Drift:
    """A record that is there and is not as recorded: unbilled, it can be replaced; billed, corrected.

    One that was `corrected` by others is corrected again, for what is wrong may be its corrections.
    """
    stop = place.stop(entry.record.usage_timestamp)
    how = AUDIT
    if found.billed_at is not None and kind == WRONG_PERIOD:
        fix = (
            f"{found.id} is billed and cannot be moved: refund it at Recurly, and charge it where it belongs"
        )
    elif found.billed_at is not None or corrected:
        how, fix = _corrected(place, entry, found, *corrected)
    elif stop is None:
        how, fix = REPLACE, f"{REPAIR_IT} sets {found.id} back to what was recorded"
    else:
        assert stop is not None
        fix = f"change {found.id} back at Recurly by hand ({stop.reason})"
    return Drift(
        kind,
        units=units,
        cause=cause,
        fix=fix,
        repairable=how != AUDIT,
        detail=_detail(how, place, found, entry),
        **_about(place, entry),
    )


def _corrected(place: Place, entry: Entry, billed: BilledUsage, *others: BilledUsage) -> tuple[str, str]:
    """How a billed record is mended: its cycle is corrected, where Recurly takes corrections of it.

    What is at another time than it was recorded with may be of another cycle, and so may the `others` of
    its tag: their sum says nothing then.

    Flat and tiered charges follow from the cycle's sum alone, so a difference, negative too, makes the
    charge what it should have been (recurly.md 5.2, 5.5).
    """
    stop = place.stop(entry.record.usage_timestamp)
    moved = any(one.usage_timestamp != entry.record.usage_timestamp for one in (billed, *others))
    if place.tier_type in CORRECTABLE and stop is None and not moved:
        return CORRECT, f"{REPAIR_IT} posts the difference as a correction of the cycle"
    why = f"Recurly takes no corrections of {place.tier_type} prices"
    if stop is not None:
        why = stop.reason
    elif moved:
        why = "at another time than the ledger's"
    fixed = "billed" if billed.billed_at is not None else "corrected"
    return AUDIT, f"{billed.id} is {fixed} and {why}: refund or charge the difference there"


def _foreign(place: Place, one: BilledUsage, window_start: datetime) -> Drift:
    mended = (
        "remove it at Recurly while it is unbilled"
        if one.billed_at is None
        else "it is billed: refund it at Recurly"
    )
    cause = (
        f"billingd did not make it (tag {one.merchant_tag})"
        if one.merchant_tag
        else "billingd did not make it: it has no tag"
    )
    if one.units < 0:
        cause += "; negative ones are Recurly's own when usage is waived at a termination"
    return Drift(
        FOREIGN_RECORD,
        subject=f"foreign:{one.id}",
        subscription_id=place.subscription_id,
        add_on_code=place.add_on_code,
        window_start=window_start,
        units=abs(one.units),
        cause=cause,
        fix=f"{mended}; write the held item off if it is meant. Never removed from here",
        tag=one.merchant_tag,
        detail=_detail(AUDIT, place, one),
    )


def _detail(how: str, place: Place, found: BilledUsage, entry: Entry | None = None) -> dict[str, Any]:
    """What a repair needs to know, as JSON."""
    at = found.usage_timestamp.isoformat()
    detail: dict[str, Any] = {"how": how, "usage": found.id, "at": at, "quota": place.quota_id}
    return detail if entry is None else detail | {"record": entry.id}
