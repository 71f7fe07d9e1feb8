"""Where seeds are run: nothing in there has threads, sockets, real time, or the machine's own chance."""

import asyncio
import gc
import logging
import os
import secrets
import shutil
import ssl
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import faster
import sim_store
import structlog
from sim_life import Ingredients, Life
from sim_loop import SimLoop
from sim_loop import run as run_loop
from sim_wire import SimConnection, SimFlight, SimLocal, SimPool
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.ext.asyncio import engine as async_engine

from billingd import daemon, loops, outbox, resync
from billingd.adapters.recurly import client, sockets, workers
from billingd.store import engine

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""What the SDK wants to have and never uses here; making a real one takes 30 ms."""


@dataclass(slots=True)
class Result:
    """How a life ended."""

    seed: int
    faults: list[str]
    digest: str
    counts: Counter[str]
    trace: list[str] = field(default_factory=list)


@contextmanager
def inline(
    life_of: Callable[[], Life | None], loop_of: Callable[[], SimLoop], seed: int, *, tracing: bool
) -> Iterator[None]:
    """Nothing below uses threads, sockets, real time or the machine's chance."""
    chance = Random(f"{seed}:chance")

    def told(logger: Any, method: str, event: Any) -> Any:
        life = life_of()
        if life is None:
            raise structlog.DropEvent
        return life.told(logger, method, event)

    kept = structlog.get_config()
    level = logging.DEBUG if tracing else logging.CRITICAL
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, told],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    engine_of = sim_store.cached_engine(engine._sqlite)
    patches: list[Any] = [
        mock.patch.object(engine, "create_async_engine", sim_store.connect_arguments(create_async_engine)),
        mock.patch.object(engine, "_sqlite", engine_of),
        mock.patch.object(async_engine, "greenlet_spawn", sim_store.spawn_inline),
        mock.patch.object(AsyncAdapt_aiosqlite_connection, "_cursor_cls", sim_store.InlineCursor),
        mock.patch.object(workers, "ThreadPoolExecutor", SimPool),
        mock.patch.object(workers, "threading", SimpleNamespace(local=SimLocal)),
        mock.patch.object(workers, "Flight", SimFlight),
        mock.patch.object(client, "PlainConnection", SimConnection),
        mock.patch.object(sockets, "time", SimpleNamespace(monotonic=lambda: loop_of().time())),
        mock.patch.object(ssl, "_create_default_https_context", return_value=CONTEXT),
        mock.patch.object(os, "urandom", chance.randbytes),
        mock.patch.object(secrets, "token_hex", lambda count=16: chance.randbytes(count).hex()),
        mock.patch.object(secrets, "token_urlsafe", lambda count=16: chance.randbytes(count).hex()),
        mock.patch.object(outbox, "IDLE_MAX", timedelta(hours=6)),
        mock.patch.object(daemon, "PROBE_EVERY", timedelta(hours=6)),
        mock.patch.object(daemon, "TROUBLES_EVERY", timedelta(hours=6)),
        mock.patch.object(daemon, "REFRESH_EVERY", timedelta(hours=6)),
        mock.patch.object(daemon, "RETENTION_EVERY", timedelta(hours=12)),
        mock.patch.object(resync, "LOOK_EVERY", timedelta(hours=6)),
        mock.patch.object(loops, "HELD_UP_PAUSE_MAX", timedelta(minutes=10)),
    ]
    for patch in patches:
        patch.start()
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)  # a life leaves many cycles, and little that outlives it
    try:
        with faster.templates_once():
            yield
    finally:
        gc.set_threshold(*thresholds)
        for patch in reversed(patches):
            patch.stop()
        structlog.configure(**kept)


class Bench:
    """Where seeds are run one after the other: a store file and a template of it."""

    def __init__(self) -> None:
        base = sim_store.FILES if sim_store.FILES.is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="billingd-sim-", dir=base))
        self.template = self.directory / "template.db"
        self._lives = 0
        asyncio.run(sim_store.build_template(self.template))
        self._warm_up()

    def _warm_up(self) -> None:
        """An engine's first connection asks the database more than later ones: no seed is to see that."""
        path = self.directory / "warm.db"
        shutil.copyfile(self.template, path)

        async def use_both() -> None:
            sim_store.insert(sim_store.Disk(path, _no_step, lambda: False))
            store = engine.Store(f"sqlite+aiosqlite:///{path}")
            async with store, store.write(), store.read():
                pass

        with inline(lambda: None, lambda: SimLoop(Random(0)), 0, tracing=False):
            run_loop(lambda _: use_both(), Random(0))

    def close(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(
        self, seed: int, days: float, ingredients: Ingredients | None = None, *, tracing: bool = False
    ) -> Result:
        """One seed from beginning to end."""
        self._lives += 1
        path = self.directory / f"billingd{self._lives}.db"  # who lived before may still hold another
        shutil.copyfile(self.template, path)
        lives: list[Life] = []
        loop_seen: list[SimLoop] = []

        def make(loop: SimLoop) -> Coroutine[Any, Any, list[str]]:
            loop_seen.append(loop)

            async def live() -> list[str]:
                life = Life(loop, seed, days, path, ingredients or Ingredients(), tracing=tracing)
                lives.append(life)
                return await life.whole()

            return live()

        with inline(lambda: lives[0] if lives else None, lambda: loop_seen[0], seed, tracing=tracing):
            try:
                faults: list[str] = run_loop(make, Random(f"{seed}:order"))
            except Exception as error:
                if not lives:
                    raise
                faults = [f"{type(error).__name__}: {error}"]
                if tracing:
                    lives[0].trace += traceback.format_exc().splitlines()
        for left in self.directory.glob(f"{path.name}*"):
            left.unlink()
        life = lives[0]
        return Result(seed, faults, life.digest, life.counts, life.trace)


async def _no_step(_where: str) -> None:
    return None
