"""The proof: what was served, recorded, reported and billed per subscription, and whether that agrees."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from billingd.demo.marketplace import BY_NAME, Subscriber, amplify_price

Json = dict[str, Any]

ADD_ON: Final = "amplify-quota-"
WIDTH_WITHOUT_TERMINAL: Final = 160
COLUMNS: Final = ("subscriber", "plan", "pricing", "served", "recorded", "reported", "billed", "invoiced")
NUMBERS: Final = frozenset(COLUMNS[3:])


@dataclass(frozen=True, slots=True)
class Row:
    """One subscription in the end. `counted` is the sandbox's own count of what was served."""

    id: str
    subscriber: str
    plan: str
    model: str
    currency: str
    served: int
    counted: int
    recorded: int
    reported: int
    billed: int
    invoiced: Decimal
    mispriced: tuple[str, ...] = ()
    """Sentences about invoice lines that are not what Amplify's rules charge."""
    subscriptions: int = 1
    """How many Recurly has for it."""
    tags_twice: tuple[str, ...] = ()

    @property
    def drift(self) -> int:
        """How many units any later stage differs from what was served."""
        return max(abs(self.served - other) for other in (self.recorded, self.reported, self.billed))


@dataclass(frozen=True, slots=True)
class Injected:
    """Something that was made to go wrong: how often it was meant to, and did."""

    what: str
    planned: int
    happened: int


@dataclass(frozen=True, slots=True)
class Proof:
    """All that is known in the end; `faults` are further sentences about what should not be."""

    rows: tuple[Row, ...]
    kills: int
    injected: tuple[Injected, ...]
    held: tuple[str, ...]
    faults: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: Mapping[str, int] = field(default_factory=dict)

    def total(self, stage: str) -> int:
        """The sum of one column."""
        return sum(int(getattr(row, stage)) for row in self.rows)

    @property
    def drift(self) -> int:
        """Units by which the subscriptions differ, in all."""
        return sum(row.drift for row in self.rows)

    @property
    def faults_happened(self) -> int:
        """How often something was made to go wrong, kills left out."""
        return sum(each.happened for each in self.injected)

    def problems(self) -> list[str]:
        """Everything for which the demo fails, in sentences."""
        return [*self._of_the_demo(), *(told for row in self.rows for told in _problems(row)), *self.faults]

    def verdict(self) -> str:
        """The closing line."""
        served, billed, drift = self.total("served"), self.total("billed"), self.drift
        if drift == 0:
            return f"served {served} = billed {billed}, drift 0"
        return f"served {served}, billed {billed}, drift {drift}"

    def document(self) -> Json:
        """What `--json` prints."""
        return {
            "drift_units": self.drift,
            "served_units": self.total("served"),
            "recorded_units": self.total("recorded"),
            "reported_units": self.total("reported"),
            "billed_units": self.total("billed"),
            "kills": self.kills,
            "faults": self.faults_happened,
            "subscriptions": [_shown(row) for row in self.rows],
            "injected": [
                {"what": each.what, "planned": each.planned, "happened": each.happened}
                for each in self.injected
            ],
            "held": list(self.held),
            "problems": self.problems(),
            "seconds": round(self.seconds, 1),
        }

    def _of_the_demo(self) -> Iterator[str]:
        if not self.rows or not self.total("served"):
            yield "No traffic was served, so nothing is proved."
        if self.kills < 1:
            yield "The daemon was never killed, so nothing is proved about crashes."
        if self.faults_happened < 1:
            yield "No fault struck, so nothing is proved about faults."
        for each in self.injected:
            if each.happened < each.planned:
                yield f"Planned {each.planned} time(s), happened {each.happened}: {each.what}."


def row(subscriber: Subscriber, seen: Mapping[str, Any], served: Mapping[str, int], recorded: int) -> Row:
    """One subscription from the sandbox's ledger, the demo's count per quota, and billingd's ledger."""
    plan = BY_NAME[subscriber.plan]
    invoices = seen["invoices"]
    return Row(
        id=seen["id"],
        subscriber=subscriber.name,
        plan=plan.title,
        model=plan.model,
        currency=plan.currency,
        served=sum(served.values()),
        counted=seen["served_units"],
        recorded=recorded,
        reported=seen["reported_units"],
        billed=seen["billed_units"],
        invoiced=sum((Decimal(invoice["total"]) for invoice in invoices), Decimal(0)),
        mispriced=tuple(_mispriced(subscriber, seen, served)),
        subscriptions=len(seen["recurly"]),
        tags_twice=tuple(seen["duplicate_tags"]),
    )


