"""The composition root: builds every part, turns the loops, and ends cleanly on SIGTERM."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, Final

import aiohttp
import structlog
from aiohttp import web
from cronsim import CronSim

from billingd import __version__, listening, systemd, tls
from billingd.adapters.amplify import REGIONS, Amplify, traffic_source
from billingd.adapters.announce import Announcer
from billingd.adapters.recurly import Recurly
from billingd.admin.metrics import Metrics
from billingd.admin.server import AdminListener, FarSide, Parts
from billingd.admin.status import Watched
from billingd.adoption import Adoption
from billingd.catch_up import CatchUp
from billingd.domain.attempts import Patience
from billingd.domain.errors import BillingdError
from billingd.domain.events import (
    ADOPT_SUBSCRIPTION,
    ATTACH_ADD_ONS,
    AUDIT_USAGE,
    END_SUBSCRIPTION,
    PROVISION_PLAN,
    PROVISION_PRODUCT,
    PROVISION_SUBSCRIPTION,
    REFRESH_SUBSCRIPTION,
    REPAIR_USAGE,
    REPORT_USAGE,
    RESYNC,
)
from billingd.domain.notices import NOTIFY_PROVIDER, NOTIFY_SUBSCRIBER
from billingd.intake import Intake
from billingd.loops import Clock, Progress, every, forever
from billingd.notify import Notifier
from billingd.once import Once
from billingd.outbox import Handler, Outbox
from billingd.provisioning.absence import Absences
from billingd.provisioning.attach import AddOnAttacher
from billingd.provisioning.ending import SubscriptionEnder
from billingd.provisioning.linking import Linker
from billingd.provisioning.plan import PlanProvisioner
from billingd.provisioning.pricecheck import PriceCheck
from billingd.provisioning.product import ProductProvisioner
from billingd.provisioning.subscription import Policy, SubscriptionProvisioner
from billingd.reception import Reception
from billingd.reconcile.billed import BilledSurvey
from billingd.reconcile.linkage import Linkage
from billingd.reconcile.repair import UsageRepairer
from billingd.reconcile.runs import Reconciler
from billingd.reconcile.served import ServedSurvey
from billingd.reload import CERTIFICATE_EVERY, Reloader
from billingd.resync import Resync
from billingd.settings import ConfigurationError, Fault, Settings, host_port, parse_duration
from billingd.store import copies, events, intents, migrate, outbox
from billingd.store.engine import STATEMENT_SECONDS, Store
from billingd.traffic.audit import UsageAuditor
from billingd.traffic.periods import REFRESH_EVERY, PeriodWatch
from billingd.traffic.poll import TrafficPoller
from billingd.traffic.read_back import ReadBack
from billingd.traffic.report import UsageReporter
from billingd.troubles import TroubleWatch
from billingd.webhooks import Authenticator, Tally, WebhookListener
from billingd.wording import Wording

log = structlog.get_logger()

PROBE_EVERY: Final = timedelta(seconds=30)
TROUBLES_EVERY: Final = timedelta(seconds=15)
RETENTION_EVERY: Final = timedelta(hours=1)
POLL_PATIENCE: Final = timedelta(hours=1)
"""A catch-up over weeks of windows may take this long before the process counts as stuck."""

HTTP_CLOSE_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Daemon:
    """Every part that runs."""

    settings: Settings
    clock: Clock
    store: Store
    amplify: Amplify
    recurly: Recurly
    outbox: Outbox
    poller: TrafficPoller
    read_back: ReadBack
    resync: Resync
    adoption: Adoption
    reconciler: Reconciler
    catch_up: CatchUp
    webhooks: WebhookListener
    admin: AdminListener
    progress: Progress
    troubles: TroubleWatch


async def run(settings: Settings, read: Callable[[], Settings]) -> None:
    """Run until SIGTERM or SIGINT, then drain; `read` reads the configuration anew when asked to reload.

    Raises StoreBusy when another process has the store.
    """
    os.umask(0o077)  # the store and the admin socket are nobody else's business
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    inherited = systemd.inherited()
    clock = Clock()
    async with Store(settings.store.url, statement_seconds=STATEMENT_SECONDS) as store:
        store.lock()
        async with Store(settings.store.url) as unhurried:
            await _migrate(unhurried, clock.now())
        await take_over(store, clock.now())
        async with build(settings, store, clock) as daemon:
            await _serve(daemon, stop, inherited, read)
    log.info("daemon.stopped")


async def take_over(store: Store, now: datetime) -> None:
    """End what a dead process had under way. Only a SQLite store's lock tells that nobody else is left."""
    if store.sqlite:
        async with store.write() as tx:
            await outbox.take_back_leases(tx, now=now)
            await intents.end_sendings(tx, now=now)


