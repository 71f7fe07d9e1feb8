"""`hooks`: the real command against the sandbox's API Server, which delivers to a real webhook listener."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from cli_bench import Bench, document
from click.testing import Result
from manual_clock import ManualClock

from billingd import hooks
from billingd.intake import Intake
from billingd.sandbox import control_amplify
from billingd.sandbox.asked import Asked
from billingd.sandbox.faults import Rule
from billingd.sandbox.server import WORLD, build
from billingd.sandbox.world import World
from billingd.settings import Settings
from billingd.store.engine import Store
from billingd.webhooks import Authenticator, Tally, WebhookListener

URL = "https://billingd.example.com"
SECRET = "hidden-webhook-secret"
KINDS = ["Integration", "Secret", "Webhook", "ResourceHook", "WatchTopic"]


class Place:
    """A sandbox Amplify, and the command in front of it."""

    def __init__(self, bench: Bench, world: World, base: str) -> None:
        self.bench = bench
        self.world = world
        self.base = base
        self.configure()

    def configure(self, more: str = "") -> None:
        """Point the command at the sandbox."""
        tokens = self.world.tenant.tokens
        self.bench.config.write_text(
            f'[amplify]\ncentral_url = "{self.base}"\nlogin_url = "{self.base}/auth"\n'
            f'platform_url = "{self.base}"\nclient_id = "{tokens.client_id}"\n'
            f'organization_id = "{self.world.tenant.organization_id}"\n{more}',
            encoding="utf-8",
        )

    async def run(self, *words: str) -> Result:
        """`billingd hooks …`"""
        secret = {"BILLINGD_AMPLIFY__CLIENT_SECRET": self.world.tenant.tokens.client_secret}
        return await asyncio.to_thread(lambda: self.bench.run("hooks", *words, env=secret))

    async def apply(self, url: str = URL, *words: str) -> list[str]:
        """What `apply` did to each resource, in order."""
        result = await self.run("apply", "--webhook-url", url, *words, "--json")
        return [step["op"] for step in document(result)["resources"]]

    def there(self, kind: str) -> Any:
        """The one resource of a kind that Amplify holds."""
        [found] = self.world.tenant.resources.of_kind(kind)
        return found


@asynccontextmanager
async def a_place(directory: Path, watch_topic: str | None = None) -> AsyncIterator[Place]:
    app = build(watch_topic=watch_topic)
    async with TestServer(app) as server:
        yield Place(Bench(directory), app[WORLD], str(server.make_url("")).rstrip("/"))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with a_place(tmp_path) as made:
        yield made


@asynccontextmanager
async def listening(directory: Path, template: Path, auth: str) -> AsyncIterator[tuple[str, Tally]]:
    """A webhook listener with a store of its own; its address, and what it took."""
    bench, tally = Bench(directory), Tally()
    await bench.fill(template)
    async with Store(bench.url) as store:
        clock = ManualClock()
        listener = WebhookListener(
            Intake(store, clock, lambda: None),
            clock,
            Authenticator(auth, SECRET),
            body_bytes_max=100_000,
            tally=tally,
        )
        async with TestServer(listener.application()) as server:
            yield str(server.make_url("")), tally


def test_show_prints_yaml_that_says_what_is_made_and_hides_the_secret(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run("hooks", "show", "--webhook-url", URL)
    assert (result.exit_code, result.stderr) == (0, "")
    documents = list(yaml.safe_load_all(result.stdout))
    assert [one["kind"] for one in documents] == KINDS
    assert {one["apiVersion"] for one in documents} == {"v1"}
    assert [one.get("metadata", {}).get("scope", {}).get("name") for one in documents[1:4]] == [
        "billingd"
    ] * 3
    _, secret, webhook, hook, topic = [one["spec"] for one in documents]
    assert secret == {"data": {"value": "CHANGE-ME"}}
    assert (webhook["enabled"], webhook["url"]) == (True, f"{URL}/webhooks/amplify")
    assert webhook["auth"]["secret"] == {"name": documents[1]["name"], "key": "value"}
    assert hook["webhooks"] == [documents[2]["name"]]
    for triggers in (hook["triggers"], topic["filters"]):
        scopes = {one["kind"]: one.get("scope") for one in triggers}
        assert set(scopes) == {"Product", "ProductPlan", "Quota", "Subscription"}
        assert scopes.pop("Quota") == {"kind": "ProductPlan", "name": "*"}, "a scoped kind needs its scope"
        assert set(scopes.values()) == {None}
    assert "hidden" not in result.output
    shown = bench.run("hooks", "show", "--webhook-url", URL, "--with-secret")
    assert list(yaml.safe_load_all(shown.stdout))[1]["spec"]["data"] == {"value": f"Bearer {SECRET}"}
    as_json = document(bench.run("hooks", "show", "--webhook-url", URL, "--json"))
    assert as_json == {"resources": documents}


async def test_what_show_prints_is_what_apply_makes(place: Place) -> None:
    """Posted by hand, as Axway's CLI does, apply finds nothing to mend."""
    shown = await place.run("show", "--webhook-url", URL, "--with-secret")
    tenant, scope = place.world.tenant, None
    for one in yaml.safe_load_all(shown.stdout):
        inside = scope if "scope" in one.get("metadata", {}) else None
        made = tenant.create(one["kind"], one, scope=inside)
        scope = made if one["kind"] == "Integration" else scope
    assert await place.apply() == ["=", "~", "=", "=", "="]


