"""Provision subscription: the real handler, store and adapters against the sandbox, on both databases."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, LEASE, LOOK_AGAIN, PER_UNIT, Json, Rig, a_rig

from billingd.admin.operations import release
from billingd.domain.errors import Unknown
from billingd.domain.events import subscription_action
from billingd.domain.windows import floor
from billingd.sandbox import control_amplify
from billingd.store import outbox, schema
from billingd.store.held import standing

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For what differs by the far sides' behaviour only."""


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        made.channels.provider.clear()
        yield made


def resource(rig: Rig, name: str) -> Json:
    """A subscription as Amplify holds it."""
    found = rig.world.tenant.resources.find("Subscription", name)
    assert found is not None
    return dict(found.body)


async def test_a_pending_subscription_is_created_marked_linked_and_approved(rig: Rig) -> None:
    """Add-ons listed, marker in the PO number, attributes written back, both sides told once."""
    rig.marketplace_url = "https://market.example"
    rig.start()
    acme = await rig.subscribe()
    await rig.work()
    [billed] = rig.billed(acme)
    [plan] = rig.world.site.plans.values()
    assert (billed["state"], billed["plan"], billed["marker"]) == ("active", plan.code, acme)
    assert list(billed["add_ons"]) == list(plan.add_ons)
    assert billed["account"].startswith("amplify-user-")
    assert rig.approval("acme") == "approved"
    assert rig.attributes("Subscription", "acme") == {
        "recurlyAccountCode": billed["account"],
        "recurlySubscriptionUuid": billed["uuid"],
    }
    link = await rig.link(acme)
    assert link is not None
    assert (link.state, link.uuid, link.organization_id) == ("active", billed["uuid"], "200000000000002")
    assert link.usage_from == rig.far.now().replace(minute=0)
    [told] = rig.channels.provider
    assert "acme was approved" in told
    [(address, _, body)] = rig.channels.mails
    assert address == "acme@example.com"
    assert "Hello user of acme" in body
    assert "https://market.example" in body
    await rig.work()
    await rig.ask(subscription_action("acme", acme, because="again"))
    await rig.work()
    assert (len(rig.channels.provider), len(rig.channels.mails), len(rig.billed(acme))) == (1, 1, 1)


@ONE_DATABASE
async def test_a_subscriber_without_an_address_is_normal(rig: Rig) -> None:
    """No mail, no dead letter, approved all the same."""
    body = {"plan": "metered", "name": "robot", "user": "robot", "team": "robots"}
    made = await rig.play(control_amplify.subscribe, body)
    rig.account(made)
    await rig.work()
    assert rig.approval("robot") == "approved"
    assert (rig.channels.mails, await rig.dead()) == ([], [])


@pytest.mark.parametrize(
    ("store_url", "there", "taken"),
    [
        ("sqlite", ("user", "team", "org"), "user"),
        ("postgres", ("team", "org"), "team"),
        ("sqlite", ("org",), "org"),
    ],
    indirect=["store_url"],
)
async def test_the_account_is_the_users_else_the_teams_else_the_organisations(
    rig: Rig, there: tuple[str, ...], taken: str
) -> None:
    """The first that exists pays."""
    acme = await rig.subscribe(account=False)
    codes = {kind: rig.account(resource(rig, "acme"), kind) for kind in there}
    await rig.work()
    [billed] = rig.billed(acme)
    assert billed["account"] == codes[taken]


async def test_without_an_account_it_is_held_until_one_appears(rig: Rig) -> None:
    """Hold leaves it pending, tells once, and looks again by itself, as often as it takes."""
    acme = await rig.subscribe(account=False)
    await rig.work(10 * LOOK_AGAIN)
    held = await rig.held()
    assert set(held) == {"account_missing"}
    assert "amplify-user-" in held["account_missing"]
    assert rig.approval("acme") == "pending"
    assert len(rig.channels.provider) == 1
    assert await rig.dead() == [], "waiting costs no attempt"
    rig.account(resource(rig, "acme"))
    await rig.work(LOOK_AGAIN)
    assert await rig.held() == {}
    assert rig.approval("acme") == "approved"
    assert len(rig.billed(acme)) == 1


