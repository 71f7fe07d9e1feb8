"""What comes back, as domain values: exact money, whole units, every page."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from recurly_far_side import API_KEY, NOW, Action, World, error, listing, lose, reply, usage, world
from structlog.testing import capture_logs

from billingd.adapters.recurly import Recurly
from billingd.adapters.recurly.client import Address, locate
from billingd.domain.billing import BilledAddOn, BilledPlan, BilledSubscription, BilledUsage, SubscribedAddOn
from billingd.domain.charges import Prices
from billingd.domain.errors import NotDone, NotFound, Retryable
from billingd.domain.pricing import TierSpec

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "object": "plan",
        "id": "p1",
        "code": "amplify-plan-p1",
        "state": "active",
        "interval_unit": "months",
        "interval_length": 1,
        "total_billing_cycles": None,
        "auto_renew": True,
        "currencies": [{"currency": "USD", "unit_amount": 0.1, "setup_fee": 3.3}],
    } | changes


def add_on(**changes: Any) -> dict[str, Any]:
    return {
        "object": "add_on",
        "id": "o1",
        "code": "amplify-quota-q1",
        "state": "active",
        "add_on_type": "usage",
        "usage_type": "price",
        "usage_calculation_type": "cumulative",
        "usage_timeframe": "billing_period",
        "tier_type": "flat",
        "measured_unit_id": "m1",
        "currencies": [{"currency": "USD", "unit_amount": None, "unit_amount_decimal": "0.000000001"}],
        "tiers": [],
    } | changes


def tier(end: int | None, decimal: str | None = None, amount: float | None = None) -> dict[str, Any]:
    price = {"currency": "USD", "unit_amount": amount, "unit_amount_decimal": decimal}
    return {"ending_quantity": end, "currencies": [{"currency": "EUR", "unit_amount": 77.7}, price]}


def subscription(**changes: Any) -> dict[str, Any]:
    return {
        "object": "subscription",
        "id": "x1",
        "uuid": "u" * 32,
        "state": "active",
        "plan": {"object": "plan_mini", "id": "p1", "code": "amplify-plan-p1"},
        "account": {"object": "account_mini", "id": "a1", "code": "amplify-team-1"},
        "po_number": "sub-1",
        "add_ons": [
            {"object": "subscription_add_on", "add_on": {"object": "add_on_mini", "code": code}}
            for code in ("q1", "q2", "q1")
        ],
        "activated_at": "2026-11-01T00:00:00Z",
        "current_period_started_at": "2026-11-01T02:00:00+02:00",
        "current_period_ends_at": "2026-12-01T00:00:00Z",
        "something_new": {"since": 2027},
    } | changes


async def test_a_plan() -> None:
    """Prices as they were written, not as a float holds them."""
    async with world() as w:
        w.far.script.append(reply(200, plan()))
        assert await w.recurly.find_plan("amplify-plan-p1") == BilledPlan(
            id="p1",
            code="amplify-plan-p1",
            state="active",
            interval_unit="months",
            interval_length=1,
            total_billing_cycles=None,
            auto_renew=True,
            unit_amounts={"USD": Decimal("0.1")},
            setup_fees={"USD": Decimal("3.3")},
        )
        w.far.script.append(reply(200, plan(trial_unit="days", trial_length=14)))
        found = await w.recurly.find_plan("amplify-plan-p1")
        assert found is not None
        assert (found.trial_length, found.trial_unit) == (14, "days")


async def test_plans_of_ours() -> None:
    """Every page; those of others are left out without a word, ours that cannot be read with one."""
    async with world() as w:
        named, other = plan(name="Finance starter"), plan(code="gold", state=None)
        odd = plan(code="amplify-plan-p2", interval_unit=None)
        w.far.script.append(reply(200, listing([named, other, odd], "/plans?cursor=2")))
        w.far.script.append(reply(200, listing([plan(code="amplify-plan-p3")])))
        with capture_logs() as logs:
            found = await w.recurly.list_plans()
        assert [(one.code, one.name) for one in found] == [
            ("amplify-plan-p1", "Finance starter"),
            ("amplify-plan-p3", ""),
        ]
        assert [one["plan"] for one in logs if one["event"] == "recurly.plan_not_readable"] == [
            "amplify-plan-p2"
        ]
        path, _, query = w.far.requests[0].target.partition("?")
        assert (path, sorted(query.split("&"))) == (
            "/plans",
            ["limit=200", "order=asc", "sort=created_at", "state=active"],
        )


async def test_a_plans_setup_fees_have_a_place_of_their_own() -> None:
    """The old place is deprecated; an inactive plan is still found."""
    async with world() as w:
        fees = [{"currency": "USD", "unit_amount": 5}, {"currency": "EUR", "unit_amount": 4.5}]
        w.far.script.append(reply(200, plan(setup_fees=fees, state="inactive", total_billing_cycles=12)))
        found = await w.recurly.find_plan("amplify-plan-p1")
        assert found is not None
        assert found.setup_fees == {"USD": Decimal(5), "EUR": Decimal("4.5")}
        assert (found.state, found.total_billing_cycles) == ("inactive", 12)


async def test_add_ons() -> None:
    """Flat ones have a price, the others tiers; the decimal text goes before the rounded number."""
    async with world() as w:
        tiers = [tier(1000, "0.015"), tier(999_999_999, None, 0.1)]
        both = [{"currency": "USD", "unit_amount": 0.02, "unit_amount_decimal": "0.015"}]
        items = [add_on(), add_on(currencies=both), add_on(tier_type="volume", tiers=tiers, currencies=[])]
        w.far.script.append(reply(200, listing(items)))
        flat, rounded, volume = await w.recurly.list_add_ons("amplify-plan-p1", "USD")
        assert flat == BilledAddOn(
            id="o1",
            code="amplify-quota-q1",
            state="active",
            add_on_type="usage",
            usage_type="price",
            usage_calculation_type="cumulative",
            usage_timeframe="billing_period",
            tier_type="flat",
            measured_unit_id="m1",
            unit_amount=Decimal("0.000000001"),
            tiers=(),
        )
        assert rounded.unit_amount == Decimal("0.015")
        assert volume.unit_amount is None
        assert volume.tiers == (TierSpec(1000, Decimal("0.015")), TierSpec(999_999_999, Decimal("0.1")))
        assert "limit=200" in w.far.requests[0].target


async def test_an_add_on_of_another_currency_has_no_price() -> None:
    """It is there, but not for us."""
    async with world() as w:
        w.far.script.append(reply(200, listing([add_on()])))
        (found,) = await w.recurly.list_add_ons("amplify-plan-p1", "JPY")
        assert found.unit_amount is None


async def test_a_subscription() -> None:
    """Times in UTC, add-ons once each, unknown fields ignored."""
    async with world() as w:
        w.far.script.append(reply(200, subscription()))
        found = await w.recurly.get_subscription("u" * 32)
        assert found == BilledSubscription(
            uuid="u" * 32,
            plan_code="amplify-plan-p1",
            account_code="amplify-team-1",
            marker="sub-1",
            state="active",
            add_on_codes=("q1", "q2"),
            activated_at=BEGIN,
            period_started_at=BEGIN,
            period_ends_at=datetime(2026, 12, 1, tzinfo=UTC),
        )


async def test_a_subscriptions_own_prices() -> None:
    """Its own, in its currency, whatever the plan's are; since when it has each add-on."""
    attached = {"object": "subscription_add_on", "created_at": "2026-11-01T00:00:00Z"}
    flat = {"unit_amount": None, "unit_amount_decimal": "0.0025", "tier_type": "flat", "tiers": None}
    tiers = [
        {"ending_quantity": 10, "unit_amount": 0.1, "unit_amount_decimal": None},
        {"ending_quantity": 999_999_999, "unit_amount": None, "unit_amount_decimal": "0.05"},
    ]
    own = [
        attached | flat | {"id": "x1", "add_on": {"code": "q1"}},
        attached | {"id": "x2", "add_on": {"code": "q2"}, "tier_type": "volume", "tiers": tiers},
    ]
    async with world() as w:
        w.far.script.append(reply(200, subscription(add_ons=own, currency="EUR", unit_amount=19.99)))
        found = await w.recurly.get_subscription("u")
    assert (found.currency, found.unit_amount) == ("EUR", Decimal("19.99"))
    ends = (TierSpec(10, Decimal("0.1")), TierSpec(999_999_999, Decimal("0.05")))
    assert found.add_ons == (
        SubscribedAddOn("x1", "q1", Prices("flat", Decimal("0.0025")), BEGIN),
        SubscribedAddOn("x2", "q2", Prices("volume", None, ends), BEGIN),
    )


