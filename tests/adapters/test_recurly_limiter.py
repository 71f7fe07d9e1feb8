"""Requests per minute: bursts, pace, and what Recurly's own headers do to it. Nobody sleeps."""

import asyncio
from datetime import timedelta

import pytest
from recurly_far_side import NOW, FakeTime, error, new_usage, reply, usage, world

from billingd.adapters.recurly.limiter import Limiter
from billingd.domain.errors import NotDone


def limiter(time: FakeTime, per_minute: int = 60) -> Limiter:
    return Limiter(
        requests_per_minute=per_minute, low=8, clock=lambda: NOW, monotonic=time.monotonic, sleep=time.sleep
    )


def reset_in(seconds: int) -> str:
    return str(int(NOW.timestamp()) + seconds)


async def test_a_minutes_worth_goes_at_once_then_an_even_pace() -> None:
    """60 a minute: 60 now, then one a second."""
    time = FakeTime()
    limit = limiter(time)
    for _ in range(60):
        await limit.turn()
    assert time.slept == []
    for _ in range(30):
        await limit.turn()
    assert time.slept == pytest.approx([1.0] * 30)


async def test_a_rest_gives_the_burst_back() -> None:
    """But never more than a minute's worth."""
    time = FakeTime()
    limit = limiter(time)
    for _ in range(60):
        await limit.turn()
    time.now += 3600
    for _ in range(61):
        await limit.turn()
    assert time.slept == pytest.approx([1.0])


async def test_waiters_are_served_in_turn() -> None:
    """Each has its own second, however many wait together."""
    time = FakeTime()
    limit = limiter(time)
    for _ in range(60):
        await limit.turn()
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    limit._sleep = sleep
    await asyncio.gather(*(limit.turn() for _ in range(5)))
    assert waits == pytest.approx([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"x-ratelimit-reset": reset_in(40)}, 40),
        ({"retry-after": "7", "x-ratelimit-reset": reset_in(40)}, 7),
        ({"x-ratelimit-reset": reset_in(-100)}, 1),
        ({"x-ratelimit-reset": "soon"}, 1),
        ({}, 1),
    ],
)
async def test_a_429_holds_everyone(headers: dict[str, str], wait: float) -> None:
    """Until the limit is whole again; without a usable word on when, a second, then two, then four."""
    time = FakeTime()
    limit = limiter(time)
    limit.heed(429, headers)
    await asyncio.gather(limit.turn(), limit.turn())
    assert time.now == pytest.approx(1000 + wait)


async def test_429s_without_a_word_back_off() -> None:
    """Up to a minute, and from the start again once it works."""
    time = FakeTime()
    limit = limiter(time, per_minute=10_000)
    for _ in range(9):
        limit.heed(429, {})
        await limit.turn()
    assert time.slept == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])
    limit.heed(200, {})
    limit.heed(429, {})
    await limit.turn()
    assert time.slept[-1] == pytest.approx(1)


async def test_a_wait_of_minutes_is_said_not_slept() -> None:
    """An attempt comes back later instead of holding a worker."""
    time = FakeTime()
    limit = limiter(time)
    limit.heed(429, {"x-ratelimit-reset": reset_in(86_400)})
    with pytest.raises(NotDone) as caught:
        await limit.turn()
    assert caught.value.retry_after == timedelta(seconds=300)  # Recurly's window is not longer
    assert time.slept == []


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"x-ratelimit-remaining": "500", "x-ratelimit-reset": reset_in(20)}, 0),
        ({"x-ratelimit-remaining": "9", "x-ratelimit-reset": reset_in(20)}, 0),
        ({"x-ratelimit-remaining": "8", "x-ratelimit-reset": reset_in(20)}, 20),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset_in(280)}, 30),
        ({"x-ratelimit-remaining": "8", "x-ratelimit-limit": "20", "x-ratelimit-reset": reset_in(20)}, 0),
        ({"x-ratelimit-remaining": "-1", "x-ratelimit-reset": reset_in(20)}, 0),
        ({"x-ratelimit-remaining": "²", "x-ratelimit-reset": reset_in(20)}, 0),
        ({"x-ratelimit-remaining": "0"}, 0),
    ],
)
async def test_a_limit_that_runs_low_slows_down(headers: dict[str, str], wait: float) -> None:
    """Before there is a 429; half a minute at most, since the window slides."""
    time = FakeTime()
    limit = limiter(time)
    limit.heed(200, headers)
    await limit.turn()
    assert time.now == pytest.approx(1000 + wait)


def test_a_limit_of_nothing_is_refused() -> None:
    """It would never send anything."""
    with pytest.raises(ValueError, match="at least 1"):
        limiter(FakeTime(), per_minute=0)


async def test_a_429_of_one_call_holds_the_others() -> None:
    """One limiter for all threads, learning from every answer, lists' pages too."""
    async with world(threads=4) as w:
        w.far.script.append(error(429, "rate_limited", X_RateLimit_Reset=reset_in(40)))
        with pytest.raises(NotDone) as caught:
            await w.recurly.list_subscriptions("a")
        assert caught.value.retry_after == timedelta(seconds=40)
        await asyncio.gather(*(w.recurly.find_account("a") for _ in range(4)))
        assert w.time.now == pytest.approx(1040)


async def test_absurd_headers_do_not_spoil_a_write() -> None:
    """The SDK would raise on them, after the write has taken effect."""
    async with world() as w:
        odd = {"X_RateLimit_Reset": "9" * 30, "X_RateLimit_Remaining": "²", "Recurly_Total_Records": "²"}
        w.far.script.append(reply(201, usage(), **odd))
        assert await w.recurly.create_usage(new_usage(), key="k1") == "u1"


async def test_the_limit_is_kept_across_threads() -> None:
    """70 calls at 60 a minute over 8 threads: ten of them have to wait for their second."""
    async with world(threads=8, requests_per_minute=60) as w:
        await asyncio.gather(*(w.recurly.find_account(f"a{n}") for n in range(70)))
        assert w.time.now >= 1000 + 10 - 1e-6
        assert len(w.far.requests) == 70
