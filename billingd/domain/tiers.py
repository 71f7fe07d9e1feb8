"""Amplify tiers -> Recurly tiers, and why some have no equivalent. Bounds are whole units, inclusive."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from typing import Final, Literal

from billingd.domain.catalog import UNLIMITED_TO, Graduated, Loose, Tier, Volume
from billingd.domain.money import AMOUNT_MAX, Limit, amount_fault, plain, shown

TierType = Literal["flat", "tiered", "volume", "stairstep"]

ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class TierSpec:
    """Up to `ending_quantity` inclusive (None: the open last tier) at `amount`.

    `amount` is per unit for tiered and volume, per range reached for stairstep.
    """

    ending_quantity: int | None
    amount: Decimal


def tier_faults(pricing: Graduated | Volume, limit: Limit) -> Iterator[str]:
    """Why Recurly has no add-on that charges these tiers exactly (recurly.md 8): clauses, one per fault."""
    tiers = pricing.tiers
    yield from _bound_faults(tiers)
    amounts_fit = True
    for number, tier in enumerate(tiers, 1):
        for what, amount in (("unit price", tier.cost), ("flat fee", tier.flat_fee)):
            if fault := amount_fault(f"the {what} of tier {number}", amount, limit):
                amounts_fit = False
                yield fault
    yield from _mixture_faults(tiers)
    if isinstance(pricing, Graduated) and amounts_fit and _by_fee(tiers):
        for number, total in enumerate(accumulate(tier.flat_fee for tier in tiers), 1):
            if total > AMOUNT_MAX:
                yield (
                    f"the flat fees up to tier {number} add up to {shown(total)}, "
                    f"above Recurly's limit of {AMOUNT_MAX}. Lower them."
                )
                break


def translate_tiers(pricing: Graduated | Volume) -> tuple[TierType, tuple[TierSpec, ...]]:
    """Tiers without faults as Recurly's: by unit price as they are, by flat fee as stairstep.

    Amplify's graduated pricing charges the flat fee of every tier reached (amplify.md 3.3), a stairstep only
    that of the range reached, so graduated fees are summed up.
    """
    tiers = pricing.tiers
    ends = [*(tier.to for tier in tiers[:-1]), None]
    if not _by_fee(tiers):
        tier_type: TierType = "tiered" if isinstance(pricing, Graduated) else "volume"
        return tier_type, _specs(ends, [tier.cost for tier in tiers])
    fees = [tier.flat_fee for tier in tiers]
    return "stairstep", _specs(ends, list(accumulate(fees)) if isinstance(pricing, Graduated) else fees)


def loose_faults(pricing: Loose, overage: Decimal, interval: str | None, limit: Limit) -> Iterator[str]:
    """Why a loose limit with an overage price does not fit: clauses; `interval` is the plan's if known."""
    if interval is not None and pricing.interval != interval:
        yield (
            f'its limit starts anew "{pricing.interval}" while the plan is billed "{interval}", '
            f'and Recurly\'s tiers start anew with each bill. Set the interval of the limit to "{interval}".'
        )
    if pricing.limit < 1:
        yield f"its limit of {pricing.limit} is below 1. Price the quota per unit."
    if pricing.limit >= UNLIMITED_TO:
        yield (
            f"its limit of {pricing.limit} leaves no unit to charge for, as Recurly's tiers end at "
            f"{UNLIMITED_TO}. Make the quota unlimited."
        )
    if fault := amount_fault("its overage price", overage, limit):
        yield fault


def translate_loose(pricing: Loose, overage: Decimal) -> tuple[TierSpec, ...]:
    """A loose limit without faults as `tiered` (recurly.md 8): `limit` units at 0, more at `overage`."""
    return _specs([pricing.limit, None], [ZERO, overage])


def _by_fee(tiers: tuple[Tier, ...]) -> bool:
    """Whether the tiers are priced by flat fee alone."""
    return all(tier.cost.is_zero() for tier in tiers) and any(not tier.flat_fee.is_zero() for tier in tiers)


def _specs(ends: list[int | None], amounts: list[Decimal]) -> tuple[TierSpec, ...]:
    return tuple(TierSpec(end, plain(amount)) for end, amount in zip(ends, amounts, strict=True))


def _bound_faults(tiers: tuple[Tier, ...]) -> Iterator[str]:
    """Gaps, overlaps and ends that Recurly's tiers cannot have; Amplify's schema checks none of them."""
    if not tiers:
        yield "it has no tier. Give it at least one."
        return
    if tiers[0].from_ not in (0, 1):
        yield (
            f"tier 1 starts at unit {tiers[0].from_}, so nothing says what the units before it cost. "
            "Start it at 1."
        )
    for number, tier in enumerate(tiers, 1):
        if number > 1 and tier.from_ != (start := tiers[number - 2].to + 1):
            yield (
                f"tier {number} starts at unit {tier.from_}, but tier {number - 1} ends at {start - 1}. "
                f"Start it at {start}."
            )
        if tier.to < max(tier.from_, 1):
            yield f"tier {number} runs from {tier.from_} to {tier.to} and holds no unit. Mend its bounds."
        if tier.to > UNLIMITED_TO:
            yield (
                f"tier {number} ends at unit {tier.to}, above Recurly's limit of {UNLIMITED_TO}. "
                f"End it at {UNLIMITED_TO} (unlimited)."
            )
    if tiers[-1].to < UNLIMITED_TO:
        yield (
            f"tier {len(tiers)} is the last and ends at unit {tiers[-1].to}; "
            f"Recurly's last tier is always open. Let it end at {UNLIMITED_TO} (unlimited)."
        )


def _mixture_faults(tiers: tuple[Tier, ...]) -> Iterator[str]:
    """Unit prices beside flat fees, in one tier or in several."""
    priced = [number for number, tier in enumerate(tiers, 1) if not tier.cost.is_zero()]
    charged = [number for number, tier in enumerate(tiers, 1) if not tier.flat_fee.is_zero()]
    both = sorted(set(priced) & set(charged))
    for number in both:
        tier = tiers[number - 1]
        yield (
            f"tier {number} has unit price {shown(tier.cost)} and flat fee {shown(tier.flat_fee)}; "
            "Recurly has no tier with both. Price the tier by one of the two."
        )
    if priced and charged and not both:
        cost, fee = shown(tiers[priced[0] - 1].cost), shown(tiers[charged[0] - 1].flat_fee)
        yield (
            f"tier {priced[0]} has unit price {cost} while tier {charged[0]} has flat fee {fee}; "
            "Recurly has no add-on with both. Price all tiers by one of the two."
        )
