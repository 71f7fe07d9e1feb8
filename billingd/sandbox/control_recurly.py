"""Control operations on Recurly's subscriptions, trials and webhooks."""

import dataclasses
from collections.abc import Callable
from typing import Final

from billingd.sandbox.amplify.resources import Json
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.control_amplify import subscription_of
from billingd.sandbox.recurly import billing_views
from billingd.sandbox.recurly.billing import bring_up
from billingd.sandbox.recurly.hooks import Hook
from billingd.sandbox.recurly.model import Subscription
from billingd.sandbox.world import World

STEPS: Final = ("bill_date", "pause", "resume", "expire", "cancel", "trial")
FIELDS: Final = (
    "key: a Recurly uuid, or an Amplify subscription; step: bill_date (at), pause (cycles, 1), resume, "
    "expire (reason, nonpayment), cancel (timeframe: bill_date, term_end), trial (ends_at; in a trial only)"
)
TIMEFRAMES: Final = ("bill_date", "term_end")


async def move_subscription(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Moves the bill date or the trial's end, pauses, resumes, expires or cancels at Recurly, now."""
    if path["step"] not in STEPS:
        told = f"a Recurly subscription cannot '{path['step']}'"
        raise Wrong("step", told, f"use one of {', '.join(STEPS)}", status=404)
    act = _read(world, asked, path["step"])
    asked.done()
    subscription = recurly_subscription_of(world, path["key"], "key")
    _allowed("step", lambda: act(subscription.uuid))
    return billing_views.subscription(subscription)


async def trial_of_plan(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Gives a plan at Recurly a trial for subscriptions to come; length 0 takes it away."""
    length, unit = asked.whole("length"), asked.choice("unit", ("days", "months"), "days")
    asked.done()
    code, plan = path["plan"], world.tenant.resources.either("ProductPlan", path["plan"])
    if code not in world.site.plan_by_code and plan is not None:
        code = f"amplify-plan-{plan.id}"
    if code not in world.site.plan_by_code:
        told = f"Recurly has no plan '{code}'"
        raise Wrong("plan", told, "wait until it is provisioned, or use its code", status=404)
    _allowed("length", lambda: world.site.plan_trial(code, length, unit))
    return {"plan": code, "trial_length": length, "trial_unit": unit}


async def add_hook(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Delivers every event of Recurly's to a URL, signed with a secret."""
    url, secrets = asked.text("url"), [asked.text("secret")]
    if not url.startswith(("http://", "https://")):
        raise Wrong("url", f"'url' must begin with http:// or https://, not {url!r}", "give the full address")
    if asked.has("old_secret"):
        secrets.append(asked.text("old_secret"))
    hook = Hook(
        url,
        tuple(secrets),
        events=frozenset(map(str, asked.listing("events"))),
        drop_every=asked.whole("drop_every", 0),
        duplicate=asked.flag("duplicate", False),
    )
    asked.done()
    return {"hook": world.notifier.add(hook).id}


async def list_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Shows Recurly's hooks without their secrets, what was delivered and how many notices wait."""
    asked.done()
    hooks = [
        {"hook": hook.id, "url": hook.url, "events": sorted(hook.events)}
        | {"drop_every": hook.drop_every, "duplicate": hook.duplicate}
        for hook in world.notifier.hooks.values()
    ]
    deliveries = [dataclasses.asdict(each) for each in world.notifier.deliveries]
    return {"hooks": hooks, "deliveries": deliveries, "waiting": len(world.notifier.waiting)}


async def remove_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Removes all hooks of Recurly's with what waits for them."""
    asked.done()
    return {"removed": world.notifier.clear()}


async def settle_hooks(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Delivers what is due by the sandbox's clock; answers how many were taken in and how many wait."""
    asked.done()
    taken = await world.notifier.run_due()
    return {"delivered": taken, "waiting": len(world.notifier.waiting)}


def recurly_subscription_of(world: World, key: str, field: str) -> Subscription:
    """By Recurly's uuid, or the one with the marker of an Amplify subscription; live before ended."""
    found = world.site.subscription_by_uuid.get(key)
    if found is not None:
        return found
    marker = subscription_of(world, key, field).id
    for each in world.site.subscriptions.values():
        if each.given.get("po_number") == marker:
            found = each if found is None or each.live else found
    if found is None:
        told = f"Recurly holds no subscription with po_number {marker}"
        raise Wrong(field, told, "wait until it is provisioned", status=409)
    return found


def live_subscriptions(world: World) -> list[Subscription]:
    """Those that have not ended, once what is due on them is billed."""
    for each in world.site.subscriptions.values():
        bring_up(world.site, each)
    return [each for each in world.site.subscriptions.values() if each.live]


def _read(world: World, asked: Asked, step: str) -> Callable[[str], None]:
    site = world.site
    match step:
        case "bill_date":
            to = asked.time("at")
            return lambda uuid: site.move_bill_date(uuid, to)
        case "pause":
            cycles = asked.whole("cycles", 1, least=1)
            return lambda uuid: site.pause(uuid, cycles)
        case "expire":
            reason = asked.text("reason", "nonpayment")
            return lambda uuid: site.expire(uuid, reason)
        case "cancel":
            timeframe = asked.choice("timeframe", TIMEFRAMES, "term_end")
            return lambda uuid: site.cancel(uuid, timeframe)
        case "trial":
            ends_at = asked.time("ends_at")
            return lambda uuid: site.move_trial(uuid, ends_at)
        case _:
            return site.resume


def _allowed(field: str, act: Callable[[], None]) -> None:
    try:
        act()
    except ValueError as error:
        fix = "GET /control/ledger shows the subscriptions and their states"
        raise Wrong(field, f"Recurly refuses it: {error}", fix, status=409) from error
