"""What happened, in order: the source of webhook deliveries and of the watch-topic feed (amplify.md 4)."""

import uuid
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Final

from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.settings import FEED_DAYS
from billingd.sandbox.amplify.times import api_time, feed_time
from billingd.sandbox.clock import SandboxClock

TRIGGER: Final = {
    "ResourceCreated": "created",
    "ResourceUpdated": "updated",
    "SubResourceUpdated": "updated",
    "ResourceDeleted": "deleted",
}
"""A hook's trigger type for each event type (amplify.md 4.1)."""
_FEED_KEYS: Final = ("group", "apiVersion", "kind", "name", "title", "attributes", "tags", "owner")


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one resource; `payload` is the resource right after it."""

    id: str
    at: datetime
    sequence: int
    type: str
    payload: Json
    subresource: str | None
    scope: tuple[str, str] | None
    correlation_id: str
    organization_id: str
    topics: frozenset[str] = frozenset()
    """Ids of the watch topics whose filters selected it when it happened."""

    def envelope(self) -> Json:
        """What a webhook receives (amplify.md 4.1)."""
        return {
            "id": self.id,
            "time": api_time(self.at),
            "version": "v1",
            "product": "AmplifyCentral",
            "correlationId": self.correlation_id,
            "organization": {"id": self.organization_id},
            "type": self.type,
            "payload": self.payload,
            "metadata": {} if self.subresource is None else {"subresource": self.subresource},
        }

    def in_feed(self, topic: Resource, version: str) -> Json:
        """What a watch topic shows: no spec, no subresources, another time format (amplify.md 4.5)."""
        payload: dict[str, Any] = {key: self.payload[key] for key in _FEED_KEYS if key in self.payload}
        metadata = dict(self.payload["metadata"])
        if references := metadata.get("references"):
            metadata["references"] = [{**each, "type": each["type"].upper()} for each in references]
        return {
            **self.envelope(),
            "time": feed_time(self.at),
            "payload": {"attributes": {}, "tags": [], **payload, "finalizers": None, "metadata": metadata},
            "metadata": {
                "watchTopicID": topic.id,
                "watchTopicSelfLink": topic.link(version),
                "sequenceID": self.sequence,
                "subresource": self.subresource,
            },
        }

    def fires(self, trigger: Json) -> bool:
        """Whether a trigger or watch filter selects it; for a scoped kind it needs a scope (4.4)."""
        if (trigger["group"], trigger["kind"]) != (self.payload["group"], self.payload["kind"]):
            return False
        if TRIGGER[self.type] not in trigger["type"] or not fnmatchcase(
            self.payload["name"], trigger["name"]
        ):
            return False
        scope = trigger.get("scope")
        if self.scope is None or scope is None:
            return self.scope is None and scope is None
        kind, name = self.scope
        return bool(scope["kind"] == kind and fnmatchcase(name, scope["name"]))


class Journal:
    """Records events and hands each to its listeners; keeps them as long as the feed does."""

    def __init__(self, clock: SandboxClock, organization_id: str) -> None:
        self._clock = clock
        self._organization_id = organization_id
        self._events: deque[Event] = deque()
        self._count = 0
        self._dropped_sequence = 0
        self._dropped: dict[str, int] = {}
        self.sequence = 41_200
        self.topics: Callable[[], list[Resource]] = list
        self.version: Callable[[], str] = lambda: "v1"
        self.listeners: list[Callable[[Event], None]] = []

    def record(self, kind_of: str, resource: Resource, subresource: str | None = None) -> None:
        """Writes one event down and tells the listeners."""
        shown = deepcopy(resource.shown(self.version()))
        if kind_of == "ResourceDeleted":  # its content is documented nowhere: only what is certain
            kept = {
                key: shown["metadata"][key]
                for key in ("id", "selfLink", "scope", "references")
                if key in shown["metadata"]
            }
            shown = {**{key: shown[key] for key in ("group", "apiVersion", "kind", "name")}, "metadata": kept}
        self._count += 1
        self.sequence += 1 + self._count * 5 % 7  # grows, but is not contiguous (amplify.md 4.5)
        event = Event(
            id=str(uuid.uuid4()),
            at=self._clock.now(),
            sequence=self.sequence,
            type=kind_of,
            payload=shown,
            subresource=subresource,
            scope=None if resource.scope is None else (resource.scope.kind.name, resource.scope.name),
            correlation_id=str(uuid.uuid4()),
            organization_id=self._organization_id,
        )
        watching = [topic for topic in self.topics() if topic is not resource]
        selected = [
            topic.id for topic in watching if any(event.fires(each) for each in topic.body["spec"]["filters"])
        ]
        event = replace(event, topics=frozenset(selected))
        self._events.append(event)
        for listener in self.listeners:
            listener(event)

    def kept(self) -> tuple[list[Event], int]:
        """The events of the last seven days, and the highest sequence of those already dropped."""
        oldest = self._clock.now() - timedelta(days=FEED_DAYS)
        while self._events and self._events[0].at < oldest:
            dropped = self._events.popleft()
            self._dropped_sequence = dropped.sequence
            self._dropped.update(dict.fromkeys(dropped.topics, dropped.sequence))
        return list(self._events), self._dropped_sequence

    def of_topic(self, topic: Resource) -> tuple[list[Event], int]:
        """The same of what a watch topic selected."""
        kept, _ = self.kept()
        return [event for event in kept if topic.id in event.topics], self._dropped.get(topic.id, 0)
