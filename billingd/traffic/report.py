"""Report: one usage record to Recurly, once, however often it is tried."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, Protocol

import structlog

from billingd.domain.agreement import costs_nothing
from billingd.domain.attempts import UNFINISHED, Action, Leased, Wait
from billingd.domain.billing import BilledSubscription, BilledUsage, NewUsage
from billingd.domain.delivery import AFTER_END, LATE, MISSING, NOT_THERE, PAUSED, Obstacle, obstacle
from billingd.domain.errors import NotFound, Permanent, Refused, Retryable
from billingd.domain.events import attach_subject, report_action
from billingd.domain.notices import provider_notice
from billingd.domain.usage import corrected_tag, usage_intent
from billingd.loops import Clock
from billingd.once import Once
from billingd.store import held, marks, outbox, periods, usage
from billingd.store.engine import Store, Tx
from billingd.store.stakes import usage_hold
from billingd.store.usage import Recorded
from billingd.traffic.periods import PeriodWatch

log = structlog.get_logger()

REFUSED: Final = "usage_refused"
FREE: Final = "Amplify charges nothing for it: write it off"
AROUND: Final = timedelta(seconds=1)
"""A look-up spans a second on each side: whether Recurly's `end_time` is inclusive is not certain."""

SECOND: Final = timedelta(seconds=1)

AGAIN_SOON: Final = timedelta(seconds=30)
"""How long a report waits after its subscription was not found for the first time."""

