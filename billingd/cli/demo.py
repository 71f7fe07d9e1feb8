"""`demo`: the whole job on this machine, against a sandbox, with the proof."""

import asyncio

import click

from billingd.cli import output


@click.command(short_help="Prove the whole job against a sandbox, to the unit.")
@click.option("--seconds", type=click.IntRange(min=1), help="How long to make traffic.")
@click.option("--store", "store_url", metavar="URL", help="Use this store instead of a temporary one.")
@output.json_option
@click.pass_context
def demo(ctx: click.Context, seconds: int | None, store_url: str | None, as_json: bool) -> None:
    """Bill a sandbox's subscriptions through an outage and a crash, and prove that every unit is there.

    Opens nothing to the network. Exits with 0 only when what was served, recorded, reported and billed
    agrees to the unit.

    \b
    Example:
      billingd demo
      billingd demo --seconds 20 --json
    """
    from pydantic import ValidationError

    from billingd import logs
    from billingd.settings.models import StoreSettings

    if store_url is not None:
        try:
            StoreSettings(url=store_url)
        except ValidationError as error:
            why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise click.BadParameter(why, param_hint="--store") from None
    logs.configure(level="warning")
    from billingd.demo import run_demo

    ctx.exit(asyncio.run(run_demo(seconds=seconds, as_json=as_json, store_url=store_url)))
