"""The proof: what was served, recorded, reported and billed per subscription, and whether that agrees."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from billingd.demo.marketplace import BY_NAME, Subscriber, amplify_charge, amplify_price

Json = dict[str, Any]

ADD_ON: Final = "amplify-quota-"
WIDTH_WITHOUT_TERMINAL: Final = 160
COLUMNS: Final = (
    *("subscriber", "plan", "pricing"),
    *("served", "recorded", "reported", "billed", "held", "written off", "invoiced"),
)
UNITS: Final = ("served", "recorded", "reported", "billed", "held", "written_off")
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
    held: int = 0
    written_off: int = 0
    mispriced: tuple[str, ...] = ()
    """Sentences about invoice lines that are not what Amplify's rules charge."""
    subscriptions: int = 1
    """How many Recurly has for it."""
    tags_twice: tuple[str, ...] = ()

    @property
    def drift(self) -> int:
        """How many units any later stage differs from what was served; what is not billed must be known."""
        kept = self.held + self.written_off
        later = (self.recorded, self.reported + kept, self.billed + kept)
        return max(abs(self.served - other) for other in later)


@dataclass(frozen=True, slots=True)
class Renewal:
    """A bill that came in between: what its period used, and where that went.

    `billed` is on that bill, `corrected` on a later one; `complete` is billingd's own word for the period.
    """

    subscriber: str
    at: datetime
    served: int
    billed: int
    corrected: int
    held: int
    written_off: int
    complete: bool
    money: str = ""
    """What the units that were held are worth."""

    def problems(self) -> Iterator[str]:
        """What is wrong with it."""
        gone = self.billed + self.corrected + self.held + self.written_off
        if gone != self.served:
            yield f"{self.subscriber}: {self.served} units served before the bill, {gone} accounted for."
        if self.complete is not (self.billed == self.served):
            word = "complete" if self.complete else "incomplete"
            yield f"{self.subscriber}: {self.billed} of {self.served} units on the bill, and it is {word}."

    def told(self) -> str:
        """In a line."""
        parts = [f"{self.subscriber} at {self.at:%H:%M:%S}, {'' if self.complete else 'in'}complete:"]
        parts.append(f"{self.billed:,} of {self.served:,} units on the bill")
        if self.corrected:
            parts.append(f"+ {self.corrected:,} corrections on the next")
        if self.held or self.written_off:
            parts.append(f"+ {self.held:,} held + {self.written_off:,} written off ({self.money} at stake)")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Line:
    """What one invoice charges for one quota of one billing period."""

    add_on: str
    starts: datetime
    ends: datetime
    units: int
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Cycle:
    """One billing period: what was used of each quota, and what of it is not to be billed."""

    served: Mapping[str, int]
    kept: int = 0
    starts: datetime | None = None
    ends: datetime | None = None

    def has(self, line: Line) -> bool:
        """Whether a line's dates are of this period, as far as its own are known."""
        return self.starts in {None, line.starts} and self.ends in {None, line.ends}


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
    renewals: tuple[Renewal, ...] = ()
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
        return [
            *self._of_the_demo(),
            *(told for row in self.rows for told in _problems(row)),
            *(told for renewal in self.renewals for told in renewal.problems()),
            *self.faults,
        ]

    def verdict(self) -> str:
        """The closing line."""
        served, drift = self.total("served"), self.drift
        parts = [f"billed {self.total('billed')}"]
        parts += [f"held {held}"] if (held := self.total("held")) else []
        parts += [f"written off {given_up}"] if (given_up := self.total("written_off")) else []
        if drift == 0:
            return f"served {served} = {' + '.join(parts)}, drift 0"
        return f"served {served}, {', '.join(parts)}, drift {drift}"

    def document(self) -> Json:
        """What `--json` prints."""
        return {
            "drift_units": self.drift,
            "served_units": self.total("served"),
            "recorded_units": self.total("recorded"),
            "reported_units": self.total("reported"),
            "billed_units": self.total("billed"),
            "held_units": self.total("held"),
            "written_off_units": self.total("written_off"),
            "kills": self.kills,
            "faults": self.faults_happened,
            "subscriptions": [_shown(row) for row in self.rows],
            "renewals": [_renewal(each) for each in self.renewals],
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
        if not any(each.complete for each in self.renewals):
            yield "No bill came in between that was complete, so nothing is proved about renewals."
        if all(each.complete for each in self.renewals):
            yield "No bill came in between that was incomplete, so nothing is proved about late units."
        if self.faults_happened < 1:
            yield "No fault struck, so nothing is proved about faults."
        for each in self.injected:
            if each.happened < each.planned:
                yield f"Planned {each.planned} time(s), happened {each.happened}: {each.what}."


def row(
    subscriber: Subscriber,
    seen: Mapping[str, Any],
    lines: Sequence[Line],
    cycles: Sequence[Cycle],
    known: Mapping[str, int],
) -> Row:
    """One subscription from the sandbox's ledger, Recurly's lines, the demo's count, and billingd's ledger.

    `known` has billingd's own sums: recorded_units, held_units, written_off_units.
    """
    plan = BY_NAME[subscriber.plan]
    invoices = seen["invoices"]
    return Row(
        id=seen["id"],
        subscriber=subscriber.name,
        plan=plan.title,
        model=plan.model,
        currency=plan.currency,
        served=sum(sum(cycle.served.values()) for cycle in cycles),
        counted=seen["served_units"],
        recorded=known["recorded_units"],
        reported=seen["reported_units"],
        billed=seen["billed_units"],
        invoiced=sum((Decimal(invoice["total"]) for invoice in invoices), Decimal(0)),
        held=known["held_units"],
        written_off=known["written_off_units"],
        mispriced=tuple(_mispriced(subscriber, seen, lines, cycles)),
        subscriptions=len(seen["recurly"]),
        tags_twice=tuple(seen["duplicate_tags"]),
    )


def renewal(
    subscriber: Subscriber, cycle: Cycle, lines: Sequence[Line], known: Mapping[str, int], *, complete: bool
) -> Renewal:
    """One bill that came in between: the first line of each quota is on that bill, others on later ones."""
    assert cycle.ends is not None
    first: dict[str, int] = {}
    corrected = 0
    for line in lines:
        if not cycle.has(line):
            continue
        if line.add_on in first:
            corrected += line.units
        else:
            first[line.add_on] = line.units
    return Renewal(
        subscriber=subscriber.name,
        at=cycle.ends,
        served=sum(cycle.served.values()),
        billed=sum(first.values()),
        corrected=corrected,
        held=known["held_units"],
        written_off=known["written_off_units"],
        complete=complete,
        money=_stake(subscriber, cycle),
    )


def worth(subscriber: Subscriber, cycle: Cycle) -> Decimal:
    """What Amplify charges for the units of a period that are not billed, not rounded; one quota only."""
    (quota,) = BY_NAME[subscriber.plan].quotas
    served = cycle.served.get(quota.name, 0)
    return amplify_charge(quota.pricing, served) - amplify_charge(quota.pricing, served - cycle.kept)


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
        units = (f"{getattr(each, column):,}" for column in UNITS)
        style = "red" if each.drift else ""
        table.add_row(Text(each.subscriber), Text(each.plan), each.model, *units, money, style=style)
    totals = (f"{proof.total(column):,}" for column in UNITS)
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
    for struck in proof.injected:
        yield f"injected  {struck.what}: {struck.happened}"
    for each in proof.renewals:
        yield f"renewed   {each.told()}"
    for reason in proof.held:
        yield f"held      {first_sentence(reason)}"
    priced = "no" if any(each.mispriced for each in proof.rows) else "yes"
    yield f"priced    as Amplify would, to the smallest unit of each currency: {priced}"
    yield ""


def _problems(row: Row) -> Iterator[str]:
    """What is wrong with one subscription."""
    kept = row.held + row.written_off
    for stage, elsewhere in (("recorded", 0), ("reported", kept), ("billed", kept)):
        units = getattr(row, stage)
        if units + elsewhere != row.served:
            also = f" and {elsewhere} held or written off" if elsewhere else ""
            yield f"{row.subscriber}: {row.served} units served, {units} {stage}{also}."
    if row.counted != row.served:
        yield f"{row.subscriber}: the demo served {row.served} units, and Amplify counted {row.counted}."
    if row.subscriptions != 1:
        yield f"{row.subscriber}: Recurly has {row.subscriptions} subscriptions for it instead of 1."
    for tag in row.tags_twice:
        yield f"{row.subscriber}: Recurly has more than one usage record with the tag {tag}."
    yield from row.mispriced


def _mispriced(
    subscriber: Subscriber, seen: Mapping[str, Any], lines: Sequence[Line], cycles: Sequence[Cycle]
) -> Iterator[str]:
    """Usage lines that are not what Amplify's rules charge for each period, or of no period at all.

    What one period used may be on several invoices: each line is charged on top of those before it.
    """
    plan = BY_NAME[subscriber.plan]
    add_ons = {quota["name"]: quota["add_on"] for quota in seen["quotas"]}
    by_cycle: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        number = next((number for number, cycle in enumerate(cycles) if cycle.has(line)), None)
        if number is None:
            yield f"{subscriber.name}: a line from {line.starts} to {line.ends} is of no billing period."
        else:
            by_cycle[number, line.add_on].append(line)
    for number, cycle in enumerate(cycles):
        for quota in plan.quotas:
            right = cycle.served.get(quota.name, 0) - cycle.kept
            charged = by_cycle[number, add_ons.get(quota.name, "")]
            already = 0
            for line in charged:
                price = amplify_price(quota.pricing, line.units, plan.currency, on_top_of=already)
                if line.amount != price:
                    yield (
                        f"{subscriber.name}: {line.units} units of {quota.title} on top of {already} cost "
                        f"{plan.currency} {price} by Amplify's rules, and Recurly invoiced {line.amount}."
                    )
                already += line.units
            if not charged or already != right:
                yield (
                    f"{subscriber.name}: {right} units of {quota.title} belong on the invoices of billing "
                    f"period {number + 1}, and Recurly has {already} there."
                )


def _stake(subscriber: Subscriber, cycle: Cycle) -> str:
    if not cycle.kept:
        return ""
    return f"{BY_NAME[subscriber.plan].currency} {worth(subscriber, cycle).normalize():f}"


def _shown(row: Row) -> Json:
    return {
        "id": row.id,
        "served": row.served,
        "recorded": row.recorded,
        "reported": row.reported,
        "billed": row.billed,
        "held": row.held,
        "written_off": row.written_off,
        "subscriber": row.subscriber,
        "plan": row.plan,
        "currency": row.currency,
        "invoiced": str(row.invoiced),
        "priced_as_amplify": not row.mispriced,
    }


def _renewal(renewal: Renewal) -> Json:
    return {
        "subscriber": renewal.subscriber,
        "at": renewal.at.isoformat(),
        "complete": renewal.complete,
        "served": renewal.served,
        "billed": renewal.billed,
        "corrected": renewal.corrected,
        "held": renewal.held,
        "written_off": renewal.written_off,
    }
