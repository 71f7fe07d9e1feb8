"""Report: one usage record to Recurly, once; the real handler and adapters against the sandbox."""

from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, Crash, Rig, a_rig

from billingd.admin import operations
from billingd.domain.attempts import Action
from billingd.domain.billing import NewUsage
from billingd.domain.errors import Unknown
from billingd.sandbox.faults import KINDS
from billingd.store import held, schema, usage

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


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


USAGE = "/subscriptions/*/add_ons/*/usage"


async def test_served_is_recorded_is_reported_is_billed(rig: Rig) -> None:
    """Each window is one record, with its tag and a time inside the window; the invoice has the sum."""
    for units in (3, 4, 5):
        await rig.traffic("acme", units)
        rig.pass_(HOUR)
    await rig.report()
    records = await rig.rows(schema.usage_records)
    assert [record["units"] for record in records] == [3, 4, 5]
    assert all(record["state"] == "reported" for record in records)
    assert rig.tags() == Counter(record["merchant_tag"] for record in records)
    at_recurly = rig.world.site.usages.values()
    assert [each.usage_timestamp for each in at_recurly] == [each["usage_timestamp"] for each in records]
    await rig.renew()
    book = rig.ledger()
    assert book["agrees"]
    assert book["totals"] == {
        "served_units": 12,
        "reported_units": 12,
        "unbilled_units": 0,
        "billed_units": 12,
    }


async def test_two_subscribers_of_one_organisation_are_read_in_one_call(rig: Rig) -> None:
    """Calls to Amplify do not grow with subscriptions, and each gets its own units."""
    for name in ("beta", "gamma"):
        await rig.subscribe(name)
    await rig.work()
    for units, name in enumerate(("acme", "beta", "gamma"), start=1):
        await rig.traffic(name, units)
    rig.world.calls.clear()
    await rig.report()
    assert [n for path, n in rig.world.calls.items() if "chartGroupedBy" in path] == [1]
    assert rig.ledger()["agrees"]


async def test_more_than_nine_digits_reach_recurly_whole(rig: Rig) -> None:
    """Split over several records, billed as one sum."""
    await rig.traffic("acme", 2_345_678_901)
    await rig.report()
    assert len(rig.tags()) == 3
    assert rig.ledger()["totals"]["reported_units"] == 2_345_678_901


async def test_late_traffic_is_another_revision(rig: Rig) -> None:
    """What arrives after the window was reported is booked as the difference, under a tag of its own."""
    await rig.traffic("acme", 3)
    await rig.traffic("acme", 4, arrives=rig.far.now() + 3 * HOUR)
    await rig.report()
    assert rig.units() == 3
    rig.pass_(2 * HOUR)
    await rig.report()
    assert rig.units() == 7
    assert set(rig.tags().values()) == {1}
    assert [row["revision"] for row in await rig.rows(schema.usage_records)] == [1, 2]
    assert rig.ledger()["agrees"]


@pytest.mark.parametrize(
    ("store_url", "kind"),
    [
        (database, kind)
        for kind, database in zip(
            sorted(set(KINDS) - {"slow", "list_lag", "outage", "refuse"}),
            ["sqlite", "postgres"] * 9,
            strict=False,
        )
    ],
    indirect=["store_url"],
)
async def test_whatever_goes_wrong_on_the_way_each_unit_is_billed_once(rig: Rig, kind: str) -> None:
    """Each fault strikes twice in a row, at the post and at the look-up; the sum is exact in the end."""
    await rig.traffic("acme", 7)
    rig.fault(kind, "POST", USAGE, times=2)
    if kind not in {"lost", "fin", "cut", "garbage", "not_json", "ignore_idempotency_key"}:
        rig.fault(kind, "GET", USAGE, times=1)
    await rig.report()
    await rig.work(3 * HOUR)
    assert rig.world.faults.counts[kind] >= 1
    assert list(rig.tags().values()) == [1]
    assert rig.ledger()["totals"]["reported_units"] == 7
    assert await rig.unfinished() == []
    assert await rig.dead() == []


