"""Audit: each open billing cycle is compared with the ledger while its mistakes can still be undone."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol

import structlog

from billingd.domain.attempts import UNFINISHED, Leased
from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.delivery import CORRECTABLE
from billingd.domain.errors import NotFound, Refused
from billingd.domain.events import REPORT_USAGE, audit_action
from billingd.domain.notices import provider_notice
from billingd.domain.periods import Period, period_of
from billingd.domain.sending import idempotency_key
from billingd.domain.usage import TAG_PREFIX, corrected_tag, usage_intent
from billingd.loops import Clock
from billingd.once import DOUBTED, IGNORED, KEYS, mistrust
from billingd.store import held, history, intents, links, marks, outbox, periods, usage
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import AddOnLink, SubscriptionLink
from billingd.store.usage import Known

log = structlog.get_logger()

DOUBLE: Final = "double_record"
FOREIGN: Final = "foreign_record"
WRONG: Final = "wrong_amount"
SECOND: Final = timedelta(seconds=1)
NOT_ENDED: Final = " An audit could not end this doubt:"
"""How a doubt's reason goes on from where it may need a person."""


class Billing(Protocol):
    """What is read and removed at Recurly."""

    async def list_usage(
        self,
        subscription_uuid: str,
        add_on_code: str,
        *,
        begin: datetime,
        end: datetime,
        status: Literal["all", "unbilled"] = "all",
    ) -> tuple[BilledUsage, ...]: ...
    async def list_subscriptions(self, account_code: str) -> tuple[BilledSubscription, ...]: ...
    async def remove_usage(self, usage_id: str, *, key: str, retried: bool = False) -> None: ...
    def far_now(self) -> datetime: ...


