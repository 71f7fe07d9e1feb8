"""Reads a request body against a table of fields: unknown names, kinds, limits; all faults at once."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from billingd.sandbox.recurly.errors import RefusalError, bad_values, invalid, missing_feature, unpermitted

Body = dict[str, Any]

CODE: Final = re.compile(r"[a-z0-9_+-]+")
"""OAS: `/^[a-z0-9_+-]+$/` of plan, item and accounting codes."""

AMOUNT_MAX: Final = Decimal(1_000_000)
CENTS: Final = 2
DECIMALS_MAX: Final = 9


@dataclass(slots=True)
class Problems:
    """What is wrong with a body, by how Recurly answers it."""

    unpermitted: list[str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    invalid: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self) -> None:
        """Raises the first kind of fault found: 400s before 422s."""
        refusal = self._worst()
        if refusal is not None:
            raise refusal

    def _worst(self) -> RefusalError | None:
        if self.unpermitted:
            return unpermitted(self.unpermitted)
        if self.malformed:
            return bad_values(self.malformed)
        if self.unavailable:
            return missing_feature(self.unavailable)
        return invalid(*self.invalid) if self.invalid else None


Reader = Callable[[Any, str, Problems], Any]
"""Checks one value (never None) under its dotted name, notes faults, gives back what to keep."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A JSON object: its fields, and which of them may not be missing or null."""

    fields: Mapping[str, Reader]
    required: tuple[str, ...] = ()

    def read(self, body: Body) -> Body:
        """The checked body, or a `RefusalError` that names every fault."""
        problems = Problems()
        checked = self(body, "", problems)
        problems.refuse()
        return dict(checked)

    def __call__(self, value: Any, name: str, problems: Problems) -> Any:
        """Reads a nested object."""
        if not isinstance(value, dict):
            problems.malformed.append(name)
            return {}
        prefix = f"{name}." if name else ""
        checked: Body = {}
        for key, item in value.items():
            if key not in self.fields:
                problems.unpermitted.append(prefix + key)
            else:
                checked[key] = None if item is None else self.fields[key](item, prefix + key, problems)
        for key in self.required:
            if checked.get(key) is None or checked[key] == "":
                problems.invalid.append((prefix + key, "can't be blank"))
        return checked


def text(length_max: int | None = None, pattern: re.Pattern[str] | None = None) -> Reader:
    """A string of at most `length_max` characters that matches `pattern` as a whole."""

    def read(value: Any, name: str, problems: Problems) -> Any:
        if not isinstance(value, str):
            problems.malformed.append(name)
        elif length_max is not None and len(value) > length_max:
            problems.invalid.append((name, f"is too long (maximum is {length_max} characters)"))
        elif pattern is not None and value and not pattern.fullmatch(value):
            problems.invalid.append((name, "is invalid"))
        return value

    return read


def one_of(*names: str) -> Reader:
    """A string of an enumeration."""

    def read(value: Any, name: str, problems: Problems) -> Any:
        if value not in names:
            problems.invalid.append((name, f"must be one of: {', '.join(names)}"))
        return value

    return read


def integer(least: int | None = None, most: int | None = None) -> Reader:
    """A whole JSON number within bounds."""

    def read(value: Any, name: str, problems: Problems) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            problems.malformed.append(name)
        elif least is not None and value < least:
            problems.invalid.append((name, f"must be greater than or equal to {least}"))
        elif most is not None and value > most:
            problems.invalid.append((name, f"must be less than or equal to {most}"))
        return value

    return read


def number(value: Any, name: str, problems: Problems) -> Any:
    """A JSON number as a Decimal."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        problems.malformed.append(name)
        return Decimal(0)
    return Decimal(value)


def boolean(value: Any, name: str, problems: Problems) -> Any:
    """true or false."""
    if not isinstance(value, bool):
        problems.malformed.append(name)
    return value


def unit_amount(value: Any, name: str, problems: Problems) -> Any:
    """A JSON number 0..1,000,000 of at most 2 decimals (OAS: UnitAmount)."""
    amount = number(value, name, problems)
    _within(amount, CENTS, name, problems)
    return amount


def unit_amount_decimal(value: Any, name: str, problems: Problems) -> Any:
    """A decimal string 0..1,000,000 of at most 9 decimals; a JSON number is refused, the type is string."""
    if not isinstance(value, str):
        problems.malformed.append(name)
        return Decimal(0)
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value, re.ASCII):
        problems.invalid.append((name, "is not a number"))
        return Decimal(0)
    amount = Decimal(value)
    _within(amount, DECIMALS_MAX, name, problems)
    return amount


def timestamp(value: Any, name: str, problems: Problems) -> Any:
    """An ISO 8601 time; without a zone it is UTC (OAS: filter_begin_time)."""
    try:
        return parsed_time(value)
    except (TypeError, ValueError):
        problems.malformed.append(name)
        return None


def list_of(item: Reader, least: int = 0) -> Reader:
    """A JSON array of at least `least` items."""

    def read(value: Any, name: str, problems: Problems) -> Any:
        if not isinstance(value, list):
            problems.malformed.append(name)
            return []
        if len(value) < least:
            problems.invalid.append((name, "can't be empty"))
        return [item(each, name, problems) for each in value]

    return read


def unavailable(value: Any, name: str, problems: Problems) -> Any:
    """A field Recurly has and the sandbox does not: refused, unless it says nothing anyway."""
    if value not in ("", False, []) and value != {}:
        problems.unavailable.append(name)


def fields(reader: Reader, *names: str) -> dict[str, Reader]:
    """The same reader under several names."""
    return dict.fromkeys(names, reader)


def parsed_time(value: str) -> datetime:
    """An ISO 8601 time or date as aware UTC."""
    at = datetime.fromisoformat(value)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)


def duplicates(values: Collection[Any]) -> bool:
    """Whether a value comes twice."""
    return len(set(values)) != len(values)


def _within(amount: Decimal, decimals_max: int, name: str, problems: Problems) -> None:
    exponent = amount.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    if amount < 0:
        problems.invalid.append((name, "must be greater than or equal to 0"))
    elif amount > AMOUNT_MAX:
        problems.invalid.append((name, f"must be less than or equal to {AMOUNT_MAX}"))
    elif -exponent > decimals_max:
        problems.invalid.append((name, f"must have at most {decimals_max} decimal places"))
