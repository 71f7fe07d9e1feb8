"""Failures are counted for each source, and few sources are remembered."""

from billingd.throttle import ADDRESSES_MAX, FAILURES_MAX, Throttle, source_of


def test_a_source_is_an_address_or_the_network_of_one() -> None:
    """IPv6 senders have a /64 to themselves; what is no address is local."""
    assert source_of("192.0.2.7") == source_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert source_of("2001:db8::1") == source_of("2001:db8::2:3") == "2001:db8::/64"
    assert source_of("fe80::1%eth0") == "fe80::/64"
    assert source_of("::1") == "::/64"
    assert source_of("") == source_of(None) == source_of("nonsense") == "local"


def test_the_throttle_remembers_few_and_forgets_in_time() -> None:
    """Memory does not grow with the number of addresses."""
    at = [0.0]
    throttle = Throttle(lambda: at[0])
    assert all(throttle.failed("one") for _ in range(FAILURES_MAX))
    assert not throttle.failed("one")
    assert throttle.wait_seconds("one") == 1
    at[0] += 1
    assert throttle.failed("one")
    assert not throttle.failed("one")
    for number in range(10_000):
        throttle.failed(str(number))
    assert len(throttle._dry_at) == ADDRESSES_MAX
    assert throttle.failed("one"), "it was forgotten"
