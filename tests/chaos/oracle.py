"""What should be true in the end, worked out by brute force from what was served; knows nothing of billingd.

It reads the sandbox's world, the rows of billingd's SQLite file, and the document `status`.
"""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

Pair = tuple[str, str]
"""(Amplify subscription id, quota id)"""

ADD_ON: Final = "amplify-quota-"
OVER: Final = frozenset({"expired", "failed"})
CORRECTABLE: Final = frozenset({"flat", "tiered"})
UNAPPROVED: Final = frozenset({"subscription_refused"})
"""What may be held of a subscription for good instead of approving it, in a world that wants nothing else."""


@dataclass(frozen=True, slots=True)
class Served:
    """Units that a gateway counted at one instant, and when anybody could first read them."""

    subscription: str
    quota: str
    at: datetime
    units: int
    arrives: datetime


@dataclass(slots=True)
class Known:
    """One Amplify subscription as its people left it."""

    id: str
    name: str
    quotas: tuple[str, ...]
    approved_at: datetime | None = None
    rejected: bool = False
    ended_at: datetime | None = None

    @property
    def over(self) -> bool:
        """Whether nobody wants it any more."""
        return self.rejected or self.ended_at is not None


@dataclass(slots=True)
class Ledger:
    """All that happened, written down as it happened."""

    served: list[Served] = field(default_factory=list)
    subscriptions: dict[str, Known] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    """Ids of the events that billingd took with 202."""
    up: list[tuple[datetime, datetime | None]] = field(default_factory=list)
    """From when to when billingd lived."""
    dead: set[str] = field(default_factory=set)
    """Keys of the actions that were given up, and that a person had tried again."""
    struck: list[datetime] = field(default_factory=list)
    """When a request of billingd's went wrong."""

    def calm(self, since: datetime, until: datetime) -> bool:
        """Whether billingd lived all the time, and nothing went wrong for it."""
        lived = any(began <= since and (ended is None or ended >= until) for began, ended in self.up)
        return lived and not any(since <= moment <= until for moment in self.struck)

    def units(self) -> int:
        """All units ever served."""
        return sum(one.units for one in self.served)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How late traffic may come and still must be billed; later traffic may be or not be."""

    lateness: timedelta
    cycles: bool = True
    """Whether every unit must be in the billing cycle in which it was served."""
    settled: timedelta = timedelta(0)
    """What comes no later is certain to be in the first reading of its window."""
    flushed: timedelta | None = None
    """What comes so long before a bill is on it, when nothing goes wrong from then on; None: nobody knows."""
    doubles: bool = False
    """Whether Recurly may have taken a record twice: then it is billed once, or held as billed twice."""


@dataclass(frozen=True, slots=True)
class Far:
    """Subscriptions at Recurly by marker."""

    of: dict[str, list[Any]]
    doubles: frozenset[str]
    """Ids of the records that a person was told to refund."""

    def records(self, attached: Any) -> list[Any]:
        """The usage records of an add-on, without those."""
        return [usage for _, _, usage in attached.book.all_by_usage if usage.id not in self.doubles]


@dataclass(slots=True)
class Record:
    """One row of billingd's ledger, as SQL has it."""

    subscription: str
    quota: str
    units: int
    at: datetime
    tag: str
    state: str


@dataclass(slots=True)
class Rows:
    """billingd's rows, read with no help from billingd."""

    records: list[Record]
    events: set[str]
    actions: list[dict[str, Any]]
    held: list[dict[str, Any]]
    unlinked: dict[Pair, int]
    open_intents: list[str]


