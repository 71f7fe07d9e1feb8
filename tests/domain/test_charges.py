"""What usage costs, against a count of every single unit."""

from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.charges import Prices
from billingd.domain.tiers import TierSpec

OPEN = (None, 999_999_999)
AMOUNTS = st.decimals(0, 1000, places=6)


@st.composite
def prices(draw: st.DrawFn) -> Prices:
    """Any price that Recurly can hold, its tiers short enough to count through."""
    tier_type = draw(st.sampled_from(["flat", "tiered", "volume", "stairstep"]))
    if tier_type == "flat":
        return Prices(tier_type, draw(AMOUNTS))
    ends = sorted(draw(st.sets(st.integers(1, 60), max_size=4)))
    tiers = [TierSpec(end, draw(AMOUNTS)) for end in ends]
    tiers.append(TierSpec(draw(st.sampled_from(OPEN)), draw(AMOUNTS)))
    return Prices(tier_type, None, tuple(tiers))


def counted(price: Prices, units: int) -> Decimal:
    """The same, unit by unit; shares nothing with it."""

    def tier_of(nth: int) -> TierSpec:
        below = 0
        for tier in price.tiers:
            end = 10**12 if tier.ending_quantity is None else tier.ending_quantity
            if below < nth <= end:
                return tier
            below = end
        raise AssertionError(nth)

    if units == 0:
        return Decimal(0)
    match price.tier_type:
        case "flat":
            assert price.unit_amount is not None
            return sum((price.unit_amount for _ in range(units)), Decimal(0))
        case "tiered":
            return sum((tier_of(nth).amount for nth in range(1, units + 1)), Decimal(0))
        case "volume":
            return sum((tier_of(units).amount for _ in range(units)), Decimal(0))
        case _:
            return tier_of(units).amount


@given(price=prices(), units=st.integers(0, 130))
def test_a_charge_is_what_counting_every_unit_comes_to(price: Prices, units: int) -> None:
    """Exact, for every kind of price, at every edge of a tier."""
    assert price.charge(units) == counted(price, units)


@given(price=prices(), units=st.integers(0, 60), earlier=st.integers(0, 70))
def test_what_is_at_stake_is_what_the_cycle_costs_more(price: Prices, units: int, earlier: int) -> None:
    """On top of what it has: with volume prices that may be less."""
    assert price.at_stake(units, on_top_of=earlier) == counted(price, earlier + units) - counted(
        price, earlier
    )


@given(price=prices(), parts=st.lists(st.integers(0, 20), max_size=6))
def test_stakes_of_parts_add_up(price: Prices, parts: list[int]) -> None:
    """However usage comes in, the stakes of its parts are together what the cycle costs."""
    sums = [sum(parts[:count]) for count in range(len(parts) + 1)]
    stakes = [price.at_stake(other - one, on_top_of=one) for one, other in pairwise(sums)]
    assert sum(stakes, Decimal(0)) == price.charge(sum(parts))


@pytest.mark.parametrize(
    ("tier_type", "amounts"),
    [
        ("tiered", {10: "5", 11: "5.1", 20: "6", 21: "6.01"}),
        ("volume", {10: "5", 11: "1.1", 20: "2", 21: "0.21"}),
        ("stairstep", {10: "0.5", 11: "0.1", 20: "0.1", 21: "0.01"}),
    ],
)
def test_where_a_tier_ends(tier_type: str, amounts: dict[int, str]) -> None:
    """Its last unit belongs to it, the next one does not."""
    tiers = (
        TierSpec(10, Decimal("0.5")),
        TierSpec(20, Decimal("0.1")),
        TierSpec(None, Decimal("0.01")),
    )
    price = Prices(tier_type, None, tiers)
    assert {units: price.charge(units) for units in amounts} == {
        units: Decimal(amount) for units, amount in amounts.items()
    }


def test_less_than_nothing_costs_nothing() -> None:
    """A cycle that was corrected below zero is no debt of ours."""
    assert Prices("flat", Decimal(3)).charge(-5) == 0
    assert Prices("volume", None, (TierSpec(None, Decimal(3)),)).charge(0) == 0


@given(prices())
def test_a_document_is_read_back_as_it_was(price: Prices) -> None:
    """To the last digit, and it is JSON."""
    document = price.document()
    assert Prices.of(document) == price
    texts = [document["unit_amount"], *(amount for _, amount in document["tiers"])]
    assert all(text is None or isinstance(text, str) for text in texts)
