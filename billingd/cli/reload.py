"""`reload`: the running daemon reads its configuration again."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.talk import Daemon

if TYPE_CHECKING:
    from billingd.settings import Settings


@click.command()
@output.json_option
@click.pass_obj
def reload(config: Path | None, as_json: bool) -> None:
    """Let the running daemon check its configuration and take over what can change while it runs.

    That is webhooks.secret, auth, body_bytes_max, tls_cert and tls_key; whatever else changed is named and
    waits for a restart. With any fault nothing changes, and the exit code is 2. SIGHUP does the same and
    logs what came of it.

    \b
    Example:
      billingd reload
      systemctl reload billingd
    """
    from billingd.settings import ConfigurationError, Fault

    listen = _settings(config).admin.listen
    said: dict[str, Any] = asyncio.run(Daemon(listen).post("/reload", key="faults"))
    if said["faults"]:
        raise ConfigurationError([Fault(one["key"], one["message"]) for one in said["faults"]])
    if as_json:
        output.document({"reloaded": said["reloaded"], "restart": said["restart"]})
        return
    output.say(f"reloaded: {', '.join(said['reloaded']) or 'nothing had changed'}")
    if said["restart"]:
        output.note(f"changed, and waiting for a restart: {', '.join(said['restart'])}")


def _settings(config: Path | None) -> "Settings":
    """What says where the daemon is: it judges the rest, for it sees secrets that may be hidden from us."""
    from billingd import logs
    from billingd.settings import ConfigurationError, load

    logs.configure(level="warning")
    try:
        return load(config).settings
    except ConfigurationError as error:
        if error.partial is None:
            raise
        return error.partial
