"""The life of an action: states, what an attempt led to, and when the next one is due."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from random import Random
from typing import Any, Final

from billingd.domain.errors import Permanent, Retryable, Settling
from billingd.domain.privacy import KNOWN, without_addresses


class State(StrEnum):
    """Where an action stands."""

    PENDING = "pending"
    """Waits for its due time."""
    LEASED = "leased"
    """A worker has it until its lease ends."""
    DONE = "done"
    DEAD = "dead"
    """Gave up; keeps its last error until an operator retries or discards it."""
    DISCARDED = "discarded"


NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.PENDING: frozenset({State.LEASED, State.DISCARDED}),
    State.LEASED: frozenset({State.DONE, State.PENDING, State.DEAD, State.LEASED}),  # expired: leased anew
    State.DEAD: frozenset({State.PENDING, State.DISCARDED}),  # an operator's `retry` or `discard`
    State.DONE: frozenset(),
    State.DISCARDED: frozenset(),
}

UNFINISHED: Final = (State.PENDING, State.LEASED)
"""States in which an action holds back later actions of its subject."""


@dataclass(frozen=True, slots=True)
class Action:
    """A durable intention: `kind` of work about `subject`; `key` is unique for ever."""

    kind: str
    subject: str
    key: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Leased:
    """An action that a worker holds. `fence` grows with every claim: a settle with an old one moves nothing.

    `attempt` counts attempts since the action last waited on purpose; it includes this one. Not counted are
    those that only found that an earlier one must settle, and those that were cut off with their process.
    """

    id: int
    kind: str
    subject: str
    key: str
    args: Mapping[str, Any]
    attempt: int
    fence: int
    event_id: str | None
    correlation: str | None = None
    """The event's correlation id, for the log; the event's own id where it has none."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A handler's answer: not yet, for `reason`; look again after `delay`. It costs no attempt."""

    delay: timedelta
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt led to. `waited`: the count begins anew; `uncounted`: it leaves this one out."""

    state: State
    due_at: datetime
    error: str | None = None
    waited: bool = False
    uncounted: bool = False


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how slowly to try again: the wait doubles from `backoff` up to `backoff_max`."""

    attempts_max: int
    backoff: timedelta
    backoff_max: timedelta


def backoff(attempt: int, patience: Patience, rng: Random) -> timedelta:
    """The wait after the given attempt (1, 2, ...): doubled each time, bounded, less up to half as jitter."""
    doublings = min(attempt - 1, 40)  # 2**40 times any wait is past every bound
    wait: timedelta = min(patience.backoff * (1 << doublings), patience.backoff_max)
    return wait * (1 - rng.random() / 2)


def judge(
    attempt: int, outcome: Wait | BaseException | None, *, now: datetime, patience: Patience, rng: Random
) -> Verdict:
    """What the outcome of an attempt means.

    None is done; `Wait` and `Settling` are not yet; `Permanent` is dead; everything else, bugs included, is
    tried again until `attempts_max` (a bad row may not stop the line, nor be tried for ever).
    """
    if outcome is None:
        return Verdict(State.DONE, due_at=now)
    if isinstance(outcome, Wait):
        return Verdict(State.PENDING, due_at=now + outcome.delay, error=outcome.reason, waited=True)
    error = describe(outcome)
    if isinstance(outcome, Settling) and outcome.retry_after is not None:
        return Verdict(State.PENDING, due_at=now + outcome.retry_after, error=error, uncounted=True)
    if isinstance(outcome, Permanent) or attempt >= patience.attempts_max:
        return Verdict(State.DEAD, due_at=now, error=error)
    wait = backoff(attempt, patience, rng)
    if isinstance(outcome, Retryable) and outcome.retry_after is not None:
        wait = max(wait, outcome.retry_after)
    return Verdict(State.PENDING, due_at=now + wait, error=error)


def describe(error: BaseException) -> str:
    """The text an operator reads: its class too, since a bug's message alone says little; no secrets."""
    text = without_addresses(KNOWN.without(f"{type(error).__name__}: {error}")[:2000])
    return text.replace("\x00", "�").encode(errors="replace").decode()  # no database keeps these two
