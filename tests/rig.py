"""The daemon's core on a real store, in front of the sandbox on a real socket, with one clock for all."""

import asyncio
import io
import json
import pickle
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import aiohttp
import sqlalchemy as sa
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from unthreaded import sqlite_in_turn
from yarl import URL

from billingd.adapters.amplify import Amplify
from billingd.adapters.recurly import Recurly
from billingd.admin import operations
from billingd.admin.metrics import Metrics
from billingd.daemon import Outside, assemble, take_over
from billingd.domain.attempts import Action
from billingd.domain.billing import BilledSubscription, NewSubscription
from billingd.domain.errors import BillingdError
from billingd.domain.events import parse_amplify
from billingd.loops import Clock
from billingd.sandbox import control_amplify, control_both, control_traffic, server
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.routes import routes as amplify_routes
from billingd.sandbox.asked import Asked
from billingd.sandbox.clock import ManualClock as SandboxClock
from billingd.sandbox.clock import dating
from billingd.sandbox.faults import Rule
from billingd.sandbox.ledger import ledger
from billingd.sandbox.recurly.idempotency import IdempotencyStore
from billingd.sandbox.recurly.routes import routes as recurly_routes
from billingd.sandbox.world import World
from billingd.settings import Settings
from billingd.store import held, links, outbox, usage
from billingd.store.engine import Store, Tx
from billingd.store.links import SubscriptionLink
from billingd.store.schema import metadata

START = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)
LEASE = timedelta(minutes=2)
LOOK_AGAIN = timedelta(minutes=10)
SETTLING = timedelta(seconds=60)
PER_UNIT = {"type": "perunit", "cost": 0.5}
WRITES = (
    *("create_", "update_", "remove_", "cancel_", "terminate_"),
    *("rename_", "add_", "mark_", "set_", "decide"),
)
LANDING = "X-Landing"
"""Marks a request of a process that is dead: no step of the one that lives."""

Json = dict[str, Any]


class Crash(BaseException):
    """The process dies here: no handler sees it, nothing is settled."""


@dataclass(frozen=True)
class Sent:
    """A request that has left, and that the far side has not carried out yet."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Steps:
    """Counts the steps of a process (calls out, commits) and dies at one of them.

    With `wire`, a request that changes something is two steps more: once it was sent, and once the far side
    has carried it out. With `reads`, every other request is two steps too.
    """

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.die_at: int | None = None
        self.die_on: str | None = None
        """Die at the first step whose name begins so, whatever its number is."""
        self.dead = False
        self.wire = False
        self.reads = False
        self.in_flight: list[Callable[[], Awaitable[object]]] = []
        """What a process that died had sent already: the far side carries it out some time."""
        self.watch: Callable[[Sent | None], None] | None = None
        """Looks on at each step, and at what was sent right before it."""

    def arm(self, step: int | None) -> None:
        """Count from zero, die at that step."""
        self.taken, self.die_at, self.die_on, self.dead = [], step, None, False

    def step(self, name: str) -> None:
        self.note(name)
        self.alive()

    def note(self, name: str, sent: Sent | None = None) -> bool:
        """A step that is taken outside of the process; whether it is dead, of which it learns later."""
        self.taken.append(name)
        if self.watch is not None:
            self.watch(sent)
        if len(self.taken) == self.die_at or (self.die_on is not None and name.startswith(self.die_on)):
            self.dead = True
        return self.dead

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
                result = await self._outlived(call, *args, **kwargs)
                self._steps.alive()
                return result
            self._steps.step(f"before {name}")
            result = await self._outlived(call, *args, **kwargs)
            self._steps.step(f"after {name}")
            return result

        return stepped

    async def _outlived(self, call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Who died while the call was under way hears nothing of what came of it."""
        try:
            return await call(*args, **kwargs)
        except BillingdError:
            self._steps.alive()
            raise


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
    """The sandbox's time, so that both sides agree on it, but for `offset`; waiting moves it."""

    def __init__(self, far: SandboxClock) -> None:
        self.far = far
        self.offset = timedelta(0)
        self._went_back = timedelta(0)

    def travel(self, far: SandboxClock) -> None:
        """Another time is now; what has elapsed never shrinks all the same."""
        self._went_back += self.far.now() - far.now()
        self.far, self.offset = far, timedelta(0)

    def now(self) -> datetime:
        return self.far.now() + self.offset

    def elapsed(self) -> float:
        return (self.far.now() + self._went_back).timestamp()

    async def wait(self, wake: asyncio.Event, at_most: timedelta) -> None:
        self.far.advance(at_most)
        wake.clear()
        await asyncio.sleep(0)


