"""Each remote operation with each thing that can go wrong on the network, once, later, and for a while."""

import copy
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from faster import named_once, quiet, seldom_collected, sqlite_inline, templates_once
from points import quick_store
from rig import HOUR, Rig, a_rig
from scale import FULL, again, only
from scripted import DAILY, MINUTE, Script, live, misplaced, wrong
from wired import Operation, Wire

from billingd.sandbox import control_amplify
from billingd.store import outbox

MANY = 3 if FULL else 1
"""How often each operation is called at least."""

WHEN = ("first", "third", "for a while") if FULL else ("first",)
A_WHILE = 75 * MINUTE
"""Longer than Recurly remembers a key."""
A_DAY = 24
"""How many hours are played on until the third call of an operation comes."""

Record = Callable[[str, object], None]
Play = Callable[[Rig, Script], Awaitable[timedelta]]

TOKEN = Operation("token", "amplify", "POST", "/auth/**")
TRAFFIC = Operation("read traffic", "amplify", "POST", "/api/traceability/**")
FIND_SUBSCRIPTION = Operation("find_subscription", "amplify", "GET", "/apis/**/subscriptions/*")
GET_SUBSCRIPTION = Operation("get_subscription", "recurly", "GET", "/subscriptions/*")
FIND_PLAN = Operation("find_plan", "recurly", "GET", "/plans/*")
USAGE = "/subscriptions/*/add_ons/*/usage"


async def plans(rig: Rig, script: Script) -> timedelta:
    """Product plans, each with a unit of its own."""
    await rig.product()
    for number in range(MANY):
        quotas = [
            {"name": f"calls-{number}", "unit": f"x-u{number}", "pricing": {"type": "perunit", "cost": 0.5}}
        ]
        await script.plan(rig, f"plan-{number}", quotas=quotas, **DAILY)
    return timedelta(0)


async def quotas_(rig: Rig, script: Script) -> timedelta:
    """A quota more in each plan."""
    for number in range(MANY):
        body = {"name": f"more-{number}", "unit": f"x-u{number}", "pricing": {"type": "perunit", "cost": 0.1}}
        made = await rig.play(control_amplify.add_quota, body, name=f"plan-{number}")
        script.quotas[f"amplify-quota-{made['metadata']['id']}"] = f"more-{number}"
    return timedelta(0)


async def subscribers(rig: Rig, script: Script) -> timedelta:
    """Subscribers without an account, which is made for them."""
    for number in range(MANY):
        name = f"sub-{number}"
        script.ids[name] = await rig.subscribe(name, f"plan-{number}", account=False)
    return timedelta(0)


async def serving(rig: Rig, script: Script) -> timedelta:
    """Traffic of everybody."""
    for number in range(MANY):
        await script.serve(rig, f"sub-{number}", f"calls-{number}", 7 + number)
    rig.pass_(111 * MINUTE)
    return 30 * MINUTE


async def retitling(rig: Rig, script: Script) -> timedelta:
    """Plans and quotas get other titles."""
    resources = rig.world.tenant.resources
    for kind in ("ProductPlan", "Quota"):
        for each in list(resources.of_kind(kind)):
            rig.world.tenant.replace(each, {**each.shown("v1"), "title": f"New {each.name}"})
    return timedelta(0)


def renamed(rig: Rig) -> list[str]:
    """Who still has the old name."""
    named = [(plan.code, plan.name) for plan in rig.world.site.plans.values()]
    named += [(one.code, one.name) for plan in rig.world.site.plans.values() for one in plan.add_ons.values()]
    return [f"{code} is still named {name}" for code, name in named if not name.startswith("New ")]


def attached(rig: Rig) -> list[str]:
    """Which subscription does not have every add-on of its plan once, or lost one on the way."""
    return [
        f"{each.uuid} has {[one.add_on.code for one in each.all_add_ons]}"
        for each in rig.world.site.subscriptions.values()
        if sorted(one.add_on.code for one in each.all_add_ons) != sorted(each.plan.add_ons)
    ]


