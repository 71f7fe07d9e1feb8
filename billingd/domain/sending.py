"""The protocol of a write that must take effect once, although its answer may be lost.

Recurly remembers an `Idempotency-Key` for one hour (Idempotent Requests in its API description). Within
that hour the same key is safe to send again. After it only a look-up protects, and a look-up is believed
only after the settling time, since a request that got no answer may still be running at the far side.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

KEY_WINDOW: Final = timedelta(minutes=50)
"""How long a key is trusted: Recurly's hour less a margin for clocks and delay."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What is durably known of one write: `epoch` counts its keys, `burnt` says this key can't help again.

    `state` is `open` (sent, outcome unknown), `refused` (clearly not done) or `done` (with `result`).
    """

    name: str
    epoch: int
    state: str
    first_sent_at: datetime
    last_sent_at: datetime
    burnt: bool
    result: str | None
    body_hash: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send under this epoch; `again` when the same key was sent before."""

    epoch: int
    again: bool


@dataclass(frozen=True, slots=True)
class Settle:
    """Send nothing before this moment: an earlier request may still take effect."""

    until: datetime


def after_not_found(intent: Intent | None, *, now: datetime, settling: timedelta) -> Send | Settle:
    """What to do when a look-up found nothing, or when none was needed because nothing was ever sent."""
    if intent is None:
        return Send(epoch=1, again=False)
    if intent.state == "refused":
        return Send(epoch=intent.epoch + 1, again=False)
    if not intent.burnt and now - intent.first_sent_at < KEY_WINDOW:
        return Send(epoch=intent.epoch, again=True)
    if now - intent.last_sent_at < settling:
        return Settle(until=intent.last_sent_at + settling)
    return Send(epoch=intent.epoch + 1, again=False)


def body_hash(body: Mapping[str, Any]) -> str:
    """A digest of what is sent, so that one key never carries two bodies."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def idempotency_key(name: str, epoch: int, body_digest: str) -> str:
    """The key of one epoch of one write, at most 64 characters (Recurly allows 255)."""
    return "bd1-" + hashlib.sha256(f"{name}\n{epoch}\n{body_digest}".encode()).hexdigest()[:48]
