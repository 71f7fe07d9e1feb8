"""Resync: what was missed is found and done, nothing else is, and what only seems absent is not ended."""

from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, PER_UNIT, Json, Rig, a_rig

from billingd.admin import status
from billingd.admin.operations import release, write_off
from billingd.domain.errors import Misconfigured
from billingd.domain.events import plan_action, subscription_action
from billingd.resync import Comparison
from billingd.sandbox import control_amplify
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.tenant import MARKETPLACE
from billingd.sandbox.asked import Wrong
from billingd.store import held, marks, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
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


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        yield made


async def resync(rig: Rig, *, dry_run: bool = False) -> Comparison:
    """What nobody was told of is forgotten; then one resync."""
    rig.unheard.clear()
    return await rig.daemon.resync.run(dry_run=dry_run)


async def deaf(rig: Rig, *, held_too: bool = False) -> None:
    """Works without a single webhook until nothing is left to do, or half a day when something is held."""
    for _ in range(24 if held_too else 48):
        rig.unheard.clear()
        await rig.drain()
        if not await rig.unfinished():
            return
        rig.pass_(HOUR / 2)
        await rig.poll()
    assert held_too, await rig.unfinished()


def signs(found: Comparison) -> list[str]:
    """Its steps, in short."""
    return [f"{step.op} {step.what} {step.name}" for step in found.steps]


async def assert_settled(rig: Rig) -> None:
    """There is nothing to do any more, and another resync asks for nothing."""
    found = await resync(rig)
    assert (signs(found), found.withheld, found.enqueued) == ([], (), 0)


async def forget(rig: Rig, *tables: Any) -> None:
    """The store loses these tables' rows."""
    async with rig.store.write() as tx:
        for table in tables:
            await tx.execute(table.delete())


async def test_all_that_was_missed_is_done_and_nothing_is_left_to_do(rig: Rig) -> None:
    """Plans and subscriptions of a daemon that was down; then their ends."""
    plan = await rig.plan()
    await rig.plan("other", quotas=[{"name": "maps", "pricing": PER_UNIT}])
    ids = {name: await rig.subscribe(name) for name in ("acme", "beta")}
    found = await resync(rig)
    assert [step.what for step in found.steps] == ["plan", "plan", "subscription", "subscription"]
    assert set(signs(found)) == {
        "+ plan metered",
        "+ plan other",
        "+ subscription acme",
        "+ subscription beta",
    }
    assert found.enqueued == 4
    await deaf(rig)
    assert {name: rig.approval(name) for name in ids} == {"acme": "approved", "beta": "approved"}
    assert {name: len(rig.billed(id_)) for name, id_ in ids.items()} == {"acme": 1, "beta": 1}
    await assert_settled(rig)

    await rig.traffic("acme", 5)
    await rig.move("acme", "cancel")
    await rig.move("beta", "reject")
    await rig.subscribe("late")
    await rig.move_plan("other", "deprecate")
    found = await resync(rig)
    assert sorted(signs(found)) == [
        "+ subscription late",
        "- subscription acme",
        "- subscription beta",
        "~ plan other",
    ]
    await deaf(rig)
    assert [each["state"] for id_ in ids.values() for each in rig.billed(id_)] == ["expired", "expired"]
    assert rig.ledger()["totals"]["billed_units"] == 5
    await assert_settled(rig)

    await rig.move("late", "cancel")
    await rig.move_plan("other", "archive")
    await rig.play(control_amplify.move_plan, None, name="metered", step="delete")
    found = await resync(rig)
    assert sorted(signs(found)) == ["- plan metered", "- plan other", "- subscription late"]
    await deaf(rig, held_too=True)
    await rig.confirm()  # the last of its kind: nothing is left that shows that we may still see it
    await deaf(rig)
    assert all(one.deleted_at is not None for one in rig.world.site.plans.values())
    assert {row["state"] for row in await rig.rows(schema.plan_links)} == {"removed"}
    assert plan["metadata"]["id"] in {row["plan_id"] for row in await rig.rows(schema.plan_links)}
    assert await rig.dead() == []
    await assert_settled(rig)


async def test_a_dry_run_only_shows(rig: Rig) -> None:
    """No action, no mark, nothing held; the next run finds the same."""
    await rig.plan()
    shown = await resync(rig, dry_run=True)
    assert signs(shown) == ["+ plan metered"]
    assert await rig.rows(schema.outbox) == []
    assert await rig.rows(schema.marks) == []
    assert signs(await resync(rig)) == signs(shown)
    assert signs(await resync(rig)) == [], "its action waits already"


