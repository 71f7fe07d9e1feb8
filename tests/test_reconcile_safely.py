"""Reconcile where it could do harm: races, people's decisions, what cannot be compared, its own failures."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, Json, Rig, a_rig
from test_reconcile import DAY, drift_status, kinds, numbers, posted, reconciled, repaired, reported
from test_reconcile_drifts import VOLUME, Plants

from billingd.admin import operations
from billingd.domain.errors import Refused, Retryable
from billingd.domain.events import audit_action, plan_action
from billingd.loops import Progress, forever
from billingd.sandbox.recurly.model import Usage
from billingd.store import held, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
MINUTES = timedelta(minutes=1)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        await made.subscribe()
        await made.work()
        made.channels.provider.clear()
        yield made


def changed(one: Usage, units: int) -> None:
    """Somebody changes it at Recurly."""
    one.add_on.book.remove(one)
    one.amount = units
    one.add_on.book.add(one)


def priced(rig: Rig, price: int) -> None:
    """The plan's price at Amplify is another; no event tells of it."""
    plan = rig.world.tenant.resources.find("ProductPlan", "metered")
    assert plan is not None
    plan.body["spec"]["billing"]["price"] = price


async def audited(rig: Rig) -> None:
    [link] = await rig.rows(schema.subscription_links)
    await rig.ask(audit_action(link["subscription_id"], because=f"test {next(numbers)}"))
    await rig.drain()


async def standing(rig: Rig) -> list[dict[str, Any]]:
    async with rig.store.read() as tx:
        return await held.standing(tx)


async def write_off_all(rig: Rig) -> None:
    for item in await standing(rig):
        assert await operations.write_off(rig.store, item["id"], reason="meant", now=rig.clock.now())


async def settled(rig: Rig) -> None:
    for _ in range(6):
        rig.pass_(2 * MINUTES)
        await rig.drain()


async def by_itself(rig: Rig) -> None:
    """All that the loop has to do."""
    loop = rig.daemon.reconciler
    while await loop.run_once() or loop._rest:
        pass


async def test_a_tag_of_any_length_and_a_bug_end_no_loop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's tag is told as it is; what breaks a run fails that run, and people hear of it once."""
    one = await reported(rig, 7)
    await posted(rig, one, tag="x" * 250)
    assert [each["tag"] for each in (await reconciled(rig))["drift"]] == ["x" * 250]

    async def breaks(*_args: Any, **_named: Any) -> None:
        raise ZeroDivisionError("boom")

    loop = rig.daemon.reconciler
    monkeypatch.setattr(loop._billed_survey, "compare", breaks)
    rig.channels.provider.clear()
    for _ in range(2):
        run = await loop.start()
        turning = forever(
            "reconcile",
            loop.run_once,
            wake=loop.wake,
            clock=rig.clock,
            idle=loop.idle,
            progress=Progress(),
        )
        task = asyncio.create_task(turning)
        async with asyncio.timeout(10):
            while (found := await loop.document(run)) is None or found["state"] == "running":
                assert not task.done()
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (found["state"], "ZeroDivisionError: boom" in found["error"]) == ("failed", True)
    await rig.drain()
    assert sum("were not compared" in text for text in rig.channels.provider) == 1
    assert "boom" in (await rig.daemon.admin._document())["drift"]["error"]


async def test_what_is_set_back_is_never_away(rig: Rig) -> None:
    """By its id and with absolute values: an end in between loses nothing."""
    one, moved = await reported(rig, 7), await reported(rig, 5)
    changed(one, 9)
    moved.usage_timestamp -= 20 * MINUTES
    rig.world.calls.clear()
    assert kinds(await reconciled(rig, repair=True)) == [("wrong_amount", 2), ("wrong_period", 5)]
    await rig.drain()
    assert rig.units() == 12
    assert set(rig.world.site.usages) == {one.id, moved.id}
    assert not [call for call in rig.world.calls if "recurly DELETE" in call or "recurly POST" in call]
    assert {row["state"] for row in await rig.rows(schema.usage_records)} == {"reported"}
    assert kinds(await reconciled(rig)) == []


