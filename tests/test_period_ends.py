"""Period ends: each unit on the bill of the cycle it was served in, or held with what is at stake."""

import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from rig import HOUR, LOOK_AGAIN, Json, Rig, a_rig

from billingd.admin import operations
from billingd.domain.events import parse_recurly
from billingd.sandbox.recurly.model import Subscription
from billingd.store import schema
from billingd.store.watermarks import find as find_watermark

START = datetime(2026, 3, 2, 10, 45, tzinfo=UTC)
"""A quarter to: every period ends inside a window."""
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)

TIERS: list[Json] = [
    {"from": 1, "to": 10, "cost": 2, "flatFee": 0},
    {"from": 11, "to": 999999999, "cost": 1, "flatFee": 0},
]
PRICES: dict[str, Json] = {
    "flat": {"type": "perunit", "cost": 0.5},
    "tiered": {"type": "graduated", "limit": {"type": "tiered", "tiers": TIERS}},
    "volume": {"type": "volume", "limit": {"type": "tiered", "tiers": TIERS}},
}
DAILY: Json = {
    "billing": {"price": 10, "interval": "daily"},
    "subscription": {"interval": {"type": "days", "length": 1}},
}


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    async with a_rig(store_url, start=START) as made:
        await made.product()
        yield made


async def subscribed(rig: Rig, price: str, *, trial_days: int = 0) -> Subscription:
    """A daily plan of that price with one subscriber, as Recurly has it."""
    await rig.plan(pricing=PRICES[price], **DAILY)
    await rig.work()
    if trial_days:
        await rig.subscribe_to_a_trial(trial_days)
    else:
        await rig.subscribe()
        await rig.work()
    rig.channels.provider.clear()
    [made] = rig.world.site.subscriptions.values()
    return made


async def live(rig: Rig, until: datetime) -> None:
    """The daemon lives on: it polls every half hour, and when a bill is near."""
    while (now := rig.far.now()) < until:
        flush = await rig.poller.until_flush()
        rig.pass_(min(HOUR / 2, until - now, flush or HOUR))
        await rig.work()
        await rig.poll()
        await rig.work()


def by_cycle(subscription: Subscription) -> dict[int, int]:
    """Units at Recurly by the cycle they are billed in."""
    units = Counter[int]()
    for usage in subscription.add_ons[next(iter(subscription.add_ons))].book.all_by_usage:
        units[usage[2].cycle] += usage[2].amount
    return dict(units)


def lines(subscription: Subscription) -> list[tuple[int, Decimal, bool]]:
    """(units, amount, correction) of each usage line that charges something, invoice by invoice."""
    return [
        (line.units, line.amount, line.correction)
        for invoice in subscription.invoices
        for line in invoice.lines
        if line.add_on is not None and line.units
    ]


async def held_items(rig: Rig) -> list[Json]:
    return [row for row in await rig.rows(schema.held) if row["closed_at"] is None]


def notices(rig: Rig) -> int:
    return sum("Usage is held" in told for told in rig.channels.provider)


@pytest.mark.parametrize("price", list(PRICES))
async def test_a_window_that_a_bill_cuts_is_billed_on_both_sides(rig: Rig, price: str) -> None:
    """Served before and after the renewal, in one window: each bill has its own units."""
    subscription = await subscribed(rig, price)
    end = subscription.cycle.ends_at
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await live(rig, end + 5 * MINUTE)
    await rig.traffic("acme", 7)
    await live(rig, end + 4 * HOUR)
    assert by_cycle(subscription) == {0: 5, 1: 7}
    await live(rig, end + DAY + MINUTE)
    charge = {"flat": ["2.50", "3.50"], "tiered": ["10", "14"], "volume": ["10", "14"]}[price]
    assert lines(subscription) == [(5, Decimal(charge[0]), False), (7, Decimal(charge[1]), False)]
    assert rig.ledger()["agrees"]
    assert (await rig.held(), await rig.dead()) == ({}, [])
    assert set(rig.tags().values()) == {1}


