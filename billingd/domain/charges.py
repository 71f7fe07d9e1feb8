"""What Recurly charges for usage, so that held units have a price: money at stake is a difference of two."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Self

from billingd.domain.tiers import ZERO, TierSpec


@dataclass(frozen=True, slots=True)
class Prices:
    """An add-on's prices: `unit_amount` for flat, `tiers` for the others."""

    tier_type: str
    unit_amount: Decimal | None = None
    tiers: tuple[TierSpec, ...] = ()

    def charge(self, units: int) -> Decimal:
        """What so many units of one billing cycle cost, unrounded (recurly.md 4.4).

        tiered: each unit at its own tier's price; volume: all at that of the tier reached; stairstep: one
        amount for the range reached. Nothing used costs nothing.
        """
        if units <= 0:
            return ZERO
        if self.tier_type == "flat":
            return units * (self.unit_amount or ZERO)
        if self.tier_type == "tiered":
            return self._each_at_its_own(units)
        reached = next(
            (tier for tier in self.tiers if tier.ending_quantity is None or units <= tier.ending_quantity),
            self.tiers[-1],
        )
        return reached.amount if self.tier_type == "stairstep" else units * reached.amount

    def at_stake(self, units: int, *, on_top_of: int) -> Decimal:
        """How much more a cycle would cost with `units` on top of those it has; negative when less."""
        return self.charge(on_top_of + units) - self.charge(on_top_of)

    def document(self) -> dict[str, Any]:
        """JSON-able, amounts as text."""
        amount = None if self.unit_amount is None else str(self.unit_amount)
        tiers = [[tier.ending_quantity, str(tier.amount)] for tier in self.tiers]
        return {"tier_type": self.tier_type, "unit_amount": amount, "tiers": tiers}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """What `document` wrote."""
        amount = document["unit_amount"]
        return cls(
            document["tier_type"],
            None if amount is None else Decimal(amount),
            tuple(TierSpec(end, Decimal(text)) for end, text in document["tiers"]),
        )

    def _each_at_its_own(self, units: int) -> Decimal:
        total, below = ZERO, 0
        for tier in self.tiers:
            upto = units if tier.ending_quantity is None else min(units, tier.ending_quantity)
            total += max(0, upto - below) * tier.amount
            below = max(below, upto)
        return total
