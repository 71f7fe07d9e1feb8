"""Bugs planted into billingd for as long as a context lasts, and the lives in which they are hunted.

Any change of billingd or of the simulation makes other lives of the same seeds. `planted.py busy 1 40` says
which bugs each of these seeds finds, and at what cost: one that finds all of a season goes into `BUGS`.

billingd itself has no switch for any of them: functions are replaced, as little of each as makes the bug.
"""

import asyncio
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import sim_bench
import sim_life
import sqlalchemy as sa
from sim_bench import Bench, Result
from sim_life import Ingredients, Life
from sim_loop import spawn
from sim_process import Shape

from billingd import once
from billingd.adapters.recurly.adapter import Recurly
from billingd.adapters.recurly.calls import Calls
from billingd.domain import sending
from billingd.domain.attempts import UNFINISHED, Leased, Verdict
from billingd.domain.sending import Intent, Send, Trust
from billingd.domain.usage import UsageRecord, book
from billingd.once import Once
from billingd.provisioning import ending
from billingd.sandbox.faults import Rule
from billingd.store import intents, outbox, usage, watermarks
from billingd.store.schema import intents as intents_table
from billingd.store.schema import outbox as outbox_table
from billingd.traffic import audit, keep, poll
from billingd.traffic.poll import TrafficPoller

EARLY: Final = 2
"""Subscriptions that are there from the first hours on, so that they renew before the end."""

MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)
Json = dict[str, Any]


# The bugs.


async def _nothing(*_: Any, **__: Any) -> None:
    return None


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for where, name, by in replacements:
            stack.enter_context(mock.patch.object(where, name, by))
        yield


def post_again_without_looking() -> AbstractContextManager[None]:
    """What got no answer is sent again at once, under a new key."""
    write = Once.write

    async def hasty(self: Once, name: str, body: Any, *, look_first: bool = False, **how: Any) -> str:
        if not look_first:
            how["find"] = _nothing
        return await write(self, name, body, look_first=look_first, **how)

    def at_once(intent: Intent | None, *, now: datetime, trust: Trust) -> Send:
        return Send(1 if intent is None else intent.epoch + 1, again=False)

    return _replaced((Once, "write", hasty), (Once, "_settle", _nothing), (once, "after_not_found", at_once))


def look_at_the_unbilled_only() -> AbstractContextManager[None]:
    """Lists of usage come without `billing_status=all`, and Recurly's default leaves out what was billed."""
    pages = Calls.pages

    async def by_default(self: Calls, operation: str, path: str, params: Json, read: Any) -> Any:
        asked = {name: value for name, value in params.items() if name != "billing_status"}
        return await pages(self, operation, path, asked, read)

    return _replaced((Calls, "pages", by_default))


def move_the_watermark_apart() -> AbstractContextManager[None]:
    """The watermark moves in a transaction of its own, right before that of the records."""
    read, cut, advance = TrafficPoller._read, TrafficPoller._cut, watermarks.advance
    moving: ContextVar[tuple[watermarks.Watermark, datetime]] = ContextVar("moving")

    async def noted(self: TrafficPoller, mark: Any, start: Any, end: Any, **how: Any) -> Any:
        moving.set((mark, how["advance_to"]))
        return await read(self, mark, start, end, **how)

    async def then_moved(self: TrafficPoller, totals: Any, known: Any) -> Any:
        counted = await cut(self, totals, known)
        mark, to = moving.get()
        async with self._store.write() as tx:
            await advance(tx, mark, to, now=self._clock.now())
        return counted

    return _replaced(
        (TrafficPoller, "_read", noted),
        (TrafficPoller, "_cut", then_moved),
        (watermarks, "advance", _nothing),
    )