@ONE_DATABASE
async def test_without_an_account_one_is_created_if_so_configured(rig: Rig) -> None:
    """The owner's, with the subscriber's address."""
    rig.accounts_missing = "create"
    rig.start()
    acme = await rig.subscribe(account=False)
    await rig.work()
    [billed] = rig.billed(acme)
    assert (
        billed["account"] == "amplify-team-" + resource(rig, "acme")["marketplace"]["resource"]["owner"]["id"]
    )
    assert rig.world.site.account_by_code[billed["account"]].given["email"] == "acme@example.com"


@ONE_DATABASE
async def test_without_an_account_it_is_rejected_if_so_configured(rig: Rig) -> None:
    """Rejected with a reason, the provider told, nothing made."""
    rig.accounts_missing = "reject"
    rig.start()
    acme = await rig.subscribe(account=False)
    await rig.work()
    assert rig.approval("acme") == "rejected"
    assert rig.billed(acme) == []
    assert "was rejected" in rig.channels.provider[0]
    await rig.work()
    assert (await rig.unfinished(), await rig.held()) == ([], {})


@ONE_DATABASE
async def test_a_closed_account_is_held(rig: Rig) -> None:
    """The owner's own account is closed: nobody else's pays instead, a person decides."""
    acme = await rig.subscribe(account=False)
    body = resource(rig, "acme")
    rig.account(body, "org")
    rig.world.site.account_by_code[rig.account(body)].deleted_at = rig.far.now()
    await rig.work()
    assert set(await rig.held()) == {"account_closed"}
    assert rig.billed(acme) == []


async def test_two_subscriptions_of_one_account_stand_in_line_for_the_guard(rig: Rig) -> None:
    """Recurly takes one a minute of an account: the others wait, costing no attempt, and lose nothing."""
    names = [f"acme-{n}" for n in range(3)]
    for name in names[1:]:
        await rig.plan(name)
    await rig.work()
    ids = [await rig.subscribe(names[0], account=False)]
    ids += [await rig.subscribe(name, plan=name, account=False) for name in names[1:]]
    rig.account(resource(rig, names[0]), "org")
    await rig.hear()
    for _ in range(8):
        await rig.drain()
        rig.pass_(timedelta(seconds=61))
    assert [rig.approval(name) for name in names] == ["approved"] * 3
    assert [len(rig.billed(id_)) for id_ in ids] == [1, 1, 1]
    rows = await rig.rows(schema.outbox)
    assert max(row["attempt"] for row in rows if row["kind"] == "provision_subscription") == 1


async def test_a_site_that_refuses_a_second_subscription_to_a_plan_holds_it(rig: Rig) -> None:
    """Recurly's words are shown; nothing is made, and nothing is tried again and again."""
    first = await rig.subscribe("one", account=False)
    rig.account(resource(rig, "one"), "org")
    await rig.work()
    rig.pass_(HOUR)
    second = await rig.subscribe("two", account=False)
    await rig.work(HOUR)
    held = await rig.held()
    assert set(held) == {"subscription_refused"}
    assert "already have a subscription to this plan" in held["subscription_refused"]
    assert rig.world.calls["recurly POST /subscriptions"] == 2
    assert (len(rig.billed(first)), len(rig.billed(second))) == (1, 0)
    assert rig.approval("two") == "pending"
    rig.world.site.configure(allow_multiple_subscriptions_per_plan=True)
    async with rig.store.read() as tx:
        [item] = await standing(tx)
    assert await release(rig.store, item["id"], now=rig.far.now())
    await rig.work(HOUR)
    assert len(rig.billed(second)) == 1
    assert await rig.held() == {}


async def test_an_unmarked_subscription_at_recurly_is_held_and_adopted_once_marked(rig: Rig) -> None:
    """Somebody made it before us: a second one would bill twice, so a person says whose it is."""
    acme = await rig.subscribe()
    await rig.work()
    async with rig.store.write() as tx:  # the store forgets: a first start beside the original integration
        for table in (schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox):
            await tx.execute(table.delete())
    [subscription] = rig.world.site.subscriptions.values()
    subscription.given["po_number"] = None
    await rig.ask(subscription_action("acme", acme, because="1"))
    await rig.work()
    assert set(await rig.held()) == {"subscription_unmarked"}
    assert len(rig.world.site.subscriptions) == 1
    subscription.given["po_number"] = acme
    await rig.work(LOOK_AGAIN)
    assert await rig.held() == {}
    link = await rig.link(acme)
    assert link is not None
    assert link.uuid == subscription.uuid
    assert len(rig.world.site.subscriptions) == 1


