"""The protocol of a write that must take effect once, although its answer may be lost.

Recurly remembers an `Idempotency-Key` for one hour (Idempotent Requests in its API description). Within
that hour the same key is safe to send again. After it only a look-up protects, and a look-up is believed
only after the settling time, since a request that got no answer may still be running at the far side.
Where a site turns out not to heed keys, only the look-up is left.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

KEY_WINDOW: Final = timedelta(minutes=50)
"""How long a key is trusted: Recurly's hour less a margin for clocks and delay."""


SECOND_LOOK: Final = timedelta(seconds=5)
"""How long after a look that found nothing the second one follows: lists may lag behind writes."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What is durably known of one write: `epoch` counts its keys, `burnt` says this key can't help again.

    `state` is `open` (sent, outcome unknown), `refused` (clearly not done) or `done` (with `result`).
    `sends` counts the sendings, so that one that was overtaken is known. `gave_up_at` is when the last
    sending ended without an answer (None: it still runs, or the process died with it); `missed_at` when a
    look-up after the settling time first found nothing.
    """

    name: str
    epoch: int
    state: str
    sends: int
    first_sent_at: datetime
    last_sent_at: datetime
    gave_up_at: datetime | None
    missed_at: datetime | None
    burnt: bool
    result: str | None
    body_hash: str


@dataclass(frozen=True, slots=True)
class Trust:
    """What may be relied on: `keys`: whether the far side heeds idempotency keys at all.

    `settling` is how long a request that got no answer may still take effect, `attempt` how long one
    sending may take at most, from writing its intent down to its last byte.
    """

    settling: timedelta
    attempt: timedelta
    keys: bool = True


@dataclass(frozen=True, slots=True)
class Send:
    """Send under this epoch; `again` when the same key was sent before."""

    epoch: int
    again: bool


@dataclass(frozen=True, slots=True)
class Settle:
    """Send nothing before this moment: an earlier request may still take effect.

    `missed`: this look counts as the first of the two that a new key needs.
    """

    until: datetime
    missed: bool = False


def settled_at(intent: Intent, trust: Trust) -> datetime:
    """From when on the last request can no longer take effect."""
    ended_at = intent.gave_up_at or intent.last_sent_at + trust.attempt
    return ended_at + trust.settling


def after_not_found(intent: Intent | None, *, now: datetime, trust: Trust) -> Send | Settle:
    """What to do when a look-up found nothing, or when none was needed because nothing was ever sent.

    A key that Recurly still knows is sent again. Else two look-ups after the settling time must find
    nothing (recurly.md 5.6) before a new key is taken.
    """
    if intent is None:
        return Send(epoch=1, again=False)
    if intent.state == "refused":
        return Send(epoch=intent.epoch + 1, again=False)
    if trust.keys and not intent.burnt and now - intent.first_sent_at < KEY_WINDOW:
        return Send(epoch=intent.epoch, again=True)
    settled = settled_at(intent, trust)
    if now < settled:
        return Settle(until=settled)
    if intent.missed_at is None or intent.missed_at < settled:
        return Settle(until=now + SECOND_LOOK, missed=True)
    if now < intent.missed_at + SECOND_LOOK:
        return Settle(until=intent.missed_at + SECOND_LOOK)
    return Send(epoch=intent.epoch + 1, again=False)


def body_hash(body: Mapping[str, Any]) -> str:
    """A digest of what is sent, so that one key never carries two bodies."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def idempotency_key(name: str, epoch: int, body_digest: str) -> str:
    """The key of one epoch of one write, at most 64 characters (Recurly allows 255)."""
    return "bd1-" + hashlib.sha256(f"{name}\n{epoch}\n{body_digest}".encode()).hexdigest()[:48]
