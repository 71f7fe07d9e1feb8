"""On which line of a TOML file each key stands; `tomllib` reads the values, and forgets where they were."""

import re
from collections.abc import Mapping
from typing import Final

Path = tuple[str | int, ...]
"""A key by its tables, as in ("traffic", "window"); a number is a place in a list."""

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def lines_of(text: str) -> Mapping[Path, int]:
    """The line of every table, key and item of a list, counted from 1. The text must be TOML."""
    found: dict[Path, int] = {}
    reader = _Reader(text, found)
    table: Path = ()
    numbers: dict[Path, int] = {}
    while reader.skip(newlines=True):
        line = reader.line
        if reader.take("[["):
            name = reader.key()
            reader.take("]]")
            numbers[name] = numbers.get(name, -1) + 1
            table = (*name, numbers[name])
        elif reader.take("["):
            table = reader.key()
            reader.take("]")
        else:
            reader.pair(table)
            continue
        found.setdefault(table, line)
    return found


class _Reader:
    """Walks through a document that is known to be well formed, so that nothing needs to be refused."""

    def __init__(self, text: str, found: dict[Path, int]) -> None:
        self._text = text
        self._at = 0
        self.line = 1
        self._found = found

    def skip(self, *, newlines: bool) -> bool:
        """Pass over blanks and comments; whether anything is left."""
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif character in " \t\r" or (newlines and character == "\n"):
                self._on(1)
            else:
                return True
        return False

    def take(self, word: str) -> bool:
        """Pass over exactly this, if it is next."""
        if self._text.startswith(word, self._at):
            self._on(len(word))
            return True
        return False

    def key(self) -> Path:
        """A key, perhaps dotted and quoted."""
        parts = []
        while True:
            self.skip(newlines=False)
            if self._text[self._at] in "\"'":
                parts.append(self._string())
            else:
                match = _BARE.match(self._text, self._at)
                assert match is not None
                parts.append(match[0])
                self._on(len(match[0]))
            self.skip(newlines=False)
            if not self.take("."):
                return tuple(parts)

    def pair(self, table: Path) -> None:
        """`key = value`, with all that the value holds."""
        line, key = self.line, (*table, *self.key())
        self._found.setdefault(key, line)
        self.take("=")
        self.skip(newlines=False)
        self._value(key)

    def _value(self, path: Path) -> None:
        if self._text[self._at] in "\"'":
            self._string()
        elif self.take("["):
            number = 0
            while self.skip(newlines=True) and not self.take("]"):
                self._found.setdefault((*path, number), self.line)
                self._value((*path, number))
                self.skip(newlines=True)
                self.take(",")
                number += 1
        elif self.take("{"):
            while self.skip(newlines=True) and not self.take("}"):
                self.pair(path)
                self.skip(newlines=True)
                self.take(",")
        else:  # a number, a time, true or false
            while self._at < len(self._text) and self._text[self._at] not in ",]}#\n":
                self._on(1)

    def _string(self) -> str:
        """Its raw text: keys that need escapes are none of ours."""
        quote = self._text[self._at]
        if self.take(quote * 3):
            begin = self._at
            while not self._text.startswith(quote * 3, self._at):
                self._on(2 if quote == '"' and self._text[self._at] == "\\" else 1)
            end = self._at
            while self._at < len(self._text) and self._text[self._at] == quote:  # up to two belong to it
                self._on(1)
            return self._text[begin:end]
        self._on(1)
        begin = self._at
        while self._text[self._at] != quote:
            self._on(2 if quote == '"' and self._text[self._at] == "\\" else 1)
        self._on(1)
        return self._text[begin : self._at - 1]

    def _on(self, characters: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + characters)
        self._at += characters
