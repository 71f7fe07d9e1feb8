"""Intents on both databases: what is known of a write before, while and after it is sent."""

from datetime import datetime, timedelta
from typing import Any

from linked import HOUR, TEN

from billingd.domain.sending import Intent
from billingd.store import intents
from billingd.store.engine import Store, Tx


async def opened(tx: Tx, epoch: int = 1, first: int = 0, now: int = 0) -> None:
    ours = await intents.opened(
        tx,
        "w",
        await intents.find(tx, "w"),
        epoch=epoch,
        key=f"k{epoch}",
        body_hash="h",
        first_sent_at=TEN + first * HOUR,
        now=TEN + now * HOUR,
    )
    assert ours


def an_intent(
    epoch: int = 1,
    state: str = "open",
    sends: int = 1,
    first: datetime = TEN,
    last: datetime = TEN,
    **but: Any,
) -> Intent:
    fields: dict[str, Any] = {
        "gave_up_at": None,
        "missed_at": None,
        "burnt": False,
        "result": None,
        "body_hash": "h",
    }
    return Intent("w", epoch, state, sends, first, last, **fields | but)


async def test_an_intent_is_what_was_written_last(store: Store) -> None:
    """Sent, sent again under the same key, then under a new one: one row; the caller keeps its first time."""
    async with store.write() as tx:
        assert await intents.find(tx, "w") is None
        await opened(tx)
        await opened(tx, now=1)
        assert await intents.find(tx, "w") == an_intent(sends=2, last=TEN + HOUR)
        await intents.gave_up(tx, "w", sends=2, burnt=True, now=TEN + HOUR)
        await intents.missed(tx, "w", sends=2, now=TEN + 2 * HOUR)
        assert await intents.find(tx, "w") == an_intent(
            sends=2, last=TEN + HOUR, gave_up_at=TEN + HOUR, missed_at=TEN + 2 * HOUR, burnt=True
        )
        await opened(tx, epoch=2, first=2, now=2)
        again = TEN + 2 * HOUR
        assert await intents.find(tx, "w") == an_intent(epoch=2, sends=3, first=again, last=again)


async def test_what_is_done_is_never_refused_or_burnt_again(store: Store) -> None:
    """A late verdict of an earlier attempt changes nothing."""
    async with store.write() as tx:
        await opened(tx)
        await intents.gave_up(tx, "w", sends=1, burnt=True, now=TEN)
        await intents.done(tx, "w", result="r1")
        assert not await intents.refused(tx, "w", sends=1)
        await intents.gave_up(tx, "w", sends=1, burnt=True, now=TEN + HOUR)
        await intents.missed(tx, "w", sends=1, now=TEN + HOUR)
        found = await intents.find(tx, "w")
    assert found == an_intent(state="done", result="r1", gave_up_at=TEN)


async def test_what_was_sent_again_is_not_refused_by_an_earlier_answer(store: Store) -> None:
    """Who sent it last may have made it: that stays unknown."""
    async with store.write() as tx:
        await opened(tx)
        await opened(tx, now=1)
        assert not await intents.refused(tx, "w", sends=1)
        assert await intents.count_open(tx) == 1


async def test_the_end_of_a_sending_that_was_overtaken_is_not_the_end(store: Store) -> None:
    """The newer one may still run, so that nothing has settled; but a burnt key stays burnt."""
    async with store.write() as tx:
        await opened(tx)
        await opened(tx, now=1)
        await intents.missed(tx, "w", sends=1, now=TEN + HOUR)
        await intents.gave_up(tx, "w", sends=1, burnt=True, now=TEN + HOUR)
        assert await intents.find(tx, "w") == an_intent(sends=2, last=TEN + HOUR, burnt=True)
        await intents.gave_up(tx, "w", sends=2, burnt=False, now=TEN + 2 * HOUR)
        found = await intents.find(tx, "w")
    assert found is not None
    assert (found.gave_up_at, found.burnt) == (TEN + 2 * HOUR, True)


async def test_open_ones_are_counted(store: Store) -> None:
    """Outcomes nobody knows; refused and done ones are known."""
    async with store.write() as tx:
        assert await intents.count_open(tx) == 0
        await opened(tx)
        assert await intents.count_open(tx) == 1
        assert await intents.refused(tx, "w", sends=1)
        assert await intents.count_open(tx) == 0
        await opened(tx, epoch=2)
        await intents.done(tx, "w", result="r")
        assert await intents.count_open(tx) == 0


async def test_names_are_apart(store: Store) -> None:
    """What happens to one write says nothing of another."""
    async with store.write() as tx:
        await opened(tx)
        await intents.opened(
            tx, "v", None, epoch=1, key="kv", body_hash="h", first_sent_at=TEN, now=TEN + timedelta(seconds=1)
        )
        await intents.done(tx, "v", result="r")
        found = await intents.find(tx, "w")
    assert found is not None
    assert found.state == "open"


async def test_only_what_is_still_as_it_was_seen_is_opened(store: Store) -> None:
    """Somebody else sent it meanwhile: what is known of that stays."""
    async with store.write() as tx:
        await opened(tx)
        seen = await intents.find(tx, "w")
        await intents.done(tx, "w", result="r")
        for stale in (None, seen):
            assert not await intents.opened(
                tx, "w", stale, epoch=1, key="k1", body_hash="other", first_sent_at=TEN, now=TEN + HOUR
            )
        found = await intents.find(tx, "w")
    assert found == an_intent(state="done", result="r")
