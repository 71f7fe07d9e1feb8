"""What commands work on: the settings, the running daemon, or without it the store itself."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.talk import Daemon, DaemonAway, DaemonHangs
from billingd.domain.errors import BillingdError, ReadingBack, StoreBusy, StoreHeld

if TYPE_CHECKING:
    from billingd.settings import Fault, Settings
    from billingd.store.engine import Store

T = TypeVar("T")

START_IT: Final = (
    "start it with `billingd run`, or name the configuration it runs with: `billingd --config FILE ...`"
)


RESTART_IT: Final = "`systemctl restart billingd` ends that; `billingd doctor --only daemon` tells more"


class StoreMissing(BillingdError):
    """There is no store where the configuration says it is."""


def settings_of(config: Path | None) -> "Settings":
    """The settings, with logs (of which there should be none) on stderr. Raises ConfigurationError."""
    from billingd import logs
    from billingd.settings import ConfigurationError, load

    logs.configure(level="warning", json=False)  # whoever types a command reads them
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
            if not store.path.parent.is_dir():
                raise StoreMissing(f"there is no directory {store.path.parent} for the store; make it first")
            raise StoreMissing(
                f"there is no store at {store.path} (`billingd run` or `billingd db upgrade` makes it)"
            )
        if store.path is not None and not store.path.parent.is_dir():
            raise StoreMissing(f"there is no directory {store.path.parent}; make it first")
        if lock:
            store.lock()
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
            raise _neither(away, error) from None
        if not quiet:
            output.note(f"{_how(away, store.path)}; read from the store")
        return answer


async def ask_or_change(
    settings: "Settings",
    ask: Callable[[Daemon], Awaitable[T]],
    change: "Callable[[Store], Awaitable[T]]",
    *,
    quiet: bool,
) -> T:
    """Let the daemon do it, or without it do it on the store, whose lock keeps a daemon from starting.

    One that hangs may still be at it, and on PostgreSQL no lock says so: nothing is done beside it.
    """
    from billingd.store.engine import StoreUnavailable

    try:
        return await ask(Daemon(settings.admin.listen))
    except DaemonAway as away:
        if isinstance(away, DaemonHangs) and not settings.store.url.startswith("sqlite"):
            raise Unreachable(f"{away}, but listens there: it hangs; {RESTART_IT}") from None
        try:
            async with opened(settings, lock=True) as store:
                answer = await change(store)
        except StoreHeld as error:
            step = "see that admin.listen is the daemon's own"
            if isinstance(away, DaemonHangs):
                away, step = DaemonHangs(f"{away}, but listens there: it hangs"), RESTART_IT
            raise StoreBusy(f"{error}, but {away}; {step}") from None
        except ReadingBack as error:
            raise Unreachable(f"{error}: the daemon does that, and none runs; {START_IT}") from None
        except (StoreMissing, StoreUnavailable) as error:
            raise _neither(away, error) from None
        if not quiet:
            output.note("the daemon does not answer; done on the store itself")
        return answer


def _how(away: DaemonAway, store: Path | None) -> str:
    """In which way no daemon answers: none runs, or one hangs, and what ends that."""
    from billingd.store.holder import holder

    hangs = isinstance(away, DaemonHangs)
    if (process := holder(store)) is not None:
        more = RESTART_IT if hangs else "`billingd doctor --only daemon` tells more"
        return f"{away}, but process {process} holds the store; {more}"
    return f"{away}, but listens there: it hangs; {RESTART_IT}" if hangs else "the daemon does not answer"


def _neither(away: DaemonAway, error: BillingdError) -> Unreachable:
    """There is neither a daemon nor a store, and what mends that."""
    from billingd.store.engine import ServerAway

    if isinstance(error, ServerAway):
        step = "see that its server runs and lets us in"
    elif isinstance(error, StoreMissing):
        step = START_IT
    else:
        step = "`billingd doctor --only store` tells more"
    return Unreachable(f"{away}, and {error}; {step}")
