"""`notify`: one message through each configured channel, and the words that notices have."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import settings_of
from billingd.domain.errors import BillingdError

if TYPE_CHECKING:
    from billingd.adapters.announce import Announcer
    from billingd.settings import Fault, Settings

TITLE = "A test from billingd"
BODY = "This message was sent by `billingd notify test`. Nothing is wrong."


def channel_faults(settings: "Settings") -> "list[Fault]":
    """The channels whose URLs cannot be understood; the URLs themselves are never shown."""
    from billingd.settings import Fault

    channels = {
        f"notifications.provider[{number}]": ([url.get_secret_value()], "")
        for number, url in enumerate(settings.notifications.provider)
    }
    if template := settings.notifications.subscriber.get_secret_value():
        channels["notifications.subscriber"] = ([], template)
    if not channels:
        return []
    from billingd.adapters.announce import Announcer  # Apprise takes its time to load

    faults = []
    for key, (urls, template) in channels.items():
        try:
            Announcer(urls, template)
        except ValueError as error:
            message = str(error).removeprefix("notifications.provider[0]").removeprefix(key)
            faults.append(Fault(key, message.lstrip(": ")))
    return faults


def template_faults(settings: "Settings") -> "list[Fault]":
    """The operator's templates that cannot be used, or that no notice would."""
    from billingd.settings import Fault

    if not settings.notifications.templates:
        return []
    from billingd.wording import faults

    found = faults(Path(settings.notifications.templates))
    return [Fault("notifications.templates", message) for message in found]


@click.group(short_help="Try the channels through which people are told; show the words.")
def notify() -> None:
    """Tell people.

    \b
    Example:
      billingd notify test
    """


@notify.command()
@click.option("--email", metavar="ADDRESS", help="Try the subscriber channel too, with mail to this address.")
@output.json_option
@click.pass_context
def test(ctx: click.Context, email: str | None, as_json: bool) -> None:
    """Send one message through each configured channel, and say what became of each.

    Exits with 4 when a channel did not take its message. Channels are named by their key and kind, never by
    their URL, which may be a secret.

    \b
    Example:
      billingd notify test
      billingd notify test --email somebody@example.com
    """
    from billingd.adapters.announce import Announcer
    from billingd.settings import ConfigurationError, Fault

    config: Path | None = ctx.obj
    settings = settings_of(config)
    if faults := channel_faults(settings) + template_faults(settings):
        raise ConfigurationError(faults)
    provider = [url.get_secret_value() for url in settings.notifications.provider]
    subscriber = settings.notifications.subscriber.get_secret_value()
    if not provider and not subscriber:
        raise ConfigurationError(
            [Fault("notifications.provider", "is empty: nobody would be told; list Apprise URLs there")]
        )
    if email is not None and not subscriber:
        raise ConfigurationError([Fault("notifications.subscriber", "is empty, so --email has no channel")])
    tried = asyncio.run(_send(Announcer(provider, subscriber), email))
    if as_json:
        output.document({"channels": tried})
    else:
        for one in tried:
            output.say(f"{one['channel']}: {'sent' if one['sent'] else one['error']}")
        if subscriber and email is None:
            output.note("notifications.subscriber: not tried; name an address with --email")
    if not all(one["sent"] for one in tried):
        output.note("see that the URL is right and that this machine may reach the service, then try again")
        ctx.exit(output.UNREACHABLE)


@notify.command()
@click.option(
    "--write",
    "directory",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    help="Copy the packaged templates there, to be changed; files that are there already stay.",
)
@output.json_option
@click.pass_obj
def templates(config: Path | None, directory: Path | None, as_json: bool) -> None:
    """List the templates of notices with the facts that each may use, and whose is in use.

    A template is a file TOPIC.txt in notifications.templates: its first line is the title, the rest the body,
    in Jinja's language. `check-config` tries each.

    \b
    Example:
      billingd notify templates
      billingd notify templates --write /etc/billingd/notices
    """
    from billingd.wording import PACKAGED, SUFFIX, listed

    settings = settings_of(config)
    own = Path(settings.notifications.templates) if settings.notifications.templates else None
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(PACKAGED.glob(f"*{SUFFIX}")):
                if not (directory / path.name).exists():
                    (directory / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
                    output.note(f"wrote {directory / path.name}")
        except OSError as error:
            raise BillingdError(
                f"cannot write {error.filename or directory}: {error.strerror}; "
                "name a directory that this user may write with --write"
            ) from error
        if own != directory.absolute():
            output.note(f'put them to use: [notifications] templates = "{directory.absolute()}"')
    rows = listed(own)
    if as_json:
        output.document({"templates": rows})
        return
    output.table(["TOPIC", "FACTS", "FROM"], ([row["topic"], row["facts"], row["from"]] for row in rows))


async def _send(announcer: "Announcer", email: str | None) -> list[dict[str, Any]]:
    """Try every channel; what became of each."""
    tried: list[dict[str, Any]] = []
    ways: list[tuple[str, Awaitable[Any]]] = [
        (name, announcer.tell(name, TITLE, BODY)) for name in announcer.names
    ]
    if email is not None:
        ways.append(("notifications.subscriber", announcer.tell_subscriber(email, TITLE, BODY)))
    for (name, _), outcome in zip(
        ways, await asyncio.gather(*(way for _, way in ways), return_exceptions=True), strict=True
    ):
        if isinstance(outcome, BaseException) and not isinstance(outcome, BillingdError):
            raise outcome
        error = str(outcome).removeprefix(f"{name} ") if isinstance(outcome, BaseException) else None
        tried.append({"channel": name, "sent": error is None, "error": error})
    return tried
