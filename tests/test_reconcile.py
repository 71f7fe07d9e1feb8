"""Reconcile: what differs between Amplify, the ledger and Recurly is found, mended where that is safe."""

from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import count

import pytest
from rig import HOUR, Crash, Json, Rig, a_rig
from test_reconcile_drifts import Plants

from billingd.admin import operations
from billingd.domain.billing import NewUsage
from billingd.domain.errors import NotFound
from billingd.domain.events import audit_action
from billingd.sandbox.recurly.model import Usage
from billingd.store import held, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
DAY = timedelta(days=1)
USAGE = "/subscriptions/*/add_ons/*/usage"
METER = "recurly GET /subscriptions/{subscription}/add_ons/{add_on}/usage"
numbers = count(1)


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


async def reported(rig: Rig, units: int) -> Usage:
    """Units that are served and reported in one record."""
    before = set(rig.world.site.usages)
    await rig.traffic("acme", units)
    await rig.report()
    [made] = set(rig.world.site.usages) - before
    return rig.world.site.usages[made]


async def posted(rig: Rig, like: Usage, *, tag: str | None = None) -> Usage:
    """Another record like that one, as Recurly takes it: no tag is unique there."""
    new = NewUsage(
        subscription_uuid=like.subscription.uuid,
        add_on_code=like.add_on.add_on.code,
        units=like.amount,
        merchant_tag=tag or like.merchant_tag or "",
        usage_timestamp=like.usage_timestamp,
        recorded_at=rig.far.now(),
    )
    return rig.world.site.usages[await rig.recurly._adapter.create_usage(new, key=f"other-{next(numbers)}")]


async def reconciled(rig: Rig, **asked: object) -> Json:
    """A whole run."""
    rig.pass_(timedelta(minutes=2))  # what has just been reported is not missed yet
    run = await rig.daemon.reconciler.start(**asked)  # type: ignore[arg-type]
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert found["state"] == "done", found["error"]
    return found


async def repaired(rig: Rig) -> Json:
    """A run that repairs, and what it leads to."""
    found = await reconciled(rig, repair=True)
    await rig.work(timedelta(minutes=10))
    return found


def kinds(found: Json) -> list[tuple[str, int]]:
    return [(one["kind"], one["units"]) for one in found["drift"]]


async def test_nothing_differs(rig: Rig) -> None:
    """Served, recorded, billed: the same."""
    await reported(rig, 7)
    await reported(rig, 5)
    found = await reconciled(rig)
    assert kinds(found) == []
    assert (found["drift_units"], found["left"], found["checked"]) == (
        0,
        0,
        {"subscriptions": 1, "records": 2},
    )


async def test_a_record_removed_at_recurly_is_posted_again(rig: Rig) -> None:
    """Under its tag, once; the history says that it was there before."""
    one = await reported(rig, 7)
    await reported(rig, 5)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    found = await reconciled(rig)
    [drift] = found["drift"]
    assert (drift["kind"], drift["units"], drift["repairable"]) == ("missing_record", 7, True)
    assert drift["tag"] == one.merchant_tag
    found = await repaired(rig)
    assert (found["repaired_units"], rig.units()) == (7, 12)
    assert set(rig.tags().values()) == {1}
    assert kinds(await reconciled(rig)) == []
    assert "gone_at_recurly" in [row["kind"] for row in await rig.rows(schema.history)]
    assert await rig.dead() == []


@ONE_DATABASE
async def test_what_is_under_way_is_no_drift(rig: Rig) -> None:
    """Recorded and about to be sent; or reported a moment ago, which a list may not show yet."""
    await rig.traffic("acme", 7)
    rig.pass_(2 * HOUR)
    await rig.poll()
    found = await reconciled(rig)
    assert (kinds(found), found["under_way_units"]) == ([], 7), "Recurly does not have them yet"
    other = await reconciled(rig, since=rig.far.now() - HOUR)
    assert other["under_way_units"] == 0, "not of what it looks at"
    rig.fault("list_lag", "GET", USAGE, times=1, args={"seconds": 3600})
    await rig.drain()
    run = await rig.daemon.reconciler.start()
    await rig.daemon.reconciler.finish(run)
    after = await rig.daemon.reconciler.document(run)
    assert after is not None
    assert rig.world.faults.counts["list_lag"] == 1
    assert (kinds(after), after["under_way_units"]) == ([], 0)


@ONE_DATABASE
async def test_only_what_was_served_since_the_link_is_compared(rig: Rig) -> None:
    """The window that a link begins in belongs to it in part; what came before is nobody's drift."""
    usage_from = rig.far.now() + HOUR + timedelta(minutes=10)
    async with rig.store.write() as tx:
        await tx.execute(schema.subscription_links.update().values(usage_from=usage_from))
    await rig.traffic("acme", 9)  # in a window of its own
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    rig.pass_(timedelta(minutes=20))
    await reported(rig, 7)
    assert rig.units() == 7
    assert kinds(await reconciled(rig)) == []
    rig.horizon = HOUR
    rig.start()
    rig.pass_(3 * HOUR)
    await rig.poll()
    await rig.traffic("acme", 2, at=usage_from + timedelta(minutes=1), arrives=rig.far.now())
    assert kinds(await reconciled(rig)) == [("late_beyond_horizon", 2)]


