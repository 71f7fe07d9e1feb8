"""Recurly's webhooks: what is told when, how it is signed, and what becomes of a delivery that fails."""

import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from recurly_side import START, Json, RecurlySide, path_of, recurly_side, stamp

from billingd.sandbox.recurly.hooks import RETRIES_MAX, Hook, Notifier

DAY = timedelta(days=1)


class Receiver:
    """Somebody's endpoint: what came, and the status it answers next."""

    def __init__(self, notifier: Notifier, url: str) -> None:
        self.notifier = notifier
        self.url = url
        self.status = 204
        self.got: list[tuple[bytes, dict[str, str]]] = []

    def hook(self, *secrets: str, **options: Any) -> Hook:
        return self.notifier.add(Hook(self.url, secrets or ("s3cret",), **options))

    def events(self) -> list[str]:
        return [json.loads(body)["event_type"] for body, _ in self.got]


@asynccontextmanager
async def receiving(far: RecurlySide) -> AsyncIterator[Receiver]:
    async def take(request: web.Request) -> web.Response:
        here.got.append((await request.read(), dict(request.headers)))
        return web.Response(status=here.status)

    app = web.Application()
    app.router.add_post("/webhooks/recurly", take)
    async with TestServer(app) as served:
        here = Receiver(Notifier(far.site), str(served.make_url("/webhooks/recurly")))
        yield here
        await here.notifier.close()


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan()
        yield side


def told(far: RecurlySide) -> list[tuple[str, str]]:
    """Event types and times so far; forgets them."""
    found = [(each.payload["event_type"], each.payload["event_time"]) for each in far.site.notices]
    far.site.notices.clear()
    return found


def types(far: RecurlySide) -> list[str]:
    return [event for event, _ in told(far)]


async def test_a_renewal_is_announced_a_day_before(far: RecurlySide) -> None:
    """Then it comes; both as of their dates, in order, however far the clock jumps."""
    await far.subscribe()
    assert types(far) == ["created"]
    far.clock.set(START + timedelta(days=27))
    far.site.run_due_bills()
    assert told(far) == [("renewal.scheduled", "2026-02-27T12:00:00Z")]
    far.pass_(days=35)
    far.site.run_due_bills()
    assert told(far) == [
        ("renewed", "2026-02-28T12:00:00Z"),
        ("renewal.scheduled", "2026-03-30T12:00:00Z"),
        ("renewed", "2026-03-31T12:00:00Z"),
    ]


async def test_a_bill_date_moved_nearer_is_announced_at_once(far: RecurlySide) -> None:
    """The announcement of the old date does not come any more."""
    made = await far.subscribe()
    told(far)
    to = far.clock.now() + timedelta(hours=3)
    await far.call("PUT", path_of(made), {"next_bill_date": stamp(to)})
    assert types(far) == ["renewal.scheduled", "updated"]
    far.pass_(days=29)
    far.site.run_due_bills()
    assert told(far)[0] == ("renewed", stamp(to))
    await far.call("PUT", path_of(made), {"next_bill_date": stamp(far.clock.now() + 3 * DAY)})
    assert types(far) == ["updated"]
    far.pass_(days=2)
    far.site.run_due_bills()
    assert types(far) == ["renewal.scheduled"]


async def test_a_period_of_a_day_or_less_is_announced_as_it_begins(far: RecurlySide) -> None:
    """There is no day before."""
    await far.make_plan(code="daily", interval_unit="days")
    await far.subscribe(plan_code="daily")
    assert types(far) == ["renewal.scheduled", "created"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([("PUT", "/cancel", None), ("PUT", "/reactivate", None)], ["canceled", "reactivated"]),
        ([("DELETE", "", None)], ["expired"]),
        ([("PUT", "", {"po_number": "m2"})], ["updated"]),
    ],
)
async def test_changes_are_told(far: RecurlySide, steps: list[Any], expected: list[str]) -> None:
    """Each once."""
    made = await far.subscribe()
    told(far)
    for method, action, body in steps:
        await far.call(method, path_of(made, action), body)
    assert types(far) == expected


async def test_pauses_and_the_end_are_told(far: RecurlySide) -> None:
    """When they take effect, not when they are asked for."""
    made = await far.subscribe()
    told(far)
    await far.call("PUT", path_of(made, "/pause"), {"remaining_pause_cycles": 1})
    assert types(far) == ["updated"]
    far.pass_(days=60)
    await far.call("PUT", path_of(made, "/cancel"), {"timeframe": "bill_date"})
    far.pass_(days=60)
    far.site.run_due_bills()
    assert types(far) == [
        "renewal.scheduled",
        "paused",
        "renewal.scheduled",
        "resumed",
        "canceled",
        "renewal.scheduled",
        "expired",
    ]