@pytest.mark.parametrize(
    "answer",
    [
        lose,
        reply(200, subscription(add_ons=None)),
        reply(200, subscription()),  # add-ons without an id
        reply(200, {"object": "plan"}),
        reply(503),
    ],
)
async def test_no_change_is_sent_without_knowing_what_is_there(answer: Action) -> None:
    """It would remove what it does not list; nothing left, so nothing is unknown."""
    async with world(threads=1) as w:
        w.far.script.extend([answer] * 2)
        with pytest.raises(NotDone):
            await w.recurly.add_to_subscription("u", ["q3"], key="k")
        assert {request.method for request in w.far.requests} == {"GET"}


async def test_a_change_that_is_there_already_is_not_sent() -> None:
    """Nor one for a subscription that is not there."""
    own = [{"id": "x1", "object": "subscription_add_on", "add_on": {"code": "q1"}}]
    async with world() as w:
        w.far.script.append(reply(200, subscription(add_ons=own)))
        await w.recurly.add_to_subscription("u", ["q1"], key="k")
        w.far.script.append(error(404, "not_found"))
        with pytest.raises(NotFound):
            await w.recurly.add_to_subscription("u", ["q1"], key="k")
        assert [request.method for request in w.far.requests] == ["GET", "GET"]


async def test_a_subscription_with_little_to_say() -> None:
    """A future one has no times yet; one without a plan is not readable."""
    async with world() as w:
        bare = subscription(po_number=None, add_ons=None, activated_at=None, state="future")
        del bare["current_period_started_at"], bare["current_period_ends_at"]
        w.far.script.extend([reply(200, bare), reply(200, subscription(plan=None))])
        found = await w.recurly.get_subscription("u")
        assert (found.marker, found.add_on_codes, found.activated_at, found.period_ends_at) == (
            None,
            (),
            None,
            None,
        )
        with pytest.raises(Retryable, match="no code"):
            await w.recurly.get_subscription("u")


