"""The store's connection: one transaction at a time for writing on SQLite, many on PostgreSQL."""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from billingd.domain.errors import BillingdError, Retryable, StoreHeld
from billingd.store.holder import holder
from billingd.store.rows import upsert
from billingd.store.schema import marks

Tx = AsyncConnection
"""A transaction: whoever opened it commits by leaving its block; statements never do."""

BUSY_TIMEOUT_MS: Final = 5_000
READERS: Final = 4
POSTGRES_CONNECTIONS: Final = 10
POSTGRES_CONNECT_SECONDS: Final = 10.0
STATEMENT_SECONDS: Final = 120.0
"""What the daemon gives a statement on PostgreSQL, which may have fallen silent: longer than any of its own
takes, shorter than a loop may stand still. Migrations, copies and commands take as long as they take."""

APPLICATION: Final = "billingd"
"""How PostgreSQL's `pg_stat_activity` names our connections: a restore waits for none to be left."""

PROOF: Final = "written"
"""A mark that is there only while the store proves that it can be written again."""

PROOF_BYTES: Final = 65_536
"""What it holds: more than an event with all its actions and the pages of their indexes."""


class StoreUnavailable(Retryable):
    """The store cannot read or commit now: disk full, read-only, locked, or the server away."""


class ServerAway(StoreUnavailable):
    """The server of a PostgreSQL store does not answer, or takes nothing now."""


class StoreDamaged(BillingdError):
    """SQLite cannot read its file: it is damaged, or was never a store."""


class Store:
    """The durable store. `write` and `read` are its only ways in; flows open them, statements run in them."""

    def __init__(self, url: str, *, statement_seconds: float | None = None) -> None:
        """`statement_seconds`: how long PostgreSQL may take for a statement; None is no limit."""
        self.url = sa.make_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._locked: int | None = None
        self.write_error: str | None = None
        """Why writing failed; None again once as much as a webhook needs was written and is on disk."""
        self._server = None if self.sqlite else self.url.set(query={}).render_as_string(hide_password=True)
        if self.sqlite:
            self._writer = _sqlite(self.url, pool_size=1)
            self._reader = _sqlite(self.url, pool_size=READERS)
            self._group: GroupCommit | None = GroupCommit(self._writer)
        else:
            self._writer = self._reader = create_async_engine(
                self.url,
                pool_size=POSTGRES_CONNECTIONS,
                max_overflow=0,
                pool_pre_ping=True,
                connect_args={
                    "server_settings": {"application_name": APPLICATION},
                    "timeout": POSTGRES_CONNECT_SECONDS,
                    "command_timeout": statement_seconds,
                },
            )
            self._group = None

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None on PostgreSQL and in memory."""
        return Path(self.url.database) if self.sqlite and self.url.database else None

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        """A transaction that is committed, and on disk, when the block has ended well.

        Raises StoreUnavailable when it cannot be.
        """
        try:
            async with self._transaction() as tx:
                yield tx
        except (StoreUnavailable, StoreDamaged) as error:
            self.write_error = str(error)
            raise
        if self.write_error is not None:
            await self._prove()

    def _transaction(self) -> AbstractAsyncContextManager[Tx]:
        return self._group.member() if self._group is not None else _transaction(self._writer, self._server)

    async def _prove(self) -> None:
        """See that a write as large as any webhook's goes well again; what wrote nothing proves nothing.

        On a full disk a claim that finds no action commits, for it touches no page. On PostgreSQL several
        writers may be at it at once.
        """
        padding = {"name": PROOF, "at": datetime.now(UTC), "detail": {"padding": "." * PROOF_BYTES}}
        try:
            async with self._transaction() as tx:
                await upsert(tx, marks, padding)
            async with self._transaction() as tx:
                await tx.execute(sa.delete(marks).where(marks.c.name == PROOF))
        except (StoreUnavailable, StoreDamaged) as error:
            self.write_error = str(error)
        else:
            self.write_error = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        """A consistent view; nothing written in it is kept. Raises StoreUnavailable."""
        with _translated(self._server):
            async with self._reader.connect() as tx:  # leaving it rolls back
                if self.sqlite:
                    await tx.exec_driver_sql("BEGIN")
                yield tx

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Tx]:
        """As `read`, but all its statements see the store as it was at the first, on PostgreSQL too."""
        if self.sqlite:
            async with self.read() as tx:
                yield tx
            return
        with _translated(self._server):
            async with self._reader.connect() as connection:
                yield await connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )

    def lock(self) -> None:
        """Take a SQLite store for this process until it ends. Raises StoreHeld when another has it.

        PostgreSQL needs no lock: claims are fenced there.
        """
        if self.path is None or self._locked is not None:
            return
        lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            handle = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not lock_path.parent.is_dir():
                raise StoreUnavailable(f"there is no directory {lock_path.parent}; make it first") from error
            raise StoreUnavailable(f"cannot open {lock_path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            process = holder(self.path)
            who = "another process" if process is None else f"process {process}"
            raise StoreHeld(f"the store {self.path} is held by {who} (lock {lock_path})") from None
        self._locked = handle

    async def close(self) -> None:
        """Close every connection and let go of the lock."""
        if self._group is not None:
            await self._group.close()
        await self._writer.dispose()
        if self._reader is not self._writer:
            await self._reader.dispose()
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class GroupCommit:
    """One writer at a time, and one sync to disk for all that wait together (SQLite syncs at each commit).

    Blocks run one after the other in a transaction they share. The first of a group queues its commit
    behind whoever waits already; a block returns when that commit is on disk. A later block has a savepoint
    of its own, sees what an earlier one wrote, and fails with it if the commit fails. The first needs no
    savepoint: when it fails, nobody else is in the transaction yet, and all of it is rolled back.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()  # first come, first served; SQLite's own wait is unfair
        self._connection: AsyncConnection | None = None
        self._committed: asyncio.Future[None] | None = None
        self._committing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def member(self) -> AsyncIterator[Tx]:
        """A block in the group that is open now, or the first of a new one."""
        async with self._turn:
            first = self._connection is None
            connection, committed = await self._open()
            try:
                with _translated():
                    async with contextlib.nullcontext() if first else connection.begin_nested():
                        yield connection
            except (StoreUnavailable, StoreDamaged) as error:
                await self._end(error)  # SQLite may have rolled all of the group back
                raise
            except BaseException as error:
                if not connection.invalidated:
                    if first:
                        await self._end()
                    raise
                # what SQLAlchemy does when a statement is cancelled: nobody in the group is kept
                cut_off = StoreUnavailable("the store is not available: who shared a transaction was cut off")
                await self._end(cut_off)
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError from error
                raise cut_off from error
        # Whoever is cancelled here has written: as after any commit, it must look before it tries again.
        await asyncio.shield(committed)

    async def close(self) -> None:
        """Wait for the last commit."""
        await asyncio.gather(*self._committing, return_exceptions=True)

    async def _open(self) -> tuple[AsyncConnection, asyncio.Future[None]]:
        if self._connection is not None and self._committed is not None:
            return self._connection, self._committed
        with _translated():
            connection = await self._engine.connect().start()
            try:
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            except BaseException:  # cancelled, say: the pool has one connection, and must get it back
                await connection.close()
                raise
        self._connection = connection
        self._committed = asyncio.get_running_loop().create_future()
        self._committed.add_done_callback(lambda done: done.exception())  # a group of failures has no reader
        task = asyncio.create_task(self._commit(connection, self._committed), name="store-commit")
        self._committing.add(task)
        task.add_done_callback(self._committing.discard)
        return connection, self._committed

    async def _end(self, error: BillingdError | None = None) -> None:
        """End the open group without a commit; all its blocks fail alike (no error: there are none left)."""
        connection, committed = self._connection, self._committed
        self._connection = self._committed = None
        if committed is not None:
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(error)
        if connection is not None:
            with contextlib.suppress(sa.exc.SQLAlchemyError):  # there is nothing left to lose
                await connection.close()

    async def _commit(self, connection: AsyncConnection, committed: asyncio.Future[None]) -> None:
        """Commit the open group, once everybody who waited before has had a turn."""
        async with self._turn:
            if committed.done():
                return  # it ended without
            self._connection = self._committed = None
            try:
                with _translated():
                    try:
                        await connection.commit()
                    except BaseException:  # cancelled or failed alike
                        # SQLAlchemy takes a transaction whose commit failed for ended; SQLite may not
                        await connection.invalidate()
                        raise
                    finally:
                        await connection.close()
            except Exception as error:
                committed.set_exception(error)
            else:
                committed.set_result(None)


