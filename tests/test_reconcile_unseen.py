"""Reconcile and what it cannot look at: it hides nothing else, and what is not seen is not gone."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from rig import HOUR, LOOK_AGAIN, Json, Rig, a_rig
from test_adoption import found as adopted
from test_adoption import original
from test_reconcile import DAY, drift_status, kinds, posted, reconciled, repaired, reported
from test_reconcile_safely import by_itself, standing

from billingd.domain.errors import Refused, Retryable
from billingd.domain.windows import floor
from billingd.reconcile.document import time_text
from billingd.sandbox import control_amplify
from billingd.store import read_back, schema

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


async def two(rig: Rig) -> tuple[Any, Any]:
    """One record each of two subscriptions, that of the one compared last removed: the other, and whose."""
    await rig.subscribe("beta")
    await rig.work(10 * MINUTES)
    await reported(rig, 7)
    await rig.traffic("beta", 7)
    await rig.report()
    links = {row["uuid"]: row["subscription_id"] for row in await rig.rows(schema.subscription_links)}
    first, second = sorted(rig.world.site.usages.values(), key=lambda one: links[one.subscription.uuid])
    await rig.recurly._adapter.remove_usage(second.id, key="by hand")
    return first, links[first.subscription.uuid]


def names(found: Json) -> list[str | None]:
    return [one["subscription"] for one in found["not_compared"]]


async def test_an_answer_that_makes_no_sense_stops_nobody_else(rig: Rig) -> None:
    """Recurly's quantities may be fractions: that subscription is named at once, and the others compared."""
    first, name = await two(rig)
    odd = await posted(rig, first, tag="by hand")
    odd.amount = 1.5  # type: ignore[assignment]
    found = await reconciled(rig)
    assert kinds(found) == [("missing_record", 7)]
    [told] = found["not_compared"]
    assert (told["subscription"], "1.5, not a whole number" in told["reason"]) == (name, True)


async def test_one_that_stays_away_is_passed_over_while_others_answer(rig: Rig) -> None:
    """Not before it was tried for a while."""
    first, name = await two(rig)
    rig.fault("500", "GET", f"/subscriptions/uuid-{first.subscription.uuid}/**", times=None)
    run = await rig.daemon.reconciler.start()
    with pytest.raises(Retryable):
        await rig.daemon.reconciler.finish(run)
    rig.pass_(14 * MINUTES)
    with pytest.raises(Retryable):
        await rig.daemon.reconciler.finish(run)
    rig.pass_(2 * MINUTES)
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert (found["state"], kinds(found), names(found)) == ("done", [("missing_record", 7)], [name])


async def test_while_recurly_is_away_nobody_is_passed_over(rig: Rig) -> None:
    await two(rig)
    fault = rig.fault("not_json", "GET", times=None)
    run = await rig.daemon.reconciler.start()
    for _ in range(4):
        with pytest.raises(Retryable):
            await rig.daemon.reconciler.finish(run)
        rig.pass_(20 * MINUTES)
    rig.world.faults.remove(fault)
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert (kinds(found), names(found)) == ([("missing_record", 7)], [])


@pytest.mark.parametrize("kind", ["Subscription", "ProductPlan", "Quota"])
async def test_one_resource_that_makes_no_sense_fails_no_run(rig: Rig, kind: str) -> None:
    """Somebody else's, even: it is neither absent nor unlinked, and all else is compared."""
    one = await reported(rig, 7)
    attributes = {"billingSystem": "recurly"} if kind == "Quota" else {}
    await rig.play(control_amplify.add_product, {"name": "other", "attributes": attributes})
    quota = {"name": "q", "pricing": {"type": "perunit", "cost": 1}}
    plan = {"name": "foreign", "product": "other", "billing": {"price": 1}, "quotas": [quota]}
    await rig.play(control_amplify.add_plan, plan)
    await rig.subscribe("stranger", "foreign")
    for each in rig.world.tenant.resources.of_kind(kind):
        if kind == "Quota" and "foreign" in str(each.body["metadata"]):
            each.body["spec"]["pricing"] = {"type": "graduated"}
        elif each.name in {"stranger", "foreign"}:
            each.body["spec"].pop("product")
    await rig.work()
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    found = await reconciled(rig)
    assert (kinds(found), found["not_compared"]) == ([("missing_record", 7)], [])


@pytest.mark.parametrize("kind", ["Subscription", "ProductPlan"])
async def test_ours_that_makes_no_sense_is_named_and_not_over(rig: Rig, kind: str) -> None:
    [link] = await rig.rows(schema.subscription_links)
    for each in rig.world.tenant.resources.of_kind(kind):
        each.body["spec"].pop("product")
    found = await reconciled(rig)
    assert kinds(found) == []
    [told] = found["not_compared"]
    whose = link["subscription_id"] if kind == "Subscription" else None
    assert (told["subscription"], told["phase"], "spec.product is missing" in told["reason"]) == (
        whose,
        "links",
        True,
    )
    await rig.drain()
    assert sum("could not be compared" in text for text in rig.channels.provider) == 1


