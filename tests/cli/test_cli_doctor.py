"""`doctor`: the real command against both sides of the sandbox, each check made to fail once."""

import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from doctor_bench import TEAM, URL, Clinic, Examined, a_clinic

from billingd.sandbox import control_both
from billingd.sandbox.faults import Rule


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
    clinic.configure(store=f"postgresql+asyncpg://billingd:hidden@127.0.0.1:{port}/billingd")


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