async def test_usage_over_several_pages() -> None:
    """Every page, relative or absolute, one without items too, and one that needs a second try."""
    async with world(threads=1) as w:
        items = [usage(amount=float(n), tag=f"bd1:{n}", id_=f"u{n}") for n in range(1, 5)]
        items[1] |= {"billed_at": "2026-11-23T00:00:00Z", "merchant_tag": None}
        w.far.script.extend(
            [
                reply(200, listing(items[:2], "/next?cursor=1&limit=200")),
                reply(200, listing([], "https://v3.recurly.com/next?cursor=2")),
                lose,
                reply(200, listing(items[2:])),
            ]
        )
        found = await w.recurly.list_usage("s1", "q1", begin=BEGIN, end=NOW)
        assert [u.units for u in found] == [1, 2, 3, 4]
        at = datetime(2026, 11, 22, 10, 59, 59, tzinfo=UTC)
        assert found[1] == BilledUsage("u2", 2, None, at, datetime(2026, 11, 23, tzinfo=UTC))
        assert [r.target for r in w.far.requests[1:]] == [
            "/next?cursor=1&limit=200",
            "/next?cursor=2",
            "/next?cursor=2",
        ]


@pytest.mark.parametrize(
    "page",
    [
        listing([usage(amount=1.5)]),
        listing([usage(amount=None)]),
        listing([{"object": "usage", "id": "u1", "amount": 1}]),
        listing([{"object": "plan"}]),
        listing([usage()], "") | {"has_more": True},
        {"object": "list", "data": []},
        usage(),
    ],
)
async def test_a_list_that_cannot_be_read_is_no_empty_list(page: Any) -> None:
    """Half a list, or a rounded one, would bill somebody wrongly."""
    async with world() as w:
        w.far.script.append(reply(200, page))
        with pytest.raises(Retryable):
            await w.recurly.list_usage("s1", "q1", begin=BEGIN, end=NOW)