@ONE_DATABASE
async def test_a_run_goes_on_where_it_was_after_a_restart(rig: Rig) -> None:
    """The same question joins it; each subscription is read once."""
    for name in ("beta", "gamma"):
        await rig.subscribe(name)
        await rig.work()
        rig.pass_(timedelta(minutes=2))
    await reported(rig, 7)
    rig.pass_(timedelta(minutes=2))
    rig.world.calls.clear()
    run = await rig.daemon.reconciler.start()
    while rig.world.calls[METER] < 2:
        assert await rig.daemon.reconciler.step(run)
    rig.start()
    assert await rig.daemon.reconciler.start() == run
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert (found["state"], found["checked"]["subscriptions"]) == ("done", 3)
    assert rig.world.calls[METER] == 3
    assert await rig.daemon.reconciler.start() != run


@ONE_DATABASE
async def test_a_step_that_dies_is_taken_again_and_says_nothing_twice(rig: Rig) -> None:
    """Findings and progress are one transaction."""
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    rig.pass_(timedelta(minutes=2))
    run = await rig.daemon.reconciler.start()
    for step in range(1, 40):
        rig.steps.arm(step)
        try:
            await rig.daemon.reconciler.finish(run)
        except Crash:
            await rig.restart()
        else:
            break
    rig.steps.arm(None)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert (found["state"], kinds(found)) == ("done", [("missing_record", 7)])


@ONE_DATABASE
async def test_a_repair_that_dies_at_any_step_mends_once(store_url: str) -> None:
    """Whatever a repair had done when it died, the next start does the rest: one record, one correction."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await rig.work()
        await rig.subscribe()
        await rig.work()
        gone, wrong, double = [await reported(rig, units) for units in (7, 5, 3)]
        await rig.recurly._adapter.remove_usage(gone.id, key="by hand")
        wrong.add_on.book.remove(wrong)
        wrong.amount = 6
        wrong.add_on.book.add(wrong)
        twin = await posted(rig, double)
        double.billed_at = twin.billed_at = rig.far.now()
        rig.pass_(timedelta(minutes=2))
        run = await rig.daemon.reconciler.start(repair=True)
        await rig.daemon.reconciler.finish(run)
        saved = await rig.save()
        died = 0
        for step in range(1, 60):
            await rig.load(saved)
            rig.steps.arm(step)
            if not await rig.dies():
                break
            died += 1
            await rig.restart()
            for _ in range(8):
                rig.pass_(timedelta(minutes=2))
                await rig.drain()
            assert rig.units() == 15, step
            assert {row["state"] for row in await rig.rows(schema.intents)} == {"done"}
            assert await rig.dead() == []
            assert max(rig.tags().values()) <= 2
        assert died > 10


@ONE_DATABASE
async def test_one_subscription_alone(rig: Rig) -> None:
    """Nothing of the others is read or told."""
    await rig.subscribe("beta")
    await rig.work()
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    by_name = {row["name"]: row["subscription_id"] for row in await rig.rows(schema.subscription_links)}
    assert kinds(await reconciled(rig, subscription=by_name["beta"])) == []
    assert kinds(await reconciled(rig, subscription=by_name["acme"])) == [("missing_record", 7)]
    with pytest.raises(NotFound, match="nobody"):
        await rig.daemon.reconciler.start(subscription="nobody")
    assert kinds(await reconciled(rig, subscription="acme")) == [("missing_record", 7)], "by its name"
    assert kinds(await reconciled(rig, subscription="beta")) == []
    assert await rig.daemon.poller.read_range(rig.far.now() - DAY, rig.far.now(), subscription="acme") == 0


@ONE_DATABASE
async def test_once_a_day_by_itself_and_told_on_the_change(rig: Rig) -> None:
    """A poll comes first; people hear when drift begins and when it is over, not each day."""
    loop = rig.daemon.reconciler
    assert not await loop.run_once(), "its hour has not come since traffic is read"
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    told = []
    for day in range(4):
        rig.pass_(DAY)
        await rig.traffic("acme", 5, at=rig.far.now() - 3 * HOUR)  # only late as a reading is
        while await loop.run_once() or loop._rest:
            pass
        await rig.drain()
        [run] = [row for row in await rig.rows(schema.reconciliations) if row["state"] == "done"][-1:]
        notices = sum("the ledger and Recurly differ" in text for text in rig.channels.provider)
        told.append((run["drifting"], notices))
        if day == 1:
            await repaired(rig)
        rig.start()  # the table knows that it was done today
        assert not await rig.daemon.reconciler.run_once()
        loop = rig.daemon.reconciler
    assert told == [(True, 1), (True, 1), (False, 1), (False, 1)]
    assert sum("agree again" in text for text in rig.channels.provider) == 1
    assert len([row for row in await rig.rows(schema.reconciliations) if row["asked"] == "daily"]) == 4


@ONE_DATABASE
async def test_a_loop_rests_between_two_subscriptions(rig: Rig) -> None:
    """Half of what Recurly lets through is left to the reports."""
    await rig.subscribe("beta")
    await rig.work()
    await reported(rig, 7)
    loop = rig.daemon.reconciler
    loop._seconds_per_call = 60 / 60
    await loop.start()
    rests = []
    while await loop.run_once() or loop._rest:
        if loop._rest:
            rests.append(await loop.idle())
    assert rests == [timedelta(seconds=2), timedelta(seconds=2)]


@ONE_DATABASE
async def test_what_a_person_wrote_off_is_no_drift_any_more(rig: Rig) -> None:
    """A foreign record that is meant; other units of it are news."""
    one = await reported(rig, 7)
    await posted(rig, one, tag="by hand")
    assert kinds(await repaired(rig)) == [("foreign_record", 7)]
    async with rig.store.read() as tx:
        [item] = await held.standing(tx)
    assert await operations.write_off(rig.store, item["id"], reason="meant", now=rig.clock.now())
    assert kinds(await reconciled(rig)) == []
    await posted(rig, one, tag="once more")
    assert kinds(await reconciled(rig)) == [("foreign_record", 7)]


async def test_a_billed_double_is_corrected_once(rig: Rig) -> None:
    """The cycle's sum is right then, for the audit too, however often it is looked at."""
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    found = await repaired(rig)
    assert [(each["kind"], each["repairable"]) for each in found["drift"]] == [("double_record", True)]
    for _ in range(2):
        assert kinds(await repaired(rig)) == []
        [link] = await rig.rows(schema.subscription_links)
        await rig.ask(audit_action(link["subscription_id"], because=f"test {next(numbers)}"))
        await rig.work()
    assert rig.units() == 7
    assert rig.tags() == {one.merchant_tag: 2, f"{one.merchant_tag}~1": 1}
    assert await rig.held() == {}
    assert "corrected" in [row["kind"] for row in await rig.rows(schema.history)]


