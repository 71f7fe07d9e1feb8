"""Nobody new is charged by prices that Amplify does not say, however and wherever they came to differ."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, PER_UNIT, Rig, a_rig
from test_reconcile import reconciled

from billingd.domain.events import plan_action
from billingd.sandbox import control_amplify
from billingd.sandbox.recurly.add_ons import remove_add_on
from billingd.store import events, schema

MINUTE = timedelta(minutes=1)
pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""The check asks the two far sides, not the store."""


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        await made.subscribe("acme")
        await made.work()
        made.channels.provider.clear()
        yield made


def spec(rig: Rig, kind: str, name: str) -> Any:
    """What Amplify has of it, to be changed without a word to anybody."""
    return next(each.body["spec"] for each in rig.world.tenant.resources.of_kind(kind) if each.name == name)


async def looked_at(rig: Rig, because: str = "an event") -> None:
    await rig.ask(plan_action("metered", None, because=because))
    await rig.drain()


async def costs_more_at_amplify(rig: Rig) -> None:
    spec(rig, "ProductPlan", "metered")["billing"]["price"] = 20


async def costs_more_at_recurly(rig: Rig) -> None:
    [plan] = rig.world.site.plans.values()
    plan.prices["USD"] += 5


async def begins_with_a_trial(rig: Rig) -> None:
    [plan] = rig.world.site.plans.values()
    rig.world.site.plan_trial(plan.code, 30)


async def became_free(rig: Rig) -> None:
    spec(rig, "ProductPlan", "metered")["type"] = "free"
    await looked_at(rig)


async def became_unlimited(rig: Rig) -> None:
    spec(rig, "Quota", "calls")["pricing"] = {"type": "unlimited"}
    await looked_at(rig)


async def changed_without_its_label(rig: Rig) -> None:
    await label(rig, None)
    await rig.work()
    spec(rig, "ProductPlan", "metered")["billing"]["price"] = 20
    await looked_at(rig)
    await label(rig, "recurly")


async def label(rig: Rig, value: str | None) -> None:
    asked = {"attributes": {"billingSystem": value}}
    await rig.play(control_amplify.mark_product, asked, name="weather")


EXTRA = {"type": "perunit", "cost": 3}
LOOSE = {"type": "fixed", "limit": {"type": "loose", "value": 1000}, "interval": "monthly"}


async def with_extra(rig: Rig) -> Any:
    """The plan has a second quota, and who subscribes already has it too; its add-on at Recurly."""
    await rig.play(control_amplify.add_quota, {"name": "extra", "pricing": EXTRA}, name="metered")
    await rig.work()
    rig.channels.provider.clear()
    [plan] = rig.world.site.plans.values()
    return next(one for one in plan.add_ons.values() if one.name == "extra")


async def resynced(rig: Rig) -> None:
    await rig.daemon.resync.run(dry_run=False)
    await rig.work(2 * LOOK_AGAIN)


@pytest.mark.parametrize("pricing", [{"type": "unlimited"}, LOOSE], ids=["unlimited", "loose"])
async def test_nobody_new_pays_for_a_quota_that_became_free(rig: Rig, pricing: Any) -> None:
    """Told, held and drift while Recurly charges for it; once that costs nothing, who waited is let in."""
    add_on = await with_extra(rig)
    spec(rig, "Quota", "extra")["pricing"] = pricing
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    assert (rig.billed(late), rig.approval("late")) == ([], "pending")
    assert set(await rig.held()) == {"plan_differs", "plan_held"}
    assert f'"{add_on.code}" charges for quota "extra"' in (await rig.held())["plan_differs"]
    found = await reconciled(rig)
    assert [(one["kind"], one["add_on"]) for one in found["drift"]] == [("price_differs", add_on.code)]
    add_on.prices["USD"] = replace(add_on.prices["USD"], amount=Decimal(0))
    await resynced(rig)
    assert (await rig.held(), rig.approval("late")) == ({}, "approved")
    for name in ("acme", "late"):
        await rig.traffic(name, 100, quota="extra")
    await rig.report()
    [billed] = rig.billed(late)
    assert billed["add_ons"][add_on.code]["reported_units"] == 100
    link = next(one for one in await rig.rows(schema.add_on_links) if one["add_on_code"] == add_on.code)
    assert Decimal(link["prices"]["unit_amount"]) == 0
    [drift] = (await reconciled(rig))["drift"]
    assert (drift["kind"], drift["add_on"]) == ("price_differs", add_on.code), "of who pays the old price"
    assert await rig.held() == {}


