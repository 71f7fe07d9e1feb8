"""The life of an action: the state table as data, verdicts, waits."""

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.attempts import (
    NEXT,
    UNFINISHED,
    Patience,
    State,
    Verdict,
    Wait,
    backoff,
    describe,
    judge,
)
from billingd.domain.errors import (
    BillingdError,
    Conflict,
    Misconfigured,
    NotFound,
    Permanent,
    Refused,
    Retryable,
    Settling,
    Unknown,
)
from billingd.domain.privacy import KNOWN

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
PATIENCE = Patience(attempts_max=5, backoff=timedelta(seconds=2), backoff_max=timedelta(minutes=10))


def judged(outcome: Wait | BaseException | None, attempt: int = 1, patience: Patience = PATIENCE) -> Verdict:
    return judge(attempt, outcome, now=NOW, patience=patience, rng=Random(7))


def test_every_state_says_where_it_leads() -> None:
    """The table is total, and every state can be reached from the first."""
    assert set(NEXT) == set(State)
    reached, seen = {State.PENDING}, set[State]()
    while reached - seen:
        state = (reached - seen).pop()
        seen.add(state)
        reached |= NEXT[state]
    assert reached == set(State)


def test_what_is_finished_stays_finished() -> None:
    """Done and discarded lead nowhere; a dead one only where a person sends it; the others can still end."""
    assert {state for state in State if not NEXT[state]} == {State.DONE, State.DISCARDED}
    assert NEXT[State.DEAD] == {State.PENDING, State.DISCARDED}
    assert set(UNFINISHED) == {state for state in State if State.LEASED in NEXT[state]}


@pytest.mark.parametrize(
    ("outcome", "attempt", "state", "waited"),
    [
        (None, 1, State.DONE, False),
        (None, 99, State.DONE, False),
        (Wait(timedelta(minutes=1), "later"), 1, State.PENDING, True),
        (Wait(timedelta(minutes=1), "later"), 99, State.PENDING, True),
        (Retryable("x"), 4, State.PENDING, False),
        (Retryable("x"), 5, State.DEAD, False),
        (Unknown("x"), 1, State.PENDING, False),
        (Settling("x", retry_after=timedelta(minutes=1)), 99, State.PENDING, False),
        (Misconfigured("x"), 1, State.PENDING, False),
        (Permanent("x"), 1, State.DEAD, False),
        (Refused("x"), 1, State.DEAD, False),
        (NotFound("x"), 1, State.DEAD, False),
        (Conflict("x"), 1, State.PENDING, False),
        (KeyError("x"), 1, State.PENDING, False),
        (KeyError("x"), 5, State.DEAD, False),
        (MemoryError(), 1, State.PENDING, False),
    ],
)
def test_verdicts(outcome: Wait | BaseException | None, attempt: int, state: State, waited: bool) -> None:
    """What each kind of outcome means at each attempt; whatever is not done says why."""
    verdict = judged(outcome, attempt)
    assert (verdict.state, verdict.waited) == (state, waited)
    assert verdict.state in NEXT[State.LEASED]
    assert (verdict.error is None) is (outcome is None)
    if verdict.state is State.PENDING:
        assert verdict.due_at > NOW


def test_a_wait_is_as_long_as_it_says_and_gives_its_reason() -> None:
    """To the second, whatever the patience."""
    verdict = judged(Wait(timedelta(seconds=61), "one a minute"))
    assert (verdict.due_at - NOW, verdict.error) == (timedelta(seconds=61), "one a minute")


def test_the_far_sides_wish_lengthens_a_wait_and_never_shortens_it() -> None:
    """Retry-After against the backoff: the longer of the two."""
    assert judged(Retryable("x", retry_after=timedelta(hours=1))).due_at == NOW + timedelta(hours=1)
    assert judged(Retryable("x", retry_after=timedelta(0))) == judged(Retryable("x"))


@given(
    attempt=st.integers(1, 10_000),
    seed=st.integers(),
    first=st.timedeltas(timedelta(milliseconds=1), timedelta(minutes=1)),
    most=st.timedeltas(timedelta(milliseconds=1), timedelta(days=1)),
)
def test_the_backoff_doubles_up_to_its_bound_with_jitter(
    attempt: int, seed: int, first: timedelta, most: timedelta
) -> None:
    """Between half of and the whole of the doubled wait, never above the bound, never zero."""
    wait = backoff(attempt, Patience(12, first, most), Random(seed))
    whole = min(first * 2 ** min(attempt - 1, 60), most) if attempt < 40 else most
    assert whole / 2 - timedelta(microseconds=1) <= wait <= whole
    assert wait > timedelta(0) or whole < timedelta(microseconds=2)


def test_the_jitter_spreads() -> None:
    """A thousand actions that failed together do not come back together."""
    rng = Random(1)
    assert len({backoff(5, PATIENCE, rng) for _ in range(1000)}) > 900


@given(st.text(max_size=5000))
def test_an_error_can_always_be_kept(text: str) -> None:
    """Its class first, bounded, and nothing in it that a database refuses."""
    told = describe(ValueError(text))
    assert told.startswith("ValueError: ")
    assert len(told) <= 2000
    assert "\x00" not in told
    told.encode()


@pytest.mark.parametrize("quoted", ["s3cret-api-key", "s3cret%2Fhook", "czNjcmV0LWFwaS1rZXk6"])
def test_no_error_that_is_kept_or_shown_has_a_secret(quoted: str) -> None:
    """Whoever quoted it: in a URL, or as it was sent; not even the half that a long text is cut in."""
    KNOWN.add(["s3cret-api-key", "s3cret/hook"])
    for error in (ValueError(f"403: {quoted} may not"), Refused(f"403: {quoted} may not")):
        assert describe(error).endswith(": 403: [hidden] may not")
    assert f"{BillingdError(f'403: {quoted}')}" == "403: [hidden]"
    assert quoted[:6] not in describe(ValueError("." * (2000 - len("ValueError: ") - 6) + quoted))