@ONE_DATABASE
async def test_one_that_expired_at_recurly_is_held(rig: Rig) -> None:
    """The one marked for it is over: no second one is made behind a person's back."""
    acme = await rig.subscribe()
    await rig.work()
    async with rig.store.write() as tx:
        for table in (schema.billing_periods, schema.subscription_links, schema.intents, schema.outbox):
            await tx.execute(table.delete())
    [subscription] = rig.world.site.subscriptions.values()
    rig.world.site.expire(subscription.uuid)
    await rig.ask(subscription_action("acme", acme, because="1"))
    await rig.work(LOOK_AGAIN)
    assert set(await rig.held()) == {"subscription_expired"}
    assert len(rig.world.site.subscriptions) == 1


@ONE_DATABASE
async def test_what_a_person_approved_before_counts_from_the_second_it_was_made_at_recurly(rig: Rig) -> None:
    """It is not approved again; the window in which it was made is cut there."""
    acme = await rig.subscribe()
    await rig.move("acme", "approve")
    await rig.traffic("acme", 3)  # before the link
    rig.pass_(timedelta(minutes=5))
    await rig.work()
    link = await rig.link(acme)
    assert link is not None
    [made] = rig.world.site.subscriptions.values()
    assert (link.state, link.usage_from) == ("active", made.activated_at)
    assert link.usage_from != floor(link.usage_from, HOUR)
    assert "before create_subscription" in rig.steps.taken
    assert "before decide" not in rig.steps.taken
    rig.pass_(timedelta(minutes=5))
    await rig.traffic("acme", 4)
    rig.pass_(HOUR)
    await rig.traffic("acme", 5)
    await rig.report()
    assert rig.units() == 9
    first, _ = await rig.rows(schema.usage_records)
    assert (first["window_start"], first["units"]) == (link.usage_from, 4)


@ONE_DATABASE
async def test_before_amplify_asks_for_approval_nothing_happens(rig: Rig) -> None:
    """A subscription goes through steps; an action that comes before `approval` is set makes nothing."""
    acme = await rig.subscribe()
    found = rig.world.tenant.resources.find("Subscription", "acme")
    assert found is not None
    approval = found.body.pop("approval")
    rig.unheard.clear()
    await rig.ask(subscription_action("acme", acme, because="early"))
    await rig.work()
    assert rig.billed(acme) == []
    found.body["approval"] = approval
    await rig.ask(subscription_action("acme", acme, because="asked"))
    await rig.work()
    assert rig.approval("acme") == "approved"


@ONE_DATABASE
async def test_a_subscription_of_a_product_that_is_not_ours_is_left_alone(rig: Rig) -> None:
    """No label, no plan at Recurly: it is not ours to approve, hold or reject."""
    await rig.product("other", ours=False)
    await rig.plan("theirs", product="other")
    acme = await rig.subscribe(plan="theirs")
    await rig.work()
    assert (rig.approval("acme"), rig.billed(acme), await rig.held()) == ("pending", [], {})
    assert await rig.unfinished() == []


