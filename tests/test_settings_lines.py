"""Where each key of a TOML file stands: by example, and for any document that tomllib reads."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.settings.lines import lines_of

DOCUMENT = '''# a comment with [brackets] and "quotes
secrets_dir = "/run" # more
[amplify]
region = "us"
"client_id" = 'a # b'

[notifications]
provider = [   # the first
  "json://a/[x]",
  """
many
lines""", # comment, with a comma
  'json://c',
]
subscriber = """\\
  mailto://x"""
[traffic]
window = 1979-05-27T07:32:00Z
outbox.lease = "2m"
store = { url = "x", keep = [1, 2] }
[[more]]
one = 1
[[more]]
two = 2'''


def test_every_key_has_its_line() -> None:
    assert lines_of(DOCUMENT) == {
        ("secrets_dir",): 2,
        ("amplify",): 3,
        ("amplify", "region"): 4,
        ("amplify", "client_id"): 5,
        ("notifications",): 7,
        ("notifications", "provider"): 8,
        ("notifications", "provider", 0): 9,
        ("notifications", "provider", 1): 10,
        ("notifications", "provider", 2): 13,
        ("notifications", "subscriber"): 15,
        ("traffic",): 17,
        ("traffic", "window"): 18,
        ("traffic", "outbox", "lease"): 19,
        ("traffic", "store"): 20,
        ("traffic", "store", "url"): 20,
        ("traffic", "store", "keep"): 20,
        ("traffic", "store", "keep", 0): 20,
        ("traffic", "store", "keep", 1): 20,
        ("more", 0): 21,
        ("more", 0, "one"): 22,
        ("more", 1): 23,
        ("more", 1, "two"): 24,
    }


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """The paths of everything that is neither a table nor a list."""
    if isinstance(value, dict):
        return {leaf for key, each in value.items() for leaf in leaves(each, (*path, key))}
    if isinstance(value, list):
        return {leaf for number, each in enumerate(value) for leaf in leaves(each, (*path, number))}
    return {path}


PIECES = st.sampled_from(
    [
        *("a = 1", "b.c = true", "'q' = \"#\"", "d = [1, [2, 3], '''x\ny''']", "e = { f = [ ], g = 1 }"),
        *(
            "[t]",
            "[u.v]",
            "[[w]]",
            "# [x]",
            "",
            'h = """\n"quoted\\" " # no comment"""',
            "i = [\n1, # one\n]",
        ),
        *("j = 2026-01-01", "k = -1.5e3 # after", 'l = "\\"#\\\\"', "m = ''", 'n = """"two"" quotes"""'),
    ]
)


@given(st.lists(PIECES, max_size=12).map("\n".join))
def test_no_key_of_any_document_is_missed(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    found = lines_of(text)
    assert leaves(document) <= set(found)
    rows = text.split("\n")
    for path, line in found.items():
        last = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
        assert isinstance(path[-1], int) or last in rows[line - 1]


@pytest.mark.parametrize("text", ["", "\n\n", "# only"])
def test_a_file_may_be_empty(text: str) -> None:
    assert lines_of(text) == {}
