"""Audit: the open cycle at Recurly against the ledger; what can be undone is, the rest a person is told."""

from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from rig import HOUR, SETTLING, Json, Rig, a_rig

from billingd.admin import operations
from billingd.domain.billing import NewSubscription, NewUsage
from billingd.domain.events import audit_action
from billingd.domain.sending import SECOND_LOOK
from billingd.domain.usage import correction_tag, usage_intent
from billingd.once import Once
from billingd.sandbox.recurly.model import Usage
from billingd.store import held, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
DAY = timedelta(days=1)
USAGE = "/subscriptions/*/add_ons/*/usage"
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


async def audited(rig: Rig) -> None:
    """An audit of the one subscription, now, and what it leads to."""
    [link] = await rig.rows(schema.subscription_links)
    await rig.ask(audit_action(link["subscription_id"], because=f"test {next(numbers)}"))
    await rig.work()


async def items(rig: Rig) -> list[Json]:
    return [row for row in await rig.rows(schema.held) if row["closed_at"] is None]


async def test_a_double_that_is_unbilled_is_removed(rig: Rig) -> None:
    """One of them stays, whichever came first; nobody needs to be told."""
    one = await reported(rig, 7)
    for _ in range(2):
        await posted(rig, one)
    await reported(rig, 5)
    assert rig.units() == 7 + 7 + 7 + 5
    await audited(rig)
    assert rig.units() == 12
    assert set(rig.tags().values()) == {1}
    assert (await items(rig), await rig.dead(), rig.channels.provider) == ([], [], [])
    await audited(rig)
    assert rig.units() == 12


@ONE_DATABASE
@pytest.mark.parametrize("kind", ["lost", "500", "500_committed", "reset", "html_502"])
async def test_a_removal_without_an_answer_takes_effect_once(rig: Rig, kind: str) -> None:
    """The record is looked for before it is removed again, and the right one stays."""
    one = await reported(rig, 7)
    await posted(rig, one)
    rig.fault(kind, "DELETE", "/usage/*", times=2)
    await audited(rig)
    await rig.work(HOUR)
    assert rig.world.faults.counts[kind] >= 1
    assert list(rig.tags().values()) == [1]
    assert rig.units() == 7
    assert {item["kind"] for item in await items(rig)} <= {"idempotency_doubted"}
    assert (await rig.dead(), await rig.unfinished()) == ([], [])


async def test_a_double_that_was_billed_is_held_for_a_refund(rig: Rig) -> None:
    """It cannot be removed: a person is told once, with its units."""
    one = await reported(rig, 7)
    double = await posted(rig, one)
    double.billed_at = one.billed_at = rig.far.now()
    await audited(rig)
    [item] = await items(rig)
    assert (item["kind"], item["units"]) == ("double_record", 7)
    assert item["subscription_id"] is not None
    assert double.id in item["reason"] or one.id in item["reason"]
    await audited(rig)
    assert len(await items(rig)) == 1
    assert sum("differs" in told for told in rig.channels.provider) == 1
    assert rig.units() == 14
    assert not [call for call in rig.world.calls if " DELETE " in call], "Recurly would refuse it"


@ONE_DATABASE
async def test_of_a_billed_and_an_unbilled_double_the_billed_one_stays(rig: Rig) -> None:
    """It cannot be removed, so the other one is."""
    one = await reported(rig, 7)
    double = await posted(rig, one)
    billed, unbilled = sorted((one, double), key=lambda usage: usage.id, reverse=True)
    billed.billed_at = rig.far.now()
    await audited(rig)
    assert unbilled.id not in rig.world.site.usages
    assert billed.id in rig.world.site.usages
    assert await items(rig) == []


async def test_a_record_that_billingd_never_made_is_held_until_it_is_gone(rig: Rig) -> None:
    """Never removed: somebody may have meant it."""
    one = await reported(rig, 7)
    foreign = [await posted(rig, one, tag=tag) for tag in ("by hand", "bd1:0123456789abcdef:of:another")]
    await audited(rig)
    await audited(rig)
    [item] = await items(rig)
    assert (item["kind"], item["units"]) == ("foreign_record", 14)
    assert all(usage.id in item["reason"] for usage in foreign)
    assert sum("differs" in told for told in rig.channels.provider) == 1
    assert rig.units() == 21
    for usage in foreign:
        await rig.recurly._adapter.remove_usage(usage.id, key=f"gone-{usage.id}")
    await audited(rig)
    assert await items(rig) == []
    [closed] = await rig.rows(schema.held)
    assert closed["resolution"] == "they are gone"