ATTACHED_SOON: Final = timedelta(minutes=1)
"""How long a report waits for its add-on to be put on the subscription, each time."""


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def create_usage(self, new: NewUsage, *, key: str, retried: bool = False) -> str: ...
    async def list_usage(
        self, subscription_uuid: str, add_on_code: str, *, begin: datetime, end: datetime
    ) -> tuple[BilledUsage, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...
    def far_now(self) -> datetime: ...


class UsageReporter:
    """Handles `report_usage`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        billing: Billing,
        once: Once,
        watch: PeriodWatch,
        *,
        look_again: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._watch = watch
        self._look_again = look_again

    async def report(self, action: Leased) -> Wait | None:
        """Post the record under its merchant tag, or find that an earlier attempt already did.

        What no invoice would carry rightly (its cycle was billed and takes no corrections, the subscription
        is over) is held without being sent, unless a person released it; what Recurly rejects for good is
        held with its words; what a paused subscription may not take yet stays pending.
        """
        async with self._store.read() as tx:
            recorded = await usage.find(tx, action.args["record"])
            unread = await marks.find(tx, marks.unread(recorded.record.subscription_id))
        if recorded.state != "recorded":
            return None
        new = _new(recorded)
        if (ahead := new.usage_timestamp + SECOND - self._billing.far_now()) > timedelta(0):
            return Wait(ahead, "by Recurly's clock its time is still to come")
        state = None if unread is None else await self._watch.look_at(recorded.link)
        if state not in {None, MISSING}:
            return Wait(AGAIN_SOON, "what Recurly has of it was read back only now")
        released = bool(action.args.get("released"))
        stop = await self._obstacle(recorded, state=state)
        if stop is not None and not (released and stop.kind == LATE):
            return _lagging(recorded, stop) or await self._stopped(recorded, new, stop)

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_usage(new, key=key, retried=retried)

        body = {
            "subscription": new.subscription_uuid,
            "add_on": new.add_on_code,
            "units": new.units,
            "at": new.usage_timestamp.isoformat(),
        }
        try:
            await self._once.write(
                usage_intent(new.merchant_tag),
                body,
                send=send,
                find=lambda: self._find(new),
                keep=lambda tx, usage_id: self._keep(tx, recorded, usage_id),
                about=recorded.record.subscription_id,
            )
        except (Refused, NotFound) as error:
            return await self._refused(recorded, new, str(error))
        return None

    async def _keep(self, tx: Tx, recorded: Recorded, usage_id: str) -> None:
        now = self._clock.now()
        await usage.reported(tx, recorded.id, usage_id=usage_id, now=now)
        subject = f"usage:{recorded.record.merchant_tag}"
        await held.close(tx, subject=subject, resolution="Recurly has it", now=now)

    async def _obstacle(self, recorded: Recorded, *, state: str | None = None) -> Obstacle | None:
        """What stands in its way, in that `state`. What is not plainly alive is looked at as it is now."""
        link = recorded.link
        known_alive = link.billed_state in {None, "active", "canceled"}
        if state is None and (link.state in {"ending", "ended"} or not known_alive):
            state = await self._watch.look_at(link)
        async with self._store.read() as tx:
            known = await periods.of(tx, link.subscription_id)
        return obstacle(
            recorded.record.usage_timestamp,
            state=state,
            periods=known,
            tier_type=recorded.add_on.tier_type,
        )

    async def _stopped(self, recorded: Recorded, new: NewUsage, stop: Obstacle) -> Wait | None:
        """It is not sent; but an earlier attempt may have reached Recurly, and then it is reported."""
        if stop.kind == PAUSED and recorded.link.state != "ending":
            return Wait(self._look_again, stop.reason)
        name, about = usage_intent(new.merchant_tag), recorded.record.subscription_id
        found = await self._once.look(name, find=lambda: self._find(new), about=about)
        if found is None:
            # one that is over at Amplify while it is paused would only be resumed to be charged
            over = Obstacle(AFTER_END, "the subscription is over, and was paused at Recurly")
            stop = over if stop.kind == PAUSED else stop
            await self._hold(recorded, new, stop.kind, stop.reason)
            return None
        async with self._store.write() as tx:
            await self._keep(tx, recorded, found)
        return None

    async def _find(self, new: NewUsage) -> str | None:
        """The id of the record that carries this tag, billed or not; its units must be ours.

        What was corrected counts with its corrections, and with all that is billed under the tag.
        """
        try:
            there = await self._billing.list_usage(
                new.subscription_uuid,
                new.add_on_code,
                begin=new.usage_timestamp - AROUND,
                end=new.usage_timestamp + AROUND,
            )
        except NotFound as error:  # of the subscription or add-on: it says nothing about the record
            raise Retryable(f"the look-up failed: {error}") from error
        ours = [one for one in there if one.merchant_tag == new.merchant_tag]
        if not ours:
            return None
        first, *extra = sorted(ours, key=staying)  # of doubles, the one that the audit keeps
        corrections = [one for one in there if corrected_tag(one.merchant_tag or "") == new.merchant_tag]
        if corrections:
            billed = [one for one in extra if one.billed_at is not None]
            right = sum(one.units for one in (first, *billed, *corrections)) == new.units
        else:
            right = all(one.units == new.units for one in ours)
        if not right:
            ours += corrections
            held_units = ", ".join(f"{one.units} ({one.id})" for one in ours)
            raise Permanent(
                f"Recurly holds {held_units} under the tag {new.merchant_tag}, where {new.units} belong once"
            )
        return first.id

    async def _refused(self, recorded: Recorded, new: NewUsage, why: str) -> Wait | None:
        """Recurly will not take this record: later, if that is only for now; else hold it."""
        stop = await self._obstacle(recorded, state=await self._watch.look_at(recorded.link))
        if stop is not None and (wait := _lagging(recorded, stop)) is not None:
            return wait
        if stop is not None and stop.kind == PAUSED:
            return Wait(self._look_again, stop.reason)
        if stop is None and await self._to_be_attached(recorded):
            return Wait(ATTACHED_SOON, f"add-on {new.add_on_code} is yet to be put on its subscription")
        if (ahead := new.usage_timestamp + SECOND - self._billing.far_now()) > timedelta(0):
            return Wait(ahead, f"by Recurly's clock its time is still to come ({why})")
        if stop is None:
            await self._hold(recorded, new, REFUSED, await self._refusal(recorded, why))
        else:
            gone = stop.reason == NOT_THERE
            await self._hold(recorded, new, stop.kind, f"{stop.reason} ({why})" if gone else why)
        return None

    async def _to_be_attached(self, recorded: Recorded) -> bool:
        """Whether its plan gained an add-on that the subscription does not have yet."""
        subject = attach_subject(recorded.record.subscription_id)
        async with self._store.read() as tx:
            return bool(await outbox.select(tx, states=UNFINISHED, subject=subject, limit=1))

    async def _refusal(self, recorded: Recorded, why: str) -> str:
        """Recurly's words, and what they come from where that is known."""
        try:
            theirs = await self._billing.get_subscription(recorded.link.uuid)
        except NotFound:
            return why
        code, at = recorded.add_on.add_on_code, recorded.record.usage_timestamp
        attached = next((one for one in theirs.add_ons if one.code == code), None)
        prices = recorded.add_on.prices
        if attached is None and prices is not None and costs_nothing(prices):
            return f"the subscription does not have that add-on ({why}). {FREE}"
        if attached is None:
            return (
                f"the subscription does not have that add-on ({why}). Add it there, then release this; what "
                "was counted before it had it stays refused"
            )
        if attached.created_at is not None and at < attached.created_at:
            return (
                f"it was counted before the subscription had that add-on ({attached.created_at.isoformat()})"
                f", and Recurly takes no usage of that time ({why}). Charge it there by hand, or write it off"
            )
        return why

    async def _hold(self, recorded: Recorded, new: NewUsage, kind: str, why: str) -> None:
        now = self._clock.now()
        record = recorded.record
        reason = (
            f"{record.units} unit(s) in the window from {record.window.start.isoformat()} cannot be billed "
            f"by Recurly for add-on {new.add_on_code} of subscription {new.subscription_uuid}: {why}"
        )
        again = report_action(recorded.id, record)
        again = Action(again.kind, again.subject, again.key, {**again.args, "released": True})
        async with self._store.write() as tx:
            item = await usage_hold(tx, recorded, kind, reason, again)
            if await usage.hold(tx, recorded.id) and await held.add(tx, item, now=now):
                # One notice a day for each add-on: what was late once is often late many times.
                key = f"held:{kind}:{record.subscription_id}:{record.quota_id}:{now:%Y-%m-%d}"
                at_stake = item.amount is not None and Decimal(item.amount) != 0
                stake = f" At stake: {item.amount} {item.currency}." if at_stake else ""
                body = f"{reason}.{stake} `billingd held list` shows all that is held."
                notice = provider_notice(key, "Usage is held, not billed", body)
                await outbox.insert(tx, [notice], now=now)
        log.warning("usage.held", held_kind=kind, tag=record.merchant_tag, units=record.units, reason=why)


def _lagging(recorded: Recorded, stop: Obstacle) -> Wait | None:
    """A first 404 of the subscription may come from a read that lags: only a second one counts."""
    if stop.reason != NOT_THERE or recorded.link.billed_state == MISSING:
        return None
    return Wait(AGAIN_SOON, f"{NOT_THERE}, for the first time: its read may lag")


def staying(one: BilledUsage) -> tuple[bool, str]:
    """Which of several records with one tag stays: a billed one, which cannot be removed, else the first."""
    return one.billed_at is None, one.id


def _new(recorded: Recorded) -> NewUsage:
    record = recorded.record
    return NewUsage(
        subscription_uuid=recorded.link.uuid,
        add_on_code=recorded.add_on.add_on_code,
        units=record.units,
        merchant_tag=record.merchant_tag,
        usage_timestamp=record.usage_timestamp,
        recorded_at=recorded.recorded_at,
    )