@pytest.mark.parametrize("price", ["flat", "tiered"])
@ONE_DATABASE
async def test_what_comes_late_is_a_correction_at_its_own_time(rig: Rig, price: str) -> None:
    """Counted by Amplify only after the bill: it goes to the cycle it was served in, on the next bill."""
    subscription = await subscribed(rig, price)
    end = subscription.cycle.ends_at
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 9)
    await rig.traffic("acme", 4, arrives=end + 3 * HOUR)
    await live(rig, end + 5 * MINUTE)
    await rig.traffic("acme", 7)
    await live(rig, end + 5 * HOUR)
    assert by_cycle(subscription) == {0: 13, 1: 7}
    late = max(rig.world.site.usages.values(), key=lambda usage: usage.order)
    assert (late.amount, late.usage_timestamp) == (4, end - SECOND)
    await live(rig, end + DAY + MINUTE)
    charge = {"flat": ["4.50", "2", "3.50"], "tiered": ["18", "5", "14"]}[price]
    assert sorted(lines(subscription)) == sorted(
        [(9, Decimal(charge[0]), False), (4, Decimal(charge[1]), True), (7, Decimal(charge[2]), False)]
    )
    assert rig.ledger()["agrees"]
    assert await rig.held() == {}


async def test_before_its_end_a_cycle_is_read_up_to_the_present(rig: Rig) -> None:
    """Ten and three minutes before: the bill of volume prices, which take no corrections, is complete."""
    subscription = await subscribed(rig, "volume")
    end = subscription.cycle.ends_at
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await live(rig, end - 9 * MINUTE)
    assert rig.units() == 5, "ten minutes before"
    await rig.traffic("acme", 3)
    await live(rig, end + MINUTE)
    assert by_cycle(subscription) == {0: 8}, "three minutes before"
    stamps = [usage.usage_timestamp for usage in rig.world.site.usages.values()]
    assert all(at < end - 4 * MINUTE for at in stamps)
    await live(rig, end + 4 * HOUR)
    assert lines(subscription) == [(8, Decimal(16), False)]
    assert (await rig.held(), rig.ledger()["agrees"]) == ({}, True)


async def test_what_misses_the_bill_of_volume_prices_is_held_with_what_is_at_stake(rig: Rig) -> None:
    """Told once a day; released it is sent, refused by Recurly, and held again with its words."""
    subscription = await subscribed(rig, "volume")
    end = subscription.cycle.ends_at
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await live(rig, end - MINUTE)
    await rig.traffic("acme", 4)  # nobody reads again before the bill
    await live(rig, end + 3 * HOUR)
    [item] = await held_items(rig)
    assert (item["kind"], item["units"], item["currency"]) == ("late_usage", 4, "USD")
    assert Decimal(item["amount"]) == 8, "nine units cost 18, where five were billed for 10"
    assert "volume" in item["reason"]
    assert notices(rig) == 1
    assert "At stake: 8" in rig.channels.provider[0]
    assert await rig.totals() == {"reported": 5, "held": 4}
    await rig.traffic("acme", 1, at=end - 2 * MINUTE)
    await live(rig, end + 5 * HOUR)
    assert [each["units"] for each in await held_items(rig)] == [4, 1]
    assert Decimal((await held_items(rig))[1]["amount"]) == 2
    assert notices(rig) == 1, "one a day for each add-on"
    assert by_cycle(subscription) == {0: 5}

    assert await operations.release(rig.store, item["id"], now=rig.far.now())
    await rig.work(HOUR)
    again = (await held_items(rig))[-1]
    assert (again["kind"], again["units"]) == ("late_usage", 4)
    assert Decimal(again["amount"]) == 8
    assert "Recurly answered 422" in again["reason"]
    assert "corrections are not accepted" in again["reason"]
    assert by_cycle(subscription) == {0: 5}
    assert notices(rig) == 1
    assert (await rig.dead(), await rig.unfinished()) == ([], [])


@ONE_DATABASE
async def test_usage_from_before_a_pause_waits_for_its_end(rig: Rig) -> None:
    """The pause begins with the next cycle: what came too late for the bill goes out when it is over."""
    subscription = await subscribed(rig, "flat")
    end = subscription.cycle.ends_at
    rig.pass_(HOUR)
    await rig.traffic("acme", 4)
    rig.pass_(MINUTE)
    rig.world.site.pause(subscription.uuid)
    assert subscription.status == "paused"
    began = subscription.cycle.started_at
    await live(rig, began + 6 * HOUR)
    assert by_cycle(subscription) == {}
    assert "paused" in (await rig.waits("report_usage"))[0]
    link = await rig.link(str(subscription.given["po_number"]))
    assert link is not None
    assert link.billed_state == "paused"
    assert await rig.held() == {}
    await live(rig, max(end, subscription.cycle.ends_at) + 2 * LOOK_AGAIN)
    assert subscription.status == "active"
    assert by_cycle(subscription) == {0: 4}
    assert (await rig.held(), await rig.dead()) == ({}, [])


