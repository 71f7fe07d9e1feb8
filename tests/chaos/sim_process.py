"""The process `billingd run` inside a simulation: it starts, works, dies at a step, and starts again."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

import sim_store
from aiohttp import web
from sim_loop import Crash, FarClock, OwnClock, SimLoop, spawn
from sim_wire import SimConnection, SimSession, Wire

from billingd.adapters.amplify import Amplify
from billingd.adapters.recurly import Recurly
from billingd.admin.metrics import Metrics
from billingd.daemon import Daemon, Outside, assemble, loops, take_over
from billingd.domain.errors import BillingdError, Retryable
from billingd.domain.events import Event
from billingd.sandbox import server
from billingd.settings import Settings
from billingd.store.engine import Store

BASE: Final = "http://127.0.0.1:8010"
HOUR: Final = timedelta(hours=1)
SWITCH: Final = 0.05
"""How often a statement lets somebody else run."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How this daemon is configured."""

    window: timedelta
    settle: timedelta
    horizon: timedelta
    schedule: str
    look_again: timedelta
    on_cancel: str
    feed: timedelta
    resync: timedelta

    @classmethod
    def drawn(cls, rng: Random) -> "Shape":
        """One of many: coarse, so that a life has few statements."""
        return cls(
            window=rng.choice((2, 3, 4)) * HOUR,
            settle=rng.choice((1, 2)) * HOUR,
            horizon=rng.choice((12, 18)) * HOUR,
            schedule=rng.choice(("4h", "6h", "7 */6 * * *")),
            look_again=rng.choice((timedelta(minutes=10), *[HOUR] * 7)),
            on_cancel=rng.choice(("terminate", "terminate", "cancel")),
            feed=rng.choice((2, 4)) * HOUR,
            resync=rng.choice((24, 36, 48)) * HOUR,
        )


