"""The watch-topic feed over plain HTTP (amplify.md 4.5)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import structlog

from billingd.adapters.amplify.answers import Call, Reply, detail_of, json_of
from billingd.adapters.amplify.catalog import ApiVersion
from billingd.adapters.amplify.encoding import Json, query_string, segment
from billingd.adapters.amplify.http import Http
from billingd.adapters.amplify.reader import dig
from billingd.domain.errors import Gone, Permanent, Rejected
from billingd.domain.events import parse_feed, sequence_of
from billingd.domain.feed import PAGE_SIZE, FeedEvent, FeedPage

log = structlog.get_logger(__name__)

OLDEST_FIRST: Final = "sequenceID,ASC"
NEWEST_FIRST: Final = "sequenceID,DESC"


class Feed:
    """Reads `{central}/events/management/{version}/watchtopics/{name}`."""

    def __init__(self, http: Http, central_url: str, api_version: ApiVersion) -> None:
        self._http = http
        self._base = f"{central_url.rstrip('/')}/events/management"
        self._candidates: tuple[ApiVersion, ApiVersion] = (
            api_version,
            "v1alpha1" if api_version == "v1" else "v1",
        )
        self._proved: ApiVersion | None = None

    async def newest(self, topic: str, size: int) -> tuple[int, ...]:
        """The newest numbers of a topic, the highest first; none when it keeps no event."""
        rows = await self._rows(topic, [("pageSize", str(size)), ("sort", NEWEST_FIRST)])
        found = [number for row in rows if (number := sequence_of(row)) is not None]
        if rows and not found:
            raise Permanent(f"Amplify's feed of watch topic {topic} does not number its events")
        return tuple(sorted(found, reverse=True))

    async def read(self, topic: str, after: int) -> FeedPage:
        """The first page behind a number; after 0: of all that is kept, with which no 410 is possible."""
        where = [("query", f"sequenceID>{after}")] if after else []
        page = [("page", "1"), ("pageSize", str(PAGE_SIZE))]
        rows = await self._rows(topic, [*where, ("sort", OLDEST_FIRST), *page])
        events: list[FeedEvent] = []
        unread: list[tuple[int | None, str]] = []
        for row in rows:
            try:
                events.append(FeedEvent(*parse_feed(row)))
            except Rejected as error:
                unread.append((sequence_of(row), str(error)))
        numbers = [number for row in rows if (number := sequence_of(row)) is not None]
        highest = max(numbers, default=None)
        named = (dig(row, "metadata.watchTopicID") for row in rows)
        return FeedPage(
            events=tuple(sorted(events, key=lambda one: one.sequence)),
            unread=tuple(unread),
            highest=highest,
            # how many items a page has at most is not known, so that a short one says nothing
            last=len(rows) < PAGE_SIZE and (highest is None or highest <= after),
            topic_ids=frozenset(one for one in named if isinstance(one, str)),
        )

    async def _rows(self, topic: str, params: Sequence[tuple[str, str]]) -> list[Json]:
        call, reply = await self._ask(topic, params)
        rows = json_of(call, reply)
        if not isinstance(rows, list):
            raise Permanent(f"Amplify's answer to {call.what} is not a list of events")
        return rows

    async def _ask(self, topic: str, params: Sequence[tuple[str, str]]) -> tuple[Call, Reply]:
        """Under the version that has answered before; else under each, for 404 may mean either."""
        for version in self._candidates if self._proved is None else (self._proved,):
            url = f"{self._base}/{version}/watchtopics/{segment(topic)}{query_string(params)}"
            call = Call("GET", url, f"reading the feed of watch topic {topic}", handles=frozenset({404, 410}))
            reply = await self._http.send(call)
            if reply.status != 404:
                break
        if reply.status == 404:
            self._proved = None
            raise self._http.error(replace(call, handles=frozenset()), reply)
        if self._proved is None and version != self._candidates[0]:
            log.info("amplify.version_fell_back", collection="events/watchtopics", version=version)
        self._proved = version
        if reply.status == 410:
            detail = detail_of(reply.body) or "no reason given"
            text = reply.headers.get("X-Axway-Max-Sequence-Id", "").strip()
            raise Gone(
                f"watch topic {topic} no longer keeps what is asked for: {detail} (HTTP 410)",
                max_sequence=int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None,
            )
        return call, reply