async def test_free_usage_that_nobody_can_be_told_is_no_money_lost(rig: Rig) -> None:
    """Who subscribed after its add-on was removed has none, and Amplify asks nothing for it."""
    add_on = await with_extra(rig)
    spec(rig, "Quota", "extra")["pricing"] = {"type": "unlimited"}
    remove_add_on(rig.world.site, add_on)
    await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    await resynced(rig)
    await rig.traffic("late", 100, quota="extra")
    await rig.report()
    assert set(await rig.held()) == {"usage_refused"}
    assert (await rig.daemon.resync.run(dry_run=True)).steps == ()
    [told] = [each for each in rig.channels.provider if "Usage is held" in each]
    assert "Amplify charges nothing for it" in told
    assert ("At stake" in told, "Add it there" in told) == (False, False)
    [item] = [row for row in await rig.rows(schema.held) if row["kind"] == "usage_refused"]
    assert (item["units"], item["amount"]) == (100, "0")


async def test_a_free_quota_whose_add_on_is_removed_at_recurly_lets_the_waiting_in(rig: Rig) -> None:
    """It is not asked for, not put on later, and no drift of who never had it."""
    add_on = await with_extra(rig)
    spec(rig, "Quota", "extra")["pricing"] = {"type": "unlimited"}
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    remove_add_on(rig.world.site, add_on)
    await resynced(rig)
    await resynced(rig)
    [billed] = rig.billed(late)
    assert len(billed["add_ons"]) == 1
    assert (await rig.held(), rig.approval("late")) == ({}, "approved")
    gained = await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    await rig.work(HOUR)
    assert f"amplify-quota-{gained['metadata']['id']}" in rig.billed(late)[0]["add_ons"]
    [acme] = [row["title"] for row in await rig.rows(schema.subscription_links) if row["name"] == "acme"]
    told = [(one["kind"], one["cause"].split(" (")[0]) for one in (await reconciled(rig))["drift"]]
    assert told == [("price_differs", acme)]


async def test_a_list_that_lacks_a_quota_says_nothing(rig: Rig) -> None:
    """Who subscribes waits for the next list, and is billed for it then; a run says so, and finds nothing."""
    add_on = await with_extra(rig)
    rig.blind("Quota", names={"extra"})
    late = await rig.subscribe("late")
    await rig.work()
    assert (rig.billed(late), rig.approval("late")) == ([], "pending")
    found = await reconciled(rig)
    assert (found["drift"], len(found["not_compared"])) == ([], 1)
    rig.sighted()
    await rig.work(2 * LOOK_AGAIN)
    await rig.traffic("late", 100, quota="extra")
    await rig.report()
    [billed] = rig.billed(late)
    assert billed["add_ons"][add_on.code]["reported_units"] == 100
    assert await rig.held() == {}


async def costs_five_at_recurly(rig: Rig, add_on: Any) -> None:
    add_on.prices["USD"] = replace(add_on.prices["USD"], amount=Decimal(5))


async def costs_five_at_amplify(rig: Rig, _add_on: Any) -> None:
    """What is linked, and what Recurly has, agree still."""
    spec(rig, "Quota", "extra")["pricing"] = {"type": "perunit", "cost": 5}


async def became_free_at_amplify(rig: Rig, _add_on: Any) -> None:
    spec(rig, "Quota", "extra")["pricing"] = {"type": "unlimited"}


@pytest.mark.parametrize("differ", [costs_five_at_recurly, costs_five_at_amplify, became_free_at_amplify])
@pytest.mark.parametrize("lacks", ["amplify", "recurly"])
async def test_a_list_that_lacks_what_differs_closes_no_hold(
    rig: Rig, differ: Callable[[Rig, Any], Awaitable[None]], lacks: str
) -> None:
    add_on = await with_extra(rig)
    await differ(rig, add_on)
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    before = {row["id"]: row["closed_at"] for row in await rig.rows(schema.held)}
    assert set(await rig.held()) == {"plan_differs", "plan_held"}
    if lacks == "amplify":
        rig.blind("Quota", names={"extra"})
    else:
        rig.fault("list_lag", "GET", "/plans/*/add_ons", times=None, args={"seconds": 9 * 3600})
    await looked_at(rig)
    await rig.daemon.resync.run(dry_run=False)
    await rig.work()
    assert {row["id"]: row["closed_at"] for row in await rig.rows(schema.held)} == before
    rig.sighted()
    rig.world.faults.clear()
    await rig.work(2 * LOOK_AGAIN)
    assert {row["id"]: row["closed_at"] for row in await rig.rows(schema.held)} == before
    assert rig.billed(late) == []


