"""A sandbox Amplify on a real socket, and the few calls its tests make again and again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import BasicAuth, ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from billingd.sandbox.amplify import consumer
from billingd.sandbox.amplify.hooks import Webhooks
from billingd.sandbox.amplify.people import CONSUMER_ORGANIZATION, Team, User
from billingd.sandbox.amplify.resources import Resource
from billingd.sandbox.amplify.routes import routes
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.clock import ManualClock

TOKEN_PATH = "/auth/realms/Broker/protocol/openid-connect/token"
CATALOG = "/apis/catalog/v1"
PLAN_SPEC = {
    "product": "weather",
    "type": "paid",
    "billing": {"currency": "USD", "price": 10, "interval": "monthly"},
    "subscription": {"interval": {"type": "months", "length": 1}, "approval": "manual"},
}
QUOTA_SPEC = {"unit": "transactions", "pricing": {"type": "perunit", "cost": 0.1}, "resources": []}


class AmplifySide:
    """The tenant, its webhooks, and an authorised client."""

    def __init__(self, tenant: Tenant, webhooks: Webhooks, client: TestClient[Any, Any]) -> None:
        self.tenant = tenant
        self.webhooks = webhooks
        self.client = client
        self.clock = tenant.clock
        self.token = ""

    async def log_in(self) -> None:
        """Gets a fresh bearer."""
        tokens = self.tenant.tokens
        answer = await self.client.post(
            TOKEN_PATH,
            data={"grant_type": "client_credentials"},
            auth=BasicAuth(tokens.client_id, tokens.client_secret),
        )
        self.token = (await answer.json())["access_token"]

    async def call(self, method: str, path: str, **options: Any) -> ClientResponse:
        """A call with the bearer."""
        headers = {"Authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **options)

    async def json(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON answer to a call that must end with `status`."""
        answer = await self.call(method, path, **({} if body is None else {"json": body}))
        text = await answer.text()
        assert answer.status == status, text
        return await answer.json() if text else None

    def plan(self, name: str = "metered", *, active: bool = True, **spec: Any) -> Resource:
        """A product (once), a plan with one quota `calls`, activated."""
        if self.tenant.resources.find("Product", "weather") is None:
            marked = {"name": "weather", "attributes": {"billingSystem": "recurly"}, "spec": {}}
            self.tenant.create("Product", marked)
        plan = self.tenant.create("ProductPlan", {"name": name, "spec": {**PLAN_SPEC, **spec}})
        self.tenant.create("Quota", {"name": "calls", "spec": QUOTA_SPEC}, scope=plan)
        if active:
            self.tenant.put_subresource(plan, "state", {"state": "active"})
        return plan

    def subscribe(self, plan: Resource, name: str = "acme", *, approve: bool = False) -> Resource:
        """A subscription of a team of its own."""
        user = User(f"user of {name}", f"{name}@example.com", CONSUMER_ORGANIZATION)
        team = Team(f"team of {name}", CONSUMER_ORGANIZATION, users=[user])
        self.tenant.people.add_user(user)
        self.tenant.people.add_team(team)
        made = consumer.subscribe(self.tenant, plan, name, name, user, team)
        if approve:
            self.tenant.put_subresource(made, "approval", {"approval": {"state": "approved"}})
        return made


@asynccontextmanager
async def amplify_side() -> AsyncIterator[AmplifySide]:
    """Served on a free port, its clock standing still."""
    tenant = Tenant(ManualClock())
    webhooks = Webhooks(tenant)
    app = web.Application()
    app.add_routes(routes(tenant))
    async with TestClient(TestServer(app)) as client:
        side = AmplifySide(tenant, webhooks, client)
        await side.log_in()
        yield side
        await webhooks.close()
