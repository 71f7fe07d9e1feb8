"""The control interface and the server: everything around billingd, played on one port."""

import asyncio
import tomllib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import BasicAuth, ClientSession, web
from aiohttp.test_utils import TestServer
from sandbox_side import TOKEN_PATH, Sandbox, sandbox_side

from billingd.sandbox import control, server


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with sandbox_side() as side:
        yield side


async def test_every_operation_is_documented_with_an_example(sandbox: Sandbox) -> None:
    """GET /control lists each operation, what it does and a curl that is complete."""
    listed = (await sandbox.control("GET", ""))["operations"]
    assert len(listed) == len(control.OPERATIONS)
    for each in listed:
        assert each["does"].endswith(".")
        assert each["example"].startswith(f"curl -sS -X {each['operation'].split()[0]} http://127.0.0.1:")
        assert "/{" not in each["example"]


async def test_the_examples_work_in_the_order_they_are_listed(sandbox: Sandbox) -> None:
    """Whoever pastes them one after the other sees each succeed."""
    for each in control.OPERATIONS:
        path = (each.at or each.path).removeprefix("/control")
        if each.path.startswith("/control/recurly-plans/"):
            made = sandbox.world.tenant.resources.find("Subscription", "weather-ada")
            assert made is not None
            await sandbox.provision(made.shown("v1"))
        await sandbox.control(each.method, path, each.example)
    assert sandbox.world.tenant.traffic.metrics == 1
    assert sandbox.world.stop.is_set()


async def test_a_plan_is_made_whole(sandbox: Sandbox) -> None:
    """Draft, quotas, units as needed, activation: with the events that fire at each."""
    await sandbox.control(
        "POST", "/products", {"name": "weather", "attributes": {"billingSystem": "recurly"}}
    )
    quotas = [
        {"name": "calls", "pricing": {"type": "perunit", "cost": 0.5}},
        {"name": "data", "title": "Data", "unit": "x-mb", "pricing": {"type": "unlimited"}},
    ]
    body = {"name": "p", "title": "P", "product": "weather", "billing": {"price": 10}, "quotas": quotas}
    plan = await sandbox.control("POST", "/plans", body)
    assert plan["state"] == "active"
    assert plan["spec"]["billing"] == {
        "currency": "USD",
        "price": 10,
        "cycle": "recurring",
        "interval": "monthly",
    }
    assert plan["spec"]["subscription"]["approval"] == "manual"
    assert [each["spec"]["unit"] for each in plan["quotas"]] == ["transactions", "x-mb"]
    assert sandbox.world.tenant.resources.find("ProductPlanUnit", "x-mb")
    kept, _ = sandbox.world.tenant.journal.kept()
    assert [each.payload["kind"] for each in kept][-4:] == [
        "Quota",
        "ProductPlanUnit",
        "Quota",
        "ProductPlan",
    ]
    later = await sandbox.control("POST", "/plans/p/quotas", {"name": "later", "unit": "x-kb"})
    assert later["metadata"]["scope"]["name"] == "p"
    for step, state in (("deprecate", "deprecated"), ("archive", "archived")):
        assert (await sandbox.control("POST", f"/plans/p/{step}"))["state"] == state
    assert (await sandbox.control("POST", "/plans/p/delete"))["deleted"] is True


async def test_half_a_plan_is_taken_back(sandbox: Sandbox) -> None:
    """A faulty quota leaves no plan behind, so that the request can be mended and sent again."""
    await sandbox.control("POST", "/products", {"name": "weather"})
    body = {"name": "p", "product": "weather", "quotas": [{"name": "calls", "pricing": {"type": "perUnit"}}]}
    refused = await sandbox.control("POST", "/plans", body, status=400)
    assert "pricing.type" in refused["error"]["message"]
    assert sandbox.world.tenant.resources.find("ProductPlan", "p") is None


