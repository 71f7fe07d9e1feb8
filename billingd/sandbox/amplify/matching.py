"""Whether a resource satisfies a query (amplify.md 2.4)."""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

from billingd.sandbox.amplify import rsql
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.times import comparable_ms

Lookup = Callable[[str], Iterable[object]]
"""The values found under a dotted field: none, one, or one per element of a list."""


def dig(value: object, path: str) -> list[object]:
    """Values under a dotted path; a list on the way stands for each of its elements."""
    found = [value]
    for step in path.split(".") if path else ():
        found = [
            each[step] for each in _elements(found) if isinstance(each, dict) and each.get(step) is not None
        ]
    return list(_elements(found))


def _elements(values: Iterable[object]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def attribute_aware(body: dict[str, Any]) -> Lookup:
    """Look-up in a resource: attribute keys may hold dots themselves."""

    def lookup(field: str) -> list[object]:
        if field.startswith("attributes."):
            value = body.get("attributes", {}).get(field.removeprefix("attributes."))
            return [] if value is None else [value]
        return dig(body, field)

    return lookup


def matches(node: rsql.Node, lookup: Lookup) -> bool:
    """Holds on a list if it holds for one element; `!=`, `!==`, `=out=` are the opposites of `==`, …"""
    match node:
        case rsql.All(parts):
            return all(matches(part, lookup) for part in parts)
        case rsql.Any(parts):
            return any(matches(part, lookup) for part in parts)
        case rsql.Within(field, inner, negated):
            found = any(matches(inner, partial(dig, element)) for element in lookup(field))
            return found is not negated
        case rsql.Compare(field, operator, values):
            return _compare(field, operator, values, lookup(field))


def _compare(field: str, operator: str, wanted: tuple[str, ...], found: Iterable[object]) -> bool:
    texts = [str(value) for value in found]
    match operator:
        case "eq":
            return wanted[0] in texts
        case "neq":
            return wanted[0] not in texts
        case "in":
            return any(text in wanted for text in texts)
        case "out":
            return not any(text in wanted for text in texts)
        case "like":
            return any(_wildcards(wanted[0]).fullmatch(text) for text in texts)
        case "unlike":
            return not any(_wildcards(wanted[0]).fullmatch(text) for text in texts)
    try:
        limit = comparable_ms(wanted[0]) if field.endswith("imestamp") else int(wanted[0])
        numbers = [comparable_ms(text) if field.endswith("imestamp") else int(text) for text in texts]
    except ValueError as error:
        raise Refused(400, f"query: {field} cannot be compared with '{wanted[0]}'") from error
    tests = {"lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__}
    return any(tests[operator](number, limit) for number in numbers)


@lru_cache(maxsize=256)
def _wildcards(pattern: str) -> re.Pattern[str]:
    parts = {"*": ".*", "_": "."}
    text = "".join(parts.get(char) or re.escape(char) for char in pattern)
    return re.compile(text, re.IGNORECASE | re.DOTALL)
