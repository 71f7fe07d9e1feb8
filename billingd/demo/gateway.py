"""The gateways of the demo: traffic of every open subscription, counted here first."""

import asyncio
from collections import Counter
from datetime import UTC, datetime
from random import Random
from types import TracebackType
from typing import Any, Final, Self

from billingd.demo.marketplace import BURST_UNITS_LEAST, BY_NAME, Subscriber
from billingd.demo.talk import Talk

TICK_SECONDS: Final = 0.25
BUSY: Final = 0.6
"""How likely a quota is used in one tick."""
SEED: Final = 2026


class Gateway:
    """Serves calls of the subscriptions that are open, and remembers what it served."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._random = Random(SEED)  # noqa: S311 - the same traffic every time
        self._open: dict[str, Subscriber] = {}
        self._sending = asyncio.Lock()
        self._served: Counter[tuple[str, str, int]] = Counter()
        """Units by (subscription, quota, second)."""
        self.last_at = datetime.now(UTC)

    @property
    def units(self) -> int:
        """All units served."""
        return self._served.total()

    def of(self, subscriber: Subscriber, *, before: datetime | None = None) -> Counter[str]:
        """Units of each quota that a subscription used, in all or before a whole second."""
        found: Counter[str] = Counter()
        for (subscription, quota, second), units in self._served.items():
            if subscription == subscriber.subscription and (before is None or second < before.timestamp()):
                found[quota] += units
        return found

    def open(self, subscriber: Subscriber) -> None:
        """From now on it is used."""
        self._open[subscriber.subscription] = subscriber

    async def close(self, subscriber: Subscriber) -> None:
        """Not used any more, and nothing of it under way."""
        async with self._sending:
            self._open.pop(subscriber.subscription, None)

    async def __aenter__(self) -> Self:
        """Let calls come in."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No more of them, and none under way; raises what ended them before their time."""
        if kind is None:
            self.check()
        async with self._sending:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def check(self) -> None:
        """Raises what ended the traffic before its time."""
        if self._task.done():
            self._task.result()

    async def serve(self, subscriber: Subscriber, units: int, at: datetime) -> None:
        """Units of one subscription from a moment that lies back: its metric arrives only now."""
        quota = BY_NAME[subscriber.plan].quotas[0].name
        await self._send([_metric(subscriber, quota, units)], at)

    async def _run(self) -> None:
        while True:
            metrics = [
                _metric(subscriber, quota.name, self._random.randint(BURST_UNITS_LEAST, subscriber.pace))
                for subscriber in self._open.values()
                for quota in BY_NAME[subscriber.plan].quotas
                if self._random.random() < BUSY
            ]
            await self._send(metrics)
            await asyncio.sleep(TICK_SECONDS)

    async def _send(self, metrics: list[dict[str, Any]], at: datetime | None = None) -> None:
        """All or none, of now or of an earlier moment; counted once the sandbox has taken them."""
        async with self._sending:
            sent = [each for each in metrics if each["subscription"] in self._open]
            if not sent:
                return
            moment = datetime.now(UTC) if at is None else at
            timed = [each | {"at": moment.isoformat()} for each in sent]
            await self._talk.control("POST", "traffic", {"traffic": timed})
            for each in sent:
                second = int(moment.timestamp())
                self._served[each["subscription"], each["quota"], second] += each["units"]
            self.last_at = datetime.now(UTC)


def _metric(subscriber: Subscriber, quota: str, units: int) -> dict[str, Any]:
    return {"subscription": subscriber.subscription, "quota": quota, "units": units}
