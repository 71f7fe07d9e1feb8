"""Report: one usage record to Recurly, once, however often it is tried."""

from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from billingd.domain.attempts import Action, Leased, Wait
from billingd.domain.billing import BilledSubscription, BilledUsage, NewUsage
from billingd.domain.errors import NotFound, Permanent, Refused
from billingd.domain.notices import provider_notice
from billingd.domain.usage import UsageRecord
from billingd.loops import Clock
from billingd.once import Once
from billingd.store import held, outbox, usage
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold

log = structlog.get_logger()

REPORT_USAGE: Final = "report_usage"
AROUND: Final = timedelta(seconds=1)
"""A look-up spans a second on each side: whether Recurly's `end_time` is inclusive is not certain."""


def report_action(record_id: int, record: UsageRecord) -> Action:
    """Tell Recurly of one record. All of one add-on share a subject: one writer at a time."""
    return Action(
        REPORT_USAGE,
        f"usage:{record.subscription_id}:{record.quota_id}",
        f"{REPORT_USAGE}:{record.merchant_tag}",
        {"record": record_id},
    )


class Billing(Protocol):
    """What is read and written at Recurly."""

    async def create_usage(self, new: NewUsage, *, key: str, retried: bool = False) -> str: ...
    async def list_usage(
        self, subscription_uuid: str, add_on_code: str, *, begin: datetime, end: datetime
    ) -> tuple[BilledUsage, ...]: ...
    async def get_subscription(self, uuid: str) -> BilledSubscription: ...


class UsageReporter:
    """Handles `report_usage`."""

    def __init__(
        self, store: Store, clock: Clock, billing: Billing, once: Once, *, look_again: timedelta
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._look_again = look_again

    async def report(self, action: Leased) -> Wait | None:
        """Post the record under its merchant tag, or find that an earlier attempt already did.

        What Recurly rejects for good is held with its words; what a paused subscription may not take yet
        stays pending.
        """
        async with self._store.read() as tx:
            recorded = await usage.find(tx, action.args["record"])
        if recorded.state != "recorded":
            return None
        record = recorded.record
        new = NewUsage(
            subscription_uuid=recorded.subscription_uuid,
            add_on_code=recorded.add_on_code,
            units=record.units,
            merchant_tag=record.merchant_tag,
            usage_timestamp=record.usage_timestamp,
            recorded_at=recorded.recorded_at,
        )
        body = {
            "subscription": new.subscription_uuid,
            "add_on": new.add_on_code,
            "units": new.units,
            "at": new.usage_timestamp.isoformat(),
        }

        async def keep(tx: Tx, usage_id: str) -> None:
            await usage.reported(tx, recorded.id, usage_id=usage_id, now=self._clock.now())

        over = recorded.subscription_state in {"ending", "ended"}  # ending: maybe over there, not yet known
        if over and not await self._live(new.subscription_uuid):
            # Recurly may take it all the same, for it looks at dates; but no invoice would ever carry it.
            found = await self._once.look(f"usage:{record.merchant_tag}", find=lambda: self._find(new))
            if found is None:
                return await self._refused(recorded, new, "the subscription has ended there")
            async with self._store.write() as tx:
                await keep(tx, found)
            return None

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_usage(new, key=key, retried=retried)

        try:
            await self._once.write(
                f"usage:{record.merchant_tag}", body, send=send, find=lambda: self._find(new), keep=keep
            )
        except (Refused, NotFound) as error:
            return await self._refused(recorded, new, str(error))
        return None

    async def _find(self, new: NewUsage) -> str | None:
        """The id of the record that carries this tag, billed or not; its units must be ours."""
        there = await self._billing.list_usage(
            new.subscription_uuid,
            new.add_on_code,
            begin=new.usage_timestamp - AROUND,
            end=new.usage_timestamp + AROUND,
        )
        ours = [one for one in there if one.merchant_tag == new.merchant_tag]
        if not ours:
            return None
        if len(ours) > 1 or ours[0].units != new.units:
            held_units = ", ".join(f"{one.units} ({one.id})" for one in ours)
            raise Permanent(
                f"Recurly holds {held_units} under the tag {new.merchant_tag}, where {new.units} belong once"
            )
        return ours[0].id

    async def _live(self, uuid: str) -> bool:
        return (await self._billing.get_subscription(uuid)).live

    async def _refused(self, recorded: usage.Recorded, new: NewUsage, why: str) -> Wait | None:
        """Recurly will not take this record: later, if the subscription is only paused; else hold it."""
        if (await self._billing.get_subscription(new.subscription_uuid)).state == "paused":
            return Wait(self._look_again, "the Recurly subscription is paused; its usage waits")
        now = self._clock.now()
        record = recorded.record
        reason = (
            f"{record.units} unit(s) in the window from {record.window.start.isoformat()} cannot be billed "
            f"by Recurly for add-on {new.add_on_code} of subscription {new.subscription_uuid}: {why}"
        )
        item = Hold(
            "usage_refused",
            f"usage:{record.merchant_tag}",
            reason,
            report_action(recorded.id, record),
            subscription_id=record.subscription_id,
            add_on_code=new.add_on_code,
            units=record.units,
        )
        notice = provider_notice(
            f"held:usage:{record.merchant_tag}:{now.isoformat()}", "Usage is held, not billed", reason
        )
        async with self._store.write() as tx:
            if await usage.hold(tx, recorded.id) and await held.add(tx, item, now=now):
                await outbox.insert(tx, [notice], now=now)
        log.warning("usage.held", tag=record.merchant_tag, units=record.units, reason=why)
        return None
