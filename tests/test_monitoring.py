"""Health of each loop, what a scrape says and costs, and the dashboard and alerts made for it."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from click.testing import CliRunner, Result
from linked import HOUR, TEN, link, subscription
from manual_clock import START, ManualClock
from rig import a_rig

from billingd import daemon as root
from billingd.admin import monitoring, status
from billingd.admin.figures import Figures
from billingd.admin.metrics import Metrics
from billingd.cli import program
from billingd.domain.attempts import Action, Leased, Patience, State, Verdict, Wait
from billingd.domain.usage import book
from billingd.domain.windows import Window
from billingd.loops import Progress
from billingd.outbox import ATTEMPT_MAX, Outbox
from billingd.store import outbox, schema, usage, watermarks
from billingd.store.engine import Store, StoreUnavailable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
NAMES = re.compile(r"\b((?:billingd|process)_\w+)(?:\{([^}]*)\})?")
SELECTOR = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*')


@SQLITE
async def test_every_loop_counts_for_health_also_one_that_never_turns(store_url: str) -> None:
    """Each by its own name and patience; a loop that was made and never began is overdue like any other."""
    async with a_rig(store_url) as rig:
        made = root.loops(rig.daemon)
        for coroutine in made.values():
            coroutine.close()
        progress, now = rig.daemon.progress, rig.clock.now()
        assert set(progress.ages(now)) == set(made)
        assert {"outbox", "traffic", "resync", "reconcile", "feed", "probe", "troubles"} <= set(made)
        for name in made:
            for other in made:
                progress.turned(other, now, patience=HOUR)
            progress.turned(name, now, patience=timedelta(minutes=5))
            assert progress.stuck(now + timedelta(minutes=6)) == [name]


async def test_an_attempt_that_hangs_is_named_although_its_loop_turns(
    store: Store, clock: ManualClock
) -> None:
    release = asyncio.Event()

    async def hang(_action: Leased) -> Wait | None:
        await release.wait()
        return None

    patience = Patience(3, HOUR, HOUR)
    box = Outbox(store, clock, {"k": hang}, workers=2, lease=HOUR, patience=patience, rng=Random(1))
    progress = Progress()
    progress.watch(box.hung)
    async with store.write() as tx:
        await outbox.insert(tx, [Action("k", "s", "s")], now=clock.now())
    await box.run_once()
    assert progress.stuck(clock.now() + ATTEMPT_MAX) == []
    assert progress.stuck(clock.now() + ATTEMPT_MAX + HOUR) == ["action 1 (k)"]
    release.set()
    await box.drain(at_most=timedelta(seconds=30))
    assert progress.stuck(clock.now() + ATTEMPT_MAX + HOUR) == []


@contextmanager
def no_page_left(store: Store) -> Iterator[None]:
    """What changes a page fails; what changes none commits, as on a full disk."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("INSERT", "DELETE")):
            raise sa.exc.OperationalError(statement, {}, Exception("database or disk is full"))

    sa.event.listen(store._writer.sync_engine, "before_cursor_execute", refuse)
    try:
        yield
    finally:
        sa.event.remove(store._writer.sync_engine, "before_cursor_execute", refuse)


async def test_a_commit_that_wrote_nothing_does_not_make_the_store_writable(
    store: Store, clock: ManualClock
) -> None:
    """An empty claim commits on a full disk, while each webhook still gets 503."""
    with no_page_left(store):
        with pytest.raises(StoreUnavailable):
            async with store.write() as tx:
                await outbox.insert(tx, [Action("k", "s", "s")], now=clock.now())
        for _ in range(2):
            async with store.write() as tx:
                assert await outbox.claim(tx, now=clock.now(), lease=HOUR, limit=1) == []
            assert store.write_error is not None
            assert "disk is full" in store.write_error
    async with store.write() as tx:
        await outbox.claim(tx, now=clock.now(), lease=HOUR, limit=1)
    assert store.write_error is None
    async with store.read() as tx:
        marks = (await tx.execute(sa.select(schema.marks))).all()
    assert marks == [], "nothing of the proof is left"