async def _migrate(store: Store, now: datetime) -> None:
    """Bring the store up to date, after a backup on SQLite when it holds anything."""
    try:
        await migrate.check(store)
    except migrate.SchemaBehind:
        empty = await migrate.current(store) is None
        copy = None if empty else copies.before_upgrade(store, now=now)
        if copy is not None:
            log.info("store.backed_up", to=str(copy))
        with copies.one_kept(store, copy):
            before, after = await migrate.upgrade(store)
        log.info("store.upgraded", before=before, after=after)


@dataclass(frozen=True)
class Outside:
    """What billingd talks to, and what it counts of that."""

    amplify: Amplify
    recurly: Recurly
    announcer: Announcer
    metrics: Metrics


def make_amplify(
    settings: Settings,
    session: aiohttp.ClientSession,
    clock: Clock,
    *,
    observe: Callable[[str, float], None] | None = None,
) -> Amplify:
    """Amplify as it is configured."""
    region = REGIONS[settings.amplify.region]
    return Amplify(
        session,
        central_url=settings.amplify.central_url or region.central_url,
        login_url=settings.amplify.login_url or region.login_url,
        platform_url=settings.amplify.platform_url or region.platform_url,
        api_version=settings.amplify.api_version,
        organization_id=settings.amplify.organization_id,
        client_id=settings.amplify.client_id,
        client_secret=settings.amplify.client_secret.get_secret_value(),
        timeout=settings.amplify.timeout,
        clock=clock.now,
        observe=observe,
    )


def make_recurly(
    settings: Settings, clock: Clock, *, observe: Callable[[str, float], None] | None = None
) -> Recurly:
    """Recurly as it is configured."""
    return Recurly(
        api_key=settings.recurly.api_key.get_secret_value(),
        base_url=settings.recurly.base_url,
        region=settings.recurly.region,
        timeout=settings.recurly.timeout,
        requests_per_minute=settings.recurly.requests_per_minute,
        threads=settings.outbox.workers,
        observe=observe,
        clock=clock.now,
    )


@asynccontextmanager
async def build(settings: Settings, store: Store, clock: Clock) -> AsyncIterator[Daemon]:
    """Construct every part; nothing starts here."""
    metrics = Metrics()
    async with aiohttp.ClientSession() as session:
        amplify = make_amplify(settings, session, clock, observe=metrics.observer("amplify"))
        recurly = make_recurly(settings, clock, observe=metrics.observer("recurly"))
        announcer = Announcer(
            [url.get_secret_value() for url in settings.notifications.provider],
            settings.notifications.subscriber.get_secret_value(),
        )
        outside = Outside(amplify, recurly, announcer, metrics)
        yield assemble(settings, store, clock, outside, rng=SystemRandom())