def write_with_a_lost_lease() -> AbstractContextManager[None]:
    """Whoever was overtaken writes all the same: no fence at an action, no count of sendings at an intent."""
    opened = intents.opened

    async def settle(tx: Any, leased: Leased, verdict: Verdict, *, now: datetime) -> None:
        unfinished = verdict.state in UNFINISHED
        await tx.execute(
            sa.update(outbox_table)
            .where(outbox_table.c.id == leased.id)
            .values(
                state=verdict.state,
                due_at=verdict.due_at,
                error=verdict.error,
                attempt=0 if verdict.waited else leased.attempt,
                settled_at=None if unfinished else now,
            )
        )

    async def all_ours(tx: Any, held: Any, *, now: datetime, lease: timedelta) -> set[int]:
        return {leased.id for leased in held}

    async def as_it_is(tx: Any, name: str, seen: Intent | None, **how: Any) -> bool:
        found = await intents.find(tx, name)
        return await opened(tx, name, found, **how)

    async def refused(tx: Any, name: str, *, sends: int) -> bool:
        of_it = intents_table.c.name == name
        await tx.execute(sa.update(intents_table).where(of_it).values(state="refused"))
        return True

    return _replaced(
        (outbox, "settle", settle),
        (outbox, "renew", all_ours),
        (intents, "opened", as_it_is),
        (intents, "refused", refused),
    )


def same_key_with_another_amount() -> AbstractContextManager[None]:
    """A later difference is sent under the key of the window's first record, and any answer is believed."""
    key_of, create = sending.idempotency_key, Recurly.create_usage

    def key_of_window(name: str, epoch: int, digest: str) -> str:
        if not name.startswith("usage:"):
            return key_of(name, epoch, digest)
        return key_of(name.rpartition(":")[0], epoch, "")

    async def believed(self: Recurly, new: Any, *, key: str, retried: bool = False) -> str:
        with mock.patch.object(self._calls, "send", _anything_of(self._calls.send, new)):
            return await create(self, new, key=key, retried=retried)

    return _replaced((once, "idempotency_key", key_of_window), (Recurly, "create_usage", believed))


def _anything_of(send: Any, new: Any) -> Any:
    """`Calls.send`, its answer made to look as what was asked for."""

    async def answered(*asked: Any) -> Any:
        answer = await send(*asked)
        alike = dataclasses.replace(answer.value, merchant_tag=new.merchant_tag, units=new.units)
        return dataclasses.replace(answer, value=alike)

    return answered


def subscribe_without_the_marker() -> AbstractContextManager[None]:
    """A Recurly subscription is created without a search for the marker of an earlier one."""
    write = Once.write

    async def blind(self: Once, name: str, body: Any, **how: Any) -> str:
        if name.startswith("subscription:"):
            how |= {"find": _nothing, "look_first": False}
        return await write(self, name, body, **how)

    return _replaced((Once, "write", blind))


def reuse_the_revision() -> AbstractContextManager[None]:
    """A later difference goes to Recurly under the tag of the first."""
    create = Recurly.create_usage

    async def as_the_first(self: Recurly, new: Any, *, key: str, retried: bool = False) -> str:
        tag = new.merchant_tag.rpartition(":")[0] + ":1"
        return await create(self, dataclasses.replace(new, merchant_tag=tag), key=key, retried=retried)

    return _replaced((Recurly, "create_usage", as_the_first))


def book_differences_twice() -> AbstractContextManager[None]:
    """What arrived late is booked two times."""

    def twice(*of: Any, **how: Any) -> Iterator[UsageRecord]:
        for record in book(*of, **how):
            yield record
            if record.revision > 1:
                tag, _, revision = record.merchant_tag.rpartition(":")
                again = f"{tag}:{int(revision) + 1}"
                yield dataclasses.replace(record, revision=record.revision + 1, merchant_tag=again)

    return _replaced((keep, "book", twice))


def do_not_cut() -> AbstractContextManager[None]:
    """A window is one record, also where a period ends in it."""
    return _replaced((poll, "cut", lambda window, moments: (window,)))


def terminate_at_once() -> AbstractContextManager[None]:
    """Nothing waits for the last usage of a subscription that is over."""

    async def all_read(tx: Any, source: str) -> watermarks.Watermark:
        far = datetime(9999, 1, 1, tzinfo=UTC)
        return watermarks.Watermark(source, far, HOUR, far)

    async def none_left(tx: Any, subscription_id: str) -> int:
        return 0

    return _replaced(
        (ending, "watermarks", SimpleNamespace(**{**vars(watermarks), "find": all_read})),
        (ending, "usage", SimpleNamespace(**{**vars(usage), "unreported_of": none_left})),
    )


