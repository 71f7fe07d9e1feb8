"""A sandbox and a daemon as real processes, for tests whose promise depends on processes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 60
"""Far more than anything here takes: a condition that is never true must fail, not hang."""

FAST = """
[traffic]
window = "2s"
settle = "1s"
schedule = "300ms"
horizon = "10m"
[outbox]
backoff = "100ms"
backoff_max = "1s"
lease = "2s"
drain = "1s"
[catch_up]
every = "300ms"
"""


def call(
    url: str, body: Any = None, headers: dict[str, str] | None = None, *, method: str | None = None
) -> Any:
    """One JSON request; POST when there is a body, unless told otherwise."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", "X-Billingd": "1", **(headers or {})}, method=method
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def until(
    what: str,
    true: Callable[[], bool],
    *,
    said: Callable[[], object] = str,
    patience_seconds: float = PATIENCE_SECONDS,
) -> None:
    """Wait until something is so; fail with its name, and with what `said` says then, when it never is."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        try:
            if true():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"never came true: {what} {said()}".rstrip())


class Sandbox:
    """The sandbox's control interface."""

    def __init__(self, directory: Path, port: int, webhooks_port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self._output = (directory / "sandbox.out").open("w")
        webhook_url = f"http://127.0.0.1:{webhooks_port}/webhooks/amplify"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "billingd", "sandbox"),
                *("--listen", f"127.0.0.1:{port}", "--webhook-url", webhook_url),
            ],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        until("the sandbox answers", lambda: call(f"{self.base}/control/clock") is not None)
        self.printed = (directory / "sandbox.out").read_text()

    def do(self, what: str, **body: Any) -> Any:
        """POST /control/WHAT."""
        return call(f"{self.base}/control/{what}", body)

    def hook(self, url: str) -> None:
        """Send webhooks there instead, with the secret they had."""
        call(f"{self.base}/control/hooks", method="DELETE")
        secret = self.secrets()["BILLINGD_WEBHOOKS__SECRET"]
        self.do("hooks", url=url, headers={"Authorization": secret})

    def secrets(self) -> dict[str, str]:
        """What it told to export, by name."""
        lines = [line for line in self.printed.splitlines() if line.startswith("# export ")]
        return {name: value.strip("'") for name, value in (line[9:].split("=", 1) for line in lines)}

    def ledger(self) -> dict[str, Any]:
        """What was served, reported and billed."""
        document: dict[str, Any] = call(f"{self.base}/control/ledger")
        return document

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)
        self._output.close()


class Daemon:
    """`billingd run`, started, stopped and killed at will, on one store."""

    def __init__(self, directory: Path, sandbox: Sandbox, ports: tuple[int, int], store_url: str) -> None:
        self._log = (directory / "billingd.log").open("a")
        self.admin = f"http://127.0.0.1:{ports[0]}"
        self.config = directory / "billingd.toml"
        settings = sandbox.printed.split("[store]")[0]
        self.config.write_text(
            f'{settings}\n[admin]\nlisten = "127.0.0.1:{ports[0]}"\n[store]\nurl = "{store_url}"\n{FAST}'
        )
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("BILLINGD_")}
        self.environment |= sandbox.secrets()
        self.environment |= {"BILLINGD_RECURLY__TIMEOUT": "2s", "BILLINGD_RECURLY__SETTLING": "1s"}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it, without waiting."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "billingd", "--config", str(self.config), "run"],
            env=self.environment | environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        return self.process

    def ready(self) -> None:
        """Wait until it answers on its admin listener."""
        until("the daemon is ready", lambda: call(f"{self.admin}/readyz")["ready"])

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = call(f"{self.admin}/status")
        return document

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._log.close()


@contextmanager
def rehearsal(
    directory: Path, free_port: Callable[[], int], store_url: str
) -> Iterator[tuple[Sandbox, Daemon]]:
    """A sandbox that runs, and a daemon that is not started yet."""
    admin, webhooks = free_port(), free_port()
    sandbox = Sandbox(directory, free_port(), webhooks)
    daemon = Daemon(directory, sandbox, (admin, webhooks), store_url)
    try:
        yield sandbox, daemon
    finally:
        daemon.close()
        sandbox.stop()


def open_shop(sandbox: Sandbox) -> None:
    """One labelled product with one plan priced per call."""
    sandbox.do("products", name="weather", title="Weather", attributes={"billingSystem": "recurly"})
    sandbox.do(
        "plans",
        name="metered",
        title="Metered",
        product="weather",
        type="paid",
        billing={"currency": "USD", "price": 10, "interval": "monthly"},
        subscription={"approval": "manual"},
        quotas=[
            {
                "name": "calls",
                "title": "Calls",
                "unit": "transactions",
                "pricing": {"type": "perunit", "cost": 0.01},
            }
        ],
    )


def subscribe(sandbox: Sandbox, name: str) -> str:
    """A subscriber with an account of their own; returns the subscription's id."""
    made = sandbox.do("subscribe", plan="metered", name=name, team=f"team {name}")
    team = made["marketplace"]["resource"]["owner"]["id"]
    sandbox.do("accounts", code=f"amplify-team-{team}")
    return str(made["metadata"]["id"])


def served(sandbox: Sandbox) -> int:
    return int(sandbox.ledger()["totals"]["served_units"])


def agrees(sandbox: Sandbox) -> bool:
    """Everything served is reported once, and nothing else is."""
    ledger = sandbox.ledger()
    totals = ledger["totals"]
    return bool(
        ledger["agrees"]
        and totals["served_units"] == totals["reported_units"]
        and not any(one["duplicate_tags"] for one in ledger["subscriptions"])
    )
