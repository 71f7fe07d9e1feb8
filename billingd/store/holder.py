"""Which process has a SQLite store."""

from pathlib import Path
from typing import Final

LOCKS: Final = Path("/proc/locks")


def holder(store: Path | None) -> str | None:
    """The process that has a SQLite store's lock, as the kernel lists it; None when nobody is seen to.

    Looking by locking would keep a daemon that starts in this moment from its store.
    """
    try:
        inode = None if store is None else store.with_name(f"{store.name}.lock").stat().st_ino
        for line in LOCKS.read_text(encoding="ascii").splitlines():
            _number, sort, _how, _access, process, file, *_range = line.split()
            if sort == "FLOCK" and file.rpartition(":")[2] == str(inode):
                return process
    except (OSError, ValueError):  # no lock file, or a kernel that lists them in another way
        pass
    return None
