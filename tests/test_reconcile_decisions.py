"""Reconcile and what people have decided: nothing is given back twice, nothing is said twice."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from rig import Rig, a_rig
from test_reconcile import kinds, posted, reconciled, repaired, reported
from test_reconcile_safely import audited, changed, standing

from billingd.admin import operations
from billingd.store import schema

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
MINUTES = timedelta(minutes=1)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        await made.subscribe()
        await made.work()
        made.channels.provider.clear()
        yield made


def corrections(rig: Rig) -> list[int]:
    """The units of every correction at Recurly."""
    return [one.amount for one in rig.world.site.usages.values() if "~" in (one.merchant_tag or "")]


async def closed(rig: Rig, item: int, how: str) -> None:
    """A person has dealt with it."""
    if how == "released":
        assert await operations.release(rig.store, item, now=rig.clock.now())
    else:
        assert await operations.write_off(rig.store, item, reason="refunded", now=rig.clock.now())
    await rig.drain()


@pytest.mark.parametrize("what", ["double", "amount"])
async def test_what_was_found_after_its_bill_and_refunded_is_not_corrected_too(rig: Rig, what: str) -> None:
    """Then only reconcile holds it."""
    one = await reported(rig, 7)
    if what == "double":
        await posted(rig, one)
    else:
        changed(one, 9)
    rig.pass_(MINUTES)
    await rig.renew()
    await rig.poll()
    await rig.drain()
    await reconciled(rig)
    await reconciled(rig)
    [item] = await standing(rig)
    assert item["subject"].startswith("drift:")
    await closed(rig, item["id"], "written off")
    assert (await repaired(rig))["drift"] == []
    assert corrections(rig) == []


async def test_a_release_decides_nothing(rig: Rig) -> None:
    """It has it looked at again: what is still billed twice is then corrected, as was said."""
    one = await reported(rig, 7)
    two = await posted(rig, one)
    one.billed_at = two.billed_at = rig.far.now()
    await audited(rig)
    [item] = await standing(rig)
    await closed(rig, item["id"], "released")
    await rig.work(10 * MINUTES)
    await reconciled(rig, repair=True)
    await rig.work(10 * MINUTES)
    assert corrections(rig) == [-7]


@pytest.mark.parametrize("before", [True, False])
async def test_a_decision_about_one_record_holds_for_all_of_its_tag(rig: Rig, before: bool) -> None:
    """A correction posts the surplus of the whole tag: what was refunded by hand is in it."""
    one = await reported(rig, 7)
    two, three = await posted(rig, one), await posted(rig, one)
    one.billed_at = two.billed_at = three.billed_at = rig.far.now()
    await audited(rig)
    first, _ = await standing(rig)
    if before:
        await closed(rig, first["id"], "written off")
        found = await repaired(rig)
        assert not any(each["repairable"] for each in found["drift"])
    else:
        await reconciled(rig, repair=True)
        assert await operations.write_off(rig.store, first["id"], reason="refunded", now=rig.clock.now())
        await rig.work(10 * MINUTES)
    assert corrections(rig) == []


async def test_a_refunded_double_with_other_units_is_not_corrected(rig: Rig) -> None:
    one = await reported(rig, 7)
    two = await posted(rig, one)
    changed(one, 9)
    changed(two, 9)
    one.billed_at = two.billed_at = rig.far.now()
    await audited(rig)
    [double] = [item for item in await standing(rig) if item["kind"] == "double_record"]
    await closed(rig, double["id"], "written off")
    assert kinds(await repaired(rig)) == [("wrong_amount", 2)]
    assert corrections(rig) == []


async def test_a_billed_double_says_what_closes_it_and_stays_closed(rig: Rig) -> None:
    """Writing it off; for releasing it looks again, and finds the same."""
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    await audited(rig)
    [item] = await standing(rig)
    assert "write this off" in item["reason"]
    assert "release" not in item["reason"]
    await closed(rig, item["id"], "written off")
    rig.channels.provider.clear()
    await audited(rig)
    assert (await standing(rig), rig.channels.provider) == ([], [])


@pytest.mark.parametrize("first", ["audit", "reconcile"])
async def test_one_difference_is_one_item(rig: Rig, first: str) -> None:
    """Whoever finds it first: its units count once, and a person decides once."""
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    if first == "audit":
        await audited(rig)
    await reconciled(rig)
    await reconciled(rig)
    if first == "reconcile":
        assert [item["subject"][:6] for item in await standing(rig)] == ["drift:"]
        await audited(rig)
        await reconciled(rig)
    [item] = await standing(rig)
    assert (item["subject"].startswith("audit:"), item["units"]) == (True, 7)


async def test_a_billed_double_that_was_moved_is_not_said_to_be_right(rig: Rig) -> None:
    """What the sum at its time says is not all that is billed."""
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    stays, _ = sorted([one, twin], key=lambda each: each.id)
    stays.add_on.book.remove(stays)
    stays.usage_timestamp -= 20 * MINUTES
    stays.add_on.book.add(stays)
    one.billed_at = twin.billed_at = rig.far.now()
    found = await repaired(rig)
    assert {each["repairable"] for each in found["drift"]} == {False}
    assert ("double_record", 7) in kinds(await reconciled(rig))
    assert rig.units() == 14


async def test_a_double_that_is_moved_before_its_repair_is_left(rig: Rig) -> None:
    one = await reported(rig, 7)
    twin = await posted(rig, one)
    one.billed_at = twin.billed_at = rig.far.now()
    assert [each["repairable"] for each in (await reconciled(rig, repair=True))["drift"]] == [True]
    twin.add_on.book.remove(twin)
    twin.usage_timestamp -= 20 * MINUTES
    twin.add_on.book.add(twin)
    await rig.work(10 * MINUTES)
    assert (rig.units(), corrections(rig)) == (14, [])
    assert [row["mended"] for row in await rig.rows(schema.drift)] == [None]


async def test_a_foreign_record_that_grows_after_it_was_written_off_is_news(rig: Rig) -> None:
    one = await reported(rig, 7)
    other = await posted(rig, one, tag="other")
    await audited(rig)
    [item] = await standing(rig)
    await closed(rig, item["id"], "written off")
    assert kinds(await reconciled(rig)) == []
    changed(other, 5000)
    assert kinds(await reconciled(rig)) == [("foreign_record", 5000)]


@pytest.mark.parametrize("usages", [None, "list"])
async def test_what_an_earlier_release_held_stays_written_off(rig: Rig, usages: str | None) -> None:
    """It named the records alone, in the text or as a list."""
    one = await reported(rig, 7)
    other = await posted(rig, one, tag="other")
    await audited(rig)
    [item] = await standing(rig)
    args = {**item["action"]["args"], "usages": [other.id]}
    if usages is None:
        del args["usages"]
    async with rig.store.write() as tx:
        await tx.execute(sa.update(schema.held).values(action=item["action"] | {"args": args}))
    await closed(rig, item["id"], "written off")
    assert kinds(await reconciled(rig)) == []