def never_flush() -> AbstractContextManager[None]:
    """Before a bill nothing is read but what has settled, as at any other time."""
    return _replaced((TrafficPoller, "_flush", _nothing))


def clear_doubts_unseen() -> AbstractContextManager[None]:
    """An audit ends a doubt without having looked at what was doubted."""
    return _replaced((audit, "_tag_of", lambda write: None))


# The lives in which they are hunted.

HEEDED: Final = Ingredients(ignored_keys=False)


@dataclass(frozen=True, slots=True)
class Season:
    """What a life has more of than any: the same for every seed, and nothing in it knows of a bug."""

    name: str
    days: float = 1.25
    """A day's plan renews in it, with traffic on both sides."""
    ingredients: Ingredients = HEEDED
    """Where Recurly heeds keys, nothing may be there twice."""
    ignores: int = 0
    """How often it does not heed them for hours."""
    strikes: int = 0
    """How many requests go wrong besides, each in one of these ways:"""
    kinds: tuple[str, ...] = ()
    outages: int = 0
    """How often more one side is away for a while."""
    serves: int = 0
    """How often more somebody is served."""
    ends: int = 0
    """How often more something ends."""
    leases: float = 0.0
    """How likely all leases run out while a request is on its way."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are not drawn."""


class Daily(Random):
    """Chooses plans that renew each day."""

    def choice(self, seq: Any) -> Any:
        return "daily" if "daily" in seq else super().choice(seq)


class HuntedLife(Life):
    """A life with more of what the season says."""

    def __init__(self, *given: Any, season: Season, **options: Any) -> None:
        drawn = Shape.drawn

        def shape(rng: Random) -> Shape:
            return dataclasses.replace(drawn(rng), **season.shape)

        with mock.patch.object(sim_life, "Shape", SimpleNamespace(drawn=shape)):
            super().__init__(*given, **options)
        self._season = season
        self._plan_rng = Daily(f"{self.seed}:plan")
        self._more = self._random("more")
        if season.leases:
            self._step = self.process.step
            self.process.step = self._overtaken  # type: ignore[method-assign]

    async def turmoil(self) -> None:
        """All that a life has, and what the season adds."""
        seconds, season = self.days * 86_400, self._season
        moments = [(self._more.uniform(0, seconds), "strike") for _ in range(season.strikes)]
        moments += [(self._more.uniform(0, seconds), "outage") for _ in range(season.outages)]
        moments += [(self._more.uniform(0, seconds), "serve") for _ in range(season.serves)]
        moments += [(self._more.uniform(seconds / 3, seconds), "end") for _ in range(season.ends)]
        moments += [(self._more.uniform(0, seconds), "ignore") for _ in range(season.ignores)]
        moments += [(self._more.uniform(0, 7200), "subscribe") for _ in range(EARLY)]
        spawn(self._and_more(sorted(moments)))
        await super().turmoil()

    async def _and_more(self, moments: list[tuple[float, str]]) -> None:
        for number, (at, what) in enumerate(moments):
            await asyncio.sleep(max(0.0, at - self.loop.time()))
            if what == "serve":
                await self.serve()
            elif what == "end":
                spawn(self.end_one())
            elif what == "outage":
                spawn(self.outage())
            elif what == "ignore":
                spawn(self.ignore_keys())
            elif what == "subscribe":
                spawn(self.subscribe(f"early{number}"))
            else:
                kind = self._more.choice(self._season.kinds)
                seconds = {"slow": self._more.choice((1, 5, 12, 40)), "late": self._more.uniform(1, 50)}
                args = {"seconds": seconds[kind]} if kind in seconds else {}
                self.world.faults.add(Rule("recurly", "POST", "*", kind, 1, self._more.randint(0, 2), args))
                self.note("fault", kind, args)

    async def _overtaken(self, where: str) -> None:
        await self._step(where)
        if where == "sent" and self._more.random() < self._season.leases:
            spawn(self._leases_run_out())

    async def _leases_run_out(self) -> None:
        """As when a process was held up for longer than its leases last: another worker takes them over."""
        daemon = self.process.daemon
        if daemon is None:
            return

        async def taken() -> None:
            async with daemon.store.write() as tx:
                await outbox.take_back_leases(tx, now=self.clock.now())
            daemon.outbox.wake.set()

        self.note("leases run out")
        await asyncio.wait([spawn(taken(), owner=self.process.number)])


