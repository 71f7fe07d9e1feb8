"""Plans: what may be created, changed, removed."""

from decimal import Decimal

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.add_ons import keep_add_on, new_add_on
from billingd.sandbox.recurly.checks import (
    TAKEN,
    accounting_code,
    check_active,
    check_currencies,
    check_custom_fields,
    check_minor_unit,
    remove,
)
from billingd.sandbox.recurly.errors import invalid, missing_feature
from billingd.sandbox.recurly.fields import Body, duplicates
from billingd.sandbox.recurly.model import Plan
from billingd.sandbox.recurly.state import State


def create_plan(state: State, body: Body) -> Plan:
    """A plan with its add-ons, all or nothing (4.3; atomicity is inferred)."""
    given = schemas.PLAN_CREATE.read(body)
    if given.get("pricing_model") == "ramp":
        raise missing_feature(["pricing_model"])
    if given["code"] in state.plan_by_code:
        raise invalid(("code", TAKEN))
    prices, setup_fees = _plan_prices(state, given)
    plan = Plan(
        **state.stamps(),
        code=given["code"],
        name=given["name"],
        interval_unit=given.get("interval_unit") or "months",
        interval_length=given.get("interval_length") or 1,
        prices=prices,
        setup_fees=setup_fees,
        total_billing_cycles=given.get("total_billing_cycles"),
        auto_renew=given.get("auto_renew") is not False,
        trial_unit=given.get("trial_unit") or "days",
        trial_length=given.get("trial_length") or 0,
        trial_requires_billing_info=given.get("trial_requires_billing_info") is not False,
        accounting_code=accounting_code(state, given, given["code"]),
        given=given,
    )
    check_custom_fields(state, given)
    add_ons = [new_add_on(state, plan, each) for each in given.get("add_ons") or ()]
    if duplicates([add_on.code for add_on in add_ons]):
        raise invalid(("add_ons.code", TAKEN))
    state.plans[plan.id] = state.plan_by_code[plan.code] = plan
    for add_on in add_ons:
        keep_add_on(state, plan, add_on)
    return plan


def update_plan(state: State, plan: Plan, body: Body) -> Plan:
    """Prices reach new subscriptions only; interval and add-ons cannot be changed here."""
    given = schemas.PLAN_UPDATE.read(body)
    check_active(plan, "plan")
    check_custom_fields(state, given)
    code = given.get("code") or plan.code
    if code != plan.code and code in state.plan_by_code:
        raise invalid(("code", TAKEN))
    if given.get("currencies") or given.get("setup_fees"):
        plan.prices, plan.setup_fees = _plan_prices(state, _merged(plan, given))
    state.plan_by_code[code] = state.plan_by_code.pop(plan.code)
    plan.code, plan.name = code, given.get("name") or plan.name
    for name in (
        "total_billing_cycles",
        "auto_renew",
        "trial_unit",
        "trial_length",
        "trial_requires_billing_info",
    ):
        if given.get(name) is not None or (name == "total_billing_cycles" and name in given):
            setattr(plan, name, given[name])
    plan.accounting_code = given.get("accounting_code") or plan.accounting_code
    plan.given |= given
    state.touch(plan)
    return plan


def remove_plan(state: State, plan: Plan) -> Plan:
    """For good. Subscriptions go on and renew, but can no longer be edited (DOC plans.md)."""
    check_active(plan, "plan")
    remove(state, plan)
    return plan


def _plan_prices(state: State, given: Body) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
    currencies, fees = given["currencies"], given.get("setup_fees") or []
    old_fees = [each for each in currencies if each.get("setup_fee") is not None]
    if fees and old_fees:
        raise invalid(("currencies.setup_fee", "cannot be provided with setup_fees"))
    check_currencies(state, currencies, "currencies")
    check_currencies(state, fees, "setup_fees")
    prices = {each["currency"]: each["unit_amount"] for each in currencies}
    setup = {each["currency"]: each["setup_fee"] for each in old_fees}
    setup |= {each["currency"]: each["unit_amount"] for each in fees}
    if not setup.keys() <= prices.keys():
        raise invalid(("setup_fees.currency", "is not a currency of the plan"))
    for name, amounts in (("currencies.unit_amount", prices), ("setup_fees.unit_amount", setup)):
        for currency, amount in amounts.items():
            check_minor_unit(amount, currency, name)
    return prices, setup


def _merged(plan: Plan, given: Body) -> Body:
    """What an update leaves out stays as it is."""
    prices = [{"currency": currency, "unit_amount": amount} for currency, amount in plan.prices.items()]
    fees = [{"currency": currency, "unit_amount": amount} for currency, amount in plan.setup_fees.items()]
    return {"currencies": given.get("currencies") or prices, "setup_fees": given.get("setup_fees") or fees}
