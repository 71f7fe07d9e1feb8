"""The real process against the real sandbox: signals, kills, restarts, a second daemon, systemd."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, agrees, call, open_shop, rehearsal, served, subscribe, until

ROOT = Path(__file__).parents[1]


def test_sigterm_at_any_moment_ends_with_0_and_a_restart_resumes(
    tmp_path: Path, store_url: str, free_port: Callable[[], int]
) -> None:
    """While it loads, migrates, starts, is idle, or waits for an answer: exit 0 within the drain limit."""
    with rehearsal(tmp_path, free_port, store_url) as (sandbox, daemon):
        daemon.start()
        until("its code runs", lambda: _catches_sigterm(daemon.process))
        assert daemon.terminate() == 0
        daemon.start()
        log = tmp_path / "billingd.log"
        until("it logs", lambda: log.stat().st_size > 0)
        assert daemon.terminate() == 0
        daemon.start()
        daemon.ready()
        open_shop(sandbox)
        subscription = subscribe(sandbox, "acme")
        until("it is approved", lambda: _approved(sandbox.ledger()) == 1)
        sandbox.do("traffic", subscription=subscription, units=40)
        until("it is reported", lambda: agrees(sandbox) and served(sandbox) == 40)
        # The next report gets no answer before the drain limit, although Recurly takes it.
        sandbox.do("faults", side="recurly", method="POST", path="**/usage", kind="slow", times=1, seconds=3)
        sandbox.do("traffic", subscription=subscription, units=2)
        until("the slow answer is being waited for", lambda: _struck(sandbox.base) == 1)
        assert daemon.terminate() == 0
        daemon.start()
        until("all is reported once", lambda: agrees(sandbox) and served(sandbox) == 42)
        until("nothing is unknown", lambda: daemon.status()["traffic"]["unknown_outcomes"] == 0)
        until("the ledger says so", lambda: daemon.status()["traffic"]["reported_units"] == 42)
        assert daemon.terminate() == 0


def _catches_sigterm(process: subprocess.Popen[bytes] | None) -> bool:
    """Whether the process has put a handler on SIGTERM (bit 14 of SigCgt)."""
    assert process is not None
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << 14)


def _approved(ledger: dict[str, list[dict[str, str]]]) -> int:
    return sum(one["approval"] == "approved" for one in ledger["subscriptions"])


def test_kills_lose_nothing_and_double_nothing(
    tmp_path: Path, store_url: str, free_port: Callable[[], int]
) -> None:
    """SIGKILL again and again in the middle of work, and every unit is at Recurly once.

    Each kill waits for a different sign of work under way, not for a time.
    """
    with rehearsal(tmp_path, free_port, store_url) as (sandbox, daemon):
        daemon.start()
        daemon.ready()
        open_shop(sandbox)
        until("the plan is linked", lambda: daemon.status()["links"]["plans"] == 1)
        subscriptions = [subscribe(sandbox, name) for name in ("one", "two", "three")]
        sandbox.do("hooks/settle")  # what nobody listened to is lost for ever: catching up is another matter
        daemon.kill()
        daemon.start()
        until("all are approved", lambda: _approved(sandbox.ledger()) == 3)
        total = 0
        for number, kind in enumerate(("lost", "500_committed", "lost", "slow", "cut"), start=1):
            fault = {"side": "recurly", "method": "POST", "path": "**/usage", "kind": kind, "times": 1}
            sandbox.do("faults", **fault, **({"seconds": 1} if kind == "slow" else {}))
            for units, subscription in enumerate(subscriptions, start=number):
                sandbox.do("traffic", subscription=subscription, units=units)
                total += units
            until(f"fault {number} struck", lambda n=number: _struck(sandbox.base) >= n)  # type: ignore[misc]
            daemon.kill()
            daemon.start()
        until("every unit is reported once", lambda: agrees(sandbox) and served(sandbox) == total)
        until("nothing is unknown", lambda: daemon.status()["traffic"]["unknown_outcomes"] == 0)
        status = daemon.status()
        assert status["traffic"]["reported_units"] == status["traffic"]["recorded_units"] == total
        assert all(len(one["recurly"]) == 1 for one in sandbox.ledger()["subscriptions"])


def _struck(base: str) -> int:
    return sum(call(f"{base}/control/faults")["struck"].values())


def test_a_second_daemon_on_one_sqlite_store_exits_with_5(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """The second says whose lock it is and leaves the first alone."""
    store_url = f"sqlite+aiosqlite:///{tmp_path}/billingd.db"
    with rehearsal(tmp_path, free_port, store_url) as (_sandbox, daemon):
        daemon.start()
        daemon.ready()
        second = subprocess.run(
            [sys.executable, "-m", "billingd", "--config", str(daemon.config), "run"],
            env=daemon.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert second.returncode == 5, second.stderr
        assert re.search("held by process [0-9]+ ", second.stderr)
        assert daemon.status()["ready"]


def test_systemd_hears_ready_watchdog_and_stopping(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Type=notify and WatchdogSec work without systemd: the same datagrams to the socket it names."""
    store_url = f"sqlite+aiosqlite:///{tmp_path}/billingd.db"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = tmp_path / "notify"
        listener.bind(str(address))
        listener.settimeout(PATIENCE_SECONDS)
        with rehearsal(tmp_path, free_port, store_url) as (_sandbox, daemon):
            daemon.start(NOTIFY_SOCKET=str(address), WATCHDOG_USEC="300000")
            heard = {listener.recv(100), listener.recv(100)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            assert daemon.terminate() == 0
            said = b"WATCHDOG=1"
            while said == b"WATCHDOG=1":
                said = listener.recv(100)
            assert said == b"STOPPING=1"


def test_a_wheel_brings_its_migrations(tmp_path: Path) -> None:
    """Installed into an empty folder, away from the checkout, `billingd db upgrade` makes a store."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".venv", ".git", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    installed = tmp_path / "installed"
    _python(checkout, "-m", "hatchling", "build", "-t", "wheel")
    [wheel] = (checkout / "dist").glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    _python(tmp_path, *pip, "--target", str(installed), str(wheel))
    shutil.rmtree(checkout)
    said = _python(
        tmp_path,
        *("-c", "import billingd; print(billingd.__file__); from billingd.__main__ import main; main()"),
        *("db", "upgrade"),
        PYTHONPATH=str(installed),
        BILLINGD_STORE__URL=f"sqlite+aiosqlite:///{tmp_path}/new.db",
    )
    assert str(installed) in said
    assert (tmp_path / "new.db").exists()
    current = _python(
        tmp_path,
        *("-m", "billingd", "db", "current"),
        PYTHONPATH=str(installed),
        BILLINGD_STORE__URL=f"sqlite+aiosqlite:///{tmp_path}/new.db",
    )
    assert "0004" in current


def _python(cwd: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "unix:/nowhere/at/all.sock"])
def test_an_address_that_cannot_be_had_is_said_without_a_traceback(
    tmp_path: Path, free_port: Callable[[], int], listen: str
) -> None:
    """Exit 1, the address and the reason."""
    if os.geteuid() == 0 and listen.endswith(":1"):
        taken = socket.create_server(("127.0.0.1", 0))
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
    with rehearsal(tmp_path, free_port, f"sqlite+aiosqlite:///{tmp_path}/billingd.db") as (_sandbox, daemon):
        process = daemon.start(BILLINGD_ADMIN__LISTEN=listen)
        assert process.wait(PATIENCE_SECONDS) == 1
        log = (tmp_path / "billingd.log").read_text()
        assert f"cannot listen on {listen}" in log
        assert "Traceback" not in log
    if os.geteuid() == 0 and not listen.startswith("unix"):
        taken.close()
