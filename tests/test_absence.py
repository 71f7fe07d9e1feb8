"""What is not found at Amplify: ended when it was deleted, kept when it may only be hidden from us."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from rig import HOUR, Json, Rig, a_rig

from billingd import daemon as root
from billingd.domain.errors import Retryable
from billingd.domain.events import plan_action, product_action, subscription_action
from billingd.sandbox import control_amplify
from billingd.store import events, schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
OURS = ("Product", "ProductPlan", "Subscription")


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        yield made


async def several(rig: Rig, number: int, plan: str = "metered") -> dict[str, str]:
    """Linked subscriptions, by name."""
    ids = {f"{plan}-{n}": await rig.subscribe(f"{plan}-{n}", plan=plan) for n in range(number)}
    await rig.work()
    return ids


async def unheard_of(rig: Rig, span: timedelta = 12 * HOUR) -> None:
    """Time passes without a webhook; traffic is read and resyncs run."""
    until = rig.far.now() + span
    while rig.far.now() < until:
        rig.unheard.clear()
        await rig.daemon.resync.run_once()
        await rig.drain()
        rig.pass_(HOUR / 2)
        await rig.poll()


async def delete(rig: Rig, *names: str) -> None:
    """They are deleted, and no event of it ever comes."""
    for name in names:
        await rig.move(name, "delete")
    rig.unheard.clear()


async def states(rig: Rig) -> dict[str, str]:
    return {row["name"]: row["state"] for row in await rig.rows(schema.subscription_links)}


async def until(rig: Rig, subscription_id: str) -> datetime | None:
    link = await rig.link(subscription_id)
    assert link is not None
    return link.usage_until


def at_recurly(rig: Rig) -> set[str]:
    """States of all subscriptions there, and `gone` for a plan that was removed."""
    found = {one["state"] for one in rig.world.site.oracle()["subscriptions"]}
    return found | {"gone" for plan in rig.world.site.plans.values() if plan.deleted_at is not None}


def point_elsewhere(rig: Rig) -> Callable[[], None]:
    """Another tenant answers, with the same names and other ids; returns what takes that back."""

    def other(one: Any) -> Any:
        if one is None:
            return None
        ids = {name: getattr(one, name, None) for name in ("id", "plan_id", "product_id")}
        return replace(one, **{name: id_[::-1] for name, id_ in ids.items() if id_ is not None})

    def answering(call: Callable[..., Any], say: Callable[[Any], Any]) -> Callable[..., Any]:
        async def asked(*args: Any, **kwargs: Any) -> Any:
            return say(await call(*args, **kwargs))

        return asked

    finding = ("find_product", "find_product_plan", "find_subscription")
    listing = ("list_products", "list_product_plans", "list_subscriptions", "list_quotas")
    having = ("has_subscription", "has_product_plan")
    says: dict[str, Callable[[Any], Any]] = dict.fromkeys(finding, other)
    says |= dict.fromkeys(
        (*listing, "survey_product_plans", "survey_subscriptions"), lambda all_: tuple(map(other, all_))
    )
    says |= dict.fromkeys(having, lambda _: False)
    for name, say in says.items():
        setattr(rig.amplify, name, answering(getattr(rig.amplify, name), say))

    def back() -> None:
        for name in says:
            delattr(rig.amplify, name)

    return back


@pytest.mark.parametrize("number", [1, 3, 8])
async def test_whoever_lost_its_rights_ends_nothing_whatever_event_comes(rig: Rig, number: int) -> None:
    """C2, C3: neither listed nor found, and every handler is asked, for hours; it is over with the right."""
    ids = await several(rig, number)
    rig.blind(*OURS)
    await rig.ask(product_action("weather", None, because="an event"))
    await rig.ask(plan_action("metered", None, because="an event"))
    for name, id_ in ids.items():
        await rig.ask(subscription_action(name, id_, because="an event"))
    await unheard_of(rig)
    assert set(await rig.held()) == {"mass_absence"}
    assert at_recurly(rig) == {"active"}
    assert set((await states(rig)).values()) == {"active"}
    assert await rig.dead() == []
    told = [one for one in rig.channels.provider if "missing at Amplify" in one.split(":")[0]]
    assert len(told) == 1
    rig.sighted()
    await unheard_of(rig, 2 * HOUR)
    assert await rig.held() == {}
    assert await rig.rows(schema.absences) == []
    assert [one for one in await rig.unfinished() if not one.startswith("audit_usage")] == []
    await rig.traffic(next(iter(ids)), 3)
    await rig.report()
    assert rig.units() == 3


async def test_one_answer_of_404_ends_nothing(rig: Rig) -> None:
    """The second look finds it."""
    ids = await several(rig, 2)
    rig.blind("Subscription", names={"metered-0"})
    await rig.ask(subscription_action("metered-0", ids["metered-0"], because="an event"))
    await rig.drain()
    assert [row["id"] for row in await rig.rows(schema.absences)] == [ids["metered-0"]]
    rig.sighted()
    await unheard_of(rig, HOUR)
    assert at_recurly(rig) == {"active"}
    assert await rig.rows(schema.absences) == []
    assert await rig.held() == {}


async def test_one_that_is_listed_though_it_is_not_found_is_kept(rig: Rig) -> None:
    ids = await several(rig, 2)

    async def nothing(name: str) -> None:
        return None

    find = rig.amplify.find_subscription
    rig.amplify.find_subscription = lambda name: nothing(name) if name == "metered-0" else find(name)
    await rig.ask(subscription_action("metered-0", ids["metered-0"], because="an event"))
    await unheard_of(rig)
    assert at_recurly(rig) == {"active"}
    assert await rig.held() == {}


async def test_one_of_several_that_is_gone_for_ten_minutes_is_ended(rig: Rig) -> None:
    """No event tells of it, but the others are there: it is over since it was first missed."""
    ids = await several(rig, 2)
    rig.pass_(HOUR)
    await rig.traffic("metered-0", 4)
    await delete(rig, "metered-0")
    missed = rig.far.now()
    await rig.daemon.resync.run(dry_run=False)
    await rig.drain()
    assert at_recurly(rig) == {"active"}, "a second look comes first"
    rig.pass_(9 * MINUTE)
    await rig.drain()
    assert await states(rig) == {"metered-0": "active", "metered-1": "active"}
    rig.pass_(MINUTE)
    await rig.drain()
    assert await states(rig) == {"metered-0": "ending", "metered-1": "active"}
    assert await until(rig, ids["metered-0"]) == missed
    await unheard_of(rig)
    assert await states(rig) == {"metered-0": "ended", "metered-1": "active"}
    assert rig.ledger()["totals"]["billed_units"] == 4
    assert await rig.held() == {}
    assert await rig.rows(schema.absences) == []


async def test_the_last_one_is_ended_when_a_person_says_that_it_is_gone(rig: Rig) -> None:
    """Nothing else is there to show that we may still see it."""
    ids = await several(rig, 1)
    await delete(rig, "metered-0")
    await unheard_of(rig)
    [reason] = (await rig.held()).values()
    assert reason.startswith("1 subscription(s) that are linked are not found at Amplify any more")
    assert ids["metered-0"] in reason
    assert at_recurly(rig) == {"active"}
    await rig.confirm()
    await unheard_of(rig)
    assert at_recurly(rig) == {"expired"}
    assert await rig.held() == {}


async def test_many_that_handlers_miss_one_by_one_are_a_mass_too(rig: Rig) -> None:
    """A right to half of them is lost: the others are seen, and still nothing is ended."""
    ids = await several(rig, 10)
    hidden = {f"metered-{n}" for n in range(5)}
    rig.blind("Subscription", names=hidden)
    for name in sorted(hidden):
        await rig.ask(subscription_action(name, ids[name], because="an event"))
    for _ in range(12):
        rig.unheard.clear()
        await rig.drain()
        rig.pass_(10 * MINUTE)
    assert set(await rig.held()) == {"mass_absence"}
    assert at_recurly(rig) == {"active"}
    reason = (await rig.held())["mass_absence"]
    assert all(id_ in reason for name, id_ in ids.items() if name in hidden)


@pytest.mark.parametrize("kind", ["Subscription", "ProductPlan"])
async def test_what_is_missing_with_one_is_counted_whether_it_was_asked_about_or_not(
    rig: Rig, kind: str
) -> None:
    """A right to most of them is lost between two resyncs, and events ask for a few, an hour apart."""
    if kind == "Subscription":
        ids = await several(rig, 10)
    else:
        ids = {f"p{n}": (await rig.plan(f"p{n}"))["metadata"]["id"] for n in range(9)}
        await rig.work()
    hidden = sorted(ids)[:6]
    rig.blind(kind, names=set(hidden))
    for name in hidden[:3]:
        asked = subscription_action if kind == "Subscription" else plan_action
        await rig.ask(asked(name, ids[name], because="an event"))
        for _ in range(6):
            rig.unheard.clear()
            await rig.drain()
            rig.pass_(10 * MINUTE)
    assert at_recurly(rig) <= {"active"}
    assert set(await rig.held()) == {"mass_absence"}
    reason = (await rig.held())["mass_absence"]
    assert [name for name, id_ in ids.items() if id_ in reason] == hidden, "all of them are named"
    rig.sighted()
    await unheard_of(rig, 7 * HOUR)
    assert [await rig.held(), await rig.dead(), await rig.rows(schema.absences)] == [{}, [], []]


@ONE_DATABASE
async def test_a_list_that_cannot_be_read_ends_nothing(rig: Rig) -> None:
    """How many are missing with it is not known until it can."""
    ids = await several(rig, 3)
    await delete(rig, "metered-0")
    await rig.ask(subscription_action("metered-0", ids["metered-0"], because="an event"))
    await rig.drain()
    survey = rig.amplify.survey_subscriptions

    async def away() -> None:
        raise Retryable("Amplify is away")

    rig.amplify.survey_subscriptions = away
    for _ in range(4):
        rig.pass_(10 * MINUTE)
        await rig.drain()
    assert set((await states(rig)).values()) == {"active"}
    rig.amplify.survey_subscriptions = survey
    rig.pass_(HOUR)
    await rig.drain()
    assert await states(rig) == {"metered-0": "ending", "metered-1": "active", "metered-2": "active"}


@ONE_DATABASE
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("number", [1, 3])
async def test_one_that_was_made_again_under_its_name_ends(rig: Rig, heard: bool, number: int) -> None:
    """Its name is another's now, and no id of it is there: no more has to be known."""
    ids = await several(rig, number)
    await rig.move("metered-0", "delete")
    if not heard:
        rig.unheard.clear()
    anew = await rig.subscribe("metered-0", account=False)
    if heard:
        await rig.work()
    else:
        await rig.daemon.resync.run(dry_run=False)
        await rig.drain()
    await unheard_of(rig)
    [old], [new] = rig.billed(ids["metered-0"]), rig.billed(anew)
    assert [old["state"], new["state"]] == ["expired", "active"]
    assert [await rig.held(), await rig.dead()] == [{}, []]


