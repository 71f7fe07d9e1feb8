"""Tells people: the provider through any Apprise URL, the subscriber by mail.

Apprise URLs hold passwords and webhook secrets, and Apprise logs them; here only their scheme is ever shown.
"""

import asyncio
import logging
import re
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final
from urllib.parse import quote

import apprise

from billingd.domain.errors import Permanent, Retryable

SECONDS_MAX: Final = 30.0
TITLE_LENGTH_MAX: Final = 200
PLACEHOLDER: Final = "{email}"
_ADDRESS: Final = re.compile(r"[^@\s,;:<>\"'()\[\]\\]+@[^@\s,;:<>\"'()\[\]\\/?&#%]+")
_ERROR: Final = re.compile(r"\berror=(\d{3})\b")

_WHY: Final = {
    "Connection refused": "connection refused",
    "Name or service not known": "its host's name is not known",
    "Temporary failure in name resolution": "its host's name cannot be looked up",
    "No address associated with hostname": "its host has no address",
    "Network is unreachable": "network unreachable",
    "No route to host": "no route to its host",
    "Connection reset": "connection reset",
    "timed out": "no answer in time",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted",
}
"""What the network says of a failure, and how it is told: never Apprise's own text, which may quote a URL."""

_statuses: ContextVar[list[str] | None] = ContextVar("announce_statuses", default=None)


class Announcer:
    """Sends to each configured channel, in threads, for Apprise blocks."""

    def __init__(
        self, provider_urls: Sequence[str], subscriber_template: str, *, seconds_max: float = SECONDS_MAX
    ) -> None:
        _hush()
        self._seconds_max = seconds_max
        self._channels: dict[str, str] = {}
        for number, url in enumerate(provider_urls):
            key = f"notifications.provider[{number}]"
            _checked(key, url)
            self._channels[f"{key} ({_scheme(url)})"] = url
        if subscriber_template:
            if PLACEHOLDER not in subscriber_template:
                raise ValueError(f"notifications.subscriber must contain {PLACEHOLDER}")
            _checked("notifications.subscriber", _addressed(subscriber_template, "somebody@example.com"))
        self._template = subscriber_template

    @property
    def names(self) -> tuple[str, ...]:
        """The provider's channels: key and scheme of each."""
        return tuple(self._channels)

    async def tell(self, name: str, title: str, body: str) -> None:
        """Tell one channel of the provider's. Raises Retryable when it did not take the message."""
        await self._tell(name, self._channels[name], title, body)

    async def tell_subscriber(self, email: str | None, title: str, body: str) -> bool:
        """Mail the subscriber; False when mail is switched off or nobody knows the address."""
        if not self._template or not email:
            return False
        if not _ADDRESS.fullmatch(email):
            # Anything else could name further recipients, or further channels.
            raise Permanent("the subscriber's e-mail address is not one plain address")
        url = _addressed(self._template, email)
        await self._tell(f"notifications.subscriber ({_scheme(url)})", url, title, body)
        return True

    async def _tell(self, channel: str, url: str, title: str, body: str) -> None:
        title = " ".join(title.split())[:TITLE_LENGTH_MAX]
        try:
            async with asyncio.timeout(self._seconds_max):
                # The thread outlives a timeout; Apprise's own socket timeouts (4 s, mail 15 s) end it.
                fault = await asyncio.to_thread(_send, url, title, body)
        except TimeoutError:
            raise Retryable(f"{channel} did not take the message within {self._seconds_max:g} s") from None
        if fault is not None:
            raise Retryable(f"{channel} did not take the message{fault}")


def _send(url: str, title: str, body: str) -> str | None:
    """Runs in a thread: None, or what is known of the failure."""
    statuses: list[str] = []
    _statuses.set(statuses)  # a thread of to_thread has a context of its own
    notifier = apprise.Apprise(asset=_asset())
    if not notifier.add(url):
        return ": Apprise does not understand its URL"
    if notifier.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT):
        return None
    return f" ({', '.join(statuses)})" if statuses else ""


def _asset() -> apprise.AppriseAsset:
    # async_mode would open threads and loops of its own.
    return apprise.AppriseAsset(app_id="billingd", app_desc="billingd", async_mode=False)


def _checked(key: str, url: str) -> None:
    with warnings.catch_warnings():
        # The first URL makes Apprise import its hundred services, some of them over deprecated modules.
        warnings.simplefilter("ignore", DeprecationWarning)
        understood = isinstance(url, str) and apprise.Apprise(asset=_asset()).add(url)
    if not understood:
        raise ValueError(f"{key}: Apprise does not understand this URL (scheme: {_scheme(url)})")


def _scheme(url: str) -> str:
    found = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,31})://", url) if isinstance(url, str) else None
    return found[1].lower() if found else "none"


def _addressed(template: str, email: str) -> str:
    return template.replace(PLACEHOLDER, quote(email, safe=""))


class _Silence(logging.Filter):
    """Keeps Apprise's records, which quote URLs, out of every log; notes only what failed, in our words."""

    def filter(self, record: logging.LogRecord) -> bool:
        statuses = _statuses.get()
        if statuses is not None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                statuses += [f"HTTP {status}" for status in _ERROR.findall(text)]
            statuses += [why for words, why in _WHY.items() if words in text and why not in statuses]
        return False


def _hush() -> None:
    """Silence the two loggers that would write down the URLs: Apprise's, and the HTTP client's under it."""
    logger = logging.getLogger("apprise")
    if not any(isinstance(each, _Silence) for each in logger.filters):
        logger.addFilter(_Silence())
        logger.setLevel(logging.DEBUG)  # only there Apprise says why; the filter lets nothing through
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
