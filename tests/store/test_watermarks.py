"""Watermarks on both databases: moved by whoever saw them last, and by nobody else."""

import asyncio
from datetime import timedelta

import pytest
from linked import HOUR, TEN

from billingd.store import watermarks
from billingd.store.engine import Store
from billingd.store.watermarks import Watermark, WatermarkMoved

BEGUN = Watermark("metrics", TEN, HOUR, TEN)


async def begin(store: Store) -> None:
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN, HOUR, now=TEN)


async def find(store: Store) -> Watermark | None:
    async with store.read() as tx:
        return await watermarks.find(tx, "metrics")


async def test_a_source_is_begun_once(store: Store) -> None:
    """A later start leaves it where it is; sources do not share."""
    assert await find(store) is None
    await begin(store)
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN + HOUR, 2 * HOUR, now=TEN)
        assert await watermarks.find(tx, "summary") is None
    assert await find(store) == BEGUN


async def test_it_advances_from_where_it_was_seen(store: Store) -> None:
    """Also by nothing; whoever saw an older one is told so and changes nothing."""
    await begin(store)
    async with store.write() as tx:
        await watermarks.advance(tx, BEGUN, TEN, now=TEN)
        await watermarks.advance(tx, BEGUN, TEN + HOUR, now=TEN)
    with pytest.raises(WatermarkMoved):
        async with store.write() as tx:
            await watermarks.advance(tx, BEGUN, TEN + 5 * HOUR, now=TEN)
    assert await find(store) == Watermark("metrics", TEN + HOUR, HOUR, TEN)


async def test_a_new_length_counts_from_where_it_came_into_force(store: Store) -> None:
    """Whoever still reads in the old length is told so."""
    await begin(store)
    async with store.write() as tx:
        await watermarks.change_length(tx, BEGUN, timedelta(minutes=15), now=TEN)
    with pytest.raises(WatermarkMoved):
        async with store.write() as tx:
            await watermarks.advance(tx, BEGUN, TEN + HOUR, now=TEN)
    assert await find(store) == Watermark("metrics", TEN, timedelta(minutes=15), TEN)
    seen = Watermark("metrics", TEN + HOUR, HOUR, TEN)
    with pytest.raises(WatermarkMoved):
        async with store.write() as tx:
            await watermarks.change_length(tx, seen, HOUR, now=TEN)


async def test_of_two_at_once_one_moves_it(store_url: str) -> None:
    """Two processes: the second waits for the first, and then finds it moved."""
    async with Store(store_url) as one, Store(store_url) as two:
        await begin(one)

        async def advance(store: Store) -> None:
            async with store.write() as tx:
                await watermarks.advance(tx, BEGUN, TEN + HOUR, now=TEN)

        results = await asyncio.gather(advance(one), advance(two), return_exceptions=True)
        assert {type(result) for result in results} == {type(None), WatermarkMoved}
