"""The threads that call the SDK, and the bridge between them and the event loop."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, TypeVar

from billingd.adapters.recurly.client import Client, perform
from billingd.adapters.recurly.outcomes import Answer
from billingd.adapters.recurly.sockets import Flight
from billingd.domain.errors import NotDone

T = TypeVar("T")

WAKE_SECONDS: Final = 1.0  # how long an abandoned thread may take to say what it saw
CLOSED: Final = "the connection to Recurly is being closed; nothing was sent"


class Workers:
    """A pool of threads, each with its own client.

    A cancelled await stops nothing: the thread goes on, and what it learns still reaches `heard`.
    """

    def __init__(
        self,
        make_client: Callable[[], Client],
        first: Client,
        *,
        threads: int,
        deadline: timedelta,
        heard: Callable[[Answer[Any]], None],
    ) -> None:
        self._make_client = make_client
        self._spare = [first]
        self._deadline_seconds = deadline.total_seconds()
        self._heard = heard
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="recurly")
        self._free = asyncio.Semaphore(threads)  # so that who waits, waits here and not in the pool's queue
        self._mine = threading.local()
        self._clients: list[Client] = []
        self._busy: set[Client] = set()
        self._under_way: dict[asyncio.Future[Answer[Any]], Flight] = {}
        self._closing = False

    async def run(self, work: Callable[[Client], T], turn: Callable[[], Awaitable[None]]) -> Answer[T]:
        """Call `work` in a thread once `turn` has come, for no longer than the deadline."""
        loop = asyncio.get_running_loop()
        if self._closing:
            raise NotDone(CLOSED)
        await self._free.acquire()
        flight = Flight()
        landed: asyncio.Future[Answer[Any]] = loop.create_future()
        try:
            await turn()
            if self._closing:
                raise NotDone(CLOSED)
            job = self._pool.submit(self._perform, work, flight)
        except BaseException:  # a cancelled wait, too, gives its place back
            flight.abandon()  # a pool that cannot start a thread keeps the job all the same
            self._free.release()
            raise
        self._under_way[landed] = flight
        job.add_done_callback(lambda done: self._report(loop, landed, done))
        await asyncio.wait({landed}, timeout=self._deadline_seconds)
        if landed.done():
            return landed.result()
        return await self._give_up(landed, flight)

    async def close(self, *, deadline: timedelta) -> None:
        """Let calls under way finish until the deadline, then wake their threads and leave them."""
        self._closing = True
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=deadline.total_seconds())
        if self._under_way:  # each now ends as unknown, unless its request had not left
            for flight in self._under_way.values():
                flight.abandon()
            await asyncio.wait(self._under_way, timeout=WAKE_SECONDS)
        self._pool.shutdown(wait=not self._under_way, cancel_futures=True)
        for client in self._clients:
            if client not in self._busy:  # a busy one closes its own: see _perform
                client.connection.close()

    async def _give_up(self, landed: asyncio.Future[Answer[T]], flight: Flight) -> Answer[T]:
        left = flight.abandon()
        fault = f"no whole answer within {self._deadline_seconds:g} s"
        await asyncio.wait({landed}, timeout=WAKE_SECONDS)
        if not landed.done():  # in a name look-up, say: it is left to itself, and can send nothing any more
            return Answer(fault=fault, left=left, cut=True)
        answer = landed.result()
        return replace(answer, fault=f"{fault}; {answer.fault}") if answer.fault else answer

    def _perform(self, work: Callable[[Client], T], flight: Flight) -> Answer[T]:
        try:
            client = self._client()
        except Exception as error:
            return Answer(fault=f"no client: {type(error).__name__}")
        self._busy.add(client)
        try:
            return perform(client, flight, work)
        finally:
            self._busy.discard(client)
            if self._closing:
                client.connection.close()

    def _client(self) -> Client:
        client: Client | None = getattr(self._mine, "client", None)
        if client is None:
            try:
                client = self._spare.pop()
            except IndexError:
                client = self._make_client()  # takes some 30 ms, for the SDK reads the system's certificates
            self._mine.client = client
            self._clients.append(client)
        return client

    def _report(
        self, loop: asyncio.AbstractEventLoop, landed: asyncio.Future[Answer[Any]], job: "Future[Answer[Any]]"
    ) -> None:
        with suppress(RuntimeError):  # the loop is gone, so nobody waits any more
            loop.call_soon_threadsafe(self._land, landed, job)

    def _land(self, landed: asyncio.Future[Answer[Any]], job: "Future[Answer[Any]]") -> None:
        flight = self._under_way.pop(landed)
        self._free.release()
        if job.cancelled() or job.exception() is not None:
            answer: Answer[Any] = Answer(fault="the thread ended early", left=flight.left, cut=True)
        else:
            answer = job.result()
        self._heard(answer)
        landed.set_result(answer)
