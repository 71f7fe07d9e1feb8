"""`doctor`: the real command against both sides of the sandbox, each check made to fail once."""

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web
from cli_bench import SECRETS
from doctor_bench import URL, Clinic, a_clinic
from processes import call, open_shop, rehearsal
from test_cli_hooks import listening

from billingd.cli import talk
from billingd.daemon import make_amplify
from billingd.doctor.at_recurly import RecurlyChecks
from billingd.doctor.at_traffic import SourceName, TrafficChecks
from billingd.doctor.facts import Facts
from billingd.doctor.findings import Check, Found, State, examine, fine
from billingd.domain.billing import Account, Allowance, Site
from billingd.domain.usage import Reading
from billingd.loops import Clock
from billingd.sandbox.faults import Rule
from billingd.settings import load
from billingd.store.engine import Store
from billingd.store.holder import LOCKS


@pytest.fixture
async def clinic(tmp_path: Path, sqlite_template: Path) -> AsyncIterator[Clinic]:
    async with a_clinic(tmp_path, sqlite_template) as made:
        yield made


def refused(side: str, path: str, status: int = 403) -> Rule:
    """One path of a side answers with that status until cleared."""
    return Rule(side, "*", path, "outage", None, args={"status": status})


async def test_a_sound_installation_is_found_sound(clinic: Clinic) -> None:
    """Also one in which somebody is to be written to, and one without a feed; on paper too."""
    found = await clinic.examine()
    assert (found.code, found.wrong(), found.document["healthy"]) == (0, {}, True)
    assert found.skipped() == {"amplify.users"}
    assert found.document["daemon"] is False
    assert "70 units" in found.says("traffic")
    assert '"summary" agrees' in found.says("traffic")
    clinic.configure('[accounts]\nmissing = "create"\n[catch_up]\nwatch_topic = ""\n')
    other = await clinic.examine()
    assert (other.code, other.wrong(), other.skipped()) == (0, {}, {"amplify.watch_topic"})
    printed = await clinic.run("doctor")
    assert (printed.exit_code, printed.stderr) == (0, "")
    assert "fix:" not in printed.stdout
    assert "hidden" not in printed.output


class Case(NamedTuple):
    """What is planted, which check finds it, how, and what the fix must say."""

    plant: Callable[[Clinic], Awaitable[None]]
    check: str
    state: str
    fix: str


CASES: dict[str, Case] = {}


def case(check: str, fix: str, state: str = "look") -> Callable[[Any], Any]:
    def keep(plant: Callable[[Clinic], Awaitable[None]]) -> Callable[[Clinic], Awaitable[None]]:
        CASES[plant.__name__] = Case(plant, check, state, fix)
        return plant

    return keep


for _plural in ("products", "productplans", "subscriptions", "marketplaces"):

    @case(f"amplify.{_plural}", "axway service-account update DOSA_sandbox --role api_central_admin")
    async def forbidden(clinic: Clinic, plural: str = _plural) -> None:
        clinic.world.faults.add(refused("amplify", f"**/catalog/*/{plural}"))

    CASES[f"forbidden {_plural}"] = CASES.pop("forbidden")


@case("amplify.quotas", "--role api_central_admin")
async def forbidden_quotas(clinic: Clinic) -> None:
    clinic.world.faults.add(refused("amplify", "**/quotas"))


@case("amplify.users", "--role administrator")
async def forbidden_users(clinic: Clinic) -> None:
    clinic.configure('[accounts]\nmissing = "create"\n')
    clinic.world.faults.add(refused("amplify", "/api/v1/user/*"))


@case("amplify.roles", "--role api_central_admin")
async def another_teams(clinic: Clinic) -> None:
    clinic.world.tenant.settings.own_teams_only = True


@case("amplify.api_version", 'amplify.api_version = "v1alpha1"')
async def an_old_tenant(clinic: Clinic) -> None:
    clinic.world.tenant.settings.versions = "v1alpha1"


@case("amplify.webhooks", f"billingd hooks apply --webhook-url {URL}/webhooks/amplify")
async def switched_off(clinic: Clinic) -> None:
    clinic.change("Webhook", enabled=False)


