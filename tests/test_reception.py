"""What a connection may cost, on real sockets: slow ones, many, large ones, and how the reception leaves."""

import asyncio
import errno
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import structlog
from manual_clock import ManualClock
from receiving import event, receiving, request

from billingd.reception import PIECE, Limits
from billingd.store.engine import Store
from billingd.throttle import FAILURES_MAX, SECONDS_PER_FAILURE

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
SOON = 0.05


async def test_a_head_that_takes_too_long_is_a_408_and_silence_is_hung_up_on(store: Store) -> None:
    """However the bytes are spread: from the connection to the end of the head there is one limit."""
    async with receiving(store, Limits(head_seconds=SOON)) as door:
        silent, slow = await door.call(), await door.call()
        await slow.say(b"POST /webhooks/amplify HTTP/1.1\r\nHost: x\r\n")
        answer = await slow.answer()
        assert (answer.status, answer.document["error"]["code"]) == (408, "too_slow")
        assert await slow.ended() == b""
        assert await silent.ended() == b""


async def test_a_body_that_takes_too_long_is_a_408(store: Store) -> None:
    """Also of one who knows the secret."""
    async with receiving(store, body_seconds=SOON) as door:
        caller = await door.call()
        await caller.say(request()[:-5])
        answer = await caller.answer()
        assert (answer.status, answer.document["error"]["code"]) == (408, "too_slow")


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_head_that_is_too_large_is_a_431(store: Store, at_once: bool) -> None:
    """Many small headers count as one large one does."""
    async with receiving(store, Limits(head_bytes=4_000)) as door:
        caller = await door.call()
        lines = [
            b"POST /webhooks/amplify HTTP/1.1\r\n",
            *(b"X-%d: %s\r\n" % (n, b"v" * 90) for n in range(60)),
        ]
        for piece in [b"".join(lines)] if at_once else lines:
            await caller.say(piece)
        answer = await caller.answer()
        assert (answer.status, answer.document["error"]["code"]) == (431, "head_too_large")


async def test_a_head_within_its_size_may_be_followed_by_a_larger_body(store: Store) -> None:
    """The body has a size of its own, and the next request on the connection its own head."""
    async with receiving(store, Limits(head_bytes=500)) as door:
        caller = await door.call()
        for number in range(3):
            await caller.say(request(event(f"e{number}").ljust(50_000)))
            assert (await caller.answer()).status == 202


async def test_what_is_not_http_is_a_400_in_the_contracts_words(store: Store) -> None:
    """And closes the connection."""
    async with receiving(store) as door:
        for text in (
            b"hello\r\n\r\n",
            b"POST http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /webhooks/amplify HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"POST /webhooks/amplify HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
        ):
            caller = await door.call()
            await caller.say(text)
            answer = await caller.answer()
            assert (answer.status, answer.document["error"]["code"]) == (400, "not_http"), text
            assert await caller.ended() == b""


