"""The daemon's core on a real store, in front of the sandbox on a real socket, with one clock for all."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import aiohttp
from aiohttp.test_utils import TestServer

from billingd.adapters.amplify import Amplify
from billingd.adapters.recurly import Recurly
from billingd.admin.metrics import Metrics
from billingd.daemon import Outside, assemble
from billingd.domain.attempts import Action
from billingd.domain.events import parse_amplify
from billingd.loops import Clock
from billingd.sandbox import control_amplify, control_both, control_traffic, server
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.asked import Asked
from billingd.sandbox.clock import ManualClock as SandboxClock
from billingd.sandbox.faults import Rule
from billingd.sandbox.ledger import ledger
from billingd.sandbox.world import World
from billingd.settings import Settings
from billingd.store import held, links, outbox, usage
from billingd.store.engine import Store, Tx
from billingd.store.links import SubscriptionLink

START = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)
LEASE = timedelta(minutes=2)
LOOK_AGAIN = timedelta(minutes=10)
SETTLING = timedelta(seconds=60)
PER_UNIT = {"type": "perunit", "cost": 0.5}
WRITES = ("create_", "remove_", "cancel_", "terminate_", "set_", "decide")
Json = dict[str, Any]


class Crash(BaseException):
    """The process dies here: no handler sees it, nothing is settled."""


class Steps:
    """Counts the steps of a process (calls out, commits) and dies at one of them."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.die_at: int | None = None
        self.dead = False

    def arm(self, step: int | None) -> None:
        """Count from zero, die at that step."""
        self.taken, self.die_at, self.dead = [], step, False

    def step(self, name: str) -> None:
        self.taken.append(name)
        if len(self.taken) == self.die_at:
            self.dead = True
        self.alive()

    def alive(self) -> None:
        """Whatever else a dead process does fails as well."""
        if self.dead:
            raise Crash(self.taken[-1])


class Dying:
    """An adapter whose every write is two steps: just before it, and just after.

    Reads are none: to die at one is to die after the step before it. Whoever is dead reads no more, either.
    """

    def __init__(self, adapter: object, steps: Steps) -> None:
        self._adapter = adapter
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._adapter, name)
        if not asyncio.iscoroutinefunction(call):
            return call

        async def stepped(*args: Any, **kwargs: Any) -> Any:
            if not name.startswith(WRITES):
                self._steps.alive()
                return await call(*args, **kwargs)
            self._steps.step(f"before {name}")
            result = await call(*args, **kwargs)
            self._steps.step(f"after {name}")
            return result

        return stepped


class DyingStore(Store):
    """A store whose every commit is two steps: just before it, and just after."""

    def __init__(self, url: str, steps: Steps) -> None:
        super().__init__(url)
        self._steps = steps

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        async with super().write() as tx:
            yield tx
            self._steps.step("before commit")
        self._steps.step("after commit")


class SharedClock(Clock):
    """The sandbox's time, so that both sides agree on it; waiting moves it."""

    def __init__(self, far: SandboxClock) -> None:
        self.far = far

    def now(self) -> datetime:
        return self.far.now()

    async def wait(self, wake: asyncio.Event, at_most: timedelta) -> None:
        self.far.advance(at_most)
        wake.clear()
        await asyncio.sleep(0)


class Channels:
    """Keeps what was told."""

    def __init__(self) -> None:
        self.provider: list[str] = []
        self.mails: list[tuple[str, str, str]] = []

    async def tell_provider(self, title: str, body: str) -> bool:
        self.provider.append(f"{title}: {body}")
        return True

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool:
        self.mails.append((email, title, body))
        return True