async def test_a_subscription_that_comes_before_its_plan_waits_for_it(store_url: str) -> None:
    """The plan's event was lost: the subscription asks for its plan and goes on when it is there."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        rig.unheard.clear()
        await rig.subscribe()
        await rig.work()
        await rig.work(timedelta(seconds=5))
        assert rig.approval("acme") == "approved"


@ONE_DATABASE
async def test_a_subscription_to_a_plan_that_failed_is_held_not_forgotten(store_url: str) -> None:
    """The plan became a dead letter: whoever waits for it is shown, and goes on after the retry."""
    async with a_rig(store_url) as rig:
        await rig.product()
        broken = rig.fault("500", "POST", "/plans", times=None)
        await rig.plan()
        acme = await rig.subscribe()
        await rig.work(48 * HOUR, rounds=120)
        [error, *_] = await rig.dead()  # each event of the plan failed alike
        held = await rig.held()
        assert set(held) == {"plan_failed"}
        assert error in held["plan_failed"]
        assert rig.billed(acme) == []
        rig.world.faults.remove(broken)
        async with rig.store.write() as tx:
            ids = [row["id"] for row in await outbox.select(tx, states=["dead"])]
            await outbox.retry(tx, ids, now=rig.far.now())
        await rig.work(2 * LOOK_AGAIN)
        assert rig.approval("acme") == "approved"
        assert await rig.held() == {}


async def test_the_link_is_written_before_the_approval(rig: Rig) -> None:
    """Whoever is approved can be billed: at the moment of the approval the link is on disk."""
    acme = await rig.subscribe()
    seen: list[Any] = []
    decide = rig.amplify._adapter.decide

    async def decide_and_look(*args: Any, **kwargs: Any) -> None:
        seen.append(await rig.link(acme))
        await decide(*args, **kwargs)

    rig.amplify._adapter.decide = decide_and_look
    await rig.work()
    [link] = seen
    assert link.state == "created"


async def test_rejected_between_creation_and_approval_it_ends_with_a_full_refund(rig: Rig) -> None:
    """A person was faster: nothing is approved over their no, and the first invoice is taken back."""
    rig.collection_method = "automatic"
    rig.start()
    acme = await rig.subscribe()
    set_attributes = rig.amplify._adapter.set_attributes

    async def reject_meanwhile(*args: Any, **kwargs: Any) -> Any:
        await rig.move("acme", "reject")
        return await set_attributes(*args, **kwargs)

    rig.amplify._adapter.set_attributes = reject_meanwhile
    await rig.settled()
    assert rig.approval("acme") == "rejected"
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 0
    assert not any("was approved" in told for told in rig.channels.provider)
    assert "never approved" in rig.channels.provider[-1]


async def test_approved_and_deleted_before_anybody_wrote_it_down_is_not_refunded(rig: Rig) -> None:
    """That it was to be approved is on disk before the approval: what may have been served stands."""
    rig.collection_method = "automatic"
    rig.start()
    acme = await rig.subscribe()
    decide = rig.amplify._adapter.decide

    async def delete_meanwhile(*args: Any, **kwargs: Any) -> Any:
        await decide(*args, **kwargs)
        await rig.move("acme", "delete")
        raise Unknown("the answer was lost")

    rig.amplify._adapter.decide = delete_meanwhile
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert [invoice["total"] for invoice in billed["invoices"] if float(invoice["total"]) > 0] == ["10.00"]
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 10


@ONE_DATABASE
async def test_rejected_after_an_approval_that_failed_it_ends_with_a_full_refund(rig: Rig) -> None:
    """The approval was intended and did not come through; a person's no did: nothing was ever served."""
    rig.collection_method = "automatic"
    rig.start()
    acme = await rig.subscribe()

    async def reject_meanwhile(*_args: Any, **_kwargs: Any) -> None:
        await rig.move("acme", "reject")
        raise Unknown("Amplify is away")

    rig.amplify._adapter.decide = reject_meanwhile
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 0
    assert "never approved" in rig.channels.provider[-1]


async def test_usage_counts_up_to_the_end_that_amplify_names(rig: Rig) -> None:
    """The event may come late; what counts is when Amplify ended it."""
    await rig.subscribe()
    await rig.settled()
    await rig.move("acme", "cancel")
    ended = rig.far.now()
    rig.pass_(3 * HOUR)
    await rig.work()
    [link] = await rig.rows(schema.subscription_links)
    assert abs(link["usage_until"] - ended) < timedelta(seconds=1)


@pytest.mark.parametrize(
    ("store_url", "step", "known"),
    [("sqlite", "reject", True), ("postgres", "delete", True), ("sqlite", "reject", False)],
    indirect=["store_url"],
)
async def test_over_between_creation_and_link_leaves_nothing_behind(rig: Rig, step: str, known: bool) -> None:
    """The process died after Recurly made it and before the link; then the subscription was rejected or
    deleted. It is found again by what was written down before sending, and ended with a full refund.
    """
    rig.collection_method = "automatic"
    rig.start()
    acme = await rig.subscribe()
    await rig.hear()
    steps = await clean_steps(rig, "probe")
    lost = steps.index("after create_subscription") + 1
    rig.steps.arm(lost + 2 if known else lost)  # just after the commit that says it is done
    assert await rig.dies()
    [made] = rig.billed(acme)
    assert made["state"] == "active"
    assert await rig.link(acme) is None
    await rig.move("acme", step)
    rig.start()
    rig.pass_(LEASE)
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 0
    assert await rig.dead() == []


