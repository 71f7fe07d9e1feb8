"""Notices to people, as actions: each is told once, and none holds back billing.

A notice says what it is about (its topic) and the facts; the words are chosen when it is sent, so that an
operator's template counts for what waits as well. What goes on for a while (a trouble) is told when it
begins, when it grows, and when it is over: never at each failure.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from billingd.domain.attempts import Action

NOTIFY_PROVIDER: Final = "notify_provider"
NOTIFY_SUBSCRIBER: Final = "notify_subscriber"

PROVIDER_SUBJECT: Final = "notices:provider"
"""All of them have one subject: they are sent one after the other, and who waits is sent along."""

PLAIN: Final = "notice"
DIGEST: Final = "digest"
"""Templates: of a notice whose topic has none of its own, and of several notices in one message."""

DEAD_LETTERS: Final = "dead_letters"
FAR_SIDE: Final = "far_side"
STORE: Final = "store"
LOOPS: Final = "loops"
HELD: Final = "held"
"""Troubles. Their topics are these words with what happened: `dead_letters_begun`, `far_side_over`, …"""

AGAIN_AFTER: Final = timedelta(hours=1)
"""A trouble that grows is told again this long after it was told at the earliest."""

CAUSE_LENGTH_MAX: Final = 160


def topic_of(key: str) -> str:
    """What a notice is about, by the key it has: `plan-linked:8ac9…` is about `plan_linked`."""
    return key.partition(":")[0].replace("-", "_")


def provider_notice(key: str, title: str, body: str) -> Action:
    """Tell the provider something once: the key is unique for ever, and so is the notice."""
    args = {"topic": topic_of(key), "title": title, "body": body}
    return Action(NOTIFY_PROVIDER, PROVIDER_SUBJECT, f"{NOTIFY_PROVIDER}:{key}", args)


def subscriber_notice(key: str, user_id: str, facts: Mapping[str, str]) -> Action:
    """Mail somebody at Amplify once, if they have an address; the words are the topic's template."""
    return Action(
        NOTIFY_SUBSCRIBER,
        f"notice:{key}",
        f"{NOTIFY_SUBSCRIBER}:{key}",
        {"topic": topic_of(key), "user_id": user_id, "facts": dict(facts)},
    )


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that goes on now. `size` grows while it gets worse; `facts` are for the template."""

    name: str
    about: str = ""
    size: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """The name under which it is remembered."""
        return f"trouble:{self.name}:{self.about}"[:40]


@dataclass(frozen=True, slots=True)
class Standing:
    """A trouble as it is remembered: since when, whether and when it was told, how large it was then."""

    since: datetime
    told_at: datetime | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be remembered now (None: nothing is left of it), and what to tell: begun | grown | over."""

    standing: Standing | None
    tell: str | None = None


def next_step(trouble: Trouble | None, known: Standing | None, *, now: datetime, patience: timedelta) -> Step:
    """What follows from how things are and what is remembered.

    A trouble is told once it has lasted for `patience`; one that nobody was told of is over in silence.
    """
    if trouble is None:
        return Step(None, None if known is None or known.told_at is None else "over")
    if known is None:
        known = Standing(now)
    if known.told_at is None:
        if now - known.since < patience:
            return Step(known)
        return Step(Standing(known.since, now, trouble.size), "begun")
    if trouble.size > known.size and now - known.told_at >= AGAIN_AFTER:
        return Step(Standing(known.since, now, trouble.size), "grown")
    return Step(known)


def trouble_notice(name: str, about: str, what: str, facts: Mapping[str, Any], *, now: datetime) -> Action:
    """Tell the provider of a trouble: that it has begun, has grown, or is over."""
    topic = f"{name}_{'over' if what == 'over' else 'begun'}"
    key = f"{topic}:{about}:{now.isoformat()}"
    args = {"topic": topic, "facts": dict(facts) | {"grown": what == "grown"}}
    return Action(NOTIFY_PROVIDER, PROVIDER_SUBJECT, f"{NOTIFY_PROVIDER}:{key}", args)


_NUMBERED: Final = re.compile(r"\b(?=[\w-]*\d)[\w-]{4,}\b")
_REQUEST: Final = re.compile(r"\s*\[request [^\]]*\]")


def cause_of(error: str | None) -> str:
    """An error without what differs from one action to the next (ids, amounts, requests)."""
    text = _NUMBERED.sub("…", _REQUEST.sub("", (error or "no error was kept").splitlines()[0]))
    return text if len(text) <= CAUSE_LENGTH_MAX else text[: CAUSE_LENGTH_MAX - 1] + "…"


def grouped(dead: Iterable[tuple[str, str | None]], *, at_most: int = 12) -> list[dict[str, Any]]:
    """Dead letters (kind, error) by kind and cause, most of them first; the rest is one group of its own."""
    counts = Counter((kind, cause_of(error)) for kind, error in dead)
    groups: list[dict[str, Any]] = [
        {"kind": kind, "cause": cause, "count": count}
        for (kind, cause), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    rest = sum(group["count"] for group in groups[at_most:])
    if rest:
        groups[at_most:] = [{"kind": "others", "cause": "see `billingd outbox list`", "count": rest}]
    return groups