class Channels:
    """Keeps what was told."""

    def __init__(self) -> None:
        self.provider: list[str] = []
        self.mails: list[tuple[str, str, str]] = []

    names = ("provider",)

    async def tell(self, _name: str, title: str, body: str) -> None:
        """What comes in one message is kept one by one."""
        together = re.fullmatch(r"\d+ notices: .*", title)
        each = re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:] if together else [f"{title}\n{body}"]
        self.provider += [": ".join(one.strip().split("\n", 1)) for one in each]

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool:
        self.mails.append((email, title, body))
        return True


class Front:
    """The socket of both far sides; the world behind it can be replaced."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    async def show(self, app: web.Application) -> None:
        """From now on this is what answers; connections to whatever answered before are closed."""
        await self._hide()
        app.middlewares.insert(0, _on_the_way(self._steps))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connected, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

    def _connected(self) -> asyncio.Protocol:
        assert self._runner is not None
        serve = self._runner.server
        assert serve is not None
        return serve()

    async def _hide(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._hide()
        if self._server is not None:
            await self._server.wait_closed()


def _on_the_way(steps: Steps) -> Middleware:
    """Where a process may die while its request is under way; what it has sent is carried out some time."""

    @web.middleware
    async def passing(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not steps.wire or request.headers.get(LANDING):
            return await handler(request)
        if steps.dead:
            return _hung_up(request)
        writes = request.method not in {"GET", "HEAD"}
        counted = writes or steps.reads
        what = f"{request.method} {request.path}"
        if counted:
            body = await request.read()
            sent = Sent(request.method, request.raw_path, dict(request.headers), body) if writes else None
            if steps.note(f"sent {what}", sent):
                if writes:
                    steps.in_flight.append(lambda: handler(request))
                return _hung_up(request)
        answer = await handler(request)
        died = counted and steps.note(f"carried out {what}")
        return _hung_up(request) if died else answer

    return passing


def _hung_up(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()  # goes nowhere


@dataclass(frozen=True)
class Saved:
    """Everything as it was at one moment at which nothing was under way."""

    pickled: bytes
    """The far sides, what of them is unheard, their clock, and what Recurly has answered to each key."""
    file: bytes
    rows: dict[str, list[Json]]
    drawn: tuple[Any, ...]
    """How far the ids were drawn, so that the same are drawn again."""
    log: bytes = b""
    """SQLite's write-ahead log beside `file`."""
    sent: Sent | None = None
    """What was under way to a far side."""


class _Pickler(pickle.Pickler):
    """Pickles the far sides for this very process, where functions within functions are what they are."""

    local: ClassVar[dict[int, FunctionType]] = {}

    def reducer_override(self, thing: object) -> Any:
        if not isinstance(thing, FunctionType) or "<locals>" not in thing.__qualname__:
            return NotImplemented
        self.local[id(thing)] = thing
        return _local, (id(thing),)


def _local(number: int) -> FunctionType:
    return _Pickler.local[number]