@ONE_DATABASE
async def test_what_recurly_does_not_let_be_changed_is_held(store_url: str) -> None:
    """Volume prices: a person changes it there."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan("bulk", pricing=VOLUME)
        await rig.work()
        await rig.subscribe("acme", "bulk")
        await rig.work()
        changed(await reported(rig, 7), 9)
        await repaired(rig)
        [item] = [one for one in await standing(rig) if one["subject"].startswith("drift:")]
        assert (item["kind"], item["units"], "by hand" in item["reason"]) == ("wrong_amount", 2, True)
        assert rig.units() == 9
        assert await rig.dead() == []


@ONE_DATABASE
async def test_an_audit_believes_no_list_that_lags_over_a_report_to_come(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was removed is shown a while yet; its new report must not be given up for that."""
    one = await reported(rig, 7)
    adapter = rig.recurly._adapter
    uuid, code = one.subscription.uuid, one.add_on.add_on.code
    lagging = await adapter.list_usage(uuid, code, begin=one.usage_timestamp - HOUR, end=rig.far.now())
    await adapter.remove_usage(one.id, key="by hand")
    await reconciled(rig, repair=True)
    await rig.drain()

    async def listed(*_args: Any, **_named: Any) -> Any:
        return lagging

    with monkeypatch.context() as patched:
        patched.setattr(adapter, "list_usage", listed)
        await audited(rig)
    await settled(rig)
    assert (rig.units(), await rig.totals()) == (7, {"reported": 7})


@ONE_DATABASE
async def test_the_last_stretch_of_a_period_is_compared_after_its_renewal(rig: Rig) -> None:
    """From where the run before looked last, less what may be late."""
    rig.horizon = HOUR
    rig.start()
    await reported(rig, 3)
    await reconciled(rig)
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    await rig.renew()
    for _ in range(4):
        rig.pass_(HOUR)
        await rig.poll()
        await rig.drain()
    assert kinds(await reconciled(rig)) == [("missing_record", 7)]


@ONE_DATABASE
async def test_a_subscription_that_runs_out_as_asked_is_no_orphan(store_url: str) -> None:
    """`subscriptions.on_cancel = "cancel"`."""
    async with a_rig(store_url) as rig:
        rig.on_cancel = "cancel"
        rig.start()
        await rig.poll()
        await rig.product()
        await rig.plan()
        await rig.work()
        await rig.subscribe()
        await rig.work()
        await reported(rig, 7)
        await rig.move("acme", "cancel")
        for _ in range(8):
            await rig.work(HOUR)
            await rig.poll()
        [link] = await rig.rows(schema.subscription_links)
        theirs = await Plants(rig).call("GET", f"/subscriptions/uuid-{link['uuid']}")
        assert (link["state"], theirs["state"]) == ("ended", "canceled")
        assert kinds(await reconciled(rig)) == []


@ONE_DATABASE
async def test_what_came_late_within_the_horizon_is_booked_and_no_drift(rig: Rig) -> None:
    """In a run that somebody asks for, and in a daily one that has begun already."""
    await reported(rig, 7)
    await rig.traffic("acme", 5, at=rig.far.now() - 2 * HOUR, arrives=rig.far.now())
    assert kinds(await reconciled(rig)) == []
    await rig.drain()
    assert rig.units() == 12
    rig.pass_(DAY)
    loop = rig.daemon.reconciler
    assert await loop.run_once()
    await rig.traffic("acme", 4, at=rig.far.now() - 3 * HOUR, arrives=rig.far.now())
    await by_itself(rig)
    await rig.drain()
    assert rig.units() == 16
    assert not [text for text in rig.channels.provider if "differ" in text]


