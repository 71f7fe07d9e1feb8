"""What the tests of the command line share: a configured store with rows, and a daemon's admin listener."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import structlog
from aiohttp import web
from click.testing import CliRunner, Result
from manual_clock import START, ManualClock
from reconciling import Reconciling

from billingd.admin.metrics import Metrics
from billingd.admin.server import AdminListener, Parts
from billingd.cli import program
from billingd.domain.attempts import Action, Patience, judge
from billingd.domain.errors import Permanent, Retryable
from billingd.domain.periods import Period
from billingd.domain.usage import book
from billingd.domain.windows import Window
from billingd.loops import Progress
from billingd.reload import Reloader
from billingd.settings import Settings, load
from billingd.store import held, links, outbox, periods, usage, watermarks
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, PlanLink, SubscriptionLink

HOUR = timedelta(hours=1)
FAR_OFF = datetime(9000, 1, 1, tzinfo=UTC)
"""The end of the current period, on whatever day the tests run."""
WAITING, DEAD, TIMED_OUT, DONE = 1, 2, 3, 4
"""The actions of a filled store."""

SECRETS = {
    "BILLINGD_AMPLIFY__CLIENT_SECRET": "hidden-client-secret",
    "BILLINGD_RECURLY__API_KEY": "hidden-api-key",
    "BILLINGD_WEBHOOKS__SECRET": "hidden-webhook-secret",
}


class Poller:
    """Stands in for the daemon's: remembers what it was asked."""

    def __init__(self) -> None:
        self.polls = 0
        self.ranges: list[tuple[datetime, datetime]] = []
        self.fault: Exception | None = None

    async def run_once(self) -> bool:
        if self.fault is not None:
            raise self.fault
        self.polls += 1
        return False

    async def read_range(self, since: datetime, until: datetime, *_: Any, **__: Any) -> int:
        self.ranges.append((since, until))
        return 42

    async def told(self, *, dry_run: bool) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        return resync_document(dry_run=dry_run)


class Adopter:
    """Stands in for the daemon's: finds one of each sort."""

    def __init__(self) -> None:
        self.asked: list[tuple[datetime, bool]] = []
        self.fault: Exception | None = None
        self.ops = "+~!="

    async def told(self, since: datetime, *, dry_run: bool) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        self.asked.append((since, dry_run))
        whats = {"+": "plan", "!": "recurly"}
        steps = [
            {
                "op": op,
                "what": whats.get(op, "subscription"),
                "id": f"id-{op}",
                "name": f"name-{op}",
                "title": f"Title {op}",
                "recurly_uuid": None,
                "reason": f"because of {op}",
            }
            for op in self.ops
        ]
        return {
            "since": since.isoformat().replace("+00:00", "Z"),
            "dry_run": dry_run,
            "steps": steps,
            "to_do": sum(op in "+~" for op in self.ops),
            "problems": self.ops.count("!"),
            "adopted": 5,
        }


def resync_document(*, dry_run: bool) -> dict[str, Any]:
    """What a resync found: one of each sort."""
    whats = (("+", "subscription"), ("~", "plan"), ("-", "subscription"))
    steps = [
        {
            "op": op,
            "what": what,
            "id": f"id{number}",
            "name": f"n{number}",
            "title": f"T{number}",
            "reason": "so",
        }
        for number, (op, what) in enumerate(whats)
    ]
    return {
        "dry_run": dry_run,
        "steps": steps,
        "enqueued": 0 if dry_run else len(steps),
        "withheld": [],
        "warnings": ["Much is missing."],
        "notes": [],
        "counts": {"plans": 1, "subscriptions": 2, "dead_letters": 0},
    }