def _pickled(things: object) -> bytes:
    """A copy of it all in a sixth of what `copy.deepcopy` takes."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(things)
    return file.getvalue()


class Rig:
    """Everything between a webhook and a bill; `world` is the truth of both far sides."""

    def __init__(
        self,
        world: World,
        far: SandboxClock,
        store: DyingStore,
        steps: Steps,
        front: Front,
        kept: IdempotencyStore,
    ) -> None:
        self.world = world
        self.far = far
        self.store = store
        self.steps = steps
        self.front = front
        self.clock = SharedClock(far)
        self.channels = Channels()
        self.unheard: list[Event] = []
        self.ids = Random(1)
        self.kept = kept
        self.make_adapters: Callable[[], tuple[Amplify, Recurly]] | None = None
        self.workers = 4
        self.look_again = LOOK_AGAIN
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
        self.daemon = daemon
        self.engine, self.poller, self.listener = daemon.outbox, daemon.poller, daemon.webhooks

    async def restart(self, *, die_at: int | None = None) -> None:
        """A new process after a death: its adapters know nothing; on SQLite it takes all leases back."""
        await self.gone()
        await self.recurly._adapter.close(deadline=timedelta(seconds=1))
        assert self.make_adapters is not None
        amplify, recurly = self.make_adapters()
        self.amplify, self.recurly = Dying(amplify, self.steps), Dying(recurly, self.steps)
        self.start()
        self.steps.arm(die_at)
        await take_over(self.store, self.clock.now())

    async def close(self) -> None:
        """Ends the daemon's part of it."""
        await self.engine.drain(at_most=timedelta(seconds=5))
        await self.recurly._adapter.close(deadline=timedelta(seconds=5))

    async def gone(self) -> None:
        """Waits until nothing of a dead process is under way any more."""
        tasks = list(self.engine._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if flights := self.recurly._adapter._calls._workers._under_way:
            await asyncio.wait(list(flights), timeout=10)

    async def land(self) -> int:
        """The far sides carry out what a dead process had sent."""
        flying, self.steps.in_flight[:] = list(self.steps.in_flight), []
        for carry_out in flying:
            await carry_out()
        return len(flying)

    # Going back to a moment.

    async def save(self) -> Saved:
        """Everything as it is now, when nothing is under way."""
        if self.store.path is None:
            return self._saved(b"", await self._all_rows())
        await self.store.close()  # the file is whole then; both engines open it again by themselves
        return self._saved(self.store.path.read_bytes(), {})

    def left(self, sent: Sent | None) -> Saved:
        """What SIGKILL at this moment leaves: the far sides, the bytes on disk, and a request under way.

        Only where SQLite has no threads, so that nobody writes meanwhile.
        """
        assert self.store.path is not None
        log = self.store.path.with_name(f"{self.store.path.name}-wal")
        saved = self._saved(self.store.path.read_bytes(), {})
        return replace(saved, log=log.read_bytes() if log.exists() else b"", sent=sent)

    def _saved(self, file: bytes, rows: dict[str, list[Json]]) -> Saved:
        listeners = self.world.tenant.journal.listeners
        listeners.remove(self.unheard.append)
        pickled = _pickled((self.world, self.unheard, self.far, self.kept))
        listeners.append(self.unheard.append)
        return Saved(pickled, file, rows, self.ids.getstate())

    async def load(self, saved: Saved, *, dead: bool = False) -> None:
        """Everything as it was then, with a new process; `dead`: that is yet to be started."""
        await self.gone()
        self.steps.in_flight.clear()
        self.steps.arm(None)
        world, unheard, clock, self.kept = pickle.loads(saved.pickled)
        self.world, self.far = world, clock
        if saved.sent is not None:
            self.steps.in_flight.append(partial(self._carry_out, saved.sent))
        self.clock.travel(clock)
        self.unheard[:] = unheard
        self.ids.setstate(saved.drawn)
        world.tenant.journal.listeners.append(self.unheard.append)
        await self.front.show(_around(world, self.kept))
        if self.store.path is None:
            await self._put_rows(saved.rows)
        else:
            await self.store.close()
            self.store.path.write_bytes(saved.file)
            self.store.path.with_name(f"{self.store.path.name}-wal").write_bytes(saved.log)
        self.channels.provider.clear()
        self.channels.mails.clear()
        if not dead:
            await self.restart()

    async def _carry_out(self, sent: Sent) -> None:
        url = URL(f"http://127.0.0.1:{self.front.port}{sent.path}", encoded=True)
        headers = sent.headers | {LANDING: "1"}
        async with aiohttp.request(sent.method, url, data=sent.body, headers=headers) as answer:
            await answer.read()

    async def _all_rows(self) -> dict[str, list[Json]]:
        return {table.name: await self.rows(table) for table in metadata.sorted_tables}

    async def _put_rows(self, rows: dict[str, list[Json]]) -> None:
        async with Store.write(self.store) as tx:
            names = ", ".join(table.name for table in metadata.sorted_tables)
            await tx.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
            for table in metadata.sorted_tables:
                if rows[table.name]:
                    await tx.execute(table.insert(), rows[table.name])
                identity = table.primary_key.columns.values()[0]
                if len(table.primary_key.columns) == 1 and isinstance(identity.type, sa.Integer):
                    sequence = f"pg_get_serial_sequence('{table.name}', '{identity.name}')"
                    top = f"(SELECT max({identity.name}) FROM {table.name})"
                    await tx.execute(sa.text(f"SELECT setval({sequence}, {top})"))

    def settings(self) -> Settings:
        """The configuration: the defaults, but for what a test has set."""
        return Settings.model_validate(
            {
                "amplify": {"organization_id": self.world.tenant.organization_id},
                "recurly": {"collection_method": self.collection_method, "settling": SETTLING},
                "webhooks": {"auth": "none"},
                "traffic": {"window": self.window, "settle": self.settle, "horizon": self.horizon},
                "outbox": {"workers": self.workers, "lease": LEASE, "backoff_max": self.look_again},
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

    async def subscribe_to_a_trial(self, days: int, name: str = "acme") -> str:
        """One whose plan has a trial for just as long as it is made: before and after, prices agree."""
        adapter, site = self.recurly._adapter, self.world.site
        create = adapter.create_subscription

        async def create_in_trial(new: NewSubscription, **kwargs: Any) -> BilledSubscription:
            site.plan_trial(new.plan_code, days)
            try:
                made: BilledSubscription = await create(new, **kwargs)
                return made
            finally:
                site.plan_trial(new.plan_code, 0)

        adapter.create_subscription = create_in_trial
        made = await self.subscribe(name)
        await self.work()
        adapter.create_subscription = create
        return made

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

    def watch(self, topic: str = "billingd") -> None:
        """Makes the watch topic that the feed is read from."""
        self.world.tenant.create("WatchTopic", server._topic(topic))

    def blind(self, *kinds: str, names: Collection[str] | None = None) -> None:
        """The service account loses its right to these kinds (or to some of them, by name).

        They are neither listed nor found, as if they had been deleted.
        """
        resources = self.world.tenant.resources
        listed, found = resources.of_kind, resources.find

        def hidden(kind: str, name: str) -> bool:
            return kind in kinds and (names is None or name in names)

        def of_kind(kind: str, *args: Any) -> Any:
            return [one for one in listed(kind, *args) if not hidden(kind, one.name)]

        def find(kind: str, name: str, *args: Any) -> Any:
            return None if hidden(kind, name) else found(kind, name, *args)

        vars(resources).update(of_kind=of_kind, find=find)

    def sighted(self) -> None:
        """It has its rights back."""
        for name in ("of_kind", "find"):
            vars(self.world.tenant.resources).pop(name, None)

    # What the daemon does.

    async def catch_up(self) -> None:
        """Reads the feed, resyncs when that is due, and runs what they ask for; every webhook is lost."""
        self.unheard.clear()
        await self.daemon.catch_up.run_once()
        await self.daemon.resync.run_once()
        await self.drain()

    async def hear(self, choose: Callable[[list[Event]], list[Event]] = list) -> int:
        """Webhooks for what happened since; the actions they led to."""
        self.unheard[:] = choose(list(self.unheard))
        actions = 0
        for event in list(self.unheard):
            answer = await self.listener._accept(parse_amplify(json.dumps(event.envelope()).encode()))
            assert isinstance(answer.body, bytes)
            actions += json.loads(answer.body)["actions"]
            del self.unheard[0]  # not before it is acknowledged: else it comes again
        return actions

    async def drain(self, *, until: datetime | None = None) -> None:
        """Runs what is due now until nothing is. Raises Crash when the process dies.

        Where each try takes time, as each waits a minute out that Recurly asks for, something may always be
        due: then `until` ends it.
        """
        while (until is None or self.far.now() < until) and await self.engine.run_once():
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

    async def confirm(self) -> None:
        """A person says that what is held as missing was deleted."""
        async with self.store.read() as tx:
            [item] = await held.standing(tx, kind="mass_absence")
        assert await operations.release(self.store, item["id"], now=self.clock.now())

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
        """Everything in a table, in the order of its key."""
        async with self.store.read() as tx:
            in_order = table.select().order_by(*table.primary_key)
            return [dict(row) for row in (await tx.execute(in_order)).mappings()]

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


def _around(world: World, kept: IdempotencyStore) -> web.Application:
    """Both far sides over a world that was there before, and the keys that Recurly has answered."""
    middlewares = [server._counting(world), world.faults.middleware(server.side_of)]
    app = web.Application(client_max_size=server.BODY_BYTES_MAX, middlewares=middlewares)
    app.add_routes(amplify_routes(world.tenant))
    with patch("billingd.sandbox.recurly.wire.IdempotencyStore", return_value=kept):
        app.add_routes(recurly_routes(world.site))
    app.on_response_prepare.append(dating(world.clock))
    return app


@asynccontextmanager
async def a_rig(
    url: str, *, start: datetime = START, threads: bool = False, same_ids: bool = False
) -> AsyncIterator[Rig]:
    """A rig on a store of its own; the far sides stand still unless moved.

    `threads`: SQLite's connections have the threads that they have in the daemon. `same_ids`: the far sides
    give out the same ids each time, so that the nth step is the same moment in each run.
    """
    far = SandboxClock(start)
    kept = IdempotencyStore(far)
    with patch("billingd.sandbox.recurly.wire.IdempotencyStore", return_value=kept):
        app = server.build(clock=far, watch_topic=None)
    world = app[server.WORLD]
    world.site.configure(rate_limit_per_minute=1_000_000)
    steps = Steps()
    front = Front(steps)

    async def sleep(seconds: float) -> None:
        # A rest that rounds to nothing would never end: time has to get on.
        rig.far.advance(max(timedelta(seconds=seconds), timedelta.resolution))

    async with AsyncExitStack() as stack:
        # ids are drawn anew each time, and with them the hour of the audit: here it is midnight
        stack.enter_context(patch("billingd.traffic.poll.audit_hour", return_value=0))
        if not threads:
            stack.enter_context(sqlite_in_turn())
        stack.push_async_callback(front.close)
        await front.show(app)
        base = f"http://127.0.0.1:{front.port}"
        session = await stack.enter_async_context(aiohttp.ClientSession())

        def adapters() -> tuple[Amplify, Recurly]:
            with patch("ssl._create_default_https_context", _no_tls):  # reads the system's certificates
                recurly = Recurly(
                    api_key=server.API_KEY,
                    base_url=base,
                    region="us",
                    timeout=timedelta(seconds=10),
                    requests_per_minute=1_000_000,
                    threads=min(rig.workers, 2),
                    clock=lambda: rig.clock.now(),
                    monotonic=lambda: rig.clock.elapsed(),
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
                clock=lambda: rig.clock.now(),
            )
            return amplify, recurly

        store = await stack.enter_async_context(DyingStore(url, steps))
        rig = Rig(world, far, store, steps, front, kept)
        rig.make_adapters = adapters
        if same_ids:
            stack.enter_context(patch("uuid.os", SimpleNamespace(urandom=rig.ids.randbytes)))
        amplify, recurly = adapters()
        rig.amplify, rig.recurly = Dying(amplify, steps), Dying(recurly, steps)
        stack.push_async_callback(rig.close)
        rig.start()
        await rig.poll()  # the watermark begins with the present window
        yield rig


def _no_tls() -> ssl.SSLContext:
    """What the SDK wants for a connection that is replaced at once."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
