"""The control interface: plays everybody around billingd, under /control, documented by GET /control."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from aiohttp import web

from billingd.sandbox import control_amplify as amplify
from billingd.sandbox import control_both as both
from billingd.sandbox import control_faults as faults
from billingd.sandbox import control_recurly as recurly
from billingd.sandbox import control_traffic as traffic
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.world import World

Handler = Callable[[World, Asked, dict[str, str]], Awaitable[dict[str, Any]]]


class Operation(NamedTuple):
    """One thing the interface does; its help is the handler's docstring."""

    method: str
    path: str
    handler: Handler
    example: dict[str, Any] | None = None
    fields: str = ""
    at: str = ""
    """The path in the example, where `path` has places to fill in."""


_TIERS: Final = [
    {"from": 1, "to": 1000, "cost": 0.1, "flatFee": 0},
    {"from": 1001, "to": 999999999, "cost": 0.05, "flatFee": 0},
]
_PLAN: Final = {
    "name": "weather-metered",
    "product": "weather",
    "billing": {"currency": "USD", "price": 10, "interval": "monthly"},
    "quotas": [
        {
            "name": "calls",
            "title": "Calls",
            "unit": "transactions",
            "pricing": {"type": "graduated", "limit": {"type": "tiered", "tiers": _TIERS}},
        }
    ],
}

OPERATIONS: Final = (
    Operation(
        "POST",
        "/control/products",
        amplify.add_product,
        {"name": "weather", "title": "Weather", "attributes": {"billingSystem": "recurly"}},
    ),
    Operation(
        "POST",
        "/control/products/{name}",
        amplify.mark_product,
        {"attributes": {"billingSystem": "recurly"}},
        at="/control/products/weather",
    ),
    Operation(
        "POST",
        "/control/plans",
        amplify.add_plan,
        _PLAN,
        "name, title, product, type (paid), billing, subscription {interval, renewal, approval, cycles}, "
        "attributes, quotas [{name, title, unit, pricing, usage}], activate (true)",
    ),
    Operation(
        "POST",
        "/control/plans/{name}/quotas",
        amplify.add_quota,
        {"name": "more", "unit": "x-mb"},
        at="/control/plans/weather-metered/quotas",
    ),
    Operation(
        "POST",
        "/control/plans/{name}/{step}",
        amplify.move_plan,
        {},
        "step: activate, deprecate, archive, delete",
        at="/control/plans/weather-metered/activate",
    ),
    Operation(
        "POST",
        "/control/people",
        amplify.add_person,
        {"name": "Ada Example", "email": "ada@example.com"},
        "name, email, guid, organization, team",
    ),
    Operation(
        "POST",
        "/control/subscribe",
        amplify.subscribe,
        {"plan": "weather-metered", "user": "Ada Example", "name": "weather-ada"},
        "plan, user, team, organization, email, name, title",
    ),
    Operation(
        "POST",
        "/control/subscriptions/{name}/{step}",
        amplify.move_subscription,
        {},
        "step: cancel, migrate (to plan), reject, approve, delete; reason, plan",
        at="/control/subscriptions/weather-ada/approve",
    ),
    Operation(
        "POST",
        "/control/traffic",
        traffic.add_traffic,
        {"subscription": "weather-ada", "quota": "calls", "units": 1200},
        "subscription, quota, units, at, arrives (late traffic), status, force; or traffic [those]",
    ),
    Operation(
        "POST",
        "/control/accounts",
        both.add_account,
        {"code": "amplify-user-1"},
        "code (amplify-user-<user guid>, amplify-team-<team guid> or amplify-org-<organization id>), "
        "email, first_name, last_name, company",
    ),
    Operation("POST", "/control/renew", both.renew, {"subscription": "all"}),
    Operation(
        "POST",
        "/control/recurly-plans/{plan}/trial",
        recurly.trial_of_plan,
        {"length": 14},
        "plan: a Recurly code, or an Amplify plan; length, unit (days, months)",
        at="/control/recurly-plans/weather-metered/trial",
    ),
    Operation(
        "POST",
        "/control/recurly-subscriptions/{key}/{step}",
        recurly.move_subscription,
        {"cycles": 2},
        recurly.FIELDS,
        at="/control/recurly-subscriptions/weather-ada/pause",
    ),
    Operation(
        "POST",
        "/control/recurly-hooks",
        recurly.add_hook,
        {"url": "http://127.0.0.1:8080/webhooks/recurly", "secret": "s"},
        "url, secret, old_secret, events (all), drop_every (1: lose all), duplicate",
    ),
    Operation("GET", "/control/recurly-hooks", recurly.list_hooks),
    Operation("POST", "/control/recurly-hooks/settle", recurly.settle_hooks, {}),
    Operation("DELETE", "/control/recurly-hooks", recurly.remove_hooks),
    Operation("GET", "/control/clock", both.read_clock),
    Operation("POST", "/control/clock", both.move_clock, {"advance": "31d"}, "advance or set"),
    Operation(
        "POST",
        "/control/faults",
        faults.add_fault,
        {"side": "recurly", "method": "POST", "path": "/subscriptions", "kind": "lost", "times": 3},
        faults.FIELDS,
    ),
    Operation("GET", "/control/faults", faults.list_faults),
    Operation("DELETE", "/control/faults", faults.clear_faults),
    Operation(
        "POST",
        "/control/outage",
        faults.outage,
        {"side": "recurly", "on": True},
        "side (amplify, recurly, both), on, status",
    ),
    Operation(
        "POST",
        "/control/hooks",
        both.add_hook,
        {"url": "http://127.0.0.1:8080/webhooks/amplify", "headers": {"Authorization": "Bearer s"}},
        "url, headers, kinds, drop_every (1: lose all), duplicate, reorder, delay",
    ),
    Operation("GET", "/control/hooks", both.list_hooks),
    Operation("DELETE", "/control/hooks", both.remove_hooks),
    Operation("POST", "/control/hooks/settle", both.settle_hooks, {}),
    Operation(
        "POST",
        "/control/settings",
        both.change_settings,
        {"amplify": {"sample_percent": 10}},
        "amplify, recurly (list_lag_seconds, bill_run_lag_seconds, …), revoke_tokens; {} shows all",
    ),
    Operation("GET", "/control/ledger", both.read_ledger),
    Operation("GET", "/control/calls", both.read_calls),
    Operation("DELETE", "/control/calls", both.reset_calls),
    Operation(
        "POST",
        "/control/mailbox",
        both.put_letter,
        {"version": "1.0", "title": "Held", "message": "…", "type": "warning"},
    ),
    Operation("GET", "/control/mailbox", both.read_letters),
    Operation("DELETE", "/control/mailbox", both.clear_letters),
    Operation("POST", "/control/shutdown", both.shut_down, {}),
)


