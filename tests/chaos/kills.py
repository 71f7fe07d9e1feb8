"""Lives of a real daemon that all end with SIGKILL, and what must be so when it is left alone at last.

What happens in a life, and when, is drawn from its seed before it begins; how far the daemon gets is up to
the machine. The truth is what this module asked the sandbox to serve.
"""

import asyncio
import random
import socket
import time
import urllib.error
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import scale
import sqlalchemy as sa
from own_postgres import OwnPostgres, own_postgres
from preloaded import PreloadedDaemon
from processes import Daemon, Sandbox, call, until
from redelivery import Redelivery, redelivering
from sqlalchemy.ext.asyncio import create_async_engine

Json = dict[str, Any]

SUBSCRIPTIONS_MAX: Final = 12
PLANS_MAX: Final = 6
OPENING_MAX: Final = 5
SHORT_ROUND: Final = 30
USED_LEAST: Final = 3
LATE_SECONDS: Final = (0.5, 8.0 if scale.FULL else 2.5)
UNITS_MAX: Final = 60
LOG_LINES: Final = 25
START_LEAST: Final = 0.6
"""What a start counts at least: where starts are quick, lives must be long enough for something to happen."""
AGAIN: Final = 3
STARTED_AS_USUAL: Final = 6
"""Of so many rounds two, one on each database, start `python -m billingd` each time; most of what a kill
costs is that start. The others fork from a process that has imported everything: SIGKILL is the same to both.
"""
SETTLED_SECONDS: Final = 300
"""On PostgreSQL nobody knows whether whoever sent the last request still lives: for as long as one may take
(a minute for its turn, and three time-outs) and the settling time after it, nothing is sent under a new key.
"""
HONEST: Final = {"idempotency_doubted", "renewed_after_end"}
"""What may be held without units: a key whose first request a kill kept from leaving looks like one that
Recurly does not heed; what is renewed between its end at Amplify and its end at Recurly wants a refund.
"""
SETTINGS: Final = {
    # A call that is slow outlasts the time-out, and takes effect within the settling time.
    "BILLINGD_RECURLY__TIMEOUT": "1s",
    "BILLINGD_RECURLY__SETTLING": "2s",
    "BILLINGD_RECURLY__REQUESTS_PER_MINUTE": "6000",
    "BILLINGD_TRAFFIC__SETTLE": "500ms",
    "BILLINGD_LOG_FORMAT": "json",
}

_NO_END: Final = 999_999_999
_TIERS: Final = {
    "type": "tiered",
    "tiers": [
        {"from": 1, "to": 100, "cost": 0.1, "flatFee": 0},
        {"from": 101, "to": _NO_END, "cost": 0.05, "flatFee": 0},
    ],
}
PRICINGS: Final[tuple[Json, ...]] = (
    {"type": "perunit", "cost": 0.01},
    {"type": "graduated", "limit": _TIERS},
    {"type": "volume", "limit": _TIERS},
)

USAGE: Final = "**/usage"
FAULTS: Final[tuple[tuple[str, str, str, str, Json], ...]] = (
    *(
        ("recurly", method, path, kind, {})
        for method, path in (("POST", USAGE), ("POST", "/subscriptions"), ("POST", "/plans"))
        for kind in ("lost", "cut", "garbage", "500_committed", "html_502_committed", "409", "reset")
    ),
    *(("recurly", "POST", USAGE, kind, {}) for kind in ("not_json", "500", "html_502", "fin")),
    ("recurly", "POST", USAGE, "slow", {"seconds": 1.5}),
    ("recurly", "POST", "/subscriptions", "slow", {"seconds": 1.5}),
    ("recurly", "POST", USAGE, "429", {"seconds": 1}),
    *(("recurly", "GET", USAGE, kind, {}) for kind in ("500", "reset", "cut")),
    ("recurly", "GET", USAGE, "list_lag", {"seconds": 0.5}),
    *(("recurly", "DELETE", "/subscriptions/*", kind, {}) for kind in ("lost", "500_committed", "reset")),
    *(("amplify", "PUT", "**", kind, {}) for kind in ("lost", "500", "500_committed", "reset")),
    *(("amplify", "POST", "**", kind, {}) for kind in ("reset", "500", "not_json", "html_502")),
)
"""(side, method, path, kind, arguments)"""