class Channels:
    """People who are told, and are sometimes out."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    names = ("one", "another")

    async def tell(self, name: str, title: str, body: str) -> None:
        if self._rng.random() < 0.1:
            raise Retryable(f"{name} is out")

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool:
        return self._rng.random() < 0.9


class Process:
    """The daemon's lives, one after the other, on one store."""

    def __init__(
        self,
        loop: SimLoop,
        app: web.Application,
        clocks: tuple[FarClock, OwnClock],
        path: Path,
        shape: Shape,
        chance: Callable[[str], Random],
        note: Callable[..., None],
    ) -> None:
        self._loop = loop
        self._app = app
        self._tenant = app[server.WORLD].tenant
        self._far, self._clock = clocks
        self._path = path
        self.shape = shape
        self._chance = chance
        self._note = note
        self._rng = chance("process")
        self._steps = chance("steps")
        self._died = asyncio.Event()
        self._softly = asyncio.Event()
        self._over = asyncio.Event()
        self._away_until = 0.0
        self._disk: sim_store.Disk | None = None
        self._wire: Wire | None = None
        self._dies_in: int | None = None
        self.number = 0
        self.daemon: Daemon | None = None
        self.counts: Counter[str] = Counter()

    def die_in(self, steps: int | None) -> None:
        """Die so many steps from now; None: not any more."""
        self._dies_in = steps

    def stay_away(self, seconds: float | None) -> None:
        """Die, and be started again only after so long; None: soon."""
        if seconds is None:
            self._away_until = 0.0
            return
        self._away_until = self._loop.time() + seconds
        self.restart()

    def restart(self) -> None:
        """End as on SIGTERM, and start again."""
        self._softly.set()

    def end(self) -> None:
        """End as on SIGTERM, for good."""
        self._over.set()
        self._softly.set()

    async def within(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Something done in the process, as by its admin socket."""
        return await spawn(work, owner=self.number)

    async def step(self, where: str) -> None:
        """A point at which somebody else may run, or the process die."""
        if self._dies_in is not None:
            self._dies_in -= 1
            if self._dies_in <= 0:
                self._dies_in = None
                self._note("crash", where)
                self.counts["crashes"] += 1
                self._kill()
                raise Crash(where)
        if where == "statement" or self._steps.random() < SWITCH:
            await asyncio.sleep(0)

    def _due(self) -> bool:
        """Whether a statement is a point at which anything may happen."""
        return self._dies_in is not None or self._steps.random() < SWITCH

    def _kill(self) -> None:
        assert self._disk is not None
        assert self._wire is not None
        self._disk.die()
        self._wire.dead = True
        self._died.set()

    async def keep_alive(self) -> None:
        """Starts the daemon, and again whenever it has died, until the simulation ends."""
        while not self._over.is_set():
            self.number += 1
            self._died.clear()
            self._disk = sim_store.Disk(self._path, self.step, self._due)
            sim_store.insert(self._disk)
            self._wire = Wire(self._app, self._far, self._chance(f"wire{self.number}"), self.step, self._note)
            SimConnection.wire = self._wire
            self._note("start", self.number)
            main = spawn(self._run(), owner=self.number, name="daemon")
            dead = asyncio.ensure_future(self._died.wait())
            await asyncio.wait([main, dead], return_when=asyncio.FIRST_COMPLETED)
            dead.cancel()
            if main.done() and not self._died.is_set() and main.exception() is not None:
                raise AssertionError(
                    f"the daemon ended by itself: {main.exception()!r}"
                ) from main.exception()
            self.daemon = None
            self._note("down", self.number)
            self._kill()
            await self._bury(self.number)
            if not self._over.is_set():
                await asyncio.sleep(self._rng.choice((1, 30, 600, 7200)) * self._rng.random())
            while self._loop.time() < self._away_until and not self._over.is_set():  # noqa: ASYNC110
                await asyncio.sleep(600)

    async def _bury(self, number: int) -> None:
        for _ in range(50):
            tasks = [task for task in self._loop.owned.pop(number, []) if not task.done()]
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)
        raise AssertionError(f"tasks of a dead process go on: {tasks}")

    async def _run(self) -> None:
        """What `billingd run` does, without listeners and signals."""
        store = Store(f"sqlite+aiosqlite:///{self._path}")
        settings = self._settings()
        await take_over(store, self._clock.now())
        amplify, recurly = self._amplify(settings), self._recurly(settings)
        channels: Any = Channels(self._chance(f"people{self.number}"))
        outside = Outside(amplify, recurly, channels, Metrics())
        rng = self._chance(f"backoff{self.number}")
        self.daemon = daemon = assemble(settings, store, self._clock, outside, rng=rng)
        self._softly.clear()
        tasks = [asyncio.create_task(step, name=name) for name, step in loops(daemon).items()]
        stop = asyncio.create_task(self._softly.wait())
        done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task is not stop:
                await task
                raise AssertionError(f"the loop {task.get_name()} ended")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.daemon = None
        await daemon.outbox.drain(at_most=settings.outbox.drain)
        await recurly.close(deadline=timedelta(seconds=5))
        await store.close()

    def _settings(self) -> Settings:
        return Settings.model_validate(
            {
                "amplify": {"organization_id": self._tenant.organization_id},
                "webhooks": {"auth": "none"},
                "store": {"keep_done": timedelta(days=3650)},  # the oracle asks for every event
                "traffic": {
                    "window": self.shape.window,
                    "settle": self.shape.settle,
                    "horizon": self.shape.horizon,
                    "schedule": self.shape.schedule,
                },
                "outbox": {
                    "workers": 4,
                    "lease": timedelta(hours=24),
                    "backoff_max": self.shape.look_again,
                },
                "subscriptions": {"on_cancel": self.shape.on_cancel},
                "catch_up": {"every": self.shape.feed, "resync_every": self.shape.resync},
            }
        )

    def _amplify(self, settings: Settings) -> Amplify:
        assert self._wire is not None
        session: Any = SimSession(self._wire)
        tokens = self._tenant.tokens
        return Amplify(
            session,
            central_url=BASE,
            login_url=f"{BASE}/auth",
            platform_url=BASE,
            api_version="v1",
            organization_id=self._tenant.organization_id,
            client_id=tokens.client_id,
            client_secret=tokens.client_secret,
            timeout=settings.amplify.timeout,
            clock=self._clock.now,
        )

    def _recurly(self, settings: Settings) -> Recurly:
        return Recurly(
            api_key=server.API_KEY,
            base_url=BASE,
            region="us",
            timeout=settings.recurly.timeout,
            requests_per_minute=settings.recurly.requests_per_minute,
            threads=settings.outbox.workers,
            clock=self._clock.now,
            monotonic=self._loop.time,
        )

    async def accepts(self, event: Event) -> bool:
        """Whether an event that was told by a webhook is taken."""
        if self.daemon is None:
            return False
        listener = self.daemon.webhooks
        task = spawn(_waited(listener._accept(event)), owner=self.number, name="accept")
        await asyncio.wait([task])
        if task.cancelled() or isinstance(error := task.exception(), Crash | BillingdError):
            return False
        if error is not None:
            raise error
        return bool(task.result().status == 202)


async def _waited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
