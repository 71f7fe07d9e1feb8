"""Rules that several resources share: currencies, prices, tiers, codes."""

from decimal import Decimal
from typing import Final

from billingd.sandbox.recurly.charges import UNBOUNDED, WITHOUT_MINOR_UNIT
from billingd.sandbox.recurly.errors import invalid, unprocessable
from billingd.sandbox.recurly.fields import Body, duplicates
from billingd.sandbox.recurly.model import Price, Record
from billingd.sandbox.recurly.state import State

TAKEN: Final = "has already been taken"
ACCOUNTING_CODE_MAX: Final = 20


def check_currency(state: State, currency: str, name: str) -> None:
    """The currency must be enabled on the site."""
    if currency not in state.settings.currencies:
        raise invalid((name, "is not enabled on this site"))


def check_currencies(state: State, given: list[Body], name: str) -> None:
    """Each one enabled, none twice."""
    for each in given:
        check_currency(state, each["currency"], f"{name}.currency")
    if duplicates([each["currency"] for each in given]):
        raise invalid((f"{name}.currency", TAKEN))


def check_minor_unit(amount: Decimal, currency: str, name: str) -> None:
    """Half a yen is not a price; whether Recurly refuses it is not documented."""
    if currency in WITHOUT_MINOR_UNIT and amount != int(amount):
        raise invalid((name, f"must be a whole number in {currency}"))


def price_of(given: Body, currency: str, name: str) -> Price:
    """One of `unit_amount` and `unit_amount_decimal`, never both, never none (4.4)."""
    whole: Decimal | None = given.get("unit_amount")
    exact: Decimal | None = given.get("unit_amount_decimal")
    if whole is not None and exact is not None:
        raise invalid((f"{name}.unit_amount", "cannot be provided with unit_amount_decimal"))
    if exact is not None:
        return Price(exact, exact=True)
    if whole is None:
        raise invalid((f"{name}.unit_amount", "can't be blank"))
    check_minor_unit(whole, currency, f"{name}.unit_amount")
    return Price(whole)


def check_tiers(endings: list[int | None], name: str) -> None:
    """Ascending, and only the last one open (OAS: Tier)."""
    last = [ending for ending in endings if ending in (None, UNBOUNDED)]
    bounded = [ending for ending in endings[:-1] if ending is not None]
    if len(last) != 1 or endings[-1] not in (None, UNBOUNDED):
        raise invalid((name, "must have one tier without an ending quantity, the last"))
    if bounded != sorted(set(bounded)):
        raise invalid((f"{name}.ending_quantity", "must be ascending"))


def accounting_code(state: State, given: Body, code: str) -> str:
    """Defaults to the code. Beyond 20 characters nothing is documented: refused, or cut if so set."""
    given_or_code = str(given.get("accounting_code") or code)
    if len(given_or_code) > ACCOUNTING_CODE_MAX and state.settings.long_accounting_code_default == "refuse":
        raise invalid(("accounting_code", f"is too long (maximum is {ACCOUNTING_CODE_MAX} characters)"))
    return given_or_code[:ACCOUNTING_CODE_MAX]


def check_custom_fields(state: State, given: Body) -> None:
    """Custom fields must have been defined in the admin UI (4.9)."""
    names = [each.get("name") for each in given.get("custom_fields") or ()]
    if not state.settings.custom_field_names.issuperset(names):
        raise invalid(("custom_fields.name", "is not a defined custom field"))


def check_active(record: Record, kind: str) -> None:
    """What has been removed cannot be changed any more."""
    if record.deleted_at:
        raise unprocessable(f"The {kind.replace('_', '-')} is inactive", (kind, "is inactive"))


def remove(state: State, record: Record) -> None:
    """Makes a record inactive."""
    record.deleted_at = state.now()
    state.touch(record)
