"""The token: one request for many, renewed in time, its refusal said without its secret."""

import asyncio
import base64
from datetime import timedelta

import aiohttp
import pytest
from amplify_bench import CENTRAL, NOW, SECRET, TOKEN_URL, a_bench, sample

from billingd.adapters.amplify.encoding import decode
from billingd.adapters.amplify.token import token_from
from billingd.domain.errors import Misconfigured, NotDone, Retryable

PRODUCTS = f"{CENTRAL}/apis/catalog/v1/products*"


async def test_many_waiters_make_one_request() -> None:
    """However many calls wait for a token, the login is asked once (amplify.md 1.1)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PRODUCTS, b"[]", times=20)
        await asyncio.gather(*(bench.amplify.reach() for _ in range(20)))
        assert [url for _, url, _ in bench.asked].count(TOKEN_URL) == 1
        login = bench.asked[0][2]
        expected = base64.b64encode(f"DOSA_1:{SECRET}".encode()).decode()
        assert login["headers"]["Authorization"] == f"Basic {expected}"
        assert login["data"] == b"grant_type=client_credentials"
        headers = bench.sent("GET")[0]["headers"]
        assert headers["Authorization"] == "Bearer token-1"
        assert headers["X-Axway-Tenant-Id"] == "100000000000001"


async def test_a_waiter_that_gives_up_does_not_take_the_token_along() -> None:
    """Cancelling one waiter leaves the request for the others."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PRODUCTS, b"[]", times=2)
        first, second = (asyncio.create_task(bench.amplify.reach()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        assert [url for _, url, _ in bench.asked].count(TOKEN_URL) == 1


async def test_it_is_renewed_at_four_fifths_of_its_lifetime() -> None:
    """A token of 1800 s serves 1440 s."""
    async with a_bench() as bench:
        bench.token("token-1")
        bench.token("token-2")
        bench.answer("GET", PRODUCTS, b"[]", times=3)
        await bench.amplify.reach()
        bench.now = NOW + timedelta(seconds=1439)
        await bench.amplify.reach()
        bench.now = NOW + timedelta(seconds=1440)
        await bench.amplify.reach()
        tokens = [sent["headers"]["Authorization"] for sent in bench.sent("GET")]
        assert tokens == ["Bearer token-1", "Bearer token-1", "Bearer token-2"]


async def test_a_401_renews_it_once_and_repeats_the_call() -> None:
    """A revoked token costs one more token and one more request, and nothing else."""
    async with a_bench() as bench:
        bench.token("token-1")
        bench.token("token-2")
        bench.answer("GET", PRODUCTS, b"{}", status=401)
        bench.answer("GET", PRODUCTS, b"[]")
        await bench.amplify.reach()
        tokens = [sent["headers"]["Authorization"] for sent in bench.sent("GET")]
        assert tokens == ["Bearer token-1", "Bearer token-2"]
        assert [outcome for outcome, _ in bench.seen] == ["ok", "unauthorized", "ok", "ok"]


async def test_a_second_401_is_misconfigured() -> None:
    """What a fresh token does not mend, a person must."""
    async with a_bench() as bench:
        bench.token(times=2)
        bench.answer("GET", PRODUCTS, b"{}", status=401, times=2)
        with pytest.raises(Misconfigured, match=r"amplify\.client_id"):
            await bench.amplify.reach()
        assert len(bench.sent("GET")) == 2
        assert bench.amplify.last_reached_at is None
        assert "401" in (bench.amplify.last_error or "")


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_refused_credentials_are_named_and_not_shown(status: int) -> None:
    """The error names the keys to mend; it holds neither id nor secret, nor what the login said of them."""
    async with a_bench() as bench:
        body = f'{{"error": "invalid_client", "error_description": "DOSA_1 with {SECRET} is wrong"}}'
        bench.answer("POST", TOKEN_URL, body, status=status)
        with pytest.raises(Misconfigured, match=r"amplify\.client_id / client_secret") as caught:
            await bench.amplify.reach()
        shown = f"{caught.value!r} {bench.amplify.last_error}"
        assert "invalid_client" in shown
        assert SECRET not in shown
        assert "DOSA_1" not in shown
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, b"", Retryable),
        (429, b"", Retryable),
        (404, b"", Misconfigured),
        (200, b"<html>", Retryable),
        (200, b"{}", Misconfigured),
        (200, b"[]", Misconfigured),
    ],
)
async def test_other_answers_of_the_login(status: int, body: bytes, error: type[Exception]) -> None:
    """A login that is away comes back; one that is none wants its URL mended."""
    async with a_bench() as bench:
        bench.answer("POST", TOKEN_URL, body, status=status)
        with pytest.raises(error) as caught:
            await bench.amplify.reach()
        assert type(caught.value) is error


async def test_a_failed_login_fails_the_write_without_doubt() -> None:
    """Without a token nothing was sent: the outcome of a write is not unknown."""
    async with a_bench() as bench:
        bench.answer("POST", TOKEN_URL, exception=aiohttp.ServerDisconnectedError())
        bench.answer("POST", TOKEN_URL, b'{"access_token": "t", "expires_in": 60}')
        bench.answer("PUT", f"{CENTRAL}/apis/catalog/v1/subscriptions/s/approval", b"", status=429)
        with pytest.raises(Retryable) as caught:
            await bench.amplify.decide("s", "approved", "")
        assert type(caught.value) is Retryable
        with pytest.raises(NotDone):  # and the next call asks the login anew
            await bench.amplify.decide("s", "approved", "")


def test_lifetimes() -> None:
    """The recorded answer, one without a lifetime, and one with a silly one."""
    assert token_from(decode(sample("token.json")), NOW).renew_at == NOW + timedelta(minutes=24)
    assert token_from({"access_token": "a"}, NOW).renew_at == NOW + timedelta(minutes=4)
    assert token_from({"access_token": "a", "expires_in": 10**30}, NOW).renew_at < NOW + timedelta(days=1)
    assert "eyJ" not in repr(token_from(decode(sample("token.json")), NOW))
