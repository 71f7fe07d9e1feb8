"""A life of billingd between two sandboxed far sides, drawn from a seed: people, traffic, faults, deaths."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

import structlog
from oracle import Bounds, Known, Ledger, Served, check, parse_time, read_rows
from sim_loop import FarClock, OwnClock, SimLoop, spawn
from sim_process import Process, Shape

from billingd.admin import operations, status
from billingd.daemon import Daemon
from billingd.domain.events import parse_amplify, parse_recurly
from billingd.domain.resync import MASS_ABSENCE
from billingd.sandbox import control_amplify, control_traffic, server
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.journal import Event
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.faults import KINDS, Rule
from billingd.sandbox.recurly import lifecycle
from billingd.store import held
from billingd.store.engine import Store
from billingd.traffic.poll import FLUSH_LEADS

START: Final = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)
CLOCK_STEP_MAX: Final = HOUR

TOP: Final = 999_999_999
PRICINGS: Final[tuple[dict[str, Any], ...]] = (
    {"type": "perunit", "cost": 0.5},
    {
        "type": "graduated",
        "limit": {
            "type": "tiered",
            "tiers": [
                {"from": 1, "to": 500, "cost": 0.1, "flatFee": 0},
                {"from": 501, "to": TOP, "cost": 0.05, "flatFee": 0},
            ],
        },
    },
    {
        "type": "volume",
        "limit": {
            "type": "tiered",
            "tiers": [
                {"from": 1, "to": 500, "cost": 0.1, "flatFee": 0},
                {"from": 501, "to": TOP, "cost": 0.05, "flatFee": 0},
            ],
        },
    },
    {
        "type": "volume",
        "limit": {
            "type": "tiered",
            "tiers": [
                {"from": 1, "to": 500, "cost": 0, "flatFee": 5},
                {"from": 501, "to": TOP, "cost": 0, "flatFee": 9},
            ],
        },
    },
)
STRIKES: Final = (
    "refuse",
    "reset",
    "lost",
    "fin",
    "cut",
    "garbage",
    "not_json",
    "429",
    "409",
    "500",
    "500_committed",
    "html_502",
    "html_502_committed",
    "slow",
    "list_lag",
    "late",
    "stored_500",
    "key_expired",
)
LATE_MAX: Final = 50
"""Seconds after which a request that was given up may still be carried out: less than the settling time."""

UNANSWERED: Final = (*["late"] * 6, "lost", "cut", "html_502_committed", "slow")
"""How a write is left without a usable answer, although it is carried out."""

REFUSED: Final = "subscription_refused"
"""What is held when Recurly said for good that it makes no such subscription."""

EXHAUSTED: Final = ("Retryable", "NotDone", "Unknown")
"""What an action is given up for after `attempts_max`, while a far side is away for hours."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What may happen in a life."""

    crashes: bool = True
    faults: bool = True
    outages: bool = True
    clock_steps: bool = True
    pauses: bool = True
    ignored_keys: bool = True
    """Whether Recurly does not look at idempotency keys for a while."""
    beyond_horizon: bool = True
    cycles: bool = True
    """Whether the oracle asks that every unit is in its own billing cycle."""
    lost_mail: float = 0.0
    """The share of webhooks that never come; of the others, none comes a second time because it failed."""
    away: bool = False
    """Whether the daemon is down for days, once for longer than the feed keeps events."""
    density: float = 1.0
    """How much of everything happens in a day."""


