"""What the catalog allows when: plan stages, quotas of active plans, approvals (amplify.md 3, 5)."""

from typing import Any, Final

from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.resources import Json, Resource, Resources

NEXT_STAGE: Final = {
    "draft": frozenset({"active"}),
    "active": frozenset({"deprecated"}),
    "deprecated": frozenset({"archived"}),
    "archived": frozenset[str](),
}
"""Stages of products and plans; repeating the present one is harmless (amplify.md 3.2)."""
ENDED: Final = frozenset({"archived", "migrated"})
_PLAN_FREE_FIELDS: Final = frozenset({"description", "features"})


def ended(subscription: Resource) -> bool:
    """Cancelled, migrated or rejected: no claim on its plan any more."""
    state = subscription.body.get("state", {}).get("name")
    return state in ENDED or subscription.body.get("approval", {}).get("state") == "rejected"


def check_new(resources: Resources, kind: str, scope: Resource | None, body: Json) -> None:
    """Refused(400) where a resource may not come into being as things stand."""
    if scope is not None and scope.deleting:
        raise Refused(400, f"{scope.kind.name} '{scope.name}' is being deleted")
    if kind == "ProductPlanUnit" and body["name"] != "transactions" and not body["name"].startswith("x-"):
        raise Refused(400, f"name: the name of a custom unit starts with 'x-'; got '{body['name']}'")
    if kind == "Quota" and scope is not None and scope.body["state"] not in ("draft", "active"):
        raise Refused(400, f"A {scope.body['state']} plan takes no further quota")
    if kind == "Subscription":
        plan = resources.find("ProductPlan", body["spec"]["plan"]["name"])
        if plan is not None and plan.body["state"] != "active":
            raise Refused(
                400, f"Plan '{plan.name}' is {plan.body['state']}; only active plans can be subscribed"
            )
        if plan is not None and plan.body["spec"]["product"] != body["spec"]["product"]:
            raise Refused(400, f"spec.product: plan '{plan.name}' is not a plan of this product")


def check_change(old: Resource, body: Json) -> None:
    """Refused(400) where the present stage forbids a change of spec."""
    before, after = old.body.get("spec", {}), body.get("spec", {})
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    if old.kind.name == "ProductPlan" and old.body["state"] != "draft" and changed - _PLAN_FREE_FIELDS:
        fields = ", ".join(sorted(changed - _PLAN_FREE_FIELDS))
        raise Refused(400, f"Only a draft plan can be edited; it is {old.body['state']} (spec: {fields})")
    if old.kind.name == "Subscription" and changed - {"data", "schema"}:
        raise Refused(400, "A subscription's product and plan cannot be changed")
    if old.kind.name == "Quota" and old.scope is not None and old.scope.body["state"] != "draft" and changed:
        kept = all(each in after.get("resources", ()) for each in before.get("resources", ()))
        if old.scope.body["state"] != "active" or changed - {"resources", "description"} or not kept:
            raise Refused(400, "A quota of an active plan may only gain resources")
    if old.deleting:
        names = {each["name"] for each in old.body.get("finalizers", ())}
        if {each["name"] for each in body.get("finalizers", ())} - names:
            raise Refused(400, "finalizers: none can be added while the resource is being deleted")


def check_removal(resources: Resources, resource: Resource) -> None:
    """Refused(400) where a client may not delete it; a cascade from above asks nobody."""
    if resource.kind.name == "Subscription" and not ended(resource):
        raise Refused(400, "Only a cancelled or rejected subscription can be deleted")
    if resource.kind.name == "ProductPlanUnit" and resources.dependants(resource, "soft"):
        raise Refused(400, f"Unit '{resource.name}' is in use")
    if (
        resource.kind.name == "Quota"
        and resource.scope is not None
        and resource.scope.body["state"] != "draft"
    ):
        raise Refused(400, "A quota can only be deleted while its plan is a draft")


def settled(resources: Resources, resource: Resource, name: str, value: Any) -> Any:
    """The value a subresource gets when a client asks for `value`; Refused(400) where it may not."""
    if name == "state" and resource.kind.name in ("Product", "ProductPlan"):
        return _stage(resources, resource, value)
    if resource.kind.name == "Subscription" and name == "approval":
        before = resource.body.get("approval", {}).get("state")
        kept = {key: value[key] for key in ("state", "reason", "userId") if key in value}
        return {**kept, "previousState": before} if before else kept
    if resource.kind.name == "Subscription" and name == "state":
        before = resource.body.get("state", {}).get("name")
        if before is None and resource.body.get("approval", {}).get("state") != "approved":
            raise Refused(400, "state: is not set before the subscription is approved")
        if before in ENDED and value["name"] != before:
            raise Refused(400, f"state.name: a subscription that is {before} cannot become {value['name']}")
    return value


def _stage(resources: Resources, resource: Resource, stage: str) -> str:
    before = resource.body["state"]
    if stage != before and stage not in NEXT_STAGE[before]:
        allowed = ", ".join(sorted(NEXT_STAGE[before])) or "nothing"
        raise Refused(400, f"state: {resource.kind.name} is {before} and can become {allowed}, not {stage}")
    if stage == "archived" and resource.kind.name == "ProductPlan":
        users = [each for each in resources.dependants(resource, "hard") if each.kind.name == "Subscription"]
        alive = [each.name for each in users if not ended(each)]
        if alive:
            raise Refused(400, f"state: {len(alive)} subscription(s) still use the plan, e.g. {alive[0]}")
    return stage