@ONE_DATABASE
async def test_whatever_is_found_can_be_accepted(rig: Rig) -> None:
    """A record deleted on purpose: two runs over everything hold it; written off, it is no drift."""
    gone, moved = await reported(rig, 7), await reported(rig, 5)
    await rig.recurly._adapter.remove_usage(gone.id, key="on purpose")
    moved.usage_timestamp -= 20 * MINUTES
    moved.billed_at = rig.far.now()
    priced(rig, 11)
    expected = [("missing_record", 7), ("wrong_period", 5), ("price_differs", 0)]
    assert kinds(await reconciled(rig)) == expected
    assert await standing(rig) == []
    found = await reconciled(rig)
    assert (kinds(found), found["left"]) == (expected, 3)
    assert sorted(one["kind"] for one in await standing(rig)) == sorted(kind for kind, _ in expected)
    await write_off_all(rig)
    found = await reconciled(rig)
    assert (kinds(found), found["left"]) == ([], 0)
    priced(rig, 12)
    assert kinds(await reconciled(rig)) == [("price_differs", 0)], "another price is news"


@ONE_DATABASE
async def test_too_little_billed_and_written_off_stays_so(rig: Rig) -> None:
    """The audit counts it below zero."""
    one = await reported(rig, 7)
    changed(one, 5)
    one.billed_at = rig.far.now()
    await audited(rig)
    [item] = await standing(rig)
    assert item["units"] == -2
    await write_off_all(rig)
    assert kinds(await repaired(rig)) == []
    assert rig.units() == 5


@ONE_DATABASE
@pytest.mark.parametrize("decided", ["before", "after"])
async def test_what_a_person_refunded_is_not_corrected_too(rig: Rig, decided: str) -> None:
    """The audit's item says that it may be refunded by hand; then nothing is given back twice."""
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    await audited(rig)
    [item] = await standing(rig)
    assert "reconcile --repair" in item["reason"]
    assert "write this off" in item["reason"]
    if decided == "before":
        await operations.write_off(rig.store, item["id"], reason="refunded", now=rig.clock.now())
        assert (await repaired(rig))["drift"] == []
    else:
        await reconciled(rig, repair=True)
        await operations.write_off(rig.store, item["id"], reason="refunded", now=rig.clock.now())
        await rig.work(10 * MINUTES)
    assert rig.tags() == {one.merchant_tag: 2}


@ONE_DATABASE
async def test_what_cannot_be_compared_is_told(rig: Rig) -> None:
    """Windows of another length, and what the source keeps no more: neither "agrees" nor is it drift."""
    await reported(rig, 7)
    rig.window = timedelta(minutes=30)
    rig.start()
    for _ in range(3):
        rig.pass_(2 * HOUR)
        await rig.poll()
        await rig.drain()
    found = await reconciled(rig)
    [told] = found["not_compared"]
    assert (told["since"], told["subscription"], "traffic.window" in told["reason"]) == (
        "2026-03-02T10:00:00Z",
        None,
        True,
    )
    rig.pass_(9 * DAY)
    await rig.poll()
    await rig.drain()
    source = rig.daemon.reconciler._served_survey._source
    source.keeps = 7 * DAY
    real = source.read

    async def kept(**asked: Any) -> Any:
        return [one for one in await real(**asked) if one.window_start >= rig.far.now() - 7 * DAY]

    source.read = kept  # type: ignore[method-assign]
    found = await reconciled(rig)
    assert kinds(found) == []
    assert len(found["not_compared"]) == 2
    assert "keeps no more" in found["not_compared"][1]["reason"]
    assert found["not_compared"][0]["until"] == found["not_compared"][1]["since"]


@ONE_DATABASE
async def test_links_made_meanwhile_are_for_the_next_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    linkage = rig.daemon.reconciler._linkage
    real = linkage._billing.list_live_subscriptions
    done = False

    async def listed() -> Any:
        nonlocal done
        if not done:
            done = True
            await rig.subscribe("beta")
            await rig.work()
        return await real()

    monkeypatch.setattr(linkage._billing, "list_live_subscriptions", listed, raising=False)
    assert kinds(await reconciled(rig)) == []
    assert len(await rig.rows(schema.subscription_links)) == 2
    assert kinds(await reconciled(rig)) == []