async def test_what_is_none_of_ours_is_no_step(rig: Rig) -> None:
    """Free, automatic, draft, of a product without the label, a subscription of any of them."""
    await rig.plan("free", type="free", quotas=[{"name": "calls", "pricing": {"type": "unlimited"}}])
    await rig.plan("automatic", subscription={"approval": "automatic"})
    await rig.plan("draft", activate=False)
    await rig.plan("nothing", quotas=[{"name": "calls", "pricing": {"type": "unlimited"}}])
    await rig.product("theirs", ours=False)
    await rig.plan("alien", product="theirs")
    for plan in ("free", "nothing", "alien"):
        await rig.subscribe(f"of-{plan}", plan=plan)
    await rig.plan("old")
    await rig.subscribe("of-old", plan="old")
    await rig.move("of-old", "approve")
    await rig.move_plan("old", "deprecate")
    await assert_settled(rig)


@pytest.mark.parametrize("why", ["inexpressible", "refused"])
async def test_what_is_held_for_the_same_reason_is_not_asked_again(rig: Rig, why: str) -> None:
    """Neither the plan nor its subscriptions; once it is gone, what was held is closed."""
    if why == "refused":
        rig.world.site.configure(currencies=frozenset({"EUR"}))
    await rig.plan(pricing=INEXPRESSIBLE if why == "inexpressible" else PER_UNIT)
    await rig.subscribe()
    assert signs(await resync(rig)) == ["+ plan metered", "+ subscription acme"]
    await rig.drain()
    rig.pass_(LOOK_AGAIN)
    await rig.drain()
    assert set(await rig.held()) == {f"plan_{why}", "plan_held"}
    await assert_settled(rig)
    await rig.move_plan("metered", "delete")
    assert signs(await resync(rig)) == ["~ plan metered"]
    await deaf(rig)
    assert await rig.held() == {}
    await assert_settled(rig)


async def test_a_plan_that_gained_a_quota_or_another_title_is_changed(rig: Rig) -> None:
    """Until its links say so; the subscription that was there gets the add-on too."""
    plan = await rig.plan()
    await rig.work()
    acme = await rig.subscribe()
    await rig.work()
    await assert_settled(rig)
    await rig.play(control_amplify.add_quota, {"name": "maps", "pricing": PER_UNIT}, name="metered")
    resource = rig.world.tenant.resources.find("ProductPlan", "metered")
    assert resource is not None
    rig.world.tenant.replace(resource, {**resource.shown("v1"), "title": "Metered anew"})
    found = await resync(rig)
    assert signs(found) == ["~ plan metered"]
    assert 'quota "maps" has no add-on yet' in found.steps[0].reason
    assert 'was "metered" before' in found.steps[0].reason
    await deaf(rig)
    for _ in range(3):  # what one step brings to light, the next resync sees
        if not (await resync(rig)).steps:
            break
        await deaf(rig)
    [billed] = rig.billed(acme)
    assert len(billed["add_ons"]) == 2
    assert {row["title"] for row in await rig.rows(schema.plan_links)} == {"Metered anew"}
    assert plan["metadata"]["id"] == (await rig.rows(schema.plan_links))[0]["plan_id"]
    await assert_settled(rig)


async def test_prices_that_differ_are_a_change_until_they_are_held_for_it(rig: Rig) -> None:
    """Then nothing is asked again, and it is once they agree."""
    await rig.plan()
    await rig.work()
    [plan] = rig.world.site.plans.values()
    plan.prices["USD"] += 1
    found = await resync(rig)
    assert signs(found) == ["~ plan metered"]
    assert "costs 11 USD" in found.steps[0].reason
    await deaf(rig)
    assert set(await rig.held()) == {"plan_differs"}
    await assert_settled(rig)
    plan.prices["USD"] += 1
    assert signs(await resync(rig)) == ["~ plan metered"], "it differs otherwise now"
    await deaf(rig)
    await assert_settled(rig)
    plan.setup_fees["USD"] = Decimal(3)
    assert signs(await resync(rig)) == ["~ plan metered"], "and in something else, too"
    await deaf(rig)
    assert "3 USD" in (await rig.held())["plan_differs"]
    await assert_settled(rig)
    plan.setup_fees["USD"] = Decimal(0)
    plan.prices["USD"] -= 2
    found = await resync(rig)
    assert signs(found) == ["~ plan metered"]
    await deaf(rig)
    assert await rig.held() == {}
    await assert_settled(rig)