@case("amplify.webhooks", f"billingd hooks apply --webhook-url {URL}/webhooks/amplify")
async def a_deleted_secret(clinic: Clinic) -> None:
    clinic.world.tenant.delete(clinic.there("Secret"))


@case("amplify.webhooks", f"billingd hooks apply --webhook-url {URL}/webhooks/amplify")
async def a_secret_without_its_key(clinic: Clinic) -> None:
    clinic.change("Secret", data={"other": "x"})


@case("amplify.webhooks", f"billingd hooks apply --webhook-url {URL}/webhooks/amplify")
async def a_secret_in_another_header(clinic: Clinic) -> None:
    clinic.configure('[webhooks]\nauth = "header:x-api-key"\n')


@case("amplify.webhooks", "billingd hooks apply --webhook-url")
async def no_webhook(clinic: Clinic) -> None:
    clinic.change("Webhook", url="https://somebody.example.com/else")
    clinic.world.tenant.delete(clinic.there("Integration"), force=True)


@case("amplify.triggers", "billingd hooks apply --webhook-url")
async def a_trigger_lost(clinic: Clinic) -> None:
    triggers = clinic.there("ResourceHook").body["spec"]["triggers"]
    clinic.change("ResourceHook", triggers=[one for one in triggers if one["kind"] != "Subscription"])


@case("amplify.watch_topic", "billingd hooks apply --webhook-url")
async def no_watch_topic(clinic: Clinic) -> None:
    clinic.world.tenant.delete(clinic.there("WatchTopic"))


@case("amplify.watch_topic", "billingd hooks apply --webhook-url")
async def a_watch_topic_that_is_half_blind(clinic: Clinic) -> None:
    filters = clinic.there("WatchTopic").body["spec"]["filters"]
    clinic.change("WatchTopic", filters=[{**one, "type": ["created"]} for one in filters])


@case("traffic", 'traffic.source = "metrics"')
async def a_sampled_source(clinic: Clinic) -> None:
    clinic.configure('[traffic]\nsource = "search"\n')


@case("traffic", "--role api_central_admin")
async def forbidden_traffic(clinic: Clinic) -> None:
    clinic.world.faults.add(refused("amplify", "**/chartGroupedBy"))


@case("traffic", 'traffic.source = "metrics"')
async def units_that_summary_cannot_count(clinic: Clinic) -> None:
    pricing = {"type": "perunit", "cost": 0.5}
    await clinic.plan("stored", quotas=[{"name": "mb", "unit": "x-mb", "pricing": pricing}])
    clinic.configure('[traffic]\nsource = "summary"\n')


@case("amplify.labels", "set the attribute billingSystem to recurly")
async def nothing_labelled(clinic: Clinic) -> None:
    product = clinic.there("Product")
    clinic.world.tenant.replace(product, {**product.body, "attributes": {}})


@case("amplify.pricing", "change plan odd at Amplify")
async def a_price_that_recurly_cannot_express(clinic: Clinic) -> None:
    await clinic.plan("odd", billing={"currency": "KWD", "price": 0.125})
    clinic.world.site.settings.configure(currencies={"USD", "KWD"})


@case("amplify.native_billing", "switch billing off in the settings of Marketplace")
async def a_marketplace_that_bills(clinic: Clinic) -> None:
    marketplace = clinic.there("Marketplace")
    clinic.world.tenant.put_subresource(marketplace, "billing", {"billing": {"payment": {"type": "stripe"}}})


@case("recurly.key", "make a private API key")
async def a_wrong_key(clinic: Clinic) -> None:
    clinic.environment["BILLINGD_RECURLY__API_KEY"] = "hidden-wrong-key"


@case("recurly.currency", "switch EUR on at Recurly")
async def a_currency_not_taken(clinic: Clinic) -> None:
    await clinic.plan("euro", billing={"currency": "EUR", "price": 1})
    clinic.world.site.settings.configure(currencies={"USD"})


