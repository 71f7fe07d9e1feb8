"""The admin listener: what it tells, what it refuses, and that nothing of it can be a web page's doing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp.test_utils import TestClient, TestServer
from linked import HOUR, TEN, link, subscription
from manual_clock import ManualClock
from reconciling import Reconciling
from rig import a_rig

from billingd.admin import operations
from billingd.admin.metrics import Metrics
from billingd.admin.server import AdminListener, Parts
from billingd.domain.attempts import Action, State, Verdict
from billingd.domain.periods import Period
from billingd.domain.usage import Booked, book
from billingd.domain.windows import Window
from billingd.loops import Progress
from billingd.store import held, outbox, periods, schema, usage
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

    async def told(self, *, dry_run: bool) -> dict[str, Any]:
        self.asked.append(f"resync, {dry_run=}")
        return {"dry_run": dry_run, "steps": [], "enqueued": 0, "warnings": []}


@dataclass
class Adopter:
    """Records what was asked of it."""

    poller: Poller

    async def told(self, since: datetime, *, dry_run: bool) -> dict[str, Any]:
        self.poller.asked.append(("adopt", since, dry_run))
        return {"dry_run": dry_run, "steps": [], "to_do": 0, "problems": 0, "adopted": 0}


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

    async def record(
        self,
        units: int,
        *,
        ends: datetime,
        state: str = "recorded",
        reported: datetime | None = None,
        subscription: str = "s1",
    ) -> int:
        """A record of the window that ends there, whose time is a second before; its id."""
        window = Window(ends - HOUR, ends)
        async with self.store.write() as tx:
            known = (await usage.sums(tx, window.start, ends)).get((subscription, "q1"), {})
            booked = known.get(window, Booked(0, 0))
            reading = {window: units + booked.units}
            records = list(book(subscription, "q1", reading, {window: booked}, before=ends))
            [(record_id, _)] = await usage.insert(tx, records, now=self.clock.now(), state=state)
            if reported is not None:
                await usage.reported(tx, record_id, usage_id=f"u{record_id}", now=reported)
        return record_id

    async def sees(self, subscription: str, *known: Period, state: str = "active") -> None:
        """Recurly shows these periods, one after the other."""
        async with self.store.write() as tx:
            for period in known:
                await periods.seen(tx, subscription, state=state, current=period, now=self.clock.now())

    async def hold(self, item: Hold) -> bool:
        async with self.store.write() as tx:
            return await held.add(tx, item, now=self.clock.now())

    async def held(self) -> list[Any]:
        _, document = await self.get("/held")
        return list(document["held"])


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
            resync=poller,
            adoption=Adopter(poller),
            reconciler=Reconciling(),
        )
    )
    async with TestClient(TestServer(listener.application())) as client:
        yield Rig(client, store, clock, sides, progress, poller, woken)


async def test_the_status_document_has_the_keys_others_rely_on(rig: Rig) -> None:
    """Contract section 4, on an empty store."""
    status, document = await rig.get("/status")
    assert status == 200
    assert document["webhooks"] == {"accepted": 0, "duplicates": 1, "rejected": 2, "unauthorized": 0}
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
        "written_off_units": 0,
    }
    assert document["periods"] == {"open": 0, "incomplete": 0, "ends_next": None, "missed_units": 0}
    assert document["held"] == {"standing": 0, "plans": 0, "subscriptions": 0, "units": 0, "items": []}
    assert document["links"] == {"plans": 0, "subscriptions": 0}
    assert (document["ready"], document["reasons"]) == (True, [])


async def test_health_is_the_loops_progress(rig: Rig) -> None:
    """A loop that is overdue makes the process unhealthy, by name."""
    rig.progress.turned("traffic", rig.clock.now(), patience=timedelta(minutes=5))
    loops = {"traffic": {"turned_seconds_ago": 0.0, "may_take_seconds": 300.0}}
    assert await rig.get("/healthz") == (200, {"healthy": True, "stuck": [], "loops": loops})
    rig.clock.advance(timedelta(minutes=6))
    loops["traffic"]["turned_seconds_ago"] = 360.0
    assert await rig.get("/healthz") == (503, {"healthy": False, "stuck": ["traffic"], "loops": loops})


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
    "path",
    [
        *("/outbox/replay", "/outbox/1/retry", "/outbox/1/discard", "/traffic/poll"),
        *("/held/1/release", "/held/1/write-off"),
    ],
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
        ("/held/1/write-off", {}, "reason"),
        ("/held/1/write-off", {"reason": "  "}, "reason"),
        ("/held/1/write-off", {"reason": ["why"]}, "reason"),
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


async def test_a_resync_is_asked_for_with_or_without_acting(rig: Rig) -> None:
    """It acts unless told otherwise, and `dry_run` is no text."""
    assert (await rig.post("/resync"))[1]["dry_run"] is False
    assert (await rig.post("/resync", {"dry_run": True}))[1]["dry_run"] is True
    assert rig.poller.asked == ["resync, dry_run=False", "resync, dry_run=True"]
    status, document = await rig.post("/resync", {"dry_run": "no"})
    assert (status, document["error"]["code"]) == (400, "bad_request")
    assert len(rig.poller.asked) == 2


async def test_a_warning_is_in_the_document_and_on_the_page(rig: Rig) -> None:
    """What is held of one plan is none; what is held of a whole Marketplace is, escaped like all else."""
    await rig.hold(Hold("plan_refused", "plan:metered", "Only one plan."))
    await rig.hold(Hold("native_billing", "marketplace:m", "Market <b>M</b> bills by itself."))
    assert (await rig.get("/status"))[1]["warnings"] == ["Market <b>M</b> bills by itself."]
    async with rig.client.get("/") as answer:
        page = await answer.text()
    assert "<li><bdi>Market &lt;b&gt;M&lt;/b&gt; bills by itself.</bdi></li>" in page


async def test_poll_and_backfill_reach_the_poller(rig: Rig) -> None:
    """Times arrive aware, the subscription too."""
    assert await rig.post("/traffic/poll") == (200, {"polled": True})
    body = {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T01:00:00+01:00", "subscription": "s"}
    assert await rig.post("/traffic/backfill", body) == (200, {"booked_units": 7})
    assert rig.poller.asked[0] == "poll"
    since, until, subscription = rig.poller.asked[1]
    assert (until - since, subscription) == (timedelta(days=1), "s")


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
    record_id = await rig.record(5, ends=TEN + HOUR)
    async with rig.store.write() as tx:
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


SECOND = timedelta(seconds=1)
FIRST = Period(TEN, TEN + 10 * HOUR)
BEFORE = Period(TEN + 10 * HOUR, TEN + 20 * HOUR)
NOW = Period(TEN + 20 * HOUR, TEN + 30 * HOUR)


async def a_life(rig: Rig) -> None:
    """Of one subscription in its third period, with units of every sort, each a power of two."""
    await link(rig.store, subscription("s1"), now=TEN)
    await rig.sees("s1", FIRST, BEFORE, NOW)
    end = BEFORE.ends_at
    await rig.record(1, ends=FIRST.ends_at, state="held")
    await rig.record(2, ends=end, reported=end - SECOND)
    await rig.record(4, ends=end, reported=end)
    await rig.record(8, ends=end - HOUR, reported=end + HOUR)
    await rig.record(16, ends=end - HOUR, state="held")
    await rig.record(32, ends=FIRST.ends_at + SECOND, state="written_off")
    await rig.record(64, ends=end)
    await rig.record(128, ends=end + HOUR, reported=end + HOUR)
    await rig.record(256, ends=end + 2 * HOUR)
    await rig.record(512, ends=end + 2 * HOUR, state="held")
    await rig.record(1024, ends=end + 3 * HOUR, state="written_off")
    await rig.record(2048, ends=end + SECOND)
    rig.clock.advance(TEN + 25 * HOUR - rig.clock.now())


async def of_subscriptions(rig: Rig) -> dict[str, Any]:
    _, document = await rig.get("/subscriptions")
    return {row["subscription"]: row for row in document["subscriptions"]}


async def test_periods_say_what_their_invoice_has_and_what_misses_it(rig: Rig) -> None:
    """A record belongs to the period of its time: its first second counts, its end is the next one's."""
    await a_life(rig)
    row = (await of_subscriptions(rig))["s1"]
    assert row["billed_state"] == "active"
    assert row["period"] == {
        "started_at": "2026-03-03T06:00:00Z",
        "ends_at": "2026-03-03T16:00:00Z",
        "trial": False,
        "recorded_units": 128 + 256 + 512 + 1024 + 2048,
        "reported_units": 128,
        "unreported_units": 256 + 2048,
        "held_units": 512,
        "complete": False,
    }
    assert row["last_period"] == {
        "started_at": "2026-03-02T20:00:00Z",
        "ends_at": "2026-03-03T06:00:00Z",
        "trial": False,
        "units": 2 + 4 + 8 + 16 + 32 + 64,
        "corrected_units": 4 + 8,
        "missed_units": 16 + 64,
        "complete": False,
    }
    summary = {"open": 1, "incomplete": 1, "ends_next": "2026-03-03T16:00:00Z", "missed_units": 80}
    assert (await rig.get("/status"))[1]["periods"] == summary
    async with rig.client.get("/metrics") as answer:
        assert "billingd_period_missed_units 80.0" in (await answer.text()).splitlines()


