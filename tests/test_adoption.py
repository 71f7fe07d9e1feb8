"""Adoption: a site as the original integration left it, the real handlers, both far sides, both databases."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from rig import HOUR, LOOK_AGAIN, START, Crash, Json, Rig, a_rig

from billingd.adoption import TRAILING, CannotAdopt, Findings, Step
from billingd.domain.errors import Retryable
from billingd.domain.events import audit_action, subscription_action
from billingd.domain.usage import TAG_PREFIX
from billingd.sandbox import control_amplify
from billingd.sandbox.recurly import metering
from billingd.sandbox.recurly.model import Subscription
from billingd.store import copies, schema
from billingd.store.links import SubscriptionLink

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For what differs by the far sides only."""

MINUTE = timedelta(minutes=1)
numbers = count(1)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        yield made


async def original(rig: Rig, *names: str, plan: str = "metered") -> dict[str, str]:
    """Subscriptions as the original integration made them, and no billingd that knows of any; ids by name."""
    ids = {name: await rig.subscribe(name, plan) for name in names}
    await left_by_the_original(rig)
    return ids


async def left_by_the_original(rig: Rig) -> None:
    """Whatever is pending is provisioned; then nothing shows that it was billingd that did it."""
    await rig.work()
    while waiting := [key for key in await rig.unfinished() if key.startswith("provision")]:
        assert rig.far.now() < START + timedelta(days=1), waiting
        await rig.work(2 * MINUTE, rounds=1)
    for made in rig.world.site.subscriptions.values():
        made.given["po_number"] = None
    resources = rig.world.tenant.resources
    for one in (*resources.of_kind("Subscription"), *resources.of_kind("ProductPlan")):
        one.body["attributes"].clear()
    await forget(rig)


async def forget(rig: Rig) -> None:
    """A store in which nothing was ever written."""
    async with rig.store.write() as tx:
        for table in reversed(schema.metadata.sorted_tables):
            await tx.execute(table.delete())
    rig.unheard.clear()
    rig.channels.provider.clear()
    rig.start()


def at_recurly(rig: Rig, account_of: str) -> Subscription:
    """The one subscription at Recurly on the account of that subscriber."""
    resource = rig.world.tenant.resources.find("Subscription", account_of)
    assert resource is not None
    code = f"amplify-user-{resource.body['marketplace']['resource']['metadata']['createUserId']}"
    [made] = [one for one in rig.world.site.subscriptions.values() if one.account.code == code]
    return made


async def original_reports(rig: Rig, name: str, units: int) -> None:
    """Traffic now, told to Recurly as the original does: at once, without a tag."""
    await rig.traffic(name, units)
    untagged(rig, at_recurly(rig, name), units)


def untagged(rig: Rig, made: Subscription, units: int) -> None:
    metering.create_usage(rig.world.site, made, made.all_add_ons[0], {"amount": units})


async def found(rig: Rig, since: datetime, *, dry_run: bool = True) -> Findings:
    return await rig.daemon.adoption.run(since, dry_run=dry_run)


async def adopted(rig: Rig, since: datetime) -> Findings:
    """What was found, once all that was asked for is done."""
    findings = await found(rig, since, dry_run=False)
    await rig.work()
    for _ in range(10):  # a plan may have to be linked first
        if not [key for key in await rig.unfinished() if key.startswith(("adopt", "provision_plan"))]:
            break
        await rig.work(2 * MINUTE, rounds=1)
    return findings


def ops(findings: Findings) -> list[tuple[str, str, str]]:
    return [(step.op, step.what, step.name) for step in findings.steps]


def of(findings: Findings, name: str) -> Step:
    [step] = [step for step in findings.steps if step.name == name]
    return step


async def the_link(rig: Rig, subscription_id: str) -> SubscriptionLink:
    link = await rig.link(subscription_id)
    assert link is not None
    return link


async def held_items(rig: Rig) -> list[Json]:
    return [row for row in await rig.rows(schema.held) if row["closed_at"] is None]


def by_whom(rig: Rig) -> tuple[int, int]:
    """Units at Recurly in all: told by the original, and by billingd."""
    records = rig.world.site.usages.values()
    ours = sum(one.amount for one in records if (one.merchant_tag or "").startswith(TAG_PREFIX))
    return sum(one.amount for one in records) - ours, ours


