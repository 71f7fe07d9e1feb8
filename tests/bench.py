"""`make bench`: the whole chain at size, measured beside yardsticks in the same minute.

One organisation with many subscriptions, two quotas each, a day of hourly windows: provisioned, read,
recorded and reported through real sockets to a sandbox in a process of its own. Prints time, calls to
Amplify (which must not grow with the number of subscriptions) and memory.
"""

import argparse
import asyncio
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, AsyncIterator

import aiohttp

from billingd import daemon as root
from billingd.loops import Clock
from billingd.settings import load
from billingd.store import migrate, outbox, usage
from billingd.store.engine import Store

HOURS = 24
QUOTAS = ("calls", "messages")


class ShiftedClock(Clock):
    """Real time, moved: so that a day of windows has settled although it was made a minute ago."""

    def __init__(self) -> None:
        self.shift = timedelta()

    def now(self) -> datetime:
        return super().now() + self.shift


@dataclass
class Figures:
    """What one round measured."""

    subscriptions: int
    windows: int
    records: int
    provision_seconds: float
    poll_seconds: float
    report_seconds: float
    reports_per_second: float
    amplify_traffic_calls: int
    amplify_calls_provisioning: int
    recurly_calls_reporting: int
    peak_memory_mb: float
    served_units: int
    reported_units: int


@asynccontextmanager
async def sandbox(directory: Path) -> AsyncIterator[str]:
    """A sandbox process; yields its base URL."""
    code = "import asyncio; from billingd.sandbox.server import serve; asyncio.run(serve('127.0.0.1:0', webhook_url='http://127.0.0.1:9/none'))"
    output = (directory / "sandbox.out").open("w+")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=output)
    try:
        while "at http" not in (text := (directory / "sandbox.out").read_text()):
            await asyncio.sleep(0.05)
        (directory / "billingd.toml").write_text("")
        yield text.split(" at ")[1].split(";")[0].strip()
    finally:
        process.terminate()
        await process.wait()
        output.close()


async def post(session: aiohttp.ClientSession, path: str, body: Any) -> Any:
    async with session.post(path, json=body) as response:
        answer = await response.json()
        if response.status >= 400:
            raise RuntimeError(f"{path}: {response.status} {answer}")
        return answer


