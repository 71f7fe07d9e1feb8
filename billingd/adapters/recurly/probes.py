"""What may be asked of Recurly to see whether everything billingd does there would go well; reads only."""

from datetime import datetime, timedelta
from typing import Final

from billingd.adapters.recurly import bodies, reading
from billingd.adapters.recurly.calls import PAGE_ITEMS, Calls, Params
from billingd.adapters.recurly.client import Client
from billingd.domain.billing import Allowance, Site

DATED: Final = ("/plans", "/measured_units", "/accounts")
"""Lists whose rows say when they were made."""


class Probes:
    """Each asks for one thing, and raises what stands in the way; nothing is written."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @property
    def skew(self) -> timedelta | None:
        """How far Recurly's clock is ahead of ours, to a second or two; None before its first answer."""
        return self._calls.skew

    @property
    def allowance(self) -> Allowance | None:
        """What was left of the rate limit at the latest answer that spoke of it."""
        return self._calls.allowance

    async def sites(self) -> tuple[Site, ...]:
        """The sites that the key opens: one, as Recurly documents it."""

        def work(client: Client) -> tuple[Site, ...]:
            return tuple(map(reading.site, client.page("/sites", {"limit": 2})[0]))

        return await self._calls.read("list sites", work)

    async def time_returns(self) -> bool | None:
        """Whether a time that Recurly told, sent back to it as a filter, still means the same moment.

        That is: what was made at that second is listed from then on, and no longer from a second later on.
        None when there is nothing at Recurly yet to try it with.
        """
        for path in DATED:
            for id_, at in await self._made(path, {"limit": 1}):
                second = timedelta(seconds=1)
                from_then = await self._made(path, _between(at, at + second))
                from_later = await self._made(path, _between(at + second, at + timedelta(days=1)))
                return (id_, at) in from_then and (id_, at) not in from_later
        return None

    async def _made(self, path: str, params: Params) -> list[tuple[str, datetime]]:
        """Ids with when each was made, the newest first."""
        wanted: Params = {"sort": "created_at", "order": "desc", **params}

        def work(client: Client) -> list[tuple[str, datetime]]:
            return [reading.made(each) for each in client.page(path, wanted)[0]]

        return await self._calls.read(f"list {path[1:]} by time", work)


def _between(begin: datetime, end: datetime) -> Params:
    return {"limit": PAGE_ITEMS, "begin_time": bodies.instant(begin), "end_time": bodies.instant(end)}
