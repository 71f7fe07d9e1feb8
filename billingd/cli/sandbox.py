"""`sandbox`: a local Amplify and Recurly to rehearse against."""

import asyncio
from urllib.parse import urlsplit

import click

from billingd.domain.errors import BillingdError


@click.command()
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:8010",
    show_default=True,
    help="Loopback; port 0: any.",
)
@click.option(
    "--webhook-url",
    metavar="URL",
    help="Where webhooks are sent; default http://127.0.0.1:8080/webhooks/amplify.",
)
@click.option(
    "--webhook-secret",
    metavar="TEXT",
    help="The Authorization header they carry; default 'Bearer sandbox-webhook-secret'.",
)
def sandbox(listen: str, webhook_url: str | None, webhook_secret: str | None) -> None:
    """Serve a local Amplify and Recurly until interrupted.

    Prints the configuration that points billingd at it, with the secrets to export as comments.

    \b
    Example:
      billingd sandbox > sandbox.toml
      billingd sandbox --listen 127.0.0.1:8010 --webhook-url http://127.0.0.1:8080/webhooks/amplify
    """
    from billingd.sandbox.server import serve
    from billingd.settings.values import host_port, is_loopback

    try:
        host, _port = host_port(listen)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from None
    if not is_loopback(host):
        raise click.BadParameter("must be a loopback address", param_hint="--listen")
    url = urlsplit(webhook_url or "http://127.0.0.1")
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise click.BadParameter("must be a URL, as in http://127.0.0.1:8080", param_hint="--webhook-url")
    given = {"webhook_url": webhook_url, "webhook_secret": webhook_secret}
    try:
        asyncio.run(serve(listen, **{name: value for name, value in given.items() if value is not None}))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BillingdError(f"cannot listen on {listen}: {error.strerror or error}") from error
