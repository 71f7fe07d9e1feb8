"""Add-ons of plans: what may be created, changed, removed."""

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.charges import TierType
from billingd.sandbox.recurly.checks import (
    TAKEN,
    accounting_code,
    check_active,
    check_currencies,
    check_tiers,
    price_of,
    remove,
)
from billingd.sandbox.recurly.errors import RefusalError, invalid, missing_feature
from billingd.sandbox.recurly.fields import Body
from billingd.sandbox.recurly.model import AddOn, MeasuredUnit, Plan, PlanTier, Price
from billingd.sandbox.recurly.state import State


def create_add_on(state: State, plan: Plan, body: Body) -> AddOn:
    """An add-on of a plan; subscriptions that exist do not get it."""
    given = schemas.ADD_ON_CREATE.read(body)
    check_active(plan, "plan")
    if given["code"] in plan.add_ons:
        raise invalid(("code", TAKEN))
    add_on = new_add_on(state, plan, given)
    keep_add_on(state, plan, add_on)
    return add_on


def update_add_on(state: State, plan: Plan, add_on: AddOn, body: Body) -> AddOn:
    """Prices and calculation type reach new subscriptions only; the kind of pricing stays."""
    given = schemas.ADD_ON_UPDATE.read(body)
    check_active(plan, "plan")
    check_active(add_on, "add_on")
    code = given.get("code") or add_on.code
    if code != add_on.code and code in plan.add_ons:
        raise invalid(("code", TAKEN))
    if "currencies" in given or "tiers" in given:
        add_on.prices, add_on.tiers = _add_on_prices(state, plan, add_on.tier_type, given)
    if given.get("measured_unit_id") or given.get("measured_unit_name"):
        add_on.measured_unit = _measured_unit(state, given)
    if given.get("usage_calculation_type") and add_on.add_on_type == "usage":
        add_on.usage_calculation_type = given["usage_calculation_type"]
    plan.add_ons[code] = plan.add_ons.pop(add_on.code)
    add_on.code, add_on.name = code, given.get("name") or add_on.name
    add_on.accounting_code = given.get("accounting_code") or add_on.accounting_code
    add_on.given |= given
    state.touch(add_on)
    return add_on


def remove_add_on(state: State, add_on: AddOn) -> AddOn:
    """For new subscriptions only; its code stays taken."""
    check_active(add_on, "add_on")
    remove(state, add_on)
    return add_on


def new_add_on(state: State, plan: Plan, given: Body) -> AddOn:
    """An add-on as its checked body says, not yet kept."""
    usage = given.get("add_on_type") == "usage"
    _check_kind(given, usage)
    tier_type: TierType = given.get("tier_type") or "flat"
    prices, tiers = _add_on_prices(state, plan, tier_type, given)
    return AddOn(
        **state.stamps(),
        plan_id=plan.id,
        code=given["code"],
        name=given["name"],
        add_on_type=given.get("add_on_type") or "fixed",
        usage_type=given.get("usage_type"),
        usage_calculation_type=(given.get("usage_calculation_type") or "cumulative") if usage else None,
        usage_timeframe=(given.get("usage_timeframe") or "billing_period") if usage else None,
        tier_type=tier_type,
        measured_unit=_measured_unit(state, given) if usage else None,
        accounting_code=accounting_code(state, given, given["code"]),
        prices=prices,
        tiers=tiers,
        given=given,
    )


def keep_add_on(state: State, plan: Plan, add_on: AddOn) -> None:
    """Takes it into the plan."""
    state.add_ons[add_on.id] = plan.add_ons[add_on.code] = add_on


def _check_kind(given: Body, usage: bool) -> None:
    of_usage = (
        "usage_type",
        "usage_calculation_type",
        "usage_timeframe",
        "measured_unit_id",
        "measured_unit_name",
    )
    wrong = [name for name in of_usage if given.get(name) is not None]
    if not usage and wrong:
        raise invalid(*((name, "must be blank unless the add-on type is usage") for name in wrong))
    if usage and given.get("usage_type") is None:
        raise invalid(("usage_type", "can't be blank"))
    if given.get("usage_type") == "percentage":
        raise missing_feature(["usage_type"])
    if given.get("usage_timeframe") == "subscription_term" and given.get("tier_type") != "tiered":
        # "Allows for `tiered` add-ons to accumulate" (OAS:38493): of the others nothing is said.
        raise invalid(("usage_timeframe", "is not available for this tier type"))


def _measured_unit(state: State, given: Body) -> MeasuredUnit:
    key, name = given.get("measured_unit_id"), given.get("measured_unit_name")
    field = "measured_unit_id" if key else "measured_unit_name"
    if not key and not name:
        raise invalid(("measured_unit_id", "can't be blank"))
    try:
        unit = state.measured_unit(key or f"name-{name}")
    except RefusalError:
        raise invalid((field, "is invalid")) from None
    if unit.deleted_at:
        raise invalid((field, "is inactive"))
    return unit


def _add_on_prices(
    state: State, plan: Plan, tier_type: str, given: Body
) -> tuple[dict[str, Price], tuple[PlanTier, ...]]:
    """`currencies` for flat, `tiers` for the others, the other one absent (4.4)."""
    wanted, absent = ("currencies", "tiers") if tier_type == "flat" else ("tiers", "currencies")
    if given.get(absent):
        raise invalid((absent, f"must be blank if the tier type is {tier_type}"))
    if not given.get(wanted):
        raise invalid((wanted, "can't be blank"))
    if tier_type == "flat":
        return _prices(state, plan, given["currencies"], "currencies"), ()
    check_tiers([tier.get("ending_quantity") for tier in given["tiers"]], "tiers")
    tiers = tuple(
        PlanTier(tier.get("ending_quantity"), _prices(state, plan, tier["currencies"], "tiers.currencies"))
        for tier in given["tiers"]
    )
    if any(tier.prices.keys() != tiers[0].prices.keys() for tier in tiers):
        raise invalid(("tiers.currencies", "must be the same in every tier"))
    return {}, tiers


def _prices(state: State, plan: Plan, given: list[Body], name: str) -> dict[str, Price]:
    check_currencies(state, given, name)
    if any(each["currency"] not in plan.prices for each in given):
        raise invalid(
            (f"{name}.currency", "is not a currency of the plan")
        )  # not documented: the harsher way
    return {each["currency"]: price_of(each, each["currency"], name) for each in given}
