"""The watch-topic feed: recorded answers, and the sandbox's own."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from amplify_bench import CENTRAL, Bench, a_bench, sample
from structlog.testing import capture_logs

from billingd.adapters.amplify import Amplify
from billingd.domain.errors import Gone, Misconfigured, NotFound, Permanent, Retryable
from billingd.sandbox.clock import ManualClock
from billingd.sandbox.server import WORLD, build
from billingd.sandbox.world import World

V1 = f"{CENTRAL}/events/management/v1/watchtopics/billingd"
ALPHA = f"{CENTRAL}/events/management/v1alpha1/watchtopics/billingd"
MISSING = sample("not_found.json")


def item(sequence: Any, **changes: Any) -> dict[str, Any]:
    """An item as amplify.md 4.5 shows one."""
    return {
        "id": f"e{sequence}",
        "time": "2026-03-02 11:00:02.417551",
        "version": "v1",
        "product": "AmplifyCentral",
        "correlationId": "c1",
        "organization": {"id": "100000000000001"},
        "type": "SubResourceUpdated",
        "payload": {
            "group": "catalog",
            "kind": "Subscription",
            "name": "weather-pro-acme",
            "attributes": {},
            "tags": [],
            "finalizers": None,
            "metadata": {
                "id": "8ac9dd00",
                "selfLink": "/catalog/v1/subscriptions/weather-pro-acme",
                "references": [{"kind": "ProductPlan", "id": "8ac9aa00", "type": "HARD"}],
            },
        },
        "metadata": {
            "watchTopicID": "8ac9ff00",
            "watchTopicSelfLink": "/management/v1/watchtopics/billingd",
            "sequenceID": sequence,
            "subresource": "approval",
        },
    } | changes


def the_query(bench: Bench, number: int = 0) -> dict[str, list[str]]:
    """The query of a GET."""
    asked = [url for way, url, _ in bench.asked if way == "GET"]
    return parse_qs(urlsplit(asked[number]).query)


async def test_a_page_is_asked_for_as_the_sdk_does_and_read_whole() -> None:
    """Behind a position, the lowest first; how many items a page has at most is Amplify's to say."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", json.dumps([item(41209), item(41207)]))
        page = await bench.amplify.read_feed("billingd", 41200)
        assert the_query(bench) == {
            "query": ["sequenceID>41200"],
            "sort": ["sequenceID,ASC"],
            "page": ["1"],
            "pageSize": ["100"],
        }
        assert [one.sequence for one in page.events] == [41207, 41209]
        assert (page.events[0].event.kind, page.events[0].event.subresource) == ("Subscription", "approval")
        assert (page.highest, page.last, page.unread) == (41209, False, ())
        assert page.topic_ids == {"8ac9ff00"}


async def test_a_full_page_is_not_the_last() -> None:
    """A hundred items, read or not."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", json.dumps([item(number) for number in range(1, 100)] + ["odd"]))
        page = await bench.amplify.read_feed("billingd", 0)
        assert (len(page.events), page.highest, page.last) == (99, 99, False)
        assert "query" not in the_query(bench), "everything that is kept: no position can be too old"


@pytest.mark.parametrize(
    ("items", "last"),
    [
        ([], True),
        ([item(41199), item(41200)], True),  # a feed that does not heed the query
        ([item(None)], True),
        ([item(41201)], False),
        ([item(number) for number in range(41101, 41201)], False),
    ],
)
async def test_the_last_page_brings_nothing_higher(items: list[Any], last: bool) -> None:
    """A full one that brings nothing higher is none: then the feed is not read as it should be."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", json.dumps(items))
        assert (await bench.amplify.read_feed("billingd", 41200)).last is last


async def test_what_cannot_be_read_is_named_and_its_number_counts() -> None:
    """No event, an unknown type, no number at all."""
    odd = [item(1), item(2, payload=None), item(3, type="ResourceEaten"), item(None), 7, None, item("4")]
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", json.dumps(odd))
        page = await bench.amplify.read_feed("billingd", 0)
        assert [one.sequence for one in page.events] == [1, 4]
        assert [number for number, _ in page.unread] == [2, 3, None, None, None]
        assert page.highest == 4


@pytest.mark.parametrize(
    ("header", "highest"),
    [("41999", 41999), (None, None), ("soon", None), ("-1", None), ("9" * 30, None)],
)
async def test_410_is_gone_with_the_highest_number_if_it_is_one(
    header: str | None, highest: int | None
) -> None:
    """The error of its own that begins the feed anew."""
    headers = None if header is None else {"X-Axway-Max-Sequence-Id": header}
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", b'{"errors": [{"detail": "too old"}]}', status=410, headers=headers)
        with pytest.raises(Gone, match="too old") as caught:
            await bench.amplify.read_feed("billingd", 5)
        assert caught.value.max_sequence == highest


