"""The outbox: durable actions, claimed with a lease, settled only by whoever holds the newest fence.

Its hot statements are made once, here and in the other modules: building one takes longer than running it.
"""

from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.attempts import UNFINISHED, Action, Leased, State, Verdict
from billingd.domain.errors import Retryable
from billingd.store.engine import Tx
from billingd.store.rows import insert_new
from billingd.store.schema import UtcDateTime, events, outbox

CAUSE: Final[ContextVar[str | None]] = ContextVar("outbox_cause", default=None)
"""The event whose action is attempted in this context: what is added meanwhile is due to it too."""

SUBJECTS_MAX: Final = 10_000
"""Subjects in one statement: both databases bound its parameters."""


class LeaseLost(Retryable):
    """The action was claimed anew by another worker: this attempt may write nothing."""


def _in(table: sa.FromClause, states: Sequence[str]) -> sa.ColumnElement[bool]:
    """That an action is in one of these states, written out: SQLite uses a partial index only for constants.

    With bound parameters each claim would read every row there is.
    """
    words: list[sa.ColumnElement[str]] = [sa.literal_column(f"'{State(state).value}'") for state in states]
    column: sa.ColumnElement[str] = table.c.state
    return column == words[0] if len(words) == 1 else column.in_(words)


async def insert(
    tx: Tx,
    actions: Sequence[Action],
    *,
    now: datetime,
    due_at: datetime | None = None,
    event_id: str | None = None,
) -> int:
    """Add actions whose keys are new, due now unless said otherwise; return how many were new."""
    rows = [
        {
            "kind": action.kind,
            "subject": action.subject,
            "key": action.key,
            "args": dict(action.args),
            "state": State.PENDING,
            "due_at": due_at or now,
            "attempt": 0,
            "fence": 0,
            "event_id": event_id or CAUSE.get(),
            "created_at": now,
        }
        for action in actions
    ]
    return await insert_new(tx, outbox, rows)


async def claim(tx: Tx, *, now: datetime, lease: timedelta, limit: int) -> list[Leased]:
    """Lease up to `limit` due actions, the oldest first, each the first unfinished one of its subject.

    An action whose lease ran out is simply due again, so that no rescuer is needed. On PostgreSQL an older
    action may be committed after a younger one was claimed; then it waits for that one. An attempt that was
    cut off with its process goes on as the same attempt: its end says nothing about the action.
    """
    given = {"now": now, "leased_until": now + lease, "at_most": limit}
    rows = (await tx.execute(_CLAIM, given)).mappings().all()
    known = await correlations(tx, rows)
    return sorted((_leased(row, known.get(row["event_id"])) for row in rows), key=lambda leased: leased.id)


async def correlations(tx: Tx, rows: Sequence[Mapping[Any, Any]]) -> dict[str | None, str]:
    """What the log calls the events that these actions are due to, by their ids."""
    known = {row["event_id"]: row["event_id"] for row in rows if row["event_id"] is not None}
    if known:
        found = await tx.execute(_CORRELATIONS, {"ids": sorted(known)})
        known |= {row.id: row.correlation_id or row.id for row in found}
    return known


_CORRELATIONS: Final = sa.select(events.c.id, events.c.correlation_id).where(
    events.c.source.in_(["amplify", "recurly"]), events.c.id.in_(sa.bindparam("ids", expanding=True))
)


