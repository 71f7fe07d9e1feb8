"""A page to look at: an admin listener over a store that is empty, busy, in trouble, or hostile."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from aiohttp import web
from linked import add_on, link, subscription
from manual_clock import ManualClock
from reconciling import Reconciling

from billingd.admin.metrics import Metrics
from billingd.admin.server import AdminListener, Parts
from billingd.domain.attempts import Action, State, Verdict
from billingd.domain.drift import MISSING_RECORD, Drift
from billingd.domain.events import Event
from billingd.domain.periods import Period
from billingd.loops import Progress
from billingd.store import drift, events, held, outbox, periods, watermarks
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import PlanLink
from billingd.store.schema import usage_records

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
NOW = datetime(2026, 3, 20, 14, 37, 5, tzinfo=UTC)
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}'
LONG = "W" * 380
BIDI = "‮evil⁦ <!-- & 'x'"


@dataclass
class Side:
    last_reached_at: datetime | None
    last_error: str | None = None


@dataclass
class Asked:
    """Stands in for what the page's buttons reach behind the store."""

    polls: int = 0
    fault: Exception | None = None

    async def run_once(self) -> bool:
        if self.fault is not None:
            raise self.fault
        self.polls += 1
        return False

    async def read_range(self, since: datetime, until: datetime, *, subscription: str | None = None) -> int:
        raise NotImplementedError

    async def told(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class Behind:
    """Everything behind one page."""

    store: Store
    clock: ManualClock
    sides: dict[str, Side]
    progress: Progress = field(default_factory=Progress)
    asked: Asked = field(default_factory=Asked)

    def listener(self) -> AdminListener:
        return AdminListener(
            Parts(
                store=self.store,
                clock=self.clock,
                progress=self.progress,
                metrics=Metrics(),
                poller=self.asked,
                sides=dict(self.sides),
                source="metrics",
                webhooks=lambda: {"duplicates": 0, "rejected": 0},
                wake_outbox=lambda: None,
                resync=self.asked,
                adoption=self.asked,
                reconciler=Reconciling(),
            )
        )


def behind(store: Store) -> Behind:
    clock = ManualClock(NOW)
    return Behind(store, clock, {"Amplify": Side(NOW), "Recurly": Side(NOW)})


async def dead(store: Store, *actions: Action, error: str, at: datetime, attempts: int = 12) -> list[int]:
    """Actions that gave up."""
    async with store.write() as tx:
        await outbox.insert(tx, actions, now=at - HOUR)
        leased = await outbox.claim(tx, now=at, lease=HOUR, limit=10_000)
        for one in leased:
            await outbox.settle(tx, one, Verdict(State.DEAD, at, error), now=at)
    return [one.id for one in leased]


async def records(
    store: Store,
    name: str,
    *,
    hours: int,
    units: Callable[[int], int],
    state: str = "reported",
    back: int = 2,
) -> None:
    """A record an hour, the newest `back` hours ago, each reported three minutes after it was recorded."""
    top = NOW.replace(minute=0, second=0) - back * HOUR
    rows = []
    for number in range(hours):
        start = top - (number + 1) * HOUR
        at = start + 3 * HOUR
        row = {"subscription_id": name, "quota_id": "q1", "window_start": start, "window_end": start + HOUR}
        row |= {"revision": 1, "units": units(number), "usage_timestamp": start, "state": state}
        row |= {"merchant_tag": f"bd1:{name[:20]}:{start:%Y%m%d%H}", "recorded_at": at}
        reported = {"reported_at": at, "usage_id": f"u{number}"} if state == "reported" else {}
        rows.append(row | {"reported_at": None, "usage_id": None} | reported)
    async with store.write() as tx:
        await tx.execute(sa.insert(usage_records), [row for row in rows if row["units"]])


async def period(store: Store, name: str, began: timedelta = 12 * DAY) -> None:
    """A month that began so long ago, and the one before."""
    start = NOW - began
    async with store.write() as tx:
        for one in (Period(start - 30 * DAY, start), Period(start, start + 30 * DAY)):
            await periods.seen(tx, name, state="active", current=one, now=NOW)


async def came(store: Store, number: int, *, kind: str = "Subscription", name: str = "weather-acme") -> None:
    event = Event(
        source="amplify",
        id=f"event-{number}",
        type="ResourceCreated",
        kind=kind,
        name=name,
        happened_at=NOW - timedelta(minutes=number),
        resource_id=f"r{number}",
        subresource=None,
        correlation_id=None,
        resource_version=None,
        scope_name=None,
        state=None,
        deleting=False,
    )
    async with store.write() as tx:
        await events.insert(tx, event, now=NOW - timedelta(minutes=number))


async def busy(store: Store) -> None:
    """Five subscriptions whose traffic flows, and no fault."""
    names = {"weather-acme": "Acme weather", "weather-ada": "Ada's forecasts", "maps-globex": "Globex maps"}
    names |= {"maps-initech": "Initech", "weather-umbrella": "Umbrella"}
    subs = [subscription(name, title=title, billed_state="active") for name, title in names.items()]
    await link(store, *subs, now=NOW - 40 * DAY)
    for place, name in enumerate(names):
        await period(store, name)
        units = [(n * (place + 3)) % 97 * (n % 24 > 8) for n in range(330 - 60 * place)]
        await records(store, name, hours=len(units), units=units.__getitem__)
    async with store.write() as tx:
        at = NOW.replace(minute=0, second=0) - 2 * HOUR
        await watermarks.begin(tx, "metrics", at, HOUR, now=NOW - timedelta(minutes=30))
        actions = [Action("report_usage", f"usage:{name}:q1", f"r:{name}") for name in names]
        await outbox.insert(tx, actions, now=NOW - timedelta(minutes=27))
        for one in await outbox.claim(tx, now=NOW - timedelta(minutes=27), lease=HOUR, limit=100):
            await outbox.settle(tx, one, Verdict(State.DONE, NOW, None), now=NOW - timedelta(minutes=27))
    for number, kind in ((3, "Subscription"), (48, "ProductPlan")):
        await came(store, number, kind=kind)
    await reconciled(store)


async def reconciled(store: Store, *found: Drift) -> None:
    """A reconciliation that is over."""
    async with store.write() as tx:
        run_id = await drift.begin(
            tx,
            since=NOW - 30 * DAY,
            until=NOW - 3 * DAY,
            subscription_id=None,
            repair=False,
            asked=drift.DAILY,
            phase="links",
            steps=3,
            not_compared=[],
            now=NOW - 5 * HOUR,
        )
        run = await drift.find(tx, run_id)
        assert run is not None
        await drift.step(tx, run, phase="links", cursor=None, now=NOW, subscriptions=5, records=1_240)
        await drift.add(tx, run_id, list(found))
        await drift.finish(tx, run_id, now=NOW - 4 * HOUR, drifting=bool(found))


async def trouble(store: Store, sides: dict[str, Side]) -> None:
    """Recurly is away for hours; dead letters, held items, drift."""
    await busy(store)
    sides["Recurly"].last_error = "503 Service Unavailable"
    refused = "Recurly answered 503 Service Unavailable (request 7f3c): try again later"
    await records(store, "weather-acme", hours=9, units=lambda n: 40 + n, state="recorded", back=-7)
    await records(store, "maps-globex", hours=1, units=lambda _: 35, state="held", back=-4)
    await dead(
        store,
        *(Action("report_usage", f"usage:weather-acme:q{n}", f"dead:{n}") for n in range(3)),
        error=refused,
        at=NOW - 3 * HOUR,
    )
    plan = Action("provision_plan", "plan:weather-gold", "dead:plan", {"name": "weather-gold"})
    await dead(store, plan, error="Recurly refused the plan: currency CHF is not enabled", at=NOW - 30 * HOUR)
    async with store.write() as tx:
        again = Action("report_usage", "usage:maps-globex:q1", "", {"record": 1})
        late = "35 unit(s) of 2026-03-19T18:00Z came after their period was billed under volume pricing"
        await held.add(
            tx,
            Hold(
                "late_usage", "usage:late", late, again, "maps-globex", "amplify-quota-q1", 35, "1.05", "USD"
            ),
            now=NOW - 20 * HOUR,
        )
        tiers = "Quota `storage` is priced by a formula that Recurly has no model for: price it per unit"
        await held.add(
            tx,
            Hold("plan_inexpressible", "plan:weather-storage", tiers, Action("provision_plan", "plan:s", "")),
            now=NOW - 50 * HOUR,
        )
        actions = [Action("report_usage", f"usage:ada:{n}", f"wait:{n}") for n in range(40)]
        await outbox.insert(tx, actions, now=NOW - 2 * HOUR, due_at=NOW + timedelta(minutes=4))
    missing = Drift(
        MISSING_RECORD,
        "usage:bd1:3f",
        "weather-ada",
        "amplify-quota-q1",
        NOW - 4 * DAY,
        7,
        "Recurly has no record of it: it was removed by hand",
        "`billingd reconcile --repair` posts it again",
        repairable=True,
    )
    await reconciled(store, missing)


async def hostile(store: Store) -> None:
    """Whatever comes from outside is markup, endless, or turns the writing round."""
    plan = PlanLink("p1", "metered", HOSTILE, "weather", "amplify-plan-p1", "USD", "active", None)
    shop = [
        subscription("s1", title=HOSTILE, name="a" * 100, billed_state="active"),
        subscription("s2", title=LONG, account_code="x" * 50),
        subscription("s3", title=BIDI),
    ]
    await link(store, *shop, plan=plan, add_ons=[add_on(title=HOSTILE)], now=NOW - 40 * DAY)
    for name in ("s1", "s2", "s3"):
        await records(store, name, hours=50, units=lambda n: 999_999_999 if n == 3 else 1)
    await dead(store, Action("report_usage", f"usage:{LONG[:150]}", "d1"), error=HOSTILE, at=NOW)
    await dead(store, Action("provision_plan", HOSTILE, "d2"), error=LONG, at=NOW)
    async with store.write() as tx:
        await held.add(tx, Hold("plan_refused", HOSTILE, f"{HOSTILE} {LONG} {BIDI}", units=3), now=NOW)
        await held.add(tx, Hold("native_billing", "marketplace:m", HOSTILE), now=NOW)
    await came(store, 1, name=HOSTILE)
    found = Drift(MISSING_RECORD, HOSTILE, "s1", None, NOW, 3, HOSTILE, LONG)
    await reconciled(store, found)


@contextmanager
def in_thread(url: str, fill: Callable[[Behind], Any]) -> Iterator[tuple[str, Behind]]:
    """The listener's address, while a thread of its own serves it; what fills its store is awaited there."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    box: dict[str, Any] = {}

    async def serve() -> None:
        async with Store(url) as store:
            all_of_it = behind(store)
            await fill(all_of_it)
            runner = web.AppRunner(all_of_it.listener().application(), access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            box["address"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
            box["behind"], box["stop"] = all_of_it, asyncio.Event()
            ready.set()
            await box["stop"].wait()
            await runner.cleanup()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="page")
    thread.start()
    ready.wait(60)
    try:
        yield box["address"], box["behind"]
    finally:
        if "stop" in box:
            loop.call_soon_threadsafe(box["stop"].set)
        thread.join(60)