async def test_a_consumer_subscribes_cancels_and_is_deleted(sandbox: Sandbox) -> None:
    """People are made on the way; approval is pending on a manual plan; reject is possible after approval."""
    await sandbox.control("POST", "/people", {"name": "Ada", "email": "ada@example.com", "guid": "u-ada"})
    await sandbox.subscribed("first")
    body = {"plan": "p", "user": "Ada", "team": "blue", "organization": "300", "name": "second"}
    made = await sandbox.control("POST", "/subscribe", body)
    resource = made["marketplace"]["resource"]
    assert resource["metadata"]["createUserId"] == "u-ada"
    assert resource["owner"]["organization"] == {"id": "300"}
    assert made["approval"] == {"state": "pending"}
    again = await sandbox.control("POST", "/subscribe", {**body, "name": "third"}, status=409)
    assert "second" in again["error"]["message"]
    await sandbox.control("POST", "/subscriptions/second/approve")
    rejected = await sandbox.control("POST", "/subscriptions/second/reject", {"reason": "unpaid"})
    assert rejected["approval"] == {"state": "rejected", "reason": "unpaid", "previousState": "approved"}
    cancelled = await sandbox.control("POST", "/subscriptions/first/cancel")
    assert cancelled["state"]["name"] == "archived"
    assert (await sandbox.control("POST", f"/subscriptions/{made['metadata']['id']}/delete"))[
        "deleted"
    ] is True


async def test_a_subscription_migrates_to_another_plan(sandbox: Sandbox) -> None:
    """A new one with the approval and a reference to the old one, which becomes migrated."""
    await sandbox.subscribed()
    await sandbox.control(
        "POST", "/plans", {"name": "q", "product": "weather", "quotas": [{"name": "calls"}]}
    )
    new = await sandbox.control("POST", "/subscriptions/acme/migrate", {"plan": "q"})
    assert (new["approval"]["state"], new["references"]) == ("approved", {"subscription": "acme"})
    old = sandbox.world.tenant.resources.find("Subscription", "acme")
    assert old is not None
    assert old.body["state"]["name"] == "migrated"
    await sandbox.control("POST", "/subscriptions/acme/migrate", {"plan": "q"}, status=400)


async def test_the_owner_is_a_user_where_only_a_user_is_named(sandbox: Sandbox) -> None:
    """`user` alone makes a personal subscription; with a team the team owns it."""
    await sandbox.subscribed()
    made = await sandbox.control("POST", "/subscribe", {"plan": "p", "user": "Ada", "email": "a@example.com"})
    resource = made["marketplace"]["resource"]
    assert resource["owner"]["user"] == {"id": resource["metadata"]["createUserId"]}
    made = await sandbox.control("POST", "/subscribe", {"plan": "p", "user": "Ada", "team": "blue"})
    assert "user" not in made["marketplace"]["resource"]["owner"]


REFUSALS: list[tuple[int, str, str, dict[str, Any]]] = [
    (400, "name", "/products", {}),
    (400, "titel", "/products", {"name": "x", "titel": "typo"}),
    (400, "attributes.a", "/products", {"name": "x", "attributes": {"a": 1}}),
    (404, "product", "/plans", {"name": "x", "product": "nope"}),
    (404, "plan", "/subscribe", {"plan": "nope"}),
    (404, "step", "/plans/p/explode", {}),
    (404, "name", "/subscriptions/nope/cancel", {}),
    (404, "subscription", "/traffic", {"subscription": "nope", "units": 1}),
    (400, "units", "/traffic", {"subscription": "acme", "units": -1}),
    (400, "units", "/traffic", {"subscription": "acme", "units": 1.5}),
    (400, "quota", "/traffic", {"subscription": "acme", "units": 1, "quota": "nope"}),
    (400, "at", "/traffic", {"subscription": "acme", "units": 1, "at": "yesterday"}),
    (400, "at", "/traffic", {"subscription": "acme", "units": 1, "at": "2027-01-01T00:00:00Z"}),
    (400, "arrives", "/traffic", {"subscription": "acme", "units": 1, "arrives": "2025-01-01T00:00:00Z"}),
    (400, "status", "/traffic", {"subscription": "acme", "units": 1, "status": "OK"}),
    (409, "subscription", "/renew", {"subscription": "acme"}),
    (400, "advance", "/clock", {}),
    (400, "advance", "/clock", {"advance": "a month"}),
    (400, "kind", "/faults", {"side": "recurly", "kind": "explode"}),
    (400, "on", "/outage", {"side": "recurly", "on": "yes"}),
    (400, "url", "/hooks", {"url": "127.0.0.1:8080"}),
    (400, "amplify", "/settings", {"amplify": {"sample_percent": 101}}),
    (400, "recurly", "/settings", {"recurly": {"nope": 1}}),
    (400, "message", "/mailbox", {"title": "no message"}),
]


