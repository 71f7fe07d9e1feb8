"""Readings of traffic -> usage records, each with its merchant tag."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from billingd.domain.windows import Window

UNITS_MAX: Final = 999_999_999
"""Recurly takes nine digits in one usage record (recurly.md 4.7); more is split over several."""

TAG_PREFIX: Final = "bd1:"
"""How every merchant tag of ours begins."""

CORRECTION: Final = "~"
"""What stands between the tag of a record and the number of its correction, in the correction's tag."""

RECURLY_SECOND: Final = timedelta(seconds=1)
"""Recurly's timestamps are whole seconds."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What Amplify counted for one subscription and quota in the window that starts at `window_start`."""

    subscription_id: str
    quota_id: str
    window_start: datetime
    units: int


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """Units of one quota in one window, as they will be told to Recurly; never changed once recorded.

    `window` is a traffic window, or the piece of one that a billing period cuts off. `revision` numbers the
    records of one (subscription, quota, window): 1 is the first reading, later ones book what arrived late,
    or what one record cannot hold.
    """

    subscription_id: str
    quota_id: str
    window: Window
    revision: int
    units: int
    usage_timestamp: datetime
    merchant_tag: str


@dataclass(frozen=True, slots=True)
class Booked:
    """What is recorded of one (subscription, quota, piece): units in all, and the newest revision."""

    units: int
    revisions: int


@dataclass(frozen=True, slots=True)
class ParsedTag:
    """What a merchant tag says: of which pair, which window or piece, and the how manieth record of it."""

    pair_hash: str
    window: Window
    revision: int


_TAG: Final = re.compile(
    rf"{TAG_PREFIX}(?P<pair>[0-9a-f]{{24}}):(?P<start>\d{{8}}T\d{{6}}Z):(?P<seconds>[1-9]\d{{0,9}}):"
    r"(?P<revision>[1-9]\d{0,8})",
    re.ASCII,
)


def pair_hash(subscription_id: str, quota_id: str) -> str:
    """How a merchant tag names its (subscription, quota): 24 hex digits."""
    return hashlib.sha256(f"{subscription_id}\n{quota_id}".encode()).hexdigest()[:24]


def parse_tag(tag: str) -> ParsedTag | None:
    """What `merchant_tag` was given to make this tag; None when it cannot have made it."""
    found = _TAG.fullmatch(tag)
    if found is None:
        return None
    try:
        start = datetime.strptime(found["start"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        window = Window(start, start + timedelta(seconds=int(found["seconds"])))
    except (ValueError, OverflowError):  # no such day, or beyond the calendar
        return None
    return ParsedTag(found["pair"], window, int(found["revision"]))


def merchant_tag(subscription_id: str, quota_id: str, window: Window, revision: int) -> str:
    """The name of a usage record at Recurly: the same for the same record, whoever computes it.

    `bd1:` + 24 hex digits of the pair + window start + its seconds + revision; at most 64 ASCII characters.
    """
    pair = pair_hash(subscription_id, quota_id)
    start = window.start.strftime("%Y%m%dT%H%M%SZ")
    tag = f"{TAG_PREFIX}{pair}:{start}:{int(window.length.total_seconds())}:{revision}"
    assert len(tag) <= 64
    return tag


def correction_tag(tag: str, number: int) -> str:
    """The name of the correction of a billed record that is there twice, or with other units."""
    correction = f"{tag}{CORRECTION}{number}"
    assert len(correction) <= 64
    return correction


def corrected_tag(tag: str) -> str | None:
    """The tag that a correction's own tag is about; None when it is no correction's."""
    corrected, mark, number = tag.rpartition(CORRECTION)
    return corrected if mark and number.isdigit() and corrected.startswith(TAG_PREFIX) else None


def usage_intent(tag: str) -> str:
    """The name of the intent to report the record with that merchant tag; also its subject in history."""
    return f"usage:{tag}"


def book(
    subscription_id: str,
    quota_id: str,
    read: Mapping[Window, int],
    recorded: Mapping[Window, Booked],
    *,
    before: datetime,
) -> Iterator[UsageRecord]:
    """The records that bring what is recorded of one window up to what was read of it.

    `read` has the units of each piece that the window is cut into (mostly the window itself), `recorded`
    what the ledger has of it, by piece. A record that straddles pieces, because the cut was not known then,
    counts for the earliest that still lack units. Never more is booked than is missing in the whole window,
    so that a cut that became known late moves no unit twice. Less read than recorded books nothing: a fault
    to show, not a refund (totals of a past window only grow, amplify.md 6.4).

    A record's time is the last whole second of its piece that lies `before` a moment: usage cannot be told
    of the future. A piece that begins later has none yet, and waits for a later reading.
    """
    missing = sum(read.values()) - sum(one.units for one in recorded.values())
    straddling = sum(
        one.units for key, one in recorded.items() if not any(_within(key, piece) for piece in read)
    )
    for piece, units in sorted(read.items()):
        known = sum(one.units for key, one in recorded.items() if _within(key, piece))
        poured = min(straddling, max(0, units - known))
        straddling -= poured
        at = min(piece.end, before) - RECURLY_SECOND
        if missing <= 0 or at < piece.start:
            continue
        revision = recorded[piece].revisions if piece in recorded else 0
        short = min(units - known - poured, missing)
        while short > 0:
            revision += 1
            part = min(short, UNITS_MAX)
            short -= part
            missing -= part
            yield UsageRecord(
                subscription_id,
                quota_id,
                piece,
                revision,
                part,
                at,
                merchant_tag(subscription_id, quota_id, piece, revision),
            )


def _within(inner: Window, outer: Window) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end