STEPS: Final = {"traffic": 60, "fault": 22, "subscribe": 10, "plan": 4, "renew": 8, "end": 4, "again": 6}
"""What happens, by how often."""


class Step(NamedTuple):
    """One thing that happens: when, in shares of the time a start takes; `draw` decides the rest."""

    at: float
    what: str
    draw: float
    more: float


class Life(NamedTuple):
    """What happens until the kill, and when that is.

    `opens`: it is let live until people can use what they subscribed to. `postgres`: before the daemon the
    database is killed.
    """

    steps: tuple[Step, ...]
    killed_at: float
    opens: bool
    postgres: bool


@dataclass
class Counts:
    """What a round did."""

    kills: int = 0
    postgres_kills: int = 0
    faults: int = 0
    units: int = 0


@dataclass
class Told:
    """What was asked of the sandbox: the truth, kept outside of it."""

    served: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Units by (subscription id, quota id)."""
    ended: set[str] = field(default_factory=set)
    plans: list[Json] = field(default_factory=list)
    subscriptions: dict[str, Json] = field(default_factory=dict)


def lives(rng: random.Random, number: int, postgres_kills: int) -> list[Life]:
    """The lives of a round. Some end while the daemon starts, in long rounds a few last longer than the rest.

    The first ones die while the shop is opened; without one that is let live there would be no traffic.
    """
    opening = min(number // 4, OPENING_MAX)
    with_postgres = set(rng.sample(range(opening, number), postgres_kills))
    drawn = []
    for each in range(number):
        kind = rng.random()
        killed_at = rng.uniform(0.07, 1.0) if kind < 0.4 else rng.uniform(1.0, 1.5)
        if kind > 0.9 and number > SHORT_ROUND:
            killed_at = rng.uniform(2.0, 4.0)
        times = sorted(rng.uniform(0, killed_at) for _ in range(rng.randint(3, 6)))
        chosen = rng.choices(list(STEPS), list(STEPS.values()), k=len(times))
        steps = [Step(at, what, rng.random(), rng.random()) for at, what in zip(times, chosen, strict=True)]
        drawn.append(Life(tuple(steps), killed_at, each == opening, each in with_postgres))
    return drawn


def play(
    directory: Path,
    seed: int,
    kills: int,
    *,
    postgres_kills: int = 0,
    on_postgres: bool = False,
    lost: bool = False,
) -> Counts:
    """One round: so many lives on one store, then peace, then the reckoning. Raises AssertionError.

    With `lost`, no webhook ever comes: all that the daemon learns, it learns from the feed and by resync.
    """
    directory.mkdir(parents=True)
    with ExitStack() as stack:
        postgres = stack.enter_context(own_postgres()) if on_postgres else None
        url = f"sqlite+aiosqlite:///{directory}/billingd.db" if postgres is None else postgres.url
        play_ = stack.enter_context(_round(directory, seed, url, postgres, lost=lost))
        try:
            for life in lives(play_.rng, kills, postgres_kills):
                play_.live(life)
            play_.reckon()
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{error}\n{_tail(directory / 'billingd.log')}") from error
        return play_.counts


def recurring(run: Callable[[int], Counts], how: str) -> Counts:
    """Run it; when it fails, run it again to say how often that recurs, and which command does the same."""
    try:
        return run(0)
    except AssertionError as error:
        failed = 0
        for again in range(1, AGAIN + 1):
            try:
                run(again)
            except AssertionError:
                failed += 1
        told = f"{error}\nrun again {AGAIN} times it failed {failed} times; again by: {how}"
        raise AssertionError(told) from error


class Round:
    """One sandbox, one store, one daemon after the other."""

    def __init__(
        self,
        seed: int,
        sandbox: Sandbox,
        daemon: Daemon,
        relay: Redelivery,
        url: str,
        postgres: OwnPostgres | None,
    ) -> None:
        self.rng = random.Random(f"kills {seed}")
        self.counts = Counts()
        self._sandbox = sandbox
        self._daemon = daemon
        self._relay = relay
        self._url = url
        self._postgres = postgres
        self._told = Told()
        self._start_seconds = 0.7
        # looks are many here, for the settling time is short: limits are other tests' business
        self._sandbox.do("settings", recurly={"rate_limit_per_minute": 1_000_000})
        self._product()
        for draw in (0.0, 0.4, 0.9):
            self._plan(draw, 0.9)
        for draw in (0.0, 0.4, 0.9):
            self._subscribe(draw, 0.9)

    def live(self, life: Life) -> None:
        """Start the daemon, let things happen, kill it."""
        daemon = self._daemon
        process = daemon.start()
        began = time.monotonic()
        for step in life.steps:
            self._wait(began, step.at)
            self._take(step)
        if life.opens:
            until("the daemon answers", lambda: bool(daemon.status()))
            self._start_seconds = max(START_LEAST, time.monotonic() - began)
            until("some are approved", self._used)
        self._wait(began, life.killed_at)
        if life.postgres and self._postgres is not None:
            self._kill_postgres(self._postgres, life.steps[0])
        code = process.poll()
        assert code is None, f"the daemon ended by itself, with {code}"
        daemon.kill()
        self.counts.kills += 1

    def reckon(self) -> None:
        """Leave the daemon alone until all is settled, and see that it stays so."""
        call(f"{self._sandbox.base}/control/faults", method="DELETE")
        self._daemon.start()
        self._settle("all is settled")
        if scale.FULL:
            self._daemon.kill()
            self._daemon.start()
            self._settle("all is still settled after one more kill")
        self.counts.faults = sum(call(f"{self._sandbox.base}/control/faults")["struck"].values())
        self.counts.units = sum(self._told.served.values())
        self._stored()

    def _used(self) -> bool:
        live = self._told.subscriptions.keys() - self._told.ended
        rows = self._sandbox.ledger()["subscriptions"]
        approved = sum(row["id"] in live and row["approval"] == "approved" for row in rows)
        return bool(approved >= min(len(live), USED_LEAST))

    def _settle(self, what: str) -> None:
        now = datetime.now(UTC)

        def read_past() -> bool:
            mark = self._daemon.status()["traffic"]["watermark"]
            return bool(mark and datetime.fromisoformat(mark) > now)

        until("every webhook is acknowledged", lambda: self._relay.idle)
        until("all traffic is there to be read", lambda: not self._sandbox.ledger()["not_yet_visible_units"])
        until("the watermark passes the last traffic", read_past)
        until(
            what,
            lambda: not self._amiss(),
            said=lambda: "; ".join(self._amiss()),
            patience_seconds=SETTLED_SECONDS,
        )

    def _amiss(self) -> list[str]:
        """Everything that is not as it must be in the end."""
        status, ledger = self._daemon.status(), self._sandbox.ledger()
        held: Counter[tuple[str, str]] = Counter()
        for item in status["held"]["items"]:
            if item["units"] is not None and item["add_on"] is not None:
                held[item["subscription"], item["add_on"]] += item["units"]
        unasked = [item for item in status["held"]["items"] if item["units"] is None]
        amiss = [f"held: {item['reason']}" for item in unasked if item["kind"] not in HONEST]
        amiss += [f"foreign at Recurly: {each}" for each in ledger["foreign"]]
        rows = {row["id"]: row for row in ledger["subscriptions"]}
        amiss += [f"no row for {id_}" for id_ in self._told.subscriptions.keys() - rows.keys()]
        served = reported = 0
        for id_, row in rows.items():
            amiss += self._amiss_with(row, id_ in self._told.ended)
            of_quota = {quota["quota"]: quota for quota in row["quotas"]}
            quotas = {quota for of, quota in self._told.served if of == id_} | of_quota.keys()
            for quota in sorted(quotas):
                truth, there = self._told.served[id_, quota], of_quota.get(quota, {}).get("reported_units", 0)
                kept = held[id_, f"amplify-quota-{quota}"]
                served, reported = served + truth, reported + there
                if truth != there + kept:
                    amiss.append(f"{row['name']}: served {truth}, reported {there}, held {kept}")
        traffic = status["traffic"]
        expected = {
            "recorded_units": served,
            "reported_units": reported,
            "unreported_units": served - reported,
            "unknown_outcomes": 0,
            "unlinked_units": 0,
        }
        amiss += [f"status: {k} {traffic[k]}, not {v}" for k, v in expected.items() if traffic[k] != v]
        if status["held"]["units"] != served - reported:
            amiss.append(f"status: held {status['held']['units']}, not {served - reported}")
        if status["outbox"]["dead"]:
            amiss.append(f"status: {status['outbox']['dead']} dead letters")
        if status["webhooks"]["accepted"] != len(self._relay.acknowledged):
            accepted = status["webhooks"]["accepted"]
            amiss.append(f"status: {accepted} webhooks, {len(self._relay.acknowledged)} were acknowledged")
        live = sum(id_ not in self._told.ended for id_ in rows)
        if status["links"]["subscriptions"] != live:
            amiss.append(f"status: {status['links']['subscriptions']} linked, not {live}")
        return amiss + [f"refused a webhook: {each}" for each in self._relay.refused]

    @staticmethod
    def _amiss_with(row: Json, ended: bool) -> Iterator[str]:
        """What is wrong with one subscription, its units aside."""
        far = row["recurly"]
        if row["duplicate_tags"]:
            yield f"{row['name']}: twice at Recurly: {row['duplicate_tags']}"
        if len(far) > 1:
            yield f"{row['name']}: {len(far)} subscriptions at Recurly"
        if ended:
            unbilled = row["unbilled_units"]
            if any(each["state"] != "expired" for each in far) or unbilled:
                yield f"{row['name']}: has ended, but at Recurly {far}, {unbilled} units unbilled"
        elif row["approval"] != "approved" or len(far) != 1:
            yield f"{row['name']}: is {row['approval']}, at Recurly {far}"

    def _stored(self) -> None:
        """Every webhook that was acknowledged is in the store when the daemon is dead, and that is sound."""
        self._daemon.kill()
        [ids, *sound] = asyncio.run(_read(self._url))
        missing = self._relay.acknowledged - {str(row[0]) for row in ids}
        assert not missing, f"acknowledged, but not in the store: {sorted(missing)}"
        assert all([tuple(row) for row in rows] == [("ok",)] for rows in sound), f"SQLite says: {sound}"

    def _kill_postgres(self, postgres: OwnPostgres, step: Step) -> None:
        """The database dies under the daemon, which must live on and find it again."""
        until("the daemon answers", lambda: bool(self._daemon.status()))
        self._wait(time.monotonic(), step.draw)
        postgres.kill()
        self.counts.postgres_kills += 1
        self._take(step)
        self._wait(time.monotonic(), step.more)
        postgres.start()
        until("the daemon reads its store again", lambda: bool(self._daemon.status()))
        self._wait(time.monotonic(), step.more * 2)

    def _wait(self, since: float, shares: float) -> None:
        """Until so many start-up times have passed: a random moment is all that this is about."""
        time.sleep(max(0.0, since + shares * self._start_seconds - time.monotonic()))

    def _take(self, step: Step) -> None:
        take: dict[str, Callable[[float, float], None]] = {
            "traffic": self._traffic,
            "fault": self._fault,
            "subscribe": self._subscribe,
            "plan": self._plan,
            "renew": self._renew,
            "end": self._end,
            "again": lambda draw, _more: self._relay.again(int(draw * 1_000_000)),
        }
        take[step.what](step.draw, step.more)

    def _product(self) -> None:
        self._sandbox.do("products", name="weather", title="Weather", attributes={"billingSystem": "recurly"})

    def _plan(self, draw: float, more: float) -> None:
        """A plan with one quota or two, priced in one of the ways."""
        plans = self._told.plans
        if len(plans) >= PLANS_MAX:
            return
        pricing = PRICINGS[int(draw * len(PRICINGS))]
        names = ["calls", "tiles"] if more > 0.5 else ["calls"]
        units = {"calls": "transactions", "tiles": "x-tiles"}
        plans.append(
            self._sandbox.do(
                "plans",
                name=f"plan-{len(plans)}",
                title=f"Plan {len(plans)}",
                product="weather",
                type="paid",
                billing={"currency": "USD", "price": 10, "interval": "monthly"},
                subscription={"approval": "manual"},
                quotas=[
                    {"name": name, "title": name.title(), "unit": units[name], "pricing": pricing}
                    for name in names
                ],
            )
        )

    def _subscribe(self, draw: float, more: float) -> None:
        """A team subscribes; its account is there before, or only afterwards."""
        live = self._told.subscriptions.keys() - self._told.ended
        if len(live) >= SUBSCRIPTIONS_MAX:
            return
        plan = self._told.plans[int(draw * len(self._told.plans))]
        number = len(self._told.subscriptions)
        team = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        if more < 0.7:
            self._sandbox.do("accounts", code=f"amplify-team-{team}")
        made = self._sandbox.do("subscribe", plan=plan["name"], name=f"subscription-{number}", team=team)
        self._told.subscriptions[made["metadata"]["id"]] = {"name": made["name"], "plan": plan}
        if more >= 0.7:
            self._sandbox.do("accounts", code=f"amplify-team-{team}")

    def _traffic(self, draw: float, more: float) -> None:
        """Every third subscription is used, some of it told late; gateways refuse what is not approved."""
        rng = random.Random(f"traffic {draw} {more}")
        for id_, subscription in self._told.subscriptions.items():
            share, units, late = rng.random(), rng.randint(1, UNITS_MAX), rng.random()
            quotas = subscription["plan"]["quotas"]
            quota = quotas[rng.randrange(len(quotas))]["metadata"]["id"]
            if share > 0.35 or id_ in self._told.ended:
                continue
            told: Json = {"subscription": id_, "quota": quota, "units": units}
            if late < 0.25:
                delay = LATE_SECONDS[0] + (LATE_SECONDS[1] - LATE_SECONDS[0]) * late * 4
                told["arrives"] = (datetime.now(UTC) + timedelta(seconds=delay)).isoformat()
            if self._asked("traffic", **told):
                self._told.served[id_, quota] += units

    def _fault(self, draw: float, more: float) -> None:
        side, method, path, kind, args = FAULTS[int(draw * len(FAULTS))]
        times = 1 + int(more * 3)
        self._sandbox.do("faults", side=side, method=method, path=path, kind=kind, times=times, args=args)

    def _renew(self, draw: float, more: float) -> None:
        """One subscription's period ends now, or everybody's."""
        live = sorted(self._told.subscriptions.keys() - self._told.ended)
        if live:
            self._asked("renew", subscription="all" if more < 0.3 else live[int(draw * len(live))])

    def _end(self, draw: float, more: float) -> None:
        """The consumer leaves, or the provider deletes the subscription."""
        live = sorted(self._told.subscriptions.keys() - self._told.ended)
        if len(live) > 1:
            id_ = live[int(draw * len(live))]
            self._sandbox.do(f"subscriptions/{id_}/{'cancel' if more < 0.7 else 'delete'}")
            self._told.ended.add(id_)

    def _asked(self, what: str, **body: Any) -> bool:
        """Ask for something that the sandbox refuses while a subscription is not there yet."""
        try:
            self._sandbox.do(what, **body)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 409:
                    raise AssertionError(f"{what}: {error.read().decode()}") from error
            return False
        return True


@contextmanager
def _round(
    directory: Path, seed: int, url: str, postgres: OwnPostgres | None, *, lost: bool
) -> Iterator[Round]:
    webhooks, admin, far = _ports()
    sandbox = Sandbox(directory, far, webhooks)
    started_as_usual = scale.FULL and seed % STARTED_AS_USUAL in {0, 1}
    kind = Daemon if started_as_usual else PreloadedDaemon
    daemon = kind(directory, sandbox, (admin, webhooks), url)
    daemon.environment |= SETTINGS
    try:
        to = f"http://127.0.0.1:{webhooks}/webhooks/amplify"
        with redelivering(to, lost=lost) as (relay, relay_url):
            sandbox.hook(relay_url)
            yield Round(seed, sandbox, daemon, relay, url, postgres)
    finally:
        daemon.close()
        sandbox.stop()


def _ports() -> list[int]:
    """Three free ports below those the system gives to clients.

    While a daemon is dead, somebody's connection could else get its port, even one that knocks at that port.
    """
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < 3:
            port = random.SystemRandom().randrange(10_000, 32_000)
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


async def _read(url: str) -> list[Any]:
    """The ids of all events; on SQLite also what it says of its own file."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        answers = [(await connection.execute(sa.text("SELECT id FROM events"))).all()]
        if url.startswith("sqlite"):
            answers.append((await connection.execute(sa.text("PRAGMA integrity_check"))).all())
    await engine.dispose()
    return answers


def _tail(log: Path) -> str:
    """The end of the daemon's log without what is said of things that went well."""
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [line for line in lines if '"level": "info"' not in line]
    return "\n".join(["the daemon's last words:", *lines[-LOG_LINES:]])