@pytest.mark.parametrize(("status", "field", "path", "body"), REFUSALS)
async def test_refusals_name_the_field_and_the_fix(
    sandbox: Sandbox, status: int, field: str, path: str, body: dict[str, Any]
) -> None:
    """Whoever mistypes is told what and how to mend it."""
    await sandbox.subscribed()
    error = (await sandbox.control("POST", path, body, status=status))["error"]
    assert error["field"] == field
    assert error["message"]
    assert error["fix"]


async def test_paths_nobody_serves_answer_in_each_interfaces_words(sandbox: Sandbox) -> None:
    """404s of /control point to the list, Amplify's have its errors shape."""
    assert (await sandbox.control("GET", "/nope", status=404))["error"][
        "fix"
    ] == "GET /control lists what there is"
    answer = await sandbox.amplify("GET", "/api/traceability/v1/traceability/count")
    assert (answer.status, (await answer.json())["errors"][0]["status"]) == (404, 404)


async def test_traffic_needs_an_approved_subscription(sandbox: Sandbox) -> None:
    """Gateways let nobody else through, unless forced; a bulk is counted whole or not at all."""
    made = await sandbox.subscribed(approve=False)
    one = {"subscription": "acme", "units": 5}
    await sandbox.control("POST", "/traffic", one, status=409)
    await sandbox.control("POST", "/traffic", {**one, "force": True})
    await sandbox.control("POST", "/subscriptions/acme/approve")
    bulk = [{**one, "at": "2026-01-15T10:00:00Z"}, {**one, "quota": "calls", "status": "Failure"}]
    assert await sandbox.control("POST", "/traffic", {"traffic": bulk}) == {"metrics": 2, "units": 10}
    await sandbox.control("POST", "/traffic", {"traffic": [one, {**one, "units": 0}]}, status=400)
    late = {"subscription": made["metadata"]["id"], "units": 100, "arrives": "2026-01-15T13:00:00Z"}
    await sandbox.control("POST", "/traffic", late)
    ledger = await sandbox.control("GET", "/ledger")
    assert (ledger["totals"]["served_units"], ledger["not_yet_visible_units"]) == (115, 100)
    await sandbox.control("POST", "/clock", {"advance": "1h"})
    assert (await sandbox.control("GET", "/ledger"))["not_yet_visible_units"] == 0


async def test_the_ledger_shows_what_was_served_reported_and_billed(sandbox: Sandbox) -> None:
    """Units of both sides side by side, to the unit; a repeated tag and a foreign subscription stand out."""
    made = await sandbox.subscribed()
    uuid = await sandbox.provision(made)
    quota = sandbox.world.tenant.resources.of_kind("Quota")[0].id
    sandbox.world.clock.advance(timedelta(hours=1))
    await sandbox.control("POST", "/traffic", {"subscription": "acme", "units": 7})
    behind = (await sandbox.control("GET", "/ledger"))["subscriptions"][0]
    assert (behind["served_units"], behind["reported_units"], behind["agrees"]) == (7, 0, False)
    path = f"/subscriptions/uuid-{uuid}/add_ons/code-amplify-quota-{quota}/usage"
    stamp = "2026-01-15T12:30:00Z"
    usage = {"amount": 7, "merchant_tag": "bd1:1", "recording_timestamp": stamp, "usage_timestamp": stamp}
    await sandbox.recurly("POST", path, usage, status=201)
    level = await sandbox.control("GET", "/ledger")
    assert level["agrees"] is True
    assert level["totals"] == {"served_units": 7, "reported_units": 7, "unbilled_units": 7, "billed_units": 0}
    assert await sandbox.control("POST", "/renew", {"subscription": "acme"}) == {"renewed": 1}
    billed = (await sandbox.control("GET", "/ledger"))["subscriptions"][0]
    assert (billed["unbilled_units"], billed["billed_units"], billed["agrees"]) == (0, 7, True)
    assert [invoice["origin"] for invoice in billed["invoices"]] == ["purchase", "renewal"]
    assert billed["invoices"][1]["total"] == "13.50"
    sandbox.world.clock.advance(timedelta(hours=1))
    again = {
        **usage,
        "usage_timestamp": "2026-01-15T13:30:00Z",
        "recording_timestamp": "2026-01-15T13:30:00Z",
    }
    await sandbox.recurly("POST", path, again, status=201)
    doubled = (await sandbox.control("GET", "/ledger"))["subscriptions"][0]
    assert (doubled["duplicate_tags"], doubled["agrees"]) == (["bd1:1"], False)
    await sandbox.control("POST", "/subscriptions/acme/delete")
    gone = (await sandbox.control("GET", "/ledger"))["subscriptions"][0]
    assert (gone["state"], gone["served_units"]) == ("deleted", 7)