async def test_what_the_original_made_is_taken_over_and_each_unit_is_billed_once(rig: Rig) -> None:
    """The original's sums up to the cut-over, ours from it on, though it lies within a window."""
    ids = await original(rig, "acme", "beta")
    acme, beta = ids["acme"], ids["beta"]
    before = {name: at_recurly(rig, name).uuid for name in ids}
    rig.pass_(3 * HOUR)
    await original_reports(rig, "acme", 7)
    await original_reports(rig, "beta", 5)
    rig.far.set(rig.far.now().replace(minute=20, second=30, microsecond=0) + HOUR)
    await original_reports(rig, "acme", 2)  # in the window of the cut-over, seconds before it
    rig.pass_(5 * timedelta(seconds=1))
    since = rig.far.now()
    await rig.traffic("acme", 11)
    rig.pass_(HOUR)
    await rig.traffic("acme", 13)
    await rig.traffic("beta", 17)

    dry = await found(rig, since)
    assert ops(dry) == [
        ("+", "plan", "metered"),
        ("~", "subscription", "acme"),
        ("~", "subscription", "beta"),
    ]
    assert (dry.to_do, dry.problems, dry.adopted) == (3, 0, 0)
    assert await rig.rows(schema.outbox) == []
    assert await rig.rows(schema.watermarks) == []

    await adopted(rig, since)
    for name, id_ in ids.items():
        link = await the_link(rig, id_)
        assert (link.uuid, link.state, link.usage_from) == (before[name], "active", since)
        [billed] = rig.billed(id_)
        assert billed["uuid"] == before[name]
        assert rig.attributes("Subscription", name) == {
            "recurlyAccountCode": link.account_code,
            "recurlySubscriptionUuid": link.uuid,
            "recurlyUsageFrom": since.isoformat().replace("+00:00", "Z"),
        }
    assert len(rig.world.site.subscriptions) == 2
    assert len(rig.world.site.plans) == 1
    await rig.report()
    assert by_whom(rig) == (14, 41)
    await rig.traffic("beta", 19)
    await rig.report()
    assert by_whom(rig) == (14, 60)
    assert rig.ledger()["agrees"], rig.ledger()

    again = await adopted(rig, since)
    assert (ops(again), again.to_do, again.problems, again.adopted) == ([], 0, 0, 2)
    await rig.report()
    for id_ in (acme, beta):
        await rig.ask(subscription_action("acme" if id_ == acme else "beta", id_, because="event"))
        await rig.ask(audit_action(id_, because="test"))
    await rig.work(LOOK_AGAIN)
    assert by_whom(rig) == (14, 60)
    assert set(rig.tags().values()) - {rig.tags()[""]} == {1}
    assert (await held_items(rig), await rig.dead(), await rig.unfinished()) == ([], [], [])
    assert "An adoption has begun" in rig.channels.provider[0]


@ONE_DATABASE
async def test_a_death_at_any_step_doubles_nothing_and_loses_nothing(rig: Rig) -> None:
    """The command and the handler begin again where they were, and what it comes to is the same."""
    ids = await original(rig, "acme")
    rig.pass_(3 * HOUR)
    await original_reports(rig, "acme", 7)
    rig.pass_(20 * MINUTE)
    since = rig.far.now()
    await rig.traffic("acme", 11)
    saved = await rig.save()
    deaths = 0
    for step in count(1):
        await rig.load(saved)
        rig.steps.arm(step)
        try:
            await found(rig, since, dry_run=False)
            died = await rig.dies()
        except Crash:  # within the command
            died = True
        rig.steps.arm(None)
        if not died:
            break
        deaths += 1
        await rig.mended()
        await adopted(rig, since)  # whoever saw it die runs it again
        await rig.mended()
        link = await the_link(rig, ids["acme"])
        assert (link.usage_from, link.state) == (since, "active")
        [made] = rig.world.site.subscriptions.values()
        assert made.given["po_number"] == ids["acme"]
        await rig.report()
        assert by_whom(rig) == (7, 11), rig.steps.taken
        assert (await rig.dead(), await held_items(rig)) == ([], [])
        assert [key for key in await rig.unfinished() if not key.startswith("audit")] == []
    assert deaths > 10


@ONE_DATABASE
@pytest.mark.parametrize("kind", ["lost", "500", "500_committed", "reset", "429", "html_502"])
async def test_a_mark_without_an_answer_is_looked_for(rig: Rig, kind: str) -> None:
    ids = await original(rig, "acme")
    rig.fault(kind, "PUT", "/subscriptions/*", times=2)
    rig.pass_(HOUR)
    await adopted(rig, rig.far.now())
    await rig.work(HOUR)
    assert rig.world.faults.counts[kind] >= 1
    [made] = rig.world.site.subscriptions.values()
    assert made.given["po_number"] == ids["acme"]
    assert (await rig.dead(), await rig.unfinished()) == ([], [])