async def test_a_list_that_lacks_what_cannot_be_expressed_makes_no_plan(rig: Rig) -> None:
    """It is not linked yet: what is held says which quotas it was judged with."""
    await rig.plan("other")
    odd = await rig.play(control_amplify.add_quota, {"name": "odd", "pricing": EXTRA}, name="other")
    spec(rig, "Quota", "odd")["pricing"] = {"type": "odd-new-type"}
    await rig.work()
    assert set(await rig.held()) == {"plan_inexpressible"}
    rig.blind("Quota", names={"odd"})
    await rig.daemon.resync.run(dry_run=False)
    await rig.work()
    rig.sighted()
    await rig.work(2 * LOOK_AGAIN)
    assert (len(rig.world.site.plans), set(await rig.held())) == (1, {"plan_inexpressible"})
    gone = next(
        each for each in rig.world.tenant.resources.of_kind("Quota") if each.id == odd["metadata"]["id"]
    )
    rig.world.tenant.delete(gone, asked=False)
    await rig.work()
    assert (len(rig.world.site.plans), await rig.held()) == (2, {})


@pytest.mark.parametrize("told", [True, False])
async def test_who_is_new_goes_without_a_quota_that_is_gone(rig: Rig, told: bool) -> None:
    """At once when Amplify has told of it; else after two lists. If it was wrong, it is put on later."""
    add_on = await with_extra(rig)
    agreed = add_on.prices["USD"]
    await costs_five_at_recurly(rig, add_on)
    gone = next(one for one in rig.world.tenant.resources.of_kind("Quota") if one.name == "extra")
    if told:
        rig.world.tenant.delete(gone, asked=False)
    else:
        rig.blind("Quota", names={"extra"})
    late = await rig.subscribe("late")
    await rig.work(timedelta(0) if told else 2 * LOOK_AGAIN)
    assert (rig.approval("late"), await rig.held()) == ("approved", {})
    assert add_on.code not in rig.billed(late)[0]["add_ons"]
    assert sum("Quota extra of metered is gone" in each for each in rig.channels.provider) == 1
    rig.sighted()
    add_on.prices["USD"] = agreed
    await resynced(rig)
    assert (add_on.code in rig.billed(late)[0]["add_ons"]) is not told
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


async def test_a_deletion_is_known_for_as_long_as_the_quota_is_linked(rig: Rig) -> None:
    await with_extra(rig)
    gone = next(one for one in rig.world.tenant.resources.of_kind("Quota") if one.name == "extra")
    rig.world.tenant.delete(gone, asked=False)
    await rig.work()
    async with rig.store.write() as tx:
        await events.forget(tx, before=rig.clock.now() + HOUR)
    late = await rig.subscribe("late")
    await rig.work()
    assert (rig.approval("late"), len(rig.billed(late)[0]["add_ons"])) == ("approved", 1)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("how", ["free", "gone"])
async def test_what_was_left_out_is_not_put_on_later(rig: Rig, how: str, lost: bool) -> None:
    """Its add-on is removed; nor after a lost answer, when what was made is only found."""
    add_on = await with_extra(rig)
    if how == "free":
        spec(rig, "Quota", "extra")["pricing"] = {"type": "unlimited"}
    else:
        gone = next(one for one in rig.world.tenant.resources.of_kind("Quota") if one.name == "extra")
        rig.world.tenant.delete(gone, asked=False)
    remove_add_on(rig.world.site, add_on)
    if lost:
        rig.fault("lost", "POST", "/subscriptions", times=1)
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    assert (await rig.held(), rig.approval("late")) == ({}, "approved")
    assert add_on.code not in rig.billed(late)[0]["add_ons"]
    assert await rig.unfinished() == []


