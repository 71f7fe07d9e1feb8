"""Events: envelopes, sequences, webhook delivery and its faults, the watch-topic feed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from amplify_side import CATALOG, AmplifySide, amplify_side

from billingd.sandbox.amplify.hooks import Hook

FEED = "/events/management/v1/watchtopics/billingd"
MANAGEMENT = "/apis/management/v1"


@pytest.fixture
async def amplify() -> AsyncIterator[AmplifySide]:
    async with amplify_side() as side:
        yield side


class Receiver:
    """What a webhook got: (header value, envelope)."""

    def __init__(self) -> None:
        self.got: list[tuple[str | None, dict[str, Any]]] = []
        self.url = ""
        self.status = 202

    def steps(self) -> list[tuple[str, str, str | None]]:
        return [
            (each["type"], each["payload"]["kind"], each["metadata"].get("subresource"))
            for _, each in self.got
        ]


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    taken = Receiver()

    async def take(request: web.Request) -> web.Response:
        header = request.headers.get("Authorization") or request.query.get("key")
        taken.got.append((header, await request.json()))
        return web.Response(status=taken.status)

    app = web.Application()
    app.router.add_post("/hook", take)
    async with TestServer(app) as server:
        taken.url = str(server.make_url("/hook"))
        yield taken


async def test_a_new_subscription_comes_in_five_steps(amplify: AmplifySide) -> None:
    """created, status Pending, marketplace, approval pending, status Success; then approval and state."""
    async with receiver() as taken:
        plan = amplify.plan()
        amplify.webhooks.add(Hook(taken.url, {"Authorization": "Bearer s"}, frozenset({"Subscription"})))
        made = amplify.subscribe(plan)
        await amplify.webhooks.idle()
        updated = "SubResourceUpdated"
        assert sorted(taken.steps(), key=str) == sorted(
            [
                ("ResourceCreated", "Subscription", None),
                (updated, "Subscription", "status"),
                (updated, "Subscription", "marketplace"),
                (updated, "Subscription", "approval"),
                (updated, "Subscription", "status"),
            ],
            key=str,
        )
        approval = next(each for _, each in taken.got if each["metadata"].get("subresource") == "approval")
        assert approval["payload"]["approval"] == {"state": "pending"}
        assert approval["payload"]["status"]["level"] == "Pending"  # a picture of that moment
        assert approval["payload"]["metadata"]["id"] == made.id
        assert approval["organization"] == {"id": amplify.tenant.organization_id}
        taken.got.clear()
        body = {"approval": {"state": "approved"}}
        await amplify.json("PUT", f"{CATALOG}/subscriptions/acme/approval", body)
        await amplify.webhooks.idle()
        assert {step[2] for step in taken.steps()} == {"approval", "state"}  # own writes come back
        assert {header for header, _ in taken.got} == {"Bearer s"}


async def test_an_automatic_plan_approves_at_once(amplify: AmplifySide) -> None:
    """With approval automatic the subscription is approved and active from its first moment."""
    made = amplify.subscribe(amplify.plan(subscription={"approval": "automatic"}))
    assert (made.body["approval"]["state"], made.body["state"]["name"]) == ("approved", "active")


async def test_a_deletion_tells_only_what_is_certain(amplify: AmplifySide) -> None:
    """A ResourceDeleted payload has kind, name and id, but no spec."""
    async with receiver() as taken:
        plan = amplify.plan()
        amplify.subscribe(plan)
        amplify.webhooks.add(Hook(taken.url))
        amplify.tenant.delete(plan, asked=False)
        await amplify.webhooks.idle()
        assert {step[:2] for step in taken.steps()} == {
            ("ResourceDeleted", kind) for kind in ("ProductPlan", "Quota", "Subscription")
        }
        assert all("spec" not in each["payload"] for _, each in taken.got)
        assert plan.id in {each["payload"]["metadata"]["id"] for _, each in taken.got}


@pytest.mark.parametrize(
    ("faults", "arrived", "notes"),
    [
        ({}, 4, {""}),
        ({"drop_every": 2}, 2, {"", "dropped"}),
        ({"drop_every": 1}, 0, {"dropped"}),
        ({"duplicate": True}, 8, {""}),
        ({"reorder": True}, 4, {""}),
        ({"delay_seconds": 0.001}, 4, {""}),
    ],
)
async def test_deliveries_go_wrong_as_told(
    amplify: AmplifySide, faults: dict[str, Any], arrived: int, notes: set[str]
) -> None:
    """Dropped every nth, doubled, swapped, delayed; each try is kept with the status got back."""
    async with receiver() as taken:
        amplify.webhooks.add(Hook(taken.url, **faults))
        for number in range(4):
            amplify.tenant.create("Product", {"name": f"p{number}"})
        await amplify.webhooks.idle()
        assert len(taken.got) == arrived
        assert {each.note for each in amplify.webhooks.deliveries} == notes
        sent = [each for each in amplify.webhooks.deliveries if not each.note]
        assert {each.status for each in sent} <= {202}


async def test_a_failed_delivery_is_never_repeated(amplify: AmplifySide) -> None:
    """A 503 or a closed port ends the delivery."""
    async with receiver() as taken:
        taken.status = 503
        amplify.webhooks.add(Hook(taken.url))
        amplify.webhooks.add(Hook("http://127.0.0.1:1/closed"))
        amplify.tenant.create("Product", {"name": "p"})
        await amplify.webhooks.idle()
        assert len(taken.got) == 1
    assert sorted(each.status for each in amplify.webhooks.deliveries) == [0, 503]


@pytest.mark.parametrize(
    "location", [None, {"in": "header", "name": "Authorization"}, {"in": "query", "name": "key"}]
)
async def test_stored_hooks_deliver_with_their_secret(
    amplify: AmplifySide, location: dict[str, str] | None
) -> None:
    """ResourceHooks and Webhooks made over the API deliver; without the Secret, unauthenticated."""
    async with receiver() as taken:
        auth: dict[str, Any] = {"secret": {"name": "s", "key": "k"}}
        if location is not None:
            auth["location"] = location
        base = f"{MANAGEMENT}/integrations"
        trigger = {"group": "catalog", "kind": "ProductPlan", "name": "*", "type": ["updated", "deleted"]}
        bodies: list[tuple[str, dict[str, Any]]] = [
            (base, {"name": "billingd", "spec": {}}),
            (f"{base}/billingd/secrets", {"name": "s", "spec": {"data": {"k": "Bearer hush"}}}),
            (f"{base}/billingd/webhooks", {"name": "w", "spec": {"url": taken.url, "auth": auth}}),
            (
                f"{base}/billingd/resourcehooks",
                {"name": "r", "spec": {"triggers": [trigger], "webhooks": ["w"]}},
            ),
        ]
        for path, body in bodies:
            await amplify.json("POST", path, body, status=201)
        plan = amplify.plan()
        await amplify.webhooks.idle()
        assert taken.steps() == [("SubResourceUpdated", "ProductPlan", "state")]  # created is not triggered
        await amplify.json("DELETE", f"{base}/billingd/secrets/s", status=204)
        amplify.tenant.delete(plan, asked=False)
        await amplify.webhooks.idle()
        assert [header for header, _ in taken.got] == ["Bearer hush", None]


async def watch(amplify: AmplifySide) -> None:
    """Makes the topic for plans and quotas."""
    every = ["created", "updated", "deleted"]
    filters: list[dict[str, Any]] = [
        {"group": "catalog", "kind": "ProductPlan", "name": "*", "type": every},
        {
            "group": "catalog",
            "kind": "Quota",
            "name": "*",
            "type": every,
            "scope": {"kind": "ProductPlan", "name": "*"},
        },
    ]
    await amplify.json(
        "POST", f"{MANAGEMENT}/watchtopics", {"name": "billingd", "spec": {"filters": filters}}, status=201
    )


async def test_the_feed_shows_what_happened_since_its_making(amplify: AmplifySide) -> None:
    """Its own time format, upper-case references, no spec, growing sequence numbers with gaps."""
    amplify.plan("before")
    await watch(amplify)
    amplify.plan("after")
    events = await amplify.json("GET", f"{FEED}?query=sequenceID>0&sort=sequenceID,ASC")
    assert [(each["payload"]["name"], each["type"]) for each in events] == [
        ("after", "ResourceCreated"),
        ("calls", "ResourceCreated"),
        ("after", "SubResourceUpdated"),
    ]
    first = events[0]
    assert first["time"] == "2026-01-15 12:00:00.000000"
    assert first["metadata"]["subresource"] is None
    assert first["payload"]["metadata"]["references"][0]["type"] == "HARD"
    assert not {"spec", "state", "status"} & set(first["payload"])
    numbers = [each["metadata"]["sequenceID"] for each in events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] - numbers[0] > 2
    last = await amplify.json("GET", f"{FEED}?pageSize=1&sort=sequenceID,DESC")
    assert last[0]["metadata"]["sequenceID"] == numbers[-1]
    later = await amplify.json(
        "GET", f"{FEED}?query=sequenceID>{numbers[0]}&page=2&pageSize=1&sort=sequenceID,ASC"
    )
    assert [each["metadata"]["sequenceID"] for each in later] == numbers[2:]


async def test_the_feed_forgets_after_seven_days(amplify: AmplifySide) -> None:
    """A position older than the retention is 410 with X-Axway-Max-Sequence-Id, from which one may go on."""
    await watch(amplify)
    amplify.plan("old")
    (first, *_) = await amplify.json("GET", f"{FEED}?sort=sequenceID,ASC")
    amplify.clock.advance(timedelta(days=8))
    await amplify.log_in()
    amplify.plan("new")
    position = first["metadata"]["sequenceID"]
    answer = await amplify.call("GET", f"{FEED}?query=sequenceID>{position}&sort=sequenceID,ASC")
    assert answer.status == 410
    highest = answer.headers["X-Axway-Max-Sequence-Id"]
    assert await amplify.json("GET", f"{FEED}?query=sequenceID>{highest}&sort=sequenceID,ASC") == []
    kept = await amplify.json("GET", f"{FEED}?sort=sequenceID,ASC")
    assert {each["payload"]["name"] for each in kept} == {"new", "calls"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/events/management/v1/watchtopics/other", 404),
        (f"{FEED}?query=sequence>=1", 400),
        (f"{FEED}?sort=time,ASC", 400),
        (f"{FEED}?pageSize=1000", 400),
    ],
)
async def test_the_feed_refuses(amplify: AmplifySide, path: str, status: int) -> None:
    """Unknown topics, fields and page sizes."""
    await watch(amplify)
    await amplify.json("GET", path, status=status)


async def test_the_feed_shows_some_events_late(amplify: AmplifySide) -> None:
    """A lower sequence number may become visible after a higher one."""
    await watch(amplify)
    amplify.tenant.settings.configure(feed_lag_seconds=60)
    for number in range(6):
        amplify.plan(f"p{number}", active=False)
    path = f"{FEED}?query=sequenceID>0&sort=sequenceID,ASC&pageSize=100"
    at_once = [each["metadata"]["sequenceID"] for each in await amplify.json("GET", path)]
    amplify.clock.advance(timedelta(seconds=60))
    later = [each["metadata"]["sequenceID"] for each in await amplify.json("GET", path)]
    assert later == sorted(later)
    hidden = set(later) - set(at_once)
    assert hidden
    assert min(hidden) < max(at_once)


async def test_the_feed_may_show_an_event_twice(amplify: AmplifySide) -> None:
    """Under the same id and number, also across pages."""
    await watch(amplify)
    amplify.tenant.settings.configure(feed_repeats=True)
    amplify.plan(active=False)
    events = await amplify.json("GET", f"{FEED}?sort=sequenceID,ASC&pageSize=3")
    assert [each["payload"]["kind"] for each in events] == ["ProductPlan", "ProductPlan", "Quota"]
    assert events[0] == events[1]


async def test_a_topic_shows_what_its_filters_selected_when_it_happened(amplify: AmplifySide) -> None:
    """A filter added later brings nothing back; a topic made anew knows nothing of the one before."""
    await watch(amplify)
    amplify.tenant.create("Product", {"name": "unwatched"})
    amplify.plan("first", active=False)
    [topic] = amplify.tenant.resources.of_kind("WatchTopic")
    product = {"group": "catalog", "kind": "Product", "name": "*", "type": ["created"]}
    shown = topic.shown("v1")
    filters = [*shown["spec"]["filters"], product]
    amplify.tenant.replace(topic, {**shown, "spec": {**shown["spec"], "filters": filters}})
    amplify.tenant.create("Product", {"name": "watched"})
    events = await amplify.json("GET", f"{FEED}?sort=sequenceID,ASC")
    assert [each["payload"]["name"] for each in events] == ["first", "calls", "watched"]
    amplify.tenant.delete(topic)
    await watch(amplify)
    assert await amplify.json("GET", f"{FEED}?query=sequenceID>1&sort=sequenceID,ASC") == []