def routes(world: World) -> list[web.RouteDef]:
    """All operations and their documentation."""

    async def document(request: web.Request) -> web.Response:
        base = str(request.url.origin())
        return web.json_response({"operations": [_documented(each, base) for each in OPERATIONS]})

    found = [web.route(each.method, each.path, _answering(world, each.handler)) for each in OPERATIONS]
    return [web.get("/control", document), *found]


def _answering(world: World, handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        try:
            asked = Asked(await _body(request))
            return web.json_response(await handler(world, asked, dict(request.match_info)))
        except Wrong as wrong:
            return web.json_response(wrong.body, status=wrong.status)
        except Refused as refused:
            told = Wrong("", refused.detail, "GET /control shows an example of each", status=refused.status)
            return web.json_response(told.body, status=told.status)

    return answer


async def _body(request: web.Request) -> object:
    text = await request.read()
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise Wrong("", f"the body is not JSON: {error}", "GET /control shows an example of each") from error


def _documented(operation: Operation, base: str) -> dict[str, str]:
    curl = f"curl -sS -X {operation.method} {base}{operation.at or operation.path}"
    if operation.example is not None and operation.method == "POST":
        curl += f" -d '{json.dumps(operation.example, ensure_ascii=False)}'"
    does = (operation.handler.__doc__ or "").strip()
    shown = {"operation": f"{operation.method} {operation.path}", "does": does, "example": curl}
    return {**shown, "fields": operation.fields} if operation.fields else shown
