"""Measured units: what may be created, changed, removed."""

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.checks import TAKEN, remove
from billingd.sandbox.recurly.errors import invalid, unprocessable
from billingd.sandbox.recurly.fields import Body
from billingd.sandbox.recurly.model import MeasuredUnit
from billingd.sandbox.recurly.state import State


def create_measured_unit(state: State, body: Body) -> MeasuredUnit:
    """A new measured unit; the name is unique (OAS:32553)."""
    given = schemas.MEASURED_UNIT_CREATE.read(body)
    _unique_name(state, given["name"])
    unit = MeasuredUnit(
        **state.stamps(),
        name=given["name"],
        display_name=given["display_name"],
        description=given.get("description"),
    )
    state.measured_units[unit.id] = unit
    return unit


def update_measured_unit(state: State, unit: MeasuredUnit, body: Body) -> MeasuredUnit:
    """Changes apply at once to all plans and subscriptions."""
    given = schemas.MEASURED_UNIT_UPDATE.read(body)
    if given.get("name") not in (None, unit.name):
        _unique_name(state, given["name"])
    unit.name = given.get("name") or unit.name
    unit.display_name = given.get("display_name") or unit.display_name
    unit.description = given.get("description", unit.description)
    state.touch(unit)
    return unit


def remove_measured_unit(state: State, unit: MeasuredUnit) -> MeasuredUnit:
    """Only while no active plan uses it."""
    in_use = any(
        add_on.measured_unit is unit
        and add_on.deleted_at is None
        and state.plans[add_on.plan_id].deleted_at is None
        for add_on in state.add_ons.values()
    )
    if in_use or unit.deleted_at:
        raise unprocessable(
            "Measured unit may already be inactive" if unit.deleted_at else "Measured unit is in use"
        )
    remove(state, unit)
    return unit


def _unique_name(state: State, name: str) -> None:
    if any(unit.name == name for unit in state.measured_units.values()):
        raise invalid(("name", TAKEN))
