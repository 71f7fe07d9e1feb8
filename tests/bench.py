"""`make bench`: the whole chain at size, beside yardsticks in the same minute.

One organisation with many subscriptions, two quotas each, a day of hourly windows: provisioned, read,
recorded and reported through real sockets to a sandbox in a process of its own. Times are given as ratios:

- poll: against the same readings fetched and parsed, nothing kept;
- report: against the same number of usage records posted by the same client and threads, no store.

Calls for traffic must not grow with the number of subscriptions, and every unit must arrive: else exit 1.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from billingd import daemon as root
from billingd.adapters.amplify import traffic_source
from billingd.domain.billing import NewUsage
from billingd.domain.events import plan_action, subscription_action
from billingd.loops import Clock
from billingd.settings import Settings, load
from billingd.store import links, migrate, outbox, usage
from billingd.store.engine import Store

HOURS = 24
UNITS = {"calls": "transactions", "messages": "x-messages"}
ORGANIZATION = "200000000000002"
YARDSTICK_POSTS = 1_000


class ShiftedClock(Clock):
    """Real time, moved: so that a day of windows has settled although it was made a minute ago."""

    shift = timedelta()

    def now(self) -> datetime:
        return super().now() + self.shift


@dataclass
class Figures:
    """What one round measured. Ratios are time against the yardstick's: 1 is as fast, 2 twice as slow."""

    store: str
    subscriptions: int
    windows: int
    records: int
    provision_seconds: float
    poll_seconds: float
    poll_ratio: float
    report_seconds: float
    reports_per_second: float
    report_ratio: float
    amplify_calls_for_traffic: int
    recurly_calls_per_report: float
    peak_memory_mb: float
    served_units: int
    reported_units: int


@asynccontextmanager
async def sandbox(directory: Path) -> AsyncIterator[tuple[str, Path]]:
    """A sandbox process; yields its base URL and the configuration it printed."""
    words = ["-m", "billingd", "sandbox", "--listen", "127.0.0.1:0", "--webhook-url", "http://127.0.0.1:9/"]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        lines: list[str] = []
        while not lines or not lines[-1].startswith("# export BILLINGD_WEBHOOKS__SECRET"):
            lines.append((await process.stdout.readline()).decode())
        config = directory / "billingd.toml"
        config.write_text("".join(lines), encoding="utf-8")
        yield lines[0].split(" at ")[1].split(";")[0], config
    finally:
        process.terminate()
        await process.wait()


def settings_of(config: Path, store_url: str) -> Settings:
    exports = [
        line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("# export ")
    ]
    secrets = dict(line.removeprefix("# export ").split("=", 1) for line in exports)
    environment = {name: value.strip("'") for name, value in secrets.items()} | {
        "BILLINGD_STORE__URL": store_url,
        "BILLINGD_RECURLY__REQUESTS_PER_MINUTE": "10000000",
        "BILLINGD_TRAFFIC__WINDOW": "1h",
        "BILLINGD_TRAFFIC__SETTLE": "2h",
        "BILLINGD_NOTIFICATIONS__PROVIDER": "[]",
    }
    return load(config, environment).settings


async def post(session: aiohttp.ClientSession, what: str, body: Any) -> Any:
    """One control operation."""
    async with session.post(f"/control/{what}", json=body) as response:
        answer = await response.json()
        if response.status >= 400:
            raise RuntimeError(f"{what}: {response.status} {answer}")
        return answer


async def calls(session: aiohttp.ClientSession, side: str, part: str = "") -> int:
    """How many calls the sandbox has had."""
    async with session.get("/control/calls") as response:
        answer = await response.json()
    counts = answer.get("calls", answer)
    return sum(number for name, number in counts.items() if name.startswith(side) and part in name)


