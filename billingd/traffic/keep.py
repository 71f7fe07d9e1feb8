"""Keeping one reading: what is new becomes usage records with their actions, the rest is held or counted."""

from collections import Counter
from collections.abc import Collection, Mapping
from datetime import datetime

import structlog

from billingd.domain.delivery import AFTER_END, NOT_READ_BACK, OVER
from billingd.domain.events import report_action
from billingd.domain.money import shown
from billingd.domain.notices import provider_notice
from billingd.domain.usage import Booked, UsageRecord, book
from billingd.domain.windows import Window
from billingd.store import held, links, outbox, usage
from billingd.store.engine import Tx
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.marks import Mark
from billingd.store.stakes import usage_hold

log = structlog.get_logger()

Key = tuple[str, str, Window]
"""(subscription id, quota id, window)"""


def _reading_subject(key: Key) -> str:
    subscription_id, quota_id, window = key
    return f"reading:{subscription_id}:{quota_id}:{window.start.isoformat()}"


def _after_end(link: SubscriptionLink, window: Window) -> bool:
    """Whether nothing that was counted in that window may be billed any more without a person's word."""
    if link.usage_until is not None and window.start >= link.usage_until:
        return True
    return link.state == "ended" and link.billed_state in {None, *OVER}


def _before_link(link: SubscriptionLink, add_on: AddOnLink) -> bool:
    """Whether what was counted before `usage_from` was served in vain.

    While it is not approved nothing was served, and what an adopted one was served before, another program
    has billed.
    """
    return add_on.plan_id == link.plan_id and link.approved_at is not None and not link.adopted