@pytest.mark.parametrize("ends", ["its time", "expired", "failed"])
async def test_a_period_is_over_by_its_end_or_with_its_subscription(rig: Rig, ends: str) -> None:
    """Until Recurly shows the next one there is none; what is not reported has missed the invoice."""
    await a_life(rig)
    if ends == "its time":
        rig.clock.advance(NOW.ends_at - SECOND - rig.clock.now())
        assert (await of_subscriptions(rig))["s1"]["period"] is not None
        rig.clock.advance(SECOND)
    else:
        await rig.sees("s1", NOW, state=ends)
    row = (await of_subscriptions(rig))["s1"]
    assert row["period"] is None
    assert row["last_period"]["ends_at"] == "2026-03-03T16:00:00Z"
    missed = row["last_period"]["missed_units"]
    assert (row["last_period"]["corrected_units"], missed) == (0, 256 + 512 + 2048)
    summary = {"open": 0, "incomplete": 0, "ends_next": None, "missed_units": missed}
    assert (await rig.get("/status"))[1]["periods"] == summary


async def test_complete_periods_trials_and_unknown_ones(rig: Rig) -> None:
    """What was written off waits for nobody; no invoice follows a trial; a cancelled one runs to its end."""
    names = ("complete", "corrected", "empty", "held", "trial", "unknown")
    await link(rig.store, *(subscription(name) for name in names), now=TEN)
    await rig.sees("complete", BEFORE, NOW, state="canceled")
    await rig.record(5, ends=BEFORE.ends_at, reported=BEFORE.ends_at - SECOND, subscription="complete")
    await rig.record(6, ends=NOW.ends_at - HOUR, reported=NOW.ends_at, subscription="complete")
    await rig.record(7, ends=NOW.ends_at - HOUR, state="written_off", subscription="complete")
    await rig.sees("corrected", BEFORE, NOW)
    await rig.record(5, ends=BEFORE.ends_at, reported=BEFORE.ends_at + HOUR, subscription="corrected")
    await rig.sees("empty", NOW)
    await rig.sees("held", Period(NOW.started_at, NOW.ends_at + HOUR))
    await rig.record(8, ends=NOW.ends_at, state="held", subscription="held")
    await rig.sees("trial", Period(BEFORE.started_at, BEFORE.ends_at, trial=True), NOW)
    await rig.record(9, ends=BEFORE.ends_at, subscription="trial")
    await rig.record(10, ends=BEFORE.ends_at, subscription="unknown")
    rig.clock.advance(TEN + 25 * HOUR - rig.clock.now())
    rows = await of_subscriptions(rig)
    current = {name: row["period"] and row["period"]["complete"] for name, row in rows.items()}
    assert current == {
        **dict.fromkeys(("complete", "corrected", "empty", "trial"), True),
        "held": False,
        "unknown": None,
    }
    last = {name: row["last_period"] and row["last_period"]["complete"] for name, row in rows.items()}
    assert last == {
        "complete": True,
        "corrected": False,
        "trial": False,
        **dict.fromkeys(("empty", "held", "unknown")),
    }
    assert rows["complete"]["period"]["recorded_units"] == 13
    assert rows["trial"]["last_period"]["trial"] is True
    summary = {"open": 5, "incomplete": 1, "ends_next": "2026-03-03T16:00:00Z", "missed_units": 0}
    assert (await rig.get("/status"))[1]["periods"] == summary