def assemble(settings: Settings, store: Store, clock: Clock, outside: Outside, *, rng: Random) -> Daemon:
    """Put the parts together. The only place that knows every class."""
    amplify, recurly, metrics = outside.amplify, outside.recurly, outside.metrics
    tally, progress = Tally(), Progress()
    tally.observers.append(metrics.webhook)
    source = traffic_source(settings.traffic.source, amplify, settings.traffic.billable)
    settling = settings.recurly.settling
    once = Once(store, clock, settling=settling, attempt=recurly.attempt_max, doubt=recurly.take_doubt)
    watch = PeriodWatch(store, clock, recurly)
    look_again = settings.outbox.backoff_max
    products = ProductProvisioner(store, clock, amplify)
    read_back = ReadBack(
        store,
        clock,
        recurly,
        watch,
        unsettled=settling + recurly.attempt_max,
        horizon=settings.traffic.horizon,
    )
    absences = Absences(store, clock, amplify, look_again=look_again)
    plans = PlanProvisioner(
        store, clock, amplify, recurly, once, absences, look_again=look_again, read_back=read_back
    )
    linker = Linker(
        store,
        clock,
        recurly,
        once,
        organization_id=settings.amplify.organization_id,
        window=settings.traffic.window,
        read_back=read_back,
    )
    prices = PriceCheck(store, amplify, recurly)
    subscriptions = SubscriptionProvisioner(
        store,
        clock,
        amplify,
        recurly,
        once,
        linker,
        absences,
        prices,
        Policy(
            accounts_missing=settings.accounts.missing,
            collection_method=settings.recurly.collection_method,
            marketplace_url=settings.notifications.marketplace_url,
            look_again=look_again,
        ),
    )
    attacher = AddOnAttacher(store, clock, recurly, once, prices, look_again=look_again)
    ender = SubscriptionEnder(
        store,
        clock,
        amplify,
        recurly,
        once,
        on_cancel=settings.subscriptions.on_cancel,
        traffic_source=source.name,
        look_again=min(look_again, settings.traffic.window),
    )
    reporter = UsageReporter(store, clock, recurly, once, watch, look_again=look_again)
    auditor = UsageAuditor(store, clock, recurly, settling=settling)
    own_words = Path(settings.notifications.templates) if settings.notifications.templates else None
    notifier = Notifier(store, clock, outside.announcer, amplify, Wording(own_words))
    handlers: dict[str, Handler] = {
        PROVISION_PRODUCT: products.provision,
        PROVISION_PLAN: plans.provision,
        PROVISION_SUBSCRIPTION: subscriptions.provision,
        END_SUBSCRIPTION: ender.end,
        ATTACH_ADD_ONS: attacher.attach,
        REPORT_USAGE: reporter.report,
        AUDIT_USAGE: auditor.audit,
        NOTIFY_PROVIDER: notifier.provider,
        NOTIFY_SUBSCRIBER: notifier.subscriber,
    }
    engine = Outbox(
        store,
        clock,
        handlers,
        workers=settings.outbox.workers,
        lease=settings.outbox.lease,
        patience=Patience(settings.outbox.attempts_max, settings.outbox.backoff, settings.outbox.backoff_max),
        rng=rng,
    )
    progress.watch(engine.hung)
    poller = TrafficPoller(
        store,
        clock,
        source,
        watch,
        length=settings.traffic.window,
        settle=settings.traffic.settle,
        horizon=settings.traffic.horizon,
        wake_outbox=engine.wake,
        may_read=read_back.require,
    )
    handlers[REFRESH_SUBSCRIPTION] = poller.look_again  # made after the engine, for it wakes it
    intake = Intake(store, clock, engine.wake.set)
    listener = WebhookListener(
        intake,
        clock,
        Authenticator(settings.webhooks.auth, settings.webhooks.secret.get_secret_value()),
        body_bytes_max=settings.webhooks.body_bytes_max,
        tally=tally,
    )
    resync = Resync(
        store, clock, amplify, recurly, every=settings.catch_up.resync_every, wake_outbox=engine.wake
    )
    handlers[RESYNC] = resync.handle
    repairer = UsageRepairer(store, clock, recurly, poller, auditor, once, settling=settling)
    handlers[REPAIR_USAGE] = repairer.repair
    reconciler = Reconciler(
        store,
        clock,
        ServedSurvey(store, source, poller, horizon=settings.traffic.horizon),
        BilledSurvey(store, clock, recurly, settling=settling),
        Linkage(store, amplify, recurly),
        poller,
        source=source.name,
        length=settings.traffic.window,
        settle=settings.traffic.settle,
        late=settings.traffic.horizon + settings.traffic.settle,
        requests_per_minute=settings.recurly.requests_per_minute,
        wake_outbox=engine.wake,
        may_read=read_back.require,
    )
    adoption = Adoption(
        store,
        clock,
        amplify,
        recurly,
        once,
        linker,
        traffic_source=source.name,
        window=settings.traffic.window,
        look_again=look_again,
        wake_outbox=engine.wake,
        may_find=read_back.require,
    )
    handlers[ADOPT_SUBSCRIPTION] = adoption.adopt
    topic = settings.catch_up.watch_topic
    catch_up = CatchUp(store, clock, amplify, intake, topic, resync)
    sides: dict[str, FarSide] = {"Amplify": amplify, "Recurly": recurly}
    troubles = TroubleWatch(store, clock, sides, progress, notifier, engine.wake.set)
    admin = AdminListener(
        Parts(
            store=store,
            clock=clock,
            progress=progress,
            metrics=metrics,
            poller=poller,
            sides=sides,
            source=source.name,
            webhooks=lambda: {
                "duplicates": tally.duplicates,
                "rejected": tally.rejected,
                "unauthorized": tally.unauthorized,
            },
            wake_outbox=engine.wake.set,
            reading_back=lambda: read_back.reason,
            resync=resync,
            reconciler=reconciler,
            adoption=adoption,
            watched=lambda: Watched(topic, settings.catch_up.every, missing=catch_up.missing),
            usual_lag=_usual_lag(settings, clock.now()),
        )
    )
    return Daemon(
        settings,
        clock,
        store,
        amplify,
        recurly,
        engine,
        poller,
        read_back,
        resync,
        adoption,
        reconciler,
        catch_up,
        listener,
        admin,
        progress,
        troubles,
    )


