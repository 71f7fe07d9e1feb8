"""A stand-in for systemd: starts the daemon as its units say, over the same protocols.

It reads systemd/billingd.service and billingd.socket, listens, hands the socket over (sd_listen_fds), copies
the credentials, and hears what the service says (sd_notify). What needs a namespace is left out.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from processes import PATIENCE_SECONDS, until

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "systemd"
SECRETS = {
    "amplify.client_secret": "amplify-secret",
    "recurly.api_key": "recurly-key",
    "webhooks.secret": "webhook-secret",
}

CONFIGURATION = """
[amplify]
organization_id = "100000000000001"
client_id = "DOSA_1"
central_url = "http://127.0.0.1:9"
login_url = "http://127.0.0.1:9/auth"
platform_url = "http://127.0.0.1:9"
[recurly]
base_url = "http://127.0.0.1:9"
timeout = "1s"
[catch_up]
watch_topic = ""
[outbox]
drain = "1s"
"""
"""Both far sides are away: what counts here is what the daemon takes in."""

HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""LISTEN_PID is the service's own, which only it knows: this becomes the service."""


def unit(name: str) -> dict[str, list[str]]:
    """What a unit file sets, by directive, in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "[")):
            found.setdefault(key, []).append(value)
    return found


def seconds(span: str) -> float:
    """`2min`, `5s` or `45s` as seconds."""
    for suffix, factor in (("min", 60.0), ("s", 1.0)):
        if span.endswith(suffix):
            return float(span.removesuffix(suffix)) * factor
    return float(span)


class ServiceManager:
    """One service with its sockets, in a directory of its own."""

    def __init__(self, directory: Path, *, watchdog_seconds: float | None = None, unix: bool = False) -> None:
        self.directory = directory
        self.service, self.listener = unit("billingd.service"), unit("billingd.socket")
        self.watchdog_seconds = watchdog_seconds or seconds(self.service["WatchdogSec"][0])
        self.state, self.run = directory / "state", directory / "run"
        self.secrets, self.credentials = directory / "secrets", directory / "credentials"
        for one in (self.state, self.run, self.secrets):
            one.mkdir(parents=True)
        for name, value in SECRETS.items():
            (self.secrets / name).write_text(value)
        self.admin = self.run / "admin.sock"
        self.config = directory / "billingd.toml"
        self.config.write_text(
            f'{CONFIGURATION}[admin]\nlisten = "unix:{self.admin}"\n'
            f'[store]\nurl = "sqlite+aiosqlite:///{self.state}/billingd.db"\n'
        )
        if unix:
            self.webhooks = socket.socket(socket.AF_UNIX)
            self.webhooks.bind(str(self.run / "webhooks.sock"))
        else:
            self.webhooks = socket.socket()
            self.webhooks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.webhooks.bind(("127.0.0.1", 0))
        self.webhooks.listen(int(self.listener["Backlog"][0]))
        self.heard: list[tuple[float, str]] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.run / "notify"))
        self._ear = threading.Thread(target=self._listen, daemon=True)
        self._ear.start()
        self._log = (directory / "billingd.log").open("a")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where webhooks go."""
        host, port = self.webhooks.getsockname()
        return host, port

    def _listen(self) -> None:
        while message := self._notify.recv(4096):
            self.heard += [(time.monotonic(), line) for line in message.decode().splitlines()]

    def said(self, line: str) -> int:
        """How often the service said so."""
        return sum(heard == line for _, heard in self.heard)

    def start(self, *wrapped: str, **environment: str) -> None:
        """Start the service and wait until it says READY=1, as Type=notify does."""
        before = self.said("READY=1")
        self.launch(*wrapped, **environment)
        until("the service is ready", lambda: self.said("READY=1") > before or self._ended(), said=self.log)
        assert not self._ended(), self.log()

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def launch(self, *wrapped: str, **environment: str) -> None:
        """Start the service, inside another command if one is named."""
        self._load_credentials()
        descriptor = self.webhooks.fileno()
        given = {name: value for name, value in os.environ.items() if not name.startswith("BILLINGD_")}
        given |= {
            "NOTIFY_SOCKET": str(self.run / "notify"),
            "WATCHDOG_USEC": str(int(self.watchdog_seconds * 1_000_000)),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": self.listener["FileDescriptorName"][0],
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "STATE_DIRECTORY": str(self.state),
            "RUNTIME_DIRECTORY": str(self.run),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", HAND_OVER, str(descriptor), *wrapped, *self._command("ExecStart")],
            env=given | environment,
            pass_fds=[descriptor],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            umask=int(self.service["UMask"][0], 8),
        )

    def _load_credentials(self) -> None:
        """Copies of what LoadCredential= names, for the service to read only."""
        shutil.rmtree(self.credentials, ignore_errors=True)
        self.credentials.mkdir(mode=0o500)
        for line in self.service["LoadCredential"]:
            name, _, path = line.partition(":")
            assert path == f"/etc/billingd/secrets/{name}"
            target = self.credentials / name
            shutil.copy(self.secrets / name, target)
            target.chmod(0o400)

    def _command(self, directive: str) -> list[str]:
        words = self.service[directive][0].split()
        assert words[:4] == ["/usr/bin/env", "billingd", "--config", "/etc/billingd/billingd.toml"]
        return [sys.executable, "-m", "billingd", "--config", str(self.config), *words[4:]]

    def reload(self) -> subprocess.CompletedProcess[str]:
        """What ExecReload= does: without the credentials, which systemd hides from it."""
        return subprocess.run(
            self._command("ExecReload"),
            env={name: value for name, value in os.environ.items() if not name.startswith("BILLINGD_")},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def stop(self) -> int:
        """SIGTERM; returns the exit code. The socket stays open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def log(self) -> str:
        """What the service logged."""
        return (self.directory / "billingd.log").read_text()

    def close(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_SECONDS)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.run / "notify"))
        self._ear.join(PATIENCE_SECONDS)
        for one in (self._notify, self.webhooks):
            one.close()
        self._log.close()