async def test_a_needless_correction_is_corrected(rig: Rig) -> None:
    """Also while all of it is unbilled: setting the record back would change nothing."""
    one = await reported(rig, 7)
    await Plants(rig).post(one, units=2, tag=f"{one.merchant_tag}~1")
    assert kinds(await repaired(rig)) == [("wrong_amount", 2)]
    assert rig.units() == 7
    assert kinds(await reconciled(rig)) == []
    assert await rig.held() == {}


async def test_what_recurly_holds_decides_what_is_corrected(rig: Rig) -> None:
    """Not what is remembered: of a correction that nobody knows of, or one that somebody removed since."""
    one = await reported(rig, 7)
    await Plants(rig).call("PUT", f"/usage/{one.id}", {"amount": 5})
    one.billed_at = rig.far.now()
    await repaired(rig)
    assert rig.units() == 7
    await Plants(rig).sql(schema.intents.delete().where(schema.intents.c.name.endswith("~1")))
    twin = await posted(rig, one)
    twin.billed_at = rig.far.now()
    await repaired(rig)
    corrections = {
        each.merchant_tag: each for each in rig.world.site.usages.values() if "~" in (each.merchant_tag or "")
    }
    assert [each.amount for each in corrections.values()] == [2, -5]
    assert rig.units() == 7
    await rig.recurly._adapter.remove_usage(corrections[f"{one.merchant_tag}~2"].id, key="by hand")
    assert rig.units() == 12
    await repaired(rig)
    assert rig.units() == 7
    assert set(rig.tags()) == {one.merchant_tag, f"{one.merchant_tag}~1", f"{one.merchant_tag}~3"}
    assert kinds(await reconciled(rig)) == []
    assert (await rig.held(), await rig.dead()) == ({}, [])


@ONE_DATABASE
async def test_status_and_metrics_tell_of_the_latest_run(rig: Rig) -> None:
    """Less what was mended since."""
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    assert await drift_status(rig) == (0, 0, False)
    await reconciled(rig)
    assert await drift_status(rig) == (7, 1, True)
    await repaired(rig)
    assert await drift_status(rig) == (0, 0, True)


async def drift_status(rig: Rig) -> tuple[int, int, bool]:
    document = await rig.daemon.admin._document()
    text = rig.daemon.admin._parts.metrics.render((document, {})).decode()
    drift = document["drift"]
    assert f"billingd_drift_units {float(drift['units'])}" in text
    assert drift["running"] is False
    return drift["units"], drift["findings"], drift["checked_at"] is not None
