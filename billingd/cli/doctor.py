"""`doctor`: whether an installation would work, and what mends it."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from billingd.cli import output
from billingd.cli.config import everything_wrong
from billingd.cli.talk import ANSWER_SECONDS, Another, Daemon, DaemonAway, DaemonHangs

if TYPE_CHECKING:
    from billingd.doctor import Finding
    from billingd.settings import Fault, Settings

COLOURS: Final = {"ok": "green", "look": "yellow", "unreachable": "red", "configuration": "red"}
WORDS: Final = {
    "ok": "fine",
    "look": "to look at",
    "unreachable": "not reachable",
    "configuration": "of the configuration",
    "skipped": "not tried",
}
CODES: Final = (
    ("configuration", output.MISUSED),
    ("unreachable", output.UNREACHABLE),
    ("look", output.LOOK),
)
"""The first that occurs is the exit code."""


@click.command(short_help="Try everything billingd needs; print what mends it.")
@click.option(
    "--only", metavar="CHECK", help="Only checks whose name begins so, as in amplify or store.disk."
)
@output.json_option
@click.pass_context
def doctor(ctx: click.Context, only: str | None, as_json: bool) -> None:
    """Try each far side, credential, permission, clock and the store; print for each failing check what
    mends it. Changes nothing, at either side or here; works beside a running daemon and without one.

    Exit codes: 0 all fine; 2 the configuration has faults; 4 a far side or the database is not reachable;
    3 something else to look at. What the configuration does not say enough of is not tried, the rest is.

    \b
    Example:
      billingd doctor
      billingd doctor --only amplify
      billingd doctor --json
    """
    config: Path | None = ctx.obj
    settings, faults = everything_wrong(config)
    from billingd import doctor as parts

    found, running = parts.of_configuration(faults), False
    if settings is not None:
        found, running = asyncio.run(_examine(settings, faults, only))
    if only is not None and settings is not None and not found:
        raise click.BadParameter(f"no check's name begins with {only!r}", param_hint="--only")
    if as_json:
        output.document(_document(found, running=running))
    else:
        _print(found)
    states = {str(one.state) for one in found}
    ctx.exit(next((code for state, code in CODES if state in states), 0))


def _document(found: "Sequence[Finding]", *, running: bool) -> dict[str, Any]:
    return {
        "healthy": all(one.state in {"ok", "skipped"} for one in found),
        "daemon": running,
        "counts": {state: sum(one.state == state for one in found) for state in WORDS},
        "checks": [
            {"check": one.check, "state": str(one.state), "says": one.says, "fix": one.fix} for one in found
        ],
    }


def _print(found: "Sequence[Finding]") -> None:
    state_width = max(len(one.state) for one in found)
    width = max(len(one.check) for one in found)
    coloured = output.terminal() and not os.environ.get("NO_COLOR")
    for one in found:
        state = f"{one.state:<{state_width}}"
        if coloured and (colour := COLOURS.get(str(one.state))) is not None:
            state = click.style(state, fg=colour)
        click.echo(f"{state}  {one.check:<{width}}  {output.plain(one.says)}")
        if one.fix is not None:
            click.echo(f"{'':{state_width}}  {'':{width}}  fix: {output.plain(one.fix)}")
    counts = {word: sum(one.state == state for one in found) for state, word in WORDS.items()}
    click.echo("")
    click.echo(", ".join(f"{number} {word}" for word, number in counts.items() if number) + ".")


async def _examine(
    settings: "Settings", faults: "list[Fault]", only: str | None
) -> "tuple[list[Finding], bool]":
    import shutil
    from contextlib import AsyncExitStack
    from datetime import timedelta

    import aiohttp

    from billingd import daemon as root
    from billingd import doctor as parts
    from billingd import logs
    from billingd.loops import Clock
    from billingd.store.engine import Store

    logs.configure(level="critical")  # each finding is printed, and needs no log beside it
    named = {fault.key for fault in faults}
    clock, running = Clock(), Daemon(settings.admin.listen)
    away: str | None = None
    listens: parts.Listens = None
    try:
        await running.look("/healthz", "stuck")
    except DaemonAway as error:
        away = str(error)
        listens = (
            "hangs" if isinstance(error, DaemonHangs) else "another" if isinstance(error, Another) else None
        )

    async def reach(url: str) -> tuple[int, str | None]:
        patience = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with session.get(url, timeout=patience, allow_redirects=False) as answer:
                return answer.status, _code(await answer.content.read(65_536))
        except TimeoutError:
            raise OSError(f"no answer within {ANSWER_SECONDS:g} s") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise OSError(str(error)) from None

    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        amplify = recurly = store = None
        if not any(key.startswith("amplify.") for key in named):
            amplify = root.make_amplify(settings, session, clock)
        if not any(key.startswith("recurly.") for key in named):
            recurly = root.make_recurly(settings, clock)
            stack.push_async_callback(recurly.close, deadline=timedelta(0))
        if "store.url" not in named:
            store = await stack.enter_async_context(Store(settings.store.url))
        subject = parts.Subject(
            settings=settings,
            faults=faults,
            amplify=amplify,
            recurly=recurly,
            store=store,
            ask=running.look,
            away=away,
            listens=listens,
            reach=reach,
            now=clock.now,
            free_bytes=lambda directory: shutil.disk_usage(directory).free,
        )
        return await parts.findings(subject, only), away is None


def _code(body: bytes) -> str | None:
    """The code in billingd's own words for an error."""
    import json

    try:
        document = json.loads(body)
    except ValueError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


assert set(WORDS) >= {state for state, _ in CODES}
