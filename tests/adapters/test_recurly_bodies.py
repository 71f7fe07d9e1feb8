"""What goes over the wire, byte for byte where money is concerned."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recurly_far_side import NOW, new_usage, reply, usage, world

from billingd.adapters.recurly import bodies
from billingd.domain.billing import NewSubscription
from billingd.domain.errors import Refused
from billingd.domain.pricing import AddOnSpec, MeasuredUnitSpec, PlanSpec, TierSpec, TierType

UNIT = MeasuredUnitSpec("amplify-unit-transactions", "Transactions")
FLAT = AddOnSpec("q1", "amplify-quota-q1", "Calls", UNIT, "transactions", "flat", Decimal("0.0025"))
TIERS = (TierSpec(1000, Decimal("0.010")), TierSpec(None, Decimal("1E+1")))
PLAN = PlanSpec(
    plan_id="p1",
    code="amplify-plan-p1",
    name="Finance starter",
    description="For the small",
    currency="USD",
    interval_unit="months",
    interval_length=1,
    unit_amount=Decimal("19.99"),
    setup_fee=Decimal("5"),
    total_billing_cycles=12,
    auto_renew=False,
    add_ons=(FLAT, replace(FLAT, code="amplify-quota-q2", tier_type="volume", unit_amount=None, tiers=TIERS)),
)
USAGE_ADD_ON = {
    "name": "Calls",
    "add_on_type": "usage",
    "usage_type": "price",
    "usage_calculation_type": "cumulative",
    "usage_timeframe": "billing_period",
    "measured_unit_name": "amplify-unit-transactions",
    "optional": False,
    "accounting_code": "api-usage",
}
FLAT_BODY = {
    **USAGE_ADD_ON,
    "code": "amplify-quota-q1",
    "tier_type": "flat",
    "currencies": [{"currency": "USD", "unit_amount_decimal": "0.0025"}],
}
TIERS_BODY = [
    {"ending_quantity": 1000, "currencies": [{"currency": "USD", "unit_amount_decimal": "0.01"}]},
    {"currencies": [{"currency": "USD", "unit_amount_decimal": "10"}]},
]


def test_a_plan() -> None:
    """Prices, setup fee, term and add-ons in one request."""
    assert bodies.plan(PLAN) == {
        "code": "amplify-plan-p1",
        "name": "Finance starter",
        "description": "For the small",
        "interval_unit": "months",
        "interval_length": 1,
        "currencies": [{"currency": "USD", "unit_amount": 19.99}],
        "setup_fees": [{"currency": "USD", "unit_amount": 5.0}],
        "accounting_code": "api-plan",
        "setup_fee_accounting_code": "api-setup",
        "total_billing_cycles": 12,
        "auto_renew": False,
        "add_ons": [
            FLAT_BODY,
            {**USAGE_ADD_ON, "code": "amplify-quota-q2", "tier_type": "volume", "tiers": TIERS_BODY},
        ],
    }


def test_a_bare_plan() -> None:
    """Without a fee, an end, a description or add-ons there is no word of them."""
    bare = replace(
        PLAN,
        unit_amount=Decimal(0),
        setup_fee=Decimal("0.00"),
        total_billing_cycles=None,
        auto_renew=True,
        description="",
        add_ons=(),
    )
    body = bodies.plan(bare)
    assert body["currencies"] == [{"currency": "USD", "unit_amount": 0.0}]
    assert body["auto_renew"] is True
    assert not {"setup_fees", "total_billing_cycles", "description", "add_ons"} & body.keys()


@pytest.mark.parametrize("tier_type", ["tiered", "volume", "stairstep"])
def test_an_add_on_with_tiers(tier_type: TierType) -> None:
    """Tiers instead of currencies; the last one is open."""
    spec = replace(FLAT, tier_type=tier_type, unit_amount=None, tiers=TIERS)
    expected = {**USAGE_ADD_ON, "code": "amplify-quota-q1", "tier_type": tier_type, "tiers": TIERS_BODY}
    assert bodies.add_on(spec, "USD") == expected


@pytest.mark.parametrize(
    "spec",
    [
        replace(FLAT, unit_amount=None),
        replace(FLAT, tiers=TIERS),
        replace(FLAT, tier_type="volume", tiers=TIERS),
        replace(FLAT, tier_type="volume", unit_amount=None),
        replace(FLAT, tier_type="volume", unit_amount=None, tiers=TIERS[:1]),
        replace(FLAT, unit_amount=Decimal("0.0000000001")),
        replace(FLAT, unit_amount=Decimal("1000000.01")),
        replace(FLAT, unit_amount=Decimal("-0.01")),
        replace(FLAT, unit_amount=Decimal("NaN")),
    ],
)
def test_an_add_on_that_makes_no_sense_is_refused(spec: AddOnSpec) -> None:
    """Here rather than rounded there."""
    with pytest.raises(Refused):
        bodies.add_on(spec, "USD")


@given(st.decimals(0, 1_000_000, places=2))
def test_a_json_number_reads_exactly_like_the_amount(amount: Decimal) -> None:
    """No amount changes on its way through float."""
    written = json.dumps(bodies.number(amount))
    assert "e" not in written
    assert "-" not in written
    assert Decimal(written) == amount


@given(st.decimals(0, 1_000_000, places=9))
def test_decimal_text_is_plain_and_exact(amount: Decimal) -> None:
    """Digits and a point, nothing else."""
    written = bodies.text(amount)
    assert set(written) <= set("0123456789.")
    assert Decimal(written) == amount


@pytest.mark.parametrize(
    ("amount", "written"),
    [
        ("0E-9", "0"),
        ("1E+6", "1000000"),
        ("100", "100"),
        ("0.10", "0.1"),
        ("1E-9", "0.000000001"),
        ("-0", "0"),
    ],
)
def test_decimal_text_has_no_exponent(amount: str, written: str) -> None:
    """Decimal itself would write 1E-9."""
    assert bodies.text(Decimal(amount)) == written


@pytest.mark.parametrize("amount", ["0.001", "1000000.01", "-1", "Infinity", "NaN", "1E+30"])
def test_a_price_that_is_no_exact_cents_is_refused(amount: str) -> None:
    """It is never rounded."""
    with pytest.raises(Refused):
        bodies.number(Decimal(amount))


def test_a_subscription() -> None:
    """The marker, every add-on by name, and no price of its own."""
    new = NewSubscription("amplify-plan-p1", "amplify-team-1", "USD", "manual", "sub-1", ("q1", "q2"))
    assert bodies.subscription(new) == {
        "plan_code": "amplify-plan-p1",
        "currency": "USD",
        "account": {"code": "amplify-team-1"},
        "collection_method": "manual",
        "po_number": "sub-1",
        "add_ons": [{"code": "q1"}, {"code": "q2"}],
    }
    assert "add_ons" not in bodies.subscription(replace(new, add_on_codes=()))


def test_an_account() -> None:
    """What is known of it, cut to what fits."""
    assert bodies.account("amplify-user-1") == {"code": "amplify-user-1"}
    full = bodies.account("c", email="a@b.example", first_name="A", last_name="B", company="x" * 300)
    assert full == {
        "code": "c",
        "email": "a@b.example",
        "first_name": "A",
        "last_name": "B",
        "company": "x" * 100,
    }


def test_a_measured_unit() -> None:
    """Its name finds it again."""
    expected = {"name": "amplify-unit-transactions", "display_name": "Transactions"}
    assert bodies.measured_unit(UNIT) == expected


def test_usage() -> None:
    """Whole units, whole seconds, always UTC."""
    east = datetime(2026, 11, 22, 14, 0, 0, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert bodies.usage(replace(new_usage("bd1:x", 999_999_999), recorded_at=east)) == {
        "amount": 999_999_999,
        "merchant_tag": "bd1:x",
        "usage_timestamp": "2026-11-22T10:59:59Z",
        "recording_timestamp": "2026-11-22T12:00:00Z",
    }


@pytest.mark.parametrize("units", [0, 1_000_000_000, -1_000_000_000])
def test_usage_that_does_not_fit_is_refused(units: int) -> None:
    """Recurly keeps nine digits."""
    with pytest.raises(Refused):
        bodies.usage(new_usage(units=units))


def test_a_time_without_a_zone_is_a_bug() -> None:
    """It could mean any hour."""
    with pytest.raises(ValueError, match="zone"):
        bodies.instant(datetime(2026, 1, 1))  # noqa: DTZ001


async def test_what_a_write_sends() -> None:
    """Method, path, key, version and body, as the far side sees them."""
    async with world() as w:
        w.far.script.append(reply(201, usage()))
        await w.recurly.create_usage(new_usage(), key="k1")
        (sent,) = w.far.requests
        assert sent.method == "POST"
        assert sent.target == f"/subscriptions/uuid-{'s' * 32}/add_ons/code-amplify-quota-q/usage"
        assert sent.headers["idempotency-key"] == "k1"
        assert sent.headers["accept"] == "application/vnd.recurly.v2021-02-25"
        assert "accept-language" not in sent.headers  # messages would be translated
        assert sent.json == bodies.usage(new_usage())


async def test_how_a_subscription_is_ended() -> None:
    """Cancelled with its cycle; terminated with its usage billed."""
    subscription = {
        "object": "subscription",
        "uuid": "s1",
        "state": "expired",
        "plan": {"code": "p"},
        "account": {"code": "a"},
    }
    async with world() as w:
        w.far.script.extend([reply(200, subscription)] * 3)
        await w.recurly.cancel_subscription("s1", key="k1")
        await w.recurly.terminate_subscription("s1", refund="none", key="k2")
        await w.recurly.terminate_subscription("s1", refund="full", charge=False, key="k3")
        cancel, none, full = w.far.requests
        assert (cancel.method, cancel.target, cancel.json) == (
            "PUT",
            "/subscriptions/uuid-s1/cancel",
            {"timeframe": "bill_date"},
        )
        assert (none.method, none.target) == ("DELETE", "/subscriptions/uuid-s1?refund=none&charge=true")
        assert full.target == "/subscriptions/uuid-s1?refund=full&charge=false"
        assert full.headers["idempotency-key"] == "k3"


def test_a_change_lists_what_is_there_and_what_is_new() -> None:
    """The set is replaced by it: ids keep prices, codes take the plan's; the way of collecting stays."""
    assert bodies.attachment(["x1", "x2"], ["q3"], "manual") == {
        "timeframe": "now",
        "add_ons": [{"id": "x1"}, {"id": "x2"}, {"code": "q3"}],
        "collection_method": "manual",
    }
    assert bodies.attachment([], ["q3"], None) == {"timeframe": "now", "add_ons": [{"code": "q3"}]}