async def test_a_dead_letter_is_left_to_the_operator(rig: Rig) -> None:
    """It is noted with its number, and no second action is made beside it."""
    await rig.plan()
    rig.unheard.clear()
    await rig.ask(plan_action("metered", None, because="x"))
    async with rig.store.write() as tx:
        await tx.execute(
            schema.outbox.update().values(state="dead", error="Permanent: boom", settled_at=rig.far.now())
        )
    found = await resync(rig)
    assert signs(found) == []
    [note] = found.notes
    assert "action 1 is a dead letter: Permanent: boom" in note
    assert len(await rig.rows(schema.outbox)) == 1


@pytest.mark.parametrize("later", ["done", "pending"])
async def test_a_dead_letter_is_in_nobodys_way_once_a_later_action_is_done(rig: Rig, later: str) -> None:
    """The last action of a subject says how it stands with it."""
    await rig.plan()
    rig.unheard.clear()
    for because in ("first", "second"):
        await rig.ask(plan_action("metered", None, because=because))
    async with rig.store.write() as tx:
        now = rig.far.now()
        for id_, state in ((1, "dead"), (2, later)):
            settled_at = None if state == "pending" else now
            values = {"state": state, "error": "boom", "settled_at": settled_at}
            await tx.execute(schema.outbox.update().where(schema.outbox.c.id == id_).values(values))
    found = await resync(rig, dry_run=True)
    assert (signs(found), found.notes) == (["+ plan metered"] if later == "done" else [], ())


@ONE_DATABASE
@pytest.mark.parametrize("state", ["dead", "pending"])
async def test_what_waits_or_is_dead_is_missing_all_the_same(rig: Rig, state: str) -> None:
    """Six of ten are missing, and half of these have an action that is in the way of another."""
    ids = await several(rig, 10)
    for name in ("s0", "s1", "s2"):
        await rig.ask(subscription_action(name, ids[name], because="in the way"))
    async with rig.store.write() as tx:
        theirs = schema.outbox.c.key.endswith("in the way")
        settled_at = rig.far.now() if state == "dead" else None
        values = {"state": state, "error": "outage", "settled_at": settled_at}
        await tx.execute(schema.outbox.update().where(theirs).values(values))
    hidden = {f"s{number}" for number in range(6)}
    rig.blind("Subscription", names=hidden)
    found = await resync(rig)
    assert signs(found) == []
    assert {step.name for step in found.withheld} == hidden
    reason = (await rig.held())["mass_absence"]
    assert all(ids[name] in reason for name in hidden)


@ONE_DATABASE
async def test_what_was_let_go_of_is_asked_for_once_it_is_ours_again(rig: Rig) -> None:
    """It waits for its account; its product loses its label and gets it again, and no event says so."""
    await rig.plan()
    await rig.work()
    made = await rig.play(
        control_amplify.subscribe, {"plan": "metered", "name": "acme", "user": "u", "team": "t"}
    )
    await rig.work()
    assert set(await rig.held()) == {"account_missing"}
    for label in (None, "recurly"):
        await rig.play(control_amplify.mark_product, {"attributes": {"billingSystem": label}}, name="weather")
        rig.unheard.clear()
        rig.pass_(LOOK_AGAIN)
        await rig.drain()
    rig.account(made)
    await resync(rig)
    await rig.drain()
    assert (rig.approval("acme"), await rig.held()) == ("approved", {})


async def test_what_exists_at_recurly_and_was_not_approved_yet_is_approved(rig: Rig) -> None:
    """The link stands at `created`, and nobody works on it."""
    await rig.plan()
    await rig.work()
    acme = await rig.subscribe()
    rig.unheard.clear()
    await rig.ask(subscription_action("acme", acme, because="x"))
    rig.fault("outage", "PUT", "**/subscriptions/acme/approval", side="amplify", times=None)
    await rig.drain()
    link = await rig.link(acme)
    assert link is not None
    assert link.state == "created"
    rig.world.faults.clear()
    await forget(rig, schema.outbox)
    assert signs(await resync(rig)) == ["~ subscription acme"]
    await deaf(rig)
    assert rig.approval("acme") == "approved"
    await assert_settled(rig)


async def several(rig: Rig, number: int) -> dict[str, str]:
    """Linked subscriptions to one plan, by name."""
    await rig.plan()
    await rig.work()
    ids = {f"s{n}": await rig.subscribe(f"s{n}") for n in range(number)}
    await rig.work()
    return ids


