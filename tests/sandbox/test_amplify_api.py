"""The API Server: validation, lists, locks, patches, deletion."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from amplify_side import CATALOG, PLAN_SPEC, QUOTA_SPEC, AmplifySide, amplify_side


@pytest.fixture
async def amplify() -> AsyncIterator[AmplifySide]:
    async with amplify_side() as side:
        yield side


async def test_a_plan_is_made_activated_and_read_back(amplify: AmplifySide) -> None:
    """POST answers 201 with the envelope; the state subresource moves on; the quota lists below its plan."""
    await amplify.json("POST", f"{CATALOG}/products", {"name": "weather", "spec": {}}, status=201)
    plan = await amplify.json(
        "POST",
        f"{CATALOG}/productplans",
        {"name": "metered", "title": "Metered", "spec": PLAN_SPEC},
        status=201,
    )
    assert len(plan["metadata"]["id"]) == 32
    assert plan["metadata"]["selfLink"] == "/catalog/v1/productplans/metered"
    assert plan["metadata"]["audit"]["createTimestamp"] == "2026-01-15T12:00:00.000+0000"
    assert [each["kind"] for each in plan["metadata"]["references"]] == ["Product"]
    assert plan["state"] == "draft"
    path = f"{CATALOG}/productplans/metered"
    await amplify.json("POST", f"{path}/quotas", {"name": "calls", "spec": QUOTA_SPEC}, status=201)
    changed = await amplify.json("PUT", f"{path}/state", {"state": "active"})
    assert changed["state"] == "active"
    (quota,) = await amplify.json("GET", f"{path}/quotas")
    assert quota["metadata"]["scope"]["name"] == "metered"
    assert await amplify.json("GET", f"{CATALOG}/quotas") == [quota]


TIER = {"from": 1, "to": 10, "cost": 1, "flatFee": 0}
REFUSED_QUOTAS: list[tuple[str, dict[str, Any]]] = [
    ("pricing.type", {"pricing": {"type": "perUnit", "cost": 1}}),
    ("pricing.type", {"pricing": {"type": "tiered", "cost": 1}}),
    ("pricing.cost", {"pricing": {"type": "perunit"}}),
    ("pricing.price", {"pricing": {"type": "perunit", "cost": 1, "price": 1}}),
    ("limit.type", {"pricing": {"type": "graduated", "limit": {"type": "strict", "value": 1}}}),
    ("limit.tiers", {"pricing": {"type": "volume", "limit": {"type": "tiered", "tiers": []}}}),
    (
        "tiers[0].flatFee",
        {"pricing": {"type": "volume", "limit": {"type": "tiered", "tiers": [{**TIER, "flatFee": None}]}}},
    ),
    ("pricing.limit", {"pricing": {"type": "fixed", "interval": "monthly"}}),
    ("overages", {"pricing": {"type": "fixed", "interval": "daily", "limit": {"type": "loose", "value": 1}}}),
    ("spec.unit", {"unit": "x-unknown"}),
    ("spec.unit", {"unit": None}),
    ("usage.interval", {"usage": {"limit": 1, "interval": "yearly"}}),
    ("spec.colour", {"colour": "red"}),
]


@pytest.mark.parametrize(("named", "change"), REFUSED_QUOTAS)
async def test_a_faulty_quota_is_refused(amplify: AmplifySide, named: str, change: dict[str, Any]) -> None:
    """Enums, required and unknown properties are checked; the 400 names the field in the errors shape."""
    amplify.plan(active=False)
    body = {"name": "other", "spec": {**QUOTA_SPEC, **change}}
    answer = await amplify.json("POST", f"{CATALOG}/productplans/metered/quotas", body, status=400)
    (error,) = answer["errors"]
    assert named in error["detail"]
    assert error["meta"] == {"tenantId": amplify.tenant.organization_id}


REFUSED_BODIES: list[tuple[int, str, dict[str, Any]]] = [
    (409, "exists", {"name": "metered", "spec": PLAN_SPEC}),
    (400, "name", {"name": "Not_A_Name", "spec": PLAN_SPEC}),
    (400, "there is no Product", {"name": "x", "spec": {**PLAN_SPEC, "product": "nope"}}),
    (400, "spec.billing.currency", {"name": "x", "spec": {**PLAN_SPEC, "billing": {"interval": "monthly"}}}),
    (400, "attributes.a", {"name": "x", "spec": PLAN_SPEC, "attributes": {"a": 1}}),
    (400, "kind", {"name": "x", "kind": "Product", "spec": PLAN_SPEC}),
    (400, "surprise", {"name": "x", "spec": PLAN_SPEC, "surprise": 1}),
    (400, "is required", {"name": "x"}),
]


@pytest.mark.parametrize(("status", "told", "body"), REFUSED_BODIES)
async def test_a_faulty_envelope_is_refused(
    amplify: AmplifySide, status: int, told: str, body: dict[str, Any]
) -> None:
    """Names, references, attributes and unknown properties are checked."""
    amplify.plan()
    answer = await amplify.json("POST", f"{CATALOG}/productplans", body, status=status)
    assert told in answer["errors"][0]["detail"]


async def test_a_stale_version_is_refused(amplify: AmplifySide) -> None:
    """PUT with a stale resourceVersion is 428; the present one counts up; without, last write wins."""
    amplify.plan()
    path = f"{CATALOG}/productplans/metered"
    seen = await amplify.json("GET", path)
    changed = await amplify.json("PUT", path, {**seen, "attributes": {"recurlyPlanCode": "p"}})
    before, after = seen["metadata"]["resourceVersion"], changed["metadata"]["resourceVersion"]
    assert int(after) == int(before) + 1
    assert changed["state"] == "active"
    await amplify.json("PUT", path, seen, status=428)
    del seen["metadata"]
    assert (await amplify.json("PUT", path, seen))["attributes"] == {}


PATCHES: list[tuple[int, list[dict[str, Any]]]] = [
    (
        200,
        [
            {"op": "x-build-object-tree", "path": "/attributes"},
            {"op": "add", "path": "/attributes/a~1b", "value": "1"},
        ],
    ),
    (200, [{"op": "add", "path": "/tags/-", "value": "t"}]),
    (400, [{"op": "replace", "path": "/attributes/missing", "value": "1"}]),
    (400, [{"op": "remove", "path": "/attributes/missing"}]),
    (400, [{"op": "delete", "path": "/attributes/missing"}]),
    (400, [{"op": "add", "path": "/attributes/a", "value": 7}]),
    (400, [{"op": "add", "path": "/state", "value": "archived"}]),
    (400, []),
]


@pytest.mark.parametrize(("status", "operations"), PATCHES)
async def test_a_patch_does_all_or_nothing(
    amplify: AmplifySide, status: int, operations: list[dict[str, Any]]
) -> None:
    """add, replace, remove and x-build-object-tree; what cannot be done is 400."""
    amplify.plan()
    answer = await amplify.call(
        "PATCH",
        f"{CATALOG}/productplans/metered",
        json=operations,
        headers={"Content-Type": "application/json-patch+json"},
    )
    assert answer.status == status, await answer.text()


async def test_patch_wants_its_own_content_type_and_may_be_switched_off(amplify: AmplifySide) -> None:
    """Another content type is 415; with the switch, /attributes cannot be patched."""
    amplify.plan()
    path = f"{CATALOG}/productplans/metered"
    operations = [{"op": "add", "path": "/attributes/a", "value": "1"}]
    await amplify.json("PATCH", path, operations, status=415)
    amplify.tenant.settings.patch_attributes = False
    headers = {"Content-Type": "application/json-patch+json"}
    assert (await amplify.call("PATCH", path, json=operations, headers=headers)).status == 400


async def test_lists_are_paged(amplify: AmplifySide) -> None:
    """20 to a page, at most 100, the total in X-Axway-Total-Count, HEAD without a body."""
    plan = amplify.plan()
    for number in range(25):
        amplify.subscribe(plan, f"s{number:02d}")
    path = f"{CATALOG}/subscriptions"
    first = await amplify.call("GET", path)
    assert (len(await first.json()), first.headers["X-Axway-Total-Count"]) == (20, "25")
    second = await amplify.json("GET", f"{path}?page=2&sort=name,DESC&fields=name")
    assert second == [{"name": f"s{number:02d}"} for number in (4, 3, 2, 1, 0)]
    head = await amplify.call("HEAD", f"{path}?query=name===s01")
    assert head.headers["X-Axway-Total-Count"] == "1"
    for faulty in (
        "pageSize=101",
        "page=0",
        "page=x",
        "sort=spec.plan.name",
        "query=name=~1",
        "query=nope===1",
    ):
        await amplify.json("GET", f"{path}?{faulty}", status=400)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("name==ACME", {"acme"}),
        ("name===ACME", set()),
        ("name==b*", {"bell", "bolt"}),
        ("name==b_ll", {"bell"}),
        ("name!=b*", {"acme"}),
        ("name!==acme", {"bell", "bolt"}),
        ("name=in=(acme,bolt)", {"acme", "bolt"}),
        ("name=out=(acme,bolt)", {"bell"}),
        ("approval.state===approved;(name==a*,name==bo*)", {"acme"}),
        ("approval.state===approved and name==b* or name===bolt", {"bell", "bolt"}),
        ("metadata.references=with='kind===ProductPlan;name===metered'", {"acme", "bell", "bolt"}),
        ("metadata.references=with='kind===ProductPlan;name===weather'", set()),
        (
            "metadata.references.kind===ProductPlan;metadata.references.name===weather",
            {"acme", "bell", "bolt"},
        ),
        ("metadata.audit.modifyTimestamp>=1767225600000", {"acme", "bell", "bolt"}),
        ("metadata.audit.modifyTimestamp<2026-01-15T12:00:00.000+0000", set()),
        ("state.name===active", {"acme", "bell"}),
        ("attributes.recurly===yes", set()),
    ],
)
async def test_queries_select(amplify: AmplifySide, query: str, found: set[str]) -> None:
    """RSQL: wildcards, case, lists, logic, conditions on one element of a list."""
    plan = amplify.plan()
    for name in ("acme", "bell", "bolt"):
        amplify.subscribe(plan, name, approve=name != "bolt")
    answer = await amplify.call("GET", f"{CATALOG}/subscriptions", params={"query": query})
    assert {each["name"] for each in await answer.json()} == found


async def test_deletion_cascades_and_waits_for_finalizers(amplify: AmplifySide) -> None:
    """A plan's deletion takes its subscriptions along; a finalizer on one holds both in DELETING."""
    plan = amplify.plan()
    free, held = amplify.subscribe(plan, "free"), amplify.subscribe(plan, "held")
    path = f"{CATALOG}/subscriptions/held"
    seen = await amplify.json("GET", path)
    await amplify.json("PUT", path, {**seen, "finalizers": [{"name": "billingd"}]})
    await amplify.json("DELETE", f"{CATALOG}/productplans/metered", status=202)
    waiting = await amplify.json("GET", path)
    assert waiting["metadata"]["state"] == "DELETING"
    assert amplify.tenant.resources.get(free.id) is None
    await amplify.json("PUT", path, {**waiting, "finalizers": []})
    for gone in (plan, held):
        assert amplify.tenant.resources.get(gone.id) is None
    await amplify.json("DELETE", f"{CATALOG}/products/weather", status=204)
    await amplify.json("GET", f"{CATALOG}/products/weather", status=404)


