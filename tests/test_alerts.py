"""Each gauge in both of its states, as a scrape shows it, and which alert that rouses."""

import math
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from aiohttp.test_utils import make_mocked_request
from linked import link, subscription
from page_bench import DAY, HOUR, NOW, Behind, behind, dead, period, reconciled, records
from prometheus_client.parser import text_string_to_metric_families

from billingd.admin import monitoring, operations
from billingd.domain.attempts import Action, State, Verdict
from billingd.domain.drift import PRICE_DIFFERS, Drift
from billingd.settings import Settings
from billingd.store import drift, held, intents, outbox, usage, watermarks
from billingd.store.engine import Store, StoreDamaged
from billingd.store.held import Hold

SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
ALERTS = {one.name: one for one in monitoring.ALERTS}
OF_RATES = {"BillingdRequestsFail", "BillingdRequestsSlow"}
"""What no single scrape can tell; promtool looks at them below."""

CLAUSE = re.compile(
    r"(?:sum by \([^)]*\) \()?(?:(absent|increase|min_over_time)\()?(\w+)(?:{(.*?)})?(?:\[\w+\])?\)*"
    r"(?: (==|>) ([\d *]+))?"
)
SELECTOR = re.compile(r'(\w+)="([^"]*)"')
Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


def holds(expr: str, seen: Scrape) -> bool:
    """Whether an alert's expression is true of a scrape, taking it that all was so for as long as it asks."""
    return any(_clause(part, seen) for part in expr.split(" or "))


def _clause(part: str, seen: Scrape) -> bool:
    match = CLAUSE.fullmatch(part)
    assert match, part
    wanted = set(SELECTOR.findall(match[3] or ""))
    found = [value for (name, labels), value in seen.items() if name == match[2] and wanted <= labels]
    if match[1] == "absent":
        return not found
    limit = threshold(match[5])
    return any(value == limit if match[4] == "==" else value > limit for value in found)


def threshold(text: str) -> int:
    return math.prod(int(factor) for factor in text.split("*"))