async def test_a_period_cut_short_keeps_its_records_apart(rig: Rig) -> None:
    """A bill date that was moved ends one period where the next begins."""
    await link(rig.store, subscription("s1"), now=TEN)
    await rig.sees("s1", BEFORE)
    await rig.record(1, ends=BEFORE.started_at + 2 * HOUR)
    await rig.record(2, ends=BEFORE.started_at + 4 * HOUR)
    await rig.sees("s1", Period(BEFORE.started_at + 3 * HOUR, NOW.ends_at))
    rig.clock.advance(BEFORE.started_at + 5 * HOUR - rig.clock.now())
    row = (await of_subscriptions(rig))["s1"]
    assert (row["last_period"]["missed_units"], row["period"]["unreported_units"]) == (1, 2)


async def test_the_period_before_is_over_when_a_later_one_is_known(rig: Rig) -> None:
    """Whatever our own clock says: Recurly's decides, and may be ahead."""
    await a_life(rig)
    rig.clock.advance(BEFORE.ends_at - SECOND - rig.clock.now())
    row = (await of_subscriptions(rig))["s1"]
    assert row["period"]["ends_at"] == "2026-03-03T16:00:00Z"
    assert row["last_period"]["ends_at"] == "2026-03-03T06:00:00Z"


async def test_subscriptions_are_told_with_as_many_statements_as_one(rig: Rig) -> None:
    """However many there are."""
    asked: list[str] = []
    engine = rig.store._reader.sync_engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            asked.append(statement)

    await link(rig.store, subscription("s0"), now=TEN)
    await rig.sees("s0", NOW)
    for path in ("/status", "/subscriptions"):
        asked.clear()
        await rig.get(path)
        with_one = len(asked)
        assert with_one > 0
        names = [f"{path}:{number}" for number in range(30)]
        await link(rig.store, *(subscription(name) for name in names), now=TEN)
        for name in names:
            await rig.sees(name, BEFORE, NOW)
            await rig.record(3, ends=NOW.ends_at, subscription=name)
        asked.clear()
        await rig.get(path)
        assert len(asked) == with_one
    sa.event.remove(engine, "before_cursor_execute", count)


