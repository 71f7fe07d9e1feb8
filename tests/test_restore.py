"""A store put back from an old copy, in the middle of traffic: nothing is billed twice, nothing is missed."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from rig import HOUR, Rig, a_rig

from billingd.sandbox import control_amplify
from billingd.store import copies, history, marks, schema

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    """Three subscriptions of two plans, served and reported for a few hours."""
    async with a_rig(store_url) as made:
        made.horizon = 3 * DAY
        made.start()
        await made.product()
        await made.plan()
        await made.plan("gold")
        await quiet(made)
        for name, plan in (("acme", "metered"), ("beta", "metered"), ("gamma", "gold")):
            await made.subscribe(name, plan)
        await quiet(made)
        await life(made, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
        yield made


async def quiet(rig: Rig) -> None:
    """Works until nothing is left that a few minutes would settle."""
    await rig.work()
    for _ in range(20):
        if not [key for key in await rig.unfinished() if not key.startswith("end_subscription")]:
            return
        await rig.work(2 * MINUTE, rounds=1)


async def life(rig: Rig, span: timedelta, step: timedelta, names: list[str], late: timedelta = HOUR) -> None:
    """Time passes in steps; in each all are served, a little of it is counted late, and all is polled."""
    until = rig.far.now() + span
    number = 0
    while rig.far.now() < until:
        number += 1
        for name in names:
            await rig.traffic(name, 3 + number % 5, quota="calls")
            await rig.traffic(name, 2, quota="calls", arrives=rig.far.now() + late)
        rig.pass_(min(step, until - rig.far.now()))
        await rig.hear()
        await rig.drain()
        await rig.poll()
        await rig.drain()


async def put_back(rig: Rig, copy: Path) -> None:
    """The daemon is stopped, the copy restored, the daemon started; all events of the time between are lost."""
    await rig.gone()
    await rig.store.close()
    await copies.restore(rig.store, copy, now=rig.clock.now())
    rig.unheard.clear()
    await rig.restart()


async def read_back(rig: Rig) -> None:
    """What the loop does until it is finished."""
    for _ in range(1000):
        if await rig.daemon.read_back.finished():
            return
        if not await rig.daemon.read_back.run_once():
            rig.pass_(MINUTE)
    raise AssertionError(rig.daemon.read_back.reason)


async def go_on(rig: Rig) -> None:
    """What the loops do after that: traffic is read before anything else had a chance."""
    await read_back(rig)
    await rig.poll()
    await rig.drain()
    await rig.daemon.resync.run_once()
    await rig.settled()
    await rig.report()
    await rig.report()


async def agrees(rig: Rig) -> None:
    """The truth of both sides is the same, and the ledger says the same."""
    book = rig.ledger()
    assert book["agrees"], [row for row in book["subscriptions"] if not row["agrees"]]
    assert book["foreign"] == []
    assert book["not_yet_visible_units"] == 0
    tags = rig.tags()
    assert set(tags.values()) == {1}
    assert await rig.dead() == []
    assert (await rig.totals()).keys() == {"reported"}
    assert (await rig.totals())["reported"] == book["totals"]["served_units"] == rig.units()
    assert await rig.rows(schema.unlinked_traffic) == []
    assert await rig.held() == {}
    ledger = {row["merchant_tag"]: row["units"] for row in await rig.rows(schema.usage_records)}
    assert ledger.keys() == tags.keys()


SPANS = {
    "one hour": (HOUR, HOUR / 2),
    "three days": (3 * DAY, 3 * HOUR),
    "thirty days": (30 * DAY, 8 * HOUR),
}


@pytest.mark.parametrize("old", SPANS)
async def test_a_copy_in_the_middle_of_traffic_bills_nothing_twice(
    rig: Rig, tmp_path: Path, old: str
) -> None:
    """Meanwhile subscriptions, a plan and a quota came, one ended, a plan went, and bills were sent."""
    span, step = SPANS[old]
    await rig.traffic("acme", 11)
    rig.pass_(2 * HOUR)
    await rig.poll()  # recorded, and not yet reported
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.drain()
    await life(rig, span / 3, step, ["acme", "beta", "gamma"])
    await rig.plan("silver")
    await quiet(rig)
    await rig.subscribe("delta", "metered")
    await rig.subscribe("epsilon", "silver")
    await quiet(rig)
    await rig.play(
        control_amplify.add_quota, {"name": "late", "pricing": {"type": "perunit", "cost": 2}}, name="metered"
    )
    await quiet(rig)
    if span < 30 * DAY:
        await rig.renew()
    await rig.move("beta", "cancel")
    await life(rig, span / 3, step, ["acme", "gamma", "delta", "epsilon"])
    await rig.traffic("acme", 9, quota="late")
    await rig.traffic("delta", 13, quota="late")
    await rig.move_plan("gold", "delete")
    await rig.subscribe("zeta", "silver")
    await quiet(rig)
    await life(rig, span / 3, step, ["acme", "delta", "epsilon", "zeta"])
    await rig.traffic("acme", 7, quota="calls")
    rig.pass_(2 * HOUR)
    await rig.poll()  # recorded, and never reported by this life
    await rig.traffic("delta", 5, quota="calls")
    await rig.traffic("zeta", 4, arrives=rig.far.now() + 6 * HOUR)

    await put_back(rig, copy)
    rig.pass_(2 * HOUR)
    await rig.traffic("epsilon", 6)
    await go_on(rig)
    await rig.report()
    await rig.report()
    await agrees(rig)
    for each in rig.world.site.oracle()["subscriptions"]:
        assert len(rig.billed(each["marker"])) == 1
    async with rig.store.read() as tx:
        assert await marks.find(tx, marks.RESTORED) is None
        [entry] = await history.of(tx, "store")
        assert entry.kind == "restored"