async def measured(work: Callable[[], Awaitable[Any]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def drain(parts: root.Daemon) -> None:
    """Turn the outbox until nothing is left that is due."""
    while True:
        if not await parts.outbox.run_once():
            async with parts.store.read() as tx:
                left = sum(n for (state, _), n in (await outbox.count(tx)).items() if state in {"pending", "leased"})
            if not left:
                return
            await parts.clock.wait(parts.outbox.wake, timedelta(milliseconds=50))


async def chain(subscriptions: int, directory: Path) -> Figures:
    """The whole chain once."""
    async with sandbox(directory) as base, aiohttp.ClientSession(base) as session:
        printed = (directory / "sandbox.out").read_text()
        secrets = dict(line.removeprefix("# export ").split("=", 1) for line in printed.splitlines() if line.startswith("# export"))
        environment = {name: value.strip("'") for name, value in secrets.items()} | {
            "BILLINGD_STORE__URL": f"sqlite+aiosqlite:///{directory}/billingd.db",
            "BILLINGD_RECURLY__REQUESTS_PER_MINUTE": "10000000",
            "BILLINGD_TRAFFIC__WINDOW": "1h",
            "BILLINGD_TRAFFIC__SETTLE": "2h",
        }
        config = directory / "billingd.toml"
        config.write_text(printed)
        settings = load(config, environment).settings
        clock = ShiftedClock()
        await post(session, "/control/settings", {"recurly": {"rate_limit_per_minute": 100_000_000}})
        await market(session, subscriptions)
        async with Store(settings.store.url) as store:
            await migrate.upgrade(store)
            async with root.build(settings, store, clock) as parts:
                try:
                    return await day(parts, session, clock, subscriptions)
                finally:
                    await parts.recurly.close(deadline=timedelta(seconds=5))


async def market(session: aiohttp.ClientSession, subscriptions: int) -> None:
    """One product, one plan with two quotas, and that many pending subscriptions of one organisation."""
    await post(session, "/control/products", {"name": "weather", "title": "Weather", "attributes": {"billingSystem": "recurly"}})
    quotas = [
        {"name": name, "title": name, "unit": unit, "pricing": {"type": "perunit", "cost": 0.01}}
        for name, unit in zip(QUOTAS, ("transactions", "x-messages"), strict=True)
    ]
    await post(
        session,
        "/control/plans",
        {
            "name": "metered",
            "title": "Metered",
            "product": "weather",
            "type": "paid",
            "billing": {"currency": "USD", "price": 1, "cycle": "recurring", "interval": "monthly"},
            "subscription": {"approval": "manual"},
            "quotas": quotas,
        },
    )
    for number in range(subscriptions):
        made = await post(
            session,
            "/control/subscribe",
            {"plan": "metered", "name": f"s-{number}", "team": f"team {number}", "organization": "200000000000002"},
        )
        team = made["marketplace"]["resource"]["owner"]["id"]
        await post(session, "/control/accounts", {"code": f"amplify-team-{team}"})


async def day(parts: root.Daemon, session: aiohttp.ClientSession, clock: ShiftedClock, subscriptions: int) -> Figures:
    """Provision, serve a day of traffic, read it, report it."""
    from billingd.domain.events import plan_action, subscription_action

    pending = await parts.amplify.list_subscriptions()
    async with parts.store.write() as tx:
        actions = [plan_action("metered", None, because="bench")]
        actions += [subscription_action(one.name, one.id, because="bench") for one in pending]
        await outbox.insert(tx, actions, now=clock.now())
    provisioning = await measured(lambda: drain(parts))
    await parts.poller.run_once()
    before = await calls(session)
    start = clock.now().replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    shift = timedelta(hours=HOURS + 4)
    await post(session, "/control/clock", {"advance": f"{HOURS + 4}h"})
    clock.shift = shift
    served = 0
    for one in pending:
        rows = [
            {"subscription": one.id, "quota": quota, "units": 7 + hour, "at": (start + timedelta(hours=hour)).isoformat()}
            for hour in range(HOURS)
            for quota in QUOTAS
        ]
        served += sum(row["units"] for row in rows)
        await post(session, "/control/traffic", {"traffic": rows})
    poll = await measured(parts.poller.run_once)
    between = await calls(session)
    async with parts.store.read() as tx:
        records = sum(window["records"] for window in await usage.by_window(tx, limit=HOURS + 8))
    report = await measured(lambda: drain(parts))
    after = await calls(session)
    async with parts.store.read() as tx:
        totals = await usage.totals(tx)
    return Figures(
        subscriptions=subscriptions,
        windows=HOURS,
        records=records,
        provision_seconds=round(provisioning, 2),
        poll_seconds=round(poll, 2),
        report_seconds=round(report, 2),
        reports_per_second=round(records / report, 1),
        amplify_traffic_calls=difference(before, between, "amplify", "chartGroupedBy"),
        amplify_calls_provisioning=sum(n for name, n in before.items() if name.startswith("amplify")),
        recurly_calls_reporting=difference(between, after, "recurly", ""),
        peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        served_units=served,
        reported_units=totals.get("reported", 0),
    )


async def calls(session: aiohttp.ClientSession) -> dict[str, int]:
    async with session.get("/control/calls") as response:
        answer = await response.json()
        return dict(answer.get("calls", answer))


def difference(before: dict[str, int], after: dict[str, int], side: str, part: str) -> int:
    return sum(n - before.get(name, 0) for name, n in after.items() if name.startswith(side) and part in name)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscriptions", type=int, nargs="*", default=[100, 1000])
    found = []
    for number in parser.parse_args().subscriptions:
        with tempfile.TemporaryDirectory(prefix="bd-bench-") as directory:
            figures = await chain(number, Path(directory))
        found.append(figures)
        print(json.dumps(asdict(figures)))
    exact = all(one.served_units == one.reported_units for one in found)
    per_traffic = {one.amplify_traffic_calls for one in found}
    print(f"exact: {exact}; calls for traffic by size: {sorted(per_traffic)}")
    return 0 if exact and len(per_traffic) == 1 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
_ = statistics
