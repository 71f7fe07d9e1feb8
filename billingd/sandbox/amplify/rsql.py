"""RSQL as Amplify's queries use it (amplify.md 2.4): a parser into a tree of conditions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from billingd.sandbox.amplify.errors import Refused

_OPERATORS: Final = {
    "===": "eq",
    "=eq=": "eq",
    "!==": "neq",
    "=neq=": "neq",
    "==": "like",
    "!=": "unlike",
    "=lt=": "lt",
    "=le=": "le",
    "=gt=": "gt",
    "=ge=": "ge",
    "<=": "le",
    ">=": "ge",
    "<": "lt",
    ">": "gt",
    "=in=": "in",
    "=out=": "out",
    "=with=": "with",
    "=without=": "without",
}
_OPERATOR: Final = re.compile("|".join(re.escape(op) for op in sorted(_OPERATORS, key=len, reverse=True)))
_FIELD: Final = re.compile(r"[^\"'();,=!~<>\s]+")
_AND: Final = re.compile(r"\s*;\s*|\s+and\s+")
_OR: Final = re.compile(r"\s*,\s*|\s+or\s+")
DEPTH_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Compare:
    """`field operator value(s)`."""

    field: str
    operator: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Within:
    """`field=with='...'`: several conditions on the same element of a list."""

    field: str
    inner: "Node"
    negated: bool


@dataclass(frozen=True, slots=True)
class All:
    """`a;b`"""

    parts: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Any:
    """`a,b`"""

    parts: tuple["Node", ...]


Node = Compare | Within | All | Any


def parse(query: str) -> Node:
    """The query as a tree; Refused(400) where it cannot be read."""
    return _Parser(query).whole()


def fields(node: Node) -> list[str]:
    """Every field a query names, those inside `=with=` with their list's name before them."""
    match node:
        case Compare(field, _, _):
            return [field]
        case Within(field, inner, _):
            return [field, *(f"{field}.{name}" for name in fields(inner))]
        case All(parts) | Any(parts):
            return [name for part in parts for name in fields(part)]


class _Parser:
    def __init__(self, query: str) -> None:
        self._query = query
        self._at = 0
        self._depth = 0

    def whole(self) -> Node:
        node = self._either()
        if self._query[self._at :].strip():
            raise self._fault("unexpected text")
        return node

    def _either(self) -> Node:
        parts = [self._both()]
        while self._take(_OR):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def _both(self) -> Node:
        parts = [self._term()]
        while self._take(_AND):
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _term(self) -> Node:
        self._spaces()
        if self._take(re.compile(r"\(")):
            self._depth += 1
            if self._depth > DEPTH_MAX:
                raise self._fault("too deeply nested")
            node = self._either()
            self._spaces()
            if not self._take(re.compile(r"\)")):
                raise self._fault("a parenthesis is not closed")
            self._depth -= 1
            return node
        field = self._take(_FIELD)
        symbol = self._take(_OPERATOR) if field else ""
        if not field or not symbol:
            raise self._fault("expected a field and an operator")
        operator = _OPERATORS[symbol]
        if operator in ("in", "out"):
            return Compare(field, operator, tuple(self._list()))
        value = self._value()
        if operator in ("with", "without"):
            return Within(field, parse(value), negated=operator == "without")
        return Compare(field, operator, (value,))

    def _list(self) -> Sequence[str]:
        if not self._take(re.compile(r"\(\s*")):
            raise self._fault("expected a list in parentheses")
        values = [self._value()]
        while self._take(re.compile(r"\s*,\s*")):
            values.append(self._value())
        if not self._take(re.compile(r"\s*\)")):
            raise self._fault("a list is not closed")
        return values

    def _value(self) -> str:
        quote = self._query[self._at : self._at + 1]
        if quote in ("'", '"') and quote:
            text = self._take(re.compile(rf"{quote}(?:\\.|[^{quote}\\])*{quote}"))
            if not text:
                raise self._fault("a quote is not closed")
            return re.sub(r"\\(.)", r"\1", text[1:-1])
        text = self._take(_FIELD)
        if not text:
            raise self._fault("expected a value")
        return text

    def _spaces(self) -> None:
        self._take(re.compile(r"\s*"))

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._query, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def _fault(self, why: str) -> Refused:
        return Refused(400, f"query is not valid RSQL at position {self._at}: {why}")
