"""What a person is told. A notice is an action of its own, so a failing one never holds back billing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from billingd.domain.attempts import Leased, State, Wait
from billingd.domain.catalog import Person
from billingd.domain.errors import Permanent, Retryable
from billingd.domain.notices import DIGEST, NOTIFY_PROVIDER
from billingd.loops import Clock
from billingd.store import outbox
from billingd.store.engine import Store
from billingd.wording import Wording

log = structlog.get_logger()

TOGETHER_MAX: Final = 25
"""Notices in one message: what is more goes into the next."""

GIVE_UP: Final = timedelta(days=3)
"""How long a notice is tried while its channel fails; then it is a dead letter."""

PAUSE_MIN: Final = timedelta(seconds=15)
PAUSE_MAX: Final = timedelta(minutes=10)
"""Between two tries: a tenth of the notice's age, within these."""


class People(Protocol):
    """Where addresses are looked up."""

    async def find_person(self, user_id: str) -> Person | None: ...


class Channels(Protocol):
    """What carries a notice: the provider's channels by name, and mail to a subscriber."""

    @property
    def names(self) -> Sequence[str]: ...

    async def tell(self, name: str, title: str, body: str) -> None: ...

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Notice:
    """A notice to the provider; `due_to` is what its log lines name when another's attempt sends it along."""

    args: Mapping[str, Any]
    due_to: Mapping[str, Any] = field(default_factory=dict)


class Notifier:
    """Handles the two kinds of notice."""

    def __init__(
        self, store: Store, clock: Clock, channels: Channels, people: People, wording: Wording
    ) -> None:
        self._store = store
        self._clock = clock
        self._channels = channels
        self._people = people
        self._wording = wording
        self._told: dict[int, set[str]] = {}
        """Channels that have had a notice which others still lack, also once it was given up: it may be
        retried. After a restart they may have it again.
        """
        self._failing: dict[str, str] = {}

    async def provider(self, action: Leased) -> Wait | None:
        """Tell the provider, and send along what waits behind it; each channel has each notice once.

        A channel that fails is tried again for three days, the others are left alone meanwhile.
        """
        if not self._channels.names:
            log.info("notice.nobody_to_tell", topic=_topic(action.args))
            return None
        async with self._store.read() as tx:
            rows = await outbox.select(
                tx,
                states=[State.PENDING],
                kind=NOTIFY_PROVIDER,
                subject=action.subject,
                limit=TOGETHER_MAX - 1,
            )
            known = await outbox.correlations(tx, rows)
            own = await outbox.find(tx, action.id)
        notices = {action.id: _Notice(action.args)}
        for row in rows:
            if row["id"] > action.id:
                due_to = {name: row[name] for name in ("attempt", "event_id")}
                due_to |= {"action": row["id"], "correlation": known.get(row["event_id"])}
                notices[row["id"]] = _Notice(row["args"], due_to)
        told = [await self._tell(name, notices) for name in self._channels.names]
        failures = [why for why in told if why is not None]
        await self._settle_others(notices, action.id)
        if not failures:
            self._told.pop(action.id, None)
            return None
        age = self._clock.now() - (self._clock.now() if own is None else own["created_at"])
        if age >= GIVE_UP:
            raise Permanent("; ".join(failures))
        return Wait(min(max(age / 10, PAUSE_MIN), PAUSE_MAX), "; ".join(failures))

    async def now(self, topic: str, facts: Mapping[str, Any]) -> bool:
        """Tell the provider something that cannot be stored first; whether anybody heard. Never raises."""
        title, body = self._wording.words(topic, facts)
        heard = False
        for name in self._channels.names:
            try:
                await self._channels.tell(name, title, body)
            except Retryable as error:
                log.warning("notice.not_sent", topic=topic, error=str(error))
            else:
                heard = True
        return heard

    async def subscriber(self, action: Leased) -> Wait | None:
        """Mail the subscriber. A missing address is normal: many are service accounts."""
        person = await self._people.find_person(action.args["user_id"])
        if person is None or person.email is None:
            log.info("notice.no_address", topic=_topic(action.args))
            return None
        name = person.name or "subscriber"
        if "facts" in action.args:
            title, body = self._wording.words(action.args["topic"], action.args["facts"] | {"name": name})
        else:  # of a billingd before 0.2
            title, body = action.args["title"], action.args["body"].replace("{name}", name)
        await self._channels.tell_subscriber(person.email, title, body)
        return None

    async def _tell(self, name: str, notices: Mapping[int, _Notice]) -> str | None:
        """Send a channel what it lacks of these notices; None, or why it took nothing."""
        lacking = {id_: one for id_, one in notices.items() if name not in self._told.get(id_, ())}
        if not lacking:
            return None
        words = []
        for one in lacking.values():
            title, body = self._wording.words(_topic(one.args), _facts(one.args))
            words.append({"topic": _topic(one.args), "title": title, "body": body})
        title, body = words[0]["title"], words[0]["body"]
        if len(words) > 1:
            title, body = self._wording.words(DIGEST, {"notices": words})
        try:
            await self._channels.tell(name, title, body)
        except Retryable as error:
            if self._failing.get(name) != str(error):
                log.warning("notice.held_up", channel=name, error=str(error))
            self._failing[name] = str(error)
            return str(error)
        if self._failing.pop(name, None) is not None:
            log.info("notice.channel_recovered", channel=name)
        for id_, one in lacking.items():
            log.info("notice.sent", channel=name, topic=_topic(one.args), **one.due_to)
            self._told.setdefault(id_, set()).add(name)
        return None

    async def _settle_others(self, notices: Mapping[int, _Notice], own: int) -> None:
        """What was sent along, to every channel, is done."""
        names = set(self._channels.names)
        done = [id_ for id_ in notices if id_ != own and names <= self._told.get(id_, set())]
        if not done:
            return
        async with self._store.write() as tx:
            await outbox.finish(tx, done, now=self._clock.now())
        for id_ in done:
            log.info("action.settled", state=State.DONE.value, error=None, **notices[id_].due_to)
            del self._told[id_]


def moment(at: datetime) -> str:
    """A time as notices have it."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _topic(args: Mapping[str, Any]) -> str:
    return str(args.get("topic", "notice"))


def _facts(args: Mapping[str, Any]) -> Mapping[str, Any]:
    if "facts" in args:
        return dict(args["facts"])
    return {"topic": _topic(args), "title": args["title"], "body": args["body"]}
