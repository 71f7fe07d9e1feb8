"""Explain: a usage record back to the readings and attempts that made it; a subscription forward to all."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, SETTLING, Rig, a_rig
from test_adoption import adopted, original, original_reports
from test_audit import audited
from test_reconcile import posted, reconciled, repaired, reported
from test_reconcile_drifts import VOLUME, Plants
from test_restore import go_on, put_back

from billingd.admin import operations
from billingd.admin.explain import explain
from billingd.admin.status import timestamp
from billingd.domain.errors import NotFound
from billingd.domain.events import plan_action
from billingd.store import copies, held, schema, usage
from billingd.store.stakes import at_stake

ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
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
    assert found["readings"][0]["booked_at"] < found["readings"][1]["booked_at"]
    assert found["window"]["start"] <= at.isoformat().replace("+00:00", "Z") < found["window"]["end"]
    assert found["state"] == "reported"
    [usage] = [one for one in rig.world.site.usages.values() if one.merchant_tag == second]
    assert found["recurly_usage_id"] == usage.id == found["sending"]["result"]
    assert found["sending"]["sends"] == 1
    assert found["action"]["state"] == "done"
    assert found["history"] == found["held"] == []


async def test_an_attempt_without_an_answer_is_told(rig: Rig) -> None:
    """It stays in the history, with its key and its outcome."""
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
    [attempt] = found["attempts"]
    assert (attempt["outcome"], attempt["unanswered_since"]) == ("done", found["history"][0]["at"])


async def test_a_refusal_is_told_with_its_key_and_the_sending_after_it(rig: Rig) -> None:
    """The key and time of what was refused stay, also once another key took effect."""
    await rig.traffic("acme", 7)
    rig.fault("422", "POST", USAGE, times=1)
    await rig.report()
    [tag] = await tags(rig)
    refused = await told(rig, tag)
    [entry] = refused["history"]
    assert (entry["kind"], entry["key"], entry["epoch"]) == ("refused", refused["sending"]["key"], 1)
    assert "simultaneous_request" in entry["error"]
    await rig.work(2 * HOUR)
    if items := [row for row in await rig.rows(schema.held) if row["closed_at"] is None]:
        assert await operations.release(rig.store, items[0]["id"], now=rig.clock.now())
        await rig.work(HOUR)
    found = await told(rig, tag)
    assert found["state"] == "reported"
    assert [(one["epoch"], one["outcome"]) for one in found["attempts"]] == [(1, "refused"), (2, "done")]
    assert found["attempts"][0]["key"] == entry["key"] != found["sending"]["key"]
    assert found["attempts"][0]["first_sent_at"] == refused["sending"]["first_sent_at"]
    assert "superseded" in [one["kind"] for one in found["history"]]


@ONE_DATABASE
async def test_a_process_that_dies_while_it_sends_leaves_its_key_and_time(rig: Rig) -> None:
    """Nobody heard the answer; an hour later another key is taken, and the first is told all the same."""
    await rig.traffic("acme", 7)
    rig.pass_(2 * HOUR)
    await rig.poll()
    for step in range(1, 20):
        saved = await rig.save()
        await rig.restart()
        rig.steps.arm(step)
        rig.steps.wire = True
        died = await rig.dies()
        rig.steps.wire = False
        assert died, "it never sent anything"
        if rig.steps.in_flight:
            break
        await rig.load(saved)
    rig.steps.in_flight.clear()  # it is lost on the way
    [tag] = await tags(rig)
    first = (await told(rig, tag))["sending"]
    rig.pass_(2 * HOUR)
    known_dead = timestamp(rig.clock.now())  # on SQLite, nobody else can be sending it
    await rig.restart()
    await rig.work(HOUR)
    found = await told(rig, tag)
    assert (found["state"], found["sending"]["sends"]) == ("reported", 2)
    dead, last = found["attempts"]
    assert (dead["key"], dead["first_sent_at"]) == (first["key"], first["first_sent_at"])
    assert (dead["epoch"], dead["outcome"], dead["unanswered_since"]) == (1, "open", known_dead)
    assert (last["epoch"], last["outcome"]) == (2, "done")


@ONE_DATABASE
async def test_a_plain_success_costs_no_row_of_history(rig: Rig) -> None:
    before = len(await rig.rows(schema.history))
    await rig.traffic("acme", 7)
    await rig.report()
    assert len(await rig.rows(schema.history)) == before
    [tag] = await tags(rig)
    [attempt] = (await told(rig, tag))["attempts"]
    assert (attempt["outcome"], attempt["epoch"]) == ("done", 1)


async def test_a_repair_is_told_with_what_it_posted_again(rig: Rig) -> None:
    """The id, key and times of the record that somebody removed at Recurly are not forgotten."""
    one = await reported(rig, 7)
    tag = one.merchant_tag or ""
    before = await told(rig, tag)
    await rig.recurly._adapter.remove_usage(one.id, key="by hand")
    await repaired(rig)
    await rig.work(HOUR)
    found = await told(rig, tag)
    assert found["state"] == "reported"
    assert found["recurly_usage_id"] != one.id
    [gone] = [entry for entry in found["history"] if entry["kind"] == "gone_at_recurly"]
    assert gone["usage_id"] == one.id == gone["result"]
    assert gone["reported_at"] == before["reported_at"]
    assert gone["key"] == before["sending"]["key"]
    first, last = found["attempts"]
    assert first == before["attempts"][0]
    assert (last["epoch"], last["result"]) == (2, found["recurly_usage_id"])


@ONE_DATABASE
async def test_a_correction_is_explained_by_its_own_tag_and_with_its_record(rig: Rig) -> None:
    """A billed record that somebody made larger: the repair takes the rest back on the next invoice."""
    one = await reported(rig, 7)
    tag = one.merchant_tag or ""
    await Plants(rig).call("PUT", f"/usage/{one.id}", {"amount": 9})
    rig.pass_(timedelta(minutes=1))
    await rig.renew()
    await rig.work(HOUR)
    await rig.report()
    for _ in range(2):
        await repaired(rig)
    assert rig.units() == 7
    found = await told(rig, tag)
    [correction] = found["corrections"]
    assert (correction["tag"], correction["units"]) == (f"{tag}~1", -2)
    assert found["units"] == 7
    its_own = await told(rig, correction["tag"])
    assert (its_own["corrects"], its_own["units"], its_own["state"]) == (tag, -2, "reported")
    assert its_own["recurly_usage_id"] == correction["recurly_usage_id"] == its_own["sending"]["result"]
    assert [attempt["outcome"] for attempt in its_own["attempts"]] == ["done"]
    invoice = (await told(rig, "acme"))["next_invoice"]
    [line] = invoice["lines"]
    assert (line["corrected_units"], line["corrected_amount"], invoice["total"]) == (-2, "-1", "9")
    with pytest.raises(NotFound, match="billingd reconcile"):
        await told(rig, f"{tag}~2")


async def test_what_an_audit_removed_or_found_is_told(rig: Rig) -> None:
    """Another one may stay than the one that was sent: both ids are told, and the key of the removal."""
    one = await reported(rig, 7)
    tag = one.merchant_tag or ""
    twin = await posted(rig, one)
    twin.billed_at = rig.far.now()  # it cannot be removed, so it is the one that stays
    await audited(rig)
    found = await told(rig, tag)
    assert found["recurly_usage_id"] == twin.id
    renamed, removing, removed = found["history"]
    assert (renamed["kind"], renamed["was"], renamed["usage_id"]) == ("renamed", one.id, twin.id)
    assert (removing["kind"], removing["usage_id"], removing["units"]) == ("removing_double", one.id, 7)
    assert removing["key"].startswith("bd1-")
    assert (removed["kind"], removed["usage_id"]) == ("double_removed", one.id)


@ONE_DATABASE
async def test_what_was_read_back_after_a_restore_is_told(rig: Rig, tmp_path: Path) -> None:
    """The copy knows nothing of one record, and not that the other arrived; neither was sent from here."""
    at = rig.clock.now()
    await rig.traffic("acme", 7, at=at.isoformat())
    rig.pass_(2 * HOUR)
    await rig.poll()
    copy = await copies.backup(rig.store, tmp_path / "copy.db", now=rig.clock.now())
    await rig.drain()
    await rig.traffic("acme", 5)
    await rig.report()
    await put_back(rig, copy)
    await go_on(rig)
    [waited, lacked] = [await told(rig, tag) for tag in await tags(rig)]
    for found in (waited, lacked):
        assert (found["state"], found["attempts"], found["sending"]) == ("reported", [], None)
        [entry] = found["history"]
        assert (entry["kind"], entry["usage_id"]) == ("read_back", found["recurly_usage_id"])
    assert waited["history"][0]["was"] == "recorded"


async def test_what_an_audit_found_after_all_is_told(rig: Rig) -> None:
    """It was given up while nobody knew that Recurly has it."""
    await rig.traffic("acme", 7)
    rig.fault("lost", "POST", USAGE, times=None)
    rig.fault("500", "GET", USAGE, times=None)
    await rig.report()
    [tag] = await tags(rig)
    [action] = [row for row in await rig.rows(schema.outbox) if row["kind"] == "report_usage"]
    assert await operations.discard(rig.store, action["id"], reason="a test", now=rig.clock.now())
    rig.world.faults.clear()
    assert rig.units() == 7
    await audited(rig)
    found = await told(rig, tag)
    assert found["state"] == "reported"
    entry = found["history"][-1]
    assert (entry["kind"], entry["was"]) == ("there_after_all", "held")
    assert entry["usage_id"] == found["recurly_usage_id"]


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
    assert (line["corrected_units"], line["corrected_amount"]) == (0, "0")
    invoice = found["next_invoice"]
    assert (invoice["base_price"], invoice["total"], invoice["currency"]) == ("10", "16", "USD")
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
    assert (line["units"], line["corrected_units"], line["corrected_amount"]) == (0, 4, "2")
    assert found["next_invoice"]["total"] == "12"


@ONE_DATABASE
async def test_a_correction_of_tiered_usage_costs_what_it_adds_to_its_own_cycle(store_url: str) -> None:
    """10 units at 1, the rest at 0.5: the cycle had 8, so that of 4 late ones 2 cost 1 and 2 cost 0.5."""
    tiers = [
        {"from": 1, "to": 10, "cost": 1, "flatFee": 0},
        {"from": 11, "to": 999_999_999, "cost": 0.5, "flatFee": 0},
    ]
    pricing = {"type": "graduated", "limit": {"type": "tiered", "tiers": tiers}}
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan(pricing=pricing)
        await rig.work()
        await rig.subscribe()
        await rig.work()
        at = rig.clock.now()
        await rig.traffic("acme", 8, at=at.isoformat())
        await rig.report()
        rig.pass_(timedelta(minutes=1))
        await rig.renew()
        await rig.traffic("acme", 4, at=at.isoformat())
        await rig.work(HOUR)
        await rig.report()
        invoice = (await told(rig, "acme"))["next_invoice"]
        [line] = invoice["lines"]
        assert (line["corrected_units"], line["corrected_amount"], invoice["total"]) == (4, "3", "13")


async def test_a_price_that_is_not_known_is_said_and_learnt(rig: Rig) -> None:
    """A store of a release that did not keep it; the next look at Recurly does."""
    async with rig.store.write() as tx:
        await tx.execute(schema.subscription_links.update().values(unit_amount=None))
    invoice = (await told(rig, "acme"))["next_invoice"]
    assert (invoice["base_price"], invoice["total"]) == (None, None)
    rig.pass_(HOUR)
    await rig.poll()
    assert (await told(rig, "acme"))["next_invoice"]["base_price"] == "10"


async def test_of_several_of_a_name_the_living_one_is_meant(rig: Rig) -> None:
    """Whichever id comes first; among the dead the one that was linked last."""
    ids = [row["subscription_id"] for row in await rig.rows(schema.subscription_links)]
    for _ in range(3):
        await rig.move("acme", "delete")
        await rig.work(2 * HOUR)
        await rig.report()
        ids.append(await rig.subscribe(account=False))
        await rig.work()
        found = await told(rig, "acme")
        assert found["subscription"]["id"] == ids[-1]
        assert found["others"] == ids[-2::-1]
    assert (await told(rig, ids[0]))["subscription"]["id"] == ids[0]
    await rig.move("acme", "delete")
    await rig.work(2 * HOUR)
    await rig.report()
    assert (await told(rig, "acme"))["subscription"]["id"] == ids[-1]


async def test_what_is_not_known_is_said_with_a_way_on(rig: Rig) -> None:
    with pytest.raises(NotFound, match="billingd reconcile"):
        await told(rig, "bd1:000000000000000000000000:20260302T100000Z:3600:1")
    with pytest.raises(NotFound, match="status --subscriptions"):
        await told(rig, "nobody")


async def test_a_subscription_that_waits_to_be_linked_says_for_what(rig: Rig) -> None:
    """By its name, or its id: the action, and what is held."""
    made = await rig.subscribe("poor", account=False)
    await rig.work()
    for about in ("poor", made):
        with pytest.raises(
            NotFound, match=r"is not linked yet: `billingd outbox show \d+`.* held item \d+: "
        ):
            await told(rig, about)


@ONE_DATABASE
async def test_the_first_invoice_after_an_adoption_has_more_than_is_known_here(store_url: str) -> None:
    """What the original integration reported is on it: no amount is better than a wrong one."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan(pricing=VOLUME)
        await original(rig, "acme")
        rig.pass_(3 * HOUR)
        await original_reports(rig, "acme", 95)
        rig.pass_(2 * HOUR)
        since = rig.far.now().replace(microsecond=0)
        rig.pass_(timedelta(minutes=1))
        await rig.traffic("acme", 10)
        await adopted(rig, since)
        await rig.report()
        invoice = (await told(rig, "acme"))["next_invoice"]
        [line] = invoice["lines"]
        assert (line["units"], line["amount"], invoice["total"]) == (10, None, None)
        assert "another integration" in line["why"]
        async with rig.store.read() as tx:
            assert await at_stake(tx, await usage.find(tx, 1)) is None
        rig.pass_(timedelta(minutes=1))
        await rig.renew()
        await rig.poll()
        await rig.drain()
        await rig.traffic("acme", 10)
        await rig.report()
        [line] = (await told(rig, "acme"))["next_invoice"]["lines"]
        assert (line["amount"], line["why"]) == ("20", None)


