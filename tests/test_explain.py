"""Explain: a usage record back to the readings and attempts that made it; a subscription forward to all."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, SETTLING, Rig, a_rig

from billingd.admin import operations
from billingd.admin.explain import explain
from billingd.domain.errors import NotFound
from billingd.store import schema

USAGE = "/subscriptions/*/add_ons/*/usage"


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url) as made:
        await made.product()
        await made.plan()
        await made.work()
        await made.subscribe()
        await made.work()
        yield made


async def told(rig: Rig, about: str) -> dict[str, Any]:
    return await explain(rig.store, about, now=rig.clock.now())


async def tags(rig: Rig) -> list[str]:
    return [row["merchant_tag"] for row in await rig.rows(schema.usage_records)]


async def test_a_record_leads_back_to_its_window_readings_and_sending(rig: Rig) -> None:
    at = rig.clock.now()
    await rig.traffic("acme", 7, at=at.isoformat())
    await rig.report()
    [first] = await tags(rig)
    await rig.traffic("acme", 5, at=at.isoformat())  # late, in the same window
    rig.pass_(HOUR)
    await rig.report()
    [_, second] = await tags(rig)
    found = await told(rig, second)
    assert found["units"] == 5
    assert found["revision"] == 2
    assert [reading["units"] for reading in found["readings"]] == [7, 12]
    assert [reading["tag"] for reading in found["readings"]] == [first, second]
    assert found["readings"][0]["read_at"] < found["readings"][1]["read_at"]
    assert found["window"]["start"] <= at.isoformat().replace("+00:00", "Z") < found["window"]["end"]
    assert found["state"] == "reported"
    [usage] = [one for one in rig.world.site.usages.values() if one.merchant_tag == second]
    assert found["recurly_usage_id"] == usage.id == found["sending"]["result"]
    assert found["sending"]["sends"] == 1
    assert found["action"]["state"] == "done"
    assert found["history"] == found["held"] == []


async def test_an_attempt_without_an_answer_and_a_refusal_are_told(rig: Rig) -> None:
    """Every attempt that did not simply succeed stays in the history, with its key and its outcome."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", USAGE, times=1)
    await rig.report()
    rig.pass_(SETTLING + timedelta(seconds=10))
    await rig.work(LOOK_AGAIN)
    [tag] = await tags(rig)
    found = await told(rig, tag)
    assert found["state"] == "reported"
    kinds = [entry["kind"] for entry in found["history"]]
    assert kinds == ["unanswered", "found"]
    assert found["history"][0]["key"] == found["sending"]["key"]
    assert found["history"][1]["result"] == found["recurly_usage_id"]


async def test_what_operators_did_is_told_with_the_record(rig: Rig) -> None:
    at = rig.clock.now()
    await rig.move("acme", "cancel")
    rig.pass_(2 * HOUR)
    await rig.traffic("acme", 7, at=(at + timedelta(minutes=80)).isoformat(), force=True)
    await rig.work(HOUR)
    await rig.report()
    [tag] = await tags(rig)
    [item] = [row for row in await rig.rows(schema.held) if row["subject"] == f"usage:{tag}"]
    assert await operations.write_off(rig.store, item["id"], reason="too little", now=rig.clock.now())
    found = await told(rig, tag)
    assert found["state"] == "written_off"
    [entry] = found["history"]
    assert (entry["kind"], entry["by"], entry["reason"]) == ("written_off", "operator", "too little")
    [held] = found["held"]
    assert held["resolution"] == "written off: too little"
    assert held["amount"] == "3.5"


async def test_a_release_and_a_discard_are_told_too(rig: Rig) -> None:
    await rig.traffic("acme", 7)
    rig.fault("500", "*", USAGE, times=None)
    await rig.report()
    [tag] = await tags(rig)
    [action] = [row for row in await rig.rows(schema.outbox) if row["kind"] == "report_usage"]
    assert await operations.discard(rig.store, action["id"], reason="a test", now=rig.clock.now())
    rig.world.faults.clear()
    [item] = [row for row in await rig.rows(schema.held) if row["kind"] == "usage_discarded"]
    assert await operations.release(rig.store, item["id"], now=rig.clock.now())
    await rig.work(SETTLING + HOUR)
    found = await told(rig, tag)
    assert found["state"] == "reported"
    told_of = [entry["kind"] for entry in found["history"] if entry.get("by") == "operator"]
    assert told_of == ["discarded", "released"]


async def test_a_subscription_leads_forward_to_its_records_and_next_invoice(rig: Rig) -> None:
    await rig.traffic("acme", 7)
    await rig.report()
    await rig.traffic("acme", 5)
    await rig.report()
    [link] = await rig.rows(schema.subscription_links)
    for about in (link["subscription_id"], link["uuid"], "acme"):
        found = await told(rig, about)
        assert found["subscription"]["id"] == link["subscription_id"]
    assert sorted(row["tag"] for row in found["records"]) == sorted(await tags(rig))
    [total] = found["totals"]
    assert (total["recorded_units"], total["reported_units"], total["held_units"]) == (12, 12, 0)
    [line] = found["next_invoice"]["lines"]
    assert (line["units"], line["amount"], line["currency"]) == (12, "6", "USD")
    assert line["corrected_units"] == 0
    assert found["next_invoice"]["period_ends_at"] == found["periods"][-1]["ends_at"]


async def test_a_correction_of_a_billed_cycle_is_no_part_of_the_open_one(rig: Rig) -> None:
    at = rig.clock.now()
    await rig.traffic("acme", 7, at=at.isoformat())
    await rig.report()
    rig.pass_(timedelta(minutes=1))
    await rig.renew()
    await rig.traffic("acme", 4, at=at.isoformat())
    await rig.work(HOUR)
    await rig.report()
    found = await told(rig, "acme")
    [line] = found["next_invoice"]["lines"]
    assert (line["units"], line["corrected_units"]) == (0, 4)


async def test_what_is_not_known_is_said_with_a_way_on(rig: Rig) -> None:
    with pytest.raises(NotFound, match="billingd reconcile"):
        await told(rig, "bd1:000000000000000000000000:20260302T100000Z:3600:1")
    with pytest.raises(NotFound, match="status --subscriptions"):
        await told(rig, "nobody")
