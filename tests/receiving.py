"""A reception with the real webhook listener behind it, on sockets, for tests of what a connection may do."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from manual_clock import ManualClock

from billingd import listening
from billingd.intake import Intake
from billingd.reception import Limits, Reception
from billingd.store.engine import Store
from billingd.webhooks import BODY_SECONDS, Authenticator, Tally, WebhookListener

SECRET = "correct-horse"
PATIENCE_SECONDS = 30


def event(identity: str = "e1") -> bytes:
    """An event that is kept and asks for nothing."""
    payload = {"kind": "Asset", "name": "weather", "metadata": {"id": "a1"}}
    return json.dumps({"id": identity, "type": "ResourceUpdated", "payload": payload}).encode()


def request(body: bytes | None = None, *, secret: str | None = SECRET, **headers: str) -> bytes:
    """The bytes of a delivery."""
    body = event() if body is None else body
    lines = {"Host": "billingd", "Content-Type": "application/json", "Content-Length": str(len(body))}
    if secret is not None:
        lines["Authorization"] = secret
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /webhooks/amplify HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass
class Answer:
    """What came back: the status, the headers with small letters, and the document."""

    status: int
    headers: dict[str, str]
    document: dict[str, dict[str, str]] = field(default_factory=dict)


class Caller:
    """One connection from outside."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """The next answer."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split()[1]), headers, json.loads(body))

    async def ended(self) -> bytes:
        """What else comes until the other side hangs up."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def close(self) -> None:
        self.writer.close()


@dataclass
class Receiving:
    """A reception at work."""

    reception: Reception
    listener: WebhookListener
    sockets: list[socket.socket]
    tally: Tally
    store: Store
    _callers: list[Caller] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    async def call(self, tls: ssl.SSLContext | None = None) -> Caller:
        """A new connection."""
        name = None if tls is None else "billing.example.com"
        made = Caller(*await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name))
        self._callers.append(made)
        return made

    async def send(self, body: bytes | None = None, *, secret: str | None = SECRET) -> Answer:
        """One delivery on a connection of its own."""
        caller = await self.call()
        await caller.say(request(body, secret=secret))
        answer = await caller.answer()
        caller.close()
        return answer

    def hang_up(self) -> None:
        for caller in self._callers:
            caller.close()


@asynccontextmanager
async def receiving(
    store: Store,
    limits: Limits | None = None,
    *,
    clock: ManualClock | None = None,
    tls: ssl.SSLContext | None = None,
    body_seconds: float = BODY_SECONDS,
    sockets: list[socket.socket] | None = None,
) -> AsyncIterator[Receiving]:
    """Listen on a free port of loopback."""
    clock, tally = clock or ManualClock(), Tally()
    listener = WebhookListener(
        Intake(store, clock, lambda: None),
        clock,
        Authenticator("header:Authorization", SECRET),
        body_bytes_max=100_000,
        tally=tally,
        body_seconds=body_seconds,
    )
    reception = Reception(listener.application(), limits, tls=tls)
    sockets = sockets or await listening.opened("127.0.0.1:0")
    made = Receiving(reception, listener, sockets, tally, store)
    await reception.start(sockets)
    try:
        yield made
    finally:
        made.hang_up()
        await reception.close()


def certificate(directory: Path, name: str) -> tuple[str, str]:
    """A certificate of its own making and its key, as two files; skips the test where openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate: apt install openssl")
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:billing.example.com"),
            *("-out", str(cert), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )
    return str(cert), str(key)
