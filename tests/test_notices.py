"""Notices from the trouble to the channel: together, once per channel, on change, and none is lost."""

import ast
import sqlite3
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from manual_clock import ManualClock

from billingd import wording
from billingd.domain.attempts import Action, Leased, Patience, State, Verdict, Wait
from billingd.domain.errors import Retryable
from billingd.domain.events import Event
from billingd.domain.notices import NOTIFY_PROVIDER, PROVIDER_SUBJECT, provider_notice, topic_of
from billingd.loops import Progress
from billingd.notify import Notifier
from billingd.outbox import Outbox
from billingd.store import events, held, outbox, schema
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.troubles import AWAY_FOR, GATHER, UNWRITABLE_FOR, TroubleWatch
from billingd.wording import Wording

ROOT = Path(__file__).parents[1]
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
MINUTE = timedelta(minutes=1)


class Channels:
    """Two channels, each of which may be out."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ("chat", "mail")
        self.out: set[str] = set()
        self.told: dict[str, list[str]] = {"chat": [], "mail": []}

    async def tell(self, name: str, title: str, body: str) -> None:
        if name in self.out:
            raise Retryable(f"{name} is out")
        self.told[name].append(f"{title}\n{body}")

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool:
        raise AssertionError(email)


@dataclass
class Side:
    last_reached_at: datetime | None
    last_error: str | None = None


class Bench:
    """The parts that tell people, as the daemon puts them together; `start` is a new process."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store, self.clock = store, clock
        self.channels = Channels()
        self.side = Side(clock.now())
        self.progress = Progress()
        self.own: Path | None = None
        self.start()

    def start(self) -> None:
        self.notifier = Notifier(self.store, self.clock, self.channels, None, Wording(self.own))  # type: ignore[arg-type]
        self.engine = Outbox(
            self.store,
            self.clock,
            {NOTIFY_PROVIDER: self.notifier.provider},
            workers=4,
            lease=MINUTE,
            patience=Patience(2, MINUTE, MINUTE),
            rng=Random(1),
        )
        sides = {"Recurly": self.side}
        self.watch = TroubleWatch(
            self.store, self.clock, sides, self.progress, self.notifier, self.engine.wake.set
        )

    async def put(self, *actions: Action) -> None:
        async with self.store.write() as tx:
            await outbox.insert(tx, actions, now=self.clock.now())

    async def drain(self) -> None:
        while await self.engine.run_once():
            await self.engine.drain(at_most=MINUTE)

    async def look(self, after: timedelta = timedelta(0)) -> None:
        """Time passes, the watch looks, and what it tells is sent."""
        self.clock.advance(after)
        await self.watch.run_once()
        await self.drain()

    async def die(self, *errors: str, kind: str = "report_usage") -> None:
        """Actions give up with these errors."""
        now = self.clock.now()
        names = [f"{now}:{kind}:{number}" for number in range(len(errors))]
        async with self.store.write() as tx:
            await outbox.insert(tx, [Action(kind, name, name) for name in names], now=now)
            for one in await outbox.claim(tx, now=now, lease=MINUTE, limit=100):
                error = errors[names.index(one.key)]
                await outbox.settle(tx, one, Verdict(State.DEAD, now, error), now=now)

    def heard(self) -> list[str]:
        """What the chat was told since last asked."""
        told, self.channels.told["chat"] = self.channels.told["chat"], []
        return told


@pytest.fixture
def bench(store: Store, clock: ManualClock) -> Bench:
    return Bench(store, clock)


def notices(number: int) -> list[Action]:
    return [provider_notice(f"plan-linked:{n}", f"Plan {n}", f"Body {n}") for n in range(number)]


def an_event(number: int) -> Event:
    return Event(
        source="amplify",
        id=f"event-{number}",
        type="ResourceCreated",
        kind="ProductPlan",
        name="metered",
        happened_at=None,
        resource_id="p1",
        subresource=None,
        correlation_id=f"correlation-{number}",
        resource_version=None,
        scope_name=None,
        state=None,
        deleting=False,
    )


