"""Control operations on faults and outages."""

from typing import Final

from billingd.sandbox.amplify.resources import Json
from billingd.sandbox.asked import Asked
from billingd.sandbox.faults import KINDS, SIDES, Rule
from billingd.sandbox.world import World

FIELDS: Final = (
    "side (amplify, recurly), method (*), path (*; * is one segment, ** any), kind, times (1; null: until "
    "cleared), skip (0), args {seconds, status}; kinds: "
    + "; ".join(f"{name}: {KINDS[name]}" for name in KINDS)
)
_ARGS: Final = ("seconds", "status")


async def add_fault(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Makes requests go wrong."""
    side = asked.choice("side", tuple(sorted(SIDES)))
    method, path = asked.text("method", "*"), asked.text("path", "*")
    kind = asked.choice("kind", tuple(KINDS))
    forever = asked.named("times") and not asked.has("times")
    times: int | None = asked.whole("times", 1, least=1)
    args = asked.mapping("args") | {name: asked.raw(name) for name in _ARGS if asked.has(name)}
    rule = Rule(side, method, path, kind, None if forever else times, asked.whole("skip", 0), args)
    asked.done()
    return {"fault": world.faults.add(rule)}


async def list_faults(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Shows the faults in force, how often each kind has struck, and what is late until when."""
    asked.done()
    waiting = sorted(late.at.isoformat() for late in world.faults.late)
    return {"faults": world.faults.describe(), "struck": dict(world.faults.counts), "late": waiting}


async def clear_faults(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Ends all faults and outages."""
    asked.done()
    world.faults.clear()
    return {"faults": []}


async def outage(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Takes a side down, or up again; with a status it answers that instead of resetting connections."""
    side, on = asked.choice("side", ("amplify", "recurly", "both")), asked.flag("on")
    args = {"status": asked.whole("status", least=400)} if asked.has("status") else {}
    asked.done()
    sides = ("amplify", "recurly") if side == "both" else (side,)
    for fault in world.faults.describe():
        if fault["kind"] == "outage" and fault["side"] in sides:
            world.faults.remove(fault["id"])
    if on:
        for each in sides:
            world.faults.add(Rule(each, "*", "*", "outage", None, args=args))
    return {"down": [fault["side"] for fault in world.faults.describe() if fault["kind"] == "outage"]}
