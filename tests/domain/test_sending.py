"""What to do about a write whose outcome is not known: the protocol as a function of time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.sending import (
    KEY_WINDOW,
    SECOND_LOOK,
    Intent,
    Send,
    Settle,
    Trust,
    after_not_found,
    body_hash,
    idempotency_key,
)

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
SETTLING = timedelta(seconds=60)
ATTEMPT = timedelta(seconds=150)
SECOND = timedelta(seconds=1)
ZERO = timedelta(0)
TRUST = Trust(SETTLING, ATTEMPT)


def intent(
    first: timedelta = ZERO,
    last: timedelta = ZERO,
    *,
    state: str = "open",
    burnt: bool = False,
    gave_up: timedelta | None = None,
    missed: timedelta | None = None,
) -> Intent:
    """First and last sent, given up and missed so long ago, under the third key."""
    return Intent(
        name="w",
        epoch=3,
        state=state,
        sends=5,
        first_sent_at=NOW - first,
        last_sent_at=NOW - last,
        gave_up_at=None if gave_up is None else NOW - gave_up,
        missed_at=None if missed is None else NOW - missed,
        burnt=burnt,
        result=None,
        body_hash="h",
    )


@pytest.mark.parametrize(
    ("known", "step"),
    [
        (None, Send(1, again=False)),
        (intent(), Send(3, again=True)),
        (intent(KEY_WINDOW - SECOND), Send(3, again=True)),
        (intent(state="refused"), Send(4, again=False)),
        (intent(2 * KEY_WINDOW, state="refused"), Send(4, again=False)),
        # forgotten or burnt: the settling time counts from when the sending ended
        (intent(KEY_WINDOW, gave_up=ZERO), Settle(NOW + SETTLING)),
        (intent(KEY_WINDOW, 9 * SETTLING, gave_up=SETTLING - SECOND), Settle(NOW + SECOND)),
        (intent(burnt=True, gave_up=ZERO), Settle(NOW + SETTLING)),
        # the process died with it: it may have run as long as an attempt can
        (intent(KEY_WINDOW, ZERO), Settle(NOW + ATTEMPT + SETTLING)),
        (intent(KEY_WINDOW, ATTEMPT + SETTLING - SECOND), Settle(NOW + SECOND)),
        # settled: this look counts as the first
        (intent(KEY_WINDOW, gave_up=SETTLING), Settle(NOW + SECOND_LOOK, missed=True)),
        (intent(KEY_WINDOW, ATTEMPT + SETTLING), Settle(NOW + SECOND_LOOK, missed=True)),
        (intent(2 * KEY_WINDOW, 2 * KEY_WINDOW), Settle(NOW + SECOND_LOOK, missed=True)),
        (intent(burnt=True, gave_up=SETTLING), Settle(NOW + SECOND_LOOK, missed=True)),
        # a look before it had settled is none
        (
            intent(KEY_WINDOW, gave_up=SETTLING + SECOND, missed=2 * SECOND),
            Settle(NOW + SECOND_LOOK, missed=True),
        ),
        # the second look follows no sooner than its time
        (
            intent(KEY_WINDOW, gave_up=2 * SETTLING, missed=SECOND_LOOK - SECOND),
            Settle(NOW + SECOND),
        ),
        (intent(KEY_WINDOW, gave_up=2 * SETTLING, missed=SECOND_LOOK), Send(4, again=False)),
        (intent(burnt=True, gave_up=2 * SETTLING, missed=SECOND_LOOK), Send(4, again=False)),
    ],
)
def test_the_table(known: Intent | None, step: Send | Settle) -> None:
    """Same key within its window, then settle, then two looks, then a new key."""
    assert after_not_found(known, now=NOW, trust=TRUST) == step


def test_where_keys_are_not_heeded_only_looks_help() -> None:
    """The same key is not sent again, however young it is."""
    trust = replace(TRUST, keys=False)
    assert after_not_found(intent(gave_up=ZERO), now=NOW, trust=trust) == Settle(NOW + SETTLING)
    assert after_not_found(intent(gave_up=2 * SETTLING, missed=SECOND_LOOK), now=NOW, trust=trust) == Send(
        4, again=False
    )
    assert after_not_found(None, now=NOW, trust=trust) == Send(1, again=False)


AGES = st.timedeltas(ZERO, timedelta(days=3))


@given(
    age=AGES,
    since=AGES,
    gave_up=st.none() | AGES,
    missed=st.none() | AGES,
    burnt=st.booleans(),
    keys=st.booleans(),
    state=st.sampled_from(["open", "refused"]),
)
def test_a_new_key_is_never_taken_while_an_old_request_may_run(
    age: timedelta,
    since: timedelta,
    gave_up: timedelta | None,
    missed: timedelta | None,
    burnt: bool,
    keys: bool,
    state: str,
) -> None:
    """Unless it was clearly refused: it had ended, and settled, before the first of two looks."""
    first, last = max(age, since), min(age, since)
    known = intent(first, last, state=state, burnt=burnt, gave_up=gave_up, missed=missed)
    step = after_not_found(known, now=NOW, trust=replace(TRUST, keys=keys))
    ended_at = known.last_sent_at + ATTEMPT if known.gave_up_at is None else known.gave_up_at
    if isinstance(step, Send) and step.epoch != known.epoch and state == "open":
        assert known.missed_at is not None
        assert ended_at + SETTLING <= known.missed_at <= NOW - SECOND_LOOK
        assert burnt or not keys or NOW - known.first_sent_at >= KEY_WINDOW
    if isinstance(step, Send) and step.again:
        assert keys
        assert not known.burnt
        assert NOW - known.first_sent_at < KEY_WINDOW
    if isinstance(step, Settle):
        assert NOW < step.until <= NOW + ATTEMPT + SETTLING
        assert not step.missed or ended_at + SETTLING <= NOW


@pytest.mark.parametrize("gave_up", [ZERO, None])
@pytest.mark.parametrize("burnt", [True, False])
def test_a_write_that_is_never_found_comes_to_a_new_key(gave_up: timedelta | None, burnt: bool) -> None:
    """Whoever waits as told gets there, and looks twice on the way."""
    known, now, looks = intent(gave_up=gave_up, burnt=burnt), NOW, 0
    if not burnt:
        now += KEY_WINDOW
    for _ in range(4):
        step = after_not_found(known, now=now, trust=TRUST)
        if isinstance(step, Send):
            break
        if now >= NOW + SETTLING + (ATTEMPT if gave_up is None else ZERO):
            looks += 1
        if step.missed:
            known = replace(known, missed_at=now)
        now = step.until
    assert step == Send(4, again=False)
    assert looks == 1, "this one, and that which led to the sending"


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
