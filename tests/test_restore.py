"""A store put back from an old copy, in the middle of traffic: nothing is billed twice, nothing is missed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rig import HOUR, Crash, Rig, a_rig
from test_reconcile import posted, reconciled, repaired, reported
from test_reconcile_drifts import Plants

from billingd import daemon as root
from billingd.admin import operations
from billingd.admin.explain import explain
from billingd.domain.errors import NotFound, Retryable
from billingd.domain.events import audit_action, subscription_action
from billingd.sandbox import control_amplify
from billingd.store import copies, held, history, intents, marks, schema

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
    """The daemon is stopped, the copy restored, the daemon started; what was told meanwhile is lost."""
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
    removed = [call for call in rig.world.calls if call.startswith("recurly DELETE /usage")]
    assert not removed, "an audit had to undo doubles"
    assert await rig.dead() == []
    assert (await rig.totals()).keys() == {"reported"}
    assert (await rig.totals())["reported"] == book["totals"]["served_units"] == rig.units()
    assert await rig.rows(schema.unlinked_traffic) == []
    assert await rig.held() == {}
    ledger = {row["merchant_tag"]: row["units"] for row in await rig.rows(schema.usage_records)}
    assert ledger.keys() == tags.keys()


SPANS = {
    "one hour": (HOUR, HOUR / 2),
    "three days": (3 * DAY, 6 * HOUR),
    "thirty days": (30 * DAY, DAY),
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


async def test_who_came_after_the_copy_is_billed_for_an_outage_longer_than_the_horizon(
    rig: Rig, tmp_path: Path
) -> None:
    """Traffic is read on before the link is made again: all of it is read once more from its beginning."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 4 * HOUR, HOUR, ["acme"])
    await rig.subscribe("delta")
    await quiet(rig)
    await life(rig, 8 * HOUR, HOUR, ["acme", "delta"])
    for _ in range(6):  # nobody is there to hear or to read
        rig.pass_(DAY)
        await rig.traffic("acme", 5)
        await rig.traffic("delta", 7)
    await put_back(rig, copy)
    await go_on(rig)
    await agrees(rig)


async def test_nothing_is_read_or_sent_before_it_is_read_back(rig: Rig, tmp_path: Path) -> None:
    """Neither loop takes a step, a person's poll is refused, and readiness says why."""
    await rig.traffic("acme", 4)
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await put_back(rig, copy)
    rig.world.calls.clear()
    daemon = rig.daemon
    steps: list[str] = []

    async def step() -> bool:
        steps.append("taken")
        return True

    reading = root._once_open(daemon.read_back.finished, step)
    sending = root._once_open(daemon.read_back.may_send, step)
    assert not await reading()
    assert not await sending()
    with pytest.raises(Retryable, match="reading back from Recurly"):
        await rig.poll()
    with pytest.raises(Retryable, match="reading back from Recurly"):
        await rig.poller.read_range(rig.far.now() - DAY, rig.far.now())
    with pytest.raises(Retryable, match="reading back from Recurly"):
        await daemon.reconciler.start(repair=True)
    with pytest.raises(Retryable, match="reading back from Recurly"):
        await daemon.reconciler.step(1)
    with pytest.raises(Retryable, match="reading back from Recurly"):
        await daemon.adoption.run(rig.far.now().replace(microsecond=0), dry_run=True)
    assert any("reading back from Recurly after a restore" in one for one in daemon.admin._reasons())
    assert not await daemon.read_back.run_once(), "what the old process sent may still take effect"
    assert rig.world.calls == {}
    assert await rig.subscribe("delta")
    assert await rig.hear() > 0, "events are taken meanwhile"
    await read_back(rig)
    assert not [call for call in rig.world.calls if call.startswith("recurly POST")]
    assert not [one for one in daemon.admin._reasons() if "reading back" in one]
    assert await reading()
    assert steps == ["taken"]
    assert not await daemon.read_back.run_once()
    assert not await sending(), "Amplify was not listed yet"
    assert "listing Amplify after a restore" in daemon.admin._reasons()
    await daemon.resync.run_once()
    assert await daemon.read_back.run_once()
    assert await sending()
    assert "listing Amplify after a restore" not in daemon.admin._reasons()
    assert await daemon.read_back.idle() > MINUTE
    await go_on(rig)
    await agrees(rig)