def read_rows(path: Path) -> Rows:
    """Everything the oracle looks at, out of the SQLite file."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        records = [
            Record(
                row["subscription_id"],
                row["quota_id"],
                row["units"],
                parse_time(row["usage_timestamp"]),
                row["merchant_tag"],
                row["state"],
            )
            for row in connection.execute("SELECT * FROM usage_records ORDER BY id")
        ]
        unlinked: dict[Pair, int] = defaultdict(int)
        for row in connection.execute("SELECT * FROM unlinked_traffic"):
            unlinked[row["subscription_id"], row["quota_id"]] += row["units"]
        return Rows(
            records=records,
            events={row["id"] for row in connection.execute("SELECT id FROM events")},
            actions=[dict(row) for row in connection.execute("SELECT * FROM outbox ORDER BY id")],
            held=[
                dict(row)
                for row in connection.execute("SELECT * FROM held WHERE closed_at IS NULL ORDER BY id")
            ],
            unlinked=dict(unlinked),
            open_intents=[
                row["name"] for row in connection.execute("SELECT name FROM intents WHERE state = 'open'")
            ],
        )
    finally:
        connection.close()


def check(
    site: Any, ledger: Ledger, rows: Rows, status: Mapping[str, Any], bounds: Bounds, *, now: datetime
) -> list[str]:
    """Every deviation in a sentence of its own; none when all is as it should be.

    Legitimate is only: a unit that is held, with a reason, instead of at Recurly; a unit later than
    `bounds.lateness`, wherever it is or is not; a billed record that is held because it is there twice.
    """
    faults: list[str] = []
    by_marker = _by_marker(site)
    far = Far(by_marker, _doubles(by_marker, rows) if bounds.doubles else frozenset())
    faults += _units(ledger, rows, far, bounds)
    faults += _tags(far, rows)
    faults += _subscriptions(ledger, far, rows, now)
    faults += _held(rows, far, ledger)
    faults += _ended_too_soon(ledger, rows, far, bounds)
    faults += _acknowledged(ledger, rows)
    faults += _status(status, ledger, rows, far)
    if bounds.cycles:
        faults += _cycles(ledger, rows, far, bounds)
    if bounds.flushed is not None:
        faults += _late_without_need(ledger, rows, far, bounds.flushed)
    return faults


def _units(ledger: Ledger, rows: Rows, far: Far, bounds: Bounds) -> list[str]:
    """Recurly's sum and what is held make up the truth."""
    least: Counter[Pair] = Counter()
    most: Counter[Pair] = Counter()
    for one in ledger.served:
        most[one.subscription, one.quota] += one.units
        if one.arrives - one.at <= bounds.lateness:
            least[one.subscription, one.quota] += one.units
    there = _at_recurly(far)
    held = _sum(rows.records, "held")
    open_ = _sum(rows.records, "recorded")
    written_off = _sum(rows.records, "written_off")
    faults = []
    for pair in sorted({*most, *there, *held, *open_}):
        found = there[pair] + held[pair] + written_off[pair]
        if not least[pair] <= found <= most[pair]:
            served = str(most[pair]) if least[pair] == most[pair] else f"{least[pair]} to {most[pair]}"
            faults.append(
                f"{_named(ledger, pair)}: {served} units were served, {there[pair]} are at Recurly and "
                f"{held[pair]} held ({found - (least[pair] if found < least[pair] else most[pair]):+d}; "
                f"{open_[pair]} wait, {rows.unlinked.get(pair, 0)} unlinked)"
            )
        elif open_[pair]:
            faults.append(f"{_named(ledger, pair)}: {open_[pair]} units still wait to be reported")
    return faults


def _tags(far: Far, rows: Rows) -> list[str]:
    """Every tag once, at Recurly and in the ledger, with the same units on both sides."""
    told: dict[str, list[int]] = defaultdict(list)
    for usage in _usages(far):
        told[str(usage.merchant_tag)].append(usage.amount)
    faults = [
        f"tag {tag} is at Recurly {len(units)} times: {units}"
        for tag, units in told.items()
        if len(units) > 1
    ]
    for record in rows.records:
        units = told.get(record.tag)
        if record.state == "reported" and units is None:
            faults.append(f"tag {record.tag} ({record.units} units) is said to be reported and is not there")
        elif record.state != "reported" and units is not None:
            faults.append(f"tag {record.tag} ({units}) is at Recurly and said to be {record.state}")
        elif units is not None and units[0] != record.units:
            faults.append(
                f"tag {record.tag} has {units[0]} units at Recurly and {record.units} in the ledger"
            )
    known = {record.tag for record in rows.records}
    faults += [f"tag {tag} at Recurly is unknown to the ledger" for tag in told if tag not in known]
    return faults