@ONE_DATABASE
async def test_another_amount_under_our_tag_is_held(rig: Rig) -> None:
    """Somebody edited it: the difference is told, nothing is changed."""
    one = await reported(rig, 7)
    one.amount = 9
    await audited(rig)
    [item] = await items(rig)
    assert (item["kind"], item["units"]) == ("wrong_amount", 2)
    assert one.merchant_tag is not None
    assert one.merchant_tag in item["reason"]
    one.amount = 7
    assert await operations.release(rig.store, item["id"], now=rig.far.now())
    await rig.work()
    assert await items(rig) == [], "released, it was audited again, and agrees"


async def test_corrections_that_leave_something_over_are_held(rig: Rig) -> None:
    """A right record beside a correction that nobody needs is wrong, too; all of it counts."""
    one = await reported(rig, 7)
    needless = await posted(rig, one, tag=f"{one.merchant_tag}~1")
    needless.amount = 2
    await audited(rig)
    [item] = await items(rig)
    assert (item["kind"], item["units"]) == ("wrong_amount", 2)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    await audited(rig)
    [item] = await items(rig)
    assert (item["kind"], item["units"]) == ("wrong_amount", 9), "no double beside it: it is counted already"
    needless.amount = -7
    await audited(rig)
    assert await items(rig) == []


@ONE_DATABASE
async def test_audits_come_by_themselves(rig: Rig) -> None:
    """Once a day, and before a bill."""
    one = await reported(rig, 7)
    await posted(rig, one)
    rig.pass_(DAY)
    await rig.poll()
    await rig.work()
    assert rig.units() == 7
    await posted(rig, one)
    rig.world.site.move_bill_date(one.subscription.uuid, rig.far.now() + timedelta(minutes=9))
    rig.start()
    await rig.poll()
    rig.pass_(timedelta(minutes=7, seconds=30))
    await rig.work()
    assert rig.units() == 7


async def doubt(rig: Rig) -> list[Json]:
    async with rig.store.read() as tx:
        return await held.standing(tx, kind="idempotency_doubted")


async def doubted(rig: Rig, kind: str = "reset", **args: Any) -> Json:
    """A key was sent again and not recognised, for its first request never arrived (yet); what is held."""
    rig.fault(kind, "POST", USAGE, args=args)
    await rig.traffic("acme", 7)
    rig.pass_(2 * HOUR)
    await rig.poll()
    for _ in range(300):
        await rig.drain()
        if found := await doubt(rig):
            [item] = found
            return item
        rig.pass_(timedelta(seconds=1))
    raise AssertionError("nobody doubted anything")


async def test_a_doubt_about_keys_ends_with_a_clean_audit(rig: Rig) -> None:
    """It asks for one by itself: after the settling time each record is there once, and all is well."""
    item = await doubted(rig)
    [link] = await rig.rows(schema.subscription_links)
    assert item["subscription_id"] == link["subscription_id"]
    await rig.work(timedelta(minutes=4))
    assert await doubt(rig) == []
    [closed] = await rig.rows(schema.held)
    assert closed["closed_at"] - closed["since"] >= SETTLING
    assert closed["resolution"] == "audited: each record is there once"
    assert sum("idempotency keys" in told for told in rig.channels.provider) == 1
    assert rig.units() == 7


@ONE_DATABASE
async def test_a_doubt_stays_while_a_request_may_still_take_effect(rig: Rig) -> None:
    """An audit within the settling time proves nothing."""
    item = await doubted(rig)
    await rig.ask(audit_action(item["subscription_id"], because="too soon"))
    await rig.drain()
    assert len(await doubt(rig)) == 1


