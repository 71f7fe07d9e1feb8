"""A small schema language, enough to be as strict as Amplify's `additionalProperties: false`."""

import re
from collections.abc import Callable, Iterator, Mapping

Check = Callable[[object, str], Iterator[str]]
"""Yields what is wrong with a value found at a path; nothing if it is fine."""


def text(
    *,
    max_length: int | None = None,
    min_length: int = 0,
    pattern: str = "",
    among: frozenset[str] | None = None,
) -> Check:
    """A string within bounds, fully matching `pattern`, or one of `among`."""

    def check(value: object, path: str) -> Iterator[str]:
        if not isinstance(value, str):
            yield f"{path}: must be a string"
        elif among is not None and value not in among:
            yield f"{path}: must be one of {', '.join(sorted(among))}; got '{value}'"
        elif pattern and not re.fullmatch(pattern, value):
            yield f"{path}: must match {pattern}; got '{value}'"
        elif len(value) < min_length or (max_length is not None and len(value) > max_length):
            yield f"{path}: must have {min_length} to {max_length} characters"

    return check


def one_of(*values: str) -> Check:
    """One of a few exact spellings."""
    return text(among=frozenset(values))


def number(minimum: float = 0, maximum: float = 999_999_999, *, whole: bool = False) -> Check:
    """A JSON number in [minimum, maximum]; a boolean is none."""

    def check(value: object, path: str) -> Iterator[str]:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            yield f"{path}: must be {'an integer' if whole else 'a number'}"
        elif isinstance(value, int | float) and not minimum <= value <= maximum:
            yield f"{path}: must lie in {minimum}..{maximum}"

    return check


def flag(value: object, path: str) -> Iterator[str]:
    """true or false."""
    if not isinstance(value, bool):
        yield f"{path}: must be true or false"


def free_object(value: object, path: str) -> Iterator[str]:
    """An object with anything in it."""
    if not isinstance(value, dict):
        yield f"{path}: must be an object"


def items(item: Check, *, least: int = 0) -> Check:
    """A list of at least `least` items."""

    def check(value: object, path: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{path}: must be a list"
            return
        if len(value) < least:
            yield f"{path}: needs at least {least} item(s)"
        for number_, each in enumerate(value):
            yield from item(each, f"{path}[{number_}]")

    return check


def text_map(value: object, path: str) -> Iterator[str]:
    """`string -> string`, no nulls (amplify.md 2.5, attributes)."""
    if not isinstance(value, dict):
        yield f"{path}: must be an object"
        return
    for key, each in value.items():
        if not isinstance(each, str):
            yield f"{path}.{key}: must be a string"


def struct(fields: Mapping[str, Check], *required: str) -> Check:
    """An object with these fields and no others."""

    def check(value: object, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: must be an object"
            return
        for name in required:
            if value.get(name) is None:
                yield f"{path}.{name}: is required"
        for name, each in value.items():
            if name not in fields:
                yield f"{path}.{name}: unknown property"
            elif each is not None:
                yield from fields[name](each, f"{path}.{name}")
            elif name not in required:
                yield f"{path}.{name}: must not be null"

    return check


def by_type(variants: Mapping[str, tuple[Mapping[str, Check], tuple[str, ...]]]) -> Check:
    """An object whose `type` decides its fields: {type: (further fields, required ones)}."""
    known = one_of(*variants)

    def check(value: object, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: must be an object"
        elif not isinstance(value.get("type"), str) or value["type"] not in variants:
            yield from known(value.get("type"), f"{path}.type")
        else:
            fields, required = variants[value["type"]]
            yield from struct({"type": known, **fields}, "type", *required)(value, path)

    return check
