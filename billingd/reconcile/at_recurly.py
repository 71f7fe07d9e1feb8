"""At Recurly: what is there of a record, whether it would be taken now, and how a billed one is corrected."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from billingd.domain.billing import BilledUsage, NewUsage
from billingd.domain.delivery import CORRECTABLE, PAUSED, obstacle
from billingd.domain.drift import DOUBLE_RECORD, decides_on
from billingd.domain.drift_usage import kept_first
from billingd.domain.errors import NotFound, Permanent, Retryable
from billingd.domain.usage import corrected_tag, correction_tag, usage_intent
from billingd.loops import Clock
from billingd.once import Once
from billingd.store import drift, held, history, intents, periods, read_back
from billingd.store.drift import Found
from billingd.store.engine import Store, Tx
from billingd.store.usage import Recorded

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
    async def find_usage(self, usage_id: str) -> BilledUsage | None: ...
    async def update_usage(
        self,
        usage_id: str,
        *,
        units: int,
        usage_timestamp: datetime,
        merchant_tag: str,
        key: str,
        retried: bool = False,
    ) -> str: ...
    def far_now(self) -> datetime: ...


class AtRecurly:
    """One record's far side."""

    def __init__(
        self, store: Store, clock: Clock, billing: Billing, once: Once, *, settling: timedelta
    ) -> None:
        self._store = store
        self._clock = clock
        self._billing = billing
        self._once = once
        self._settling = settling

    async def listed(self, recorded: Recorded, at: datetime) -> tuple[BilledUsage, ...]:
        """What Recurly has of its add-on around a moment."""
        uuid, code = recorded.link.uuid, recorded.add_on.add_on_code
        try:
            return await self._billing.list_usage(uuid, code, begin=at - SECOND, end=at + SECOND)
        except NotFound as error:
            raise Permanent(f"Recurly has no usage of {code} on {uuid} any more: {error}") from error

    async def takes(self, recorded: Recorded, *, removing: bool = False) -> bool:
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

    async def correct(self, found: Found, recorded: Recorded) -> None:
        """Billed units that are too many or too few: the difference goes into the same cycle, once.

        What Recurly has decides, whatever is known of it here: all that is billed under the tag, and its
        corrections. One that was made just now, and is not shown yet, is waited for.
        """
        record = recorded.record
        tag = record.merchant_tag
        async with self._store.read() as tx:
            decided = await held.by_person(tx, record.subscription_id)
        if any(decides_on(subject, tag) for subject in decided):
            return  # refunded by hand, or let go: correcting it too would give it back twice
        there = [
            one
            for one in await self.listed(recorded, record.usage_timestamp)
            if one.merchant_tag == tag or corrected_tag(one.merchant_tag or "") == tag
        ]
        ours = [one for one in there if one.merchant_tag == tag]
        seen = any(one.id == found.drift.detail["usage"] for one in there)
        if not seen or len(ours) < (2 if found.drift.kind == DOUBLE_RECORD else 1):
            return  # moved or removed since: the next run says what is so now
        if not await self.takes(recorded, removing=True):
            return
        shown = {one.merchant_tag or "": one.id for one in there if one.merchant_tag != tag}
        free = await self._free(tag, shown)
        left_out = {one.id for one in kept_first(ours, record.units)[1:] if one.billed_at is None}
        surplus = sum(one.units for one in there if one.id not in left_out) - record.units
        name = usage_intent(free)
        new = NewUsage(
            subscription_uuid=recorded.link.uuid,
            add_on_code=recorded.add_on.add_on_code,
            units=-surplus,
            merchant_tag=free,
            usage_timestamp=record.usage_timestamp,
            recorded_at=self._clock.now(),  # by which a restored store finds what its copy lacks
        )

        async def keep(tx: Tx, usage_id: str) -> None:
            detail = {"tag": new.merchant_tag, "units": new.units, "usage_id": usage_id}
            now = self._clock.now()
            await history.append(
                tx, usage_intent(tag), history.CORRECTED, now=now, run=found.run_id, **detail
            )
            await self._right(
                tx, found, recorded, f"corrected by {new.units} unit(s) under {new.merchant_tag}"
            )

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_usage(new, key=key, retried=retried)

        async def find() -> str | None:
            again = await self.listed(recorded, record.usage_timestamp)
            return next((one.id for one in again if one.merchant_tag == new.merchant_tag), None)

        if surplus == 0:
            # one that was sent and got no answer may still come, on top of what makes it right
            if await self._once.look(name, find=find) is not None:
                raise Retryable(f"{free} has turned up at Recurly: what is there is added up again")
            async with self._store.write() as tx:
                await self._right(tx, found, recorded, "it is corrected already")
            return
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

    async def _free(self, tag: str, shown: Mapping[str, str]) -> str:
        """The tag of its next correction: the first that is not at Recurly, and was not made before.

        `shown` has the ids of those that are there, by tag. One without an answer takes effect under its own.
        """
        now, number = self._clock.now(), 1
        async with self._store.write() as tx:
            for each, usage_id in shown.items():
                await read_back.learn_correction(tx, each, usage_id, now=now)
            while True:
                free = correction_tag(tag, number)
                intent = await intents.find(tx, usage_intent(free))
                if intent is None or intent.state != "done":
                    return free
                # long after it was made it is no list that lags: somebody removed it
                if free not in shown and now < intent.last_sent_at + 2 * self._settling:
                    raise Retryable(f"the correction {number} of {tag} is not shown at Recurly yet")
                number += 1

    async def _right(self, tx: Tx, found: Found, recorded: Recorded, how: str) -> None:
        """A billed record is right now: what the audit holds of it needs nobody any more."""
        tag, now = recorded.record.merchant_tag, self._clock.now()
        for subject in (f"audit:{tag}", f"audit:{tag}:{found.drift.detail['usage']}"):
            await held.close(tx, subject=subject, resolution=how, now=now)
        await drift.mended(tx, [found.id], how)
