"""A stretch of network between Amplify and billingd that loses answers, and then delivers again."""

import asyncio
from types import TracebackType
from typing import Final, Self

from aiohttp import hdrs, web

from billingd.demo.processes import HOST
from billingd.demo.talk import Json, Talk

PASSED_ON: Final = (hdrs.CONTENT_TYPE, hdrs.AUTHORIZATION)


class LosesAnswers:
    """Hands every webhook to the daemon, closes the connection instead of answering, and sends it again."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._runner: web.AppRunner | None = None
        self._deliveries: list[asyncio.Task[Json]] = []
        self.url = ""
        self.lost = 0

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_post("/", self._take)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0).start()
        self.url = f"http://{HOST}:{self._runner.addresses[0][1]}/"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for delivery in self._deliveries:
            delivery.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def again(self) -> list[Json]:
        """What the daemon answered to each second delivery."""
        return list(await asyncio.gather(*self._deliveries))

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {str(name): request.headers[name] for name in PASSED_ON if name in request.headers}
        await self._talk.deliver(body, headers)
        if request.transport is not None:
            request.transport.abort()
        self.lost += 1
        self._deliveries.append(asyncio.create_task(self._talk.deliver(body, headers)))
        return web.Response()  # goes nowhere
