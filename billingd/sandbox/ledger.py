"""The truth of both sides in one table: served, reported, unbilled, billed, per subscription and quota."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.recurly.model import Subscription, SubscriptionAddOn
from billingd.sandbox.world import World

UNITS = ("served_units", "reported_units", "unbilled_units", "billed_units")


def ledger(world: World) -> Json:
    """Joined by po_number = subscription id and add-on code = amplify-quota-<quota id> (contract.md 5)."""
    world.site.run_due_bills()
    resources = world.tenant.resources
    served: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (subscription, quota), units in world.tenant.traffic.served().items():
        served[subscription][quota] = units
    at_recurly: defaultdict[str, list[Subscription]] = defaultdict(list)
    for each in world.site.subscriptions.values():
        at_recurly[str(each.given.get("po_number") or "")].append(each)
    gone = [each for each in resources.gone.values() if each.kind.name == "Subscription"]
    rows = [
        _row(world, each, served[each.id], at_recurly.pop(each.id, []))
        for each in [*resources.of_kind("Subscription"), *gone]
    ]
    return {
        "agrees": all(row["agrees"] for row in rows) and not at_recurly,
        "totals": {name: sum(row[name] for row in rows) for name in UNITS},
        "not_yet_visible_units": world.tenant.traffic.pending_units(),
        "subscriptions": rows,
        "foreign": [
            {"uuid": each.uuid, "po_number": po_number, "reported_units": _reported(each.all_add_ons)}
            for po_number, several in at_recurly.items()
            for each in several
        ],
    }


def _row(world: World, subscription: Resource, served: dict[str, int], far: list[Subscription]) -> Json:
    body = subscription.body
    add_ons = [attached for each in far for attached in each.all_add_ons if attached.metered]
    codes = dict.fromkeys([f"amplify-quota-{quota}" for quota in served])
    codes |= dict.fromkeys(attached.add_on.code for attached in add_ons)
    quotas = [_quota(world, code, served, far) for code in codes]
    duplicates = sorted(
        str(tag)
        for attached in add_ons
        for tag, times in attached.book.tags.items()
        if times > 1 and tag is not None
    )
    sums = {name: sum(quota[name] for quota in quotas) for name in UNITS}
    gone = subscription.id in world.tenant.resources.gone
    return {
        "id": subscription.id,
        "name": subscription.name,
        "plan": body["spec"]["plan"]["name"],
        "approval": body.get("approval", {}).get("state"),
        "state": "deleted" if gone else body.get("state", {}).get("name"),
        "agrees": not duplicates and all(quota["agrees"] for quota in quotas) and len(far) <= 1,
        **sums,
        "quotas": quotas,
        "duplicate_tags": duplicates,
        "recurly": [{"uuid": each.uuid, "state": each.status, "account": each.account.code} for each in far],
        "invoices": [invoice for each in far for invoice in _invoices(each)],
    }


def _quota(world: World, code: str, served: dict[str, int], far: list[Subscription]) -> Json:
    quota_id = code.removeprefix("amplify-quota-")
    quota = world.tenant.resources.get(quota_id) or world.tenant.resources.gone.get(quota_id)
    attached = [(each, add_on) for each in far for add_on in each.all_add_ons if add_on.add_on.code == code]
    billed = sum(
        line.units
        for each, add_on in attached
        for invoice in each.invoices
        for line in invoice.lines
        if line.add_on is add_on
    )
    unbilled = sum(
        usage.amount
        for _, add_on in attached
        for cycle in add_on.book.open.values()
        for usage in cycle.values()
    )
    units = served.get(quota_id, 0)
    reported = _reported(add_on for _, add_on in attached)
    return {
        "quota": quota_id,
        "name": None if quota is None else quota.name,
        "unit": None if quota is None else quota.body["spec"].get("unit"),
        "add_on": code,
        "served_units": units,
        "reported_units": reported,
        "unbilled_units": unbilled,
        "billed_units": billed,
        "agrees": units == reported == unbilled + billed,
    }


def _reported(add_ons: Iterable[SubscriptionAddOn]) -> int:
    return sum(add_on.book.units for add_on in add_ons)


def _invoices(subscription: Subscription) -> list[dict[str, Any]]:
    return [
        {
            "number": invoice.number,
            "kind": invoice.kind,
            "origin": invoice.origin,
            "state": invoice.status,
            "currency": subscription.currency,
            "total": f"{invoice.total}",
            "lines": [
                {
                    "add_on": line.add_on.add_on.code if line.add_on is not None else None,
                    "units": line.units,
                    "amount": f"{line.amount}",
                    "description": line.description,
                }
                for line in invoice.lines
            ],
        }
        for invoice in subscription.invoices
    ]