async def test_a_pending_subscription_is_left_to_the_ordinary_way(rig: Rig) -> None:
    """The original made a subscription at Recurly before it approved: what is pending has none."""
    await original(rig, "acme")
    rig.pass_(HOUR)
    beta = await rig.subscribe("beta")
    findings = await adopted(rig, rig.far.now())
    assert ops(findings) == [("+", "plan", "metered"), ("~", "subscription", "acme")]
    await rig.settled()
    assert rig.approval("beta") == "approved"
    assert len(rig.billed(beta)) == 1
    assert len(rig.world.site.subscriptions) == 2


async def test_prices_that_differ_are_a_problem_and_nothing_of_that_plan_is_adopted(rig: Rig) -> None:
    await rig.plan("other")
    ids = await original(rig, "acme")
    ids |= await original(rig, "beta", plan="other")
    rig.pass_(HOUR)
    [plan] = [one for one in rig.world.site.plans.values() if one.name == "metered"]
    plan.prices["USD"] *= 2
    findings = await adopted(rig, rig.far.now())
    assert set(ops(findings)) == {
        ("!", "plan", "metered"),
        ("+", "plan", "other"),
        ("!", "subscription", "acme"),
        ("~", "subscription", "beta"),
    }
    assert "costs 20" in of(findings, "metered").reason
    assert await rig.link(ids["acme"]) is None
    assert at_recurly(rig, "acme").given["po_number"] is None
    assert (await the_link(rig, ids["beta"])).state == "active"
    plan.prices["USD"] /= 2
    assert ops(await adopted(rig, rig.far.now())) == [
        ("+", "plan", "metered"),
        ("~", "subscription", "acme"),
    ]
    assert (await the_link(rig, ids["acme"])).state == "active"


async def second_at_recurly(rig: Rig, name: str) -> Subscription:
    """Another subscription to the same plan on the same account, as a repeated event made the original do."""
    rig.world.site.configure(allow_multiple_subscriptions_per_plan=True)
    first = at_recurly(rig, name)
    there = set(rig.world.site.subscriptions)
    rig.pass_(2 * MINUTE)
    from billingd.domain.billing import NewSubscription

    new = NewSubscription(first.plan.code, first.account.code, "USD", "manual", "x", ())
    await rig.recurly._adapter.create_subscription(new, key=f"second-{next(numbers)}")
    [made] = set(rig.world.site.subscriptions) - there
    second = rig.world.site.subscriptions[made]
    second.given["po_number"] = None
    return second


async def test_of_several_at_recurly_a_person_says_which(rig: Rig) -> None:
    """Both are named; the id in the PO number of one says it, and the other is told of."""
    ids = await original(rig, "acme")
    first = at_recurly(rig, "acme")
    second = await second_at_recurly(rig, "acme")
    rig.pass_(HOUR)
    findings = await adopted(rig, rig.far.now())
    step = of(findings, "acme")
    assert (step.op, step.action) == ("!", None)
    assert first.uuid in step.reason
    assert second.uuid in step.reason
    assert ids["acme"] in step.reason
    assert await rig.link(ids["acme"]) is None
    second.given["po_number"] = ids["acme"]
    findings = await adopted(rig, rig.far.now())
    assert of(findings, "acme").uuid == second.uuid
    assert (of(findings, first.uuid).op, of(findings, first.uuid).what) == ("!", "recurly")
    assert (await the_link(rig, ids["acme"])).uuid == second.uuid
    assert first.given["po_number"] is None


@ONE_DATABASE
async def test_one_that_is_canceled_at_recurly_gives_way_to_one_that_is_not(rig: Rig) -> None:
    """Unsubscribed and subscribed anew: the earlier runs to the end of its term."""
    ids = await original(rig, "acme")
    first = at_recurly(rig, "acme")
    second = await second_at_recurly(rig, "acme")
    rig.world.site.cancel(first.uuid)
    rig.pass_(HOUR)
    findings = await adopted(rig, rig.far.now())
    assert ops(findings) == [("+", "plan", "metered"), ("~", "subscription", "acme")]
    assert (await the_link(rig, ids["acme"])).uuid == second.uuid


@ONE_DATABASE
async def test_one_that_is_only_canceled_is_a_problem(rig: Rig) -> None:
    ids = await original(rig, "acme")
    rig.world.site.cancel(at_recurly(rig, "acme").uuid)
    rig.pass_(HOUR)
    step = of(await adopted(rig, rig.far.now()), "acme")
    assert step.op == "!"
    assert "is canceled at Recurly" in step.reason
    assert await rig.link(ids["acme"]) is None


