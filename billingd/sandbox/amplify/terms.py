"""The end that a plan's `cycles` sets to its subscriptions (amplify.md 3.2)."""

import calendar
from datetime import datetime, timedelta

from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.amplify.times import api_time, instant


def end_finished(tenant: Tenant) -> int:
    """Archives what has run its number of terms, counted from the approval; answers how many."""
    now, count = tenant.clock.now(), 0
    for subscription in tenant.resources.of_kind("Subscription"):
        state = subscription.body.get("state", {})
        plan = tenant.resources.find("ProductPlan", subscription.body["spec"]["plan"]["name"])
        terms = plan.body["spec"].get("subscription", {}) if plan is not None else {}
        if state.get("name") != "active" or "cycles" not in terms or "interval" not in terms:
            continue
        if _after(instant(state["when"]["timestamp"]), terms["interval"], terms["cycles"]) <= now:
            ended = {"name": "archived", "when": {"timestamp": api_time(now)}}
            tenant.set_subresource(subscription, "state", ended)
            count += 1
    return count


def _after(start: datetime, interval: dict[str, float | str], times: int) -> datetime:
    """`start` and so many terms; a month's missing day is its last."""
    length = int(interval["length"]) * times
    if interval["type"] == "days":
        return start + timedelta(days=length)
    months = start.month - 1 + length * (12 if interval["type"] == "years" else 1)
    year, month = start.year + months // 12, months % 12 + 1
    return start.replace(year=year, month=month, day=min(start.day, calendar.monthrange(year, month)[1]))