async def test_a_trial_and_a_future_start_are_told(far: RecurlySide) -> None:
    """The first payment is a renewal, the start an update."""
    await far.subscribe(trial_ends_at=stamp(START + 7 * DAY))
    assert types(far) == ["created"]
    far.pass_(days=8)
    far.site.run_due_bills()
    assert types(far) == ["renewal.scheduled", "renewed"]
    await far.subscribe(account="bob", starts_at=stamp(far.clock.now() + DAY))
    assert types(far) == ["created"]
    far.pass_(days=2)
    far.site.run_due_bills()
    assert types(far) == ["updated"]


async def test_recurlys_own_usage_is_told(far: RecurlySide) -> None:
    """Only the negative record of a termination without charge, with where it lies (4.10)."""
    made = await far.subscribe()
    await far.use(made, 5)
    told(far)
    await far.call("DELETE", path_of(made) + "?charge=false")
    usage, expired = far.site.notices
    records = await far.call("GET", f"{path_of(made)}/add_ons/code-calls/usage?billing_status=all")
    assert usage.payload == {
        "id": records["data"][0]["id"],
        "object_type": "usage",
        "site_id": far.site.record.id,
        "event_type": "created",
        "event_time": stamp(START),
        "subscription_uuid": made["uuid"],
        "add_on_code": "calls",
    }
    assert expired.payload["event_type"] == "expired"


async def test_a_delivery_points_and_is_signed(far: RecurlySide) -> None:
    """`ts,hex[,hex]` over `ts.body`, in milliseconds of the sandbox's clock; old secret beside the new."""
    far.clock.advance(timedelta(milliseconds=250))
    async with receiving(far) as there:
        there.hook("new", "old")
        made = await far.subscribe()
        assert await there.notifier.run_due() == 1
    ((body, headers),) = there.got
    payload: Json = json.loads(body)
    assert (payload["id"], payload["uuid"]) == (made["id"], made["uuid"])
    assert (payload["object_type"], payload["event_type"]) == ("subscription", "created")
    assert payload["event_time"] == stamp(START)
    ts, *found = headers["recurly-signature"].split(",")
    assert int(ts) == int(far.clock.now().timestamp() * 1000)
    signed = ts.encode() + b"." + body
    assert found == [hmac.new(each, signed, sha256).hexdigest() for each in (b"new", b"old")]
    assert headers["recurly-notification-id"]


async def test_a_failed_delivery_is_tried_again(far: RecurlySide) -> None:
    """After 10 + x·2^(x+5) seconds, under the same id, with a new signature; given up after ten retries."""
    async with receiving(far) as there:
        there.hook()
        await far.subscribe()
        there.status = 500
        assert await there.notifier.run_due() == 0
        far.pass_(seconds=9)
        assert (await there.notifier.run_due(), len(there.got)) == (0, 1)
        far.pass_(seconds=1)
        await there.notifier.run_due()
        assert len(there.got) == 2
        assert len({headers["recurly-notification-id"] for _, headers in there.got}) == 1
        assert len({headers["recurly-signature"] for _, headers in there.got}) == 2
        there.status = 200
        far.pass_(seconds=74)
        assert await there.notifier.run_due() == 1
        assert there.notifier.waiting == []
        assert [each.status for each in there.notifier.deliveries] == [500, 500, 200]
        told(far)
        far.site.announce(next(iter(far.site.subscriptions.values())), "updated")
        there.status = 500
        for _ in range(RETRIES_MAX + 5):
            await there.notifier.run_due()
            far.clock.advance(timedelta(hours=200))
        assert there.events().count("updated") == 1 + RETRIES_MAX


async def test_nobody_there_is_a_failure_too(far: RecurlySide) -> None:
    """It waits, and comes once somebody listens."""
    async with receiving(far) as there:
        hook = there.hook()
        url, hook.url = hook.url, "http://127.0.0.1:9/"
        await far.subscribe()
        assert await there.notifier.run_due() == 0
        hook.url = url
        far.pass_(seconds=10)
        assert await there.notifier.run_due() == 1
        assert [each.status for each in there.notifier.deliveries] == [0, 204]


async def test_deliveries_may_be_lost_doubled_or_chosen(far: RecurlySide) -> None:
    """Per hook; a doubled notice has one id; `take_due` gives them out instead of sending them."""
    async with receiving(far) as there:
        there.hook(drop_every=1)
        there.hook(duplicate=True, events=frozenset({"created"}))
        made = await far.subscribe()
        await far.call("PUT", path_of(made), {"po_number": "m2"})
        assert await there.notifier.run_due() == 2
        assert there.events() == ["created"] * 2
        assert len({headers["recurly-notification-id"] for _, headers in there.got}) == 1
        await far.subscribe(account="bob")
        taken = there.notifier.take_due()
        assert [each.notice.payload["event_type"] for each in taken] == ["created"] * 2
        assert there.notifier.take_due() == []
        assert there.notifier.clear() == 2
