"""A sandbox that refuses connections for a while."""

import pytest
from aiohttp import ClientConnectorError, ClientSession
from aiohttp.test_utils import TestServer

from billingd.sandbox import server
from billingd.sandbox.clock import ManualClock
from billingd.sandbox.door import Door


async def test_a_shut_door_refuses_new_and_idle_connections_alike() -> None:
    """ECONNREFUSED, also for a client that had kept a connection; opened again, it is the same port."""
    app = server.build(clock=ManualClock())
    async with TestServer(app) as served, ClientSession() as session:
        assert served.runner is not None
        assert served.port is not None
        door = Door(served.runner, served.host, served.port)
        url = served.make_url("/control/clock")
        for _ in range(2):
            async with session.get(url) as answer:
                assert answer.status == 200
            async with door.refusing():
                for _ in range(2):
                    with pytest.raises(ClientConnectorError) as caught:
                        await session.get(url)
                    assert isinstance(caught.value.os_error, ConnectionRefusedError)
        async with session.get(url) as answer:
            assert answer.status == 200
