"""Dying at numbered points: a life that can be taken back to the beginning of each of its scenes."""

import asyncio
import copy
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from faster import named_once, quiet, seldom_collected, sqlite_inline, templates_once
from rig import HOUR, Rig, Saved, a_rig
from scripted import SCENES, Scene, Script, live, misplaced, outlived, wrong

from billingd.domain.errors import BillingdError
from billingd.store.engine import Store
from billingd.store.schema import metadata

MEMORY = Path("/dev/shm")


@contextmanager
def quick_store(template: Path) -> Iterator[str]:
    """The URL of a SQLite store in memory where there is such a place, else on disk."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="billingd-", dir=place))
    try:
        shutil.copy(template, directory / "billingd.db")
        yield f"sqlite+aiosqlite:///{directory / 'billingd.db'}"
    finally:
        shutil.rmtree(directory)


@contextmanager
def store_on(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """The URL of an empty store of that kind: in memory where it is SQLite."""
    if database == "sqlite":
        with quick_store(request.getfixturevalue("sqlite_template")) as url:
            yield url
        return
    url = request.getfixturevalue("postgres_migrated")
    asyncio.run(_emptied(url))
    yield url


async def _emptied(url: str) -> None:
    async with Store(url) as store, store.write() as tx:
        names = ", ".join(table.name for table in metadata.sorted_tables)
        await tx.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))


@dataclass
class Stage:
    """A moment at which something has just happened in the world, and how long the daemon then lives on."""

    rig: Rig
    script: Script
    saved: Saved
    until: datetime
    rest: Sequence[Scene]
    left: list[Saved] = field(default_factory=list)
    """What a kill leaves at each point, once that was watched."""

    async def watched(self) -> list[str]:
        """Lives the scene once, keeping what a kill would leave at each point; the points by name."""
        self.left.clear()
        await self.rig.load(self.saved)
        self.rig.steps.arm(None)
        self.rig.steps.watch = lambda sent: self.left.append(self.rig.left(sent))
        try:
            await live(self.rig, self.until)
        finally:
            self.rig.steps.watch = None
        return list(self.rig.steps.taken)

    async def die_at(self, point: int) -> bool:
        """Lives from the beginning of the scene up to that point; whether there is such a point.

        What was watched is not lived again: what a kill leaves there is known.
        """
        if self.left:
            await self.rig.load(self.left[point - 1], dead=True)
            return True
        await self.rig.load(self.saved)
        self.rig.steps.arm(point)
        return not await outlived(self.rig, live(self.rig, self.until))

    async def recover(self, *, die_at: int | None = None) -> bool:
        """A new process finishes the scene; False when it died as well.

        What the dead one had sent reaches the far side after the new one has looked for the first time.
        """
        return await outlived(self.rig, self._recovery(die_at))

    async def _recovery(self, die_at: int | None) -> None:
        rig = self.rig
        await rig.restart(die_at=die_at)
        try:
            await rig.hear()
            await rig.drain()
        except BillingdError:
            rig.steps.alive()
        await rig.land()
        await live(rig, self.until, new_process=True)

    async def finish(self) -> Script:
        """Plays the rest of the life; returns what was played in all."""
        script = copy.deepcopy(self.script)
        for scene in self.rest:
            span = await scene(self.rig, script)
            await live(self.rig, self.rig.far.now() + span)
        return script

    async def faults(self, script: Script | None = None) -> list[str]:
        """What is not as it must be."""
        played = script or self.script
        return [*await wrong(self.rig, played), *misplaced(self.rig, played)]


@asynccontextmanager
async def staged(url: str, number: int, *, reads: bool = False, inline: bool = False) -> AsyncIterator[Stage]:
    """The beginning of a scene of the life, after all scenes before it went well."""
    async with AsyncExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(templates_once())
        stack.enter_context(named_once())
        stack.enter_context(seldom_collected())
        if inline:
            stack.enter_context(sqlite_inline())
        rig = await stack.enter_async_context(a_rig(url, threads=True, same_ids=True))
        rig.workers = 1  # so that the same point is the same moment each time
        rig.look_again = HOUR
        rig.start()
        script = Script()
        for scene in SCENES[:number]:
            span = await scene(rig, script)
            await live(rig, rig.far.now() + span)
        span = await SCENES[number](rig, script)
        rig.steps.wire, rig.steps.reads = True, reads
        yield Stage(rig, script, await rig.save(), rig.far.now() + span, SCENES[number + 1 :])
