"""`outbox`: dead letters and backlog, and what an operator may do to them."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_change, ask_or_read, settings_of
from billingd.cli.selection import LIST_MAX, Chosen, find_at_daemon, find_in_store
from billingd.cli.talk import Daemon, Declined
from billingd.domain.attempts import State

if TYPE_CHECKING:
    from billingd.settings import Settings
    from billingd.store.engine import Store

Command = TypeVar("Command", bound=Callable[..., Any])

MOVABLE: Final = (State.DEAD, State.PENDING)
"""States that an operator can change."""

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
looks_option = click.option(
    "--dry-run", is_flag=True, expose_value=False, help="As the others take it; this only looks anyway."
)


def _kind(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """One that there is: a misspelt one would look as if there were nothing to do."""
    from billingd.domain.kinds import KINDS

    if value is not None and value not in KINDS:
        raise click.BadParameter(f"{value!r} is no kind of action; there are {', '.join(sorted(KINDS))}")
    return value


def filter_options(command: Command) -> Command:
    """--kind, --subject and --cause."""
    for option in (
        click.option("--cause", metavar="TEXT", help="Only those whose last error contains this."),
        click.option("--subject", metavar="SUBJECT", help="Only those about this subject."),
        click.option("--kind", metavar="KIND", callback=_kind, help="Only actions of this kind."),
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
@click.option(
    "--limit",
    type=click.IntRange(1, LIST_MAX),
    default=100,
    show_default=True,
    help="At most so many, the oldest first.",
)
@looks_option
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
    chosen = Chosen(states or (State.DEAD, State.PENDING, State.LEASED), kind, subject, cause, limit)
    actions = asyncio.run(ask_or_read(settings_of(config), chosen.ask, chosen.read, quiet=as_json))
    if as_json:
        output.document({"actions": actions})
        return
    _table(actions)
    if len(actions) == limit:
        output.note(f"these are the first {limit}; --limit shows more (at most {LIST_MAX})")


@outbox.command()
@click.argument("action_id", metavar="ID", type=output.ID)
@looks_option
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
@click.argument("action_id", metavar="ID", type=output.ID)
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
@click.argument("action_id", metavar="ID", type=output.ID)
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
@click.argument("ids", metavar="[ID]...", nargs=-1, type=output.ID)
@click.option(
    "--state",
    type=click.Choice([state.value for state in MOVABLE]),
    default=State.DEAD.value,
    show_default=True,
    help="pending: try those that wait for their next attempt at once.",
)
@filter_options
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
    chosen = Chosen((state,), kind, subject, cause, limit, tuple(dict.fromkeys(ids)) or None)
    if dry_run:
        actions = asyncio.run(ask_or_read(settings, chosen.ask, chosen.read, quiet=as_json))
        replayed = [int(action["id"]) for action in actions]
        if not as_json:
            _table(actions)
    else:
        replayed = asyncio.run(
            ask_or_change(settings, chosen.replay_at_daemon, chosen.replay_in_store, quiet=as_json)
        )
    if as_json:
        output.document({"replayed": replayed, "dry_run": dry_run})
    else:
        output.say(f"{len(replayed)} action(s) {'would be' if dry_run else 'will be'} tried again")
    if left := [action_id for action_id in chosen.ids or () if action_id not in replayed]:
        raise Declined(f"not {state}, or not of this selection: {', '.join(map(str, left))}")


async def _find(settings: "Settings", action_id: int, *, quiet: bool) -> dict[str, Any]:
    action = await ask_or_read(
        settings,
        lambda daemon: find_at_daemon(daemon, action_id),
        lambda store: find_in_store(store, action_id),
        quiet=quiet,
    )
    if action is None:
        raise Declined(f"there is no action {action_id}; `billingd outbox list` shows those there are")
    return action


async def _movable(settings: "Settings", action_id: int, *, quiet: bool) -> dict[str, Any]:
    """The action, when an operator can change it."""
    action = await _find(settings, action_id, quiet=quiet)
    if action["state"] not in MOVABLE:
        raise Declined(f"there is no dead or pending action {action_id}: it is {action['state']}")
    return action


async def _retry(settings: "Settings", action_id: int, *, quiet: bool) -> None:
    async def ask(daemon: Daemon) -> None:
        await daemon.post(f"/outbox/{action_id}/retry", key="retried")

    async def change(store: "Store") -> None:
        from billingd.admin import operations

        if not await operations.retry(store, action_id, now=datetime.now(UTC)):
            raise Declined(
                f"there is no dead or pending action {action_id}; `billingd outbox list` shows what waits"
            )

    await ask_or_change(settings, ask, change, quiet=quiet)


async def _discard(settings: "Settings", action_id: int, reason: str, *, quiet: bool) -> None:
    async def ask(daemon: Daemon) -> None:
        await daemon.post(f"/outbox/{action_id}/discard", {"reason": reason}, key="discarded")

    async def change(store: "Store") -> None:
        from billingd.admin import operations

        if not await operations.discard(store, action_id, reason=reason, now=datetime.now(UTC)):
            raise Declined(
                f"there is no dead or pending action {action_id}; `billingd outbox list` shows what waits"
            )

    await ask_or_change(settings, ask, change, quiet=quiet)


def _table(actions: Sequence[Mapping[str, Any]]) -> None:
    output.table(
        ["ID", "STATE", "KIND", "SUBJECT", "ATTEMPT", "DUE", "LAST ERROR"],
        (
            [action[name] for name in ("id", "state", "kind", "subject", "attempt", "due_at", "error")]
            for action in actions
        ),
    )


def _line(action: Mapping[str, Any]) -> str:
    return f"action {action['id']}, {action['state']}: {action['kind']} of {action['subject']}"
