"""Readings of traffic -> usage records, each with its merchant tag."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from billingd.domain.windows import Window

UNITS_MAX: Final = 999_999_999
"""Recurly takes nine digits in one usage record (recurly.md 4.7); more is split over several."""

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

    `revision` numbers the records of one (subscription, quota, window): 1 is the first reading, later ones
    book what arrived late, or what one record cannot hold.
    """

    subscription_id: str
    quota_id: str
    window: Window
    revision: int
    units: int
    usage_timestamp: datetime
    merchant_tag: str


def merchant_tag(subscription_id: str, quota_id: str, window: Window, revision: int) -> str:
    """The name of a usage record at Recurly: the same for the same record, whoever computes it.

    `bd1:` + 24 hex digits of the pair + window start + its seconds + revision; at most 64 ASCII characters.
    """
    pair = hashlib.sha256(f"{subscription_id}\n{quota_id}".encode()).hexdigest()[:24]
    start = window.start.strftime("%Y%m%dT%H%M%SZ")
    tag = f"bd1:{pair}:{start}:{int(window.length.total_seconds())}:{revision}"
    assert len(tag) <= 64
    return tag


def book(
    subscription_id: str, quota_id: str, window: Window, *, read: int, recorded: int, revisions: int
) -> Iterator[UsageRecord]:
    """The records that make `recorded` units equal to `read`, numbered on from `revisions`.

    Nothing when they agree, or when less was read than is recorded: that is a fault to show, not a refund
    (totals of a past window only grow, amplify.md 6.4). The timestamp is the window's last whole second.
    """
    missing = read - recorded
    while missing > 0:
        revisions += 1
        units = min(missing, UNITS_MAX)
        missing -= units
        yield UsageRecord(
            subscription_id,
            quota_id,
            window,
            revisions,
            units,
            window.end - RECURLY_SECOND,
            merchant_tag(subscription_id, quota_id, window, revisions),
        )
