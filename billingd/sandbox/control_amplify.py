"""Control operations that play Amplify's people: providers, consumers, gateways."""

import uuid
from typing import Any, Final

from billingd.sandbox.amplify import consumer
from billingd.sandbox.amplify.people import CONSUMER_ORGANIZATION, Team, User
from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.world import World

_BILLING: Final = {"currency": "USD", "price": 0, "cycle": "recurring", "interval": "monthly"}
_TERMS: Final = {
    "interval": {"type": "months", "length": 1},
    "renewal": "automatic",
    "approval": "manual",
}
_STAGES: Final = {"activate": "active", "deprecate": "deprecated", "archive": "archived"}


async def add_product(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Makes a product and activates it."""
    name = asked.text("name")
    sent = {"name": name, "title": asked.text("title", name), "attributes": asked.texts("attributes")}
    asked.done()
    product = world.tenant.create("Product", {**sent, "spec": {}})
    world.tenant.put_subresource(product, "state", {"state": "active"})
    return product.shown("v1")


async def mark_product(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Changes a product's attributes; null removes one."""
    product = world.tenant.resources.find("Product", path["name"])
    if product is None:
        fix = f'POST /control/products {{"name": "{path["name"]}"}} first'
        raise Wrong("name", f"there is no product '{path['name']}'", fix, status=404)
    attributes = _without_nulls({**product.body["attributes"], **asked.mapping("attributes")})
    asked.done()
    return world.tenant.replace(product, {**product.shown("v1"), "attributes": attributes}).shown("v1")


async def add_plan(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Makes a draft plan with quotas and units, then activates it unless told otherwise."""
    name = asked.text("name")
    title, product, kind = asked.text("title", name), asked.text("product"), asked.text("type", "paid")
    if world.tenant.resources.find("Product", product) is None:
        fix = f'POST /control/products {{"name": "{product}"}} first'
        raise Wrong("product", f"there is no product '{product}'", fix, status=404)
    given = asked.mapping("billing")
    billing = {**_BILLING, **given} if kind == "paid" or given else None
    terms = {**_TERMS, **asked.mapping("subscription")}
    spec: Json = {"product": product, "type": kind, "subscription": _without_nulls(terms)}
    if billing is not None:
        spec["billing"] = _without_nulls(billing)
    quotas, activate = asked.listing("quotas"), asked.flag("activate", True)
    attributes = asked.texts("attributes")
    asked.done()
    read = [_quota(Asked(each)) for each in quotas]
    plan = world.tenant.create(
        "ProductPlan", {"name": name, "title": title, "attributes": attributes, "spec": spec}
    )
    try:
        made = [_make_quota(world, plan, each) for each in read]
    except BaseException:  # and raised again
        world.tenant.delete(plan, force=True)  # half a plan helps nobody
        raise
    if activate:
        world.tenant.put_subresource(plan, "state", {"state": "active"})
    return {**plan.shown("v1"), "quotas": [quota.shown("v1") for quota in made]}


async def add_quota(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Adds a quota to a draft or active plan."""
    plan = _plan(world, path["name"], "name")
    return _make_quota(world, plan, _quota(asked)).shown("v1")


async def move_plan(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Activates, deprecates, archives or deletes a plan."""
    asked.done()
    plan = _plan(world, path["name"], "name")
    if path["step"] == "delete":
        return {"deleted": world.tenant.delete(plan, asked=False), "id": plan.id}
    if path["step"] not in _STAGES:
        fix = f"use one of {', '.join(_STAGES)}, delete"
        raise Wrong("step", f"a plan cannot '{path['step']}'", fix, status=404)
    return world.tenant.put_subresource(plan, "state", {"state": _STAGES[path["step"]]}).shown("v1")


async def add_person(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Makes a user of an organisation, optionally in a team."""
    name, email, team = asked.text("name"), asked.maybe("email"), asked.maybe("team")
    user = User(name, email, asked.text("organization", CONSUMER_ORGANIZATION))
    if asked.has("guid"):
        user.guid = asked.text("guid")
    asked.done()
    world.tenant.people.add_user(user)
    answer = {"name": name, "guid": user.guid, "email": email, "organization": user.organization}
    if team is not None:
        found = world.tenant.people.team(team) or Team(team, user.organization)
        found.users.append(user)
        world.tenant.people.add_team(found)
        answer["team"] = found.guid
    return answer


async def subscribe(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """A consumer subscribes; everybody unknown is made on the way."""
    plan = _plan(world, asked.text("plan"), "plan")
    who, group, email = asked.maybe("user"), asked.maybe("team"), asked.maybe("email")
    organization, name = asked.text("organization", CONSUMER_ORGANIZATION), asked.maybe("name")
    title = asked.maybe("title")
    asked.done()
    people = world.tenant.people
    user = people.user(who) if who else None
    if user is None:
        user = User(who or f"Consumer {uuid.uuid4().hex[:6]}", email, organization)
        if who and _is_guid(who):
            user.guid = who
    team = people.team(group) if group else None
    if team is None:
        team = Team(group or f"team-{uuid.uuid4().hex[:8]}", organization)
        if group and _is_guid(group):
            team.guid = group
    if name is None:
        name = f"{plan.name[:80]}-{uuid.uuid4().hex[:8]}"
    personal = who is not None and group is None
    subscription = consumer.subscribe(world.tenant, plan, name, title or name, user, team, personal=personal)
    people.add_user(user)
    people.add_team(team)
    if user not in team.users:
        team.users.append(user)
    return subscription.shown("v1")


async def move_subscription(world: World, asked: Asked, path: dict[str, str]) -> Json:
    """Cancels (the consumer), migrates, approves, rejects or deletes (the provider) a subscription."""
    reason = asked.text("reason", "by the sandbox's control interface")
    target = _plan(world, asked.text("plan"), "plan") if path["step"] == "migrate" else None
    asked.done()
    subscription = subscription_of(world, path["name"], "name")
    match path["step"]:
        case "cancel":
            consumer.unsubscribe(world.tenant, subscription)
        case "migrate" if target is not None:
            return consumer.migrate(world.tenant, subscription, target).shown("v1")
        case "reject" | "approve":
            state = {"reject": "rejected", "approve": "approved"}[path["step"]]
            sent = {"approval": {"state": state, "reason": reason}}
            world.tenant.put_subresource(subscription, "approval", sent)
        case "delete":
            return {"deleted": world.tenant.delete(subscription, asked=False), "id": subscription.id}
        case step:
            fix = "use one of cancel, migrate, reject, approve, delete"
            raise Wrong("step", f"a subscription cannot '{step}'", fix, status=404)
    return subscription.shown("v1")


def subscription_of(world: World, key: str, field: str) -> Resource:
    """A subscription by name or id."""
    found = world.tenant.resources.either("Subscription", key)
    if found is None:
        fix = "GET /control/ledger lists the subscriptions there are"
        raise Wrong(field, f"there is no subscription '{key}'", fix, status=404)
    return found


def _plan(world: World, key: str, field: str) -> Resource:
    found = world.tenant.resources.either("ProductPlan", key)
    if found is None:
        names = ", ".join(plan.name for plan in world.tenant.resources.of_kind("ProductPlan")[:5])
        fix = f"use one of {names}" if names else "POST /control/plans first"
        raise Wrong(field, f"there is no plan '{key}'", fix, status=404)
    return found


def _quota(asked: Asked) -> Json:
    name = asked.text("name")
    spec: Json = {
        "unit": asked.text("unit", "transactions"),
        "pricing": asked.raw("pricing", {"type": "perunit", "cost": 0.1}),
        "resources": asked.listing("resources"),
    }
    for key in ("description", "usage"):
        if asked.has(key):
            spec[key] = asked.raw(key)
    sent = {"name": name, "title": asked.text("title", name), "spec": spec}
    asked.done()
    return sent


def _make_quota(world: World, plan: Resource, sent: Json) -> Resource:
    unit = sent["spec"]["unit"]
    if world.tenant.resources.find("ProductPlanUnit", unit) is None:
        world.tenant.create("ProductPlanUnit", {"name": unit, "title": unit.removeprefix("x-").capitalize()})
    return world.tenant.create("Quota", sent, scope=plan)


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}


def _is_guid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True