async def test_a_subscription_made_twice_is_found_while_its_key_is_doubted(rig: Rig) -> None:
    """Clean usage alone proves nothing of it: the doubt may be of its own creation."""
    one = await reported(rig, 7)
    first = one.subscription
    acme = str(first.given["po_number"])
    rig.world.site.configure(allow_multiple_subscriptions_per_plan=True)
    rig.pass_(timedelta(minutes=2))
    new = NewSubscription(first.plan.code, first.account.code, "USD", "manual", acme, ())
    second = await rig.recurly._adapter.create_subscription(new, key="the same, unheeded")
    await doubted_about(rig, acme)
    rig.pass_(SETTLING + SECOND_LOOK)
    await rig.work()
    assert set(await rig.held()) == {"idempotency_ignored", "orphan_subscription"}
    async with rig.store.read() as tx:
        [item] = await held.standing(tx, kind="orphan_subscription")
    assert second.uuid in item["reason"]
    assert first.uuid in item["reason"]
    assert sum("was made twice" in told for told in rig.channels.provider) == 1


async def doubted_about(rig: Rig, subscription_id: str, *, write: str = "") -> None:
    """A key of its creation, or of another write, was sent again and not recognised."""
    once = Once(rig.store, rig.clock, settling=SETTLING, attempt=timedelta(0), doubt=lambda: None)
    async with rig.store.write() as tx:
        name = write or f"subscription:{subscription_id}"
        await once._heed_doubt(tx, "create usage", name, subscription_id)


@ONE_DATABASE
async def test_a_double_that_was_billed_before_it_was_audited_is_proven_and_held(rig: Rig) -> None:
    """The cycle is over when the audit comes that the doubt asked for: it looks at what was doubted."""
    rig.fault("ignore_idempotency_key", "POST", USAGE, times=None)
    item = await doubted(rig, "late", seconds=20)
    rig.pass_(timedelta(seconds=20))
    await rig.world.faults.carry_out_due()
    assert list(rig.tags().values()) == [2]
    await rig.renew()
    link = await rig.link(item["subscription_id"])
    assert link is not None
    await rig.daemon.poller._watch.look_at(link)
    await rig.work(timedelta(minutes=4))
    assert set(await rig.held()) == {"idempotency_ignored", "double_record"}
    [told] = [one for one in await items(rig) if one["kind"] == "double_record"]
    assert told["units"] == 7


@ONE_DATABASE
@pytest.mark.parametrize("price", ["flat", "volume"])
async def test_a_double_of_which_no_answer_told_is_found_all_the_same(rig: Rig, price: str) -> None:
    """Neither sending got an answer, so nothing was doubted: it is audited once a look has found it."""
    rig.fault("ignore_idempotency_key", "POST", USAGE, times=None)
    rig.fault("late", "POST", USAGE, times=2, args={"seconds": 20})
    await rig.traffic("acme", 7)
    rig.pass_(2 * HOUR)
    await rig.poll()
    while rig.world.faults.counts["late"] < 2:
        await rig.drain()
        rig.pass_(timedelta(seconds=1))
    [subscription] = rig.world.site.subscriptions.values()
    if price == "volume":  # Recurly takes no more of that cycle, so that it is looked for, and not sent
        async with rig.store.write() as tx:
            await tx.execute(schema.add_on_links.update().values(tier_type="volume"))
    rig.pass_(timedelta(seconds=20))
    await rig.world.faults.carry_out_due()
    await rig.renew()
    link = await rig.link(str(subscription.given["po_number"]))
    assert link is not None
    await rig.daemon.poller._watch.look_at(link)
    await rig.work(timedelta(minutes=4))
    assert list(rig.tags().values()) == [2]
    assert set(await rig.held()) == {"double_record"}


@ONE_DATABASE
async def test_a_doubted_record_that_was_billed_once_clears_its_doubt(rig: Rig) -> None:
    """One list at its time, beside those of the cycles."""
    item = await doubted(rig)
    await rig.renew()
    link = await rig.link(item["subscription_id"])
    assert link is not None
    await rig.daemon.poller._watch.look_at(link)
    rig.world.calls.clear()
    await rig.work(timedelta(minutes=4))
    assert (await rig.held(), rig.units(), lists(rig)) == ({}, 7, 3)


