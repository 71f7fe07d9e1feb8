"""JSON -> domain values: exact about prices, tolerant of the rest, clear about what is missing."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from amplify_bench import sample

from billingd.adapters.amplify import resources
from billingd.adapters.amplify.encoding import Json, decode, encode, equals, moment_of, pointer, segment
from billingd.domain.catalog import (
    Graduated,
    Loose,
    PerUnit,
    Pricing,
    Strict,
    Term,
    Tier,
    UnknownPricing,
    Unlimited,
    Volume,
)
from billingd.domain.errors import Permanent


def changed(name: str, path: str, value: Any) -> Json:
    """A sample with one value replaced, or removed (`...`)."""
    raw = json.loads(sample(name))
    *steps, last = path.split(".")
    node = raw
    for step in steps:
        node = node[step]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return decode(json.dumps(raw).encode())


def priced(pricing: dict[str, Any]) -> Pricing:
    """The pricing of the sample quota with another `spec.pricing`."""
    return resources.quota(changed("quota.json", "spec.pricing", pricing)).pricing


def test_product() -> None:
    """The attribute decides whether it is billed (amplify.md 3.1)."""
    product = resources.product(decode(sample("product.json")))
    assert (product.id[:8], product.name, product.title) == ("8ac9bb00", "weather-pro", "Weather Pro")
    assert (product.state, product.billing_system) == ("active", "recurly")
    bare = resources.product({"name": "p", "metadata": {"id": "1"}, "state": {"name": "draft"}})
    assert (bare.title, bare.state, bare.billing_system) == ("p", "draft", None)


def test_product_plan() -> None:
    """Every field billingd uses (amplify.md 3.2)."""
    plan = resources.product_plan(decode(sample("product_plan.json")))
    assert plan.id == "8ac9aa00aa000001aa000001aa000001"
    assert (plan.product_name, plan.product_id) == ("weather-pro", "8ac9bb00aa000001aa000001aa000001")
    assert (plan.state, plan.type, plan.approval) == ("active", "paid", "manual")
    assert (plan.currency, plan.interval) == ("USD", "monthly")
    assert (str(plan.price), plan.setup_price) == ("10.10", Decimal(25))
    assert (plan.term, plan.renewal, plan.cycles) == (Term("months", 1), "automatic", 12)
    assert (plan.attributes, plan.resource_version, plan.deleting) == ({"color": "blue"}, "3", False)


def test_a_plan_without_a_price() -> None:
    """Free and custom plans have no billing; unknown words pass through as they are."""
    plan = resources.product_plan(
        {
            "name": "p",
            "metadata": {"id": "1", "state": "DELETING"},
            "spec": {"product": "x", "type": "custom"},
        }
    )
    assert (plan.type, plan.currency, plan.interval, plan.price) == ("custom", None, None, Decimal(0))
    assert (plan.term, plan.cycles, plan.approval, plan.state) == (None, None, "", "")
    assert plan.product_id is None
    assert plan.deleting


@pytest.mark.parametrize(
    ("pricing", "expected"),
    [
        ({"type": "unlimited"}, Unlimited()),
        ({"type": "perunit", "cost": 0.1}, PerUnit(Decimal("0.1"))),
        (
            {"type": "fixed", "interval": "monthly", "limit": {"type": "strict", "value": 100}},
            Strict(100, "monthly"),
        ),
        (
            {
                "type": "fixed",
                "interval": "daily",
                "limit": {"type": "loose", "value": 5, "overages": {"value": 0.2}},
            },
            Loose(5, "daily", Decimal("0.2")),
        ),
        (
            {"type": "fixed", "interval": "daily", "limit": {"type": "loose", "value": 5, "overages": {}}},
            Loose(5, "daily", None),
        ),
        (
            {
                "type": "volume",
                "limit": {"type": "tiered", "tiers": [{"from": 1, "to": 2, "cost": 1, "flatFee": 0}]},
            },
            Volume((Tier(1, 2, Decimal(1), Decimal(0)),)),
        ),
        ({"type": "perUnit", "cost": 1}, UnknownPricing("perUnit")),
        ({"type": "volume", "limit": {"type": "strict"}}, UnknownPricing("volume with limit strict")),
        ({"type": "fixed", "limit": {"type": "tiered"}}, UnknownPricing("fixed with limit tiered")),
    ],
)
def test_pricing(pricing: dict[str, Any], expected: Pricing) -> None:
    """Exact spellings (amplify.md 3.3); whatever else is unknown, and not an error."""
    assert priced(pricing) == expected


def test_a_price_never_passes_float() -> None:
    """A cost no double can hold keeps all its digits."""
    quota = resources.quota(decode(sample("quota.json")))
    assert isinstance(quota.pricing, Graduated)
    assert str(quota.pricing.tiers[2].cost) == "0.1000000000000000055"
    assert quota.pricing.tiers[0] == Tier(1, 500, Decimal("2.0"), Decimal(0))
    assert quota.unit == "transactions"
    assert resources.quota(changed("quota.json", "spec.unit", None)).unit is None


def test_a_whole_resource_goes_back_digit_for_digit() -> None:
    """GET + PUT returns what was read, prices included, as valid JSON."""
    raw = decode(sample("quota.json"))
    assert "0.1000000000000000055" in encode(raw)
    assert decode(encode(raw).encode()) == raw
    assert encode({"a": [Decimal("1E+3"), True, None, 'q"', 1]}) == '{"a": [1E+3, true, null, "q\\"", 1]}'


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        ("product_plan.json", "metadata.id", ..., "ProductPlan weather-pro-metered: metadata.id is missing"),
        ("product_plan.json", "spec.product", ..., "spec.product is missing"),
        ("product_plan.json", "spec.type", None, "spec.type is missing"),
        ("product_plan.json", "spec.billing.price", "ten", "spec.billing.price is not a number"),
        ("product_plan.json", "spec.billing.price", True, "spec.billing.price is not a number"),
        ("product_plan.json", "spec.billing.currency", ["USD"], "spec.billing.currency is not text"),
        ("product_plan.json", "spec.subscription.cycles", 1.5, "cycles is not a whole number"),
        ("product_plan.json", "spec.subscription.interval.length", ..., "interval.length is missing"),
        ("quota.json", "spec.pricing", ..., "Quota calls: spec.pricing.type is missing"),
        ("quota.json", "spec.pricing.limit.tiers", ..., "spec.pricing.limit.tiers is missing"),
        ("quota.json", "spec.pricing.limit.tiers", {}, "tiers is not a list"),
        (
            "quota.json",
            "spec.pricing.limit.tiers",
            [{"from": 1, "to": 2, "cost": 1}],
            r"Quota calls: spec.pricing.limit.tiers\[0\].flatFee is missing",
        ),
        (
            "subscription_pending.json",
            "spec.plan",
            {},
            "Subscription weather-pro-acme: spec.plan.name is missing",
        ),
        (
            "subscription_pending.json",
            "state",
            {"when": {"timestamp": "later"}},
            "when.timestamp is not a time",
        ),
    ],
)
def test_what_is_missing_is_named(name: str, path: str, value: Any, complaint: str) -> None:
    """Kind, name and field: enough to find it in Amplify's UI."""
    kind = {"p": resources.product_plan, "q": resources.quota, "s": resources.subscription}[name[0]]
    with pytest.raises(Permanent, match=complaint):
        kind(changed(name, path, value))