@ONE_DATABASE
async def test_two_subscriptions_that_may_be_of_the_same_one_at_recurly(rig: Rig) -> None:
    """Two users of an organisation whose account pays for both: neither gets it by chance."""
    acme = await rig.subscribe("acme")
    await left_by_the_original(rig)
    [made] = rig.world.site.subscriptions.values()
    beta = await rig.subscribe("beta", account=False)
    await rig.move("beta", "approve")
    resource = rig.world.tenant.resources.find("Subscription", "beta")
    assert resource is not None
    made.account = rig.world.site.account_by_code[rig.account(resource.body, "org")]
    rig.unheard.clear()
    rig.pass_(HOUR)
    findings = await found(rig, rig.far.now())
    assert [of(findings, name).op for name in ("acme", "beta")] == ["!", "!"]
    assert "may be of any of acme, beta" in of(findings, "acme").reason
    made.given["po_number"] = beta
    findings = await adopted(rig, rig.far.now())
    assert (of(findings, "beta").op, of(findings, "acme").op) == ("~", "=")
    assert (await the_link(rig, beta)).uuid == made.uuid
    assert await rig.link(acme) is None


@ONE_DATABASE
async def test_a_po_number_of_a_persons_own_is_not_written_over(rig: Rig) -> None:
    ids = await original(rig, "acme")
    made = at_recurly(rig, "acme")
    made.given["po_number"] = "PO-4711"
    rig.pass_(HOUR)
    findings = await adopted(rig, rig.far.now())
    assert [step.op for step in findings.steps] == ["+", "!"]
    assert "PO-4711" in of(findings, "acme").reason
    assert made.given["po_number"] == "PO-4711"
    assert await rig.link(ids["acme"]) is None


@ONE_DATABASE
async def test_what_is_at_neither_side_is_only_told(rig: Rig) -> None:
    """None at Recurly: the ordinary way makes it. One at Recurly of nobody: a person ends it."""
    ids = await original(rig, "acme", "beta")
    gone = at_recurly(rig, "acme")
    orphan = at_recurly(rig, "beta")
    rig.world.site.expire(gone.uuid)
    await rig.move("beta", "cancel")
    rig.unheard.clear()
    rig.pass_(HOUR)
    findings = await found(rig, rig.far.now())
    assert (of(findings, "acme").op, of(findings, orphan.uuid).op) == ("=", "!")
    assert "no subscription that it belongs to" in of(findings, orphan.uuid).reason
    await adopted(rig, rig.far.now())
    assert [await rig.link(id_) for id_ in ids.values()] == [None, None]


async def test_a_deprecated_plan_with_subscriptions_is_linked_too(rig: Rig) -> None:
    ids = await original(rig, "acme")
    await rig.move_plan("metered", "deprecate")
    rig.unheard.clear()
    rig.pass_(HOUR)
    since = rig.far.now()
    await rig.traffic("acme", 3)
    assert ops(await adopted(rig, since)) == [("+", "plan", "metered"), ("~", "subscription", "acme")]
    [plan] = await rig.rows(schema.plan_links)
    assert plan["state"] == "deprecated"
    assert (await the_link(rig, ids["acme"])).state == "active"
    await rig.report()
    assert by_whom(rig) == (0, 3)


@ONE_DATABASE
async def test_an_add_on_that_it_lacks_is_attached(rig: Rig) -> None:
    """A quota that came after the original had made it."""
    ids = await original(rig, "acme")
    quota = {"name": "more", "pricing": {"type": "perunit", "cost": 2}}
    await rig.play(control_amplify.add_quota, quota, name="metered")
    rig.unheard.clear()
    rig.pass_(HOUR)
    since = rig.far.now()
    findings = await adopted(rig, since)
    assert "1 add-on(s) that it lacks are attached" in of(findings, "acme").reason
    await rig.work(LOOK_AGAIN)
    [billed] = rig.billed(ids["acme"])
    assert len(billed["add_ons"]) == 2


