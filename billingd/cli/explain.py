"""`explain`: where a usage record comes from and what became of it; all there is of a subscription."""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from billingd.cli import output
from billingd.cli.reach import ask_or_read, settings_of

if TYPE_CHECKING:
    from billingd.cli.talk import Daemon
    from billingd.settings import Settings
    from billingd.store.engine import Store


@click.command(short_help="Tell where a usage record comes from, or all there is of a subscription.")
@click.argument("about", metavar="TAG|SUBSCRIPTION")
@click.option(
    "--records",
    type=click.IntRange(0, 10_000),
    default=200,
    show_default=True,
    help="Of a subscription: how many of its records, the newest.",
)
@output.json_option
@click.pass_obj
def explain(config: Path | None, about: str, records: int, as_json: bool) -> None:
    """Tell all that is known of a usage record (by its merchant tag), or of a subscription.

    A record: its window, the readings that made it, every attempt to send it, what operators did. A
    subscription (by id, name, or Recurly's uuid): its records, and what the next invoice will hold.

    \b
    Example:
      billingd explain bd1:6f1c…:20261122T100000Z:3600:1
      billingd explain 8ac9dd00aa000001aa000001aa000001 --records 20
    """
    found = asyncio.run(_read(settings_of(config), about, records, as_json))
    if as_json:
        output.document(found)
        return
    for line in _record(found) if "tag" in found else _subscription(found):
        output.say(line)
    if found.get("records"):
        output.say("")
        columns = ("window_start", "window_end", "add_on", "revision", "units", "state", "tag")
        titles = [name.upper().replace("_", " ") for name in columns]
        output.table(titles, ([row[name] for name in columns] for row in found["records"]))


async def _read(settings: "Settings", about: str, records: int, as_json: bool) -> dict[str, Any]:
    from billingd.admin import explain as admin

    async def ask(daemon: "Daemon") -> dict[str, Any]:
        query = [("about", about), ("records", str(records))]
        return await daemon.get("/explain", key="subscription", query=query)

    async def read(store: "Store") -> dict[str, Any]:
        return await admin.explain(store, about, now=datetime.now(UTC), records=records)

    return await ask_or_read(settings, ask, read, quiet=as_json)


def _record(found: Mapping[str, Any]) -> Iterator[str]:
    who, window, sending, action = (found[name] for name in ("subscription", "window", "sending", "action"))
    yield f"record        {found['tag']}"
    if found["corrects"]:
        yield f"corrects      {found['corrects']}"
    yield f"subscription  {who['title']} ({who['id']}), at Recurly {who['recurly_uuid']}"
    yield f"add-on        {found['add_on']['title']} ({found['add_on']['code']})"
    yield f"window        {window['start']} to {window['end']}, revision {found['revision']}"
    units = "not known yet" if found["units"] is None else found["units"]
    yield f"units         {units}, at {found['usage_timestamp']}"
    if found["period"]:
        yield f"period        {found['period']['started_at']} to {found['period']['ends_at']}"
    where = f" as {found['recurly_usage_id']}, {found['reported_at']}" if found["recurly_usage_id"] else ""
    yield f"state         {found['state']}{where}"
    for reading in found["readings"]:
        ours = "  <- this record" if reading["tag"] == found["tag"] else ""
        counted = f"Amplify had counted {reading['units']} in this window"
        yield f"booked        {reading['booked_at']}  {counted} (revision {reading['revision']}){ours}"
    for one in found["corrections"]:
        units = "units not known yet" if one["units"] is None else f"{one['units']} unit(s)"
        yield f"corrected     {units}, {one['state']} as {one['tag']}"
    if not found["attempts"]:
        yield "sent          never" if sending is None else "sent          never from here: Recurly had it"
    for one in found["attempts"]:
        again = "" if one["first_sent_at"] == one["last_sent_at"] else f" (first {one['first_sent_at']})"
        outcome = "no clear answer" if one["outcome"] == "open" else one["outcome"]
        yield f"sent          {one['last_sent_at']}{again}, epoch {one['epoch']}: {outcome}"
        yield f"  key         {one['key']}"
    if action is not None:
        why = f": {action['error']}" if action["error"] else ""
        yield f"action        {action['id']} is {action['state']}, attempt {action['attempt']}{why}"
    yield from _events(found)


def _subscription(found: Mapping[str, Any]) -> Iterator[str]:
    link = found["subscription"]
    yield f"subscription  {link['title']} ({link['id']}, name {link['name']})"
    for other in found["others"]:
        yield f"same name     {other}"
    yield f"at Recurly    {link['recurly_uuid']}, {link['billed_state'] or 'not seen yet'}; {link['account']}"
    yield f"plan          {link['plan']}"
    until = f" until {link['usage_until']}" if link["usage_until"] else ""
    yield f"state         {link['state']}; usage counts from {link['usage_from']}{until}"
    for row in found["totals"]:
        yield (
            f"add-on        {row['title'] or row['add_on']}: {row['recorded_units']} units recorded, "
            f"{row['reported_units']} reported, {row['unreported_units']} to report, {row['held_units']} "
            f"held, {row['written_off_units']} written off"
        )
    invoice = found["next_invoice"]
    if invoice is None:
        yield "next invoice  no open billing period is known"
    else:
        trial = ", after a trial, whose usage is not billed" if invoice["trial"] else ""
        yield f"next invoice  {invoice['period_ends_at']}{trial}; so far"
        yield f"              base price: {_money(invoice, 'base_price')}"
        for line in invoice["lines"]:
            why = f": {line['why']}" if line["why"] else ""
            yield f"              {line['title']}: {line['units']} units, {_money(line, 'amount')}{why}"
            if line["corrected_units"] or line["corrected_amount"] != "0":
                units, costs = line["corrected_units"], _money(line, "corrected_amount")
                yield f"              corrections of {line['title']}: {units} units, {costs}"
        yield f"              in all: {_money(invoice, 'total')}, before taxes and discounts"
        yield "              (at its plan's prices of today; a subscription keeps those of the day it began)"
    yield from _events(found)


def _money(line: Mapping[str, Any], what: str) -> str:
    return "not known" if line[what] is None else f"{line[what]} {line['currency']}"


def _events(found: Mapping[str, Any]) -> Iterator[str]:
    """What went otherwise than expected, and what people did about it, in order."""
    told = [
        (
            entry["at"],
            f"{entry['kind']} "
            + ", ".join(f"{k} {v}" for k, v in entry.items() if k not in _KNOWN and v is not None),
        )
        for entry in found["history"]
    ]
    for item in found["held"]:
        told.append((item["since"], f"held ({item['kind']}, item {item['id']}): {item['reason']}"))
        if item["closed_at"]:
            told.append((item["closed_at"], f"no longer held (item {item['id']}): {item['resolution']}"))
    for at, what in sorted(told):
        yield f"then          {at}  {what}"


_KNOWN = frozenset({"at", "kind"})
