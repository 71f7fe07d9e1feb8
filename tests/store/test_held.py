"""What is held, on both databases: once per reason, until it is closed."""

from dataclasses import replace

from linked import HOUR, TEN

from billingd.domain.attempts import Action
from billingd.store import held
from billingd.store.engine import Store
from billingd.store.held import Hold

PLAN = Hold(
    "plan_differs", "plan:p", "10 there, 11 here", Action("provision_plan", "plan:p", "k", {"name": "p"})
)
USAGE = Hold("usage_refused", "usage:t", "422", None, "s1", "amplify-quota-q1", 12, "1.20", "USD")


async def test_somebody_is_told_when_it_was_not_held_before(store: Store) -> None:
    """Holding again keeps the beginning and takes the newest reason."""
    async with store.write() as tx:
        assert await held.add(tx, PLAN, now=TEN)
        assert not await held.add(tx, replace(PLAN, reason="10 there, 12 here"), now=TEN + HOUR)
        [row] = await held.standing(tx)
    assert (row["reason"], row["since"]) == ("10 there, 12 here", TEN)
    assert row["action"] == {"kind": "provision_plan", "subject": "plan:p", "args": {"name": "p"}}


async def test_all_that_is_at_stake_is_kept(store: Store) -> None:
    """Units, money, and whose."""
    async with store.write() as tx:
        await held.add(tx, USAGE, now=TEN)
        [row] = await held.standing(tx, kind="usage_refused")
        found = await held.find(tx, row["id"])
        assert await held.find(tx, 999) is None
    assert found == row
    assert [
        row[name] for name in ("subscription_id", "add_on_code", "units", "amount", "currency", "action")
    ] == [
        "s1",
        "amplify-quota-q1",
        12,
        "1.20",
        "USD",
        None,
    ]


async def test_what_is_closed_may_be_held_anew(store: Store) -> None:
    """With a beginning of its own, and somebody is told again."""
    async with store.write() as tx:
        await held.add(tx, PLAN, now=TEN)
        assert await held.close(tx, subject="plan:p", resolution="mended", now=TEN) == 1
        assert await held.close(tx, subject="plan:p", resolution="mended", now=TEN) == 0
        assert await held.standing(tx) == []
        assert await held.add(tx, PLAN, now=TEN + HOUR)
        [row] = await held.standing(tx)
        assert row["since"] == TEN + HOUR
        assert await held.close_one(tx, row["id"], resolution="written off", now=TEN)
        assert not await held.close_one(tx, row["id"], resolution="written off", now=TEN)


async def test_closing_may_spare_one_kind(store: Store) -> None:
    """A new reason replaces the others of the same subject and leaves other subjects alone."""
    other = replace(PLAN, kind="plan_inexpressible")
    async with store.write() as tx:
        for item in (PLAN, other, USAGE):
            await held.add(tx, item, now=TEN)
        assert await held.close(tx, subject="plan:p", resolution="now", now=TEN, but_kind=other.kind) == 1
        assert [row["kind"] for row in await held.standing(tx)] == ["plan_inexpressible", "usage_refused"]
        assert [row["kind"] for row in await held.standing(tx, subject="plan:p")] == ["plan_inexpressible"]
        assert await held.standing(tx, subject="plan:p", kind="usage_refused") == []


async def test_counts_are_of_what_stands(store: Store) -> None:
    """All, plans, subscriptions; units, of which too few are as much at stake as too many."""
    async with store.write() as tx:
        assert set((await held.count(tx)).values()) == {0}
        await held.add(tx, PLAN, now=TEN)
        await held.add(tx, replace(PLAN, subject="subscription:s1"), now=TEN)
        await held.add(tx, USAGE, now=TEN)
        await held.add(tx, replace(USAGE, subject="usage:u", units=30), now=TEN)
        await held.add(tx, replace(USAGE, subject="usage:v", units=99), now=TEN)
        await held.close(tx, subject="usage:v", resolution="x", now=TEN)
        await held.add(tx, replace(USAGE, subject="reading:r", units=-5), now=TEN)
        found = await held.count(tx)
        assert found == {"standing": 5, "plans": 1, "subscriptions": 1, "units": 47}
