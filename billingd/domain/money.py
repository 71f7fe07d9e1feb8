"""Amounts of money: what a currency can hold, what Recurly takes, and why a given amount does not fit."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

AMOUNT_MAX: Final = 1_000_000
"""Recurly's limit for any one amount, in units of the currency (recurly.md 4.1)."""

AMOUNT_DECIMALS_MAX: Final = 2
"""Decimals of Recurly's `unit_amount`: plan price and setup fee (recurly.md 4.1)."""

USAGE_DECIMALS_MAX: Final = 9
"""Decimals of Recurly's `unit_amount_decimal`: prices of usage (recurly.md 4.1)."""

CURRENCIES_BY_DIGITS: Final = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
MINOR_DIGITS: Final = {
    currency: digits for digits, currencies in CURRENCIES_BY_DIGITS.items() for currency in currencies.split()
}
"""Digits after the point of the currencies that do not have 2 (ISO 4217)."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many decimals, and the clause that says why."""

    decimals: int
    because: str


def minor_digits(currency: str) -> int:
    """Digits after the point of the currency's smallest unit (ISO 4217)."""
    return MINOR_DIGITS.get(currency, 2)


def price_limit(currency: str) -> Limit:
    """What a base price or setup fee may have: 2 decimals, or fewer if the currency has fewer."""
    digits = minor_digits(currency)
    if digits < AMOUNT_DECIMALS_MAX:
        return Limit(digits, f"{currency} has {digits or 'none'}")
    return Limit(AMOUNT_DECIMALS_MAX, f"Recurly takes at most {AMOUNT_DECIMALS_MAX} here")


def usage_limit(currency: str) -> Limit:
    """What a price of usage may have: 9 decimals, but 2 where a line total could need a third.

    Recurly rounds line totals and documents them with 2 decimals only, so in a currency with more a finer
    price could not be charged to its smallest unit.
    """
    digits = minor_digits(currency)
    if digits > AMOUNT_DECIMALS_MAX:
        return Limit(
            AMOUNT_DECIMALS_MAX,
            f"Recurly charges at most {AMOUNT_DECIMALS_MAX}, so totals in {currency}, "
            f"which has {digits}, would be cut",
        )
    return Limit(USAGE_DECIMALS_MAX, f"Recurly takes at most {USAGE_DECIMALS_MAX}")


def decimals(amount: Decimal) -> int:
    """Digits after the point that matter: 0 for 10 and 1.00, 1 for 2.50; `amount` is finite."""
    exponent = plain(amount).as_tuple().exponent
    assert isinstance(exponent, int)
    return -exponent


def plain(amount: Decimal) -> Decimal:
    """The same finite amount without needless zeros, exponent or sign: 1.50 is 1.5, 1E+2 is 100, -0 is 0."""
    sign, digits, exponent = amount.as_tuple()
    assert isinstance(exponent, int)
    if not any(digits):
        return Decimal(0)
    if exponent > 0:
        return Decimal((sign, digits + (0,) * exponent, 0))
    end = len(digits)
    while exponent < 0 and digits[end - 1] == 0:
        end, exponent = end - 1, exponent + 1
    return Decimal((sign, digits[:end], exponent))


def shown(amount: Decimal) -> str:
    """An amount for people: 0.0000001 and not 1E-7, but 1E+40 and not forty zeros."""
    if amount.is_finite() and -20 <= amount.adjusted() <= 20:
        return format(plain(amount), "f")
    return str(amount)


def _decimals(count: int) -> str:
    return f"{count} decimal{'' if count == 1 else 's'}"


def amount_fault(what: str, amount: Decimal, limit: Limit) -> str | None:
    """Why Recurly cannot take this amount, or None: 0 to 1,000,000, at most `limit.decimals` decimals."""
    if not amount.is_finite():
        return f"{what} is {amount}, which is no amount. Enter a number."
    if amount < 0:
        return f"{what} is {shown(amount)}, and Recurly takes no negative price. Set it to 0 or more."
    if amount > AMOUNT_MAX:
        return f"{what} is {shown(amount)}, above Recurly's limit of {AMOUNT_MAX}. Lower it."
    if (count := decimals(amount)) > limit.decimals:
        return (
            f"{what} is {shown(amount)} with {_decimals(count)}; {limit.because}. "
            f"Round it to {_decimals(limit.decimals) if limit.decimals else 'a whole number'}."
        )
    return None