async def test_writers_that_go_on_at_once_do_not_hinder_each_other(store: Store) -> None:
    """PostgreSQL is back, and every writer that it had failed sees for itself that it can write."""
    for _ in range(5):
        store.write_error = "the server was away"
        await asyncio.gather(*(write_nothing(store) for _ in range(8)))
        assert store.write_error is None


async def write_nothing(store: Store) -> None:
    async with store.write():
        pass


def printed_by(*words: str) -> Result:
    return CliRunner().invoke(program, words)


async def records(store: Store, first: int, units: list[int], state: str = "recorded") -> list[int]:
    """A record for each window from that number on; their ids."""
    async with store.write() as tx:
        made = []
        for number, amount in enumerate(units, first):
            window = Window(TEN + number * HOUR, TEN + (number + 1) * HOUR)
            found = list(book("s1", "q1", {window: amount}, {}, before=window.end))
            made += await usage.insert(tx, found, now=START, state=state)
    return [id_ for id_, _ in made]


async def test_a_scrape_says_what_the_status_says(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the unit, whatever is added, reported or held between two scrapes."""
    monkeypatch.setattr("billingd.admin.figures.OVERLAP", 3)
    figures = Figures(store, "metrics")
    await link(store, subscription())
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN, HOUR, now=clock.now())
        await outbox.insert(tx, [Action("k", f"s{n}", f"s{n}") for n in range(4)], now=clock.now())
    for turn in range(5):
        made = await records(store, 10 * turn, [5, -2, 7, 11 + turn], "held" if turn == 2 else "recorded")
        async with store.write() as tx:
            if turn != 2:
                await usage.reported(tx, made[0], usage_id=f"u{turn}", now=clock.now())
            for one in await outbox.claim(tx, now=clock.now(), lease=HOUR, limit=1):
                states = (State.DEAD, State.DONE, State.PENDING)
                verdict = Verdict(states[turn % 3], clock.now() + HOUR, "so")
                await outbox.settle(tx, one, verdict, now=clock.now())
        clock.advance(timedelta(minutes=6))
        told, actions = await figures.read(clock.now())
        said = await status.read(store, source="metrics", now=clock.now(), reasons=(), webhooks={})
        for section in told:
            assert told[section].items() <= said[section].items(), section
        async with store.read() as tx:
            assert actions == await outbox.count(tx)


@SQLITE
async def test_a_scrape_reads_no_whole_table(store: Store, clock: ManualClock) -> None:
    """The second one: SQLite's own plan of each statement uses an index wherever a table grows for ever."""
    await link(store, subscription())
    await records(store, 0, [1, 2, 3])
    figures = Figures(store, "metrics")
    await figures.read(clock.now())
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    reader = store._reader.sync_engine
    sa.event.listen(reader, "before_cursor_execute", note)
    await figures.read(clock.now())
    sa.event.remove(reader, "before_cursor_execute", note)
    plans = []
    async with store.read() as tx:
        for statement, parameters in asked:
            if statement.startswith("SELECT"):
                found = await tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple(parameters))
                plans += [str(row.detail) for row in found]
    whole = [
        plan
        for plan in plans
        if plan.startswith("SCAN")
        and "INDEX" not in plan
        and re.search(r"\b(outbox|usage_records|events)\b", plan)
    ]
    assert plans
    assert whole == []


def metrics_and_labels() -> dict[str, set[str]]:
    """Every sample that a scrape may show, with its labels."""
    made = Metrics()
    found: dict[str, set[str]] = {name: set() for name in made.names()}
    known = {
        "billingd_outbox_actions": {"state", "kind"},
        "billingd_usage_units_total": {"stage"},
        "billingd_webhook_events_total": {"outcome"},
        "billingd_remote_requests_total": {"side", "outcome"},
        "billingd_remote_request_seconds_bucket": {"side", "le"},
        "billingd_held": {"what"},
        "billingd_loop_overdue": {"loop"},
        "billingd_loop_turned_seconds": {"loop"},
        "billingd_remote_reached": {"side"},
        "billingd_build_info": {"version"},
    }
    assert known.keys() <= found.keys()
    return found | known