async def cancelling(rig: Rig, script: Script) -> timedelta:
    """Everybody goes."""
    for number in range(MANY):
        await rig.move(f"sub-{number}", "cancel")
        script.ended.add(f"sub-{number}")
    return 2 * HOUR


async def closing(rig: Rig, script: Script) -> timedelta:
    """The plans are given up."""
    for number in range(MANY):
        for step in ("deprecate", "archive"):
            await rig.move_plan(f"plan-{number}", step)
        script.removed.add(f"plan-{number}")
    return timedelta(0)


@dataclass(frozen=True)
class Part:
    """What happens before, what happens, and what is called for it."""

    before: tuple[Play, ...]
    play: Play
    operations: tuple[Operation, ...]
    on_cancel: str = "terminate"
    also: Callable[[Rig], list[str]] = lambda _: []
    """What is amiss in the end besides units."""


PARTS = {
    "plans": Part(
        (),
        plans,
        (
            TOKEN,
            Operation("find_product_plan", "amplify", "GET", "/apis/**/productplans/*"),
            Operation("find_product", "amplify", "GET", "/apis/**/products/*"),
            Operation("list_quotas", "amplify", "GET", "/apis/**/quotas"),
            Operation("set_attributes plan", "amplify", "PATCH", "/apis/**/productplans/*"),
            Operation("find_measured_unit", "recurly", "GET", "/measured_units/*"),
            Operation("create_measured_unit", "recurly", "POST", "/measured_units"),
            FIND_PLAN,
            Operation("create_plan", "recurly", "POST", "/plans"),
            Operation("list_add_ons", "recurly", "GET", "/plans/*/add_ons"),
        ),
    ),
    "quotas": Part((plans,), quotas_, (Operation("create_add_on", "recurly", "POST", "/plans/*/add_ons"),)),
    "retitling": Part(
        (plans,),
        retitling,
        (
            Operation("rename_plan", "recurly", "PUT", "/plans/*"),
            Operation("rename_add_on", "recurly", "PUT", "/plans/*/add_ons/*"),
        ),
        also=renamed,
    ),
    "attaching": Part(
        (plans, subscribers, serving),
        quotas_,
        (GET_SUBSCRIPTION, Operation("add_to_subscription", "recurly", "POST", "/subscriptions/*/change")),
        also=attached,
    ),
    "subscribers": Part(
        (plans,),
        subscribers,
        (
            FIND_SUBSCRIPTION,
            Operation("find_person", "amplify", "GET", "/api/v1/user/*"),
            Operation("set_attributes subscription", "amplify", "PATCH", "/apis/**/subscriptions/*"),
            Operation("decide", "amplify", "PUT", "/apis/**/approval"),
            Operation("find_account", "recurly", "GET", "/accounts/*"),
            Operation("create_account", "recurly", "POST", "/accounts"),
            Operation("list_subscriptions", "recurly", "GET", "/accounts/*/subscriptions"),
            Operation("create_subscription", "recurly", "POST", "/subscriptions"),
            GET_SUBSCRIPTION,
        ),
    ),
    "serving": Part(
        (plans, subscribers),
        serving,
        (
            TOKEN,
            TRAFFIC,
            Operation("live_subscriptions", "recurly", "GET", "/subscriptions"),
            Operation("create_usage", "recurly", "POST", USAGE),
            Operation("list_usage", "recurly", "GET", USAGE, ("lost", "POST", USAGE)),
        ),
    ),
    "terminating": Part(
        (plans, subscribers, serving),
        cancelling,
        (
            FIND_SUBSCRIPTION,
            GET_SUBSCRIPTION,
            TRAFFIC,
            Operation("terminate_subscription", "recurly", "DELETE", "/subscriptions/*"),
        ),
    ),
    "cancelling": Part(
        (plans, subscribers, serving),
        cancelling,
        (Operation("cancel_subscription", "recurly", "PUT", "/subscriptions/*/cancel"),),
        on_cancel="cancel",
    ),
    "closing": Part(
        (plans, subscribers, serving, cancelling),
        closing,
        (FIND_PLAN, Operation("remove_plan", "recurly", "DELETE", "/plans/*")),
    ),
}