class Keeper:
    """Keeps one reading in one transaction: usage records with their actions, and what does not fit."""

    def __init__(
        self,
        tx: Tx,
        linked: dict[str, SubscriptionLink],
        add_ons: dict[str, AddOnLink],
        now: datetime,
        *,
        unread: Mapping[str, Mark],
    ) -> None:
        self._tx = tx
        self._linked = linked
        self._add_ons = add_ons
        self._now = now
        self._unread = unread
        self.records = 0
        self.units = 0
        self.unlinked_units = 0
        self._held: list[Hold] = []

    async def keep(
        self,
        totals: Mapping[Key, int],
        counted: Mapping[Key, Mapping[Window, int]],
        recorded: Mapping[Key, Mapping[Window, Booked]],
        *,
        before: datetime,
    ) -> None:
        """Book differences; hold readings that shrank; count traffic of nobody.

        What is yet to be read back (`unread`) is only counted: nobody knows what Recurly has of it, so no
        record may be made. `totals` has what was read of each window, `counted` the same by the pieces a bill
        cuts it into, where there may be something to book. No record's time is `before` or later.
        """
        new: list[UsageRecord] = []
        late: list[UsageRecord] = []
        unread: Counter[Key] = Counter()
        early: set[tuple[str, str]] = set()
        for key, pieces in sorted(counted.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])):
            subscription_id, quota_id, _ = key
            link = self._linked.get(subscription_id)
            add_on = self._add_ons.get(quota_id)
            ours = {piece: units for piece, units in pieces.items() if self._billable(link, add_on, piece)}
            for piece, units in pieces.items():
                if units and piece not in ours:
                    self.unlinked_units += units
                    await usage.set_unlinked(
                        self._tx, subscription_id, quota_id, piece.start, units, now=self._now
                    )
            if link is None:
                continue
            if add_on is not None and _before_link(link, add_on) and pieces.keys() - ours.keys():
                early.add((subscription_id, quota_id))
            known = recorded.get(key, {})
            for record in book(subscription_id, quota_id, ours, known, before=before):
                if subscription_id in self._unread:
                    unread[subscription_id, quota_id, record.window] += record.units
                else:
                    (late if _after_end(link, record.window) else new).append(record)
        billable = [(one.subscription_id, one.quota_id, one.window.start) for one in (*new, *late)]
        await usage.forget_unlinked(self._tx, billable)
        in_all = {key: sum(one.units for one in pieces.values()) for key, pieces in recorded.items()}
        shrunk = [key for key, units in in_all.items() if totals.get(key, 0) < units]
        for key in shrunk:
            await self._hold_shrunk(key, read=totals.get(key, 0), recorded=in_all[key])
        await self._mended(recorded.keys() - set(shrunk))
        await self._record(new)
        await self._hold_late(late)
        for key, units in unread.items():
            self.unlinked_units += units
            await usage.count_unread(self._tx, *key, units, now=self._now)
        for subscription_id, mark in self._unread.items():
            if (link := self._linked.get(subscription_id)) is not None and link.state == "ended":
                await self._hold_unread(link, mark)
        for subscription_id, quota_id in sorted(early):
            await self._hold_early(self._linked[subscription_id], self._add_ons[quota_id])
        await self._announce()

    @staticmethod
    def _billable(link: SubscriptionLink | None, add_on: AddOnLink | None, window: Window) -> bool:
        """Whether traffic of that piece belongs to a link: from `usage_from` on, of the linked plan."""
        if link is None or add_on is None or add_on.plan_id != link.plan_id:
            return False
        return window.start >= link.usage_from

    async def _record(self, records: list[UsageRecord]) -> None:
        placed = await usage.insert(self._tx, records, now=self._now)
        await outbox.insert(self._tx, [report_action(id_, record) for id_, record in placed], now=self._now)
        self.records += len(placed)
        self.units += sum(record.units for _, record in placed)

    async def _hold_late(self, records: list[UsageRecord]) -> None:
        """Usage that shows up after its subscription ended at Recurly, where no invoice would ever carry it,
        or that was counted after its end at Amplify, where nothing should have been served.
        """
        for id_, record in await usage.insert(self._tx, records, now=self._now, state="held"):
            link = self._linked[record.subscription_id]
            when = "arrived after" if link.state == "ended" else "were counted after"
            where = "Recurly" if link.state == "ended" else "Amplify"
            reason = (
                f"{record.units} unit(s) of {self._add_ons[record.quota_id].title} in the window from "
                f"{record.window.start.isoformat()} {when} subscription {link.title} ended at {where}."
            )
            recorded = await usage.find(self._tx, id_)
            await self._tell(
                await usage_hold(self._tx, recorded, AFTER_END, reason, report_action(id_, record))
            )

    async def _hold_early(self, link: SubscriptionLink, add_on: AddOnLink) -> None:
        """Usage of a subscription that Amplify served before Recurly had it: no record can carry it.

        That is one that was approved by somebody else, or came from another plan, while billingd was not
        there. One item for each quota, with all that is known of.
        """
        units = await usage.unlinked_before(self._tx, link.subscription_id, add_on.quota_id, link.usage_from)
        if not units:
            return
        reason = (
            f"{units} unit(s) of {add_on.title} in all were served to subscription {link.title} before "
            f"{link.usage_from.isoformat()}, when Recurly's subscription {link.uuid} was made, which takes "
            "no usage of an earlier time. Charge them there by hand, or leave them; then write this off."
        )
        await self._tell(await self._sum("before_link", "before", link, add_on, units, reason))

    async def _hold_unread(self, link: SubscriptionLink, mark: Mark) -> None:
        """Usage of one that ended while it was yet to be read back: one sum for each quota.

        What a person decided on since is left out of it.
        """
        since = max(link.usage_from, datetime.fromisoformat(mark.detail["traffic_from"]))
        counted = await usage.unlinked_since(self._tx, link.subscription_id, since)
        decided = await held.decided(self._tx, link.subscription_id, NOT_READ_BACK, since=mark.at)
        for quota_id, units in sorted(counted.items()):
            add_on = self._add_ons.get(quota_id)
            if add_on is None or add_on.plan_id != link.plan_id:
                continue  # traffic of nobody
            units -= sum(item["units"] for item in decided if item["add_on_code"] == add_on.add_on_code)
            if units <= 0:
                continue
            reason = (
                f"{units} unit(s) of {add_on.title} were counted for subscription {link.title} since "
                f"{since.isoformat()}. It is over at Amplify, and since the store was restored Recurly has "
                f"not shown {link.uuid}: none of this is recorded or sent, and some of it Recurly may have "
                "billed before. Charge by hand what is on no invoice, or leave it; then write this off. "
                "Should Recurly show it before that, this closes, and what Recurly lacks is billed."
            )
            await self._tell(await self._sum(NOT_READ_BACK, "unread", link, add_on, units, reason))

    async def _sum(
        self, kind: str, prefix: str, link: SubscriptionLink, add_on: AddOnLink, units: int, reason: str
    ) -> Hold:
        """The held item of units that are in no record, of one quota."""
        plan = await links.find_plan(self._tx, link.plan_id)
        assert plan is not None
        alone = None if add_on.prices is None else add_on.prices.at_stake(units, on_top_of=0)
        return Hold(
            kind,
            f"{prefix}:{link.subscription_id}:{add_on.quota_id}",
            reason,
            subscription_id=link.subscription_id,
            add_on_code=add_on.add_on_code,
            units=units,
            amount=None if alone is None else shown(alone),
            currency=None if alone is None else plan.currency,
        )

    async def _hold_shrunk(self, key: Key, *, read: int, recorded: int) -> None:
        subscription_id, quota_id, window = key
        reason = (
            f"Amplify now counts {read} unit(s) for the window from {window.start.isoformat()}, where "
            f"{recorded} were recorded before. Totals of a past window only grow, so nothing was taken back. "
            "Compare both sides; credit the difference at Recurly if it was never served."
        )
        item = Hold(
            "reading_shrank",
            _reading_subject(key),
            reason,
            subscription_id=subscription_id,
            add_on_code=self._add_ons[quota_id].add_on_code if quota_id in self._add_ons else None,
            units=recorded - read,
        )
        await self._tell(item)

    async def _mended(self, agreeing: Collection[Key]) -> None:
        """Readings that had shrunk and have grown back are held no longer."""
        if not agreeing:
            return
        standing = {row["subject"] for row in await held.standing(self._tx, kind="reading_shrank")}
        for key in agreeing:
            if (subject := _reading_subject(key)) in standing:
                await held.close(self._tx, subject=subject, resolution="the reading grew back", now=self._now)

    async def _tell(self, item: Hold) -> None:
        if await held.add(self._tx, item, now=self._now):
            log.warning("held", held_kind=item.kind, about=item.subject, reason=item.reason)
            self._held.append(item)

    async def _announce(self) -> None:
        """One notice for all that this reading holds: nonsense from a far side must not flood people."""
        if not self._held:
            return
        first = self._held[0]
        body = first.reason
        if len(self._held) > 1:
            body = (
                f"{len(self._held)} things are held; `billingd held list` shows them all. The first: {body}"
            )
        key = f"held:{first.kind}:{first.subject}:{self._now.isoformat()}"
        notice = provider_notice(key, "Usage is held, not billed", body)
        await outbox.insert(self._tx, [notice], now=self._now)
