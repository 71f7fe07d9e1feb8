"""Real processes, real sockets, SIGKILL at random moments: nothing is lost, nothing is doubled.

Odd seeds run on SQLite, even ones on PostgreSQL, which is killed too while the daemon goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import scale
from kills import Counts, play, recurring

PER_ROUND: Final = 100
POSTGRES_KILLS_PER_ROUND: Final = 5
ALL: Final = scale.kills(quick=20, full=2_000)
ROUNDS: Final = range(1, -(-ALL // PER_ROUND) + 1)
ONLY: Final = scale.seed()


@pytest.mark.parametrize("seed", ROUNDS if ONLY is None else [ONLY])
def test_kills_at_random_moments(
    seed: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever the daemon was doing when it died, in the end every unit is at Recurly once, or held."""
    kills = min(ALL, PER_ROUND) if ONLY is not None else min(PER_ROUND, ALL - (seed - 1) * PER_ROUND)
    on_postgres = seed % 2 == 0
    postgres_kills = POSTGRES_KILLS_PER_ROUND * kills // PER_ROUND if on_postgres else 0

    def run(attempt: int) -> Counts:
        directory = tmp_path / f"attempt-{attempt}"
        return play(directory, seed, kills, postgres_kills=postgres_kills, on_postgres=on_postgres)

    done = recurring(run, scale.again(request.node.nodeid))
    assert done.units or kills < PER_ROUND // 5, "nothing was served, so nothing is proved"
    record_property("chaos", vars(done))


LOST_KILLS: Final = scale.kills(quick=4, full=100)
LOST_POSTGRES_KILLS: Final = 2


@pytest.mark.parametrize("on_postgres", [False, True], ids=["sqlite", "postgres"])
def test_kills_while_no_webhook_comes(
    on_postgres: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    """The same when every webhook is lost: the feed and resyncs tell all of it, whoever dies meanwhile."""
    kills = min(LOST_KILLS, PER_ROUND)

    def run(attempt: int) -> Counts:
        directory = tmp_path / f"attempt-{attempt}"
        postgres_kills = LOST_POSTGRES_KILLS if on_postgres else 0
        return play(
            directory,
            7_000 + on_postgres,
            kills,
            postgres_kills=postgres_kills,
            on_postgres=on_postgres,
            lost=True,
        )

    done = recurring(run, scale.again(request.node.nodeid))
    record_property("chaos", vars(done))
