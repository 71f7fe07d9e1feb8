"""A sandbox Recurly on a real socket, and what its tests ask of it again and again."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from aiohttp import BasicAuth, ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from billingd.sandbox.clock import ManualClock, dating
from billingd.sandbox.faults import Faults
from billingd.sandbox.recurly.routes import routes
from billingd.sandbox.recurly.site import Site

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
"""A month's last day, so that month arithmetic is always under test."""
ACCEPT = "application/vnd.recurly.v2021-02-25"
Json = dict[str, Any]


def tier(ending: int | None, amount: str, currency: str = "USD") -> Json:
    """A tier in one currency, priced by `unit_amount_decimal`."""
    price = {"currency": currency, "unit_amount_decimal": amount}
    return {"currencies": [price]} if ending is None else {"ending_quantity": ending, "currencies": [price]}


TIERS = [tier(100, "1"), tier(None, "0.5")]
"""100 at 1, the rest at 0.5; as stairstep: 1 up to 100, else 0.5."""


def add_on(code: str = "calls", tier_type: str = "flat", amount: str = "0.1", **changes: Any) -> Json:
    """The body of a usage add-on."""
    prices: Json = (
        {"currencies": [{"currency": "USD", "unit_amount_decimal": amount}]}
        if tier_type == "flat"
        else {"tiers": TIERS}
    )
    body = {"code": code, "name": code.title(), "add_on_type": "usage", "usage_type": "price"}
    return body | {"measured_unit_name": "call", "tier_type": tier_type} | prices | changes


def plan(code: str = "basic", **changes: Any) -> Json:
    """The body of a monthly plan of 20 USD with one flat usage add-on."""
    prices = [{"currency": "USD", "unit_amount": 20.0}]
    return {"code": code, "name": code.title(), "currencies": prices, "add_ons": [add_on()]} | changes


def subscription(account: str = "ann", plan_code: str = "basic", **changes: Any) -> Json:
    """The body of a manual subscription with the usage add-on."""
    body = {"plan_code": plan_code, "currency": "USD", "account": {"code": account}}
    return body | {"collection_method": "manual", "po_number": "m1", "add_ons": [{"code": "calls"}]} | changes


def stamp(at: datetime) -> str:
    """As Recurly writes times."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


class Exchange(NamedTuple):
    """A request and its answer."""

    method: str
    path: str
    body: Any
    status: int
    text: str


class RecurlySide:
    """The site, its clock and faults, and an authorised client."""

    def __init__(self, site: Site, clock: ManualClock, faults: Faults, client: TestClient[Any, Any]) -> None:
        self.site = site
        self.clock = clock
        self.faults = faults
        self.client = client
        self.exchanges: list[Exchange] = []

    async def send(self, method: str, path: str, body: Any = None, **options: Any) -> ClientResponse:
        """A call whatever comes of it; `body` None sends none."""
        if body is not None:
            options["data"] = json.dumps(body)
            options["headers"] = {"Content-Type": "application/json"} | options.get("headers", {})
        return await self.client.request(method, path, **options)

    async def call(
        self, method: str, path: str, body: Any = None, *, status: int = 200, **options: Any
    ) -> Any:
        """The JSON of an answer that must have `status`."""
        async with await self.send(method, path, body, **options) as answer:
            text = await answer.text()
            self.exchanges.append(Exchange(method, path, body, answer.status, text))
            assert answer.status == status, text
            return json.loads(text) if text else None

    async def refused(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        status: int = 422,
        type_: str = "validation",
        **options: Any,
    ) -> Json:
        """The error of a call that must be refused."""
        error: Json = (await self.call(method, path, body, status=status, **options))["error"]
        assert error["type"] == type_, error
        return error

    async def make_plan(self, **changes: Any) -> Json:
        """A plan, with the measured unit it needs."""
        if not self.site.measured_units:
            await self.call("POST", "/measured_units", {"name": "call", "display_name": "Call"}, status=201)
        made: Json = await self.call("POST", "/plans", plan(**changes), status=201)
        return made

    async def subscribe(self, **changes: Any) -> Json:
        """A subscription."""
        made: Json = await self.call("POST", "/subscriptions", subscription(**changes), status=201)
        return made

    async def use(self, made: Json, amount: int, at: datetime | None = None, *, status: int = 201) -> Any:
        """A usage record on `calls`; `at` None sends no timestamp."""
        body = {"amount": amount} if at is None else {"amount": amount, "usage_timestamp": stamp(at)}
        return await self.call("POST", usage_path(made), body, status=status)

    def pass_(self, **span: float) -> datetime:
        """Lets sandbox time pass; the new time."""
        self.clock.advance(timedelta(**span))
        return self.clock.now()

    def invoices(self, made: Json) -> list[Json]:
        """The oracle's invoices of a subscription, oldest first."""
        found: list[Json] = self.told(made)["invoices"]
        return found

    def told(self, made: Json) -> Json:
        """What the oracle says of a subscription."""
        told = {each["uuid"]: each for each in self.site.oracle()["subscriptions"]}
        found: Json = told[made["uuid"]]
        return found


def path_of(made: Json, action: str = "") -> str:
    """Where a subscription is, or one of its actions."""
    return f"/subscriptions/uuid-{made['uuid']}{action}"


def usage_path(made: Json, code: str = "calls") -> str:
    """Where a subscription's usage goes."""
    return f"/subscriptions/uuid-{made['uuid']}/add_ons/code-{code}/usage"


def lines(invoice: Json, *, usage: bool | None = None) -> list[tuple[str, int, str]]:
    """(add-on code or origin, units, amount) per line; `usage` True: add-on lines only, False: the others."""
    return [
        (line["add_on"] or line["origin"], line["quantity"], line["amount"])
        for line in invoice["lines"]
        if usage is None or usage == (line["add_on"] is not None)
    ]


@asynccontextmanager
async def recurly_side(start: datetime = START, **settings: Any) -> AsyncIterator[RecurlySide]:
    """A site that stands at `start` until its clock is moved."""
    clock = ManualClock(start)
    site = Site(clock)
    site.configure(**settings)
    faults = Faults(clock)
    app = web.Application(middlewares=[faults.middleware(lambda _: "recurly")])
    app.add_routes(routes(site))
    app.on_response_prepare.append(dating(clock))
    headers = {"Accept": ACCEPT}
    async with TestClient(TestServer(app), headers=headers, auth=BasicAuth("sandbox-api-key", "")) as client:
        yield RecurlySide(site, clock, faults, client)
        await faults.close()
