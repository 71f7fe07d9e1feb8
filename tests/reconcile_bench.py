"""How long a reconciliation takes at size, how many calls it makes, and how much memory it needs.

`python tests/reconcile_bench.py --subscriptions 1000 --days 30`: both far sides are a sandbox in a process of
its own, so that the memory is the reconciler's. Everything agrees but for seven planted drifts, which have to
be found, or it exits with 1. `--drifts` prints the table of planted drifts instead.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import structlog
from aiohttp import web

from billingd import daemon as root
from billingd.adapters.amplify import Amplify
from billingd.adapters.recurly import Recurly
from billingd.admin.metrics import Metrics
from billingd.domain.events import plan_action, subscription_action
from billingd.domain.usage import UsageRecord, merchant_tag
from billingd.domain.windows import Window, floor
from billingd.loops import Clock
from billingd.sandbox import control_amplify, server
from billingd.sandbox.amplify.routes import routes as amplify_routes
from billingd.sandbox.amplify.traffic import Series
from billingd.sandbox.asked import Asked
from billingd.sandbox.clock import ManualClock, dating
from billingd.sandbox.recurly.metering import record
from billingd.sandbox.recurly.routes import routes as recurly_routes
from billingd.settings import Settings
from billingd.store import links, migrate, outbox, schema, usage, watermarks
from billingd.store.engine import Store

START = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
MISSING = 7
"""So many records are missing at Recurly, far from each other."""

Json = dict[str, Any]


def units_of(number: int, hour: int) -> int:
    """What subscription `number` used in that hour."""
    return 1 + (number * 7 + hour) % 9


class Moved(Clock):
    """Stands still; moved by hand."""

    at = START + timedelta(minutes=5)

    def now(self) -> datetime:
        return self.at


async def serve(subscriptions: int) -> None:
    """The far sides; tells its port and secrets, then waits."""
    clock = ManualClock(Moved.at)
    app = server.build(clock=clock, watch_topic=None)
    world = app[server.WORLD]
    world.site.configure(rate_limit_per_minute=10_000_000)

    async def play(operation: Any, body: Json, **path: str) -> Json:
        made: Json = await operation(world, Asked(body), path)
        return made

    await play(control_amplify.add_product, {"name": "weather", "attributes": {"billingSystem": "recurly"}})
    quota = {"name": "calls", "pricing": {"type": "perunit", "cost": 0.5}}
    plan = {"name": "metered", "product": "weather", "billing": {"price": 10}, "quotas": [quota]}
    made = await play(control_amplify.add_plan, plan)
    names = {}
    for number in range(subscriptions):
        name = f"s{number:05}"
        one = await play(control_amplify.subscribe, {"plan": "metered", "name": name, "user": name})
        user = one["marketplace"]["resource"]["metadata"]["createUserId"]
        world.site.create_account(f"amplify-user-{user}", billing_info=True)
        names[name] = one["metadata"]["id"]

    async def fill(request: web.Request) -> web.Response:
        """A month of traffic, and as many usage records."""
        asked = await request.json()
        clock.advance(timedelta(days=asked["days"], hours=6))
        start = datetime.fromisoformat(asked["start"])
        org = asked["org"]
        planted = []
        every = len(names) * asked["days"] * 24 // MISSING
        by_marker = {each.given.get("po_number"): each for each in world.site.subscriptions.values()}
        for number, (name, id_) in enumerate(sorted(names.items())):
            subscription = by_marker[id_]
            [attached] = subscription.add_ons.values()
            quota_id = asked["quota"]
            series = Series(org, "transactions", id_, quota_id, made["metadata"]["id"], "p", name, "Success")
            for hour in range(asked["days"] * 24):
                window = Window(start + hour * HOUR, start + (hour + 1) * HOUR)
                units = units_of(number, hour)
                world.tenant.traffic.count(series, window.start + 5 * SECOND, units, window.end, 0)
                if (number * asked["days"] * 24 + hour) % every == every - 1:
                    planted.append(units)
                    continue
                record(
                    world.site,
                    attached,
                    subscription,
                    cycle=subscription.cycle,
                    units=units,
                    merchant_tag=merchant_tag(id_, quota_id, window, 1),
                    usage_timestamp=window.end - SECOND,
                    recording_timestamp=window.end,
                )
        return web.json_response({"missing": planted})

    async def calls(_: web.Request) -> web.Response:
        counted = dict(world.calls)
        world.calls.clear()
        return web.json_response(counted)

    front = web.Application(client_max_size=server.BODY_BYTES_MAX, middlewares=list(app.middlewares))
    front.add_routes([web.post("/bench/fill", fill), web.post("/bench/calls", calls)])
    front.add_routes(amplify_routes(world.tenant))
    front.add_routes(recurly_routes(world.site))
    front.on_response_prepare.append(dating(world.clock))
    runner = web.AppRunner(front, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    tokens = world.tenant.tokens
    told = {
        "port": runner.addresses[0][1],
        "id": tokens.client_id,
        "secret": tokens.client_secret,
        "organization": world.tenant.organization_id,
        "names": names,
    }
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


@asynccontextmanager
async def far_sides(subscriptions: int) -> AsyncIterator[Json]:
    """A sandbox in another process, and what it told."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--serve",
        str(subscriptions),
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    try:
        assert child.stdout is not None
        yield json.loads(await child.stdout.readline())
    finally:
        child.kill()
        await child.wait()