@pytest.mark.parametrize(
    ("store_url", "wire"), [("sqlite", True), ("postgres", True)], indirect=["store_url"]
)
async def test_a_crash_at_any_step_of_reading_back(rig: Rig, tmp_path: Path, wire: bool) -> None:
    """Whatever was read back is kept once, and the rest is read back by the next start."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 3 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await put_back(rig, copy)
    rig.pass_(10 * MINUTE)
    step, died = 0, True
    while died:
        step += 1
        await rig.restart()
        rig.steps.arm(step)
        rig.steps.wire = rig.steps.reads = wire
        try:
            await read_back(rig)
        except (Crash, Retryable):
            died = True
        else:
            died = False
        rig.steps.arm(None)
        rig.steps.wire = rig.steps.reads = False
    assert step > 6
    await go_on(rig)
    await agrees(rig)


@ONE_DATABASE
async def test_what_was_under_way_when_the_old_process_died_is_waited_for(rig: Rig, tmp_path: Path) -> None:
    """Its last request is carried out after the restore: the record is found, not made again."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.traffic("acme", 4)
    rig.pass_(2 * HOUR)
    await rig.poll()
    rig.steps.die_on, rig.steps.wire = "sent POST /subscriptions", True
    assert await rig.dies()
    assert len(rig.steps.in_flight) == 1
    await rig.traffic("acme", 3, at=rig.far.now() - HOUR)  # the same window holds more now
    await put_back(rig, copy)
    rig.steps.wire = False  # not before: a thread of the dead process may have been about to send another one
    assert not await rig.daemon.read_back.run_once()
    assert await rig.land() == 1
    await go_on(rig)
    await agrees(rig)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("units", [8, 12])
async def test_a_correction_since_the_copy_is_known_again(
    rig: Rig, tmp_path: Path, units: int, known: bool
) -> None:
    """Whether or not the copy has what was corrected: it is not made again, and not booked once more."""
    await rig.report()  # what came late before
    copy = await copies.backup(rig.store, tmp_path / "before.db", now=rig.clock.now())
    at = rig.far.now()
    made = await reported(rig, 10)
    served = rig.units()
    if known:
        copy = await copies.backup(rig.store, tmp_path / "after.db", now=rig.clock.now())
    await Plants(rig).call("PUT", f"/usage/{made.id}", {"amount": units})
    rig.pass_(MINUTE)
    await rig.renew()
    await rig.work(HOUR)
    before = rig.far.now()
    await repaired(rig)
    tag = f"{made.merchant_tag}~1"
    [correction] = [one for one in rig.world.site.usages.values() if one.merchant_tag == tag]
    assert correction.recording_timestamp >= before.replace(microsecond=0), "its window began long before"
    assert (correction.amount, rig.units()) == (10 - units, served)

    await put_back(rig, copy)
    await rig.traffic("acme", 3, at=at)
    await go_on(rig)
    served += 3
    assert rig.units() == served
    async with rig.store.read() as tx:
        intent = await intents.find(tx, f"usage:{tag}")
        told = [one.kind for one in await history.of(tx, f"usage:{made.merchant_tag}")]
    assert intent is not None
    assert (intent.state, intent.result) == ("done", correction.id)
    assert "correction_read_back" in told
    [link] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == "acme"]
    await rig.ask(audit_action(link["subscription_id"], because="test"))
    await rig.work(10 * MINUTE)
    found = await reconciled(rig, since=at - HOUR, repair=True)
    assert (found["drift"], await rig.held()) == ([], {})
    assert rig.units() == served == (await rig.totals())["reported"]

    twin = await posted(rig, made)  # whatever is wrong with it now is corrected under another tag
    twin.billed_at = made.billed_at
    found = await reconciled(rig, since=at - HOUR, repair=True)
    assert [one["kind"] for one in found["drift"]] == ["wrong_amount"]
    await rig.work(10 * MINUTE)
    assert rig.units() == served
    assert (await reconciled(rig, since=at - HOUR))["drift"] == []


