"""Control operations that play the gateways: traffic, on time or late."""

from typing import Any, NamedTuple

from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.times import api_time
from billingd.sandbox.amplify.traffic import STATUSES, Series
from billingd.sandbox.asked import Asked, Wrong
from billingd.sandbox.control_amplify import subscription_of
from billingd.sandbox.world import World


class _Metric(NamedTuple):
    series: Series
    at: Any
    units: int
    arrives: Any


async def add_traffic(world: World, asked: Asked, _: dict[str, str]) -> Json:
    """Counts units for a subscription; all of a bulk or none."""
    bulk = asked.has("traffic")
    entries = [Asked(each) for each in asked.listing("traffic")] if bulk else [asked]
    quotas: dict[str, list[Resource]] = {}
    metrics = [_read(world, entry, quotas) for entry in entries]
    if bulk:
        asked.done()
    percent = world.tenant.settings.sample_percent
    for metric in metrics:
        world.tenant.traffic.count(
            metric.series, metric.at, metric.units, metric.arrives, percent if _sampled(metric) else 0
        )
    answer: Json = {"metrics": len(metrics), "units": sum(metric.units for metric in metrics)}
    if not bulk:
        series, at = metrics[0].series, api_time(metrics[0].at)
        answer |= {"subscription": series.subscription, "quota": series.quota, "unit": series.unit, "at": at}
    return answer


def _read(world: World, asked: Asked, cache: dict[str, list[Resource]]) -> _Metric:
    subscription = subscription_of(world, asked.text("subscription"), "subscription")
    now = world.clock.now()
    at = asked.time("at", now)
    metric = _Metric(
        series=_series(world, subscription, asked, cache),
        at=at,
        units=asked.whole("units", least=1),
        arrives=asked.time("arrives", at),
    )
    force = asked.flag("force", False)
    asked.done()
    state = subscription.body.get("state", {}).get("name")
    approved = subscription.body.get("approval", {}).get("state") == "approved"
    if not force and (not approved or state != "active"):
        stands = state if approved else "not approved"
        told = f"'{subscription.name}' is {stands}: a gateway lets no call through"
        raise Wrong("subscription", told, 'wait for the approval, or add "force": true', status=409)
    if not force and at > now:
        raise Wrong("at", "'at' lies in the future of the sandbox's clock", "POST /control/clock first")
    if metric.arrives < at:
        raise Wrong("arrives", "'arrives' lies before 'at'", "leave it out, or make it later")
    return metric


def _series(world: World, subscription: Resource, asked: Asked, cache: dict[str, list[Resource]]) -> Series:
    references = {each["kind"]: each["id"] for each in subscription.body["metadata"]["references"]}
    plan = references["ProductPlan"]
    if plan not in cache:
        scope = world.tenant.resources.by_id("ProductPlan", plan)
        cache[plan] = [] if scope is None else world.tenant.resources.of_kind("Quota", scope)
    wanted = asked.maybe("quota")
    fitting = [each for each in cache[plan] if wanted in (None, each.name, each.id)]
    if len(fitting) != 1:
        names = ", ".join(each.name for each in cache[plan]) or "none: add one to the plan"
        told = f"the plan has no quota '{wanted}'" if wanted else "the plan has not exactly one quota"
        raise Wrong("quota", told, f'add "quota": one of {names}')
    return Series(
        org=subscription.body["marketplace"]["resource"]["owner"]["organization"]["id"],
        unit=fitting[0].body["spec"]["unit"] or "unknown",
        subscription=subscription.id,
        quota=fitting[0].id,
        plan=plan,
        product=references["Product"],
        application=f"app{subscription.id[3:]}",
        status=asked.choice("status", STATUSES, "Success"),
    )


def _sampled(metric: _Metric) -> bool:
    return metric.series.unit == "transactions"  # the documents are API calls
