"""Life after provisioning, of plans: quotas gained and lost, titles, prices, deprecation, the end."""

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, PER_UNIT, Json, Rig, a_rig

from billingd.admin.operations import release
from billingd.domain.errors import Refused
from billingd.domain.events import attach_action, plan_action, subscription_action
from billingd.sandbox import control_amplify
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.amplify.resources import Resource
from billingd.store import held, schema
from billingd.store.held import Hold

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
VOLUME: Json = {
    "type": "volume",
    "limit": {
        "type": "tiered",
        "tiers": [
            {"from": 1, "to": 100, "cost": 2, "flatFee": 0},
            {"from": 101, "to": 999999999, "cost": 1, "flatFee": 0},
        ],
    },
}


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        made.channels.provider.clear()
        yield made


def found(rig: Rig, kind: str, name: str) -> Resource:
    """A resource as Amplify holds it; a quota by the name of its plan's."""
    if kind == "Quota":
        return next(each for each in rig.world.tenant.resources.of_kind("Quota") if each.name == name)
    resource = rig.world.tenant.resources.find(kind, name)
    assert resource is not None
    return resource


def retitle(rig: Rig, kind: str, name: str, title: str) -> None:
    """The provider gives it another title."""
    resource = found(rig, kind, name)
    rig.world.tenant.replace(resource, {**resource.shown("v1"), "title": title})


async def add_quota(rig: Rig, name: str = "more", pricing: Json = PER_UNIT) -> str:
    """The active plan gains a quota; its add-on's code."""
    made = await rig.play(control_amplify.add_quota, {"name": name, "pricing": pricing}, name="metered")
    return f"amplify-quota-{made['metadata']['id']}"


def add_ons(rig: Rig, subscription_id: str) -> set[str]:
    """What is on the subscription at Recurly."""
    [billed] = rig.billed(subscription_id)
    return set(billed["add_ons"])


def changes(rig: Rig) -> int:
    """How many changes of subscriptions were asked for at Recurly."""
    return sum(n for path, n in rig.world.calls.items() if path.endswith("/change"))


# Quotas gained.


@pytest.mark.parametrize("pricing", [PER_UNIT, VOLUME], ids=["per unit", "volume"])
async def test_a_quota_added_to_an_active_plan_is_billed_on_the_subscriptions_that_exist(
    rig: Rig, pricing: Json
) -> None:
    """Recurly gives a new add-on to new subscriptions only; billingd puts it on the others, once each."""
    ids = [await rig.subscribe(name) for name in ("acme", "beta")]
    await rig.work()
    over = await rig.subscribe("gone")
    await rig.work()
    await rig.move("gone", "cancel")
    await rig.settled()
    code = await add_quota(rig, pricing=pricing)
    await rig.work()
    assert [code in add_ons(rig, each) for each in (*ids, over)] == [True, True, False]
    assert changes(rig) == 2
    for units, name in ((5, "acme"), (6, "beta")):
        await rig.traffic(name, units, quota="more")
    await rig.traffic("acme", 3, quota="calls")
    await rig.report()
    assert rig.units() == 14
    late = await rig.subscribe("late")
    await rig.work()
    assert len(add_ons(rig, late)) == 2
    assert [await rig.held(), await rig.dead(), await rig.unfinished()] == [{}, [], []]
    assert sum("gained more" in told for told in rig.channels.provider) == 1
    assert rig.ledger()["agrees"]


async def test_usage_of_a_new_quota_waits_until_its_add_on_is_there(rig: Rig) -> None:
    """Recurly is slow to take the change: no report dies of its 404 meanwhile, none is held."""
    acme = await rig.subscribe()
    await rig.work()
    stuck = rig.fault("outage", "POST", "/subscriptions/*/change", times=None, args={"status": 503})
    code = await add_quota(rig)
    await rig.work()
    rig.pass_(timedelta(minutes=5))
    await rig.traffic("acme", 5, quota="more")
    rig.pass_(2 * HOUR)
    await rig.poll()
    await rig.hear()
    for _ in range(3):
        rig.pass_(timedelta(minutes=1))
        await rig.drain()
    assert code not in add_ons(rig, acme)
    [why] = await rig.waits("report_usage")
    assert "yet to be put on" in why
    assert (await rig.held(), await rig.dead()) == ({}, [])
    rig.world.faults.remove(stuck)
    await rig.settled()
    assert code in add_ons(rig, acme)
    # What was counted before Recurly had the add-on on the subscription is refused by its time, and says so.
    held_ = await rig.held()
    assert set(held_) == {"usage_refused"}
    assert "before the subscription had that add-on" in held_["usage_refused"]
    await rig.traffic("acme", 7, quota="more")
    await rig.report()
    assert await rig.totals() == {"held": 5, "reported": 7}


