"""The served sandbox, both sides and the control interface, and what its tests ask of it again and again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aiohttp import BasicAuth, ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from billingd.sandbox import server
from billingd.sandbox.clock import ManualClock
from billingd.sandbox.world import World

TOKEN_PATH = "/auth/realms/Broker/protocol/openid-connect/token"
ACCEPT = {"Accept": "application/vnd.recurly.v2021-02-25"}
START = datetime(2026, 1, 15, 12, tzinfo=UTC)


class Sandbox:
    """The served sandbox and a client for each of its interfaces."""

    def __init__(self, world: World, client: TestClient[Any, Any]) -> None:
        self.world = world
        self.client = client

    async def control(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON answer of the control interface."""
        options: dict[str, Any] = {} if body is None else {"json": body}
        answer = await self.client.request(method, f"/control{path}", **options)
        assert answer.status == status, await answer.text()
        return await answer.json()

    async def amplify(self, method: str, path: str, **options: Any) -> ClientResponse:
        """A call to Amplify with a fresh bearer."""
        tokens = self.world.tenant.tokens
        headers = {"Authorization": f"Bearer {tokens.issue(60)}"}
        return await self.client.request(method, path, headers=headers, **options)

    async def recurly(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON answer of Recurly."""
        options: dict[str, Any] = {} if body is None else {"json": body}
        answer = await self.client.request(
            method, path, headers=ACCEPT, auth=BasicAuth(server.API_KEY, ""), **options
        )
        assert answer.status == status, await answer.text()
        return await answer.json()

    async def subscribed(self, name: str = "acme", *, approve: bool = True, **plan: Any) -> dict[str, Any]:
        """A product, a plan and a subscription."""
        if self.world.tenant.resources.find("Product", "weather") is None:
            await self.control("POST", "/products", {"name": "weather"})
            quotas = [{"name": "calls", "pricing": {"type": "perunit", "cost": 0.5}}]
            await self.control(
                "POST", "/plans", {"name": "p", "product": "weather", "quotas": quotas, **plan}
            )
        made: dict[str, Any] = await self.control("POST", "/subscribe", {"plan": "p", "name": name})
        if approve:
            await self.control("POST", f"/subscriptions/{name}/approve")
        return made

    async def provision(self, made: dict[str, Any], *, trial_days: int = 0) -> str:
        """What billingd would do at Recurly for one subscription; answers the Recurly uuid."""
        quota = self.world.tenant.resources.of_kind("Quota")[0].id
        add_on = {
            "code": f"amplify-quota-{quota}",
            "name": "Calls",
            "add_on_type": "usage",
            "usage_type": "price",
            "measured_unit_name": "transactions",
            "accounting_code": "amplify",
            "currencies": [{"currency": "USD", "unit_amount": 0.5}],
        }
        await self.recurly(
            "POST", "/measured_units", {"name": "transactions", "display_name": "Transactions"}, status=201
        )
        name = made["spec"]["plan"]["name"]
        plan = self.world.tenant.resources.find("ProductPlan", name)
        assert plan is not None
        code, prices = f"amplify-plan-{plan.id}", [{"currency": "USD", "unit_amount": 10}]
        priced = {"code": code, "name": "P", "accounting_code": "amplify", "currencies": prices}
        await self.recurly("POST", "/plans", {**priced, "add_ons": [add_on]}, status=201)
        if trial_days:
            await self.control("POST", f"/recurly-plans/{name}/trial", {"length": trial_days})
        body = {
            "plan_code": code,
            "account": {"code": "amplify-user-1"},
            "currency": "USD",
            "collection_method": "manual",
            "po_number": made["metadata"]["id"],
            "add_ons": [{"code": f"amplify-quota-{quota}"}],
        }
        return str((await self.recurly("POST", "/subscriptions", body, status=201))["uuid"])


@asynccontextmanager
async def sandbox_side(*, ticking: bool = False) -> AsyncIterator[Sandbox]:
    """Served on a free port, its clock standing still."""
    app = server.build(clock=ManualClock(START), ticking=ticking)
    async with TestClient(TestServer(app)) as client:
        yield Sandbox(app[server.WORLD], client)
