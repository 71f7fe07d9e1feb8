"""Completion and the manual page: both cover every command, and need neither network nor program."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_bench import Bench
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class
from test_cli_usage import commands

from billingd.cli import program
from billingd.cli.completion import SHELLS, VARIABLE


def offered(*words: str, incomplete: str = "") -> list[CompletionItem]:
    """What a shell would offer after these words."""
    return ShellComplete(program, {}, "billingd", VARIABLE).get_completions(list(words), incomplete)


@pytest.mark.parametrize("path", [(), *commands(program)], ids=" ".join)
def test_every_command_and_option_is_offered(path: tuple[str, ...]) -> None:
    command: click.Command = program
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    options = {name for each in command.params if isinstance(each, click.Option) for name in each.opts}
    assert options <= {item.value for item in offered(*path, incomplete="-")}
    if isinstance(command, click.Group):
        assert {item.value for item in offered(*path)} == set(command.commands)


def test_values_and_files_are_offered() -> None:
    assert "dead" in {item.value for item in offered("outbox", "list", "--state")}
    assert [item.type for item in offered("--config")] == ["file"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_asks_the_program(shell: str, tmp_path: Path) -> None:
    result = Bench(tmp_path).run("completion", shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{VARIABLE}={shell}_complete" in result.stdout


def test_bash_completes_for_real(tmp_path: Path) -> None:
    """A real bash takes the script, asks the real program, and offers what it says."""
    program_in(tmp_path)
    script = tmp_path / "completion"
    script.write_text(Bench(tmp_path).run("completion", "bash").stdout)
    asked = (
        f"source {script}; COMP_WORDS=(billingd outbox di); COMP_CWORD=2; "
        f'_billingd_completion {tmp_path}/billingd; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "discard"


def program_in(directory: Path) -> None:
    """The real program under its name, as a shell finds it."""
    program_ = directory / "billingd"
    program_.write_text(f'#!/bin/sh\nexec {sys.executable} -m billingd "$@"\n')
    program_.chmod(0o755)


ZSH = r"""
compdef() { print "for $2" }
_describe() { print -l -- ${(P)3} }
_path_files() { print files }
source %s
words=(billingd outbox di); CURRENT=3; _billingd_completion
words=(billingd --config ''); CURRENT=3; _billingd_completion
"""
"""zsh without its completion system, whose functions say what they were given."""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed: apt-get install zsh")
def test_zsh_completes_for_real(tmp_path: Path) -> None:
    program_in(tmp_path)
    script = tmp_path / "completion"
    script.write_text(Bench(tmp_path).run("completion", "zsh").stdout)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["zsh", "-f", "-c", ZSH % script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == [
        "for billingd",
        "discard:Give one dead or pending action up for good.",
        "files",
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed: apt-get install fish")
def test_fish_completes_for_real(tmp_path: Path) -> None:
    """With help that has commas in it."""
    program_in(tmp_path)
    script = tmp_path / "completion"
    script.write_text(Bench(tmp_path).run("completion", "fish").stdout)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    asked = f'source {script}; complete --do-complete "billingd outbox re"'
    command = ["fish", "--no-config", "-c", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    offers = dict(line.split("\t") for line in done.stdout.splitlines())
    assert set(offers) == {"retry", "replay"}
    assert offers["retry"].startswith("Try one dead action again, or a pending")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_is_clicks_own(shell: str, tmp_path: Path) -> None:
    """Where the shell is not here to be asked: but for the one thing that is mended in it."""
    made = get_completion_class(shell)
    assert made is not None
    wanted = made.source_template % made(program, {}, "billingd", VARIABLE).source_vars()
    for_fish = wanted.replace('(string split "," $completion)', '(string split -m 1 "," $completion)')
    assert (for_fish != wanted) is (shell == "fish")
    assert Bench(tmp_path).run("completion", shell).stdout == f"{for_fish}\n"


def test_a_shell_there_is_none_for_is_wrong_usage(tmp_path: Path) -> None:
    result = Bench(tmp_path).run("completion", "csh")
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


def test_the_manual_page_has_every_command_option_and_example(tmp_path: Path) -> None:
    page = Bench(tmp_path).run("man").stdout
    assert page.isascii()
    text = re.sub(r"\\&", "", page).replace(r"\-", "-").replace(r"\e", "\\")
    sections = dict(
        re.findall(r"^\.SS (billingd [a-z -]+?)(?: [\[A-Z{][^\n]*)?\n(.*?)(?=^\.S[SH] )", text, re.M | re.S)
    )
    for path in commands(program):
        command: click.Command = program
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        said = sections[f"billingd {' '.join(path)}"]
        assert "Example:" in said
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert all(name in said for name in option.opts), (path, option.opts)
    assert re.findall(r"^\.SH (.*)$", text, re.M) == [
        *("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "FILES")
    ]
    for code in ("0", "1", "2", "3", "4", "5", "130"):
        assert f".TP\n.B {code}\n" in text


@pytest.mark.skipif(
    shutil.which("groff") is None, reason="groff is not installed: apt-get install groff-base"
)
def test_the_manual_page_is_well_formed(tmp_path: Path) -> None:
    page = Bench(tmp_path).run("man").stdout
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "billingd outbox list" in done.stdout