def hide(rig: Rig, *names: str) -> None:
    """Amplify lists these subscriptions no more, though each is there when it is asked for by name."""
    resources = rig.world.tenant.resources
    listed = resources.of_kind

    def fewer(kind: str, *args: Any) -> Any:
        return [one for one in listed(kind, *args) if one.name not in names]

    vars(resources)["of_kind"] = fewer


def show(rig: Rig) -> None:
    """It lists them again."""
    del vars(rig.world.tenant.resources)["of_kind"]


async def test_an_absence_that_a_get_contradicts_ends_nothing(rig: Rig) -> None:
    """A listing may slip; the resource itself decides."""
    ids = await several(rig, 2)
    hide(rig, "s0", "metered")
    found = await resync(rig)
    assert signs(found) == ["- plan metered", "- subscription s0"]
    await deaf(rig)
    assert [each["state"] for id_ in ids.values() for each in rig.billed(id_)] == ["active", "active"]
    assert {row["state"] for row in await rig.rows(schema.subscription_links)} == {"active"}
    assert await rig.dead() == []


async def test_much_that_is_absent_at_once_is_held_until_a_person_confirms_it(rig: Rig) -> None:
    """An account that lost its role sees nothing: nobody is ended. What was really deleted is, once told."""
    ids = await several(rig, 5)
    gone = [name for name in ids if name != "s0"]
    for name in gone:
        await rig.move(name, "cancel")
        await rig.move(name, "delete")
    await rig.move_plan("metered", "deprecate")
    found = await resync(rig)
    assert signs(found) == ["~ plan metered"], "what was seen is done all the same"
    assert [step.name for step in found.withheld] == sorted(gone, key=lambda name: ids[name])
    assert "4 subscription(s)" in found.warnings[0]
    await rig.drain()
    assert [each["state"] for id_ in ids.values() for each in rig.billed(id_)] == ["active"] * 5
    [reason] = (await rig.held()).values()
    assert "Engage Admin" in reason
    again = await resync(rig)
    assert len(again.withheld) == 4
    assert sum("Much is missing" in told for told in rig.channels.provider) <= 1
    await rig.confirm()
    await deaf(rig)
    assert [each["state"] for id_ in ids.values() for each in rig.billed(id_)] == ["active"] + ["expired"] * 4
    assert await rig.held() == {}
    assert sum("Much is missing" in told for told in rig.channels.provider) == 1
    await assert_settled(rig)


async def test_a_confirmation_holds_for_just_those_that_were_shown(rig: Rig) -> None:
    """Others that are missing by then are held anew, as many as they may be."""
    ids = await several(rig, 6)
    for name in ("s0", "s1", "s2", "s3"):
        await rig.move(name, "cancel")
        await rig.move(name, "delete")
    assert len((await resync(rig)).withheld) == 4
    rig.blind("Subscription", names={"s4", "s5"})
    await rig.confirm()
    await deaf(rig, held_too=True)
    assert set(await rig.held()) == {"mass_absence"}
    links = {row["name"]: row["state"] for row in await rig.rows(schema.subscription_links)}
    assert links == {name: "active" if name in {"s4", "s5"} else "ended" for name in ids}
    rig.sighted()
    await deaf(rig)
    await assert_settled(rig)
    assert await rig.held() == {}
    assert [each["state"] for name in ("s4", "s5") for each in rig.billed(ids[name])] == ["active"] * 2


@ONE_DATABASE
async def test_who_was_shown_a_shorter_list_cannot_release_the_longer_one(rig: Rig) -> None:
    """It is another item by then, of which nobody is told twice."""
    await several(rig, 6)
    rig.blind("Subscription", names={"s0", "s1", "s2", "s3"})
    await resync(rig)
    async with rig.store.read() as tx:
        [shown] = await held.standing(tx)
    rig.sighted()
    rig.blind("Subscription", names={"s0", "s1", "s2", "s3", "s4"})
    await resync(rig)
    assert not await release(rig.store, shown["id"], now=rig.far.now())
    [reason] = (await rig.held()).values()
    assert "5 subscription(s)" in reason
    await rig.drain()
    assert sum("Much is missing" in told for told in rig.channels.provider) == 1
    rig.sighted()
    rig.blind("Subscription", names={"s0", "s1", "s2"})
    await resync(rig)
    [reason] = (await rig.held()).values()
    assert "3 subscription(s)" in reason, "two were seen again; about the others a person is asked still"


