"""What a call led to, judged by evidence alone: did it leave, which status came, what did Recurly say.

A write counts as refused only on a status and body that are Recurly's own, as not done only when no byte
left or Recurly said "later"; whatever else is unknown. No SDK, no network in here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Generic, TypeVar

from billingd.domain.billing import Allowance
from billingd.domain.errors import (
    BillingdError,
    Illegible,
    Misconfigured,
    NotDone,
    NotFound,
    Refused,
    Retryable,
    Unknown,
)

T = TypeVar("T")

CLOSED_DOOR: Final = frozenset({401, 402, 403, 406})  # it refuses us, not this payload
AMBIGUOUS_4XX: Final = frozenset({408, 409})
TRY_LATER: Final = frozenset({"simultaneous_request", "rate_limited"})
RETRY_AFTER_MAX: Final = timedelta(hours=1)
WORDS_MAX: Final = 500

# Recurly wants a minute between two subscriptions of one account; how it says so is not documented.
SUBSCRIPTION_GAP: Final = timedelta(seconds=60)
SUBSCRIPTION_GAP_WORDS: Final = ("delay is required between subscriptions", "wait 60 seconds")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Recurly's own error body, parsed."""

    code: str
    words: str
    params: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """All that is known of one call: `value` counts only while `fault` and `refusal` are None."""

    value: T | None = None
    refusal: Refusal | None = None
    fault: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    left: bool = False
    stale: bool = False
    """A kept-alive socket turned out to be closed before any answer came."""
    unsendable: bool = False
    """The arguments made no request."""
    cut: bool = False
    """The connection failed: what was read of the answer is not all of it."""

    @property
    def good(self) -> bool:
        """Done, and understood."""
        return self.status is not None and 200 <= self.status < 300 and not (self.fault or self.refusal)

    @property
    def replayed(self) -> bool:
        """Whether Recurly returned the stored answer of an earlier request with the same key."""
        return self.headers.get("idempotency-prior", "").strip().lower() == "true"


def write_error(operation: str, answer: Answer[T], now: datetime) -> BillingdError:
    """What a write that was not clearly done means for its caller."""
    text, status, refusal = describe(operation, answer), answer.status, answer.refusal
    if status is None and not answer.left:
        return Refused(text, code="unsendable") if answer.unsendable else NotDone(text)
    if status in CLOSED_DOOR:
        return Misconfigured(text, retry_after=retry_after(answer, now=now))
    if status == 429:
        return NotDone(text, retry_after=retry_after(answer, now=now))
    if status is not None and 400 <= status < 500 and status not in AMBIGUOUS_4XX and refusal is not None:
        gap = any(words in refusal.words.lower() for words in SUBSCRIPTION_GAP_WORDS)
        if (gap or refusal.code in TRY_LATER) and answer.replayed:  # under this key it says "later" for ever
            return Unknown(text, retry_after=retry_after(answer, now=now), replayed=not answer.cut)
        if refusal.code in TRY_LATER:
            return NotDone(text, retry_after=retry_after(answer, now=now))
        if gap:
            return NotDone(text, retry_after=SUBSCRIPTION_GAP)
        if status == 404:
            return NotFound(text)
        return Refused(text, code=refusal.code, params=refusal.params)
    # A stored answer that we cannot use stays what it is for as long as the key is remembered.
    stored = answer.replayed and not answer.cut
    return Unknown(text, retry_after=retry_after(answer, now=now), replayed=stored)


def read_error(operation: str, answer: Answer[T], now: datetime) -> BillingdError:
    """What a failed read means: it says nothing, above all not "there is none"."""
    text, wait = describe(operation, answer), retry_after(answer, now=now)
    if answer.status in CLOSED_DOOR:
        return Misconfigured(text, retry_after=wait)
    if answer.status == 404 and answer.refusal is not None:  # a gateway's 404 is not Recurly's
        return NotFound(text)
    if answer.status == 429:
        return NotDone(text, retry_after=wait)
    if answer.status is not None and 200 <= answer.status < 300 and not answer.cut:
        return Illegible(text, retry_after=wait)
    return Retryable(text, retry_after=wait)


def describe(operation: str, answer: Answer[T]) -> str:
    """One sentence for an operator: operation, target, what Recurly said, its request id."""
    if answer.refusal is not None:
        said = f"Recurly answered {answer.status} {answer.refusal.code}: {answer.refusal.words}"
    elif answer.status is None:
        moment = "after the request left" if answer.left else "before the request left"
        said = f"no answer from Recurly, {moment}: {answer.fault}"
    else:
        said = f"no usable answer from Recurly ({answer.status}): {answer.fault or 'not a success'}"
    if answer.replayed:
        said += " (the stored answer of an earlier attempt)"
    if request_id := answer.headers.get("x-request-id"):
        said += f" [request {tidy(request_id, 80)}]"
    return f"{operation}: {said}"


def retry_after(answer: Answer[T], *, now: datetime) -> timedelta | None:
    """How long the far side wants to be left alone: Retry-After, or until the rate limit is whole again."""
    wait = _seconds_or_date(answer.headers.get("retry-after", ""), now)
    if wait is None and answer.status == 429:
        wait = _until(answer.headers.get("x-ratelimit-reset", ""), now)
    return None if wait is None else min(max(wait, timedelta()), RETRY_AFTER_MAX)


def date_of(answer: Answer[T]) -> datetime | None:
    """When the far side answered, by its own clock, in whole seconds."""
    try:
        date = parsedate_to_datetime(answer.headers.get("date", ""))
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def allowance_of(answer: Answer[T]) -> Allowance | None:
    """What its headers say of the rate limit; None where they say nothing."""
    limit, left, reset = (
        integer(answer.headers.get(f"x-ratelimit-{name}", "")) for name in ("limit", "remaining", "reset")
    )
    if limit is None or left is None:
        return None
    return Allowance(limit, left, None if reset is None else datetime.fromtimestamp(reset, UTC))


def integer(text: str) -> int | None:
    """A header's plain number, or None."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None


def tidy(text: str, length_max: int = WORDS_MAX) -> str:
    """Somebody else's words, fit for one line of a log."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length_max else line[: length_max - 1] + "…"


def _until(unix_seconds: str, now: datetime) -> timedelta | None:
    reset = integer(unix_seconds)
    return None if reset is None else timedelta(seconds=reset - now.timestamp())


def _seconds_or_date(text: str, now: datetime) -> timedelta | None:
    seconds = integer(text)
    if seconds is not None:
        return min(timedelta(seconds=min(seconds, 86_400)), RETRY_AFTER_MAX)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