class Rig:
    """Everything between a webhook and a bill; `world` is the truth of both far sides."""

    def __init__(self, world: World, far: SandboxClock, store: DyingStore, steps: Steps) -> None:
        self.world = world
        self.far = far
        self.store = store
        self.steps = steps
        self.clock = SharedClock(far)
        self.channels = Channels()
        self.unheard: list[Event] = []
        self.amplify: Any = None
        self.recurly: Any = None
        self.collection_method = "manual"
        self.accounts_missing = "hold"
        self.marketplace_url = ""
        self.on_cancel = "terminate"
        self.window = HOUR
        self.settle = HOUR
        self.horizon = timedelta(days=1)
        world.tenant.journal.listeners.append(self.unheard.append)

    def start(self) -> None:
        """Builds the daemon's parts anew, as a restart does."""
        self.steps.arm(None)
        outside = Outside(self.amplify, self.recurly, self.channels, Metrics())  # type: ignore[arg-type]
        daemon = assemble(self.settings(), self.store, self.clock, outside, rng=Random(1))
        self.engine, self.poller, self.listener = daemon.outbox, daemon.poller, daemon.webhooks

    def settings(self) -> Settings:
        """The configuration: the defaults, but for what a test has set."""
        return Settings.model_validate(
            {
                "amplify": {"organization_id": self.world.tenant.organization_id},
                "recurly": {"collection_method": self.collection_method, "settling": SETTLING},
                "webhooks": {"auth": "none"},
                "traffic": {"window": self.window, "settle": self.settle, "horizon": self.horizon},
                "outbox": {"workers": 4, "lease": LEASE, "backoff_max": LOOK_AGAIN},
                "accounts": {"missing": self.accounts_missing},
                "subscriptions": {"on_cancel": self.on_cancel},
                "notifications": {"marketplace_url": self.marketplace_url},
            }
        )

    # What happens in the world.

    def pass_(self, span: timedelta) -> None:
        """Lets time pass."""
        self.far.advance(span)
        self.world.site.run_due_bills()

    async def play(self, operation: Callable[..., Any], body: Json | None = None, **path: str) -> Json:
        """One operation of the sandbox's control interface."""
        result: Json = await operation(self.world, Asked(body or {}), path)
        return result

    async def product(self, name: str = "weather", *, ours: bool = True) -> Json:
        attributes = {"billingSystem": "recurly"} if ours else {}
        return await self.play(control_amplify.add_product, {"name": name, "attributes": attributes})

    async def plan(self, name: str = "metered", *, pricing: Json = PER_UNIT, **fields: Any) -> Json:
        """An active plan of 10 USD a month with one quota `calls`."""
        body = {
            "name": name,
            "product": "weather",
            "billing": {"price": 10},
            "quotas": [{"name": "calls", "pricing": pricing}],
        }
        return await self.play(control_amplify.add_plan, body | fields)

    async def subscribe(self, name: str = "acme", plan: str = "metered", *, account: bool = True) -> str:
        """A pending subscription of a user of its own; its id."""
        body = {"plan": plan, "name": name, "user": f"user of {name}", "team": f"team of {name}"}
        made = await self.play(control_amplify.subscribe, body | {"email": f"{name}@example.com"})
        if account:
            self.account(made)
        subscription_id: str = made["metadata"]["id"]
        return subscription_id

    def account(self, subscription: Json, kind: str = "user") -> str:
        """A Recurly account of the subscription's user, team or organisation."""
        resource = subscription["marketplace"]["resource"]
        owner = resource["owner"]
        guid = {
            "user": resource["metadata"]["createUserId"],
            "team": owner["id"],
            "org": owner["organization"]["id"],
        }[kind]
        code = f"amplify-{kind}-{guid}"
        self.world.site.create_account(code, billing_info=True)
        return code

    async def move(self, name: str, step: str, **body: Any) -> Json:
        """cancel, approve, reject, delete, migrate a subscription."""
        return await self.play(control_amplify.move_subscription, body, name=name, step=step)

    async def move_plan(self, name: str, step: str) -> Json:
        """deprecate, archive, delete a plan."""
        return await self.play(control_amplify.move_plan, None, name=name, step=step)

    async def traffic(self, name: str, units: int, **fields: Any) -> None:
        """Units served now, unless said otherwise."""
        await self.play(control_traffic.add_traffic, {"subscription": name, "units": units} | _plain(fields))

    async def renew(self) -> None:
        """Every subscription's billing period ends now."""
        await self.play(control_both.renew, {"subscription": "all"})

    def fault(self, kind: str, method: str = "*", path: str = "*", **rule: Any) -> int:
        """Something goes wrong at Recurly."""
        return self.world.faults.add(Rule(rule.pop("side", "recurly"), method, path, kind, **rule))

    # What the daemon does.

    async def hear(self, choose: Callable[[list[Event]], list[Event]] = list) -> int:
        """Webhooks for what happened since; the actions they led to."""
        events, self.unheard[:] = choose(list(self.unheard)), []
        actions = 0
        for event in events:
            answer = await self.listener._accept(parse_amplify(json.dumps(event.envelope()).encode()))
            assert isinstance(answer.body, bytes)
            actions += json.loads(answer.body)["actions"]
        return actions

    async def drain(self) -> None:
        """Runs what is due now until nothing is. Raises Crash when the process dies."""
        while await self.engine.run_once():
            tasks = list(self.engine._under_way)
            await asyncio.wait(tasks)
            for task in tasks:
                if (error := task.exception()) is not None:
                    raise error

    async def dies(self) -> bool:
        """Drains until done or dead; whether it died. What it left under way is gone with it."""
        try:
            await self.drain()
        except Crash:
            pass
        else:
            return False
        for task in list(self.engine._under_way):
            task.cancel()
        await asyncio.gather(*self.engine._under_way, return_exceptions=True)
        return True

    async def work(self, span: timedelta = timedelta(0), *, rounds: int = 12) -> None:
        """Hears and drains; lets `span` pass in rounds of two minutes at least, working in each."""
        await self.hear()
        await self.drain()
        until = self.far.now() + span
        while self.far.now() < until:
            self.pass_(max(span / rounds, LEASE))
            await self.hear()
            await self.drain()

    async def settled(self) -> None:
        """Works until nothing waits that this world can still move, a day at most."""
        for _ in range(24 * 2):
            await self.work()
            if not await self.unfinished():
                return
            self.pass_(HOUR / 2)
            await self.poll()

    async def mended(self) -> None:
        """After a crash: a new start works until nothing is left to do."""
        self.start()
        for _ in range(12):
            self.pass_(LEASE)
            await self.work()
            if not await self.unfinished():
                return

    async def poll(self) -> None:
        """Reads traffic."""
        await self.poller.run_once()

    async def report(self) -> None:
        """Lets windows settle, reads and reports them."""
        self.pass_(2 * HOUR)
        await self.poll()
        await self.drain()

    async def ask(self, action: Action) -> None:
        """Puts an action into the outbox."""
        async with self.store.write() as tx:
            await outbox.insert(tx, [action], now=self.clock.now())

    # What can be seen.

    async def link(self, subscription_id: str) -> SubscriptionLink | None:
        async with self.store.read() as tx:
            return await links.find_subscription(tx, subscription_id)

    async def held(self) -> dict[str, str]:
        """What is held now: kind to reason."""
        async with self.store.read() as tx:
            return {row["kind"]: row["reason"] for row in await held.standing(tx)}

    async def unfinished(self) -> list[str]:
        """Keys of actions that are neither done nor dead."""
        async with self.store.read() as tx:
            return [row["key"] for row in await outbox.select(tx, states=["pending", "leased"])]

    async def dead(self) -> list[str]:
        """Errors of dead letters."""
        async with self.store.read() as tx:
            return [row["error"] for row in await outbox.select(tx, states=["dead"])]

    async def waits(self, kind: str) -> list[str]:
        """Why actions of a kind wait."""
        async with self.store.read() as tx:
            return [row["error"] for row in await outbox.select(tx, states=["pending"], kind=kind)]

    async def totals(self) -> dict[str, int]:
        """Units in the ledger by state."""
        async with self.store.read() as tx:
            return await usage.totals(tx)

    async def rows(self, table: Any) -> list[Json]:
        """Everything in a table."""
        async with self.store.read() as tx:
            return [dict(row) for row in (await tx.execute(table.select())).mappings()]

    def billed(self, subscription_id: str) -> list[Json]:
        """What Recurly holds under a marker."""
        told: list[Json] = self.world.site.oracle()["subscriptions"]
        return [each for each in told if each["marker"] == subscription_id]

    def tags(self) -> Counter[str]:
        """Every merchant tag Recurly holds."""
        found: Counter[str] = Counter()
        for each in self.world.site.oracle()["subscriptions"]:
            for add_on in each["add_ons"].values():
                found.update(add_on["tags"])
        return found

    def units(self) -> int:
        """All units Recurly holds."""
        told = self.world.site.oracle()["subscriptions"]
        return sum(add_on["reported_units"] for each in told for add_on in each["add_ons"].values())

    def ledger(self) -> Json:
        """Served, reported and billed, side by side."""
        return ledger(self.world)

    def approval(self, name: str) -> str:
        resource = self.world.tenant.resources.find("Subscription", name)
        assert resource is not None
        return str(resource.body["approval"]["state"])

    def attributes(self, kind: str, name: str) -> dict[str, str]:
        resource = self.world.tenant.resources.find(kind, name)
        assert resource is not None
        return dict(resource.body["attributes"])


