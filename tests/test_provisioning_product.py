"""A product's label: set after its plans exist, taken away, set again; cheap when nothing differs."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from rig import HOUR, Rig, a_rig

from billingd.domain.events import PROVISION_PRODUCT
from billingd.sandbox import control_amplify
from billingd.store import schema

OURS = {"attributes": {"billingSystem": "recurly"}}
NOT_OURS = {"attributes": {"billingSystem": None}}
ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        yield made


async def label(rig: Rig, attributes: dict[str, Any]) -> None:
    await rig.play(control_amplify.mark_product, attributes, name="weather")


async def linked(rig: Rig) -> set[str]:
    """Names of linked plans."""
    return {row["name"] for row in await rig.rows(schema.plan_links) if row["state"] != "removed"}


async def asked(rig: Rig) -> list[tuple[str, str]]:
    """Kind and subject of whatever was asked for provisioning."""
    rows = await rig.rows(schema.outbox)
    return [(row["kind"], row["subject"]) for row in rows if row["kind"].startswith("provision_")]


async def test_a_label_set_late_brings_plans_and_subscriptions(rig: Rig) -> None:
    """Every active plan, every pending subscription; not free plans, not drafts, not what has ended."""
    await rig.product(ours=False)
    await rig.plan()
    await rig.plan("gold")
    await rig.plan("draft", activate=False)
    await rig.plan("free", type="free", quotas=[])
    pending = await rig.subscribe()
    over = await rig.subscribe("over", "gold")
    await rig.move("over", "cancel")
    gratis = await rig.subscribe("gratis", "free")
    await rig.work()
    assert await linked(rig) == set()
    assert rig.approval("acme") == "pending"
    rows = len(await asked(rig))
    await label(rig, OURS)
    await rig.work(HOUR)
    assert await linked(rig) == {"metered", "gold"}
    assert rig.approval("acme") == "approved"
    assert (await rig.link(pending)) is not None
    assert [row["name"] for row in await rig.rows(schema.subscription_links)] == ["acme"]
    news = (await asked(rig))[rows:]
    assert news.count((PROVISION_PRODUCT, "product:weather")) == 1
    others = {"plan:draft", "plan:free", f"subscription:{over}", f"subscription:{gratis}"}
    assert others.isdisjoint(subject for _, subject in news)
    assert await rig.dead() == []


async def test_without_the_label_what_was_agreed_is_billed_on(rig: Rig) -> None:
    """Told once and held; new subscriptions wait for the label, which closes it and brings them."""
    await rig.product()
    await rig.plan()
    await rig.work()
    first = await rig.subscribe()
    await rig.work(HOUR)
    rig.channels.provider.clear()
    await label(rig, NOT_OURS)
    await rig.work()
    reason = (await rig.held())["product_unlabelled"]
    assert "metered" in reason
    assert "go on being billed" in reason
    assert [told for told in rig.channels.provider if "no longer labelled" in told] == [
        f"Product weather is no longer labelled: {reason}"
    ]
    await label(rig, {"attributes": {"colour": "blue"}})
    await rig.work()
    assert len(rig.channels.provider) == 1, "it was told before"
    second = await rig.subscribe("late")
    await rig.traffic("acme", 3)
    await rig.work()
    await rig.report()
    assert rig.units() == 3
    assert (await rig.link(first)) is not None
    assert await rig.link(second) is None
    await label(rig, OURS)
    await rig.work(HOUR)
    assert "product_unlabelled" not in await rig.held()
    assert (await rig.link(second)) is not None
    assert rig.approval("late") == "approved"


async def test_a_product_that_is_gone_takes_its_plans_with_it(rig: Rig) -> None:
    """Although no other event of the cascade arrives."""
    await rig.product()
    await rig.plan()
    await rig.work()
    await label(rig, NOT_OURS)
    await rig.work()
    assert "product_unlabelled" in await rig.held()
    product = rig.world.tenant.resources.find("Product", "weather")
    assert product is not None
    rig.world.tenant.delete(product, asked=False)
    await rig.hear(lambda events: [one for one in events if one.payload["kind"] == "Product"])
    await rig.drain()
    assert await linked(rig) == set()
    assert await rig.held() == {}


@ONE_DATABASE
async def test_an_update_that_changes_nothing_asks_for_nothing(rig: Rig) -> None:
    """Three reads at Amplify, none at Recurly, no action."""
    await rig.product()
    await rig.plan()
    await rig.work()
    await rig.subscribe()
    await rig.subscribe("waits", account=False)
    await rig.work(HOUR)
    before = await asked(rig)
    rig.world.calls.clear()
    await label(rig, {"attributes": {"colour": "blue"}})
    await rig.hear()
    await rig.engine.run_once()
    await rig.engine.drain(at_most=HOUR)
    assert (await asked(rig))[len(before) :] == [(PROVISION_PRODUCT, "product:weather")]
    assert sum(rig.world.calls.values()) == 3, rig.world.calls


@ONE_DATABASE
async def test_a_product_that_was_never_ours_asks_for_nothing_at_once(rig: Rig) -> None:
    """Its webhooks lead to no action; once a plan of it was linked they do."""
    await rig.product(ours=False)
    assert await rig.hear() == 0
    await label(rig, OURS)
    await rig.plan()
    await rig.work()
    await label(rig, NOT_OURS)
    assert await rig.hear() == 1


@ONE_DATABASE
async def test_what_is_held_goes_when_no_plan_of_it_is_linked(rig: Rig) -> None:
    """A product whose plans were all archived needs no label."""
    await rig.product()
    await rig.plan()
    await rig.work()
    await label(rig, NOT_OURS)
    await rig.work()
    await rig.move_plan("metered", "deprecate")
    await rig.move_plan("metered", "archive")
    await rig.work()
    assert await linked(rig) == set()
    await label(rig, {"attributes": {"colour": "blue"}})
    await rig.work()
    assert "product_unlabelled" not in await rig.held()