@ONE_DATABASE
async def test_many_foreign_records_are_accepted_at_once(rig: Rig) -> None:
    """Their ids are data: the text names a few only."""
    one = await reported(rig, 7)
    for number in range(7):
        await posted(rig, one, tag=f"by hand {number}")
    assert kinds(await repaired(rig)) == [("foreign_record", 7)] * 7
    assert [item["units"] for item in await standing(rig)] == [49]
    await write_off_all(rig)
    assert kinds(await repaired(rig)) == []


@ONE_DATABASE
async def test_a_repair_of_one_subscription_is_seen_in_the_status(rig: Rig) -> None:
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    await reconciled(rig)
    assert await drift_status(rig) == (7, 1, True)
    [link] = await rig.rows(schema.subscription_links)
    await reconciled(rig, repair=True, subscription=link["subscription_id"])
    await settled(rig)
    assert await drift_status(rig) == (0, 0, True)
    await reconciled(rig)
    changed(next(iter(rig.world.site.usages.values())), 9)
    await reconciled(rig)
    assert await drift_status(rig) == (2, 1, True)
    changed(next(iter(rig.world.site.usages.values())), 7)
    await reconciled(rig, subscription=link["subscription_id"])
    assert await drift_status(rig) == (0, 0, True), "a look at that one found it no more"


@ONE_DATABASE
async def test_a_price_is_shown_though_its_plan_is_held(rig: Rig) -> None:
    priced(rig, 11)
    assert kinds(await reconciled(rig)) == [("price_differs", 0)]
    await rig.ask(plan_action("metered", None, because="1"))
    await rig.work()
    assert await rig.held() != {}
    assert kinds(await reconciled(rig)) == [("price_differs", 0)]


@ONE_DATABASE
async def test_a_run_that_was_cut_off_long_ago_begins_anew(rig: Rig) -> None:
    """What it saw is too old; one that only waits for a far side is not cut off."""
    await reported(rig, 7)
    old = await rig.daemon.reconciler.start()
    await rig.daemon.reconciler.step(old)
    rig.pass_(20 * DAY)
    await rig.poll()
    await rig.work()
    one = await reported(rig, 11)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    found = await reconciled(rig)
    assert (found["id"] != old, kinds(found)) == (True, [("missing_record", 11)])
    failed = await rig.daemon.reconciler.document(old)
    assert failed is not None
    assert (failed["state"], "cut off" in failed["error"]) == ("failed", True)


