"""Reads one JSON resource by dotted paths: tolerant of what is missing, exact about what is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Final, NoReturn

from billingd.adapters.amplify.encoding import Json, moment_of
from billingd.domain.errors import Permanent

DIGITS_MAX: Final = 100
"""Before or after the point; no price and no count comes near."""


def dig(raw: Json, path: str) -> Json:
    """The value at a dotted path, None when any step of it is missing or null."""
    for key in path.split("."):
        if not isinstance(raw, dict):
            return None
        raw = raw.get(key)
    return raw


def word(value: Json) -> str | None:
    """A state, which Amplify writes as a string here and as an object there (amplify.md 3.5, 3.6)."""
    if isinstance(value, dict):
        return word(value.get("name") or value.get("state"))
    return value if isinstance(value, str) and value else None


@dataclass(frozen=True, slots=True)
class Reader:
    """`raw` is a resource of `kind`; every complaint names both and the field."""

    kind: str
    raw: Json
    at: str = ""
    name: str = ""

    def fail(self, path: str, problem: str) -> NoReturn:
        """Say which field of which resource is wrong."""
        raise Permanent(f"Amplify's {' '.join((self.kind, self._name())).strip()}: {self.at}{path} {problem}")

    def _name(self) -> str:
        name = self.name or dig(self.raw, "name") or dig(self.raw, "metadata.id")
        return name[:100] if isinstance(name, str) else ""

    def text(self, path: str) -> str | None:
        """Text, or None; a number is taken as its digits (ids of organizations)."""
        value = dig(self.raw, path)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.fail(path, "is not text")

    def need_text(self, path: str) -> str:
        """Text that must be there."""
        return self.text(path) or self.fail(path, "is missing")

    def number(self, path: str) -> Decimal | None:
        """A decimal number, or None."""
        value = dig(self.raw, path)
        if value is None:
            return None
        if not isinstance(value, bool) and isinstance(value, int | Decimal | str):
            try:
                number = Decimal(value)
            except InvalidOperation:
                return self.fail(path, "is not a number")
            if number.is_finite():
                # 1e999999999 is short to write, and as a whole number larger than any memory
                if number and max(abs(number.adjusted()), -int(number.as_tuple().exponent)) > DIGITS_MAX:
                    return self.fail(path, "is a number of too many digits")
                return number
        return self.fail(path, "is not a number")

    def need_number(self, path: str) -> Decimal:
        """A decimal number that must be there."""
        number = self.number(path)
        return self.fail(path, "is missing") if number is None else number

    def whole(self, path: str) -> int | None:
        """A whole number (also written 1.0), or None."""
        number = self.number(path)
        if number is None:
            return None
        return (
            int(number) if number == number.to_integral_value() else self.fail(path, "is not a whole number")
        )

    def need_whole(self, path: str) -> int:
        """A whole number that must be there."""
        number = self.whole(path)
        return self.fail(path, "is missing") if number is None else number

    def moment(self, path: str) -> datetime | None:
        """A time, aware UTC, or None."""
        value = self.text(path)
        if value is None:
            return None
        try:
            return moment_of(value)
        except ValueError:
            return self.fail(path, "is not a time")

    def each(self, path: str) -> Iterator["Reader"]:
        """A reader for each element of a list that must be there."""
        rows = dig(self.raw, path)
        if not isinstance(rows, list):
            self.fail(path, "is missing" if rows is None else "is not a list")
        for number, row in enumerate(rows):
            yield Reader(self.kind, row, f"{self.at}{path}[{number}].", self._name())