def _subscriptions(ledger: Ledger, far: Far, rows: Rows, now: datetime) -> list[str]:
    """One Recurly subscription for each approved one, alive exactly as long as it is wanted."""
    excused = {item["subscription_id"] for item in rows.held if item["kind"] in UNAPPROVED}
    faults = []
    for known in ledger.subscriptions.values():
        there = far.of.get(known.id, [])
        alive = [one for one in there if one.status not in OVER]
        title = f"{known.name} ({known.id[:8]})"
        if len(there) > 1:
            faults.append(f"{title} has {len(there)} subscriptions at Recurly")
        if known.approved_at is not None and not there:
            faults.append(f"{title} was approved and has no subscription at Recurly")
        if known.over and any(one.status != "canceled" for one in alive):
            faults.append(f"{title} is over and lives on at Recurly as {alive[0].status}")
        if not known.over and known.approved_at is not None and there and not alive:
            faults.append(f"{title} is active and over at Recurly")
        if not known.over and known.approved_at is None and known.id not in excused:
            faults.append(f"{title} was neither approved nor held")
    strange = [marker for marker in far.of if marker not in ledger.subscriptions]
    faults += [f"Recurly has a subscription for {marker!r}, which nobody made" for marker in strange]
    return faults


def _held(rows: Rows, far: Far, ledger: Ledger) -> list[str]:
    """Everything held has a reason that holds good, and every held record an item that says so."""
    faults = [
        f"{item['kind']} {item['subject']} is held without a reason"
        for item in rows.held
        if not item["reason"]
    ]
    standing = {item["subject"]: item for item in rows.held}
    for record in rows.records:
        if record.state != "held":
            continue
        item = standing.get(f"usage:{record.tag}")
        if item is None:
            faults.append(f"record {record.tag} of {record.units} units is held, and no item says why")
        elif (excuse := _excuse(item, record, far, ledger)) is not None:
            faults.append(f"record {record.tag} of {record.units} units is held as {item['kind']}, {excuse}")
    return faults


def _excuse(item: Mapping[str, Any], record: Record, far: Far, ledger: Ledger) -> str | None:
    """What is wrong with holding this record; None when it is right."""
    known = ledger.subscriptions[record.subscription]
    for subscription in far.of.get(record.subscription, ()):
        over = known.over or subscription.status in OVER
        place = _place([cycle.started_at for cycle in subscription.cycles], record.at)
        cycle = subscription.cycles[place]
        add_ons = [one.add_on for one in subscription.add_ons.values()]
        priced = [one for one in add_ons if one.code == ADD_ON + record.quota]
        match item["kind"]:
            case "usage_after_end":
                return None if over else "and the subscription lives"
            case "late_usage" if cycle is subscription.cycle and not over:
                return "and its cycle is still open"
            case "late_usage" | "usage_refused" if cycle.kind == "paused":
                return None  # Recurly takes no usage of a time in which it was paused
            case "late_usage" if priced and priced[0].tier_type in CORRECTABLE:
                return f"and {priced[0].tier_type} prices take corrections"
            case "late_usage" if item["amount"] is None or item["currency"] is None:
                return "and nothing says what money is at stake"
            case "late_usage":
                return None
    return "which the oracle does not know"


