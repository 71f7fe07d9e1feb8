"""Every way a call can end, on real sockets: what it is taken for, and that the next call works."""

import asyncio
import base64
import traceback
from datetime import timedelta
from typing import Any

import pytest
import structlog
from recurly_far_side import (
    API_KEY,
    HTML,
    NOW,
    Action,
    World,
    error,
    lose,
    message,
    new_usage,
    raw,
    reply,
    reset_after,
    silent,
    trickle,
    usage,
    world,
)

from billingd.adapters.recurly import Recurly
from billingd.adapters.recurly.sockets import PlainConnection
from billingd.domain.errors import (
    BillingdError,
    Illegible,
    Misconfigured,
    NotDone,
    NotFound,
    Refused,
    Retryable,
    Unknown,
)

TIMEOUT = timedelta(seconds=0.15)
PAGE = b"<html><body>502 Bad Gateway</body></html>"
RESET = str(int(NOW.timestamp()) + 40)

CASES: dict[str, tuple[Action, type[BillingdError], type[BillingdError]]] = {
    # name: the far side's doing, what a write makes of it, what a read makes of it
    "lost after it was read": (lose, Unknown, Retryable),
    "reset after it was read": (reset_after, Unknown, Retryable),
    "truncated body": (
        raw(message(201, b'{"id": "u1"', "application/json", {"Content-Length": "900"})),
        Unknown,
        Retryable,
    ),
    "truncated 422": (
        raw(message(422, b'{"error": {"ty', "application/json", {"Content-Length": "900"})),
        Unknown,
        Retryable,
    ),
    "truncated head": (raw(b"HTTP/1.1 20"), Unknown, Retryable),
    "garbage": (raw(b"\x00\xff\x17 what is this\r\n\r\n"), Unknown, Retryable),
    "2xx that is not JSON": (reply(200, PAGE, HTML), Unknown, Illegible),
    "2xx that claims to be JSON": (reply(201, b"{oops"), Unknown, Illegible),
    "2xx with nothing in it": (reply(200), Unknown, Illegible),
    "2xx with a bare null": (reply(201, b"null"), Unknown, Illegible),
    "2xx with a bare list": (reply(201, []), Unknown, Illegible),
    "2xx without an object": (reply(201, {"id": "u1"}), Unknown, Illegible),
    "2xx of another kind": (reply(201, {"object": "plan", "id": "p1", "code": "x"}), Unknown, Illegible),
    "2xx of a kind the SDK does not know": (
        reply(201, {"object": "surprise", "id": "x"}),
        Unknown,
        Illegible,
    ),
    "2xx without an id": (
        reply(201, {"object": "usage", "amount": 1, "merchant_tag": "bd1:t"}),
        Unknown,
        Illegible,
    ),
    "2xx with a fraction of a second": (reply(201, usage(at="2026-11-22T10:59:59.5Z")), Unknown, Illegible),
    "2xx with a PDF": (reply(200, b"%PDF", "application/pdf"), Unknown, Illegible),
    "302 empty": (reply(302, Location="https://elsewhere.example/"), Unknown, Retryable),
    "302 with the right body": (reply(302, usage()), Unknown, Retryable),
    "304": (reply(304), Unknown, Retryable),
    "103": (raw(message(103, b"", "")), Unknown, Retryable),
    "400": (error(400, "validation", params=[{"param": "x"}]), Refused, Retryable),
    "400 without `error`": (reply(400, {"message": "from a gateway"}), Unknown, Retryable),
    "400 with odd `error`": (reply(400, {"error": "no"}), Unknown, Retryable),
    "400 HTML": (reply(400, PAGE, HTML), Unknown, Retryable),
    "401": (error(401, "unauthorized"), Misconfigured, Misconfigured),
    "401 empty": (reply(401), Misconfigured, Misconfigured),
    "402": (reply(402), Misconfigured, Misconfigured),
    "403": (error(403, "invalid_api_key"), Misconfigured, Misconfigured),
    "403 HTML": (reply(403, PAGE, HTML), Misconfigured, Misconfigured),
    "404": (error(404, "not_found", "Couldn't find it"), NotFound, NotFound),
    "404 HTML": (reply(404, PAGE, HTML), Unknown, Retryable),
    "404 empty": (reply(404), Unknown, Retryable),
    "406": (error(406, "invalid_api_version"), Misconfigured, Misconfigured),
    "408": (reply(408), Unknown, Retryable),
    "409 JSON": (error(409, "conflict", Retry_After="7"), Unknown, Retryable),
    "409 HTML": (reply(409, PAGE, HTML, Retry_After="7"), Unknown, Retryable),
    "409 empty": (reply(409, Retry_After="7"), Unknown, Retryable),
    "412": (error(412, "precondition"), Refused, Retryable),
    "422": (error(422, "validation", "Amount is bad"), Refused, Retryable),
    "422 replayed": (error(422, "validation", Idempotency_Prior="true"), Refused, Retryable),
    "422 without a request id": (error(422, "validation", X_Request_Id="none"), Refused, Retryable),
    "422 empty": (reply(422), Unknown, Retryable),
    "422 declined": (error(422, "transaction", "Declined"), Refused, Retryable),
    "422 immutable": (error(422, "immutable_subscription"), Refused, Retryable),
    "422 a change in progress": (error(422, "simultaneous_request"), NotDone, Retryable),
    "422 too soon, replayed": (
        error(422, "validation", "please wait 60 seconds before …", Idempotency_Prior="true"),
        Unknown,
        Retryable,
    ),
    "422 too soon": (error(422, "validation", "please wait 60 seconds before …"), NotDone, Retryable),
    "429": (error(429, "rate_limited", X_RateLimit_Reset=RESET), NotDone, Retryable),
    "429 HTML": (reply(429, PAGE, HTML, Retry_After="40"), NotDone, Retryable),
    "429 empty": (reply(429, X_RateLimit_Reset=RESET), NotDone, Retryable),
    "500": (error(500, "internal_server_error"), Unknown, Retryable),
    "500 without a request id": (
        error(500, "internal_server_error", X_Request_Id="none"),
        Unknown,
        Retryable,
    ),
    "500 that says not_found": (error(500, "not_found"), Unknown, Retryable),
    "502 HTML": (reply(502, PAGE, HTML, X_Request_Id="none"), Unknown, Retryable),
    "503 empty": (reply(503, X_Request_Id="none"), Unknown, Retryable),
    "503 with Retry-After": (reply(503, Retry_After="7"), Unknown, Retryable),
    "504 JSON of a gateway": (reply(504, {"message": "Endpoint request timed out"}), Unknown, Retryable),
    "no answer": (silent, Unknown, Retryable),
    "an answer that never ends": (trickle, Unknown, Retryable),
}


