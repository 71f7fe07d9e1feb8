"""A store of the first release, with work in flight, becomes today's with everything kept; both databases."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from billingd.domain.periods import Period
from billingd.store import intents, links, migrate, periods, schema, usage
from billingd.store.engine import Store

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
Row = dict[str, Any]


def an_action(number: int, state: str, **but: Any) -> Row:
    settled = None if state in {"pending", "leased"} else NOW
    row = {
        "id": number,
        "kind": "report_usage",
        "subject": "usage:s1:q1",
        "key": f"report_usage:{number}",
        "args": {"record": number},
        "state": state,
        "due_at": NOW,
        "attempt": 1,
        "fence": 3,
        "error": "it said 422" if state in {"dead", "discarded"} else None,
        "event_id": "e1",
        "created_at": NOW,
        "settled_at": settled,
    }
    return row | but


def an_intent(name: str, state: str, **but: Any) -> Row:
    row = {
        "name": name,
        "epoch": 2,
        "idempotency_key": f"bd1-{name}",
        "body_hash": "h",
        "state": state,
        "burnt": False,
        "first_sent_at": NOW,
        "last_sent_at": NOW + HOUR / 4,
        "result": "r" if state == "done" else None,
    }
    return row | but


def a_subscription(number: int, state: str, **but: Any) -> Row:
    row = {
        "subscription_id": f"s{number}",
        "name": f"n{number}",
        "title": "Ä title",
        "plan_id": "p1",
        "organization_id": "o",
        "account_code": "a",
        "uuid": f"u{number}",
        "state": state,
        "resource_version": "7",
        "linked_at": NOW,
        "usage_from": NOW,
        "approved_at": None if state == "created" else NOW,
        "usage_until": NOW + HOUR if state in {"ending", "ended"} else None,
        "ended_at": NOW + 2 * HOUR if state == "ended" else None,
        "period_started_at": None,
        "period_ends_at": None,
    }
    return row | but


def a_record(number: int, state: str) -> Row:
    return {
        "id": number,
        "subscription_id": "s1",
        "quota_id": "q1",
        "window_start": NOW + number * HOUR,
        "window_end": NOW + (number + 1) * HOUR,
        "revision": number,
        "units": 999_999_999 - number,
        "usage_timestamp": NOW + (number + 1) * HOUR - timedelta(seconds=1),
        "merchant_tag": f"bd1:{number}",
        "state": state,
        "recorded_at": NOW,
        "reported_at": NOW if state == "reported" else None,
        "usage_id": "x1" if state == "reported" else None,
    }


ROWS: list[tuple[sa.Table, list[Row]]] = [
    (
        schema.events,
        [
            {
                "source": "amplify",
                "id": "e1",
                "type": "ResourceCreated",
                "kind": "Subscription",
                "name": "n1",
                "resource_id": "s1",
                "subresource": None,
                "correlation_id": "c",
                "received_at": NOW,
            }
        ],
    ),
    (
        schema.outbox,
        [
            an_action(1, "pending"),
            an_action(2, "leased", attempt=2),
            an_action(3, "done"),
            an_action(4, "dead"),
            an_action(5, "discarded"),
        ],
    ),
    (
        schema.intents,
        [
            an_intent("usage:bd1:1", "open"),
            an_intent("usage:bd1:2", "open", burnt=True),
            an_intent("usage:bd1:3", "refused"),
            an_intent("usage:bd1:4", "done"),
        ],
    ),
    (
        schema.plan_links,
        [
            {
                "plan_id": "p1",
                "name": "n",
                "title": "t",
                "product_name": "n",
                "plan_code": "c",
                "currency": "USD",
                "state": "active",
                "resource_version": "3",
                "linked_at": NOW,
                "ended_at": None,
            }
        ],
    ),
    (
        schema.add_on_links,
        [
            {
                "quota_id": "q1",
                "plan_id": "p1",
                "add_on_code": "a1",
                "title": "t",
                "unit": "u",
                "tier_type": "volume",
                "linked_at": NOW,
            }
        ],
    ),
    (
        schema.subscription_links,
        [
            a_subscription(1, "active", period_started_at=NOW, period_ends_at=NOW + 720 * HOUR),
            a_subscription(2, "created"),
            a_subscription(3, "ending", period_started_at=NOW, period_ends_at=NOW),
            a_subscription(4, "ended"),
        ],
    ),
    (
        schema.watermarks,
        [{"source": "metrics", "at": NOW, "window_seconds": 3600, "regular_since": NOW, "read_at": NOW}],
    ),
    (
        schema.usage_records,
        [a_record(1, "recorded"), a_record(2, "held"), a_record(3, "reported")],
    ),
    (
        schema.unlinked_traffic,
        [{"subscription_id": "x", "quota_id": "y", "window_start": NOW, "units": 2**40, "read_at": NOW}],
    ),
    (
        schema.held,
        [
            {
                "id": 1,
                "kind": "usage_refused",
                "subject": "usage:bd1:2",
                "subscription_id": "s1",
                "add_on_code": "a1",
                "units": 7,
                "amount": None,
                "currency": None,
                "reason": "it said 422",
                "action": {"kind": "report_usage", "subject": "usage:s1:q1", "args": {"record": 2}},
                "since": NOW,
                "closed_at": None,
                "resolution": None,
            }
        ],
    ),
]


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'old.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.fixture
async def first(url: str) -> AsyncIterator[Store]:
    """A store of schema 0001 with those rows in it."""
    async with Store(url) as store:
        config = migrate._config()

        def run(connection: sa.Connection) -> None:
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")

        async with store.write() as tx:
            await tx.run_sync(run)
            for table, rows in ROWS:
                for row in rows:
                    await tx.execute(sa.insert(table).values(row))
        assert await migrate.current(store) == "0001"
        yield store


def test_every_table_of_the_first_release_has_rows() -> None:
    """So that nothing is kept only because it was not there."""
    new = {"absences", "billing_periods", "feed_positions", "marks", "history", "reconciliations", "drift"}
    assert {table.name for table, _ in ROWS} == set(schema.metadata.tables) - new


async def test_a_store_with_work_in_flight_is_upgraded_with_everything_kept(first: Store) -> None:
    """Row for row, column for column; what is new says that nothing is known yet."""
    assert await migrate.upgrade(first) == ("0001", migrate.newest())
    assert await migrate.differences(first) == []
    async with first.read() as tx:
        for table, rows in ROWS:
            key = [column.name for column in table.primary_key.columns]
            found = {
                tuple(row[name] for name in key): dict(row)
                for row in (await tx.execute(sa.select(table))).mappings()
            }
            assert len(found) == len(rows), table.name
            for row in rows:
                kept = found[tuple(row[name] for name in key)]
                assert {name: kept[name] for name in row} == row
                assert set(kept) - set(row) <= {
                    "via",
                    "happened_at",
                    "unit_amount",
                    "served_at",
                    "sends",
                    "gave_up_at",
                    "missed_at",
                    "prices",
                    "billed_state",
                    "seen_at",
                }


async def test_what_was_in_flight_goes_on(first: Store) -> None:
    """Read as the program reads it: an open write waits, a period is known where one was shown."""
    await migrate.upgrade(first)
    async with first.write() as tx:
        intent = await intents.find(tx, "usage:bd1:1")
        assert intent is not None
        assert (intent.sends, intent.gave_up_at, intent.missed_at) == (1, None, None)
        assert await intents.refused(tx, "usage:bd1:1", sends=1)
        assert await periods.of(tx, "s1") == [Period(NOW, NOW + 720 * HOUR)]
        assert await periods.of(tx, "s2") == await periods.of(tx, "s3") == []
        link = await links.find_subscription(tx, "s1")
        assert link is not None
        assert (link.billed_state, link.seen_at) == (None, None)
        add_on = await links.find_add_on(tx, "q1")
        assert add_on is not None
        assert add_on.prices is None
        assert (await usage.find(tx, 2)).state == "held"
        assert await usage.write_off(tx, 2)


async def test_a_record_keeps_its_constraints_and_its_place(first: Store) -> None:
    """SQLite builds the table anew: checks, uniqueness, partial index and numbering come along."""
    await migrate.upgrade(first)
    for wrong in (
        {"state": "nonsense"},
        {"units": 0},
        {"merchant_tag": "bd1:1"},
        {"subscription_id": "nobody"},
        {"usage_timestamp": NOW},
    ):
        row = a_record(9, "recorded") | wrong
        with pytest.raises(sa.exc.IntegrityError):
            async with first.write() as tx:
                await tx.execute(sa.insert(schema.usage_records).values(row))
    with pytest.raises(sa.exc.IntegrityError):
        async with first.write() as tx:
            await tx.execute(sa.update(schema.intents).values(sends=0))
    async with first.write() as tx:
        row = a_record(9, "recorded")
        if first.sqlite:
            del row["id"]
        made = await tx.execute(
            sa.insert(schema.usage_records).values(row).returning(schema.usage_records.c.id)
        )
        assert made.scalar_one() == (4 if first.sqlite else 9)
        if first.sqlite:
            sql = sa.text("SELECT sql FROM sqlite_master WHERE name = 'ix_usage_records_unreported'")
            table = sa.text("SELECT sql FROM sqlite_master WHERE name = 'usage_records'")
            assert "AUTOINCREMENT" in (await tx.execute(table)).scalar_one()
        else:
            sql = sa.text("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_usage_records_unreported'")
        assert "'reported'" in (await tx.execute(sql)).scalar_one()