async def test_a_paused_subscription_gets_the_new_add_on_when_it_goes_on_and_may_end_meanwhile(
    rig: Rig,
) -> None:
    """A pause takes no change. What waits for its end does not hold up the end of the subscription."""
    acme, beta = [await rig.subscribe(name) for name in ("acme", "beta")]
    await rig.work()
    for each in (acme, beta):
        rig.world.site.pause(rig.billed(each)[0]["uuid"])
    code = await add_quota(rig)
    await rig.work()
    assert len(await rig.waits("attach_add_ons")) == 2
    await rig.move("beta", "cancel")
    await rig.settled()
    link = await rig.link(beta)
    assert link is not None
    assert link.state == "ended"
    rig.world.site.resume(rig.billed(acme)[0]["uuid"])
    await rig.work(2 * LOOK_AGAIN)
    assert code in add_ons(rig, acme)
    assert [await rig.unfinished(), await rig.dead(), await rig.held()] == [[], [], {}]


@ONE_DATABASE
async def test_a_refused_add_on_is_held_told_once_and_released(rig: Rig) -> None:
    """Somebody removed it from Recurly's plan meanwhile, say: its usage would be lost in silence."""
    acme = await rig.subscribe()
    await rig.work()
    code = await add_quota(rig)
    await rig.hear()
    create = rig.recurly._adapter.create_add_on

    async def remove_at_once(*args: Any, **kwargs: Any) -> str:
        made: str = await create(*args, **kwargs)
        plan.add_ons[code].deleted_at = rig.far.now()
        return made

    [plan] = rig.world.site.plans.values()
    rig.recurly._adapter.create_add_on = remove_at_once
    await rig.drain()
    reasons = await rig.held()
    assert set(reasons) == {"attach_refused"}
    assert "more" in reasons["attach_refused"]
    assert code in reasons["attach_refused"]
    assert sum("lacks an add-on" in told for told in rig.channels.provider) == 1
    plan.add_ons[code].deleted_at = None
    async with rig.store.read() as tx:
        [item] = await held.standing(tx)
    assert await release(rig.store, item["id"], now=rig.far.now())
    await rig.work()
    assert code in add_ons(rig, acme)
    assert (await rig.held(), await rig.dead()) == ({}, [])


@ONE_DATABASE
async def test_a_refused_add_on_stays_held_when_another_is_put_on(rig: Rig) -> None:
    """Recurly takes the one and not the other, whichever action asks, and neither keeps the other off."""
    acme = await rig.subscribe()
    await rig.work()
    add = rig.recurly._adapter.add_to_subscription

    async def refuse_one(uuid: str, codes: Sequence[str], **kwargs: Any) -> None:
        if refused in codes:
            raise Refused("not that one")
        await add(uuid, codes, **kwargs)

    rig.recurly._adapter.add_to_subscription = refuse_one
    refused = await add_quota(rig)
    await rig.work()
    assert set(await rig.held()) == {"attach_refused"}
    other = await add_quota(rig, "other")
    await rig.work()
    assert (refused in add_ons(rig, acme), other in add_ons(rig, acme)) == (False, True)
    assert set(await rig.held()) == {"attach_refused"}
    assert sum("lacks an add-on" in told for told in rig.channels.provider) == 1
    rig.recurly._adapter.add_to_subscription = add
    await rig.ask(attach_action(acme, ["whatever was lacking before"]))
    await rig.work()
    assert refused in add_ons(rig, acme)
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


