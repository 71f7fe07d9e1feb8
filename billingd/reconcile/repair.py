"""Repair: what a reconciliation found is mended through the outbox, as far as that is safe."""

from collections.abc import Awaitable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Protocol

import structlog

from billingd.domain.attempts import UNFINISHED, Leased, State
from billingd.domain.billing import BilledUsage
from billingd.domain.drift import ACCEPT, AUDIT, CORRECT, POST, READ, REPLACE, Drift
from billingd.domain.drift_usage import kept_first
from billingd.domain.errors import NotFound, Refused
from billingd.domain.events import REPORT_USAGE, report_action
from billingd.domain.sending import idempotency_key
from billingd.domain.usage import usage_intent
from billingd.loops import Clock
from billingd.once import Once
from billingd.reconcile.at_recurly import AtRecurly, Billing
from billingd.reconcile.holding import hold
from billingd.store import drift, held, history, intents, outbox, usage
from billingd.store.drift import Found
from billingd.store.engine import Store, Tx
from billingd.store.usage import Recorded

log = structlog.get_logger()


class Poller(Protocol):
    """Reads past windows again and books only differences."""

    async def read_range(
        self, since: datetime, until: datetime, *, subscription: str | None = None
    ) -> int: ...


class Auditor(Protocol):
    """Removes unbilled extra records, and holds what it cannot mend."""

    def audit(self, action: Leased) -> Awaitable[None]: ...


class UsageRepairer:
    """Handles `repair_usage`."""

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
        self._store = store
        self._clock = clock
        self._billing = billing
        self._far = AtRecurly(store, clock, billing, once, settling=settling)
        self._poller = poller
        self._auditor = auditor
        self._once = once
        self._settling = settling

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
            await self._far.correct(found, recorded)
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
            there = await self._far.listed(records[one.id], at)
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

    async def _post_again(self, found: Found, recorded: Recorded) -> None:
        """It was reported and is gone: reported once more, after a look that finds nothing."""
        now = self._clock.now()
        record = recorded.record
        if recorded.state != "reported":
            return
        there = await self._far.listed(recorded, record.usage_timestamp)
        if ours := [one for one in there if one.merchant_tag == record.merchant_tag]:
            first = kept_first(ours, record.units)[0]
            async with self._store.write() as tx:
                await usage.renamed(tx, recorded.id, usage_id=first.id)
                name = usage_intent(record.merchant_tag)
                was, run = recorded.usage_id, found.run_id
                await history.append(tx, name, "renamed", now=now, was=was, usage_id=first.id, run=run)
                await drift.mended(tx, [found.id], "Recurly has it after all")
            return
        if recorded.usage_id is not None and await self._billing.find_usage(recorded.usage_id) is not None:
            return  # it is there, at another time or under another tag: the next run says so
        if not await self._far.takes(recorded):
            return
        async with self._store.write() as tx:
            if not await usage.missing(tx, recorded.id):
                return
            name = usage_intent(record.merchant_tag)
            await history.append(
                tx,
                name,
                "gone_at_recurly",
                now=now,
                usage_id=recorded.usage_id,
                run=found.run_id,
                reported_at=history.text_of(recorded.reported_at),
                **history.sent(await intents.find(tx, name)),
            )
            key = idempotency_key(name, 1, f"gone:{recorded.usage_id}")
            await intents.reopen(tx, name, key=key, now=now)
            # lists lag behind writes: a removed record may be shown for a while yet
            await self._report(tx, found, recorded, due_at=now + self._settling)
            done = "posted again"
            await held.close(tx, subject=f"audit:{record.merchant_tag}", resolution=done, now=now)
            await drift.mended(tx, [found.id], done)

    async def _report(self, tx: Tx, found: Found, recorded: Recorded, *, due_at: datetime) -> None:
        again = report_action(recorded.id, recorded.record)
        again = replace(again, key=f"{again.key}:again:{found.run_id}")
        await outbox.insert(tx, [again], now=self._clock.now(), due_at=due_at)

    async def _replace(self, found: Found, recorded: Recorded) -> None:
        """An unbilled record that is not as recorded is set to what was recorded; it is never away.

        The values are absolute, so repeating it is harmless (recurly.md 5.5).
        """
        record, usage_id = recorded.record, found.drift.detail["usage"]
        target = (record.units, record.usage_timestamp, record.merchant_tag)
        name = f"update:{usage_id}:{found.run_id}:{found.id}"

        async def theirs() -> BilledUsage | None:
            return await self._billing.find_usage(usage_id)

        async def find() -> str | None:
            one = await theirs()
            same = one is not None and (one.units, one.usage_timestamp, one.merchant_tag) == target
            return usage_id if same else None

        async def keep(tx: Tx, _id: str) -> None:
            now, intent = self._clock.now(), usage_intent(record.merchant_tag)
            done = f"{usage_id} is set back to {record.units} unit(s) at {record.usage_timestamp.isoformat()}"
            detail = {"usage_id": usage_id, "units": record.units, "run": found.run_id}
            await history.append(tx, intent, "set_back", now=now, **detail)
            await held.close(tx, subject=f"audit:{record.merchant_tag}", resolution=done, now=now)
            await drift.mended(tx, [found.id], done)

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.update_usage(
                usage_id,
                units=record.units,
                usage_timestamp=record.usage_timestamp,
                merchant_tag=record.merchant_tag,
                key=key,
                retried=retried,
            )

        there = await theirs()
        if there is None or there.billed_at is not None or recorded.state != "reported":
            await self._once.look(name, find=find)  # an unanswered try is settled; the next run looks again
            return
        body = {"usage": usage_id, "units": record.units, "at": record.usage_timestamp.isoformat()}
        try:
            await self._once.write(
                name, body, send=send, find=find, keep=keep, look_first=True, about=record.subscription_id
            )
        except (Refused, NotFound) as error:
            fix = f"Recurly does not let it be changed ({error}): change it there by hand"
            async with self._store.write() as tx:
                await hold(tx, replace(found.drift, fix=fix, detail={}), self._clock.now())

    async def _accept(self, found: Found, recorded: Recorded) -> None:
        """Recurly has what the ledger had given up: the ledger says so, and nobody has to decide any more."""
        there = await self._far.listed(recorded, datetime.fromisoformat(found.drift.detail["at"]))
        theirs = next((one for one in there if one.id == found.drift.detail["usage"]), None)
        if theirs is None:
            return
        now, name = self._clock.now(), usage_intent(recorded.record.merchant_tag)
        said = {"usage_id": theirs.id, "run": found.run_id}
        async with self._store.write() as tx:
            rows = await outbox.select(tx, kind=REPORT_USAGE, subject=_subject(recorded))
            its = [row for row in rows if row["args"].get("record") == recorded.id]
            if any(row["state"] in UNFINISHED for row in its):
                return  # it looks for itself; the next run says what it found
            # with a new life they find it reported, and are done
            await outbox.retry(tx, [row["id"] for row in its if row["state"] == State.DEAD], now=now)
            await intents.done(tx, name, result=theirs.id)
            await usage.reported(tx, recorded.id, usage_id=theirs.id, now=now)
            await held.close(tx, subject=name, resolution="Recurly has it after all", now=now)
            await history.append(tx, name, "there_after_all", now=now, was=recorded.state, **said)
            await drift.mended(tx, [found.id], "the ledger says that it is reported")


def _subject(recorded: Recorded) -> str:
    return f"usage:{recorded.record.subscription_id}:{recorded.record.quota_id}"


def _within(one: Drift, args: Any) -> bool:
    return one.window_start is not None and (args["since"] <= one.window_start.isoformat() < args["until"])
