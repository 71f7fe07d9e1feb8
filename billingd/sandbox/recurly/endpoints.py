"""Sites, measured units, plans, add-ons and accounts over HTTP."""

from collections.abc import Callable
from typing import Final

from billingd.sandbox.recurly import accounts, add_ons, measured_units, plans, views
from billingd.sandbox.recurly.errors import missing_feature, not_found
from billingd.sandbox.recurly.listing import choice, listed
from billingd.sandbox.recurly.model import Account, AddOn, MeasuredUnit, Plan, Record
from billingd.sandbox.recurly.wire import Call, Reply, reply

LIVE_STATES: Final = frozenset({"active", "canceled", "future"})


def list_sites(call: Call) -> Reply:
    """The one site; its list is useful as a probe."""
    return listed(call, [call.state.record], lambda _: views.site(call.state), _in_state(call))


def get_site(call: Call) -> Reply:
    """The one site."""
    if call.names["site"] not in (call.state.record.id, "subdomain-sandbox"):
        raise not_found("Site", "id", call.names["site"])
    return reply(200, views.site(call.state))


def list_measured_units(call: Call) -> Reply:
    """All of them."""
    return listed(call, call.state.measured_units.values(), views.measured_unit, _in_state(call))


def create_measured_unit(call: Call) -> Reply:
    """201."""
    return reply(201, views.measured_unit(measured_units.create_measured_unit(call.state, call.body())))


def get_measured_unit(call: Call) -> Reply:
    """By id or `name-…`."""
    return reply(200, views.measured_unit(call.seen(_unit(call))))


def update_measured_unit(call: Call) -> Reply:
    """200."""
    return reply(
        200, views.measured_unit(measured_units.update_measured_unit(call.state, _unit(call), call.body()))
    )


def remove_measured_unit(call: Call) -> Reply:
    """200 with what was removed."""
    return reply(200, views.measured_unit(measured_units.remove_measured_unit(call.state, _unit(call))))


def list_plans(call: Call) -> Reply:
    """All of them, the removed ones as inactive."""
    return listed(call, call.state.plans.values(), views.plan, _in_state(call))


def create_plan(call: Call) -> Reply:
    """201."""
    return reply(201, views.plan(plans.create_plan(call.state, call.body())))


def get_plan(call: Call) -> Reply:
    """By id or `code-…`."""
    return reply(200, views.plan(call.seen(_plan(call))))


def update_plan(call: Call) -> Reply:
    """201, as the reference has it for this PUT (4.3)."""
    return reply(201, views.plan(plans.update_plan(call.state, _plan(call), call.body())))


def remove_plan(call: Call) -> Reply:
    """200 with what was removed."""
    return reply(200, views.plan(plans.remove_plan(call.state, _plan(call))))


def list_plan_add_ons(call: Call) -> Reply:
    """A plan's add-ons."""
    return listed(call, _plan(call).add_ons.values(), views.add_on, _in_state(call))


def create_plan_add_on(call: Call) -> Reply:
    """201."""
    return reply(201, views.add_on(add_ons.create_add_on(call.state, _plan(call), call.body())))


def get_plan_add_on(call: Call) -> Reply:
    """By id or `code-…`."""
    return reply(200, views.add_on(call.seen(_add_on(call))))


def update_plan_add_on(call: Call) -> Reply:
    """201, as the reference has it for this PUT."""
    changed = add_ons.update_add_on(call.state, _plan(call), _add_on(call), call.body())
    return reply(201, views.add_on(changed))


def remove_plan_add_on(call: Call) -> Reply:
    """200 with what was removed."""
    return reply(200, views.add_on(add_ons.remove_add_on(call.state, _add_on(call))))


def list_accounts(call: Call) -> Reply:
    """All of them; `subscriber` looks at active, canceled and future subscriptions."""
    email = call.query.get("email")
    subscriber = choice(call, "subscriber", "true", "false")
    past_due = choice(call, "past_due", "true")

    def keep(account: Account) -> bool:
        subscribes = any(each.status in LIVE_STATES for each in account.subscriptions)
        return (
            (email is None or (account.given.get("email") or "") == email)
            and (subscriber is None or (subscriber == "true") == subscribes)
            and past_due is None
        )

    return listed(call, call.state.accounts.values(), views.account, keep)


def create_account(call: Call) -> Reply:
    """201."""
    return reply(201, views.account(accounts.create_account(call.state, call.body())))


def get_account(call: Call) -> Reply:
    """By id or `code-…`."""
    return reply(200, views.account(call.seen(_account(call))))


def update_account(call: Call) -> Reply:
    """200."""
    return reply(200, views.account(accounts.update_account(call.state, _account(call), call.body())))


def deactivate_account(call: Call) -> Reply:
    """200 with the closed account."""
    if choice(call, "redact", "true", "false") == "true":
        raise missing_feature(["redact"])
    return reply(200, views.account(accounts.deactivate_account(call.state, _account(call))))


def reactivate_account(call: Call) -> Reply:
    """200 with the opened account."""
    return reply(200, views.account(accounts.reactivate_account(call.state, _account(call))))


def unknown_path(call: Call) -> Reply:
    """What the sandbox does not have, in Recurly's words."""
    raise not_found("Page", "path", call.path)


def _in_state(call: Call) -> Callable[[Record], bool]:
    state = choice(call, "state", "active", "inactive")
    return lambda record: state is None or record.state == state


def _unit(call: Call) -> MeasuredUnit:
    return call.state.measured_unit(call.names["unit"])


def _plan(call: Call) -> Plan:
    return call.state.plan(call.names["plan"])


def _add_on(call: Call) -> AddOn:
    return call.state.plan_add_on(_plan(call), call.names["add_on"])


def _account(call: Call) -> Account:
    return call.state.account(call.names["account"])
