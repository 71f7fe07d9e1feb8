"""Domain values -> request bodies, exactly as Recurly's OpenAPI has them. Unknown fields are refused there.

Every `unit_amount_decimal` is text; `unit_amount` is a JSON number of at most two decimals.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final, NoReturn

from billingd.domain.billing import NewSubscription, NewUsage
from billingd.domain.errors import Refused
from billingd.domain.pricing import AddOnSpec, MeasuredUnitSpec, PlanSpec, TierSpec

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Body = dict[str, Json]

AMOUNT_MAX: Final = Decimal(1_000_000)
UNITS_MAX: Final = 999_999_999
COMPANY_LENGTH_MAX: Final = 100
NAME_LENGTH_MAX: Final = 255

# Explicit, because the default is the code, which is longer than the 20 characters allowed.
PLAN_ACCOUNTING_CODE: Final = "api-plan"
SETUP_ACCOUNTING_CODE: Final = "api-setup"
USAGE_ACCOUNTING_CODE: Final = "api-usage"
assert max(map(len, (PLAN_ACCOUNTING_CODE, SETUP_ACCOUNTING_CODE, USAGE_ACCOUNTING_CODE))) <= 20


def measured_unit(spec: MeasuredUnitSpec) -> Body:
    """MeasuredUnitCreate."""
    return {"name": spec.name, "display_name": spec.display_name}


def plan(spec: PlanSpec) -> Body:
    """PlanCreate, its add-ons inline."""
    body: Body = {
        "code": spec.code,
        "name": spec.name,
        "interval_unit": spec.interval_unit,
        "interval_length": spec.interval_length,
        "currencies": [{"currency": spec.currency, "unit_amount": number(spec.unit_amount)}],
        "accounting_code": PLAN_ACCOUNTING_CODE,
        "setup_fee_accounting_code": SETUP_ACCOUNTING_CODE,
        "auto_renew": spec.auto_renew,
    }
    if spec.description:
        body["description"] = spec.description
    if spec.setup_fee:
        body["setup_fees"] = [{"currency": spec.currency, "unit_amount": number(spec.setup_fee)}]
    if spec.total_billing_cycles is not None:
        body["total_billing_cycles"] = spec.total_billing_cycles
    if spec.add_ons:
        body["add_ons"] = [add_on(each, spec.currency) for each in spec.add_ons]
    return body


def add_on(spec: AddOnSpec, currency: str) -> Body:
    """AddOnCreate: `currencies` for flat only, `tiers` for the others only."""
    body: Body = {
        "code": spec.code,
        "name": spec.name,
        "add_on_type": "usage",
        "usage_type": "price",
        "usage_calculation_type": "cumulative",
        "usage_timeframe": "billing_period",
        "measured_unit_name": spec.measured_unit.name,
        "tier_type": spec.tier_type,
        "optional": False,
        "accounting_code": USAGE_ACCOUNTING_CODE,
    }
    if spec.tier_type == "flat":
        if spec.unit_amount is None or spec.tiers:
            refuse(f"add-on {spec.code}: a flat add-on has one unit amount and no tiers")
        body["currencies"] = [_price(spec.unit_amount, currency)]
    else:
        if spec.unit_amount is not None or not spec.tiers or spec.tiers[-1].ending_quantity is not None:
            refuse(f"add-on {spec.code}: a {spec.tier_type} add-on has tiers only, the last one open")
        body["tiers"] = [_tier(each, currency) for each in spec.tiers]
    return body


def naming(name: str) -> Body:
    """PlanUpdate or AddOnUpdate that changes the name and nothing else; cut to what fits."""
    return {"name": name[:NAME_LENGTH_MAX]}


def account(
    code: str,
    *,
    email: str | None = None,
    first_name: str | None = None,
    last_name: str | None = None,
    company: str | None = None,
) -> Body:
    """AccountCreate; names are for people, so they are cut to what fits."""
    body: Body = {"code": code}
    if email:
        body["email"] = email
    if first_name:
        body["first_name"] = first_name[:NAME_LENGTH_MAX]
    if last_name:
        body["last_name"] = last_name[:NAME_LENGTH_MAX]
    if company:
        body["company"] = company[:COMPANY_LENGTH_MAX]
    return body


def subscription(new: NewSubscription) -> Body:
    """SubscriptionCreate; no price fields, so that the plan's own prices hold."""
    body: Body = {
        "plan_code": new.plan_code,
        "currency": new.currency,
        "account": {"code": new.account_code},
        "collection_method": new.collection_method,
        "po_number": new.marker,
    }
    if new.add_on_codes:  # Recurly attaches none by itself, not even those with optional=false
        body["add_ons"] = [{"code": code} for code in new.add_on_codes]
    return body