async def test_a_mass_absence_closes_itself_when_all_is_listed_again(rig: Rig) -> None:
    await several(rig, 4)
    hide(rig, "s0", "s1", "s2", "s3", "metered")
    found = await resync(rig)
    assert len(found.withheld) == 5
    assert set(await rig.held()) == {"mass_absence"}
    show(rig)
    await assert_settled(rig)
    assert await rig.held() == {}


async def test_rows_that_move_between_pages_are_taken_once(rig: Rig) -> None:
    """A deletion on page one moves a row of page two up: none is missed, none is done twice."""
    await rig.plan()
    await rig.work()
    template = await rig.subscribe("s000")
    for number in range(1, 120):
        await rig.subscribe(f"s{number:03}", account=False)
    rig.unheard.clear()
    listed: list[str] = []
    rows = rig.world.tenant.resources.of_kind

    def deleting(kind: str, *args: Any) -> Any:
        found = rows(kind, *args)
        if kind == "Subscription":
            listed.append(kind)
            if len(listed) == 2:  # between its two pages
                resource = rig.world.tenant.resources.find("Subscription", "s001")
                assert resource is not None
                rig.world.tenant.delete(resource, force=True)
                found = rows(kind, *args)
        return found

    vars(rig.world.tenant.resources)["of_kind"] = deleting
    found = await resync(rig, dry_run=True)
    names = [step.name for step in found.steps]
    assert len(names) == len(set(names))
    assert set(names) == {f"s{number:03}" for number in range(120)} - {"s001"}
    assert template in {step.id for step in found.steps}
    assert len(listed) >= 3, "the list that shrank was read again"


async def test_one_that_recurly_bills_and_nobody_knows_of_is_ended(rig: Rig) -> None:
    """A store that lost its links: what is served is linked again, what is over is ended, usage and all."""
    ids = await several(rig, 3)
    rig.pass_(HOUR)
    await rig.traffic("s1", 7)
    await rig.move("s1", "cancel")
    await rig.move("s2", "cancel")
    await rig.move("s2", "delete")
    await forget(
        rig,
        schema.usage_records,
        schema.billing_periods,
        schema.subscription_links,
        schema.intents,
        schema.outbox,
    )
    found = await resync(rig)
    assert sorted(signs(found)) == ["+ subscription s0", f"- subscription {ids['s2']}", "- subscription s1"]
    await deaf(rig)
    states = {name: [each["state"] for each in rig.billed(id_)] for name, id_ in ids.items()}
    assert states == {"s0": ["active"], "s1": ["expired"], "s2": ["expired"]}
    assert rig.ledger()["totals"]["billed_units"] == 7
    await assert_settled(rig)


@ONE_DATABASE
async def test_one_that_nobody_knows_of_is_not_ended_while_amplify_has_it(rig: Rig) -> None:
    """It was not in the list, and its name is known to nobody: it is asked for by its id."""
    ids = await several(rig, 1)
    await forget(rig, schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox)
    listed = rig.amplify.survey_subscriptions

    async def none() -> Any:
        return ()

    rig.amplify.survey_subscriptions = none
    assert signs(await resync(rig)) == []
    rig.amplify.survey_subscriptions = listed
    assert signs(await resync(rig)) == ["+ subscription s0"]
    await deaf(rig)
    assert [each["state"] for each in rig.billed(ids["s0"])] == ["active"]


@ONE_DATABASE
async def test_a_po_number_of_somebody_elses_ends_nothing(rig: Rig) -> None:
    """Only marked subscriptions to plans of ours are anybody's orphans."""
    ids = await several(rig, 1)
    [subscription] = rig.world.site.subscriptions.values()
    await rig.move("s0", "cancel")
    await rig.move("s0", "delete")
    await forget(rig, schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox)
    subscription.given["po_number"] = "PO 4711 / Miller"
    await assert_settled(rig)
    subscription.given["po_number"] = ids["s0"]
    assert signs(await resync(rig, dry_run=True)) == [f"- subscription {ids['s0']}"]
    await forget(rig, schema.add_on_links, schema.plan_links)
    assert [one for one in signs(await resync(rig, dry_run=True)) if one.startswith("-")] == []


