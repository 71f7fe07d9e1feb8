"""The page as the server makes it: what it says, how little it reads, and that nothing in it is markup."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import page_bench as bench
import pytest
import sqlalchemy as sa
from aiohttp.test_utils import TestClient, TestServer
from linked import add_on, link, subscription
from page_bench import DAY, HOSTILE, HOUR, NOW, Behind

from billingd.admin import chart
from billingd.admin.happened import Happened, happened
from billingd.domain.attempts import Action
from billingd.domain.drift import LATE_BEYOND_HORIZON, WRONG_AMOUNT, Drift
from billingd.provisioning.absence import tell
from billingd.store import (
    absences,
    glance,
    glance_subscriptions,
    held,
    intents,
    links,
    outbox,
    schema,
    watermarks,
)
from billingd.store.absences import Absence
from billingd.store.engine import Store
from billingd.store.held import Hold
from billingd.store.links import PlanLink


class Page:
    """The page over a store."""

    def __init__(self, behind: Behind, client: TestClient[Any, Any]) -> None:
        self.behind, self.client, self.store = behind, client, behind.store
        self.policy = ""

    async def text(self, query: str = "") -> str:
        async with self.client.get(f"/{query}") as answer:
            assert answer.status == 200, await answer.text()
            self.policy = answer.headers["Content-Security-Policy"]
            return await answer.text()

    async def part(self, name: str, query: str = "") -> str:
        """One part of it, as words."""
        text = await self.text(query)
        found = re.search(rf'<section[^>]*data-part="{name}".*?</section>', text, re.DOTALL)
        assert found is not None
        return " ".join(re.sub(r"<[^>]+>", " ", found[0]).split())


@pytest.fixture
async def page(store: Store) -> AsyncIterator[Page]:
    behind = bench.behind(store)
    async with TestClient(TestServer(behind.listener().application())) as client:
        yield Page(behind, client)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_nothing_from_outside_is_markup_and_the_policy_allows_two_hashes(page: Page) -> None:
    """No handler, no style attribute, no other script; what the hashes are of is just what is there."""
    await bench.hostile(page.store)
    text = await page.text()
    assert HOSTILE not in text
    assert "{{7*7}}" in text
    assert text.count("&lt;script&gt;alert(2)&lt;/script&gt;") >= 8
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy
        text = text.replace(inside, "")
    tags = re.findall(r"<[a-z][^<]*?>", re.sub(r"=\"[^\"]*\"", '=""', text))
    assert not [one for one in tags if re.search(r"\s(on\w+|style|src|action)=", one)]
    assert "unsafe" not in page.policy
    for directive in (
        "default-src 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
        "base-uri 'none'",
    ):
        assert directive in page.policy


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_endless_texts_are_cut(page: Page) -> None:
    """What a far side says may be a megabyte."""
    await bench.dead(page.store, Action("report_usage", "s", "d"), error="x" * 1_000_000, at=NOW)
    text = await page.text()
    assert "x" * 500 + "…" in text
    assert len(text) < 60_000


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("query", ["?dead_after=x", "?held_after=-1", "?dead_after=99999999999999999999"])
async def test_a_place_that_is_none_is_refused(page: Page, query: str) -> None:
    """By its name; an empty one is the beginning."""
    async with page.client.get(f"/{query}") as answer:
        assert answer.status == 400
        assert query[1:].split("=")[0] in await answer.text()
    await page.text("?dead_after=&held_after=&after=")


async def test_lists_go_on_where_a_page_ended(page: Page) -> None:
    """Dead letters by number, held items by kind and subject, subscriptions by id; each by itself."""
    await link(page.store, *(subscription(f"s{number:02}") for number in range(25)), now=NOW - DAY)
    actions = [Action("report_usage", f"u{number:02}", f"d{number:02}") for number in range(25)]
    await bench.dead(page.store, *actions, error="no", at=NOW)
    async with page.store.write() as tx:
        for number in range(24, -1, -1):
            await held.add(tx, Hold("plan_held", f"p{number:02}", "wait"), now=NOW)
    for name, letter, cell in (
        ("dead", "u", r'<bdi class="minor">(u\d\d)</bdi>'),
        ("held", "p", r'<bdi class="minor">(p\d\d)</bdi>'),
        ("subscriptions", "S", r"<b><bdi>(S\d\d)</bdi></b>"),
    ):
        seen: list[str] = []
        query = ""
        for pages in (1, 2):
            text = await page.text(query)
            [section] = re.findall(rf'<section data-part="{name}".*?</section>', text, re.DOTALL)
            seen += re.findall(cell, section)
            further = re.search(r'href="(\?[^"#]*)#\w+">Next', section)
            assert (further is not None) == (pages == 1)
            assert ("From the first" in section) == (pages == 2)
            query = further[1].replace("&amp;", "&") if further else ""
        assert seen == [f"{letter}{number:02}" for number in range(25)]


async def test_a_subscription_says_what_was_served_recorded_reported_and_billed(page: Page) -> None:
    """Of the last days; billed is what was reported before the open period began."""
    await link(page.store, subscription("s1", billed_state="active"), now=NOW - 40 * DAY)
    await bench.period(page.store, "s1", 3 * DAY)
    for back, units, state in (
        (20 * 24, 1, "reported"),  # before all bars
        (5 * 24, 2, "reported"),
        (1 * 24, 4, "reported"),
        (2 * 24, 8, "held"),
        (1 * 24 + 1, 16, "recorded"),
        (6 * 24, 32, "recorded"),
        (7 * 24, 64, "written_off"),
    ):
        await bench.records(page.store, "s1", hours=1, units=[units].__getitem__, state=state, back=back)
    window = NOW - 5 * DAY
    await bench.reconciled(
        page.store,
        Drift(LATE_BEYOND_HORIZON, "window:s1:q1:a", "s1", None, window, 1000, "late", "book it"),
        Drift(WRONG_AMOUNT, "window:s1:q1:b", "s1", None, window, 300, "less", "look"),
        Drift(WRONG_AMOUNT, "usage:bd1:x", "s1", None, window, 5000, "another amount", "look"),
    )
    said = await page.part("subscriptions")
    recorded = 2 + 4 + 8 + 16 + 32 + 64
    served = recorded + 1000 - 300
    assert f"0, 0, 0, 0, 0, 0, 64, 32, 2, 0, 0, 8, 20, 0 {served} {recorded} 6 2 16 to report, 8 held" in said
    assert "ends 2026-04-16" in said
    assert "32 missed an earlier invoice" in said
    assert "3 differences, 6,300 units" in await page.part("drift")


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_no_quota_is_left_out_however_many_there_are(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two statements find of one subscription is added up, and what another has is not."""
    monkeypatch.setattr(glance_subscriptions, "QUOTAS_AT_ONCE", 100)
    row = {"revision": 1, "units": 7, "state": "recorded", "window_start": NOW - DAY, "window_end": NOW}
    row |= {"usage_timestamp": NOW - DAY, "recorded_at": NOW}
    for name, many in (("a", 150), ("b", 210), ("c", 1)):
        plan = PlanLink(name, name, name, "weather", f"amplify-plan-{name}", "USD", "active", None)
        quotas = [f"{name}{number}" for number in range(many)]
        add_ons = [add_on(quota, name) for quota in quotas]
        await link(
            page.store, subscription(name, plan_id=name), plan=plan, add_ons=add_ons, now=NOW - 9 * DAY
        )
        async with page.store.write() as tx:
            rows = [
                row | {"subscription_id": name, "quota_id": quota, "merchant_tag": quota} for quota in quotas
            ]
            await tx.execute(sa.insert(schema.usage_records), rows)
    said = await page.part("subscriptions")
    assert re.findall(r"(\S+) (\S+) 0 0 none is open", said) == [("1,050",) * 2, ("1,470",) * 2, ("7",) * 2]