async def test_the_lifecycle_is_kept(amplify: AmplifySide) -> None:
    """No editing after the draft, no skipping of stages, none archived while in use; quotas may come."""
    plan = amplify.plan()
    amplify.subscribe(plan)
    path = f"{CATALOG}/productplans/metered"
    seen = await amplify.json("GET", path)
    cheaper = {**seen["spec"], "billing": {**seen["spec"]["billing"], "price": 1}}
    await amplify.json("PUT", path, {**seen, "spec": cheaper}, status=400)
    await amplify.json("POST", f"{path}/quotas", {"name": "later", "spec": QUOTA_SPEC}, status=201)
    await amplify.json("DELETE", f"{CATALOG}/subscriptions/acme", status=400)
    await amplify.json("PUT", f"{path}/state", {"state": "archived"}, status=400)
    await amplify.json("PUT", f"{path}/state", {"state": "deprecated"})
    await amplify.json("POST", f"{path}/quotas", {"name": "too-late", "spec": QUOTA_SPEC}, status=400)
    await amplify.json("PUT", f"{path}/state", {"state": "archived"}, status=400)
    body = {"name": "new", "spec": {"product": "weather", "plan": {"name": "metered"}}}
    await amplify.json("POST", f"{CATALOG}/subscriptions", body, status=400)


