"""What commands work on: the settings, the running daemon, or without it the store itself."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.talk import Daemon, DaemonAway
from billingd.domain.errors import BillingdError, StoreBusy

if TYPE_CHECKING:
    from billingd.settings import Fault, Settings
    from billingd.store.engine import Store

T = TypeVar("T")

START_IT: Final = (
    "start it with `billingd run`, or name the configuration it runs with: `billingd --config FILE ...`"
)


class StoreMissing(BillingdError):
    """There is no store where the configuration says it is."""


class StoreHeld(StoreBusy):
    """Another process has the store's lock."""


def settings_of(config: Path | None) -> "Settings":
    """The settings, with logs (of which there should be none) on stderr. Raises ConfigurationError."""
    from billingd import logs
    from billingd.settings import ConfigurationError, load

    logs.configure(level="warning")
    settings = load(config).settings
    if faults := driver_faults(settings):
        raise ConfigurationError(faults)
    return settings


def driver_faults(settings: "Settings") -> "list[Fault]":
    """What the store's URL needs and this installation lacks."""
    from billingd.settings import Fault

    if settings.store.url.startswith("postgresql") and find_spec("asyncpg") is None:
        return [Fault("store.url", "needs the PostgreSQL driver: pip install 'billingd[postgres]'")]
    if settings.store.url.startswith("postgresql") and (unknown := _unknown_to_driver(settings.store.url)):
        names = ", ".join(unknown)
        return [Fault("store.url", f"has {names}, which asyncpg does not know (for TLS: ssl=require)")]
    return []


def _unknown_to_driver(url: str) -> list[str]:
    """The names after the question mark that the driver would stumble over."""
    import inspect

    import asyncpg
    import sqlalchemy as sa

    known = {*inspect.signature(asyncpg.connect).parameters, "prepared_statement_cache_size"}
    return sorted(set(sa.make_url(url).query) - known)


@asynccontextmanager
async def opened(
    settings: "Settings", *, lock: bool = False, may_be_missing: bool = False, current: bool = True
) -> "AsyncIterator[Store]":
    """The store, never made by a look at it; with the schema this program knows, unless `current` is off.

    Raises StoreMissing, StoreUnavailable, StoreBusy (held, or newer), SchemaBehind.
    """
    import sqlalchemy as sa

    from billingd.store import migrate
    from billingd.store.engine import Store

    async with Store(settings.store.url) as store:
        if store.path is not None and not store.path.exists() and not may_be_missing:
            raise StoreMissing(
                f"there is no store at {store.path} (`billingd run` or `billingd db upgrade` makes it)"
            )
        if store.path is not None and not store.path.parent.is_dir():
            raise StoreMissing(f"there is no directory {store.path.parent}; make it first")
        if lock:
            try:
                store.lock()
            except StoreBusy as error:
                raise StoreHeld(str(error)) from None
        try:
            if current:
                await migrate.check(store)
            yield store
        except sa.exc.DBAPIError as error:
            name = store.url.render_as_string(hide_password=True)
            raise BillingdError(f"the store {name} cannot be used: {error.orig}") from error


async def ask_or_read(
    settings: "Settings",
    ask: Callable[[Daemon], Awaitable[T]],
    read: "Callable[[Store], Awaitable[T]]",
    *,
    quiet: bool,
) -> T:
    """What the daemon says, or without it what the store says; a note tells which unless `quiet`."""
    from billingd.store.engine import StoreUnavailable

    try:
        return await ask(Daemon(settings.admin.listen))
    except DaemonAway as away:
        try:
            async with opened(settings) as store:
                answer = await read(store)
        except (StoreMissing, StoreUnavailable) as error:
            raise Unreachable(f"{away}, and {error}; {START_IT}") from None
    if not quiet:
        output.note("the daemon does not answer; read from the store")
    return answer


async def ask_or_change(
    settings: "Settings",
    ask: Callable[[Daemon], Awaitable[T]],
    change: "Callable[[Store], Awaitable[T]]",
    *,
    quiet: bool,
) -> T:
    """Let the daemon do it, or without it do it on the store, whose lock keeps a daemon from starting."""
    from billingd.store.engine import StoreUnavailable

    try:
        return await ask(Daemon(settings.admin.listen))
    except DaemonAway as away:
        try:
            async with opened(settings, lock=True) as store:
                answer = await change(store)
        except StoreHeld as error:
            raise StoreBusy(f"{error}, but {away}; see that admin.listen is the daemon's own") from None
        except (StoreMissing, StoreUnavailable) as error:
            raise Unreachable(f"{away}, and {error}; {START_IT}") from None
    if not quiet:
        output.note("the daemon does not answer; done on the store itself")
    return answer
