"""README says only what is true: its quick start runs, its commands and keys exist."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from billingd.cli import program as cli
from billingd.settings import load, shown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_quick_start_runs_as_it_is_written(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Two processes by configuration file and environment alone, all three flows by curl, sums compared.

    Only its three ports are others, for they may be taken here.
    """
    [script] = [block for block in blocks("sh") if "billingd sandbox" in block]
    sandbox, admin, webhooks = free_port(), free_port(), free_port()
    script = script.replace("127.0.0.1:8010", f"127.0.0.1:{sandbox}").replace(
        "127.0.0.1:8081", f"127.0.0.1:{admin}"
    )
    listen = f"--listen 127.0.0.1:{sandbox}"
    assert listen in script
    script = script.replace(listen, f"{listen} --webhook-url http://127.0.0.1:{webhooks}/webhooks/amplify")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BILLINGD_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["BILLINGD_ADMIN__LISTEN"] = f"127.0.0.1:{admin}"
    shell = subprocess.Popen(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        said, _ = shell.communicate()
        pytest.fail(said)
    assert shell.returncode == 0, said
    assert "served 50 = reported 50 = billed 50" in said.splitlines()


def find(words: list[str]) -> click.Command | None:
    command: click.Command = cli
    for word in words:
        if not isinstance(command, click.Group):
            return command
        found = command.commands.get(word)
        if found is None:
            return None
        command = found
    return command


def test_every_command_it_names_exists() -> None:
    """Each `billingd …` in README, in code or in a block, is a command of the program."""
    text = README
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    named = re.findall(r"`billingd (?:--config \S+ )?([a-z][a-z-]+)", text)
    named += re.findall(r"(?:^|/)billingd (?:--config \S+ )?([a-z][a-z-]+)", shell, re.MULTILINE)
    assert len(set(named)) > 10
    assert sorted(set(named) - cli.commands.keys()) == []
    for group in ("outbox", "traffic", "held", "db", "notify", "config", "hooks"):
        assert isinstance(cli.commands[group], click.Group)
        for verb in re.findall(rf"billingd {group} ([a-z-]+)", text):
            assert verb in cli.commands[group].commands, f"billingd {group} {verb}"  # type: ignore[attr-defined]


PROMISED = (
    "run demo sandbox check-config doctor status resync reconcile explain adopt",
    "config show",
    "outbox list show retry replay discard",
    "traffic poll windows backfill",
    "held list release write-off",
    "hooks show apply remove",
    "notify test",
    "metrics dashboard alerts",
    "db upgrade current check backup restore",
)


def test_every_command_that_was_promised_exists() -> None:
    """All of the contract's commands; a line is commands, or a group and its commands."""
    alone, *groups = [line.split() for line in PROMISED]
    assert [one for one in alone if find([one]) is None] == []
    assert [(group, one) for group, *verbs in groups for one in verbs if find([group, one]) is None] == []


@pytest.mark.parametrize("section", ["amplify", "recurly", "webhooks", "store", "traffic", "outbox"])
def test_the_keys_and_defaults_it_lists_are_the_real_ones(section: str, tmp_path: Path) -> None:
    """The TOML block of README is a configuration that changes nothing, and misses no key."""
    [block] = [block for block in blocks("toml") if "[amplify]" in block]
    listed = tomllib.loads(block)
    config = tmp_path / "billingd.toml"
    config.write_text(block, encoding="utf-8")
    written = {row["key"]: row["value"] for row in shown(load(config, {}))}
    defaults = {row["key"]: row["value"] for row in shown(load(None, {}))}
    assert written == defaults
    secret = {"amplify.client_secret", "recurly.api_key", "webhooks.secret"}
    override = {"amplify.central_url", "amplify.login_url", "amplify.platform_url", "recurly.base_url"}
    expected = {key for key in defaults if key.startswith(f"{section}.")} - secret - override
    assert {f"{section}.{key}" for key in listed[section]} == expected