async def test_404_means_no_topic_once_both_versions_say_so() -> None:
    """Then it is asked for under both again, until it is there."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", MISSING, status=404, times=2)
        bench.answer("GET", f"{ALPHA}?*", MISSING, status=404)
        bench.answer("GET", f"{ALPHA}?*", b"[]", times=2)
        with pytest.raises(NotFound):
            await bench.amplify.read_feed("billingd", 5)
        with capture_logs() as logs:
            assert (await bench.amplify.read_feed("billingd", 5)).highest is None
            assert await bench.amplify.newest_position("billingd") is None
        assert [entry["event"] for entry in logs if entry["event"] != "amplify.call"] == [
            "amplify.version_fell_back"
        ]
        versions = [path.split("/")[3] for path in bench.paths()]
        assert versions == ["v1", "v1alpha1", "v1", "v1alpha1", "v1alpha1"]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b"<html>no such host</html>", Retryable),
        (200, b"{}", Permanent),
        (200, b"<html>", Retryable),
        (403, b"{}", Misconfigured),
        (503, b"", Retryable),
    ],
)
async def test_any_other_answer_is_an_error_by_its_class(status: int, body: bytes, error: type) -> None:
    """A gateway's 404 is no missing topic."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", body, status=status)
        bench.answer("GET", f"{ALPHA}?*", body, status=status)
        with pytest.raises(error) as caught:
            await bench.amplify.read_feed("billingd", 5)
        assert not isinstance(caught.value, NotFound | Gone)


async def test_the_newest_number() -> None:
    """One item, the highest; a page of them; none that are numbered is an error."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}?*", json.dumps([item(9)]))
        bench.answer("GET", f"{V1}?*", json.dumps([item(9), item(4), item(7)]))
        bench.answer("GET", f"{V1}?*", json.dumps([item(None)]))
        assert await bench.amplify.newest_position("billingd") == 9
        assert the_query(bench) == {"sort": ["sequenceID,DESC"], "pageSize": ["1"]}
        assert await bench.amplify.recent_positions("billingd") == (9, 7, 4)
        with pytest.raises(Permanent):
            await bench.amplify.newest_position("billingd")


# The sandbox


@pytest.fixture
async def far() -> AsyncIterator[tuple[Amplify, World]]:
    """An adapter in front of the sandbox, whose clock stands still."""
    clock = ManualClock()
    app = build(clock=clock)
    world = app[WORLD]
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        base = str(server.make_url("")).rstrip("/")
        amplify = Amplify(
            session,
            central_url=base,
            login_url=f"{base}/auth",
            platform_url=base,
            api_version="v1",
            organization_id=world.tenant.organization_id,
            client_id=world.tenant.tokens.client_id,
            client_secret=world.tenant.tokens.client_secret,
            timeout=timedelta(seconds=5),
            clock=clock.now,
        )
        yield amplify, world


@pytest.mark.parametrize("versions", ["both", "v1alpha1", "mixed"])
async def test_the_sandbox_feed_is_read(far: tuple[Amplify, World], versions: str) -> None:
    """Its ids are those of the webhooks; a quota's plan is told; a topic has an id, or is none."""
    amplify, world = far
    world.tenant.settings.configure(versions=versions)
    assert await amplify.newest_position("billingd") is None
    world.tenant.create("Product", {"name": "weather"})
    spec = {"product": "weather", "type": "free"}
    plan = world.tenant.create("ProductPlan", {"name": "basic", "spec": spec})
    quota = {"unit": "transactions", "pricing": {"type": "unlimited"}, "resources": []}
    world.tenant.create("Quota", {"name": "calls", "spec": quota}, scope=plan)
    world.tenant.delete(plan)
    page = await amplify.read_feed("billingd", 0)
    told = [(one.event.type, one.event.kind, one.event.scope_name) for one in page.events]
    assert told == [
        ("ResourceCreated", "Product", None),
        ("ResourceCreated", "ProductPlan", None),
        ("ResourceCreated", "Quota", "basic"),
        ("ResourceDeleted", "Quota", "basic"),
        ("ResourceDeleted", "ProductPlan", None),
    ]
    kept, _ = world.tenant.journal.kept()
    assert {one.event.id for one in page.events} <= {event.id for event in kept}
    assert page.highest == await amplify.newest_position("billingd")
    [topic] = world.tenant.resources.of_kind("WatchTopic")
    assert page.topic_ids == {topic.id} == {await amplify.find_watch_topic("billingd")}
    assert await amplify.find_watch_topic("other") is None
    with pytest.raises(NotFound):
        await amplify.read_feed("other", 0)


async def test_the_sandbox_forgets(far: tuple[Amplify, World]) -> None:
    """After seven days a position is gone; what is kept can still be read from the beginning."""
    amplify, world = far
    first = world.tenant.create("Product", {"name": "old"})
    world.clock.advance(timedelta(days=8))
    world.tenant.create("Product", {"name": "new"})
    with pytest.raises(Gone) as caught:
        await amplify.read_feed("billingd", 1)
    assert caught.value.max_sequence == await amplify.newest_position("billingd")
    page = await amplify.read_feed("billingd", 0)
    assert [one.event.name for one in page.events] == ["new"]
    assert first.id not in {one.event.resource_id for one in page.events}
