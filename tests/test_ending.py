"""The end of a subscription: the last usage is reported, then it is over at Recurly, and only then."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from rig import HOUR, LOOK_AGAIN, Json, Rig, a_rig

from billingd.provisioning.ending import end_action
from billingd.store import schema

MINUTE = timedelta(minutes=1)
LINES = "/subscriptions/*/line_items"
ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


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


def billed(rig: Rig) -> Json:
    """The only subscription at Recurly."""
    [each] = rig.world.site.oracle()["subscriptions"]
    return dict(each)


def total(rig: Rig) -> float:
    """All that is on its invoices."""
    return sum(float(invoice["total"]) for invoice in billed(rig)["invoices"])


@pytest.mark.parametrize(
    ("store_url", "step"),
    [("sqlite", "cancel"), ("postgres", "delete"), ("postgres", "reject")],
    indirect=["store_url"],
)
async def test_the_last_usage_is_billed_before_the_end(rig: Rig, step: str) -> None:
    """Archived, deleted or rejected: every unit up to the end is on the final invoice."""
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    rig.pass_(HOUR)
    await rig.traffic("acme", 6)
    await rig.move("acme", step)
    await rig.work(HOUR)
    assert billed(rig)["state"] == "active", "its last windows are not read yet"
    [why] = await rig.waits("end_subscription")
    assert "until all traffic" in why
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    assert rig.ledger()["totals"]["billed_units"] == 10
    assert total(rig) == 10 + 10 * 0.5
    assert sum("has ended" in told for told in rig.channels.provider) == 1
    assert await rig.dead() == []
    await rig.settled()
    assert sum("has ended" in told for told in rig.channels.provider) == 1


async def test_it_does_not_end_before_everything_is_reported(rig: Rig) -> None:
    """All windows are read, but Recurly does not take usage: the end waits, and no unit is lost."""
    await rig.traffic("acme", 4)
    await rig.move("acme", "cancel")
    rig.fault("outage", "POST", "/subscriptions/*/add_ons/*/usage", times=None, args={"status": 503})
    await rig.work()
    await rig.report()
    await rig.work(LOOK_AGAIN)
    assert billed(rig)["state"] == "active"
    [why] = await rig.waits("end_subscription")
    assert "1 usage record" in why
    rig.world.faults.clear()
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    assert rig.ledger()["totals"]["billed_units"] == 4


async def test_cancel_lets_it_run_to_the_bill_date(store_url: str) -> None:
    """With `on_cancel = cancel` the usage is billed with the period."""
    async with a_rig(store_url) as rig:
        rig.on_cancel = "cancel"
        rig.start()
        await rig.product()
        await rig.plan()
        await rig.work()
        acme = await rig.subscribe()
        await rig.work()
        await rig.traffic("acme", 4)
        await rig.move("acme", "cancel")
        await rig.settled()
        assert billed(rig)["state"] == "canceled"
        link = await rig.link(acme)
        assert link is not None
        assert link.state == "ended"
        await rig.report()
        await rig.renew()
        assert billed(rig)["state"] == "expired"
        assert rig.ledger()["totals"]["billed_units"] == 4


@ONE_DATABASE
@pytest.mark.parametrize("on_cancel", ["terminate", "cancel"])
async def test_one_that_is_over_at_recurly_already_is_enough(rig: Rig, on_cancel: str) -> None:
    """Dunning or a person ended it: the link ends, nothing is sent."""
    rig.on_cancel = on_cancel
    rig.start()
    rig.world.site.expire(billed(rig)["uuid"])
    rig.world.calls.clear()
    await rig.move("acme", "cancel")
    await rig.settled()
    assert not [path for path in rig.world.calls if path.startswith(("recurly DELETE", "recurly PUT"))]
    assert await rig.dead() == []
    [row] = await rig.rows(schema.subscription_links)
    assert row["state"] == "ended"


@ONE_DATABASE
async def test_a_termination_without_an_answer_is_found(rig: Rig) -> None:
    """The subscription expired although nobody said so."""
    rig.fault("lost", "DELETE", "/subscriptions/*", times=2)
    await rig.move("acme", "cancel")
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    assert await rig.dead() == []


@ONE_DATABASE
async def test_usage_that_arrives_after_the_end_is_held(rig: Rig) -> None:
    """No invoice would ever carry it: it waits for a person, with its units."""
    await rig.traffic("acme", 4)
    await rig.traffic("acme", 3, arrives=rig.far.now() + 8 * HOUR)
    await rig.move("acme", "cancel")
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    rig.pass_(8 * HOUR)
    await rig.report()
    assert set(await rig.held()) == {"usage_after_end"}
    assert await rig.totals() == {"reported": 4, "held": 3}
    assert rig.ledger()["totals"]["billed_units"] == 4


@ONE_DATABASE
async def test_migrated_ends_the_old_and_links_the_new(rig: Rig) -> None:
    """The new subscription inherits its approval and is never pending; both are billed for their own."""
    await rig.plan("gold")
    await rig.work()
    await rig.traffic("acme", 4)
    rig.pass_(HOUR)
    made = await rig.move("acme", "migrate", plan="gold")
    await rig.work()
    rig.pass_(HOUR)
    await rig.traffic(made["name"], 5)
    await rig.settled()
    await rig.report()
    states = {each["plan"]: each["state"] for each in rig.world.site.oracle()["subscriptions"]}
    assert sorted(states.values()) == ["active", "expired"]
    book = rig.ledger()
    assert book["totals"]["reported_units"] == 9
    assert book["agrees"]


@ONE_DATABASE
async def test_an_end_that_nobody_asked_for_does_nothing(rig: Rig) -> None:
    """A stale or foreign action finds a link that is not ending, or none."""
    [row] = await rig.rows(schema.subscription_links)
    await rig.ask(end_action(row["subscription_id"]))
    await rig.ask(end_action("nobody"))
    await rig.settled()
    assert billed(rig)["state"] == "active"


@pytest.mark.parametrize(
    ("store_url", "later"), [("sqlite", "soon"), ("postgres", "after the key")], indirect=["store_url"]
)
async def test_a_crash_at_any_step_of_the_end_loses_no_unit(store_url: str, later: str) -> None:
    """The end is reached, everything is billed, nobody is told of two ends."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await rig.work()
        step, died = 0, True
        while died:
            step += 1
            name = f"crash-{step}"
            subscription_id = await rig.subscribe(name)
            await rig.work()
            await rig.traffic(name, step)
            await rig.move(name, "cancel")
            await rig.work()
            rig.pass_(2 * HOUR)
            await rig.poll()
            rig.steps.arm(step)
            died = await rig.dies()
            if later == "after the key":
                rig.pass_(2 * HOUR)
            rig.start()
            await rig.settled()
            [ended] = rig.billed(subscription_id)
            assert ended["state"] == "expired"
            assert sum(add_on["billed_units"] for add_on in ended["add_ons"].values()) == step
        assert step > 6
        assert rig.ledger()["agrees"]
        assert await rig.dead() == []


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_link_that_comes_late_has_its_older_windows_read_before_the_end(store_url: str) -> None:
    """Made at Recurly, the answer lost, approved by a person, served, read as nobody's, cancelled: billed."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        await rig.work()
        await rig.subscribe("other")  # so that Amplify is asked for this organisation at all
        await rig.work()
        rig.fault("lost", "POST", "/subscriptions")
        acme = await rig.subscribe("acme")
        await rig.hear()
        await rig.drain()
        await rig.move("acme", "approve")
        await rig.traffic("acme", 5)
        await rig.move("acme", "cancel")
        rig.pass_(4 * HOUR)
        await rig.poll()  # the watermark is past the end before the link is there
        await rig.settled()
        [link] = [row for row in await rig.rows(schema.subscription_links) if row["subscription_id"] == acme]
        assert link["state"] == "ended"
        assert await rig.held() == {}
        assert await rig.rows(schema.unlinked_traffic) == []
        [served] = [one for one in rig.ledger()["subscriptions"] if one["id"] == acme]
        assert (served["served_units"], served["billed_units"]) == (5, 5)


@ONE_DATABASE
@pytest.mark.parametrize("resumed", [False, True])
async def test_a_renewal_that_was_charged_is_told_although_it_was_paused_since(
    rig: Rig, resumed: bool
) -> None:
    """The invoices say what was charged: the renewal and the cycle after the pause, but not the pause."""
    uuid = billed(rig)["uuid"]
    await rig.move("acme", "cancel")
    await rig.work()
    charged: list[str] = []
    free: list[str] = []
    steps = [(rig.world.site.renew, charged), (rig.world.site.pause, free)]
    for happens, told in [*steps, (rig.world.site.resume, charged)] if resumed else steps:
        rig.pass_(15 * MINUTE)
        happens(uuid)
        told.append(rig.far.now().isoformat())
        rig.pass_(MINUTE)
        await rig.poll()  # so that billingd sees each
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    reason = (await rig.held())["renewed_after_end"]
    assert all(moment in reason for moment in charged)
    assert free[0] not in reason


@ONE_DATABASE
async def test_a_pause_was_not_charged_whatever_the_answer_to_its_end(rig: Rig) -> None:
    """The terminate's answer is lost, so the retry sees it expired: nobody is asked for a refund."""
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(5 * MINUTE)
    rig.world.site.pause(billed(rig)["uuid"])
    rig.fault("lost", "DELETE", "/subscriptions/*", times=2)
    await rig.settled()
    assert rig.world.faults.counts["lost"] >= 1
    assert billed(rig)["state"] == "expired"
    assert await rig.held() == {}
    assert await rig.dead() == []


