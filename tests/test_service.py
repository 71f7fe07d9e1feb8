"""The units under a stand-in for systemd: readiness, credentials, watchdog, reload, sockets, sandboxing."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sandboxed
from manual_clock import ManualClock
from processes import PATIENCE_SECONDS, until
from service_manager import ROOT, UNITS, ServiceManager, unit
from under_load import HEADERS, event, kept, play

from billingd import daemon
from billingd.loops import Progress
from billingd.settings import ConfigurationError, load

ALL_UNITS = ["billingd.service", "billingd.socket", "billingd-backup.service", "billingd-backup.timer"]
EXPOSURE_MAX = 1.5


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path / "s")
    yield made
    made.close()


def test_no_webhook_is_refused_while_it_restarts_under_load(manager: ServiceManager) -> None:
    """All of them are answered with 202 by the one process or the other, and all are stored."""
    done = play(manager, restarts=1, senders=4)
    assert set(done.answers) == {"202"}
    assert done.acknowledged <= kept(manager.state / "billingd.db")
    heard = [line for _, line in manager.heard]
    assert heard.index("READY=1") < heard.index("STOPPING=1")
    assert manager.said("READY=1") == manager.said("STOPPING=1") == 2
    assert manager.said("WATCHDOG=1") >= 2


def test_a_reload_checks_first_then_changes_what_can_change(manager: ServiceManager) -> None:
    """By ExecReload=, which sees no credentials, and by SIGHUP; with a fault nothing changes."""
    manager.start(WATCHDOG_PID="1")
    sound = manager.config.read_text()
    manager.config.write_text(f'{sound}[webhooks]\nbody_bytes_max = 150\n[traffic]\nbillable = "success"\n')
    refused = manager.reload()
    assert refused.returncode == 2, refused.stderr
    assert 'traffic.billable: cannot be "success" with traffic.source "metrics"' in refused.stderr
    assert _send(manager, b" " * 200) == 202
    manager.config.write_text(f'{sound}[webhooks]\nbody_bytes_max = 150\n[traffic]\nwindow = "30m"\n')
    taken = manager.reload()
    assert (taken.returncode, taken.stdout) == (0, "reloaded: webhooks.body_bytes_max\n")
    assert "waiting for a restart: traffic.window" in taken.stderr
    assert _send(manager, b" " * 200) == 413
    heard = [line for _, line in manager.heard if not line.startswith("MONOTONIC_USEC=")]
    assert heard == ["READY=1", *["RELOADING=1", "READY=1"] * 2], "and no watchdog that is another's"
    assert len(manager.heard) == len(heard) + 2
    manager.config.write_text("[")
    assert manager.process is not None
    manager.process.send_signal(signal.SIGHUP)
    until("the fault is logged", lambda: "is not TOML" in manager.log().split("body_bytes_max")[-1])
    manager.config.write_text(sound)
    (manager.credentials / "webhooks.secret").unlink()
    (manager.credentials / "webhooks.secret").write_text("another-secret webhook-secret")
    manager.process.send_signal(signal.SIGHUP)
    until("the secret is taken over", lambda: "webhooks.secret" in manager.log())
    assert _send(manager, Authorization="another-secret") == 202
    assert _send(manager, path="/another-secret/webhook-secret") == 404
    until("the 404 is logged", lambda: '"status": 404' in manager.log())
    assert "another-secret" not in manager.log()
    assert "webhook-secret" not in manager.log()
    assert manager.stop() == 0


def _send(manager: ServiceManager, more: bytes = b"", path: str = "/webhooks/amplify", **headers: str) -> int:
    connection = http.client.HTTPConnection(*manager.address, timeout=PATIENCE_SECONDS)
    connection.request("POST", path, event("e1") + more, HEADERS | headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_it_works_under_the_sandbox_of_its_unit_by_a_unix_socket(tmp_path: Path) -> None:
    """System calls, address families, capabilities and executable memory as the unit has them."""
    if lacks := sandboxed.missing():
        pytest.skip(f"needs {lacks}")
    made = ServiceManager(tmp_path / "s", unix=True)
    try:
        made.start(sys.executable, str(ROOT / "tests/sandboxed.py"), str(UNITS / "billingd.service"))
        assert made.process is not None
        about = Path(f"/proc/{made.process.pid}/status").read_text()
        assert "Seccomp:\t2" in about
        assert "CapBnd:\t0000000000000000" in about
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(made.webhooks.getsockname())
            body = event("e1")
            caller.sendall(
                b"POST /webhooks/amplify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: webhook-secret\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert caller.recv(100).startswith(b"HTTP/1.1 202 ")
        assert oct(made.admin.stat().st_mode & 0o777) == "0o700"
        assert made.stop() == 0
    finally:
        made.close()


def test_a_socket_that_is_none_of_ours_is_said_without_a_traceback(tmp_path: Path) -> None:
    """Exit 1, with the directive that mends it."""
    made = ServiceManager(tmp_path / "s")
    try:
        made.launch(LISTEN_FDNAMES="billingd.socket")
        assert made.process is not None
        assert made.process.wait(PATIENCE_SECONDS) == 1
        assert "FileDescriptorName= must be webhooks or admin" in made.log()
        assert "Traceback" not in made.log()
    finally:
        made.close()


async def test_the_watchdog_is_fed_only_while_every_loop_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """One loop that is overdue is enough for silence, and systemd then ends the process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        progress = Progress()
        progress.turned("outbox", clock.now(), patience=timedelta(minutes=5))
        await daemon._feed(progress, clock)
        assert ear.recv(100) == b"WATCHDOG=1"
        progress.turned("traffic", clock.now(), patience=timedelta(hours=1))
        clock.advance(timedelta(minutes=6))
        await daemon._feed(progress, clock)
        with pytest.raises(BlockingIOError):
            ear.recv(100)
        progress.turned("outbox", clock.now(), patience=timedelta(minutes=5))
        await daemon._feed(progress, clock)
        assert ear.recv(100) == b"WATCHDOG=1"


