"""Control operations on Recurly, the clock, faults, hooks and the sandbox itself."""

import dataclasses
from typing import Any, Final

from billingd.sandbox.amplify.hooks import Hook
from billingd.sandbox.amplify.resources import Json
from billingd.sandbox.amplify.terms import end_finished
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.control_amplify import subscription_of
from billingd.sandbox.control_recurly import live_subscriptions
from billingd.sandbox.ledger import ledger
from billingd.sandbox.world import World

SIDES: Final = ("amplify", "recurly", "both")


async def add_account(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Makes an account at Recurly."""
    code = asked.text("code")
    fields = {
        key: asked.raw(key) for key in ("email", "first_name", "last_name", "company") if asked.has(key)
    }
    asked.done()
    try:
        return world.site.create_account(code, **fields)
    except ValueError as error:
        raise Wrong("code", f"Recurly refuses it: {error}", "use another code", status=409) from error


async def renew(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Ends the current billing period now, which bills it."""
    wanted = asked.text("subscription")
    asked.done()
    live = {each.uuid: each.given.get("po_number") for each in live_subscriptions(world)}
    if wanted != "all":
        subscription = subscription_of(world, wanted, "subscription")
        live = {uuid: po_number for uuid, po_number in live.items() if po_number == subscription.id}
        if not live:
            told = f"Recurly holds no live subscription with po_number {subscription.id}"
            raise Wrong("subscription", told, "wait until it is provisioned", status=409)
    for uuid in live:
        world.site.renew(uuid)
    return {"renewed": len(live)}


async def read_clock(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Tells the sandbox's time."""
    asked.done()
    return {"now": world.clock.now().isoformat()}


async def move_clock(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Moves the sandbox's time on; bills what falls due, ends what has run its terms."""
    if asked.has("advance") is asked.has("set"):
        raise Wrong("advance", "say either 'advance' or 'set'", 'send {"advance": "31d"}')
    if asked.has("advance"):
        by = asked.duration("advance")
        asked.done()
        world.clock.advance(by)
    else:
        to = asked.time("set")
        asked.done()
        world.clock.set(to)
    world.site.run_due_bills()
    await world.faults.carry_out_due()
    end_finished(world.tenant)
    return {"now": world.clock.now().isoformat()}


async def add_hook(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Delivers every event to a URL, with losses if wanted."""
    url = asked.text("url")
    if not url.startswith(("http://", "https://")):
        raise Wrong("url", f"'url' must begin with http:// or https://, not {url!r}", "give the full address")
    hook = Hook(
        url,
        headers=asked.texts("headers"),
        kinds=frozenset(map(str, asked.listing("kinds"))),
        drop_every=asked.whole("drop_every", 0),
        duplicate=asked.flag("duplicate", False),
        reorder=asked.flag("reorder", False),
        delay_seconds=asked.duration("delay").total_seconds() if asked.has("delay") else 0,
    )
    asked.done()
    return {"hook": world.webhooks.add(hook).id}


async def list_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Shows the hooks, their headers' names only, and what was delivered."""
    asked.done()
    hooks = [
        {"hook": hook.id, "url": hook.url, "headers": sorted(hook.headers), "kinds": sorted(hook.kinds)}
        | {"drop_every": hook.drop_every, "duplicate": hook.duplicate, "reorder": hook.reorder}
        for hook in world.webhooks.hooks.values()
    ]
    return {"hooks": hooks, "deliveries": [dataclasses.asdict(each) for each in world.webhooks.deliveries]}


async def remove_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Removes all hooks; events are lost from then on."""
    asked.done()
    removed = len(world.webhooks.hooks)
    world.webhooks.hooks.clear()
    return {"removed": removed}


async def settle_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Answers when every event so far has been delivered or lost."""
    asked.done()
    await world.webhooks.idle()
    return {"deliveries": len(world.webhooks.deliveries)}


async def change_settings(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Sets switches of either side; an empty body shows them."""
    amplify, recurly = asked.mapping("amplify"), asked.mapping("recurly")
    revoke = asked.flag("revoke_tokens", False)
    asked.done()
    for side, settings, changes in (
        ("amplify", world.tenant.settings, amplify),
        ("recurly", world.site.settings, recurly),
    ):
        try:
            settings.configure(**changes)
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in dataclasses.fields(settings))
            raise Wrong(side, f"{side}: {error}", f"settings are {names}") from error
    if revoke:
        world.tenant.tokens.revoke()
    return {
        "amplify": _shown(dataclasses.asdict(world.tenant.settings)),
        "recurly": _shown(dataclasses.asdict(world.site.settings)),
    }


async def read_ledger(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Puts served, reported, unbilled and billed units side by side."""
    asked.done()
    return ledger(world)


async def read_calls(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Counts the calls to each endpoint of both sides."""
    asked.done()
    return {"total": sum(world.calls.values()), "calls": dict(sorted(world.calls.items()))}


async def reset_calls(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Counts from zero again."""
    asked.done()
    world.calls.clear()
    return {"total": 0, "calls": {}}


async def put_letter(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Takes a notification in."""
    return {"letters": world.mailbox.put(asked.rest(), world.clock.now())}


async def read_letters(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Lists the notifications."""
    asked.done()
    return {"letters": world.mailbox.letters()}


async def clear_letters(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Empties the mailbox."""
    asked.done()
    world.mailbox.clear()
    return {"letters": []}


async def shut_down(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Ends the sandbox; nothing of it is kept."""
    asked.done()
    world.stop.set()
    return {"stopping": True}


def _shown(settings: dict[str, Any]) -> Json:
    hidden = {name for name in settings if "api_keys" in name}
    return {
        name: sorted(value) if isinstance(value, set | frozenset) else value
        for name, value in settings.items()
        if name not in hidden
    }
