"""How a call to Recurly is made: its turn, its thread, its answer judged, what it says of the far side."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, cast

import structlog

from billingd.adapters.recurly import outcomes
from billingd.adapters.recurly.client import Client
from billingd.adapters.recurly.limiter import PATIENCE_SECONDS, Limiter
from billingd.adapters.recurly.outcomes import Answer
from billingd.adapters.recurly.workers import Workers
from billingd.domain.billing import Allowance
from billingd.domain.errors import BillingdError, NotFound, Retryable

log = structlog.get_logger(__name__)

T = TypeVar("T")
Params = dict[str, str | int]
Judge = Callable[[str, Answer[Any], datetime], BillingdError]

DEADLINE_TIMEOUTS: Final = 3  # the SDK's timeout is per socket operation; a whole call may take this many
PAGE_ITEMS: Final = 200
PAGES_MAX: Final = 1000


class Calls:
    """Reads and writes against one Recurly site, over one pool of threads and one limit."""

    def __init__(
        self,
        make_client: Callable[[], Client],
        first: Client,
        *,
        timeout: timedelta,
        requests_per_minute: int,
        threads: int,
        observe: Callable[[str, float], None] | None,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._observe = observe
        self._clock = clock
        self._monotonic = monotonic
        self._limiter = Limiter(
            requests_per_minute=requests_per_minute,
            low=threads,
            clock=clock,
            monotonic=monotonic,
            sleep=sleep,
        )
        self._workers = Workers(
            make_client, first, threads=threads, deadline=DEADLINE_TIMEOUTS * timeout, heard=self._hear
        )
        self.last_reached_at: datetime | None = None
        self.last_error: str | None = None
        self._attempt_max = timedelta(seconds=PATIENCE_SECONDS) + DEADLINE_TIMEOUTS * timeout
        self.skew: timedelta | None = None
        """How far Recurly's clock is ahead of ours by its latest answer; None before the first."""
        self.allowance: Allowance | None = None
        self._doubt: str | None = None

    @property
    def attempt_max(self) -> timedelta:
        """How long one call may take at most, from asking for its turn to its last byte."""
        return self._attempt_max

    def far_now(self) -> datetime:
        """The time as Recurly's last answer had it, in whole seconds of doubt; ours before the first."""
        return self._clock() + (self.skew or timedelta(0))

    def take_doubt(self) -> str | None:
        """Which retry under a used key was no replay, once: perhaps its first request never arrived, perhaps
        the site ignores keys.
        """
        doubt, self._doubt = self._doubt, None
        return doubt

    async def close(self, *, deadline: timedelta) -> None:
        """Finish calls under way until the deadline."""
        await self._workers.close(deadline=deadline)

    async def write(self, operation: str, work: Callable[[Client], T], retried: bool) -> T:
        """The value of a write that was clearly done; else raises what its caller has to do next."""
        return cast(T, (await self.send(operation, work, retried)).value)

    async def send(self, operation: str, work: Callable[[Client], T], retried: bool) -> Answer[T]:
        """The same with all that is known of the answer."""
        answer = await self._call(operation, work, outcomes.write_error, wrote=True)
        if answer.good and retried and not answer.replayed:
            self._doubt = operation
            log.info("recurly.retry_not_replayed", operation=operation)  # most likely the first to arrive
        return answer

    async def find(self, operation: str, work: Callable[[Client], T]) -> T | None:
        """What a read found, None when Recurly itself says that there is none."""
        try:
            return await self.read(operation, work)
        except NotFound:
            return None

    async def read(self, operation: str, work: Callable[[Client], T]) -> T:
        """What a read says; a kept-alive socket that was just closed says nothing, so it asks once more."""
        answer = await self._call(operation, work, outcomes.read_error, tries_if_stale=2)
        return cast(T, answer.value)

    async def pages(
        self, operation: str, path: str, params: Params, read: Callable[[object], T]
    ) -> tuple[T, ...]:
        """Every page, each with its own turn at the limiter, its own deadline and its own second try."""
        items: list[T] = []
        following: str | None = path
        query: Params | None = {"limit": PAGE_ITEMS, **params}
        for _ in range(PAGES_MAX):
            if following is None:
                return tuple(items)

            def page(
                client: Client, path: str = following, query: Params | None = query
            ) -> tuple[list[T], str | None]:
                found, following = client.page(path, query)
                return [read(each) for each in found], following

            found, following = await self.read(operation, page)
            items.extend(found)
            query = None  # the next page's address has them all
        raise Retryable(f"{operation}: the list does not end after {PAGES_MAX} pages")

    async def _call(
        self,
        operation: str,
        work: Callable[[Client], T],
        judge: Judge,
        *,
        tries_if_stale: int = 1,
        wrote: bool = False,
    ) -> Answer[T]:
        """Call, tell the log, and raise what `judge` makes of an answer that is not good."""
        began = 0.0

        async def turn() -> None:
            nonlocal began
            await self._limiter.turn()
            began = self._monotonic()

        while True:
            answer = await self._workers.run(work, turn)
            error = None if answer.good else judge(operation, answer, self._clock())
            if not _reached(answer):
                self.last_error = str(error)
            seconds = self._monotonic() - began
            (log.info if wrote else log.debug)(
                "recurly.call",
                operation=operation,
                outcome=_outcome(error),
                status=answer.status,
                request=answer.headers.get("x-request-id"),
                replayed=answer.replayed,
                seconds=round(seconds, 3),
            )
            if self._observe is not None:
                self._observe(_outcome(error), seconds)
            if error is None:
                return answer
            tries_if_stale -= 1
            if not answer.stale or tries_if_stale < 1:
                raise error

    def _hear(self, answer: Answer[Any]) -> None:
        """Learn from an answer, also when nobody waits for it any more."""
        self._limiter.heed(answer.status, answer.headers)
        self.allowance = outcomes.allowance_of(answer) or self.allowance
        if _reached(answer):
            self.last_reached_at = self._clock()
            self.last_error = None
            if (date := outcomes.date_of(answer)) is not None:
                self.skew = date - self._clock()


def _reached(answer: Answer[Any]) -> bool:
    """Whether it was Recurly that answered, and it let us in: a refusal of one payload counts."""
    if answer.good or answer.status == 429:
        return True
    own = answer.refusal is not None and answer.status is not None
    return own and answer.status not in outcomes.CLOSED_DOOR and (answer.status or 0) < 500


def _outcome(error: BillingdError | None) -> str:
    """NotDone -> not_done: the name of an outcome in metrics."""
    if error is None:
        return "ok"
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("_")
