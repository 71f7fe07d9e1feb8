"""`run`: the daemon."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from billingd.cli.config import everything_wrong

if TYPE_CHECKING:
    from billingd.settings import Fault, Settings

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FORMATS: Final = {"json": True, "text": False, "": None}


@click.command()
@click.pass_obj
def run(config: Path | None) -> None:
    """Run the daemon until SIGTERM or SIGINT, then drain; SIGHUP is `billingd reload`.

    Brings the store up to date first, after a backup on SQLite. Logs go to standard error;
    $BILLINGD_LOG_LEVEL (debug, info, warning, error, critical) and $BILLINGD_LOG_FORMAT (json, text) shape
    them.

    \b
    Example:
      billingd --config /etc/billingd/billingd.toml run
      BILLINGD_LOG_FORMAT=json BILLINGD_LOG_LEVEL=debug billingd run
    """
    from billingd import logs
    from billingd.settings import ConfigurationError, secrets_of

    level = os.environ.get("BILLINGD_LOG_LEVEL", "").lower() or "info"
    form = os.environ.get("BILLINGD_LOG_FORMAT", "").lower()
    blotter = logs.Blotter()

    def read() -> "Settings":
        settings, faults = everything_wrong(config)
        faults = log_faults(os.environ) + faults
        if faults or settings is None:
            raise ConfigurationError(faults)
        blotter.learn(secrets_of(settings))
        return settings

    settings = read()
    logs.configure(level=level, json=FORMATS[form], blotter=blotter)
    from billingd import daemon

    asyncio.run(daemon.run(settings, read))


def log_faults(env: Mapping[str, str]) -> "list[Fault]":
    """What is wrong with the two variables that shape the logs."""
    from billingd.settings import Fault

    faults = []
    if (env.get("BILLINGD_LOG_LEVEL", "").lower() or "info") not in LEVELS:
        faults.append(Fault("BILLINGD_LOG_LEVEL", f"must be one of {', '.join(LEVELS)}"))
    if env.get("BILLINGD_LOG_FORMAT", "").lower() not in FORMATS:
        faults.append(Fault("BILLINGD_LOG_FORMAT", "must be json or text"))
    return faults