def marking(marker: str) -> Body:
    """SubscriptionUpdate that changes the marker and nothing else."""
    return {"po_number": marker}


def attachment(kept: Iterable[str], added: Iterable[str], collection_method: str | None) -> Body:
    """SubscriptionChangeCreate: `add_ons` takes the place of what is there, so it lists that too.

    `kept` are ids of the subscription's own add-ons, which keep their prices; `added` are codes of the
    plan's, which come at its prices of now. The collection method is the subscription's own: the document
    gives the field a default, and does not say that leaving it out changes nothing.
    """
    listed: list[Json] = [{"id": id_} for id_ in kept]
    listed += [{"code": code} for code in added]
    body: Body = {"timeframe": "now", "add_ons": listed}
    if collection_method is not None:
        body["collection_method"] = collection_method
    return body


def cancellation() -> Body:
    """SubscriptionCancel: at the end of the cycle under way, not of a term of many cycles."""
    return {"timeframe": "bill_date"}


def usage(new: NewUsage) -> Body:
    """UsageCreate; the times are always ours, never the server's "now"."""
    if not 1 <= abs(new.units) <= UNITS_MAX:
        refuse(f"usage {new.merchant_tag}: {new.units} units do not fit into one record")
    return {
        "amount": new.units,
        "merchant_tag": new.merchant_tag,
        "usage_timestamp": instant(new.usage_timestamp),
        "recording_timestamp": instant(new.recorded_at),
    }


def usage_change(units: int, usage_timestamp: datetime, merchant_tag: str) -> Body:
    """UsageCreate, as a change of an unbilled record takes it; when it was recorded stays as it is."""
    if not 1 <= abs(units) <= UNITS_MAX:
        refuse(f"usage {merchant_tag}: {units} units do not fit into one record")
    return {"amount": units, "merchant_tag": merchant_tag, "usage_timestamp": instant(usage_timestamp)}


def number(amount: Decimal) -> float:
    """An amount of at most two decimals as the JSON number that reads exactly like it.

    The SDK cannot serialise a Decimal. Text of up to 15 significant digits (here at most 9) survives the way
    into a float and back, so `json` writes 19.99 for Decimal("19.99"); nothing is ever computed with it.
    """
    _in_range(amount)
    if amount != amount.quantize(Decimal("0.01")):
        refuse(f"amount {amount} has more than two decimals")
    return float(abs(amount))  # abs: no -0.0


def text(amount: Decimal) -> str:
    """An amount of at most nine decimals in plain notation, as `unit_amount_decimal` wants it."""
    _in_range(amount)
    if amount != amount.quantize(Decimal("0.000000001")):
        refuse(f"amount {amount} has more than nine decimals")
    plain = format(abs(amount), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def instant(at: datetime) -> str:
    """A time in UTC, whole seconds: the SDK cannot read fractions back."""
    if at.tzinfo is None:
        raise ValueError("a time without a zone")
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def refuse(message: str) -> NoReturn:
    """Refuse to send what Recurly cannot hold exactly."""
    raise Refused(message, code="unsendable")


def _in_range(amount: Decimal) -> None:
    if not amount.is_finite() or not 0 <= amount <= AMOUNT_MAX:
        refuse(f"amount {amount} is not between 0 and {AMOUNT_MAX}")


def _price(amount: Decimal, currency: str) -> Body:
    return {"currency": currency, "unit_amount_decimal": text(amount)}


def _tier(spec: TierSpec, currency: str) -> Body:
    body: Body = {"currencies": [_price(spec.amount, currency)]}
    if spec.ending_quantity is not None:
        body["ending_quantity"] = spec.ending_quantity
    return body
