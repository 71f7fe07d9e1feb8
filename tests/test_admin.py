"""The admin listener: what it tells, what it refuses, and that nothing of it can be a web page's doing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp.test_utils import TestClient, TestServer
from linked import HOUR, TEN, link, subscription
from manual_clock import ManualClock

from billingd.admin.metrics import Metrics
from billingd.admin.server import AdminListener, Parts
from billingd.domain.attempts import Action, State, Verdict
from billingd.domain.usage import book
from billingd.domain.windows import Window
from billingd.loops import Progress
from billingd.store import held, outbox, usage
from billingd.store.engine import Store, StoreUnavailable
from billingd.store.held import Hold

SENT = {"X-Billingd": "1"}


@dataclass
class Side:
    """A far side as readiness sees it."""

    last_reached_at: datetime | None
    last_error: str | None = None


@dataclass
class Poller:
    """Records what was asked of it."""

    asked: list[Any] = field(default_factory=list)

    async def run_once(self) -> bool:
        self.asked.append("poll")
        return False

    async def read_range(self, since: datetime, until: datetime, *, subscription: str | None = None) -> int:
        self.asked.append((since, until, subscription))
        return 7


@dataclass
class Rig:
    """An admin listener on a real socket."""

    client: TestClient[Any, Any]
    store: Store
    clock: ManualClock
    sides: dict[str, Side]
    progress: Progress
    poller: Poller
    woken: asyncio.Event

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(path) as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.client.post(path, json=body or {}, headers=SENT) as answer:
            return answer.status, await answer.json()

    async def dead(self, *keys: str, error: str = "boom") -> list[int]:
        """Dead actions with these keys."""
        now = self.clock.now()
        async with self.store.write() as tx:
            await outbox.insert(tx, [Action("report_usage", key, key) for key in keys], now=now)
            leased = await outbox.claim(tx, now=now, lease=timedelta(minutes=1), limit=100)
            for one in leased:
                await outbox.settle(tx, one, Verdict(State.DEAD, now, error), now=now)
        return [one.id for one in leased]


@pytest.fixture
async def rig(store: Store, clock: ManualClock) -> AsyncIterator[Rig]:
    sides = {"Amplify": Side(clock.now()), "Recurly": Side(clock.now())}
    progress, poller, woken = Progress(), Poller(), asyncio.Event()
    listener = AdminListener(
        Parts(
            store=store,
            clock=clock,
            progress=progress,
            metrics=Metrics(),
            poller=poller,
            sides=dict(sides),
            source="metrics",
            webhooks=lambda: {"duplicates": 1, "rejected": 2},
            wake_outbox=woken.set,
        )
    )
    async with TestClient(TestServer(listener.application())) as client:
        yield Rig(client, store, clock, sides, progress, poller, woken)


async def test_the_status_document_has_the_keys_others_rely_on(rig: Rig) -> None:
    """Contract section 4, on an empty store."""
    status, document = await rig.get("/status")
    assert status == 200
    assert document["webhooks"] == {"accepted": 0, "duplicates": 1, "rejected": 2}
    assert document["outbox"] == {
        "pending": 0,
        "leased": 0,
        "dead": 0,
        "done": 0,
        "discarded": 0,
        "oldest_pending_seconds": None,
    }
    assert document["traffic"] == {
        "source": "metrics",
        "watermark": None,
        "lag_seconds": None,
        "recorded_units": 0,
        "reported_units": 0,
        "unreported_units": 0,
        "unknown_outcomes": 0,
        "unlinked_units": 0,
    }
    assert document["held"] == {"plans": 0, "subscriptions": 0, "units": 0, "items": []}
    assert document["links"] == {"plans": 0, "subscriptions": 0}
    assert (document["ready"], document["reasons"]) == (True, [])


async def test_health_is_the_loops_progress(rig: Rig) -> None:
    """A loop that is overdue makes the process unhealthy, by name."""
    rig.progress.turned("traffic", rig.clock.now(), patience=timedelta(minutes=5))
    assert await rig.get("/healthz") == (200, {"healthy": True, "stuck": []})
    rig.clock.advance(timedelta(minutes=6))
    assert await rig.get("/healthz") == (503, {"healthy": False, "stuck": ["traffic"]})


async def test_readiness_names_the_far_side_that_is_away(rig: Rig) -> None:
    """Not reached lately, or failing now, is a reason; each in its own words."""
    assert (await rig.get("/readyz"))[0] == 200
    rig.sides["Recurly"].last_error = "connection refused"
    status, document = await rig.get("/readyz")
    assert status == 503
    assert document["reasons"] == ["Recurly was not reached lately: connection refused"]
    rig.sides["Recurly"].last_error = None
    rig.clock.advance(timedelta(minutes=4))
    _, document = await rig.get("/readyz")
    assert len(document["reasons"]) == 2
    assert (await rig.get("/status"))[1]["ready"] is False


async def test_a_store_that_cannot_be_written_is_not_ready(rig: Rig) -> None:
    """Reading may work on a full disk; webhooks would get 503, so /readyz says so until a write goes well."""
    with pytest.raises(StoreUnavailable):
        async with rig.store.write():
            raise sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
    status, document = await rig.get("/readyz")
    assert status == 503
    assert "disk is full" in document["reasons"][0]
    async with rig.store.write():
        pass
    assert (await rig.get("/readyz"))[0] == 200


async def test_metrics_carry_the_names_of_the_contract(rig: Rig) -> None:
    """Every name, and the numbers of the store."""
    await rig.dead("a", "b")
    async with rig.client.get("/metrics") as answer:
        text = await answer.text()
        assert answer.content_type == "text/plain"
    for line in (
        'billingd_outbox_actions{kind="report_usage",state="dead"} 2.0',
        'billingd_usage_units_total{stage="recorded"} 0.0',
        'billingd_usage_units_total{stage="reported"} 0.0',
        "billingd_usage_unreported_units 0.0",
        "billingd_unknown_outcomes 0.0",
        "billingd_traffic_lag_seconds 0.0",
        "billingd_outbox_oldest_pending_seconds 0.0",
        'billingd_build_info{version="0.1.0"} 1.0',
    ):
        assert line in text.splitlines()
    for name in (
        "billingd_webhook_events_total",
        "billingd_remote_requests_total",
        "billingd_remote_request_seconds",
    ):
        assert f"# TYPE {name}" in text


@pytest.mark.parametrize(
    "path", ["/outbox/replay", "/outbox/1/retry", "/outbox/1/discard", "/traffic/poll", "/held/1/release"]
)
@pytest.mark.parametrize(
    ("content_type", "headers"),
    [("text/plain", SENT), ("application/x-www-form-urlencoded", SENT), ("application/json", {})],
)
async def test_no_web_page_can_send_a_command(
    rig: Rig, path: str, content_type: str, headers: dict[str, str]
) -> None:
    """JSON content type and our header together are what a form or a simple request cannot send."""
    sent = headers | {"Content-Type": content_type}
    async with rig.client.post(path, data=b"{}", headers=sent) as answer:
        assert answer.status == 403
        assert (await answer.json())["error"]["code"] == "forbidden"
    assert rig.poller.asked == []


async def test_replay_takes_all_dead_or_what_is_chosen(rig: Rig) -> None:
    """By ids, by cause; an empty list of ids is nothing, not everything."""
    one, two = await rig.dead("a", "b", error="connection refused")
    [three] = await rig.dead("c", error="422 no")
    assert await rig.post("/outbox/replay", {"ids": []}) == (200, {"replayed": []})
    assert await rig.post("/outbox/replay", {"cause": "REFUSED", "ids": [one, three]}) == (
        200,
        {"replayed": [one]},
    )
    assert rig.woken.is_set()
    assert await rig.post("/outbox/replay") == (200, {"replayed": [two, three]})


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/outbox/replay", {"ids": "1"}, "ids"),
        ("/outbox/replay", {"ids": [True]}, "ids"),
        ("/outbox/replay", {"kind": 3}, "kind"),
        ("/outbox/1/discard", {}, "reason"),
        ("/outbox/1/discard", {"reason": "  "}, "reason"),
        ("/traffic/backfill", {"since": "yesterday", "until": "2026-01-01T00:00:00Z"}, "since"),
        ("/traffic/backfill", {"since": "2026-01-01T00:00:00", "until": "2026-01-02T00:00:00Z"}, "zone"),
        ("/traffic/backfill", {"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "later"),
    ],
)
async def test_bad_input_names_the_field(rig: Rig, path: str, body: Any, says: str) -> None:
    """400, with the field and what it must be."""
    status, answer = await rig.post(path, body)
    assert status == 400
    assert says in answer["error"]["message"]


async def test_retry_and_discard_move_only_what_waits_or_is_dead(rig: Rig) -> None:
    """A second discard finds nothing; the reason is kept with the last error."""
    [one] = await rig.dead("a")
    assert (await rig.post(f"/outbox/{one}/retry"))[0] == 200
    assert (await rig.post(f"/outbox/{one}/discard", {"reason": "by hand"}))[0] == 200
    assert (await rig.post(f"/outbox/{one}/discard", {"reason": "by hand"}))[0] == 404
    assert (await rig.get(f"/outbox/{one}"))[1]["error"] == "discarded: by hand; last error: boom"
    assert (await rig.post("/outbox/99/retry"))[0] == 404
    assert (await rig.get("/outbox/99"))[0] == 404


async def test_listing_filters_and_refuses_an_unknown_state(rig: Rig) -> None:
    """States are checked, limits bounded."""
    await rig.dead("a", "b")
    _, listed = await rig.get("/outbox?state=dead&limit=1")
    assert [action["key"] for action in listed["actions"]] == ["a"]
    assert (await rig.get("/outbox?state=lost"))[0] == 400
    assert (await rig.get("/outbox?limit=100000"))[0] == 400


async def test_releasing_a_held_item_tries_its_action_again(rig: Rig) -> None:
    """The hold is closed and its action is in the outbox anew, once."""
    item = Hold(
        "plan_differs", "plan:x", "prices differ", Action("provision_plan", "plan:x", "", {"name": "x"})
    )
    async with rig.store.write() as tx:
        await held.add(tx, item, now=rig.clock.now())
    [listed] = (await rig.get("/held"))[1]["held"]
    assert (listed["kind"], listed["reason"]) == ("plan_differs", "prices differ")
    assert (await rig.post(f"/held/{listed['id']}/release"))[0] == 200
    assert (await rig.post(f"/held/{listed['id']}/release"))[0] == 404
    [action] = (await rig.get("/outbox?state=pending"))[1]["actions"]
    assert (action["kind"], action["args"]) == ("provision_plan", {"name": "x"})


async def test_releasing_what_waits_by_itself_only_ends_the_wait(rig: Rig) -> None:
    """However often it is released, there is one action that looks again, and it is due now."""
    waits = Action("provision_plan", "plan:x", "k1", {"name": "x"})
    later = rig.clock.now() + timedelta(hours=1)
    async with rig.store.write() as tx:
        await outbox.insert(tx, [waits], now=later)
    for _ in range(2):
        async with rig.store.write() as tx:
            again = Action("provision_plan", "plan:x", "", {"name": "x"})
            await held.add(tx, Hold("plan_held", "plan:x", "held", again), now=rig.clock.now())
        [listed] = (await rig.get("/held"))[1]["held"]
        assert (await rig.post(f"/held/{listed['id']}/release"))[0] == 200
    [action] = (await rig.get("/outbox?state=pending"))[1]["actions"]
    assert action["key"] == "k1"
    assert datetime.fromisoformat(action["due_at"]) == rig.clock.now()


async def test_poll_and_backfill_reach_the_poller(rig: Rig) -> None:
    """Times arrive aware, the subscription too."""
    assert await rig.post("/traffic/poll") == (200, {"polled": True})
    body = {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T01:00:00+01:00", "subscription": "s"}
    assert await rig.post("/traffic/backfill", body) == (200, {"booked_units": 7})
    assert rig.poller.asked[0] == "poll"
    since, until, subscription = rig.poller.asked[1]
    assert (until - since, subscription) == (timedelta(days=1), "s")


async def test_the_page_escapes_and_may_not_be_framed(rig: Rig) -> None:
    """What a far side said is text on the page, never markup."""
    await rig.dead("a", error="<script>alert(1)</script>")
    async with rig.client.get("/") as answer:
        text = await answer.text()
        policy = answer.headers["Content-Security-Policy"]
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy


async def test_errors_are_json(rig: Rig) -> None:
    """An unknown path and a wrong method too."""
    assert (await rig.get("/nowhere"))[0] == 404
    async with rig.client.put("/status", json={}) as answer:
        assert answer.status == 405
        assert (await answer.json())["error"]["code"] == "method_not_allowed"


async def test_the_units_of_a_discarded_report_are_held_and_can_be_released(rig: Rig) -> None:
    """Giving up on a report forgets nothing: its units show as held, until it is tried again."""
    now = rig.clock.now()
    await link(rig.store, subscription(), now=now)
    [record] = book("s1", "q1", Window(TEN, TEN + HOUR), read=5, recorded=0, revisions=0)
    async with rig.store.write() as tx:
        [(record_id, _)] = await usage.insert(tx, [record], now=now)
        await outbox.insert(tx, [Action("report_usage", "usage:s1:q1", "r", {"record": record_id})], now=now)
        [row] = await outbox.select(tx)
    assert (await rig.post(f"/outbox/{row['id']}/discard", {"reason": "billed by hand"}))[0] == 200
    [item] = (await rig.get("/held"))[1]["held"]
    assert (item["kind"], item["units"], item["subscription"]) == ("usage_discarded", 5, "s1")
    assert "billed by hand" in item["reason"]
    assert (await rig.get("/status"))[1]["traffic"]["unreported_units"] == 5
    async with rig.store.read() as tx:
        assert await usage.unreported_of(tx, "s1") == 0  # it no longer keeps its subscription from ending
    assert (await rig.post(f"/held/{item['id']}/release"))[0] == 200
    [again] = (await rig.get("/outbox?state=pending"))[1]["actions"]
    assert (again["kind"], again["args"]) == ("report_usage", {"record": record_id})
    async with rig.store.read() as tx:
        assert await usage.unreported_of(tx, "s1") == 1


async def test_a_discarded_end_is_held_for_the_subscription_goes_on_being_billed(rig: Rig) -> None:
    """Nothing else would ever ask for it again."""
    now = rig.clock.now()
    async with rig.store.write() as tx:
        await outbox.insert(tx, [Action("end_subscription", "end:s1", "e", {"id": "s1"})], now=now)
        [row] = await outbox.select(tx)
    assert (await rig.post(f"/outbox/{row['id']}/discard", {"reason": "ended by hand"}))[0] == 200
    [item] = (await rig.get("/held"))[1]["held"]
    assert (item["kind"], item["subscription"]) == ("end_discarded", "s1")
    assert (await rig.post(f"/held/{item['id']}/release"))[0] == 200
    [again] = (await rig.get("/outbox?state=pending"))[1]["actions"]
    assert (again["kind"], again["args"]) == ("end_subscription", {"id": "s1"})
