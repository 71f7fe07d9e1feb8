"""Usage at Recurly that billingd did not tell: another program's, or a person's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from billingd.domain.billing import BilledUsage
from billingd.domain.usage import TAG_PREFIX, corrected_tag, pair_hash, parse_tag


@dataclass(frozen=True, slots=True)
class ByWhom:
    """All usage of a subscription: `ours_from` is where the first window of any of ours begins."""

    ours_from: datetime | None
    others: tuple[BilledUsage, ...]


def untagged(there: Iterable[BilledUsage]) -> tuple[BilledUsage, ...]:
    """What carries no tag of billingd's."""
    return tuple(one for one in there if not (one.merchant_tag or "").startswith(TAG_PREFIX))


def by_whom(
    subscription_id: str, quotas: Mapping[str, str], found: Mapping[str, Iterable[BilledUsage]]
) -> ByWhom:
    """Tell apart what Recurly holds, by add-on code; `quotas`: the quota of each add-on."""
    begun: list[datetime] = []
    others: list[BilledUsage] = []
    for code, there in found.items():
        pair = pair_hash(subscription_id, quotas[code])
        for one in there:
            tag = one.merchant_tag or ""
            said = parse_tag(corrected_tag(tag) or tag)
            if said is None or said.pair_hash != pair:
                others.append(one)
            else:
                begun.append(said.window.start)
    return ByWhom(min(begun, default=None), tuple(others))
