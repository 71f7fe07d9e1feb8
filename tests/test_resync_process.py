"""Resync in the real process, with neither webhooks nor feed: at the first start, and by command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, Daemon, open_shop, rehearsal, subscribe, until

ALONE = {"BILLINGD_CATCH_UP__WATCH_TOPIC": ""}


def command(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """`billingd` as an operator runs it."""
    return subprocess.run(
        [sys.executable, "-m", "billingd", "--config", str(daemon.config), *words],
        env=daemon.environment | ALONE,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def approved(sandbox: object) -> list[str]:
    ledger = sandbox.ledger()  # type: ignore[attr-defined]
    return sorted(one["name"] for one in ledger["subscriptions"] if one["approval"] == "approved")


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_the_first_start_finds_what_was_there_and_the_command_what_came_since(
    tmp_path: Path, store_url: str, free_port: Callable[[], int]
) -> None:
    """Nobody tells the daemon anything, ever."""
    with rehearsal(tmp_path, free_port, store_url) as (sandbox, daemon):
        sandbox.hook(f"http://127.0.0.1:{free_port()}/")
        open_shop(sandbox)
        subscribe(sandbox, "early")
        daemon.start(**ALONE)
        daemon.ready()
        until("what was there is provisioned", lambda: approved(sandbox) == ["early"])
        subscribe(sandbox, "late")
        dry = command(daemon, "resync", "--dry-run")
        assert dry.returncode == 3, dry.stderr
        assert "+ subscription  late" in dry.stdout
        assert "Plan: 1 to create, 0 to change, 0 to end." in dry.stdout
        done = command(daemon, "resync", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["enqueued"] == 1
        until("what came since is provisioned", lambda: approved(sandbox) == ["early", "late"])
        until("nothing is left", lambda: command(daemon, "resync", "--dry-run").returncode == 0)
        assert daemon.terminate() == 0
        without = command(daemon, "resync", "--dry-run")
        assert without.returncode == 0, without.stderr
        assert "done on the store itself" in without.stderr