def peak_mb() -> float:
    """The most memory this process had since `reset_peak`, in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    [kb] = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
    return int(kb) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


async def measure(subscriptions: int, days: int) -> int:
    """Provision, fill, reconcile; the figures go to standard output."""
    async with (
        far_sides(subscriptions) as far,
        aiohttp.ClientSession() as session,
        _store() as store,
    ):
        base = f"http://127.0.0.1:{far['port']}"
        clock = Moved()
        amplify = Amplify(
            session,
            central_url=base,
            login_url=f"{base}/auth",
            platform_url=base,
            api_version="v1",
            organization_id=far["organization"],
            client_id=far["id"],
            client_secret=far["secret"],
            timeout=timedelta(seconds=60),
            clock=clock.now,
        )
        recurly = Recurly(
            api_key=server.API_KEY,
            base_url=base,
            region="us",
            timeout=timedelta(seconds=60),
            requests_per_minute=10_000_000,
            threads=4,
            clock=clock.now,
        )
        settings = Settings.model_validate(
            {
                "amplify": {"organization_id": far["organization"]},
                "recurly": {"requests_per_minute": 10_000_000},
                "webhooks": {"auth": "none"},
            }
        )
        outside = root.Outside(amplify, recurly, _Silent(), Metrics())  # type: ignore[arg-type]
        parts = root.assemble(settings, store, clock, outside, rng=Random(1))
        await _provision(parts, far["names"])
        clock.at += timedelta(days=days, hours=6)
        missing = await _fill(session, base, store, days, clock)
        await _post(session, f"{base}/bench/calls", {})
        reset_peak()
        before, began, cpu = peak_mb(), time.monotonic(), time.process_time()
        run = await parts.reconciler.start()
        await parts.reconciler.finish(run)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        found = await parts.reconciler.document(run)
        calls = Counter[str]()
        for name, number in (await _post(session, f"{base}/bench/calls", {})).items():
            calls[name.split()[0]] += number
        assert found is not None
        right = sorted(one["units"] for one in found["drift"]) == sorted(missing) and missing
        at_300 = calls["recurly"] * 2 * 60 / 300
        figures = {
            "subscriptions": found["checked"]["subscriptions"],
            "records": found["checked"]["records"],
            "seconds": round(seconds, 1),
            "own_cpu_seconds": round(cpu, 1),
            "calls": dict(calls),
            "minutes_at_half_of_300_calls_a_minute": round(at_300 / 60, 1),
            "memory_mb_before": round(before),
            "memory_mb_peak": round(peak_mb()),
            "planted": len(missing),
            "found": found["findings"],
            "store": store.url.get_backend_name(),
        }
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        await recurly.close(deadline=timedelta(seconds=5))
        return 0 if right else 1


async def show_drifts() -> None:
    """What was planted, found, mended and refused, line by line."""
    from test_reconcile_drifts import planted_and_mended

    async with _store() as store:
        url = store.url.render_as_string(hide_password=False)
        sys.stdout.write(await planted_and_mended(url) + "\n")


class _Silent:
    names = ()

    async def tell(self, *_: str) -> None:
        """Nobody is told."""

    async def tell_subscriber(self, *_: str) -> bool:
        return True


@asynccontextmanager
async def _store() -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory() as directory:
        url = os.environ.get("BENCH_STORE", f"sqlite+aiosqlite:///{directory}/bench.db")
        async with Store(url) as store:
            await migrate.upgrade(store)
            yield store


async def _provision(parts: root.Daemon, names: Json) -> None:
    """The plan, then every subscription, by the daemon's own handlers."""
    for actions in (
        [plan_action("metered", None, because="bench")],
        [subscription_action(name, id_, because="bench") for name, id_ in names.items()],
    ):
        async with parts.store.write() as tx:
            await outbox.insert(tx, actions, now=parts.clock.now())
        while await parts.outbox.run_once() or parts.outbox._under_way:
            if parts.outbox._under_way:
                await asyncio.wait(list(parts.outbox._under_way), return_when=asyncio.FIRST_COMPLETED)


async def _fill(
    session: aiohttp.ClientSession, base: str, store: Store, days: int, clock: Clock
) -> list[int]:
    """A month of windows in the ledger, reported; the same at both far sides but for a few."""
    async with store.read() as tx:
        linked = sorted(await links.subscriptions(tx), key=lambda one: one.name)
        [add_on] = (await links.add_ons(tx)).values()
    now = clock.now()
    start = floor(linked[0].usage_from, HOUR)
    for number, link in enumerate(linked):
        records = []
        for hour in range(days * 24):
            window = Window(start + hour * HOUR, start + (hour + 1) * HOUR)
            tag = merchant_tag(link.subscription_id, add_on.quota_id, window, 1)
            units = units_of(number, hour)
            records.append(
                UsageRecord(link.subscription_id, add_on.quota_id, window, 1, units, window.end - SECOND, tag)
            )
        async with store.write() as tx:
            await usage.insert(tx, records, now=now)
    async with store.write() as tx:
        reported = {"state": "reported", "usage_id": "u", "reported_at": now - HOUR}
        await tx.execute(schema.usage_records.update().values(**reported))
        await watermarks.begin(tx, "metrics", start, HOUR, now=now)
        await tx.execute(schema.watermarks.update().values(at=start + days * timedelta(days=1)))
    body = {
        "days": days,
        "start": start.isoformat(),
        "quota": add_on.quota_id,
        "org": linked[0].organization_id,
    }
    missing: list[int] = (await _post(session, f"{base}/bench/fill", body))["missing"]
    return missing


async def _post(session: aiohttp.ClientSession, url: str, body: Json) -> Json:
    async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=1_800)) as answer:
        answer.raise_for_status()
        told: Json = await answer.json()
        return told


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscriptions", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--drifts", action="store_true", help="Only the table of planted drifts.")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve is not None:
        asyncio.run(serve(asked.serve))
        return
    if asked.drifts:
        asyncio.run(show_drifts())
        return
    sys.exit(asyncio.run(measure(asked.subscriptions, asked.days)))


if __name__ == "__main__":
    main()
