"""The disk is full, or the store takes no writes, at each commit: what was acknowledged is never lost."""

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from unittest.mock import patch

import pytest
import sqlalchemy as sa
from aiohttp.test_utils import TestClient, TestServer
from points import Stage, staged, store_on
from rig import Rig
from scale import FULL, again, only
from scripted import MINUTE, SCENES, live

from billingd.store import schema

Record = Callable[[str, object], None]

AWAY = MINUTE / 3
"""How long the trouble lasts."""

NAMES = [scene.__name__ for scene in SCENES]
HERE = NAMES if FULL else ["first", "serving"]
FULL_AT_COMMIT, NO_PAGE, READ_ONLY = "full at commit", "no page left", "read-only"
CELLS = [
    (database, trouble)
    for database in (("sqlite", "postgres") if FULL else ("sqlite",))
    for trouble in (FULL_AT_COMMIT, NO_PAGE, READ_ONLY)
    if (database, trouble) != ("postgres", NO_PAGE)
]


class DiskFull(sqlite3.OperationalError):
    """What a driver says when a commit finds no room; the state is PostgreSQL's."""

    sqlstate = "53100"


class Disk:
    """What is under the store of a rig: from the nth commit on, nothing is written for a while."""

    def __init__(self, rig: Rig, trouble: str) -> None:
        self._rig = rig
        self._trouble = trouble
        self._at: int | None = None
        self._since: datetime | None = None
        self.commits = 0
        self.refused = 0
        engine = rig.store._writer.sync_engine
        sa.event.listen(engine, "checkout", self._checkout)
        sa.event.listen(engine, "begin", self._begin)
        sa.event.listen(engine, "commit", self._commit)

    def arm(self, at: int | None) -> None:
        """Counts commits from now on; trouble begins at the nth."""
        self.commits, self._at, self._since = 0, at, None

    def _bad(self) -> bool:
        now = self._rig.far.now()
        if self._since is None and self._at is not None and self.commits + 1 >= self._at:
            self._since = now
        return self._since is not None and now < self._since + AWAY

    def _checkout(self, connection: Any, _record: object, _proxy: object) -> None:
        """On SQLite before BEGIN, which fails already on a store that is read-only."""
        if self._trouble == FULL_AT_COMMIT or not self._rig.store.sqlite:
            return
        bad = self._bad()
        self.refused += bad
        cursor = connection.cursor()
        if self._trouble == READ_ONLY:
            cursor.execute(f"PRAGMA query_only = {int(bad)}")
        else:
            cursor.execute(f"PRAGMA max_page_count = {1 if bad else 1_000_000}")
        cursor.close()

    def _begin(self, connection: sa.Connection) -> None:
        """On PostgreSQL as the transaction's first statement."""
        if self._trouble == READ_ONLY and not self._rig.store.sqlite and self._bad():
            self.refused += 1
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    def _commit(self, _connection: sa.Connection) -> None:
        if self._trouble == FULL_AT_COMMIT and self._bad():
            self.refused += 1
            raise sa.exc.OperationalError("COMMIT", {}, DiskFull("database or disk is full"))
        self.commits += 1


class Delivery:
    """Amplify's webhooks through the real listener: what is not acknowledged comes again."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.acknowledged: set[str] = set()
        self.put_off = 0

    async def hear(self) -> int:
        """Delivers what happened since, until one is put off; how many were acknowledged."""
        heard = 0
        async with TestClient(TestServer(self._rig.listener.application())) as client:
            while self._rig.unheard:
                event = self._rig.unheard[0]
                answer = await client.post("/webhooks/amplify", json=event.envelope())
                if answer.status == 503:
                    assert int(answer.headers["Retry-After"]) > 0
                    self.put_off += 1
                    break
                assert answer.status == 202, await answer.text()
                del self._rig.unheard[0]
                self.acknowledged.add(json.loads(await answer.text())["event"])
                heard += 1
        return heard

    async def lost(self) -> set[str]:
        """Events that were acknowledged and are not on disk."""
        return self.acknowledged - {row["id"] for row in await self._rig.rows(schema.events)}


@pytest.fixture(params=CELLS, ids=" ".join)
def cell(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """An empty store and the trouble it has."""
    database, trouble = request.param
    with store_on(request, database) as url:
        yield url, trouble


@asynccontextmanager
async def on_a_disk(url: str, scene: str, trouble: str) -> AsyncIterator[tuple[Stage, Disk]]:
    """The beginning of a scene on a disk that can fail."""
    async with staged(url, NAMES.index(scene), inline=not FULL) as stage:
        stage.rig.steps.wire = False
        yield stage, Disk(stage.rig, trouble)


@pytest.mark.parametrize("scene", HERE)
async def test_a_store_that_takes_no_writes_loses_nothing(
    scene: str, cell: tuple[str, str], request: pytest.FixtureRequest, record_property: Record
) -> None:
    """At each commit: webhooks are put off, work stands still, and goes on when there is room again.

    `BILLINGD_CHAOS_COMMIT=7` plays only that one.
    """
    url, trouble = cell
    failures: list[str] = []
    put_off = commits = 0
    async with on_a_disk(url, scene, trouble) as (stage, disk):
        disk.arm(None)
        await live(stage.rig, stage.until)
        assert await stage.faults() == []
        commits = disk.commits
        asked = only("COMMIT")
        assert not asked or 1 <= int(asked) <= commits, f"there is no commit {asked}, but {commits} of them"
        numbers = [int(asked)] if asked else range(1, commits + 1)
        for number in numbers:
            disk.arm(None)
            await stage.rig.load(stage.saved)
            delivery = Delivery(stage.rig)
            disk.arm(number)
            with patch.object(stage.rig, "hear", delivery.hear):
                await live(stage.rig, max(stage.until, stage.rig.far.now() + AWAY))
            put_off += delivery.put_off
            faults = await stage.faults()
            faults += [f"acknowledged and lost: {event}" for event in await delivery.lost()]
            if faults:
                command = again(request.node.nodeid, COMMIT=number)
                failures.append("\n  ".join([f"{scene}, {trouble} at commit {number}: {command}", *faults]))
        refused = disk.refused
    record_property("chaos", {"points": len(numbers), "faults": refused, "put_off": put_off})
    assert not failures, "\n".join(failures)
    assert refused >= (1 if asked else commits)
    assert put_off or asked or trouble == NO_PAGE or scene not in ("opening", "first")
