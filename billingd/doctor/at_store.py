"""Checks of the store: there, of our schema, sound, with room to grow, telling times as they were written."""

import os
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from billingd.doctor.findings import Found, fine, look, skipped
from billingd.domain.errors import StoreBusy
from billingd.store import integrity, migrate
from billingd.store.engine import Store, StoreDamaged, StoreUnavailable
from billingd.store.integrity import PAST
from billingd.store.schema import UtcDateTime

FREE_BYTES_MIN: Final = 256 * 2**20
COPIES: Final = 2
"""An upgrade copies the store beside it first, and SQLite's log may grow as large once more."""
AHEAD_MAX: Final = timedelta(minutes=1)
MIB: Final = 2**20


class StoreChecks:
    """Each returns what it found, or raises what stood in the way."""

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], datetime],
        free_bytes: Callable[[Path], int],
    ) -> None:
        self._store = store
        self._now = now
        self._free_bytes = free_bytes

    @property
    def missing(self) -> bool:
        """Whether there is no SQLite file yet; opening it would make one."""
        return self._store.path is not None and not self._store.path.exists()

    async def opens(self) -> Sequence[Found]:
        """It can be read, and has the schema that this program works with."""
        path = self._store.path
        if path is not None and self.missing:
            return [_absent(path)]
        if path is not None and not os.access(path, os.R_OK | os.W_OK):
            owner = f"chown the one that runs billingd: chown billingd {path}"
            return [
                look(f"{path} cannot be read and written by this user", f"sudo -u billingd …, or {owner}")
            ]
        try:
            await migrate.check(self._store)
        except migrate.SchemaBehind as error:
            return [
                look(str(error), "billingd db upgrade    (`billingd run` does it by itself, after a backup)")
            ]
        except StoreBusy as error:  # newer than this program
            return [look(str(error), "install the billingd that wrote it, or: billingd db restore FILE")]
        except StoreUnavailable as error:
            if path is None:
                raise
            return [look(str(error), f"ls -l {path}*    shows whose it is; it must be this user's to write")]
        return [fine(f"{self._name()} can be read and has the schema {migrate.newest()}")]

    async def sound(self) -> Sequence[Found]:
        """The database finds no fault in itself."""
        if self.missing:
            return [skipped("there is no store yet")]
        try:
            problems = await integrity.problems(self._store)
        except StoreDamaged as error:
            problems = [str(error)]
        found = [
            look(problem, "stop billingd, then: billingd db restore FILE    (a copy of `billingd db backup`)")
            for problem in problems[:10]
        ]
        return found or [fine("the database finds no fault in itself, and its tables are as they should be")]

    async def disk(self) -> Sequence[Found]:
        """There is room to write."""
        path = self._store.path
        if path is None:
            return [skipped("PostgreSQL's disk is its own server's to watch")]
        directory = path.parent
        if not directory.is_dir():
            return [skipped(f"there is no directory {directory}")]
        size = sum(
            each.stat().st_size for each in (path, path.with_name(f"{path.name}-wal")) if each.exists()
        )
        needed, free = max(FREE_BYTES_MIN, COPIES * size), self._free_bytes(directory)
        said = f"{free // MIB} MiB free under {directory}, the store has {size / MIB:.1f} MiB"
        if free < needed:
            return [
                look(
                    f"only {said}: a full disk stops billingd, and an upgrade copies the store first",
                    f"make {(needed - free) // MIB + 1} MiB free there (df -h {directory}; old copies: "
                    f"ls -lh {path}.*), or move store.url to a larger disk",
                )
            ]
        return [fine(said)]

    async def times(self) -> Sequence[Found]:
        """Times come back as they were given, and none that is past lies ahead of us."""
        if self.missing:
            return [skipped("there is no store yet")]
        now = self._now()
        async with self._store.read() as tx:
            back = (await tx.execute(sa.select(sa.literal(now, UtcDateTime())))).scalar_one()
        if back != now:
            return [
                look(
                    f"{now.isoformat()} comes back from the database as {back}",
                    "report this line with the versions of the database and its driver",
                )
            ]
        found = []
        for column, newest in (await integrity.newest_times(self._store)).items():
            if newest is not None and newest - now > AHEAD_MAX:
                found.append(
                    look(
                        f"{column} says {newest:%Y-%m-%d %H:%M:%S} UTC, which is still to come: this "
                        "machine's clock was ahead, or is behind now",
                        "timedatectl set-ntp true    (or: chronyc makestep), then look at `timedatectl`",
                    )
                )
        return found or [fine(f"times come back as they were given; none of {len(PAST)} columns is ahead")]

    def _name(self) -> str:
        return str(self._store.path or self._store.url.render_as_string(hide_password=True))


def _absent(path: Path) -> Found:
    directory = path.parent
    if not directory.is_dir():
        return look(
            f"there is no directory {directory} for the store",
            f"install -d -m 0700 -o billingd {directory}    (systemd's StateDirectory= makes it by itself)",
        )
    if not os.access(directory, os.W_OK):
        return look(f"{directory} cannot be written by this user", f"chown billingd {directory}")
    return fine(f"there is no store at {path} yet; `billingd run` makes it")