SIGNED = (
    b"POST /webhooks/recurly HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/json\r\nrecurly-signature: 1,ab\r\nExpect: 100-continue\r\n"
)
CHUNKED = SIGNED + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "more", "status"),
    [
        (CHUNKED + b"0\r\n", b"a: " + b"b" * 8_000 + b"\r\n", 413),
        (CHUNKED + b"0\r\n", b"a: b\r\n", 400),
        (CHUNKED + b"1;", b"x" * 1_000, 413),
        (CHUNKED, b"zz\r\n", 400),
        (CHUNKED, b"1\r\nx\r\n", 413),
        (
            SIGNED + b"Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"x" * 999,
            401,
        ),
    ],
    ids=["long trailers", "many trailers", "a chunk's extension", "no chunk", "tiny chunks", "an upgrade"],
)
async def test_all_that_a_stranger_sends_with_a_body_is_bounded(
    store: Store, begin: bytes, more: bytes, status: int
) -> None:
    """It is refused as soon as it is too much or makes no sense, long before the body's time is over."""
    with structlog.testing.capture_logs() as lines:
        async with receiving(store, body_seconds=1.0) as door:
            caller = await door.call()
            await caller.say(begin)
            await caller.reader.readuntil(b"100 Continue\r\n\r\n")
            with suppress(ConnectionError):  # it may not want to hear the end
                await caller.say(more * (1_000_000 // len(more)))
            await caller.ended()
    assert [line["status"] for line in lines if line["event"] == "webhook.rejected"] == [status]


async def test_no_more_is_taken_ahead_of_an_answer_than_a_piece(store: Store) -> None:
    """Also from one who knows the secret, who sends the others again."""
    async with receiving(store) as door:
        friend = await door.call()
        text = request(event("e1"))
        await friend.say(text * 2_000)
        answers = [await friend.answer()]
        while "connection" not in answers[-1].headers:
            answers.append(await friend.answer())
        assert {answer.status for answer in answers} == {202}
        assert 1 < len(answers) <= PIECE / len(text) + 1
        assert await friend.ended() == b""


async def test_a_body_that_is_still_coming_after_its_answer_gets_no_second_one(store: Store) -> None:
    """The rest is dropped with the connection, also of one who knows the secret."""
    async with receiving(store) as door:
        friend = await door.call()
        await friend.say(request())
        assert (await friend.answer()).status == 202
        await friend.say(request(b" " * 300_000))
        answer = await friend.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert await friend.ended() == b""


async def test_each_head_has_its_time_on_a_connection_that_is_kept(store: Store) -> None:
    """From its first byte; before that it may be quiet for longer."""
    async with receiving(store, Limits(head_seconds=SOON)) as door:
        friend = await door.call()
        await friend.say(request())
        assert (await friend.answer()).status == 202
        await friend.say(b"POST /webhooks/amplify HTTP/1.1\r\n")
        assert (await friend.answer()).status == 408


async def test_strangers_who_share_the_senders_connection_fill_no_log(store: Store) -> None:
    """As behind a proxy: what counts is whether this request shows the secret."""
    with structlog.testing.capture_logs() as lines:
        async with receiving(store) as door:
            proxy = await door.call()
            for number in range(FAILURES_MAX + 20):
                await proxy.say(
                    request(event("e1")) if number == 0 else b"GET /wp HTTP/1.1\r\nHost: x\r\n\r\n"
                )
                await proxy.answer()
            await proxy.say(request(b"{"))
            assert (await proxy.answer()).status == 400
    said = [line["status"] for line in lines if line["event"] == "webhook.rejected"]
    assert said == [404] * FAILURES_MAX + [400]


async def test_who_has_not_shown_the_secret_gets_one_request(store: Store) -> None:
    """Requests sent ahead are dropped with the connection; who knows the secret may go on."""
    async with receiving(store) as door:
        stranger, friend = await door.call(), await door.call()
        await stranger.say(request(secret="wrong") * 3)
        answer = await stranger.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert await stranger.ended() == b""
        await friend.say(request(event("e1")) + request(event("e2")))
        assert [(await friend.answer()).status for _ in range(2)] == [202, 202]
        assert door.tally.accepted == 2


async def test_200_slow_connections_do_not_keep_a_webhook_waiting(store: Store) -> None:
    """Half a head each, and they stay; every good webhook is taken at once all the same."""
    async with receiving(store) as door:
        callers = [await door.call() for _ in range(200)]
        for caller in callers:
            await caller.say(b"POST /webhooks/amplify HTTP/1.1\r\nX-A: ")
        answers = [(await door.send(event(f"e{number}"))).status for number in range(20)]
        assert answers == [202] * 20
        assert door.reception.connections >= 200, "they were not even hung up on"


async def test_a_crowd_turns_out_strangers_by_age_and_nobody_who_knows_the_secret(store: Store) -> None:
    """There are never more connections than allowed, and always room for one more."""
    async with receiving(store, Limits(connections=8)) as door:
        friend = await door.call()
        await friend.say(request(event("first")))
        assert (await friend.answer()).status == 202
        crowd = [await door.call() for _ in range(30)]
        assert (await door.send(event("second"))).status == 202
        assert door.reception.connections <= 8
        for caller in crowd[:20]:
            assert await caller.ended() == b"", "the oldest went"
        await friend.say(request(event("third")))
        assert (await friend.answer()).status == 202
        assert (door.tally.accepted, door.tally.rejected) == (3, 0)


class _Exhausted(socket.socket):
    """A listening socket for which the system has no descriptor at first."""

    refusals = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


async def test_no_descriptor_left_is_waited_out(store: Store) -> None:
    """What waits in the socket is taken as soon as there is one."""
    listening = _Exhausted()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    async with receiving(store, sockets=[listening]) as door:
        assert (await door.send()).status == 202
        assert listening.refusals == 0


async def test_leaving_it_answers_what_has_come_and_what_is_about_to(store: Store) -> None:
    """A request under way, and one on a connection that is there already, are answered, and told to close."""
    async with receiving(store, Limits(quiet_seconds=20.0)) as door:
        halfway, kept, fresh = [await door.call() for _ in range(3)]
        whole = request(event("halfway"))
        await halfway.say(whole[:-3])
        await kept.say(request(event("kept")))
        assert (await kept.answer()).headers.get("connection") is None
        port = door.port
        leaving = asyncio.create_task(door.reception.close())
        await halfway.say(whole[-3:])
        await fresh.say(request(event("fresh")))
        await kept.say(request(event("kept again")))
        for caller in (halfway, fresh, kept):
            answer = await caller.answer()
            assert (answer.status, answer.headers["connection"]) == (202, "close")
            assert await caller.ended() == b""
        await leaving
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_leaving_it_does_not_wait_for_the_quiet(store: Store) -> None:
    """A connection kept open by a proxy holds nothing up, nor does one that never says a word."""
    async with receiving(store, Limits(quiet_seconds=0.0)) as door:
        kept, silent = await door.call(), await door.call()
        await kept.say(request())
        assert (await kept.answer()).status == 202
        await asyncio.wait_for(door.reception.close(), 20)
        assert await kept.ended() == b""
        assert await silent.ended() == b""


async def test_failures_are_limited_and_the_right_secret_is_not(store: Store, clock: ManualClock) -> None:
    """From one address: 401, then 429 with Retry-After; the real sender behind it is let in all the while."""
    async with receiving(store, clock=clock) as door:
        for number in range(FAILURES_MAX):
            assert (await door.send(secret="wrong")).status == 401, number
        for number in range(5):
            refused = await door.send(secret=None)
            assert (refused.status, refused.document["error"]["code"]) == (429, "too_many_failures")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await door.send(event(f"e{number}"))).status == 202
        clock.advance(timedelta(seconds=2 * SECONDS_PER_FAILURE))
        assert (await door.send(secret="wrong")).status == 401
        assert door.tally.accepted == 5
        assert door.tally.rejected == FAILURES_MAX + 6


async def test_an_unproven_body_is_small(store: Store) -> None:
    """A signature can be checked only once the body is there, so such a body may not be so large."""
    body = event().ljust(70_000)
    async with receiving(store) as door:
        caller = await door.call()
        text = request(body, secret=None, recurly_signature="1,ab")
        await caller.say(text.replace(b"/webhooks/amplify", b"/webhooks/recurly"))
        assert (await caller.answer()).status == 413
        assert (await door.send(body)).status == 202
