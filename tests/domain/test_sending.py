"""What to do about a write whose outcome is not known: the protocol as a function of time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.sending import (
    KEY_WINDOW,
    Intent,
    Send,
    Settle,
    after_not_found,
    body_hash,
    idempotency_key,
)

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
SETTLING = timedelta(seconds=60)
SECOND = timedelta(seconds=1)
ZERO = timedelta(0)


def intent(
    first: timedelta = ZERO, last: timedelta = ZERO, *, state: str = "open", burnt: bool = False
) -> Intent:
    """First and last sent so long ago, under the third key."""
    return Intent("w", 3, state, NOW - first, NOW - last, burnt, None, "h")


@pytest.mark.parametrize(
    ("known", "step"),
    [
        (None, Send(1, again=False)),
        (intent(), Send(3, again=True)),
        (intent(KEY_WINDOW - SECOND), Send(3, again=True)),
        (intent(KEY_WINDOW), Settle(NOW + SETTLING)),
        (intent(KEY_WINDOW, SETTLING - SECOND), Settle(NOW + SECOND)),
        (intent(KEY_WINDOW, SETTLING), Send(4, again=False)),
        (intent(2 * KEY_WINDOW, 2 * KEY_WINDOW), Send(4, again=False)),
        (intent(burnt=True), Settle(NOW + SETTLING)),
        (intent(SETTLING, SETTLING, burnt=True), Send(4, again=False)),
        (intent(state="refused"), Send(4, again=False)),
        (intent(2 * KEY_WINDOW, state="refused"), Send(4, again=False)),
    ],
)
def test_the_table(known: Intent | None, step: Send | Settle) -> None:
    """Same key within its window, then settle, then a new key; burnt and refused keys are not used again."""
    assert after_not_found(known, now=NOW, settling=SETTLING) == step


@given(
    age=st.timedeltas(ZERO, timedelta(days=3)),
    since=st.timedeltas(ZERO, timedelta(days=3)),
    burnt=st.booleans(),
    state=st.sampled_from(["open", "refused"]),
)
def test_a_new_key_is_never_taken_while_an_old_request_may_run(
    age: timedelta, since: timedelta, burnt: bool, state: str
) -> None:
    """Unless it was clearly refused, the last request lies at least the settling time back."""
    known = intent(max(age, since), min(age, since), state=state, burnt=burnt)
    step = after_not_found(known, now=NOW, settling=SETTLING)
    if isinstance(step, Send) and step.epoch != known.epoch and state == "open":
        assert NOW - known.last_sent_at >= SETTLING
        assert burnt or NOW - known.first_sent_at >= KEY_WINDOW
    if isinstance(step, Send) and step.again:
        assert not known.burnt
        assert NOW - known.first_sent_at < KEY_WINDOW
    if isinstance(step, Settle):
        assert NOW < step.until <= NOW + SETTLING


def test_the_window_of_a_key_is_below_recurlys_hour() -> None:
    """With a margin for two clocks."""
    assert timedelta(minutes=30) <= KEY_WINDOW <= timedelta(minutes=55)


def test_a_key_belongs_to_one_write_one_epoch_and_one_body() -> None:
    """Anything else is another key; the same is the same in every process."""
    keys = {idempotency_key(name, epoch, body) for name in "ab" for epoch in (1, 2) for body in "xy"}
    assert len(keys) == 8
    assert idempotency_key("usage:bd1:x", 1, "h") == "bd1-5567fe05f7f838a0ddcfae94eac7ccbccf18d7401d59d713"
    assert all(len(key) <= 64 and key.isascii() for key in keys)


def test_a_body_is_known_by_what_it_says_not_by_its_order() -> None:
    """Also with values that are no JSON of their own."""
    assert body_hash({"a": 1, "b": 2}) == body_hash({"b": 2, "a": 1}) != body_hash({"a": 1, "b": 3})
    assert body_hash({"at": NOW}) != body_hash({"at": NOW + SECOND})


def test_an_intent_is_a_value() -> None:
    """Nobody changes what is known in passing."""
    with pytest.raises(AttributeError):
        intent().epoch = 4  # type: ignore[misc]
    assert replace(intent(), epoch=4).epoch == 4
