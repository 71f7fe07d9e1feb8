"""Bills that come while traffic flows: a complete one, an incomplete one, and what is counted only later."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final

from billingd.demo import marketplace as data
from billingd.demo.failure import DemoFailed
from billingd.demo.gateway import Gateway
from billingd.demo.marketplace import Subscriber
from billingd.demo.processes import WINDOW_SECONDS, Stage
from billingd.demo.proof import Injected
from billingd.demo.story import Story
from billingd.demo.talk import Json, Talk, instant

EVENTS: Final = ("updated", "renewal.scheduled", "renewed")
"""What Recurly's webhook is about."""
LEAD_SECONDS: Final = 3
"""How near a bill date is moved; further away when billingd did not hear of it in time."""
LAST_UNITS: Final = 61
"""Served in the last moments before a bill, in each of the windows that Amplify is still counting then."""
LAST_MOMENTS: Final = (timedelta(seconds=1.4), timedelta(seconds=0.4))
LATE_UNITS: Final = 333
LATE_BY: Final = timedelta(seconds=1.5)
LATE: Final = "late_usage"
CLOCKS_DIFFER_SECONDS: Final = 0.02
"""How much sooner than the wall clock the one that sleeps may be."""
WHY_WRITTEN_OFF: Final = "our count came late"
IN_ITS_WORDS: Final = "Recurly answered "


@dataclass
class Bills:
    """What is known of the bills that came in between."""

    at: datetime
    complete: dict[str, bool] = field(default_factory=dict)
    """Whether billingd calls the period that ended complete, by subscription."""
    at_stake: Decimal = Decimal(0)
    written_off: int = 0


