"""What is blotted out of all that is logged or kept as an error: e-mail addresses, and known secrets.

A process knows its secrets from when it has read them, for as long as it runs: what was one may still be.
"""

import base64
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

HIDDEN: Final = "[hidden]"

SECRET_LENGTH_MIN: Final = 6
"""Anything shorter would blot out half of every line, and is no secret."""

PUBLIC: Final = frozenset({"billingd"})
"""What stands in every hint and path, and hides nothing, whoever takes it for a password."""

_ADDRESS: Final = re.compile(r"[\w.!#$'*+~-]+(?:@|%40)[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")


def without_addresses(text: str) -> str:
    """A text in which nobody's e-mail address stands."""
    return _ADDRESS.sub(HIDDEN, text) if "@" in text or "%40" in text else text


class Known:
    """The secrets of this process."""

    def __init__(self) -> None:
        self._secrets: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secrets: Iterable[str]) -> None:
        """Let these stand in no error from now on."""
        self._keep(self._secrets.union(secrets))

    def forget(self) -> None:
        """Know none, as at the start."""
        self._keep(frozenset())

    def _keep(self, secrets: frozenset[str]) -> None:
        if secrets != self._secrets:
            self._secrets = secrets
            shapes = forms(secrets)
            self._pattern = re.compile("|".join(map(re.escape, shapes))) if shapes else None

    def without(self, text: str) -> str:
        """A text in which none of them stands, in whatever form."""
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)


KNOWN: Final = Known()


def forms(secrets: Iterable[str]) -> list[str]:
    """The secrets in the forms in which they may be quoted: as they are, in a URL, as Basic authorization."""
    found = set()
    for secret in secrets:
        for part in {secret, *secret.split()}:
            if len(part) >= SECRET_LENGTH_MIN and part not in PUBLIC:
                whole = base64.b64encode(f"{part}:".encode()).decode()
                found |= {part, quote(part, safe=""), base64.b64encode(part.encode()).decode(), whole}
    return sorted(found, key=lambda form: (-len(form), form))