@pytest.mark.parametrize("on_cancel", ["terminate", "cancel"])
async def test_what_the_lost_life_ended_is_no_surprise(rig: Rig, tmp_path: Path, on_cancel: str) -> None:
    """Nobody is told of an end that this store asked for; of another they are, once Amplify was listed."""
    rig.on_cancel = on_cancel
    rig.start()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.move("beta", "cancel")
    await quiet(rig)
    await rig.report()
    await rig.report()
    [acme] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == "acme"]
    await put_back(rig, copy)
    getattr(rig.world.site, "expire" if on_cancel == "terminate" else "cancel")(acme["uuid"])
    rig.channels.provider.clear()
    await read_back(rig)
    await rig.poll()
    await rig.poller.watch_periods()
    assert not await rig.daemon.read_back.run_once()
    await rig.drain()
    assert (await rig.held(), told_of_ends(rig)) == ({}, [])
    await rig.daemon.resync.run_once()
    await rig.ask(subscription_action("acme", acme["subscription_id"], because="a hint"))
    for _ in range(3):
        await rig.daemon.read_back.run_once()
    assert told_of_ends(rig) == [], "both are yet to be looked at"
    await rig.drain()
    for _ in range(3):
        await rig.daemon.read_back.run_once()
    await rig.drain()
    assert len(told_of_ends(rig)) == 1
    assert "acme" in told_of_ends(rig)[0].lower()
    async with rig.store.read() as tx:
        assert await marks.find(tx, marks.RECOVERING) is None
        items = [row["subject"] for row in await held.standing(tx, kind="ended_at_recurly")]
    ended = [f"subscription:{acme['subscription_id']}:ended"]
    assert items == (ended if on_cancel == "terminate" else [])


@ONE_DATABASE
async def test_the_loops_open_the_gates_one_after_the_other(rig: Rig, tmp_path: Path) -> None:
    """Recurly is read back, Amplify is listed, and only then is what waited sent."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.traffic("acme", 4)
    await put_back(rig, copy)
    rig.pass_(2 * HOUR)
    told: list[str] = []
    daemon, send = rig.daemon, rig.recurly._adapter.create_usage

    async def sent(*args: Any, **kwargs: Any) -> str:
        told.append(args[0].merchant_tag)
        usage_id: str = await send(*args, **kwargs)
        return usage_id

    rig.recurly._adapter.create_usage = sent

    async def waits() -> bool:
        return "recorded" in await rig.totals()

    async def waited() -> bool:
        """The loops had time to send it, on a clock that moves as they rest."""
        return rig.far.now() > then + 2 * HOUR

    async def all_is_over() -> bool:
        return bool(told) and not await stands(rig, marks.RECOVERING)

    tasks = []
    for name, loop in root.loops(daemon).items():
        if name in {"read_back", "outbox", "traffic"}:
            tasks.append(asyncio.create_task(loop))
        else:
            loop.close()
    try:
        await until(lambda: stands(rig, marks.RECOVERING))
        await until(waits)
        then = rig.far.now()
        await until(waited)
        assert told == [], "Amplify is not listed yet"
        await daemon.resync.run_once()
        await until(all_is_over)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Lets the loops turn until something is so, a minute at most."""
    for _ in range(6000):
        if await true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never was so")


async def stands(rig: Rig, name: str) -> bool:
    async with rig.store.read() as tx:
        return await marks.find(tx, name) is not None


def told_of_ends(rig: Rig) -> list[str]:
    """What people were told of ends at Recurly."""
    words = ("not billed any more", "will end at Recurly")
    return [one for one in rig.channels.provider if any(word in one for word in words)]