@ONE_DATABASE
async def test_an_ignored_key_is_caught_by_the_look_up(rig: Rig) -> None:
    """Recurly forgets the key, and the answer was lost: the tag is found, nothing is sent again."""
    await rig.traffic("acme", 7)
    rig.fault("ignore_idempotency_key", "POST", USAGE, times=None)
    rig.fault("lost", "POST", USAGE)
    await rig.report()
    await rig.work(HOUR)
    assert list(rig.tags().values()) == [1]


@ONE_DATABASE
async def test_a_stored_failure_is_left_behind(rig: Rig) -> None:
    """The same key would repeat a 500 for an hour: after the settling time a new one is taken."""
    await rig.traffic("acme", 7)
    rig.fault("500", "POST", USAGE)
    await rig.report()
    began = rig.far.now()
    while not rig.tags():
        rig.pass_(timedelta(seconds=30))
        await rig.drain()
    assert rig.far.now() - began < timedelta(minutes=10)
    assert list(rig.tags().values()) == [1]
    [intent] = [row for row in await rig.rows(schema.intents) if row["name"].startswith("usage:")]
    assert (intent["epoch"], intent["state"]) == (2, "done")


@ONE_DATABASE
async def test_billed_usage_is_found_too(rig: Rig) -> None:
    """The answer is lost and the period is billed before the look-up: the record is not posted again."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", USAGE)
    rig.pass_(2 * HOUR)
    await rig.poll()
    while not rig.tags():
        await rig.drain()
    await rig.renew()
    rig.pass_(2 * HOUR)
    await rig.work(HOUR)
    assert list(rig.tags().values()) == [1]
    assert rig.ledger()["totals"]["billed_units"] == 7
    assert await rig.unfinished() == []


async def test_usage_of_one_that_expired_unseen_is_held_and_told_once(rig: Rig) -> None:
    """The subscription expired at Recurly behind our back: held, not dropped, and not tried for ever."""
    [subscription] = rig.world.site.subscriptions.values()
    await rig.traffic("acme", 7)
    rig.pass_(2 * HOUR)
    rig.world.site.expire(subscription.uuid)
    rig.pass_(timedelta(minutes=1))
    await rig.poll()
    await rig.work(HOUR)
    assert await rig.totals() == {"held": 7}
    assert set(await rig.held()) == {"usage_after_end", "ended_at_recurly"}
    assert "expired" in (await rig.held())["usage_after_end"]
    assert sum("Usage is held" in told for told in rig.channels.provider) == 1
    assert (await rig.unfinished(), await rig.dead()) == ([], [])
    async with rig.store.read() as tx:
        [item] = await held.standing(tx, kind="usage_after_end")
        assert (item["units"], (await held.count(tx))["units"]) == (7, 7)


async def test_a_released_record_is_sent_under_a_new_key(rig: Rig) -> None:
    """Recurly would repeat the refusal it has stored under the old one."""
    [attached] = [a for s in rig.world.site.subscriptions.values() for a in s.add_ons.values()]
    await rig.traffic("acme", 7)
    attached.created_at += 5 * HOUR  # Recurly refuses usage from before the add-on
    await rig.report()
    await rig.work()
    assert set(await rig.held()) == {"usage_refused"}
    assert "Recurly answered" in (await rig.held())["usage_refused"]
    assert await rig.dead() == []
    attached.created_at -= 5 * HOUR
    async with rig.store.write() as tx:
        [item] = await held.standing(tx)
        assert await usage.release(tx, item["action"]["args"]["record"])
        await held.close_one(tx, item["id"], resolution="released", now=rig.far.now())
    action = item["action"]
    await rig.ask(Action(action["kind"], action["subject"], "release:1", action["args"]))
    await rig.work()
    assert rig.units() == 7
    assert await rig.totals() == {"reported": 7}


@ONE_DATABASE
async def test_usage_of_an_ended_subscription_is_never_sent(rig: Rig) -> None:
    """Recurly may accept a date inside its life, and would never invoice it: released, it is held again."""
    await rig.traffic("acme", 3)
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(4 * HOUR)
    await rig.report()
    await rig.work(HOUR)
    [link] = await rig.rows(schema.subscription_links)
    assert link["state"] == "ended"
    await rig.traffic("acme", 2, force=True, at=link["usage_from"].isoformat())
    await rig.report()
    [item] = await rig.rows(schema.held)
    assert (item["kind"], item["units"]) == ("usage_after_end", 2)
    sent = sum(rig.tags().values())
    assert await operations.release(rig.store, item["id"], now=rig.far.now())
    await rig.work(HOUR)
    [_, again] = await rig.rows(schema.held)
    assert (again["kind"], again["units"], again["closed_at"]) == ("usage_after_end", 2, None)
    assert "the Recurly subscription is expired" in again["reason"]
    assert sum(rig.tags().values()) == sent


@ONE_DATABASE
async def test_usage_read_while_the_end_has_no_answer_is_never_sent(rig: Rig) -> None:
    """It is over at Recurly and only nobody here knows yet: late usage is held, not sent and never billed."""
    [link] = await rig.rows(schema.subscription_links)
    terminate = rig.recurly._adapter.terminate_subscription
    posted: list[str] = []

    async def late(*args: Any, **kwargs: Any) -> Any:
        await terminate(*args, **kwargs)
        if not rig.recurly._adapter.__dict__.get("create_usage"):
            rig.recurly._adapter.create_usage = accepts
            await rig.traffic("acme", 3, force=True, at=link["usage_from"].isoformat())
            await rig.poll()
        raise Unknown("the answer was lost")

    async def accepts(new: NewUsage, **_kwargs: Any) -> str:  # as Recurly may, which looks at dates
        posted.append(new.merchant_tag)
        return "u1"

    rig.recurly._adapter.terminate_subscription = late
    await rig.move("acme", "cancel")
    await rig.settled()
    assert await rig.totals() == {"held": 3}
    assert set(await rig.held()) == {"usage_after_end"}
    assert posted == []


async def test_usage_of_a_paused_subscription_waits(rig: Rig) -> None:
    """Recurly takes no usage while paused: it stays pending, costs no attempt, and is reported afterwards."""
    [subscription] = rig.world.site.subscriptions.values()
    await rig.traffic("acme", 7)
    rig.pass_(HOUR + HOUR / 2)
    rig.world.site.pause(subscription.uuid)
    await rig.report()
    await rig.work(15 * LOOK_AGAIN, rounds=15)
    assert rig.units() == 0
    assert await rig.held() == {}
    [why] = await rig.waits("report_usage")
    assert "paused" in why
    rig.world.site.resume(subscription.uuid)
    await rig.work(LOOK_AGAIN)
    assert rig.units() == 7


@ONE_DATABASE
async def test_two_records_under_one_tag_need_a_person(rig: Rig) -> None:
    """A tag that is there with other units, or twice, is never settled by guessing."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", USAGE)
    await rig.report()
    [record] = rig.world.site.usages.values()
    record.amount = 8
    await rig.work(HOUR)
    [error] = await rig.dead()
    assert "under the tag" in error
    assert await rig.totals() == {"recorded": 7}


@pytest.mark.parametrize(
    ("store_url", "later"), [("sqlite", "after the key"), ("postgres", "soon")], indirect=["store_url"]
)
async def test_usage_is_billed_once_whichever_step_dies(rig: Rig, later: str) -> None:
    """From the reading to the settled report: whatever dies, each tag is at Recurly exactly once."""
    served, step, died = 0, 0, True
    while died:
        step += 1
        await rig.traffic("acme", step)
        served += step
        rig.pass_(2 * HOUR)
        rig.steps.arm(step)
        try:
            await rig.poll()
        except (Crash, BaseExceptionGroup):  # it may die in a task group
            died = True
        else:
            died = await rig.dies()
        if later == "after the key":
            rig.pass_(2 * HOUR)
        rig.start()
        await rig.poll()
        await rig.mended()
        assert rig.units() == served, f"step {step}"
        assert set(rig.tags().values()) == {1}
    assert step > 8
    assert (await rig.dead(), await rig.held()) == ([], {})
    assert rig.ledger()["agrees"]
