"""Reconciliations, how far each has come, and what each has found."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.drift import PRICE_DIFFERS, Drift
from billingd.store.engine import Tx
from billingd.store.schema import drift, reconciliations

RUNS_KEPT: Final = 100
"""Finished runs whose findings are kept; the newest."""

DAILY: Final = "daily"
WHOLE: Final = (DAILY, "-/-/-/False", "-/-/-/True")
"""What is asked for where a run is over all subscriptions and all open periods."""


@dataclass(frozen=True, slots=True)
class Run:
    """One reconciliation of [since, until): its `phase`, and the `cursor` from which that goes on.

    `state` running | done | failed. `asked` is what was asked for, so that the same is joined. `stepped_at`
    is when it last went on, or tried to. `not_compared` has what it could not look at: since, until, reason,
    and the subscription where it is one.
    """

    id: int
    state: str
    since: datetime
    until: datetime
    subscription_id: str | None
    repair: bool
    asked: str
    phase: str
    cursor: str | None
    steps_done: int
    steps: int
    subscriptions: int
    records: int
    held_units: int
    repaired_units: int
    not_compared: list[dict[str, Any]]
    started_at: datetime
    stepped_at: datetime
    finished_at: datetime | None
    drifting: bool | None
    error: str | None

    @property
    def whole_periods(self) -> bool:
        """Whether nobody said from when on: then all open periods are meant."""
        return self.asked == DAILY or self.asked.startswith("-/")


@dataclass(frozen=True, slots=True)
class Found:
    """A finding of a run; `mended` says what a repair did about it."""

    id: int
    run_id: int
    drift: Drift
    mended: str | None


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run found: `units` and `findings` in all, `open` findings that no repair has mended yet.

    `drifting` are the open ones but for prices, which existing subscriptions keep for ever.
    """

    units: int = 0
    findings: int = 0
    open_units: int = 0
    open: int = 0
    drifting: int = 0


_RUNS: Final = sa.select(*(reconciliations.c[one.name] for one in fields(Run)))
_DRIFT: Final = [one.name for one in fields(Drift)]


async def begin(
    tx: Tx,
    *,
    since: datetime,
    until: datetime,
    subscription_id: str | None,
    repair: bool,
    asked: str,
    phase: str,
    steps: int,
    not_compared: list[dict[str, Any]],
    now: datetime,
) -> int:
    """A new run; its id."""
    row = {
        "state": "running",
        "since": since,
        "until": until,
        "subscription_id": subscription_id,
        "repair": repair,
        "asked": asked,
        "phase": phase,
        "cursor": None,
        "steps_done": 0,
        "steps": steps,
        "subscriptions": 0,
        "records": 0,
        "held_units": 0,
        "repaired_units": 0,
        "not_compared": not_compared,
        "started_at": now,
        "stepped_at": now,
    }
    made = await tx.execute(sa.insert(reconciliations).returning(reconciliations.c.id), row)
    return int(made.scalar_one())


async def find(tx: Tx, run_id: int) -> Run | None:
    """A run by its id."""
    row = (await tx.execute(_RUNS.where(reconciliations.c.id == run_id))).one_or_none()
    return None if row is None else Run(*row)


async def unfinished(tx: Tx, *, asked: str | None = None) -> Run | None:
    """The oldest run that goes on, of those that were asked for like that; a daily one comes last."""
    daily = sa.case((reconciliations.c.asked == DAILY, 1), else_=0)
    running = _RUNS.where(reconciliations.c.state == "running")
    statement = running.order_by(daily, reconciliations.c.id).limit(1)
    if asked is not None:
        statement = statement.where(reconciliations.c.asked == asked)
    row = (await tx.execute(statement)).one_or_none()
    return None if row is None else Run(*row)


async def latest(
    tx: Tx, *, before: int | None = None, asked: Sequence[str] = WHOLE, state: str | None = "done"
) -> Run | None:
    """The newest run in this state of those that were asked for like that."""
    statement = _RUNS.where(reconciliations.c.asked.in_(asked))
    if state is not None:
        statement = statement.where(reconciliations.c.state == state)
    if before is not None:
        statement = statement.where(reconciliations.c.id < before)
    row = (await tx.execute(statement.order_by(reconciliations.c.id.desc()).limit(1))).one_or_none()
    return None if row is None else Run(*row)