@ONE_DATABASE
async def test_a_doubt_stays_while_no_list_shows_its_record(rig: Rig) -> None:
    """A list that lags would show its twin no sooner."""
    await doubted(rig)
    rig.fault("list_lag", "GET", USAGE, times=2, args={"seconds": 3600})
    await rig.work(timedelta(minutes=4))
    assert len(await doubt(rig)) == 1
    await audited(rig)
    assert await doubt(rig) == []


@ONE_DATABASE
async def test_a_doubt_ends_with_a_record_that_is_there_once_whatever_its_units(rig: Rig) -> None:
    """What differs is held of itself, until a person writes it off: keys are relied on again all the same."""
    await doubted(rig)
    [made] = rig.world.site.usages.values()
    made.amount = 4
    await rig.work(timedelta(minutes=4))
    assert set(await rig.held()) == {"wrong_amount"}
    async with rig.store.read() as tx:
        [item] = await held.standing(tx)
    assert await operations.write_off(rig.store, item["id"], reason="meant", now=rig.clock.now())
    rig.pass_(DAY)
    await rig.poll()
    await rig.work(HOUR)
    assert await rig.held() == {}


@pytest.mark.parametrize("removed", [False, True])
@ONE_DATABASE
async def test_a_doubt_is_audited_daily_after_the_end_and_says_what_it_waits_for(
    rig: Rig, removed: bool
) -> None:
    """Its own audit met a list that lagged. Of a record that is removed at Recurly only a person can say."""
    item = await doubted(rig)
    rig.fault("list_lag", "GET", USAGE, times=2, args={"seconds": 3600})
    await rig.work(timedelta(minutes=4))
    if removed:
        [made] = rig.world.site.usages
        await rig.recurly._adapter.remove_usage(made, key="by hand")
    await rig.move("acme", "cancel")
    await rig.settled()
    [billed] = rig.billed(item["subscription_id"])
    assert billed["state"] == "expired"
    rig.pass_(DAY)
    await rig.poll()
    await rig.work(HOUR)
    standing = await doubt(rig)
    assert len(standing) == removed
    for one in standing:
        assert one["reason"].count("An audit could not end this doubt: Recurly does not show the record") == 1


@ONE_DATABASE
async def test_a_correction_that_was_made_twice_is_told_of(rig: Rig) -> None:
    """It is billed with its twin when its doubt is audited, and what it corrects was billed before."""
    one = await reported(rig, 7)
    acme = str(one.subscription.given["po_number"])
    one.amount = 4
    tag = correction_tag(str(one.merchant_tag), 1)
    for _ in range(2):
        (await posted(rig, one, tag=tag)).amount = 3
    await doubted_about(rig, acme, write=usage_intent(tag))
    await rig.renew()
    link = await rig.link(acme)
    assert link is not None
    await rig.daemon.poller._watch.look_at(link)
    rig.pass_(SETTLING + SECOND_LOOK)
    await rig.work()
    assert set(await rig.held()) == {"idempotency_doubted", "wrong_amount"}


@pytest.mark.parametrize("double", [False, True])
async def test_the_clean_audit_of_one_says_nothing_of_another(rig: Rig, double: bool) -> None:
    """Keys are relied on again only when each doubted subscription was found clean."""
    other = await rig.subscribe("other")
    await rig.work()
    one = await reported(rig, 7)
    acme = str(one.subscription.given["po_number"])
    await rig.traffic("other", 5)
    await rig.report()
    await doubted_about(rig, acme)
    rig.pass_(SETTLING)
    await doubted_about(rig, other)
    if double:
        [usage] = [each for each in rig.world.site.usages.values() if each.amount == 5]
        await posted(rig, usage)
    rig.pass_(SECOND_LOOK)
    await rig.work()
    assert [item["subscription_id"] for item in await doubt(rig)] == [other]
    rig.pass_(SETTLING)
    await rig.work()
    assert list(await rig.held()) == (["idempotency_ignored"] if double else [])
    assert rig.units() == 12
    assert sum("may ignore idempotency keys" in told for told in rig.channels.provider) == 1


