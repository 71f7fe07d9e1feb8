"""Clocks that differ and jump, and bill dates at the ends of months: each unit is on the right bill, once."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from faster import quiet, sqlite_inline, templates_once
from points import quick_store
from rig import HOUR, Rig, a_rig
from scale import FULL, seed_range
from scripted import DAILY, DAY, MINUTE, QUOTAS, Script, live, misplaced, next_reading, wrong

Record = Callable[[str, object], None]

MONTHLY = {
    "billing": {"price": 10, "interval": "monthly"},
    "subscription": {"interval": {"type": "months", "length": 1}},
}
ANCHORS = [
    datetime(2026, 1, 28, 10, 5, tzinfo=UTC),
    datetime(2026, 1, 29, 10, 5, tzinfo=UTC),
    datetime(2026, 1, 30, 23, 59, 30, tzinfo=UTC),
    datetime(2026, 1, 31, 0, 0, 10, tzinfo=UTC),
    datetime(2027, 12, 31, 23, 30, tzinfo=UTC),  # through the year's end, and 29 February 2028
    datetime(2028, 1, 29, 10, 5, tzinfo=UTC),
    datetime(2028, 1, 31, 10, 5, tzinfo=UTC),
]
PERIODS = 3 if FULL else 2
SEEDS = seed_range(8, 1_000)
CHUNKS = 2 if not FULL else 20
TROUBLE = ("lost", "reset", "500", "500_committed", "late", "html_502_committed", "key_expired")
USAGE = "/subscriptions/*/add_ons/*/usage"


@pytest.fixture
def url(sqlite_template: Path) -> Iterator[str]:
    """An empty store, in memory where there is a place for it."""
    with ExitStack() as stack:
        for each in (quiet(), templates_once()) if FULL else (quiet(), templates_once(), sqlite_inline()):
            stack.enter_context(each)
        yield stack.enter_context(quick_store(sqlite_template))


async def opened(rig: Rig, script: Script, terms: dict[str, object]) -> None:
    """One plan of three ways to charge, and one subscription to it, billed from now on."""
    rig.workers, rig.look_again = 1, HOUR / 2
    rig.start()
    await rig.product()
    await script.plan(rig, "metered", quotas=QUOTAS, **terms)
    await live(rig, rig.far.now())
    await script.subscribe(rig, "acme", "metered")
    await live(rig, rig.far.now())


def ends_at(rig: Rig) -> datetime:
    """When the bill that is open now will be made."""
    return next(iter(rig.world.site.subscriptions.values())).cycle.ends_at


async def jump(rig: Rig, to: datetime) -> None:
    """Time passes without anything happening but a reading now and then."""
    while rig.far.now() < to:
        rig.pass_(min(8 * DAY, to - rig.far.now()))
        await rig.poll()
        await rig.drain()


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda at: f"{at:%Y-%m-%dT%H%M}")
async def test_units_on_both_sides_of_a_bill_are_on_their_own(
    anchor: datetime, url: str, record_property: Record
) -> None:
    """Traffic a minute before each boundary and a minute after it, in the same window, is billed apart."""
    script, edges = Script(), []
    async with a_rig(url, start=anchor, threads=True) as rig:
        await opened(rig, script, MONTHLY)
        for number in range(1, PERIODS + 1):
            edges.append(ends := ends_at(rig))
            await jump(rig, ends - HOUR)
            await live(rig, ends - 20 * MINUTE, to_the_end=False)
            await script.serve(rig, "acme", "calls", 10 * number)
            await script.serve(rig, "acme", "maps", 100 * number)
            await live(rig, ends - MINUTE)
            await script.serve(rig, "acme", "data", 3)  # after the last flush: late, and a correction
            await live(rig, ends + MINUTE, to_the_end=False)
            for quota in ("calls", "maps", "data"):
                await script.serve(rig, "acme", quota, 1000 * number)
            await live(rig, rig.far.now() + 3 * HOUR)
            assert await wrong(rig, script) + misplaced(rig, script) == []
        last = [min(anchor.day, edge.day) for edge in edges]
        assert [edge.day for edge in edges] == last or anchor.day >= 28
        for invoice in rig.billed(script.ids["acme"])[0]["invoices"]:
            assert invoice["origin"] in {"purchase", "renewal", "immediate_change", "line_items"}, invoice
    record_property("chaos", {"boundaries": PERIODS, "units": script.units})


async def test_eight_days_of_sleep_with_writes_unanswered(url: str, record_property: Record) -> None:
    """The machine was suspended while nobody knew what became of a write: it is looked up, not repeated."""
    units = faults = 0
    async with a_rig(url, threads=True) as rig:
        played = Script()
        await opened(rig, played, MONTHLY)
        saved = await rig.save()
        for kind in TROUBLE:
            await rig.load(saved)
            script = copy.deepcopy(played)
            for quota in ("calls", "maps", "data"):
                await script.serve(rig, "acme", quota, 7)
            rig.fault(kind, "POST", USAGE, times=2)
            rig.pass_(111 * MINUTE)
            await live(rig, rig.far.now() + 16 * MINUTE, to_the_end=False)
            faults += rig.world.faults.counts[kind]
            rig.pass_(8 * DAY)
            await live(rig, rig.far.now() + 3 * HOUR)
            assert await wrong(rig, script) + misplaced(rig, script) == [], kind
            units += script.units
    record_property("chaos", {"faults": faults, "units": units})


@pytest.mark.parametrize("chunk", range(CHUNKS))
async def test_a_clock_that_is_wrong_and_jumps(chunk: int, url: str, record_property: Record) -> None:
    """Up to an hour fast or slow, set anew at random moments, also while outcomes are unknown."""
    units = faults = played_seeds = 0
    failures: list[str] = []
    async with a_rig(url, threads=True) as rig:
        played = Script()
        await opened(rig, played, DAILY)
        saved = await rig.save()
        for seed in SEEDS:
            if seed % CHUNKS != chunk and len(SEEDS) > 1:
                continue
            await rig.load(saved)
            script = copy.deepcopy(played)
            await wrong_clock(rig, script, Random(seed))
            found = await wrong(rig, script) + misplaced(rig, script)
            found += [f"{one} had to be removed: it was there twice" for one in rig.world.site.removed_usages]
            if found:
                told = f"BILLINGD_CHAOS_SEED={seed} .venv/bin/python -m pytest -n0 tests/chaos/test_time.py"
                failures.append("\n  ".join([f"seed {seed}: {told} -k wrong", *found]))
            played_seeds, units = played_seeds + 1, units + script.units
            faults += sum(rig.world.faults.counts.values())
    record_property("chaos", {"seeds": played_seeds, "units": units, "faults": faults})
    assert not failures, "\n".join(failures)


async def set_forward(rig: Rig, script: Script, rng: Random) -> None:
    """A write has no answer when the process ends, and is carried out when the clock of the next was set."""
    rig.clock.offset = timedelta(0)
    await script.serve(rig, "acme", "calls", rng.randint(1, 50))
    rig.fault("late", "POST", USAGE, args={"seconds": rng.randint(5, 55)})
    rig.pass_(111 * MINUTE)
    await rig.hear()
    await rig.poll()
    await rig.drain()
    await rig.restart()
    rig.clock.offset = timedelta(seconds=rng.randint(3000, 3600))
    for _ in range(30):  # seconds count here, and to `live` the clock seems to say when something is due
        await rig.drain()
        rig.pass_(timedelta(seconds=2))


async def wrong_clock(rig: Rig, script: Script, rng: Random) -> None:
    """A day of traffic with writes that get no answer, and a clock that steps; it is right in the end."""
    for _ in range(8):
        rig.clock.offset = rng.choice([timedelta(0), timedelta(seconds=rng.randint(-3600, 3600))])
        if rng.random() < 0.2:
            await set_forward(rig, script, rng)
        for quota in rng.sample(["calls", "data"], k=rng.randint(0, 2)):
            await script.serve(rig, "acme", quota, rng.randint(1, 50))
        if rng.random() < 0.6:
            rig.fault(rng.choice(TROUBLE), "POST", USAGE)
        await live(rig, rig.far.now() + timedelta(minutes=rng.randint(1, 300)), to_the_end=False)
        if rng.random() < 0.3:
            await rig.restart()
    rig.clock.offset = timedelta(0)
    rig.world.faults.clear()
    await live(rig, max(await next_reading(rig), rig.far.now()) + 4 * HOUR)