@asynccontextmanager
async def _transaction(engine: AsyncEngine, server: str | None) -> AsyncIterator[Tx]:
    with _translated(server):
        async with engine.begin() as connection:
            yield connection


@contextmanager
def _translated(server: str | None = None) -> Iterator[None]:
    """What the driver says of a store that is away, as StoreUnavailable; `server`: whose it is."""
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, OSError) as error:
        raise _unavailable(server, error) from error
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated or _connection_lost(error):
            raise _unavailable(server, error) from error
        if type(error.orig) is sqlite3.DatabaseError:
            raise StoreDamaged(
                f"the store is damaged, or is none ({_plain(error)}); "
                "`billingd db restore FILE` puts a backup in its place"
            ) from error
        raise


def _unavailable(server: str | None, error: BaseException) -> StoreUnavailable:
    if server is None:
        return StoreUnavailable(f"the store is not available: {_plain(error)}")
    return ServerAway(f"the store (store.url {server}) is not available: {_plain(error)}")


def _plain(error: BaseException) -> str:
    """The driver's own words, without the statement and its parameters."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    if isinstance(cause, TimeoutError) and not str(cause):
        return "it did not answer in time"
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__


def _connection_lost(error: sa.exc.DBAPIError) -> bool:
    """PostgreSQL's classes 08 (connection), 28 (not let in), 3D (no such database), 40 (rolled back, as in a
    deadlock), 53 (no resources), 57 (shutting down, timed out), 58 (its disk), and 25006 (read-only), 55000
    (takes no connections), 55P03 (locked).
    """
    state = str(getattr(error.orig, "sqlstate", None) or "")
    lost = state.startswith(("08", "28", "3D", "40", "53", "57", "58"))
    return lost or state in {"25006", "55000", "55P03"}


def _sqlite(url: sa.URL, *, pool_size: int) -> AsyncEngine:
    if url.database in {None, "", ":memory:"}:
        raise ValueError("store.url must name a file: an in-memory store is not durable")
    engine = create_async_engine(
        url, pool_size=pool_size, max_overflow=0, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is said where a transaction begins: a writer's is IMMEDIATE
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={BUSY_TIMEOUT_MS}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine
