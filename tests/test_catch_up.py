"""Webhooks lost: the feed brings what they would have, each event once, whatever the feed does."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from rig import HOUR, Crash, Rig, a_rig
from structlog.testing import capture_logs

from billingd.admin import status
from billingd.domain.errors import Gone, Retryable
from billingd.domain.events import parse_amplify
from billingd.sandbox.amplify.journal import Event
from billingd.store import feed, marks, schema
from billingd.store.feed import OVERLAP, Place

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
ONE_DATABASE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    """A topic, a product labelled for us, and a first reading of the feed."""
    async with a_rig(store_url) as made:
        made.watch()
        await made.product()
        await made.catch_up()
        yield made


async def place(rig: Rig) -> Place:
    async with rig.store.read() as tx:
        found = await feed.find(tx, "billingd")
    assert found is not None
    return found


async def resynced(rig: Rig) -> bool:
    """Whether no resync is asked for."""
    async with rig.store.read() as tx:
        return await marks.find(tx, marks.RESYNCED) is not None


async def minutes(rig: Rig, number: int) -> None:
    """Turns the feed once a minute."""
    for _ in range(number):
        rig.pass_(MINUTE)
        await rig.catch_up()


def shown(rig: Rig) -> list[Event]:
    """Every event that the topic keeps."""
    [topic] = rig.world.tenant.resources.of_kind("WatchTopic")
    return rig.world.tenant.journal.of_topic(topic)[0]


async def told(rig: Rig, event: Event) -> dict[str, Any]:
    """The answer to an event's webhook."""
    answer = await rig.listener._accept(parse_amplify(json.dumps(event.envelope()).encode()))
    assert isinstance(answer.body, bytes)
    return dict(json.loads(answer.body))


async def status_of(rig: Rig) -> dict[str, Any]:
    watched = status.Watched("billingd", MINUTE, missing=rig.daemon.catch_up.missing)
    document = await status.read(
        rig.store, source="metrics", now=rig.clock.now(), reasons=(), webhooks={}, watched=watched
    )
    return dict(document["catch_up"])


# Without webhooks


async def test_everything_is_provisioned_and_ended_without_one_webhook(rig: Rig) -> None:
    """Plan, subscription, approval, usage, cancellation: all of it by the feed alone."""
    await rig.plan()
    await minutes(rig, 1)
    subscription = await rig.subscribe()
    await minutes(rig, 3)
    assert rig.approval("acme") == "approved"
    link = await rig.link(subscription)
    assert link is not None
    assert link.state == "active"
    rig.pass_(HOUR)
    await rig.traffic("acme", 7)
    rig.pass_(MINUTE)
    await rig.move("acme", "cancel")
    await minutes(rig, 1)
    for _ in range(12):
        rig.pass_(HOUR)
        await rig.poll()
        await rig.catch_up()
    assert [each["state"] for each in rig.billed(subscription)] == ["expired"]
    assert rig.units() == 7
    assert await rig.dead() == []


async def test_a_migrated_subscription_is_seen_although_it_never_was_pending(rig: Rig) -> None:
    """The old one ends, the new one is linked as it is: approved."""
    await rig.plan()
    await rig.plan("gold")
    await rig.subscribe()
    await minutes(rig, 3)
    made = await rig.move("acme", "migrate", plan="gold")
    await minutes(rig, 3)
    link = await rig.link(made["metadata"]["id"])
    assert link is not None
    assert link.state == "active"


async def test_of_a_quiet_feed_nothing_is_asked(rig: Rig) -> None:
    """The events of before are read again for a while, and lead to nothing."""
    await rig.plan()
    await minutes(rig, 1)
    rows = len(await rig.rows(schema.outbox))
    await minutes(rig, 6)
    assert len(await rig.rows(schema.outbox)) == rows
    found = await place(rig)
    assert found.read_from == found.mark == found.position == shown(rig)[-1].sequence


# With webhooks


@pytest.mark.parametrize("feed_first", [True, False])
async def test_what_both_bring_is_taken_once(rig: Rig, feed_first: bool) -> None:
    """In either order: one event, its actions once; each way counts what it brought."""
    await rig.plan()
    event = next(one for one in shown(rig) if one.subresource == "state" and "price" in str(one.payload))
    if feed_first:
        await rig.daemon.catch_up.run_once()
        assert await told(rig, event) == {"event": event.id, "duplicate": True, "actions": 0}
    else:
        assert (await told(rig, event))["actions"] == 1
        await rig.daemon.catch_up.run_once()
    assert await told(rig, event) == {"event": event.id, "duplicate": True, "actions": 0}
    [row] = [row for row in await rig.rows(schema.events) if row["id"] == event.id]
    assert row["via"] == ("both" if feed_first else "webhook")
    assert len([row for row in await rig.rows(schema.outbox) if row["event_id"] == event.id]) == 1
    document = await status.read(
        rig.store, source="metrics", now=rig.clock.now(), reasons=(), webhooks={}, watched=None
    )
    assert document["webhooks"]["accepted"] == 1
    assert document["catch_up"]["events"] == len(shown(rig)) - 1
    tally = rig.daemon.webhooks._tally
    assert (tally.accepted, tally.duplicates) == (1, 1)


# What the feed may do


async def test_an_event_that_shows_late_below_the_position_is_found(rig: Rig) -> None:
    """For as long as the overlap: every number of it is read in the end."""
    rig.world.tenant.settings.configure(feed_lag_seconds=int(OVERLAP.total_seconds()))
    await rig.plan()
    await rig.subscribe()
    await rig.daemon.catch_up.run_once()
    seen = {row["id"] for row in await rig.rows(schema.events)}
    hidden = {one.id for one in shown(rig)} - seen
    assert hidden
    assert (await place(rig)).position > min(one.sequence for one in shown(rig) if one.id in hidden)
    for number in range(8):
        await rig.subscribe(f"s{number}")
        await minutes(rig, 1)
    await minutes(rig, 4)
    assert {one.id for one in shown(rig)} <= {row["id"] for row in await rig.rows(schema.events)}
    assert rig.approval("acme") == "approved"


@ONE_DATABASE
async def test_pages_that_are_shorter_than_asked_for_are_read_to_the_end(rig: Rig) -> None:
    """Amplify may put fewer items on a page: one turn reads all there is, not a page of it."""
    feed = rig.amplify._adapter._feed
    rows = feed._rows

    async def capped(topic: str, params: list[tuple[str, str]]) -> Any:
        few = [(name, str(min(int(value), 7)) if name == "pageSize" else value) for name, value in params]
        return await rows(topic, few)

    feed._rows = capped
    await rig.daemon.catch_up.run_once()
    for number in range(20):
        await rig.plan(f"p{number}", activate=False)
    rig.unheard.clear()
    await rig.daemon.catch_up.run_once()
    assert len(shown(rig)) > 20
    assert {one.id for one in shown(rig)} == {row["id"] for row in await rig.rows(schema.events)}
    assert (await place(rig)).position == shown(rig)[-1].sequence


@ONE_DATABASE
async def test_doubled_items_and_full_pages_are_read_to_the_end(rig: Rig) -> None:
    """More than a page, each item twice."""
    rig.world.tenant.settings.configure(feed_repeats=True)
    for number in range(60):
        await rig.plan(f"p{number}", activate=False)
    await rig.daemon.catch_up.run_once()
    assert len(shown(rig)) > 100
    assert {one.id for one in shown(rig)} == {row["id"] for row in await rig.rows(schema.events)}
    assert (await place(rig)).position == shown(rig)[-1].sequence


async def test_an_item_that_says_nothing_is_skipped_and_told_once(rig: Rig) -> None:
    """Its number counts, the others are taken."""
    await rig.plan()
    odd = shown(rig)[-1]
    odd.payload["name"] = ""
    with capture_logs() as logs:
        await minutes(rig, 3)
    [entry] = [one for one in logs if one["event"] == "feed.item_not_understood"]
    assert entry["sequence"] == odd.sequence
    assert (await place(rig)).position >= odd.sequence
    assert len(await rig.rows(schema.plan_links)) == 1


async def test_it_is_read_under_v1alpha1_where_nothing_else_is(rig: Rig) -> None:
    """A restart learns the version anew."""
    rig.world.tenant.settings.configure(versions="v1alpha1")
    await rig.restart()
    await rig.plan()
    await minutes(rig, 2)
    assert len(await rig.rows(schema.plan_links)) == 1


# Crashes


async def test_no_page_is_kept_without_its_position_whenever_it_dies(rig: Rig) -> None:
    """A death at each commit of a reading of three pages: nothing is lost, nothing is asked twice."""
    for number in range(70):
        await rig.plan(f"p{number}", activate=False)
    wanted = {one.id for one in shown(rig)}
    for die_at in range(1, 20):
        rig.steps.arm(die_at)
        before = (await place(rig)).position
        try:
            await rig.daemon.catch_up.run_once()
        except Crash:
            pass
        else:
            break
        rig.steps.arm(None)
        kept = {row["id"] for row in await rig.rows(schema.events)}
        position = (await place(rig)).position
        assert position >= before
        behind = {one.id for one in shown(rig) if one.sequence <= position}
        assert kept == behind
        await rig.restart()
    assert die_at > 3
    rig.steps.arm(None)
    assert {row["id"] for row in await rig.rows(schema.events)} == wanted
    keys = [row["key"] for row in await rig.rows(schema.outbox)]
    assert len(keys) == len(set(keys))


# Gaps


@pytest.mark.parametrize("days", [6.9, 7.0, 30])
async def test_after_days_away_all_is_found_again(rig: Rig, days: float) -> None:
    """By the feed while it keeps everything, by a resync after that: 410, or too old to be believed."""
    await rig.plan()
    await minutes(rig, 6)
    before = await place(rig)
    await rig.plan("gold")
    subscription = await rig.subscribe("late", "gold")
    rig.pass_(days * DAY)
    await rig.restart()
    await rig.daemon.catch_up.run_once()
    assert await resynced(rig) is (days < 7)
    await rig.catch_up()
    await minutes(rig, 2)
    link = await rig.link(subscription)
    assert link is not None
    assert link.state == "active"
    assert (await place(rig)).position >= before.position
    assert await resynced(rig)


async def test_410_goes_on_from_the_newest_position_taken_before_the_resync(rig: Rig) -> None:
    """What happens between the two is in the feed and in the resync, and taken once."""
    await rig.plan()
    await minutes(rig, 6)
    await rig.plan("old")
    rig.pass_(8 * DAY)
    await rig.plan("gold")
    newest = shown(rig)[-1].sequence
    async with rig.store.write() as tx:  # as if the end of the feed had been reached an hour ago
        await tx.execute(schema.feed_positions.update().values(read_at=rig.clock.now() - HOUR))
    with capture_logs() as logs:
        await rig.daemon.catch_up.run_once()
    [entry] = [one for one in logs if one["event"] == "feed.begun_anew"]
    assert "410" in entry["because"]
    assert entry["resync"] is True
    assert (await place(rig)).position == newest
    assert not await resynced(rig)
    await rig.plan("silver")  # while the resync is under way
    await rig.catch_up()
    assert await resynced(rig)
    assert {row["name"] for row in await rig.rows(schema.plan_links)} >= {"metered", "old", "gold", "silver"}


@ONE_DATABASE
async def test_an_idle_topic_asks_for_no_resync(rig: Rig) -> None:
    """Its last event is forgotten while the feed is read all the time: nothing was missed."""
    await rig.plan()
    await minutes(rig, 6)
    with capture_logs() as logs:
        for _ in range(20):
            rig.pass_(DAY / 2)
            await rig.daemon.catch_up.run_once()
    assert "feed.begun_anew" not in {one["event"] for one in logs}
    assert shown(rig) == []
    await rig.plan("gold")
    await rig.catch_up()
    assert "gold" in {row["name"] for row in await rig.rows(schema.plan_links)}


# The topic


async def test_a_missing_topic_is_told_once_and_read_once_it_is_there(store_url: str) -> None:
    """Whatever happened before its making is the resync's to find."""
    async with a_rig(store_url) as rig:
        await rig.product()
        await rig.plan()
        with capture_logs() as logs:
            for _ in range(3):
                await rig.daemon.catch_up.run_once()
        assert [one["event"] for one in logs].count("feed.topic_missing") == 1
        assert (await status_of(rig))["state"] == "missing"
        rig.watch()
        with capture_logs() as logs:
            await rig.catch_up()
        assert "feed.topic_found" in {one["event"] for one in logs}
        assert (await status_of(rig))["state"] == "ok"
        assert len(await rig.rows(schema.plan_links)) == 1
        await rig.plan("gold")
        await minutes(rig, 1)
        assert len(await rig.rows(schema.plan_links)) == 2


async def test_a_topic_made_anew_is_begun_with_a_resync(rig: Rig) -> None:
    """What happened between is in neither."""
    await rig.plan()
    await minutes(rig, 6)
    [topic] = rig.world.tenant.resources.of_kind("WatchTopic")
    rig.world.tenant.delete(topic)
    await rig.plan("gold")
    rig.watch()
    await minutes(rig, 2)
    assert {row["name"] for row in await rig.rows(schema.plan_links)} == {"metered", "gold"}
    [topic] = rig.world.tenant.resources.of_kind("WatchTopic")
    assert (await place(rig)).topic_id == topic.id


@ONE_DATABASE
async def test_lower_numbers_than_before_are_a_new_count(rig: Rig) -> None:
    """Nothing new would ever be behind a position that is too high."""
    await rig.plan()
    await minutes(rig, 1)
    async with rig.store.write() as tx:
        high = {"position": 10**9, "mark": 10**9, "read_from": 10**9}
        await tx.execute(schema.feed_positions.update().values(**high))
    await rig.plan("gold")
    await rig.daemon.catch_up.run_once()
    assert not await resynced(rig)
    assert (await place(rig)).position == shown(rig)[-1].sequence


@ONE_DATABASE
@pytest.mark.parametrize("days", [0, 8])
async def test_a_topic_that_forgets_at_once_holds_the_loop_up_and_asks_for_no_resync(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """410 at its own newest position, or where it keeps nothing and others are counted on: no storm."""
    await rig.plan()
    await minutes(rig, 6)
    for _ in range(days):
        rig.pass_(DAY)
        await rig.daemon.catch_up.run_once()

    async def gone(topic: str, after: int) -> None:
        raise Gone("gone", max_sequence=after + 1_000)

    monkeypatch.setattr(rig.daemon.catch_up, "_amplify", _Instead(rig.amplify, read_feed=gone))
    for _ in range(3):
        with pytest.raises(Gone):
            await rig.daemon.catch_up.run_once()
        assert await resynced(rig)
    rig.pass_(HOUR)
    assert (await status_of(rig))["state"] == "behind"


@ONE_DATABASE
async def test_nothing_is_taken_from_a_topic_that_was_replaced_while_it_was_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its items name another topic; the next turn begins it anew."""
    await rig.plan()

    async def other(name: str) -> str:
        return (await place(rig)).topic_id

    [topic] = rig.world.tenant.resources.of_kind("WatchTopic")
    rig.world.tenant.delete(topic)
    rig.watch()
    await rig.plan("gold")
    with monkeypatch.context() as patch:
        patch.setattr(rig.daemon.catch_up, "_amplify", _Instead(rig.amplify, find_watch_topic=other))
        with pytest.raises(Retryable):
            await rig.daemon.catch_up.run_once()
    await rig.catch_up()
    assert "gold" in {row["name"] for row in await rig.rows(schema.plan_links)}


class _Instead:
    """An adapter with some of its calls replaced."""

    def __init__(self, adapter: Any, **calls: Any) -> None:
        self._adapter, self._calls = adapter, calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._adapter, name)


async def test_status_tells_how_the_feed_stands(rig: Rig) -> None:
    """Off, never, ok, behind."""
    assert await status_of(rig) == {
        "topic": "billingd",
        "position": (await place(rig)).position,
        "read_at": status.timestamp(rig.clock.now()),
        "events": len(shown(rig)),
        "state": "ok",
    }
    rig.pass_(HOUR)
    assert (await status_of(rig))["state"] == "behind"
    document = await status.read(
        rig.store, source="metrics", now=rig.clock.now(), reasons=(), webhooks={}, watched=status.Watched("x")
    )
    assert document["catch_up"]["state"] == "never"
    document = await status.read(
        rig.store, source="metrics", now=rig.clock.now(), reasons=(), webhooks={}, watched=None
    )
    assert document["catch_up"]["state"] == "off"
