"""Read-back: what Recurly holds of ours and the ledger does not know is put into the ledger.

After a restore the ledger is as old as the copy. Each tag that was used since must be known before any window
is booked again, or a record would be made a second time; and so must those of a subscription that is linked
again, because its first link came after the copy. A record that was corrected counts with its corrections:
that is what the ledger had of it.

Nothing is sent before Amplify is listed again, too; and what ended at Recurly is told of only when what that
leads to is done: it may have been this store's own doing, in the life that is forgotten.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final, Protocol

import structlog

from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.delivery import MISSING, NOT_READ_BACK
from billingd.domain.errors import NotFound, ReadingBack, Retryable
from billingd.domain.events import refresh_action
from billingd.domain.notices import provider_notice
from billingd.domain.usage import (
    RECURLY_SECOND,
    UNITS_MAX,
    UsageRecord,
    corrected_tag,
    pair_hash,
    parse_tag,
    usage_intent,
)
from billingd.loops import Clock
from billingd.store import held, history, intents, links, marks, outbox, read_back, usage
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import PlanLink, SubscriptionLink
from billingd.store.marks import RECOVERING, RESTORED, RESYNCED, Mark
from billingd.store.read_back import Taken
from billingd.traffic import far_ends
from billingd.traffic.periods import PeriodWatch
from billingd.traffic.report import AROUND, staying

log = structlog.get_logger()

MARGIN: Final = timedelta(days=2)
"""How much more than what was recorded since the copy is listed: clocks differ, and time is cheap here."""

STRETCH: Final = timedelta(days=7)
"""Records that wait are looked for together as long as no more than this lies between them."""

BEGINNING: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Before any usage of ours."""

AGAIN: Final = timedelta(minutes=1)
"""How far apart two 404s of a subscription are that are believed: a read may lag."""

PAUSE: Final = timedelta(seconds=1)
SLOWLY: Final = timedelta(minutes=1)
NEVER: Final = timedelta(days=1)
"""How often to look when there is nothing to read back: only a restore makes it, with no daemon running."""

UNKNOWN: Final = "an unknown time"
"""When a copy was made that does not say it."""

SHOWN: Final = "shown_again"
"""Kind of a held item: Recurly shows one again whose usage a person has decided on meanwhile."""

READ_BACK: Final = "read_back"
CORRECTION_READ_BACK: Final = history.CORRECTION_READ_BACK
"""How the history calls a record, or its correction, that was learnt of from Recurly."""

Found = Mapping[str, tuple[BilledUsage, ...]]
"""What Recurly holds of a subscription, by add-on code."""


class Billing(Protocol):
    """What is read at Recurly."""

    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    async def list_usage(
        self, subscription_uuid: str, add_on_code: str, *, begin: datetime, end: datetime
    ) -> tuple[BilledUsage, ...]: ...
    async def list_recorded_usage(
        self, subscription_uuid: str, add_on_code: str, *, since: datetime
    ) -> tuple[BilledUsage, ...]: ...


