"""What Recurly would charge for a quantity: pure arithmetic, rounded once per invoice line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Final, Literal

TierType = Literal["flat", "tiered", "volume", "stairstep"]

UNBOUNDED: Final = 999_999_999
"""`ending_quantity` that says the same as none at all."""

# fmt: off
WITHOUT_MINOR_UNIT: Final = frozenset({
    "BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV",
    "XAF", "XOF", "XPF",
})
# fmt: on
"""ISO 4217 currencies of whole units only."""


@dataclass(frozen=True, slots=True)
class Tier:
    """Up to `ending_quantity` inclusive (None or 999999999: the open last tier) at `amount`."""

    ending_quantity: int | None
    amount: Decimal

    def end(self, quantity: int) -> int:
        """Where this tier ends for a total of `quantity` units: the last one never does."""
        open_ended = self.ending_quantity is None or self.ending_quantity >= UNBOUNDED
        return quantity if open_ended else min(quantity, self.ending_quantity or 0)


@dataclass(frozen=True, slots=True)
class AddOnPrice:
    """The price of one add-on in one currency: `unit_amount` for flat, `tiers` for the others."""

    tier_type: TierType
    unit_amount: Decimal | None = None
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        if (self.tier_type == "flat") != (self.unit_amount is not None and not self.tiers):
            raise ValueError("a flat price has a unit amount and no tiers, the others have tiers only")


def charge(add_on: AddOnPrice, quantity: int, already: int = 0) -> Decimal:
    """What `quantity` more units cost after `already` billed ones of the same cycle; exact, not rounded.

    Corrections are charged "at the tiers already billed for that period" (usage-based billing guide,
    "Usage corrections"): the difference of two totals. Recurly refuses them for volume and stairstep.
    """
    return _total(add_on, already + quantity) - _total(add_on, already)


def round_line(amount: Decimal, currency: str) -> Decimal:
    """One line's amount in the currency's minor unit, half up ($10.505 is $10.51).

    Three-decimal currencies (KWD, BHD, ...) too are rounded to hundredths: Recurly documents "the standard
    hundredths place" and nothing finer, and the coarser one is what billingd must be ready for.
    """
    step = Decimal(1) if currency in WITHOUT_MINOR_UNIT else Decimal("0.01")
    return amount.quantize(step, rounding=ROUND_HALF_UP)


def _total(add_on: AddOnPrice, quantity: int) -> Decimal:
    return _TOTALS[add_on.tier_type](add_on, quantity)


def _flat(add_on: AddOnPrice, quantity: int) -> Decimal:
    assert add_on.unit_amount is not None
    return quantity * add_on.unit_amount


def _tiered(add_on: AddOnPrice, quantity: int) -> Decimal:
    """Each unit at its own tier's price; a net-negative sum is credited at the first tier's."""
    if quantity < 0:
        return quantity * add_on.tiers[0].amount
    total, start = Decimal(0), 0
    for tier in add_on.tiers:
        end = tier.end(quantity)
        total += max(0, end - start) * tier.amount
        start = max(start, end)
    return total


def _volume(add_on: AddOnPrice, quantity: int) -> Decimal:
    """All units at the price of the tier reached."""
    return quantity * _reached(add_on, quantity).amount


def _stairstep(add_on: AddOnPrice, quantity: int) -> Decimal:
    """One amount for the range reached; nothing at zero units, which Recurly does not document."""
    return _reached(add_on, quantity).amount if quantity > 0 else Decimal(0)


def _reached(add_on: AddOnPrice, quantity: int) -> Tier:
    return next(tier for tier in add_on.tiers if quantity <= tier.end(quantity))


_TOTALS: Final[Mapping[str, Callable[[AddOnPrice, int], Decimal]]] = {
    "flat": _flat,
    "tiered": _tiered,
    "volume": _volume,
    "stairstep": _stairstep,
}
