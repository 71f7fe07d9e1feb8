"""`check-config` and `config show`: what is configured, where it comes from, and what is wrong with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.notify import channel_faults, template_faults
from billingd.cli.reach import driver_faults

if TYPE_CHECKING:
    from billingd.settings import Fault, Settings


def faults_for_run(settings: "Settings") -> "list[Fault]":
    """Everything that would stop `run` although each value alone is well formed."""
    from billingd import tls
    from billingd.settings import missing_for_run

    return (
        missing_for_run(settings)
        + driver_faults(settings)
        + channel_faults(settings)
        + template_faults(settings)
        + tls.faults(settings.webhooks)
    )


def everything_wrong(config: Path | None) -> "tuple[Settings | None, list[Fault]]":
    """Every fault at once, each with its place; the settings as far as they can be told, else None."""
    from billingd.settings import ConfigurationError, load, placed

    try:
        loaded = load(config)
    except ConfigurationError as error:
        more = [] if error.partial is None else placed(faults_for_run(error.partial), error.places)
        named = {fault.key for fault in error.faults}
        faults = error.faults + [one for one in more if one.key not in named]
        return error.partial, ConfigurationError(faults).faults
    return loaded.settings, ConfigurationError(placed(faults_for_run(loaded.settings), loaded.places)).faults


@click.command("check-config", short_help="Check the configuration; name every fault at once.")
@output.json_option
@click.pass_context
def check_config(ctx: click.Context, as_json: bool) -> None:
    """Check the configuration; name every fault at once, each with its place and its key: FILE:LINE, the
    variable, or the secret file. Asks nobody; `billingd doctor` tries what is configured.

    \b
    Example:
      billingd --config billingd.toml check-config
      billingd check-config --json
    """
    from billingd.settings import ConfigurationError, load

    config: Path | None = ctx.obj
    settings, faults = everything_wrong(config)
    sampled = settings is not None and settings.traffic.source == "search"
    warnings = ['traffic.source: "search" counts sampled traffic, which may miss some'] if sampled else []
    if as_json:
        rows = [{"key": one.key, "message": one.message, "place": one.place or None} for one in faults]
        output.document({"sound": not faults, "faults": rows, "warnings": warnings})
        ctx.exit(output.MISUSED if faults else 0)
    if faults:
        raise ConfigurationError(faults)
    output.say("configuration is sound")
    for line in _read_from(config, load(config).origins, os.environ):
        output.say(line)
    for warning in warnings:
        output.note(f"warning: {warning}")


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