def show(proof: Proof) -> None:
    """The closing table on stdout, coloured only on a terminal."""
    terminal = sys.stdout.isatty()
    console = Console(
        highlight=False,
        no_color=bool(os.environ.get("NO_COLOR")),
        width=None if terminal else WIDTH_WITHOUT_TERMINAL,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in NUMBERS else "left", overflow="fold")
    for each in proof.rows:
        money = f"{each.currency} {each.invoiced:,}"
        units = (f"{getattr(each, column):,}" for column in COLUMNS[3:7])
        style = "red" if each.drift else ""
        table.add_row(Text(each.subscriber), Text(each.plan), each.model, *units, money, style=style)
    totals = (f"{proof.total(column):,}" for column in COLUMNS[3:7])
    table.add_row("total", "", "", *totals, "", style="bold")
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    sys.stdout.write("\n" + "\n".join(lines) + "\n\n")
    for line in _told(proof):
        console.print(Text(line), soft_wrap=True)
    problems = proof.problems()
    for problem in problems:
        console.print(Text(f"wrong     {problem}", style="bold red"), soft_wrap=True)
    style = "bold red" if problems else "bold green"
    console.print(Text(proof.verdict(), style=style), soft_wrap=True)


def show_document(proof: Proof) -> None:
    """The one document of `--json`."""
    sys.stdout.write(json.dumps(proof.document(), indent=2) + "\n")
    sys.stdout.flush()


def first_sentence(reason: str) -> str:
    """A reason without what to do about it."""
    return reason.split(". ")[0].rstrip(".") + "."


def _told(proof: Proof) -> Iterator[str]:
    yield f"killed    the daemon, by SIGKILL: {proof.kills} times"
    for each in proof.injected:
        yield f"injected  {each.what}: {each.happened}"
    for reason in proof.held:
        yield f"held      {first_sentence(reason)}"
    priced = "no" if any(each.mispriced for each in proof.rows) else "yes"
    yield f"priced    as Amplify would, to the smallest unit of each currency: {priced}"
    yield ""


def _problems(row: Row) -> Iterator[str]:
    """What is wrong with one subscription."""
    for stage in ("recorded", "reported", "billed"):
        units = getattr(row, stage)
        if units != row.served:
            yield f"{row.subscriber}: {row.served} units served, {units} {stage}."
    if row.counted != row.served:
        yield f"{row.subscriber}: the demo served {row.served} units, and Amplify counted {row.counted}."
    if row.subscriptions != 1:
        yield f"{row.subscriber}: Recurly has {row.subscriptions} subscriptions for it instead of 1."
    for tag in row.tags_twice:
        yield f"{row.subscriber}: Recurly has more than one usage record with the tag {tag}."
    yield from row.mispriced


def _mispriced(subscriber: Subscriber, seen: Mapping[str, Any], served: Mapping[str, int]) -> Iterator[str]:
    """Usage lines that are not what Amplify's rules charge; there was one period, so one line per quota."""
    plan = BY_NAME[subscriber.plan]
    charged: dict[str, list[Decimal]] = {}
    for invoice in seen["invoices"]:
        for line in invoice["lines"]:
            if line["add_on"]:
                charged.setdefault(line["add_on"], []).append(Decimal(line["amount"]))
    add_ons = {quota["name"]: quota["add_on"] for quota in seen["quotas"]}
    for quota in plan.quotas:
        right = amplify_price(quota.pricing, served.get(quota.name, 0), plan.currency)
        lines = charged.get(add_ons.get(quota.name, ""), [])
        if len(lines) != 1 or lines[0] != right:
            amounts = " and ".join(map(str, lines)) or "nothing"
            yield (
                f"{subscriber.name}: {served.get(quota.name, 0)} units of {quota.title} cost {plan.currency} "
                f"{right} by Amplify's rules, and Recurly invoiced {amounts}."
            )


def _shown(row: Row) -> Json:
    return {
        "id": row.id,
        "served": row.served,
        "recorded": row.recorded,
        "reported": row.reported,
        "billed": row.billed,
        "subscriber": row.subscriber,
        "plan": row.plan,
        "currency": row.currency,
        "invoiced": str(row.invoiced),
        "priced_as_amplify": not row.mispriced,
    }
