"""Repair: what a reconciliation found is mended through the outbox, as far as that is safe."""

from collections import defaultdict
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol

import structlog

from billingd.domain.attempts import UNFINISHED, Action, Leased, State
from billingd.domain.billing import BilledUsage, NewUsage
from billingd.domain.delivery import CORRECTABLE, PAUSED, obstacle
from billingd.domain.drift import ACCEPT, AUDIT, CORRECT, POST, READ, REPLACE, Drift, kept_first
from billingd.domain.errors import NotFound, Permanent, Retryable
from billingd.domain.events import REPAIR_USAGE, REPORT_USAGE, report_action
from billingd.domain.sending import idempotency_key
from billingd.domain.usage import corrected_tag, correction_tag, usage_intent
from billingd.loops import Clock
from billingd.once import Once
from billingd.store import drift, held, history, intents, outbox, periods, usage
from billingd.store.drift import Found
from billingd.store.engine import Store, Tx
from billingd.store.usage import Recorded

log = structlog.get_logger()

SECOND: Final = timedelta(seconds=1)
BILL_NEAR: Final = timedelta(minutes=15)
"""How long before a bill nothing is replaced that could not be posted again after it."""


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
    async def create_usage(self, new: NewUsage, *, key: str, retried: bool = False) -> str: ...
    async def remove_usage(self, usage_id: str, *, key: str, retried: bool = False) -> None: ...
    def far_now(self) -> datetime: ...


class Poller(Protocol):
    """Reads past windows again and books only differences."""

    async def read_range(
        self, since: datetime, until: datetime, *, subscription: str | None = None
    ) -> int: ...


class Auditor(Protocol):
    """Removes unbilled extra records, and holds what it cannot mend."""

    def audit(self, action: Leased) -> Awaitable[None]: ...


