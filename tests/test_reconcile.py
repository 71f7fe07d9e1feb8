"""Reconcile: what differs between Amplify, the ledger and Recurly is found, mended where that is safe."""

from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import count

import pytest
from rig import HOUR, Json, Rig, a_rig

from billingd.sandbox.recurly.model import Usage
from billingd.store import schema

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
DAY = timedelta(days=1)
numbers = count(1)


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


async def reported(rig: Rig, units: int) -> Usage:
    """Units that are served and reported in one record."""
    before = set(rig.world.site.usages)
    await rig.traffic("acme", units)
    await rig.report()
    [made] = set(rig.world.site.usages) - before
    return rig.world.site.usages[made]


async def reconciled(rig: Rig, **asked: object) -> Json:
    """A whole run."""
    rig.pass_(timedelta(minutes=2))  # what has just been reported is not missed yet
    run = await rig.daemon.reconciler.start(**asked)  # type: ignore[arg-type]
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert found["state"] == "done", found["error"]
    return found


async def repaired(rig: Rig) -> Json:
    """A run that repairs, and what it leads to."""
    found = await reconciled(rig, repair=True)
    await rig.work(timedelta(minutes=10))
    return found


def kinds(found: Json) -> list[tuple[str, int]]:
    return [(one["kind"], one["units"]) for one in found["drift"]]


async def test_nothing_differs(rig: Rig) -> None:
    """Served, recorded, billed: the same."""
    await reported(rig, 7)
    await reported(rig, 5)
    found = await reconciled(rig)
    assert kinds(found) == []
    assert (found["drift_units"], found["left"], found["checked"]) == (
        0,
        0,
        {"subscriptions": 1, "records": 2},
    )


async def test_a_record_removed_at_recurly_is_posted_again(rig: Rig) -> None:
    """Under its tag, once; the history says that it was there before."""
    one = await reported(rig, 7)
    await reported(rig, 5)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    found = await reconciled(rig)
    [drift] = found["drift"]
    assert (drift["kind"], drift["units"], drift["repairable"]) == ("missing_record", 7, True)
    assert drift["tag"] == one.merchant_tag
    found = await repaired(rig)
    assert (found["repaired_units"], rig.units()) == (7, 12)
    assert set(rig.tags().values()) == {1}
    assert kinds(await reconciled(rig)) == []
    assert "gone_at_recurly" in [row["kind"] for row in await rig.rows(schema.history)]
    assert await rig.dead() == []
