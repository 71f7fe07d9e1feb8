"""The listening socket of a running sandbox: shut, it refuses connections as a stopped server does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

FINISH_SECONDS: Final = 5.0
"""What a request that is under way gets to be finished."""


class Door:
    """For whoever runs the sandbox in its own process; the control interface is behind the same door."""

    def __init__(self, runner: web.BaseRunner, host: str, port: int) -> None:
        self._runner = runner
        self._host = host
        self._port = port

    async def shut(self) -> None:
        """Connections are refused from now on, idle ones are closed; requests under way are finished."""
        for site in list(self._runner.sites):
            await site.stop()
        if self._runner.server is not None:
            for connection in self._runner.server.connections:
                connection.close()  # idle ones need not be waited for
            await self._runner.server.shutdown(FINISH_SECONDS)

    async def open(self) -> None:
        """Listens again, on the same port."""
        await web.TCPSite(self._runner, self._host, self._port).start()

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[None]:
        """Shut while this lasts."""
        await self.shut()
        try:
            yield
        finally:
            await self.open()
