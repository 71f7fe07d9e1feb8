"""`notify test`: one message through each configured channel."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from billingd.cli import output
from billingd.cli.reach import settings_of

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


@click.group(short_help="Try the channels through which people are told.")
def notify() -> None:
    """Tell people.

    \b
    Example:
      billingd notify test
    """


@notify.command()
@click.option("--email", metavar="ADDRESS", help="Try the subscriber channel too, with mail to this address.")
@click.pass_obj
def test(config: Path | None, email: str | None) -> None:
    """Send one message through each configured channel.

    \b
    Example:
      billingd notify test
      billingd notify test --email somebody@example.com
    """
    from billingd.adapters.announce import Announcer
    from billingd.settings import ConfigurationError, Fault

    settings = settings_of(config)
    if faults := channel_faults(settings):
        raise ConfigurationError(faults)
    provider = [url.get_secret_value() for url in settings.notifications.provider]
    subscriber = settings.notifications.subscriber.get_secret_value()
    if not provider and not subscriber:
        raise ConfigurationError(
            [Fault("notifications.provider", "is empty: nobody would be told; list Apprise URLs there")]
        )
    if email is not None and not subscriber:
        raise ConfigurationError([Fault("notifications.subscriber", "is empty, so --email has no channel")])
    asyncio.run(_send(Announcer(provider, subscriber), len(provider), email))
    if subscriber and email is None:
        output.note("notifications.subscriber: not tried; name an address with --email")


async def _send(announcer: "Announcer", channels: int, email: str | None) -> None:
    if await announcer.tell_provider(TITLE, BODY):
        for number in range(channels):
            output.say(f"notifications.provider[{number}]: sent")
    if email is not None and await announcer.tell_subscriber(email, TITLE, BODY):
        output.say(f"notifications.subscriber: sent to {email}")