def _claiming() -> sa.sql.dml.ReturningUpdate[Any]:
    now = sa.bindparam("now", type_=UtcDateTime())
    other = outbox.alias("other")
    older = other.c.id < outbox.c.id
    under_way = sa.and_(other.c.state == State.LEASED, other.c.due_at > now, other.c.id != outbox.c.id)
    blocked = sa.exists().where(
        other.c.subject == outbox.c.subject, _in(other, UNFINISHED), sa.or_(older, under_way)
    )
    due = (
        sa.select(outbox.c.id)
        .where(_in(outbox, UNFINISHED), outbox.c.due_at <= now, ~blocked)
        .order_by(outbox.c.due_at, outbox.c.id)
        .limit(sa.bindparam("at_most", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return (
        sa.update(outbox)
        .where(outbox.c.id.in_(sa.select(due.c.id)))
        .values(
            state=State.LEASED,
            attempt=outbox.c.attempt + sa.case((outbox.c.state == State.PENDING, 1), else_=0),
            fence=outbox.c.fence + 1,
            due_at=sa.bindparam("leased_until", type_=UtcDateTime()),
        )
        .returning(outbox)
    )


_CLAIM: Final = _claiming()


def _leased(row: Mapping[Any, Any], correlation: str | None) -> Leased:
    return Leased(
        row["id"],
        row["kind"],
        row["subject"],
        row["key"],
        row["args"],
        row["attempt"],
        row["fence"],
        row["event_id"],
        correlation,
    )


_OURS: Final = sa.and_(
    outbox.c.id == sa.bindparam("our_id"),
    outbox.c.state == State.LEASED,
    outbox.c.fence == sa.bindparam("our_fence"),
)
"""An action that nobody claimed since we did."""

_RENEW: Final = sa.update(outbox).where(_OURS).values(due_at=sa.bindparam("leased_until"))


async def renew(tx: Tx, held: Sequence[Leased], *, now: datetime, lease: timedelta) -> set[int]:
    """Lengthen the leases that are still ours; return the ids that are."""
    kept = set()
    for leased in held:
        given = {"our_id": leased.id, "our_fence": leased.fence, "leased_until": now + lease}
        if (await tx.execute(_RENEW, given)).rowcount == 1:
            kept.add(leased.id)
    return kept


_SETTLE: Final = sa.update(outbox).where(_OURS)
"""Sets what it is given by its column's name."""


async def settle(tx: Tx, leased: Leased, verdict: Verdict, *, now: datetime) -> None:
    """Write what the attempt led to. Raises LeaseLost when somebody claimed the action since."""
    unfinished = verdict.state in UNFINISHED
    given = {
        "our_id": leased.id,
        "our_fence": leased.fence,
        "state": verdict.state,
        "due_at": verdict.due_at,
        "error": verdict.error,
        "attempt": 0 if verdict.waited else leased.attempt - verdict.uncounted,
        "settled_at": None if unfinished else now,
    }
    if (await tx.execute(_SETTLE, given)).rowcount != 1:
        raise LeaseLost(f"the lease of action {leased.id} ({leased.key}) was lost")


async def take_back_leases(tx: Tx, *, now: datetime) -> int:
    """Make every leased action due at once: on SQLite a new start knows that no worker is left."""
    moved = await tx.execute(sa.update(outbox).where(_in(outbox, [State.LEASED])).values(due_at=now))
    return moved.rowcount


_EARLIEST_DUE: Final = sa.select(sa.func.min(outbox.c.due_at)).where(_in(outbox, UNFINISHED))
_NEXT_DUE: Final = _EARLIEST_DUE.where(outbox.c.due_at > sa.bindparam("after"))


async def earliest_due(tx: Tx) -> datetime | None:
    """When the first unfinished action falls or fell due, or None when there is none."""
    due_at: datetime | None = (await tx.execute(_EARLIEST_DUE)).scalar_one()
    return due_at


async def next_due(tx: Tx, *, after: datetime) -> datetime | None:
    """When the next unfinished action falls due after that moment, or None when there is none."""
    due_at: datetime | None = (await tx.execute(_NEXT_DUE, {"after": after})).scalar_one()
    return due_at


async def retry(tx: Tx, ids: Sequence[int], *, now: datetime) -> int:
    """Give dead actions a new life, and pending ones no more wait; return how many moved."""
    moved = await tx.execute(
        sa.update(outbox)
        .where(outbox.c.id.in_(ids), outbox.c.state.in_([State.DEAD, State.PENDING]))
        .values(state=State.PENDING, attempt=0, due_at=now, settled_at=None)
    )
    return moved.rowcount


async def discard(tx: Tx, action_id: int, *, reason: str, now: datetime) -> bool:
    """Give an action up for good; it keeps its last error with the operator's reason."""
    last = sa.func.coalesce(outbox.c.error, "")
    moved = await tx.execute(
        sa.update(outbox)
        .where(outbox.c.id == action_id, outbox.c.state.in_([State.DEAD, State.PENDING]))
        .values(
            state=State.DISCARDED,
            settled_at=now,
            error=sa.literal(f"discarded: {reason}; last error: ") + last,
        )
    )
    return moved.rowcount == 1


async def finish(tx: Tx, ids: Sequence[int], *, now: datetime) -> int:
    """What waits was done along with another action; return how many were still waiting."""
    moved = await tx.execute(
        sa.update(outbox)
        .where(outbox.c.id.in_(ids), outbox.c.state == State.PENDING)
        .values(state=State.DONE, settled_at=now, error=None)
    )
    return moved.rowcount


async def find(tx: Tx, action_id: int) -> dict[str, Any] | None:
    """One action with everything that is known of it."""
    row = (await tx.execute(sa.select(outbox).where(outbox.c.id == action_id))).mappings().one_or_none()
    return None if row is None else dict(row)


async def select(
    tx: Tx,
    *,
    states: Sequence[str] = (),
    kind: str | None = None,
    subject: str | None = None,
    cause: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Actions in order, by state, kind, subject, and a text that their last error contains."""
    statement = sa.select(outbox).order_by(outbox.c.id)
    if states:
        statement = statement.where(_in(outbox, states))
    if kind is not None:
        statement = statement.where(outbox.c.kind == kind)
    if subject is not None:
        statement = statement.where(outbox.c.subject == subject)
    if cause is not None:
        statement = statement.where(outbox.c.error.icontains(cause, autoescape=True))
    if limit is not None:
        statement = statement.limit(limit)
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def subjects(tx: Tx, *, states: Sequence[str]) -> set[str]:
    """What the actions in these states are about, each once."""
    statement = sa.select(outbox.c.subject).where(_in(outbox, states)).distinct()
    return set((await tx.execute(statement)).scalars())


_COUNT: Final = sa.select(outbox.c.state, outbox.c.kind, sa.func.count()).group_by(
    outbox.c.state, outbox.c.kind
)


async def count(tx: Tx) -> dict[tuple[str, str], int]:
    """How many actions there are by (state, kind)."""
    return {(state, kind): number for state, kind, number in await tx.execute(_COUNT)}


async def count_waiting(tx: Tx) -> dict[tuple[str, str], int]:
    """The same of those that are neither done nor discarded: their indexes alone are read."""
    found: dict[tuple[str, str], int] = {}
    for states in (UNFINISHED, [State.DEAD]):
        for state, kind, number in await tx.execute(_COUNT.where(_in(outbox, states))):
            found[state, kind] = number
    return found


async def oldest_pending(tx: Tx) -> datetime | None:
    """When the oldest unfinished action was made."""
    statement = sa.select(sa.func.min(outbox.c.created_at)).where(_in(outbox, UNFINISHED))
    made_at: datetime | None = (await tx.execute(statement)).scalar_one()
    return made_at


async def newest(tx: Tx) -> int:
    """The id of the newest action, 0 when there is none: it grows with every action that is made."""
    return int((await tx.execute(sa.select(sa.func.max(outbox.c.id)))).scalar_one() or 0)


_DEAD: Final = sa.select(
    sa.func.count(), sa.func.min(outbox.c.settled_at), sa.func.max(outbox.c.settled_at)
).where(_in(outbox, [State.DEAD]))


async def dead(tx: Tx) -> tuple[int, datetime | None, datetime | None]:
    """How many dead letters there are, when the first of them gave up, and when the last (None: none is)."""
    number, first, last = (await tx.execute(_DEAD)).one()
    return int(number), first, last


async def dead_causes(tx: Tx, *, limit: int) -> list[tuple[str, str | None]]:
    """Kind and error of dead letters, those that gave up last first."""
    statement = sa.select(outbox.c.kind, outbox.c.error).where(_in(outbox, [State.DEAD]))
    last = (outbox.c.settled_at.desc(), outbox.c.id.desc())
    return [(row.kind, row.error) for row in await tx.execute(statement.order_by(*last).limit(limit))]


async def newest_done(tx: Tx, subjects: Collection[str], *, after: int) -> dict[tuple[str, str], int]:
    """The id of the newest done action of each of these subjects behind an id, by kind and subject."""
    found: dict[tuple[str, str], int] = {}
    asked = sorted(set(subjects))
    for start in range(0, len(asked), SUBJECTS_MAX):
        statement = (
            sa.select(outbox.c.kind, outbox.c.subject, sa.func.max(outbox.c.id))
            .where(outbox.c.subject.in_(asked[start : start + SUBJECTS_MAX]))
            .where(outbox.c.state == State.DONE, outbox.c.id > after)
            .group_by(outbox.c.kind, outbox.c.subject)
        )
        found |= {(kind, subject): newest for kind, subject, newest in await tx.execute(statement)}
    return found


async def forget(tx: Tx, *, before: datetime) -> int:
    """Drop done and discarded actions settled before a moment."""
    gone = await tx.execute(
        sa.delete(outbox).where(
            outbox.c.state.in_([State.DONE, State.DISCARDED]), outbox.c.settled_at < before
        )
    )
    return gone.rowcount
