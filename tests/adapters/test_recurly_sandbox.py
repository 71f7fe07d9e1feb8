"""The adapter's whole surface against the sandbox's Recurly, over HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
import recurly as sdk
from aiohttp import web
from aiohttp.test_utils import TestServer
from recurly_far_side import FakeTime

from billingd.adapters.recurly import Recurly
from billingd.domain.billing import BilledSubscription, NewSubscription, NewUsage
from billingd.domain.charges import Prices
from billingd.domain.errors import Misconfigured, NotDone, NotFound, Refused, Unknown
from billingd.domain.pricing import AddOnSpec, MeasuredUnitSpec, PlanSpec, TierSpec
from billingd.sandbox.clock import ManualClock, dating
from billingd.sandbox.faults import Faults, Rule
from billingd.sandbox.recurly.routes import routes
from billingd.sandbox.recurly.site import Site
from billingd.sandbox.server import API_KEY

ACCOUNT = "amplify-team-1"
UNIT = MeasuredUnitSpec("amplify-unit-transactions", "Transactions")
TIERS = (TierSpec(1000, Decimal("0.015")), TierSpec(None, Decimal("0.010")))
FLAT = AddOnSpec("q1", "amplify-quota-q1", "Calls", UNIT, "transactions", "flat", Decimal("0.000000025"))
PLAN = PlanSpec(
    plan_id="p1",
    code="amplify-plan-p1",
    name="Finance starter",
    description="",
    currency="USD",
    interval_unit="months",
    interval_length=1,
    unit_amount=Decimal("19.99"),
    setup_fee=Decimal("5.50"),
    total_billing_cycles=None,
    auto_renew=True,
    add_ons=(
        FLAT,
        replace(FLAT, code="amplify-quota-q2", tier_type="tiered", unit_amount=None, tiers=TIERS),
        replace(FLAT, code="amplify-quota-q3", tier_type="stairstep", unit_amount=None, tiers=TIERS),
    ),
)
NEW = NewSubscription(
    PLAN.code, ACCOUNT, "USD", "manual", "8ac9dd00", tuple(add_on.code for add_on in PLAN.add_ons)
)


@dataclass
class Rehearsal:
    recurly: Recurly
    site: Site
    faults: Faults
    clock: ManualClock

    async def subscribed(self) -> BilledSubscription:
        """A subscription, from nothing."""
        await self.recurly.create_measured_unit(UNIT, key="unit")
        await self.recurly.create_plan(PLAN, key="plan")
        await self.recurly.create_account(ACCOUNT, email="a@b.example", company="ACME", key="account")
        return await self.recurly.create_subscription(NEW, key="subscription")

    def usage(self, of: BilledSubscription, tag: str, units: int = 7, add_on: str = FLAT.code) -> NewUsage:
        """Usage up to now."""
        return NewUsage(of.uuid, add_on, units, tag, self.now, self.clock.now())

    @property
    def now(self) -> datetime:
        return self.clock.now() - timedelta(seconds=1)


@asynccontextmanager
async def rehearsal(*, api_key: str = API_KEY) -> AsyncIterator[Rehearsal]:
    clock, time = ManualClock(), FakeTime()
    site, faults = Site(clock), Faults(clock)
    app = web.Application(middlewares=[faults.middleware(lambda request: "recurly")])
    app.add_routes(routes(site))
    app.on_response_prepare.append(dating(clock))
    async with TestServer(app) as server:
        recurly = Recurly(
            api_key=api_key,
            base_url=str(server.make_url("")).rstrip("/"),
            region="us",
            timeout=timedelta(seconds=5),
            requests_per_minute=300,
            threads=4,
            clock=clock.now,
            monotonic=time.monotonic,
            sleep=time.sleep,
        )
        try:
            yield Rehearsal(recurly, site, faults, clock)
        finally:
            await recurly.close(deadline=timedelta(seconds=1))


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK refuses what it does not know: the sandbox sends nothing that Recurly would not."""
    monkeypatch.setattr(sdk, "STRICT_MODE", True)


