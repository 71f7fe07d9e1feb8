"""Intents on both databases: what is known of a write before, while and after it is sent."""

from datetime import timedelta

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


async def test_an_intent_is_what_was_written_last(store: Store) -> None:
    """Sent, sent again under the same key, then under a new one: one row; the caller keeps its first time."""
    async with store.write() as tx:
        assert await intents.find(tx, "w") is None
        await opened(tx)
        await opened(tx, now=1)
        assert await intents.find(tx, "w") == Intent("w", 1, "open", TEN, TEN + HOUR, False, None, "h")
        await intents.burn(tx, "w")
        await opened(tx, epoch=2, first=2, now=2)
        assert await intents.find(tx, "w") == Intent(
            "w", 2, "open", TEN + 2 * HOUR, TEN + 2 * HOUR, False, None, "h"
        )


async def test_what_is_done_is_never_refused_or_burnt_again(store: Store) -> None:
    """A late verdict of an earlier attempt changes nothing."""
    async with store.write() as tx:
        await opened(tx)
        await intents.burn(tx, "w")
        await intents.done(tx, "w", result="r1")
        assert not await intents.refused(tx, "w", epoch=1, last_sent_at=TEN)
        await intents.burn(tx, "w")
        found = await intents.find(tx, "w")
    assert found is not None
    assert (found.state, found.result, found.burnt) == ("done", "r1", False)


async def test_what_was_sent_again_is_not_refused_by_an_earlier_answer(store: Store) -> None:
    """Who sent it last may have made it: that stays unknown."""
    async with store.write() as tx:
        await opened(tx)
        await opened(tx, now=1)
        assert not await intents.refused(tx, "w", epoch=1, last_sent_at=TEN)
        assert await intents.count_open(tx) == 1


async def test_open_ones_are_counted(store: Store) -> None:
    """Outcomes nobody knows; refused and done ones are known."""
    async with store.write() as tx:
        assert await intents.count_open(tx) == 0
        await opened(tx)
        assert await intents.count_open(tx) == 1
        assert await intents.refused(tx, "w", epoch=1, last_sent_at=TEN)
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
    assert found == Intent("w", 1, "done", TEN, TEN, False, "r", "h")
