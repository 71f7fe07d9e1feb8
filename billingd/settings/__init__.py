"""The configuration of billingd (contract: TOML, environment, secret files)."""

from billingd.settings.load import (
    ConfigurationError,
    Fault,
    Loaded,
    Settings,
    load,
    missing_for_run,
    placed,
    shown,
)
from billingd.settings.values import format_duration, host_port, is_loopback, parse_duration

__all__ = [
    "ConfigurationError",
    "Fault",
    "Loaded",
    "Settings",
    "format_duration",
    "host_port",
    "is_loopback",
    "load",
    "missing_for_run",
    "parse_duration",
    "placed",
    "shown",
]
