"""What is taken back, mistaken or missing for a while: nothing is ended for it, nothing stays unbilled."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, Json, Rig, a_rig

from billingd.admin.operations import retry
from billingd.domain.billing import BilledSubscription
from billingd.domain.errors import NotFound, Permanent
from billingd.domain.events import subscription_action
from billingd.resync import Comparison
from billingd.sandbox import control_amplify
from billingd.sandbox.recurly import lifecycle
from billingd.store import held, history, outbox, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
MINUTE = timedelta(minutes=1)
DAY = 24 * HOUR


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        yield made


@pytest.fixture
async def acme(rig: Rig) -> str:
    """A subscription that is linked and active; its id."""
    made = await rig.subscribe("acme")
    await rig.work()
    rig.channels.provider.clear()
    return made


def state(rig: Rig, subscription_id: str) -> str:
    """Its state at Recurly."""
    [billed] = rig.billed(subscription_id)
    return str(billed["state"])


async def link_state(rig: Rig, subscription_id: str) -> str:
    link = await rig.link(subscription_id)
    assert link is not None
    return link.state


async def resync(rig: Rig) -> list[str]:
    """The steps of a resync, which are asked for."""
    rig.unheard.clear()
    found: Comparison = await rig.daemon.resync.run(dry_run=False)
    return [f"{step.op} {step.name}" for step in found.steps]


async def pass_and_work(rig: Rig, span: timedelta, *, step: timedelta = HOUR / 2) -> None:
    """Time passes; traffic is read and actions are run, unlike events."""
    until = rig.far.now() + span
    while rig.far.now() < until:
        rig.pass_(step)
        await rig.poll()
        await rig.drain()


def told(rig: Rig, words: str) -> int:
    return sum(words in each for each in rig.channels.provider)


# At Amplify.


@pytest.mark.parametrize("heard", [True, False])
async def test_a_rejection_that_is_taken_back_in_time_ends_nothing(rig: Rig, acme: str, heard: bool) -> None:
    """What was served all the while is billed, every unit, and the end can still come later."""
    await rig.traffic("acme", 2)
    await rig.move("acme", "reject")
    await rig.work()
    assert await link_state(rig, acme) == "ending"
    rig.pass_(5 * MINUTE)
    await rig.move("acme", "approve")
    if heard:
        await rig.work()
        assert await link_state(rig, acme) == "ending", "its last windows are not read yet"
    rig.unheard.clear()
    rig.pass_(HOUR)
    await rig.traffic("acme", 9)
    rig.pass_(2 * HOUR)
    await rig.poll()  # while it is ending: that is usage after its end
    assert await rig.held() != {}
    await pass_and_work(rig, 4 * HOUR)
    assert (state(rig, acme), await link_state(rig, acme)) == ("active", "active")
    assert rig.units() == 11
    assert [await rig.held(), await rig.dead(), told(rig, "goes on after all")] == [{}, [], 1]
    async with rig.store.read() as tx:
        [entry] = [one for one in await history.of(tx, f"subscription:{acme}") if one.kind == "resumed"]
    assert entry.detail["was_over_at"].endswith("Z")
    assert await resync(rig) == []

    await rig.traffic("acme", 4)
    await rig.move("acme", "cancel")
    await rig.settled()
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert rig.ledger()["totals"]["billed_units"] == 15
    assert [await rig.held(), await rig.dead()] == [{}, []]


@ONE_DATABASE
async def test_one_that_was_never_approved_waits_for_its_approval_again(rig: Rig) -> None:
    """Rejected before it was approved, and pending again before that came to its end."""
    rig.fault("outage", "PUT", "**/subscriptions/acme/approval", side="amplify", times=None)
    acme = await rig.subscribe("acme")
    await rig.work()
    rig.fault("outage", "DELETE", "/subscriptions/*", times=None)
    await rig.move("acme", "reject")
    await rig.ask(subscription_action("acme", acme, because="x"))
    rig.pass_(20 * MINUTE)
    await rig.drain()
    assert await link_state(rig, acme) == "ending"
    subscription = rig.world.tenant.resources.find("Subscription", "acme")
    assert subscription is not None
    rig.world.tenant.set_subresource(subscription, "approval", {"state": "pending"})
    rig.world.faults.clear()
    rig.unheard.clear()
    await pass_and_work(rig, 2 * HOUR, step=10 * MINUTE)
    assert (state(rig, acme), await link_state(rig, acme)) == ("active", "active")
    assert rig.approval("acme") == "approved"


@ONE_DATABASE
async def test_an_end_whose_answer_was_lost_is_no_end_that_can_be_called_off(rig: Rig, acme: str) -> None:
    """Recurly has expired it by then, so that it is held instead: it is served, and nothing bills it."""
    rig.fault("lost", "DELETE", "/subscriptions/*", times=1)
    await rig.move("acme", "reject")
    await rig.work()
    rig.pass_(3 * HOUR)
    await rig.poll()
    await rig.engine.run_once()
    while state(rig, acme) != "expired":
        await rig.drain()
        rig.pass_(MINUTE)
    assert await link_state(rig, acme) in {"ending", "ended"}
    await rig.move("acme", "approve")
    await pass_and_work(rig, 2 * HOUR)
    await rig.work()
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert set(await rig.held()) == {"ended_but_served"}


@pytest.mark.parametrize("heard", [True, False])
async def test_one_that_is_served_again_after_its_end_is_held_until_it_is_over(
    rig: Rig, acme: str, heard: bool
) -> None:
    """Told once; a resync has nothing to add while it stands."""
    await rig.move("acme", "reject")
    await rig.settled()
    assert await link_state(rig, acme) == "ended"
    await rig.move("acme", "approve")
    if heard:
        await rig.work()
    else:
        assert await resync(rig) == ["~ acme"]
        await rig.drain()
    assert set(await rig.held()) == {"ended_but_served"}
    assert "Cancel it in the Marketplace" in (await rig.held())["ended_but_served"]
    assert await resync(rig) == []
    assert told(rig, "is served, and was ended at Recurly") == 1
    await rig.move("acme", "cancel")
    if heard:
        await rig.work()
    else:
        assert await resync(rig) == ["~ acme"]
        await rig.drain()
    assert [await rig.held(), await rig.dead(), await resync(rig)] == [{}, [], []]


@ONE_DATABASE
@pytest.mark.parametrize("heard", [True, False])
async def test_one_that_asks_again_after_its_end_is_held_until_it_is_rejected(
    rig: Rig, acme: str, heard: bool
) -> None:
    """Nobody is served, and nothing could bill it: whoever waits for an approval is told why none comes."""
    await rig.move("acme", "reject")
    await rig.settled()
    subscription = rig.world.tenant.resources.find("Subscription", "acme")
    assert subscription is not None
    asked = {"approval": {"state": "pending", "reason": ""}}
    rig.world.tenant.put_subresource(subscription, "approval", asked)
    if heard:
        await rig.work()
    else:
        assert await resync(rig) == ["~ acme"]
        await rig.drain()
    assert "asks for approval again" in (await rig.held())["ended_but_served"]
    assert told(rig, "asks for approval, and was ended at Recurly") == 1
    assert await resync(rig) == []
    await rig.move("acme", "reject")
    await rig.work()
    assert [await rig.held(), await rig.dead(), await resync(rig)] == [{}, [], []]
    assert state(rig, acme) == "expired"


@ONE_DATABASE
async def test_one_of_the_same_name_is_not_the_one_that_ends(rig: Rig, acme: str) -> None:
    """The name was used again since: that one is served, and the old one ends."""
    await rig.move("acme", "cancel")
    await rig.move("acme", "delete")
    await rig.subscribe("acme", account=False)
    await rig.settled()
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert told(rig, "goes on after all") == 0


# At Recurly.


async def test_a_cancellation_that_is_taken_back_at_recurly_is_made_again(store_url: str) -> None:
    """Amplify serves it no more: it would renew for ever, and be charged each time."""
    async with a_rig(store_url) as rig:
        rig.on_cancel = "cancel"
        rig.start()
        await rig.product()
        await rig.plan()
        await rig.work()
        acme = await rig.subscribe("acme")
        await rig.work()
        rig.pass_(HOUR)
        await rig.move("acme", "cancel")
        await rig.settled()
        assert (state(rig, acme), await link_state(rig, acme)) == ("canceled", "ended")
        assert await resync(rig) == []
        [theirs] = rig.world.site.subscriptions.values()
        for times in (1, 2):
            lifecycle.reactivate(rig.world.site, theirs)
            assert await resync(rig) == ["- acme"]
            await pass_and_work(rig, HOUR, step=5 * MINUTE)
            assert (state(rig, acme), await link_state(rig, acme)) == ("canceled", "ended")
            assert told(rig, "is ended again") == times
            assert await resync(rig) == []
        for _ in range(40):
            rig.pass_(DAY)
        assert state(rig, acme) == "expired"
        assert len(rig.billed(acme)[0]["invoices"]) <= 2
        assert [await rig.held(), await rig.dead()] == [{}, []]


def hide(rig: Rig) -> tuple[Any, Any]:
    """Recurly has no subscription any more."""
    adapter = rig.recurly._adapter
    shown = adapter.get_subscription, adapter.list_live_subscriptions

    async def gone(uuid: str) -> BilledSubscription:
        raise NotFound(f"no {uuid}")

    async def nothing() -> tuple[BilledSubscription, ...]:
        return ()

    adapter.get_subscription, adapter.list_live_subscriptions = gone, nothing
    return shown


def show(rig: Rig, shown: tuple[Any, Any]) -> None:
    adapter = rig.recurly._adapter
    adapter.get_subscription, adapter.list_live_subscriptions = shown


async def test_one_that_recurly_has_no_longer_ends_without_a_dead_letter(rig: Rig, acme: str) -> None:
    """Cancelled in the Marketplace, as the held item asks; should Recurly show it again, it ends there."""
    await rig.traffic("acme", 4)
    shown = hide(rig)
    await pass_and_work(rig, HOUR, step=11 * MINUTE)
    assert set(await rig.held()) == {"ended_at_recurly"}
    await rig.move("acme", "cancel")
    await rig.work()
    await pass_and_work(rig, 5 * HOUR)
    rig.pass_(2 * MINUTE)
    await rig.drain()
    [link] = await rig.rows(schema.subscription_links)
    assert (link["state"], link["billed_state"]) == ("ended", "missing")
    assert await rig.dead() == []
    assert set(await rig.held()) == {"usage_after_end"}
    assert told(rig, "has ended") == 1
    assert told(rig, "is not there any more") == 1
    assert await rig.unfinished() == []

    show(rig, shown)
    assert await resync(rig) == ["- acme"]
    await pass_and_work(rig, 3 * HOUR)
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_first_404_ends_nothing(rig: Rig, acme: str) -> None:
    """A read may lag: it is there a moment later, and ends as it should."""
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(3 * HOUR)
    await rig.poll()
    shown = hide(rig)
    await rig.engine.run_once()
    await rig.drain()
    assert await link_state(rig, acme) == "ending"
    show(rig, shown)
    await rig.settled()
    assert state(rig, acme) == "expired"
    assert told(rig, "was terminated after its last usage") == 1


async def test_usage_waits_at_a_first_404_and_is_sent_once_it_is_shown_again(rig: Rig, acme: str) -> None:
    """After a second one it is held, and released by itself when Recurly has the subscription after all."""
    await rig.traffic("acme", 4)
    shown = hide(rig)
    create = rig.recurly._adapter.create_usage

    async def gone(*_args: Any, **_more: Any) -> str:
        raise NotFound("no subscription")

    rig.recurly._adapter.create_usage = gone
    rig.pass_(2 * HOUR)
    async with rig.store.write() as tx:  # nobody has looked at it since
        await tx.execute(schema.subscription_links.update().values(seen_at=rig.far.now()))
    rig.poller._watch._refreshed_at = rig.clock.now()
    await rig.poll()
    await rig.drain()
    assert await rig.held() == {}
    assert await rig.totals() == {"recorded": 4}
    rig.pass_(11 * MINUTE)
    await rig.drain()
    await rig.poll()
    await rig.drain()
    assert set(await rig.held()) == {"usage_after_end", "ended_at_recurly"}
    show(rig, shown)
    rig.recurly._adapter.create_usage = create
    rig.pass_(11 * MINUTE)
    await rig.poller.watch_periods()
    await rig.drain()
    assert await rig.held() == {}
    assert (await rig.totals(), rig.units()) == ({"reported": 4}, 4)
    assert await rig.dead() == []


@ONE_DATABASE
async def test_usage_that_an_invoice_refused_is_not_released_with_it(rig: Rig, acme: str) -> None:
    """Only what was held because there was no such subscription."""
    async with rig.store.write() as tx:
        item = held.Hold("usage_after_end", "usage:x", "it was expired", None, acme)
        await held.add(tx, item, now=rig.far.now())
        await tx.execute(schema.subscription_links.update().values(billed_state="missing"))
    rig.pass_(11 * MINUTE)
    await rig.poller.watch_periods()
    assert set(await rig.held()) == {"usage_after_end"}


# An end that cannot come.


async def dead_letter(rig: Rig) -> int:
    async with rig.store.read() as tx:
        [row] = await outbox.select(tx, states=["dead"])
    return int(row["id"])


async def test_an_end_that_dead_letters_hold_up_is_told_with_their_number(rig: Rig, acme: str) -> None:
    """It renews until they are mended; then it ends, and nothing is held any more."""
    await rig.traffic("acme", 4)
    create = rig.recurly._adapter.create_usage

    async def bug(*_args: Any, **_more: Any) -> str:
        raise Permanent("a bug")

    rig.recurly._adapter.create_usage = bug
    await rig.report()
    await rig.move("acme", "cancel")
    await rig.work()
    await pass_and_work(rig, 4 * HOUR)
    number = await dead_letter(rig)
    reason = (await rig.held())["end_blocked"]
    assert f"action {number}: Permanent: a bug" in reason
    assert f"billingd outbox retry {number}" in reason
    assert told(rig, "cannot end at Recurly") == 1
    assert state(rig, acme) == "active"
    rig.recurly._adapter.create_usage = create
    assert await retry(rig.store, number, now=rig.far.now())
    await rig.settled()
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert [await rig.held(), await rig.dead(), rig.units()] == [{}, [], 4]


@ONE_DATABASE
async def test_an_end_that_waits_for_more_than_a_day_is_told(rig: Rig, acme: str) -> None:
    """Nothing is dead, and nothing comes: somebody should look."""
    await rig.traffic("acme", 4)
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(2 * HOUR)
    await rig.poll()
    async with rig.store.write() as tx:
        reports = schema.outbox.update().where(schema.outbox.c.kind == "report_usage")
        await tx.execute(reports.values(due_at=rig.far.now() + 2 * DAY))
    await pass_and_work(rig, 22 * HOUR)
    assert await rig.held() == {}
    await pass_and_work(rig, 6 * HOUR)
    assert "not reported within a day" in (await rig.held())["end_blocked"]
    assert [await rig.dead(), told(rig, "cannot end at Recurly")] == [[], 1]
    await pass_and_work(rig, DAY)
    assert (state(rig, acme), await rig.held(), rig.units()) == ("expired", {}, 4)


# What somebody wrote, or took off.


@pytest.mark.parametrize("known", [True, False])
async def test_a_customers_own_po_number_is_nobodys_subscription(rig: Rig, known: bool) -> None:
    """Somebody writes one onto a live subscription that no link knows of: nothing is ended for it."""
    acme = await rig.subscribe("acme")
    await rig.work()
    [theirs] = rig.world.site.subscriptions.values()
    async with rig.store.write() as tx:
        for table in (schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox):
            await tx.execute(table.delete())
    theirs.given["po_number"] = "PO-4711"
    if not known:
        await rig.move("acme", "cancel")
    steps = await resync(rig)
    assert steps == (["+ acme"] if known else [])
    await pass_and_work(rig, 5 * HOUR)
    assert theirs.status == "active"
    if known:  # neither is a second one made beside it
        assert len(rig.world.site.subscriptions) == 1
        reason = (await rig.held())["subscription_unmarked"]
        assert "PO number PO-4711 is somebody's own" in reason
        assert f"put {acme} into its PO number" in reason
    assert await rig.dead() == []


async def test_no_second_one_is_made_beside_a_po_number_of_somebodys_own(rig: Rig) -> None:
    """Where a site takes several of a plan, Recurly would not refuse it."""
    rig.world.site.configure(allow_multiple_subscriptions_per_plan=True)
    acme = await rig.subscribe("acme")
    await rig.work()
    [theirs] = rig.world.site.subscriptions.values()
    async with rig.store.write() as tx:
        for table in (schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox):
            await tx.execute(table.delete())
    theirs.given["po_number"] = "PO-4711"
    rig.pass_(3 * HOUR)
    await rig.ask(subscription_action("acme", acme, because="x"))
    await pass_and_work(rig, HOUR)
    assert len(rig.world.site.subscriptions) == 1
    assert set(await rig.held()) == {"subscription_unmarked"}
    theirs.given["po_number"] = acme
    await pass_and_work(rig, HOUR)
    assert (await rig.held(), await link_state(rig, acme)) == ({}, "active")


@pytest.mark.parametrize("heard", [True, False])
async def test_a_move_within_a_product_that_lost_its_label_is_followed(
    rig: Rig, acme: str, heard: bool
) -> None:
    """What is linked goes on being billed, to whichever linked plan it moves; new ones are not."""
    await rig.plan("gold")
    await rig.work()
    await rig.play(control_amplify.mark_product, {"attributes": {"billingSystem": None}}, name="weather")
    await rig.work()
    made: Json = await rig.move("acme", "migrate", plan="gold")
    await rig.subscribe("beta", plan="gold")
    if heard:
        await rig.work()
    else:
        assert sorted(await resync(rig)) == [f"+ {made['name']}", "- acme"]
        await rig.drain()
    rig.pass_(HOUR)
    await rig.traffic(made["name"], 7)
    await rig.settled()
    await rig.report()
    assert (state(rig, acme), state(rig, made["metadata"]["id"])) == ("expired", "active")
    units = {row["name"]: row["reported_units"] for row in rig.ledger()["subscriptions"]}
    assert units[made["name"]] == 7
    assert rig.approval("beta") == "pending"
    assert await resync(rig) == []