@ONE_DATABASE
async def test_deleted_while_nobody_knows_whether_it_was_created_it_is_found_and_ended(rig: Rig) -> None:
    """A deleted subscription no longer says which account to look in: its marker is looked for in all."""
    acme = await rig.subscribe()
    await rig.hear()
    steps = await clean_steps(rig, "probe")
    rig.steps.arm(steps.index("after create_subscription") + 1)
    assert await rig.dies()
    await rig.move("acme", "delete")
    rig.start()
    rig.pass_(LEASE)
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert (await rig.held(), await rig.dead()) == ({}, [])


@ONE_DATABASE
async def test_a_refused_creation_that_is_rejected_meanwhile_is_over(rig: Rig) -> None:
    """Nothing was made, so nothing is looked for, and nothing stays held."""
    await rig.subscribe("one", account=False)
    rig.account(resource(rig, "one"), "org")
    await rig.work()
    rig.pass_(HOUR)
    await rig.subscribe("two", account=False)
    await rig.work()
    assert set(await rig.held()) == {"subscription_refused"}
    await rig.move("two", "reject")
    await rig.work(LOOK_AGAIN)
    assert (await rig.held(), await rig.unfinished()) == ({}, [])


@ONE_DATABASE
async def test_approved_by_us_and_cancelled_before_that_was_written_keeps_its_first_invoice(rig: Rig) -> None:
    """The process died between the approval and the link's next state: the subscriber had access."""
    acme = await rig.subscribe()
    await rig.hear()
    steps = await clean_steps(rig, "probe")
    rig.steps.arm(steps.index("after decide") + 1)
    assert await rig.dies()
    rig.start()
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    await rig.move("acme", "cancel")
    await rig.settled()
    [billed] = rig.billed(acme)
    assert billed["state"] == "expired"
    assert sum(float(invoice["total"]) for invoice in billed["invoices"]) == 10 + 4 * 0.5
    link = await rig.link(acme)
    assert link is not None
    assert link.state == "ended"


async def clean_steps(rig: Rig, name: str) -> list[str]:
    """The steps that provisioning one subscription takes when nothing goes wrong, on another subscriber."""
    waiting = rig.unheard[:]
    rig.unheard.clear()
    async with rig.store.write() as tx:  # whatever waits already is put aside
        await tx.execute(schema.outbox.update().values(due_at=rig.far.now() + LEASE))
    probe = await rig.subscribe(name)
    rig.unheard[:] = waiting
    await rig.ask(subscription_action(name, probe, because="probe"))
    rig.steps.arm(None)
    assert await rig.engine.run_once()
    await rig.engine.drain(at_most=timedelta(seconds=10))
    steps = list(rig.steps.taken)
    rig.steps.arm(None)
    await rig.drain()
    rig.channels.provider.clear()
    rig.pass_(LEASE)
    return steps


