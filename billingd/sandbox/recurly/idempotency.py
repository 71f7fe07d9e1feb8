"""Answers kept under `Idempotency-Key` for an hour (OAS:182-209)."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from billingd.sandbox.clock import SandboxClock

RETENTION: Final = timedelta(hours=1)
KEY_LENGTH_MAX: Final = 255
METHODS: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
IN_FLIGHT_RETRY_SECONDS: Final = 1

Identity = tuple[str, str, str, str]
"""Key, method, path, API key: neither the body nor, as far as is known, the query."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as it can be sent again."""

    status: int
    body: bytes
    kept_at: datetime


class IdempotencyStore:
    """4xx and 5xx are kept too: only 429 is excepted by the text (OAS:198-200)."""

    def __init__(self, clock: SandboxClock) -> None:
        self._clock = clock
        self._answers: OrderedDict[Identity, Answer] = OrderedDict()
        self._in_flight: set[Identity] = set()

    def earlier(self, identity: Identity) -> Answer | None:
        """The answer kept for an identical request within the last hour."""
        self._forget_old()
        return self._answers.get(identity)

    def in_flight(self, identity: Identity) -> bool:
        """Whether an identical request is being worked on."""
        return identity in self._in_flight

    def begin(self, identity: Identity) -> None:
        """Marks a request as being worked on."""
        self._in_flight.add(identity)

    def end(self, identity: Identity, status: int | None, body: bytes) -> None:
        """Keeps the answer, unless there was none (`status` None) or it was a 429."""
        self._in_flight.discard(identity)
        if status is not None and status != 429:
            self._answers[identity] = Answer(status, body, self._clock.now())

    def forget(self, identity: Identity) -> None:
        """As if the hour had passed."""
        self._answers.pop(identity, None)

    def _forget_old(self) -> None:
        horizon = self._clock.now() - RETENTION
        while self._answers and next(iter(self._answers.values())).kept_at <= horizon:
            self._answers.popitem(last=False)