@pytest.mark.parametrize("price", ["flat", "volume"])
@ONE_DATABASE
async def test_usage_of_a_trial_is_reported_and_never_late(rig: Rig, price: str) -> None:
    """Nobody is billed for it; what is counted only after the trial is taken all the same."""
    subscription = await subscribed(rig, price, trial_days=1)
    end = subscription.cycle.ends_at
    assert subscription.cycle.kind == "trial"
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await rig.traffic("acme", 2, arrives=end + 3 * HOUR)
    await live(rig, end + 5 * MINUTE)
    await rig.traffic("acme", 7)
    await live(rig, end + 6 * HOUR)
    [(started_at, trial)] = [
        (row["started_at"], row["trial"])
        for row in await rig.rows(schema.billing_periods)
        if row["ends_at"] == end
    ]
    assert (started_at, bool(trial)) == (subscription.cycles[0].started_at, True)
    assert by_cycle(subscription) == {0: 7, 1: 7}
    await live(rig, end + DAY + MINUTE)
    assert [units for units, amount, _ in lines(subscription) if amount] == [7]
    assert await rig.held() == {}


@ONE_DATABASE
async def test_what_comes_after_dunning_has_ended_it_is_held(rig: Rig) -> None:
    """No invoice would carry it: what was reported before is on the last one, the rest a person decides."""
    subscription = await subscribed(rig, "flat")
    await rig.traffic("acme", 5)
    await live(rig, rig.far.now() + 4 * HOUR)
    await rig.traffic("acme", 3)
    rig.world.site.expire(subscription.uuid, "nonpayment")
    await live(rig, rig.far.now() + 4 * HOUR)
    assert set(await rig.held()) == {"ended_at_recurly", "usage_after_end"}
    [item] = [one for one in await held_items(rig) if one["kind"] == "usage_after_end"]
    assert (item["units"], Decimal(item["amount"])) == (3, Decimal("1.5"))
    assert by_cycle(subscription) == {0: 5}
    assert await rig.totals() == {"reported": 5, "held": 3}
    assert notices(rig) == 1


@ONE_DATABASE
async def test_one_that_ends_with_its_cycle_is_read_before_its_end_too(rig: Rig) -> None:
    """Somebody cancelled it at Recurly: its last bill is complete."""
    subscription = await subscribed(rig, "volume")
    end = subscription.cycle.ends_at
    rig.world.site.cancel(subscription.uuid, "bill_date")
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await live(rig, end + 4 * HOUR)
    assert subscription.status == "expired"
    assert lines(subscription) == [(5, Decimal(10), False)]
    assert set(await rig.held()) == {"ended_at_recurly"}, "Amplify serves it still"


async def hear_recurly(rig: Rig, subscription: Subscription, event: str) -> None:
    """A webhook of Recurly's, as it comes in."""
    body = {"id": subscription.id, "uuid": subscription.uuid, "object_type": "subscription"}
    await rig.listener._accept(parse_recurly(json.dumps(body | {"event_type": event}).encode(), None))


async def test_a_bill_date_that_a_person_moved_nearer_is_learnt_from_the_webhook(rig: Rig) -> None:
    """It is looked at again at once and the poller woken: the bill is complete."""
    subscription = await subscribed(rig, "volume")
    await rig.poll()
    await rig.traffic("acme", 5)
    rig.pass_(2 * MINUTE)
    end = rig.far.now() + 15 * MINUTE
    rig.world.site.move_bill_date(subscription.uuid, end)
    end = subscription.cycle.ends_at
    rig.poller.wake.clear()
    await hear_recurly(rig, subscription, "updated")
    await rig.work()
    assert rig.poller.wake.is_set()
    link = await rig.link(str(subscription.given["po_number"]))
    assert link is not None
    assert link.period_ends_at == end
    flush = await rig.poller.until_flush()
    assert flush is not None
    assert abs(end - flush - 10 * MINUTE - rig.far.now()) <= SECOND
    await live(rig, end + MINUTE)
    assert lines(subscription) == [(5, Decimal(10), False)]
    await rig.traffic("acme", 7)
    await live(rig, end + 4 * HOUR)
    assert by_cycle(subscription) == {0: 5, 1: 7}
    assert await rig.held() == {}


@ONE_DATABASE
async def test_a_bill_date_that_was_moved_without_a_word_is_seen_within_minutes(rig: Rig) -> None:
    """No webhook: the list of live subscriptions is read every ten minutes that are polled in."""
    subscription = await subscribed(rig, "flat")
    await live(rig, rig.far.now() + HOUR)
    rig.world.site.move_bill_date(subscription.uuid, rig.far.now() + 3 * HOUR)
    end = subscription.cycle.ends_at
    await live(rig, rig.far.now() + HOUR)
    link = await rig.link(str(subscription.given["po_number"]))
    assert link is not None
    assert link.period_ends_at == end


