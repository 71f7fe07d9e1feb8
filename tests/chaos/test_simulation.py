"""Lives of the daemon drawn from seeds: one virtual clock, one order of events, and an oracle at the end."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scale
from sim_bench import Bench, Result
from sim_life import Ingredients

SEEDS = scale.seed_range(200, 20_000)
DAYS = scale.days(3, 30)
CHUNK = 10
DENSITY = 1.0 if scale.FULL else 0.5
REPLAY = f".venv/bin/python tests/chaos/simulate.py --seed {{seed}} --days {{days}} --density {DENSITY}"

CHUNKS = [SEEDS[start : start + CHUNK] for start in range(0, len(SEEDS), CHUNK)]

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """A store template and a place for stores, for all seeds of a test process."""
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_lives(seeds: range, bench: Bench, record_property: Record) -> None:
    """Whatever happens, every unit is billed once or held with a reason."""
    counts: Counter[str] = Counter()
    wrong: list[Result] = []
    for seed in seeds:
        result = bench.run(seed, DAYS, Ingredients(density=DENSITY))
        counts.update(result.counts)
        if result.faults:
            wrong.append(result)
    told = {"seeds": len(seeds), "units": counts["units"], "faults": counts["faults"]}
    record_property("chaos", told)
    assert not wrong, "\n".join(_told(result, DAYS) for result in wrong)


LOSSES = {
    "none of the webhooks comes": Ingredients(density=DENSITY, lost_mail=1.0),
    "half of the webhooks come, late, doubled, in any order": Ingredients(density=DENSITY, lost_mail=0.5),
    "none comes, and the daemon is down for days": Ingredients(density=DENSITY, lost_mail=1.0, away=True),
}
LOST_SEEDS = scale.seed_range(8, 200)
LOST_DAYS = {True: scale.days(14, 30), False: DAYS}
"""Whoever is away for longer than the feed keeps events needs time for it."""


@pytest.mark.parametrize("loss", LOSSES)
def test_lives_in_which_webhooks_are_lost(loss: str, bench: Bench, record_property: Record) -> None:
    """Whatever is never told, the end is the same: a webhook only makes it faster."""
    ingredients = LOSSES[loss]
    days = LOST_DAYS[ingredients.away]
    counts: Counter[str] = Counter()
    wrong: list[Result] = []
    for seed in LOST_SEEDS[:3] if ingredients.away and not scale.FULL else LOST_SEEDS:
        result = bench.run(seed, days, ingredients)
        counts.update(result.counts)
        counts["lives"] += 1
        if result.faults:
            wrong.append(result)
    told = {"seeds": counts["lives"], "units": counts["units"], "faults": counts["faults"]}
    record_property("chaos", told)
    more = f" --lost-mail {ingredients.lost_mail}" + (" --away" if ingredients.away else "")
    assert not wrong, "\n".join(_told(result, days, more) for result in wrong)
    assert counts["lost_webhooks"] > counts["webhooks"] * ingredients.lost_mail
    if ingredients.away:  # the feed keeps events for seven days: what happened meanwhile only a resync finds
        assert counts["days_away"] >= 8 * counts["lives"]
        assert counts["resyncs"] >= 2 * counts["lives"]


def test_a_seed_replays_exactly(bench: Bench) -> None:
    """In another process, where sets of strings have another order, and whatever was run before it."""
    here = [bench.run(seed, 1) for seed in (1, 2)]
    assert [told(2, hash_seed) for hash_seed in ("1", "2")] == [here[1].digest] * 2
    assert here[0].digest != here[1].digest


def told(seed: int, hash_seed: str) -> str:
    """The digest of a seed in a process of its own."""
    script = Path(__file__).with_name("simulate.py")
    done = subprocess.run(
        [sys.executable, str(script), "--seed", str(seed), "--days", "1", "--digest"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


def _told(result: Result, days: float, more: str = "") -> str:
    lines = [f"seed {result.seed}, replayed by: {REPLAY.format(seed=result.seed, days=days)}{more}"]
    return "\n  ".join([*lines, *result.faults])