@ONE_DATABASE
async def test_a_refused_add_on_keeps_none_off_that_waits(rig: Rig) -> None:
    """That one is put on once its price agrees; the refused one is asked for no more while it is held."""
    acme = await rig.subscribe()
    await rig.work()
    uuid = rig.billed(acme)[0]["uuid"]
    rig.world.site.pause(uuid)
    await rig.work(LOOK_AGAIN)
    refused, waiting = [await add_quota(rig, name) for name in ("more", "other")]
    await rig.work()
    add = rig.recurly._adapter.add_to_subscription
    asked: list[str] = []

    async def refuse_one(uuid: str, codes: Sequence[str], **kwargs: Any) -> None:
        asked.extend(codes)
        if refused in codes:
            raise Refused("not that one")
        await add(uuid, codes, **kwargs)

    rig.recurly._adapter.add_to_subscription = refuse_one
    [plan] = rig.world.site.plans.values()
    priced = plan.add_ons[waiting].prices
    agreed = priced["USD"]
    priced["USD"] = replace(agreed, amount=agreed.amount + 1)
    rig.world.site.resume(uuid)
    await rig.work(2 * LOOK_AGAIN)
    tries = asked.count(refused)
    assert set(await rig.held()) == {"attach_refused", "plan_differs"}
    priced["USD"] = agreed
    await rig.daemon.resync.run(dry_run=False)
    await rig.work(2 * LOOK_AGAIN)
    assert (refused in add_ons(rig, acme), waiting in add_ons(rig, acme)) == (False, True)
    assert (set(await rig.held()), await rig.unfinished()) == ({"attach_refused"}, [])
    assert asked.count(refused) == tries


@ONE_DATABASE
async def test_a_resync_attaches_what_is_not_held(rig: Rig) -> None:
    """Of what a subscription lacks only the one that Recurly refused is a person's."""
    acme = await rig.subscribe()
    await rig.work()
    refused, other = await add_quota(rig), await add_quota(rig, "other")
    await rig.work()
    [subscription] = rig.world.site.subscriptions.values()
    for key in [key for key, one in subscription.add_ons.items() if one.add_on.code in {refused, other}]:
        del subscription.add_ons[key]  # by hand
    async with rig.store.write() as tx:
        why = "what Recurly refused"
        item = Hold(
            "attach_refused", f"subscription:{acme}:add_ons", why, attach_action(acme, [refused]), acme
        )
        await held.add(tx, item, now=rig.far.now())
    asked = await rig.daemon.resync.run(dry_run=True)
    assert [step.action.args["add_ons"] for step in asked.steps] == [[other]]


@pytest.mark.parametrize(
    ("store_url", "kind"), [("sqlite", "lost"), ("postgres", "500_committed")], indirect=["store_url"]
)
async def test_a_change_without_an_answer_attaches_once(rig: Rig, kind: str) -> None:
    """What is there already is found; the usage that the subscription has stays where it is."""
    acme = await rig.subscribe()
    await rig.work()
    await rig.traffic("acme", 3)
    await rig.report()
    rig.fault(kind, "POST", "/subscriptions/*/change")
    code = await add_quota(rig)
    await rig.settled()
    assert code in add_ons(rig, acme)
    await rig.traffic("acme", 4, quota="more")
    await rig.report()
    assert rig.units() == 7
    assert len(rig.billed(acme)[0]["invoices"]) == 1, "nothing was invoiced early"
    assert await rig.dead() == []