async def test_the_clock_moves_both_sides(sandbox: Sandbox) -> None:
    """Advancing a month bills what is due at Recurly; set and advance both answer the new time."""
    uuid = await sandbox.provision(await sandbox.subscribed())
    moved = await sandbox.control("POST", "/clock", {"advance": "31d"})
    assert moved == {"now": "2026-02-15T12:00:00+00:00"}
    row = (await sandbox.control("GET", "/ledger"))["subscriptions"][0]
    assert row["recurly"][0]["uuid"] == uuid
    assert len(row["invoices"]) == 2
    await sandbox.control("POST", "/clock", {"set": "2026-02-16T12:00:00Z"})
    assert (await sandbox.control("GET", "/clock"))["now"] == "2026-02-16T12:00:00+00:00"


async def test_a_subscription_ends_after_its_cycles(sandbox: Sandbox) -> None:
    """Amplify archives it after so many terms, counted from the approval."""
    await sandbox.subscribed(subscription={"cycles": 2})
    for advance, state in (("58d", "active"), ("1d", "archived")):
        await sandbox.control("POST", "/clock", {"advance": advance})
        (row,) = (await sandbox.control("GET", "/ledger"))["subscriptions"]
        assert row["state"] == state


async def test_a_product_is_marked_later(sandbox: Sandbox) -> None:
    """Attributes may come after the plans: a ResourceUpdated of the product."""
    await sandbox.control("POST", "/products", {"name": "weather", "attributes": {"a": "b"}})
    body = {"attributes": {"billingSystem": "recurly", "a": None}}
    marked = await sandbox.control("POST", "/products/weather", body)
    assert marked["attributes"] == {"billingSystem": "recurly"}
    kept, _ = sandbox.world.tenant.journal.kept()
    assert (kept[-1].type, kept[-1].payload["kind"]) == ("ResourceUpdated", "Product")


async def test_outages_and_faults_strike_one_side(sandbox: Sandbox) -> None:
    """An outage answers for its side only and ends when told; the control interface is never struck."""
    await sandbox.control("POST", "/outage", {"side": "amplify", "on": True, "status": 503})
    assert (await sandbox.amplify("GET", "/apis/catalog/v1/products")).status == 503
    await sandbox.recurly("GET", "/plans")
    assert await sandbox.control("POST", "/outage", {"side": "amplify", "on": False}) == {"down": []}
    assert (await sandbox.amplify("GET", "/apis/catalog/v1/products")).status == 200
    fault = {"side": "amplify", "method": "GET", "path": "/apis/**", "kind": "500", "times": 2, "skip": 1}
    await sandbox.control("POST", "/faults", fault)
    found = [(await sandbox.amplify("GET", "/apis/catalog/v1/products")).status for _ in range(4)]
    assert found == [200, 500, 500, 200]
    assert (await sandbox.control("GET", "/faults"))["struck"]["500"] == 2
    await sandbox.control("POST", "/faults", {"side": "amplify", "kind": "html_502", "times": None})
    assert await sandbox.control("DELETE", "/faults") == {"faults": []}
    assert (await sandbox.amplify("GET", "/apis/catalog/v1/products")).status == 200


async def test_calls_are_counted_per_endpoint(sandbox: Sandbox) -> None:
    """Names and ids do not split a count; the control interface counts for nothing."""
    await sandbox.subscribed()
    for path in ("productplans/p", "productplans/p/quotas", "subscriptions/acme", "subscriptions"):
        await sandbox.amplify("GET", f"/apis/catalog/v1/{path}")
    await sandbox.recurly("GET", "/plans")
    calls = (await sandbox.control("GET", "/calls"))["calls"]
    assert calls["amplify GET /apis/productplans/{name}"] == 1
    assert calls["amplify GET /apis/productplans/{name}/quotas"] == 1
    assert calls["amplify GET /apis/subscriptions/{name}"] == 1
    assert calls["recurly GET /plans"] == 1
    assert (await sandbox.control("DELETE", "/calls"))["total"] == 0