@pytest.mark.parametrize(
    ("copied", "lived", "restored"),
    [
        (HOUR, 15 * MINUTE, 15 * MINUTE),
        (HOUR, 40 * MINUTE, 40 * MINUTE),
        (15 * MINUTE, HOUR, HOUR),
        (15 * MINUTE, HOUR, 15 * MINUTE),
        (40 * MINUTE, HOUR, 30 * MINUTE),
    ],
)
@ONE_DATABASE
async def test_the_window_was_changed_since_the_copy(
    rig: Rig, tmp_path: Path, copied: timedelta, lived: timedelta, restored: timedelta
) -> None:
    """What was recorded in one length is not booked again in another, whichever is set by then."""
    rig.window = copied
    await rig.restart()
    rig.pass_(3 * HOUR)
    await rig.poll()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    for length in (copied, lived):
        rig.window = length
        await rig.restart()
        for _ in range(20):
            await rig.traffic("acme", 7)
            rig.pass_(17 * MINUTE)
            await rig.poll()
            await rig.drain()
        await rig.report()
    await agrees(rig)
    rig.window = restored
    await put_back(rig, copy)
    await go_on(rig)
    await rig.traffic("acme", 3)
    await rig.report()
    await rig.report()
    await agrees(rig)
    [mark] = await rig.rows(schema.watermarks)
    assert mark["window_seconds"] == restored.total_seconds()


@pytest.mark.parametrize("looked", [False, True])
async def test_what_ended_since_the_copy_is_read_back(rig: Rig, tmp_path: Path, looked: bool) -> None:
    """Also when Recurly shows that it is over before it is its turn: its last usage is there already."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await rig.move("beta", "cancel")
    await quiet(rig)
    await rig.report()
    await rig.report()
    assert "ended" in [row["state"] for row in await rig.rows(schema.subscription_links)]
    await put_back(rig, copy)
    if looked:
        await rig.poller.watch_periods()
    await go_on(rig)
    await agrees(rig)


@ONE_DATABASE
async def test_nothing_looks_at_recurly_or_forgets_before_it_is_read_back(rig: Rig, tmp_path: Path) -> None:
    """The loops that would write down ends, or drop what was heard of deletions, wait too."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await put_back(rig, copy)
    steps: dict[str, Callable[[], Awaitable[bool]]] = {}
    taken: list[str] = []

    async def step(name: str) -> bool:
        taken.append(name)
        return False

    rig.poller.watch_periods = partial(step, "periods")  # type: ignore[method-assign]
    with (
        patch.object(root, "_forget", lambda *_: step("retention")),
        patch.object(root, "forever", lambda name, run_once, **_: steps.update({name: run_once})),
    ):
        root.loops(rig.daemon)

        async def turned() -> list[str]:
            taken.clear()
            for name in ("periods", "retention"):
                await steps[name]()
            return list(taken)

        assert await turned() == []
        await read_back(rig)
        assert await turned() == ["periods"]
        await rig.daemon.resync.run_once()
        await rig.daemon.read_back.run_once()
        assert await turned() == ["periods", "retention"]


