"""Recurly's paths at the root of a server (OAS: paths; no `/sites/{id}` prefix)."""

from typing import Final

from aiohttp import web

from billingd.sandbox.recurly import billing_endpoints as billing
from billingd.sandbox.recurly import endpoints as catalog
from billingd.sandbox.recurly.paging import PAGING
from billingd.sandbox.recurly.site import Site
from billingd.sandbox.recurly.wire import Endpoint, Wire

NONE: Final = frozenset[str]()
STATE: Final = PAGING | {"state"}
INVOICES: Final = PAGING | {"state", "type"}
LINES: Final = INVOICES | {"original"}
USAGE: Final = PAGING | {"billing_status"}

SUBSCRIPTION: Final = "/subscriptions/{subscription}"
PLAN: Final = "/plans/{plan}"
ADD_ON: Final = "/plans/{plan}/add_ons/{add_on}"
ACCOUNT: Final = "/accounts/{account}"
UNIT: Final = "/measured_units/{unit}"
METER: Final = "/subscriptions/{subscription}/add_ons/{add_on}/usage"
RECORD: Final = "/usage/{usage}"

TABLE: Final[tuple[tuple[str, str, Endpoint, frozenset[str]], ...]] = (
    ("GET", "/sites", catalog.list_sites, STATE),
    ("GET", "/sites/{site}", catalog.get_site, NONE),
    ("GET", "/measured_units", catalog.list_measured_units, STATE),
    ("POST", "/measured_units", catalog.create_measured_unit, NONE),
    ("GET", UNIT, catalog.get_measured_unit, NONE),
    ("PUT", UNIT, catalog.update_measured_unit, NONE),
    ("DELETE", UNIT, catalog.remove_measured_unit, NONE),
    ("GET", "/plans", catalog.list_plans, STATE),
    ("POST", "/plans", catalog.create_plan, NONE),
    ("GET", PLAN, catalog.get_plan, NONE),
    ("PUT", PLAN, catalog.update_plan, NONE),
    ("DELETE", PLAN, catalog.remove_plan, NONE),
    ("GET", "/plans/{plan}/add_ons", catalog.list_plan_add_ons, STATE),
    ("POST", "/plans/{plan}/add_ons", catalog.create_plan_add_on, NONE),
    ("GET", ADD_ON, catalog.get_plan_add_on, NONE),
    ("PUT", ADD_ON, catalog.update_plan_add_on, NONE),
    ("DELETE", ADD_ON, catalog.remove_plan_add_on, NONE),
    ("GET", "/accounts", catalog.list_accounts, PAGING | {"email", "subscriber", "past_due"}),
    ("POST", "/accounts", catalog.create_account, NONE),
    ("GET", ACCOUNT, catalog.get_account, NONE),
    ("PUT", ACCOUNT, catalog.update_account, NONE),
    ("DELETE", ACCOUNT, catalog.deactivate_account, frozenset({"redact"})),
    ("PUT", f"{ACCOUNT}/reactivate", catalog.reactivate_account, NONE),
    ("GET", f"{ACCOUNT}/subscriptions", billing.list_account_subscriptions, STATE),
    ("GET", f"{ACCOUNT}/invoices", billing.list_account_invoices, INVOICES),
    ("GET", "/subscriptions", billing.list_subscriptions, STATE),
    ("POST", "/subscriptions", billing.create_subscription, NONE),
    ("GET", SUBSCRIPTION, billing.get_subscription, NONE),
    ("PUT", SUBSCRIPTION, billing.update_subscription, NONE),
    ("DELETE", SUBSCRIPTION, billing.terminate_subscription, frozenset({"refund", "charge"})),
    ("POST", f"{SUBSCRIPTION}/change", billing.change_subscription, NONE),
    ("PUT", f"{SUBSCRIPTION}/cancel", billing.cancel_subscription, NONE),
    ("PUT", f"{SUBSCRIPTION}/reactivate", billing.reactivate_subscription, NONE),
    ("PUT", f"{SUBSCRIPTION}/pause", billing.pause_subscription, NONE),
    ("PUT", f"{SUBSCRIPTION}/resume", billing.resume_subscription, NONE),
    ("GET", f"{SUBSCRIPTION}/invoices", billing.list_subscription_invoices, INVOICES),
    ("GET", f"{SUBSCRIPTION}/line_items", billing.list_subscription_line_items, LINES),
    ("GET", METER, billing.list_usage, USAGE),
    ("POST", METER, billing.create_usage, NONE),
    ("GET", RECORD, billing.get_usage, NONE),
    ("PUT", RECORD, billing.update_usage, NONE),
    ("DELETE", RECORD, billing.remove_usage, NONE),
    ("GET", "/invoices", billing.list_invoices, INVOICES),
    ("GET", "/invoices/{invoice}", billing.get_invoice, NONE),
    ("GET", "/invoices/{invoice}/line_items", billing.list_invoice_line_items, LINES),
    ("GET", "/line_items", billing.list_line_items, LINES),
    ("GET", "/line_items/{line}", billing.get_line_item, NONE),
)


def routes(site: Site, *, others: bool = True) -> list[web.RouteDef]:
    """Every route, GET with HEAD; `others`: all other paths too answer as Recurly does, with a typed 404."""
    wire = Wire(site)
    defined = [
        web.get(path, wire.serve(endpoint, query, lags=query >= PAGING or path == RECORD))
        if method == "GET"
        else web.route(method, path, wire.serve(endpoint, query))
        for method, path, endpoint, query in TABLE
    ]
    return [*defined, web.route("*", "/{path:.*}", wire.serve(catalog.unknown_path))] if others else defined