async def _serve(
    daemon: Daemon,
    stop: asyncio.Event,
    inherited: dict[str, list[socket.socket]],
    read: Callable[[], Settings],
) -> None:
    """Listen and turn the loops until told to stop, then drain; a loop that dies ends the process."""
    settings = daemon.settings
    reception = Reception(daemon.webhooks.application(), tls=tls.context(settings.webhooks))
    taken_over = inherited.get("webhooks", [])
    reloader = Reloader(settings, read, lambda changed: _judge_by(daemon, reception, taken_over, changed))
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.request)
    admin = daemon.admin.application()
    admin.router.add_post("/reload", reloader.answer)
    admin.router.add_get("/configuration", reloader.tell)
    async with AsyncExitStack() as listeners:
        at = {
            "admin": await _listen(listeners, admin, settings.admin.listen, inherited.get("admin")),
            "webhooks": await _receive(listeners, reception, settings, taken_over),
        }
        log.info(
            "daemon.ready",
            version=__version__,
            webhooks=at["webhooks"],
            admin=at["admin"],
            store=daemon.store.url.render_as_string(hide_password=True),
        )
        systemd.notify("READY=1")
        steps = loops(daemon)
        steps["reload"] = forever(
            "reload",
            reloader.run_once,
            wake=reloader.wake,
            clock=daemon.clock,
            idle=every(CERTIFICATE_EVERY),
            progress=daemon.progress,
        )
        tasks = [asyncio.create_task(step, name=name) for name, step in steps.items()]
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        systemd.notify("STOPPING=1")
        log.info("daemon.draining", at_most_seconds=settings.outbox.drain.total_seconds())
        await _cancel([*tasks, stopping])
        began = daemon.clock.now()
        await daemon.outbox.drain(at_most=settings.outbox.drain)
        left = settings.outbox.drain - (daemon.clock.now() - began)
        await daemon.recurly.close(deadline=max(left, timedelta(0)))
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


