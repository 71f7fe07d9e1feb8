"""`reload`: the running daemon reads its configuration again."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import RESTART_IT
from billingd.cli.talk import Another, Daemon, DaemonAway, DaemonHangs

if TYPE_CHECKING:
    from billingd.settings import Settings


@click.command()
@output.json_option
@click.pass_context
def reload(ctx: click.Context, as_json: bool) -> None:
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

    said = asyncio.run(_reload(_settings(ctx.obj).admin.listen))
    faults, reloaded, restart = said["faults"], said.get("reloaded", []), said.get("restart", [])
    if as_json:
        output.document({"reloaded": reloaded, "restart": restart, "faults": faults})
        ctx.exit(output.MISUSED if faults else 0)
    if faults:
        raise ConfigurationError(
            [Fault(one["key"], one["message"], one.get("place") or "") for one in faults]
        )
    if reloaded or not restart:
        output.say(f"reloaded: {', '.join(reloaded) or 'nothing had changed'}")
    else:
        output.say("reloaded: nothing, for what changed cannot be taken over while it runs")
    if restart:
        output.note(f"waiting for a restart: {', '.join(restart)} (`systemctl restart billingd`)")


async def _reload(listen: str) -> dict[str, Any]:
    """What the daemon says; without one, how to get it. Raises Unreachable, Declined."""
    try:
        return await Daemon(listen).post("/reload", key="faults")
    except DaemonHangs as error:
        raise Unreachable(f"{error}, but listens there: it hangs; {RESTART_IT}") from None
    except Another as error:
        raise Unreachable(f"{error}; `billingd doctor --only daemon` tells more") from None
    except DaemonAway as error:
        raise Unreachable(f"{error}; `billingd run` or `systemctl start billingd` starts it") from None


def _settings(config: Path | None) -> "Settings":
    """What says where the daemon is: it judges the rest, for it sees secrets that may be hidden from us."""
    from billingd import logs
    from billingd.settings import ConfigurationError, load

    logs.configure(level="warning", json=False)  # whoever types a command reads them
    try:
        return load(config).settings
    except ConfigurationError as error:
        if error.partial is None:
            raise
        return error.partial
