"""The command line (contract section 2), one file per group; what is heavy is imported inside commands."""

from pathlib import Path
from typing import Any

import click

from billingd import __version__
from billingd.cli import output
from billingd.cli.adopt import adopt
from billingd.cli.completion import completion
from billingd.cli.config import check_config, config
from billingd.cli.db import db
from billingd.cli.demo import demo
from billingd.cli.doctor import doctor
from billingd.cli.explain import explain
from billingd.cli.held import held
from billingd.cli.hooks import hooks
from billingd.cli.man import man
from billingd.cli.metrics import metrics
from billingd.cli.notify import notify
from billingd.cli.outbox import outbox
from billingd.cli.reconcile import reconcile
from billingd.cli.reload import reload
from billingd.cli.resync import resync
from billingd.cli.run import run
from billingd.cli.sandbox import sandbox
from billingd.cli.status import status
from billingd.cli.traffic import traffic
from billingd.domain.errors import BillingdError


class Program(click.Group):
    """Turns what a command raises into a message on stderr and the contract's exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except BillingdError as error:
            ctx.exit(output.fail(error))
        except (KeyboardInterrupt, click.Abort) as error:
            # at a prompt click raises Abort for Ctrl-C, for the end of input, and for "no" alike
            if isinstance(error, click.Abort) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            prompt = isinstance(error, click.Abort)  # whose line is not ended yet
            click.echo("\ninterrupted" if prompt else "interrupted", err=True)
            ctx.exit(output.INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are added, which is the order of use."""
        return list(self.commands)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Configuration file; default $BILLINGD_CONFIG, else /etc/billingd/billingd.toml if it exists.",
)
@click.pass_context
def program(ctx: click.Context, config: Path | None) -> None:
    """Bills Axway Amplify Marketplace subscriptions through Recurly: every unit once, never twice.

    Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 found something a person must look at;
    4 daemon or far side not reachable; 5 the store is held by another process or newer than this program;
    130 interrupted.

    \b
    Example:
      billingd --config billingd.toml check-config
      billingd --config billingd.toml run
    """
    ctx.obj = config


for command in (
    run,
    demo,
    sandbox,
    check_config,
    config,
    doctor,
    reload,
    status,
    outbox,
    traffic,
    resync,
    reconcile,
    held,
    explain,
    adopt,
    hooks,
    notify,
    metrics,
    db,
    completion,
    man,
):
    program.add_command(command)