async def test_subresources_are_put_one_by_one(amplify: AmplifySide) -> None:
    """approval takes the whole resource, sets previousState; attributes is no subresource; x-… is free."""
    amplify.subscribe(amplify.plan())
    path = f"{CATALOG}/subscriptions/acme"
    seen = await amplify.json("GET", path)
    approved = await amplify.json("PUT", f"{path}/approval", {**seen, "approval": {"state": "approved"}})
    assert approved["approval"] == {"state": "approved", "previousState": "pending"}
    assert approved["state"]["name"] == "active"
    await amplify.json("PUT", f"{path}/approval", {"approval": {"state": "granted"}}, status=400)
    await amplify.json("PUT", f"{path}/approval", {"state": "approved"}, status=400)
    await amplify.json("PUT", f"{path}/attributes", {"attributes": {"a": "b"}}, status=404)
    shown = await amplify.json("PUT", f"{path}/x-billingd", {"x-billingd": {"uuid": "u"}})
    assert shown["x-billingd"] == {"uuid": "u"}
    assert await amplify.json("GET", f"{path}/x-billingd") == {"x-billingd": {"uuid": "u"}}


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ("both", {"v1/products": 200, "v1/subscriptions": 200, "v1alpha1/subscriptions": 200}),
        ("v1alpha1", {"v1/products": 404, "v1/subscriptions": 404, "v1alpha1/products": 200}),
        ("mixed", {"v1/products": 200, "v1/subscriptions": 404, "v1alpha1/subscriptions": 200}),
    ],
)
async def test_versions_can_be_withheld(
    amplify: AmplifySide, versions: str, expected: dict[str, int]
) -> None:
    """A version that is not served is 404; links follow the version asked for."""
    amplify.plan()
    amplify.tenant.settings.versions = versions
    found = {path: (await amplify.call("GET", f"/apis/catalog/{path}")).status for path in expected}
    assert found == expected
    (plan,) = await amplify.json("GET", "/apis/catalog/v1alpha1/productplans")
    assert plan["apiVersion"] == "v1alpha1"
    assert plan["metadata"]["references"][0]["selfLink"] == "/catalog/v1alpha1/products/weather"