async def works(w: World) -> None:
    """A good write and a good read, as if nothing had been."""
    assert await w.recurly.create_usage(new_usage("bd1:next", 7), key="k-next") == "id-bd1:next"
    found = await w.recurly.find_account("amplify-team-1")
    assert found is not None
    assert found.code == "amplify-team-1"
    assert w.recurly.last_reached_at == NOW
    assert w.recurly.last_error is None


@pytest.mark.parametrize("name", CASES)
async def test_a_write_is_taken_for_what_it_was(name: str) -> None:
    """The error says what to do next, tells no secret, and the next call works."""
    action, expected, _ = CASES[name]
    async with world(timeout=TIMEOUT, threads=1) as w:
        w.far.script.append(action)
        with pytest.raises(BillingdError) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert type(caught.value) is expected, str(caught.value)
        assert len(w.far.requests) == 1  # a write is never repeated by itself
        assert "create usage bd1:t of 1 units of add-on amplify-quota-q" in str(caught.value)
        _tells_no_secret(caught.value)
        await works(w)


@pytest.mark.parametrize("name", CASES)
async def test_a_read_is_taken_for_what_it_was(name: str) -> None:
    """A look-up that fails is not "not found"."""
    action, _, expected = CASES[name]
    async with world(timeout=TIMEOUT, threads=1) as w:
        w.far.script.append(action)
        with pytest.raises(BillingdError) as caught:
            await w.recurly.get_subscription("s1")
        assert isinstance(caught.value, expected), str(caught.value)
        assert not isinstance(caught.value, Unknown)
        assert len(w.far.requests) == 1
        _tells_no_secret(caught.value)
        await works(w)


