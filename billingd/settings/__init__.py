"""The configuration of billingd (contract: TOML, environment, secret files)."""

from billingd.settings.load import (
    SCHEMES,
    ConfigurationError,
    Fault,
    Loaded,
    Settings,
    flat,
    load,
    missing_for_run,
    passwords_in,
    placed,
    public,
    secrets_of,
    shown,
)
from billingd.settings.models import WebhookSettings
from billingd.settings.values import format_duration, host_port, is_loopback, parse_duration

__all__ = [
    "SCHEMES",
    "ConfigurationError",
    "Fault",
    "Loaded",
    "Settings",
    "WebhookSettings",
    "flat",
    "format_duration",
    "host_port",
    "is_loopback",
    "load",
    "missing_for_run",
    "parse_duration",
    "passwords_in",
    "placed",
    "public",
    "secrets_of",
    "shown",
]
