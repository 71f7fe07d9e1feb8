"""What commands print: tables and notes for people, one JSON document for programs, and exit codes."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click

from billingd.domain.errors import BillingdError, StoreBusy, StoreHeld

FAILED: Final = 1
MISUSED: Final = 2
LOOK: Final = 3
UNREACHABLE: Final = 4
BUSY: Final = 5
INTERRUPTED: Final = 130

WIDTH_WITHOUT_TERMINAL: Final = 100_000
"""Lines for a pipe are not folded."""

STOP_IT: Final = "if it is the daemon, stop it first: `systemctl stop billingd.socket billingd`"

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on standard output, nothing else."
)


ID_MAX: Final = 2**62
"""Beyond it no database can number anything."""


class _Id(click.IntRange):
    """The number of an action or a held item."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number > ID_MAX:
            self.fail(f"{value} is more than any number that is given", param, ctx)
        return number


ID: Final = _Id()


class Unreachable(BillingdError):
    """The daemon, or a far side behind it, does not answer although the command needs it."""


def fail(error: BillingdError) -> int:
    """Print what went wrong, and return the exit code that says which sort it is."""
    from billingd.settings import ConfigurationError
    from billingd.store.engine import ServerAway

    if isinstance(error, ConfigurationError):
        for fault in error.faults:
            click.echo(plain(str(fault)), err=True)
        return MISUSED
    if isinstance(error, ServerAway):
        click.echo(f"Error: {plain(str(error))}; see that its server runs and lets us in", err=True)
        return UNREACHABLE
    step = f"; {STOP_IT}" if isinstance(error, StoreHeld) else ""
    click.echo(f"Error: {plain(str(error))}{step}", err=True)
    if isinstance(error, StoreBusy):
        return BUSY
    return UNREACHABLE if isinstance(error, Unreachable) else FAILED


def document(value: Mapping[str, Any]) -> None:
    """The one JSON document of a command."""
    click.echo(json.dumps(value, indent=2))


def say(text: str) -> None:
    """A line of the answer."""
    click.echo(plain(text))


def note(text: str) -> None:
    """A line beside the answer: progress, or where it comes from."""
    click.echo(plain(text), err=True)


def plain(text: str) -> str:
    """Text in which nothing steers the terminal, whoever wrote it."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def terminal() -> bool:
    """Whether a person reads along."""
    return sys.stdout.isatty()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows in columns: folded to the terminal's width, one line each elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    folded = terminal()
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    if not grid.row_count:
        note("there is none")
    console = Console(
        file=sys.stdout,
        force_terminal=folded,
        color_system="auto" if folded and not os.environ.get("NO_COLOR") else None,
        width=None if folded else WIDTH_WITHOUT_TERMINAL,
        highlight=False,
    )
    if folded:
        console.print(grid)
        return
    with console.capture() as captured:
        console.print(grid)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _cell(value: Any) -> str:
    """One value on one line."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return plain(str(value).replace("\n", " "))