class ReadBack:
    """Knows whether the store was restored and not read back yet, and does that.

    `unsettled` is how long a request of the time before the restore may still take effect; `horizon` how long
    a window is read again anyhow.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        watch: PeriodWatch,
        *,
        unsettled: timedelta,
        horizon: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._watch = watch
        self._unsettled = unsettled
        self._horizon = horizon
        self._done: bool | None = None
        self._may_send: bool | None = None
        self._began_at: datetime | None = None
        self._left: int | None = None
        watch.read_first = self._read_first

    # After a restore.

    async def finished(self) -> bool:
        """Whether nothing is to be read back (any more): until then nothing is sent, and no window read."""
        if self._done is None:
            async with self._store.read() as tx:
                self._done = await marks.find(tx, RESTORED) is None
        return self._done

    async def may_send(self) -> bool:
        """Whether it is finished, and Amplify was listed since the restore: only then anything is sent."""
        if not await self.finished():
            return False
        if not self._may_send:
            async with self._store.read() as tx:
                self._may_send = _sends(await marks.find(tx, RECOVERING))
        return self._may_send

    async def require(self) -> None:
        """Raise Retryable until it is finished."""
        if not await self.finished():
            raise ReadingBack(f"{self.reason}; try again later")

    @property
    def reason(self) -> str | None:
        """Why the daemon is not ready, for people."""
        if self._done is False:
            left = "" if self._left is None else f" ({self._left} subscription(s) left)"
            return f"reading back from Recurly after a restore{left}"
        if self._may_send is False:
            return "listing Amplify after a restore"
        return None

    async def idle(self) -> timedelta:
        """How long there is nothing to do."""
        if not await self.may_send():
            return PAUSE
        async with self._store.read() as tx:
            return NEVER if await marks.find(tx, RECOVERING) is None else SLOWLY

    async def run_once(self) -> bool:
        """Read one subscription back, the next after the last; the mark is gone after the last of all.

        Whoever was billing until the restore may have sent something that is not there yet: that is waited
        out first. What Recurly did not show is looked at again then, and left unread when it still does not.
        After the last one, wait for Amplify to be listed, and for what that leads to.
        """
        async with self._store.read() as tx:
            mark = await marks.find(tx, RESTORED)
            billing = [] if mark is None else await links.billing_since(tx, _copied_at(mark))
            unread = await marks.unread_ones(tx)
        self._done = mark is None
        if mark is None:
            return await self._recover()
        if self._began_at is None:
            self._began_at = self._clock.now()
            log.warning("read_back.began", copied_at=mark.detail.get("copied_at"), file=mark.detail["file"])
        if self._clock.now() < min(mark.at, self._began_at) + self._unsettled:
            return False
        after = mark.detail.get("read", "")
        # in this order, which decides where to go on: a database has its own
        left = sorted(
            (link for link in billing if link.subscription_id > after), key=lambda link: link.subscription_id
        )
        missing = [
            link
            for link in billing
            if link.billed_state == MISSING
            and link.subscription_id <= after
            and link.subscription_id not in unread
        ]
        self._left = len(left) + len(missing)
        if left:
            if await self.subscription(left[0], since=_copied_at(mark)) is None:
                async with self._store.write() as tx:
                    await _note(tx, left[0], 0)
        elif missing:
            return await self._look_again(mark, missing)
        else:
            await self._finish(mark)
        return True

    async def _look_again(self, mark: Mark, missing: Sequence[SubscriptionLink]) -> bool:
        """Look at the first of those that Recurly did not show, once a minute has passed since."""
        now = self._clock.now()
        due = [one for one in missing if one.seen_at is None or not one.seen_at <= now < one.seen_at + AGAIN]
        if not due:
            return False
        if await self.subscription(due[0], since=_copied_at(mark)) is None:
            await self._leave(due[0], since=_copied_at(mark))
        return True

    async def _leave(self, link: SubscriptionLink, *, since: datetime) -> None:
        """Nothing of it is recorded until Recurly shows it again, and it is read back (`_read_first`)."""
        now = self._clock.now()
        async with self._store.write() as tx:
            detail = {
                "subscription": link.subscription_id,
                "since": since.isoformat(),
                "traffic_from": (await read_back.read_from(tx, horizon=self._horizon, now=now)).isoformat(),
            }
            await marks.note(tx, marks.unread(link.subscription_id), at=now, detail=detail)
        log.error("read_back.left_unread", subscription=link.subscription_id, uuid=link.uuid)

    async def _read_first(self, link: SubscriptionLink) -> str:
        """One that was left unread is there again: read it back; the state that counts from now on."""
        async with self._store.read() as tx:
            unread = await marks.find(tx, marks.unread(link.subscription_id))
        if unread is None:
            return await self._watch.look_at(link)
        if await self._ask_first(link, unread):
            return MISSING
        since = datetime.fromisoformat(unread.detail["since"])
        if await self.subscription(link, since=since) is None:
            return MISSING
        async with self._store.read() as tx:
            seen = await links.find_subscription(tx, link.subscription_id)
        return MISSING if seen is None or seen.billed_state is None else seen.billed_state

    async def _ask_first(self, link: SubscriptionLink, unread: Mark) -> bool:
        """Whether a person decided on its usage meanwhile, and has yet to say that Recurly shall bill it."""
        now, of = self._clock.now(), link.subscription_id
        async with self._store.write() as tx:
            decided = await held.decided(tx, of, NOT_READ_BACK, since=unread.at)
            if not decided or await held.decided(tx, of, SHOWN, since=unread.at):
                return False
            units, subject = sum(item["units"] for item in decided), f"subscription:{of}:shown"
            reason = (
                f"Recurly shows {link.uuid} of {link.title} ({link.name}) again, which is over at Amplify; "
                f"meanwhile somebody decided on {units} unit(s) of it. To have Recurly bill what it lacks of "
                "them, take back what was charged by hand, then release this. Or terminate it there, then "
                "release this: what it lacks is held. Until then nothing of it is read back, billed or ended."
            )
            again = refresh_action(link.uuid, because="released")
            if await held.add(tx, Hold(SHOWN, subject, reason, again, of), now=now):
                log.warning("held", held_kind=SHOWN, about=subject, reason=reason)
                key, title = f"held:{subject}:{now.isoformat()}", f"{link.title} is at Recurly after all"
                await outbox.insert(tx, [provider_notice(key, title, reason)], now=now)
        return True

    async def _finish(self, mark: Mark) -> None:
        now = self._clock.now()
        records = mark.detail.get("records", 0)
        copied_at = mark.detail.get("copied_at") or UNKNOWN
        body = (
            f"The store was put back from {mark.detail['file']}, which was copied at {copied_at}. {records} "
            "usage record(s) that Recurly has and the copy lacked were read back; billing goes on. What "
            "people decided since the copy (held items released or written off, actions discarded) is "
            "forgotten, and some notices may come again."
        )
        notice = provider_notice(f"restored:{mark.at.isoformat()}", "The store was restored", body)
        async with self._store.write() as tx:
            await marks.clear(tx, RESTORED)
            await marks.note(tx, RECOVERING, at=mark.at)
            await history.append(
                tx,
                "store",
                "restored",
                now=now,
                file=mark.detail["file"],
                copied_at=copied_at,
                records=records,
            )
            await outbox.insert(tx, [notice], now=now)
        self._done, self._may_send = True, False
        log.warning("read_back.finished", records=records)

    async def _recover(self) -> bool:
        """See whether Amplify is listed again, and tell of what ended at Recurly for no reason of ours."""
        now = self._clock.now()
        async with self._store.write() as tx:
            mark = await marks.find(tx, RECOVERING)
            if mark is None:
                self._may_send = True
                return False
            listed = _sends(mark) or await marks.find(tx, RESYNCED) is not None  # a restore takes it away
            if listed:
                if await far_ends.tell_again(tx, since=mark.at, now=now):
                    await marks.clear(tx, RECOVERING)
                elif not _sends(mark):
                    await marks.note(tx, RECOVERING, at=mark.at, detail={"listed": True})
        opened, self._may_send = listed and not self._may_send, listed
        if opened:
            log.warning("read_back.amplify_listed")
        return opened

    async def subscription(self, link: SubscriptionLink, *, since: datetime) -> int | None:
        """Read one subscription back: its periods, what was recorded since, and what waits to be reported.

        Returns how many records the ledger lacked; None: Recurly does not show the subscription. All of it
        is written in one transaction, and doing it again changes nothing.
        """
        try:
            theirs = await self._billing.get_subscription(link.uuid)
        except NotFound as error:
            await self._watch.missing(link, error)
            return None
        async with self._store.read() as tx:
            add_ons = await links.add_ons_of(tx, link.plan_id)
            waiting = await read_back.waiting(tx, link.subscription_id)
            unread = await marks.find(tx, marks.unread(link.subscription_id))
        if unread is not None:  # by an earlier restore
            since = min(since, datetime.fromisoformat(unread.detail["since"]))
        found: dict[str, tuple[BilledUsage, ...]] = {}
        for add_on in add_ons:
            uuid, code = link.uuid, add_on.add_on_code
            times = [one.usage_timestamp for one in waiting if one.quota_id == add_on.quota_id]
            try:
                there = await self._billing.list_recorded_usage(
                    uuid, code, since=since - self._horizon - MARGIN
                )
                for begin, end in _stretches(times):
                    there += await self._billing.list_usage(
                        uuid, code, begin=begin - AROUND, end=end + AROUND
                    )
            except NotFound as error:
                _lacks(theirs, code, error)
                continue
            found[code] = there
        new = 0

        async def along(tx: Tx) -> None:
            nonlocal new
            now = self._clock.now()
            new, _ = await self._keep(tx, link, found, now=now)
            await _note(tx, link, new)
            if unread is not None:
                begins = datetime.fromisoformat(unread.detail["traffic_from"])
                await marks.clear(tx, unread.name)
                for item in await held.standing(tx, kind=NOT_READ_BACK):
                    if item["subscription_id"] == link.subscription_id:
                        resolution = f"Recurly shows it as {theirs.state} again: what it lacks is recorded"
                        await held.close_one(tx, item["id"], resolution=resolution, now=now)
                # all of it, so that no window of another length is read over what was just written down, and
                # an end waits for it
                none = timedelta(0)
                await read_back.read_again(tx, link.subscription_id, begins, horizon=none, now=now)

        await self._watch.keep(link, theirs, along=along)  # and where bills were cut meanwhile
        if new or unread is not None:
            log.info("read_back.subscription", subscription=link.subscription_id, records=new)
        return new

    # Before a link is written.

    async def list(self, made: BilledSubscription, plan: PlanLink) -> Found:
        """All usage that Recurly holds of a subscription that is about to be linked, by add-on code."""
        async with self._store.read() as tx:
            codes = [one.add_on_code for one in await links.add_ons_of(tx, plan.plan_id)]
        return await self._all(made.uuid, codes)

    async def list_gained(
        self, plan_id: str, add_on_codes: Sequence[str]
    ) -> Sequence[tuple[SubscriptionLink, Found]]:
        """The same of add-ons that a linked plan gains, for each of its subscriptions that has any."""
        async with self._store.read() as tx:
            subscribed = [one for one in await self._may_have_any(tx) if one.plan_id == plan_id]
        found = [
            (link, await self._all(link.uuid, add_on_codes))
            for link in subscribed
            if link.billed_state != MISSING
        ]
        return [(link, there) for link, there in found if any(there.values())]

    async def keep(self, tx: Tx, link: SubscriptionLink, found: Found, *, now: datetime) -> None:
        """Put it into the ledger, in the transaction that writes the link (or the add-ons' links).

        A subscription that was linked before, in a life of the store that is forgotten, counts from where it
        counted then; traffic that was nobody's meanwhile is read again.
        """
        new, earliest = await self._keep(tx, link, found, now=now)
        begins = min(link.usage_from, earliest or link.usage_from)
        await read_back.begin_earlier(tx, link.subscription_id, begins)
        # what was written down may lie in windows of another length than those that are read again anyhow
        of, horizon = link.subscription_id, timedelta(0) if new else self._horizon
        moved = await read_back.read_again(tx, of, begins, horizon=horizon, now=now)
        if new or moved:
            log.warning(
                "read_back.linked_again",
                subscription=link.subscription_id,
                records=new,
                traffic_from=None if moved is None else moved.isoformat(),
            )

    @staticmethod
    async def _may_have_any(tx: Tx) -> Sequence[SubscriptionLink]:
        """What Recurly may have billed in a life of the store that is forgotten."""
        restored = [one for one in await history.of(tx, "store") if one.kind == "restored"]
        if not restored:
            return await links.billing(tx)
        return await links.billing_since(tx, _moment(restored[-1].detail["copied_at"]))

    async def _all(self, uuid: str, add_on_codes: Iterable[str]) -> Found:
        found: dict[str, tuple[BilledUsage, ...]] = {}
        for code in add_on_codes:
            try:
                found[code] = await self._billing.list_recorded_usage(uuid, code, since=BEGINNING)
            except NotFound as error:
                try:
                    theirs = await self._billing.get_subscription(uuid)
                except NotFound:
                    raise Retryable(f"Recurly does not show {uuid}: {error}") from error
                _lacks(theirs, code, error)
        return found

    async def _keep(
        self, tx: Tx, link: SubscriptionLink, found: Found, *, now: datetime
    ) -> tuple[int, datetime | None]:
        """How many records the ledger lacked, and where the first window of any of ours begins."""
        new = 0
        earliest: datetime | None = None
        quotas = {one.add_on_code: one.quota_id for one in await links.add_ons_of(tx, link.plan_id)}
        for code, there in found.items():
            if code not in quotas:
                continue
            ours, corrections = _ours(link.subscription_id, quotas[code], there, now)
            known = await usage.by_tags(tx, list(ours))
            for tag, one in known.items():
                record, usage_id = ours[tag].record, ours[tag].usage_id
                if record.units != one.record.units:
                    log.error(
                        "read_back.units_differ", tag=tag, here=one.record.units, at_recurly=record.units
                    )
                if one.state != "reported":
                    await intents.done(tx, usage_intent(tag), result=usage_id)
                    await usage.reported(tx, one.id, usage_id=usage_id, now=ours[tag].at)
                    name = usage_intent(tag)
                    await history.append(tx, name, READ_BACK, now=now, was=one.state, usage_id=usage_id)
                    await held.close(tx, subject=f"usage:{tag}", resolution="Recurly has it", now=now)
            lacking = [each for tag, each in ours.items() if tag not in known]
            new += await read_back.insert(tx, lacking, now=now)
            told = [
                (usage_intent(one.record.merchant_tag), READ_BACK, {"usage_id": one.usage_id})
                for one in lacking
            ]
            await history.append_all(tx, told, now=now)
            for each in corrections:
                one_tag = each.merchant_tag or ""
                if await read_back.learn_correction(tx, one_tag, each.id, now=now):
                    name = usage_intent(corrected_tag(one_tag) or one_tag)
                    said = {"tag": one_tag, "units": each.units, "usage_id": each.id}
                    if each.created_at is not None:
                        said["posted_at"] = history.text_of(each.created_at)
                    await history.append(tx, name, CORRECTION_READ_BACK, now=now, **said)
            starts = [one.record.window.start for one in ours.values()]
            earliest = min([*starts, earliest] if earliest is not None else starts, default=None)
        return new, earliest


def _copied_at(mark: Mark) -> datetime:
    return _moment(mark.detail.get("copied_at") or UNKNOWN)


def _moment(copied_at: str) -> datetime:
    """When a copy was made, long ago when that is not known."""
    return BEGINNING + timedelta(days=366) if copied_at == UNKNOWN else datetime.fromisoformat(copied_at)


async def _note(tx: Tx, link: SubscriptionLink, records: int) -> None:
    """How far reading back has come, in the transaction that keeps what was read."""
    mark = await marks.find(tx, RESTORED)  # as it is now: another process may have gone on, or be done
    if mark is not None:
        read = max(mark.detail.get("read", ""), link.subscription_id)
        counted = mark.detail.get("records", 0) + records
        await marks.note(tx, RESTORED, at=mark.at, detail={**mark.detail, "read": read, "records": counted})


def _lacks(theirs: BilledSubscription, code: str, error: NotFound) -> None:
    """A 404 of an add-on's usage is no answer where the subscription has it. Raises Retryable then."""
    if code in theirs.add_on_codes:
        raise Retryable(f"Recurly does not show the usage of {code} on {theirs.uuid}: {error}") from error


def _stretches(times: Sequence[datetime]) -> list[tuple[datetime, datetime]]:
    """Times in order, told apart where more than STRETCH lies between two: first and last of each part."""
    if not times:
        return []
    gaps = [(one, other) for one, other in pairwise(times) if other - one > STRETCH]
    starts = [times[0], *(other for _, other in gaps)]
    ends = [*(one for one, _ in gaps), times[-1]]
    return list(zip(starts, ends, strict=True))


def _sends(mark: Mark | None) -> bool:
    """Whether Amplify was listed since the restore that left this mark RECOVERING."""
    return mark is None or bool(mark.detail.get("listed"))


def _ours(
    subscription_id: str, quota_id: str, there: Iterable[BilledUsage], now: datetime
) -> tuple[dict[str, Taken], list[BilledUsage]]:
    """What carries a tag of this pair, by tag: of doubles the one that the audit keeps.

    Then the corrections. Where a tag has any, the record has what all that is billed under it comes to with
    them: as many units as it had when it was corrected. `now` stands in where Recurly does not say since when
    it has one.
    """
    pair = pair_hash(subscription_id, quota_id)
    by_tag: dict[str, dict[str, BilledUsage]] = defaultdict(dict)
    corrections: dict[str, dict[str, BilledUsage]] = defaultdict(dict)
    for one in there:
        tag = one.merchant_tag or ""
        corrected = corrected_tag(tag)
        said = parse_tag(corrected or tag)
        if said is not None and said.pair_hash == pair:
            (by_tag if corrected is None else corrections)[corrected or tag][one.id] = one
    ours: dict[str, Taken] = {}
    for tag, records in by_tag.items():
        one, *extra = sorted(records.values(), key=staying)
        units = one.units
        if tag in corrections:
            units += sum(double.units for double in extra if double.billed_at is not None)
            units += sum(each.units for each in corrections[tag].values())
        said = parse_tag(tag)
        if said is None or not 1 <= abs(units) <= UNITS_MAX:
            log.error("read_back.units_impossible", tag=tag, usage=one.id, units=units)
            continue
        window = said.window
        at = one.usage_timestamp
        if not window.start <= at < window.end:  # somebody moved it; the audit and `reconcile` tell
            log.error("read_back.time_differs", tag=tag, usage=one.id, at=at.isoformat())
            at = window.end - RECURLY_SECOND
        record = UsageRecord(subscription_id, quota_id, window, said.revision, units, at, tag)
        ours[tag] = Taken(record, one.id, one.created_at or now)
    return ours, [each for of in corrections.values() for each in of.values()]