def loops(daemon: Daemon) -> dict[str, Coroutine[Any, Any, None]]:
    """Every loop by name, not yet turning."""
    settings, clock, progress = daemon.settings, daemon.clock, daemon.progress

    def loop(
        name: str,
        step: Callable[[], Awaitable[bool]],
        idle: Callable[[], Awaitable[timedelta]],
        wake: asyncio.Event | None = None,
        patience: timedelta = timedelta(minutes=5),
        *,
        gate: Callable[[], Awaitable[bool]] | None = None,
    ) -> Coroutine[Any, Any, None]:
        progress.turned(name, clock.now(), patience=patience)  # one that never begins is overdue too
        return forever(
            name,
            step if gate is None else _once_open(gate, step),
            wake=wake or asyncio.Event(),
            clock=clock,
            idle=idle if gate is None else _soon_until_open(gate, daemon.read_back, idle),
            progress=progress,
            patience=patience,
        )

    away: set[str] = set()
    steps = {
        "read_back": loop("read_back", daemon.read_back.run_once, daemon.read_back.idle),
        "outbox": loop(
            "outbox",
            daemon.outbox.run_once,
            daemon.outbox.idle,
            daemon.outbox.wake,
            gate=daemon.read_back.may_send,
        ),
        "traffic": loop(
            "traffic",
            daemon.poller.run_once,
            _until_next(settings.traffic.schedule, clock, daemon.poller),
            daemon.poller.wake,
            POLL_PATIENCE,
            gate=daemon.read_back.finished,
        ),
        "resync": loop(
            "resync", daemon.resync.run_once, daemon.resync.idle, daemon.resync.wake, POLL_PATIENCE
        ),
        "reconcile": loop(
            "reconcile",
            daemon.reconciler.run_once,
            daemon.reconciler.idle,
            daemon.reconciler.wake,
            POLL_PATIENCE,
            gate=daemon.read_back.finished,
        ),
        "periods": loop(
            "periods", daemon.poller.watch_periods, every(REFRESH_EVERY), gate=daemon.read_back.finished
        ),
        "retention": loop(
            "retention",
            lambda: _forget(daemon.store, clock.now() - settings.store.keep_done),
            every(RETENTION_EVERY),
            gate=daemon.read_back.may_send,
        ),
        "probe": loop("probe", lambda: _probe(daemon, away), every(PROBE_EVERY)),
        "troubles": loop("troubles", daemon.troubles.run_once, every(TROUBLES_EVERY)),
    }
    if settings.catch_up.watch_topic:
        steps["feed"] = loop(
            "feed", daemon.catch_up.run_once, every(settings.catch_up.every), patience=POLL_PATIENCE
        )
    if (seconds := systemd.watchdog_seconds()) is not None:
        steps["watchdog"] = loop(
            "watchdog", lambda: _feed(progress, clock), every(timedelta(seconds=seconds / 3))
        )
    return steps


def _once_open(
    gate: Callable[[], Awaitable[bool]], step: Callable[[], Awaitable[bool]]
) -> Callable[[], Awaitable[bool]]:
    """A step that is not taken before a restored store knows what happened since its copy."""

    async def gated() -> bool:
        return await gate() and await step()

    return gated


def _soon_until_open(
    gate: Callable[[], Awaitable[bool]], read_back: ReadBack, idle: Callable[[], Awaitable[timedelta]]
) -> Callable[[], Awaitable[timedelta]]:
    """A short rest until then, the usual one after."""

    async def gated() -> timedelta:
        return await idle() if await gate() else await read_back.idle()

    return gated


def _usual_lag(settings: Settings, now: datetime) -> timedelta:
    """How far behind the watermark is right before a poll that works; of uneven schedules, nearly."""
    traffic = settings.traffic
    firings = list(islice(CronSim(traffic.schedule, now), 50)) if " " in traffic.schedule else []
    gaps = [after - before for before, after in pairwise(firings)] or [parse_duration(traffic.schedule)]
    return traffic.settle + traffic.window + max(gaps)