async def paused_while_extra_comes(rig: Rig) -> tuple[str, Any]:
    """Who has no add-on yet for a quota that the plan gained, for a pause takes no change; the add-on."""
    [link] = await rig.rows(schema.subscription_links)
    rig.world.site.pause(link["uuid"])
    await rig.work(LOOK_AGAIN)
    return link["subscription_id"], await with_extra(rig)


async def test_nobody_is_given_what_became_free_before_it_was_put_on(rig: Rig) -> None:
    """It waits until it costs nothing, while another quota that the plan gained is put on at once."""
    acme, add_on = await paused_while_extra_comes(rig)
    spec(rig, "Quota", "extra")["pricing"] = {"type": "unlimited"}
    await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    rig.world.site.resume(rig.billed(acme)[0]["uuid"])
    await rig.work(2 * LOOK_AGAIN)
    codes = set(rig.billed(acme)[0]["add_ons"])
    assert (add_on.code in codes, len(codes)) == (False, 2)
    assert "Set its price to 0" in (await rig.waits("attach_add_ons"))[0]
    assert set(await rig.held()) == {"plan_differs"}
    add_on.prices["USD"] = replace(add_on.prices["USD"], amount=Decimal(0))
    await resynced(rig)
    assert add_on.code in rig.billed(acme)[0]["add_ons"]
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


@pytest.mark.parametrize("lacks", [None, "amplify", "recurly"])
async def test_nobody_is_given_what_costs_otherwise_at_recurly_now(rig: Rig, lacks: str | None) -> None:
    """Nor while a list lacks it."""
    acme, add_on = await paused_while_extra_comes(rig)
    agreed = add_on.prices["USD"]
    await costs_five_at_recurly(rig, add_on)
    if lacks == "amplify":
        rig.blind("Quota", names={"extra"})
    elif lacks == "recurly":
        rig.fault("list_lag", "GET", "/plans/*/add_ons", times=None, args={"seconds": 9 * 3600})
    rig.world.site.resume(rig.billed(acme)[0]["uuid"])
    await rig.work(LOOK_AGAIN)
    assert add_on.code not in rig.billed(acme)[0]["add_ons"]
    rig.sighted()
    rig.world.faults.clear()
    await rig.work(2 * LOOK_AGAIN)
    assert add_on.code not in rig.billed(acme)[0]["add_ons"]
    add_on.prices["USD"] = agreed
    await resynced(rig)
    assert add_on.code in rig.billed(acme)[0]["add_ons"]
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


@pytest.mark.parametrize("add_on_agrees", [False, True])
async def test_a_deprecated_plan_keeps_no_add_on_off_in_silence(rig: Rig, add_on_agrees: bool) -> None:
    """Nothing is held of such a plan: what waits is told of by itself. What is wrong with another is not."""
    acme, add_on = await paused_while_extra_comes(rig)
    agreed = add_on.prices["USD"]
    spec(rig, "Quota", "calls")["pricing"] = {"type": "odd-new-type"}
    if not add_on_agrees:
        await costs_five_at_recurly(rig, add_on)
    await rig.move_plan("metered", "deprecate")
    await rig.work()
    rig.world.site.resume(rig.billed(acme)[0]["uuid"])
    await rig.work(2 * LOOK_AGAIN)
    assert (add_on.code in rig.billed(acme)[0]["add_ons"]) is add_on_agrees
    if not add_on_agrees:
        assert set(await rig.held()) == {"attach_differs"}
        assert "has unit price 5 at Recurly" in (await rig.held())["attach_differs"]
        assert sum("lacks an add-on" in told for told in rig.channels.provider) == 1
        add_on.prices["USD"] = agreed
        await rig.work(2 * LOOK_AGAIN)
        assert add_on.code in rig.billed(acme)[0]["add_ons"]
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


@pytest.mark.parametrize(
    "differ",
    [
        costs_more_at_amplify,
        costs_more_at_recurly,
        begins_with_a_trial,
        became_free,
        became_unlimited,
        changed_without_its_label,
    ],
)
async def test_a_subscriber_waits_while_prices_differ(
    rig: Rig, differ: Callable[[Rig], Awaitable[None]]
) -> None:
    """Whatever the link says, both sides are asked before somebody is charged; a person is told."""
    await differ(rig)
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    assert rig.billed(late) == []
    assert rig.approval("late") == "pending"
    assert set(await rig.held()) == {"plan_differs", "plan_held"}