async def test_what_is_too_much_to_be_added_up_is_marked(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each subscription too; neither is a difference forgotten behind those that were mended."""
    await link(page.store, subscription("s1"), subscription("s2"), now=NOW - 9 * DAY)
    for name in ("s1", "s2"):
        await bench.period(page.store, name)
        await bench.records(page.store, name, hours=4, units=lambda _: 3, state="recorded")
    found = [Drift(WRONG_AMOUNT, f"window:{n}", "s1", None, NOW - DAY, 100, "c", "f") for n in range(6)]
    await bench.reconciled(page.store, *found)
    async with page.store.write() as tx:
        await tx.execute(sa.update(schema.drift).where(schema.drift.c.id == 1).values(mended="posted"))
    said = await page.part("subscriptions")
    assert said.count("12 to report ends") == 2
    assert "5 differences, 500 units" in await page.part("drift")
    monkeypatch.setattr(glance, "COUNT_MAX", 5)
    said = await page.part("subscriptions")
    assert sorted(re.findall(r"(\S+ to report|too many to add up) ends", said))[0].endswith("+ to report")
    assert "12 to report" not in said
    assert said.count("complete so far") == 0
    assert "+ 12 0 0" in said
    assert "5+ differences, 500+ units" in await page.part("drift")


async def test_subscriptions_with_units_that_wait_come_first(page: Page) -> None:
    """On the first page; the others follow in the order of their ids, nobody twice."""
    names = [f"s{number:02}" for number in range(30)]
    await link(page.store, *map(subscription, names), now=NOW - DAY)
    await bench.records(page.store, "s29", hours=1, units=lambda _: 5, state="held")
    shown = re.findall(r"<b><bdi>(S\d\d)</bdi></b>", await page.text())
    assert shown == ["S29", *(name.upper() for name in names[:20])]


Fill = Callable[[Behind], Any]


async def _late(behind: Behind) -> None:
    await bench.busy(behind.store)
    behind.clock.advance(timedelta(hours=3))
    for side in behind.sides.values():
        side.last_reached_at = behind.clock.now()


async def _stuck(behind: Behind) -> None:
    await bench.busy(behind.store)
    behind.progress.turned("outbox", NOW - HOUR, patience=timedelta(minutes=5))


async def _unreported(behind: Behind) -> None:
    await bench.busy(behind.store)
    await bench.records(behind.store, "weather-acme", hours=1, units=lambda _: 1, state="recorded", back=1)
    behind.clock.advance(timedelta(minutes=60))
    for side in behind.sides.values():
        side.last_reached_at = behind.clock.now()


async def _failing(behind: Behind) -> None:
    await bench.busy(behind.store)
    async with behind.store.write() as tx:
        new = [Action("provision_subscription", f"subscription:{n}", f"k{n}") for n in range(4)]
        await outbox.insert(tx, new, now=NOW - 3 * DAY, due_at=NOW + timedelta(minutes=9))
        backlog = [Action("report_usage", f"usage:{n}", f"u{n}") for n in range(4)]
        await outbox.insert(tx, backlog, now=NOW)
        failed = {"attempt": 11, "fence": 11, "error": "Recurly answered 500 Internal Server Error"}
        young = {"created_at": NOW - 20 * timedelta(minutes=1)}
        waits = {"attempt": 0, "error": "waits for its approval"}
        for key, changes in (("k0", failed), ("k1", failed), ("k2", failed | young), ("k3", failed | waits)):
            row = sa.update(schema.outbox).where(schema.outbox.c.key == key)
            await tx.execute(row.values(changes))


async def _unanswered(behind: Behind) -> None:
    await bench.busy(behind.store)
    async with behind.store.write() as tx:
        for name, ago, gave_up in (
            ("a", 3 * HOUR, 2 * HOUR),
            ("b", 3 * HOUR, None),
            ("c", HOUR / 2, None),
            ("d", 3 * HOUR, HOUR / 2),
        ):
            sent = NOW - ago
            await intents.opened(
                tx, name, None, epoch=1, key=name, body_hash="", first_sent_at=sent, now=sent
            )
            if gave_up is not None:
                await intents.gave_up(tx, name, sends=1, burnt=False, now=NOW - gave_up)


async def _nothing_reported(behind: Behind) -> None:
    await bench.busy(behind.store)
    async with behind.store.write() as tx:
        await tx.execute(sa.delete(schema.usage_records))
        await tx.execute(sa.delete(schema.outbox))


async def _one_held(behind: Behind) -> None:
    await _nothing_reported(behind)
    async with behind.store.write() as tx:
        again = Action("provision_plan", "plan:p", "")
        await held.add(tx, Hold("plan_differs", "plan:p", "differs", again), now=NOW)


async def _one_dead(behind: Behind) -> None:
    await bench.busy(behind.store)
    await bench.dead(behind.store, Action("a", "b", "c"), error="no", at=NOW)


@pytest.mark.parametrize(
    ("fill", "tone", "says"),
    [
        (None, "idle", "Nothing to bill yet"),
        (lambda behind: bench.busy(behind.store), "flowing", "Money is flowing"),
        (_nothing_reported, "idle", "No usage was reported yet"),
        (_one_held, "look", "No usage was reported yet, and something waits for you 1 held item"),
        (_one_dead, "look", "something waits for you 1 dead letter"),
        (_failing, "look", "something waits for you 2 actions keep failing"),
        (_unanswered, "look", "something waits for you 2 writes are unanswered"),
        (
            lambda behind: bench.trouble(behind.store, behind.sides),
            "stopped",
            "Recurly was not reached lately",
        ),
        (_late, "stopped", "traffic is read later than usual"),
        (_stuck, "stopped", "the loop outbox has stopped making progress"),
        (_unreported, "stopped", "recorded a while ago are not reported yet"),
    ],
)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_the_first_thing_said_is_whether_money_flows(
    page: Page, fill: Fill | None, tone: str, says: str
) -> None:
    """And if not, why."""
    if fill is not None:
        await fill(page.behind)
    assert f'<section class="verdict {tone}"' in await page.text()
    assert says in await page.part("verdict")


async def test_it_is_said_how_many_there_are_up_to_a_limit(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it only that there are more."""
    actions = [Action("report_usage", f"u{number}", f"d{number}") for number in range(7)]
    await bench.dead(page.store, *actions, error="no", at=NOW)
    assert "7 dead letters" in await page.part("verdict")
    monkeypatch.setattr(glance, "COUNT_MAX", 5)
    assert "more than 5 dead letters" in await page.part("verdict")
    assert "Dead letters 5+" in await page.part("figures")


async def test_what_fails_is_told_behind_any_backlog(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not counted for it."""
    monkeypatch.setattr(glance, "COUNT_MAX", 5)
    await _failing(page.behind)
    async with page.store.write() as tx:
        backlog = [Action("report_usage", f"old:{n}", f"o{n}") for n in range(20)]
        await outbox.insert(tx, backlog, now=NOW - 5 * DAY)
    assert "2 actions keep failing" in await page.part("verdict")
    assert "Work under way 5+" in await page.part("figures")


async def _grown(store: Store, first: int, until: int) -> None:
    """Everything that a store gathers with the years, in the past."""
    numbers = range(first, until)
    past = [NOW - 30 * DAY - number * HOUR for number in numbers]
    action = {"kind": "report_usage", "args": {}, "state": "done", "attempt": 1, "fence": 1}
    item = {"kind": "plan_held", "reason": "wait", "resolution": "went by"}
    event = {
        "source": "amplify",
        "type": "ResourceCreated",
        "kind": "Subscription",
        "name": "s",
        "via": "feed",
    }
    note = {"subject": "s", "kind": "retried", "detail": {}}
    rows: dict[sa.Table, list[dict[str, Any]]] = {
        schema.outbox: [
            action | {"subject": f"u{n}", "key": f"k{n}", "due_at": at, "created_at": at, "settled_at": at}
            for n, at in zip(numbers, past, strict=True)
        ],
        schema.held: [
            item | {"subject": f"p{n}", "since": at, "closed_at": at}
            for n, at in zip(numbers, past, strict=True)
        ],
        schema.events: [
            event | {"id": str(n), "received_at": at} for n, at in zip(numbers, past, strict=True)
        ],
        schema.history: [note | {"at": at} for at in past],
    }
    async with store.write() as tx:
        for table, of_it in rows.items():
            await tx.execute(sa.insert(table), of_it)
        for number in numbers:
            await links.create_subscription(tx, subscription(f"t{number:05}"))
    for name in ("s1", "t00000"):
        await bench.records(store, name, hours=len(numbers), units=lambda _: 3, back=24 * 30 + first)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_page_costs_the_same_however_much_the_store_holds(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in steps of SQLite's machine, which are the same on every computer."""
    monkeypatch.setattr(glance, "COUNT_MAX", 50)
    store = page.store
    await link(store, subscription("s1"), *(subscription(f"s1{n:02}") for n in range(25)), now=NOW - 40 * DAY)
    await bench.records(store, "s1", hours=300, units=lambda _: 2)
    async with store.write() as tx:
        await watermarks.begin(tx, "metrics", NOW - 2 * HOUR, HOUR, now=NOW)
    steps = [0]

    def step() -> int:
        steps[0] += 1
        return 0

    connections = [await store._reader.connect().start() for _ in range(4)]
    for connection in connections:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.set_progress_handler(step, 1)
    for connection in connections:
        await connection.close()

    async def cost() -> int:
        before = steps[0]
        await page.text()
        return steps[0] - before

    await _grown(store, 0, 60)
    small = await cost()
    await _grown(store, 60, 660)
    large = await cost()
    assert small > 1_000
    assert large < small * 1.1, (small, large)


async def test_negative_and_short_bars_and_words_for_them() -> None:
    """What was taken back is not drawn; where windows are seconds, bars are minutes."""
    over = chart.stretches(NOW, HOUR)
    assert (over.each, over.span, len(over.starts)) == ("day", "14 days", 14)
    drawn = chart.chart({(0, "reported"): -5, (1, "reported"): 1, (2, "held"): 1_000_000}, over)
    assert [(block.state, block.height) for block in drawn.blocks] == [("reported", 3.0), ("held", 30.0)]
    [large, small] = chart.chart({(0, "reported"): 6_272, (0, "held"): 35}, over).blocks
    assert (large.height, small.height, small.y) == (27.0, 3.0, 2.0), "seen, and within the drawing"
    assert "from 07 Mar to 20 Mar UTC: 0, 1, 1,000,000, 0" in drawn.said
    short = chart.stretches(NOW, timedelta(seconds=2))
    assert (short.each, short.span) == ("minute", "14 min")
    assert chart.stretches(NOW, timedelta(minutes=1)).span == "14 h"
    assert chart.chart({}, short).said.endswith("UTC: none")


async def test_what_came_alike_in_a_row_is_one_line() -> None:
    """With the newest's time; something else between them parts them."""

    def settled(minutes: int, state: str = "done") -> dict[str, Any]:
        at = NOW - timedelta(minutes=minutes)
        return {
            "settled_at": at,
            "kind": "report_usage",
            "subject": f"u{minutes}",
            "state": state,
            "error": "e",
        }

    note = {
        "at": NOW - timedelta(minutes=3),
        "subject": "u9",
        "kind": "retried",
        "detail": {"by": "operator"},
    }
    told = happened([], [settled(1), settled(2), settled(4), settled(5, "dead")], [note])
    assert told == [
        Happened(NOW - timedelta(minutes=1), "action", "report_usage", "", "done", 2),
        Happened(NOW - timedelta(minutes=3), "note", "retried", "u9", "by an operator"),
        Happened(NOW - timedelta(minutes=4), "action", "report_usage", "u4", "done"),
        Happened(NOW - timedelta(minutes=5), "action", "report_usage", "u5", "dead: e"),
    ]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_what_is_held_is_told_once_and_has_one_button(page: Page) -> None:
    """It looks again by itself, and so waits too."""
    why = "Subscription poor has no account"
    again = Action("provision_subscription", "subscription:poor", "k", {"name": "poor"})
    async with page.store.write() as tx:
        await held.add(tx, Hold("account_missing", again.subject, why, again), now=NOW)
        await outbox.insert(tx, [again], now=NOW, due_at=NOW + HOUR)
        await tx.execute(sa.update(schema.outbox).values(error=why))
    text = await page.text()
    assert text.count(why) == 1
    assert "held item #1" in await page.part("waiting")
    assert re.findall(r'data-post="((?:held|outbox)/[^"]+)"', text) == ["held/1/release"]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_only_what_may_be_written_off_has_the_button(page: Page) -> None:
    """The others can be mended, and are only released."""
    record = Action("report_usage", "u", "", {"record": 1})
    async with page.store.write() as tx:
        await held.add(tx, Hold("late_usage", "usage:1", "late", record, units=5), now=NOW)
        await held.add(
            tx, Hold("plan_differs", "plan:p", "differs", Action("provision_plan", "p", "")), now=NOW
        )
    text = await page.text()
    assert re.findall(r'data-post="(held/\d+/[a-z-]+)"', text) == [
        "held/1/release",
        "held/1/write-off",
        "held/2/release",
    ]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_who_releases_what_ends_subscriptions_sees_all_of_them_and_is_asked(page: Page) -> None:
    """The warning stands before the names; where they do not all fit, there is the command and no button."""

    async def missing(*titles: str) -> str:
        async with page.store.write() as tx:
            for title in titles:
                await absences.note(tx, Absence("subscription", f"id-{title[:12]}", "n", title, NOW))
            await absences.hold(tx, "subscription", [f"id-{title[:12]}" for title in titles])
            await tell(tx, NOW)
        return await page.part("held")

    again = Action("end_subscription", "end:s9", "", {"id": "s9"})
    async with page.store.write() as tx:
        await held.add(tx, Hold("end_discarded", "subscription:s9:end", "an operator", again), now=NOW)
        await held.add(tx, Hold("plan_differs", "plan:p", "differs", Action("a", "b", "")), now=NOW)
    names = [f"Customer {n:03}" for n in range(60)]
    said = await missing(*names)
    assert said.index("none of them is ended") < said.index("ends just these: ")
    assert all(f"{name} (id-{name})" in said for name in names)
    asked = dict(
        re.findall(
            r'data-post="held/\d+/release" data-about="(\w+) [^>]*?data-warn="(.*?)"', await page.text()
        )
    )
    assert sorted(asked) == ["end_discarded", "mass_absence"]
    assert "ends a subscription" in asked["end_discarded"]
    assert "ends 60 subscriptions at Recurly" in asked["mass_absence"]
    said = await missing(*(f"Client {n:05}{'.' * 380}" for n in range(30)))
    assert "90 subscription(s)" in said
    assert "It is too long to be released from here: billingd held list shows all of it." in said
    text = await page.text()
    assert re.findall(r'data-post="held/\d+/release" data-about="(\w+)', text) == [
        "end_discarded",
        "plan_differs",
    ]
    assert "<code>billingd held release 4</code>" in text