async def touch(tx: Tx, run_id: int, *, now: datetime) -> None:
    """Somebody tries to go on with a run."""
    mine = sa.and_(reconciliations.c.id == run_id, reconciliations.c.state == "running")
    await tx.execute(sa.update(reconciliations).where(mine).values(stepped_at=now))


async def ended(tx: Tx, *, before: int | None = None) -> Run | None:
    """The newest run over everything that is over, whether it failed or not."""
    over = _RUNS.where(reconciliations.c.asked.in_(WHOLE), reconciliations.c.state != "running")
    if before is not None:
        over = over.where(reconciliations.c.id < before)
    row = (await tx.execute(over.order_by(reconciliations.c.id.desc()).limit(1))).one_or_none()
    return None if row is None else Run(*row)


async def step(
    tx: Tx,
    run: Run,
    *,
    phase: str,
    cursor: str | None,
    now: datetime,
    not_compared: Sequence[dict[str, Any]] = (),
    **more: int,
) -> bool:
    """A step is done: the run goes on from there, and `more` is added to its counts.

    False, and nothing changes, when somebody else took that step already.
    """
    columns = reconciliations.c
    counts: dict[str, Any] = {name: columns[name] + number for name, number in more.items()}
    if not_compared:
        counts["not_compared"] = [*run.not_compared, *not_compared]
    moved = await tx.execute(
        sa.update(reconciliations)
        .where(columns.id == run.id, columns.state == "running", columns.steps_done == run.steps_done)
        .values(phase=phase, cursor=cursor, steps_done=columns.steps_done + 1, stepped_at=now, **counts)
    )
    return moved.rowcount == 1


async def finish(tx: Tx, run_id: int, *, now: datetime, drifting: bool) -> None:
    """The run is done; `drifting` says whether it found more than prices that differ."""
    await _end(tx, run_id, state="done", finished_at=now, drifting=drifting)


async def fail(tx: Tx, run_id: int, *, now: datetime, error: str) -> None:
    """The run cannot go on."""
    await _end(tx, run_id, state="failed", finished_at=now, error=error)


async def _end(tx: Tx, run_id: int, **values: Any) -> None:
    await tx.execute(
        sa.update(reconciliations)
        .where(reconciliations.c.id == run_id, reconciliations.c.state == "running")
        .values(**values)
    )


async def last_said(tx: Tx, kind: str, subject: str) -> Found | None:
    """What the newest run that found this said of it; None when none is remembered."""
    statement = (
        sa.select(drift)
        .where(drift.c.kind == kind, drift.c.subject == subject)
        .order_by(drift.c.id.desc())
        .limit(1)
    )
    row = (await tx.execute(statement)).one_or_none()
    return None if row is None else _found(row)


async def add(tx: Tx, run_id: int, found: Sequence[Drift]) -> None:
    """Write down what a step found; what an earlier step of the run said already is not said twice."""
    if not found:
        return
    subjects = {one.subject for one in found}
    statement = sa.select(drift.c.kind, drift.c.subject).where(drift.c.reconciliation_id == run_id)
    if len(subjects) <= 500:
        statement = statement.where(drift.c.subject.in_(sorted(subjects)))
    known = {(row.kind, row.subject) for row in await tx.execute(statement)}
    rows = []
    for one in found:
        if (one.kind, one.subject) not in known:
            known.add((one.kind, one.subject))
            row = {name: getattr(one, name) for name in _DRIFT}
            rows.append(row | {"reconciliation_id": run_id, "detail": dict(one.detail)})
    if rows:
        await tx.execute(sa.insert(drift), rows)


async def of(
    tx: Tx, run_id: int, *, after: int = 0, limit: int = 1000, repairable: bool | None = None
) -> list[Found]:
    """Findings of a run in order."""
    statement = (
        sa.select(drift)
        .where(drift.c.reconciliation_id == run_id, drift.c.id > after)
        .order_by(drift.c.id)
        .limit(limit)
    )
    if repairable is not None:
        statement = statement.where(drift.c.repairable == repairable)
    return [_found(row) for row in await tx.execute(statement)]