@pytest.mark.parametrize("store_url", ["sqlite", "postgres"], indirect=True)
async def test_a_crash_at_any_step_attaches_each_new_add_on_once(rig: Rig) -> None:
    """The process dies at each step from the new quota to its add-on on the subscription."""
    acme = await rig.subscribe()
    await rig.work()
    step, died = 0, True
    while died:
        step += 1
        code = await add_quota(rig, f"q{step}")
        await rig.hear()
        rig.steps.arm(step)
        died = await rig.dies()
        rig.start()
        await rig.settled()
        assert code in add_ons(rig, acme), step
    assert step > 8
    rig.pass_(HOUR)
    for number in range(1, step + 1):
        await rig.traffic("acme", 1, quota=f"q{number}")
    await rig.report()
    assert rig.units() == step
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_quota_added_while_a_subscription_is_made_is_put_on_it(rig: Rig) -> None:
    """Made with the add-ons that were known then: what the plan gained before the link is not forgotten."""
    acme = await rig.subscribe()
    create = rig.recurly._adapter.create_subscription
    codes: list[str] = []

    async def gain_meanwhile(*args: Any, **kwargs: Any) -> Any:
        made = await create(*args, **kwargs)
        codes.append(await add_quota(rig))
        rig.recurly._adapter.create_subscription = create
        await rig.hear()
        assert await rig.engine.run_once()
        [under_way] = [
            task for task, action in rig.engine._under_way.items() if action.kind == "provision_plan"
        ]
        await under_way
        return made

    rig.recurly._adapter.create_subscription = gain_meanwhile
    await rig.work()
    assert codes[0] in add_ons(rig, acme)
    assert len(add_ons(rig, acme)) == 2


# Quotas lost.


async def test_a_quota_that_an_active_plan_lost_is_told_of_and_nothing_is_removed(rig: Rig) -> None:
    """What was counted before is billed still, late traffic too; the other quotas go on."""
    await add_quota(rig)
    await rig.work()
    acme = await rig.subscribe()
    await rig.work()
    await rig.traffic("acme", 5, quota="more")
    rig.world.tenant.delete(found(rig, "Quota", "more"), asked=False)
    await rig.work()
    await rig.traffic("acme", 2)
    await rig.report()
    assert len(add_ons(rig, acme)) == 2
    assert rig.units() == 7
    await rig.ask(plan_action("metered", None, because="resync"))
    await rig.work()
    assert sum("Quota more of metered is gone" in told for told in rig.channels.provider) == 1
    assert (await rig.held(), await rig.dead()) == ({}, [])


# Titles.


async def test_a_plan_and_a_quota_that_are_retitled_are_renamed_at_recurly(rig: Rig) -> None:
    """Codes, prices and subscriptions stay; a title that comes back is written again."""
    acme = await rig.subscribe()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    [add_on] = plan.add_ons.values()
    for title in ("Gold", "Silver", "Gold"):
        retitle(rig, "ProductPlan", "metered", f"{title} plan")
        retitle(rig, "Quota", "calls", f"{title} calls")
        await rig.work()
        assert (plan.name, add_on.name) == (f"{title} plan", f"{title} calls")
        [row] = await rig.rows(schema.plan_links)
        [quota] = await rig.rows(schema.add_on_links)
        assert (row["title"], quota["title"]) == (f"{title} plan", f"{title} calls")
    assert len(rig.world.site.plans) == 1
    assert len(rig.billed(acme)[0]["invoices"]) == 1
    await rig.traffic("acme", 3)
    await rig.report()
    assert rig.units() == 3
    assert [await rig.held(), await rig.dead()] == [{}, []]


@ONE_DATABASE
async def test_a_name_that_a_person_gave_at_recurly_stays(rig: Rig) -> None:
    """Only a new title at Amplify is carried over."""
    [plan] = rig.world.site.plans.values()
    plan.name = "As on our invoices"
    await rig.ask(plan_action("metered", None, because="resync"))
    await rig.work()
    assert plan.name == "As on our invoices"


@pytest.mark.parametrize("kind", ["lost", "500"])
@ONE_DATABASE
async def test_a_rename_without_an_answer_is_carried_through(rig: Rig, kind: str) -> None:
    """It is looked for, and sent again."""
    rig.fault(kind, "PUT", "/plans/*", times=2)
    retitle(rig, "ProductPlan", "metered", "Gold")
    await rig.settled()
    [plan] = rig.world.site.plans.values()
    assert plan.name == "Gold"
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_refused_name_holds_up_nothing(rig: Rig) -> None:
    """Only invoices would show it: told once, and new quotas and subscriptions go on."""
    [plan] = rig.world.site.plans.values()
    await rig.subscribe()
    await rig.work()

    async def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise Refused("a name must not glitter")

    rig.recurly._adapter.rename_plan = refuse
    retitle(rig, "ProductPlan", "metered", "Gold")
    code = await add_quota(rig)
    await rig.settled()
    assert plan.name == "metered"
    assert code in plan.add_ons
    assert sum("keeps its old name" in told for told in rig.channels.provider) == 1
    assert (await rig.held(), await rig.dead()) == ({}, [])