@ONE_DATABASE
@pytest.mark.parametrize("accepted", [False, True])
async def test_a_subscription_keeps_its_prices(rig: Rig, accepted: bool) -> None:
    """Where a run has seen that its plan has others by now, no amount is told at those."""
    await reported(rig, 8)
    for quota in rig.world.tenant.resources.of_kind("Quota"):
        quota.body["spec"]["pricing"]["cost"] = 2
    [plan] = rig.world.site.plans.values()
    [add_on] = await rig.rows(schema.add_on_links)
    prices = {"currencies": [{"currency": "USD", "unit_amount_decimal": "2"}]}
    await Plants(rig).call("PUT", f"/plans/code-{plan.code}/add_ons/code-{add_on['add_on_code']}", prices)
    [link] = await rig.rows(schema.plan_links)
    await rig.ask(plan_action(link["name"], link["plan_id"], because="test"))
    await rig.work(LOOK_AGAIN)
    for _ in range(2):
        await reconciled(rig)
    if accepted:
        async with rig.store.read() as tx:
            items = await held.standing(tx, kind="price_differs")
        for item in items:
            assert await operations.write_off(rig.store, item["id"], reason="meant", now=rig.clock.now())
        assert (await reconciled(rig))["drift"] == []
    invoice = (await told(rig, "acme"))["next_invoice"]
    [line] = invoice["lines"]
    assert (line["units"], line["amount"], invoice["total"]) == (8, None, None)
    assert "keeps those of the day it began" in line["why"]
    async with rig.store.read() as tx:
        assert await at_stake(tx, await usage.find(tx, 1)) is None


@ONE_DATABASE
async def test_what_people_did_to_a_released_report_is_told_with_its_tag(rig: Rig) -> None:
    """The action that a release made has a key of its own, and is about the same record."""
    await rig.traffic("acme", 7)
    rig.fault("500", "*", USAGE, times=None)
    await rig.report()
    [tag] = await tags(rig)
    for reason in ("at first", "once more"):
        [row] = [one for one in await rig.rows(schema.outbox) if one["state"] == "pending"]
        assert await operations.discard(rig.store, row["id"], reason=reason, now=rig.clock.now())
        [item] = [one for one in await rig.rows(schema.held) if one["closed_at"] is None]
        assert await operations.release(rig.store, item["id"], now=rig.clock.now())
    found = await told(rig, tag)
    said = [(one["kind"], one.get("reason")) for one in found["history"] if one.get("by") == "operator"]
    assert said == [
        ("discarded", "at first"),
        ("released", None),
        ("discarded", "once more"),
        ("released", None),
    ]
    newest = max(one["id"] for one in await rig.rows(schema.outbox) if one["kind"] == "report_usage")
    assert (found["action"]["id"], found["action"]["state"]) == (newest, "pending")