@ONE_DATABASE
async def test_only_the_base_price_counts_as_charged(rig: Rig) -> None:
    """Usage lines have the dates of their cycle, those of the final invoice too."""
    uuid = billed(rig)["uuid"]
    subscription = rig.world.site.subscription_by_uuid[uuid]
    await rig.traffic("acme", 4)
    await rig.report()
    await rig.renew()
    rig.pass_(MINUTE)
    await rig.traffic("acme", 3)
    rig.world.site.pause(uuid)
    subscription.cycle.kind = "paid"  # as if Recurly put usage of a pause on the final invoice
    rig.pass_(MINUTE)
    rig.world.site.expire(uuid)
    first, second, pause = (cycle.started_at for cycle in subscription.cycles)
    assert pause in {line.start_date for line in subscription.invoices[-1].lines}
    assert pause in await rig.recurly.list_billed_edges(uuid, since=first)
    assert await rig.recurly.list_charged_starts(uuid, since=first) == {first, second}
    assert await rig.recurly.list_charged_starts(uuid, since=first + MINUTE) == {second}


@ONE_DATABASE
async def test_a_renewal_for_nothing_needs_no_refund(rig: Rig) -> None:
    """A base price of 0 is on the invoice too."""
    rig.world.site.subscription_by_uuid[billed(rig)["uuid"]].unit_amount *= 0
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(5 * MINUTE)
    await rig.renew()
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    assert await rig.held() == {}