async def test_what_waits_goes_into_one_message(bench: Bench) -> None:
    """Forty notices at once are two messages for each channel, and each is in one of them."""
    await bench.put(*notices(40))
    await bench.drain()
    for told in bench.channels.told.values():
        assert [one.partition("\n")[0] for one in told] == [
            "25 notices: Plan 0, …",
            "15 notices: Plan 25, …",
        ]
        assert all(
            f"{number % 25 + 1}. Plan {number}\nBody {number}" in told[number // 25] for number in range(40)
        )
    async with bench.store.read() as tx:
        assert await outbox.count(tx) == {("done", NOTIFY_PROVIDER): 40}


@SQLITE
async def test_a_channel_that_is_out_is_tried_again_and_the_others_are_left_alone(bench: Bench) -> None:
    """A day, and through it: then it hears all of it, once, and the other has heard nothing twice."""
    bench.channels.out = {"mail"}
    await bench.put(*notices(2))
    await bench.drain()
    for _ in range(30):
        bench.clock.advance(timedelta(hours=1))
        await bench.drain()
    bench.channels.out = set()
    bench.clock.advance(timedelta(hours=1))
    await bench.drain()
    assert [len(told) for told in bench.channels.told.values()] == [1, 1]
    async with bench.store.read() as tx:
        assert await outbox.count(tx) == {("done", NOTIFY_PROVIDER): 2}


@SQLITE
async def test_a_restart_loses_no_notice(bench: Bench) -> None:
    bench.channels.out = {"chat", "mail"}
    await bench.put(*notices(3))
    await bench.drain()
    bench.start()
    bench.channels.out = set()
    bench.clock.advance(timedelta(days=1))
    await bench.drain()
    [told] = bench.heard()
    assert all(f"Plan {number}" in told for number in range(3))


@SQLITE
async def test_after_three_days_it_is_a_dead_letter(bench: Bench) -> None:
    bench.channels.out = {"chat", "mail"}
    await bench.put(*notices(1))
    for after, state in ((timedelta(days=3) - MINUTE, "pending"), (timedelta(minutes=10), "dead")):
        bench.clock.advance(after)
        await bench.drain()
        async with bench.store.read() as tx:
            assert await outbox.count(tx) == {(state, NOTIFY_PROVIDER): 1}


@SQLITE
async def test_a_channel_that_works_is_left_alone_when_the_other_is_given_up(bench: Bench) -> None:
    """However often the outbox tries what fails, and also when a person has it tried again."""
    bench.channels.out = {"mail"}
    await bench.put(*notices(1))
    await bench.drain()
    bench.clock.advance(timedelta(days=3))
    for _ in range(3):
        await bench.drain()
        bench.clock.advance(timedelta(minutes=10))
    async with bench.store.write() as tx:
        assert await outbox.count(tx) == {("dead", NOTIFY_PROVIDER): 1}
        assert await outbox.retry(tx, [1], now=bench.clock.now()) == 1
    await bench.drain()
    bench.channels.out = set()
    async with bench.store.write() as tx:
        await outbox.retry(tx, [1], now=bench.clock.now())
    await bench.drain()
    assert [len(told) for told in bench.channels.told.values()] == [1, 1]


async def test_each_notice_is_in_the_log_under_its_own_event(bench: Bench) -> None:
    """Sent along in one message, they are found one by one; one that no event led to is under none."""
    put = notices(4)
    async with bench.store.write() as tx:
        for number, notice in enumerate(put):
            cause = f"event-{number}" if number < 3 else None
            await outbox.insert(tx, [notice], now=bench.clock.now(), event_id=cause)
        for number in range(2):  # of the third event nothing is kept any more
            await events.insert(tx, an_event(number), now=bench.clock.now())
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        await bench.drain()
    for number, correlation in enumerate(("correlation-0", "correlation-1", "event-2", None)):
        found = [one for one in lines if one["action"] == number + 1]
        assert {one.get("correlation") for one in found} == {correlation}
        assert [(one["event"], one.get("channel")) for one in found] == [
            ("notice.sent", "chat"),
            ("notice.sent", "mail"),
            ("action.settled", None),
        ]
        assert {one["attempt"] for one in found} == {1 if number == 0 else 0}


async def test_dead_letters_are_one_notice_with_counts_and_one_when_they_are_gone(bench: Bench) -> None:
    """An outage that makes many tells once; more of them an hour later at the earliest; recovery once."""
    await bench.die(*["Unknown: no answer [request 1a]", "Unknown: no answer [request 2b]"] * 20)
    await bench.die("Refused: 422 too long", kind="provision_plan")
    await bench.look()
    assert bench.heard() == []
    await bench.look(GATHER)
    [told] = bench.heard()
    assert told.startswith("41 dead letters\n")
    assert "- 40 x report_usage: Unknown: no answer\n- 1 x provision_plan: Refused: 422 too long" in told
    assert "billingd outbox replay" in told
    bench.start()  # a restart tells nothing anew
    await bench.look(MINUTE)
    await bench.die("Unknown: no answer")
    await bench.look(MINUTE)
    assert bench.heard() == []
    await bench.look(timedelta(hours=1))
    [told] = bench.heard()
    assert told.startswith("42 dead letters, some of them new")
    async with bench.store.write() as tx:
        await tx.execute(
            sa.update(schema.outbox)
            .where(schema.outbox.c.state == "dead")
            .values(state="discarded", settled_at=bench.clock.now())
        )
    bench.start()
    await bench.look(MINUTE)
    await bench.look(MINUTE)
    [told] = bench.heard()
    assert told.startswith("No dead letters are left")


@SQLITE
async def test_an_older_action_that_gives_up_later_is_told(bench: Bench) -> None:
    """Its id is lower than that of the dead letter that was told already."""
    await bench.put(Action("report_usage", "s0", "s0"))
    now = bench.clock.now()
    async with bench.store.write() as tx:
        [older] = await outbox.claim(tx, now=now, lease=MINUTE, limit=1)
        await outbox.settle(tx, older, Verdict(State.PENDING, now + timedelta(hours=5), "later"), now=now)
    await bench.die("Refused: 422", kind="provision_plan")
    await bench.look()
    await bench.look(GATHER)
    [told] = bench.heard()
    assert told.startswith("1 dead letter\n")
    bench.clock.advance(timedelta(hours=6))
    async with bench.store.write() as tx:
        [older] = await outbox.claim(tx, now=bench.clock.now(), lease=MINUTE, limit=1)
        verdict = Verdict(State.DEAD, bench.clock.now(), "Unknown: no answer")
        await outbox.settle(tx, older, verdict, now=bench.clock.now())
    for _ in range(2):
        await bench.look(timedelta(hours=1))
    [told] = bench.heard()
    assert told.startswith("2 dead letters, some of them new\n")
    assert "- 1 x report_usage: Unknown: no answer" in told


@SQLITE
async def test_a_far_side_that_is_long_away_is_told_and_its_return(bench: Bench) -> None:
    bench.side.last_error = "no answer from Recurly"
    await bench.look()
    await bench.look(AWAY_FOR - MINUTE)
    bench.side.last_error = None
    await bench.look(MINUTE)
    assert bench.heard() == [], "short absences are nobody's business"
    bench.side.last_error = "no answer from Recurly"
    await bench.look()
    await bench.look(AWAY_FOR)
    await bench.look(AWAY_FOR)
    [told] = bench.heard()
    assert told.startswith(
        "Recurly cannot be reached\nRecurly was last reached 2026-03-02 10:00 UTC: no answer"
    )
    bench.side.last_error = None
    await bench.look(MINUTE)
    [told] = bench.heard()
    assert told.startswith("Recurly is reached again\nRecurly answers since 2026-03-02 10:31 UTC")


@SQLITE
async def test_a_store_that_cannot_be_written_is_told_at_once_and_its_return_through_it(bench: Bench) -> None:
    bench.store.write_error = "the disk is full"
    await bench.watch.run_once()
    assert bench.heard() == []
    bench.channels.out = {"chat", "mail"}
    bench.clock.advance(UNWRITABLE_FOR)
    await bench.watch.run_once()
    bench.channels.out = set()
    for _ in range(2):
        await bench.watch.run_once()
    [told] = bench.heard()
    assert told.startswith("The store cannot be written\nSince 2026-03-02 10:00 UTC: the disk is full")
    bench.store.write_error = None
    await bench.look(MINUTE)
    [told] = bench.heard()
    assert told.startswith("The store can be written again\nIt could not be from 2026-03-02 10:00 UTC to")


@SQLITE
@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (sqlite3.DatabaseError("file is not a database"), "the store is damaged, or is none"),
        (sqlite3.OperationalError("disk I/O error"), "the store is not available: disk I/O error"),
    ],
)
async def test_a_store_that_cannot_be_read_is_told_too(bench: Bench, cause: Exception, said: str) -> None:
    """Nothing was written when it broke, so no write has failed."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        kind = sa.exc.OperationalError if "I/O" in str(cause) else sa.exc.DatabaseError
        raise kind(statement, {}, cause)

    reader = bench.store._reader.sync_engine
    sa.event.listen(reader, "before_cursor_execute", refuse)
    await bench.watch.run_once()
    for _ in range(2):
        bench.clock.advance(UNWRITABLE_FOR)
        await bench.watch.run_once()
    [told] = bench.heard()
    assert told.startswith(f"The store cannot be written\nSince 2026-03-02 10:00 UTC: {said}")
    sa.event.remove(reader, "before_cursor_execute", refuse)
    await bench.look()
    await bench.look()
    [told] = bench.heard()
    assert told.startswith("The store can be written again\nIt could not be from 2026-03-02 10:00 UTC to")


@SQLITE
async def test_a_loop_that_hangs_and_what_is_held_no_more(bench: Bench) -> None:
    bench.progress.turned("traffic", bench.clock.now(), patience=MINUTE)
    await bench.look(2 * MINUTE)
    bench.progress.turned("traffic", bench.clock.now(), patience=timedelta(days=1))
    async with bench.store.write() as tx:
        await held.add(tx, Hold("plan_refused", "plan:x", "So.", None), now=bench.clock.now())
    await bench.look()
    async with bench.store.write() as tx:
        await held.close(tx, subject="plan:x", resolution="mended", now=bench.clock.now())
    await bench.look()
    assert [one.partition("\n")[0] for one in bench.heard()] == [
        "billingd hangs: traffic",
        "billingd goes on",
        "Nothing is held any more",
    ]


@SQLITE
async def test_an_operators_template_is_used_and_one_that_fails_loses_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    bench.own = tmp_path
    bench.start()
    (tmp_path / "plan_linked.txt").write_text("[billing] {{ title }}\nSee the wiki. {{ body }}\n")
    await bench.put(*notices(1))
    await bench.drain()
    assert bench.heard() == ["[billing] Plan 0\nSee the wiki. Body 0"]
    (tmp_path / "plan_linked.txt").write_text("{{ nobody_knows }}")
    await bench.put(provider_notice("plan-linked:x", "Plan x", "Body x"))
    await bench.drain()
    assert bench.heard() == ["Plan x\nBody x"]
    (tmp_path / "plan_linked.txt").write_text("{{ ''.__class__.__mro__ }}")
    assert "unsafe" in wording.faults(tmp_path)[0]


async def test_a_notice_of_an_older_billingd_is_sent(bench: Bench) -> None:
    """Their arguments were a title and a body, their subjects their own."""
    await bench.put(Action(NOTIFY_PROVIDER, "notice:old", "notify_provider:old", {"title": "T", "body": "B"}))
    await bench.drain()
    assert bench.heard() == ["T\nB"]


@SQLITE
async def test_nobody_to_tell_is_no_failure(bench: Bench) -> None:
    bench.channels.names = ()
    args: dict[str, Any] = {"topic": "held", "title": "T", "body": "B"}
    leased = Leased(1, NOTIFY_PROVIDER, PROVIDER_SUBJECT, "k", args, 1, 1, None)
    assert await bench.notifier.provider(leased) is None
    assert not isinstance(await bench.notifier.provider(leased), Wait)


def test_every_packaged_template_has_a_sample_and_works() -> None:
    assert {path.stem for path in wording.PACKAGED.glob("*.txt")} == set(wording.SAMPLES)
    assert wording.faults(wording.PACKAGED) == []


def test_every_topic_that_the_code_tells_of_is_known() -> None:
    """What the keys of all notices in the code begin with, whether in place or in a variable before it."""
    found: set[str] = set()
    for path in (ROOT / "billingd").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        keys = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "key"
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("provider_notice", "_tell_provider")
            ):
                first = node.args[0]
                for one in keys if isinstance(first, ast.Name) else [first]:
                    if isinstance(one, ast.JoinedStr) and isinstance(one.values[0], ast.Constant):
                        found.add(topic_of(str(one.values[0].value)))
    assert found - {"remove"} == wording.PLAIN_TOPICS - {"idempotency_doubted", "idempotency_ignored"}
