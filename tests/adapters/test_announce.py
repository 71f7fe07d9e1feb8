"""Telling people through Apprise, against a real server; no URL is ever shown."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from billingd.adapters.announce import Announcer
from billingd.domain.errors import Permanent, Retryable

SECRET = "s3cret-path"


class Far:
    """A server that takes JSON posts; `told` is what arrived."""

    def __init__(self) -> None:
        self.status = 200
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.release = asyncio.Event()
        self.release.set()
        self.port = 0

    async def take(self, request: web.Request) -> web.Response:
        """One message."""
        self.told.append((request.path, await request.json()))
        await self.release.wait()
        return web.Response(status=self.status)

    def url(self, path: str = SECRET) -> str:
        """An Apprise URL for this server, with things in it that must not be shown."""
        return f"json://user:{SECRET}@127.0.0.1:{self.port}/{path}"


@asynccontextmanager
async def a_far() -> AsyncIterator[Far]:
    """The server, listening."""
    far = Far()
    app = web.Application()
    app.router.add_post("/{rest:.*}", far.take)
    async with TestServer(app) as server:
        assert server.port is not None
        far.port = server.port
        yield far


async def test_every_provider_channel_is_told() -> None:
    """Each URL gets the message; line breaks cannot leave the title."""
    async with a_far() as far:
        announcer = Announcer([far.url("a"), far.url("b")], "")
        assert announcer.names == ("notifications.provider[0] (json)", "notifications.provider[1] (json)")
        for name in announcer.names:
            await announcer.tell(name, "Held\r\nBcc: x", "No account for <acme>.")
        assert sorted(path for path, _ in far.told) == ["/a", "/b"]
        assert {(body["title"], body["message"]) for _, body in far.told} == {
            ("Held Bcc: x", "No account for <acme>.")
        }


async def test_nobody_to_tell() -> None:
    """An empty list is no failure, and not "told" either."""
    announcer = Announcer([], "")
    assert announcer.names == ()
    assert await announcer.tell_subscriber("dev@example.com", "t", "b") is False


async def test_a_channel_that_fails_is_retryable_and_named_by_key(caplog: pytest.LogCaptureFixture) -> None:
    """Key, scheme and status; never the URL, in no error and in no log, however loud logging is."""
    caplog.set_level(logging.DEBUG)
    async with a_far() as far:
        far.status = 500
        announcer = Announcer([far.url()], "")
        with pytest.raises(Retryable) as caught:
            await announcer.tell(announcer.names[0], "t", "b")
        assert str(caught.value) == "notifications.provider[0] (json) did not take the message (HTTP 500)"
    with pytest.raises(Retryable, match=r"did not take the message \(connection refused\)$"):
        await announcer.tell(announcer.names[0], "t", "b")
    records = [record for record in caplog.records if record.name != "aiohttp.access"]
    shown = "\n".join(f"{record.name} {record.getMessage()}" for record in records)
    assert SECRET not in shown + repr(caught.value)
    assert "apprise" not in shown
    assert "urllib3" not in shown


async def test_silence_is_bounded() -> None:
    """A channel that never answers does not hold the daemon."""
    async with a_far() as far:
        far.release.clear()
        announcer = Announcer([far.url()], "", seconds_max=0.2)
        try:
            with pytest.raises(Retryable, match=r"within 0\.2 s"):
                await announcer.tell(announcer.names[0], "t", "b")
        finally:
            far.release.set()  # lets the thread go


async def test_the_subscriber_is_put_into_the_template() -> None:
    """URL-quoted, in the place of {email}."""
    async with a_far() as far:
        announcer = Announcer([], far.url("to/{email}?+X-Note={braces}"))
        assert await announcer.tell_subscriber("dev+a@example.com", "Welcome", "Hello") is True
        assert [path for path, _ in far.told] == ["/to/dev+a@example.com"]
        far.status = 503
        with pytest.raises(Retryable, match=r"notifications\.subscriber \(json\).*HTTP 503"):
            await announcer.tell_subscriber("dev@example.com", "Welcome", "Hello")


@pytest.mark.parametrize(
    "email",
    [
        "nobody",
        "a@b@c",
        "a@b.example,c@d.example",
        "a@b.example json://127.0.0.1",
        "a@b.example\nBcc: c@d",
        "<a@b.example>",
        "a@b.example/?x=1",
        "@",
    ],
)
async def test_only_one_plain_address(email: str) -> None:
    """Nothing a subscriber calls themselves reaches further recipients; the address is not repeated."""
    announcer = Announcer([], "json://127.0.0.1:1/{email}")
    with pytest.raises(Permanent) as caught:
        await announcer.tell_subscriber(email, "t", "b")
    assert email not in str(caught.value)


async def test_an_unknown_address_is_nobody_to_tell() -> None:
    """A missing e-mail is normal (amplify.md 7)."""
    announcer = Announcer([], "json://127.0.0.1:1/{email}")
    assert await announcer.tell_subscriber(None, "t", "b") is False
    assert await announcer.tell_subscriber("", "t", "b") is False


@pytest.mark.parametrize(
    ("urls", "template", "message"),
    [
        ([f"nosuch://{SECRET}"], "", r"^notifications\.provider\[0\]: .*\(scheme: nosuch\)$"),
        (
            ["json://127.0.0.1", f"slack://{SECRET}"],
            "",
            r"^notifications\.provider\[1\]: .*\(scheme: slack\)$",
        ),
        ([SECRET], "", r"^notifications\.provider\[0\]: .*\(scheme: none\)$"),
        ([""], "", r"^notifications\.provider\[0\]"),
        ([], f"nosuch://{SECRET}/{{email}}", r"^notifications\.subscriber: .*\(scheme: nosuch\)$"),
        ([], f"mailto://{SECRET}", r"must contain \{email\}"),
    ],
)
def test_urls_are_checked_at_the_door(
    urls: list[str], template: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The key and the scheme, nothing else."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ValueError, match=message) as caught:
        Announcer(urls, template)
    assert SECRET not in str(caught.value) + caplog.text


def test_real_services_are_understood() -> None:
    """Teams and mail, as the documentation will show them."""
    Announcer(
        ["workflows://prod-1.westus.logic.azure.com:443/workflow/signature"],
        "mailtos://user:pass@smtp.example.com?from=billing@example.com&to={email}",
    )