def _plain(fields: Json) -> Json:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()
    }


@asynccontextmanager
async def a_rig(url: str, *, start: datetime = START) -> AsyncIterator[Rig]:
    """A rig on a store of its own; the far sides stand still unless moved."""
    far = SandboxClock(start)
    app = server.build(clock=far, watch_topic=None)
    world = app[server.WORLD]
    world.site.configure(rate_limit_per_minute=1_000_000)
    steps = Steps()

    async def sleep(seconds: float) -> None:
        far.advance(timedelta(seconds=seconds))

    async with TestServer(app) as served, aiohttp.ClientSession() as session:
        base = str(served.make_url("")).rstrip("/")
        recurly = Recurly(
            api_key=server.API_KEY,
            base_url=base,
            region="us",
            timeout=timedelta(seconds=10),
            requests_per_minute=1_000_000,
            threads=2,
            clock=far.now,
            monotonic=lambda: far.now().timestamp(),
            sleep=sleep,
        )
        amplify = Amplify(
            session,
            central_url=base,
            login_url=f"{base}/auth",
            platform_url=base,
            api_version="v1",
            organization_id=world.tenant.organization_id,
            client_id=world.tenant.tokens.client_id,
            client_secret=world.tenant.tokens.client_secret,
            timeout=timedelta(seconds=10),
            clock=far.now,
        )
        try:
            async with DyingStore(url, steps) as store:
                rig = Rig(world, far, store, steps)
                rig.amplify, rig.recurly = Dying(amplify, steps), Dying(recurly, steps)
                rig.start()
                await rig.poll()  # the watermark begins with the present window
                yield rig
                await rig.engine.drain(at_most=timedelta(seconds=5))
        finally:
            await recurly.close(deadline=timedelta(seconds=5))