async def test_not_found_is_none_only_when_recurly_says_so() -> None:
    """`find_…` returns None for Recurly's own 404, and raises on anybody else's."""
    async with world() as w:
        w.far.script.extend([error(404, "not_found"), reply(404, PAGE, HTML)])
        assert await w.recurly.find_plan("p") is None
        with pytest.raises(Retryable):
            await w.recurly.find_plan("p")


async def test_a_refused_connection_is_not_done() -> None:
    """No byte left, so nothing happened; once the far side is back the next call works."""
    async with world() as w:
        await w.far.stop()
        with pytest.raises(NotDone, match="before the request left") as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert "ConnectionRefusedError" in str(caught.value)
        with pytest.raises(Retryable):
            await w.recurly.find_account("a")
        assert w.recurly.last_reached_at is None
        assert "ConnectionRefusedError" in (w.recurly.last_error or "")
        await w.far.start()
        await works(w)


async def test_a_connection_reset_at_once_is_judged_by_whether_a_byte_left() -> None:
    """Which comes first, the request or the reset, is chance; what is said must fit what happened."""
    async with world() as w:
        w.far.slams = 1
        with pytest.raises((Unknown, NotDone)) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert isinstance(caught.value, NotDone) == ("before the request left" in str(caught.value))
        await works(w)


async def test_a_tls_handshake_that_fails_is_not_done() -> None:
    """TLS comes before the first byte of a request."""
    async with world() as w:
        w.far.script.append(raw(b"this is no TLS"))
        secure = Recurly(
            api_key=API_KEY,
            base_url=f"https://127.0.0.1:{w.far.port}",
            region="eu",
            timeout=TIMEOUT,
            requests_per_minute=300,
            threads=1,
        )
        with pytest.raises(NotDone, match="before the request left"):
            await secure.create_usage(new_usage(), key="k1")
        await secure.close(deadline=timedelta(seconds=1))


async def test_an_unsendable_argument_is_refused() -> None:
    """What cannot become a request never will; nothing is sent."""
    async with world() as w:
        for id_, key in (("", "k1"), ("u1", ""), ("u1", "k" * 256), ("u1", "k\r\nX-Evil: 1"), ("u1", "ключ")):
            with pytest.raises(Refused) as caught:
                await w.recurly.remove_usage(id_, key=key)
            assert caught.value.code == "unsendable"
        assert w.far.requests == []
        await works(w)


async def test_a_request_that_was_not_finished_is_not_sent_with_the_next() -> None:
    """http.client keeps its head in a buffer when a header is refused."""
    async with world() as w:
        connection = PlainConnection("127.0.0.1", w.far.port, timeout=1)

        def ask() -> int:
            with pytest.raises(ValueError, match="Invalid header value"):
                connection.request("DELETE", "/usage/u1", headers={"X-Key": "a\r\nb"})
            connection.request("GET", "/accounts/code-a")
            response = connection.getresponse()
            response.read()
            connection.close()
            return response.status

        assert await asyncio.to_thread(ask) == 200
        assert [r.method for r in w.far.requests] == ["GET"]


async def test_a_socket_closed_while_idle_costs_nothing() -> None:
    """A read asks once more, a write takes a fresh socket anyway."""
    async with world(threads=1) as w:
        await works(w)
        w.far.hang_up()
        assert await w.recurly.find_account("a") is not None
        w.far.hang_up()
        assert await w.recurly.create_usage(new_usage(), key="k1") == "id-bd1:t"


async def test_a_read_asks_only_once_more() -> None:
    """A far side that hangs up on every request is away."""
    async with world(threads=1) as w:
        assert await w.recurly.find_account("a") is not None
        w.far.script.extend([lose, lose, lose])
        with pytest.raises(Retryable):
            await w.recurly.find_account("a")
        assert len(w.far.requests) == 3


async def test_each_write_takes_a_fresh_socket() -> None:
    """And reads share one."""
    async with world(threads=1) as w:
        for n in range(3):
            await w.recurly.find_account(f"a{n}")
        assert w.far.connections == 1
        for n in range(3):
            await w.recurly.create_usage(new_usage(), key=f"k{n}")
        assert w.far.connections == 4