@ONE_DATABASE
@pytest.mark.parametrize("number", [2, 6])
async def test_another_environment_with_the_same_names_ends_nothing_and_makes_nothing(
    rig: Rig, number: int
) -> None:
    """Every name is there, and no id; what a dry run shows is what a run does."""
    ids = await several(rig, number)
    there = point_elsewhere(rig)
    shown = await rig.daemon.resync.run(dry_run=True)
    assert shown.steps == ()
    assert sorted(step.op for step in shown.withheld) == ["+"] * (number + 1) + ["-"] * (number + 1)
    await rig.ask(plan_action("metered", None, because="an event"))
    for name, id_ in ids.items():
        await rig.ask(subscription_action(name, id_, because="an event"))
    await unheard_of(rig)
    assert set(await rig.held()) == {"mass_absence"}
    assert at_recurly(rig) == {"active"}
    assert len(rig.world.site.oracle()["subscriptions"]) == number
    assert len(rig.world.site.plans) == 1
    there()
    await unheard_of(rig)
    assert set((await states(rig)).values()) == {"active"}
    assert [await rig.held(), await rig.dead(), await rig.rows(schema.absences)] == [{}, [], []]


@ONE_DATABASE
async def test_a_release_ends_none_that_was_not_named(rig: Rig) -> None:
    """However many there are; who is only told gets a few examples."""
    ids = await several(rig, 25)
    rig.blind("Subscription")
    await rig.daemon.resync.run(dry_run=False)
    await rig.drain()
    [reason] = (await rig.held()).values()
    assert all(id_ in reason for id_ in ids.values())
    [told] = [one for one in rig.channels.provider if "missing at Amplify" in one.split(":")[0]]
    assert told.count("(metered-") + sum(id_ in told for id_ in ids.values()) == 20
    assert "and others" in told