@pytest.mark.parametrize("versions", ["both", "v1alpha1", "mixed"])
async def test_apply_makes_everything_once_on_every_version_of_the_api(place: Place, versions: str) -> None:
    """A second run changes nothing; the secret alone is written again, for nobody can read it."""
    place.world.tenant.settings.versions = versions
    dry = await place.run("apply", "--webhook-url", URL, "--dry-run")
    assert dry.exit_code == 3
    assert [line[0] for line in dry.stdout.splitlines()] == ["+"] * 5
    assert not place.world.tenant.resources.of_kind("Integration"), "a dry run makes nothing"
    assert await place.apply() == ["+"] * 5
    before = {kind: place.there(kind).body["metadata"]["resourceVersion"] for kind in KINDS}
    assert await place.apply() == ["=", "~", "=", "=", "="]
    after = {kind: place.there(kind).body["metadata"]["resourceVersion"] for kind in KINDS}
    assert [kind for kind in KINDS if before[kind] != after[kind]] == ["Secret"]
    again = await place.run("apply", "--webhook-url", URL, "--dry-run")
    assert again.exit_code == 0, again.stdout
    assert place.there("Secret").body["spec"] == {"data": {"value": f"Bearer {SECRET}"}}


async def test_apply_mends_what_somebody_changed(place: Place) -> None:
    """A Webhook switched off, a Secret deleted or overwritten, a trigger lost, another address."""
    await place.apply()
    tenant = place.world.tenant
    webhook = place.there("Webhook")
    tenant.replace(webhook, {**webhook.body, "spec": {**webhook.body["spec"], "enabled": False}})
    tenant.delete(place.there("Secret"))
    hook = place.there("ResourceHook")
    fewer = {**hook.body["spec"], "triggers": hook.body["spec"]["triggers"][:-1]}
    tenant.replace(hook, {**hook.body, "spec": fewer})
    result = await place.run("apply", "--webhook-url", URL)
    assert [line[0] for line in result.stdout.splitlines()] == ["=", "+", "~", "~", "="]
    assert "differs in enabled" in result.stdout
    assert "differs in triggers" in result.stdout
    assert await place.apply() == ["=", "~", "=", "=", "="]
    assert place.there("Secret").body["spec"]["data"] == {"value": f"Bearer {SECRET}"}
    secret = place.there("Secret")
    tenant.replace(secret, {**secret.body, "spec": {"data": {"value": "somebody-elses"}}})
    await place.apply()
    assert place.there("Secret").body["spec"]["data"] == {"value": f"Bearer {SECRET}"}
    assert await place.apply("https://other.example.com/events") == ["=", "~", "~", "=", "="]
    assert place.there("Webhook").body["spec"]["url"] == "https://other.example.com/events"


async def test_what_amplify_adds_of_its_own_is_no_difference(place: Place) -> None:
    """Fields that we do not name, and another order, are left alone."""
    await place.apply()
    hook, webhook, tenant = place.there("ResourceHook"), place.there("Webhook"), place.world.tenant
    turned = [{**one, "type": one["type"][::-1]} for one in hook.body["spec"]["triggers"][::-1]]
    tenant.replace(hook, {**hook.body, "spec": {**hook.body["spec"], "triggers": turned}})
    spec = {**webhook.body["spec"], "headers": {"Content-Type": "application/json", "X-More": "1"}}
    tenant.replace(webhook, {**webhook.body, "spec": spec})
    assert await place.apply() == ["=", "~", "=", "=", "="]


