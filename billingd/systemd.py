"""What systemd and a service say to each other: readiness, watchdog and reloads; sockets it hands over.

Protocols: sd_notify(3) and sd_listen_fds(3). Without systemd nothing of this happens.
"""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Mapping, MutableMapping
from typing import Final

import structlog

from billingd.domain.errors import BillingdError

log = structlog.get_logger()

FIRST_DESCRIPTOR: Final = 3
DESCRIPTORS_MAX: Final = 64
SOCKET_NAMES: Final = ("webhooks", "admin")
"""What a socket unit calls each listener in FileDescriptorName=."""


class BadEnvironment(BillingdError):
    """A variable or a descriptor that systemd is said to have set makes no sense."""


def notify(message: str) -> None:
    """Send `READY=1`, `WATCHDOG=1`, `STOPPING=1` or such; nothing happens outside of systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(address)
            channel.sendall(message.encode())
    except (OSError, ValueError) as error:  # the work goes on; whoever watches decides what silence means
        log.warning("systemd.not_told", message=message, error=str(error))


def reloading() -> str:
    """What to say when a reload begins; `READY=1` says that it is over, whatever became of it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def watchdog_seconds(environment: Mapping[str, str] | None = None) -> float | None:
    """How often systemd wants to hear that we make progress, or None."""
    env = os.environ if environment is None else environment
    micros = _number(env, "WATCHDOG_USEC")
    mine = _number(env, "WATCHDOG_PID") in (None, os.getpid())
    return micros / 1_000_000 if micros and mine else None


def inherited(environment: MutableMapping[str, str] | None = None) -> dict[str, list[socket.socket]]:
    """The listening sockets of a socket unit by their names, each only once: the variables are removed.

    Raises BadEnvironment when one of them is none of ours, or cannot be accepted from.
    """
    env = os.environ if environment is None else environment
    if env.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = _number(env, "LISTEN_FDS")
    names = env.get("LISTEN_FDNAMES")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        env.pop(variable, None)
    if count is None or count > DESCRIPTORS_MAX:
        raise BadEnvironment(f"LISTEN_FDS must be a number up to {DESCRIPTORS_MAX}")
    called = [] if names is None else names.split(":")
    if names is not None and len(called) != count:
        raise BadEnvironment(f"LISTEN_FDNAMES names {len(called)} sockets, LISTEN_FDS counts {count}")
    found: dict[str, list[socket.socket]] = {}
    try:
        for position in range(count):
            name = called[position] if called else SOCKET_NAMES[0]
            if name not in SOCKET_NAMES:
                raise BadEnvironment(
                    f"a socket unit brings a socket called {name!r}; FileDescriptorName= must be "
                    f"{' or '.join(SOCKET_NAMES)}"
                )
            found.setdefault(name, []).append(_listening(FIRST_DESCRIPTOR + position, name))
    except BadEnvironment:
        for one in (one for several in found.values() for one in several):
            one.close()
        raise
    return found


def _listening(descriptor: int, name: str) -> socket.socket:
    """The descriptor as a socket that accepts; no child of ours inherits it in turn."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise BadEnvironment(f"descriptor {descriptor} ({name}) is not a socket")
        made = socket.socket(fileno=descriptor)
    except OSError as error:
        raise BadEnvironment(f"descriptor {descriptor} ({name}) cannot be used: {error.strerror}") from None
    if (
        made.type != socket.SOCK_STREAM
        or made.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        or not made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        with contextlib.suppress(OSError):
            made.close()
        raise BadEnvironment(
            f"socket {name!r} does not listen for connections: use ListenStream= and Accept=no"
        )
    made.set_inheritable(False)
    made.setblocking(False)
    return made


def _number(env: Mapping[str, str], name: str) -> int | None:
    """A variable that is a whole number; None where it is missing or is not."""
    text = env.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