@pytest.mark.parametrize("price", ["flat", "tiered"])
@ONE_DATABASE
async def test_while_recurly_is_away_no_window_is_read_beyond_a_bill(rig: Rig, price: str) -> None:
    """Where the next bill cuts is not known; when Recurly is back, each unit is on its own bill."""
    subscription = await subscribed(rig, price)
    end = subscription.cycle.ends_at
    rig.pass_(end - 80 * MINUTE - rig.far.now())
    await rig.poll()
    await rig.work()
    rig.fault("outage", times=None)
    truth = Counter[int]()
    for number in range(8):
        await rig.traffic("acme", 2**number)
        truth[int(rig.far.now() >= end)] += 2**number
        rig.pass_(40 * MINUTE)
        await rig.poll()
        await rig.drain()
    assert rig.units() == 0
    async with rig.store.read() as tx:
        mark = await find_watermark(tx, "metrics")
    assert mark is not None
    assert mark.at <= end
    assert rig.far.now() > end + 3 * HOUR
    rig.world.faults.clear()
    await live(rig, rig.far.now() + 4 * HOUR)
    assert by_cycle(subscription) == truth
    assert len(truth) == 2
    assert (await rig.held(), await rig.dead(), rig.ledger()["agrees"]) == ({}, [], True)


@pytest.mark.parametrize("price", ["flat", "tiered"])
async def test_a_daemon_that_was_down_over_three_renewals_cuts_at_each(rig: Rig, price: str) -> None:
    """Periods that it never saw are read from the invoices: every cycle gets its own units."""
    subscription = await subscribed(rig, price)
    await rig.poll()
    truth = Counter[int]()
    began = subscription.cycle.started_at
    for number in range(190):
        rig.pass_(23 * MINUTE)
        await rig.traffic("acme", number + 1)
        truth[(rig.far.now() - began) // DAY] += number + 1
    assert len(subscription.cycles) == 4
    await rig.restart()
    await live(rig, rig.far.now() + 4 * HOUR)
    assert by_cycle(subscription) == truth
    assert (await rig.held(), await rig.dead(), rig.ledger()["agrees"]) == ({}, [], True)


@ONE_DATABASE
async def test_volume_units_of_three_bills_that_were_missed_are_held_with_their_stakes(rig: Rig) -> None:
    """The stakes of each cycle add up to what its bill would have been."""
    subscription = await subscribed(rig, "volume")
    await rig.poll()
    truth = Counter[int]()
    began = subscription.cycle.started_at
    for _ in range(14):
        rig.pass_(timedelta(hours=5, minutes=53))
        await rig.traffic("acme", 3)
        truth[(rig.far.now() - began) // DAY] += 3
    await rig.restart()
    await live(rig, rig.far.now() + 4 * HOUR)
    assert by_cycle(subscription) == {3: truth.pop(3)}
    items: list[dict[str, Any]] = await held_items(rig)
    assert {item["kind"] for item in items} == {"late_usage"}
    assert sum(item["units"] for item in items) == sum(truth.values())
    bills = sum(units * (2 if units <= 10 else 1) for units in truth.values())
    assert sum(Decimal(item["amount"]) for item in items) == bills
    assert await rig.dead() == []


@pytest.mark.parametrize("price", ["flat", "volume"])
@ONE_DATABASE
async def test_recurlys_bill_run_may_come_hours_after_the_end(rig: Rig, price: str) -> None:
    """Until then the old cycle takes what was served in it; what was served since waits for the new one."""
    subscription = await subscribed(rig, price)
    rig.world.site.configure(bill_run_lag_seconds=2 * 3600)
    end = subscription.cycle.ends_at
    rig.pass_(end - 25 * MINUTE - rig.far.now())
    await rig.traffic("acme", 5)
    await live(rig, end - MINUTE)
    await rig.traffic("acme", 100)  # after the last reading before the end
    await live(rig, end + MINUTE)
    await rig.traffic("acme", 1000)
    await live(rig, end + HOUR)
    assert (len(subscription.cycles), by_cycle(subscription)) == (1, {0: 5})
    await live(rig, end + 4 * HOUR)
    assert by_cycle(subscription) == {0: 105, 1: 1000}
    charge = {"flat": "52.50", "volume": "105"}[price]
    assert lines(subscription) == [(105, Decimal(charge), False)]
    assert (await rig.held(), await rig.dead(), await rig.unfinished()) == ({}, [], [])