async def test_links_that_cannot_be_listed_keep_no_record_from_being_repaired(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")

    async def refused() -> None:
        raise Refused("not a list of resources")

    catalog = rig.daemon.reconciler._linkage._catalog
    monkeypatch.setattr(catalog, "survey_subscriptions", refused, raising=False)
    found = await reconciled(rig, repair=True)
    await rig.work(10 * MINUTES)
    assert (found["repaired_units"], rig.units()) == (7, 7)
    assert [one["phase"] for one in found["not_compared"]] == ["links"]


async def test_what_can_be_compared_no_more_still_stands(rig: Rig) -> None:
    """Late usage is held; then the window length changes: nobody says that it is gone."""
    rig.horizon = 6 * HOUR
    rig.start()
    await reported(rig, 7)
    at = rig.far.now() - 2 * HOUR
    for _ in range(4):
        rig.pass_(3 * HOUR)
        await rig.poll()
        await rig.drain()
    await rig.traffic("acme", 5, at=at, arrives=rig.far.now())
    for _ in range(2):
        assert kinds(await reconciled(rig)) == [("late_beyond_horizon", 5)]
    rig.window = timedelta(minutes=30)
    rig.start()
    for _ in range(3):
        rig.pass_(2 * HOUR)
        await rig.poll()
        await rig.drain()
    rig.channels.provider.clear()
    for _ in range(3):
        assert kinds(await reconciled(rig)) == [("late_beyond_horizon", 5)]
    await rig.drain()
    assert [item["kind"] for item in await standing(rig)] == ["late_beyond_horizon"]
    assert (await drift_status(rig), rig.channels.provider) == ((5, 1, True), [])


async def set_back(rig: Rig) -> None:
    """A drift that is known, then a watermark before it, as when a link is made again."""
    await reported(rig, 7)
    rig.pass_(2 * DAY)
    await rig.poll()
    await rig.traffic("acme", 5, at=rig.far.now() - 30 * HOUR)
    assert kinds(await reconciled(rig)) == [("late_beyond_horizon", 5)]
    await rig.drain()
    rig.channels.provider.clear()
    [link] = await rig.rows(schema.subscription_links)
    now = rig.far.now()
    async with rig.store.write() as tx:
        await read_back.read_again(
            tx, link["subscription_id"], now - 40 * HOUR, horizon=rig.horizon, now=rig.clock.now()
        )


async def test_what_is_to_be_read_again_is_read_and_compared(rig: Rig) -> None:
    """A run does not end at a watermark that was set back: what it finds there mends the drift."""
    await set_back(rig)
    found = await reconciled(rig)
    assert (kinds(found), found["not_compared"]) == ([], [])
    await rig.drain()
    assert rig.units() == 12


async def test_what_cannot_be_read_yet_is_said_and_still_stands(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run waits for ever, and none says that all agree; once it is read, it does."""
    await set_back(rig)

    async def hold_up() -> bool:
        return False

    with monkeypatch.context() as patched:
        patched.setattr(rig.poller, "run_once", hold_up)
        [mark] = await rig.rows(schema.watermarks)
        found = await reconciled(rig)
    assert kinds(found) == [("late_beyond_horizon", 5)]
    [told] = found["not_compared"]
    settled = floor(rig.far.now() - rig.settle, rig.window)
    assert (told["since"], told["until"]) == (time_text(mark["at"]), time_text(settled))
    await rig.drain()
    assert rig.channels.provider == []
    await reconciled(rig)
    await rig.drain()
    assert ["agree again" in told for told in rig.channels.provider] == [True]


async def test_a_clean_run_that_missed_windows_changes_nobodys_mind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differed lay elsewhere and is mended; of the rest nothing can be said yet."""
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    await reconciled(rig)
    await repaired(rig)
    rig.channels.provider.clear()
    rig.pass_(6 * HOUR)

    async def hold_up() -> bool:
        return False

    with monkeypatch.context() as patched:
        patched.setattr(rig.poller, "run_once", hold_up)
        found = await reconciled(rig)
    await rig.drain()
    assert (kinds(found), len(found["not_compared"]), rig.channels.provider) == ([], 1, [])
    await reconciled(rig)
    await rig.drain()
    assert ["agree again" in told for told in rig.channels.provider] == [True]


async def test_a_run_until_the_middle_of_a_window_mends_nothing_of_it(rig: Rig) -> None:
    one = await reported(rig, 7)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    await reconciled(rig)
    found = await reconciled(rig)
    start = datetime.fromisoformat(found["drift"][0]["window_start"])
    assert kinds(await reconciled(rig, since=start, until=start + 30 * MINUTES)) == []
    assert [item["kind"] for item in await standing(rig)] == ["missing_record"]
    assert await drift_status(rig) == (7, 1, True)


async def test_an_open_period_longer_than_a_month_is_compared_from_its_beginning(store_url: str) -> None:
    """At Recurly; Amplify's counts of so long ago are not, and that is said."""
    async with a_rig(store_url) as rig:
        await rig.product()
        interval = {"interval": {"type": "years", "length": 1}, "approval": "manual"}
        await rig.plan(billing={"price": 10, "interval": "annually"}, subscription=interval)
        await rig.work(10 * MINUTES)
        await rig.subscribe()
        await rig.work(20 * MINUTES)
        one = await reported(rig, 7)
        for _ in range(45):
            rig.pass_(DAY)
            await rig.poll()
            await rig.drain()
        await rig.recurly._adapter.remove_usage(one.id, key="by hand")
        await by_itself(rig)
        for _ in range(2):
            found = await reconciled(rig)
            assert kinds(found) == [("missing_record", 7)]
            [told] = found["not_compared"]
            assert (told["phase"], told["until"], told["subscription"]) == ("served", found["since"], None)
        assert [item["kind"] for item in await standing(rig)] == ["missing_record"]
        await reconciled(rig, repair=True)
        await rig.work(10 * MINUTES)
        assert kinds(await reconciled(rig)) == []
        assert (await standing(rig), rig.units()) == ([], 7)


async def test_a_lost_role_ends_nothing(rig: Rig) -> None:
    """What Amplify shows no more is not over; once it is noted as missing, a person is asked: that is all."""
    for name in ("b", "c", "d", "e"):
        await rig.subscribe(name)
        await rig.work(5 * MINUTES)
    rig.blind("Subscription", "ProductPlan")
    found = await reconciled(rig)
    assert {one["kind"] for one in found["drift"]} == {"link_orphaned"}
    assert all("not found at Amplify" in one["cause"] for one in found["drift"])
    for _ in range(2):
        await rig.daemon.resync.run_once()
        await rig.work(30 * MINUTES)
    assert "mass_absence" in await rig.held()
    assert kinds(await reconciled(rig)) == []


async def test_what_amplify_said_was_deleted_is_over(rig: Rig) -> None:
    """Though nothing has ended it yet."""
    await rig.move("acme", "delete")
    await rig.hear()
    async with rig.store.write() as tx:
        await tx.execute(sa.delete(schema.outbox))
    found = await reconciled(rig)
    assert [("is over at Amplify" in one["cause"]) for one in found["drift"]] == [True]


async def test_where_nobody_could_count_nothing_is_too_little(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is over, of whom no organization is known, where Amplify takes no such question."""
    await reported(rig, 7)
    await rig.move("acme", "cancel")
    await rig.work(6 * HOUR)
    await rig.report()
    async with rig.store.write() as tx:
        await tx.execute(sa.update(schema.subscription_links).values(organization_id=""))
    ask = rig.amplify._adapter.ask_traceability

    async def refuse(path: str, **asked: Any) -> Any:
        if path == "summary":
            raise Refused("no such grouping", code="400")
        return await ask(path, **asked)

    monkeypatch.setattr(rig.amplify._adapter, "ask_traceability", refuse)
    assert kinds(await reconciled(rig)) == []


async def test_a_plan_that_a_list_does_not_show_yet_is_not_missing(rig: Rig) -> None:
    await rig.plan("second")
    await rig.work()
    rig.world.site.configure(list_lag_seconds=30)
    run = await rig.daemon.reconciler.start()
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert found["drift"] == []


async def test_what_is_being_adopted_is_no_drift(store_url: str) -> None:
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await original(rig, "acme")
        rig.pass_(3 * HOUR)
        await adopted(rig, rig.far.now().replace(microsecond=0), dry_run=False)
        assert any("adopt" in key for key in await rig.unfinished())
        run = await rig.daemon.reconciler.start()
        await rig.daemon.reconciler.finish(run)
        found = await rig.daemon.reconciler.document(run)
        assert found is not None
        assert [one["cause"] for one in found["drift"]] == []


async def test_what_a_deprecated_plan_serves_and_nothing_bills_is_found(rig: Rig) -> None:
    await rig.subscribe("beta")
    await rig.move("beta", "approve")
    await rig.move_plan("metered", "deprecate")
    rig.unheard.clear()
    found = await reconciled(rig)
    assert ["nothing bills it" in one["cause"] for one in found["drift"]] == [True]
    await rig.daemon.resync.run_once()
    await rig.work(LOOK_AGAIN)
    assert kinds(await reconciled(rig)) == []