class UsageRepairer:
    """Handles `repair_usage`, and asks for it."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        poller: Poller,
        auditor: Auditor,
        once: Once,
        *,
        settling: timedelta,
    ) -> None:
        self._once = once
        self._store = store
        self._clock = clock
        self._billing = billing
        self._poller = poller
        self._auditor = auditor
        self._settling = settling

    @staticmethod
    async def ask(tx: Tx, found: Sequence[Found], *, now: datetime) -> int:
        """Ask for the repair of these findings; return the units of those that can be mended.

        What can only be shown to a person (late usage that no bill takes, billed extra records) is read or
        audited too, so that it is held.
        """
        await outbox.insert(tx, list(_actions(found)), now=now)
        return sum(one.drift.units for one in found if one.drift.repairable)

    async def repair(self, action: Leased) -> None:
        """Look again, and mend what is still so. Whatever a repair does can be done twice without harm."""
        args = action.args
        if args["how"] == READ:
            await self._read(args)
        elif args["how"] == AUDIT:
            await self._audit(action)
        else:
            async with self._store.read() as tx:
                found = await drift.find_finding(tx, args["finding"])
                if found is None or found.mended is not None:
                    return
                recorded = await usage.find(tx, found.drift.detail["record"])
            await self._mend(found, recorded)

    async def _mend(self, found: Found, recorded: Recorded) -> None:
        how = found.drift.detail["how"]
        if how == POST and recorded.state == "recorded":
            await self._send_again(found, recorded)
        elif how == POST:
            await self._post_again(found, recorded)
        elif how == REPLACE:
            await self._replace(found, recorded)
        elif how == CORRECT:
            await self._correct(found, recorded)
        elif how == ACCEPT:
            await self._accept(found, recorded)

    async def _read(self, args: Any) -> None:
        since, until = (datetime.fromisoformat(args[name]) for name in ("since", "until"))
        booked = await self._poller.read_range(since, until, subscription=args["subscription"])
        if not booked:
            return
        async with self._store.write() as tx:
            done = await self._of(tx, args, READ)
            text = f"Amplify was read again: {booked} unit(s) booked from {args['since']} on"
            await drift.mended(tx, [one.id for one in done], text)

    async def _audit(self, action: Leased) -> None:
        await self._auditor.audit(replace(action, args={"id": action.args["subscription"]}))
        async with self._store.read() as tx:
            doubles = await self._of(tx, action.args, AUDIT)
            records = {one.id: await usage.find(tx, one.drift.detail["record"]) for one in doubles}
        gone = []
        for one in doubles:
            at = datetime.fromisoformat(one.drift.detail["at"])
            there = await self._listed(records[one.id], at)
            if all(each.id != one.drift.detail["usage"] for each in there):
                gone.append(one.id)
        async with self._store.write() as tx:
            await drift.mended(tx, gone, "the extra record is removed")

    async def _of(self, tx: Tx, args: Any, how: str) -> list[Found]:
        """The findings that an action for a whole subscription is to mend."""
        after, found = 0, []
        while page := await drift.of(tx, args["run"], after=after, repairable=True):
            after = page[-1].id
            found += [
                one
                for one in page
                if one.drift.subscription_id == args["subscription"]
                and one.drift.detail.get("how") == how
                and one.mended is None
                and ("since" not in args or _within(one.drift, args))
            ]
        return found

    async def _send_again(self, found: Found, recorded: Recorded) -> None:
        """A record that waits for nothing: its dead action gets a new life, or it gets another one."""
        now = self._clock.now()
        subject = _subject(recorded)
        async with self._store.write() as tx:
            rows = await outbox.select(tx, kind=REPORT_USAGE, subject=subject)
            its = [row for row in rows if row["args"].get("record") == recorded.id]
            dead = [row["id"] for row in its if row["state"] == State.DEAD]
            if not any(row["state"] in UNFINISHED for row in its):
                if dead:
                    await outbox.retry(tx, dead, now=now)
                else:
                    await self._report(tx, found, recorded, due_at=now)
            await drift.mended(tx, [found.id], "its report is tried again")

    async def _post_again(self, found: Found, recorded: Recorded, *, removed: str | None = None) -> None:
        """It was reported and is gone: reported once more, after a look that finds nothing."""
        now = self._clock.now()
        record = recorded.record
        if recorded.state != "reported":
            return
        if removed is None:
            there = await self._listed(recorded, record.usage_timestamp)
            if ours := [one for one in there if one.merchant_tag == record.merchant_tag]:
                first = kept_first(ours, record.units)[0]
                async with self._store.write() as tx:
                    await usage.renamed(tx, recorded.id, usage_id=first.id)
                    await drift.mended(tx, [found.id], "Recurly has it after all")
                return
        if not await self._takes(recorded):
            return
        async with self._store.write() as tx:
            if not await usage.missing(tx, recorded.id):
                return
            name = usage_intent(record.merchant_tag)
            await history.append(
                tx,
                name,
                "gone_at_recurly" if removed is None else "replaced",
                now=now,
                usage_id=recorded.usage_id,
                run=found.run_id,
            )
            key = idempotency_key(name, 1, f"gone:{recorded.usage_id}")
            await intents.reopen(tx, name, key=key, now=now)
            # lists lag behind writes: a removed record may be shown for a while yet
            await self._report(tx, found, recorded, due_at=now + self._settling)
            done = "posted again" if removed is None else f"{removed} is removed, the recorded one posted"
            await drift.mended(tx, [found.id], done)

    async def _report(self, tx: Tx, found: Found, recorded: Recorded, *, due_at: datetime) -> None:
        again = report_action(recorded.id, recorded.record)
        again = replace(again, key=f"{again.key}:again:{found.run_id}")
        await outbox.insert(tx, [again], now=self._clock.now(), due_at=due_at)

    async def _replace(self, found: Found, recorded: Recorded) -> None:
        """An unbilled record that is not as recorded: removed, then the recorded one is posted."""
        usage_id = found.drift.detail["usage"]
        there = await self._listed(recorded, datetime.fromisoformat(found.drift.detail["at"]))
        theirs = next((one for one in there if one.id == usage_id), None)
        if theirs is not None:
            its_own = (recorded.record.units, recorded.record.usage_timestamp)
            if (theirs.units, theirs.usage_timestamp) == its_own:
                async with self._store.write() as tx:
                    await drift.mended(tx, [found.id], "it is right again")
                return
            if theirs.billed_at is not None or not await self._takes(recorded, removing=True):
                return
            # removing by id cannot take effect twice, so each try has a key of its own
            key = idempotency_key(f"remove:{usage_id}:{self._clock.now().isoformat()}", 1, "replace")
            try:
                await self._billing.remove_usage(usage_id, key=key)
            except NotFound:
                log.info("usage.gone_already", usage=usage_id)
        await self._post_again(found, recorded, removed=usage_id)

    async def _correct(self, found: Found, recorded: Recorded) -> None:
        """Billed units that are too many or too few: the difference goes into the same cycle, once.

        What Recurly has decides: all that is billed under the tag, and what was corrected before. A
        correction that is known to be there, and is not shown yet, is waited for.
        """
        record = recorded.record
        tag = record.merchant_tag
        there = [
            one
            for one in await self._listed(recorded, record.usage_timestamp)
            if one.merchant_tag == tag or corrected_tag(one.merchant_tag or "") == tag
        ]
        ours = [one for one in there if one.merchant_tag == tag]
        unbilled = [one for one in kept_first(ours, record.units)[1:] if one.billed_at is None]
        surplus = sum(one.units for one in there if one not in unbilled) - record.units
        if not ours or not await self._takes(recorded, removing=True):
            return
        shown = {one.merchant_tag for one in there}
        number, name = 1, usage_intent(correction_tag(tag, 1))
        async with self._store.read() as tx:
            while (intent := await intents.find(tx, name)) is not None and intent.state == "done":
                if correction_tag(tag, number) not in shown:
                    raise Retryable(f"the correction {number} of {tag} is not shown at Recurly yet")
                number += 1
                name = usage_intent(correction_tag(tag, number))
        if surplus == 0:
            async with self._store.write() as tx:
                await self._right(tx, found, recorded, "it is corrected already")
            return
        new = NewUsage(
            subscription_uuid=recorded.link.uuid,
            add_on_code=recorded.add_on.add_on_code,
            units=-surplus,
            merchant_tag=correction_tag(tag, number),
            usage_timestamp=record.usage_timestamp,
            recorded_at=found.drift.window_start or record.usage_timestamp,
        )

        async def keep(tx: Tx, usage_id: str) -> None:
            detail = {"tag": new.merchant_tag, "units": new.units, "usage_id": usage_id}
            now = self._clock.now()
            await history.append(tx, usage_intent(tag), "corrected", now=now, run=found.run_id, **detail)
            await self._right(
                tx, found, recorded, f"corrected by {new.units} unit(s) under {new.merchant_tag}"
            )

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_usage(new, key=key, retried=retried)

        async def find() -> str | None:
            shown = await self._listed(recorded, record.usage_timestamp)
            return next((one.id for one in shown if one.merchant_tag == new.merchant_tag), None)

        body = {"subscription": new.subscription_uuid, "add_on": new.add_on_code, "units": new.units}
        await self._once.write(
            name,
            body | {"at": new.usage_timestamp.isoformat()},
            send=send,
            find=find,
            keep=keep,
            look_first=True,
            about=record.subscription_id,
        )

    async def _right(self, tx: Tx, found: Found, recorded: Recorded, how: str) -> None:
        """A billed record is right now: what the audit holds of it needs nobody any more."""
        tag, now = recorded.record.merchant_tag, self._clock.now()
        for subject in (f"audit:{tag}", f"audit:{tag}:{found.drift.detail['usage']}"):
            await held.close(tx, subject=subject, resolution=how, now=now)
        await drift.mended(tx, [found.id], how)

    async def _accept(self, found: Found, recorded: Recorded) -> None:
        """Recurly has what the ledger had given up: the ledger says so, and nobody has to decide any more."""
        there = await self._listed(recorded, datetime.fromisoformat(found.drift.detail["at"]))
        theirs = next((one for one in there if one.id == found.drift.detail["usage"]), None)
        if theirs is None:
            return
        now, name = self._clock.now(), usage_intent(recorded.record.merchant_tag)
        async with self._store.write() as tx:
            await intents.done(tx, name, result=theirs.id)
            await usage.reported(tx, recorded.id, usage_id=theirs.id, now=now)
            await held.close(tx, subject=name, resolution="Recurly has it after all", now=now)
            await history.append(tx, name, "there_after_all", now=now, usage_id=theirs.id, run=found.run_id)
            await drift.mended(tx, [found.id], "the ledger says that it is reported")

    async def _listed(self, recorded: Recorded, at: datetime) -> tuple[BilledUsage, ...]:
        """What Recurly has of its add-on around a moment."""
        uuid, code = recorded.link.uuid, recorded.add_on.add_on_code
        try:
            return await self._billing.list_usage(uuid, code, begin=at - SECOND, end=at + SECOND)
        except NotFound as error:
            raise Permanent(f"Recurly has no usage of {code} on {uuid} any more: {error}") from error

    async def _takes(self, recorded: Recorded, *, removing: bool = False) -> bool:
        """Whether Recurly would take the record now; with `removing`, for long enough to post it again."""
        link, add_on = recorded.link, recorded.add_on
        async with self._store.read() as tx:
            known = await periods.of(tx, link.subscription_id)
        at = recorded.record.usage_timestamp
        stop = obstacle(at, state=link.billed_state, periods=known, tier_type=add_on.tier_type)
        if stop is not None and (removing or stop.kind != PAUSED):
            return False
        ends_at = link.period_ends_at
        near = ends_at is not None and ends_at - self._billing.far_now() < BILL_NEAR
        return not (removing and near and add_on.tier_type not in CORRECTABLE)


def _actions(found: Iterable[Found]) -> Iterable[Action]:
    """One for each record to mend; one for each subscription to read again, or to audit."""
    reading: dict[str, list[Found]] = defaultdict(list)
    auditing: dict[str, Found] = {}
    for one in found:
        how, name = one.drift.detail.get("how"), one.drift.subscription_id
        if how is None or name is None:
            continue
        if how == READ:
            reading[name].append(one)
        elif how == AUDIT:
            auditing.setdefault(name, one)
        else:
            yield Action(
                REPAIR_USAGE,
                f"usage:{name}:{one.drift.detail['quota']}",
                f"{REPAIR_USAGE}:{one.run_id}:{one.id}",
                {"how": how, "run": one.run_id, "finding": one.id},
            )
    for name, late in reading.items():
        starts = [one.drift.window_start for one in late if one.drift.window_start is not None]
        args = {
            "how": READ,
            "run": late[0].run_id,
            "subscription": name,
            "since": min(starts).isoformat(),
            "until": max(one.drift.detail["until"] for one in late),
        }
        subject = f"usage:{name}:{late[0].drift.detail['quota']}"
        yield Action(REPAIR_USAGE, subject, f"{REPAIR_USAGE}:{late[0].run_id}:read:{late[0].id}", args)
    for name, first in auditing.items():
        args = {"how": AUDIT, "run": first.run_id, "subscription": name}
        subject = f"audit:{name}:run {first.run_id}"
        yield Action(REPAIR_USAGE, subject, f"{REPAIR_USAGE}:{first.run_id}:audit:{name}", args)


def _within(one: Drift, args: Any) -> bool:
    return one.window_start is not None and (args["since"] <= one.window_start.isoformat() < args["until"])


def _subject(recorded: Recorded) -> str:
    return f"usage:{recorded.record.subscription_id}:{recorded.record.quota_id}"
