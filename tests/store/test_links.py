"""Links on both databases: which resource is which, and how a link may move."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa
from linked import PLAN, TEN, add_on, link, subscription

from billingd.domain.charges import Prices
from billingd.domain.periods import Period
from billingd.domain.tiers import TierSpec
from billingd.store import links, periods, schema
from billingd.store.engine import Store

LATER = TEN + timedelta(days=1)


async def test_a_plan_is_found_by_id_name_and_code(store: Store) -> None:
    """With its add-ons; unknown ones are None."""
    await link(store, add_ons=[add_on("q2"), add_on("q1")])
    async with store.read() as tx:
        assert await links.find_plan(tx, "p1") == PLAN
        assert await links.find_plan_by_code(tx, PLAN.plan_code) == PLAN
        assert await links.find_plans_by_name(tx, "metered") == [PLAN]
        assert [one.quota_id for one in await links.add_ons_of(tx, "p1")] == ["q1", "q2"]
        assert await links.add_ons(tx) == {"q1": add_on("q1"), "q2": add_on("q2")}
        assert await links.find_plan(tx, "p2") is None
        assert await links.find_plan_by_code(tx, "p2") is None
        assert await links.find_plans_by_name(tx, "other") == []


async def test_linking_again_brings_the_link_up_to_date(store: Store) -> None:
    """A new title and a new add-on are taken over; what was linked first, and what we wrote, stays known."""
    await link(store)
    async with store.write() as tx:
        await links.plan_written(tx, "p1", "7")
    changed = replace(PLAN, title="Metered II")
    await link(store, plan=changed, add_ons=[add_on("q1", title="Calls"), add_on("q2")], now=LATER)
    async with store.read() as tx:
        assert await links.find_plan(tx, "p1") == replace(changed, resource_version="7")
        assert [one.title for one in await links.add_ons_of(tx, "p1")] == ["Calls", "q2"]
        linked_at = (await tx.execute(sa.select(schema.plan_links.c.linked_at))).scalar_one()
        assert linked_at == TEN


async def test_a_removed_plan_no_longer_has_its_name(store: Store) -> None:
    """The name may belong to another plan by then; deprecated plans keep theirs."""
    await link(store)
    for state, known in (("deprecated", ["p1"]), ("removed", [])):
        async with store.write() as tx:
            await links.plan_moved(tx, "p1", state, now=LATER)
        async with store.read() as tx:
            assert [plan.plan_id for plan in await links.find_plans_by_name(tx, "metered")] == known
            assert await links.count(tx) == (len(known), 0)


@pytest.mark.parametrize(
    ("kind", "resource_id", "version", "own"),
    [
        ("ProductPlan", "p1", "7", True),
        ("ProductPlan", "p1", "6", False),
        ("ProductPlan", "p2", "7", False),
        ("Subscription", "p1", "7", False),
    ],
)
async def test_own_writes_are_recognised_by_their_version(
    store: Store, kind: str, resource_id: str, version: str, own: bool
) -> None:
    """Only the newest version we wrote, of that very resource."""
    await link(store)
    async with store.write() as tx:
        for written in ("6", "7"):
            await links.plan_written(tx, "p1", written)
    async with store.read() as tx:
        assert own is await links.is_own_write(
            tx, kind=kind, resource_id=resource_id, resource_version=version
        )


async def test_subscriptions_are_listed_by_plan_and_state(store: Store) -> None:
    """All, some, none."""
    await link(store, subscription("s2"), subscription("s1", state="created", approved_at=None))
    async with store.read() as tx:
        everything = await links.subscriptions(tx)
        assert [one.subscription_id for one in everything] == ["s1", "s2"]
        assert await links.find_subscription(tx, "s2") == subscription("s2")
        assert await links.find_subscription(tx, "s3") is None
        created = await links.subscriptions(tx, plan_id="p1", states=("created",))
        assert [one.subscription_id for one in created] == ["s1"]
        assert await links.subscriptions(tx, plan_id="p2") == []
        assert await links.count(tx) == (1, 2)


MOVES = ["activate", "begin_ending", "end"]


@pytest.mark.parametrize(
    ("before", "allowed"),
    [
        ([], {"activate", "begin_ending"}),
        (["activate"], {"begin_ending"}),
        (["begin_ending"], {"end"}),
        (["activate", "begin_ending"], {"end"}),
        (["activate", "begin_ending", "end"], set()),
    ],
)
async def test_a_subscription_moves_one_way(store: Store, before: list[str], allowed: set[str]) -> None:
    """created > active > ending > ended, or straight to its end; a move that is not due changes nothing."""
    moves = {
        "activate": lambda tx: links.activate(tx, "s1", now=LATER),
        "begin_ending": lambda tx: links.begin_ending(tx, "s1", usage_until=LATER),
        "end": lambda tx: links.end(tx, "s1", billed_state="expired", now=LATER),
    }
    await link(store, subscription(state="created", approved_at=None))
    async with store.write() as tx:
        for move in before:
            assert await moves[move](tx)
        stood = await links.find_subscription(tx, "s1")
    for move in MOVES:
        moved = None
        try:
            async with store.write() as tx:
                moved = await moves[move](tx)
                if not moved:
                    assert await links.find_subscription(tx, "s1") == stood
                raise KeyError("undo")
        except KeyError:
            assert moved is (move in allowed), move


async def test_the_end_keeps_what_was_known(store: Store) -> None:
    """Until when usage counts, and that it had been approved."""
    await link(store, subscription())
    async with store.write() as tx:
        assert await links.begin_ending(tx, "s1", usage_until=LATER)
        assert not await links.begin_ending(tx, "s1", usage_until=LATER + timedelta(days=1))
        assert await links.end(tx, "s1", billed_state="expired", now=LATER)
        link_ = await links.find_subscription(tx, "s1")
    ended = replace(subscription(), state="ended", usage_until=LATER)
    assert link_ == replace(ended, billed_state="expired", seen_at=LATER)


async def test_what_an_add_on_costs_is_kept(store: Store) -> None:
    """Linked with its prices, learnt later, and brought up to date with the plan."""
    price = Prices("volume", None, (TierSpec(10, Decimal("0.5")), TierSpec(None, Decimal("0.000001"))))
    await link(store, add_ons=[add_on("q1", prices=price), add_on("q2")])
    flat = Prices("flat", Decimal("0.5"))
    async with store.write() as tx:
        assert await links.add_ons(tx) == {"q1": add_on("q1", prices=price), "q2": add_on("q2")}
        await links.priced(tx, "q2", flat)
        assert await links.find_add_on(tx, "q2") == add_on("q2", prices=flat)
        assert await links.find_add_on(tx, "q1") == add_on("q1", prices=price)


async def test_the_next_bill_is_that_of_whoever_is_billed_next(store: Store) -> None:
    """What is over at Recurly has none; what was seen is kept with the link."""
    await link(store, *(subscription(f"s{number}") for number in range(1, 5)))
    hours = {"s1": 5, "s2": 3, "s3": 1}
    async with store.write() as tx:
        assert await links.next_period_end(tx, after=TEN) is None
        for name, number in hours.items():
            state = "expired" if name == "s3" else "active"
            end = TEN + timedelta(hours=number)
            await periods.seen(tx, name, state=state, current=Period(TEN, end), now=LATER)
        for after, expected in ((0, 3), (3, 5), (5, None)):
            found = await links.next_period_end(tx, after=TEN + timedelta(hours=after))
            assert found == (None if expected is None else TEN + timedelta(hours=expected))
        assert [one.subscription_id for one in await links.billing(tx)] == ["s1", "s2", "s4"]
        seen = await links.find_subscription_by_uuid(tx, "uuid-s1")
        assert await links.find_subscription_by_uuid(tx, "uuid-s9") is None
    assert seen is not None
    assert (seen.billed_state, seen.seen_at, seen.period_ends_at) == (
        "active",
        LATER,
        TEN + timedelta(hours=5),
    )


async def test_periods_are_kept_as_they_are_learnt(store: Store) -> None:
    """A moved end replaces, a next one adds; what has no period keeps what it had."""
    await link(store, subscription("s1"), subscription("s2"))

    def period(start: int, end: int, *, trial: bool = False) -> Period:
        return Period(TEN + timedelta(hours=start), TEN + timedelta(hours=end), trial)

    async with store.write() as tx:
        for current in (period(0, 10, trial=True), period(0, 8, trial=True), period(8, 18), None):
            await periods.seen(tx, "s1", state="active", current=current, now=LATER)
        assert await periods.of(tx, "s1") == [period(0, 8, trial=True), period(8, 18)]
        link_ = await links.find_subscription(tx, "s1")
        assert link_ is not None
        assert link_.period_ends_at == TEN + timedelta(hours=18)
        await periods.seen(tx, "s1", state="active", current=period(18, 28), now=LATER)
        await periods.seen(tx, "s2", state="active", current=period(0, 40), now=LATER)
        since = await periods.since(tx, TEN + timedelta(hours=20))
        first, last = period(0, 8, trial=True), period(18, 28)
        assert since == {"s1": [first, last], "s2": [period(0, 40)]}
        assert await periods.since(tx, TEN, only={"s2"}) == {"s2": [period(0, 40)]}
