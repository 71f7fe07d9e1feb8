"""`completion`: what a shell needs to complete commands and options."""

from typing import Final

import click
from click.shell_completion import ShellComplete, get_completion_class

SHELLS: Final = ("bash", "zsh", "fish")
VARIABLE: Final = "_BILLINGD_COMPLETE"
"""How a shell asks the program what may come next."""


@click.command(short_help="Print the script that makes a shell complete billingd.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script with which bash (4.4 or newer), zsh or fish completes commands, options and files.

    For one user: `eval "$(billingd completion bash)"` in ~/.bashrc; the same with zsh in ~/.zshrc; for fish
    into ~/.config/fish/completions/billingd.fish.

    \b
    Example:
      billingd completion bash > /usr/share/bash-completion/completions/billingd
      billingd completion zsh > /usr/share/zsh/site-functions/_billingd
      billingd completion fish > /usr/share/fish/vendor_completions.d/billingd.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    # not the shell's own `source`, which for bash starts one to ask its version: it need not be here
    script = ShellComplete.source(made(ctx.find_root().command, {}, "billingd", VARIABLE))
    # click's for fish would cut each help off at its first comma
    click.echo(script.replace('(string split "," ', '(string split -m 1 "," '))