# Prices.


@pytest.mark.parametrize("side", ["Recurly", "Amplify", "an add-on"])
async def test_other_prices_say_whom_they_reach_and_what_to_do(rig: Rig, side: str) -> None:
    """Recurly applies them to new subscriptions only: those wait; the others go on, a new quota too."""
    acme = await rig.subscribe()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    [add_on] = plan.add_ons.values()
    spec = found(rig, "ProductPlan", "metered").body["spec"]
    pricing = found(rig, "Quota", "calls").body["spec"]["pricing"]
    if side == "Recurly":
        plan.prices["USD"] += 1
    elif side == "Amplify":
        spec["billing"]["price"] = 11
    else:
        pricing["cost"] = 0.75
    await rig.ask(plan_action("metered", None, because="1"))
    await rig.ask(plan_action("metered", None, because="2"))
    await rig.work()
    reasons = await rig.held()
    assert set(reasons) == {"plan_differs"}
    for words in ("new subscriptions only", "the 1 that exist", "New ones wait", "billingd resync"):
        assert words in reasons["plan_differs"]
    assert ("0.75" if side == "an add-on" else "11") in reasons["plan_differs"]
    assert sum("is held, not billed" in told for told in rig.channels.provider) == 1

    await rig.subscribe("late")
    code = await add_quota(rig)
    await rig.work()
    assert rig.approval("late") == "pending"
    assert code in add_ons(rig, acme)
    await rig.traffic("acme", 4, quota="calls")
    await rig.traffic("acme", 5, quota="more")
    await rig.report()
    assert rig.units() == 9

    if side == "Recurly":
        plan.prices["USD"] -= 1
    elif side == "Amplify":
        plan.prices["USD"] += 1
    else:
        pricing["cost"] = 0.5
    await rig.ask(plan_action("metered", None, because="resync"))
    await rig.work(2 * LOOK_AGAIN)
    assert await rig.held() == {}
    assert rig.approval("late") == "approved"
    assert add_on.name == "calls"


# Deprecated.


@ONE_DATABASE
async def test_one_that_is_approved_already_is_billed_on_a_deprecated_plan(rig: Rig) -> None:
    """Moved to the plan, or approved by a person, just before it was deprecated: Amplify serves it."""
    acme = await rig.subscribe()
    await rig.move("acme", "approve")
    waiting = list(rig.unheard)
    rig.unheard.clear()
    await rig.move_plan("metered", "deprecate")
    await rig.work()
    rig.unheard[:0] = waiting
    await rig.work()
    assert len(rig.billed(acme)) == 1
    await rig.traffic("acme", 4)
    await rig.report()
    assert rig.units() == 4
    assert await rig.held() == {}


@ONE_DATABASE
async def test_a_deprecated_plan_that_recurly_has_is_linked_and_one_that_it_lacks_is_not_made(
    rig: Rig,
) -> None:
    """A store that knows nothing of it: its subscriptions are billed on, nobody can subscribe to it anew."""
    acme = await rig.subscribe()
    await rig.work()
    await rig.plan("other")
    rig.unheard.clear()
    for name in ("metered", "other"):
        await rig.move_plan(name, "deprecate")
    async with rig.store.write() as tx:
        for table in ("billing_periods", "subscription_links", "add_on_links", "plan_links", "intents"):
            await tx.execute(getattr(schema, table).delete())
    for name in ("metered", "other"):
        await rig.ask(plan_action(name, None, because="adopt"))
    await rig.work()
    [row] = await rig.rows(schema.plan_links)
    assert (row["name"], row["state"]) == ("metered", "deprecated")
    assert len(rig.world.site.plans) == 1
    await rig.ask(subscription_action("acme", acme, because="adopt"))
    await rig.work()
    link = await rig.link(acme)
    assert link is not None
    assert link.uuid == rig.billed(acme)[0]["uuid"]
    assert [await rig.held(), await rig.dead()] == [{}, []]