@pytest.fixture
def url(sqlite_template: Path) -> Iterator[str]:
    """An empty store, in memory where there is a place for it."""
    with quick_store(sqlite_template) as made:
        yield made


@pytest.mark.parametrize("part", PARTS)
async def test_whatever_goes_wrong_on_the_wire_each_unit_is_billed_once(
    part: str,
    url: str,
    request: pytest.FixtureRequest,
    record_property: Record,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every cell of the matrix: the fault strikes, time goes on until nothing waits, the sums are right.

    `BILLINGD_CHAOS_CELL='create_usage lost first'` plays only that cell of the part.
    """
    playing, wire = PARTS[part], Wire()
    failures: list[str] = []
    cells = struck = spared = units = given_up = 0
    with ExitStack() as stack:
        for each in (quiet(), templates_once(), named_once(), seldom_collected(), wire.refusing()):
            stack.enter_context(each)
        if not FULL:
            stack.enter_context(sqlite_inline())
        async with a_rig(url, threads=True) as rig:
            rig.accounts_missing, rig.on_cancel, rig.look_again = "create", playing.on_cancel, HOUR / 2
            rig.start()
            played = Script()
            for play in playing.before:
                span = await play(rig, played)
                await live(rig, rig.far.now() + span)
            span = await playing.play(rig, played)
            saved, until = await rig.save(), rig.far.now() + span
            for operation in playing.operations:
                for kind in operation.kinds:
                    for when in WHEN:
                        cell = f"{operation.name} {kind} {when}"
                        if only("CELL") not in ("", cell):
                            continue
                        await rig.load(saved)
                        script = copy.deepcopy(played)
                        skip = 2 if when == "third" else 0
                        times = None if when == "for a while" else 1
                        wire.arm(rig, operation, kind, times=times, skip=skip)
                        if times is None:
                            await live(rig, until + A_WHILE, to_the_end=False)
                        else:
                            await live(rig, until)
                            await _until_third(rig, wire, skip)
                        hits = wire.struck(rig)
                        wire.clear(rig)
                        if times is None:
                            given_up += await replayed(rig)
                        longer = rig.far.now() + (2 * HOUR if times is None else timedelta(0))
                        await live(rig, max(until, longer))
                        faults = await wrong(rig, script) + misplaced(rig, script) + playing.also(rig)
                        cells, struck, units = cells + 1, struck + hits, units + script.units
                        spared += not hits
                        if not hits and when != "third":
                            faults.append("it never struck")
                        if faults:
                            command = again(request.node.nodeid, CELL=cell)
                            failures.append("\n  ".join([f"{cell}: {command}", *faults]))
    assert cells, f"there is no cell {only('CELL')} in {part}"
    told = f"\n{part}: {cells} cells, {struck} faults" + (f", {spared} could not strike" if spared else "")
    with capsys.disabled():
        print(told)  # noqa: T201 - which part of the matrix was run
    counts = {"cells": cells, "faults": struck, "units": units, "replayed": given_up, "spared": spared}
    record_property("chaos", counts)
    assert not failures, "\n".join(failures)


async def replayed(rig: Rig) -> int:
    """What an operator does after a long outage: `billingd outbox replay`; how many had been given up."""
    async with rig.store.write() as tx:
        ids = [row["id"] for row in await outbox.select(tx, states=["dead"])]
        await outbox.retry(tx, ids, now=rig.far.now())
    return len(ids)


async def _until_third(rig: Rig, wire: Wire, skip: int) -> None:
    """What is called once an hour, or once a token, is called a third time in the hours to come."""
    for _ in range(A_DAY if skip else 0):
        if wire.struck(rig):
            return
        await live(rig, rig.far.now() + HOUR)