async def test_a_plan_comes_back_as_it_was_made() -> None:
    """Every price to the last digit."""
    async with rehearsal() as r:
        await r.recurly.reach()
        assert await r.recurly.find_measured_unit(UNIT.name) is None
        unit_id = await r.recurly.create_measured_unit(UNIT, key="unit")
        assert await r.recurly.find_measured_unit(UNIT.name) == unit_id

        assert await r.recurly.find_plan(PLAN.code) is None
        plan_id = await r.recurly.create_plan(PLAN, key="plan")
        plan = await r.recurly.find_plan(PLAN.code)
        assert plan is not None
        assert (plan.id, plan.code, plan.state) == (plan_id, PLAN.code, "active")
        assert (plan.interval_unit, plan.interval_length) == ("months", 1)
        assert (plan.total_billing_cycles, plan.auto_renew) == (None, True)
        assert plan.unit_amounts == {"USD": Decimal("19.99")}
        assert plan.setup_fees == {"USD": Decimal("5.50")}

        more = replace(FLAT, code="amplify-quota-q4", unit_amount=Decimal("1000000"))
        more_id = await r.recurly.create_add_on(PLAN.code, more, "USD", key="more")
        add_ons = {each.code: each for each in await r.recurly.list_add_ons(PLAN.code, "USD")}
        assert add_ons[more.code].id == more_id
        for spec in (*PLAN.add_ons, more):
            made = add_ons[spec.code]
            assert (made.state, made.add_on_type, made.usage_type) == ("active", "usage", "price")
            assert (made.usage_calculation_type, made.usage_timeframe) == ("cumulative", "billing_period")
            assert (made.tier_type, made.measured_unit_id) == (spec.tier_type, unit_id)
            assert made.unit_amount == spec.unit_amount
            open_end = tuple(replace(t, ending_quantity=_or_none(t.ending_quantity)) for t in made.tiers)
            assert open_end == spec.tiers

        await r.recurly.remove_plan(PLAN.code, key="remove")
        gone = await r.recurly.find_plan(PLAN.code)
        assert gone is None or gone.state == "inactive"
        with pytest.raises(NotFound):
            await r.recurly.remove_plan("amplify-plan-none", key="remove-none")
        with pytest.raises(NotFound):
            await r.recurly.list_add_ons("amplify-plan-none", "USD")


async def test_a_subscription_from_beginning_to_end() -> None:
    """Made, found by its marker, used, billed, ended."""
    async with rehearsal() as r:
        assert await r.recurly.find_account(ACCOUNT) is None
        with pytest.raises(NotFound):
            await r.recurly.list_subscriptions(ACCOUNT)
        made = await r.subscribed()
        account = await r.recurly.find_account(ACCOUNT)
        assert account is not None
        assert (account.code, account.state) == (ACCOUNT, "active")
        assert (made.marker, made.state, made.live) == ("8ac9dd00", "active", True)
        assert (made.plan_code, made.account_code) == (PLAN.code, ACCOUNT)
        assert set(made.add_on_codes) == set(NEW.add_on_codes)
        assert made.activated_at == made.period_started_at == r.clock.now()
        assert await r.recurly.get_subscription(made.uuid) == made
        assert await r.recurly.list_subscriptions(ACCOUNT) == (made,)
        with pytest.raises(NotFound):
            await r.recurly.get_subscription("0" * 32)

        began = r.clock.now()
        r.clock.advance(timedelta(hours=1))
        for add_on in NEW.add_on_codes:
            new = r.usage(made, f"bd1:{add_on}", 999_999_999, add_on)
            await r.recurly.create_usage(new, key=f"k-{add_on}")
            (found,) = await r.recurly.list_usage(made.uuid, add_on, begin=began, end=r.clock.now())
            assert (found.units, found.merchant_tag) == (999_999_999, f"bd1:{add_on}")
            assert (found.usage_timestamp, found.billed_at) == (r.now, None)

        r.site.renew(made.uuid)
        (billed,) = await r.recurly.list_usage(made.uuid, FLAT.code, begin=began, end=r.clock.now())
        assert billed.billed_at is not None  # billed, and not hidden for it
        with pytest.raises(Refused):
            await r.recurly.remove_usage(billed.id, key="too-late")

        ended = await r.recurly.cancel_subscription(made.uuid, key="cancel")
        assert ended.state == "canceled"
        ended = await r.recurly.terminate_subscription(made.uuid, refund="none", key="terminate")
        assert (ended.state, ended.live) == ("expired", False)
        assert [s.state for s in await r.recurly.list_subscriptions(ACCOUNT)] == ["expired"]
        with pytest.raises(Refused):
            await r.recurly.terminate_subscription(made.uuid, refund="full", key="again")