def _ended_too_soon(ledger: Ledger, rows: Rows, far: Far, bounds: Bounds) -> list[str]:
    """A subscription that was ended at Recurly took the usage with it that could be known by then.

    One that ends with its period, or is paused when it is over, takes none, and nobody can wait for it.
    """
    standing = {
        item["subject"]: item["kind"] for item in rows.held if "was paused at Recurly" not in item["reason"]
    }
    there = _at_recurly(far)
    known_by_then: Counter[Pair] = Counter()
    for one in ledger.served:
        known = ledger.subscriptions[one.subscription]
        if known.ended_at is None or not _cut_short(far.of.get(known.id, ())):
            continue
        if one.at < known.ended_at and one.arrives - one.at <= bounds.settled:
            known_by_then[one.subscription, one.quota] += one.units
    otherwise: Counter[Pair] = Counter()
    for record in rows.records:
        if record.state != "reported" and standing.get(f"usage:{record.tag}") != "usage_after_end":
            otherwise[record.subscription, record.quota] += record.units
    return [
        f"{_named(ledger, pair)}: ended at Recurly with {there[pair] + otherwise[pair]} units, where {units} "
        "had been served and counted by then"
        for pair, units in known_by_then.items()
        if there[pair] + otherwise[pair] < units
    ]


def _cut_short(there: Iterable[Any]) -> bool:
    """Whether billingd terminated it while it took usage."""
    return any(
        one.status == "expired" and one.expiration_reason == "terminated" and one.cycle.kind != "paused"
        for one in there
    )


def _acknowledged(ledger: Ledger, rows: Rows) -> list[str]:
    """What was taken with 202 is there, and nothing waits for ever or has died."""
    faults = [
        f"event {one} was acknowledged and is gone" for one in sorted(ledger.acknowledged - rows.events)
    ]
    waits_held = {item["subject"] for item in rows.held}  # it looks again by itself, and a person knows
    for action in rows.actions:
        if action["state"] == "dead":
            faults.append(f"{action['key']} is dead: {action['error']}")
        elif action["kind"] == "provision_subscription" and action["subject"] in waits_held:
            continue
        elif action["state"] in ("pending", "leased") and action["kind"] != "provision_plan":
            faults.append(f"{action['key']} is still {action['state']}: {action['error']}")
    faults += [f"the outcome of {name} is still unknown" for name in rows.open_intents]
    return faults


def _status(status: Mapping[str, Any], ledger: Ledger, rows: Rows, far: Far) -> list[str]:
    """`status` says what is true."""
    at_recurly = sum(usage.amount for usage in _usages(far))
    recorded = sum(record.units for record in rows.records)
    traffic = status["traffic"]
    expected = {
        "recorded_units": recorded,
        "reported_units": at_recurly,
        "unreported_units": recorded - at_recurly,
        "unlinked_units": sum(rows.unlinked.values()),
        "unknown_outcomes": 0,
    }
    faults = [
        f"status says {name} {traffic[name]}, and {value} it is"
        for name, value in expected.items()
        if traffic[name] != value
    ]
    if len(status["held"]["items"]) != len(rows.held):
        faults.append(f"status shows {len(status['held']['items'])} held items of {len(rows.held)}")
    alive = [
        one for known in ledger.subscriptions.values() if not known.over for one in far.of.get(known.id, ())
    ]
    if status["links"]["subscriptions"] != len(alive):
        faults.append(
            f"status counts {status['links']['subscriptions']} linked subscriptions of {len(alive)}"
        )
    return faults


def _cycles(ledger: Ledger, rows: Rows, far: Far, bounds: Bounds) -> list[str]:
    """No record straddles a bill: each cycle has the units served in it, but for those held."""
    faults = []
    for marker, several in far.of.items():
        for one in several:
            for attached in one.add_ons.values():
                quota = attached.add_on.code.removeprefix(ADD_ON)
                there = far.records(attached)
                faults += _cycles_of(ledger, rows, one, there, (marker, quota), bounds)
    return faults


