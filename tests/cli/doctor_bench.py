"""What the tests of `doctor` share: a whole installation against the sandbox, as it should be."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.test_utils import TestServer
from cli_bench import Bench, document
from click.testing import Result

from billingd.sandbox import control_amplify, control_both, control_traffic
from billingd.sandbox.asked import Asked
from billingd.sandbox.server import API_KEY, WORLD, build
from billingd.sandbox.world import World

URL = "https://billingd.example.com"
TEAM = "11111111-1111-4111-8111-111111111111"
READS = frozenset(
    {
        "amplify POST /auth/realms/Broker/protocol/openid-connect/token",
        "amplify POST /api/traceability/v1/traceability/consumer/v2/chartGroupedBy",
        "amplify POST /api/traceability/v1/traceability/search",
    }
)
"""POSTs that only ask; all else must be GET or HEAD."""


class Clinic:
    """A sandbox with a shop in it, hooks that were applied, a store; and the command in front of it."""

    def __init__(self, bench: Bench, world: World, base: str) -> None:
        self.bench = bench
        self.world = world
        self.base = base
        self.environment: dict[str, str | None] = {
            "BILLINGD_AMPLIFY__CLIENT_SECRET": world.tenant.tokens.client_secret,
            "BILLINGD_RECURLY__API_KEY": API_KEY,
        }
        self.configure()

    def configure(self, more: str = "", *, store: str | None = None) -> None:
        """The configuration file; `more` are further tables."""
        tokens = self.world.tenant.tokens
        self.bench.config.write_text(
            f'[amplify]\ncentral_url = "{self.base}"\nlogin_url = "{self.base}/auth"\n'
            f'platform_url = "{self.base}"\nclient_id = "{tokens.client_id}"\n'
            f'organization_id = "{self.world.tenant.organization_id}"\n'
            f'[recurly]\nbase_url = "{self.base}"\n[store]\nurl = "{store or self.bench.url}"\n'
            f'[admin]\nlisten = "unix:{self.bench.socket}"\n{more}',
            encoding="utf-8",
        )

    async def run(self, *words: str, env: Mapping[str, str | None] | None = None) -> Result:
        """Any command."""
        return await asyncio.to_thread(
            lambda: self.bench.run(*words, env={**self.environment, **(env or {})})
        )

    async def examine(self, *words: str, env: Mapping[str, str | None] | None = None) -> "Examined":
        """`doctor --json`, which must have changed nothing."""
        before = self.everything()
        self.world.calls.clear()
        examined = Examined(await self.run("doctor", "--json", *words, env=env))
        wrote = {call for call in self.world.calls if call.split()[1] not in ("GET", "HEAD")} - READS
        assert not wrote, "doctor only reads"
        assert self.everything() == before
        return examined

    def everything(self) -> Any:
        """All that either side holds, but for what a mere look moves."""
        tenant, site = self.world.tenant, self.world.site
        resources = {id_: repr(each.body) for kind in _KINDS for id_, each in _of(tenant, kind)}
        plans = {code: repr(plan.given) for code, plan in site.plan_by_code.items()}
        return (
            resources,
            plans,
            sorted(site.account_by_code),
            sorted(site.subscriptions),
            sorted(site.measured_units),
            sorted(site.usages),
            tenant.journal.sequence,
            control_ledger(self.world),
        )

    async def do(self, handler: Any, path: Mapping[str, str] | None = None, **body: Any) -> Any:
        """One operation of the control interface."""
        return await handler(self.world, Asked(body), dict(path or {}))

    async def plan(self, name: str, **more: Any) -> Any:
        """An active plan of the product."""
        pricing = {"type": "perunit", "cost": 0.01}
        quotas = more.pop("quotas", [{"name": "calls", "unit": "transactions", "pricing": pricing}])
        return await self.do(
            control_amplify.add_plan, name=name, product="weather", quotas=quotas, title=name, **more
        )

    async def subscribe(self, name: str, plan: str = "metered", *, team: str = TEAM) -> Any:
        """A subscription that waits for its approval."""
        return await self.do(control_amplify.subscribe, plan=plan, name=name, team=team, user="ada")

    async def serve(self, name: str, units: int) -> None:
        """Traffic of some hours ago for a subscription, approved for it."""
        await self.do(control_amplify.move_subscription, {"name": name, "step": "approve"})
        at = (self.world.clock.now() - timedelta(hours=5)).isoformat()
        await self.do(control_traffic.add_traffic, subscription=name, units=units, at=at)

    async def use_up(self, requests: int) -> None:
        """Requests of somebody else with a key of the same site."""
        async with aiohttp.ClientSession(auth=aiohttp.BasicAuth(API_KEY, "")) as session:
            for _ in range(requests):
                headers = {"Accept": "application/vnd.recurly.v2021-02-25"}
                async with session.get(f"{self.base}/sites", headers=headers) as answer:
                    assert answer.status == 200

    def there(self, kind: str) -> Any:
        """The one resource of a kind that Amplify holds."""
        [found] = self.world.tenant.resources.of_kind(kind)
        return found

    def change(self, kind: str, **spec: Any) -> None:
        """Change fields of its spec, as somebody at Amplify might."""
        one = self.there(kind)
        self.world.tenant.replace(one, {**one.body, "spec": {**one.body["spec"], **spec}})


_KINDS = (
    "Product",
    "ProductPlan",
    "Quota",
    "Subscription",
    "Webhook",
    "Secret",
    "ResourceHook",
    "WatchTopic",
)


def _of(tenant: Any, kind: str) -> list[tuple[str, Any]]:
    return [(each.id, each) for each in tenant.resources.of_kind(kind)]


def control_ledger(world: World) -> Any:
    """Served, reported and billed."""
    from billingd.sandbox.ledger import ledger

    return ledger(world)


class Examined:
    """What one run of `doctor --json` told."""

    def __init__(self, result: Result) -> None:
        self.code = result.exit_code
        self.document = document(result)
        self.checks: list[dict[str, Any]] = self.document["checks"]

    def wrong(self) -> dict[str, str]:
        """The state of each check that is neither well nor left out."""
        return {one["check"]: one["state"] for one in self.checks if one["state"] not in ("ok", "skipped")}

    def skipped(self) -> set[str]:
        """The checks that were not tried."""
        return {one["check"] for one in self.checks if one["state"] == "skipped"}

    def of(self, check: str) -> list[dict[str, Any]]:
        """What a check found."""
        return [one for one in self.checks if one["check"] == check]

    def fixes(self, check: str) -> str:
        """How what it found is mended."""
        return "\n".join(one["fix"] or "" for one in self.of(check))

    def says(self, check: str) -> str:
        """What it found."""
        return "\n".join(one["says"] for one in self.of(check))


@asynccontextmanager
async def a_clinic(directory: Path, template: Path) -> AsyncIterator[Clinic]:
    """One in which everything is as it should be."""
    app = build(watch_topic=None)
    async with TestServer(app) as server:
        bench = Bench(directory)
        shutil.copy(template, bench.path)
        clinic = Clinic(bench, app[WORLD], str(server.make_url("")).rstrip("/"))
        await clinic.do(
            control_amplify.add_product,
            name="weather",
            title="Weather",
            attributes={"billingSystem": "recurly"},
        )
        await clinic.plan("metered")
        await clinic.do(control_both.add_account, code=f"amplify-team-{TEAM}")
        await clinic.subscribe("acme")
        await clinic.serve("acme", 70)
        assert (await clinic.run("hooks", "apply", "--webhook-url", URL)).exit_code == 0
        yield clinic