@pytest.mark.parametrize(
    ("store_url", "later"), [("sqlite", "after the key"), ("postgres", "soon")], indirect=["store_url"]
)
async def test_a_crash_at_any_step_leaves_one_subscription_approved_and_linked(
    store_url: str, later: str
) -> None:
    """The process dies at each step in turn; the next start ends with exactly one of everything."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await rig.work()

        async def once(name: str, die_at: int | None) -> bool:
            subscription_id = await rig.subscribe(name)
            rig.unheard.clear()
            await rig.ask(subscription_action(name, subscription_id, because="crash"))
            rig.steps.arm(die_at)
            died = await rig.dies()
            if later == "after the key":
                rig.pass_(2 * HOUR)
            await rig.mended()
            [billed] = rig.billed(subscription_id)
            link = await rig.link(subscription_id)
            assert link is not None
            assert (billed["state"], link.state, link.uuid) == ("active", "active", billed["uuid"])
            assert rig.approval(name) == "approved"
            return died

        assert not await once("clean", None)
        step = 1
        while await once(f"crash-{step}", step):
            step += 1
        assert step > 12
        assert await rig.dead() == []
        # A process that died before its request left sends it again; Recurly does not know the key. Of a
        # subscription that is a doubt, which its audit ends: it is there once.
        assert await rig.held() == {}
        doubts = [(one["kind"], one["resolution"]) for one in await rig.rows(schema.held)]
        clean = ("idempotency_doubted", "audited: each record is there once")
        assert set(doubts) == ({clean} if later == "soon" else set())


@pytest.mark.parametrize(
    ("store_url", "kind"),
    [("sqlite", "lost"), ("postgres", "500_committed"), ("sqlite", "html_502"), ("sqlite", "429")],
    indirect=["store_url"],
)
@pytest.mark.parametrize("times", [1, 3])
async def test_a_creation_without_an_answer_makes_one(rig: Rig, kind: str, times: int) -> None:
    """Whether it was made or not, once or again: the marker is looked for before each try."""
    rig.fault(kind, "POST", "/subscriptions", times=times)
    acme = await rig.subscribe()
    await rig.work(2 * HOUR)
    assert len(rig.billed(acme)) == 1
    assert rig.approval("acme") == "approved"
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_quota_added_while_the_answer_is_lost_does_not_stop_the_creation(rig: Rig) -> None:
    """What is to be created changed while its outcome is unknown: that settles by itself."""
    rig.fault("html_502", "POST", "/subscriptions")
    acme = await rig.subscribe()
    await rig.work()
    await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    await rig.work(2 * HOUR)
    [billed] = rig.billed(acme)
    assert len(billed["add_ons"]) == 2
    assert await rig.dead() == []


@ONE_DATABASE
async def test_a_pending_subscription_to_a_plan_deprecated_before_it_was_linked_is_held(
    store_url: str,
) -> None:
    """Nobody may be left waiting in silence for a plan that will never be linked."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        rig.unheard.clear()
        acme = await rig.subscribe()
        await rig.move_plan("metered", "deprecate")
        await rig.work(HOUR / 2)
        assert set(await rig.held()) == {"plan_not_offered"}
        assert rig.billed(acme) == []


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_account_that_appears_meanwhile_makes_no_second_subscription(rig: Rig) -> None:
    """The answer is lost, then the user gets an account of their own: the first one is found, at the old."""
    acme = await rig.subscribe(account=False)
    org = rig.account(resource(rig, "acme"), "org")
    rig.fault("lost", "POST", "/subscriptions")
    await rig.hear()
    while not rig.billed(acme):
        await rig.drain()
        rig.pass_(timedelta(seconds=2))
    rig.account(resource(rig, "acme"))
    await rig.work(2 * HOUR)
    assert len(rig.billed(acme)) == 1
    link = await rig.link(acme)
    assert link is not None
    assert (link.state, link.account_code) == ("active", org)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_stored_wait_is_not_waited_for_by_the_hour(rig: Rig) -> None:
    """A second try met the guard; its key would repeat that for an hour, so a new one is taken soon."""
    await rig.plan("other")
    await rig.work()
    first = await rig.subscribe(account=False)
    rig.account(resource(rig, "acme"), "org")
    rig.fault("html_502", "POST", "/subscriptions")  # never done, but nobody can know
    await rig.hear()
    await rig.drain()
    second = await rig.subscribe("second", plan="other", account=False)
    await rig.hear()
    await rig.drain()
    assert len(rig.billed(second)) == 1
    began = rig.far.now()
    while not rig.billed(first) and rig.far.now() - began < HOUR:
        rig.pass_(timedelta(seconds=20))
        await rig.drain()
    assert rig.far.now() - began < HOUR / 4
    await rig.work(HOUR)
    assert (len(rig.billed(first)), len(rig.billed(second))) == (1, 1)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_owner_without_an_organisation_is_counted_at_the_providers(rig: Rig) -> None:
    """Metrics are asked by organisation: a subscription that names none would never be counted."""
    acme = await rig.subscribe()
    del resource(rig, "acme")["marketplace"]["resource"]["owner"]["organization"]
    await rig.work()
    link = await rig.link(acme)
    assert link is not None
    assert (link.state, link.organization_id) == ("active", rig.world.tenant.organization_id)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_one_that_expired_before_it_was_linked_is_not_made_again(rig: Rig) -> None:
    """The answer was lost and Recurly ended it since: its marker is found, and a person told."""
    acme = await rig.subscribe()
    rig.fault("lost", "POST", "/subscriptions")
    await rig.hear()
    while not rig.billed(acme):
        await rig.drain()
        rig.pass_(timedelta(seconds=2))
    rig.world.site.expire(rig.billed(acme)[0]["uuid"])
    rig.pass_(2 * HOUR)  # Recurly has forgotten the key
    await rig.work(2 * HOUR)
    assert len(rig.billed(acme)) == 1
    assert set(await rig.held()) == {"subscription_expired"}
    assert rig.approval("acme") == "pending"
