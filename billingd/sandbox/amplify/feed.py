"""The watch-topic feed over plain HTTP (amplify.md 4.5)."""

from datetime import timedelta
from functools import partial

from aiohttp import web

from billingd.sandbox.amplify import listing, matching, rsql
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.tenant import Tenant


class Feed:
    """Handler of `/events/management/{version}/watchtopics/{name}`."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def read(self, request: web.Request) -> web.Response:
        """Events that the topic's filters selected since its making; 410 for those of seven days ago."""
        topic = self._tenant.resources.find("WatchTopic", request.match_info["name"])
        version = request.match_info["version"]
        if topic is None or version not in ("v1", "v1alpha1"):
            raise Refused(404, "Unable to find resource")
        if version == "v1" and self._tenant.settings.versions != "both":
            raise Refused(404, "Unable to find resource type")
        kept, dropped = self._tenant.journal.of_topic(topic)
        events = [event for event in kept if self._visible(event)]
        if text := request.query.get("query"):
            node = rsql.parse(text)
            self._check_position(node, dropped)
            events = [each for each in events if matching.matches(node, partial(_sequence, each))]
        order = listing.sort_of(request.query, frozenset({"sequenceID"}))
        if order is not None and order[1]:
            events.reverse()
        if self._tenant.settings.feed_repeats:
            events = [each for each in events for _ in range(2)]
        first, size = listing.page_of(request.query)
        return web.json_response([event.in_feed(topic, version) for event in events[first : first + size]])

    def _visible(self, event: Event) -> bool:
        """Every third event may show later than those behind it."""
        lag = timedelta(seconds=self._tenant.settings.feed_lag_seconds)
        return event.sequence % 3 != 0 or self._tenant.clock.now() >= event.at + lag

    def _check_position(self, node: rsql.Node, dropped: int) -> None:
        for field in rsql.fields(node):
            if field != "sequenceID":
                raise Refused(400, f"query: the feed cannot be filtered by '{field}'")
        if not isinstance(node, rsql.Compare) or node.operator not in ("gt", "ge"):
            return
        try:
            position = int(node.values[0])
        except ValueError as error:
            raise Refused(400, "query: sequenceID is a whole number") from error
        if position < dropped:
            highest = str(self._tenant.journal.sequence)
            raise Refused(410, "The position is no longer kept", headers={"X-Axway-Max-Sequence-Id": highest})


def _sequence(event: Event, _field: str) -> list[int]:
    return [event.sequence]
