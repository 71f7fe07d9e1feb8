"""Faults on the wire, one operation at a time: what is called when, and connections that are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import aiohttp
from rig import Rig

from billingd.adapters.recurly.sockets import PlainConnection
from billingd.sandbox.faults import KINDS, Armed, Rule

REFUSED = "refused"
WRITES = (
    REFUSED,
    "reset",
    "lost",
    "cut",
    "garbage",
    "429",
    "409",
    "422",
    "500_committed",
    "500",
    "late",
    "html_502",
    "html_502_committed",
    "stored_500",
    "key_expired",
)
READS = (REFUSED, "reset", "lost", "cut", "garbage", "429", "409", "500", "html_502")
"""A read that was carried out and one that was not are the same; it has no key, and never comes late."""
RECURLYS = {"stored_500", "key_expired", "422"}
"""What only Recurly has."""

LATE_SECONDS = 30
"""Well before the settling time of the rig is over."""


@dataclass(frozen=True)
class Operation:
    """One remote operation as it is seen on the wire."""

    name: str
    side: str
    method: str
    path: str
    before: tuple[str, str, str] = ("", "", "")
    """(kind, method, path) of what must go wrong for this operation to be needed at all."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What can go wrong with it."""
        if self.method == "GET":
            return READS
        without = RECURLYS if self.side == "amplify" else set()
        return tuple(kind for kind in WRITES if kind not in without)


class Wire:
    """Arms one fault at a time, at the sandbox or before it."""

    def __init__(self) -> None:
        self._refused: list[Armed] = []

    def arm(self, rig: Rig, operation: Operation, kind: str, *, times: int | None, skip: int) -> None:
        """From now on that operation goes wrong so, after the first `skip` times."""
        if operation.before[0]:
            before, method, path = operation.before
            rig.fault(before, method, path, side=operation.side)
        args = {"seconds": LATE_SECONDS} if kind == "late" else {}
        sandbox_kind = "refuse" if kind == REFUSED else kind
        assert sandbox_kind in KINDS
        rule = Rule(operation.side, operation.method, operation.path, sandbox_kind, times, skip, args)
        if kind == REFUSED:
            self._refused = [Armed(rule, 0)]
        else:
            rig.world.faults.add(rule)

    def struck(self, rig: Rig) -> int:
        """How often something went wrong since it was armed."""
        refused = sum(armed.fired for armed in self._refused)
        return refused + sum(int(rule["fired"]) for rule in rig.world.faults.describe())

    def clear(self, rig: Rig) -> None:
        """Everything goes well again."""
        self._refused = []
        rig.world.faults.clear()

    def refuses(self, side: str, method: str, path: str) -> bool:
        """Whether this connection is refused."""
        return any(armed.fires(side, method, path) for armed in self._refused)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Both adapters' connections pass by here."""
        request, connect = PlainConnection.request, aiohttp.TCPConnector.connect

        def to_recurly(connection: PlainConnection, method: str, url: str, *args: Any, **kwargs: Any) -> None:
            if self.refuses("recurly", method, urlsplit(url).path):
                connection.close()
                raise ConnectionRefusedError(111, "Connection refused")
            request(connection, method, url, *args, **kwargs)

        async def to_amplify(connector: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
            if self.refuses("amplify", asked.method, asked.url.path):
                error = ConnectionRefusedError(111, "Connection refused")
                raise aiohttp.ClientConnectorError(asked.connection_key, error)
            return await connect(connector, asked, *args, **kwargs)

        with (
            patch.object(PlainConnection, "request", to_recurly),
            patch.object(aiohttp.TCPConnector, "connect", to_amplify),
        ):
            yield
