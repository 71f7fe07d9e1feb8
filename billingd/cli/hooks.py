"""`hooks`: the resources through which Amplify tells billingd what happens: show, make, remove them."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from billingd.cli import output
from billingd.cli.output import Unreachable
from billingd.cli.reach import settings_of
from billingd.domain.errors import BillingdError, Conflict, Misconfigured, Retryable, Unknown

if TYPE_CHECKING:
    from billingd.adapters.amplify.management import Management
    from billingd.hooks import Step
    from billingd.settings import Settings

AFTERWARDS = "run the same command again: it does only what is left to do"


def _url(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    from billingd import hooks as parts

    try:
        return parts.webhook_url(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


url_option = click.option(
    "--webhook-url",
    "url",
    required=True,
    callback=_url,
    metavar="URL",
    help="Where Amplify reaches webhooks.listen; without a path, /webhooks/amplify is added.",
)


@click.group(short_help="Tell Amplify where to send its events; show or remove that again.")
def hooks() -> None:
    """Make Amplify tell billingd what happens: Integration, Secret, Webhook, ResourceHook and WatchTopic.

    Talks to Amplify only, neither to the daemon nor to its store. The service account of amplify.client_id
    needs the role Engage Admin.

    \b
    Example:
      billingd hooks apply --webhook-url https://billingd.example.com
    """


@hooks.command()
@url_option
@click.option("--with-secret", is_flag=True, help="Print the secret itself in place of CHANGE-ME.")
@output.json_option
@click.pass_obj
def show(config: Path | None, url: str, with_secret: bool, as_json: bool) -> None:
    """Print the resources as YAML, for `axway central apply -f FILE`.

    \b
    Example:
      billingd hooks show --webhook-url https://billingd.example.com > hooks.yaml
      axway central apply -f hooks.yaml
    """
    from billingd import hooks as parts

    settings = settings_of(config)
    if with_secret:
        _want_secret(settings)
    wanted = parts.resources(settings, url)
    documents = [
        (one if with_secret else parts.masked(one)).document(settings.amplify.api_version) for one in wanted
    ]
    if as_json:
        output.document({"resources": documents})
        return
    import yaml

    click.echo(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True), nl=False)


@hooks.command()
@url_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done; exit with 3 when there is some.")
@output.json_option
@click.pass_obj
def apply(config: Path | None, url: str, dry_run: bool, as_json: bool) -> None:
    """Make what is missing at Amplify and mend what differs; a second run changes nothing.

    Only the Secret is written each time, for Amplify never shows what it holds. What others have made under
    such a name is left alone, and the exit code is 3 then.

    \b
    Example:
      billingd hooks apply --webhook-url https://billingd.example.com --dry-run
      billingd hooks apply --webhook-url https://billingd.example.com
    """
    from billingd import hooks as parts

    settings = settings_of(config)
    _want_secret(settings)
    wanted = parts.resources(settings, url)

    async def work(management: "Management") -> "list[Step]":
        return await parts.apply(management, wanted, dry_run=dry_run)

    steps = asyncio.run(_with_amplify(settings, work))
    _tell(steps, as_json=as_json)
    undone = [step for step in steps if step.op == "+" or (step.op == "~" and step.kind != "Secret")]
    if (dry_run and undone) or any(step.op == "!" for step in steps):
        click.get_current_context().exit(output.LOOK)


@hooks.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.json_option
@click.pass_obj
def remove(config: Path | None, yes: bool, as_json: bool) -> None:
    """Delete at Amplify what `hooks apply` made. Without it billingd finds changes by listing only.

    It looks first, and says what goes; what others made stays, and the Integration with it.

    \b
    Example:
      billingd hooks remove --yes
    """
    from billingd import hooks as parts

    settings = settings_of(config)
    found = asyncio.run(_with_amplify(settings, parts.removal))
    going = [f"{step.kind} {step.name}" for step in found if step.op == "-"]
    if going and not yes:
        for step in found:
            if step.op == "!":
                click.echo(f"{step.kind} {step.name}: {step.reason}", err=True)
        if as_json or not sys.stdin.isatty():
            raise click.UsageError(f"it deletes {', '.join(going)}: add --yes, or answer on a terminal")
        click.confirm(f"Delete {', '.join(going)} at Amplify?", abort=True, err=True)

    async def work(management: "Management") -> "list[Step]":
        return await parts.remove(management, found)

    _tell(asyncio.run(_with_amplify(settings, work)), as_json=as_json)


def _tell(steps: "Sequence[Step]", *, as_json: bool) -> None:
    if as_json:
        rows = [
            {"op": step.op, "kind": step.kind, "name": step.name, "reason": step.reason} for step in steps
        ]
        output.document({"resources": rows})
        return
    for step in steps:
        output.say(f"{step.op} {step.kind} {step.name}: {step.reason}")


def _want_secret(settings: "Settings") -> None:
    """Raises ConfigurationError where the listener asks for a secret and none is set."""
    from billingd import hooks as parts
    from billingd.settings import ConfigurationError, Fault

    auth, secrets = settings.webhooks.auth, settings.webhooks.secret.get_secret_value()
    if auth != "none" and parts.secret_value(auth, secrets) is None:
        raise ConfigurationError([Fault("webhooks.secret", "is needed and has no value")])


async def _with_amplify(
    settings: "Settings", work: "Callable[[Management], Awaitable[list[Step]]]"
) -> "list[Step]":
    """Do something at Amplify; says what to do where it did not let us."""
    import aiohttp

    from billingd import daemon as root
    from billingd.loops import Clock
    from billingd.settings import ConfigurationError, missing_for_run

    if faults := [fault for fault in missing_for_run(settings) if fault.key.startswith("amplify.")]:
        raise ConfigurationError(faults)
    async with aiohttp.ClientSession() as session:
        amplify = root.make_amplify(settings, session, Clock())
        try:
            return await work(amplify.management)
        except Misconfigured:
            raise
        except Conflict as error:
            raise BillingdError(f"{error}; {AFTERWARDS}") from None
        except Unknown as error:
            raise Unreachable(f"{error}; {AFTERWARDS}") from None
        except Retryable as error:
            raise Unreachable(str(error)) from None