@ONE_DATABASE
@pytest.mark.parametrize("trouble", ["outage", "list_lag"])
async def test_what_was_charged_is_told_once_the_invoices_can_be_read(rig: Rig, trouble: str) -> None:
    """It renews right before its end, and the line items are not there, or not shown yet."""
    await rig.move("acme", "cancel")
    await rig.work()
    rig.pass_(3 * HOUR)
    await rig.poll()
    await rig.renew()
    if trouble == "list_lag":
        rig.fault(trouble, "GET", LINES, times=None, args={"seconds": 60})
    else:
        rig.fault(trouble, "GET", LINES, times=2)
    await rig.drain()
    assert billed(rig)["state"] == "expired"
    [row] = await rig.rows(schema.subscription_links)
    assert (row["state"], await rig.held()) == ("ending", {}), "what is to be told is not known yet"
    await rig.work(HOUR)
    assert list(await rig.held()) == ["renewed_after_end"]
    [row] = await rig.rows(schema.subscription_links)
    assert row["state"] == "ended"
    assert (await rig.dead(), sum("renewed too late" in told for told in rig.channels.provider)) == ([], 1)


@pytest.mark.parametrize("steps", [("reject",), ("cancel", "delete")], ids=["rejected", "archived, deleted"])
async def test_a_renewal_before_its_end_was_heard_is_told(rig: Rig, steps: tuple[str, ...]) -> None:
    """Two days away: the event says since when it is over, and what was charged since wants a refund."""
    rig.watch()
    await rig.catch_up()
    rig.pass_(HOUR)
    over_at = rig.far.now()
    await rig.move("acme", steps[0])
    rig.pass_(HOUR)
    await rig.renew()
    rig.pass_(HOUR)
    for step in steps[1:]:
        await rig.move("acme", step)
    rig.pass_(timedelta(days=2))
    for _ in range(6):
        await rig.catch_up()
        await rig.poll()
        await rig.work(HOUR)
    assert billed(rig)["state"] == "expired"
    reason = (await rig.held())["renewed_after_end"]
    assert "between" in reason
    assert over_at.strftime("%Y-%m-%dT%H:%M") in reason