async def test_how_names_and_markers_are_changed() -> None:
    """One field each, names cut to what fits."""
    plan, add_on = {"object": "plan", "id": "p1"}, {"object": "add_on", "id": "o1"}
    marked = {"object": "subscription", "id": "x1"}
    async with world() as w:
        w.far.script.extend([reply(201, plan), reply(201, add_on), reply(200, marked)])
        await w.recurly.rename_plan("p", "n" * 300, key="k1")
        await w.recurly.rename_add_on("p", "q", "Calls", key="k2")
        await w.recurly.mark_subscription("s1", "sub-1", key="k3")
        assert [(r.method, r.target, r.json, r.headers["idempotency-key"]) for r in w.far.requests] == [
            ("PUT", "/plans/code-p", {"name": "n" * 255}, "k1"),
            ("PUT", "/plans/code-p/add_ons/code-q", {"name": "Calls"}, "k2"),
            ("PUT", "/subscriptions/uuid-s1", {"po_number": "sub-1"}, "k3"),
        ]


async def test_what_a_usage_list_asks() -> None:
    """Billed records too, oldest first, in UTC."""
    async with world() as w:
        begin = datetime(2026, 11, 22, 10, tzinfo=UTC)
        assert await w.recurly.list_usage("s1", "q 1", begin=begin, end=NOW) == ()
        path, _, query = w.far.requests[0].target.partition("?")
        assert path == "/subscriptions/uuid-s1/add_ons/code-q%201/usage"
        assert sorted(query.split("&")) == [
            "begin_time=2026-11-22T10%3A00%3A00Z",
            "billing_status=all",
            "end_time=2026-11-22T12%3A00%3A00Z",
            "limit=200",
            "order=asc",
            "sort=usage_timestamp",
        ]
