"""The whole surface of the adapter against the sandbox's Amplify, on a real socket."""

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from billingd.adapters.amplify import Amplify, traffic_source
from billingd.domain.catalog import Graduated, PerUnit
from billingd.domain.errors import Misconfigured, NotFound, Permanent, Retryable, Unknown
from billingd.domain.usage import Reading
from billingd.sandbox.clock import ManualClock
from billingd.sandbox.server import WORLD, build
from billingd.sandbox.world import World

START = datetime(2026, 1, 15, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
CONSUMER = "200000000000002"
PLAN = {
    "name": "weather-metered",
    "product": "weather",
    "billing": {"currency": "USD", "price": 10.1, "interval": "monthly"},
    "quotas": [
        {
            "name": "calls",
            "pricing": {
                "type": "graduated",
                "limit": {
                    "type": "tiered",
                    "tiers": [
                        {"from": 1, "to": 1000, "cost": 0.1, "flatFee": 0},
                        {"from": 1001, "to": 999999999, "cost": 0.05, "flatFee": 0},
                    ],
                },
            },
        },
        {"name": "messages", "unit": "x-messages", "pricing": {"type": "perunit", "cost": 0.2}},
    ],
}


class Place:
    """A sandbox, its control interface, and an adapter in front of it."""

    def __init__(self, session: aiohttp.ClientSession, base: str, world: World, clock: ManualClock) -> None:
        self._session = session
        self.base = base
        self.clock = clock
        self.world = world

    def amplify(self, **changes: Any) -> Amplify:
        """An adapter that has asked nothing yet."""
        tokens = self.world.tenant.tokens
        wired: dict[str, Any] = {
            "central_url": self.base,
            "login_url": f"{self.base}/auth",
            "platform_url": self.base,
            "api_version": "v1",
            "organization_id": self.world.tenant.organization_id,
            "client_id": tokens.client_id,
            "client_secret": tokens.client_secret,
            "timeout": timedelta(seconds=5),
            "clock": self.clock.now,
        }
        return Amplify(self._session, **(wired | changes))

    async def control(self, path: str, /, **body: Any) -> dict[str, Any]:
        """One control operation, which must succeed."""
        async with self._session.post(f"{self.base}/control/{path}", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def subscribed(self) -> tuple[str, dict[str, str]]:
        """An approved subscription with two quotas: its id, and the quotas' ids by name."""
        await self.control("products", name="weather", attributes={"billingSystem": "recurly"})
        plan = await self.control("plans", **PLAN)
        await self.control("people", name="Ada Example", email="ada@example.com", guid="u-ada")
        made = await self.control("subscribe", plan="weather-metered", user="Ada Example", name="weather-ada")
        return made["metadata"]["id"], {each["name"]: each["metadata"]["id"] for each in plan["quotas"]}

    def calls(self) -> Counter[str]:
        """Calls per endpoint."""
        return self.world.calls


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    """A sandbox whose clock stands still at START."""
    clock = ManualClock(START)
    app = build(clock=clock)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield Place(session, str(server.make_url("")).rstrip("/"), app[WORLD], clock)


async def test_the_whole_surface(place: Place) -> None:
    """Read, list, write, decide: what a flow does with a new subscription."""
    subscription_id, quota_ids = await place.subscribed()
    amplify = place.amplify()
    await amplify.reach()
    assert amplify.last_reached_at == START

    product = await amplify.find_product("weather")
    assert product is not None
    assert product.billing_system == "recurly"
    assert await amplify.list_products("recurly") == (product,)
    assert await amplify.list_products("other") == ()

    plan = await amplify.find_product_plan("weather-metered")
    assert plan is not None
    assert (plan.product_id, plan.price, plan.state) == (product.id, Decimal("10.1"), "active")
    assert await amplify.list_product_plans(product.id) == (plan,)
    assert await amplify.list_product_plans("no such id") == ()

    # made in the same instant, for the clock stands still: no order between them
    calls, messages = sorted(await amplify.list_quotas("weather-metered"), key=lambda quota: quota.name)
    assert {calls.name: calls.id, messages.name: messages.id} == quota_ids
    assert isinstance(calls.pricing, Graduated)
    assert messages.pricing == PerUnit(Decimal("0.2"))
    assert (calls.unit, messages.unit) == ("transactions", "x-messages")

    pending = await amplify.find_subscription("weather-ada")
    assert pending is not None
    assert (pending.id, pending.plan_id, pending.approval) == (subscription_id, plan.id, "pending")
    assert (pending.created_by, pending.owner_org_id, pending.state) == ("u-ada", CONSUMER, None)
    assert await amplify.list_subscriptions(plan_id=plan.id, approval="pending") == (pending,)

    await amplify.decide("weather-ada", "approved", "Linked")
    active = await amplify.find_subscription("weather-ada")
    assert active is not None
    assert (active.approval, active.state, active.state_at) == ("approved", "active", START)
    assert await amplify.list_subscriptions(state="active") == (active,)

    person = await amplify.find_person("u-ada")
    assert person is not None
    assert (person.name, person.email) == ("Ada Example", "ada@example.com")
    assert await amplify.find_person("u-nobody") is None

    assert await amplify.find_subscription("nobody") is None
    assert await amplify.find_product_plan("nothing") is None
    with pytest.raises(NotFound):
        await amplify.list_quotas("nothing")
    with pytest.raises(NotFound):
        await amplify.decide("nobody", "approved", "")


@pytest.mark.parametrize("patch", [True, False])
async def test_attributes(place: Place, patch: bool) -> None:
    """With and without PATCH the result is the same; a second time writes nothing."""
    await place.subscribed()
    await place.control("settings", amplify={"patch_attributes": patch})
    amplify = place.amplify()
    links = {"recurlyAccountCode": "amplify-user-u-ada", "odd/key~": "x"}
    version = await amplify.set_attributes("subscriptions", "weather-ada", links)
    found = await amplify.find_subscription("weather-ada")
    assert found is not None
    assert found.attributes == links
    assert found.resource_version == version
    before = place.calls().copy()
    assert await amplify.set_attributes("subscriptions", "weather-ada", links) == version
    assert place.calls() - before == Counter({"amplify GET /apis/subscriptions/{name}": 1})
    await amplify.set_attributes("productplans", "weather-metered", {"billingSystem": "recurly"})
    plan = await amplify.find_product_plan("weather-metered")
    assert plan is not None
    assert (plan.attributes, plan.price, plan.state) == (
        {"billingSystem": "recurly"},
        Decimal("10.1"),
        "active",
    )


@pytest.mark.parametrize("versions", ["v1alpha1", "mixed"])
async def test_old_tenants(place: Place, versions: str) -> None:
    """Everything works where only v1alpha1 is served, or v1 for some kinds (amplify.md 2.1)."""
    await place.subscribed()
    await place.control("settings", amplify={"versions": versions})
    amplify = place.amplify()
    assert len(await amplify.list_quotas("weather-metered")) == 2
    assert await amplify.find_subscription("nobody") is None
    await amplify.decide("weather-ada", "approved", "")
    await amplify.set_attributes("productplans", "weather-metered", {"a": "b"})
    assert len(await amplify.list_products()) == 1
    await amplify.reach()


async def test_many_pages(place: Place) -> None:
    """250 subscriptions in three pages, each once."""
    await place.subscribed()
    for number in range(249):
        await place.control("subscribe", plan="weather-metered", name=f"s-{number}")
    found = await place.amplify().list_subscriptions()
    assert len({each.id for each in found}) == len(found) == 250
    assert place.calls()["amplify GET /apis/subscriptions"] == 3


async def test_tokens(place: Place) -> None:
    """Expired by the clock, revoked at the login, wrong from the start."""
    amplify = place.amplify()
    await amplify.reach()
    place.clock.advance(timedelta(minutes=25))
    await amplify.reach()
    await place.control("settings", revoke_tokens=True)
    await amplify.reach()
    with pytest.raises(Misconfigured, match=r"amplify\.client_secret|client_id / client_secret") as caught:
        await place.amplify(client_secret="wrong-one").reach()
    assert "wrong-one" not in str(caught.value)
    with pytest.raises(Misconfigured, match="Engage Admin"):
        await place.amplify(organization_id="1").reach()


async def test_faults(place: Place) -> None:
    """Cut, not JSON, a gateway's page, a committed write whose answer is lost: known for what they are."""
    await place.subscribed()
    amplify = place.amplify()
    for kind in ("cut", "not_json", "html_502", "429"):
        await place.control("faults", side="amplify", method="GET", path="/apis/**", kind=kind)
        with pytest.raises(Retryable):
            await amplify.find_subscription("weather-ada")
    await place.control("faults", side="amplify", method="PUT", path="/apis/**", kind="html_502_committed")
    with pytest.raises(Unknown):
        await amplify.decide("weather-ada", "approved", "Linked")
    found = await amplify.find_subscription("weather-ada")
    assert found is not None
    assert found.approval == "approved"
    await place.control("faults", side="amplify", method="PATCH", path="/apis/**", kind="cut")
    with pytest.raises(Unknown):
        await amplify.set_attributes("subscriptions", "weather-ada", {"a": "b"})
    before = place.calls().copy()
    await amplify.set_attributes("subscriptions", "weather-ada", {"a": "b"})  # looks, and finds it done
    assert place.calls() - before == Counter({"amplify GET /apis/subscriptions/{name}": 1})


async def served(place: Place) -> tuple[str, dict[str, str]]:
    """Traffic in three windows: at an edge, inside, failed calls, another unit."""
    subscription, quotas = await place.subscribed()
    await place.amplify().decide("weather-ada", "approved", "")
    place.clock.advance(4 * HOUR)
    for at, units, quota, status in (
        (START, 5, "calls", "Success"),
        (START + timedelta(minutes=59, milliseconds=59_999), 7, "calls", "Success"),
        (START + HOUR, 11, "calls", "Failure"),
        (START + HOUR, 13, "messages", "Success"),
        (START + 3 * HOUR, 17, "calls", "Success"),  # the first instant behind the range
    ):
        await place.control(
            "traffic", subscription="weather-ada", quota=quota, units=units, at=at.isoformat(), status=status
        )
    return subscription, quotas


def asked(quotas: dict[str, str], subscription: str) -> dict[str, Any]:
    """Three windows of an hour."""
    return {
        "organizations": [CONSUMER, "100000000000001"],
        "units": ["transactions", "x-messages"],
        "subscriptions": [subscription],
        "quotas": list(quotas.values()),
        "start": START,
        "end": START + 3 * HOUR,
        "length": HOUR,
    }


@pytest.mark.parametrize("zero_buckets", [False, True])
async def test_metrics(place: Place, zero_buckets: bool) -> None:
    """Each unit in its window, all units, one call per organization and unit."""
    subscription, quotas = await served(place)
    await place.control("settings", amplify={"zero_buckets": zero_buckets})
    source = traffic_source("metrics", place.amplify(), "total")
    assert set(await source.read(**asked(quotas, subscription))) == {
        Reading(subscription, quotas["calls"], START, 12),
        Reading(subscription, quotas["calls"], START + HOUR, 11),
        Reading(subscription, quotas["messages"], START + HOUR, 13),
    }
    made = [number for call, number in place.calls().items() if call.endswith("chartGroupedBy")]
    assert made == [4]


@pytest.mark.parametrize(("billable", "failed"), [("total", True), ("success", False)])
async def test_summary(place: Place, billable: Any, failed: bool) -> None:
    """Transactions per window; failed calls only where they are billed."""
    subscription, quotas = await served(place)
    source = traffic_source("summary", place.amplify(), billable)
    expected = {Reading(subscription, quotas["calls"], START, 12)}
    if failed:
        expected |= {Reading(subscription, quotas["calls"], START + HOUR, 11)}
    assert set(await source.read(**asked(quotas, subscription))) == expected


async def test_summary_that_cannot_group(place: Place) -> None:
    """Should Amplify not know these groupings, the error names the way out (open question 2)."""
    subscription, quotas = await served(place)
    await place.control("settings", amplify={"summary_groups": False})
    source = traffic_source("summary", place.amplify(), "total")
    with pytest.raises(Permanent, match=r"traffic\.source=metrics"):
        await source.read(**asked(quotas, subscription))


@pytest.mark.parametrize("wrapped", [False, True])
async def test_search_sees_the_sample_only(place: Place, wrapped: bool) -> None:
    """All of it at 100 %, nothing by default: why it warns."""
    await place.control("settings", amplify={"sample_percent": 100, "lexus_wrapped": wrapped})
    subscription, quotas = await served(place)
    source = traffic_source("search", place.amplify(), "success")
    assert await source.read(**asked(quotas, subscription)) == (
        Reading(subscription, quotas["calls"], START, 12),
    )
