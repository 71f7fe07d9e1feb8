"""The watch-topic feed over plain HTTP (amplify.md 4.5)."""

from functools import partial

from aiohttp import web

from billingd.sandbox.amplify import listing, matching, rsql
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.resources import Resource
from billingd.sandbox.amplify.tenant import Tenant


class Feed:
    """Handler of `/events/management/{version}/watchtopics/{name}`."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._begins: dict[str, int] = {}
        tenant.journal.listeners.append(self._note_new_topic)

    def _note_new_topic(self, event: Event) -> None:
        if event.type == "ResourceCreated" and event.payload["kind"] == "WatchTopic":
            self._begins[event.payload["metadata"]["id"]] = event.sequence

    async def read(self, request: web.Request) -> web.Response:
        """Events of the topic since its making, oldest 410 when they are asked for after seven days."""
        topic = self._tenant.resources.find("WatchTopic", request.match_info["name"])
        version = request.match_info["version"]
        if topic is None or version not in ("v1", "v1alpha1"):
            raise Refused(404, "Unable to find resource")
        if version == "v1" and self._tenant.settings.versions != "both":
            raise Refused(404, "Unable to find resource type")
        kept, dropped = self._tenant.journal.kept()
        events = [event for event in kept if self._in_topic(event, topic)]
        if text := request.query.get("query"):
            node = rsql.parse(text)
            self._check_position(node, max(dropped, 0), topic)
            events = [each for each in events if matching.matches(node, partial(_sequence, each))]
        order = listing.sort_of(request.query, frozenset({"sequenceID"}))
        if order is not None and order[1]:
            events.reverse()
        first, size = listing.page_of(request.query)
        return web.json_response([event.in_feed(topic, version) for event in events[first : first + size]])

    def _in_topic(self, event: Event, topic: Resource) -> bool:
        if event.sequence <= self._begins.get(topic.id, 0):
            return False
        return any(event.fires(each) for each in topic.body["spec"]["filters"])

    def _check_position(self, node: rsql.Node, dropped: int, topic: Resource) -> None:
        for field in rsql.fields(node):
            if field != "sequenceID":
                raise Refused(400, f"query: the feed cannot be filtered by '{field}'")
        if not isinstance(node, rsql.Compare) or node.operator not in ("gt", "ge"):
            return
        try:
            position = int(node.values[0])
        except ValueError as error:
            raise Refused(400, "query: sequenceID is a whole number") from error
        # what was dropped before the topic was made was never its own
        if position < dropped and dropped > self._begins.get(topic.id, 0):
            highest = str(self._tenant.journal.sequence)
            raise Refused(410, "The position is no longer kept", headers={"X-Axway-Max-Sequence-Id": highest})


def _sequence(event: Event, _field: str) -> list[int]:
    return [event.sequence]
