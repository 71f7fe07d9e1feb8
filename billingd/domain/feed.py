"""A watch topic's feed as values: numbered events, a page at a time (amplify.md 4.5)."""

from dataclasses import dataclass
from typing import Final

from billingd.domain.events import Event

PAGE_SIZE: Final = 100
"""How many items are asked for; Amplify may put fewer on a page."""


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """An event and its number in the feed. Numbers grow, with gaps."""

    sequence: int
    event: Event


@dataclass(frozen=True, slots=True)
class FeedPage:
    """One page, the lowest number first.

    `unread` are items that say nothing we understand: their number, if they have one, and why. `highest` is
    the highest number on the page, whether its item was understood or not; `last`: it brought none that is
    higher than where it was asked for, so that nothing is behind it.
    `topic_ids` are the topics that the items name: a name may be used again.
    """

    events: tuple[FeedEvent, ...] = ()
    unread: tuple[tuple[int | None, str], ...] = ()
    highest: int | None = None
    last: bool = True
    topic_ids: frozenset[str] = frozenset()