async def find_finding(tx: Tx, finding_id: int) -> Found | None:
    """One finding."""
    row = (await tx.execute(sa.select(drift).where(drift.c.id == finding_id))).one_or_none()
    return None if row is None else _found(row)


def _found(row: sa.Row[Any]) -> Found:
    known = {name: getattr(row, name) for name in _DRIFT}
    return Found(row.id, row.reconciliation_id, Drift(**known), row.mended)


async def mended(tx: Tx, finding_ids: Sequence[int], how: str) -> None:
    """What a repair did about these findings; whatever other runs found likewise is mended with them."""
    if not finding_ids:
        return
    ours = drift.alias()
    same = sa.exists().where(
        ours.c.id.in_(finding_ids), ours.c.kind == drift.c.kind, ours.c.subject == drift.c.subject
    )
    is_open = drift.c.mended.is_(None)
    await tx.execute(sa.update(drift).where(is_open, same).values(mended=how))


async def not_again(tx: Tx, run_id: int, *, by: int) -> list[Found]:
    """What a run found, nothing has mended, and another run did not find again."""
    again = drift.alias()
    found_again = sa.exists().where(
        again.c.reconciliation_id == by, again.c.kind == drift.c.kind, again.c.subject == drift.c.subject
    )
    statement = sa.select(drift).where(
        drift.c.reconciliation_id == run_id, drift.c.mended.is_(None), ~found_again
    )
    return [_found(row) for row in await tx.execute(statement.order_by(drift.c.id))]


async def gone(tx: Tx, finding_ids: Sequence[int], how: str) -> None:
    """These were looked for, and are no more."""
    for start in range(0, len(finding_ids), 500):
        some = drift.c.id.in_(finding_ids[start : start + 500])
        await tx.execute(sa.update(drift).where(some).values(mended=how))


async def found_by(tx: Tx, run_id: int) -> set[tuple[str, str]]:
    """Kind and subject of what a run found and no repair has mended since."""
    statement = sa.select(drift.c.kind, drift.c.subject).where(
        drift.c.reconciliation_id == run_id, drift.c.mended.is_(None)
    )
    return {(row.kind, row.subject) for row in await tx.execute(statement)}


async def totals(tx: Tx, run_id: int) -> Totals:
    """What a run found, in numbers."""
    is_open = drift.c.mended.is_(None)
    drifting = sa.and_(is_open, drift.c.kind != PRICE_DIFFERS)
    statement = sa.select(
        sa.func.sum(drift.c.units),
        sa.func.count(),
        sa.func.sum(sa.case((is_open, drift.c.units), else_=0)),
        sa.func.sum(sa.case((is_open, 1), else_=0)),
        sa.func.sum(sa.case((drifting, 1), else_=0)),
    ).where(drift.c.reconciliation_id == run_id)
    row = (await tx.execute(statement)).one()
    return Totals(*(int(number or 0) for number in row))


async def forget(tx: Tx) -> None:
    """Drop the findings and runs that are beyond the newest `RUNS_KEPT`."""
    newest = sa.select(reconciliations.c.id).order_by(reconciliations.c.id.desc()).limit(RUNS_KEPT)
    kept = (await tx.execute(newest)).scalars().all()
    if len(kept) < RUNS_KEPT:
        return
    await tx.execute(sa.delete(drift).where(drift.c.reconciliation_id < kept[-1]))
    await tx.execute(
        sa.delete(reconciliations).where(
            reconciliations.c.id < kept[-1], reconciliations.c.state != "running"
        )
    )


async def summary(tx: Tx) -> dict[str, Any]:
    """What /status says: the latest run over everything, less what was mended since."""
    run, last = await latest(tx), await ended(tx)
    found = Totals() if run is None else await totals(tx, run.id)
    going = await unfinished(tx)
    return {
        "error": None if last is None else last.error,
        "not_compared": 0 if run is None else len(run.not_compared),
        "units": found.open_units,
        "findings": found.open,
        "checked_at": None if run is None else run.finished_at,
        "running": going is not None,
    }
