"""What is at Recurly and not in the ledger: which of it is ours, and what becomes of the rest."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from linked import HOUR, TEN, Bills, Counted, add_on, link, subscription
from manual_clock import ManualClock

from billingd.admin import operations
from billingd.domain.billing import BilledSubscription, BilledUsage
from billingd.domain.drift import Drift
from billingd.domain.errors import NotFound, Retryable
from billingd.domain.periods import Period
from billingd.domain.usage import book, merchant_tag, parse_tag
from billingd.domain.windows import Window
from billingd.reconcile.scope import Scope
from billingd.store import drift, held, history, links, marks, periods, read_back, schema, usage, watermarks
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold
from billingd.store.links import SubscriptionLink
from billingd.traffic.periods import PeriodWatch
from billingd.traffic.poll import TrafficPoller
from billingd.traffic.read_back import ReadBack, _stretches

WINDOW = Window(TEN, TEN + HOUR)
DAY = timedelta(days=1)


class Far(Bills):
    """Recurly with usage; `recorded_at` is when its maker recorded it."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.usage: dict[str, list[tuple[datetime, BilledUsage]]] = {}
        self.asked: list[tuple[str, datetime]] = []
        self.hidden: set[str] = set()

    def hold(
        self,
        tag: str | None,
        units: int,
        *,
        id_: str = "",
        at: datetime = TEN,
        code: str = "amplify-quota-q1",
        recorded_at: datetime = TEN,
        billed: bool = False,
    ) -> None:
        there = self.usage.setdefault(code, [])
        one = BilledUsage(id_ or f"u{len(there)}", units, tag, at, TEN if billed else None)
        there.append((recorded_at, one))

    async def get_subscription(self, uuid: str) -> BilledSubscription:
        if uuid in self.hidden:
            raise NotFound(uuid)
        return await super().get_subscription(uuid)

    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]:
        return tuple(one for one in await super().list_live_subscriptions() if one.uuid not in self.hidden)

    async def list_recorded_usage(
        self, subscription_uuid: str, add_on_code: str, *, since: datetime
    ) -> tuple[BilledUsage, ...]:
        self.asked.append((add_on_code, since))
        if self.away:
            raise Retryable("away")
        if add_on_code not in self.usage:
            raise NotFound(add_on_code)
        return tuple(one for recorded_at, one in self.usage[add_on_code] if recorded_at >= since)

    async def list_usage(
        self, subscription_uuid: str, add_on_code: str, *, begin: datetime, end: datetime
    ) -> tuple[BilledUsage, ...]:
        there = [one for _, one in self.usage.get(add_on_code, [])]
        return tuple(one for one in there if begin <= one.usage_timestamp <= end)


@pytest.fixture
def far(clock: ManualClock) -> Far:
    made = Far(clock)
    made.show(Period(TEN, TEN + 30 * DAY))
    return made


@pytest.fixture
def reader(store: Store, clock: ManualClock, far: Far) -> ReadBack:
    watch = PeriodWatch(store, clock, far)
    return ReadBack(store, clock, far, watch, unsettled=timedelta(minutes=2), horizon=3 * DAY)


async def rows(store: Store) -> dict[str, tuple[int, str, str | None]]:
    """Units, state and id at Recurly of each tag in the ledger."""
    async with store.read() as tx:
        found = (await tx.execute(schema.usage_records.select())).all()
    return {row.merchant_tag: (row.units, row.state, row.usage_id) for row in found}


def tag(window: Window = WINDOW, revision: int = 1, subscription_id: str = "s1", quota_id: str = "q1") -> str:
    return merchant_tag(subscription_id, quota_id, window, revision)


