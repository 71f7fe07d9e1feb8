"""One scripted life on the rig, and what it must have come to in the end; shares no code with billingd.

The truth is what the script itself says was served; it is compared with the records at the sandbox's Recurly,
one by one, and with the rows of the ledger.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from rig import HOUR, Crash, Json, Rig

from billingd.domain.errors import BillingdError
from billingd.store import schema

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
ROUNDS_MAX = 3_000
"""More than any life here needs: who is not quiet by then never is."""

DOUBTED = "idempotency_doubted"
"""What is held when a key that was sent again is not recognised: nothing is amiss with anybody's units."""

UNFINISHED = ("pending", "leased")
HELD_UP = timedelta(seconds=30)
"""The longest a loop of the daemon rests after a failure."""

TIERS: list[Json] = [
    {"from": 1, "to": 10, "cost": 2, "flatFee": 0},
    {"from": 11, "to": 999999999, "cost": 1, "flatFee": 0},
]
QUOTAS: list[Json] = [
    {"name": "calls", "pricing": {"type": "perunit", "cost": 0.5}},
    {"name": "maps", "pricing": {"type": "volume", "limit": {"type": "tiered", "tiers": TIERS}}},
    {"name": "data", "pricing": {"type": "graduated", "limit": {"type": "tiered", "tiers": TIERS}}},
]
DAILY: Json = {
    "billing": {"price": 10, "interval": "daily"},
    "subscription": {"interval": {"type": "days", "length": 1}},
}
"""A period of a day keeps the life short: a month is 31 readings."""


@dataclass(frozen=True)
class Served:
    """Units of one quota that a gateway let through at one moment."""

    name: str
    quota: str
    units: int
    at: datetime
    arrives: datetime