def check_expression(expr: str, known: dict[str, set[str]]) -> None:
    """Its metrics and their labels exist, what it opens it closes."""
    found = NAMES.findall(expr)
    assert found, expr
    for name, selectors in found:
        assert name in known, f"{name} in {expr}"
        for part in filter(None, selectors.split(",")):
            match = SELECTOR.fullmatch(part)
            assert match, part
            assert match[1] in known[name], f"{name} has no label {match[1]}"
    for left, right in ("()", "[]", "{}"):
        assert expr.count(left) == expr.count(right), expr
    for group in re.findall(r"by \(([^)]*)\)", expr):
        labels = {"instance", *set().union(*(known[name] for name, _ in found))}
        assert {one.strip() for one in group.split(",")} <= labels, expr


def test_the_contracts_metrics_are_all_there() -> None:
    contract = {
        *(
            "billingd_webhook_events_total",
            "billingd_outbox_actions",
            "billingd_outbox_oldest_pending_seconds",
        ),
        *("billingd_traffic_lag_seconds", "billingd_usage_units_total", "billingd_usage_unreported_units"),
        *("billingd_unknown_outcomes", "billingd_drift_units", "billingd_remote_requests_total"),
        *("billingd_remote_request_seconds", "billingd_build_info"),
    }
    assert contract <= Metrics().names()


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """What Grafana's importer needs, no two panels in one place, and only metrics that exist."""
    printed = printed_by("metrics", "dashboard")
    assert (printed.exit_code, printed.stderr) == (0, "")
    board = json.loads(printed.stdout)
    assert (board["uid"], board["title"], type(board["schemaVersion"])) == ("billingd", "billingd", int)
    assert board["templating"]["list"][0] == {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    known = metrics_and_labels()
    ids: set[int] = set()
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        ids.add(panel["id"])
        assert panel["type"] in {"row", "stat", "timeseries"}
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            check_expression(target["expr"], known)
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                names = [name for name, _ in NAMES.findall(target["expr"])]
                assert any(label in known[name] or label in target["expr"] for name in names)
    assert len(ids) == len(board["panels"])


def test_the_alerts_are_rules_that_prometheus_loads(tmp_path: Path) -> None:
    """By promtool where it is installed; by their own form and by the metrics that exist everywhere."""
    printed = printed_by("metrics", "alerts")
    assert (printed.exit_code, printed.stderr) == (0, "")
    [group] = yaml.safe_load(printed.stdout)["groups"]
    known = metrics_and_labels()
    for rule in group["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[A-Z]\w+", rule["alert"])
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        check_expression(rule["expr"], known)
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert any(label in known[name] for name, _ in NAMES.findall(rule["expr"])), rule["alert"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) == len(monitoring.ALERTS)
    if promtool := shutil.which("promtool"):
        rules = tmp_path / "rules.yml"
        rules.write_text(printed.stdout)
        checked = subprocess.run(
            [promtool, "check", "rules", rules], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_what_never_goes_down_is_asked_for_its_rate() -> None:
    """Units that are taken back would look like a counter set back to 0, and all of it as new usage."""
    made = Metrics()
    families = [*made._registry.collect(), *made._stored.collect()]
    growing = {f"{one.name}_total" for one in families if one.type == "counter"}
    growing |= {f"{one.name}_bucket" for one in families if one.type == "histogram"}
    exprs = [one.expr for one in monitoring.ALERTS]
    exprs += [target["expr"] for one in monitoring.dashboard()["panels"] for target in one.get("targets", ())]
    asked = set(re.findall(r"(?:rate|increase)\((\w+)", " ".join(exprs)))
    assert asked
    assert asked <= growing
    assert "billingd_usage_units_total" not in growing


def test_every_alert_links_to_a_runbook_in_readme() -> None:
    """A heading of its own whose anchor is the link's, with what it means and what to do."""
    [section] = re.findall(r"^## Alerts and runbooks$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    runbooks = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=^### |\Z)", section, re.MULTILINE | re.DOTALL))
    linked = printed_by("metrics", "alerts", "--runbooks", "https://wiki.example/b", "--json")
    [group] = json.loads(linked.stdout)["groups"]
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in group["rules"]}
    assert links == {name: f"https://wiki.example/b#{name.lower()}" for name in runbooks}
    assert all("`" in text for text in runbooks.values()), "each names a command or a key"