@ONE_DATABASE
async def test_a_run_that_waits_says_for_what(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is joined however long that is, up to a day."""
    await reported(rig, 7)
    loop = rig.daemon.reconciler
    run = await loop.start()

    async def away(*_args: Any, **_named: Any) -> None:
        raise Retryable("Amplify is away")

    with monkeypatch.context() as patched:
        patched.setattr(loop._served_survey, "compare", away)
        rig.pass_(2 * HOUR)
        await rig.poll()
        for _ in range(3):
            rig.pass_(50 * MINUTES)
            with pytest.raises(Retryable):
                await loop.step(run)
        found = await loop.document(run)
        assert found is not None
        assert found["held_up"] == "Amplify is away"
        assert await loop.start() == run
    await loop.finish(run)
    found = await loop.document(run)
    assert found is not None
    assert (found["state"], found["held_up"]) == ("done", None)


@ONE_DATABASE
async def test_one_that_cannot_be_read_hides_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.subscribe("beta")
    await rig.work()
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    by_name = {row["name"]: row for row in await rig.rows(schema.subscription_links)}
    survey = rig.daemon.reconciler._billed_survey
    real = survey.compare

    async def compare(run: Any, mark: Any, link: Any) -> Any:
        if link.subscription_id == by_name["beta"]["subscription_id"]:
            raise Refused("nonsense")
        return await real(run, mark, link)

    monkeypatch.setattr(survey, "compare", compare)
    found = await reconciled(rig)
    assert kinds(found) == [("missing_record", 7)]
    [told] = found["not_compared"]
    assert (told["subscription"], told["reason"]) == (by_name["beta"]["subscription_id"], "nonsense")
    await rig.drain()
    assert sum("could not be compared" in text for text in rig.channels.provider) == 1


@ONE_DATABASE
async def test_what_was_asked_for_comes_before_the_daily_run(rig: Rig) -> None:
    await reported(rig, 7)
    loop = rig.daemon.reconciler
    daily = await loop.start(daily=True)
    asked = await loop.start()
    await loop.run_once()
    states: list[Json] = [found for run in (daily, asked) if (found := await loop.document(run)) is not None]
    assert [one["steps_done"] for one in states] == [0, 1]


async def test_a_record_under_another_tag_is_not_posted_a_second_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for by its id before it is believed to be gone, by a run and by a repair."""
    one = await reported(rig, 7)
    tag = one.merchant_tag
    await Plants(rig).call("PUT", f"/usage/{one.id}", {"merchant_tag": "renamed by hand"})
    found = await reconciled(rig)
    assert [(each["kind"], each["repairable"]) for each in found["drift"]] == [("foreign_record", True)]

    async def nothing(_usage_id: str) -> None:
        return None

    with monkeypatch.context() as patched:
        patched.setattr(rig.recurly._adapter, "find_usage", nothing)
        assert ("missing_record", 7) in kinds(await reconciled(rig, repair=True))
    await settled(rig)
    assert rig.tags() == {"renamed by hand": 1}
    await repaired(rig)
    assert rig.tags() == {tag: 1}
    assert kinds(await reconciled(rig)) == []


@ONE_DATABASE
@pytest.mark.parametrize("billed", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
async def test_a_record_changed_while_its_outcome_is_unknown_is_mended(
    rig: Rig, billed: bool, replayed: bool
) -> None:
    """Recurly took it, the answer was lost, somebody changed it: accepted, then replaced or corrected."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", "/subscriptions/*/add_ons/*/usage", times=1)
    rig.pass_(2 * HOUR)
    await rig.poll()
    await rig.drain()
    [made] = rig.world.site.usages.values()
    await Plants(rig).call("PUT", f"/usage/{made.id}", {"amount": 9})
    if billed:
        rig.pass_(timedelta(minutes=1))
        await rig.renew()
    rig.pass_(timedelta(minutes=10))
    await rig.drain()
    [error] = await rig.dead()
    assert "Recurly holds 9" in error
    await repaired(rig)
    if replayed:
        assert await operations.replay(rig.store, operations.Selection(), now=rig.clock.now()) == []
    await repaired(rig)
    assert (await rig.totals(), rig.units(), await rig.dead()) == ({"reported": 7}, 7, [])
    assert (await reconciled(rig))["drift"] == []
    await rig.move("acme", "cancel")
    await rig.work()
    await rig.report()
    await rig.report()
    assert [row["state"] for row in await rig.rows(schema.subscription_links)] == ["ended"]
    assert await rig.held() == {}


@ONE_DATABASE
async def test_a_report_finds_a_record_with_its_corrections(rig: Rig) -> None:
    """What was corrected before its outcome was known is there, with the units that were recorded."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", "/subscriptions/*/add_ons/*/usage", times=1)
    rig.pass_(2 * HOUR)
    await rig.poll()
    await rig.drain()
    [made] = rig.world.site.usages.values()
    await Plants(rig).call("PUT", f"/usage/{made.id}", {"amount": 9})
    (await posted(rig, made, tag=f"{made.merchant_tag}~1")).amount = -2
    rig.pass_(timedelta(minutes=10))
    await rig.drain()
    assert (await rig.totals(), await rig.dead()) == ({"reported": 7}, [])