@pytest.mark.parametrize("hidden", [1, 3, 5])
async def test_what_recurly_does_not_show_is_read_back_before_anything_of_it_is_booked(
    rig: Rig, tmp_path: Path, hidden: int
) -> None:
    """For some looks, a minute apart at least: one may be a read that lags, and two hold nobody else up."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await quiet(rig)
    await rig.renew()
    await quiet(rig)
    await rig.traffic("beta", 4)  # recorded, and its report's outcome is lost with the life
    await rig.report()
    await put_back(rig, copy)
    [beta] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == "beta"]
    shows, lists = rig.recurly._adapter.get_subscription, rig.recurly._adapter.list_live_subscriptions
    looks: list[datetime] = []

    async def shown(uuid: str) -> Any:
        if uuid == beta["uuid"] and len(looks) < hidden:
            looks.append(rig.far.now())
            raise NotFound("not now")
        return await shows(uuid)

    async def listed() -> Any:
        return [one for one in await lists() if len(looks) >= hidden or one.uuid != beta["uuid"]]

    rig.recurly._adapter.get_subscription, rig.recurly._adapter.list_live_subscriptions = shown, listed
    await read_back(rig)
    assert len(looks) == min(hidden, 2)
    assert all(other - one >= MINUTE for one, other in pairwise(looks))
    known = {row["merchant_tag"] for row in await rig.rows(schema.usage_records)}
    assert (known == set(rig.tags())) == (hidden == 1)
    await rig.traffic("beta", 2, at=rig.far.now() - 6 * HOUR)
    await go_on(rig)
    for _ in range(4):
        await rig.traffic("beta", 1)
        await rig.report()
    assert len(looks) == hidden
    await agrees(rig)
    async with rig.store.read() as tx:
        assert await marks.unread_ones(tx) == {}


@ONE_DATABASE
async def test_what_stays_unread_does_not_end_before_it_is_read_back(rig: Rig, tmp_path: Path) -> None:
    """It is over at Amplify; when Recurly shows it again, what was served comes first."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await rig.traffic("beta", 9)
    await put_back(rig, copy)
    [beta] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == "beta"]
    shows = rig.recurly._adapter.get_subscription
    hidden = True

    async def shown(uuid: str) -> Any:
        if uuid == beta["uuid"] and hidden:
            raise NotFound("not now")
        return await shows(uuid)

    rig.recurly._adapter.get_subscription = shown
    await read_back(rig)
    await rig.daemon.resync.run_once()
    await rig.daemon.read_back.run_once()
    await rig.move("beta", "cancel")
    rig.pass_(5 * HOUR)
    async with rig.store.read() as tx:
        assert list(await marks.unread_ones(tx)) == [beta["subscription_id"]]
    await rig.hear()
    hidden = False
    await rig.drain()  # the end looks first, and finds it there
    assert [one["state"] for one in rig.billed(beta["subscription_id"])] == ["active"]
    await go_on(rig)
    await rig.settled()
    assert [one["state"] for one in rig.billed(beta["subscription_id"])] == ["expired"]
    await agrees(rig)


@ONE_DATABASE
async def test_the_notice_counts_what_was_read_back_before_a_crash(rig: Rig, tmp_path: Path) -> None:
    """What was kept, and that it was, is one transaction."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await put_back(rig, copy)
    rig.pass_(10 * MINUTE)
    reader = rig.daemon.read_back
    reads = reader.subscription

    async def dies(*args: Any, **kwargs: Any) -> None:
        await reads(*args, **kwargs)
        raise Crash("between two steps")

    reader.subscription = dies  # type: ignore[method-assign]
    with pytest.raises(Crash):
        await reader.run_once()
    await rig.restart()
    await go_on(rig)
    told = await rig.rows(schema.history)
    [entry] = [row for row in told if row["kind"] == "restored"]
    assert entry["detail"]["records"] == sum(row["kind"] == "read_back" for row in told) > 0


@ONE_DATABASE
@pytest.mark.parametrize("corrected", [False, True])
async def test_the_next_invoice_is_the_same_after_a_restore(
    rig: Rig, tmp_path: Path, corrected: bool
) -> None:
    """What Recurly took in the cycle before is no correction of this one; what it took since, is."""
    await rig.report()
    made = await reported(rig, 10)
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme"])
    await rig.report()
    if corrected:
        await Plants(rig).call("PUT", f"/usage/{made.id}", {"amount": 12})
    rig.pass_(MINUTE)
    await rig.renew()
    await rig.work(2 * HOUR)
    await repaired(rig)
    await rig.report()
    before = (await explain(rig.store, "acme", now=rig.clock.now()))["next_invoice"]
    [line] = before["lines"]
    assert line["corrected_units"] == (-2 if corrected else 0)
    await put_back(rig, copy)
    await go_on(rig)
    after = (await explain(rig.store, "acme", now=rig.clock.now()))["next_invoice"]
    assert after == before


@ONE_DATABASE
@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_who_came_and_went_since_the_copy_is_ended(rig: Rig, tmp_path: Path, how: str) -> None:
    """Over at Amplify, alive at Recurly, and in no link: its marker tells, its last usage is billed."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    delta = await rig.subscribe("delta")
    await quiet(rig)
    await life(rig, 5 * HOUR, HOUR, ["acme", "delta"])
    await rig.move("delta", how)
    await rig.work()
    [before] = rig.billed(delta)
    assert before["state"] == "active", "the daemon dies before it has ended it"
    await put_back(rig, copy)
    await go_on(rig)
    [ended] = rig.billed(delta)
    assert ended["state"] == "expired"
    await agrees(rig)