@pytest.mark.parametrize("auth", ["header:Authorization", "header:x-api-key", "query:token", "basic"])
async def test_an_event_arrives_and_is_believed(
    place: Place, auth: str, tmp_path: Path, sqlite_template: Path
) -> None:
    """The sandbox sends what the ResourceHook asks for, with the Secret where webhooks.auth wants it."""
    place.configure(f'[webhooks]\nauth = "{auth}"\n')
    (tmp_path / "listener").mkdir()
    async with listening(tmp_path / "listener", sqlite_template, auth) as (url, tally):
        assert await place.apply(url) == ["+"] * 5
        world = place.world
        product = {"name": "weather", "attributes": {"billingSystem": "recurly"}}
        await control_amplify.add_product(world, Asked(product), {})
        plan = {"name": "metered", "product": "weather", "quotas": [{"name": "calls"}]}
        await control_amplify.add_plan(world, Asked(plan), {})
        await world.webhooks.idle()
        delivered = {(one.kind, one.type) for one in world.webhooks.deliveries}
        assert ("Quota", "ResourceCreated") in delivered
        assert ("ProductPlan", "SubResourceUpdated") in delivered
        assert ("ProductPlan", "ResourceCreated") not in delivered, "a draft needs nothing"
        assert {one.status for one in world.webhooks.deliveries} == {202}
        assert (tally.accepted, tally.rejected) == (len(world.webhooks.deliveries), 0)
        world.tenant.delete(place.there("Secret"))
        await control_amplify.move_plan(world, Asked({}), {"name": "metered", "step": "deprecate"})
        await world.webhooks.idle()
        assert tally.rejected > 0, "without its Secret a webhook goes on, unauthenticated (amplify.md 4.4)"


async def test_the_watch_topic_tells_of_every_kind(place: Place) -> None:
    await place.apply()
    world = place.world
    product = {"name": "weather", "attributes": {"billingSystem": "recurly"}}
    await control_amplify.add_product(world, Asked(product), {})
    await control_amplify.add_plan(
        world, Asked({"name": "metered", "product": "weather", "quotas": [{"name": "calls"}]}), {}
    )
    await control_amplify.subscribe(
        world, Asked({"plan": "metered", "name": "acme", "user": "ann", "team": "a"}), {}
    )
    tokens = world.tenant.tokens
    async with aiohttp.ClientSession() as session:
        login = f"{place.base}/auth/realms/Broker/protocol/openid-connect/token"
        form = {"grant_type": "client_credentials"}
        basic = aiohttp.BasicAuth(tokens.client_id, tokens.client_secret)
        async with session.post(login, data=form, auth=basic) as answer:
            bearer = (await answer.json())["access_token"]
        feed = f"{place.base}/events/management/v1/watchtopics/billingd?pageSize=100"
        async with session.get(feed, headers={"Authorization": f"Bearer {bearer}"}) as answer:
            events = await answer.json()
    assert {one["payload"]["kind"] for one in events} == {"Product", "ProductPlan", "Quota", "Subscription"}


async def test_remove_deletes_in_reverse_and_what_is_gone_is_gone(place: Place) -> None:
    await place.apply()
    unasked = await place.run("remove")
    assert unasked.exit_code == 2, "nobody said yes"
    assert place.world.tenant.resources.of_kind("Webhook")
    place.world.tenant.delete(place.there("Secret"))
    result = await place.run("remove", "--yes")
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["-", "WatchTopic"],
        ["-", "ResourceHook"],
        ["-", "Webhook"],
        ["-", "Integration"],
    ]
    assert not any(place.world.tenant.resources.of_kind(kind) for kind in KINDS)
    steps = document(await place.run("remove", "--yes", "--json"))["resources"]
    assert {step["op"] for step in steps} == {"="}


async def test_remove_finds_what_the_settings_name_no_more(place: Place) -> None:
    """A topic that was renamed or is read no more, a Secret that nothing asks for."""
    await place.apply()
    place.configure('[webhooks]\nauth = "none"\n[catch_up]\nwatch_topic = "renamed"\n')
    await place.apply()
    place.configure('[webhooks]\nauth = "none"\n[catch_up]\nwatch_topic = ""\n')
    assert (await place.run("remove", "--yes")).exit_code == 0
    assert not any(place.world.tenant.resources.of_kind(kind) for kind in KINDS)


