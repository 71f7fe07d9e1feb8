"""`outbox`: dead letters and backlog, and what an operator may do to them."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_change, ask_or_read, settings_of
from billingd.cli.talk import Daemon, Declined
from billingd.domain.attempts import State

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store

Command = TypeVar("Command", bound=Callable[..., Any])

MOVABLE: Final = (State.DEAD, State.PENDING)
"""States that an operator can change."""

LIST_MAX: Final = 1_000

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which actions a listing names."""

    states: tuple[str, ...]
    kind: str | None
    subject: str | None
    cause: str | None
    limit: int

    async def ask(self, daemon: Daemon) -> list[dict[str, Any]]:
        """The daemon's listing."""
        query = [("state", state) for state in self.states] + [("limit", str(self.limit))]
        named = {"kind": self.kind, "subject": self.subject, "cause": self.cause}
        query += [(name, value) for name, value in named.items() if value is not None]
        actions: list[dict[str, Any]] = (await daemon.get("/outbox", key="actions", query=query))["actions"]
        return actions

    async def read(self, store: "Store") -> list[dict[str, Any]]:
        """The store's listing."""
        from billingd.admin import operations, status

        selection = operations.Selection((), self.kind, self.subject, self.cause, self.states)
        rows = await operations.selected(store, selection, limit=self.limit)
        return [status.action_item(row) for row in rows]


def filter_options(command: Command) -> Command:
    """--kind, --subject, --cause and --limit."""
    for option in (
        click.option(
            "--limit",
            type=click.IntRange(1, LIST_MAX),
            default=100,
            show_default=True,
            help="At most so many, the oldest first.",
        ),
        click.option("--cause", metavar="TEXT", help="Only those whose last error contains this."),
        click.option("--subject", metavar="SUBJECT", help="Only those about this subject."),
        click.option("--kind", metavar="KIND", help="Only actions of this kind."),
    ):
        command = option(command)
    return command


@click.group()
def outbox() -> None:
    """Look at dead letters and backlog; try again, or give up.

    Works over the running daemon, or without one on the store itself.

    \b
    Example:
      billingd outbox list --state dead
      billingd outbox replay --cause timeout
    """


@outbox.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([state.value for state in State]),
    help="Only this state; may be given several times. Default: dead, pending and leased.",
)
@filter_options
@output.json_option
@click.pass_obj
def list_(
    config: Path | None,
    states: tuple[str, ...],
    kind: str | None,
    subject: str | None,
    cause: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List actions, the oldest first.

    \b
    Example:
      billingd outbox list --state dead --kind report_usage --json
    """
    chosen = Filter(states or (State.DEAD, State.PENDING, State.LEASED), kind, subject, cause, limit)
    actions = asyncio.run(ask_or_read(settings_of(config), chosen.ask, chosen.read, quiet=as_json))
    if as_json:
        output.document({"actions": actions})
        return
    _table(actions)
    if len(actions) == limit:
        output.note(f"these are the first {limit}; --limit shows more (at most {LIST_MAX})")


@outbox.command()
@click.argument("action_id", metavar="ID", type=click.IntRange(min=1))
@output.json_option
@click.pass_obj
def show(config: Path | None, action_id: int, as_json: bool) -> None:
    """Show everything that is known of one action.

    \b
    Example:
      billingd outbox show 7
    """
    action = asyncio.run(_find(settings_of(config), action_id, quiet=as_json))
    if as_json:
        output.document(action)
        return
    for name, value in action.items():
        if value is not None:
            output.say(f"{name:<12}{json.dumps(value) if isinstance(value, dict) else value}")


@outbox.command()
@click.argument("action_id", metavar="ID", type=click.IntRange(min=1))
@dry_run_option
@output.json_option
@click.pass_obj
def retry(config: Path | None, action_id: int, dry_run: bool, as_json: bool) -> None:
    """Try one dead action again, or a pending one at once.

    \b
    Example:
      billingd outbox retry 7 --dry-run
      billingd outbox retry 7
    """
    settings = settings_of(config)
    if dry_run:
        action = asyncio.run(_movable(settings, action_id, quiet=as_json))
    else:
        asyncio.run(_retry(settings, action_id, quiet=as_json))
    if as_json:
        output.document({"retried": action_id, "dry_run": dry_run})
    elif dry_run:
        output.say(f"would try again: {_line(action)}")
    else:
        output.say(f"action {action_id} will be tried again")


@outbox.command()
@click.argument("action_id", metavar="ID", type=click.IntRange(min=1))
@click.option("--reason", required=True, metavar="TEXT", help="Why it is given up; kept with the action.")
@dry_run_option
@output.json_option
@click.pass_obj
def discard(config: Path | None, action_id: int, reason: str, dry_run: bool, as_json: bool) -> None:
    """Give one dead or pending action up for good.

    \b
    Example:
      billingd outbox discard 7 --reason "billed by hand, invoice 1042"
    """
    if not reason.strip():
        raise click.BadParameter("say in a few words why this action is given up", param_hint="--reason")
    settings = settings_of(config)
    if dry_run:
        action = asyncio.run(_movable(settings, action_id, quiet=as_json))
    else:
        asyncio.run(_discard(settings, action_id, reason, quiet=as_json))
    if as_json:
        output.document({"discarded": action_id, "dry_run": dry_run})
    elif dry_run:
        output.say(f"would be discarded: {_line(action)}")
    else:
        output.say(f"action {action_id} is discarded")


@outbox.command()
@click.argument("ids", metavar="[ID]...", nargs=-1, type=click.IntRange(min=1))
@click.option(
    "--state",
    type=click.Choice([state.value for state in MOVABLE]),
    default=State.DEAD.value,
    show_default=True,
    help="pending: try those that wait for their next attempt at once.",
)
@click.option("--kind", metavar="KIND", help="Only actions of this kind.")
@click.option("--subject", metavar="SUBJECT", help="Only those about this subject.")
@click.option("--cause", metavar="TEXT", help="Only those whose last error contains this.")
@click.option("--limit", type=click.IntRange(1, LIST_MAX), help="At most so many, the oldest first.")
@dry_run_option
@output.json_option
@click.pass_obj
def replay(
    config: Path | None,
    ids: tuple[int, ...],
    state: str,
    kind: str | None,
    subject: str | None,
    cause: str | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try all dead actions again, or a selection of them, as after an outage.

    \b
    Example:
      billingd outbox replay --dry-run
      billingd outbox replay --kind report_usage --cause timeout
      billingd outbox replay 7 9 12
    """
    settings = settings_of(config)
    chosen = _Replay(ids, state, kind, subject, cause, limit)
    if dry_run:
        actions = asyncio.run(ask_or_read(settings, chosen.ask_which, chosen.read_which, quiet=as_json))
        replayed = [action["id"] for action in actions]
        if not as_json:
            _table(actions)
    else:
        replayed = asyncio.run(ask_or_change(settings, chosen.ask, chosen.change, quiet=as_json))
    if as_json:
        output.document({"replayed": replayed, "dry_run": dry_run})
    else:
        output.say(f"{len(replayed)} action(s) {'would be' if dry_run else 'will be'} tried again")
