"""What happens on the Marketplace's side: subscribing and unsubscribing (amplify.md 3.5, 4.2)."""

import uuid
from copy import deepcopy
from typing import Any

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.lifecycle import ended
from billingd.sandbox.amplify.people import Team, User
from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.tenant import MARKETPLACE, SERVICE_ACCOUNT, Tenant
from billingd.sandbox.amplify.times import api_time


def subscribe(
    tenant: Tenant,
    plan: Resource,
    name: str,
    title: str,
    user: User,
    team: Team,
    *,
    personal: bool = False,
) -> Resource:
    """A consumer clicks Subscribe; `personal`: the user owns it, not the team (amplify.md 3.5)."""
    _check_only_one(tenant, plan, team)
    sent = {
        "name": name,
        "title": title,
        "spec": {"product": plan.body["spec"]["product"], "plan": {"name": plan.name}, "data": {}},
    }
    owner: Json = {"type": "team", "id": team.guid, "organization": {"id": team.organization}}
    if personal:
        owner["user"] = {"id": user.guid}
    made = start(tenant, sent, owner, actor=user.guid)
    team.subscriptions.append(made.id)
    return made


def start(
    tenant: Tenant,
    sent: object,
    owner: Json | None,
    *,
    version: str = "v1",
    actor: str = SERVICE_ACCOUNT,
) -> Resource:
    """The five steps of a new subscription, each an event (amplify.md 4.2)."""
    subscription = tenant.create("Subscription", sent, version=version, actor=actor)
    tenant.set_subresource(subscription, "status", {"level": "Pending", "reasons": []})
    if owner is None:  # made by the provider itself
        own = subscription.body.get("owner", {"type": "team", "id": SERVICE_ACCOUNT})
        owner = {**own, "organization": {"id": tenant.organization_id}}
    made: dict[str, Any] = {"createUserId": actor, "modifyUserId": actor}
    resource = {"metadata": made, "owner": owner}
    tenant.set_subresource(subscription, "marketplace", {"name": MARKETPLACE, "resource": resource})
    plan = tenant.resources.find("ProductPlan", subscription.body["spec"]["plan"]["name"])
    terms = plan.body["spec"].get("subscription", {}) if plan is not None else {}
    automatic = terms.get("approval") == "automatic"
    tenant.set_subresource(subscription, "approval", {"state": "approved" if automatic else "pending"})
    if automatic:
        now = {"timestamp": api_time(tenant.clock.now())}
        tenant.set_subresource(subscription, "state", {"name": "active", "when": now})
    tenant.set_subresource(subscription, "status", {"level": "Success", "reasons": []})
    return subscription


def unsubscribe(tenant: Tenant, subscription: Resource) -> None:
    """The consumer's Unsubscribe: archived, not deleted (amplify.md 3.5)."""
    if ended(subscription):
        raise Refused(400, f"Subscription '{subscription.name}' has ended already")
    now = {"timestamp": api_time(tenant.clock.now())}
    tenant.set_subresource(subscription, "state", {"name": "archived", "when": now})


def migrate(tenant: Tenant, old: Resource, plan: Resource) -> Resource:
    """A new subscription on another plan with the old one's approval; the old one ends (amplify.md 3.5)."""
    if ended(old) or old.body["approval"]["state"] != "approved":
        raise Refused(400, f"Only an approved subscription can be migrated, and '{old.name}' is not")
    if plan.body["state"] != "active" or plan.body["spec"]["product"] != old.body["spec"]["product"]:
        raise Refused(400, f"Plan '{plan.name}' is not an active plan of the same product")
    resource = old.body["marketplace"]["resource"]
    spec = {"product": old.body["spec"]["product"], "plan": {"name": plan.name}, "data": {}}
    sent = {"name": f"{old.name[:80]}-{uuid.uuid4().hex[:8]}", "title": old.body["title"], "spec": spec}
    new = tenant.create("Subscription", sent, actor=resource["metadata"]["createUserId"])
    now = {"timestamp": api_time(tenant.clock.now())}
    tenant.set_subresource(new, "references", {"subscription": old.name})
    tenant.set_subresource(new, "marketplace", {"name": MARKETPLACE, "resource": deepcopy(resource)})
    tenant.set_subresource(new, "approval", {"state": "approved"})  # inherited: never seen as pending
    tenant.set_subresource(new, "state", {"name": "active", "when": now})
    tenant.set_subresource(new, "status", {"level": "Success", "reasons": []})
    tenant.set_subresource(old, "state", {"name": "migrated", "when": now})
    return new


def _check_only_one(tenant: Tenant, plan: Resource, team: Team) -> None:
    """One subscription per team, product and plan type (amplify.md 3.5)."""
    for other in filter(None, map(tenant.resources.get, team.subscriptions)):
        theirs = tenant.resources.find("ProductPlan", other.body["spec"]["plan"]["name"])
        if theirs is None or ended(other):
            continue
        if all(theirs.body["spec"][key] == plan.body["spec"][key] for key in ("product", "type")):
            raise Refused(409, f"Team '{team.name}' is subscribed already: {other.name}")