@ONE_DATABASE
async def test_a_cycle_that_began_after_the_cut_over_is_refused(rig: Rig) -> None:
    """What was before it was billed by the original; from its beginning on it can be adopted."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    early = rig.far.now()
    rig.pass_(MINUTE)
    await rig.renew()
    made = at_recurly(rig, "acme")
    rig.pass_(HOUR)
    step = of(await adopted(rig, early), "acme")
    assert step.op == "!"
    assert made.cycle.started_at.replace(microsecond=0).isoformat().removesuffix("+00:00") in step.reason
    assert await rig.link(ids["acme"]) is None
    assert of(await adopted(rig, made.cycle.started_at.replace(microsecond=0)), "acme").op == "~"
    assert await rig.link(ids["acme"]) is not None


@ONE_DATABASE
async def test_one_that_began_after_the_cut_over_counts_from_its_beginning(rig: Rig) -> None:
    """Its first cycle: nothing of it was billed before."""
    early = rig.far.now().replace(microsecond=0)
    rig.pass_(HOUR)
    ids = await original(rig, "acme")
    made = at_recurly(rig, "acme")
    assert made.activated_at is not None
    rig.pass_(HOUR)
    await adopted(rig, early)
    assert (await the_link(rig, ids["acme"])).usage_from == made.activated_at.replace(microsecond=0)


async def test_a_daemon_that_ran_before_reads_from_the_cut_over_all_the_same(rig: Rig) -> None:
    """It held what it found unmarked, and had begun to read later; nothing was recorded yet."""
    ids = await original(rig, "acme")
    since = rig.far.now().replace(microsecond=0) + MINUTE
    rig.pass_(2 * MINUTE)
    await rig.traffic("acme", 3)
    rig.pass_(5 * HOUR)
    await rig.poll()
    await rig.daemon.resync.run_once()
    await rig.work(LOOK_AGAIN)
    assert [item["kind"] for item in await held_items(rig)] == ["subscription_unmarked"]
    assert "billingd adopt" in (await rig.held())["subscription_unmarked"]
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    await adopted(rig, since)
    await rig.work(LOOK_AGAIN)
    assert (await held_items(rig), await rig.unfinished()) == ([], [])
    await rig.report()
    assert by_whom(rig) == (0, 7)
    assert (await the_link(rig, ids["acme"])).usage_from == since
    assert len(rig.world.site.subscriptions) == 1


@ONE_DATABASE
async def test_traffic_that_was_passed_by_long_ago_is_read_again(rig: Rig) -> None:
    """A second adoption, of what was a problem at first: its windows are behind the horizon by then."""
    ids = await original(rig, "acme", "beta")
    beta = at_recurly(rig, "beta")
    beta.given["po_number"] = "PO-1"
    rig.pass_(HOUR)
    since = rig.far.now()
    await rig.traffic("beta", 5)
    await rig.traffic("acme", 6)
    await adopted(rig, since)
    rig.pass_(timedelta(days=3))
    await rig.report()
    assert by_whom(rig) == (0, 6)
    beta.given["po_number"] = None
    assert ops(await adopted(rig, since)) == [("~", "subscription", "beta")]
    await rig.report()
    assert by_whom(rig) == (0, 11)
    assert (await the_link(rig, ids["beta"])).usage_from == since
    assert set(rig.tags().values()) == {1}


@ONE_DATABASE
async def test_windows_of_another_length_are_not_gone_back_to(rig: Rig) -> None:
    """They were recorded in that length: the error names both times and what to do."""
    await original(rig, "acme", "beta")
    at_recurly(rig, "beta").given["po_number"] = "PO-1"
    rig.pass_(HOUR)
    since = rig.far.now()
    await rig.traffic("acme", 6)
    await adopted(rig, since)
    await rig.report()
    rig.window = HOUR / 2
    rig.start()
    rig.pass_(3 * HOUR)
    await rig.poll()
    [mark] = await rig.rows(schema.watermarks)
    with pytest.raises(CannotAdopt) as refused:
        await found(rig, since)
    for moment in (since, mark["regular_since"]):
        assert moment.isoformat().replace("+00:00", "Z") in str(refused.value)


@ONE_DATABASE
async def test_a_cut_over_of_tomorrow_links_now_and_counts_from_then(rig: Rig) -> None:
    ids = await original(rig, "acme")
    since = rig.far.now().replace(microsecond=0) + 5 * HOUR
    for wrong in (since + timedelta(days=1), since + timedelta(milliseconds=1)):
        with pytest.raises(CannotAdopt):
            await found(rig, wrong)
    await adopted(rig, since)
    assert (await the_link(rig, ids["acme"])).state == "active"
    await original_reports(rig, "acme", 7)
    await rig.report()
    await original_reports(rig, "acme", 2)
    beta = await rig.subscribe("beta")  # an ordinary one counts from now on, whatever is adopted
    await rig.work()
    await rig.traffic("beta", 3)
    await rig.report()
    assert by_whom(rig) == (9, 3)
    rig.pass_(HOUR)
    rig.pass_(since - rig.far.now())
    await rig.traffic("acme", 11)
    await rig.report()
    assert by_whom(rig) == (9, 14)
    assert len(rig.billed(beta)) == 1
    assert await held_items(rig) == []


@ONE_DATABASE
async def test_what_the_original_tells_after_the_cut_over_is_foreign(rig: Rig) -> None:
    """Two write at once: that is held until a person has looked; what came before is not ours to judge."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    await original_reports(rig, "acme", 7)
    rig.pass_(MINUTE)
    await adopted(rig, rig.far.now())
    await rig.ask(audit_action(ids["acme"], because="one"))
    await rig.work()
    assert await held_items(rig) == []
    rig.pass_(MINUTE)
    untagged(rig, at_recurly(rig, "acme"), 5)
    await rig.ask(audit_action(ids["acme"], because="two"))
    await rig.work()
    [item] = await held_items(rig)
    assert (item["kind"], item["units"]) == ("foreign_record", 5)