@ONE_DATABASE
async def test_one_that_recurly_no_longer_lists_as_live_is_looked_at_once(rig: Rig) -> None:
    """Until its state is known; from then on that is what tells, not a resync."""
    ids = await several(rig, 1)
    [subscription] = rig.world.site.subscriptions.values()
    rig.world.site.expire(subscription.uuid)
    found = await resync(rig)
    assert signs(found) == ["~ subscription s0"]
    await deaf(rig)
    link = await rig.link(ids["s0"])
    assert link is not None
    assert link.billed_state == "expired"
    await assert_settled(rig)


async def label(rig: Rig, value: str | None) -> None:
    """Labels the product, or takes its label off."""
    await rig.play(control_amplify.mark_product, {"attributes": {"billingSystem": value}}, name="weather")


async def test_a_label_that_came_or_went_unheard_is_heeded(rig: Rig) -> None:
    """Set after the plans exist: they are made. Taken off: told, nothing ended. Set again: closed."""
    await label(rig, None)
    await rig.plan()
    acme = await rig.subscribe()
    await assert_settled(rig)
    await label(rig, "recurly")
    assert signs(await resync(rig)) == ["+ plan metered", "+ subscription acme"]
    await deaf(rig)
    assert rig.approval("acme") == "approved"
    await label(rig, None)
    beta = await rig.subscribe("beta")
    assert signs(await resync(rig)) == ["~ product weather"]
    await deaf(rig)
    assert set(await rig.held()) == {"product_unlabelled"}
    assert len(await warnings(rig)) == 1
    await assert_settled(rig)
    assert [each["state"] for each in rig.billed(acme)] == ["active"]
    await label(rig, "recurly")
    assert signs(await resync(rig)) == ["~ product weather", "+ subscription beta"]
    await deaf(rig)
    assert await rig.held() == {}
    assert len(rig.billed(beta)) == 1
    await assert_settled(rig)


@pytest.mark.parametrize("seed", range(6))
@ONE_DATABASE
async def test_whatever_was_missed_one_resync_and_its_work_leave_nothing_to_do(rig: Rig, seed: int) -> None:
    """Twelve things happen at random in each of four days, none of them heard of; then all agrees again."""
    rng = Random(seed)
    life = Life(rig, rng)
    for _ in range(4):
        for _ in range(12):
            await life.go_on()
        if (await resync(rig)).withheld:
            await rig.confirm()
        await deaf(rig, held_too=True)
        await assert_settled(rig)
        assert await rig.dead() == []
    served = {
        one["name"]: one["spec"]["plan"]["name"] for one in life.shown("Subscription") if not _over(one)
    }
    offered = {row["name"] for row in await rig.rows(schema.plan_links) if row["state"] == "active"}
    rows = await rig.rows(schema.subscription_links)
    assert {row["state"] for row in rows} <= {"active", "ended"}
    linked = {row["name"] for row in rows if row["state"] == "active"}
    assert {name for name, plan in served.items() if plan in offered} <= linked <= set(served)
    assert {each["state"] for row in rows for each in rig.billed(row["subscription_id"])} <= {
        "active",
        "expired",
    }
    assert {row["subscription_id"] for row in rows} == {
        subscription.given["po_number"] for subscription in rig.world.site.subscriptions.values()
    }


def _over(subscription: Json) -> bool:
    ended = subscription.get("state", {}).get("name") in {"archived", "migrated"}
    return ended or subscription["approval"]["state"] == "rejected"


