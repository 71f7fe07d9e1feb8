"""Served: what Amplify counts now, window by window for all subscriptions at once, against the ledger."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from billingd.domain.drift import Drift
from billingd.domain.drift_usage import compare_served
from billingd.domain.errors import Retryable
from billingd.domain.usage import Reading
from billingd.domain.windows import Window, floor
from billingd.reconcile import scope
from billingd.reconcile.places import place_of
from billingd.store import links, marks, usage, watermarks
from billingd.store.drift import Run
from billingd.store.engine import Store
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.watermarks import Watermark

Key = tuple[str, str, Window]
"""(subscription id, quota id, window)"""


class Traffic(Protocol):
    """Where traffic is counted."""

    name: str
    keeps: timedelta | None
    """How long what was counted can be asked for; None: for longer than anything is open here."""

    async def read(
        self,
        *,
        organizations: Collection[str],
        units: Collection[str],
        subscriptions: Collection[str],
        quotas: Collection[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> tuple[Reading, ...]: ...


class Poller(Protocol):
    """Reads windows again and books only differences."""

    async def read_range(
        self, since: datetime, until: datetime, *, subscription: str | None = None
    ) -> int: ...


class ServedSurvey:
    """Compares; what came late to windows that every poll reads again is booked, as the next poll would."""

    def __init__(self, store: Store, source: Traffic, poller: Poller, *, horizon: timedelta) -> None:
        self._store = store
        self._source = source
        self._poller = poller
        self._horizon = horizon

    def kept_from(self, mark: Watermark, now: datetime) -> datetime:
        """From where on Amplify and the ledger can be compared, window by window."""
        if self._source.keeps is None:
            return mark.regular_since
        return max(mark.regular_since, _ceil(now - self._source.keeps, mark.length) + mark.length)

    def not_compared(
        self,
        linked: Sequence[SubscriptionLink],
        mark: Watermark,
        since: datetime,
        until: datetime,
        now: datetime,
    ) -> list[dict[str, Any]]:
        """The stretch of [since, until) with usage of ours that is too old to be counted again."""
        begins = max(since, min((floor(one.usage_from, mark.length) for one in linked), default=until))
        told: list[dict[str, Any]] = []
        for upto, why in (
            (mark.regular_since, "windows had another length, or were not read yet: `traffic.window`"),
            (self.kept_from(mark, now), f"traffic.source={self._source.name} keeps no more than that"),
        ):
            ends = min(upto, until)
            if begins < ends:
                reason = f"Amplify and the ledger are not compared: {why}"
                told.append(scope.not_compared(scope.SERVED, begins, ends, reason))
                begins = ends
        return told

    async def compare(
        self, run: Run, mark: Watermark, start: datetime, end: datetime
    ) -> tuple[list[Drift], list[dict[str, Any]]]:
        """Windows of [start, end) as Amplify counts them now, for all subscriptions at once.

        The second are those that are yet to be read back, as entries of `not_compared`; what ended before
        that is held in one sum, and needs none. Raises Retryable when
        what was read already is to be read again since `mark` was found.

        The ledger is looked at before and after: what is booked meanwhile is no drift. Where more is counted
        in a window within the horizon, the poll reads it again in between, for it only came late.
        """
        async with self._store.read() as tx:
            linked = {
                one.subscription_id: one
                for one in await links.subscriptions(tx)
                if run.subscription_id in {None, one.subscription_id} and one.usage_from < end
            }
            add_ons = await links.add_ons(tx)
            unread = set(await marks.unread_ones(tx))
            mark_now = await watermarks.find(tx, mark.source)
        if mark_now is not None and mark_now.at < end:  # as when one was read back just now
            raise Retryable("traffic is to be read again; it is compared then")
        told = _untold(run, linked, unread, start)
        linked = {name: link for name, link in linked.items() if name not in unread}
        if not linked or not add_ons:
            return [], told
        again_from = _ceil(mark.at - self._horizon, mark.length)
        before = await self._recorded(start, end, mark.length, linked)
        counted = await self._counted(linked, add_ons, set(linked), set(add_ons), start, end, mark.length)
        late = [
            key[2]
            for key, units in counted.items()
            if key[0] in linked and key[2].start >= again_from and units > before.get(key, 0)
        ]
        if late:
            since, until = min(one.start for one in late), max(one.end for one in late)
            await self._poller.read_range(since, until, subscription=run.subscription_id)
        after = await self._recorded(start, end, mark.length, linked)
        async with self._store.read() as tx:
            unread = set(await marks.unread_ones(tx))
        told += _untold(run, linked, unread, start)  # marked meanwhile
        linked = {name: link for name, link in linked.items() if name not in unread}
        differing = {}
        for key in counted.keys() | before.keys() | after.keys():
            link, add_on = linked.get(key[0]), add_ons.get(key[1])
            if link is None or add_on is None or add_on.plan_id != link.plan_id:
                continue  # traffic of nobody: counted as such by the poll
            if key not in counted and not link.organization_id:
                continue  # one whose organization is not known may not have been counted: that is no zero
            served, low, high = counted.get(key, 0), before.get(key, 0), after.get(key, 0)
            if not min(low, high) <= served <= max(low, high) and key[2].end > link.usage_from:
                differing[key] = served
        found = []
        for key, served in sorted(differing.items(), key=lambda item: (item[0][2], item[0][:2])):
            link, add_on, window = linked[key[0]], add_ons[key[1]], key[2]
            if window.start < link.usage_from:  # the link began in it: only what came after is billed here
                served = await self._since_link(link, add_on, window)
            async with self._store.read() as tx:
                place = await place_of(tx, link, add_on)
            recorded = after.get(key, 0) if served > after.get(key, 0) else before.get(key, 0)
            drift = compare_served(
                place, window, served=served, recorded=recorded, read_again_from=again_from
            )
            if drift is not None:
                found.append(drift)
        return found, told

    async def _recorded(
        self, start: datetime, end: datetime, length: timedelta, linked: Collection[str]
    ) -> dict[Key, int]:
        """What the ledger has, by regular window."""
        recorded: dict[Key, int] = defaultdict(int)
        async with self._store.read() as tx:
            sums = await usage.sums(tx, start, end)
        for (subscription_id, quota_id), pieces in sums.items():
            if subscription_id in linked:
                for piece, booked in pieces.items():
                    at = floor(piece.start, length)
                    recorded[subscription_id, quota_id, Window(at, at + length)] += booked.units
        return dict(recorded)

    async def _counted(
        self,
        linked: dict[str, SubscriptionLink],
        add_ons: dict[str, AddOnLink],
        subscriptions: set[str],
        quotas: set[str],
        start: datetime,
        end: datetime,
        length: timedelta,
    ) -> dict[Key, int]:
        """What Amplify counts, by window; a source may answer in several rows."""
        readings = await self._source.read(
            organizations={linked[one].organization_id for one in subscriptions},
            units={add_ons[one].unit for one in quotas},
            subscriptions=subscriptions,
            quotas=quotas,
            start=start,
            end=end,
            length=length,
        )
        counted: dict[Key, int] = defaultdict(int)
        for one in readings:
            window = Window(one.window_start, one.window_start + length)
            counted[one.subscription_id, one.quota_id, window] += one.units
        return dict(counted)

    async def _since_link(self, link: SubscriptionLink, add_on: AddOnLink, window: Window) -> int:
        """What was counted in the part of a window that came after the link."""
        counted = await self._counted(
            {link.subscription_id: link},
            {add_on.quota_id: add_on},
            {link.subscription_id},
            {add_on.quota_id},
            link.usage_from,
            window.end,
            window.end - link.usage_from,
        )
        pair = (link.subscription_id, add_on.quota_id)
        return sum(units for key, units in counted.items() if key[:2] == pair)


def _untold(
    run: Run, linked: Mapping[str, SubscriptionLink], unread: Collection[str], start: datetime
) -> list[dict[str, Any]]:
    """Entries for those that are yet to be read back, from here on; one is enough for each."""
    known = {one["subscription"] for one in run.not_compared if one["reason"] == scope.UNREAD}
    return [
        scope.not_compared(scope.SERVED, start, run.until, scope.UNREAD, subscription=name)
        for name in sorted(linked.keys() & set(unread) - known)
        if linked[name].state != "ended"
    ]


def _ceil(moment: datetime, length: timedelta) -> datetime:
    edge = floor(moment, length)
    return edge if edge == moment else edge + length
