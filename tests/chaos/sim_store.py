"""The real store on a SQLite file, with a driver that runs inline: each statement a switch or a death."""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sim_loop import Crash
from sqlalchemy.connectors.asyncio import AsyncAdapt_dbapi_cursor
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import await_only, greenlet_spawn, immutabledict

from billingd.store import engine, migrate

Step = Callable[[str], Awaitable[None]]
"""Called at each point where the process may be switched away from, or die."""

FILES: Final = Path("/dev/shm")


class Disk:
    """The file that the current life of the daemon has open, and whether that life still goes on."""

    def __init__(self, path: Path, step: Step, due: Callable[[], bool]) -> None:
        self.path = path
        self.step = step
        self.due = due
        """Whether the next statement is such a point."""
        self.dead = False
        self.open: list[sqlite3.Connection] = []
        self.commits = 0

    def die(self) -> None:
        """Close every connection as the kernel does: what was not committed is rolled back."""
        self.dead = True
        for connection in self.open:
            connection.rollback()  # a cursor that is alive still would keep a closed one's lock
            connection.close()
        self.open.clear()


class _Current:
    disk: Disk | None = None


def insert(disk: Disk) -> None:
    """From now on the store is on this disk."""
    _Current.disk = disk


class InlineCursor(AsyncAdapt_dbapi_cursor):
    """SQLAlchemy's adapter, which lets others run, or the process die, only where the seed says so."""

    _cursor: Any
    _connection: Any

    def __init__(self, adapt_connection: Any) -> None:
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection
        self._cursor = self._connection.disk_alive() and self._connection._conn.cursor()
        self._soft_closed_memoized = immutabledict()
        self._rows = deque()

    def execute(self, operation: Any, parameters: Any = None) -> Any:
        return self._run(self._cursor.execute, operation, () if parameters is None else parameters)

    def executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        return self._run(self._cursor.executemany, operation, seq_of_parameters)

    def _run(self, work: Callable[..., Any], operation: Any, parameters: Any) -> Any:
        disk = self._connection.disk_alive()
        if disk.due():
            await_only(disk.step("statement"))
            self._connection.disk_alive()
        try:
            result = work(operation, parameters)
            if self._cursor.description:
                self._rows = deque(self._cursor.fetchall())
        except Exception as error:  # as SQLAlchemy's own adapter does
            self._adapt_connection._handle_exception(error)
        return result

    async def _async_soft_close(self) -> None:
        return None

    def close(self) -> None:
        self._rows.clear()


class _Transmission:
    """aiosqlite's queue, as far as SQLAlchemy sets the isolation level through it."""

    def put_nowait(self, item: tuple[asyncio.Future[Any], Callable[[], Any]]) -> None:
        future, function = item
        future.set_result(function())


class _Connection:
    """aiosqlite's connection as SQLAlchemy's dialect sees it, without its thread."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        if disk.dead:
            raise Crash("the store")
        self._conn = sqlite3.connect(disk.path, timeout=0, check_same_thread=False)
        self._tx = _Transmission()
        self._open = True
        disk.open.append(self._conn)

    def disk_alive(self) -> Disk:
        if self.disk.dead:
            raise Crash("the store")
        return self.disk

    @property
    def _connection(self) -> sqlite3.Connection | None:
        return self._conn if self._open else None

    @property
    def isolation_level(self) -> str | None:
        return self._conn.isolation_level

    async def create_function(self, *args: Any, **kwargs: Any) -> None:
        self._conn.create_function(*args, **kwargs)

    async def commit(self) -> None:
        disk = self.disk_alive()
        if not self._conn.in_transaction:
            return
        await disk.step("commit")
        self.disk_alive()
        self._conn.commit()
        disk.commits += 1
        await disk.step("committed")
        self.disk_alive()

    async def rollback(self) -> None:
        if not self.disk.dead and self._open:
            self._conn.rollback()

    async def close(self) -> None:
        if self._open:
            self._open = False
            if self._conn in self.disk.open:
                self.disk.open.remove(self._conn)
                self._conn.close()

    def stop(self) -> None:
        """aiosqlite's way to end without an event loop."""
        if self._open:
            self._open = False
            if self._conn in self.disk.open:
                self.disk.open.remove(self._conn)
                self._conn.close()


class InlineConnection(AsyncConnection):
    """SQLAlchemy's, but closing needs no task of its own: nothing in it waits, so nothing can cut it off."""

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        await self.close()


class InlineEngine(AsyncEngine):
    """The engine of such connections."""

    _connection_cls = InlineConnection


def spawn_inline(
    work: Callable[..., Any], *args: Any, _require_await: bool = False, **named: Any
) -> Awaitable[Any]:
    """greenlet_spawn for a driver that need not wait at every statement."""
    return greenlet_spawn(work, *args, **named)


async def _connect(*_path: Any, **_options: Any) -> _Connection:
    assert _Current.disk is not None
    return _Connection(_Current.disk)


_ENGINES: dict[int, AsyncEngine] = {}
"""By the size of the pool: the writer's and the readers'."""


def cached_engine(make: Callable[..., AsyncEngine]) -> Callable[..., AsyncEngine]:
    """Engines that outlive a life of the daemon, so that statements are compiled once in a test process."""

    def engine_of(url: sa.URL, *, pool_size: int) -> AsyncEngine:
        found = _ENGINES.get(pool_size)
        if found is None:
            found = _ENGINES[pool_size] = make(url, pool_size=pool_size)

            @sa.event.listens_for(found.sync_engine, "connect")
            def faster(connection: Any, _record: Any) -> None:
                cursor = connection.cursor()
                cursor.execute("PRAGMA synchronous=OFF")  # a process dies here, never the machine
                cursor.close()

        sync = found.sync_engine
        sync.pool = sync.pool.recreate()  # whoever held a connection is gone
        return found

    return engine_of


def connect_arguments(make: Callable[..., AsyncEngine]) -> Callable[..., AsyncEngine]:
    """create_async_engine with the inline driver."""

    def created(url: sa.URL, **options: Any) -> AsyncEngine:
        arguments = {**options.pop("connect_args", {}), "async_creator_fn": _connect}
        return InlineEngine(make(url, connect_args=arguments, **options).sync_engine)

    return created


async def build_template(path: Path) -> None:
    """A migrated, empty store file, to be copied for each seed."""
    async with engine.Store(f"sqlite+aiosqlite:///{path}") as store:
        await migrate.upgrade(store)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
