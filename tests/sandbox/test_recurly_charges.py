"""What Recurly charges for a quantity."""

from decimal import Decimal

import pytest

from billingd.sandbox.recurly.charges import AddOnPrice, Tier, TierType, charge, round_line

TIERS = (Tier(10, Decimal("2")), Tier(20, Decimal("1.5")), Tier(None, Decimal("1")))


def price(tier_type: TierType) -> AddOnPrice:
    if tier_type == "flat":
        return AddOnPrice("flat", Decimal("0.0025"))
    return AddOnPrice(tier_type, tiers=TIERS)


@pytest.mark.parametrize(
    ("tier_type", "quantity", "expected"),
    [
        ("flat", 0, "0"),
        ("flat", 3, "0.0075"),
        ("flat", -3, "-0.0075"),
        ("tiered", 0, "0"),
        ("tiered", 10, "20"),
        ("tiered", 11, "21.5"),
        ("tiered", 25, "40"),
        ("tiered", -4, "-8"),
        ("volume", 0, "0"),
        ("volume", 10, "20"),
        ("volume", 11, "16.5"),
        ("volume", 21, "21"),
        ("stairstep", 0, "0"),
        ("stairstep", 1, "2"),
        ("stairstep", 10, "2"),
        ("stairstep", 11, "1.5"),
        ("stairstep", 1_000, "1"),
        ("stairstep", -5, "0"),
    ],
)
def test_each_tier_type_has_its_own_arithmetic(tier_type: TierType, quantity: int, expected: str) -> None:
    """Tiered: each unit at its tier; volume: all at the tier reached; stairstep: one amount per range."""
    assert charge(price(tier_type), quantity) == Decimal(expected)


@pytest.mark.parametrize("tier_type", ["flat", "tiered", "volume", "stairstep"])
@pytest.mark.parametrize(("first", "more"), [(5, 10), (15, 10), (15, -8), (30, -30), (0, 7)])
def test_a_later_part_costs_what_the_whole_costs_more(tier_type: TierType, first: int, more: int) -> None:
    """Charged in two parts, the sum is that of one: corrections continue at the tiers already billed."""
    parts = charge(price(tier_type), first) + charge(price(tier_type), more, already=first)
    assert parts == charge(price(tier_type), first + more)


def test_999999999_is_no_end() -> None:
    """A last tier that ends at 999999999 is open, as if it had no end."""
    ended = AddOnPrice("tiered", tiers=(*TIERS[:2], Tier(999_999_999, Decimal("1"))))
    assert charge(ended, 2_000_000_000) == charge(price("tiered"), 2_000_000_000)


@pytest.mark.parametrize(
    ("amount", "currency", "expected"),
    [
        ("10.505", "USD", "10.51"),
        ("10.504999", "USD", "10.50"),
        ("-10.505", "USD", "-10.51"),
        ("10.5", "JPY", "11"),
        ("10.4", "JPY", "10"),
        ("1.2345", "KWD", "1.23"),
        ("0.005", "BHD", "0.01"),
    ],
)
def test_a_line_is_rounded_once_half_up(amount: str, currency: str, expected: str) -> None:
    """To the minor unit; three-decimal currencies to hundredths, as Recurly documents nothing finer."""
    assert str(round_line(Decimal(amount), currency)) == expected


def test_a_flat_price_has_no_tiers_and_the_others_have() -> None:
    """A price that says both or neither cannot be made."""
    with pytest.raises(ValueError, match="flat"):
        AddOnPrice("flat", Decimal(1), TIERS)
    with pytest.raises(ValueError, match="flat"):
        AddOnPrice("tiered", Decimal(1))