class Watched:
    """A daemon's admin listener, scraped; time stands still but for what a test lets pass."""

    def __init__(self, store: Store) -> None:
        self.behind: Behind = behind(store)
        self.store, self.sides = store, self.behind.sides
        self.listener = self.behind.listener()
        self.hung: list[str] = []
        self.behind.progress.watch(lambda _now: self.hung)

    async def scrape(self) -> tuple[dict[str, float], set[str]]:
        """Every sample as it is written, and the alerts that are true of it."""
        self.behind.clock.advance(timedelta(minutes=6))  # what the listener kept is old
        for side in self.sides.values():
            side.last_reached_at = self.behind.clock.now()
        answer = await self.listener._metrics(make_mocked_request("GET", "/metrics"))
        assert isinstance(answer.body, bytes)
        assert answer.status == 200
        shown: dict[str, float] = {}
        seen: Scrape = {}
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                shown[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
                seen[sample.name, frozenset(sample.labels.items())] = sample.value
        alerts = {name for name, one in ALERTS.items() if name not in OF_RATES and holds(one.expr, seen)}
        return shown, alerts

    async def turned(self) -> None:
        self.behind.progress.turned("traffic", self.behind.clock.now(), patience=10 * HOUR)

    async def found(self, units: int) -> None:
        await reconciled(
            self.store, Drift(PRICE_DIFFERS, "plan:p1", None, None, None, units, "It differs.", "Mend it.")
        )

    async def nothing_found(self) -> None:
        async with self.store.write() as tx:
            run = await drift.latest(tx)
            assert run is not None
            await drift.gone(tx, [one.id for one in await drift.of(tx, run.id)], "gone")

    async def hold(self, kind: str, subject: str, units: int | None = None) -> None:
        async with self.store.write() as tx:
            await held.add(tx, Hold(kind, subject, "So.", units=units), now=self.behind.clock.now())

    async def hold_no_more(self) -> None:
        async with self.store.write() as tx:
            for one in await held.standing(tx):
                await held.close_one(tx, one["id"], resolution="mended", now=self.behind.clock.now())

    async def hold_record(self, state: str, *, hours_ago: int) -> None:
        """Twelve units of then; where they are held, an item says so."""
        await records(self.store, "s1", hours=1, units=lambda _: 12, state=state, back=hours_ago)
        if state == "held":
            again = Action("report_usage", "usage:s1:q1", "", {"record": await self._record()})
            async with self.store.write() as tx:
                item = Hold("late_usage", "usage:late", "So.", again, "s1", units=12)
                await held.add(tx, item, now=self.behind.clock.now())

    async def _record(self) -> int:
        async with self.store.read() as tx:
            rows = await tx.execute(sa.text("SELECT max(id) FROM usage_records"))
        return int(rows.scalar_one())

    async def reported(self) -> None:
        async with self.store.write() as tx:
            await usage.reported(tx, await self._record(), usage_id="u", now=self.behind.clock.now())

    async def write_off(self) -> None:
        async with self.store.read() as tx:
            [item] = await held.standing(tx)
        assert await operations.write_off(
            self.store, item["id"], reason="billed by hand", now=self.behind.clock.now()
        )

    async def doubt(self) -> None:
        now = self.behind.clock.now()
        async with self.store.write() as tx:
            await intents.opened(tx, "w", None, epoch=1, key="k", body_hash="h", first_sent_at=now, now=now)

    async def no_doubt(self) -> None:
        async with self.store.write() as tx:
            await intents.done(tx, "w", result="r")

    async def gives_up(self) -> None:
        await dead(self.store, Action("report_usage", "s", "d"), error="422", at=self.behind.clock.now())

    async def discard(self) -> None:
        async with self.store.read() as tx:
            [row] = await outbox.select(tx, states=[State.DEAD])
        await operations.discard(self.store, row["id"], reason="no", now=self.behind.clock.now())

    async def wait(self) -> None:
        made_at = self.behind.clock.now() - HOUR
        async with self.store.write() as tx:
            await outbox.insert(tx, [Action("k", "w", f"w:{made_at}")], now=made_at)

    async def done(self) -> None:
        now = self.behind.clock.now()
        async with self.store.write() as tx:
            for one in await outbox.claim(tx, now=now, lease=HOUR, limit=9):
                await outbox.settle(tx, one, Verdict(State.DONE, now), now=now)

    async def read_up_to(self, ago: timedelta) -> None:
        """The watermark is as old as that at the next scrape."""
        at = self.behind.clock.now() + timedelta(minutes=6) - ago
        async with self.store.write() as tx:
            await tx.execute(sa.text("DELETE FROM watermarks"))
            await watermarks.begin(tx, "metrics", at, HOUR, now=self.behind.clock.now())


USUAL = Settings().traffic.window + Settings().traffic.settle + HOUR + timedelta(minutes=8)
"""How far behind traffic is before a poll, by the default configuration."""


@pytest.fixture
async def watched(store: Store) -> Watched:
    """Nothing is wrong: what was to do is done, what was counted is reported, traffic is read as usual."""
    made = Watched(store)
    await link(store, subscription(), now=NOW - 40 * DAY)
    await period(store, "s1")
    await records(store, "s1", hours=3, units=lambda _: 7)
    await reconciled(store)
    await made.wait()
    await made.done()
    await made.turned()
    await made.read_up_to(USUAL)
    return made


@dataclass(frozen=True)
class Case:
    """What goes wrong and is mended, what a scrape shows of it, and the alerts that it rouses."""

    wrong: Callable[[Watched], Any]
    mended: Callable[[Watched], Any]
    shows: dict[str, tuple[float, float]]
    """Samples as they are while all is well, and meanwhile."""
    rouses: set[str]


def sets(what: str, name: str, value: Any) -> Callable[[Watched], Any]:
    """Sets something of the listener's surroundings."""

    async def act(watched: Watched) -> None:
        setattr(watched.sides[what] if what in watched.sides else getattr(watched, what), name, value)

    return act


def hangs(*names: str) -> Callable[[Watched], Any]:
    async def act(watched: Watched) -> None:
        watched.hung = list(names)

    return act


async def stops(watched: Watched) -> None:
    watched.behind.progress.turned("traffic", watched.behind.clock.now(), patience=timedelta(minutes=5))


READY, WRITABLE = "billingd_ready", "billingd_store_writable"
ITEMS = "billingd_held{what=items}"
CASES = {
    "a loop stops": Case(
        stops, Watched.turned, {"billingd_loop_overdue{loop=traffic}": (0, 1)}, {"BillingdHangs"}
    ),
    "an attempt hangs": Case(
        hangs("action 1 (k)", "action 2 (k)"), hangs(), {"billingd_actions_hung": (0, 2)}, {"BillingdHangs"}
    ),
    "the store cannot be written": Case(
        sets("store", "write_error", "the disk is full"),
        sets("store", "write_error", None),
        {WRITABLE: (1, 0), READY: (1, 0)},
        {"BillingdStoreNotWritable", "BillingdNotReady"},
    ),
    "a far side is away": Case(
        sets("Recurly", "last_error", "503"),
        sets("Recurly", "last_error", None),
        {
            "billingd_remote_reached{side=recurly}": (1, 0),
            "billingd_remote_reached{side=amplify}": (1, 1),
            READY: (1, 0),
        },
        {"BillingdFarSideAway", "BillingdNotReady"},
    ),
    "an action gives up": Case(
        Watched.gives_up,
        Watched.discard,
        {
            "billingd_outbox_actions{kind=report_usage,state=dead}": (0, 1),
            "billingd_outbox_actions{kind=k,state=done}": (1, 1),
        },
        {"BillingdDeadLetters"},
    ),
    "an action waits": Case(
        Watched.wait, Watched.done, {"billingd_outbox_oldest_pending_seconds": (0, 3_600 + 360)}, set()
    ),
    "traffic is not read": Case(
        lambda watched: watched.read_up_to(7 * HOUR),
        lambda watched: watched.read_up_to(USUAL),
        {"billingd_traffic_lag_seconds": (USUAL.total_seconds(), 7 * 3_600)},
        {"BillingdTrafficLate"},
    ),
    "usage is not reported": Case(
        lambda watched: watched.hold_record("recorded", hours_ago=9),
        Watched.reported,
        {
            "billingd_usage_unreported_units": (0, 12),
            "billingd_usage_units_total{stage=recorded}": (21, 33),
            "billingd_usage_units_total{stage=reported}": (21, 21),
        },
        {"BillingdUsageNotReported"},
    ),
    "usage misses its invoice and is written off": Case(
        lambda watched: watched.hold_record("held", hours_ago=20 * 24),
        Watched.write_off,
        {
            "billingd_usage_unreported_units": (0, 12),
            "billingd_period_missed_units": (0, 12),
            ITEMS: (0, 1),
            "billingd_held{what=units}": (0, 12),
        },
        {"BillingdUsageNotReported", "BillingdInvoiceMissed", "BillingdHeld"},
    ),
    "an outcome is unknown": Case(
        Watched.doubt, Watched.no_doubt, {"billingd_unknown_outcomes": (0, 1)}, {"BillingdUnknownOutcomes"}
    ),
    "units differ": Case(
        lambda watched: watched.found(7),
        Watched.nothing_found,
        {"billingd_drift_units": (0, 7), "billingd_drift_findings": (0, 1)},
        {"BillingdDrift"},
    ),
    "something without units differs": Case(
        lambda watched: watched.found(0),
        Watched.nothing_found,
        {"billingd_drift_units": (0, 0), "billingd_drift_findings": (0, 1)},
        {"BillingdDrift"},
    ),
    **{
        f"{kind} is held": Case(
            lambda watched, kind=kind, subject=subject: watched.hold(kind, subject),  # type: ignore[misc]
            Watched.hold_no_more,
            {ITEMS: (0, 1), "billingd_held{what=plans}": (0, subject.startswith("plan:"))},
            {"BillingdHeld"},
        )
        for kind, subject in {
            "plan_refused": "plan:p",
            "mass_absence": "absence",
            "native_billing": "marketplace:m",
            "orphan_subscription": "audit:twice:x",
        }.items()
    },
}


@SQLITE
@pytest.mark.parametrize("name", CASES)
async def test_each_gauge_has_two_states_and_rouses_its_alert_in_one(watched: Watched, name: str) -> None:
    case = CASES[name]
    shown, alerts = await watched.scrape()
    assert ({one: shown.get(one, 0) for one in case.shows}, alerts) == (
        {one: well for one, (well, _) in case.shows.items()},
        set(),
    )
    await case.wrong(watched)
    shown, alerts = await watched.scrape()
    assert ({one: shown.get(one, 0) for one in case.shows}, alerts) == (
        {one: ill for one, (_, ill) in case.shows.items()},
        case.rouses,
    )
    await case.mended(watched)
    _, alerts = await watched.scrape()
    assert alerts == set()


@contextmanager
def unreadable(store: Store) -> Iterator[None]:
    """As when the file is damaged: each statement of a reader fails."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        raise sa.exc.DatabaseError(statement, {}, sqlite3.DatabaseError("file is not a database"))

    sa.event.listen(store._reader.sync_engine, "before_cursor_execute", refuse)
    try:
        yield
    finally:
        sa.event.remove(store._reader.sync_engine, "before_cursor_execute", refuse)


@SQLITE
async def test_a_store_that_cannot_be_read_is_told_and_nothing_of_what_is_in_it(watched: Watched) -> None:
    """Old numbers would say that all is well; the listener answers all the same, so that the alert fires."""
    of_store = {
        name for name in (await watched.scrape())[0] if name.startswith(("billingd_usage", "billingd_held"))
    }
    assert len(of_store) == 3 + 4
    with unreadable(watched.store):
        with pytest.raises(StoreDamaged):
            async with watched.store.read() as tx:
                await outbox.count(tx)
        shown, alerts = await watched.scrape()
    assert (shown[READY], shown[WRITABLE], shown["billingd_remote_reached{side=recurly}"]) == (0, 0, 1)
    assert shown["billingd_loop_overdue{loop=traffic}"] == 0
    assert not of_store & shown.keys()
    assert alerts == {"BillingdStoreNotWritable", "BillingdNotReady"}
    assert (await watched.scrape())[1] == set()


@SQLITE
async def test_units_at_stake_do_not_cancel_each_other(watched: Watched) -> None:
    """Too much is held in one item, too little in another."""
    await watched.hold("reading_shrank", "reading:a", -30)
    await watched.hold("usage_refused", "usage:b", 30)
    assert (await watched.scrape())[0]["billingd_held{what=units}"] == 60


@SQLITE
async def test_webhooks_that_are_refused_rouse_an_alert_and_so_does_silence(watched: Watched) -> None:
    metrics = watched.listener._parts.metrics
    for _ in range(11):
        metrics.webhook("rejected")
    assert (await watched.scrape())[1] == {"BillingdWebhooksRejected"}
    metrics.webhook("unavailable")
    assert (await watched.scrape())[1] == {"BillingdWebhooksRejected", "BillingdStoreNotWritable"}
    assert holds(ALERTS["BillingdDown"].expr, {})


def test_the_alert_about_traffic_suits_the_defaults() -> None:
    """Traffic is read up to a window, its settling and a turn of the schedule ago; two turns may fail."""
    match = CLAUSE.fullmatch(ALERTS["BillingdTrafficLate"].expr)
    assert match
    assert USUAL + HOUR < timedelta(seconds=threshold(match[5])) < 2 * USUAL


MINUTES = 400
"""How long promtool lets each of its days last."""

USUALLY: dict[str, str] = {
    'billingd_build_info{version="1"}': f"1x{MINUTES}",
    'billingd_loop_overdue{loop="traffic"}': f"0x{MINUTES}",
    "billingd_actions_hung": f"0x{MINUTES}",
    "billingd_store_writable": f"1x{MINUTES}",
    "billingd_ready": f"1x{MINUTES}",
    'billingd_remote_reached{side="recurly"}': f"1x{MINUTES}",
    'billingd_webhook_events_total{outcome="unavailable"}': f"3x{MINUTES}",
    'billingd_webhook_events_total{outcome="rejected"}': f"0+1x{MINUTES // 2} {MINUTES // 2}x{MINUTES // 2}",
    'billingd_outbox_actions{state="dead",kind="k"}': f"0x{MINUTES}",
    'billingd_outbox_actions{state="done",kind="k"}': f"0+3x{MINUTES}",
    'billingd_outbox_actions{state="pending",kind="k"}': f"9x{MINUTES}",
    "billingd_traffic_lag_seconds": f"{int(USUAL.total_seconds())}x{MINUTES}",
    "billingd_usage_unreported_units": f"0x{MINUTES - 300} 40x299",
    "billingd_unknown_outcomes": f"0x{MINUTES - 90} 1x89",
    "billingd_period_missed_units": f"0x{MINUTES}",
    "billingd_drift_units": f"0x{MINUTES}",
    "billingd_drift_findings": f"0x{MINUTES}",
    'billingd_held{what="items"}': f"0x{MINUTES}",
    'billingd_remote_requests_total{side="recurly",outcome="ok"}': f"0+90x{MINUTES}",
    'billingd_remote_requests_total{side="recurly",outcome="unknown"}': f"0+10x{MINUTES}",
    'billingd_remote_request_seconds_bucket{side="recurly",le="5"}': f"0+96x{MINUTES}",
    'billingd_remote_request_seconds_bucket{side="recurly",le="20"}': f"0+100x{MINUTES}",
    'billingd_remote_request_seconds_bucket{side="recurly",le="+Inf"}': f"0+100x{MINUTES}",
}
"""A day on which nobody is woken: a tenth of the requests fails, usage waits for less than five hours."""

BAD_DAYS: dict[str, dict[str, str]] = {
    "BillingdHangs": {'billingd_loop_overdue{loop="traffic"}': f"0x{MINUTES - 10} 1x9"},
    "BillingdStoreNotWritable": {"billingd_store_writable": f"1x{MINUTES - 10} 0x9"},
    "BillingdFarSideAway": {'billingd_remote_reached{side="recurly"}': f"1x{MINUTES - 20} 0x19"},
    "BillingdNotReady": {"billingd_ready": f"1x{MINUTES - 20} 0x19"},
    "BillingdDeadLetters": {'billingd_outbox_actions{state="dead",kind="k"}': f"0x{MINUTES - 10} 1x9"},
    "BillingdTrafficLate": {"billingd_traffic_lag_seconds": f"{7 * 3_600}x{MINUTES}"},
    "BillingdUsageNotReported": {"billingd_usage_unreported_units": f"0x{MINUTES - 370} 40x369"},
    "BillingdUnknownOutcomes": {"billingd_unknown_outcomes": f"0x{MINUTES - 130} 1x129"},
    "BillingdInvoiceMissed": {"billingd_period_missed_units": f"0x{MINUTES - 20} 1x19"},
    "BillingdDrift": {"billingd_drift_findings": f"0x{MINUTES - 70} 1x69"},
    "BillingdHeld": {'billingd_held{what="items"}': f"0x{MINUTES - 70} 1x69"},
    "BillingdWebhooksRejected": {'billingd_webhook_events_total{outcome="rejected"}': f"0+1x{MINUTES}"},
    "BillingdRequestsFail": {
        'billingd_remote_requests_total{side="recurly",outcome="unknown"}': f"0+30x{MINUTES}"
    },
    "BillingdRequestsSlow": {
        'billingd_remote_request_seconds_bucket{side="recurly",le="5"}': f"0+80x{MINUTES}"
    },
}
"""What is otherwise on a day that wakes somebody."""


def days(series: list[dict[str, str]], minutes: int, fired: list[str]) -> dict[str, Any]:
    """A test as promtool has it: just these alerts fire at the end."""
    looked = {
        "expr": 'count by (alertname, instance) (ALERTS{alertstate="firing"})',
        "eval_time": f"{minutes}m",
        "exp_samples": [{"labels": labels, "value": 1} for labels in fired],
    }
    return {"interval": "1m", "input_series": series, "promql_expr_test": [looked]}


def test_promtool_sees_each_alert_fire_on_its_bad_day_alone(tmp_path: Path) -> None:
    assert set(BAD_DAYS) == set(ALERTS) - {"BillingdDown"}
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool: the alerts are tried against scrapes alone; it comes with Prometheus")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(monitoring.rules("README.md")))
    series = []
    for day, otherwise in {"usual": {}, **BAD_DAYS}.items():
        for one, values in (USUALLY | otherwise).items():
            name, _, labels = one.rstrip("}").partition("{")
            series.append({"series": f'{name}{{instance="{day}",{labels}}}', "values": values})
    fired = [f'{{alertname="{alert}",instance="{alert}"}}' for alert in BAD_DAYS]
    tests = [days(series, MINUTES, fired), days([], 10, ['{alertname="BillingdDown"}'])]
    cases = tmp_path / "cases.yml"
    whole = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    cases.write_text(yaml.safe_dump(whole))
    told = subprocess.run([promtool, "test", "rules", cases], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