async def hide(rig: Rig, name: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """Recurly shows nothing of a subscription while `hidden["now"]`; its link's row, and that."""
    [link] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == name]
    adapter, hidden = rig.recurly._adapter, {"now": True}
    shows, lists, uses = adapter.get_subscription, adapter.list_live_subscriptions, adapter.list_usage

    async def shown(uuid: str) -> Any:
        if uuid == link["uuid"] and hidden["now"]:
            raise NotFound("not now")
        return await shows(uuid)

    async def used(uuid: str, *args: Any, **kwargs: Any) -> Any:
        if uuid == link["uuid"] and hidden["now"]:
            raise NotFound("not now")
        return await uses(uuid, *args, **kwargs)

    async def listed() -> Any:
        return [one for one in await lists() if not hidden["now"] or one.uuid != link["uuid"]]

    adapter.get_subscription, adapter.list_usage, adapter.list_live_subscriptions = shown, used, listed
    return link, hidden


async def left_unread(rig: Rig) -> None:
    """Reads back what Recurly shows; then Amplify is listed."""
    await read_back(rig)
    await rig.poll()
    await rig.daemon.resync.run_once()
    await rig.daemon.read_back.run_once()


@ONE_DATABASE
@pytest.mark.parametrize("shown", [False, True])
async def test_what_is_not_read_back_is_not_compared(rig: Rig, tmp_path: Path, shown: bool) -> None:
    """What the ledger lacks of it is no drift, nor is what Recurly has of it, before that was read."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await put_back(rig, copy)
    beta, hidden = await hide(rig, "beta")
    await left_unread(rig)
    await rig.report()
    hidden["now"] = not shown
    for _ in range(2):  # what two runs find is held
        found = await reconciled(rig, repair=True)
        drifts = [one for one in found["drift"] if one["window_start"] is not None]
        assert drifts == []
        unseen = [one for one in found["not_compared"] if one["subscription"] == beta["subscription_id"]]
        told = {(one["phase"], one["reason"]) for one in unseen if one["phase"] != "links"}
        assert told == {(phase, "restored, and not read back yet") for phase in ("served", "billed")}
        await rig.drain()
        rig.pass_(MINUTE)
    hidden["now"] = False
    for _ in range(4):
        await rig.report()
    found = await reconciled(rig)
    assert (found["drift"], [one for one in found["not_compared"] if one["subscription"]]) == ([], [])
    await agrees(rig)


@ONE_DATABASE
async def test_a_run_in_which_one_is_read_back_finds_nothing_false(rig: Rig, tmp_path: Path) -> None:
    """It is judged by its mark before each step."""
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await life(rig, 6 * HOUR, HOUR, ["acme", "beta", "gamma"])
    await put_back(rig, copy)
    _, hidden = await hide(rig, "beta")
    await left_unread(rig)
    hidden["now"] = False
    rig.pass_(11 * MINUTE)
    reconciler = rig.daemon.reconciler
    run = await reconciler.start()
    compare = reconciler._served_survey.compare
    steps = 0

    async def comparing(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 1:
            await rig.poller.watch_periods()  # between a look at the watermark and one at the marks
            async with rig.store.read() as tx:
                assert await marks.unread_ones(tx) == {}
        return await compare(*args, **kwargs)

    reconciler._served_survey.compare = comparing  # type: ignore[method-assign]
    with pytest.raises(Retryable, match="read again"):
        await reconciler.finish(run)
    await rig.poll()
    await reconciler.finish(run)
    found = await reconciler.document(run)
    assert found is not None
    assert (found["state"], found["drift"], steps > 1) == ("done", [], True)
    await go_on(rig)
    await agrees(rig)


@ONE_DATABASE
@pytest.mark.parametrize("shown", ["at a look", "at a report"])
async def test_what_ends_without_being_read_back_is_held(rig: Rig, tmp_path: Path, shown: str) -> None:
    """In one sum, and none of it is recorded: shown after all, it is billed as the lost life left it.

    That cut a window by a bill, and booked what came late in second records.
    """
    await rig.traffic("beta", 7)
    rig.pass_(2 * HOUR)
    await rig.poll()  # recorded; the lost life reports it
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.drain()
    await life(rig, 3 * HOUR, HOUR, ["acme", "beta", "gamma"], late=3 * HOUR)
    for _ in range(2):
        await rig.traffic("beta", 20)
        rig.pass_(10 * MINUTE)
        await rig.renew()
        await quiet(rig)
    await life(rig, 4 * HOUR, HOUR, ["acme", "beta", "gamma"], late=3 * HOUR)
    for _ in range(3):
        await rig.report()
    await put_back(rig, copy)
    beta, hidden = await hide(rig, "beta")
    known = await booked(rig, beta)
    await left_unread(rig)
    for _ in range(2):
        await rig.traffic("beta", 100)
        await rig.report()
    [item] = await standing(rig, "ended_at_recurly")
    assert "counted" in item["reason"]
    assert "its usage is held" not in item["reason"]
    assert await standing(rig, "usage_not_read_back") == []
    at = rig.far.now()
    await rig.move("beta", "cancel")
    await rig.hear()
    await rig.report()
    await rig.settled()
    await rig.work(20 * MINUTE)  # it ends
    await rig.traffic("beta", 50, at=at, arrives=rig.far.now(), force=True)  # counted only now
    await rig.report()
    [link] = [row for row in await rig.rows(schema.subscription_links) if row["name"] == "beta"]
    assert (link["state"], link["billed_state"]) == ("ended", "missing")
    assert [one["merchant_tag"] for one in await booked(rig, beta)] == [one["merchant_tag"] for one in known]
    [item] = await standing(rig, "usage_not_read_back")
    assert item["units"] == served_units(rig, "beta") - sum(one["units"] for one in known) > 250
    assert any("never read back" in one for one in rig.channels.provider)
    found = await reconciled(rig, repair=True)
    assert [one for one in found["drift"] if one["window_start"] is not None] == []
    assert [one for one in found["not_compared"] if one["phase"] != "links"] == []
    assert found["held_units"] == sum(one["units"] for one in await every_held(rig)) > item["units"]
    hidden["now"] = False
    if shown == "at a look":
        rig.pass_(11 * MINUTE)
        await rig.poller.watch_periods()
    else:
        for one in await standing(rig, "usage_after_end"):  # recorded in the copy
            assert await operations.release(rig.store, one["id"], now=rig.clock.now())
    await rig.drain()
    await rig.report()
    found = await reconciled(rig, repair=True)  # before the next resync has it ended
    assert [one for one in found["drift"] if one["window_start"] is not None] == []
    await go_on(rig)
    await rig.settled()
    assert [one["state"] for one in rig.billed(beta["subscription_id"])] == ["expired"]
    assert (await reconciled(rig))["drift"] == []
    await agrees(rig)


async def booked(rig: Rig, link: dict[str, Any]) -> list[dict[str, Any]]:
    """What the ledger has of a subscription."""
    rows = await rig.rows(schema.usage_records)
    return [row for row in rows if row["subscription_id"] == link["subscription_id"]]


def served_units(rig: Rig, name: str) -> int:
    [row] = [one for one in rig.ledger()["subscriptions"] if one["name"] == name]
    return int(row["served_units"])


async def every_held(rig: Rig) -> list[dict[str, Any]]:
    """What is held that has units."""
    async with rig.store.read() as tx:
        return [one for one in await held.standing(tx) if one["units"]]


async def standing(rig: Rig, kind: str) -> Any:
    async with rig.store.read() as tx:
        return await held.standing(tx, kind=kind)