class UsageAuditor:
    """Handles `audit_usage`."""

    def __init__(self, store: Store, clock: Clock, billing: Billing, *, settling: timedelta) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._settling = settling

    async def audit(self, action: Leased) -> None:
        """List what Recurly holds of the open cycle, billed or not, add-on by add-on.

        A tag that is there more than once: the unbilled extra records are removed, billed ones are held for
        a refund. Records that billingd never made are held up to a person. A doubt about the idempotency key
        of one that is there once is settled, whatever its units are.
        """
        began = self._clock.now()
        async with self._store.read() as tx:
            link = await links.find_subscription(tx, action.args["id"])
            unread = await marks.find(tx, marks.unread(action.args["id"])) is not None
        if link is None or unread:  # what of it is ours is not known before it is read back
            why = "its subscription is not linked" if link is None else "its usage is yet to be read back"
            await self._doubt_stands(action.args["id"], began, why)
            return
        async with self._store.read() as tx:
            known = await periods.of(tx, link.subscription_id)
            add_ons = await links.add_ons_of(tx, link.plan_id)
            writes = [*await _doubted(tx, link), *([asked] if (asked := action.args.get("write")) else [])]
            tags = [tag for write in writes if (tag := _tag_of(write)) is not None]
            doubted = await usage.by_tags(tx, [corrected_tag(tag) or tag for tag in tags])
        # what an adopted subscription was billed for before its cut-over is the original integration's
        begin = max(max(known).started_at, link.usage_from) if known else link.usage_from
        looked = not add_ons
        seen: set[str] = set()
        for add_on in add_ons:
            try:
                there = await self._listed(link, add_on, known, begin, doubted.values())
            except NotFound:
                continue  # a quota that came after this subscription: it has no such add-on
            await self._add_on(link, add_on, there, begin)
            looked = True
            seen.update(tag for tag, records in there.items() if len(records) == 1)
        if looked and (not writes or await self._alone(link)):
            await self._clear_doubt(link, began, seen)
        await self._doubt_stands(link.subscription_id, began, "Recurly does not show the record just once")

    async def _listed(
        self,
        link: SubscriptionLink,
        add_on: AddOnLink,
        known: Sequence[Period],
        begin: datetime,
        doubted: Iterable[Known],
    ) -> dict[str, list[BilledUsage]]:
        """By tag: all of the open cycle, corrections of earlier ones, and what stands beside a doubted one.

        The twin of a correction may be billed already, so what is there at its time is asked for, too; but
        nothing of a trial ever is. What is doubted may have been billed with its twin meanwhile.
        """
        uuid, code = link.uuid, add_on.add_on_code
        there = list(await self._billing.list_usage(uuid, code, begin=begin, end=self._billing.far_now()))
        early: Sequence[BilledUsage] = ()
        if link.usage_from < begin:
            early = await self._billing.list_usage(
                uuid, code, begin=link.usage_from, end=begin, status="unbilled"
            )
        async with self._store.read() as tx:
            ours = await usage.by_tags(tx, [one.merchant_tag for one in early if one.merchant_tag])
        corrections = [one for one in early if one.merchant_tag in ours and not _in_trial(one, known)]
        times = {one.usage_timestamp.replace(microsecond=0) for one in corrections}
        records = [one.record for one in doubted if one.record.quota_id == add_on.quota_id]
        earlier = [one for one in records if one.usage_timestamp < begin]
        tags = {*ours, *(one.merchant_tag for one in earlier)}
        for at in sorted({*times, *(one.usage_timestamp for one in earlier)}):
            near = await self._billing.list_usage(uuid, code, begin=at - SECOND, end=at + SECOND)
            there += [twin for twin in near if _corrected(twin) in tags]
        by_tag: dict[str, dict[str, BilledUsage]] = defaultdict(dict)
        for one in (*there, *early):
            by_tag[one.merchant_tag or ""][one.id] = one
        return {tag: list(records.values()) for tag, records in by_tag.items()}

    async def _add_on(
        self,
        link: SubscriptionLink,
        add_on: AddOnLink,
        by_tag: Mapping[str, list[BilledUsage]],
        begin: datetime,
    ) -> None:
        """Hold, or undo, what is not there once with its units."""
        async with self._store.read() as tx:
            tags = {corrected_tag(tag) or tag for tag in by_tag if tag.startswith(TAG_PREFIX)}
            known_tags = await usage.by_tags(tx, sorted(tags))
        ours = {tag: known for tag, known in known_tags.items() if tag in by_tag}
        corrections: dict[str, int] = defaultdict(int)
        foreign: list[BilledUsage] = []
        for tag, records in by_tag.items():
            if (corrected := corrected_tag(tag)) is not None and corrected in known_tags:
                corrections[corrected] += sum(one.units for one in records)
            elif tag not in known_tags:
                foreign += records
        await self._tell_foreign(link, add_on, foreign, begin)
        right: set[str] = set()
        for tag, known in ours.items():
            units = known.record.units
            first, *extra = sorted(
                by_tag[tag], key=lambda one: (one.billed_at is None, one.units != units, one.id)
            )
            if known.state == "recorded" and await self._reporting(known):
                pass  # its report looks for it; what was removed may still be shown by a list that lags
            elif known.state != "reported":
                await self._there_after_all(tag, known, first)
            elif known.usage_id != first.id:
                async with self._store.write() as tx:
                    await usage.renamed(tx, known.id, usage_id=first.id)
                    name, now = usage_intent(tag), self._clock.now()
                    await history.append(tx, name, "renamed", now=now, was=known.usage_id, usage_id=first.id)
            there, under = first.units, tag
            if tag in corrections:  # then all that is billed counts, and none of it is a double any more
                there += corrections[tag] + sum(one.units for one in extra if one.billed_at is not None)
                extra = [one for one in extra if one.billed_at is None]
                under = f"{tag}, its corrections included"
            if there == units:
                right.add(f"audit:{tag}")
            else:
                reason = f"Recurly has {there} unit(s) under {under}, where {units} were recorded"
                await self._hold(link, add_on, WRONG, tag, reason, there - units)
            for one in extra:
                await self._prove_doubt()
                await self._undo(link, add_on, tag, one)
        await self._close_mended(right)

    async def _close_mended(self, right: set[str]) -> None:
        """Amounts that were wrong and were seen to be right now need nobody any more."""
        async with self._store.write() as tx:
            for item in await held.standing(tx, kind=WRONG):
                if item["subject"] in right:
                    resolution = "Recurly agrees with the ledger"
                    await held.close_one(tx, item["id"], resolution=resolution, now=self._clock.now())

    async def _reporting(self, known: Known) -> bool:
        """Whether a record's report is still to come."""
        subject = f"usage:{known.record.subscription_id}:{known.record.quota_id}"
        async with self._store.read() as tx:
            rows = await outbox.select(tx, states=UNFINISHED, kind=REPORT_USAGE, subject=subject)
        return any(row["args"].get("record") == known.id for row in rows)

    async def _there_after_all(self, tag: str, known: Known, found: BilledUsage) -> None:
        """Recurly has a record that was given up (held, written off) while its outcome was unknown."""
        now, name = self._clock.now(), usage_intent(tag)
        async with self._store.write() as tx:
            await intents.done(tx, name, result=found.id)
            await usage.reported(tx, known.id, usage_id=found.id, now=now)
            await history.append(tx, name, "there_after_all", now=now, was=known.state, usage_id=found.id)
            await held.close(tx, subject=f"usage:{tag}", resolution="Recurly has it after all", now=now)
        log.info("usage.there_after_all", tag=tag, usage=found.id)

    async def _undo(self, link: SubscriptionLink, add_on: AddOnLink, tag: str, extra: BilledUsage) -> None:
        """Remove a record that is there twice; when it was billed already, a person must refund it."""
        if extra.billed_at is None:
            # removing by id cannot take effect twice, so each try has a key of its own
            key = idempotency_key(f"remove:{extra.id}:{self._clock.now().isoformat()}", 1, tag)
            await self._tell(tag, "removing_double", usage_id=extra.id, units=extra.units, key=key)
            try:
                await self._billing.remove_usage(extra.id, key=key)
            except NotFound:
                log.info("usage.gone_already", usage=extra.id)
                await self._tell(tag, "double_gone_already", usage_id=extra.id)
                return
            except Refused as error:
                log.warning("usage.double_not_removed", usage=extra.id, error=str(error))
                await self._tell(tag, "double_not_removed", usage_id=extra.id, error=str(error))
            else:
                log.error("usage.double_removed", tag=tag, usage=extra.id, units=extra.units)
                await self._tell(tag, "double_removed", usage_id=extra.id)
                return
        mend = "refund that line there, then write this off"
        if add_on.tier_type in CORRECTABLE:
            mend = f"`billingd reconcile --repair` corrects it; or {mend}, never both"
        reason = f"Recurly billed {extra.units} unit(s) twice under {tag} ({extra.id}): {mend}"
        await self._hold(link, add_on, DOUBLE, f"{tag}:{extra.id}", reason, extra.units)

    async def _tell(self, tag: str, kind: str, **detail: Any) -> None:
        """What is removed at Recurly is told of before, with its key, and after, with its outcome."""
        async with self._store.write() as tx:
            await history.append(tx, usage_intent(tag), kind, now=self._clock.now(), **detail)

    async def _tell_foreign(
        self, link: SubscriptionLink, add_on: AddOnLink, foreign: Sequence[BilledUsage], begin: datetime
    ) -> None:
        """Each cycle has an item of its own: once it is billed, it stands until a person has refunded it."""
        subject = f"foreign:{link.uuid}:{add_on.add_on_code}:{begin:%Y%m%dT%H%M%S}"
        if not foreign:
            async with self._store.write() as tx:
                await held.close(tx, subject=subject, resolution="they are gone", now=self._clock.now())
            return
        units = sum(one.units for one in foreign)
        ids = ", ".join(one.id for one in foreign[:5]) + (", …" if len(foreign) > 5 else "")
        reason = (
            f"{len(foreign)} usage record(s) that billingd did not make ({ids}) are in the open cycle of "
            f"add-on {add_on.add_on_code} of {link.title}. Remove them at Recurly before they are billed, or "
            "refund them; write them off here if they are meant."
        )
        about = subject.removeprefix("foreign:")
        usages = {one.id: one.units for one in sorted(foreign, key=lambda one: one.id)}
        await self._hold(link, add_on, FOREIGN, about, reason, units, usages=usages)

    async def _hold(
        self,
        link: SubscriptionLink,
        add_on: AddOnLink,
        kind: str,
        about: str,
        reason: str,
        units: int,
        *,
        usages: Mapping[str, int] | None = None,
    ) -> None:
        """Hold a difference; `usages` are the units of the records that make it, where it names no tag."""
        now = self._clock.now()
        prefix = "foreign" if kind == FOREIGN else "audit"
        again = audit_action(link.subscription_id, because="released")
        if usages:
            again = replace(again, args={**again.args, "usages": dict(usages)})
        item = Hold(
            kind,
            f"{prefix}:{about}",
            reason,
            again,
            subscription_id=link.subscription_id,
            add_on_code=add_on.add_on_code,
            units=units,
        )
        notice = provider_notice(
            f"held:{item.kind}:{item.subject}:{now.isoformat()}", "Recurly differs from the ledger", reason
        )
        async with self._store.write() as tx:
            if await held.add(tx, item, now=now):
                log.error("audit.differs", held_kind=kind, about=about, units=units)
                await outbox.insert(tx, [notice], now=now)

    async def _alone(self, link: SubscriptionLink) -> bool:
        """Whether it was made once; asked only while a key is doubted that may have been its own."""
        there = await self._billing.list_subscriptions(link.account_code)
        others = [
            one.uuid
            for one in there
            if one.marker == link.subscription_id and one.live and one.uuid != link.uuid
        ]
        if not others:
            return True
        await self._prove_doubt()
        reason = (
            f"Account {link.account_code} has {', '.join(others)} besides {link.uuid}, marked for the same "
            f"subscription {link.title}: end what is too much at Recurly, refund it, then release this."
        )
        now = self._clock.now()
        item = Hold(
            "orphan_subscription",
            f"audit:twice:{link.subscription_id}",
            reason,
            audit_action(link.subscription_id, because="released"),
            subscription_id=link.subscription_id,
        )
        notice = provider_notice(
            f"held:{item.kind}:{item.subject}:{now.isoformat()}", "A subscription was made twice", reason
        )
        async with self._store.write() as tx:
            if await held.add(tx, item, now=now):
                log.error("audit.subscription_twice", subscription=link.subscription_id, others=others)
                await outbox.insert(tx, [notice], now=now)
        return False

    async def _prove_doubt(self) -> None:
        """A double while keys are doubted: this site ignores them, until a person says otherwise."""
        now = self._clock.now()
        reason = (
            "An audit found a record twice while idempotency keys were doubted. Unanswered writes are looked "
            "up, never repeated under their key, until you release this: the site probably ignores "
            "Idempotency-Key; ask Recurly."
        )
        async with self._store.write() as tx:
            doubts = await held.standing(tx, kind=DOUBTED)
            for item in doubts:
                await held.close_one(tx, item["id"], resolution="proven", now=now)
            if doubts and await held.add(tx, Hold(IGNORED, KEYS, reason), now=now):
                log.error("recurly.keys_ignored")
                key = f"{IGNORED}:{now.isoformat()}"
                notice = provider_notice(key, "Recurly ignores idempotency keys", reason)
                await outbox.insert(tx, [notice], now=now)

    async def _clear_doubt(self, link: SubscriptionLink, began: datetime, seen: Collection[str]) -> None:
        """Keys are relied on again once all that was doubted turned out to be there once, after all.

        `seen`: the tags that this audit saw once. A record that no list shows (yet) proves nothing.
        """
        async with self._store.write() as tx:
            doubts = await held.standing(tx, kind=DOUBTED)
            for item in doubts:
                settled = item["since"] + self._settling <= began
                tag = _tag_of(_write_of(item))
                looked = tag is None or tag in seen
                if settled and looked and item["subscription_id"] in {None, link.subscription_id}:
                    resolution = "audited: each record is there once"
                    await held.close_one(tx, item["id"], resolution=resolution, now=self._clock.now())
            if doubts and not await mistrust(tx):
                log.info("recurly.keys_relied_on_again")

    async def _doubt_stands(self, subscription_id: str, began: datetime, why: str) -> None:
        """Say in each doubt that this audit should have ended why it did not: perhaps only a person can."""
        why = f"{NOT_ENDED} {why}. If that stays so, look at Recurly for a double, and release this."
        async with self._store.write() as tx:
            for item in await held.standing(tx, kind=DOUBTED):
                if item["subscription_id"] == subscription_id and item["since"] + self._settling <= began:
                    reason = item["reason"].partition(NOT_ENDED)[0] + why
                    said = Hold(DOUBTED, item["subject"], reason, subscription_id=subscription_id)
                    await held.add(tx, said, now=self._clock.now())


def _in_trial(record: BilledUsage, known: Sequence[Period]) -> bool:
    """Whether a record's time lies in a trial, which is never billed."""
    period = period_of(known, record.usage_timestamp)
    return period is not None and period.trial


async def _doubted(tx: Tx, link: SubscriptionLink) -> list[str]:
    """The writes about a subscription of which nobody knows yet whether they took effect twice."""
    doubts = await held.standing(tx, kind=DOUBTED)
    return [_write_of(item) for item in doubts if item["subscription_id"] == link.subscription_id]


def _write_of(item: Mapping[str, Any]) -> str:
    """The name of the write that a doubt is about."""
    subject: str = item["subject"]
    return subject.removeprefix(f"{KEYS}:")


def _tag_of(write: str) -> str | None:
    """The tag of the record that was written; None when it was something else."""
    prefix = usage_intent("")
    return write.removeprefix(prefix) if write.startswith(prefix) else None


def _corrected(record: BilledUsage) -> str:
    """The tag of the record itself, or of that which it corrects."""
    tag = record.merchant_tag or ""
    return corrected_tag(tag) or tag