def test_subscription_pending() -> None:
    """Ids from the references, the subscriber from the marketplace (amplify.md 3.5, 7)."""
    found = resources.subscription(decode(sample("subscription_pending.json")))
    assert (found.plan_name, found.plan_id) == ("weather-pro-metered", "8ac9aa00aa000001aa000001aa000001")
    assert (found.approval, found.state, found.state_at) == ("pending", None, None)
    assert (found.owner_user_id, found.owner_team_id) == (None, "team-guid")
    assert (found.owner_org_id, found.created_by) == ("200000000000002", "u-guid")
    assert found.marketplace_id == "7d7d0000-0000-4000-8000-000000000001"
    assert (found.migrated_from, found.deleting) == (None, False)


def test_subscription_migrated() -> None:
    """States as objects, a time with a colon in its zone, ids as numbers, a deletion under way."""
    found = resources.subscription(decode(sample("subscription_migrated.json")))
    assert (found.approval, found.state) == ("approved", "archivalScheduled")
    assert found.state_at == datetime(2026, 4, 1, 0, 0, tzinfo=UTC)
    assert (found.owner_user_id, found.owner_org_id) == ("u-owner", "200000000000002")
    assert (found.created_by, found.migrated_from) == ("u-2", "weather-pro-acme")
    assert (found.title, found.resource_version, found.deleting) == ("weather-gold-acme", "9", True)


def test_subscription_just_created() -> None:
    """Before its approval is set it is neither pending nor anything else (amplify.md 4.2)."""
    raw = changed("subscription_pending.json", "approval", ...)
    assert resources.subscription(raw).approval == ""
    assert resources.subscription(changed("subscription_pending.json", "state", "active")).state == "active"


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-02T10:15:00.120+0000",
        "2026-03-02T10:15:00.120+00:00",
        "2026-03-02T10:15:00.120Z",
        "2026-03-02 10:15:00.120",
        "2026-03-02T11:15:00.120+0100",
    ],
)
def test_times(text: str) -> None:
    """With and without a colon in the zone, with Z, and with none meaning UTC (amplify.md 2.5, 4.5)."""
    assert moment_of(text) == datetime(2026, 3, 2, 10, 15, 0, 120_000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "query"),
    [
        ("8ac9aa00", "f===8ac9aa00"),
        ("a b", "f==='a b'"),
        ("x';state===active", "f==='x\\';state===active'"),
        ("a\\'b", "f==='a\\\\\\'b'"),
        ("*", "f==='*'"),
        ("", "f===''"),
    ],
)
def test_rsql_values_stay_values(value: str, query: str) -> None:
    """No value can end its quotes and become a condition (amplify.md 2.4)."""
    assert equals("f", value) == query


def test_paths_stay_paths() -> None:
    """No name reaches another path; no key another attribute (RFC 6901)."""
    assert segment("a/../b?x#y") == "a%2F..%2Fb%3Fx%23y"
    for name in ("", ".", "..", "x" * 400):
        with pytest.raises(Permanent):
            segment(name)
    assert pointer("attributes", "a/b~c") == "/attributes/a~1b~0c"
