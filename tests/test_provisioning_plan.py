"""Provision plan: the real handler, store and adapters against the sandbox, on both databases."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, PER_UNIT, Json, Rig, a_rig

from billingd.admin.operations import release
from billingd.domain.attempts import Action
from billingd.domain.events import plan_action
from billingd.sandbox import control_amplify
from billingd.store import schema
from billingd.store.held import standing

INEXPRESSIBLE: Json = {
    "type": "volume",
    "limit": {
        "type": "tiered",
        "tiers": [
            {"from": 1, "to": 10, "cost": 1.5, "flatFee": 3},
            {"from": 11, "to": 999999999, "cost": 1.0, "flatFee": 4},
        ],
    },
}
"""Costs and flat fees in one volume tier: no tier type of Recurly charges that."""


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        yield made


def codes(rig: Rig) -> dict[str, list[str]]:
    """The active plans at Recurly with their add-ons."""
    return {
        plan.code: sorted(plan.add_ons) for plan in rig.world.site.plans.values() if plan.deleted_at is None
    }


async def links(rig: Rig) -> dict[str, str]:
    """Linked plans by name, with their state."""
    return {row["name"]: row["state"] for row in await rig.rows(schema.plan_links)}


async def test_an_active_paid_plan_is_made_linked_labelled_and_told_once(rig: Rig) -> None:
    """One unit, one plan, one add-on per billable quota; attributes at Amplify; the provider is told once."""
    quotas = [
        {"name": "calls", "pricing": PER_UNIT},
        {"name": "maps", "pricing": PER_UNIT},
        {"name": "data", "unit": "x-mb", "pricing": {"type": "unlimited"}},
    ]
    plan = await rig.plan(quotas=quotas)
    await rig.work()
    plan_id = plan["metadata"]["id"]
    ids = sorted(quota["metadata"]["id"] for quota in plan["quotas"][:2])
    assert codes(rig) == {f"amplify-plan-{plan_id}": [f"amplify-quota-{id_}" for id_ in ids]}
    assert len(rig.world.site.measured_units) == 1
    assert rig.attributes("ProductPlan", "metered") == {
        "billingSystem": "recurly",
        "recurlyPlanCode": f"amplify-plan-{plan_id}",
    }
    await rig.ask(plan_action("metered", plan_id, because="again"))
    await rig.work()
    assert len(rig.channels.provider) == 1
    assert "is linked to Recurly's plan" in rig.channels.provider[0]


async def test_the_event_of_our_own_write_asks_for_nothing(rig: Rig) -> None:
    """The attributes we write come back as an event, which is recorded and leads to no action."""
    await rig.plan()
    await rig.hear()
    await rig.drain()
    assert [event.type for event in rig.unheard] == ["ResourceUpdated"]
    assert await rig.hear() == 0


@pytest.mark.parametrize(
    ("fields", "quotas"),
    [
        ({"type": "free"}, [{"name": "calls", "pricing": {"type": "unlimited"}}]),
        ({"activate": False}, [{"name": "calls", "pricing": PER_UNIT}]),
        ({"subscription": {"approval": "automatic"}}, [{"name": "calls", "pricing": PER_UNIT}]),
        ({}, [{"name": "calls", "pricing": {"type": "unlimited"}}]),
    ],
    ids=["free", "draft", "automatic", "nothing billable"],
)
async def test_a_plan_that_is_none_of_ours_leaves_no_trace(
    rig: Rig, fields: Json, quotas: list[Json]
) -> None:
    """Nothing is made at Recurly, held, or written back."""
    await rig.plan(**fields, quotas=quotas)
    await rig.work()
    assert codes(rig) == {}
    assert await rig.held() == {}
    assert rig.attributes("ProductPlan", "metered") == {}
    assert await rig.unfinished() == []


async def test_a_plan_of_a_product_without_the_label_waits_for_the_label(rig: Rig) -> None:
    """`billingSystem` is read from the product as it is when the action runs."""
    await rig.product("other", ours=False)
    plan = await rig.plan(product="other")
    await rig.work()
    assert codes(rig) == {}
    await rig.play(control_amplify.mark_product, {"attributes": {"billingSystem": "recurly"}}, name="other")
    await rig.ask(plan_action("metered", plan["metadata"]["id"], because="resync"))
    await rig.work()
    assert len(codes(rig)) == 1


async def test_what_the_original_integration_made_is_adopted(rig: Rig) -> None:
    """Unit, plan and add-ons that exist under our codes at our prices are linked, and nothing is made."""
    await rig.plan()
    await rig.work()
    before = codes(rig)
    made = rig.world.calls.copy()
    async with rig.store.write() as tx:  # the store forgets all: a first start beside an old site
        for table in (schema.add_on_links, schema.plan_links, schema.intents, schema.outbox):
            await tx.execute(table.delete())
    plan_id = next(iter(before)).removeprefix("amplify-plan-")
    await rig.ask(plan_action("metered", plan_id, because="adopt"))
    await rig.work()
    assert await links(rig) == {"metered": "active"}
    assert codes(rig) == before
    posts = {path: n for path, n in (rig.world.calls - made).items() if path.startswith("recurly POST")}
    assert posts == {}


async def test_a_missing_add_on_is_added_to_a_plan_that_exists(rig: Rig) -> None:
    """An active plan may gain a quota (amplify.md 3.2): its event brings the add-on, the link follows."""
    await rig.plan()
    await rig.work()
    await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    await rig.work()
    [(_, add_ons)] = codes(rig).items()
    assert len(add_ons) == 2
    assert len(await rig.rows(schema.add_on_links)) == 2


async def test_other_prices_at_recurly_are_held_and_released_when_they_agree(rig: Rig) -> None:
    """Nothing of what is there is changed; the sentence names both prices; subscriptions wait for it."""
    await rig.plan()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.prices["USD"] += 1
    plan_id = plan.code.removeprefix("amplify-plan-")
    await rig.ask(plan_action("metered", plan_id, because="resync 1"))
    await rig.work()
    held = await rig.held()
    assert set(held) == {"plan_differs"}
    assert "10" in held["plan_differs"]
    assert "11" in held["plan_differs"]
    assert sum("is held, not billed" in told for told in rig.channels.provider) == 1
    await rig.ask(plan_action("metered", plan_id, because="resync 2"))
    await rig.work()
    assert sum("is held, not billed" in told for told in rig.channels.provider) == 1

    await rig.subscribe()
    await rig.work()
    assert set(await rig.held()) == {"plan_differs", "plan_held"}, "no subscription at a wrong price"
    assert rig.approval("acme") == "pending"

    plan.prices["USD"] -= 1
    await rig.ask(plan_action("metered", plan_id, because="resync 3"))
    await rig.work(LOOK_AGAIN)
    assert await rig.held() == {}
    assert rig.approval("acme") == "approved"


async def test_an_inexpressible_plan_is_held_until_it_is_mended(rig: Rig) -> None:
    """Nothing reaches Recurly; the sentence names plan and quota; a new plan of the name releases it."""
    await rig.plan(pricing=INEXPRESSIBLE)
    await rig.work()
    held = await rig.held()
    assert set(held) == {"plan_inexpressible"}
    assert "metered" in held["plan_inexpressible"]
    assert "calls" in held["plan_inexpressible"]
    assert codes(rig) == {}
    assert not rig.world.site.measured_units
    assert "not billed" in rig.channels.provider[0]
    await rig.move_plan("metered", "delete")
    await rig.work()
    assert await rig.held() == {}
    await rig.plan()
    await rig.work()
    assert await links(rig) == {"metered": "active"}
    assert await rig.held() == {}


async def test_one_plan_is_held_for_one_reason_at_a_time(rig: Rig) -> None:
    """A hold of another kind replaces the one before, so that `status` counts plans, not reasons."""
    await rig.plan()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.prices["USD"] += 1
    await rig.ask(plan_action("metered", None, because="1"))
    await rig.work()
    await rig.play(control_amplify.add_quota, {"name": "odd", "pricing": INEXPRESSIBLE}, name="metered")
    await rig.work()
    assert set(await rig.held()) == {"plan_inexpressible"}


async def test_a_deprecated_plan_only_takes_no_new_subscriptions(rig: Rig) -> None:
    """It stays at Recurly with what it has; a new subscription to it is held."""
    await rig.plan()
    await rig.work()
    acme = await rig.subscribe("acme")
    await rig.work()
    late = await rig.subscribe("late")
    asked = list(rig.unheard)
    rig.unheard.clear()
    await rig.move_plan("metered", "deprecate")
    await rig.work()
    rig.unheard[:0] = asked
    await rig.work()
    assert await links(rig) == {"metered": "deprecated"}
    assert len(codes(rig)) == 1
    assert rig.approval("acme") == "approved"
    assert set(await rig.held()) == {"plan_not_offered"}
    assert len(rig.billed(acme)) == 1
    assert rig.billed(late) == []


async def test_an_archived_plan_is_removed(rig: Rig) -> None:
    """Archived is only possible without subscriptions; the plan at Recurly goes, and the provider is told."""
    await rig.plan()
    await rig.work()
    for step in ("deprecate", "archive"):
        await rig.move_plan("metered", step)
    await rig.work()
    assert codes(rig) == {}
    assert await links(rig) == {"metered": "removed"}
    assert "was removed at Recurly" in rig.channels.provider[-1]


@pytest.mark.parametrize(
    ("store_url", "order"),
    [
        ("sqlite", "as sent"),
        ("postgres", "reversed"),
        ("sqlite", "plan only"),
        ("postgres", "subscriptions only"),
    ],
    indirect=["store_url"],
)
async def test_a_deleted_plan_takes_its_subscriptions_along_whatever_order_events_come_in(
    store_url: str, order: str
) -> None:
    """Usage is reported first, then the subscriptions end, then the plan goes: even if events are lost."""

    def choose(events: list[Any]) -> list[Any]:
        if order == "plan only":
            return [event for event in events if event.payload["kind"] == "ProductPlan"]
        if order == "subscriptions only":
            return [event for event in events if event.payload["kind"] == "Subscription"]
        return events[::-1] if order == "reversed" else events

    async with a_rig(store_url) as rig:
        await rig.product()
        plan = await rig.plan()
        await rig.work()
        ids = [await rig.subscribe(name) for name in ("acme", "beta")]
        await rig.work()
        await rig.traffic("acme", 5)
        await rig.move_plan("metered", "delete")
        await rig.hear(choose)
        await rig.drain()
        assert len(codes(rig)) == 1, "not before its subscriptions have ended"
        assert [each["state"] for id_ in ids for each in rig.billed(id_)] == ["active", "active"]
        await rig.settled()
        assert [each["state"] for id_ in ids for each in rig.billed(id_)] == ["expired", "expired"]
        assert rig.ledger()["totals"]["billed_units"] == 5
        if order == "subscriptions only":
            await rig.ask(plan_action("metered", plan["metadata"]["id"], because="resync"))
            await rig.settled()
            assert len(codes(rig)) == 1, "nothing has said that it was deleted, and it is the only one"
            await rig.confirm()
            await rig.settled()
        assert codes(rig) == {}
        assert await rig.dead() == []


async def test_a_name_used_again_is_another_plan(rig: Rig) -> None:
    """The link belongs to the id: the old plan is removed, the new one made under a code of its own."""
    first = await rig.plan()
    await rig.work()
    acme = await rig.subscribe()
    await rig.work()
    await rig.move_plan("metered", "delete")
    second = await rig.plan()
    await rig.settled()
    assert list(codes(rig)) == [f"amplify-plan-{second['metadata']['id']}"]
    rows = {row["plan_id"]: row["state"] for row in await rig.rows(schema.plan_links)}
    assert rows == {first["metadata"]["id"]: "removed", second["metadata"]["id"]: "active"}
    assert [each["state"] for each in rig.billed(acme)] == ["expired"]


async def test_a_plan_removed_at_recurly_by_hand_needs_a_person(rig: Rig) -> None:
    """An inactive plan differs: it is held, not made anew under a code that is taken."""
    await rig.plan()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.deleted_at = rig.far.now()
    await rig.ask(plan_action("metered", None, because="resync"))
    await rig.work()
    assert set(await rig.held()) | set(await rig.dead())
    assert len(rig.world.site.plans) == 1


async def test_a_removal_that_is_done_already_is_enough(rig: Rig) -> None:
    """Somebody removed the plan at Recurly before us: the link ends all the same."""
    await rig.plan()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.deleted_at = rig.far.now()
    await rig.move_plan("metered", "delete")
    await rig.settled()
    assert await links(rig) == {"metered": "removed"}
    assert await rig.dead() == []


@pytest.mark.parametrize(
    ("store_url", "kind"),
    [("sqlite", "lost"), ("sqlite", "500_committed"), ("postgres", "cut"), ("postgres", "html_502")],
    indirect=["store_url"],
)
async def test_a_lost_answer_makes_nothing_twice(rig: Rig, kind: str) -> None:
    """Every first write of plan provisioning goes wrong once; in the end there is one of each."""
    for path in ("/measured_units", "/plans"):
        rig.fault(kind, "POST", path)
    await rig.plan()
    await rig.settled()
    assert len(rig.world.site.measured_units) == 1
    assert len(rig.world.site.plans) == 1
    assert await links(rig) == {"metered": "active"}
    assert await rig.dead() == []


@pytest.mark.parametrize(
    ("store_url", "later"), [("sqlite", "after the key"), ("postgres", "soon")], indirect=["store_url"]
)
async def test_a_crash_at_any_step_is_mended_by_the_next_start(store_url: str, later: str) -> None:
    """The process dies at each step in turn, each time on a new plan, which is then made once.

    Only the notice may be told twice: nothing can tell whether a channel took it.
    """
    async with a_rig(store_url) as rig:
        await rig.product()

        async def once(name: str, die_at: int | None) -> bool:
            plan = await rig.plan(name, quotas=[{"name": "calls", "unit": f"x-{name}", "pricing": PER_UNIT}])
            rig.unheard.clear()
            await rig.ask(plan_action(name, plan["metadata"]["id"], because="crash"))
            rig.steps.arm(die_at)
            died = await rig.dies()
            if later == "after the key":
                rig.pass_(2 * HOUR)
            await rig.mended()
            code = f"amplify-plan-{plan['metadata']['id']}"
            assert [each.code for each in rig.world.site.plans.values()].count(code) == 1, name
            assert rig.attributes("ProductPlan", name)["recurlyPlanCode"] == code
            assert (await links(rig))[name] == "active"
            assert sum(f"({name})" in told for told in rig.channels.provider) in ({1, 2} if died else {1})
            return died

        assert not await once("clean", None)
        step = 1
        while await once(f"crash-{step}", step):
            step += 1
        assert step > 16
        assert await rig.dead() == []


async def test_actions_of_a_kind_nobody_knows_stay(rig: Rig) -> None:
    """An action from a newer billingd waits beside the others of its subject, undone."""
    await rig.ask(Action("provision_galaxy", "plan:metered", "k", {}))
    await rig.work()
    assert await rig.unfinished() == ["k"]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_plan_that_recurly_refuses_is_held_in_its_words_and_made_once_it_is_mended(
    store_url: str,
) -> None:
    """A currency the site lacks, say: no dead letter that nobody hears of, but a hold and a notice."""
    async with a_rig(store_url) as rig:
        rig.world.site.configure(currencies=frozenset({"EUR"}))
        await rig.product()
        await rig.plan()
        await rig.work()
        held = await rig.held()
        assert set(held) == {"plan_refused"}
        assert "USD" in held["plan_refused"] or "currenc" in held["plan_refused"].lower()
        assert await rig.dead() == []
        rig.world.site.configure(currencies=frozenset({"USD"}))
        async with rig.store.read() as tx:
            [item] = await standing(tx)
        assert await release(rig.store, item["id"], now=rig.far.now())
        await rig.work(HOUR)
        assert await rig.held() == {}
        assert await links(rig) == {"metered": "active"}
