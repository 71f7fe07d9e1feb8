"""Requests and answers of a whole life against Recurly's own OpenAPI document, where it is at hand."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from openapi_core import Config, OpenAPI
from openapi_core.testing import MockRequest, MockResponse
from recurly_side import START, Exchange, RecurlySide, add_on, plan, recurly_side, stamp, usage_path

DOCUMENT = Path(
    os.environ.get("BILLINGD_RECURLY_OPENAPI")
    or Path(__file__).parents[3] / "shared/reference/recurly-openapi.yaml"
)
HOST = "https://v3.recurly.com"
PATHS = (
    "/sites",
    "/measured_units",
    "/measured_units/{measured_unit_id}",
    "/plans",
    "/plans/{plan_id}",
    "/plans/{plan_id}/add_ons",
    "/plans/{plan_id}/add_ons/{add_on_id}",
    "/accounts",
    "/accounts/{account_id}",
    "/accounts/{account_id}/subscriptions",
    "/subscriptions",
    "/subscriptions/{subscription_id}",
    "/subscriptions/{subscription_id}/cancel",
    "/subscriptions/{subscription_id}/change",
    "/subscriptions/{subscription_id}/pause",
    "/subscriptions/{subscription_id}/invoices",
    "/subscriptions/{subscription_id}/line_items",
    "/subscriptions/{subscription_id}/add_ons/{add_on_id}/usage",
    "/usage/{usage_id}",
    "/invoices/{invoice_id}",
)


def mended(node: Any) -> Any:
    """JavaScript's `/…/i` as a plain pattern; no numeric minimum on strings, no default outside its enum."""
    if isinstance(node, list):
        return [mended(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: mended(value) for key, value in node.items() if key != "x-code-samples"}
    pattern = made.get("pattern")
    if isinstance(pattern, str) and (literal := re.fullmatch(r"/(.*)/(i?)", pattern)):
        made["pattern"] = ("(?i)" if literal[2] else "") + literal[1]
    if made.get("type") == "string":
        made.pop("minimum", None)
        made.pop("maximum", None)
    if "enum" in made and made.get("default") not in made["enum"]:
        made.pop("default", None)
    return made


def references(node: Any) -> Iterator[str]:
    """The `#/components/…` a node points to."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from references(each)


def pruned(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the paths under test only, and what they reach."""
    paths = {path: document["paths"][path] for path in PATHS}
    components: dict[str, dict[str, Any]] = {"securitySchemes": document["components"]["securitySchemes"]}
    waiting = list(references(paths))
    while waiting:
        _, _, section, name = waiting.pop().split("/")
        if name not in components.setdefault(section, {}):
            components[section][name] = document["components"][section][name]
            waiting += references(components[section][name])
    head = {key: document[key] for key in ("openapi", "security", "servers")}
    info = {"title": "Recurly", "version": "v2021-02-25"}
    made: dict[str, Any] = mended({**head, "info": info, "paths": paths, "components": components})
    return made


@pytest.fixture(scope="session")
def openapi() -> OpenAPI:
    if not DOCUMENT.is_file():
        pytest.skip(f"no OpenAPI document of Recurly's at {DOCUMENT}; BILLINGD_RECURLY_OPENAPI can name one")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with DOCUMENT.open(encoding="utf-8") as file:
        document = pruned(yaml.load(file, Loader=loader))
    # The document does not keep to OpenAPI's own rules everywhere, so it is not validated itself.
    return OpenAPI.from_dict(document, config=Config(spec_validator_cls=None))


def without_nulls(node: Any) -> Any:
    """The document declares nothing nullable, while Recurly spells nulls out (and the SDK reads them)."""
    if isinstance(node, dict):
        return {key: without_nulls(value) for key, value in node.items() if value is not None}
    return [without_nulls(each) for each in node] if isinstance(node, list) else node


def template(path: str) -> str:
    """The path of the document a real one is of."""
    for known in PATHS:
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", known), path):
            return known
    raise AssertionError(f"{path} is not under test")


def as_request(exchange: Exchange) -> MockRequest:
    url = urlsplit(exchange.path)
    pattern = template(url.path)
    names = re.findall(r"\{([^}]*)\}", pattern)
    match = re.fullmatch(re.sub(r"\{[^}]*\}", "([^/]+)", pattern), url.path)
    assert match is not None
    return MockRequest(
        HOST,
        exchange.method.lower(),
        url.path,
        path_pattern=pattern,
        args=dict(parse_qsl(url.query)),
        view_args=dict(zip(names, match.groups(), strict=True)),
        headers={"Authorization": "Basic c2FuZGJveDo="},
        data=json.dumps(exchange.body).encode() if exchange.body is not None else b"",
        content_type="application/json",
    )


def as_response(exchange: Exchange) -> MockResponse:
    """Errors without their envelope: the document describes the inner object only."""
    body = without_nulls(json.loads(exchange.text)) if exchange.text else {}
    told = body["error"] if exchange.status >= 400 else body
    data = json.dumps(told).encode() if exchange.text else b""
    return MockResponse(data, status_code=exchange.status, content_type="application/json")


async def lived(far: RecurlySide) -> None:
    """Every operation billingd needs, the refused ones too, on every tier type."""
    kinds = ("flat", "tiered", "volume", "stairstep")
    add_ons = [add_on(kind, tier_type=kind, accounting_code=kind) for kind in kinds]
    setup_fees = [{"currency": "USD", "unit_amount": 5}]
    made_plan = await far.make_plan(add_ons=add_ons, setup_fees=setup_fees, interval_unit="months")
    await far.call("GET", "/sites")
    await far.call("GET", "/measured_units/name-call")
    await far.call("GET", "/measured_units?state=active")
    await far.refused("POST", "/plans", plan())
    await far.refused("GET", "/plans/code-unknown", status=404, type_="not_found")
    await far.call("PUT", f"/plans/{made_plan['id']}", {"name": "Renamed"}, status=201)
    await far.call("GET", "/plans?limit=1")
    await far.call("GET", "/plans/code-basic/add_ons?order=asc")
    await far.call("GET", "/plans/code-basic/add_ons/code-tiered")
    await far.call("PUT", "/plans/code-basic/add_ons/code-flat", {"name": "Flat"}, status=201)
    await far.call("POST", "/plans/code-basic/add_ons", add_on("more"), status=201)
    await far.call("POST", "/accounts", {"code": "ann", "email": "ann@example.com"}, status=201)
    await far.call("GET", "/accounts/code-ann")
    await far.call("GET", "/accounts")
    made = await far.subscribe(add_ons=[{"code": kind} for kind in kinds])
    await far.refused("POST", "/subscriptions", {"plan_code": "basic"})
    path = f"/subscriptions/uuid-{made['uuid']}"
    await far.call("GET", path)
    await far.call("PUT", path, {"po_number": "m2", "auto_renew": True})
    for kind in kinds:
        body = {"amount": 150, "merchant_tag": "t", "usage_timestamp": stamp(START)}
        record = await far.call("POST", usage_path(made, kind), body, status=201)
        await far.call("GET", f"{usage_path(made, kind)}?billing_status=all&sort=usage_timestamp&limit=200")
        await far.call("GET", f"/usage/{record['id']}")
    await far.call("PUT", f"/usage/{record['id']}", {"merchant_tag": "t2"})
    await far.refused("POST", usage_path(made, "flat"), {"amount": 1_000_000_000})
    await far.refused("GET", f"{usage_path(made, 'flat')}?limit=999", status=400)
    await far.call("DELETE", f"/usage/{record['id']}", status=204)
    kept = [{"id": each["id"]} for each in made["add_ons"]]
    dearer = [{**kept[0], "unit_amount_decimal": "0.25"}, *kept[1:3], {"code": "more"}]
    await far.call("POST", f"{path}/change", {"timeframe": "now", "add_ons": dearer}, status=201)
    await far.call("POST", f"{path}/change", {"unit_amount": 25.5}, status=201)
    await far.refused("POST", f"{path}/change", {"unit_amount": 25.5})
    far.pass_(days=40)
    await far.call("GET", f"{usage_path(made, 'flat')}?billing_status=billed")
    invoice = (await far.call("GET", f"{path}/invoices"))["data"][0]
    await far.call("GET", f"/invoices/{invoice['id']}")
    await far.call("GET", f"{path}/line_items?limit=50")
    await far.call("PUT", f"{path}/pause", {"remaining_pause_cycles": 1})
    await far.call("PUT", f"{path}/cancel", {"timeframe": "bill_date"})
    await far.call("GET", "/accounts/code-ann/subscriptions?state=live")
    await far.call("GET", "/subscriptions?state=canceled&limit=200")
    await far.call("DELETE", f"{path}?refund=none&charge=true")
    await far.refused("DELETE", path)
    await far.call("DELETE", "/plans/code-basic/add_ons/code-more")
    await far.call("DELETE", "/plans/code-basic")


async def test_a_whole_life_keeps_to_recurlys_own_document(openapi: OpenAPI) -> None:
    """Every request that was taken and every answer, the errors too, has the shape the document gives it."""
    async with recurly_side() as far:
        await lived(far)
    assert len(far.exchanges) > 45
    for exchange in far.exchanges:
        request = as_request(exchange)
        if exchange.status < 400:
            openapi.validate_request(request)
        openapi.validate_response(request, as_response(exchange))


async def test_the_check_itself_can_fail(openapi: OpenAPI) -> None:
    """A wrong type in an answer and an unknown enum value in a request are found."""
    wrong = Exchange("GET", "/usage/x", None, 200, '{"amount": "many"}')
    with pytest.raises(Exception, match=r"[Ii]nvalid|[Vv]alidation"):
        openapi.validate_response(as_request(wrong), as_response(wrong))
    asked = Exchange("POST", "/plans", plan(interval_unit="weeks"), 201, "")
    with pytest.raises(Exception, match=r"[Rr]equest body|[Vv]alidation"):
        openapi.validate_request(as_request(asked))