class Life:
    """What providers and consumers do at Amplify, at random."""

    def __init__(self, rig: Rig, rng: Random) -> None:
        self.rig = rig
        self.rng = rng
        self.number = 0

    def shown(self, kind: str) -> list[Json]:
        """All of a kind as they are now."""
        return [one.shown("v1") for one in self.rig.world.tenant.resources.of_kind(kind)]

    def one_of(self, kind: str, *states: str) -> str | None:
        """The name of one at random."""
        found = [
            one["name"]
            for one in self.shown(kind)
            if not states or (one["state"] if kind == "ProductPlan" else self._state(one)) in states
        ]
        return self.rng.choice(sorted(found)) if found else None

    def _state(self, subscription: Json) -> str:
        return "over" if _over(subscription) else str(subscription["approval"]["state"])

    async def go_on(self) -> None:
        """One thing happens."""
        self.number += 1
        doing = [
            self.plan,
            self.subscribe,
            self.subscribe,
            self.subscribe,
            self.quota,
            self.retitle,
            self.move_plan,
            self.move,
            self.move,
            self.delete,
        ]
        await self.rng.choice(doing)()
        self.rig.pass_(timedelta(minutes=2))

    async def plan(self) -> None:
        pricing = self.rng.choice([PER_UNIT, PER_UNIT, INEXPRESSIBLE, {"type": "unlimited"}])
        await self.rig.plan(f"p{self.number}", pricing=pricing, activate=self.rng.random() < 0.9)

    async def subscribe(self) -> None:
        if (plan := self.one_of("ProductPlan", "active")) is not None:
            await self.rig.subscribe(f"s{self.number}", plan=plan)

    async def quota(self) -> None:
        if (plan := self.one_of("ProductPlan", "active")) is not None:
            body = {"name": f"q{self.number}", "pricing": PER_UNIT}
            await self.rig.play(control_amplify.add_quota, body, name=plan)

    async def retitle(self) -> None:
        if (name := self.one_of("ProductPlan", "active", "deprecated")) is not None:
            resource = self.rig.world.tenant.resources.find("ProductPlan", name)
            assert resource is not None
            titled = {**resource.shown("v1"), "title": f"T{self.number}"}
            self.rig.world.tenant.replace(resource, titled)

    async def move_plan(self) -> None:
        if (plan := self.one_of("ProductPlan", "active", "deprecated")) is not None:
            step = self.rng.choice(["deprecate", "delete"])
            await self.rig.move_plan(plan, step)

    async def move(self) -> None:
        if (name := self.one_of("Subscription", "pending", "approved")) is not None:
            step = self.rng.choice(["cancel", "reject", "approve", "migrate"])
            plan = self.one_of("ProductPlan", "active")
            body = {"plan": plan} if step == "migrate" else {}
            if step != "migrate" or plan is not None:
                with suppress(Refused, Wrong):
                    await self.rig.move(name, step, **body)

    async def delete(self) -> None:
        if (name := self.one_of("Subscription", "over")) is not None:
            await self.rig.move(name, "delete")


async def test_a_resource_that_cannot_be_understood_hides_none_of_the_others(rig: Rig) -> None:
    """Nor is it taken for absent; it is told."""
    ids = await several(rig, 1)
    await rig.subscribe("beta")
    resource = rig.world.tenant.resources.find("Subscription", "s0")
    assert resource is not None
    del resource.body["spec"]["product"]
    found = await resync(rig)
    assert signs(found) == ["+ subscription beta"]
    assert "spec.product is missing" in found.warnings[0]
    await deaf(rig)
    assert [each["state"] for each in rig.billed(ids["s0"])] == ["active"]


async def bills_by_itself(rig: Rig, payment: str | None) -> None:
    """Switches a Marketplace's own billing on or off."""
    resource = rig.world.tenant.resources.find("Marketplace", MARKETPLACE)
    assert resource is not None
    if payment is None:
        resource.body.pop("billing")
    else:
        rig.world.tenant.put_subresource(resource, "billing", {"billing": {"payment": {"type": payment}}})


async def warnings(rig: Rig) -> list[str]:
    """As /status has them."""
    read = await status.read(rig.store, source="metrics", now=rig.far.now(), reasons=[], webhooks={})
    told: list[str] = read["warnings"]
    return told


async def test_a_marketplace_that_bills_by_itself_is_told_once_until_it_stops(rig: Rig) -> None:
    """Consumers would be charged twice: held, warned of, and closed when it is off."""
    await assert_settled(rig)
    assert await warnings(rig) == []
    await bills_by_itself(rig, "stripe")
    for _ in range(2):
        assert "charged twice" in (await resync(rig)).warnings[0]
        await rig.drain()
    assert set(await rig.held()) == {"native_billing"}
    assert "charged twice" in (await warnings(rig))[0]
    assert sum("bills by itself" in told for told in rig.channels.provider) == 1
    await bills_by_itself(rig, None)
    await resync(rig)
    assert await rig.held() == {}
    assert await warnings(rig) == []


@ONE_DATABASE
async def test_a_marketplace_that_is_not_listed_says_nothing_of_its_billing(rig: Rig) -> None:
    """It may only be hidden from us: what is held of it stands."""
    await bills_by_itself(rig, "stripe")
    await resync(rig)
    rig.blind("Marketplace")
    await resync(rig)
    assert set(await rig.held()) == {"native_billing"}


@ONE_DATABASE
async def test_who_knows_that_it_bills_by_itself_is_not_told_again(rig: Rig) -> None:
    """Written off: it stays so."""
    await bills_by_itself(rig, "custom")
    await resync(rig)
    async with rig.store.read() as tx:
        [item] = await held.standing(tx)
    assert await write_off(rig.store, item["id"], reason="invoices go to nobody", now=rig.far.now())
    await resync(rig)
    assert await rig.held() == {}