class Renewals:
    """Four subscriptions are billed at one moment, in the middle of a window of traffic.

    One has been silent for a while, and all of it is at Recurly. The others are used until that very moment,
    so Amplify counts their last units when the bill is out: two have prices that take corrections, one has
    a price that takes none.
    """

    def __init__(self, stage: Stage, talk: Talk, story: Story, gateway: Gateway) -> None:
        self._stage = stage
        self._talk = talk
        self._story = story
        self._gateway = gateway
        self._bills: Bills | None = None
        self.faults: list[str] = []
        self.injected: list[Injected] = []

    @property
    def bills(self) -> Bills:
        """What is known once they have come."""
        if self._bills is None:
            raise DemoFailed("no bill came while traffic flowed")
        return self._bills

    async def fall_silent(self) -> None:
        """One of them is not used for a while."""
        await self._gateway.close(data.LEAVING)
        self._story.tell("traffic", f"{data.LEAVING.name} makes no calls for now")

    async def come(self) -> None:
        """From the bill dates to what an operator does about the units that missed their bill."""
        await self._all_reported(data.LEAVING)
        await self._talk.control(
            "POST",
            "recurly-hooks",
            {
                "url": self._stage.recurly_webhook_url,
                "secret": self._stage.webhook_secret,
                "events": list(EVENTS),
            },
        )
        self._bills = bills = Bills(await self._move_bill_dates())
        await self._until_the_last_moment(bills.at)
        self._gateway.open(data.LEAVING)
        await self._late(bills.at)
        await self._settled(bills)
        await self._operate(bills)

    async def _all_reported(self, subscriber: Subscriber) -> None:
        served = sum(self._gateway.of(subscriber).values())

        async def reported() -> bool | None:
            row = (await self._talk.subscriptions())[subscriber.subscription]
            return row["reported_units"] == served or None

        await self._talk.until(f"all {served} units of {subscriber.name} are at Recurly", reported)
        self._story.tell("billingd", f"has reported all {served:,} units of {subscriber.name}")

    async def _move_bill_dates(self) -> datetime:
        """Somebody moves them at Recurly, whose webhook tells billingd; the moment, which it knows ahead.

        A machine so busy that the news comes too late has the dates moved once more, before they come.
        """
        names = ", ".join(each.name for each in data.RENEWED)
        lead = timedelta(seconds=LEAD_SECONDS)
        while True:
            at = _middle_of_a_window(datetime.now(UTC) + lead)
            for subscriber in data.RENEWED:
                path = f"recurly-subscriptions/{subscriber.subscription}/bill_date"
                await self._talk.control("POST", path, {"at": at.isoformat()})
            self._story.tell("Recurly", f"somebody moves bill dates to {at:%H:%M:%S}: {names}")
            while datetime.now(UTC) < at - lead / 2:
                if await self._known(at):
                    self._story.tell("billingd", "knows it from Recurly's webhook, and cuts its window there")
                    return at
                await asyncio.sleep(0.1)
            lead *= 2

    async def _known(self, at: datetime) -> bool:
        rows = await self._talk.subscriptions()
        periods = [rows[each.subscription]["period"] for each in data.RENEWED]
        return all(period is not None and instant(period["ends_at"]) == at for period in periods)

    async def _until_the_last_moment(self, at: datetime) -> None:
        """Until the bills are written: the calls of a volume price too, whose units Amplify still counts."""
        for before in LAST_MOMENTS:
            await _until(at - before)
            await self._gateway.serve(data.CUT_SHORT, LAST_UNITS, at - before)
        await _until(at)
        self._story.tell("Recurly", f"bills {len(data.RENEWED)} subscriptions while traffic flows")

    async def _late(self, at: datetime) -> None:
        """Units from before the bill arrive when the windows before it have been read."""
        read = at + timedelta(seconds=WINDOW_SECONDS // 2)

        async def passed() -> bool | None:
            mark = ((await self._talk.admin("/status")) or {}).get("traffic", {}).get("watermark")
            return (mark is not None and instant(mark) >= read) or None

        await self._talk.until("the windows around the bill were read", passed)
        for subscriber in data.CORRECTED:
            await self._gateway.serve(subscriber, LATE_UNITS, at - LATE_BY)
        units = LATE_UNITS * len(data.CORRECTED)
        names = " and ".join(each.name for each in data.CORRECTED)
        self._story.tell("fault", f"{units:,} units of {names} from before that bill arrive only now")
        late = len(data.CORRECTED)
        self.injected.append(Injected("subscriptions with traffic that came after its bill", late, late))

    async def _settled(self, bills: Bills) -> None:
        """billingd has found every unit of the periods that ended, and says what became of each."""
        served = {each: sum(self._gateway.of(each, before=bills.at).values()) for each in data.RENEWED}

        async def accounted(
            subscriber: Subscriber, right: Callable[[Json, Json], bool], what: str
        ) -> tuple[Json, Json]:
            async def probe() -> tuple[Json, Json] | None:
                row = (await self._talk.subscriptions())[subscriber.subscription]
                last = row["last_period"]
                if last is None or instant(last["ends_at"]) != bills.at:
                    return None
                there = last["units"] == served[subscriber] and right(row, last)
                return (row, last) if there else None

            return await self._talk.until(f"{subscriber.name}: {what}", probe)

        def nothing_missed(_row: Json, last: Json) -> bool:
            return not last["missed_units"]

        def all_held(row: Json, last: Json) -> bool:
            return bool(last["missed_units"] == row["held_units"] > 0)

        moment = f"{bills.at:%H:%M:%S}"
        _, last = await accounted(data.LEAVING, nothing_missed, "every unit is billed")
        bills.complete[data.LEAVING.subscription] = last["complete"]
        word = "complete" if last["complete"] else "not complete"
        self._story.tell(
            "billingd",
            f"{data.LEAVING.name}: the period to {moment} is {word}, {last['units']:,} units on its invoice",
        )
        for subscriber in data.CORRECTED:
            _, last = await accounted(subscriber, nothing_missed, "late units are reported as corrections")
            bills.complete[subscriber.subscription] = last["complete"]
            self._story.tell(
                "billingd",
                f"{subscriber.name}: {last['corrected_units']:,} of {last['units']:,} units came after the "
                "bill: corrections, on the next invoice",
            )
        row, last = await accounted(data.CUT_SHORT, all_held, "late units are held")
        bills.complete[data.CUT_SHORT.subscription] = last["complete"]
        self._story.tell(
            "billingd",
            f"{data.CUT_SHORT.name}: {row['held_units']:,} of {last['units']:,} units missed the invoice; "
            "volume prices take no corrections, so they are held",
        )

    async def _operate(self, bills: Bills) -> None:
        """What is held is looked at; one item is tried again, another given up."""
        items = await self._held()
        self._story.tell("operator", "billingd held list")
        for item in items:
            stake = f"{item['units']} units, {_money(item)} at stake"
            self._story.tell("billingd", f"#{item['id']} {item['kind']}, {stake}: {_why(item)}")
        bills.at_stake = sum((Decimal(item["amount"] or 0) for item in items), Decimal(0))
        again, given_up = items[-1], items[0]
        if again is given_up:
            self.faults.append(
                f"Of {data.CUT_SHORT.name} one item is held, where two windows missed the bill."
            )
            return
        await self._release(again)
        await self._write_off(given_up, bills)

    async def _release(self, item: Json) -> None:
        self._story.tell("operator", f"billingd held release {item['id']}")
        await self._talk.act(f"/held/{item['id']}/release", {})

        async def held_again() -> Json | None:
            return next(
                (
                    each
                    for each in await self._held()
                    if each["subject"] == item["subject"] and each["id"] != item["id"]
                ),
                None,
            )

        anew = await self._talk.until("what was released is held again", held_again)
        self._story.tell("billingd", f"sends it, and holds it again as #{anew['id']}: {_why(anew)}")
        if anew["units"] != item["units"] or IN_ITS_WORDS not in anew["reason"]:
            self.faults.append(f"Released, held item {item['id']} was not sent: {anew['reason']}")

    async def _write_off(self, item: Json, bills: Bills) -> None:
        self._story.tell("operator", f'billingd held write-off {item["id"]} --reason "{WHY_WRITTEN_OFF}"')
        await self._talk.act(f"/held/{item['id']}/write-off", {"reason": WHY_WRITTEN_OFF})
        bills.written_off += item["units"]
        self._story.tell("billingd", f"writes {item['units']} units off, {_money(item)}")
        if any(each["subject"] == item["subject"] for each in await self._held()):
            self.faults.append(f"Held item {item['id']} was written off, and is held all the same.")

    async def _held(self) -> list[Json]:
        return [item for item in await self._talk.held() if item["kind"] == LATE]


def _money(item: Json) -> str:
    return f"{item['currency']} {item['amount']}"


def _why(item: Json) -> str:
    """The cause without the names of what it is about; Recurly's own words where it was asked."""
    reason = str(item["reason"])
    start = reason.find(IN_ITS_WORDS)
    return reason.partition(": ")[2] if start < 0 else reason[start:].partition(" [request ")[0]


def _middle_of_a_window(moment: datetime) -> datetime:
    """The first one at or after a moment: the bill shall cut a window in two."""
    second = int(moment.timestamp()) + 1
    while second % WINDOW_SECONDS != WINDOW_SECONDS // 2:
        second += 1
    return datetime.fromtimestamp(second, UTC)


async def _until(moment: datetime) -> None:
    left = (moment - datetime.now(UTC)).total_seconds()
    await asyncio.sleep(max(0.0, left + CLOCKS_DIFFER_SECONDS))