async def test_names_are_changed_everywhere() -> None:
    """Of plans and add-ons; prices stay."""
    async with rehearsal() as r:
        await r.subscribed()
        [plan] = await r.recurly.list_plans()
        assert (plan.code, plan.name) == (PLAN.code, PLAN.name)
        await r.recurly.rename_plan(PLAN.code, "Ünïcode", key="k1")
        await r.recurly.rename_add_on(PLAN.code, FLAT.code, "More calls", key="k2")
        assert await r.recurly.list_plans() == (replace(plan, name="Ünïcode"),)
        add_ons = {each.code: each for each in await r.recurly.list_add_ons(PLAN.code, "USD")}
        assert (add_ons[FLAT.code].name, add_ons[FLAT.code].unit_amount) == ("More calls", FLAT.unit_amount)
        with pytest.raises(NotFound):
            await r.recurly.rename_plan("amplify-plan-none", "x", key="k3")
        with pytest.raises(NotFound):
            await r.recurly.rename_add_on(PLAN.code, "amplify-quota-none", "x", key="k4")
        await r.recurly.remove_plan(PLAN.code, key="k5")
        assert await r.recurly.list_plans() == ()
        with pytest.raises(Refused):
            await r.recurly.rename_plan(PLAN.code, "x", key="k6")


async def test_plans_over_many_pages() -> None:
    """Each once; those of others are left out."""
    async with rehearsal() as r:
        r.site.configure(rate_limit_per_minute=10_000)
        codes = [f"amplify-plan-{n}" for n in range(203)]
        for code in [*codes, "gold"]:
            await r.recurly.create_plan(replace(PLAN, code=code, add_ons=()), key=code)
        assert [plan.code for plan in await r.recurly.list_plans()] == codes


async def test_add_ons_are_attached_to_a_subscription() -> None:
    """What it has stays, with its prices and usage; those that it has already are not sent again."""
    async with rehearsal() as r:
        made = await r.subscribed()
        began = r.clock.now()
        r.clock.advance(timedelta(hours=1))
        await r.recurly.create_usage(r.usage(made, "bd1:a"), key="k1")
        more = replace(FLAT, code="amplify-quota-q4", unit_amount=Decimal("0.75"))
        await r.recurly.create_add_on(PLAN.code, more, "USD", key="k2")
        await r.recurly.add_to_subscription(made.uuid, [FLAT.code, more.code], key="k3")
        found = await r.recurly.get_subscription(made.uuid)
        assert found.add_ons[:3] == made.add_ons
        assert [each.code for each in found.add_ons] == list(found.add_on_codes)
        assert (found.add_ons[3].code, found.add_ons[3].prices) == (more.code, more_prices(more))
        assert (found.add_ons[3].created_at, found.unit_amount) == (r.clock.now(), Decimal("19.99"))
        (kept,) = await r.recurly.list_usage(made.uuid, FLAT.code, begin=began, end=r.clock.now())
        assert kept.billed_at is None
        await r.recurly.add_to_subscription(made.uuid, [more.code], key="k4")
        await r.recurly.add_to_subscription(made.uuid, [more.code], key="k3", retried=True)
        assert await r.recurly.get_subscription(made.uuid) == found
        with pytest.raises(Refused) as caught:
            await r.recurly.add_to_subscription(made.uuid, ["amplify-quota-none"], key="k5")
        assert caught.value.params == ("add_ons.add_on",)
        await r.recurly.terminate_subscription(made.uuid, refund="none", key="end")
        with pytest.raises(Refused) as caught:
            await r.recurly.add_to_subscription(made.uuid, ["amplify-quota-none"], key="k6")
        assert caught.value.code == "immutable_subscription"


@pytest.mark.parametrize(
    ("kind", "error", "happened"),
    [("lost", Unknown, True), ("500", Unknown, False), ("422", NotDone, False), ("reset", Unknown, False)],
)
async def test_a_change_goes_wrong_like_any_other_write(
    kind: str, error: type[Exception], happened: bool
) -> None:
    """Unknown, or not done; sent again, the add-on is there once."""
    async with rehearsal() as r:
        made = await r.subscribed()
        more = replace(FLAT, code="amplify-quota-q4")
        await r.recurly.create_add_on(PLAN.code, more, "USD", key="k2")
        r.faults.add(Rule("recurly", "POST", "/subscriptions/*/change", kind))
        with pytest.raises(error):
            await r.recurly.add_to_subscription(made.uuid, [more.code], key="k3")
        codes = (await r.recurly.get_subscription(made.uuid)).add_on_codes
        assert (more.code in codes) == happened
        await r.recurly.add_to_subscription(made.uuid, [more.code], key="k4")
        codes = (await r.recurly.get_subscription(made.uuid)).add_on_codes
        assert codes == (*made.add_on_codes, more.code)