@ONE_DATABASE
async def test_marketplaces_that_may_not_be_seen_stop_nothing(rig: Rig) -> None:
    """What was known of them stays."""
    await bills_by_itself(rig, "stripe")
    await resync(rig)
    rig.fault("outage", "GET", "**/marketplaces", side="amplify", times=None, args={"status": 403})
    await rig.plan()
    found = await resync(rig)
    assert signs(found) == ["+ plan metered"]
    assert found.charging is None
    assert set(await rig.held()) == {"native_billing"}


async def test_it_runs_at_the_first_start_when_asked_and_every_so_often(rig: Rig) -> None:
    """Judged by the mark, which says when the listing began."""
    made = rig.daemon.resync
    assert await made.run_once() is True
    assert await made.run_once() is False
    assert await made.idle() == timedelta(minutes=1)
    async with rig.store.read() as tx:
        mark = await marks.find(tx, marks.RESYNCED)
    assert mark is not None
    assert mark.at == rig.far.now()
    rig.pass_(timedelta(hours=6) - timedelta(seconds=10))
    assert await made.run_once() is False
    assert await made.idle() == timedelta(seconds=10)
    rig.pass_(timedelta(seconds=10))
    assert await made.run_once() is True
    async with rig.store.write() as tx:
        await made.ask(tx, "the feed has a gap")
    assert made.wake.is_set()
    assert await made.run_once() is True
    assert await made.run_once() is False


@ONE_DATABASE
async def test_a_clock_that_was_ahead_puts_no_resync_off(rig: Rig) -> None:
    """A mark of the future is none of a listing that was made."""
    made = rig.daemon.resync
    rig.clock.offset = timedelta(days=365)
    assert await made.run_once() is True
    rig.clock.offset = timedelta(0)
    assert await made.run_once() is True
    assert await made.run_once() is False
    assert await made.idle() == timedelta(minutes=1)


async def test_who_asks_while_one_is_under_way_gets_another(rig: Rig) -> None:
    """What was listed already may be what they ask about."""
    made = rig.daemon.resync
    listed = rig.amplify.list_marketplaces

    async def asking() -> Any:
        async with rig.store.write() as tx:
            await made.ask(tx, "a gap")
        return await listed()

    rig.amplify.list_marketplaces = asking
    assert await made.run_once() is True
    del rig.amplify.list_marketplaces
    assert await made.run_once() is True
    assert await made.run_once() is False


@ONE_DATABASE
async def test_a_listing_that_fails_asks_for_nothing_and_is_tried_again(rig: Rig) -> None:
    """Half a list would end the other half."""
    await several(rig, 2)
    rig.fault("outage", "GET", "**/subscriptions", side="amplify", times=None, args={"status": 503})
    with pytest.raises(Exception, match="HTTP 503"):
        await rig.daemon.resync.run_once()
    assert await rig.unfinished() == []
    rig.world.faults.clear()
    assert await rig.daemon.resync.run_once() is True


@ONE_DATABASE
async def test_a_forbidden_listing_ends_nobody(rig: Rig) -> None:
    """403 is no empty list."""
    await several(rig, 1)
    rig.fault("outage", "GET", "**/subscriptions", side="amplify", times=None, args={"status": 403})
    with pytest.raises(Misconfigured):
        await resync(rig)
    assert await rig.unfinished() == []


@ONE_DATABASE
@pytest.mark.parametrize("what", ["currency and price", "inactive, and a new quota"])
async def test_what_a_person_is_asked_about_is_no_step_for_ever(rig: Rig, what: str) -> None:
    """It is held, and the next runs have nothing to do."""
    await rig.plan()
    await rig.work()
    await rig.subscribe()
    await rig.work()
    if what == "currency and price":
        for each in rig.world.tenant.resources.of_kind("ProductPlan"):
            each.body["spec"]["billing"]["currency"] = "EUR"
        for each in rig.world.tenant.resources.of_kind("Quota"):
            each.body["spec"]["pricing"]["cost"] = 0.7
    else:
        [plan] = rig.world.site.plans.values()
        plan.deleted_at = rig.far.now()
        await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    for _ in range(3):
        rig.unheard.clear()
        rig.pass_(2 * HOUR)
        found = await rig.daemon.resync.run(dry_run=False)
        await rig.drain()
    assert found.steps == ()