@ONE_DATABASE
async def test_one_missed_by_a_clock_that_was_ahead_is_ended_all_the_same(rig: Rig) -> None:
    """It counts as missed when that is seen to be nonsense."""
    ids = await several(rig, 3)
    await delete(rig, "metered-0")
    rig.clock.offset = timedelta(days=365)
    await rig.ask(subscription_action("metered-0", ids["metered-0"], because="an event"))
    await rig.drain()
    rig.clock.offset = timedelta(0)
    async with rig.store.write() as tx:
        pending = schema.outbox.c.state == "pending"
        await tx.execute(schema.outbox.update().where(pending).values(due_at=rig.clock.now()))
    await rig.drain()
    missed = rig.far.now()
    rig.pass_(10 * MINUTE)
    await rig.drain()
    assert await states(rig) == {"metered-0": "ending", "metered-1": "active", "metered-2": "active"}
    assert await until(rig, ids["metered-0"]) == missed


@pytest.mark.parametrize("kind", ["Subscription", "ProductPlan", "Product"])
async def test_what_amplify_said_was_deleted_is_believed_at_once(rig: Rig, kind: str) -> None:
    """Of the subscription, of its plan, or of its product, with which it goes; over since then."""
    ids = await several(rig, 2)
    if kind == "Subscription":
        for name in ids:
            await rig.move(name, "delete")
    else:
        named = {"ProductPlan": "metered", "Product": "weather"}[kind]
        resource = rig.world.tenant.resources.find(kind, named)
        assert resource is not None
        rig.world.tenant.delete(resource, asked=False)
    deleted = rig.far.now()
    rig.pass_(5 * HOUR)
    await rig.hear(lambda events: [one for one in events if one.payload["kind"] == kind])
    await rig.drain()
    assert set((await states(rig)).values()) == {"ending"}
    for id_ in ids.values():
        ended = await until(rig, id_)
        assert ended is not None
        assert deleted - MINUTE < ended <= deleted
    await rig.settled()
    assert at_recurly(rig) - {"gone"} == {"expired"}
    assert "mass_absence" not in await rig.held()