COARSE: Final = {"window": 4 * HOUR, "settle": 2 * HOUR, "horizon": 12 * HOUR, "look_again": HOUR}
BUSY: Final = Season("busy", serves=40, ends=1, shape=COARSE)
STORMY: Final = Season(
    "stormy",
    serves=20,
    strikes=60,
    outages=4,
    kinds=("lost", "cut", "late", "html_502_committed", "500_committed", "stored_500", "key_expired"),
    shape=COARSE,
)
FORGETFUL: Final = Season(
    "forgetful",
    ingredients=Ingredients(clock_steps=False, density=2.5, ignored_keys=False),
    shape={"window": 15 * MINUTE, "settle": 2 * HOUR, "horizon": 30 * MINUTE},
)
OVERTAKEN: Final = Season(
    "overtaken",
    strikes=40,
    kinds=("stored_500", "stored_500", "late", "slow", "lost"),
    leases=0.2,
    shape=COARSE,
)
HEEDLESS: Final = Season(
    "heedless",
    ingredients=Ingredients(faults=False, outages=False, crashes=False, clock_steps=False),
    ignores=2,
    shape=COARSE,
)
SEASONS: Final = (BUSY, STORMY, FORGETFUL, OVERTAKEN, HEEDLESS)


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted bug, and where it is hunted. `seed` is known to find it, `tries` the first that does."""

    name: str
    plant: Callable[[], AbstractContextManager[None]]
    season: Season
    seed: int
    tries: int


BUGS: Final = (
    Bug("post again without looking", post_again_without_looking, STORMY, 41, 1),
    Bug("look without billing_status=all", look_at_the_unbilled_only, STORMY, 41, 5),
    Bug("watermark in another transaction", move_the_watermark_apart, FORGETFUL, 8, 8),
    Bug("lease without fencing", write_with_a_lost_lease, OVERTAKEN, 18, 18),
    Bug("same key with another amount", same_key_with_another_amount, BUSY, 42, 1),
    Bug("subscription without the marker search", subscribe_without_the_marker, STORMY, 1, 1),
    Bug("revision reused", reuse_the_revision, BUSY, 42, 1),
    Bug("late difference applied twice", book_differences_twice, BUSY, 42, 1),
    Bug("window across a period end", do_not_cut, BUSY, 42, 4),
    Bug("terminated before the last usage", terminate_at_once, BUSY, 1, 1),
    Bug("no reading before a bill", never_flush, BUSY, 42, 5),
    Bug("a doubt cleared unseen", clear_doubts_unseen, HEEDLESS, 14, 14),
)


EXCEPTION: Final = re.compile(r"[A-Z]\w*: ")


def play(bench: Bench, season: Season, seed: int, *, tracing: bool = False) -> Result:
    """One life of the season."""
    life = functools.partial(HuntedLife, season=season)
    with mock.patch.object(sim_bench, "Life", life):
        return bench.run(seed, season.days, season.ingredients, tracing=tracing)


def with_bug(bench: Bench, bug: Bug, seed: int) -> Result:
    """The same with the bug in it."""
    with bug.plant():
        return play(bench, bug.season, seed)


def said(result: Result) -> list[str]:
    """What the oracle says of a life; that it ended with an exception is no finding."""
    return [fault for fault in result.faults if not EXCEPTION.match(fault)]


def main(name: str, first: str, last: str) -> None:
    """Which bugs of a season each seed finds."""
    season = next(one for one in SEASONS if one.name == name)
    bench = Bench()
    for seed in range(int(first), int(last) + 1):
        began = time.process_time()
        clean = not play(bench, season, seed).faults
        finds = [bug.name for bug in BUGS if bug.season is season and said(with_bug(bench, bug, seed))]
        took = time.process_time() - began
        told = ", ".join(finds) or "nothing"
        sys.stdout.write(f"seed {seed}: {told}{'' if clean else '; NOT CLEAN WITHOUT'}; {took:.1f} s\n")
        sys.stdout.flush()
    bench.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
