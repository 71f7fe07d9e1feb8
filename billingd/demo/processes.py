"""The sandbox and the daemon as processes of their own: started, killed, restarted, and always ended."""

import asyncio
import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from billingd.demo.failure import DemoFailed, StoreAway

HOST: Final = "127.0.0.1"
PORTS: Final = range(20_000, 32_000)
"""Below the range from which connections take theirs, so that a port is still free after a restart."""
WINDOW_SECONDS: Final = 2
"""How much traffic is read at a time."""
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
STEP_SECONDS: Final = 0.05
TAIL_LINES: Final = 15
EXPORT: Final = re.compile(r"^# export (BILLINGD_\w+)='(.*)'$", re.MULTILINE)
SECRETS_PRINTED: Final = 3
LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG: Final = 1
FOREIGN: Final = ("BILLINGD_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_")
"""What the environment may hold for another billingd, a real one perhaps."""


class Child:
    """One process with its log file."""

    def __init__(self, name: str, log: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *, stdout: Path | None = None) -> None:
        """Spawn it, in a session of its own: a Ctrl-C at the terminal is for the demo, which ends it."""
        with contextlib.ExitStack() as files:
            log = files.enter_context(self.log.open("ab"))
            out = files.enter_context(stdout.open("wb")) if stdout else log
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "billingd",
                *self._arguments,
                env=_environment() | self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def check(self) -> None:
        """Raises DemoFailed when it has ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            code = self._process.returncode
            failed = StoreAway if code == StoreAway.exit_code else DemoFailed
            raise failed(f"the {self.name} ended by itself with exit code {code}")

    def pause(self) -> None:
        """SIGSTOP: it does nothing more, and does not know."""
        self._signal(signal.SIGSTOP)

    async def kill(self) -> None:
        """SIGKILL, from which nothing is saved."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
            self._process = None

    async def stop(self) -> int:
        """SIGTERM; its exit code. One that does not end in time is killed."""
        if self._process is None:
            return 0
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                code = await self._process.wait()
        except TimeoutError:
            await self.kill()
            raise DemoFailed(f"the {self.name} did not end within {STOP_SECONDS:g} s of SIGTERM") from None
        self._process = None
        return code

    def tail(self) -> list[str]:
        """The last lines of its log."""
        if not self.log.exists():
            return []
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]

    def logged(self, since: int = 0) -> list[dict[str, Any]]:
        """The events of its log from a byte offset on."""
        with self.log.open("rb") as file:
            file.seek(since)
            lines = file.read().decode(errors="replace").splitlines()
        events = []
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.append(event)
        return events

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Stage:
    """The two processes, their addresses and the directory they work in."""

    def __init__(self, directory: Path, store_url: str | None) -> None:
        self.directory = directory
        self.webhook_port, self.admin_port = free_port(), free_port()
        self.webhook_url = f"http://{HOST}:{self.webhook_port}/webhooks/amplify"
        self.recurly_webhook_url = f"http://{HOST}:{self.webhook_port}/webhooks/recurly"
        self.admin_url = f"http://{HOST}:{self.admin_port}"
        self.webhook_secret = secrets.token_urlsafe(24)
        self.api_key = ""
        self.sandbox_url = ""
        self.kills = 0
        self._foreign_store = store_url is not None
        self._store_url = store_url or f"sqlite+aiosqlite:///{directory / 'billingd.db'}"
        self._sandbox = Child(
            "sandbox",
            directory / "sandbox.log",
            ["sandbox", "--listen", f"{HOST}:0", *self._hook()],
            {},
        )
        self.daemon = self._daemon({})

    @property
    def store(self) -> str:
        """Which database it is."""
        return "PostgreSQL" if self._store_url.startswith("postgresql") else "SQLite"

    async def open(self) -> None:
        """Start the sandbox, and write the daemon's configuration from what the sandbox prints."""
        printed = self.directory / "sandbox.toml"
        await self._sandbox.start(stdout=printed)
        exported: dict[str, str] = {}
        try:
            async with asyncio.timeout(START_SECONDS):
                while len(exported) < SECRETS_PRINTED:
                    self._sandbox.check()
                    await asyncio.sleep(STEP_SECONDS)
                    exported = dict(EXPORT.findall(printed.read_text(encoding="utf-8")))
        except TimeoutError:
            raise DemoFailed(f"the sandbox printed no configuration within {START_SECONDS:g} s") from None
        configuration = tomllib.loads(printed.read_text(encoding="utf-8"))
        self.sandbox_url = configuration["recurly"]["base_url"]
        self.api_key = exported["BILLINGD_RECURLY__API_KEY"]
        text = _toml(self._configured(configuration))
        (self.directory / "billingd.toml").write_text(text, encoding="utf-8")
        self.daemon = self._daemon(exported | {"BILLINGD_STORE__URL": self._store_url})
        if self._foreign_store:
            await self._refuse_a_store_in_use()

    def check(self) -> None:
        """Raises DemoFailed when either process has ended by itself."""
        self._sandbox.check()
        self.daemon.check()

    async def kill_daemon(self) -> None:
        """SIGKILL, counted."""
        await self.daemon.kill()
        self.kills += 1

    async def close(self) -> None:
        """End both, whatever state they are in."""
        for child in (self.daemon, self._sandbox):
            await child.kill()

    async def _refuse_a_store_in_use(self) -> None:
        """A daemon on it would do in the sandbox what was meant for the real far sides."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "billingd", "db", "current", "--json"),
            env=_environment() | {"BILLINGD_STORE__URL": self._store_url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what keeps it from being read, the daemon tells too
        )
        out, _ = await process.communicate()
        if process.returncode == 0 and json.loads(out)["current"] is not None:
            raise DemoFailed("the store is in use; the demo needs an empty one of its own")

    def _hook(self) -> list[str]:
        return ["--webhook-url", self.webhook_url, "--webhook-secret", self.webhook_secret]

    def _daemon(self, environment: Mapping[str, str]) -> Child:
        """The real daemon: its configuration in a file, its secrets and its store in the environment."""
        arguments = ["--config", str(self.directory / "billingd.toml"), "run"]
        log = self.directory / "billingd.log"
        return Child("daemon", log, arguments, {**environment, "BILLINGD_LOG_FORMAT": "json"})

    def _configured(self, sandbox: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The sandbox's configuration with times short enough to watch."""
        mailbox = self.sandbox_url.replace("http://", "json://", 1) + "/control/mailbox"
        return {
            "amplify": {**sandbox["amplify"], "timeout": "5s"},
            "recurly": {
                **sandbox["recurly"],
                "requests_per_minute": 6000,
                "timeout": "3s",
                "settling": "3s",
            },
            "webhooks": dict(sandbox["webhooks"]),
            "admin": {"listen": f"{HOST}:{self.admin_port}"},
            "traffic": {
                "window": f"{WINDOW_SECONDS}s",
                "settle": "1s",
                "horizon": "60s",
                "schedule": "1s",
            },
            "outbox": {
                # A kill leaves no more than one write in the dark besides the one that it was aimed at: of
                # several, each may have to wait for a minute until billingd is sure that it never arrived.
                "workers": 2,
                "attempts_max": 100,
                "backoff": "200ms",
                "backoff_max": "2s",
                "lease": "6s",
            },
            "notifications": {"provider": [mailbox]},
        }


def _end_with_parent() -> None:
    """In the child: die with the demo, should that be killed (where Linux can do it)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    for _ in range(100):
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise DemoFailed(f"no free port on {HOST} in {PORTS.start} to {PORTS.stop}")


def _environment() -> dict[str, str]:
    """The environment without what is meant for another billingd, and without a proxy for loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | {"NO_PROXY": HOST, "no_proxy": HOST}


def _toml(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers and lists of strings; JSON writes these as TOML does."""
    lines = []
    for section, table in document.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)