async def test_verbs_and_paths_that_do_not_exist(amplify: AmplifySide) -> None:
    """405 for verbs, 404 for paths, in the errors shape."""
    amplify.plan()
    await amplify.json("POST", f"{CATALOG}/quotas", {}, status=405)
    await amplify.json("DELETE", f"{CATALOG}/products", status=405)
    await amplify.json("GET", f"{CATALOG}/quotas/calls", status=404)
    await amplify.json("GET", f"{CATALOG}/gadgets", status=404)
    await amplify.json("GET", f"{CATALOG}/productplans/none/quotas", status=404)


async def test_a_unit_in_use_stays(amplify: AmplifySide) -> None:
    """A unit is deleted when unused only; forced, the quota's unit becomes null."""
    amplify.plan()
    path = f"{CATALOG}/productplanunits/transactions"
    await amplify.json("DELETE", path, status=400)
    await amplify.json("DELETE", f"{path}?forceDelete=true", status=204)
    (quota,) = await amplify.json("GET", f"{CATALOG}/quotas")
    assert quota["spec"]["unit"] is None
    assert quota["metadata"]["deletedReferences"][0]["name"] == "transactions"
    body = {"name": "messages", "spec": {}}
    await amplify.json("POST", f"{CATALOG}/productplanunits", body, status=400)


async def test_secrets_are_not_given_back(amplify: AmplifySide) -> None:
    """A Secret's values are never shown again."""
    base = "/apis/management/v1/integrations"
    await amplify.json("POST", base, {"name": "billingd"}, status=201)
    body = {"name": "s", "spec": {"data": {"key": "Bearer hush"}}}
    made = await amplify.json("POST", f"{base}/billingd/secrets", body, status=201)
    assert made["spec"] == {"data": {"key": "encrypted"}}
