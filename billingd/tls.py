"""TLS for the webhook listener from a certificate's files, read again when they change."""

import ssl
from pathlib import Path
from typing import Final

from billingd.settings import ConfigurationError, Fault, WebhookSettings

CERT_KEY: Final = "webhooks.tls_cert"
KEY_KEY: Final = "webhooks.tls_key"


def context(settings: WebhookSettings) -> ssl.SSLContext | None:
    """How connections are encrypted, None when they are not. Raises ConfigurationError naming the key."""
    if not settings.tls_cert:
        return None
    for name, path in ((CERT_KEY, settings.tls_cert), (KEY_KEY, settings.tls_key)):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise ConfigurationError([Fault(name, f"cannot be read from {path}: {error.strerror}")]) from None
        except ValueError:  # a NUL in it
            raise ConfigurationError([Fault(name, "is not a path")]) from None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # the empty password keeps a locked key from asking for one on the terminal
        made.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigurationError([_fault(settings, error)]) from None
    return made


def _fault(settings: WebhookSettings, error: Exception) -> Fault:
    reason = str(getattr(error, "reason", "") or "")
    if "MISMATCH" in reason:
        return Fault(KEY_KEY, f"{settings.tls_key} is not the key of {settings.tls_cert}")
    return Fault(
        CERT_KEY,
        f"{settings.tls_cert} and {settings.tls_key} must be a certificate (its chain below it) and its "
        "unlocked private key, in PEM",
    )


def stamps(settings: WebhookSettings) -> tuple[tuple[int, int], ...]:
    """Something that changes when the files do; a file that is missing counts as empty."""
    found = []
    for path in filter(None, (settings.tls_cert, settings.tls_key)):
        try:
            about = Path(path).stat()
        except OSError:
            found.append((0, 0))
        else:
            found.append((about.st_mtime_ns, about.st_ino))
    return tuple(found)


def faults(settings: WebhookSettings) -> list[Fault]:
    """What keeps the certificate from being used."""
    try:
        context(settings)
    except ConfigurationError as error:
        return error.faults
    return []
