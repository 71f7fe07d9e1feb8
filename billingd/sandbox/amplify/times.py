"""Amplify's ways of writing an instant."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_API_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?([+-]\d\d):?(\d\d)")


def api_time(at: datetime) -> str:
    """`2026-03-02T10:15:00.120+0000`: milliseconds, zone without colon (amplify.md 2.5)."""
    at = at.astimezone(UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}+0000"


def feed_time(at: datetime) -> str:
    """`2026-03-02 11:00:02.417551`: the watch-topic feed's own form, no zone (amplify.md 4.5)."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"


def epoch_ms(at: datetime) -> int:
    """Milliseconds since the epoch, as Traceability wants them (amplify.md 6.2)."""
    return (at - EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int) -> datetime:
    """The inverse of `epoch_ms`."""
    return EPOCH + timedelta(milliseconds=ms)


def instant(text: str) -> datetime:
    """An aware instant from RFC 3339 or Amplify's form; ValueError for anything else."""
    match = _API_TIME.fullmatch(text)
    at = datetime.fromisoformat(f"{match[1]}{match[2] or ''}{match[3]}:{match[4]}" if match else text)
    if at.tzinfo is None:
        raise ValueError("a time needs a zone, e.g. 2026-03-02T10:15:00Z")
    return at.astimezone(UTC)


def comparable_ms(text: str) -> int:
    """An audit timestamp in a query: epoch ms or Amplify's form (amplify.md 2.4)."""
    return int(text) if text.isdigit() else epoch_ms(instant(text))