def usage_item(record_id: int, units: int = 5) -> Hold:
    again = Action("report_usage", "usage:s1:q1", "", {"record": record_id, "released": True})
    return Hold("late_usage", f"usage:{record_id}", "late", again, "s1", "amplify-quota-q1", units)


async def test_written_off_usage_is_never_sent_and_still_counted(rig: Rig) -> None:
    """The record stays in the ledger, so that no later reading books it anew; its item is closed."""
    await link(rig.store, subscription("s1"), now=TEN)
    record_id = await rig.record(5, ends=TEN + HOUR, state="held")
    await rig.hold(usage_item(record_id))
    [item] = await rig.held()
    path = f"/held/{item['id']}"
    assert await rig.post(f"{path}/write-off", {"reason": "tiny"}) == (200, {"written_off": item["id"]})
    assert await rig.held() == []
    traffic = (await rig.get("/status"))[1]["traffic"]
    assert [traffic[f"{name}_units"] for name in ("recorded", "reported", "written_off")] == [5, 0, 5]
    assert (await rig.get("/outbox"))[1]["actions"] == []
    for act in ("write-off", "release"):
        assert (await rig.post(f"{path}/{act}", {"reason": "again"}))[0] == 404
    async with rig.store.read() as tx:
        row = await held.find(tx, item["id"])
        assert row is not None
        assert (row["resolution"], row["closed_at"]) == ("written off: tiny", rig.clock.now())
        assert (await usage.find(tx, record_id)).state == "written_off"
        assert await usage.unreported_of(tx, "s1") == 0


