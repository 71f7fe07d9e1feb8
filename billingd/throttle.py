"""How many failures an address may show before it is answered shortly and no longer logged one by one.

Only failures count, and what carries the right secret is never asked here: nobody, whatever they send and
from wherever, can keep the real sender out, not even from behind the same proxy.
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

FAILURES_MAX: Final = 60
"""How many failures an address may show at once."""

SECONDS_PER_FAILURE: Final = 1.0
"""How soon one more is forgiven."""

ADDRESSES_MAX: Final = 4_096
"""How many addresses are remembered; beyond that the one longest unheard of is forgotten."""


def source_of(peer: str | None) -> str:
    """Whom a failure counts against: an IPv4 address, the /64 of an IPv6 one, or a unix socket's far end."""
    try:
        address = ipaddress.ip_address((peer or "").partition("%")[0])
    except ValueError:
        return "local"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)


class Throttle:
    """One leaking bucket of failures for each source."""

    def __init__(self, elapsed: Callable[[], float]) -> None:
        self._elapsed = elapsed
        self._dry_at: OrderedDict[str, float] = OrderedDict()
        """When each source's bucket will have leaked dry."""

    def failed(self, source: str) -> bool:
        """Count a failure; whether the source is still within what it may show."""
        now = self._elapsed()
        dry = max(self._dry_at.pop(source, now), now)
        within = dry - now < FAILURES_MAX * SECONDS_PER_FAILURE
        self._dry_at[source] = dry + SECONDS_PER_FAILURE if within else dry
        if len(self._dry_at) > ADDRESSES_MAX:
            self._dry_at.popitem(last=False)
        return within

    def wait_seconds(self, source: str) -> int:
        """How long until one more failure of the source is answered as usual, at least a second."""
        excess = self._dry_at.get(source, 0.0) - self._elapsed() - (FAILURES_MAX - 1) * SECONDS_PER_FAILURE
        return max(1, round(excess))
