"""Reading what somebody asks of the control interface, with refusals that say how to do it right."""

import re
from datetime import datetime, timedelta
from typing import Any, Final

from billingd.sandbox.amplify.times import instant

_UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_PART: Final = re.compile(r"(\d+)(ms|s|m|h|d)")


class Wrong(Exception):
    """A request that cannot be done: the field at fault, and the fix."""

    def __init__(self, field: str, message: str, fix: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": _CODES[status], "field": field, "message": message, "fix": fix}}


_CODES: Final = {400: "bad_request", 404: "not_found", 409: "conflict", 428: "stale"}


class Asked:
    """The fields of a JSON body; each may be read once, and `done` refuses what nobody read."""

    def __init__(self, body: object) -> None:
        if not isinstance(body, dict):
            raise Wrong("", "the body must be a JSON object", 'send for example {"name": "weather"}')
        self._left: dict[str, Any] = dict(body)
        self._known: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._left.get(name) is not None

    def named(self, name: str) -> bool:
        """Whether a field is there, null or not."""
        return name in self._left

    def raw(self, name: str, default: Any = None) -> Any:
        """A field as it is."""
        self._known.add(name)
        value = self._left.pop(name, None)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str:
        """A non-empty string; required without a default."""
        value = self.raw(name, default)
        if value is None:
            raise Wrong(name, f"'{name}' is required", f'add "{name}": "…"')
        if not isinstance(value, str) or (not value and value != default):
            raise Wrong(name, f"'{name}' must be a non-empty string, not {value!r}", f'write "{name}": "…"')
        return value

    def maybe(self, name: str) -> str | None:
        """A string, or None where it is left out."""
        return self.text(name, "") or None

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """One of a few words."""
        value = self.text(name, default)
        if value not in choices:
            raise Wrong(name, f"'{name}' cannot be '{value}'", f"use one of {', '.join(choices)}")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number of at least `least`."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Wrong(
                name,
                f"'{name}' must be a whole number of at least {least}, not {value!r}",
                f'write "{name}": {max(least, 1)}',
            )
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise Wrong(name, f"'{name}' must be true or false, not {value!r}", f'write "{name}": true')
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, empty where it is left out."""
        value = self.raw(name, {})
        if not isinstance(value, dict):
            raise Wrong(name, f"'{name}' must be an object, not {value!r}", f'write "{name}": {{…}}')
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings."""
        value = self.mapping(name)
        for key, each in value.items():
            if not isinstance(each, str):
                raise Wrong(f"{name}.{key}", f"'{name}.{key}' must be a string", f'write "{key}": "…"')
        return value

    def listing(self, name: str) -> list[Any]:
        """A list, empty where it is left out."""
        value = self.raw(name, [])
        if not isinstance(value, list):
            raise Wrong(name, f"'{name}' must be a list, not {value!r}", f'write "{name}": […]')
        return value

    def time(self, name: str, default: datetime | None = None) -> datetime:
        """An instant in RFC 3339; required without a default."""
        if default is not None and not self.has(name):
            self.raw(name)
            return default
        value = self.text(name)
        try:
            return instant(value)
        except ValueError as error:
            raise Wrong(
                name,
                f"'{name}' is not an RFC 3339 time: {value!r}",
                f'write "{name}": "2026-03-02T10:15:00Z"',
            ) from error

    def duration(self, name: str) -> timedelta:
        """`31d`, `1h30m`, `-2h`, `200ms`."""
        value = self.text(name)
        sign, digits = (-1, value[1:]) if value.startswith("-") else (1, value)
        parts = _PART.findall(digits)
        if not parts or "".join(number + unit for number, unit in parts) != digits:
            raise Wrong(name, f"'{name}' is not a duration: {value!r}", f'write "{name}": "31d" or "1h30m"')
        return sign * timedelta(seconds=sum(int(number) * _UNITS[unit] for number, unit in parts))

    def rest(self) -> dict[str, Any]:
        """All fields not read yet, taken as they are."""
        left, self._left = self._left, {}
        return left

    def done(self) -> None:
        """Refuses fields that nobody read."""
        for name in self._left:
            raise Wrong(name, f"'{name}' is not known here", f"known are {', '.join(sorted(self._known))}")