async def measured(work: Callable[[], Awaitable[Any]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def drain(parts: root.Daemon) -> None:
    """Turn the outbox until nothing is left."""
    left = 1
    while left:
        if not await parts.outbox.run_once():
            await parts.clock.wait(parts.outbox.wake, timedelta(milliseconds=50))
            async with parts.store.read() as tx:
                counts = await outbox.count(tx)
            left = sum(number for (state, _), number in counts.items() if state in {"pending", "leased"})


async def market(session: aiohttp.ClientSession, subscriptions: int) -> None:
    """One plan with two quotas, and that many pending subscriptions of one organisation."""
    await post(session, "settings", {"recurly": {"rate_limit_per_minute": 100_000_000}})
    labelled = {"name": "weather", "title": "Weather", "attributes": {"billingSystem": "recurly"}}
    await post(session, "products", labelled)
    price = {"type": "perunit", "cost": 0.01}
    plan = {
        "name": "metered",
        "title": "Metered",
        "product": "weather",
        "type": "paid",
        "billing": {"currency": "USD", "price": 1, "interval": "monthly"},
        "subscription": {"approval": "manual"},
        "quotas": [{"name": n, "title": n, "unit": unit, "pricing": price} for n, unit in UNITS.items()],
    }
    await post(session, "plans", plan)
    for number in range(subscriptions):
        who = {"name": f"s-{number}", "team": f"team {number}", "organization": ORGANIZATION}
        made = await post(session, "subscribe", {"plan": "metered"} | who)
        team = made["marketplace"]["resource"]["owner"]["id"]
        await post(session, "accounts", {"code": f"amplify-team-{team}"})


async def serve_a_day(session: aiohttp.ClientSession, ids: list[str], start: datetime) -> int:
    """Traffic in every window for every subscription and quota; returns the units."""
    served = 0
    for subscription in ids:
        rows = [
            {
                "subscription": subscription,
                "quota": quota,
                "units": 7 + hour,
                "at": (start + timedelta(hours=hour)).isoformat(),
            }
            for hour in range(HOURS)
            for quota in UNITS
        ]
        served += sum(7 + hour for hour in range(HOURS)) * len(UNITS)
        await post(session, "traffic", {"traffic": rows})
    return served


async def chain(subscriptions: int, directory: Path, store_url: str) -> Figures:
    """The whole chain once."""
    clock = ShiftedClock()
    async with sandbox(directory) as (base, config), aiohttp.ClientSession(base) as session:
        settings = settings_of(config, store_url)
        await market(session, subscriptions)
        async with Store(store_url) as store:
            await migrate.upgrade(store)
            async with root.build(settings, store, clock) as parts:
                try:
                    return await day(parts, session, clock, subscriptions)
                finally:
                    await parts.recurly.close(deadline=timedelta(seconds=5))


async def day(
    parts: root.Daemon, session: aiohttp.ClientSession, clock: ShiftedClock, subscriptions: int
) -> Figures:
    """Provision, serve a day of traffic, read it, report it; then the yardsticks."""
    pending = await parts.amplify.list_subscriptions()
    async with parts.store.write() as tx:
        actions = [plan_action("metered", None, because="bench")]
        actions += [subscription_action(one.name, one.id, because="bench") for one in pending]
        await outbox.insert(tx, actions, now=clock.now())
    provision = await measured(lambda: drain(parts))
    await parts.poller.run_once()
    start = clock.now().replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    clock.shift = timedelta(hours=HOURS + 4)
    await post(session, "clock", {"advance": f"{HOURS + 4}h"})
    served = await serve_a_day(session, [one.id for one in pending], start)

    before = await calls(session, "amplify", "chartGroupedBy")
    poll = await measured(parts.poller.run_once)
    traffic_calls = await calls(session, "amplify", "chartGroupedBy") - before
    async with parts.store.read() as tx:
        records = sum(window["records"] for window in await usage.by_window(tx, limit=HOURS + 8))
    before = await calls(session, "recurly")
    report = await measured(lambda: drain(parts))
    recurly_calls = await calls(session, "recurly") - before
    async with parts.store.read() as tx:
        reported = (await usage.totals(tx)).get("reported", 0)
        linked = await links.subscriptions(tx)
        add_on = next(iter((await links.add_ons(tx)).values()))

    source = traffic_source("metrics", parts.amplify, "total")
    window = {"start": start, "end": start + timedelta(hours=HOURS), "length": timedelta(hours=1)}
    everything: dict[str, set[str]] = {"subscriptions": set(), "quotas": set()}
    bare_poll = await measured(
        lambda: source.read(organizations={ORGANIZATION}, units=set(UNITS.values()), **everything, **window)  # type: ignore[arg-type]
    )
    bare_post = await measured(
        lambda: bare_posts(parts, [one.uuid for one in linked], add_on.add_on_code, clock)
    )
    return Figures(
        store=parts.store.url.get_backend_name(),
        subscriptions=subscriptions,
        windows=HOURS,
        records=records,
        provision_seconds=round(provision, 1),
        poll_seconds=round(poll, 2),
        poll_ratio=round(poll / bare_poll, 1),
        report_seconds=round(report, 1),
        reports_per_second=round(records / report),
        report_ratio=round((report / records) / (bare_post / YARDSTICK_POSTS), 1),
        amplify_calls_for_traffic=traffic_calls,
        recurly_calls_per_report=round(recurly_calls / records, 2),
        peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        served_units=served,
        reported_units=reported,
    )


async def bare_posts(parts: root.Daemon, uuids: list[str], add_on: str, clock: Clock) -> None:
    """The yardstick for reports: the same client, the same threads, nothing remembered."""
    now = clock.now().replace(microsecond=0) - timedelta(minutes=5)
    free = asyncio.Semaphore(parts.settings.outbox.workers)

    async def one(number: int) -> None:
        tag = f"bench:{number}"
        async with free:
            await parts.recurly.create_usage(
                NewUsage(uuids[number % len(uuids)], add_on, 1, tag, now, now), key=f"bench-{number}"
            )

    await asyncio.gather(*(one(number) for number in range(YARDSTICK_POSTS)))


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subscriptions", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--store", default="", help="URL of an empty PostgreSQL database; default SQLite")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    found = []
    for number in asked.subscriptions:
        with tempfile.TemporaryDirectory(prefix="bd-bench-") as name:
            store_url = asked.store or f"sqlite+aiosqlite:///{name}/billingd.db"
            found.append(await chain(number, Path(name), store_url))
        sys.stdout.write(json.dumps(asdict(found[-1])) + "\n")
    exact = all(one.served_units == one.reported_units for one in found)
    traffic = sorted({one.amplify_calls_for_traffic for one in found})
    machine = f"{os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}"
    sys.stdout.write(f"exact: {exact}; calls for traffic at each size: {traffic}; {machine}\n")
    return 0 if exact and len(traffic) == 1 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
