"""What is blotted out of all that is logged or kept as an error: e-mail addresses, and known secrets."""

import base64
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

HIDDEN: Final = "[hidden]"

SECRET_LENGTH_MIN: Final = 6
"""Anything shorter would blot out half of every line, and is no secret."""

_ADDRESS: Final = re.compile(r"[\w.!#$'*+~-]+(?:@|%40)[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")


def without_addresses(text: str) -> str:
    """A text in which nobody's e-mail address stands."""
    return _ADDRESS.sub(HIDDEN, text) if "@" in text or "%40" in text else text


def forms(secrets: Iterable[str]) -> list[str]:
    """The secrets in the forms in which they may be quoted: as they are, in a URL, as Basic authorization."""
    found = set()
    for secret in secrets:
        for part in {secret, *secret.split()}:
            if len(part) >= SECRET_LENGTH_MIN:
                whole = base64.b64encode(f"{part}:".encode()).decode()
                found |= {part, quote(part, safe=""), base64.b64encode(part.encode()).decode(), whole}
    return sorted(found, key=lambda form: (-len(form), form))