@pytest.mark.parametrize("name", ["409 JSON", "409 HTML", "409 empty", "503 with Retry-After"])
async def test_retry_after_is_passed_on(name: str) -> None:
    """Also from answers without a body, which the SDK does not show."""
    async with world() as w:
        w.far.script.append(CASES[name][0])
        with pytest.raises(Unknown) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert caught.value.retry_after == timedelta(seconds=7)
        assert not caught.value.replayed


async def test_retry_after_may_be_a_date() -> None:
    """As HTTP allows, and proxies do."""
    async with world() as w:
        w.far.script.append(reply(503, Retry_After="Sun, 22 Nov 2026 12:00:30 GMT"))
        with pytest.raises(Unknown) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert caught.value.retry_after == timedelta(seconds=30)


@pytest.mark.parametrize(
    "action",
    [
        error(500, "internal_server_error", Idempotency_Prior="true"),
        reply(502, PAGE, HTML, Idempotency_Prior="true"),
        reply(503, Idempotency_Prior="true"),
        reply(201, b"{oops", Idempotency_Prior="true"),
    ],
)
async def test_a_stored_failure_is_marked(action: Action) -> None:
    """The same key would bring the same answer for an hour."""
    async with world() as w:
        w.far.script.append(action)
        with pytest.raises(Unknown, match="stored answer") as caught:
            await w.recurly.create_usage(new_usage(), key="k1", retried=True)
        assert caught.value.replayed
        await works(w)


async def test_a_replayed_success_is_a_success() -> None:
    """That is what the key is for."""
    async with world() as w:
        w.far.script.append(reply(201, usage(id_="u9"), Idempotency_Prior="true"))
        assert await w.recurly.create_usage(new_usage(), key="k1", retried=True) == "u9"
        assert w.recurly.take_doubt() is None


async def test_a_retry_that_is_no_replay_is_noticed() -> None:
    """Perhaps the site ignores the header: said once as a warning, and kept."""
    async with world() as w:
        await w.recurly.create_usage(new_usage(), key="k1")
        assert w.recurly.take_doubt() is None
        with structlog.testing.capture_logs() as logs:
            await w.recurly.create_usage(new_usage(), key="k1", retried=True)
        assert [entry["event"] for entry in logs] == ["recurly.call", "recurly.retry_not_replayed"]
        doubt = w.recurly.take_doubt()
        assert doubt is not None
        assert doubt.startswith("create usage")
        assert w.recurly.take_doubt() is None


async def test_another_records_stored_answer_is_not_ours() -> None:
    """A used key brings back what it was first used for: our record was not made."""
    async with world() as w:
        w.far.script.append(reply(201, usage(tag="bd1:other"), Idempotency_Prior="true"))
        with structlog.testing.capture_logs() as logs, pytest.raises(Unknown) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert caught.value.replayed
        assert [entry["event"] for entry in logs] == ["recurly.call", "recurly.usage_differs"]


async def test_a_record_kept_differently_is_still_done() -> None:
    """Sending it again would bill twice."""
    async with world() as w:
        w.far.script.append(reply(201, usage(tag="bd1:cut", id_="u5")))
        with structlog.testing.capture_logs() as logs:
            assert await w.recurly.create_usage(new_usage(), key="k1") == "u5"
        assert [entry["event"] for entry in logs] == ["recurly.call", "recurly.usage_differs"]


async def test_a_refusal_carries_recurlys_words() -> None:
    """Type, fields, message and request id, for the operator and for the code."""
    params = [{"param": "code", "message": "has already been taken"}, {"param": "name"}]
    async with world() as w:
        w.far.script.append(error(422, "validation", "Code has already been taken", params))
        with pytest.raises(Refused) as caught:
            await w.recurly.create_usage(new_usage(), key="k1")
        assert (caught.value.code, caught.value.params) == ("validation", ("code", "name"))
        assert str(caught.value).endswith(
            "Recurly answered 422 validation: Code has already been taken "
            "(code: has already been taken; name) [request req-1]"
        )


async def test_a_cancelled_write_goes_on() -> None:
    """Its request arrives all the same, its exception is nobody's noise, and its thread serves again."""
    async with world(timeout=TIMEOUT, threads=1) as w:
        w.far.script.append(silent)
        call = asyncio.create_task(w.recurly.create_usage(new_usage(), key="k1"))
        await w.far.asked()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await works(w)
        assert [r.headers["idempotency-key"] for r in w.far.requests[:2]] == ["k1", "k-next"]