async def test_what_recurly_took_after_all_is_reported_and_not_written_off(rig: Rig) -> None:
    """Its answer came while the item stood: the item stays as it is and says how to close it."""
    await link(rig.store, subscription("s1"), now=TEN)
    record_id = await rig.record(5, ends=TEN + HOUR, state="held", reported=TEN + HOUR)
    await rig.hold(usage_item(record_id))
    [item] = await rig.held()
    status, answer = await rig.post(f"/held/{item['id']}/write-off", {"reason": "tiny"})
    assert (status, answer["error"]["code"]) == (409, "conflict")
    assert "is reported" in answer["error"]["message"]
    assert await rig.held() == [item]
    assert (await rig.post(f"/held/{item['id']}/release"))[0] == 200
    async with rig.store.read() as tx:
        assert (await usage.find(tx, record_id)).state == "reported"


@pytest.mark.parametrize("kind", ["reading_shrank", "foreign_record", "double_record", "wrong_amount"])
async def test_a_finding_that_was_written_off_comes_back_only_when_it_is_another(rig: Rig, kind: str) -> None:
    """The same units in the same words are known; other units or other words are held and told anew."""
    again = None if kind == "reading_shrank" else Action("audit_usage", "audit:s1", "", {"id": "s1"})
    item = Hold(kind, "about:this", "5 too few (record a)", again, "s1", "amplify-quota-q1", 5)
    assert await rig.hold(item)
    [shown] = await rig.held()
    assert (await rig.post(f"/held/{shown['id']}/write-off", {"reason": "agreed"}))[0] == 200
    assert not await rig.hold(item)
    assert await rig.held() == []
    assert await rig.hold(replace(item, subject="about:that"))
    item = replace(item, reason="5 too few (record b)")
    assert await rig.hold(item)
    [_, other] = await rig.held()
    assert (await rig.post(f"/held/{other['id']}/write-off", {"reason": "agreed"}))[0] == 200
    assert not await rig.hold(item)
    assert await rig.hold(replace(item, units=6))
    [_, more] = await rig.held()
    assert (more["kind"], more["units"]) == (kind, 6)
    assert (await rig.post(f"/held/{more['id']}/release"))[0] == 200
    assert await rig.hold(replace(item, units=6))  # released, not written off: it stands as before


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        ("plan_differs", "plan:p"),
        ("subscription_orphaned", "subscription:s1:left"),
        ("end_discarded", "subscription:s1:end"),
        ("idempotency_doubted", "recurly:idempotency"),
    ],
)
async def test_what_can_be_mended_is_not_written_off(rig: Rig, kind: str, subject: str) -> None:
    """It is said what to do instead, and the item stands."""
    await rig.hold(Hold(kind, subject, "why", Action("provision_plan", subject, "", {"name": "p"})))
    await rig.hold(Hold(kind, f"{subject}:2", "why"))
    for item in await rig.held():
        status, answer = await rig.post(f"/held/{item['id']}/write-off", {"reason": "no more"})
        assert status == 409
        assert f"`billingd held release {item['id']}`" in answer["error"]["message"]
    assert len(await rig.held()) == 2
    assert (await rig.get("/outbox"))[1]["actions"] == []


async def test_no_later_reading_books_or_sends_what_was_written_off(store_url: str) -> None:
    """With the real daemon's parts: read again, late units are sent alone, and the refused ones never."""
    async with a_rig(store_url) as far:
        await far.product()
        await far.plan()
        await far.work()
        await far.subscribe()
        await far.work()
        [attached] = [one for each in far.world.site.subscriptions.values() for one in each.add_ons.values()]
        created_at = attached.created_at
        await far.traffic("acme", 7)
        attached.created_at += 5 * HOUR  # Recurly refuses usage from before the add-on
        await far.report()
        await far.work()
        [item] = await far.rows(schema.held)
        assert (item["kind"], item["units"]) == ("usage_refused", 7)
        assert item["action"]["args"]["record"] == (await far.rows(schema.usage_records))[0]["id"]
        now = far.far.now()
        assert await operations.write_off(far.store, item["id"], reason="tiny", now=now)
        attached.created_at = created_at  # it would take them now
        [before] = await far.rows(schema.usage_records)
        at = before["window_start"].isoformat()
        await far.traffic("acme", 2, at=at)
        await far.report()
        await far.work(HOUR)
        assert await far.totals() == {"written_off": 7, "reported": 2}
        assert list(far.tags().values()) == [1]
        assert far.units() == 2
        assert (await far.unfinished(), await far.dead(), await far.held()) == ([], [], {})