@case("recurly.accounts", "make an account at Recurly with the code amplify-user-")
async def nobody_to_pay(clinic: Clinic) -> None:
    await clinic.subscribe("poor", team="22222222-2222-4222-8222-222222222222")


@case("recurly.requests_per_minute", "recurly.requests_per_minute = 60")
async def a_limit_below_the_setting(clinic: Clinic) -> None:
    clinic.world.site.settings.configure(rate_limit_per_minute=60)


@case("recurly.rate_limit", "wait until")
async def a_limit_nearly_used_up(clinic: Clinic) -> None:
    await clinic.use_up(9)
    clinic.world.site.settings.configure(rate_limit_per_minute=2)


@case("recurly.key", "wait until")
async def a_limit_used_up(clinic: Clinic) -> None:
    await clinic.use_up(10)
    clinic.world.site.settings.configure(rate_limit_per_minute=2)


@case("recurly.times", "systemctl stop billingd")
async def times_that_mean_something_else(clinic: Clinic) -> None:
    """The account is listed as the newest, and not from its own second on."""
    lag = Rule("recurly", "GET", "/accounts", "list_lag", None, skip=1, args={"seconds": 3600})
    clinic.world.faults.add(lag)


@case("store", "billingd db upgrade")
async def an_old_schema(clinic: Clinic) -> None:
    with sqlite3.connect(clinic.bench.path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()


@case("store", "install the billingd that wrote it")
async def a_newer_schema(clinic: Clinic) -> None:
    with sqlite3.connect(clinic.bench.path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()


@case("store", "billingd db restore FILE")
async def no_store_at_all(clinic: Clinic) -> None:
    clinic.bench.path.write_bytes(b"hidden " * 4096)


@case("store", "install -d -m 0700 -o billingd")
async def no_directory(clinic: Clinic) -> None:
    clinic.configure(store=f"sqlite+aiosqlite:///{clinic.bench.directory}/none/billingd.db")


@case("store", "see that the server of store.url runs", "unreachable")
async def a_database_that_is_away(clinic: Clinic) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"postgresql+asyncpg://billingd:hidden@127.0.0.1:{port}/billingd"
    clinic.environment["BILLINGD_STORE__URL"] = url


@case("store.integrity", "billingd db restore FILE")
async def a_stray_row(clinic: Clinic) -> None:
    with sqlite3.connect(clinic.bench.path) as connection:
        connection.execute(
            "INSERT INTO add_on_links (quota_id, plan_id, add_on_code, title, unit, tier_type, linked_at) "
            "VALUES ('q', 'gone', 'c', 't', 'u', 'flat', '2026-01-01 00:00:00.000000')"
        )
    connection.close()


@case("store.times", "timedatectl set-ntp true")
async def a_time_still_to_come(clinic: Clinic) -> None:
    with sqlite3.connect(clinic.bench.path) as connection:
        connection.execute(
            "INSERT INTO events (source, id, type, kind, name, received_at) "
            "VALUES ('amplify', '1', 't', 'k', 'n', '2999-01-01 00:00:00.000000')"
        )
    connection.close()


@pytest.mark.parametrize("name", CASES)
async def test_each_check_fails_once_and_prints_what_mends_it(clinic: Clinic, name: str) -> None:
    """And hides none of the others: only what needs it is not tried."""
    planted = CASES[name]
    await planted.plant(clinic)
    found = await clinic.examine()
    assert found.wrong().get(planted.check) == planted.state, found.checks
    assert planted.fix in found.fixes(planted.check)
    assert found.code == {"look": 3, "unreachable": 4}[planted.state]
    assert found.document["healthy"] is False
    for one in found.checks:
        assert (one["fix"] is None) == (one["state"] in ("ok", "skipped")), "a failing check has a fix"
    assert "hidden" not in str(found.document)


async def test_a_refused_token_leaves_the_other_side_examined(clinic: Clinic) -> None:
    """Everything at Amplify needs the token, and nothing else does."""
    clinic.environment["BILLINGD_AMPLIFY__CLIENT_SECRET"] = "hidden-wrong-secret"
    found = await clinic.examine()
    assert (found.code, found.wrong()) == (3, {"amplify.token": "look"})
    assert "amplify.client_secret" in found.fixes("amplify.token")
    assert {"amplify.products", "amplify.webhooks", "traffic", "recurly.currency"} <= found.skipped()
    assert not {"recurly.key", "recurly.times", "store.integrity"} & found.skipped()
    assert "not tried: it needs amplify.token" in found.says("amplify.webhooks")


@pytest.mark.parametrize("side", ["amplify", "recurly"])
async def test_a_side_that_is_away_is_4(clinic: Clinic, side: str) -> None:
    """The other one is examined all the same; when both are away, so is the store."""
    first = {"amplify": "amplify.token", "recurly": "recurly.key"}
    clinic.world.faults.add(Rule(side, "*", "*", "outage", None))
    found = await clinic.examine()
    assert (found.code, found.wrong()) == (4, {first[side]: "unreachable"})
    assert f"see that this machine reaches {clinic.base}" in found.fixes(first[side])
    other = first["recurly" if side == "amplify" else "amplify"]
    assert found.of(other)[0]["state"] == "ok"
    assert found.of("store.integrity")[0]["state"] == "ok"


async def test_a_fault_of_the_configuration_is_2_and_hides_nothing(clinic: Clinic) -> None:
    """What can be tried with the rest is tried, and its faults are told too."""
    clinic.configure('[traffic]\nwindow = "soon"\n')
    clinic.change("Webhook", enabled=False)
    clinic.environment["BILLINGD_RECURLY__API_KEY"] = None
    found = await clinic.examine()
    assert found.code == 2
    assert found.wrong() == {"configuration": "configuration", "amplify.webhooks": "look"}
    assert f"{clinic.bench.config}:14: traffic.window: " in found.says("configuration")
    assert f"mend {clinic.bench.config}:14, then: billingd check-config" in found.fixes("configuration")
    assert "recurly.api_key: is needed" in found.says("configuration")
    assert found.skipped() == {"amplify.users", "recurly"}


async def test_a_file_that_is_no_toml_is_told_as_every_fault_is(clinic: Clinic) -> None:
    """Nobody can tell what it would have said, so nothing else is tried."""
    clinic.bench.config.write_text('[store]\nurl = "x\n')
    found = await clinic.examine()
    assert (found.code, [one["check"] for one in found.checks]) == (2, ["configuration"])
    assert f"{clinic.bench.config}:2: is not TOML" in found.says("configuration")
    assert not clinic.world.calls


async def test_clocks_are_compared_with_both_sides(clinic: Clinic) -> None:
    clinic.world.clock.advance(timedelta(seconds=-90))
    found = await clinic.examine()
    assert found.wrong() == {"amplify.clock": "look", "recurly.clock": "look"}
    assert "ahead of Recurly's" in found.says("recurly.clock")
    assert "timedatectl set-ntp true" in found.fixes("amplify.clock")


async def test_a_full_disk_is_seen_before_it_stops_anything(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20))
    found = await clinic.examine()
    assert found.wrong() == {"store.disk": "look"}
    assert "MiB free there" in found.fixes("store.disk")


async def test_several_faults_are_all_told(clinic: Clinic) -> None:
    """Of all sides at once; and for people, a line and what mends it for each."""
    for name in (
        "switched_off",
        "no_watch_topic",
        "a_marketplace_that_bills",
        "a_stray_row",
        "nobody_to_pay",
    ):
        await CASES[name].plant(clinic)
    found = await clinic.examine()
    assert set(found.wrong()) == {
        "store.integrity",
        "amplify.webhooks",
        "amplify.watch_topic",
        "amplify.native_billing",
        "recurly.accounts",
    }
    printed = await clinic.run("doctor")
    assert printed.exit_code == 3
    assert printed.stdout.count("fix: ") == 5
    assert printed.stdout.splitlines()[-1].endswith("5 to look at, 1 not tried.")


async def test_only_some_checks(clinic: Clinic) -> None:
    """With what they need, which is not told of; a name that is none is wrong usage."""
    found = await clinic.examine("--only", "recurly.accounts")
    assert [one["check"] for one in found.checks] == ["recurly.accounts"]
    wrong = await clinic.run("doctor", "--only", "nothing")
    assert wrong.exit_code == 2
    assert "no check's name begins with 'nothing'" in wrong.stderr


async def test_hooks_of_the_original_integration_count(clinic: Clinic) -> None:
    """Under names of their own, to its own paths, without quotas: the watch topic has those."""
    clinic.world.tenant.delete(clinic.there("Integration"), force=True)
    tenant = clinic.world.tenant
    scope = tenant.create("Integration", {"name": "monitor", "title": "m", "spec": {"description": "d"}})
    tenant.create(
        "Secret", {"name": "s", "title": "s", "spec": {"data": {"Authorization": "x"}}}, scope=scope
    )
    for path, kind in (("provisionplan", "ProductPlan"), ("provisionsubscription", "Subscription")):
        auth = {"secret": {"name": "s", "key": "Authorization"}}
        spec = {"enabled": True, "url": f"{URL}/{path}", "auth": auth}
        tenant.create("Webhook", {"name": f"wh-{path}", "title": path, "spec": spec}, scope=scope)
        trigger = {"group": "catalog", "kind": kind, "name": "*", "type": ["updated", "deleted"]}
        hook = {"triggers": [trigger], "webhooks": [f"wh-{path}"]}
        tenant.create("ResourceHook", {"name": f"rh-{path}", "title": path, "spec": hook}, scope=scope)
    found = await clinic.examine()
    assert found.wrong() == {}
    assert len(found.of("amplify.webhooks")) == 2
    assert "by the watch topic only" in found.says("amplify.triggers")
    clinic.configure('[catch_up]\nwatch_topic = ""\n')
    assert (await clinic.examine()).wrong() == {"amplify.triggers": "look"}


async def test_beside_a_running_daemon_the_way_to_it_is_examined_too(
    clinic: Clinic, tmp_path: Path, sqlite_template: Path
) -> None:
    """The store is locked by the daemon meanwhile, and nobody minds."""
    (tmp_path / "listener").mkdir()
    async with clinic.bench.reached("unix"):
        async with listening(tmp_path / "listener", sqlite_template, "header:Authorization") as (url, _):
            clinic.change("Webhook", url=f"{url}/webhooks/amplify")
            found = await clinic.examine()
            assert (found.code, found.wrong(), found.document["daemon"]) == (0, {}, True)
            assert "leads to billingd's listener" in found.says("webhooks.address")
        away = await clinic.examine("--only", "webhooks")
        assert away.wrong() == {"webhooks.address": "look"}
        assert f"curl -v {url}/webhooks/amplify" in away.fixes("webhooks.address")
        clinic.change("Webhook", url=f"{clinic.base}/webhooks/amplify")
        elsewhere = await clinic.examine("--only", "webhooks")
        assert "leads elsewhere" in elsewhere.says("webhooks.address")


async def test_a_daemon_that_runs_with_something_else_is_told(clinic: Clinic) -> None:
    """What was edited waits for a restart or a reload; or the daemon has another file."""
    async with clinic.bench.reached("unix"):
        clinic.configure('[accounts]\nmissing = "create"\n[webhooks]\nbody_bytes_max = 9\n')
        edited = await clinic.examine("--only", "daemon.configuration")
        clinic.configure("[accounts]\nmissing = 3\n")
        broken = await clinic.examine("--only", "daemon.configuration")
        clinic.configure()
        other = await clinic.examine("--only", "daemon.config", env={"BILLINGD_OUTBOX__WORKERS": "3"})
    assert [(one["state"], one["fix"]) for one in edited.checks] == [
        ("look", "systemctl restart billingd"),
        ("look", "billingd reload"),
    ]
    assert "runs with another accounts.missing than is configured now" in edited.says("daemon.configuration")
    assert "it would not start again: " in broken.says("daemon.configuration")
    assert "runs with another outbox.workers than this command" in other.says("daemon.configuration")
    assert other.code == 3


@pytest.mark.parametrize("http", [True, False])
async def test_a_foreign_program_at_our_address_is_no_free_one(clinic: Clinic, http: bool) -> None:
    """`billingd run` could not listen there."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" if http else "220 mail.example.com ESMTP\r\n"
        writer.write(body.encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(greet, clinic.bench.socket):
        found = await clinic.examine("--only", "daemon")
    assert (found.code, found.wrong()) == (3, {"daemon": "look"})
    assert "end what listens there, or set admin.listen" in found.fixes("daemon")


async def test_a_daemon_that_hangs_is_no_daemon_that_was_not_started(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, say: the kernel takes connections, and nobody answers them."""
    monkeypatch.setattr(talk, "ANSWER_SECONDS", 0.2)

    async def silent(_request: web.Request) -> web.Response:
        await asyncio.sleep(3_600)
        raise AssertionError

    application = web.Application()
    application.router.add_get("/healthz", silent)
    async with clinic.bench.listening(application, "unix"):
        found = await clinic.examine("--only", "daemon")
    assert (found.code, found.wrong(), found.document["daemon"]) == (3, {"daemon": "look"}, False)
    assert "in time, but listens there" in found.says("daemon")
    assert "systemctl restart billingd" in found.fixes("daemon")


@pytest.mark.skipif(not LOCKS.exists(), reason="this kernel lists no locks in /proc")
async def test_a_store_that_somebody_holds_without_answering_is_told(clinic: Clinic) -> None:
    async with Store(clinic.bench.url) as store:
        store.lock()
        found = await clinic.examine("--only", "daemon")
    assert (found.code, found.wrong()) == (3, {"daemon": "look"})
    assert f"but process {os.getpid()} holds the store" in found.says("daemon")
    assert "journalctl -u billingd" in found.fixes("daemon")
    assert (await clinic.examine("--only", "daemon")).wrong() == {}, "a lock file alone is none"


async def test_what_an_unwell_daemon_says_is_told(clinic: Clinic) -> None:
    async def answer(request: web.Request) -> web.Response:
        documents: dict[str, Any] = {
            "/healthz": {"healthy": False, "stuck": ["traffic"]},
            "/readyz": {"ready": False, "reasons": ["Recurly was not reached lately: no call yet"]},
            "/configuration": {"runs_with": {}, "reload": [], "restart": [], "faults": []},
            "/status": {"webhooks": {"accepted": 3, "rejected": 9, "unauthorized": 7}},
        }
        return web.json_response(documents[request.path], status=200 if request.path == "/status" else 503)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    clinic.change("Webhook", url=f"{clinic.base}/webhooks/amplify")
    async with clinic.bench.listening(application, "unix"):
        found = await clinic.examine()
    assert found.wrong() == dict.fromkeys(
        ("daemon.progress", "daemon.ready", "webhooks.address", "webhooks.secret"), "look"
    )
    assert "systemctl restart billingd" in found.fixes("daemon.progress")
    assert "Recurly was not reached lately" in found.says("daemon.ready")
    assert "7 delivery(s) without the right secret" in found.says("webhooks.secret")


class Counts(NamedTuple):
    """A traffic source of a few fixed answers."""

    answers: list[tuple[Reading, ...]]

    async def read(self, **_: Any) -> tuple[Reading, ...]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def counting(clinic: Clinic, source: SourceName, **answers: list[int]) -> TrafficChecks:
    """The checks of a source, with sources that count so many units at each call."""
    subscription = clinic.there("Subscription").id
    quota = clinic.there("Quota").id
    now = clinic.world.clock.now()
    made = {
        name: Counts([(Reading(subscription, quota, now - timedelta(hours=5), units),) for units in each])
        for name, each in answers.items()
    }
    async with aiohttp.ClientSession() as session:
        environment = {name: value for name, value in clinic.environment.items() if value is not None}
        settings = load(clinic.bench.config, {**SECRETS, **environment}).settings
        facts = Facts(make_amplify(settings, session, Clock()))
        await facts.active()
    return TrafficChecks(
        lambda name: made[name],
        facts,
        name=source,
        billable="total",
        settle=timedelta(0),
        now=lambda: now,
    )


async def test_a_source_that_counts_less_than_another_is_named(clinic: Clinic) -> None:
    """Read again before it is believed: more may have arrived between the two."""
    checks = await counting(clinic, "metrics", metrics=[40], summary=[41])
    [found] = await checks.counts()
    assert found.fix == 'traffic.source = "summary"'
    later = await counting(clinic, "metrics", metrics=[40, 41], summary=[41])
    assert [one.fix for one in await later.counts()] == [None]


async def test_an_hour_that_counts_otherwise_alone_is_told(clinic: Clinic) -> None:
    checks = await counting(clinic, "metrics", metrics=[40, 40, 39], summary=[40])
    await checks.counts()
    [found] = await checks.times()
    assert found.state is State.LOOK
    assert "counts 40 units within a day and 39 alone" in found.says
    assert found.fix is not None


class Sites(NamedTuple):
    """A Recurly of which only the sites are asked."""

    found: tuple[Site, ...]
    skew: timedelta | None = None
    allowance: Allowance | None = None

    async def sites(self) -> tuple[Site, ...]:
        return self.found

    async def time_returns(self) -> bool | None:
        return None

    async def find_account(self, code: str) -> Account | None:
        raise AssertionError(code)


@pytest.mark.parametrize(
    ("sites", "fix"),
    [
        ((), "make a private API key"),
        ((Site("old", "production", frozenset(), frozenset({"credit_memos"})),), "switch on only_bill_what"),
        ((Site("new", "production", frozenset(), frozenset()),), None),
    ],
)
async def test_what_a_site_lacks_is_told(sites: tuple[Site, ...], fix: str | None) -> None:
    probes = Sites(sites)
    checks = RecurlyChecks(probes, probes, None)
    await checks.key()
    [found] = await checks.site()
    assert (found.fix or "None").find(str(fix)) >= 0


async def test_a_check_with_a_bug_hides_no_other() -> None:
    async def broken() -> list[Found]:
        raise KeyError("x")

    async def well() -> list[Found]:
        return [fine("well")]

    first, second = await examine([Check("a", broken, "", ""), Check("b", well, "", "")])
    assert (first.state, second.state) == (State.LOOK, State.OK)
    assert "KeyError" in first.says
    assert "billingd doctor --only a" in str(first.fix)


def test_beside_the_real_daemon_and_without_it(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """As processes: a delivery with the wrong secret is told of, and doctor takes nothing from the daemon."""
    url = f"sqlite+aiosqlite:///{tmp_path}/billingd.db"
    with rehearsal(tmp_path, free_port, url) as (sandbox, daemon):
        open_shop(sandbox)

        def doctor() -> tuple[int, dict[str, Any]]:
            command = [sys.executable, "-m", "billingd", "--config", str(daemon.config), "doctor", "--json"]
            done = subprocess.run(
                command, env=daemon.environment, capture_output=True, text=True, check=False
            )
            assert done.stderr == ""
            told = json.loads(done.stdout)
            return done.returncode, {
                one["check"]: one["state"] for one in told["checks"] if one["state"] == "look"
            }

        assert doctor() == (3, {"amplify.webhooks": "look", "amplify.triggers": "look"}), "no hooks applied"
        daemon.start()
        daemon.ready()
        before = call(f"{sandbox.base}/control/ledger")
        assert doctor() == (3, {"amplify.webhooks": "look", "amplify.triggers": "look"})
        call(f"{sandbox.base}/control/hooks", method="DELETE")
        hook = call(f"{daemon.admin}/status")["webhooks"]["rejected"]
        listen = daemon.config.read_text().split("[webhooks]")[1].split('"')[1]
        sandbox.do("hooks", url=f"http://{listen}/webhooks/amplify", headers={"Authorization": "stranger"})
        sandbox.do("products", name="more", title="More")
        sandbox.do("hooks/settle")
        assert call(f"{daemon.admin}/status")["webhooks"]["rejected"] > hook
        assert doctor()[1].keys() == {"amplify.webhooks", "amplify.triggers", "webhooks.secret"}
        assert call(f"{sandbox.base}/control/ledger") == before
        assert daemon.terminate() == 0
