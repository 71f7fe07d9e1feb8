"""Requests that are carried out long after their client has gone, and keys that lie or are forgotten."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import ClientError
from recurly_side import Json, RecurlySide, recurly_side, usage_path
from sandbox_side import Sandbox, sandbox_side

from billingd.sandbox.faults import Rule

KEY = "Idempotency-Key"
USAGE = "/subscriptions/*/add_ons/*/usage"
USED = {"amount": 5, "merchant_tag": "t"}


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan()
        yield side


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with sandbox_side() as side:
        yield side


def late(far: RecurlySide, seconds: float = 90, **changes: Any) -> None:
    far.faults.add(Rule("recurly", "POST", USAGE, "late", args={"seconds": seconds}, **changes))


async def unanswered(far: RecurlySide, made: Json, key: str = "k") -> None:
    with pytest.raises(ClientError):
        await far.send("POST", usage_path(made), USED, headers={KEY: key})


def records(far: RecurlySide, made: Json) -> int:
    return int(far.told(made)["add_ons"]["calls"]["records"])


async def test_a_late_write_is_done_once_its_time_has_come(far: RecurlySide) -> None:
    """No answer; until then a 409 with `Retry-After` to the same key, afterwards the stored answer."""
    made = await far.subscribe()
    late(far)
    await unanswered(far, made)
    assert far.faults.counts == {"late": 1}
    far.pass_(seconds=89)
    async with await far.send("POST", usage_path(made), USED, headers={KEY: "k"}) as refused:
        assert (refused.status, refused.headers["Retry-After"]) == (409, "1")
        assert refused.headers["Recurly-Should-Retry"] == "true"
    assert records(far, made) == 0
    far.pass_(seconds=1)
    async with await far.send("POST", usage_path(made), USED, headers={KEY: "k"}) as replayed:
        assert (replayed.status, replayed.headers["Idempotency-Prior"]) == (201, "true")
        assert (await replayed.json())["merchant_tag"] == "t"
    assert records(far, made) == 1


async def test_any_later_request_lets_it_through(far: RecurlySide) -> None:
    """Before a look-up is answered, what is due by then has been done; a look-up before finds nothing."""
    made = await far.subscribe()
    late(far)
    await unanswered(far, made)
    listing = f"{usage_path(made)}?billing_status=all"
    assert (await far.call("GET", listing))["data"] == []
    far.pass_(seconds=90)
    assert len((await far.call("GET", listing))["data"]) == 1


async def test_tests_can_let_it_through_themselves(far: RecurlySide) -> None:
    """`carry_out_due` goes by the clock, earliest first."""
    made = await far.subscribe()
    for seconds in (60, 30):
        late(far, seconds)
    await unanswered(far, made, "slow")
    await unanswered(far, made, "slower")
    assert [each.at - far.clock.now() for each in far.faults.late] == [
        timedelta(seconds=60),
        timedelta(seconds=30),
    ]
    assert await far.faults.carry_out_due() == 0
    far.pass_(seconds=30)
    assert (await far.faults.carry_out_due(), records(far, made)) == (1, 1)
    far.pass_(days=1)
    assert (await far.faults.carry_out_due(), records(far, made)) == (1, 2)
    assert far.faults.late == []


async def test_another_key_meanwhile_makes_it_twice(far: RecurlySide) -> None:
    """Which is why nobody may send a second time before he is sure."""
    made = await far.subscribe()
    late(far)
    await unanswered(far, made)
    await far.call("POST", usage_path(made), USED, status=201, headers={KEY: "other"})
    far.pass_(seconds=90)
    assert await far.faults.carry_out_due() == 1
    assert far.told(made)["add_ons"]["calls"]["tags"] == {"t": 2}


async def test_a_late_retry_is_answered_at_once(far: RecurlySide) -> None:
    """The fault delays what is carried out: a 409, a replay and a wrong API key are not."""
    made = await far.subscribe()
    late(far, times=None)
    await unanswered(far, made)
    async with await far.send("POST", usage_path(made), USED, headers={KEY: "k"}) as refused:
        assert refused.status == 409
    far.pass_(seconds=90)
    assert (await far.call("POST", usage_path(made), USED, status=201, headers={KEY: "k"}))["amount"] == 5
    async with await far.send("POST", usage_path(made), USED, headers={"Accept": "x"}) as refused:
        assert refused.status == 406


async def test_what_is_late_is_judged_by_the_time_it_is_done(far: RecurlySide) -> None:
    """The subscription has ended meanwhile: refused then, and the refusal is what the key replays."""
    made = await far.subscribe()
    late(far)
    await unanswered(far, made)
    far.site.expire(made["uuid"])
    far.pass_(seconds=90)
    await far.refused("POST", usage_path(made), USED, headers={KEY: "k"})
    assert records(far, made) == 0


async def test_amplifys_writes_are_late_too(sandbox: Sandbox) -> None:
    """A decision that is made after the client has given up; the control interface shows what waits."""
    await sandbox.subscribed(approve=False)
    fault = {"side": "amplify", "method": "PUT", "kind": "late", "args": {"seconds": 45}}
    await sandbox.control("POST", "/faults", fault)
    decision = {"approval": {"state": "approved"}}
    path = "/apis/catalog/v1/subscriptions/acme/approval"
    with pytest.raises(ClientError):
        await sandbox.amplify("PUT", path, json=decision)
    subscription = sandbox.world.tenant.resources.find("Subscription", "acme")
    assert subscription is not None
    assert subscription.body["approval"]["state"] == "pending"
    assert (await sandbox.control("GET", "/faults"))["late"] == ["2026-01-15T12:00:45+00:00"]
    await sandbox.control("POST", "/clock", {"advance": "45s"})
    assert subscription.body["approval"]["state"] == "approved"
    assert (await sandbox.control("GET", "/faults"))["late"] == []


async def test_what_still_waits_is_forgotten_at_the_end(far: RecurlySide) -> None:
    """A sandbox that closes carries nothing out any more."""
    made = await far.subscribe()
    late(far)
    await unanswered(far, made)
    await far.faults.close()
    far.pass_(days=1)
    assert await far.faults.carry_out_due() == 0
    assert records(far, made) == 0
    assert not [task for task in asyncio.all_tasks() if task in far.faults._tasks]


async def test_a_500_is_stored_without_anything_done(far: RecurlySide) -> None:
    """The key says 500 for an hour, from the second time on as a replay; another key gets it done."""
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "POST", USAGE, "stored_500"))
    priors = []
    for _ in range(3):
        async with await far.send("POST", usage_path(made), USED, headers={KEY: "k"}) as answer:
            assert answer.status == 500
            priors.append(answer.headers.get("Idempotency-Prior"))
    assert priors == [None, "true", "true"]
    assert (records(far, made), far.faults.counts["stored_500"]) == (0, 1)
    await far.call("POST", usage_path(made), USED, status=201, headers={KEY: "k2"})
    far.pass_(hours=1)
    await far.call("POST", usage_path(made), USED, status=201, headers={KEY: "k"})


async def test_an_expired_key_does_it_again(far: RecurlySide) -> None:
    """Committed, no answer, and the same key is a new request: no `Idempotency-Prior`, a second record."""
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "POST", USAGE, "key_expired"))
    await unanswered(far, made)
    assert records(far, made) == 1
    async with await far.send("POST", usage_path(made), USED, headers={KEY: "k"}) as again:
        assert (again.status, "Idempotency-Prior" in again.headers) == (201, False)
    assert records(far, made) == 2
    await far.call("POST", usage_path(made), USED, status=201, headers={KEY: "k"})
    assert records(far, made) == 2