async def test_a_subscription_is_marked() -> None:
    """It is found by its marker from then on."""
    async with rehearsal() as r:
        made = await r.subscribed()
        await r.recurly.mark_subscription(made.uuid, "8ac9dd77", key="k1")
        assert await r.recurly.get_subscription(made.uuid) == replace(made, marker="8ac9dd77")
        with pytest.raises(Refused):
            await r.recurly.mark_subscription(made.uuid, "x" * 51, key="k2")
        with pytest.raises(NotFound):
            await r.recurly.mark_subscription("0" * 32, "x", key="k3")


async def test_usage_over_many_pages() -> None:
    """450 records are three pages, in order, each once; a removed one is gone."""
    async with rehearsal() as r:
        made = await r.subscribed()
        began = r.clock.now()
        r.site.configure(rate_limit_per_minute=10_000)
        r.clock.advance(timedelta(minutes=1))
        for n in range(450):
            r.clock.advance(timedelta(seconds=1 if n % 3 else 0))  # some at the same second
            await r.recurly.create_usage(r.usage(made, f"bd1:{n}", n + 1), key=f"k{n}")
        r.clock.advance(timedelta(minutes=1))
        begin = began - timedelta(seconds=1)
        found = await r.recurly.list_usage(made.uuid, FLAT.code, begin=begin, end=r.clock.now())
        assert sorted(u.units for u in found) == list(range(1, 451))
        assert [u.usage_timestamp for u in found] == sorted(u.usage_timestamp for u in found)
        await r.recurly.remove_usage(found[0].id, key="remove")
        left = await r.recurly.list_usage(made.uuid, FLAT.code, begin=begin, end=r.clock.now())
        assert left == found[1:]
        with pytest.raises(NotFound):
            await r.recurly.remove_usage(found[0].id, key="remove-again")


@pytest.mark.parametrize(
    ("kind", "happened"),
    [
        ("reset", False),
        ("lost", True),
        ("cut", True),
        ("garbage", True),
        ("not_json", True),
        ("409", False),
        ("500", False),
        ("500_committed", True),
        ("html_502", False),
        ("html_502_committed", True),
    ],
)
async def test_an_unknown_write_is_settled_by_its_key(kind: str, happened: bool) -> None:
    """Whether it happened or not: the same key again, or a look where its answer is stored, leaves one."""
    async with rehearsal() as r:
        made = await r.subscribed()
        r.clock.advance(timedelta(hours=1))
        new = r.usage(made, "bd1:x")
        r.faults.add(Rule("recurly", "POST", "/subscriptions/**", kind))
        with pytest.raises(Unknown):
            await r.recurly.create_usage(new, key="k1")
        begin = r.now - timedelta(hours=1)
        seen = await r.recurly.list_usage(made.uuid, FLAT.code, begin=begin, end=r.clock.now())
        assert len(seen) == happened
        if kind.startswith("500"):  # stored under the key like any other answer
            with pytest.raises(Unknown, match="stored answer") as caught:
                await r.recurly.create_usage(new, key="k1", retried=True)
            assert caught.value.replayed
            if not seen:
                await r.recurly.create_usage(new, key="k2")
        else:
            await r.recurly.create_usage(new, key="k1", retried=True)
            # it cannot tell a first arrival from a bad site
            assert (r.recurly.take_doubt() is None) == happened
        seen = await r.recurly.list_usage(made.uuid, FLAT.code, begin=begin, end=r.clock.now())
        assert [u.merchant_tag for u in seen] == ["bd1:x"]


async def test_a_site_that_ignores_the_key_is_found_out() -> None:
    """A same-key retry makes a second record, and says so nowhere but in what its answer lacks."""
    async with rehearsal() as r:
        made = await r.subscribed()
        r.clock.advance(timedelta(hours=1))
        r.faults.add(Rule("recurly", "POST", "/subscriptions/**", "ignore_idempotency_key", times=None))
        await r.recurly.create_usage(r.usage(made, "bd1:x"), key="k1")
        await r.recurly.create_usage(r.usage(made, "bd1:x"), key="k1", retried=True)
        assert r.recurly.take_doubt() is not None


async def test_two_subscriptions_within_a_minute() -> None:
    """Recurly's guard is no refusal for good."""
    async with rehearsal() as r:
        await r.subscribed()
        await r.recurly.create_plan(replace(PLAN, code="amplify-plan-p2", add_ons=()), key="plan2")
        second = replace(NEW, plan_code="amplify-plan-p2", marker="8ac9dd01", add_on_codes=())
        with pytest.raises(NotDone) as caught:
            await r.recurly.create_subscription(second, key="s2")
        assert caught.value.retry_after == timedelta(seconds=60)
        r.clock.advance(timedelta(seconds=61))
        assert (await r.recurly.create_subscription(second, key="s2b")).marker == "8ac9dd01"
        assert len(await r.recurly.list_subscriptions(ACCOUNT)) == 2


