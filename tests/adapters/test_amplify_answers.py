"""Bad answers become the error that says what to do next (style.md 2.11)."""

from datetime import timedelta

import aiohttp
import pytest
from amplify_bench import CENTRAL, NOW, PLATFORM, Bench, a_bench, sample

from billingd.adapters.amplify.encoding import retry_after
from billingd.domain.errors import (
    BillingdError,
    Conflict,
    Misconfigured,
    NotDone,
    NotFound,
    Refused,
    Retryable,
    Unknown,
)

READ = f"{CENTRAL}/apis/catalog/v1/subscriptions/s"
WRITE = f"{CENTRAL}/apis/catalog/v1/subscriptions/s/approval"
DETAIL = '{"errors": [{"status": 400, "title": "Bad", "detail": "spec.plan: is\\n wrong"}]}'


async def failed_read(bench: Bench) -> BillingdError:
    """The error of a read, exactly as typed."""
    with pytest.raises(BillingdError) as caught:
        await bench.amplify.find_subscription("s")
    return caught.value


async def failed_write(bench: Bench) -> BillingdError:
    """The error of a write."""
    with pytest.raises(BillingdError) as caught:
        await bench.amplify.decide("s", "approved", "because")
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "read", "write"),
    [
        (400, DETAIL, Refused, Refused),
        (403, DETAIL, Misconfigured, Misconfigured),
        (408, b"", Retryable, Unknown),
        (409, DETAIL, Conflict, Conflict),
        (422, b"not json", Refused, Refused),
        (428, DETAIL, Conflict, Conflict),
        (429, b"", Retryable, NotDone),
        (500, DETAIL, Retryable, Unknown),
        (502, b"<html>", Retryable, Unknown),
        (503, b"", Retryable, Unknown),
        (504, b"", Retryable, Unknown),
        (200, b"<html>", Retryable, Unknown),
        (200, b"", Retryable, Unknown),
        (200, b'{"a": NaN}', Retryable, Unknown),
        (302, b"", Misconfigured, Misconfigured),
    ],
)
async def test_each_status(
    status: int, body: bytes | str, read: type[BillingdError], write: type[BillingdError]
) -> None:
    """The same answer to a read and to a write; a write whose fate is open says so."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, body, status=status)
        bench.answer("PUT", WRITE, body, status=status)
        assert type(await failed_read(bench)) is read
        assert type(await failed_write(bench)) is write


@pytest.mark.parametrize(
    ("exception", "write"),
    [
        (aiohttp.ServerDisconnectedError(), Unknown),
        (aiohttp.ClientPayloadError("cut"), Unknown),
        (aiohttp.ClientOSError(104, "reset"), Unknown),
        (TimeoutError(), Unknown),
        (aiohttp.SocketTimeoutError(), Unknown),
        (aiohttp.ConnectionTimeoutError(), NotDone),
        (
            aiohttp.ClientConnectorDNSError(
                aiohttp.client_reqrep.ConnectionKey("h", 443, True, True, None, None, None),
                OSError("no name"),
            ),
            NotDone,
        ),
    ],
)
async def test_lost_answers(exception: Exception, write: type[BillingdError]) -> None:
    """A write that never left is not unknown; one whose answer was lost is."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, exception=exception)
        bench.answer("PUT", WRITE, exception=exception)
        assert type(await failed_read(bench)) is Retryable
        error = await failed_write(bench)
        assert type(error) is write
        assert error.__cause__ is None
        assert error.__suppress_context__
        assert "token-1" not in repr(error)