async def test_a_price_changed_back_lets_the_waiting_in(rig: Rig) -> None:
    await costs_more_at_amplify(rig)
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    spec(rig, "ProductPlan", "metered")["billing"]["price"] = 10
    await looked_at(rig, "changed back")
    await rig.work(2 * LOOK_AGAIN)
    assert rig.approval("late") == "approved"
    [billed] = rig.billed(late)
    assert billed["state"] == "active"
    assert await rig.held() == {}


async def test_one_resync_that_finds_both_charges_nobody_wrongly(rig: Rig) -> None:
    """A plan's action and its subscriber's run side by side: the one that is first changes nothing."""
    for number in range(5):
        name = f"plan-{number}"
        await rig.plan(name)
        await rig.work()
        spec(rig, "ProductPlan", name)["billing"]["price"] = 20
        late = await rig.subscribe(f"late-{number}", plan=name)
        rig.unheard.clear()
        rig.pass_(2 * MINUTE)
        await rig.daemon.resync.run(dry_run=False)
        await rig.drain()
        assert rig.billed(late) == []


async def hidden_quotas(rig: Rig) -> None:
    rig.blind("Quota")


async def hidden_product(rig: Rig) -> None:
    rig.blind("Product")


@pytest.mark.parametrize("hide", [hidden_quotas, hidden_product])
async def test_what_is_not_shown_lifts_nothing(rig: Rig, hide: Callable[[Rig], Awaitable[None]]) -> None:
    """No quota, or no product, in one answer: what was held of differing prices is held on."""
    await costs_more_at_amplify(rig)
    await looked_at(rig)
    late = await rig.subscribe("late")
    await rig.work()
    assert set(await rig.held()) == {"plan_differs", "plan_held"}
    await hide(rig)
    await looked_at(rig, "while it is hidden")
    await rig.daemon.resync.run(dry_run=False)
    await rig.drain()
    rig.sighted()
    await rig.work(2 * LOOK_AGAIN)
    assert rig.billed(late) == []
    assert not [told for told in rig.channels.provider if "is gone" in told]


async def test_one_approved_by_hand_waits_on_a_deprecated_plan_too(rig: Rig) -> None:
    await costs_more_at_amplify(rig)
    await looked_at(rig)
    late = await rig.subscribe("late")
    await rig.work()
    await rig.move("late", "approve")
    await rig.work()
    await rig.move_plan("metered", "deprecate")
    await rig.work(2 * LOOK_AGAIN)
    assert rig.billed(late) == []
    assert "plan_held" in await rig.held()


async def test_a_quota_added_without_its_label_is_attached_with_it(rig: Rig) -> None:
    acme = (await rig.rows(schema.subscription_links))[0]["subscription_id"]
    await label(rig, None)
    await rig.work()
    await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    await rig.work()
    await label(rig, "recurly")
    await rig.work(HOUR)
    [billed] = rig.billed(acme)
    assert len(billed["add_ons"]) == 2


async def test_a_changed_currency_leaves_the_amounts_of_those_there_alone(rig: Rig) -> None:
    spec(rig, "ProductPlan", "metered")["billing"]["currency"] = "EUR"
    await looked_at(rig)
    [link] = await rig.rows(schema.plan_links)
    assert link["currency"] == "USD"
    assert set(await rig.held()) == {"plan_differs"}


async def test_a_currency_that_both_sides_know_is_not_taken_for_the_other(rig: Rig) -> None:
    """Recurly has a price in each: the link's is what a new subscription would be made in."""
    [plan] = rig.world.site.plans.values()
    priced: list[Any] = [plan, *plan.add_ons.values()]
    for one in priced:
        one.prices["EUR"] = one.prices["USD"]
    plan.prices["USD"] += 5
    spec(rig, "ProductPlan", "metered")["billing"]["currency"] = "EUR"
    late = await rig.subscribe("late")
    await rig.work(2 * LOOK_AGAIN)
    made = [each for each in rig.world.site.subscriptions.values() if each.given["po_number"] == late]
    assert [each.given["currency"] for each in made] in ([], ["EUR"])