async def test_refusals_carry_recurlys_words() -> None:
    """A code that is taken, a unit that does not exist, an account that is unknown."""
    async with rehearsal() as r:
        with pytest.raises(Refused):
            await r.recurly.create_plan(PLAN, key="plan-too-early")
        await r.subscribed()
        with pytest.raises(Refused) as caught:
            await r.recurly.create_plan(PLAN, key="plan-again")
        assert (caught.value.code, caught.value.params) == ("validation", ("code",))
        with pytest.raises(Refused) as caught:
            await r.recurly.create_measured_unit(UNIT, key="unit-again")
        assert "name" in caught.value.params


async def test_a_wrong_key_is_a_matter_of_configuration() -> None:
    """And waits until somebody mends it."""
    async with rehearsal(api_key="wrong") as r:
        with pytest.raises(Misconfigured) as caught:
            await r.recurly.reach()
        assert "wrong" not in str(caught.value)


async def test_the_rate_limit_of_the_site() -> None:
    """A 429 is not done, and the next call says how long to wait."""
    async with rehearsal() as r:
        made = await r.subscribed()
        r.site.configure(rate_limit_per_minute=1)
        r.clock.advance(timedelta(hours=1))
        for n in range(5):
            await r.recurly.create_usage(r.usage(made, f"bd1:{n}"), key=f"k{n}")
        with pytest.raises(NotDone) as caught:
            await r.recurly.create_usage(r.usage(made, "bd1:5"), key="k5")
        assert caught.value.retry_after is not None
        assert timedelta(seconds=290) < caught.value.retry_after <= timedelta(seconds=301)
        with pytest.raises(NotDone, match="rate limit is used up"):
            await r.recurly.create_usage(r.usage(made, "bd1:5"), key="k5")


def more_prices(spec: AddOnSpec) -> Prices:
    """What a flat add-on charges."""
    return Prices("flat", spec.unit_amount)


def _or_none(ending_quantity: int | None) -> int | None:
    """Recurly may say 999,999,999 for the open end."""
    return None if ending_quantity == 999_999_999 else ending_quantity


@pytest.mark.parametrize("behind", [-3600, -90, 90, 3600])
async def test_the_far_side_has_its_own_time(behind: int) -> None:
    """Known from its answers to a second or two, however wrong the clock here is."""
    async with rehearsal() as r:
        r.recurly._calls._clock = lambda: r.clock.now() - timedelta(seconds=behind)
        assert r.recurly.far_now() == r.clock.now() - timedelta(seconds=behind), "before the first answer"
        await r.recurly.reach()
        assert abs(r.recurly.far_now() - r.clock.now()) <= timedelta(seconds=1)
        r.clock.advance(timedelta(hours=1))
        assert abs(r.recurly.far_now() - r.clock.now()) <= timedelta(seconds=1)


async def test_where_past_bills_were_is_read_from_the_lines() -> None:
    """Every renewal since a moment, from the invoices; of another subscription nothing."""
    async with rehearsal() as r:
        made = await r.subscribed()
        cycles = r.site.subscription_by_uuid[made.uuid].cycles
        began = cycles[0].started_at
        r.clock.advance(timedelta(days=100))
        r.site.run_due_bills()
        assert len(cycles) == 4
        edges = await r.recurly.list_billed_edges(made.uuid, since=began)
        assert {one.started_at for one in cycles} <= edges
        assert edges <= {moment for one in cycles for moment in (one.started_at, one.ends_at)}
        late = await r.recurly.list_billed_edges(made.uuid, since=cycles[2].started_at + timedelta(days=1))
        assert cycles[3].started_at in late
        assert cycles[1].started_at not in late
        with pytest.raises(NotFound):
            await r.recurly.list_billed_edges("0" * 32, since=began)


async def test_live_subscriptions_are_those_that_bill() -> None:
    """With the period that is current; what is over is left out."""
    async with rehearsal() as r:
        made = await r.subscribed()
        [live] = await r.recurly.list_live_subscriptions()
        assert (live.uuid, live.live, live.period) == (made.uuid, True, made.period)
        assert live.period is not None
        await r.recurly.terminate_subscription(made.uuid, refund="none", key="end")
        assert await r.recurly.list_live_subscriptions() == ()