class Life:
    """One seed."""

    def __init__(
        self, loop: SimLoop, seed: int, days: float, path: Path, ingredients: Ingredients, *, tracing: bool
    ) -> None:
        self.loop = loop
        self.seed = seed
        self.days = days
        self.path = path
        self.ingredients = ingredients
        self.far = FarClock(loop, START)
        self.clock = OwnClock(self.far)
        self.app = server.build(clock=self.far)
        self.app.freeze()
        self.world = self.app[server.WORLD]
        self.world.tenant.settings.configure(resource_hooks=False, token_seconds=6 * 3600)
        self.world.tenant.journal.listeners.append(self._heard)
        self.ledger = Ledger()
        self.counts: Counter[str] = Counter()
        self.tracing = tracing
        self.trace: list[str] = []
        self._digest = hashlib.sha256()
        self._plan_rng = self._random("plan")
        self._mail = self._random("webhooks")
        self._life_rng = self._random("life")
        self._keys_rng = self._random("keys")
        self._plans: list[tuple[str, tuple[str, ...]]] = []
        self._on_the_way = 0
        self._struck = 0
        self.process = Process(
            loop,
            self.app,
            (self.far, self.clock),
            path,
            Shape.drawn(self._random("settings")),
            self._random,
            self.note,
        )
        self._shape = self.process.shape

    def _random(self, name: str) -> Random:
        return Random(f"{self.seed}:{name}")

    # What is written down of it.

    def note(self, *words: object) -> None:
        """One line of the trace; all lines make up the digest."""
        if words[0] == "http" and "/catalog/v1/marketplaces" in str(words[2]):
            self.counts["resyncs"] += 1  # nothing else reads these
        self._watch(str(words[0]))
        line = f"{self.loop.time():12.3f} {' '.join(map(str, words))}"
        self._digest.update(line.encode() + b"\n")
        if self.tracing:
            self.trace.append(f"{self.far.now():%m-%d %H:%M:%S.%f} {' '.join(map(str, words))}")

    def _watch(self, what: str) -> None:
        """When billingd lives, and when something goes wrong for it: at other times it has no excuse."""
        if what == "start":
            self.ledger.up.append((self.far.now(), None))
        elif what == "down":
            self.ledger.up[-1] = (self.ledger.up[-1][0], self.far.now())
        elif what == "http" and (struck := sum(self.world.faults.counts.values())) != self._struck:
            self._struck = struck
            self.ledger.struck.append(self.far.now())

    def told(self, _logger: Any, method: str, event: Json) -> Any:
        """structlog's processor: billingd's log lines go into the trace."""
        if self.tracing:
            name, rest = event.pop("event"), {key: str(value)[:160] for key, value in event.items()}
            shown = " ".join(f"{key}={value}" for key, value in rest.items() if key != "exc_info")
            self.trace.append(f"{self.far.now():%m-%d %H:%M:%S.%f}     {method} {name} {shown}")
        raise structlog.DropEvent

    # Webhooks: every one is delivered, sooner or later, once or more often, in any order.

    def _heard(self, event: Event) -> None:
        payload = event.payload
        known = self.ledger.subscriptions.get(payload["metadata"]["id"])
        approved = event.subresource == "approval" and payload["approval"]["state"] == "approved"
        if approved and known is not None and known.approved_at is None:
            known.approved_at = self.far.now()
            self.note("approved", known.name)
        if payload["kind"] not in ("Product", "ProductPlan", "Quota", "Subscription"):
            return
        body = json.dumps(event.envelope()).encode()
        if self._mail.random() < self.ingredients.lost_mail:
            self.counts["lost_webhooks"] += 1
            return
        for _ in range(2 if self._mail.random() < 0.1 else 1):
            late = self._mail.random()
            delay = self._mail.uniform(0, 20) if late < 0.8 else self._mail.uniform(0, 1800)
            delay = self._mail.uniform(0, 6 * 3600) if late > 0.97 else delay
            self._on_the_way += 1
            spawn(self._deliver(event.id, body, delay), name="webhook")

    async def _deliver(self, id_: str, body: bytes, delay: float) -> None:
        await asyncio.sleep(delay)
        while not await self.process.accepts(parse_amplify(body)):
            if self.ingredients.lost_mail:  # Amplify never repeats one (amplify.md 4.3)
                self.counts["lost_webhooks"] += 1
                self._on_the_way -= 1
                return
            await asyncio.sleep(self._mail.uniform(5, 300))
        self.ledger.acknowledged.add(id_)
        self.counts["webhooks"] += 1
        self._on_the_way -= 1

    # The world.

    async def play(self, operation: Callable[..., Any], body: Json | None = None, **path: str) -> Json:
        """One operation of the sandbox's control interface."""
        result: Json = await operation(self.world, Asked(body or {}), path)
        return result

    async def set_up(self) -> None:
        """Plans and first subscriptions."""
        rng = self._plan_rng
        await self.play(
            control_amplify.add_product, {"name": "weather", "attributes": {"billingSystem": "recurly"}}
        )
        for number in range(rng.randint(1, 3)):
            interval = rng.choice(("daily", "daily", "daily", "weekly", "monthly", "annually"))
            length = {
                "daily": {"type": "days", "length": 1},
                "weekly": {"type": "days", "length": 7},
                "monthly": {"type": "months", "length": 1},
                "annually": {"type": "years", "length": 1},
            }[interval]
            quotas = [
                {
                    "name": f"q{place}",
                    "unit": "transactions" if place == 0 else f"x-u{place}",
                    "pricing": rng.choice(PRICINGS),
                }
                for place in range(rng.choice((1, 1, 2)))
            ]
            body = {
                "name": f"plan{number}",
                "product": "weather",
                "billing": {"price": 10, "interval": interval},
                "subscription": {"interval": length},
                "quotas": quotas,
            }
            made = await self.play(control_amplify.add_plan, body)
            self._plans.append((f"plan{number}", tuple(each["metadata"]["id"] for each in made["quotas"])))

    async def subscribe(self, name: str) -> None:
        """Somebody subscribes; an account of theirs is there, sooner or later."""
        rng = self._life_rng
        plan, quotas = rng.choice(self._plans)
        body = {"plan": plan, "name": name, "user": f"user of {name}", "team": f"team of {name}"}
        try:
            made = await self.play(control_amplify.subscribe, body | {"email": f"{name}@example.com"})
        except Refused as refused:
            self.note("subscribe", name, "refused", refused)
            return
        id_ = made["metadata"]["id"]
        self.ledger.subscriptions[id_] = Known(id_, name, quotas)
        self.note("subscribe", name, id_, plan)
        code = f"amplify-user-{made['marketplace']['resource']['metadata']['createUserId']}"
        if code not in self.world.site.account_by_code:
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 7200))
            if code not in self.world.site.account_by_code:  # they may have subscribed once more meanwhile
                self.world.site.create_account(code, billing_info=True)

    def _alive(self) -> list[Known]:
        """Subscriptions that a gateway lets calls through for."""
        found = []
        for known in self.ledger.subscriptions.values():
            resource = self.world.tenant.resources.get(known.id)
            if resource is None or known.ended_at is not None:
                continue
            if resource.body.get("state", {}).get("name") == "active" and known.approved_at is not None:
                found.append(known)
        return found

    async def serve(self) -> None:
        """Traffic of a few subscriptions, some of it late."""
        rng, now = self._life_rng, self.far.now()
        for known in self._alive():
            if rng.random() < 0.5:
                continue
            for _ in range(rng.randint(1, 3)):
                assert known.approved_at is not None
                at = max(known.approved_at, now - rng.uniform(0, 600) * timedelta(seconds=1))
                at = at.replace(microsecond=at.microsecond // 1000 * 1000)
                if at < known.approved_at:
                    continue
                late = self._lateness(rng)
                arrives = max(now, at + late)
                quota, units = rng.choice(known.quotas), rng.randint(1, 400)
                await self._count(known, Served(known.id, quota, at, units, arrives))

    async def _count(self, known: Known, served: Served) -> None:
        body = {
            "subscription": served.subscription,
            "quota": served.quota,
            "units": served.units,
            "at": served.at.isoformat(),
            "arrives": served.arrives.isoformat(),
        }
        await self.play(control_traffic.add_traffic, body)
        self.ledger.served.append(served)
        late = f"late {served.arrives - served.at}"
        self.note("served", known.name, served.quota[:8], served.units, served.at.isoformat(), late)

    def _lateness(self, rng: Random) -> timedelta:
        draw = rng.random()
        if draw < 0.7:
            return rng.uniform(0, 300) * timedelta(seconds=1)
        if draw < 0.9:
            return rng.uniform(0, 3) * HOUR
        if draw < 0.99 or not self.ingredients.beyond_horizon:
            return rng.uniform(0, self.bounds().lateness / HOUR) * HOUR
        return rng.uniform(1, 2) * (self._shape.horizon + self._shape.settle)

    def bounds(self) -> Bounds:
        """Traffic is certain to be seen when it comes before the watermark has left its window behind."""
        certain = self._shape.horizon + self._shape.settle - 2 * self._shape.window - CLOCK_STEP_MAX
        steps = CLOCK_STEP_MAX if self.ingredients.clock_steps else timedelta(0)
        return Bounds(
            certain,
            cycles=self.ingredients.cycles,
            settled=self._shape.settle - steps,
            flushed=FLUSH_LEADS[0] + self._shape.settle,
            doubles=self.counts["ignored_keys"] > 0,
        )

    async def end_one(self) -> None:
        """A cancellation, a rejection, a deletion; sometimes the same name comes back."""
        rng = self._life_rng
        if not self.ledger.subscriptions:
            return
        known = rng.choice(list(self.ledger.subscriptions.values()))
        if known.ended_at is not None or known.rejected:
            return
        resource = self.world.tenant.resources.get(known.id)
        assert resource is not None
        waits = resource.body["approval"]["state"] == "pending"
        step = rng.choice(("reject", "delete")) if waits else rng.choice(("cancel", "cancel", "delete"))
        try:
            await self.play(control_amplify.move_subscription, {}, name=known.id, step=step)
        except (Refused, Wrong) as refused:
            self.note(step, known.name, "refused", refused)
            return
        self.note(step, known.name, known.id)
        if step == "reject":
            known.rejected = True
        else:
            known.ended_at = self.far.now()
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0, 7200))
            if self.world.tenant.resources.get(known.id) is not None:
                await self.play(control_amplify.move_subscription, {}, name=known.id, step="delete")
                self.note("delete", known.name, known.id)
                known.ended_at = known.ended_at or self.far.now()
            await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 3600))))
            await self.subscribe(known.name)

    def strike(self) -> None:
        """Something goes wrong on one side for a few requests."""
        rng = self._life_rng
        kind, side = (
            rng.choice([kind for kind in STRIKES if kind in KINDS]),
            rng.choice(("recurly", "recurly", "amplify")),
        )
        args: Json = {}
        if kind == "slow":
            args = {"seconds": rng.choice((1, 5, 12, 40))}
        elif kind == "late":
            args = {"seconds": rng.uniform(1, LATE_MAX)}
        elif kind == "409":
            side = "recurly"  # Amplify's says that somebody else changed the resource
        elif kind in ("stored_500", "key_expired"):
            side = "recurly"
        elif kind == "list_lag":
            args, side = {"seconds": rng.uniform(1, 30)}, "recurly"
        elif kind == "429":
            args = {"seconds": rng.randint(1, 120)}
        method = rng.choice(("*", "POST", "GET", "PUT")) if kind != "list_lag" else "GET"
        rule = Rule(side, method, "*", kind, rng.randint(1, 4), rng.randint(0, 3), args)
        self.world.faults.add(rule)
        self.note("fault", side, method, kind, rule.times, rule.skip, args)

    async def outage(self) -> None:
        """One side is away for a while."""
        rng = self._life_rng
        side = rng.choice(("recurly", "amplify"))
        args: Json = rng.choice(({}, {"status": 503}))
        number = self.world.faults.add(Rule(side, "*", "*", "outage", None, args=args))
        seconds = rng.choice((600, 600, 7200, 6 * 3600)) * rng.random()
        self.note("outage", side, args, f"{seconds:.0f} s")
        await asyncio.sleep(seconds)
        self.world.faults.remove(number)

    async def ignore_keys(self) -> None:
        """Recurly looks at no idempotency key for hours; mostly a bill comes meanwhile.

        Usage right before it has to wait, gets no answer at first, and is carried out all the same.
        """
        rng, site = self._keys_rng, self.world.site
        number = self.world.faults.add(Rule("recurly", "POST", "*", "ignore_idempotency_key", None))
        self.counts["ignored_keys"] += 1
        self.note("keys ignored")
        now = self.far.now()
        soon = sorted(
            (one.cycle.ends_at, known.name, one.uuid, one.id)
            for known in self._alive()
            for one in site.subscriptions.values()
            if one.given.get("po_number") == known.id and one.status == "active"
            if timedelta(minutes=10) < one.cycle.ends_at - now < 30 * HOUR
        )
        if soon and rng.random() < 0.8:
            ends_at, name, uuid, id_ = rng.choice(soon)
            await self._sleep_until(ends_at - rng.uniform(185, 300) * timedelta(seconds=1))
            for known in self._alive():
                if known.name == name:
                    at = self.far.now().replace(microsecond=0)
                    units = rng.randint(1, 400)
                    await self._count(known, Served(known.id, rng.choice(known.quotas), at, units, at))
            wait, kind = rng.randint(100, 170), rng.choice(UNANSWERED)
            args = {"seconds": rng.uniform(10, LATE_MAX)} if kind in {"late", "slow"} else {}
            path = f"/subscriptions/uuid-{uuid}/add_ons/*/usage"
            self.world.faults.add(Rule("recurly", "POST", path, "429", 1, args={"seconds": wait}))
            self.world.faults.add(Rule("recurly", "POST", path, kind, rng.randint(1, 2), args=args))
            self.note("faults before a bill", name, wait, kind, args)
            await self._sleep_until(ends_at + rng.uniform(0, 60) * timedelta(seconds=1))
            site.run_due_bills()
            renewed = {"id": id_, "uuid": uuid, "object_type": "subscription", "event_type": "renewed"}
            await self.process.accepts(parse_recurly(json.dumps(renewed).encode(), None))
        await asyncio.sleep(rng.uniform(0.1, 6) * 3600)
        self.world.faults.remove(number)
        self.note("keys heeded")

    async def _sleep_until(self, moment: datetime) -> None:
        await asyncio.sleep(max(0.0, (moment - self.far.now()).total_seconds()))

    async def _ignore_keys_some_time(self) -> None:
        await asyncio.sleep(self._keys_rng.uniform(0, self.days * 86_400))
        await self.ignore_keys()

    async def pause(self) -> None:
        """Recurly pauses one from its next bill date on; maybe somebody resumes it by hand."""
        rng, site = self._life_rng, self.world.site
        site.run_due_bills()
        found = [one for one in site.subscriptions.values() if one.status == "active"]
        if not found:
            return
        one = rng.choice(found)
        lifecycle.pause(site, one, {"remaining_pause_cycles": 1})
        self.note("pause", one.given.get("po_number"))

    def leave(self) -> None:
        """Nobody starts the daemon again for days."""
        days = self._life_rng.choice((1.5, 3.0, 8.0)) if self.counts["days_away"] else 8.0
        self.note("away", days)
        self.counts["days_away"] += int(days)
        self.process.stay_away(days * 86_400)

    def step_clock(self) -> None:
        """billingd's clock is set."""
        self.clock.offset = self._life_rng.uniform(-1, 1) * CLOCK_STEP_MAX
        self.note("clock", self.clock.offset)

    async def turmoil(self) -> None:
        """Everything that happens, each thing at a moment of its own."""
        rng, life_seconds = self._life_rng, self.days * 86_400
        moments: list[tuple[float, str]] = []

        def often(per_day: float, what: str) -> None:
            for _ in range(
                max(1, round(per_day * self.ingredients.density * self.days * rng.uniform(0.5, 1.5)))
            ):
                moments.append((rng.uniform(0, life_seconds), what))

        chosen = self.ingredients
        people = max(1, round(rng.randint(1, 4) * chosen.density))
        moments += [(rng.uniform(0, life_seconds / 3), "subscribe") for _ in range(people)]
        often(8, "serve")
        often(0.5, "end")
        for wanted, per_day, what in (
            (chosen.faults, 4, "strike"),
            (chosen.outages, 0.3, "outage"),
            (chosen.crashes, 1.2, "crash"),
            (chosen.crashes, 0.3, "stop"),
            (chosen.clock_steps, 0.4, "clock"),
            (chosen.pauses, 0.2, "pause"),
            (chosen.away, 0.1, "away"),
        ):
            if wanted:
                often(per_day, what)
        if chosen.ignored_keys and self._keys_rng.random() < 0.5:
            spawn(self._ignore_keys_some_time())
        subscribed = 0
        for at, what in sorted(moments):
            await asyncio.sleep(max(0.0, at - self.loop.time()))
            if what == "subscribe":
                subscribed += 1
                spawn(self.subscribe(f"s{subscribed}"))
            elif what == "serve":
                await self.serve()
            elif what == "end":
                spawn(self.end_one())
            elif what == "strike":
                self.strike()
            elif what == "outage":
                spawn(self.outage())
            elif what == "crash":
                self.process.die_in(rng.randint(1, 60))
            elif what == "stop":
                if self.process.daemon is not None:
                    self.note("stop")
                    self.process.restart()
            elif what == "away":
                self.leave()
            elif what == "clock":
                self.step_clock()
            else:
                await self.pause()
        await asyncio.sleep(max(0.0, life_seconds - self.loop.time()))

    async def calm(self) -> None:
        """Nothing goes wrong any more, until all that can be done is done."""
        self.note("calm")
        await asyncio.sleep(8 * 3600)  # the last outage and the last webhook
        self.process.die_in(None)
        self.process.stay_away(None)
        self.world.faults.clear()
        self.clock.offset = timedelta(0)
        span = self._shape.horizon + self._shape.settle + 2 * self._shape.window + 4 * HOUR
        await asyncio.sleep(span.total_seconds() / 2)
        await self._retry_dead()
        await asyncio.sleep(span.total_seconds() / 2)
        site = self.world.site
        for _ in range(48):
            site.run_due_bills()
            paused = [one for one in site.subscriptions.values() if one.status == "paused"]
            if not paused and not self._on_the_way and not self._unfinished():
                break
            await asyncio.sleep(2 * 3600)

    async def _retry_dead(self) -> None:
        """An operator looks at what was given up during an outage, and has it tried again.

        What billingd asks about, for no event told of it, was deleted: nobody loses a right in this world.
        """
        dead = [one for one in read_rows(self.path).actions if one["state"] == "dead"]
        for action in dead:
            self.note("dead", action["key"], action["error"])
            self.counts["dead"] += 1
            self.ledger.dead.add(action["key"])
            if not action["error"].startswith(EXHAUSTED):
                continue  # given up at once: the oracle is to see it
            daemon = self._running()
            await self.process.within(operations.retry(daemon.store, action["id"], now=self.clock.now()))
            daemon.outbox.wake.set()
        await self.process.within(self._confirm_absent(self._running().store))

    async def _confirm_absent(self, store: Store) -> None:
        async with store.read() as tx:
            items = await held.standing(tx, kind=MASS_ABSENCE)
        for item in items:
            self.note("confirmed", item["reason"])
            self.counts["confirmed"] += 1
            await operations.release(store, item["id"], now=self.clock.now())

    def _unfinished(self) -> bool:
        """Whether anything is left to do. What Recurly refused is held, and looks again for ever: no person
        comes here, so that half a day of it, long after the last fault, is enough.
        """
        rows, now = read_rows(self.path), self.clock.now()
        refused = {
            one["subject"]
            for one in rows.held
            if one["kind"] == REFUSED and now - parse_time(one["since"]) > 12 * HOUR
        }
        return any(
            one["state"] == "leased" or (one["state"] == "pending" and one["subject"] not in refused)
            for one in rows.actions
        )

    async def whole(self) -> list[str]:
        """The life from its beginning to its end; what the oracle finds wrong."""
        await self.set_up()
        alive = spawn(self.process.keep_alive(), name="process")
        turmoil = asyncio.ensure_future(self._all_of_it())
        await asyncio.wait([alive, turmoil], return_when=asyncio.FIRST_COMPLETED)
        if not turmoil.done():
            turmoil.cancel()
            await alive
        document = await turmoil
        self.process.end()
        await alive
        self.world.site.run_due_bills()
        rows = read_rows(self.path)
        found = check(self.world.site, self.ledger, rows, document, self.bounds(), now=self.far.now())
        self.counts += self.process.counts
        self.counts["units"] = self.ledger.units()
        self.counts["billed_twice"] = sum(one["kind"] == "double_record" for one in rows.held)
        self.counts["held_units"] = sum(one.units for one in rows.records if one.state == "held")
        self.counts["faults"] = sum(self.world.faults.counts.values())
        return [*found, *self.loop.unhandled]

    async def _all_of_it(self) -> Json:
        await self.turmoil()
        await self.calm()
        daemon = self._running()
        source, now = daemon.settings.traffic.source, self.clock.now()
        document: Json = await self.process.within(
            status.read(daemon.store, source=source, now=now, reasons=(), webhooks={})
        )
        return document

    def _running(self) -> Daemon:
        assert self.process.daemon is not None
        return self.process.daemon

    @property
    def digest(self) -> str:
        """Of all that happened, in order."""
        return self._digest.hexdigest()
