"""Life after provisioning, of subscriptions: moved, rejected, made anew, ended where nobody here asked."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, Json, Rig, a_rig

from billingd.admin.operations import discard, write_off
from billingd.domain.catalog import Subscription
from billingd.domain.errors import NotFound
from billingd.domain.events import subscription_action
from billingd.provisioning.linking import USAGE_FROM, Linker
from billingd.sandbox import control_amplify
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.times import api_time
from billingd.store import held, links, outbox, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        made.channels.provider.clear()
        yield made


@pytest.fixture
async def acme(rig: Rig) -> str:
    """An approved subscription."""
    made = await rig.subscribe()
    await rig.work()
    return made


def body(rig: Rig, name: str) -> Json:
    """A subscription as Amplify holds it."""
    found = rig.world.tenant.resources.find("Subscription", name)
    assert found is not None
    return found.body


def state(rig: Rig, subscription_id: str) -> str:
    """What Recurly calls the one that is marked so."""
    [billed] = rig.billed(subscription_id)
    return str(billed["state"])


async def link_state(rig: Rig, subscription_id: str) -> str | None:
    link = await rig.link(subscription_id)
    return None if link is None else link.state


async def standing(rig: Rig, kind: str) -> list[dict[str, Any]]:
    async with rig.store.read() as tx:
        return await held.standing(tx, kind=kind)


def told(rig: Rig, words: str) -> int:
    """How often the provider was told something."""
    return sum(words in each for each in rig.channels.provider)


# Moved to another plan.


def old_first(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.payload["name"] != "acme")


def new_first(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.payload["name"] == "acme")


@pytest.mark.parametrize("order", [old_first, new_first])
async def test_a_migrated_subscription_ends_with_its_usage_and_the_new_one_is_linked(
    rig: Rig, acme: str, order: Any
) -> None:
    """The new one was never pending, so nobody approves it again; each is billed for its own, once."""
    await rig.plan("gold")
    await rig.work()
    await rig.traffic("acme", 4)
    rig.pass_(HOUR)
    await rig.traffic("acme", 2)
    made = await rig.move("acme", "migrate", plan="gold")
    moved_at = rig.far.now()
    new, name = made["metadata"]["id"], made["name"]
    rig.pass_(timedelta(minutes=2))
    await rig.hear(order)
    await rig.drain()
    rig.pass_(timedelta(minutes=10))
    await rig.traffic(name, 5)
    await rig.settled()
    await rig.report()
    assert (state(rig, acme), state(rig, new)) == ("expired", "active")
    [ended] = [row for row in await rig.rows(schema.subscription_links) if row["subscription_id"] == acme]
    assert abs(ended["usage_until"] - moved_at) < timedelta(seconds=1)
    units = {row["name"]: row["reported_units"] for row in rig.ledger()["subscriptions"]}
    assert units == {"acme": 6, name: 5}
    assert not any(row["approval"] == "pending" for row in rig.ledger()["subscriptions"])
    assert [await rig.held(), await rig.dead()] == [{}, []]


async def test_what_was_served_between_the_move_and_the_link_is_held_and_told(rig: Rig, acme: str) -> None:
    """Recurly takes no usage of before it had the subscription: a person charges it, or writes it off."""
    await rig.plan("gold")
    await rig.work()
    made = await rig.move("acme", "migrate", plan="gold")
    new, name = made["metadata"]["id"], made["name"]
    rig.pass_(timedelta(minutes=20))
    await rig.traffic(name, 3)
    rig.pass_(2 * HOUR)
    await rig.traffic(name, 4)
    await rig.traffic(name, 2, arrives=rig.far.now() + 12 * HOUR)
    rig.pass_(timedelta(minutes=5))
    await rig.work()
    await rig.traffic(name, 5)
    await rig.report()
    await rig.drain()
    [item] = await standing(rig, "before_link")
    assert (item["units"], item["subscription_id"], item["amount"]) == (7, new, "3.5")
    assert told(rig, "Usage is held") == 1
    assert told(rig, "before Recurly had it") == 1
    await rig.report()
    assert told(rig, "Usage is held") == 1
    assert await rig.totals() == {"reported": 5}
    assert await write_off(rig.store, item["id"], reason="charged by hand", now=rig.far.now())
    await rig.report()
    assert await rig.held() == {}
    rig.pass_(12 * HOUR)  # some of it shows up late
    await rig.report()
    [item] = await standing(rig, "before_link")
    assert item["units"] == 9
    assert await rig.totals() == {"reported": 5}
    assert await rig.dead() == []


async def test_what_an_adopted_subscription_was_served_before_is_not_ours(rig: Rig, acme: str) -> None:
    """Another program billed it until the cut-over; it is active at once, and only told of what follows."""
    await rig.traffic("acme", 3)
    [made] = rig.billed(acme)
    async with rig.store.write() as tx:
        for table in ("billing_periods", "subscription_links", "intents", "outbox"):
            await tx.execute(getattr(schema, table).delete())
        [plan] = await links.plans(tx)
    rig.pass_(timedelta(minutes=20))
    since = rig.far.now().replace(microsecond=0)
    await rig.traffic("acme", 4)
    linker = Linker(
        rig.store,
        rig.clock,
        rig.recurly,
        rig.daemon.outbox,  # type: ignore[arg-type]  # finds nothing that was lost here
        organization_id="1",
        window=rig.window,
    )
    subscription = await rig.amplify.find_subscription("acme")
    assert isinstance(subscription, Subscription)
    theirs = await rig.recurly.get_subscription(made["uuid"])
    link = await linker.link(subscription, plan, theirs, usage_from=since, approved_at=rig.far.now())
    assert (link.state, link.adopted) == ("active", True)
    await rig.report()
    assert await rig.totals() == {"reported": 4}
    assert await rig.held() == {}
    mails = len(rig.channels.mails)
    await rig.ask(subscription_action("acme", acme, because="again"))
    await rig.work()
    assert len(rig.channels.mails) == mails, "nobody is welcomed twice"

    async with rig.store.write() as tx:  # restored from before its adoption: an attribute says since when
        for table in ("usage_records", "billing_periods", "subscription_links", "outbox"):
            await tx.execute(getattr(schema, table).delete())
    await rig.amplify.set_attributes("subscriptions", "acme", {USAGE_FROM: since.isoformat()})
    rig.unheard.clear()
    await rig.ask(subscription_action("acme", acme, because="restored"))
    await rig.report()
    found = await rig.link(acme)
    assert found is not None
    assert (found.state, found.adopted, found.usage_from) == ("active", True, since)
    assert await rig.held() == {}


@ONE_DATABASE
@pytest.mark.parametrize("name", ["migrationScheduled", "archivalScheduled"])
async def test_what_is_only_scheduled_is_served_and_billed_on(rig: Rig, acme: str, name: str) -> None:
    """It ends when it is archived or migrated, not before."""
    subscription = rig.world.tenant.resources.find("Subscription", "acme")
    assert subscription is not None
    when = {"timestamp": api_time(rig.far.now() + 3 * HOUR)}
    rig.world.tenant.set_subresource(subscription, "state", {"name": name, "when": when})
    await rig.work()
    await rig.traffic("acme", 4, force=True)
    await rig.report()
    assert (state(rig, acme), await link_state(rig, acme)) == ("active", "active")
    assert rig.units() == 4
    over = "migrated" if name == "migrationScheduled" else "archived"
    rig.world.tenant.set_subresource(
        subscription, "state", {"name": over, "when": {"timestamp": api_time(rig.far.now())}}
    )
    await rig.settled()
    assert state(rig, acme) == "expired"
    assert rig.ledger()["totals"]["billed_units"] == 4


# Rejected, made anew, waited for.


async def test_rejected_after_its_approval_it_ends_with_its_usage_and_keeps_its_first_invoice(
    rig: Rig, acme: str
) -> None:
    """It was served: what it used is billed, its first invoice stands."""
    await rig.traffic("acme", 4)
    await rig.move("acme", "reject")
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 10 + 4 * 0.5
    assert rig.approval("acme") == "rejected"
    assert [await rig.held(), await rig.dead()] == [{}, []]


@pytest.mark.parametrize("order", ["old first", "new first", "old never"])
async def test_one_that_is_made_anew_under_its_name_is_another(rig: Rig, acme: str, order: str) -> None:
    """The old one ends, the new one is linked, each billed for its own: Recurly takes one of a plan."""
    await rig.traffic("acme", 4)
    await rig.move("acme", "cancel")
    rig.unheard.clear()
    await rig.move("acme", "delete")
    old_events, rig.unheard[:] = list(rig.unheard), []
    fields = {"plan": "metered", "name": "acme", "user": "user of acme", "team": "team of acme"}
    new = (await rig.play(control_amplify.subscribe, fields))["metadata"]["id"]
    new_events, rig.unheard[:] = list(rig.unheard), []
    for events in (old_events, new_events) if order == "old first" else (new_events, old_events):
        if events is old_events and order == "old never":
            rig.pass_(3 * HOUR)
            await rig.ask(subscription_action("acme", acme, because="resync"))
            continue
        rig.unheard.extend(events)
        await rig.work(timedelta(minutes=6), rounds=3)
    await rig.settled()
    assert (state(rig, acme), state(rig, new)) == ("expired", "active")
    assert (await link_state(rig, acme), await link_state(rig, new)) == ("ended", "active")
    await rig.traffic("acme", 5)
    await rig.report()
    units = {row["id"]: row["reported_units"] for row in rig.ledger()["subscriptions"]}
    assert units == {acme: 4, new: 5}
    assert [await rig.held(), await rig.dead(), await rig.unfinished()] == [{}, [], []]


async def test_an_account_that_appears_later_gets_its_subscription_by_itself(rig: Rig) -> None:
    """Held and told once; nobody has to release it, and usage counts from the approval on."""
    made = await rig.subscribe("late", account=False)
    await rig.work(5 * LOOK_AGAIN)
    assert set(await rig.held()) == {"account_missing"}
    rig.account(body(rig, "late"), "team")
    await rig.work(2 * LOOK_AGAIN)
    assert (state(rig, made), await link_state(rig, made)) == ("active", "active")
    await rig.traffic("late", 4)
    await rig.report()
    assert rig.units() == 4
    assert told(rig, "is held") == 1
    assert [await rig.held(), await rig.dead()] == [{}, []]


async def test_two_of_one_account_within_a_minute_are_both_linked(rig: Rig) -> None:
    """Recurly takes one a minute of an account: the second waits for it, and is billed like the first."""
    await rig.plan("gold")
    await rig.work()
    one = await rig.subscribe("one", account=False)
    two = await rig.subscribe("two", plan="gold", account=False)
    rig.account(body(rig, "one"), "org")
    await rig.hear()
    await rig.drain()
    assert sorted(len(rig.billed(each)) for each in (one, two)) == [0, 1]
    await rig.work(timedelta(minutes=6))
    for name, units in (("one", 3), ("two", 4)):
        await rig.traffic(name, units)
    await rig.report()
    assert {row["id"]: row["reported_units"] for row in rig.ledger()["subscriptions"]} == {one: 3, two: 4}
    assert [await rig.held(), await rig.dead()] == [{}, []]


# Ended at Recurly.


async def test_one_that_dunning_ended_while_it_is_served_is_held_told_once_and_closed_by_its_end(
    rig: Rig, acme: str
) -> None:
    """One item says that nothing is billed any more, and what to do; its usage is held as it comes."""
    await rig.traffic("acme", 4)
    await rig.report()
    rig.world.site.expire(rig.billed(acme)[0]["uuid"])
    rig.pass_(timedelta(minutes=11))
    await rig.poller.watch_periods()
    await rig.drain()
    rig.pass_(HOUR)
    await rig.traffic("acme", 5)
    await rig.report()
    [item] = await standing(rig, "ended_at_recurly")
    assert (item["subscription_id"], item["subject"]) == (acme, f"subscription:{acme}:ended")
    for words in ("expired", "still serves", "nothing of it is billed", "Cancel the subscription"):
        assert words in item["reason"]
    assert told(rig, "is served, and not billed any more") == 1
    assert set(await rig.held()) == {"ended_at_recurly", "usage_after_end"}
    await rig.move("acme", "cancel")
    await rig.settled()
    assert set(await rig.held()) == {"usage_after_end"}
    assert await link_state(rig, acme) == "ended"
    assert told(rig, "is served, and not billed any more") == 1
    assert await rig.dead() == []


async def test_one_that_somebody_canceled_is_told_of_and_billed_until_its_bill_date(
    rig: Rig, acme: str
) -> None:
    """Then it is over, which is held; reactivated in time, nothing came of it."""
    uuid = rig.billed(acme)[0]["uuid"]
    rig.world.site.cancel(uuid)
    for _ in range(2):
        rig.pass_(timedelta(minutes=11))
        await rig.poller.watch_periods()
        await rig.drain()
    assert told(rig, "will end at Recurly") == 1
    assert await rig.held() == {}
    await rig.traffic("acme", 4)
    await rig.report()
    assert rig.units() == 4
    await rig.renew()
    rig.pass_(timedelta(minutes=11))
    await rig.poller.watch_periods()
    await rig.drain()
    assert state(rig, acme) == "expired"
    assert set(await rig.held()) == {"ended_at_recurly"}
    assert told(rig, "is served, and not billed any more") == 1
    assert rig.ledger()["totals"]["billed_units"] == 4


@ONE_DATABASE
@pytest.mark.parametrize("on_cancel", ["cancel", "terminate"])
async def test_the_end_of_what_amplify_no_longer_serves_is_no_surprise(
    rig: Rig, acme: str, on_cancel: str
) -> None:
    """It runs out at its bill date, or somebody was faster than its last windows: nobody is told."""
    rig.on_cancel = on_cancel
    rig.start()
    await rig.move("acme", "cancel")
    await rig.work()
    if on_cancel == "terminate":
        rig.world.site.expire(rig.billed(acme)[0]["uuid"])
    rig.pass_(timedelta(minutes=11))
    await rig.poller.watch_periods()
    await rig.drain()
    assert state(rig, acme) == ("canceled" if on_cancel == "cancel" else "expired")
    assert told(rig, "will end at Recurly") == 0
    assert await rig.held() == {}


async def test_one_that_recurly_does_not_show_any_more_is_held_until_it_does(rig: Rig, acme: str) -> None:
    """A first 404 may come from a read that lags; the second counts, and being seen again closes it."""
    adapter = rig.recurly._adapter
    get, listing = adapter.get_subscription, adapter.list_live_subscriptions

    async def gone(uuid: str) -> Any:
        raise NotFound(f"no {uuid}")

    async def nothing() -> tuple[Any, ...]:
        return ()

    adapter.get_subscription, adapter.list_live_subscriptions = gone, nothing
    for times in range(3):
        assert bool(await rig.held()) is (times > 1)
        rig.pass_(timedelta(minutes=11))
        await rig.poller.watch_periods()
        await rig.drain()
    [item] = await standing(rig, "ended_at_recurly")
    assert "no subscription" in item["reason"]
    assert told(rig, "is served, and not billed any more") == 1
    adapter.get_subscription, adapter.list_live_subscriptions = get, listing
    rig.pass_(timedelta(minutes=11))
    await rig.poller.watch_periods()
    await rig.drain()
    assert await rig.held() == {}
    await rig.traffic("acme", 4)
    await rig.report()
    assert rig.units() == 4


# Given up by an operator.


@ONE_DATABASE
async def test_a_discarded_cancellation_is_made_up_for_by_the_next_look(rig: Rig, acme: str) -> None:
    """Whatever asks to look at the subscription again ends it at Recurly, with its last usage."""
    await rig.traffic("acme", 4)

    async def bug(_name: str) -> None:
        raise NotFound("a bug")

    find = rig.amplify._adapter.find_subscription
    rig.amplify._adapter.find_subscription = bug
    await rig.move("acme", "cancel")
    await rig.work()
    rig.amplify._adapter.find_subscription = find
    async with rig.store.read() as tx:
        dead = [row["id"] for row in await outbox.select(tx, states=["dead"])]
    assert dead
    for action_id in dead:
        assert await discard(rig.store, action_id, reason="a bug", now=rig.far.now())
    await rig.report()
    assert state(rig, acme) == "active"
    await rig.ask(subscription_action("acme", acme, because="resync"))
    await rig.settled()
    assert (state(rig, acme), await link_state(rig, acme)) == ("expired", "ended")
    assert rig.ledger()["totals"]["billed_units"] == 4