@pytest.mark.parametrize("others", ["webhook", "integration"])
async def test_remove_leaves_what_others_made(place: Place, others: str) -> None:
    """The Integration too, when theirs would go with it; it says so before it asks."""
    tenant = place.world.tenant
    await place.apply()
    if others == "integration":
        made = place.there("Integration")
        tenant.replace(made, {**made.body, "attributes": {}, "spec": {"description": "theirs"}})
    else:
        theirs = {"name": "theirs", "spec": {"enabled": True, "url": "https://other.example/"}}
        tenant.create("Webhook", theirs, scope=place.there("Integration"))
    topic = {"name": "agents", "spec": {"description": "of agents", "filters": list(hooks.WATCHED)}}
    tenant.create("WatchTopic", topic)
    asked = await place.run("remove")
    assert (asked.exit_code, "add --yes, or answer on a terminal" in asked.stderr) == (2, True)
    assert ("theirs" if others == "webhook" else "Integration billingd: is somebody else's") in asked.stderr
    assert len(tenant.resources.of_kind("ResourceHook")) == 1
    result = await place.run("remove", "--yes")
    assert "! Integration billingd" in result.stdout
    left = [one.name for kind in KINDS for one in tenant.resources.of_kind(kind)]
    assert left == ["billingd", "theirs", "agents"] if others == "webhook" else ["billingd", "agents"]


async def test_apply_overwrites_nothing_of_others(place: Place) -> None:
    """A topic of that name that somebody else reads; the rest is made, and the exit code says to look."""
    topic = {"name": "agents", "spec": {"description": "of agents", "filters": list(hooks.WATCHED)[:1]}}
    place.world.tenant.create("WatchTopic", topic)
    place.configure('[catch_up]\nwatch_topic = "agents"\n')
    result = await place.run("apply", "--webhook-url", URL)
    assert result.exit_code == 3
    assert "! WatchTopic agents: is somebody else's, and left alone; name another in catch" in result.stdout
    assert place.there("WatchTopic").body["spec"]["description"] == "of agents"
    assert place.there("Webhook")
    wider = [*hooks.WATCHED, {"group": "management", "kind": "Webhook", "name": "*", "type": ["created"]}]
    made = place.there("WatchTopic")
    place.world.tenant.replace(made, {**made.body, "spec": {**made.body["spec"], "filters": wider}})
    served = await place.run("apply", "--webhook-url", URL)
    assert served.exit_code == 0
    assert "= WatchTopic agents: is somebody else's, and tells of all that is needed" in served.stdout
    assert place.there("WatchTopic").body["spec"]["filters"] == wider


async def test_the_sandbox_has_the_topic_such_as_apply_makes_it(tmp_path: Path) -> None:
    """It works without hooks; who rehearses them is stopped by nothing, and can remove all."""
    async with a_place(tmp_path, "billingd") as place:
        assert await place.apply() == ["+", "+", "+", "+", "="]
        assert (await place.run("remove", "--yes")).exit_code == 0
        assert not place.world.tenant.resources.of_kind("WatchTopic")


async def test_what_an_earlier_release_made_is_ours(place: Place) -> None:
    """It marked nothing."""
    await place.apply()
    for kind in KINDS:
        made = place.there(kind)
        place.world.tenant.replace(made, {**made.body, "attributes": {}})
    assert await place.apply() == ["~"] * 5
    assert await place.apply() == ["=", "~", "=", "=", "="]
    assert all(place.there(kind).body["attributes"] == hooks.MARK for kind in KINDS)


async def test_a_removal_that_goes_on_is_said(place: Place) -> None:
    """202: something of somebody else's still hangs on the Integration."""
    await place.apply()
    integration = place.there("Integration")
    place.world.tenant.replace(integration, {**integration.body, "finalizers": [{"name": "somebodys"}]})
    result = await place.run("remove", "--yes")
    assert result.exit_code == 0
    assert "- Integration billingd: deleted; Amplify is still removing what hangs on it" in result.stdout


