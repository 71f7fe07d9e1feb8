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
    assert not wrong, "\n".join(map(_told, wrong))


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


def _told(result: Result) -> str:
    lines = [f"seed {result.seed}, replayed by: {REPLAY.format(seed=result.seed, days=DAYS)}"]
    return "\n  ".join([*lines, *result.faults])