async def test_whoever_does_not_hear_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """A notify socket that is gone, or no address at all, is logged."""
    for address in (str(tmp_path / "gone"), "\0", "@" + "x" * 200, "/" + "x" * 300):
        if "\0" not in address:
            monkeypatch.setenv("NOTIFY_SOCKET", address)
        await daemon._feed(Progress(), clock)
    await asyncio.sleep(0)


def test_no_start_that_fails_makes_the_socket_refuse_webhooks() -> None:
    """At a start limit the socket unit fails too; without one a webhook waits for the next attempt."""
    service = unit("billingd.service")
    assert (service["Restart"], service["StartLimitIntervalSec"]) == (["on-failure"], ["0"])
    assert "RestartPreventExitStatus" not in service, (
        "a start that the socket asks for would not wait RestartSec="
    )
    assert service["MemoryMax"] == ["1G"]


def _analyze(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt install systemd")
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


def test_the_units_are_sound() -> None:
    """`systemd-analyze verify` has nothing to say."""
    done = _analyze("verify", *(str(UNITS / name) for name in ALL_UNITS))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["billingd.service", "billingd-backup.service"])
def test_the_units_expose_little(name: str) -> None:
    """At most 1.5 of 10 by `systemd-analyze security`."""
    threshold = f"--threshold={int(EXPOSURE_MAX * 10)}"
    done = _analyze("security", "--offline=yes", "--no-pager", "--json=short", threshold, str(UNITS / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)


def test_the_timer_runs_a_command_that_exists_and_keeps_the_daemons_user() -> None:
    """The copy is made by the user whom the store belongs to, in the directory that is tidied after it."""
    service, backup = unit("billingd.service"), unit("billingd-backup.service")
    for directive in ("User", "DynamicUser", "StateDirectory", "SystemCallFilter", "CapabilityBoundingSet"):
        assert backup[directive] == service[directive]
    assert " db backup " in backup["ExecStart"][0]
    directory = "/var/lib/billingd/backups"
    assert backup["ExecStart"][0].count(directory) == 2
    assert directory in backup["ExecStartPost"][0]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_socket_unit_may_not_open_to_all_what_asks_for_no_secret(host: str) -> None:
    """The rule of webhooks.auth "none" holds for sockets that the configuration does not name."""
    settings = load(Path("/dev/null"), {"BILLINGD_WEBHOOKS__AUTH": "none"}).settings
    with socket.create_server((host, 0)) as listening:
        if host == "127.0.0.1":
            daemon._require_loopback_without_a_secret(settings, [listening])
            return
        with pytest.raises(ConfigurationError, match=r'webhooks\.auth: "none" is for loopback only'):
            daemon._require_loopback_without_a_secret(settings, [listening])
