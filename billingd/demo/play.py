"""The story: a marketplace opens, people subscribe and use it, things break, and in the end all is billed."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from billingd.demo import marketplace as data
from billingd.demo.failure import DemoFailed
from billingd.demo.gateway import Gateway
from billingd.demo.marketplace import Subscriber
from billingd.demo.processes import WINDOW_SECONDS, Stage
from billingd.demo.proof import Cycle, Injected, Line, Proof, first_sentence, renewal, row, worth
from billingd.demo.relay import LosesAnswers
from billingd.demo.renewals import Renewals
from billingd.demo.story import Story
from billingd.demo.talk import Json, Talk, instant
from billingd.demo.trouble import SUBSCRIPTIONS, USAGE, Trouble

SECONDS: Final = 24
"""How long traffic is made, unless told otherwise; what happens meanwhile takes its own time."""
OUTAGE_SHARE: Final = 12
OUTAGE_SECONDS_LEAST: Final = 1.5
OUTAGE_SECONDS_MOST: Final = 8.0
KILL_TRIES: Final = 3
SETTLED_SECONDS: Final = 180.0
"""How long billingd may take at most for a write that a kill has left in the dark."""
LATE_UNITS: Final = 777
WINDOW: Final = timedelta(seconds=WINDOW_SECONDS)


class Play:
    """Plays provider, consumers and gateways against the two processes, and watches what billingd does."""

    def __init__(self, stage: Stage, talk: Talk, story: Story, seconds: int | None) -> None:
        self._stage = stage
        self._talk = talk
        self._story = story
        self._seconds = SECONDS if seconds is None else seconds
        self._gateway = Gateway(talk)
        self._trouble = Trouble(stage, talk, story)
        self._renewals = Renewals(stage, talk, story, self._gateway)
        self._injected: list[Injected] = []
        self._accounts: dict[str, str] = {}
        """The account code of each subscriber, by name."""
        self._faults: list[str] = []

    async def run(self) -> Proof:
        """From the opening to the last invoice."""
        await self._open()
        await self._first_subscribers()
        async with self._gateway:
            self._story.tell("traffic", f"flows for {len(data.FIRST) + 1} subscriptions, and does not stop")
            await self._happenings()
        self._story.tell("traffic", f"ends; {self._gateway.units:,} units were served")
        await self._close_books()
        return await self._prove()

    async def _happenings(self) -> None:
        """Everything that happens while traffic flows, spread over its time."""
        outage = min(max(self._seconds / OUTAGE_SHARE, OUTAGE_SECONDS_LEAST), OUTAGE_SECONDS_MOST)
        happenings: tuple[Callable[[], Awaitable[None]], ...] = (
            self._announced_twice,
            self._answer_lost,
            self._account_appears,
            self._renewals.fall_silent,
            self._late_traffic,
            self._renewals.come,
            self._killed_while_subscribing,
            self._trouble.strike,
            lambda: self._trouble.outage("recurly", outage),
            self._deprecated,
            lambda: self._trouble.outage("amplify", outage),
            self._killed_between,
            self._cancelled,
            lambda: self._trouble.kill_under_way(USAGE, "a usage record"),
        )
        began = self._story.seconds
        for number, happening in enumerate(happenings):
            await self._pass(began + self._seconds * number / len(happenings))
            await happening()
            await self._tell_units()
        await self._pass(began + self._seconds)

    async def _pass(self, until: float) -> None:
        self._gateway.check()
        await asyncio.sleep(max(0.0, until - self._story.seconds))
        self._gateway.check()

    async def _tell_units(self) -> None:
        if (status := await self._talk.admin("/status")) is not None:
            traffic = status["traffic"]
            self._story.tell(
                "traffic",
                f"served {self._gateway.units:,}, recorded {traffic['recorded_units']:,}, "
                f"reported {traffic['reported_units']:,}",
            )

    async def _open(self) -> None:
        """Products and plans; billingd links what it can, holds what it cannot, ignores the rest."""
        await self._trouble.start_daemon()
        story, talk = self._story, self._talk
        story.tell("demo", f"sandbox at {self._stage.sandbox_url}, store on {self._stage.store}")
        story.tell("demo", f"billingd runs, its status page is {self._stage.admin_url}/")
        for name, title in data.PRODUCTS.items():
            labels = {"billingSystem": "recurly"}
            await talk.control("POST", "products", {"name": name, "title": title, "attributes": labels})
        name, title = data.UNLABELLED
        await talk.control("POST", "products", {"name": name, "title": title})
        codes = {}
        for plan in (*data.PLANS, data.IGNORED):
            made = await talk.control("POST", "plans", plan.body())
            codes[plan.name] = f"amplify-plan-{made['metadata']['id']}"
            story.tell("Amplify", f'plan "{plan.title}" is active: {plan.model}, {plan.currency}')
        told: set[str] = set()

        async def linked() -> Json | None:
            there = await talk.recurly_plans()
            for plan in data.BILLED:
                if codes[plan.name] in there.keys() - told:
                    told.add(codes[plan.name])
                    story.tell("Recurly", f'plan {codes[plan.name]} stands for "{plan.title}"')
            status = await talk.admin("/status")
            ready = status and status["links"]["plans"] == len(data.BILLED) == len(told)
            return status if ready and status and status["held"]["plans"] == 1 else None

        status = await talk.until("all plans that can be billed are at Recurly, one is held", linked)
        story.tell("billingd", f"holds a plan: {first_sentence(status['held']['items'][0]['reason'])}")
        there = await talk.recurly_plans()
        if codes[data.IGNORED.name] in there:
            raise DemoFailed(f"plan {data.IGNORED.title} is not labelled, and is at Recurly all the same")
        story.tell("billingd", f'leaves "{data.IGNORED.title}" alone: its product is not labelled')

    async def _first_subscribers(self) -> None:
        """Most have an account, one has none and is held, one wants the plan that is held."""
        for subscriber in (*data.FIRST, data.LEAVING, data.WITHOUT_ACCOUNT, data.HELD):
            await self._meet(subscriber, account=subscriber is not data.WITHOUT_ACCOUNT)
            await self._subscribe(subscriber)
        await self._approved((*data.FIRST, data.LEAVING))

        async def held() -> Json | None:
            status = await self._talk.admin("/status")
            return status if status and status["held"]["subscriptions"] == 2 else None

        status = await self._talk.until("two subscriptions are held", held)
        for item in status["held"]["items"]:
            if item["subscription"]:
                self._story.tell("billingd", f"holds a subscription: {first_sentence(item['reason'])}")

    async def _announced_twice(self) -> None:
        """Amplify delivers each webhook about one subscription twice."""
        await self._meet(data.ANNOUNCED_TWICE, account=True)
        self._story.tell("fault", "webhooks: each is delivered twice")
        await self._rehook({"url": self._stage.webhook_url, "duplicate": True})
        before = await self._duplicates()
        await self._subscribe(data.ANNOUNCED_TWICE)
        await self._approved([data.ANNOUNCED_TWICE])
        await self._talk.control("POST", "hooks/settle", {})
        seen = await self._duplicates() - before
        await self._rehook({"url": self._stage.webhook_url})
        self._story.tell("billingd", f"knew {seen} webhooks already, and did nothing for them")
        self._injected.append(Injected("webhooks delivered twice", 1, seen))

    async def _answer_lost(self) -> None:
        """billingd takes webhooks in, but its answers are lost, and they are delivered again."""
        await self._meet(data.UNHEARD, account=True)
        async with LosesAnswers(self._talk) as relay:
            self._story.tell("fault", "webhooks: billingd's answers are lost, so they come again")
            await self._rehook({"url": relay.url})
            await self._subscribe(data.UNHEARD)
            await self._approved([data.UNHEARD])
            await self._talk.control("POST", "hooks/settle", {})
            known = sum(bool(answer["duplicate"]) for answer in await relay.again())
            await self._rehook({"url": self._stage.webhook_url})
        self._story.tell("billingd", f"knew all {known} that came again")
        self._injected.append(Injected("webhook answers lost, then delivered again", 1, known))
        if known != relay.lost:
            self._faults.append(f"{relay.lost - known} webhook(s) were taken for new when delivered again.")

    async def _account_appears(self) -> None:
        """Somebody makes the account that was missing; billingd finds it without being told."""
        await self._make_account(data.WITHOUT_ACCOUNT)
        await self._approved([data.WITHOUT_ACCOUNT])

    async def _killed_while_subscribing(self) -> None:
        await self._meet(data.INTERRUPTED, account=True)
        found = await self._trouble.kill_after_commit(
            SUBSCRIPTIONS, "the new subscription", after=lambda: self._subscribe(data.INTERRUPTED)
        )
        if not found:
            self._story.tell("demo", "that kill came a moment too late to be between the two")
        await self._approved([data.INTERRUPTED])

    async def _killed_between(self) -> None:
        for _ in range(KILL_TRIES):
            if await self._trouble.kill_after_commit(USAGE, "a usage record"):
                return
            self._story.tell("demo", "no sign that this kill was between the two; once more")
        self._faults.append(
            f"After {KILL_TRIES} kills between posting a usage record and recording it, billingd never "
            "looked for the record at Recurly and found it."
        )

    async def _late_traffic(self) -> None:
        """Traffic of windows that billingd has read already, under prices that care about the order."""
        at = datetime.now(UTC)

        async def read() -> Json | None:
            status = await self._talk.admin("/status")
            mark = status and status["traffic"]["watermark"]
            return status if mark and instant(mark) >= at + WINDOW else None

        await self._talk.until("the window of late traffic was read once", read)
        late = [each for each in data.FIRST if each.plan in {data.VOLUME.name, data.GRADUATED.name}]
        for subscriber in late:
            await self._gateway.serve(subscriber, LATE_UNITS, at)
        age = (datetime.now(UTC) - at).total_seconds()
        units = LATE_UNITS * len(late)
        self._story.tell("fault", f"{units:,} units arrive {age:.1f} s late, their window was read already")
        self._injected.append(Injected("subscriptions with traffic that came late", len(late), len(late)))

    async def _deprecated(self) -> None:
        await self._talk.control("POST", f"plans/{data.GRADUATED.name}/deprecate", {})
        self._story.tell("Amplify", f'plan "{data.GRADUATED.title}" is deprecated; who has it keeps it')

    async def _cancelled(self) -> None:
        await self._gateway.close(data.LEAVING)
        await self._talk.control("POST", f"subscriptions/{data.LEAVING.subscription}/cancel", {})
        self._story.tell("Amplify", f"{data.LEAVING.name} cancels")

    async def _close_books(self) -> None:
        """Everything is reported, the cancelled one has ended, then a renewal bills it all."""
        last = self._gateway.last_at

        async def reported() -> Json | None:
            status = await self._talk.admin("/status")
            traffic = (status or {}).get("traffic", {})
            mark = traffic.get("watermark")
            if status is None or not mark or instant(mark) <= last:
                return None
            settled = traffic["reported_units"] + traffic["written_off_units"] + status["held"]["units"]
            return status if settled == traffic["recorded_units"] else None

        what = "all traffic is read, and reported or held"
        status = await self._talk.until(what, reported, seconds=SETTLED_SECONDS)
        held = status["held"]["units"] + status["traffic"]["written_off_units"]
        self._story.tell(
            "billingd",
            f"has reported {status['traffic']['reported_units']:,} units; {held:,} are held or written off",
        )

        async def ended() -> bool | None:
            found = await self._talk.subscriptions()
            return found.get(data.LEAVING.subscription, {}).get("state") == "ended" or None

        await self._talk.until(f"{data.LEAVING.name}'s subscription has ended at Recurly", ended)
        self._story.tell("Recurly", f"{data.LEAVING.name}: final invoice written, subscription terminated")
        renewed = await self._talk.control("POST", "renew", {"subscription": "all"})
        self._story.tell("Recurly", f"{renewed['renewed']} subscriptions renew, and their usage is invoiced")

    async def _prove(self) -> Proof:
        """Both sides are read once more; then the daemon is asked to stop."""
        ledger = await self._talk.control("GET", "ledger")
        status = await self._talk.until("the daemon's status", lambda: self._talk.admin("/status"))
        linked = await self._talk.subscriptions()
        lines = {each.subscription: await self._lines(each, linked) for each in data.LINKED}
        known = {each.subscription: self._known(each, linked) for each in data.LINKED}
        cycles = {each.subscription: self._cycles(each, known[each.subscription]) for each in data.LINKED}
        code = await self._stage.daemon.stop()
        self._story.tell("billingd", f"stopped on SIGTERM with exit code {code}")
        if code != 0:
            self._faults.append(f"The daemon left with exit code {code} on SIGTERM.")
        letters = (await self._talk.control("GET", "mailbox"))["letters"]
        by_name = {each["name"]: each for each in ledger["subscriptions"]}
        self._see_to_the_rest(by_name, ledger, status)
        self._see_to_the_held(status, known, cycles[data.CUT_SHORT.subscription][0])
        held = tuple(str(item["reason"]) for item in status["held"]["items"])
        complete = self._renewals.bills.complete
        self._story.tell("billingd", f"sent {len(letters)} notifications to its provider")
        return Proof(
            rows=tuple(
                row(
                    each,
                    by_name[each.subscription],
                    lines[each.subscription],
                    cycles[each.subscription],
                    known[each.subscription],
                )
                for each in data.LINKED
            ),
            renewals=tuple(
                renewal(
                    each,
                    cycles[each.subscription][0],
                    lines[each.subscription],
                    known[each.subscription],
                    complete=complete[each.subscription],
                )
                for each in data.RENEWED
            ),
            kills=self._stage.kills,
            injected=(*self._injected, *self._renewals.injected, *self._trouble.injected),
            held=held,
            faults=(*self._faults, *self._renewals.faults),
            seconds=self._story.seconds,
        )

    def _see_to_the_rest(self, by_name: dict[str, Json], ledger: Json, status: Json) -> None:
        """What the sums per subscription do not show."""
        if by_name[data.HELD.subscription]["recurly"]:
            self._faults.append(f"{data.HELD.name}'s plan is held, and Recurly has a subscription to it.")
        if ledger["foreign"]:
            self._faults.append(f"Recurly has {len(ledger['foreign'])} subscription(s) of nobody.")
        if dead := status["outbox"]["dead"]:
            self._faults.append(f"billingd gave up {dead} action(s).")
        if not any(item["kind"] == "plan_inexpressible" for item in status["held"]["items"]):
            self._faults.append(f'Plan "{data.INEXPRESSIBLE.title}" is not held.')

    def _see_to_the_held(self, status: Json, known: dict[str, dict[str, int]], cycle: Cycle) -> None:
        """Units are held of one subscription only, and what billingd says they are worth is right."""
        bills = self._renewals.bills
        for subscription, units in known.items():
            kept = units["held_units"] + units["written_off_units"]
            if kept and subscription != data.CUT_SHORT.subscription:
                self._faults.append(f"billingd holds {kept} unit(s) of {subscription}.")
        if (units_held := status["held"]["units"]) != known[data.CUT_SHORT.subscription]["held_units"]:
            self._faults.append(f"billingd's list has {units_held} held unit(s), and its ledger has others.")
        if (right := worth(data.CUT_SHORT, cycle)) != bills.at_stake:
            self._faults.append(f"What is held is worth {right}, and billingd says {bills.at_stake}.")

    async def _lines(self, subscriber: Subscriber, linked: dict[str, Json]) -> tuple[Line, ...]:
        """What Recurly's invoices charge for usage."""
        uuid = linked[subscriber.subscription]["recurly_uuid"]
        return tuple(
            Line(
                add_on=line["add_on_code"],
                starts=instant(line["start_date"]),
                ends=instant(line["end_date"]),
                units=line["quantity"],
                amount=Decimal(str(line["amount"])),
            )
            for line in await self._talk.recurly_lines(uuid)
        )

    def _known(self, subscriber: Subscriber, linked: dict[str, Json]) -> dict[str, int]:
        """billingd's own sums of a subscription."""
        row = linked[subscriber.subscription]
        written_off = self._renewals.bills.written_off if subscriber is data.CUT_SHORT else 0
        return {
            "recorded_units": row["recorded_units"],
            "held_units": row["held_units"],
            "written_off_units": written_off,
        }

    def _cycles(self, subscriber: Subscriber, known: dict[str, int]) -> tuple[Cycle, ...]:
        """What it used in each billing period, by the gateway's count."""
        bills, used = self._renewals.bills, self._gateway.of(subscriber)
        if subscriber not in data.RENEWED:
            return (Cycle(used),)
        before = self._gateway.of(subscriber, before=bills.at)
        kept = known["held_units"] + known["written_off_units"]
        return (Cycle(before, kept, ends=bills.at), Cycle(used - before, starts=bills.at))

    async def _meet(self, subscriber: Subscriber, *, account: bool) -> None:
        """The person, the team or organisation, and the account that pays."""
        person: Json = {"name": subscriber.person, "team": f"{subscriber.name} team"}
        if subscriber.account == "user":
            person["email"] = f"{subscriber.person.split()[0].lower()}@example.com"
        if subscriber.organization is not None:
            person["organization"] = subscriber.organization
        made = await self._talk.control("POST", "people", person)
        id_ = {"user": made["guid"], "team": made["team"], "org": subscriber.organization}[subscriber.account]
        self._accounts[subscriber.name] = f"amplify-{subscriber.account}-{id_}"
        if account:
            await self._make_account(subscriber, quietly=True)

    async def _make_account(self, subscriber: Subscriber, *, quietly: bool = False) -> None:
        code = self._accounts[subscriber.name]
        await self._talk.control("POST", "accounts", {"code": code, "company": subscriber.name})
        if not quietly:
            self._story.tell("Recurly", f"somebody makes the account {code} for {subscriber.name}")

    async def _subscribe(self, subscriber: Subscriber) -> None:
        plan = data.BY_NAME[subscriber.plan]
        asked: Json = {
            "plan": plan.name,
            "user": subscriber.person,
            "name": subscriber.subscription,
            "title": f"{subscriber.name}: {plan.title}",
        }
        if subscriber.account != "user":
            asked["team"] = f"{subscriber.name} team"
        if subscriber.organization is not None:
            asked["organization"] = subscriber.organization
        await self._talk.control("POST", "subscribe", asked)
        self._story.tell("Amplify", f'{subscriber.name} subscribes to "{plan.title}": pending')

    async def _approved(self, subscribers: Iterable[Subscriber]) -> None:
        """Each is approved, told as it happens, and used from then on."""
        waiting = {each.subscription: each for each in subscribers}

        async def all_approved() -> bool | None:
            rows = (await self._talk.control("GET", "ledger"))["subscriptions"]
            for seen in rows:
                subscriber = waiting.get(seen["name"])
                if subscriber is None or seen["approval"] != "approved":
                    continue
                del waiting[subscriber.subscription]
                self._gateway.open(subscriber)
                account = seen["recurly"][0]["account"] if seen["recurly"] else "nobody"
                self._story.tell("billingd", f"approves {subscriber.name}, billed to {account}")
            return not waiting or None

        names = ", ".join(each.name for each in waiting.values())
        await self._talk.until(f"billingd approves {names}", all_approved)

    async def _rehook(self, hook: dict[str, Any]) -> None:
        """Amplify's only hook from now on."""
        await self._talk.control("DELETE", "hooks")
        headers = {"Authorization": self._stage.webhook_secret}
        await self._talk.control("POST", "hooks", {"headers": headers, **hook})

    async def _duplicates(self) -> int:
        status = await self._talk.until("the daemon's status", lambda: self._talk.admin("/status"))
        return int(status["webhooks"]["duplicates"])