def _until_next(schedule: str, clock: Clock, poller: TrafficPoller) -> Callable[[], Awaitable[timedelta]]:
    """How long until the schedule (a cron line in UTC, or a duration) is due, or a bill is near."""

    async def idle() -> timedelta:
        now = clock.now()
        regular = next(CronSim(schedule, now)) - now if " " in schedule else parse_duration(schedule)
        flush = await poller.until_flush()
        return regular if flush is None else min(regular, flush)

    return idle


async def _probe(daemon: Daemon, away: set[str]) -> bool:
    """See whether both far sides answer, so that readiness speaks of now; log the change, either way."""
    for name, reach in (("amplify", daemon.amplify.reach), ("recurly", daemon.recurly.reach)):
        try:
            await reach()
        except BillingdError as error:
            if name not in away:
                log.warning("far_side.not_reached", side=name, error=str(error))
            away.add(name)
        else:
            if name in away:
                log.info("far_side.reached_again", side=name)
            away.discard(name)
    return False


async def _feed(progress: Progress, clock: Clock) -> bool:
    """Tell systemd that every loop makes progress, and stay silent when one does not."""
    if not progress.stuck(clock.now()):
        systemd.notify("WATCHDOG=1")
    return False


async def _forget(store: Store, before: datetime) -> bool:
    """Drop what was settled or seen long ago; the usage ledger is kept for ever."""
    async with store.write() as tx:
        await outbox.forget(tx, before=before)
        await events.forget(tx, before=before)
    return False


async def _listen(
    stack: AsyncExitStack, application: web.Application, listen: str, inherited: list[socket.socket] | None
) -> str:
    """Serve the admin listener's application; where that is."""
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=HTTP_CLOSE_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    if inherited:
        if not listening.private(inherited):
            places = ", ".join(listening.place(one) for one in inherited)
            raise BillingdError(
                f"a socket unit listens on {places}; the admin listener is for loopback or a unix socket only"
            )
        for one in inherited:
            await web.SockSite(runner, one).start()
        return ", ".join(listening.place(one) for one in inherited)
    try:
        if listen.startswith(listening.UNIX):
            await web.UnixSite(runner, listen.removeprefix(listening.UNIX)).start()
        else:
            host, port = host_port(listen)
            await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise BillingdError(f"cannot listen on {listen}: {error.strerror or error}") from error
    return listen


async def _receive(
    stack: AsyncExitStack, reception: Reception, settings: Settings, inherited: list[socket.socket]
) -> str:
    """Let webhooks in; where that is. A socket unit's sockets take the place of `webhooks.listen`."""
    listen = settings.webhooks.listen
    _require_loopback_without_a_secret(settings, inherited)
    sockets = inherited or await listening.opened(listen)
    stack.push_async_callback(reception.close)
    await reception.start(sockets, inherited=bool(inherited))
    places = [listening.place(one) for one in sockets]
    if inherited and listen not in places:
        log.info("webhooks.from_the_socket_unit", listen=places, not_used=listen)
    if not settings.webhooks.tls_cert and not listening.private(sockets):
        log.warning("webhooks.not_encrypted", listen=places)
    return ", ".join(places)


def _judge_by(
    daemon: Daemon, reception: Reception, inherited: list[socket.socket], settings: Settings
) -> None:
    """Judge webhooks by these settings from now on; all of it or, on ConfigurationError, nothing."""
    _require_loopback_without_a_secret(settings, inherited)
    context = tls.context(settings.webhooks)
    authenticator = Authenticator(settings.webhooks.auth, settings.webhooks.secret.get_secret_value())
    reception.use_tls(context)
    daemon.webhooks.configure(authenticator, body_bytes_max=settings.webhooks.body_bytes_max)


def _require_loopback_without_a_secret(settings: Settings, inherited: list[socket.socket]) -> None:
    """The configuration's own rule, for sockets that it does not name. Raises ConfigurationError."""
    if settings.webhooks.auth == "none" and not listening.private(inherited):
        places = ", ".join(listening.place(one) for one in inherited)
        raise ConfigurationError(
            [Fault("webhooks.auth", f'"none" is for loopback only, and the socket unit listens on {places}')]
        )


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