@dataclass
class Script:
    """What was played so far, by whoever plays the world."""

    served: list[Served] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    quotas: dict[str, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    async def plan(self, rig: Rig, name: str, *, quotas: list[Json] = QUOTAS, **fields: Any) -> None:
        """A plan with its quotas, active."""
        made = await rig.plan(name, quotas=quotas, **fields)
        for quota in made["quotas"]:
            self.quotas[f"amplify-quota-{quota['metadata']['id']}"] = quota["name"]

    async def subscribe(self, rig: Rig, name: str, plan: str) -> None:
        """A pending subscription with an account to bill."""
        self.ids[name] = await rig.subscribe(name, plan)

    async def serve(
        self, rig: Rig, name: str, quota: str, units: int, *, late: timedelta | None = None
    ) -> None:
        """Units served now, visible now or `late`."""
        now = rig.far.now()
        arrives = now + (late or timedelta(0))
        await rig.traffic(name, units, quota=quota, arrives=arrives)
        self.served.append(Served(name, quota, units, now, arrives))

    @property
    def units(self) -> int:
        """All that was served."""
        return sum(each.units for each in self.served)


Key = tuple[str, str, str]
"""Subscription, quota, and which part of its units is meant."""

Scene = Callable[[Rig, Script], Awaitable[timedelta]]
"""What happens in the world, at once; returns how long the daemon then lives on before the next scene."""


async def opening(rig: Rig, script: Script) -> timedelta:
    """A product with a plan of three ways to charge."""
    await rig.product()
    await script.plan(rig, "metered", **DAILY)
    return timedelta(0)


async def first(rig: Rig, script: Script) -> timedelta:
    """Somebody subscribes."""
    await script.subscribe(rig, "acme", "metered")
    return timedelta(0)


async def second(rig: Rig, script: Script) -> timedelta:
    """Somebody else does, at the same moment, so that both are billed at the same."""
    await script.subscribe(rig, "beta", "metered")
    return timedelta(0)


async def serving(rig: Rig, script: Script) -> timedelta:
    """Traffic, of which some arrives three hours late."""
    await script.serve(rig, "acme", "calls", 7)
    await script.serve(rig, "acme", "maps", 12)
    await script.serve(rig, "acme", "data", 30)
    await script.serve(rig, "beta", "calls", 3)
    await script.serve(rig, "acme", "calls", 2, late=3 * HOUR)
    rig.pass_(111 * MINUTE)
    return 15 * MINUTE


async def arriving(rig: Rig, script: Script) -> timedelta:
    """The late part is there."""
    rig.pass_(2 * HOUR - 20 * MINUTE)
    return 30 * MINUTE


async def before_renewal(rig: Rig, script: Script) -> timedelta:
    """Traffic in the last hour of a period, up to what is flushed before its end."""
    ends = sorted(each.cycle.ends_at for each in rig.world.site.subscriptions.values())
    rig.pass_(ends[0] - 15 * MINUTE - rig.far.now())
    await script.serve(rig, "acme", "calls", 11)
    await script.serve(rig, "beta", "maps", 4)
    return ends[0] - 9 * MINUTE - rig.far.now()


async def last_minutes(rig: Rig, script: Script) -> timedelta:
    """What was served since is read once more."""
    await script.serve(rig, "acme", "maps", 2)
    rig.pass_(3 * MINUTE)
    ends = max(each.cycle.ends_at for each in rig.world.site.subscriptions.values())
    return ends - MINUTE - rig.far.now()


async def after_renewal(rig: Rig, script: Script) -> timedelta:
    """Traffic on both sides of the moment at which the bill is made."""
    await script.serve(rig, "beta", "calls", 1)
    rig.pass_(2 * MINUTE)
    await script.serve(rig, "beta", "calls", 5)
    await script.serve(rig, "acme", "maps", 6)
    await script.serve(rig, "beta", "data", 13)
    rig.pass_(111 * MINUTE)
    return 15 * MINUTE


async def cancelling(rig: Rig, script: Script) -> timedelta:
    """Both end, one after its last traffic."""
    await script.serve(rig, "acme", "calls", 9)
    for name in ("acme", "beta"):
        await rig.move(name, "cancel")
        script.ended.add(name)
    rig.pass_(timedelta(minutes=(110 - rig.far.now().minute) % 60))
    return 20 * MINUTE


async def closing(rig: Rig, script: Script) -> timedelta:
    """The plan is given up."""
    await rig.move_plan("metered", "deprecate")
    await rig.move_plan("metered", "archive")
    script.removed.add("metered")
    return 2 * HOUR


SCENES: tuple[Scene, ...] = (
    opening,
    first,
    second,
    serving,
    arriving,
    before_renewal,
    last_minutes,
    after_renewal,
    cancelling,
    closing,
)


async def live(rig: Rig, until: datetime, *, new_process: bool = False, to_the_end: bool = True) -> int:
    """The daemon lives until that moment, and on until nothing waits; returns how often it was held up.

    Time jumps to the next moment at which something is due. Traffic is read when the daemon would: at its
    start, on the schedule, before a bill, and when something asks for it.
    """
    held_up = 0
    why = ""
    read_at = rig.far.now() if new_process else await next_reading(rig)
    for _ in range(ROUNDS_MAX):
        try:
            await rig.hear()
            if rig.far.now() >= read_at or rig.poller.wake.is_set():
                rig.poller.wake.clear()
                await rig.poll()
                read_at = await next_reading(rig)
            await rig.drain(until=None if to_the_end else until)
        except BillingdError as error:  # as the daemon's loops do: they rest, and go on
            rig.steps.alive()
            held_up += 1
            why = str(error)
            rig.pass_(HELD_UP)
            if to_the_end or rig.far.now() < until:
                continue
            return held_up
        left, now = await unfinished(rig), rig.far.now()
        due = next_due(left)
        # an audit that waits for its time is nothing to wait for
        idle = due is None or (due > now and next_due(left, audits=False) is None)
        quiet = idle and not rig.unheard and not rig.poller.wake.is_set()
        if now >= until and (quiet or not to_the_end):
            return held_up
        moments = [moment for moment in (due, until, read_at) if moment is not None and moment > now]
        rig.pass_(max(min(moments) - now, timedelta(seconds=1)))
    amiss = [*await waiting(rig), f"{len(rig.unheard)} unheard", why]
    raise AssertionError(f"not quiet after {ROUNDS_MAX} rounds: {amiss}")


async def next_reading(rig: Rig) -> datetime:
    """When the traffic loop turns next: at seven minutes past the hour, or before a bill."""
    now = rig.far.now()
    scheduled = now.replace(minute=7, second=0, microsecond=0)
    scheduled += HOUR if scheduled <= now else timedelta(0)
    before_bill = await rig.poller.until_flush()
    return scheduled if before_bill is None else min(scheduled, now + max(before_bill, timedelta(0)))


async def unfinished(rig: Rig) -> list[Json]:
    """The actions that are neither done nor dead, in the order in which they were asked for."""
    box = schema.outbox.c
    asked = sa.select(box.kind, box.subject, box.key, box.state, box.error, box.due_at)
    async with rig.store.read() as tx:
        found = await tx.execute(asked.where(box.state.in_(UNFINISHED)).order_by(box.id))
        return [dict(row) for row in found.mappings()]


def next_due(left: list[Json], *, audits: bool = True) -> datetime | None:
    """When the next unfinished action is due; of one that is leased, when its lease ends.

    Later actions of a subject wait for its first.
    """
    firsts: dict[str, datetime] = {}
    for row in left:
        if audits or row["kind"] != "audit_usage":
            firsts.setdefault(row["subject"], row["due_at"])
    return min(firsts.values(), default=None)


async def waiting(rig: Rig) -> list[str]:
    """What is unfinished, and why; an audit whose time has not come is not."""
    now = rig.clock.now()
    return [
        f"{row['key']} {row['state']}: {row['error']}"
        for row in await unfinished(rig)
        if row["kind"] != "audit_usage" or row["due_at"] <= now
    ]


async def outlived(rig: Rig, life: Awaitable[object]) -> bool:
    """Lives; False when it died on the way."""
    try:
        await life
    except (Crash, BillingdError, BaseExceptionGroup):
        if not rig.steps.dead:
            raise
    if rig.steps.dead:  # also when nothing of the process noticed
        await rig.gone()
        return False
    return True


# What it came to.


async def wrong(rig: Rig, script: Script) -> list[str]:
    """Everything that is not as it must be; nothing may wait any more."""
    return [
        *_far_side(rig, script),
        *await _ledger(rig),
        *_approvals(rig, script),
        *[f"unfinished: {each}" for each in await waiting(rig)],
        *[f"dead letter: {each}" for each in await rig.dead()],
        *[f"held: {kind}: {reason}" for kind, reason in (await rig.held()).items() if kind != DOUBTED],
    ]


def misplaced(rig: Rig, script: Script) -> list[str]:
    """Units that are in another billing cycle than the one they were served in."""
    there: Counter[Key] = Counter()
    names = {id_: name for name, id_ in script.ids.items()}
    cycles: dict[str, list[datetime]] = {}
    for subscription in rig.world.site.subscriptions.values():
        cycles[names[str(subscription.given["po_number"])]] = [one.started_at for one in subscription.cycles]
    for usage in rig.world.site.usages.values():
        name = names[str(usage.subscription.given["po_number"])]
        there[name, script.quotas[usage.add_on.add_on.code], f"cycle {usage.cycle}"] += usage.amount

    def cycle(each: Served) -> str:
        return (
            f"cycle {max(bisect_right(cycles[each.name], each.at) - 1, 0)}" if each.name in cycles else "none"
        )

    return _differences(rig, script, there, cycle)


def _differences(rig: Rig, script: Script, there: Counter[Key], part: Callable[[Served], str]) -> list[str]:
    """Where Recurly has less than was settled, or more than has arrived."""
    now = rig.far.now()
    least: Counter[Key] = Counter()
    most: Counter[Key] = Counter()
    for each in script.served:
        key = (each.name, each.quota, part(each))
        window_end = each.at - timedelta(minutes=each.at.minute, seconds=each.at.second) + rig.window
        if each.arrives <= now:
            most[key] += each.units
        if max(each.arrives, window_end + rig.settle) <= now:
            least[key] += each.units
    return [
        f"{' '.join(key)}: {there[key]} unit(s) at Recurly, served {least[key]}"
        + (f" to {most[key]}" if most[key] != least[key] else "")
        for key in sorted(least.keys() | most.keys() | there.keys())
        if not least[key] <= there[key] <= most[key]
    ]


def _far_side(rig: Rig, script: Script) -> list[str]:
    """Every unit once, every tag once, every approved subscription once."""
    faults: list[str] = []
    there: Counter[Key] = Counter()
    tags = Counter(usage.merchant_tag for usage in rig.world.site.usages.values())
    names = {id_: name for name, id_ in script.ids.items()}
    made: Counter[str] = Counter()
    for subscription in rig.world.site.subscriptions.values():
        marker = str(subscription.given.get("po_number"))
        if marker not in names:
            faults.append(f"a subscription {subscription.uuid} marked {marker!r} is nobody's")
            continue
        made[names[marker]] += 1
        over = not subscription.live or subscription.status == "canceled"
        if over != (names[marker] in script.ended):
            faults.append(f"{names[marker]} is {subscription.status} at Recurly")
    for usage in rig.world.site.usages.values():
        name = names[str(usage.subscription.given["po_number"])]
        there[name, script.quotas[usage.add_on.add_on.code], ""] += usage.amount
    faults += [
        f"{made[name]} subscriptions at Recurly of {name}" for name in names.values() if made[name] != 1
    ]
    faults += [f"{count} records under the tag {tag}" for tag, count in tags.items() if count > 1 or not tag]
    faults += _differences(rig, script, there, lambda _: "")
    codes = Counter(plan.code for plan in rig.world.site.plans.values())
    faults += [f"{count} plans with the code {code}" for code, count in codes.items() if count > 1]
    for plan in rig.world.site.plans.values():
        add_ons = {add_on.code for add_on in plan.add_ons.values()}
        if script.removed and plan.deleted_at is None:
            faults.append(f"plan {plan.code} is still there")
        if not script.removed and add_ons != {code for code in script.quotas if code in add_ons}:
            faults.append(f"plan {plan.code} has add-ons of nobody: {add_ons - set(script.quotas)}")
    return faults


async def _ledger(rig: Rig) -> list[str]:
    """Every row of the ledger is at Recurly with its units, and nothing else is."""
    there = Counter((str(one.merchant_tag), one.amount) for one in rig.world.site.usages.values())
    rows = await rig.rows(schema.usage_records)
    ours = Counter((row["merchant_tag"], row["units"]) for row in rows if row["state"] == "reported")
    faults = [f"{row['merchant_tag']} is {row['state']}" for row in rows if row["state"] != "reported"]
    faults += [f"{tag} with {units}: in the ledger only" for tag, units in ours - there]
    return faults + [f"{tag} with {units}: at Recurly only" for tag, units in there - ours]


def _approvals(rig: Rig, script: Script) -> list[str]:
    """Everybody who is billed was approved and labelled, and nobody was told twice."""
    faults: list[str] = []
    for name, id_ in script.ids.items():
        if rig.world.tenant.resources.find("Subscription", name) is None:
            continue
        if (state := rig.approval(name)) != "approved":
            faults.append(f"{name} is {state} at Amplify")
        uuids = [each["uuid"] for each in rig.billed(id_)]
        if [rig.attributes("Subscription", name).get("recurlySubscriptionUuid")] != uuids:
            faults.append(f"{name} is labelled {rig.attributes('Subscription', name)}")
    return faults