@pytest.mark.parametrize(
    "window",
    [WINDOW, Window(TEN, TEN + timedelta(seconds=1)), Window(TEN + timedelta(seconds=7), TEN + 400 * DAY)],
)
@pytest.mark.parametrize("revision", [1, 2, 999])
def test_a_tag_says_what_it_was_made_of(window: Window, revision: int) -> None:
    said = parse_tag(tag(window, revision))
    assert said is not None
    assert (said.window, said.revision) == (window, revision)
    assert merchant_tag("s1", "q1", said.window, said.revision) == tag(window, revision)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bd1:",
        tag().upper(),
        tag() + " ",
        tag() + "\n",
        "x" + tag(),
        tag()[:-1] + "0",
        tag()[:-1] + "01",
        tag()[:-1] + "\u0661",
        tag().replace("bd1", "bd2"),
        tag().replace("20260302", "20260231"),
        tag().replace(":3600:", ":0:"),
        tag().replace(":3600:", ":9999999999:").replace("2026", "9999"),
    ],
)
def test_what_is_no_tag_of_ours_says_nothing(text: str) -> None:
    assert parse_tag(text) is None


async def test_what_the_ledger_lacks_is_put_into_it_once(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """Ours by the tag's pair; a second look finds nothing new; book() goes on after it."""
    await link(store, subscription(), add_ons=[add_on(), add_on("q2"), add_on("q3")])
    cut = Window(TEN + HOUR, TEN + HOUR + timedelta(minutes=7))
    far.hold(tag(), 5, at=TEN + HOUR / 2)
    far.hold(tag(revision=2), 2, at=TEN + HOUR / 2, billed=True)
    far.hold(tag(cut), -3, at=cut.start)
    far.hold(tag(quota_id="q2"), 70, code="amplify-quota-q1")  # of another add-on
    far.hold(tag(subscription_id="s2"), 80)
    far.hold(None, 90)
    far.hold("by hand", 90)
    far.hold(tag(revision=7), 0)
    far.hold(tag(quota_id="q2"), 4, code="amplify-quota-q2", at=TEN + 5 * HOUR)  # moved out of its window
    async with store.read() as tx:
        found = await links.find_subscription(tx, "s1")
    assert found is not None
    assert await reader.subscription(found, since=TEN) == 4
    expected = {
        tag(): (5, "reported", "u0"),
        tag(revision=2): (2, "reported", "u1"),
        tag(cut): (-3, "reported", "u2"),
        tag(quota_id="q2"): (4, "reported", "u0"),
    }
    assert await rows(store) == expected
    assert await reader.subscription(found, since=TEN) == 0
    assert await rows(store) == expected
    async with store.read() as tx:
        booked = (await usage.sums(tx, TEN, TEN + HOUR))[("s1", "q1")]
        assert await periods.of(tx, "s1") == [Period(TEN, TEN + 30 * DAY)], "learnt on the way"
    [more] = book("s1", "q1", {WINDOW: 10}, booked, before=WINDOW.end)
    assert (more.units, more.revision) == (3, 3)
    assert {since for _, since in far.asked} == {TEN - 5 * DAY}


async def test_what_waits_here_and_is_there_is_reported(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """However long ago it was recorded, and held or not; the ledger keeps its own units."""
    await link(store, subscription())
    old = Window(TEN - 90 * DAY, TEN - 90 * DAY + HOUR)
    async with store.write() as tx:
        for window, units, state in ((WINDOW, 5, "recorded"), (old, 6, "held")):
            await usage.insert(
                tx,
                list(book("s1", "q1", {window: units}, {}, before=window.end)),
                now=window.end,
                state=state,
            )
        await held.add(tx, Hold("late_usage", f"usage:{tag(old)}", "late", units=6), now=TEN)
        found = await links.find_subscription(tx, "s1")
    assert found is not None
    second = timedelta(seconds=1)
    far.hold(tag(), 4, id_="b", at=WINDOW.end - second)
    far.hold(tag(), 5, id_="a", at=WINDOW.end - second, billed=True)
    far.hold(tag(old), 6, id_="c", at=old.end - second, recorded_at=old.end)
    assert await reader.subscription(found, since=TEN) == 0
    assert await rows(store) == {tag(): (5, "reported", "a"), tag(old): (6, "reported", "c")}
    async with store.read() as tx:
        assert await held.standing(tx) == []


async def test_the_mark_stays_until_all_are_read(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """Nothing before what was under way has settled; one that cannot be read keeps the rest waiting."""
    await link(store, subscription("s1"), subscription("s2", billed_state="expired"), subscription("s3"))
    far.show(Period(TEN, TEN + 30 * DAY), subscription="s3")
    far.hold(tag(), 5)
    async with store.write() as tx:
        detail = {"copied_at": TEN.isoformat(), "file": "copy.db"}
        await marks.note(tx, marks.RESTORED, at=clock.now(), detail=detail)
    assert not await reader.finished()
    assert not await reader.run_once()
    assert far.asked == []
    clock.advance(timedelta(minutes=2))
    assert await reader.run_once()
    assert reader.reason == "reading back from Recurly after a restore (2 subscription(s) left)"
    far.away = True
    with pytest.raises(Retryable):
        await reader.run_once()
    assert not await reader.finished()
    far.away = False
    again = ReadBack(
        store, clock, far, PeriodWatch(store, clock, far), unsettled=timedelta(0), horizon=3 * DAY
    )
    far.asked.clear()
    while await again.run_once():
        pass
    assert await again.finished()
    assert (await again.may_send(), again.reason) == (False, "listing Amplify after a restore")
    assert len(far.asked) == 1, "the first was read before the restart, the second is over"
    async with store.read() as tx:
        assert await marks.find(tx, marks.RESTORED) is None
        [notice] = (await tx.execute(schema.outbox.select())).all()
    assert "1 usage record(s)" in str(notice.args)
    async with store.write() as tx:
        await marks.note(tx, marks.RESYNCED, at=clock.now())
    assert await again.run_once()
    assert (await again.may_send(), again.reason) == (True, None)
    async with store.read() as tx:
        assert await marks.find(tx, marks.RECOVERING) is None


async def test_what_was_corrected_counts_with_its_corrections(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """As the ledger had it: with all that is billed under its tag, each once, however often it is listed."""
    await link(store, subscription())
    changed, doubled, known, single = (Window(TEN + n * HOUR, TEN + (n + 1) * HOUR) for n in range(4))
    far.hold(tag(changed), 8, at=changed.start, billed=True)
    far.hold(f"{tag(changed)}~1", 3, at=changed.start, billed=True)
    far.hold(f"{tag(changed)}~2", -1, at=changed.start)
    for _ in range(2):
        far.hold(tag(doubled), 5, at=doubled.start, billed=True)
    far.hold(tag(doubled), 5, at=doubled.start)  # the audit will remove it
    far.hold(f"{tag(doubled)}~1", -5, at=doubled.start)
    far.hold(tag(known), 6, at=known.start, billed=True)
    far.hold(f"{tag(known)}~1", 1, at=known.start)
    for _ in range(2):
        far.hold(tag(single), 4, at=single.start, billed=True)  # doubled, and nobody corrected it
    far.hold(f"{tag(subscription_id='s2')}~1", 70)
    far.hold(f"{tag(known, 2)}~1", 70)  # of nothing that is there
    async with store.write() as tx:
        mine = list(book("s1", "q1", {known: 7}, {}, before=known.end))
        await usage.insert(tx, mine, now=known.end, state="recorded")
        found = await links.find_subscription(tx, "s1")
    assert found is not None
    assert await reader.subscription(found, since=TEN) == 3
    expected = {
        tag(changed): (10, "reported", "u0"),
        tag(doubled): (5, "reported", "u3"),
        tag(known): (7, "reported", "u7"),
        tag(single): (4, "reported", "u10"),
    }
    assert await rows(store) == expected
    assert await reader.subscription(found, since=TEN) == 0
    assert await rows(store) == expected
    async with store.read() as tx:
        written = {row.name: row for row in (await tx.execute(schema.intents.select())).all()}
        told = [
            (one.subject, one.detail["units"])
            for one in await history.of(tx, *(f"usage:{tag(each)}" for each in (changed, doubled, known)))
            if one.kind == "correction_read_back"
        ]
    done = {name.removeprefix("usage:"): (row.state, row.result) for name, row in written.items()}
    assert done.items() >= {
        (f"{tag(changed)}~1", ("done", "u1")),
        (f"{tag(changed)}~2", ("done", "u2")),
        (f"{tag(doubled)}~1", ("done", "u6")),
        (f"{tag(known)}~1", ("done", "u8")),
    }
    assert sorted(told) == sorted(
        [
            (f"usage:{tag(changed)}", 3),
            (f"usage:{tag(changed)}", -1),
            (f"usage:{tag(doubled)}", -5),
            (f"usage:{tag(known)}", 1),
        ]
    )


async def test_the_next_one_is_the_next_in_the_order_that_decides_what_is_read(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database may sort texts otherwise: nobody is passed over."""
    names = ["s1", "S2", "s-3"]
    await link(store, *(subscription(name) for name in names))
    for name in names:
        far.show(Period(TEN, TEN + 30 * DAY), subscription=name)
        far.hold(tag(subscription_id=name), 5)
    billing = links.billing_since

    async def as_a_dictionary(tx: Tx, moment: datetime) -> list[SubscriptionLink]:
        return sorted(await billing(tx, moment), key=lambda one: one.subscription_id.casefold())

    monkeypatch.setattr(links, "billing_since", as_a_dictionary)
    async with store.write() as tx:
        await marks.note(tx, marks.RESTORED, at=clock.now(), detail={"copied_at": None, "file": "copy.db"})
    clock.advance(timedelta(minutes=2))
    while not await reader.finished():
        assert await reader.run_once()
    assert len(await rows(store)) == 3


async def test_a_link_made_again_counts_from_where_it_counted(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """Its first window began before it was made at Recurly; traffic that was nobody's is read again."""
    made_at = TEN + timedelta(minutes=20)
    await link(store, subscription(usage_from=made_at))
    far.hold(tag(), 5, at=made_at)
    now = TEN + 10 * DAY
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN - DAY, HOUR, now=now)
        mark = await watermarks.find(tx, "metrics")
        assert mark is not None
        await watermarks.advance(tx, mark, now, now=now)
        for start in (TEN - HOUR, TEN, TEN + 5 * DAY):
            await usage.set_unlinked(tx, "s1", "q1", start, 3, now=now)
    async with store.read() as tx:
        found = await links.find_subscription(tx, "s1")
        plan = await links.find_plan(tx, "p1")
    assert found is not None
    assert plan is not None
    there = await reader.list(far.shown["uuid-s1"], plan)
    async with store.write() as tx:
        await reader.keep(tx, found, there, now=now)
    assert await rows(store) == {tag(): (5, "reported", "u0")}
    async with store.read() as tx:
        again = await links.find_subscription(tx, "s1")
        mark = await watermarks.find(tx, "metrics")
        left = (await tx.execute(schema.unlinked_traffic.select())).all()
    assert again is not None
    assert mark is not None
    assert again.usage_from == TEN
    assert mark.at == TEN
    assert [row.window_start for row in left] == [TEN - HOUR]


async def test_a_fresh_link_moves_nothing(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """What lies within the horizon is read again anyhow."""
    await link(store, subscription())
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN - DAY, HOUR, now=TEN)
        assert await read_back.read_again(tx, "s1", TEN - DAY, horizon=3 * DAY, now=TEN) is None
        found = await links.find_subscription(tx, "s1")
        assert found is not None
        await reader.keep(tx, found, {}, now=TEN)
        mark = await watermarks.find(tx, "metrics")
        assert mark is not None
        assert mark.at == TEN - DAY
        assert await links.find_subscription(tx, "s1") == found


async def test_what_was_never_read_is_read_from_where_it_counts(store: Store) -> None:
    """Windows begin earlier then, also those of today's length; no record is cut by where they begin."""
    await link(store, subscription())
    long = Window(TEN - 9 * DAY - HOUR, TEN - 9 * DAY + HOUR)
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", TEN - DAY, HOUR, now=TEN)
        await usage.insert(tx, list(book("s1", "q1", {long: 5}, {}, before=long.end)), now=TEN)
        since = TEN - 9 * DAY + timedelta(minutes=5)
        assert await read_back.read_again(tx, "s1", since, horizon=30 * DAY, now=TEN) == long.start
        mark = await watermarks.find(tx, "metrics")
        assert mark == watermarks.Watermark("metrics", long.start, HOUR, long.start)


async def test_a_404_of_an_add_on_that_the_subscription_has_is_no_answer(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> None:
    """Nothing of it is taken for read back; a quota that came later is passed over."""
    await link(store, subscription(), add_ons=[add_on(), add_on("q2")])
    far.hold(tag(), 5)
    far.shown["uuid-s1"] = replace(
        far.shown["uuid-s1"], add_on_codes=("amplify-quota-q1", "amplify-quota-q2")
    )
    async with store.read() as tx:
        found = await links.find_subscription(tx, "s1")
        plan = await links.find_plan(tx, "p1")
    assert found is not None
    assert plan is not None
    with pytest.raises(Retryable, match="amplify-quota-q2"):
        await reader.subscription(found, since=TEN)
    with pytest.raises(Retryable, match="amplify-quota-q2"):
        await reader.list(far.shown["uuid-s1"], plan)
    assert await rows(store) == {}
    far.shown["uuid-s1"] = replace(far.shown["uuid-s1"], add_on_codes=("amplify-quota-q1",))
    assert await reader.subscription(found, since=TEN) == 1


@pytest.fixture
async def given_up(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack
) -> tuple[TrafficPoller, Counted]:
    """It was over at Amplify at noon while Recurly did not show it after a restore; read until four."""
    over = subscription(state="ending", usage_until=TEN + 2 * HOUR)
    await link(store, over, add_ons=[add_on(), add_on("q2")])
    far.hidden.add("uuid-s1")
    async with store.write() as tx:
        await links.end(tx, "s1", billed_state="missing", now=TEN + 2 * HOUR)
        told = {"subscription": "s1", "since": TEN.isoformat(), "traffic_from": TEN.isoformat()}
        await marks.note(tx, marks.unread("s1"), at=clock.now(), detail=told)
        await watermarks.begin(tx, Counted.name, TEN, HOUR, now=TEN)
        mine = list(book("s1", "q1", {WINDOW: 3}, {}, before=WINDOW.end))
        await usage.insert(tx, mine, now=WINDOW.end, state="held")  # of the copy
    source = Counted()
    source.serve(5)
    source.serve(4, hours=1)
    source.serve(8, hours=1, quota="q2")
    poller = TrafficPoller(
        store,
        clock,
        source,
        reader._watch,
        length=HOUR,
        settle=HOUR,
        horizon=3 * DAY,
        wake_outbox=asyncio.Event(),
    )
    clock.advance(6 * HOUR)
    await poller.run_once()
    return poller, source


async def sums(store: Store) -> dict[str, tuple[int, int]]:
    """The id and the units of what is held in a sum, by its add-on."""
    async with store.read() as tx:
        items: Sequence[dict[str, Any]] = await held.standing(tx, kind="usage_not_read_back")
    return {item["add_on_code"][-2:]: (item["id"], item["units"]) for item in items}


async def test_what_is_not_read_back_is_counted_and_not_recorded(
    store: Store, clock: ManualClock, given_up: tuple[TrafficPoller, Counted]
) -> None:
    """Beyond what the ledger has: what the copy held is held by itself. In windows of any length, once."""
    poller, source = given_up
    assert await rows(store) == {tag(): (3, "held", None)}
    assert {code: units for code, (_, units) in (await sums(store)).items()} == {"q1": 6, "q2": 8}
    async with store.write() as tx:  # as it was read in quarters once
        at = TEN + 1.5 * HOUR
        await usage.set_unlinked(tx, "s1", "q1", at, 3, now=clock.now())
    source.serve(6, hours=1)
    await poller.run_once()
    assert {code: units for code, (_, units) in (await sums(store)).items()} == {"q1": 8, "q2": 8}
    assert await rows(store) == {tag(): (3, "held", None)}


async def test_what_a_run_found_of_it_before_still_stands(
    store: Store, given_up: tuple[TrafficPoller, Counted]
) -> None:
    """No run compares its usage any more, and none says so each day: it is held."""
    async with store.write() as tx:
        many: dict[str, Any] = {"since": TEN, "until": TEN + DAY, "subscription_id": None, "now": TEN}
        begun = await drift.begin(
            tx, **many, repair=False, asked=drift.DAILY, phase="served", steps=1, not_compared=[]
        )
        run, mark = await drift.find(tx, begun), await watermarks.find(tx, Counted.name)
        assert run is not None
        assert mark is not None
        scope = await Scope.of(tx, run, mark)
    found = Drift("wrong_amount", "usage", "s1", "amplify-quota-q1", TEN, 4, "planted", "by hand", tag=tag())
    assert scope.hides(found)
    assert not scope.covers(found)
    assert scope.covers(replace(found, subscription_id="s2"))


async def test_what_a_person_decided_on_is_not_billed_unasked(
    store: Store, clock: ManualClock, far: Far, reader: ReadBack, given_up: tuple[TrafficPoller, Counted]
) -> None:
    """What is counted since is held beside it; shown again, nothing happens before that was released."""
    poller, source = given_up
    held_id, _ = (await sums(store))["q1"]
    assert await operations.write_off(store, held_id, reason="charged by hand", now=clock.now())
    await poller.run_once()
    assert (await sums(store)).keys() == {"q2"}
    source.serve(9, hours=1.5)
    await poller.run_once()
    assert (await sums(store))["q1"][1] == 9

    far.hidden.clear()
    far.hold(tag(), 3, at=WINDOW.start)
    far.hold(tag(), 0, code="amplify-quota-q2")
    for _ in range(2):
        clock.advance(HOUR)
        await poller.run_once()
    assert (far.asked, sorted(await sums(store))) == ([], ["q1", "q2"])
    assert await rows(store) == {tag(): (3, "held", None)}
    async with store.read() as tx:
        [shown] = await held.standing(tx, kind="shown_again")
    assert "6 unit(s)" in shown["reason"]

    assert await operations.release(store, shown["id"], now=clock.now())
    clock.advance(HOUR)
    await poller.run_once()
    await poller.run_once()
    assert await sums(store) == {}
    there = {(one[0], one[1]) for one in (await rows(store)).values()}
    assert there == {(3, "reported"), (2, "recorded"), (13, "recorded"), (8, "recorded")}
    async with store.read() as tx:
        assert await usage.unlinked_units(tx) == 0
        assert await marks.unread_ones(tx) == {}


def test_times_are_looked_for_in_stretches() -> None:
    """Years of nothing between two records are not listed."""
    times = [TEN, TEN + DAY, TEN + 300 * DAY, TEN + 306 * DAY, TEN + 900 * DAY]
    assert _stretches(times) == [
        (TEN, TEN + DAY),
        (TEN + 300 * DAY, TEN + 306 * DAY),
        (TEN + 900 * DAY, TEN + 900 * DAY),
    ]
    assert _stretches([]) == []
