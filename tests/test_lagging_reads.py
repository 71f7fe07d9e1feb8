"""A first 404 of what was there a moment ago is a lag: it ends nothing, and makes no dead letter."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, Rig, a_rig

from billingd.domain.errors import NotFound
from billingd.domain.events import plan_action, subscription_action
from billingd.sandbox import control_amplify
from billingd.store import schema

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        yield made


def hide_around(rig: Rig, side: Any, call: str, kind: str, *, first: bool) -> None:
    """Everything of that kind is hidden before, or after, the next such call."""
    real = getattr(side, call)

    async def hidden(*args: Any, **options: Any) -> Any:
        delattr(side, call)
        if first:
            rig.blind(kind)
        done = await real(*args, **options)
        rig.blind(kind)
        return done

    setattr(side, call, hidden)


@pytest.mark.parametrize("call", ["set_attributes", "decide"])
async def test_a_subscription_hidden_while_it_is_approved(rig: Rig, call: str) -> None:
    await rig.subscribe("acme")
    hide_around(rig, rig.amplify, call, "Subscription", first=True)
    await rig.hear()
    await rig.drain()
    assert await rig.dead() == []
    rig.sighted()
    await rig.work(HOUR)
    assert rig.approval("acme") == "approved"


async def test_a_plan_hidden_before_its_quotas(rig: Rig) -> None:
    await rig.plan("second")
    hide_around(rig, rig.amplify, "list_quotas", "ProductPlan", first=True)
    await rig.hear()
    await rig.drain()
    assert await rig.dead() == []
    rig.sighted()
    await rig.work(HOUR)
    assert {row["name"] for row in await rig.rows(schema.plan_links)} == {"metered", "second"}


async def test_an_account_whose_list_lags(rig: Rig) -> None:
    await rig.subscribe("acme")
    asked: list[str] = []

    async def lags(account: str) -> Any:
        asked.append(account)
        del rig.recurly.list_subscriptions
        raise NotFound("Couldn't find Account")

    rig.recurly.list_subscriptions = lags
    await rig.work(HOUR)
    assert asked
    assert rig.approval("acme") == "approved"
    assert await rig.dead() == []


async def test_a_new_subscription_that_is_not_shown_at_once(rig: Rig) -> None:
    """Its event is the only word of it until the next resync."""
    await rig.subscribe("late")
    rig.blind("Subscription", names={"late"})
    await rig.hear()
    await rig.drain()
    rig.sighted()
    await rig.work(HOUR)
    assert rig.approval("late") == "approved"


@pytest.mark.parametrize("heard", [True, False])
async def test_one_that_waits_is_ours_again_when_its_product_is(rig: Rig, heard: bool) -> None:
    """It is let go of while its product has no label, and asked for again, by a resync at the latest."""
    asked = {"plan": "metered", "name": "acme", "user": "u", "team": "t"}
    await rig.play(control_amplify.subscribe, asked)
    await rig.work()
    assert list(await rig.held()) == ["account_missing"]
    for value in (None, "recurly"):
        label = {"attributes": {"billingSystem": value}}
        await rig.play(control_amplify.mark_product, label, name="weather")
        if not heard:
            rig.unheard.clear()
        await rig.work(HOUR)
        if value is None:
            assert "account_missing" not in await rig.held()
    await rig.daemon.resync.run(dry_run=False)
    await rig.drain()
    assert list(await rig.held()) == ["account_missing"]


async def test_one_whose_product_is_not_shown_waits_on(rig: Rig) -> None:
    """That is no word about its label."""
    await rig.subscribe("acme", account=False)
    await rig.work()
    assert list(await rig.held()) == ["account_missing"]
    rig.blind("Product")
    await rig.work(HOUR)
    rig.sighted()
    [waiting] = rig.world.tenant.resources.of_kind("Subscription")
    rig.account(waiting.shown("v1"))
    await rig.work(HOUR)
    assert rig.approval("acme") == "approved"


async def standing(rig: Rig) -> list[Any]:
    return [(row["id"], row["kind"]) for row in await rig.rows(schema.held) if row["closed_at"] is None]


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("kind", ["ProductPlan", "Subscription"])
async def test_what_is_held_stays_held_while_it_is_only_hidden(rig: Rig, kind: str, deleted: bool) -> None:
    """Nothing of it is linked, so nothing ends; but nobody knows that it is over before Amplify says so."""
    await rig.subscribe("acme")
    name = "other" if kind == "ProductPlan" else "late"
    if kind == "ProductPlan":
        made = await rig.plan(
            name, quotas=[{"name": "odd", "pricing": {"type": "perunit", "cost": 0.1234567891}}]
        )
        action = plan_action(name, made["metadata"]["id"], because="a quota")
    else:
        action = subscription_action(name, await rig.subscribe(name, account=False), because="an event")
    await rig.work()
    before = await standing(rig)
    assert [one for _, one in before] == [
        "plan_inexpressible" if kind == "ProductPlan" else "account_missing"
    ]
    rig.blind(kind, names={name})
    await rig.ask(action)
    await rig.daemon.resync.run(dry_run=False)
    await rig.work(timedelta(minutes=6 if kind == "ProductPlan" else 14))  # it looks every ten by itself
    assert await standing(rig) == before
    rig.sighted()
    await rig.work(HOUR)
    assert await standing(rig) == before
    if deleted:
        resource = rig.world.tenant.resources.find(kind, name)
        assert resource is not None
        rig.world.tenant.delete(resource, asked=False)
        await rig.work(HOUR)
        assert (await rig.held(), await rig.unfinished()) == ({}, [])
    assert (await rig.rows(schema.absences), await rig.dead()) == ([], [])
