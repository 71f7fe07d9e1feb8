"""Every numbered point of a life: die there, restart, finish; then die again while recovering."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from points import Stage, quick_store, staged, store_on
from scale import FULL, again, only, pairs
from scripted import SCENES

DATABASES = ["sqlite", "postgres"] if FULL else ["sqlite"]
NAMES = [scene.__name__ for scene in SCENES]
STEPPED = NAMES if FULL else [name for name in NAMES if name != "second"]
"""Scenes whose points are died at; a second subscriber takes the very steps of the first."""

PAIRS = pairs(len(SCENES) * 4, 5_000)
FINISHED = 10 if FULL else 25
"""After every how manieth point the rest of the life is played, too."""

Record = Callable[[str, object], None]


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty store."""
    with store_on(request, request.param) as made:
        yield made


async def counted(stage: Stage) -> list[str]:
    """The points of the scene by name; without a death, all is well.

    In the full run the process dies by itself at each of them; else what SIGKILL leaves there is kept.
    """
    if FULL:
        assert not await stage.die_at(1_000_000)
        taken = list(stage.rig.steps.taken)
    else:
        taken = await stage.watched()
    assert await stage.faults() == []
    return taken


@pytest.mark.parametrize("scene", STEPPED)
async def test_whichever_point_it_dies_at_each_unit_is_billed_once(
    scene: str, url: str, request: pytest.FixtureRequest, record_property: Record
) -> None:
    """Each call has four points (before, sent, carried out, answered), each commit two; then pairs.

    `BILLINGD_CHAOS_POINT=17` (or `17,5`) plays only that point (or pair) of the scene.
    """
    number = NAMES.index(scene)
    failures: list[str] = []
    async with staged(url, number, reads=FULL, inline=not FULL) as stage:
        names = await counted(stage)
        recoveries: dict[int, int] = {}
        points, pairs_of_it = _chosen(len(names), Random(number))
        for point in points:
            await stage.die_at(point)
            assert await stage.recover()
            recoveries[point] = len(stage.rig.steps.taken)
            faults = await stage.faults()
            if not faults and point % FINISHED == 0:
                faults = await stage.faults(await stage.finish())
            if faults:
                failures.append(_told(request, f"{point}", names[point - 1], faults))
        died_twice = 0
        for first, share in pairs_of_it:
            second = max(1, round(share * recoveries.get(first, 100)))
            where, faults = await _pair(stage, first, second)
            died_twice += bool(where)
            if faults:
                failures.append(_told(request, f"{first},{second}", f"{names[first - 1]}, {where}", faults))
    record_property("chaos", {"points": len(points), "pairs": died_twice, "units": stage.script.units})
    assert not failures, "\n".join(failures)
    assert died_twice or "," not in only("POINT"), "the recovery has no such point"


async def _pair(stage: Stage, first: int, second: int) -> tuple[str, list[str]]:
    """Dies at a point, and at one of the recovery: its name, empty where there is none, and what is wrong."""
    await stage.die_at(first)
    died = not await stage.recover(die_at=second)
    where = stage.rig.steps.taken[-1] if died else ""
    if died:
        assert await stage.recover()
    return where, await stage.faults()


def _chosen(points: int, rng: Random) -> tuple[list[int], list[tuple[int, float]]]:
    """The points to die at, and pairs: a point and how far through its recovery the second death is."""
    asked = only("POINT")
    if not asked:
        every = list(range(1, points + 1))
        return every, [(rng.choice(every), rng.random()) for _ in range(PAIRS // len(SCENES))]
    first, _, second = asked.partition(",")
    assert 1 <= int(first) <= points, f"there is no point {first}, but {points} of them"
    return ([], [(int(first), int(second) / 100)]) if second else ([int(first)], [])


def _told(request: pytest.FixtureRequest, point: str, name: str, faults: list[str]) -> str:
    command = again(request.node.nodeid, POINT=point)
    return "\n  ".join([f"died at point {point} ({name}): {command}", *faults])


async def test_what_a_kill_leaves_is_what_a_death_leaves(sqlite_template: Path) -> None:
    """What is kept from one life, and a process that dies by itself there, recover by the same steps."""
    with quick_store(sqlite_template) as made:
        async with staged(made, NAMES.index("first"), inline=True) as stage:
            names = await stage.watched()
            left = stage.left
            for point in range(3, len(names), 34):
                came_to = []
                for stage.left in ([], left):
                    await stage.die_at(point)
                    assert await stage.recover()
                    came_to.append((stage.rig.steps.taken, await stage.faults()))
                assert came_to[0] == came_to[1], names[point - 1]
