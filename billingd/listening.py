"""The sockets that the listeners accept from: made here, or handed over by a socket unit."""

import asyncio
import socket
from collections.abc import Sequence
from typing import Final

from billingd.domain.errors import BillingdError
from billingd.reception import BACKLOG
from billingd.settings import host_port, is_loopback

UNIX: Final = "unix:"


async def opened(listen: str) -> list[socket.socket]:
    """Listening sockets at HOST:PORT, one for each address that the host has. Raises BillingdError."""
    host, port = host_port(listen)
    made: list[socket.socket] = []
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, address in dict.fromkeys((one[0], one[4]) for one in found):
            one = socket.socket(family, socket.SOCK_STREAM)
            made.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
            one.listen(BACKLOG)
            one.setblocking(False)
    except OSError as error:
        for one in made:
            one.close()
        raise BillingdError(f"cannot listen on {listen}: {error.strerror or error}") from error
    return made


def place(listening: socket.socket) -> str:
    """Where it listens, as the configuration writes it."""
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        path = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return UNIX + path.replace("\0", "@")
    host, port = name[:2]
    return f"[{host}]:{port}" if listening.family == socket.AF_INET6 else f"{host}:{port}"


def private(sockets: Sequence[socket.socket]) -> bool:
    """Whether only this machine can reach all of them."""
    return all(one.family == socket.AF_UNIX or is_loopback(one.getsockname()[0]) for one in sockets)