@ONE_DATABASE
@pytest.mark.parametrize("renewed", ["before the listing", "after it"])
async def test_a_rejection_that_nobody_told_of_is_dated_by_the_last_listing(rig: Rig, renewed: str) -> None:
    """No webhook, no feed: what renewed since everything was listed may be charged for nothing."""
    if renewed == "before the listing":
        rig.pass_(HOUR)
        await rig.renew()
        await rig.work()
    await rig.daemon.resync.run(dry_run=False)
    await rig.drain()
    rig.pass_(HOUR)
    await rig.move("acme", "reject")
    if renewed == "after it":
        await rig.renew()
    rig.pass_(7 * HOUR)
    for _ in range(6):
        rig.unheard.clear()
        await rig.daemon.resync.run_once()
        await rig.drain()
        await rig.poll()
        rig.pass_(HOUR)
    assert billed(rig)["state"] == "expired"
    assert list(await rig.held()) == ([] if renewed == "before the listing" else ["renewed_after_end"])


async def test_a_rejection_taken_back_dates_no_later_end(rig: Rig) -> None:
    """It was served since, and renewed honestly: its deletion, heard at once, asks for no refund."""
    rig.pass_(HOUR)
    await rig.move("acme", "reject")
    await rig.hear()
    await rig.drain()
    rig.pass_(5 * MINUTE)
    await rig.move("acme", "approve")
    await rig.settled()
    rig.pass_(timedelta(days=2))
    await rig.renew()
    await rig.work()
    rig.pass_(timedelta(days=1))
    await rig.poll()
    await rig.move("acme", "delete")
    await rig.settled()
    assert billed(rig)["state"] == "expired"
    assert await rig.held() == {}


@ONE_DATABASE
async def test_a_deletion_that_nobody_told_of_is_dated_by_when_it_was_last_there(rig: Rig) -> None:
    """Later listings, in which it is missing already, date nothing."""
    for name in ("bolt", "cord", "dart"):
        await rig.subscribe(name)
    await rig.work()
    await rig.daemon.resync.run(dry_run=False)
    rig.pass_(HOUR)
    await rig.move("acme", "delete")
    rig.pass_(HOUR)
    await rig.renew()
    rig.pass_(4 * HOUR)
    for _ in range(4):
        rig.unheard.clear()
        await rig.daemon.resync.run(dry_run=False)
        await rig.drain()
        rig.pass_(5 * MINUTE)
    for _ in range(8):
        rig.unheard.clear()
        await rig.poll()
        await rig.drain()
        rig.pass_(HOUR)
    assert sorted(each["state"] for each in rig.world.site.oracle()["subscriptions"]).count("expired") == 1
    assert list(await rig.held()) == ["renewed_after_end"]