def _cycles_of(
    ledger: Ledger, rows: Rows, subscription: Any, there: list[Any], pair: Pair, bounds: Bounds
) -> list[str]:
    starts = [cycle.started_at for cycle in subscription.cycles]
    least: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for one in ledger.served:
        if (one.subscription, one.quota) == pair:
            number = _place(starts, one.at)
            most[number] += one.units
            if one.arrives - one.at <= bounds.lateness:
                least[number] += one.units
    found: Counter[int] = Counter()
    for usage in there:
        found[usage.cycle] += usage.amount
    for record in rows.records:
        if (record.subscription, record.quota) == pair and record.state in ("held", "written_off"):
            found[_place(starts, record.at)] += record.units
    return [
        f"{_named(ledger, pair)}, cycle from {starts[number].isoformat()} to "
        f"{subscription.cycles[number].ends_at.isoformat()}: {least[number]} to {most[number]} units were "
        f"served in it, {found[number]} are"
        for number in sorted({*most, *found})
        if not least[number] <= found[number] <= most[number]
    ]


def _late_without_need(ledger: Ledger, rows: Rows, far: Far, lead: timedelta) -> list[str]:
    """What could be read so long before a bill is on it, and not held for having missed it."""
    standing = {item["subject"] for item in rows.held if item["kind"] == "late_usage"}
    late: Counter[tuple[Pair, int]] = Counter()
    for record in rows.records:
        given_up = f"report_usage:{record.tag}" in ledger.dead
        if record.state == "held" and f"usage:{record.tag}" in standing and not given_up:
            pair = record.subscription, record.quota
            for one in far.of.get(record.subscription, ()):
                late[pair, _place([cycle.started_at for cycle in one.cycles], record.at)] += record.units
    faults = []
    for (pair, number), units in sorted(late.items()):
        [subscription] = far.of[pair[0]]
        cycle, starts = subscription.cycles[number], [one.started_at for one in subscription.cycles]
        if cycle.kind == "paused" or not ledger.calm(cycle.ends_at - lead, cycle.ends_at):
            continue
        too_late = sum(
            one.units
            for one in ledger.served
            if (one.subscription, one.quota) == pair
            and _place(starts, one.at) == number
            and one.arrives > cycle.ends_at - lead
        )
        if units > too_late:
            faults.append(
                f"{_named(ledger, pair)}, cycle up to {cycle.ends_at.isoformat()}: {units} units are held as "
                f"late, {too_late} came later than {lead} before its bill; nothing went wrong from then on"
            )
    return faults


def _doubles(far: dict[str, list[Any]], rows: Rows) -> frozenset[str]:
    """Records that were billed, and of which an item says that they were there before."""
    told = {(item["subject"], item["units"]) for item in rows.held if item["kind"] == "double_record"}
    return frozenset(
        usage.id
        for usage in _usages(Far(far, frozenset()))
        if usage.billed_at is not None and (f"audit:{usage.merchant_tag}:{usage.id}", usage.amount) in told
    )


def _place(starts: list[datetime], at: datetime) -> int:
    """The cycle that an instant lies in; what lies before the first belongs to the first."""
    return max(0, sum(1 for start in starts if start <= at) - 1)


def _by_marker(site: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for subscription in site.subscriptions.values():
        found[str(subscription.given.get("po_number") or "")].append(subscription)
    return dict(found)


def _usages(far: Far) -> Iterable[Any]:
    for several in far.of.values():
        for one in several:
            for attached in one.add_ons.values():
                yield from far.records(attached)


def _at_recurly(far: Far) -> Counter[Pair]:
    found: Counter[Pair] = Counter()
    for marker, several in far.of.items():
        for one in several:
            for attached in one.add_ons.values():
                quota = attached.add_on.code.removeprefix(ADD_ON)
                found[marker, quota] += sum(usage.amount for usage in far.records(attached))
    return found


def _sum(records: Iterable[Record], state: str) -> Counter[Pair]:
    found: Counter[Pair] = Counter()
    for record in records:
        if record.state == state:
            found[record.subscription, record.quota] += record.units
    return found


def _named(ledger: Ledger, pair: Pair) -> str:
    known = ledger.subscriptions.get(pair[0])
    return f"{known.name if known else '?'} ({pair[0][:8]}), quota {pair[1][:8]}"


def parse_time(text: str) -> datetime:
    """A moment as the SQLite file says it: UTC without saying so."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