async def test_what_was_deleted_while_nobody_was_there_is_over_since_then(rig: Rig) -> None:
    """H4: the feed tells days later when that was; nothing served before is lost, and no renewal counts."""
    rig.watch()
    await rig.catch_up()
    ids = await several(rig, 1)
    rig.pass_(HOUR)
    await rig.traffic("metered-0", 6)
    await rig.move("metered-0", "delete")
    deleted = rig.far.now()
    rig.pass_(timedelta(days=3))
    await rig.catch_up()
    ended = await until(rig, ids["metered-0"])
    assert ended is not None
    assert deleted - MINUTE < ended <= deleted
    await rig.settled()
    assert rig.ledger()["totals"]["billed_units"] == 6
    assert at_recurly(rig) == {"expired"}


@ONE_DATABASE
async def test_a_product_of_that_name_that_was_deleted_before_says_nothing(rig: Rig) -> None:
    """Its plans went with it; those of the new one are others."""
    product = rig.world.tenant.resources.find("Product", "weather")
    assert product is not None
    rig.world.tenant.delete(product, asked=False)
    await rig.settled()
    rig.pass_(HOUR)
    await rig.product()
    await rig.plan()
    await rig.work()
    await several(rig, 1)
    rig.blind(*OURS)
    await rig.ask(product_action("weather", None, because="an event"))
    await unheard_of(rig)
    assert await states(rig) == {"metered-0": "active"}


