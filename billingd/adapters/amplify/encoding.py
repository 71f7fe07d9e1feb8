"""What goes into a request and comes out of an answer, as text: JSON, RSQL, paths, header values."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Final, TypeAlias
from urllib.parse import quote, urlencode

from billingd.domain.errors import Permanent

Json: TypeAlias = "bool | int | Decimal | str | list[Json] | dict[str, Json] | None"

NAME_LENGTH_MAX: Final = 350
RETRY_AFTER_MAX: Final = timedelta(days=1)
_PLAIN_VALUE: Final = re.compile(r"[A-Za-z0-9._-]+")


def decode(body: bytes) -> Json:
    """JSON with fractions as Decimal, so that no price passes through float; ValueError if it is not JSON."""
    try:
        value: Json = json.loads(body, parse_float=Decimal, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _no_constant(word: str) -> Json:
    raise ValueError(f"{word} is not JSON")


def encode(value: object) -> str:
    """JSON with each Decimal written digit for digit (json.dumps knows only float)."""
    match value:
        case Decimal():
            return str(value)
        case Mapping():
            return (
                "{"
                + ", ".join(f"{json.dumps(str(key))}: {encode(each)}" for key, each in value.items())
                + "}"
            )
        case list() | tuple():
            return "[" + ", ".join(map(encode, value)) + "]"
        case _:
            return json.dumps(value, allow_nan=False)


def segment(name: str) -> str:
    """One resource name as one URL path segment; nothing in it can reach another path (RFC 3986 3.3)."""
    if name in ("", ".", "..") or len(name) > NAME_LENGTH_MAX:
        raise Permanent(f"{name[:60]!r} cannot be the name of an Amplify resource")
    return quote(name, safe="")


def query_string(params: Iterable[tuple[str, str]]) -> str:
    """`?a=b&c=d` with every special character escaped (RSQL is full of `=` and `;`), or nothing."""
    text = urlencode(list(params), quote_via=quote, safe="")
    return f"?{text}" if text else ""


def equals(field: str, value: str) -> str:
    """An RSQL comparison that takes the value literally: `==` would know wildcards (amplify.md 2.4)."""
    if not _PLAIN_VALUE.fullmatch(value):
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{field}==={value}"


def all_of(conditions: Sequence[str]) -> str:
    """RSQL conditions joined by "and"."""
    return ";".join(conditions)


def pointer(*keys: str) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in keys)


def retry_after(value: str | None, now: datetime) -> timedelta | None:
    """What a Retry-After header asks for, in seconds or as an HTTP date (RFC 9110 10.2.3)."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return min(timedelta(seconds=int(text[:9])), RETRY_AFTER_MAX)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return min(max(moment - now, timedelta(0)), RETRY_AFTER_MAX)


def date_of(header: str | None) -> datetime | None:
    """When the far side answered (an HTTP `Date`), in whole seconds; None where it does not say."""
    try:
        date = parsedate_to_datetime(header or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def moment_of(text: str) -> datetime:
    """An Amplify time (`+0000`, `+00:00`, `Z`, no zone: UTC) as aware UTC; ValueError if it is none."""
    moment = datetime.fromisoformat(text)
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("it is before or after all time") from error


def epoch_ms(moment: datetime) -> int:
    """Milliseconds since the epoch, as Traceability counts time (amplify.md 6.2)."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