class Bench:
    """A directory with a configuration, and perhaps a store in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "billingd.db"
        self.url = f"sqlite+aiosqlite:///{self.path}"
        self.config = directory / "billingd.toml"
        self.socket = directory / "a.sock"
        self.poller = Poller()
        self.reconciler = Reconciling()
        self.adopter = Adopter()
        self.configure(f"unix:{self.socket}")

    def configure(self, listen: str, more: str = "") -> None:
        """Write the configuration file."""
        self.config.write_text(
            f'[store]\nurl = "{self.url}"\n[admin]\nlisten = "{listen}"\n'
            f'[amplify]\norganization_id = "100"\nclient_id = "DOSA_1"\n{more}',
            encoding="utf-8",
        )

    def environment(self, more: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
        """Nothing of the developer's own settings, but the secrets."""
        ours = [
            name for name in os.environ if name.startswith("BILLINGD_") or name == "CREDENTIALS_DIRECTORY"
        ]
        return {**dict.fromkeys(ours), **SECRETS, **(more or {})}

    def run(self, *words: str, env: Mapping[str, str | None] | None = None) -> Result:
        """One command, with exit code and both outputs."""
        arguments = ["--config", str(self.config), *words]
        try:
            return CliRunner().invoke(program, arguments, prog_name="billingd", env=self.environment(env))
        finally:
            structlog.reset_defaults()  # the command's stderr is closed by now

    async def ask(self, *words: str) -> Result:
        """One command, while this loop serves the daemon's side."""
        return await asyncio.to_thread(self.run, *words)

    async def fill(self, template: Path) -> None:
        """A store with something of everything, written once and then copied."""
        filled = template.with_name("filled.db")
        if not filled.exists():
            shutil.copy(template, self.path)
            async with Store(self.url) as store:
                await _fill(store)
            shutil.copy(self.path, filled)
        shutil.copy(filled, self.path)

    async def states(self) -> dict[int, str]:
        """Every action's state."""
        async with Store(self.url) as store, store.read() as tx:
            return {row["id"]: row["state"] for row in await outbox.select(tx)}

    @asynccontextmanager
    async def reached(self, over: str) -> AsyncIterator[None]:
        """The real admin listener on tcp or unix, or nobody ("store")."""
        if over == "store":
            yield
            return
        async with Store(self.url) as store:
            store.lock()
            parts = Parts(
                store=store,
                clock=ManualClock(START + 5 * HOUR),
                progress=Progress(),
                metrics=Metrics(),
                poller=self.poller,
                sides={},
                source="metrics",
                webhooks=lambda: {"duplicates": 1, "rejected": 2},
                wake_outbox=lambda: None,
                resync=self.poller,
                adoption=self.adopter,
                reconciler=self.reconciler,
            )
            application = AdminListener(parts).application()
            reloader = Reloader(self.settings(), self.settings, lambda _changed: None)
            application.router.add_post("/reload", reloader.answer)
            application.router.add_get("/configuration", reloader.tell)
            async with self.listening(application, over):
                yield

    def settings(self) -> Settings:
        """What the daemon reads."""
        return load(self.config, SECRETS).settings

    @asynccontextmanager
    async def listening(self, application: web.Application, over: str) -> AsyncIterator[None]:
        """Any application where the configuration says that the daemon is."""
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            if over == "unix":
                await web.UnixSite(runner, str(self.socket)).start()
            else:
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self.configure(f"127.0.0.1:{runner.addresses[0][1]}")
            yield
        finally:
            await runner.cleanup()


async def _fill(store: Store) -> None:
    names = ("notify_provider", "report_usage", "report_usage", "provision_plan")
    actions = [Action(name, f"subject:{number}", f"key:{number}") for number, name in enumerate(names, 1)]
    outcomes = {
        WAITING: Retryable("nobody there"),
        DEAD: Permanent("quantity: \x1b[31mis too long"),
        TIMED_OUT: Permanent("Timeout of a call"),
        DONE: None,
    }
    patience = Patience(12, HOUR, HOUR)
    async with store.write() as tx:
        await outbox.insert(tx, actions, now=START)
        for leased in await outbox.claim(tx, now=START, lease=HOUR, limit=9):
            verdict = judge(1, outcomes[leased.id], now=START, patience=patience, rng=Random(1))
            await outbox.settle(tx, leased, verdict, now=START)
        await _fill_ledger(store, tx)
        late = Hold(
            "late_usage",
            "usage:tag",
            "It came late.",
            Action("report_usage", "usage:s:q", "", {"record": 2}),
            subscription_id="sub-1",
            add_on_code="amplify-quota-q",
            units=12,
            amount="1.20",
            currency="USD",
        )
        await held.add(tx, late, now=START)


async def _fill_ledger(store: Store, tx: Any) -> None:
    plan = PlanLink("plan-1", "metered", "Metered", "weather", "amplify-plan-1", "USD", "active", None)
    add_on = AddOnLink("q", "plan-1", "amplify-quota-q", "Calls", "calls", "flat")
    subscription = SubscriptionLink(
        *("sub-1", "sub", "Sub", "plan-1", "100", "amplify-team-1", "uuid-1", "active", None),
        *(START, START, None, None, None, START),
    )
    await links.save_plan(tx, plan, (add_on,), now=START)
    await links.create_subscription(tx, subscription)
    await watermarks.begin(tx, "metrics", START + 2 * HOUR, HOUR, now=START)
    for number, (state, units) in enumerate([("recorded", 30), ("held", 12)]):
        window = Window(START + number * HOUR, START + (number + 1) * HOUR)
        records = list(book("sub-1", "q", {window: units}, {}, before=window.end))
        await usage.insert(tx, records, now=START, state=state)
    for period in (Period(START - HOUR, START + HOUR), Period(START + HOUR, FAR_OFF)):
        await periods.seen(tx, "sub-1", state="active", current=period, now=START)


def document(result: Result) -> Any:
    """The one document on standard output, with nothing beside it."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert result.stderr == "", result.stderr
    return json.loads(result.stdout)
