"""What a check found, and how checks are run so that none hides another."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from billingd.domain.attempts import describe
from billingd.domain.errors import BillingdError, Misconfigured, Retryable

AT_ONCE_MAX: Final = 6
"""Checks under way at a time: they share the far sides with a daemon that works."""


class State(StrEnum):
    """How one check came out."""

    OK = "ok"
    LOOK = "look"
    """Something a person must look at."""
    UNREACHABLE = "unreachable"
    CONFIGURATION = "configuration"
    SKIPPED = "skipped"
    """Not tried: it does not apply, or what it stands on failed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: what is so, and for what is not as it should be the command or line that mends it."""

    check: str
    state: State
    says: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A finding before it bears the name of its check."""

    says: str
    fix: str | None = None
    state: State = State.OK


def fine(says: str) -> Found:
    return Found(says)


def look(says: str, fix: str) -> Found:
    return Found(says, fix, State.LOOK)


def skipped(says: str) -> Found:
    return Found(says, None, State.SKIPPED)


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `fix` mends what it raises; `away` what it raises when nobody answers."""

    name: str
    run: Callable[[], Awaitable[Sequence[Found]]]
    fix: str
    away: str
    needs: tuple[str, ...] = ()
    """Checks without which this one can say nothing of its own."""


async def examine(checks: Sequence[Check]) -> list[Finding]:
    """Run every check, a few at a time; what they found, in the order given."""
    gate = asyncio.Semaphore(AT_ONCE_MAX)
    done: dict[str, asyncio.Task[list[Finding]]] = {}

    async def one(check: Check) -> list[Finding]:
        for need in check.needs:
            if need in done and not _well(await done[need]):
                return [Finding(check.name, State.SKIPPED, f"not tried: it needs {need}")]
        async with gate:
            return [Finding(check.name, each.state, each.says, each.fix) for each in await _found(check)]

    async with asyncio.TaskGroup() as group:
        for check in checks:
            done[check.name] = group.create_task(one(check))
    return [finding for check in checks for finding in done[check.name].result()]


def _well(findings: Sequence[Finding]) -> bool:
    return all(each.state is State.OK for each in findings)


async def _found(check: Check) -> Sequence[Found]:
    try:
        return await check.run()
    except Misconfigured as error:
        return [look(str(error), check.fix)]
    except Retryable as error:
        return [Found(str(error), check.away, State.UNREACHABLE)]
    except BillingdError as error:
        return [look(str(error), check.fix)]
    except Exception as error:  # a bug in one check may not hide what the others found
        fix = f"report it with this line; `billingd doctor --only {check.name}` shows it again"
        return [look(f"this check itself failed: {describe(error)}", fix)]