async def test_hooks_are_delivered_to(sandbox: Sandbox) -> None:
    """A hook set over the interface gets events; its deliveries are listed, its secret is not."""
    got: list[str | None] = []

    async def take(request: web.Request) -> web.Response:
        got.append(request.headers.get("Authorization"))
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/webhooks/amplify", take)
    async with TestServer(app) as receiver:
        url = str(receiver.make_url("/webhooks/amplify"))
        await sandbox.control("POST", "/hooks", {"url": url, "headers": {"Authorization": "s3cret"}})
        await sandbox.control("POST", "/products", {"name": "weather"})
        await sandbox.control("POST", "/hooks/settle", {})
        assert got == ["s3cret"] * 2
    listed = await sandbox.control("GET", "/hooks")
    assert [each["status"] for each in listed["deliveries"]] == [202, 202]
    assert "s3cret" not in str(listed)
    assert await sandbox.control("DELETE", "/hooks") == {"removed": 1}


async def test_settings_are_changed_on_both_sides(sandbox: Sandbox) -> None:
    """An empty body shows them, without keys; revoking tokens makes the next call 401."""
    changed = await sandbox.control(
        "POST", "/settings", {"amplify": {"versions": "v1alpha1"}, "recurly": {"production": True}}
    )
    assert changed["amplify"]["versions"] == "v1alpha1"
    assert changed["recurly"]["production"] is True
    assert "api_keys" not in changed["recurly"]
    token = sandbox.world.tenant.tokens.issue(60)
    await sandbox.control("POST", "/settings", {"revoke_tokens": True})
    headers = {"Authorization": f"Bearer {token}"}
    assert (await sandbox.client.get("/apis/catalog/v1alpha1/products", headers=headers)).status == 401


async def test_notifications_land_in_the_mailbox(sandbox: Sandbox) -> None:
    """What Apprise's json:// sends is kept and listed."""
    letter = {"version": "1.0", "title": "Held", "message": "7 units", "type": "warning", "attachments": []}
    await sandbox.control("POST", "/mailbox", letter)
    (kept,) = (await sandbox.control("GET", "/mailbox"))["letters"]
    assert kept == {"received_at": "2026-01-15T12:00:00+00:00", **letter}
    assert await sandbox.control("DELETE", "/mailbox") == {"letters": []}


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:8010", "192.168.1.1:8010", "example.com:80", "127.0.0.1", "8010"]
)
async def test_only_loopback_is_served(listen: str) -> None:
    """Any other address is refused with a message that names it."""
    with pytest.raises(ValueError, match=r"loopback|HOST:PORT"):
        await server.serve(listen)


async def test_serve_prints_what_points_billingd_at_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Port 0 is a free one; stdout is TOML with the secrets as exports; shutdown ends it."""
    task = asyncio.create_task(
        server.serve("127.0.0.1:0", webhook_url="http://127.0.0.1:9/hook", webhook_secret="s")
    )
    text = ""
    while "BILLINGD_WEBHOOKS__SECRET" not in text:
        await asyncio.sleep(0)
        assert not task.done(), task.result()
        text += capsys.readouterr().out
    told = tomllib.loads(text)
    base = told["amplify"]["central_url"]
    assert told["amplify"]["login_url"] == f"{base}/auth"
    assert told["recurly"]["base_url"] == base
    assert told["webhooks"]["listen"] == "127.0.0.1:9"
    exports = dict(
        line.removeprefix("# export ").split("=", 1)
        for line in text.splitlines()
        if line.startswith("# export ")
    )
    assert exports["BILLINGD_WEBHOOKS__SECRET"] == "'s'"
    secret = exports["BILLINGD_AMPLIFY__CLIENT_SECRET"].strip("'")
    async with ClientSession() as session:
        answer = await session.post(
            f"{base}{TOKEN_PATH}",
            data={"grant_type": "client_credentials"},
            auth=BasicAuth(told["amplify"]["client_id"], secret),
        )
        assert answer.status == 200
        assert (await session.post(f"{base}/control/shutdown", json={})).status == 200
    await asyncio.wait_for(task, 5)