async def test_refusals_carry_amplifys_words() -> None:
    """The operator reads Amplify's own detail, on one line, and the status as a code."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, DETAIL, status=400)
        error = await failed_read(bench)
        assert isinstance(error, Refused)
        assert "spec.plan: is wrong" in str(error)
        assert error.code == "400"


async def test_403_names_the_role() -> None:
    """What is missing is a role of the service account; it differs between Central and the platform."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, DETAIL, status=403)
        assert "Engage Admin" in str(await failed_read(bench))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("7", timedelta(seconds=7)),
        (" 0 ", timedelta(0)),
        ("Mon, 02 Mar 2026 12:00:30 GMT", timedelta(seconds=30)),
        ("Mon, 02 Mar 2026 11:00:00 GMT", timedelta(0)),
        ("Mon, 02 Mar 2026 12:00:30 -0000", timedelta(seconds=30)),
        ("9" * 40, timedelta(days=1)),
        ("soon", None),
        ("-1", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(header: str | None, expected: timedelta | None) -> None:
    """Seconds or a date, never in the past, never beyond a day, never an exception (RFC 9110 10.2.3)."""
    assert retry_after(header, NOW) == expected


async def test_retry_after_is_handed_on() -> None:
    """429 and 503 say when; the outbox obeys."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, status=429, headers={"Retry-After": "17"})
        bench.answer("PUT", WRITE, status=503, headers={"Retry-After": "Mon, 02 Mar 2026 12:01:00 GMT"})
        read, write = await failed_read(bench), await failed_write(bench)
        assert isinstance(read, Retryable)
        assert read.retry_after == timedelta(seconds=17)
        assert isinstance(write, Unknown)
        assert write.retry_after == timedelta(minutes=1)


async def test_readiness_follows_the_latest_call() -> None:
    """Away: an error and the old time. An answer of Amplify's own, even a refusal: reached."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", READ, sample("subscription_pending.json"))
        bench.answer("GET", READ, status=503)
        bench.answer("GET", READ, DETAIL, status=400)
        await bench.amplify.find_subscription("s")
        assert bench.amplify.last_reached_at == NOW
        assert bench.amplify.last_error is None
        bench.now = NOW + timedelta(minutes=5)
        await failed_read(bench)
        assert bench.amplify.last_reached_at == NOW
        assert "503" in str(bench.amplify.last_error)
        await failed_read(bench)
        assert bench.amplify.last_reached_at == bench.now
        assert bench.amplify.last_error is None
        assert [outcome for outcome, _ in bench.seen] == ["ok", "ok", "failed", "refused"]


async def test_a_user() -> None:
    """The guid is the id; the name is put together (amplify.md 7)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{PLATFORM}/api/v1/user/u-guid", sample("user.json"))
        person = await bench.amplify.find_person("u-guid")
        assert person is not None
        assert (person.id, person.name, person.email) == ("u-guid", "Ada Example", "dev@example.com")


@pytest.mark.parametrize("status", [400, 404, 200])
async def test_a_user_who_is_not_there(status: int) -> None:
    """The Platform says 400 and means its `code`; both are checked."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{PLATFORM}/api/v1/user/x", sample("user_missing.json"), status=status)
        assert await bench.amplify.find_person("x") is None


async def test_platform_codes_mean_what_statuses_mean() -> None:
    """A 400 with code 401 renews the token, with 403 hides the user, with 400 is a refusal."""
    url = f"{PLATFORM}/api/v1/user/x"
    async with a_bench() as bench:
        bench.token()
        bench.token("token-2")
        bench.answer("GET", url, '{"success": false, "code": 401, "description": "no"}', status=400)
        bench.answer("GET", url, '{"success": false, "code": 403, "description": "no"}', status=400)
        assert await bench.amplify.find_person("x") is None
        assert bench.sent("GET")[1]["headers"]["Authorization"] == "Bearer token-2"
        bench.answer("GET", url, '{"success": false, "code": 400, "description": "bad id"}', status=400)
        with pytest.raises(Refused, match="bad id"):
            await bench.amplify.find_person("x")
        bench.answer("GET", url, '{"success": false, "code": 404}', status=500)
        with pytest.raises(Retryable):
            await bench.amplify.find_person("x")
        bench.answer("GET", url, '{"success": true}')
        with pytest.raises(BillingdError, match="result is missing"):
            await bench.amplify.find_person("x")


async def test_traceability_404_is_for_an_operator() -> None:
    """An endpoint that is not there is a setting to mend, not traffic that is not there."""
    async with a_bench() as bench:
        bench.token()
        url = f"{CENTRAL}/api/traceability/v1/traceability/summary*"
        bench.answer("GET", url, sample("not_found.json"), status=404)
        with pytest.raises(Misconfigured, match=r"traffic\.source"):
            await bench.amplify.ask_traceability("summary")


async def test_not_found_is_an_error_where_something_must_be_there() -> None:
    """Approving what is gone, listing the quotas of a plan that is gone."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("PUT", WRITE, sample("not_found.json"), status=404)
        bench.answer("GET", f"{CENTRAL}/apis/catalog/v1/subscriptions?pageSize=1", b"[]")
        assert type(await failed_write(bench)) is NotFound
        bench.answer(
            "GET", f"{CENTRAL}/apis/catalog/v1/productplans/p/quotas*", sample("not_found.json"), status=404
        )
        bench.answer("GET", f"{CENTRAL}/apis/catalog/v1/productplans?pageSize=1", b"[]")
        with pytest.raises(NotFound):
            await bench.amplify.list_quotas("p")