@ONE_DATABASE
async def test_a_later_doubt_of_the_same_subscription_waits_for_its_own_audit(rig: Rig) -> None:
    """The request of the later one may still take effect when the earlier one's audit comes."""
    one = await reported(rig, 7)
    acme = str(one.subscription.given["po_number"])
    await doubted_about(rig, acme)
    rig.pass_(SETTLING)
    await doubted_about(rig, acme)
    rig.pass_(SECOND_LOOK)
    await rig.work()
    assert len(await doubt(rig)) == 1
    rig.pass_(SETTLING)
    await rig.work()
    assert await rig.held() == {}


async def test_a_site_that_ignores_keys_ends_with_each_record_once(rig: Rig) -> None:
    """Answers are lost and lists lag: what was made twice is found and removed, and then made no more."""
    rig.fault("ignore_idempotency_key", "POST", USAGE, times=None)
    for number in range(4):
        await rig.traffic("acme", number + 1)
        rig.fault("lost", "POST", USAGE)
        rig.fault("list_lag", "GET", USAGE, times=1, args={"seconds": 3600})
        await rig.report()
        await rig.work(HOUR)
        assert set(rig.tags().values()) == {1}
        assert len(rig.world.site.removed_usages) == 1, "the first retry is the price, and there is no other"
        assert list(await rig.held()) == ["idempotency_ignored"], "the audit it asked for found a double"
    assert rig.units() == 1 + 2 + 3 + 4
    await audited(rig)
    assert list(await rig.held()) == ["idempotency_ignored"], "which only a person may take back"
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_double_among_corrections_is_found_too(rig: Rig) -> None:
    """A correction is unbilled in a cycle that was billed: it can still be undone, and must be."""
    rig.pass_(2 * HOUR)
    await rig.traffic("acme", 3)
    began = rig.far.now() + timedelta(minutes=10)
    rig.pass_(timedelta(minutes=10))
    await rig.renew()
    await rig.poll()
    await rig.work()  # the day's audit is over, so that the next list is the look-up's
    await rig.traffic("acme", 4, at=began - timedelta(minutes=5))
    rig.fault("ignore_idempotency_key", "POST", USAGE, times=None)
    rig.fault("lost", "POST", USAGE)
    rig.fault("list_lag", "GET", USAGE, times=1, args={"seconds": 3600})
    await rig.report()
    await rig.work(HOUR)
    assert "idempotency_ignored" in await rig.held(), "it was made twice; the audit that was asked for saw it"
    assert set(rig.tags().values()) == {1}
    assert rig.units() == 7


def lists(rig: Rig) -> int:
    """How often usage was listed."""
    return sum(
        times
        for call, times in rig.world.calls.items()
        if call.startswith("recurly GET") and call.endswith("/usage")
    )


@ONE_DATABASE
async def test_corrections_of_one_moment_are_looked_for_at_once(rig: Rig) -> None:
    """However many records have the same time: one list for it, beside those of the cycles."""
    at = rig.far.now()
    await rig.traffic("acme", 3, at=at)
    await rig.report()
    await rig.renew()
    for units in (4, 5, 6):
        await rig.traffic("acme", units, at=at)
        await rig.report()
    times = {one.usage_timestamp for one in rig.world.site.usages.values() if one.billed_at is None}
    assert (len(rig.tags()), len(times)) == (4, 1)
    twin = next(one for one in rig.world.site.usages.values() if one.billed_at is None)
    (await posted(rig, twin)).billed_at = rig.far.now()
    rig.world.calls.clear()
    await audited(rig)
    assert lists(rig) == 3
    assert (rig.units(), await rig.held()) == (18, {}), "the unbilled one of the two is gone"


@ONE_DATABASE
async def test_usage_of_a_trial_is_not_looked_for_one_by_one(store_url: str) -> None:
    """It stays unbilled for ever: each audit would ask for each record of it."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await rig.work()
        await rig.subscribe_to_a_trial(1)
        for units in (1, 2, 3):
            first = await reported(rig, units)
        rig.pass_(DAY)
        await rig.poll()
        await rig.work()
        assert first.subscription.cycle.kind == "paid"
        await posted(rig, first)
        rig.world.calls.clear()
        await audited(rig)
        assert lists(rig) == 2
        assert (rig.units(), await rig.held()) == (6, {}), "a double among them is found all the same"