async def test_close_finishes_what_is_under_way() -> None:
    """And refuses what comes after."""

    async def slowly(*args: Any) -> bool:
        await asyncio.sleep(0.1)
        return await reply(201, usage())(*args)

    async with world() as w:
        w.far.script.append(slowly)
        call = asyncio.create_task(w.recurly.create_usage(new_usage(), key="k1"))
        await w.far.asked()
        await w.recurly.close(deadline=timedelta(seconds=2))
        assert await call == "u1"
        with pytest.raises(NotDone, match="being closed"):
            await w.recurly.create_usage(new_usage(), key="k2")


async def test_close_does_not_wait_for_ever() -> None:
    """What has no answer at the deadline is unknown, and its thread does not hold up the exit."""
    async with world() as w:
        w.far.script.append(silent)
        call = asyncio.create_task(w.recurly.create_usage(new_usage(), key="k1"))
        await w.far.asked()
        began = asyncio.get_running_loop().time()
        await w.recurly.close(deadline=timedelta(seconds=0.1))
        assert asyncio.get_running_loop().time() - began < 1
        with pytest.raises(Unknown):
            await call


async def test_many_calls_over_few_threads() -> None:
    """Everyone gets their own answer."""

    async def one(w: World, n: int) -> None:
        if n % 2:
            assert await w.recurly.create_usage(new_usage(f"bd1:{n}", n), key=f"k{n}") == f"id-bd1:{n}"
        else:
            found = await w.recurly.find_account(f"a{n}")
            assert found is not None
            assert found.code == f"a{n}"

    async with world(threads=8) as w:
        await asyncio.gather(*(one(w, n) for n in range(400)))
        assert len(w.far.requests) == 400
        assert [outcome for outcome, _ in w.observed] == ["ok"] * 400


async def test_many_calls_to_a_far_side_in_trouble() -> None:
    """Some answers are lost on the way: exactly those are unknown, all others right."""
    trouble = [action for name, (action, _, _) in CASES.items() if action not in (silent, trickle)][:12]
    async with world(threads=8) as w:
        w.far.script.extend(trouble)
        calls = (w.recurly.create_usage(new_usage(f"bd1:{n}", n), key=f"k{n}") for n in range(1, 201))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(r, Unknown) for r in results) == len(trouble)
        assert all(r == f"id-bd1:{n}" for n, r in enumerate(results, 1) if isinstance(r, str))
        await works(w)


async def test_outcomes_are_observed() -> None:
    """One word per request, for the metrics."""
    async with world() as w:
        w.far.script.extend([error(422, "simultaneous_request"), error(404, "not_found"), lose])
        for _ in range(3):
            with pytest.raises(BillingdError):
                await w.recurly.create_usage(new_usage(), key="k1")
        await w.recurly.reach()
        assert [outcome for outcome, _ in w.observed] == ["not_done", "not_found", "unknown", "ok"]


async def test_being_locked_out_is_not_being_reached() -> None:
    """For readiness: wrong credentials are an error, a refused payload is not."""
    async with world() as w:
        w.far.script.extend([error(401, "unauthorized"), error(422, "validation")])
        with pytest.raises(Misconfigured):
            await w.recurly.reach()
        assert w.recurly.last_reached_at is None
        assert "401" in (w.recurly.last_error or "")
        with pytest.raises(Refused):
            await w.recurly.create_usage(new_usage(), key="k1")
        assert w.recurly.last_reached_at == NOW
        assert w.recurly.last_error is None


def _tells_no_secret(error: BaseException) -> None:
    """Neither in its text nor in the local variables that a traceback with locals would print."""
    basic = base64.b64encode(f"{API_KEY}:".encode()).decode()
    stack = traceback.TracebackException.from_exception(error, capture_locals=True).stack
    ours = [frame for frame in stack if "/billingd/" in frame.filename]
    assert ours
    shown = str(error) + "".join(str(frame.locals) for frame in ours)
    assert not any(secret in shown for secret in (basic, API_KEY, "Authorization"))
    assert error.__cause__ is None
    assert error.__context__ is None
