"""`man`: the manual page, made from the help of every command."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Final

import click

from billingd import __version__

EXIT_CODES: Final = (
    ("0", "done"),
    ("1", "failed"),
    ("2", "wrong usage or configuration"),
    ("3", "ran, and found something that a person must look at"),
    ("4", "daemon or far side not reachable"),
    ("5", "the store is held by another process, or is newer than this program"),
    ("130", "interrupted"),
)
ENVIRONMENT: Final = (
    ("BILLINGD_CONFIG", "the configuration file, where --config names none"),
    ("BILLINGD_SECTION__KEY", "one key of the configuration, as in BILLINGD_TRAFFIC__SOURCE"),
    ("CREDENTIALS_DIRECTORY", "where files named after secrets are, as in recurly.api_key; set by systemd"),
    ("BILLINGD_LOG_LEVEL", "debug, info, warning, error or critical"),
    ("BILLINGD_LOG_FORMAT", "json or text"),
    ("NO_COLOR", "when set, nothing is coloured"),
)
FILES: Final = (
    ("/etc/billingd/billingd.toml", "the configuration, where nothing else is named"),
    ("/var/lib/billingd/billingd.db", "the store, where store.url names no other"),
)


@click.command(short_help="Print the manual page.")
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page, billingd(1), made from the help of every command.

    \b
    Example:
      billingd man | man -l -
      billingd man > /usr/local/share/man/man1/billingd.1
    """
    click.echo("\n".join(page(ctx.find_root().command)))


def page(program: click.Command) -> Iterator[str]:
    """The page in man's macros, line by line."""
    root = click.Context(program, info_name="billingd", **program.context_settings)
    first, *more = _paragraphs(program)
    yield f'.TH BILLINGD 1 "" "billingd {__version__}" "User Commands"'
    yield ".SH NAME"
    yield _text(f"billingd - {first[0].lower()}{first[1:].rstrip('.')}")
    yield ".SH SYNOPSIS"
    yield r".B billingd"
    yield _text("[OPTIONS] COMMAND [ARGS]...")
    yield ".SH DESCRIPTION"
    yield from _body([first, *(each for each in more if not each.startswith("Exit codes"))])
    yield ".SH OPTIONS"
    yield from _options(program, root)
    yield ".SH COMMANDS"
    for command, context in _commands(program, root):
        yield f".SS {_text(_usage(command, context))}"
        yield from _body(_paragraphs(command))
        yield from _options(command, context)
    yield ".SH EXIT STATUS"
    yield from _list(EXIT_CODES)
    yield ".SH ENVIRONMENT"
    yield from _list(ENVIRONMENT)
    yield ".SH FILES"
    yield from _list(FILES)


def _commands(group: click.Command, above: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Every command below, with the context in which its help is written, in the order of the help."""
    if isinstance(group, click.Group):
        for name in group.list_commands(above):
            command = group.commands[name]
            context = click.Context(command, info_name=name, parent=above)
            yield command, context
            yield from _commands(command, context)


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _paragraphs(command: click.Command) -> list[str]:
    r"""Those of its help; one that begins with \b keeps its lines."""
    text = inspect.cleandoc(command.help or "")
    return [each for each in re.split(r"\n\s*\n", text) if each.strip()]


def _body(paragraphs: Sequence[str]) -> Iterator[str]:
    for each in paragraphs:
        if each.startswith("\b"):
            heading, *lines = each.removeprefix("\b").strip("\n").split("\n")
            yield from (
                ".PP",
                _text(heading),
                ".PP",
                ".RS 4",
                ".nf",
                *map(_text, inspect.cleandoc("\n".join(lines)).split("\n")),
            )
            yield from (".fi", ".RE")
        else:
            yield from (".PP", _text(" ".join(each.split())))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        inherited = context.parent is not None and "--help" in parameter.opts  # said once, of the program
        if record is not None and not inherited:
            yield from _list([record])


def _list(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, says in rows:
        yield from (".TP", f".B {_text(name)}", _text(says))


def _text(line: str) -> str:
    """A line in which nothing is taken for man's own: escapes, hyphens that are typed, a leading dot."""
    line = line.replace("\\", r"\e").replace("-", r"\-")
    line = "".join(c if c.isascii() else rf"\[u{ord(c):04X}]" for c in line)
    return rf"\&{line}" if line.startswith((".", "'")) else line
