"""All checks in order, put together; what each needs, and what mends what it raises."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from billingd.adapters.amplify import Amplify, TrafficSource, traffic_source
from billingd.adapters.recurly import Recurly
from billingd.doctor.at_amplify import AmplifyChecks, clock, engage_admin
from billingd.doctor.at_daemon import Ask, DaemonChecks, Listens
from billingd.doctor.at_hooks import Arrivals, HookChecks, Reach
from billingd.doctor.at_recurly import RecurlyChecks
from billingd.doctor.at_store import StoreChecks
from billingd.doctor.at_traffic import SourceName, TrafficChecks
from billingd.doctor.facts import Facts
from billingd.doctor.findings import Check, Finding, Found, State, examine, skipped
from billingd.settings import Fault, Settings, flat, public
from billingd.store.engine import Store
from billingd.store.holder import holder

CATALOG: Final = ("products", "productplans", "subscriptions", "marketplaces")
"""Collections of the catalog that billingd reads; quotas live in plans."""
CONFIGURATION: Final = "configuration"
BY_ROLE: Final = ("amplify.products", "amplify.productplans")
"""Without reading these nothing can be said of plans and subscriptions."""


@dataclass(frozen=True)
class Subject:
    """What is examined. `amplify`, `recurly`: None where the configuration does not say enough."""

    settings: Settings
    faults: Sequence[Fault]
    amplify: Amplify | None
    recurly: Recurly | None
    store: Store | None
    ask: Ask
    away: str | None
    """Why no daemon answers; None when one does."""
    listens: Listens
    """What is there all the same."""
    reach: Reach
    now: Callable[[], datetime]
    free_bytes: Callable[[Path], int]


async def findings(subject: Subject, only: str | None = None) -> list[Finding]:
    """What each check found, in order. `only`: those whose name begins so."""
    every = checks(subject)
    told = [*of_configuration(subject.faults), *await examine(_wanted(every, only))]
    return [one for one in told if only is None or one.check.startswith(only)]


def checks(subject: Subject) -> list[Check]:
    """Every check of one installation."""
    amplify, recurly = subject.amplify, subject.recurly
    facts = None if amplify is None else Facts(amplify)
    return [
        *_of_daemon(subject),
        *_of_store(subject),
        *(_untried("amplify") if amplify is None or facts is None else _of_amplify(subject, amplify, facts)),
        *(_untried("recurly") if recurly is None else _of_recurly(subject, recurly, facts)),
    ]


def of_configuration(faults: Sequence[Fault]) -> list[Finding]:
    """Every fault of the configuration, or that it has none."""
    return [
        Finding(
            CONFIGURATION,
            State.CONFIGURATION,
            str(fault),
            f"mend {fault.place or 'the configuration'}, then: billingd check-config",
        )
        for fault in faults
    ] or [Finding(CONFIGURATION, State.OK, "sound")]


def _wanted(every: Sequence[Check], only: str | None) -> list[Check]:
    """Those asked for, with all that they need."""
    if only is None:
        return list(every)
    names = {check.name for check in every if check.name.startswith(only)}
    while more := {need for check in every if check.name in names for need in check.needs} - names:
        names |= more
    return [check for check in every if check.name in names]


def _untried(side: str) -> list[Check]:
    async def run() -> Sequence[Found]:
        return [skipped(f"not tried: the configuration does not say enough of {side}")]

    return [Check(side, run, "", "")]


def _of_daemon(subject: Subject) -> list[Check]:
    path = None if subject.store is None else subject.store.path
    away = "journalctl -u billingd -n 100    says why it does not answer; systemctl restart billingd"
    daemon = DaemonChecks(
        subject.ask,
        away=subject.away,
        listens=subject.listens,
        holder=lambda: holder(path),
        settings=public(flat(subject.settings)),
        fix=away,
    )
    older = "systemctl restart billingd    (it runs another release than this command)"
    found = [Check("daemon", daemon.runs, away, away)]
    if subject.away is None:
        found += [
            Check("daemon.configuration", daemon.configuration, older, older),
            Check("daemon.progress", daemon.progress, away, away),
            Check("daemon.ready", daemon.ready, away, away),
        ]
    return found


def _of_store(subject: Subject) -> list[Check]:
    if subject.store is None:
        return _untried("store")
    store = StoreChecks(subject.store, now=subject.now, free_bytes=subject.free_bytes)
    away = "see that the server of store.url runs and lets us in: billingd db current"
    sound = "stop billingd, then: billingd db restore FILE    (a copy of `billingd db backup`)"
    return [
        Check("store", store.opens, sound, away),
        Check("store.integrity", store.sound, sound, away, ("store",)),
        Check("store.disk", store.disk, sound, away),
        Check("store.times", store.times, sound, away, ("store",)),
    ]


def _of_amplify(subject: Subject, amplify: Amplify, facts: Facts) -> list[Check]:
    settings = subject.settings
    client_id = settings.amplify.client_id
    mine = AmplifyChecks(amplify.probes, amplify, facts, client_id=client_id)
    webhooks = HookChecks(amplify.management, amplify, settings)
    traffic = TrafficChecks(
        lambda name: _source(amplify, settings, name),
        facts,
        name=settings.traffic.source,
        billable=settings.traffic.billable,
        settle=settings.traffic.settle,
        now=subject.now,
    )
    host = settings.amplify.central_url or f"amplify.region {settings.amplify.region}"
    away = _reaching(host)
    role = engage_admin(client_id)
    token = (
        "put the client secret of that service account into amplify.client_secret (environment or secret "
        f"file; new one: axway service-account update {client_id} --secret …)"
    )
    needs = ("amplify.token",)

    def check(name: str, run: Callable[[], Awaitable[Sequence[Found]]], *more: str) -> Check:
        return Check(name, run, role, away, (*needs, *more))

    def reading(plural: str) -> Check:
        return check(f"amplify.{plural}", lambda: mine.collection(plural))

    async def version() -> Sequence[Found]:
        return await mine.api_version(settings.amplify.api_version)

    async def users() -> Sequence[Found]:
        return await mine.users(why=_why_users(settings))

    async def time() -> Sequence[Found]:
        return clock("Amplify", amplify.probes.skew)

    found = [
        Check("amplify.token", mine.token, token, away),
        *map(reading, CATALOG),
        check("amplify.quotas", mine.quotas, *BY_ROLE),
        check("amplify.webhooks", webhooks.webhooks),
        check("amplify.triggers", webhooks.triggers),
        check("amplify.watch_topic", webhooks.watch_topic),
        check("amplify.users", users),
        check("amplify.roles", mine.roles, "amplify.products", "amplify.subscriptions"),
        check("amplify.api_version", version, "amplify.products"),
        check("amplify.clock", time),
        check("amplify.labels", mine.products, "amplify.products"),
        check("amplify.pricing", mine.pricing, *BY_ROLE),
        check("amplify.native_billing", mine.native_billing, "amplify.marketplaces"),
        check("traffic", traffic.counts, *BY_ROLE, "amplify.subscriptions"),
        check("traffic.times", traffic.times, "traffic"),
    ]
    if subject.away is None:
        arrivals = Arrivals(amplify.management, subject.reach, subject.ask)
        found += [
            check("webhooks.address", arrivals.addresses),
            Check("webhooks.secret", arrivals.believed, "billingd status", "billingd status"),
        ]
    return found


def _of_recurly(subject: Subject, recurly: Recurly, facts: Facts | None) -> list[Check]:
    settings = subject.settings
    mine = RecurlyChecks(recurly.probes, recurly, facts)
    host = settings.recurly.base_url or f"recurly.region {settings.recurly.region}"
    away = _reaching(host)
    key = (
        "make a private API key with full access at Recurly (Integrations, API Credentials), of a site in "
        f'recurly.region "{settings.recurly.region}", and put it into recurly.api_key (environment or secret '
        "file)"
    )

    async def pace() -> Sequence[Found]:
        return await mine.pace(settings.recurly.requests_per_minute)

    async def accounts() -> Sequence[Found]:
        return await mine.accounts(settings.accounts.missing)

    async def time() -> Sequence[Found]:
        return clock("Recurly", recurly.probes.skew)

    needs = ("recurly.key",)
    little = (*needs, "recurly.rate_limit")  # what is left of it is better spent on bills
    found = [
        Check("recurly.key", mine.key, key, away),
        Check("recurly.site", mine.site, key, away, needs),
        Check("recurly.rate_limit", mine.rate_limit, key, away, needs),
        Check("recurly.requests_per_minute", pace, key, away, needs),
        Check("recurly.clock", time, key, away, needs),
        Check("recurly.times", mine.times, key, away, little),
    ]
    if facts is not None:
        plans = ("amplify.token", *BY_ROLE)
        found += [
            Check("recurly.currency", mine.currency, key, away, (*needs, *plans)),
            Check("recurly.accounts", accounts, key, away, (*little, *plans, "amplify.subscriptions")),
        ]
    return found


def _source(amplify: Amplify, settings: Settings, name: SourceName) -> TrafficSource:
    """The configured source as it is configured, another one for comparison in full."""
    return traffic_source(
        name, amplify, settings.traffic.billable if name == settings.traffic.source else "total"
    )


def _reaching(host: str) -> str:
    return f"see that this machine reaches {host} (curl -v, DNS, proxy, firewall), or wait; then run it again"


def _why_users(settings: Settings) -> str | None:
    """Which setting makes billingd read users of the platform."""
    if settings.notifications.subscriber.get_secret_value():
        return "notifications.subscriber"
    return "accounts.missing = create" if settings.accounts.missing == "create" else None
