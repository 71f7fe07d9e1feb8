"""Values as they are written in the configuration: durations, listening addresses, URLs."""

import ipaddress
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, PlainSerializer

_UNITS: Final[Mapping[str, timedelta]] = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}
PORT_MAX: Final = 65_535
DURATION: Final = re.compile(r"([0-9]+)(ms|s|m|h|d)")


def parse_duration(value: object) -> timedelta:
    """`200ms`, `90s`, `15m`, `2h`, `3d` as a timedelta. Raises ValueError."""
    if isinstance(value, timedelta):
        return value
    match = DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f'{value!r} is not a duration; write a whole number and ms, s, m, h or d, as in "90s"'
        )
    try:
        return int(match[1]) * _UNITS[match[2]]
    except OverflowError as error:
        raise ValueError(f"{value!r} is longer than any duration billingd can work with") from error


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads as this."""
    for unit in ("d", "h", "m", "s"):
        if value % _UNITS[unit] == timedelta(0):
            return f"{value // _UNITS[unit]}{unit}"
    return f"{value // _UNITS['ms']}ms"


Duration = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration)]


def positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("must be longer than nothing")
    return value


PositiveDuration = Annotated[Duration, BeforeValidator(lambda v: positive(parse_duration(v)))]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_port(value: str) -> tuple[str, int]:
    """`HOST:PORT` (or `[IPv6]:PORT`) in its two parts. Raises ValueError."""
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError('must be HOST:PORT, as in "127.0.0.1:8080"')
    if int(port) > PORT_MAX:
        raise ValueError(f"has no such port: {port} is more than {PORT_MAX}")
    return host, int(port)


def safe_url(value: str) -> str:
    """An https URL, or plain http on loopback only, without a slash at its end. Raises ValueError."""
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a URL that begins with https://")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError("must be https: plain http is for loopback only")
    return value.rstrip("/")
