"""The ledger of usage records: recorded once, then reported or held; never rewritten."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.attempts import UNFINISHED
from billingd.domain.events import REPORT_USAGE
from billingd.domain.usage import Booked, UsageRecord
from billingd.domain.windows import Window
from billingd.store import links
from billingd.store.engine import Tx
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.rows import PARAMETERS_MAX, upsert
from billingd.store.schema import outbox, unlinked_traffic, usage_records

Pair = tuple[str, str]
"""(subscription id, quota id)"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A usage record with its place in the ledger, and what is known of where it belongs at Recurly.

    `state` recorded | reported | held | written_off.
    """

    id: int
    record: UsageRecord
    state: str
    usage_id: str | None
    recorded_at: datetime
    link: SubscriptionLink
    add_on: AddOnLink
    currency: str
    reported_at: datetime | None = None


def _sums() -> sa.Select[Any]:
    columns = usage_records.c
    return (
        sa.select(
            columns.subscription_id,
            columns.quota_id,
            columns.window_start,
            columns.window_end,
            sa.func.sum(columns.units).label("units"),
            sa.func.max(columns.revision).label("revisions"),
        )
        .where(columns.window_start >= sa.bindparam("start"), columns.window_start < sa.bindparam("end"))
        .group_by(columns.subscription_id, columns.quota_id, columns.window_start, columns.window_end)
    )


_SUMS: Final = _sums()
_FIND: Final = sa.select(usage_records).where(usage_records.c.id == sa.bindparam("of_id"))
_MOVE: Final = sa.update(usage_records).where(
    usage_records.c.id == sa.bindparam("of_id"),
    usage_records.c.state.in_(sa.bindparam("leaves", expanding=True)),
)
_INSERT: Final = sa.insert(usage_records).returning(usage_records.c.id, usage_records.c.merchant_tag)
"""Made once, for these run often: making one takes longer than running it."""


async def insert(
    tx: Tx, records: Sequence[UsageRecord], *, now: datetime, state: str = "recorded"
) -> list[tuple[int, UsageRecord]]:
    """Add records to the ledger; return them with their ids, in order."""
    by_tag = {record.merchant_tag: record for record in records}
    rows = [
        {
            "subscription_id": record.subscription_id,
            "quota_id": record.quota_id,
            "window_start": record.window.start,
            "window_end": record.window.end,
            "revision": record.revision,
            "units": record.units,
            "usage_timestamp": record.usage_timestamp,
            "merchant_tag": record.merchant_tag,
            "state": state,
            "recorded_at": now,
        }
        for record in records
    ]
    placed = await tx.execute(_INSERT, rows) if rows else ()
    return sorted(((id_, by_tag[tag]) for id_, tag in placed), key=lambda pair: pair[0])


async def sums(tx: Tx, start: datetime, end: datetime) -> dict[Pair, dict[Window, Booked]]:
    """What is recorded of every (subscription, quota), by the window or piece that begins in [start, end)."""
    found: dict[Pair, dict[Window, Booked]] = {}
    for row in await tx.execute(_SUMS, {"start": start, "end": end}):
        pieces = found.setdefault((row.subscription_id, row.quota_id), {})
        pieces[Window(row.window_start, row.window_end)] = Booked(int(row.units), row.revisions)
    return found


async def pieces_from(tx: Tx, moment: datetime) -> set[Window]:
    """Every window, or piece of one, of which anything is recorded, from a moment on."""
    columns = usage_records.c
    statement = sa.select(columns.window_start, columns.window_end).where(columns.window_start >= moment)
    return {Window(*row) for row in await tx.execute(statement.distinct())}


async def recorded_before(tx: Tx, moment: datetime) -> bool:
    """Whether anything is recorded of a window that begins before a moment."""
    one = sa.select(usage_records.c.id).where(usage_records.c.window_start < moment).limit(1)
    return (await tx.execute(one)).first() is not None


async def find(tx: Tx, record_id: int) -> Recorded:
    """A record by its id, which must exist."""
    row = (await tx.execute(_FIND, {"of_id": record_id})).one()
    link = await links.find_subscription(tx, row.subscription_id)
    add_on = await links.find_add_on(tx, row.quota_id)
    assert link is not None
    assert add_on is not None
    plan = await links.find_plan(tx, add_on.plan_id)
    assert plan is not None
    return Recorded(
        row.id,
        _record(row),
        row.state,
        row.usage_id,
        row.recorded_at,
        link,
        add_on,
        plan.currency,
        row.reported_at,
    )


async def tag_of(tx: Tx, record_id: int) -> str:
    """The merchant tag of a record, which must exist."""
    statement = sa.select(usage_records.c.merchant_tag).where(usage_records.c.id == record_id)
    return str((await tx.execute(statement)).scalar_one())


@dataclass(frozen=True, slots=True)
class Known:
    """A record with its id, its state, and the id that Recurly is thought to have it under, since when."""

    id: int
    state: str
    usage_id: str | None
    record: UsageRecord
    reported_at: datetime | None = None


async def by_tags(tx: Tx, tags: Sequence[str]) -> dict[str, Known]:
    """The records that have these merchant tags."""
    found: dict[str, Known] = {}
    for start in range(0, len(tags), PARAMETERS_MAX):
        some = tags[start : start + PARAMETERS_MAX]
        statement = sa.select(usage_records).where(usage_records.c.merchant_tag.in_(some))
        for row in await tx.execute(statement):
            found[row.merchant_tag] = _known(row)
    return found


def _known(row: sa.Row[Any]) -> Known:
    return Known(row.id, row.state, row.usage_id, _record(row), row.reported_at)


async def of_add_on(
    tx: Tx, subscription_id: str, quota_id: str, start: datetime, end: datetime
) -> list[Known]:
    """The records of one add-on whose time lies in [start, end), in order."""
    columns = usage_records.c
    statement = (
        sa.select(usage_records)
        .where(
            columns.subscription_id == subscription_id,
            columns.quota_id == quota_id,
            columns.window_start < end,
            columns.usage_timestamp >= start,
            columns.usage_timestamp < end,
        )
        .order_by(columns.usage_timestamp, columns.id)
    )
    return [_known(row) for row in await tx.execute(statement)]


async def units_in(
    tx: Tx, subscription_id: str, quota_id: str, start: datetime, end: datetime, *, before_id: int
) -> int:
    """Units with a time in [start, end) that are reported, or of earlier records that wait or are held."""
    columns = usage_records.c
    statement = sa.select(sa.func.sum(columns.units)).where(
        columns.subscription_id == subscription_id,
        columns.quota_id == quota_id,
        columns.window_start < end,
        columns.usage_timestamp >= start,
        columns.usage_timestamp < end,
        columns.id != before_id,
        sa.or_(
            columns.state == "reported",
            sa.and_(columns.state.in_(["recorded", "held"]), columns.id < before_id),
        ),
    )
    return int((await tx.execute(statement)).scalar_one() or 0)


def _record(row: sa.Row[Any]) -> UsageRecord:
    return UsageRecord(
        row.subscription_id,
        row.quota_id,
        Window(row.window_start, row.window_end),
        row.revision,
        row.units,
        row.usage_timestamp,
        row.merchant_tag,
    )


async def reported(tx: Tx, record_id: int, *, usage_id: str, now: datetime) -> None:
    """Recurly holds this record under `usage_id`."""
    await _move(
        tx,
        record_id,
        ("recorded", "held", "written_off"),
        state="reported",
        usage_id=usage_id,
        reported_at=now,
    )


async def renamed(tx: Tx, record_id: int, *, usage_id: str) -> None:
    """Of several records that Recurly had for this one, it is this that stays."""
    await _move(tx, record_id, ("reported",), usage_id=usage_id)


async def missing(tx: Tx, record_id: int) -> bool:
    """Recurly has this record no more, so it is still to be reported; False when it was not reported."""
    return await _move(tx, record_id, ("reported",), state="recorded", usage_id=None, reported_at=None)


async def hold(tx: Tx, record_id: int) -> bool:
    """This record cannot be reported honestly; False when it was not waiting."""
    return await _move(tx, record_id, ("recorded",), state="held")


async def release(tx: Tx, record_id: int) -> bool:
    """Try this held record again; False when it was not held."""
    return await _move(tx, record_id, ("held",), state="recorded")


async def write_off(tx: Tx, record_id: int) -> bool:
    """This held record will never be billed: a person said so. False when it was not held."""
    return await _move(tx, record_id, ("held",), state="written_off")


async def _move(tx: Tx, record_id: int, leaves: tuple[str, ...], **values: Any) -> bool:
    given = {"of_id": record_id, "leaves": leaves, **values}
    return (await tx.execute(_MOVE, given)).rowcount == 1


async def last_served(tx: Tx, subscription_id: str) -> datetime | None:
    """When the newest window began in which it was used: then it was still served. None: it never was."""
    newest = sa.select(sa.func.max(usage_records.c.window_start)).where(
        usage_records.c.subscription_id == subscription_id, usage_records.c.units > 0
    )
    began: datetime | None = (await tx.execute(newest)).scalar_one()
    return began


async def unreported_of(tx: Tx, subscription_id: str) -> int:
    """How many records of a subscription are still to be reported (held ones left out)."""
    statement = (
        sa.select(sa.func.count())
        .select_from(usage_records)
        .where(
            usage_records.c.subscription_id == subscription_id,
            usage_records.c.state == "recorded",
            sa.text("usage_records.state <> 'reported'"),  # as the partial index has it
        )
    )
    return int((await tx.execute(statement)).scalar_one())


async def units_under_way(
    tx: Tx, *, subscription_id: str | None, start: datetime | None, end: datetime
) -> int:
    """Units with a time in [start, end) whose report is still to come; what gave up is not among them."""
    columns = usage_records.c
    statement = (
        sa.select(sa.func.sum(columns.units))
        .join(outbox, sa.cast(outbox.c.args["record"].as_string(), sa.BigInteger) == columns.id)
        .where(
            outbox.c.kind == REPORT_USAGE,
            outbox.c.state.in_(UNFINISHED),
            sa.text("usage_records.state <> 'reported'"),  # as the partial index has it
            columns.state == "recorded",
            columns.usage_timestamp < end,
        )
    )
    if start is not None:
        statement = statement.where(columns.usage_timestamp >= start)
    if subscription_id is not None:
        statement = statement.where(columns.subscription_id == subscription_id)
    return int((await tx.execute(statement)).scalar_one() or 0)


async def totals(tx: Tx) -> dict[str, int]:
    """Units in the ledger by state."""
    statement = sa.select(usage_records.c.state, sa.func.sum(usage_records.c.units)).group_by(
        usage_records.c.state
    )
    return {state: int(units) for state, units in await tx.execute(statement)}


async def added(tx: Tx, *, after: int, up_to: int | None = None) -> tuple[int, int]:
    """Units of the records with an id above `after` (and up to `up_to`), and the highest id among them."""
    columns = usage_records.c
    statement = sa.select(sa.func.sum(columns.units), sa.func.max(columns.id)).where(columns.id > after)
    if up_to is not None:
        statement = statement.where(columns.id <= up_to)
    units, highest = (await tx.execute(statement)).one()
    return int(units or 0), int(highest or after)


async def not_reported(tx: Tx) -> tuple[int, int]:
    """Units that Recurly does not have, and how many of these a person wrote off."""
    units, given_up = usage_records.c.units, usage_records.c.state == "written_off"
    statement = sa.select(sa.func.sum(units), sa.func.sum(sa.case((given_up, units), else_=0))).where(
        sa.text("usage_records.state <> 'reported'")  # as the partial index has it
    )
    missing, written_off = (await tx.execute(statement)).one()
    return int(missing or 0), int(written_off or 0)


async def totals_by_subscription(tx: Tx) -> dict[str, dict[str, int]]:
    """Units in the ledger by subscription id and state."""
    columns = usage_records.c
    statement = sa.select(columns.subscription_id, columns.state, sa.func.sum(columns.units)).group_by(
        columns.subscription_id, columns.state
    )
    result: dict[str, dict[str, int]] = {}
    for subscription_id, state, units in await tx.execute(statement):
        result.setdefault(subscription_id, {})[state] = int(units)
    return result


async def by_window(tx: Tx, *, limit: int) -> list[dict[str, Any]]:
    """The newest windows with their records and units, newest first."""
    columns = usage_records.c
    reported_units = sa.func.sum(sa.case((columns.state == "reported", columns.units), else_=0))
    statement = (
        sa.select(
            columns.window_start,
            columns.window_end,
            sa.func.count().label("records"),
            sa.func.sum(columns.units).label("recorded_units"),
            reported_units.label("reported_units"),
        )
        .group_by(columns.window_start, columns.window_end)
        .order_by(columns.window_start.desc(), columns.window_end.desc())
        .limit(limit)
    )
    return [
        {
            "window_start": row.window_start,
            "window_end": row.window_end,
            "records": row.records,
            "recorded_units": int(row.recorded_units),
            "reported_units": int(row.reported_units),
        }
        for row in await tx.execute(statement)
    ]


async def set_unlinked(
    tx: Tx, subscription_id: str, quota_id: str, window_start: datetime, units: int, *, now: datetime
) -> None:
    """Traffic that is not recorded: of no linked subscription, or of one that is yet to be read back.

    It is counted and shown, never dropped in silence.
    """
    row = {
        "subscription_id": subscription_id,
        "quota_id": quota_id,
        "window_start": window_start,
        "units": units,
        "read_at": now,
    }
    await upsert(tx, unlinked_traffic, row)


async def unlinked_before(tx: Tx, subscription_id: str, quota_id: str, moment: datetime) -> int:
    """Units of a pair that belong to no link, in windows or pieces that begin before a moment."""
    columns = unlinked_traffic.c
    statement = sa.select(sa.func.sum(columns.units)).where(
        columns.subscription_id == subscription_id,
        columns.quota_id == quota_id,
        columns.window_start < moment,
    )
    return int((await tx.execute(statement)).scalar_one() or 0)


async def count_unread(
    tx: Tx, subscription_id: str, quota_id: str, window: Window, units: int, *, now: datetime
) -> None:
    """What a window of one that is yet to be read back lacks, in place of what was counted in it before."""
    columns = unlinked_traffic.c
    await tx.execute(
        sa.delete(unlinked_traffic).where(
            columns.subscription_id == subscription_id,
            columns.quota_id == quota_id,
            columns.window_start >= window.start,
            columns.window_start < window.end,  # in windows of another length, as it was then
        )
    )
    await set_unlinked(tx, subscription_id, quota_id, window.start, units, now=now)


async def unlinked_since(tx: Tx, subscription_id: str, moment: datetime) -> dict[str, int]:
    """Units of a subscription that are not recorded, in windows or pieces from a moment on, by quota id."""
    columns = unlinked_traffic.c
    statement = (
        sa.select(columns.quota_id, sa.func.sum(columns.units))
        .where(columns.subscription_id == subscription_id, columns.window_start >= moment)
        .group_by(columns.quota_id)
    )
    return {quota_id: int(units) for quota_id, units in await tx.execute(statement)}


async def forget_unlinked(tx: Tx, keys: Sequence[tuple[str, str, datetime]]) -> None:
    """Traffic of (subscription, quota, window start) that belongs to a link after all."""
    if not keys:
        return
    starts = [start for _, _, start in keys]
    columns = unlinked_traffic.c
    statement = sa.select(columns.subscription_id, columns.quota_id, columns.window_start).where(
        columns.window_start.between(min(starts), max(starts))
    )
    standing = {tuple(row) for row in await tx.execute(statement)}
    for subscription_id, quota_id, start in standing.intersection(keys):
        await tx.execute(
            sa.delete(unlinked_traffic).where(
                columns.subscription_id == subscription_id,
                columns.quota_id == quota_id,
                columns.window_start == start,
            )
        )


async def unlinked_units(tx: Tx) -> int:
    """All units that belong to no linked subscription."""
    total = (await tx.execute(sa.select(sa.func.sum(unlinked_traffic.c.units)))).scalar_one()
    return int(total or 0)