@ONE_DATABASE
@pytest.mark.parametrize("time", [None, "2099-01-01T00:00:00.000+0000", "1999-01-01T00:00:00.000+0000"])
async def test_a_time_that_makes_no_sense_is_bounded(rig: Rig, time: str | None) -> None:
    """Not after it was heard of, not before anything was billed."""
    ids = await several(rig, 1)
    await rig.move("metered-0", "delete")
    rig.pass_(HOUR)
    sent: list[Any] = list(rig.unheard)
    rig.unheard.clear()

    class Told:
        """The event with another time."""

        def __init__(self, event: Any) -> None:
            self.payload = event.payload
            self._event = event

        def envelope(self) -> Json:
            return {**self._event.envelope(), "time": time}

    rig.unheard[:] = [Told(one) for one in sent]  # type: ignore[misc]
    await rig.hear()
    await rig.drain()
    link = await rig.link(ids["metered-0"])
    assert link is not None
    assert link.usage_until == (link.usage_from if time and time < "2000" else rig.far.now())


@ONE_DATABASE
async def test_one_that_vanishes_before_its_approval_is_waited_for(rig: Rig) -> None:
    """Between its link and its approval it is hidden, and there again later: it is approved then."""
    await rig.subscribe()
    patch = rig.amplify.set_attributes

    async def then_hidden(*args: Any) -> Any:
        version = await patch(*args)
        rig.blind("Subscription")
        return version

    rig.amplify.set_attributes = then_hidden
    await rig.hear()
    await rig.drain()
    assert await states(rig) == {"acme": "created"}
    rig.amplify.set_attributes = patch
    rig.sighted()
    await rig.settled()
    assert await states(rig) == {"acme": "active"}
    assert rig.approval("acme") == "approved"


@ONE_DATABASE
async def test_one_that_a_death_left_at_recurly_is_not_ended_for_being_hidden(rig: Rig) -> None:
    """It was made, its link never written, and then the right was lost; there again, it is linked."""
    ids = await several(rig, 1)
    async with rig.store.write() as tx:
        for table in (schema.billing_periods, schema.subscription_links, schema.outbox):
            await tx.execute(table.delete())
    rig.blind("Subscription")
    await rig.ask(subscription_action("metered-0", ids["metered-0"], because="an event"))
    await unheard_of(rig)
    assert at_recurly(rig) == {"active"}
    assert await rig.rows(schema.subscription_links) == []
    assert set(await rig.held()) == {"mass_absence"}
    rig.sighted()
    await unheard_of(rig)
    assert await states(rig) == {"metered-0": "active"}
    assert await rig.held() == {}


@ONE_DATABASE
async def test_one_that_never_was_at_recurly_is_forgotten_without_a_question(rig: Rig) -> None:
    """Held for want of an account, then deleted unheard: nobody has to say that it is gone."""
    await rig.subscribe(account=False)
    await rig.work()
    assert set(await rig.held()) == {"account_missing"}
    await rig.play(control_amplify.move_subscription, {}, name="acme", step="delete")
    await unheard_of(rig)
    assert await rig.held() == {}
    assert await rig.unfinished() == []


@pytest.mark.parametrize("kind", ["Subscription", "ProductPlan", "Product"])
async def test_a_deletion_that_was_heard_is_known_until_it_is_acted_on(rig: Rig, kind: str) -> None:
    """However long that takes: other events are forgotten, and so is this one when nothing is linked."""
    [sid] = (await several(rig, 1)).values()
    await rig.work(HOUR)
    named = {"Subscription": "metered-0", "ProductPlan": "metered", "Product": "weather"}[kind]
    resource = rig.world.tenant.resources.find(kind, named)
    assert resource is not None
    rig.world.tenant.delete(resource, asked=False)
    deleted = rig.far.now()
    await rig.hear(lambda heard: [one for one in heard if one.payload["kind"] == kind])
    rig.pass_(31 * DAY)
    before = len(await rig.rows(schema.events))
    await root._forget(rig.store, rig.clock.now() - 30 * DAY)
    left = await rig.rows(schema.events)
    assert 0 < len(left) < before
    await rig.settled()
    over = await until(rig, sid)
    assert over is not None
    assert deleted - MINUTE < over <= deleted
    rig.pass_(DAY)
    async with rig.store.write() as tx:
        await events.forget(tx, before=rig.clock.now())
    assert await rig.rows(schema.events) == []
