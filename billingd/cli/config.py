"""`check-config` and `config show`: what is configured, where it comes from, and what is wrong with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.notify import channel_faults
from billingd.cli.reach import driver_faults

if TYPE_CHECKING:
    from billingd.settings import Fault, Settings


def faults_for_run(settings: "Settings") -> "list[Fault]":
    """Everything that would stop `run` although each value alone is well formed."""
    from billingd import tls
    from billingd.settings import missing_for_run

    found = missing_for_run(settings) + driver_faults(settings) + channel_faults(settings)
    return found + tls.faults(settings.webhooks)


@click.command("check-config")
@click.pass_obj
def check_config(config: Path | None) -> None:
    """Check the configuration; print every fault with its key.

    \b
    Example:
      billingd --config billingd.toml check-config
    """
    from billingd.settings import ConfigurationError, load

    try:
        loaded = load(config)
    except ConfigurationError as error:
        more = faults_for_run(error.partial) if error.partial is not None else []
        named = {fault.key for fault in error.faults}
        raise ConfigurationError(error.faults + [one for one in more if one.key not in named]) from None
    if faults := faults_for_run(loaded.settings):
        raise ConfigurationError(faults)
    output.say("configuration is sound")
    for line in _read_from(config, loaded.origins, os.environ):
        output.say(line)
    if loaded.settings.traffic.source == "search":
        output.note('warning: traffic.source: "search" counts sampled traffic, which may miss some')


def _read_from(config: Path | None, origins: Mapping[str, str], env: Mapping[str, str]) -> list[str]:
    """The configuration file, the directories of secrets and the variables that were read, a line each."""
    from billingd.settings.load import DEFAULT_CONFIG

    named = config or env.get("BILLINGD_CONFIG") or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    lines = [f"file: {named}" if named else "file: none"]
    keys: dict[str, list[str]] = {}
    for key, origin in origins.items():
        keys.setdefault(origin, []).append(key)
    keys.pop(str(named), None)
    variables = keys.pop("environment", [])
    lines += [f"secrets: {directory} ({', '.join(sorted(found))})" for directory, found in keys.items()]
    if variables:
        lines.append(f"environment: {', '.join(sorted(variables))}")
    return lines


@click.group()
def config() -> None:
    """Show the configuration.

    \b
    Example:
      billingd config show
    """


@config.command()
@output.json_option
@click.pass_obj
def show(config: Path | None, as_json: bool) -> None:
    """Print every key with its effective value and where that came from; secrets are masked.

    \b
    Example:
      billingd --config billingd.toml config show
      billingd config show --json
    """
    from billingd.settings import load, shown

    loaded = load(config)
    directory = loaded.settings.secrets_dir
    first = {
        "key": "secrets_dir",
        "value": None if directory is None else str(directory),
        "origin": loaded.origins.get("secrets_dir", "default"),
    }
    rows = [first, *shown(loaded)]
    if as_json:
        output.document({"settings": rows})
        return
    output.table(
        ["KEY", "VALUE", "FROM"], ([row["key"], _written(row["value"]), row["origin"]] for row in rows)
    )


def _written(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_written(item) for item in value)}]"
    if value is None:
        return "-"
    if isinstance(value, str) and value != "(set)":
        return f'"{value}"'
    return str(value)