@ONE_DATABASE
async def test_what_changed_since_it_was_planned_is_held(rig: Rig) -> None:
    """Another one at Recurly appears before the handler runs; released once it is gone, it is adopted."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    first = at_recurly(rig, "acme")
    await found(rig, rig.far.now(), dry_run=False)
    second = await second_at_recurly(rig, "acme")
    await rig.work(2 * MINUTE, rounds=1)
    [item] = await held_items(rig)
    assert (item["kind"], item["subscription_id"]) == ("adoption_refused", ids["acme"])
    assert second.uuid in item["reason"]
    rig.world.site.expire(second.uuid)
    from billingd.admin import operations

    assert await operations.release(rig.store, item["id"], now=rig.clock.now())
    await rig.work()
    assert (await the_link(rig, ids["acme"])).uuid == first.uuid
    assert await held_items(rig) == []


@ONE_DATABASE
async def test_one_that_ends_before_it_is_adopted_is_told(rig: Rig) -> None:
    """Nobody else would end it at Recurly: nothing there says whose it is."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    made = at_recurly(rig, "acme")
    await found(rig, rig.far.now(), dry_run=False)
    await rig.move("acme", "cancel")
    await rig.work()
    assert await rig.link(ids["acme"]) is None
    reason = (await rig.held())["adoption_refused"]
    assert made.uuid in reason
    assert "end" in reason


async def test_after_a_store_was_lost_it_counts_from_the_cut_over_all_the_same(rig: Rig) -> None:
    """Its marker is found, and the attribute says from when on: the original's units stay billed once."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    await original_reports(rig, "acme", 7)
    rig.pass_(MINUTE)
    since = rig.far.now()
    await adopted(rig, since)
    await rig.traffic("acme", 5)
    await forget(rig)
    await rig.ask(subscription_action("acme", ids["acme"], because="1"))
    await rig.daemon.resync.run_once()
    await rig.work(LOOK_AGAIN)
    assert (await the_link(rig, ids["acme"])).usage_from == since
    await rig.report()
    assert by_whom(rig)[0] == 7


@ONE_DATABASE
@pytest.mark.parametrize("text", ["yesterday", "2026-03-02T10:00:00"])
async def test_a_beginning_that_somebody_spoilt_is_told(rig: Rig, text: str) -> None:
    """Nothing is guessed: the action stops and says which attribute to mend."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    resource = rig.world.tenant.resources.find("Subscription", "acme")
    assert resource is not None
    resource.body["attributes"]["recurlyUsageFrom"] = text
    await adopted(rig, rig.far.now())
    [error] = await rig.dead()
    assert "recurlyUsageFrom" in error
    assert await rig.link(ids["acme"]) is None
    del resource.body["attributes"]["recurlyUsageFrom"]
    assert of(await adopted(rig, rig.far.now()), "acme").op == "~"
    assert await rig.link(ids["acme"]) is not None


@ONE_DATABASE
async def test_a_second_command_does_not_ask_twice(rig: Rig) -> None:
    """While the first is under way: the same moment is nothing new, another one is a problem."""
    await original(rig, "acme")
    rig.pass_(HOUR)
    since = rig.far.now()
    await found(rig, since, dry_run=False)
    assert of(await found(rig, since, dry_run=False), "acme").op == "="
    assert of(await found(rig, since - MINUTE), "acme").op == "!"
    kinds = [row["kind"] for row in await rig.rows(schema.outbox)]
    assert kinds.count("adopt_subscription") == 1


async def put_back(rig: Rig, copy: Path) -> None:
    """The daemon is stopped, the copy restored, the daemon started; what was told meanwhile is lost."""
    await rig.gone()
    await rig.store.close()
    await copies.restore(rig.store, copy, now=rig.clock.now())
    rig.unheard.clear()
    await rig.restart()