@ONE_DATABASE
async def test_a_deprecated_plan_is_held_for_no_price_any_more(rig: Rig) -> None:
    """It takes no new subscriptions, and those that exist keep their price: nothing waits for a person."""
    await rig.subscribe()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.prices["USD"] += 1
    await rig.ask(plan_action("metered", None, because="1"))
    await rig.work()
    assert set(await rig.held()) == {"plan_differs"}
    await rig.move_plan("metered", "deprecate")
    await rig.work()
    assert await rig.held() == {}
    [row] = await rig.rows(schema.plan_links)
    assert row["state"] == "deprecated"


# The end, in any order of events.

CASCADE = ("plan deleted", "acme deleted", "beta archived", "quota deleted")


async def ends_with_everything(rig: Rig, order: tuple[str, ...]) -> None:
    """A plan is deleted with all that hangs on it: each unit is billed, everything ends, nothing is left."""
    acme, beta = [await rig.subscribe(name) for name in ("acme", "beta")]
    await rig.work()
    await rig.traffic("acme", 5)
    await rig.traffic("beta", 6)
    rig.pass_(timedelta(minutes=10))
    await rig.traffic("acme", 1)
    await rig.move("beta", "cancel")
    archived = rig.unheard[-1]
    assert (archived.payload["name"], archived.subresource) == ("beta", "state")
    rig.unheard.clear()
    await rig.move_plan("metered", "delete")

    def the(kind: str, name: str) -> Event:
        return next(
            event
            for event in rig.unheard
            if event.type == "ResourceDeleted"
            and (event.payload["kind"], event.payload["name"]) == (kind, name)
        )

    events = {
        "plan deleted": the("ProductPlan", "metered"),
        "acme deleted": the("Subscription", "acme"),
        "beta archived": archived,
        "quota deleted": the("Quota", "calls"),
    }
    rig.unheard.clear()
    for name in order:
        rig.unheard.append(events[name])
        await rig.hear()
        await rig.drain()
        rig.pass_(timedelta(minutes=3))
    await rig.settled()
    assert [each["state"] for id_ in (acme, beta) for each in rig.billed(id_)] == ["expired", "expired"]
    assert rig.ledger()["totals"]["billed_units"] == 12
    [plan] = rig.world.site.plans.values()
    assert plan.deleted_at is not None
    [row] = await rig.rows(schema.plan_links)
    assert row["state"] == "removed"
    assert [await rig.held(), await rig.dead(), await rig.unfinished()] == [{}, [], []]


@pytest.mark.parametrize("order", list(itertools.permutations(CASCADE)), ids=lambda order: ", ".join(order))
@ONE_DATABASE
async def test_a_deleted_plan_ends_with_everything_in_any_order_of_events(
    rig: Rig, order: tuple[str, ...]
) -> None:
    """All twenty-four."""
    await ends_with_everything(rig, order)


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("order", [CASCADE, CASCADE[::-1]], ids=["as sent", "reversed"])
async def test_a_deleted_plan_ends_with_everything_on_postgres_too(rig: Rig, order: tuple[str, ...]) -> None:
    """Two of them."""
    await ends_with_everything(rig, order)


async def test_deprecated_then_archived_after_its_subscriptions_ended(rig: Rig) -> None:
    """The usual end of a plan; the last usage of its subscriptions comes first."""
    acme = await rig.subscribe()
    await rig.work()
    await rig.traffic("acme", 5)
    await rig.move_plan("metered", "deprecate")
    await rig.work()
    await rig.move("acme", "cancel")
    await rig.move_plan("metered", "archive")
    await rig.settled()
    assert rig.billed(acme)[0]["state"] == "expired"
    assert rig.ledger()["totals"]["billed_units"] == 5
    [row] = await rig.rows(schema.plan_links)
    assert row["state"] == "removed"
    assert [await rig.held(), await rig.dead()] == [{}, []]