@pytest.mark.parametrize("topic", ["", "other"])
async def test_the_settings_say_what_is_made(place: Place, topic: str) -> None:
    """No secret where none is asked for, no topic where none is read."""
    place.configure(f'[webhooks]\nauth = "none"\n[catch_up]\nwatch_topic = "{topic}"\n')
    await place.apply()
    assert not place.world.tenant.resources.of_kind("Secret")
    assert "auth" not in place.there("Webhook").body["spec"]
    assert [one.name for one in place.world.tenant.resources.of_kind("WatchTopic")] == [topic][: bool(topic)]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("billingd.example.com", "must be a URL"),
        ("ftp://billingd.example.com", "must be a URL"),
        ("http://billingd.example.com", "must be https"),
        ("https://u:hidden@billingd.example.com", "neither a user"),
        ("https://billingd.example.com#x", "neither a user"),
        ("https://billingd.example.com:99999", "ort"),
    ],
)
def test_an_address_that_will_not_do_is_wrong_usage(url: str, why: str, tmp_path: Path) -> None:
    result = Bench(tmp_path).run("hooks", "show", "--webhook-url", url)
    assert result.exit_code == 2
    assert why in result.stderr


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (URL, f"{URL}/webhooks/amplify"),
        (f"{URL}/", f"{URL}/webhooks/amplify"),
        (f"{URL}/provisionplan", f"{URL}/provisionplan"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/webhooks/amplify"),
    ],
)
def test_a_bare_address_gets_our_path(given: str, taken: str) -> None:
    assert hooks.webhook_url(given) == taken


@pytest.mark.parametrize(
    ("auth", "secrets", "value"),
    [
        ("header:Authorization", "new old", "Bearer new"),
        ("header:authorization", "Bearer new", "Bearer new"),
        ("header:x-api-key", "new old", "new"),
        ("query:token", "new", "new"),
        ("basic", "ann:new", "Basic YW5uOm5ldw=="),
        ("header:Authorization", "", None),
        ("none", "new", None),
    ],
)
def test_the_secret_is_what_the_listener_takes(auth: str, secrets: str, value: str | None) -> None:
    assert hooks.secret_value(auth, secrets) == value


async def test_without_a_secret_nothing_is_made(place: Place) -> None:
    """A webhook without one would be refused by our own listener."""
    env = {"BILLINGD_WEBHOOKS__SECRET": "Bearer", "BILLINGD_AMPLIFY__CLIENT_SECRET": "x"}
    words = ("hooks", "apply", "--webhook-url", URL)
    result = await asyncio.to_thread(lambda: place.bench.run(*words, env=env))
    assert result.exit_code == 2
    assert "webhooks.secret: is needed" in result.stderr
    assert place.world.calls == {}


@asynccontextmanager
async def answering(status: int, body: str) -> AsyncIterator[str]:
    """A login that works in front of an API Server that always answers the same."""

    async def token(_request: web.Request) -> web.Response:
        return web.json_response({"access_token": "t", "expires_in": 1800})

    async def same(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, content_type="application/json")

    app = web.Application()
    app.router.add_post("/auth/realms/Broker/protocol/openid-connect/token", token)
    app.router.add_route("*", "/apis/{rest:.*}", same)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(403, 1, "the role Engage Admin"), (503, 4, "503"), (500, 4, "500")],
)
async def test_a_refusal_says_what_to_do(
    status: int, code: int, said: str, tmp_path: Path, place: Place
) -> None:
    body = '{"errors": [{"status": 403, "title": "Forbidden", "detail": "No access to integrations"}]}'
    async with answering(status, body) as base:
        place.base = base
        place.configure()
        result = await place.run("apply", "--webhook-url", URL)
    assert result.exit_code == code
    assert said in result.stderr
    assert "No access to integrations" in result.stderr
    assert "hidden" not in result.output


async def test_a_lost_answer_says_to_run_it_again(place: Place) -> None:
    """The resource may be there or not: the next run looks."""
    place.world.faults.add(Rule("amplify", "POST", "**/webhooks", "lost"))
    result = await place.run("apply", "--webhook-url", URL)
    assert result.exit_code == 4
    assert "run the same command again" in result.stderr
    assert await place.apply() == ["=", "~", "=", "+", "+"]


async def test_a_resource_that_changes_meanwhile_is_not_overwritten() -> None:
    """The version that was read goes with the change, so that Amplify can refuse it."""
    seen: list[Any] = []

    class Management:
        async def find(self, kind: str, name: str, scope: str | None) -> dict[str, Any]:
            return {"metadata": {"resourceVersion": "7"}, "attributes": hooks.MARK, "spec": {}}

        async def everything(self, *_: Any) -> Any:
            raise AssertionError

        async def create(self, *_: Any) -> None:
            raise AssertionError

        async def remove(self, *_: Any) -> Any:
            raise AssertionError

        async def replace(self, _kind: str, _name: str, _scope: str | None, raw: Any, *_: Any) -> None:
            seen.append(raw["metadata"]["resourceVersion"])

    steps = await hooks.apply(Management(), hooks.resources(Settings(), URL))
    assert [step.op for step in steps] == ["~"] * 5
    assert seen == ["7"] * 5