async def read_back(rig: Rig) -> None:
    for _ in range(1000):
        if await rig.daemon.read_back.finished():
            return
        if not await rig.daemon.read_back.run_once():
            rig.pass_(MINUTE)
    raise AssertionError(rig.daemon.read_back.reason)


async def go_on(rig: Rig) -> None:
    """What was told is read back; then all goes on until nothing is left to do."""
    await read_back(rig)
    for _ in range(4):
        await rig.poll()
        await rig.drain()
        await rig.daemon.resync.run_once()
        await rig.settled()
        await rig.report()
        rig.pass_(LOOK_AGAIN)


@pytest.mark.parametrize("heard", [False, True], ids=["found by absence", "deletion heard"])
@pytest.mark.parametrize("reported", [True, False], ids=["reported", "nothing reported"])
async def test_one_adopted_after_the_copy_and_deleted_since_bills_nothing_again(
    rig: Rig, tmp_path: Path, reported: bool, heard: bool
) -> None:
    """The cut-over went with the resource: what stands at Recurly tells whose its usage was."""
    ids = await original(rig, "acme", "beta")
    acme = at_recurly(rig, "acme")
    acme.given["po_number"] = "PO-7"  # a problem at first
    await rig.poll()
    rig.pass_(HOUR)
    for _ in range(3):
        await original_reports(rig, "acme", 7)
        rig.pass_(HOUR)
    await adopted(rig, rig.far.now())
    assert await rig.link(ids["acme"]) is None
    await rig.traffic("beta", 1)
    await rig.report()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    acme.given["po_number"] = None
    since = rig.far.now()
    await adopted(rig, since)
    if reported:
        await rig.traffic("acme", 11)
        await rig.report()
        await rig.traffic("acme", 5)  # its last, which no life of the store has read yet
    await rig.move("acme", "delete")
    rig.channels.provider.clear()
    await put_back(rig, copy)
    if heard:
        await rig.ask(subscription_action("acme", ids["acme"], because="deleted"))
    await go_on(rig)
    assert by_whom(rig) == ((21, 17) if reported else (21, 1))
    link = await the_link(rig, ids["acme"])
    assert link.state == "ended"
    assert link.usage_from == since if reported else link.usage_from > since
    assert [one["state"] for one in rig.billed(ids["acme"])] == ["expired"]
    assert (await held_items(rig), await rig.dead()) == ([], [])
    [told] = [text for text in rig.channels.provider if "billed by another program before" in text]
    assert link.usage_from.isoformat() in told


@ONE_DATABASE
async def test_usage_of_ours_alone_says_that_no_other_program_billed_it(rig: Rig, tmp_path: Path) -> None:
    """Made by billingd after the copy, and deleted: all that was served to it is billed."""
    beta = await rig.subscribe("beta")
    await rig.settled()
    await rig.poll()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    acme = await rig.subscribe("acme")
    await rig.settled()
    await rig.traffic("acme", 3, arrives=rig.far.now() + 5 * HOUR)
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    await rig.report()
    assert by_whom(rig) == (0, 4)
    await rig.move("acme", "delete")
    rig.pass_(2 * HOUR)
    await put_back(rig, copy)
    await go_on(rig)
    assert by_whom(rig) == (0, 7)
    assert (await the_link(rig, acme)).state == "ended"
    assert (await the_link(rig, beta)).state == "active"
    assert await held_items(rig) == []


async def test_what_the_original_told_long_after_the_cut_over_is_a_problem(rig: Rig) -> None:
    """Traffic is counted from the cut-over on, so it would be billed twice; a later one is the way out."""
    ids = await original(rig, "acme", "beta")
    rig.pass_(HOUR)
    early = rig.far.now()
    await rig.traffic("beta", 5)
    await original_reports(rig, "acme", 7)
    rig.pass_(2 * HOUR)
    await original_reports(rig, "acme", 2)
    newest = rig.far.now()
    rig.pass_(MINUTE)
    for dry_run in (True, False):
        findings = await found(rig, early, dry_run=dry_run)
        step = of(findings, "acme")
        assert (step.op, step.action, findings.problems) == ("!", None, 1)
        assert "told 9 unit(s) in 2 record(s)" in step.reason
        assert f"a --since after {newest.isoformat().replace('+00:00', 'Z')}" in step.reason
        assert of(findings, "beta").op == "~"
    await adopted(rig, early)
    assert await rig.link(ids["acme"]) is None
    late = newest + timedelta(seconds=1)
    step = of(await adopted(rig, late), "acme")
    assert (step.op, "told" in step.reason) == ("~", False)
    assert (await the_link(rig, ids["acme"])).usage_from == late
    await rig.report()
    assert by_whom(rig) == (9, 5)


