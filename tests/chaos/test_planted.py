"""The tests, tested: each bug that is planted into billingd is found, and without it nothing is.

The quick run plays seeds that are known to find them, the full one hunts for each from seed 1 on and says
after how many tries it was found: that is what the table in planted.py is refreshed from.
"""

from collections.abc import Callable, Iterator

import pytest
import scale
from planted import BUGS, SEASONS, Bug, play, said, with_bug
from sim_bench import Bench

SEEDS = scale.seed_range(25, 500)
"""How long a bug is hunted at most."""

ONE_SEASON = [tuple(bug for bug in BUGS if bug.season is season) for season in SEASONS]
HUNTS = [(bug,) for bug in BUGS] if scale.FULL else ONE_SEASON
"""Bugs that are hunted one after the other: in the quick run those that share lives without any bug."""

SENTENCE_MAX = 100

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """A place for stores."""
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("bugs", HUNTS, ids=lambda bugs: bugs[0].name if scale.FULL else bugs[0].season.name)
def test_what_is_planted_is_found(bugs: tuple[Bug, ...], bench: Bench, record_property: Record) -> None:
    """The oracle says something of a life with the bug, and nothing of the same life without it."""
    clean: set[int] = set()
    for bug in bugs:
        tries, seed, sentence = _hunted(bench, bug)
        if seed not in clean:
            assert not play(bench, bug.season, seed).faults, f"seed {seed} fails without any bug"
            clean.add(seed)
        shown = sentence if len(sentence) <= SENTENCE_MAX else sentence[: SENTENCE_MAX - 1] + "…"
        found_by = f"simulation ({bug.season.name}), seed {seed}: {shown}"
        record_property("planted", {"bug": bug.name, "found_by": found_by, "tries": tries})


def _hunted(bench: Bench, bug: Bug) -> tuple[int, int, str]:
    """After how many tries it was found, in which seed, and what the oracle said."""
    if not scale.FULL and (found := said(with_bug(bench, bug, bug.seed))):
        return bug.tries, bug.seed, found[0]
    # the full run; or billingd has changed since, and the known seed is another life now
    for tries, seed in enumerate(SEEDS, 1):
        if found := said(with_bug(bench, bug, seed)):
            return tries, seed, found[0]
    pytest.fail(f"nothing finds it in {len(SEEDS)} {bug.season.name} lives: {bug.name}")
