"""What the far sides, or anybody, might send: sound documents with weird values in random places."""

import copy
import os
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("BILLINGD_FUZZ_EXAMPLES", "25"))
"""How often each parser is tried; `make fuzz` tries more."""

TEXTS = [
    "",
    " ",
    "x" * 400,
    "\x00",
    "\ud800",
    "²",
    "unknown",
    "..",
    "true",
    "1e999999999",
    "-1e-999999999",
    "NaN",
    "Infinity",
    "9" * 5_000,
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "2026-02-30T00:00:00Z",
    "2026-W01-1",
    "2026-03-02T11:00:02.417+0000",
    "DELETING",
]
NUMBERS: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, -(2**63), 10**30),
    *(
        Decimal("1e999999999"),
        Decimal("-1e999999999"),
        Decimal("1e-999999999"),
        Decimal("0.1"),
        Decimal("1.0"),
    ),
]
leaves = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.text(max_size=20)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value in a document, its own included."""
    found: list[tuple[Any, ...]] = [()]
    if isinstance(document, dict):
        inner: list[tuple[Any, Any]] = list(document.items())
    elif isinstance(document, list):
        inner = list(enumerate(document))
    else:
        inner = []
    for key, value in inner:
        found += [(key, *rest) for rest in places(value)]
    return found


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value there; as it is where there is no such place any more."""
    if not path:
        return value
    changed = copy.copy(document)
    try:
        changed[path[0]] = put(document[path[0]], path[1:], value)
    except (KeyError, IndexError, TypeError):
        return document
    return changed


def mutated(sample: Any, *, of: st.SearchStrategy[Any] = values) -> st.SearchStrategy[Any]:
    """The sample with up to four values replaced."""
    where = st.sampled_from(places(sample))
    changes = st.lists(st.tuples(where, of), min_size=1, max_size=4)

    def apply(chosen: list[tuple[tuple[Any, ...], Any]]) -> Any:
        document = sample
        for path, value in chosen:
            document = put(document, path, value)
        return document

    return changes.map(apply)


def nothing_but(act: Callable[[], object], *typed: type[BaseException]) -> None:
    """Let it work, or raise one of these; anything else is a bug."""
    try:
        act()
    except typed:
        return