@ONE_DATABASE
async def test_what_the_original_posted_late_is_told_and_adopted(rig: Rig) -> None:
    """It read up to the cut-over, and posted minutes later: the step says how that must be understood."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    await rig.traffic("acme", 9)
    rig.pass_(MINUTE)
    since = rig.far.now()
    rig.pass_(TRAILING - MINUTE)
    untagged(rig, at_recurly(rig, "acme"), 9)
    rig.pass_(MINUTE)
    await rig.traffic("acme", 4)
    findings = await adopted(rig, since)
    step = of(findings, "acme")
    assert (step.op, findings.problems) == ("~", 0)
    assert "told 9 unit(s) in 1 record(s)" in step.reason
    assert "right only if that is traffic of before it, posted late" in step.reason
    assert (await the_link(rig, ids["acme"])).usage_from == since
    await rig.report()
    assert by_whom(rig) == (9, 4)


@ONE_DATABASE
async def test_what_the_original_tells_before_the_handler_runs_is_held(rig: Rig) -> None:
    """It was never stopped: the handler looks again."""
    ids = await original(rig, "acme")
    rig.pass_(HOUR)
    await found(rig, rig.far.now(), dry_run=False)
    rig.pass_(2 * TRAILING)
    await original_reports(rig, "acme", 6)
    await rig.work(2 * MINUTE, rounds=1)
    [item] = await held_items(rig)
    assert item["kind"] == "adoption_refused"
    assert "told 6 unit(s)" in item["reason"]
    assert await rig.link(ids["acme"]) is None


@ONE_DATABASE
async def test_nothing_is_adopted_before_a_restored_store_is_read_back(rig: Rig, tmp_path: Path) -> None:
    """What it says is linked is of the copy's time."""
    await original(rig, "acme")
    rig.pass_(HOUR)
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await put_back(rig, copy)
    for dry_run in (True, False):
        with pytest.raises(Retryable, match="reading back from Recurly"):
            await found(rig, rig.far.now(), dry_run=dry_run)
    await read_back(rig)
    assert of(await found(rig, rig.far.now()), "acme").op == "~"


@ONE_DATABASE
@pytest.mark.parametrize("source", ["metrics", "summary", "search"])
@pytest.mark.parametrize("account", ["user", "org"])
async def test_the_last_usage_of_a_deleted_one_of_an_organisation_of_its_own_is_billed(
    rig: Rig, tmp_path: Path, source: str, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says any more whose it was, and no other subscription is of that organisation."""
    rig.world.tenant.settings.sample_percent = 100
    rig.settle = timedelta(minutes=5)
    plain = rig.settings()
    chosen = plain.model_copy(update={"traffic": plain.traffic.model_copy(update={"source": source})})
    monkeypatch.setattr(rig, "settings", lambda: chosen)
    rig.start()
    beta = await rig.subscribe("beta")
    await rig.settled()
    await rig.poll()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    body = {"plan": "metered", "name": "acme", "user": "u", "team": "t", "organization": "300000000000003"}
    made = await rig.play(control_amplify.subscribe, body)
    rig.account(made, account)
    acme = made["metadata"]["id"]
    await rig.settled()
    for units in (6, 7, 8):
        await rig.traffic("acme", units)
        await rig.report()
    await rig.traffic("acme", 5)
    rig.pass_(MINUTE)
    await rig.move("acme", "delete")
    await put_back(rig, copy)
    await go_on(rig)
    assert by_whom(rig) == (0, 26)
    link = await the_link(rig, acme)
    assert (link.state, link.organization_id) == ("ended", "" if account == "user" else "300000000000003")
    assert (await the_link(rig, beta)).state == "active"
    assert (await held_items(rig), await rig.dead()) == ([], [])


async def test_adopted_since_the_copy_counts_from_the_cut_over(rig: Rig, tmp_path: Path) -> None:
    """Also when the copy knows of no traffic that early: all of it is read after the restore."""
    ids = await original(rig, "acme")
    since = rig.far.now().replace(microsecond=0) + MINUTE
    rig.pass_(2 * MINUTE)
    await rig.traffic("acme", 3)
    rig.pass_(5 * HOUR)
    await rig.poll()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    await adopted(rig, since)
    await rig.work(LOOK_AGAIN)
    assert (await the_link(rig, ids["acme"])).usage_from == since
    await put_back(rig, copy)
    await go_on(rig)
    await rig.report()
    await rig.report()
    assert (await the_link(rig, ids["acme"])).usage_from == since
    assert by_whom(rig) == (0, 7)
    assert set(rig.tags().values()) == {1}
    assert await rig.held() == {}