async def test_a_page_that_fails_fails_the_list() -> None:
    """What was read before is not the answer."""
    async with world() as w:
        w.far.script.extend([reply(200, listing([usage()], "/next")), reply(503)])
        with pytest.raises(Retryable):
            await w.recurly.list_usage("s1", "q1", begin=BEGIN, end=NOW)


async def test_measured_units() -> None:
    """By name; one that was deleted cannot be used."""
    unit = {"object": "measured_unit", "id": "m1", "name": "n", "display_name": "N", "state": "active"}

    async def find(w: World, answer: dict[str, Any]) -> str | None:
        w.far.script.append(reply(200, answer))
        return await w.recurly.find_measured_unit("amplify unit")

    async with world() as w:
        assert await find(w, unit) == "m1"
        assert await find(w, unit | {"state": "inactive"}) is None
        assert w.far.requests[0].target == "/measured_units/name-amplify%20unit"


@pytest.mark.parametrize(
    ("base_url", "region", "address"),
    [
        (None, "us", Address("v3.recurly.com", 443, plain=False)),
        (None, "eu", Address("v3.eu.recurly.com", 443, plain=False)),
        ("http://127.0.0.1:8010", "us", Address("127.0.0.1", 8010, plain=True)),
        ("http://127.8.8.8/", "us", Address("127.8.8.8", 80, plain=True)),
        ("http://[::1]:8010", "us", Address("::1", 8010, plain=True)),
        ("http://localhost:8010", "us", Address("localhost", 8010, plain=True)),
        ("https://recurly.example", "us", Address("recurly.example", 443, plain=False)),
    ],
)
def test_where_recurly_is(base_url: str | None, region: str, address: Address) -> None:
    """The region's host, or what was configured."""
    assert locate(base_url, region) == address


@pytest.mark.parametrize(
    "base_url",
    [
        "http://recurly.example",
        "http://10.0.0.1:80",
        "http://localhost.example",
        "http://127.0.0.1.example",
        "https://user:pw@recurly.example",
        "https://recurly.example/v3",
        "https://recurly.example?x=1",
        "ftp://127.0.0.1",
        "127.0.0.1:8010",
        "https://",
        "http://127.0.0.1:99999",
    ],
)
def test_where_recurly_must_not_be(base_url: str) -> None:
    """The key would travel in the clear, or to nowhere."""
    with pytest.raises(ValueError, match=r"base_url|[Pp]ort"):
        locate(base_url, "us")


def test_an_unknown_region_is_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="mars"):
        locate(None, "mars")


@pytest.mark.parametrize("key", ["", "naïve-key", "key\n"])
def test_a_key_that_cannot_work_is_refused_without_being_told(key: str) -> None:
    """The SDK would fail on each call, and name it."""
    with pytest.raises(ValueError, match="API key") as caught:
        Recurly(
            api_key=key,
            base_url=None,
            region="us",
            timeout=timedelta(seconds=1),
            requests_per_minute=300,
            threads=1,
        )
    assert not key or key not in str(caught.value)
    assert API_KEY not in str(caught.value)
