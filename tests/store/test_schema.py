"""The tables refuse impossible rows, on both databases; migrations make exactly these tables."""

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import START, ManualClock

from billingd.domain.errors import BillingdError, StoreBusy, StoreHeld
from billingd.store import copies, migrate, schema
from billingd.store.engine import Store

Row = dict[str, Any]
LATER = START + timedelta(hours=1)

EVENT: Row = {"source": "amplify", "id": "e", "type": "t", "kind": "k", "name": "n", "received_at": START}
INTENT: Row = {
    "name": "w",
    "epoch": 1,
    "idempotency_key": "k",
    "body_hash": "h",
    "state": "open",
    "burnt": False,
    "first_sent_at": START,
    "last_sent_at": START,
}
PLAN: Row = {
    "plan_id": "p",
    "name": "n",
    "title": "t",
    "product_name": "n",
    "plan_code": "c",
    "currency": "USD",
    "state": "active",
    "linked_at": START,
}
ADD_ON: Row = {
    "quota_id": "q",
    "plan_id": "p",
    "add_on_code": "a",
    "title": "t",
    "unit": "u",
    "tier_type": "flat",
    "linked_at": START,
}
SUBSCRIPTION: Row = {
    "subscription_id": "s",
    "name": "n",
    "title": "t",
    "plan_id": "p",
    "organization_id": "o",
    "account_code": "a",
    "uuid": "u",
    "state": "created",
    "linked_at": START,
    "usage_from": START,
}
PERIOD: Row = {"subscription_id": "s", "started_at": START, "ends_at": LATER, "trial": False}
USAGE: Row = {
    "subscription_id": "s",
    "quota_id": "q",
    "window_start": START,
    "window_end": LATER,
    "revision": 1,
    "units": 1,
    "usage_timestamp": START,
    "merchant_tag": "bd1:1",
    "state": "recorded",
    "recorded_at": START,
}
UNLINKED: Row = {"subscription_id": "s", "quota_id": "q", "window_start": START, "units": 1, "read_at": START}
WATERMARK: Row = {
    "source": "metrics",
    "at": START,
    "window_seconds": 3600,
    "regular_since": START,
    "read_at": START,
}
HELD: Row = {"kind": "k", "subject": "s", "reason": "r", "since": START}

BEFORE: dict[str, list[tuple[sa.Table, Row]]] = {
    "add_on_links": [(schema.plan_links, PLAN)],
    "subscription_links": [(schema.plan_links, PLAN)],
    "billing_periods": [(schema.plan_links, PLAN), (schema.subscription_links, SUBSCRIPTION)],
    "usage_records": [
        (schema.plan_links, PLAN),
        (schema.add_on_links, ADD_ON),
        (schema.subscription_links, SUBSCRIPTION),
    ],
}
"""What a row of a table refers to."""

GOOD: list[tuple[sa.Table, Row]] = [
    (schema.events, EVENT),
    (schema.intents, INTENT),
    (schema.intents, INTENT | {"state": "done", "result": "r"}),
    (schema.plan_links, PLAN),
    (schema.plan_links, PLAN | {"state": "removed", "ended_at": LATER}),
    (schema.add_on_links, ADD_ON),
    (schema.subscription_links, SUBSCRIPTION),
    (schema.subscription_links, SUBSCRIPTION | {"state": "active", "approved_at": START}),
    (
        schema.subscription_links,
        SUBSCRIPTION | {"state": "ended", "usage_until": LATER, "ended_at": LATER},
    ),
    (schema.usage_records, USAGE),
    (schema.usage_records, USAGE | {"units": -999_999_999}),
    (schema.usage_records, USAGE | {"state": "reported", "reported_at": LATER, "usage_id": "x"}),
    (schema.usage_records, USAGE | {"state": "written_off"}),
    (schema.billing_periods, PERIOD),
    (schema.unlinked_traffic, UNLINKED),
    (schema.unlinked_traffic, UNLINKED | {"units": 2**62}),
    (schema.watermarks, WATERMARK),
    (schema.held, HELD),
    (schema.held, HELD | {"closed_at": LATER, "resolution": "r"}),
]

BAD: list[tuple[str, sa.Table, Row, Row]] = [
    ("ck_events_source", schema.events, EVENT, {"source": "elsewhere"}),
    ("name", schema.events, EVENT, {"name": None}),
    ("ck_intents_state", schema.intents, INTENT, {"state": "lost"}),
    ("ck_intents_epoch", schema.intents, INTENT, {"epoch": 0}),
    ("ck_intents_sends", schema.intents, INTENT, {"sends": 0}),
    ("ck_intents_last_sent_at", schema.intents, INTENT, {"first_sent_at": LATER}),
    ("ck_intents_result", schema.intents, INTENT, {"state": "done"}),
    ("ck_intents_result", schema.intents, INTENT, {"result": "r"}),
    ("ck_plan_links_state", schema.plan_links, PLAN, {"state": "gone"}),
    ("ck_plan_links_ended_at", schema.plan_links, PLAN, {"state": "removed"}),
    ("ck_plan_links_ended_at", schema.plan_links, PLAN, {"ended_at": LATER}),
    ("ck_add_on_links_tier_type", schema.add_on_links, ADD_ON, {"tier_type": "steep"}),
    ("fk_add_on_links_plan_id", schema.add_on_links, ADD_ON, {"plan_id": "nobody"}),
    ("ck_subscription_links_state", schema.subscription_links, SUBSCRIPTION, {"state": "odd"}),
    ("ck_subscription_links_ended_at", schema.subscription_links, SUBSCRIPTION, {"ended_at": LATER}),
    ("ck_subscription_links_usage_until", schema.subscription_links, SUBSCRIPTION, {"state": "ending"}),
    ("ck_subscription_links_usage_until", schema.subscription_links, SUBSCRIPTION, {"usage_until": LATER}),
    ("ck_subscription_links_approved_at", schema.subscription_links, SUBSCRIPTION, {"state": "active"}),
    ("fk_subscription_links_plan_id", schema.subscription_links, SUBSCRIPTION, {"plan_id": "nobody"}),
    ("ck_billing_periods_ends_at", schema.billing_periods, PERIOD, {"ends_at": START}),
    ("fk_billing_periods_subscription_id", schema.billing_periods, PERIOD, {"subscription_id": "nobody"}),
    ("ck_usage_records_state", schema.usage_records, USAGE, {"state": "billed"}),
    ("ck_usage_records_revision", schema.usage_records, USAGE, {"revision": 0}),
    ("ck_usage_records_units", schema.usage_records, USAGE, {"units": 0}),
    ("ck_usage_records_units", schema.usage_records, USAGE, {"units": 1_000_000_000}),
    ("ck_usage_records_", schema.usage_records, USAGE, {"window_end": START}),
    ("ck_usage_records_usage_timestamp", schema.usage_records, USAGE, {"usage_timestamp": LATER}),
    (
        "ck_usage_records_usage_timestamp",
        schema.usage_records,
        USAGE,
        {"usage_timestamp": START - timedelta(seconds=1)},
    ),
    ("ck_usage_records_reported_at", schema.usage_records, USAGE, {"reported_at": LATER}),
    ("ck_usage_records_usage_id", schema.usage_records, USAGE, {"usage_id": "x"}),
    ("fk_usage_records_subscription_id", schema.usage_records, USAGE, {"subscription_id": "nobody"}),
    ("fk_usage_records_quota_id", schema.usage_records, USAGE, {"quota_id": "nobody"}),
    ("ck_unlinked_traffic_units", schema.unlinked_traffic, UNLINKED, {"units": 0}),
    ("ck_watermarks_window_seconds", schema.watermarks, WATERMARK, {"window_seconds": 0}),
    ("ck_watermarks_regular_since", schema.watermarks, WATERMARK, {"regular_since": LATER}),
    ("ck_held_resolution", schema.held, HELD, {"closed_at": LATER}),
    ("ck_held_resolution", schema.held, HELD, {"resolution": "r"}),
]

TWICE: list[tuple[str, sa.Table, Row, Row]] = [
    ("pk_events", schema.events, EVENT, {}),
    ("pk_intents", schema.intents, INTENT, {"idempotency_key": "other"}),
    ("uq_intents_idempotency_key", schema.intents, INTENT, {"name": "other"}),
    ("uq_plan_links_plan_code", schema.plan_links, PLAN, {"plan_id": "other"}),
    ("uq_add_on_links_add_on_code", schema.add_on_links, ADD_ON, {"quota_id": "other"}),
    ("uq_subscription_links_uuid", schema.subscription_links, SUBSCRIPTION, {"subscription_id": "other"}),
    ("uq_usage_records_merchant_tag", schema.usage_records, USAGE, {"revision": 2}),
    ("uq_usage_records_record", schema.usage_records, USAGE, {"merchant_tag": "other"}),
    ("pk_billing_periods", schema.billing_periods, PERIOD, {"trial": True}),
    ("pk_unlinked_traffic", schema.unlinked_traffic, UNLINKED, {"units": 2}),
    ("pk_watermarks", schema.watermarks, WATERMARK, {"at": LATER}),
    ("uq_held_standing", schema.held, HELD, {"reason": "other"}),
]


async def put(store: Store, table: sa.Table, *rows: Row) -> None:
    """Rows of a table, and before them what they refer to."""
    async with store.write() as tx:
        for before, row in BEFORE.get(table.name, []):
            await tx.execute(sa.insert(before).values(**row))
        for row in rows:
            await tx.execute(sa.insert(table).values(**row))


async def test_possible_rows_are_taken(store: Store) -> None:
    """Each row the program writes in some state."""
    for table, row in GOOD:
        await put(store, table, row)
        async with store.write() as tx:
            for each in reversed(schema.metadata.sorted_tables):
                await tx.execute(each.delete())


@pytest.mark.parametrize(
    ("name", "table", "row", "change"), BAD, ids=[f"{name} {list(change)}" for name, _, _, change in BAD]
)
async def test_impossible_rows_are_refused_by_name(
    store: Store, name: str, table: sa.Table, row: Row, change: Row
) -> None:
    """CHECK, NOT NULL and foreign keys; the error names which (SQLite does not name foreign keys)."""
    with pytest.raises(sa.exc.IntegrityError) as caught:
        await put(store, table, row | change)
    if not (store.sqlite and name.startswith("fk_")):
        assert name in str(caught.value.orig)


@pytest.mark.parametrize(("name", "table", "row", "change"), TWICE, ids=[name for name, _, _, _ in TWICE])
async def test_nothing_is_there_twice(
    store: Store, name: str, table: sa.Table, row: Row, change: Row
) -> None:
    """Primary keys and unique constraints; a closed hold does not stand in the way of a new one."""
    with pytest.raises(sa.exc.IntegrityError):
        await put(store, table, row, row | change)
    if table is schema.held:
        await put(store, table, row | {"closed_at": LATER, "resolution": "r"}, row)


async def test_rows_that_others_refer_to_stay(store: Store) -> None:
    """The ledger never loses what its records belong to."""
    await put(store, schema.usage_records, USAGE)
    for table in (schema.plan_links, schema.add_on_links, schema.subscription_links):
        with pytest.raises(sa.exc.IntegrityError):
            async with store.write() as tx:
                await tx.execute(table.delete())


# Migrations.


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with nothing in it, once on each database."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
    else:
        yield request.getfixturevalue("empty_postgres_url")


async def test_the_migrations_make_exactly_these_tables(store: Store) -> None:
    """Types, columns, keys and indexes: nothing is missing, nothing is left over."""
    assert await migrate.differences(store) == []
    async with store.read() as tx:
        constraints = await tx.run_sync(
            lambda connection: {
                constraint["name"]
                for table in schema.metadata.tables
                for constraint in sa.inspect(connection).get_check_constraints(table)
            }
        )
    expected = {
        constraint.name
        for table in schema.metadata.sorted_tables
        for constraint in table.constraints
        if isinstance(constraint, sa.CheckConstraint)
    }
    assert constraints >= {str(name) for name in expected}, "alembic does not compare CHECKs"


async def test_a_store_is_brought_up_from_nothing_and_again_to_no_effect(empty_url: str) -> None:
    """Empty is behind; afterwards it is current, and a second upgrade changes nothing."""
    async with Store(empty_url) as store:
        assert await migrate.current(store) is None
        with pytest.raises(migrate.SchemaBehind, match="billingd db upgrade"):
            await migrate.check(store)
        assert await migrate.upgrade(store) == (None, migrate.newest())
        await migrate.check(store)
        assert await migrate.upgrade(store) == (migrate.newest(), migrate.newest())
        assert await migrate.differences(store) == []


async def test_a_store_that_is_newer_is_left_alone(store: Store) -> None:
    """An older program refuses it and does not touch it."""
    async with store.write() as tx:
        await tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        for step in (migrate.check, migrate.upgrade):
            with pytest.raises(StoreBusy, match="newer than this program"):
                await step(store)
        assert await migrate.current(store) == "9999"
    finally:
        async with store.write() as tx:
            await tx.execute(
                sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": migrate.newest()}
            )


async def test_a_difference_is_told(store_url: str, tmp_path: Path, sqlite_template: Path) -> None:
    """Somebody changed a table by hand."""
    path = tmp_path / "changed.db"
    shutil.copy(sqlite_template, path)
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE held ADD COLUMN odd TEXT")
    connection.close()
    async with Store(f"sqlite+aiosqlite:///{path}") as store:
        [difference] = await migrate.differences(store)
        assert "odd" in difference


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_backup_is_whole_even_while_the_store_is_in_use(
    store: Store, clock: ManualClock, tmp_path: Path
) -> None:
    """A copy that opens, holds all that was committed and nothing else, and overwrites nobody."""
    await put(store, schema.usage_records, USAGE)
    async with store.write() as tx:
        await tx.execute(sa.insert(schema.held).values(**HELD))
        made = copies.backup_file(store, None, now=clock.now())
    assert made is not None
    assert made.name.endswith(".20260302T100000Z.backup")
    with sqlite3.connect(made) as copy:
        counted = [
            copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("usage_records", "held")
        ]
    copy.close()
    assert counted == [1, 0]
    with pytest.raises(BillingdError, match="exists already"):
        copies.backup_file(store, made, now=clock.now())
    async with Store(f"sqlite+aiosqlite:///{made}") as restored:
        await migrate.check(restored)
    assert copies.backup_file(store, tmp_path / "b", now=datetime.now(UTC)) == tmp_path / "b"


async def test_there_is_no_file_to_back_up_on_postgres(empty_postgres_url: str, clock: ManualClock) -> None:
    """None, not an error: `copies.backup` writes one row by row."""
    async with Store(empty_postgres_url) as store:
        assert copies.backup_file(store, None, now=clock.now()) is None


# One process at a time.

HOLD = """
import sys
from billingd.store.engine import Store
store = Store(sys.argv[1])
store.lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_second_process_cannot_take_the_store(store: Store, store_url: str) -> None:
    """While it lives it is refused; killed without a word, the next one takes over at once."""
    other = subprocess.Popen(  # noqa: ASYNC220 - nothing else waits meanwhile
        [sys.executable, "-c", HOLD, store_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(StoreHeld, match=f"held by process {other.pid} "):
        store.lock()
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    store.lock()
    store.lock()  # it is ours already
    lock = os.open(f"{store.path}.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await store.close()
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


async def test_postgres_is_shared(empty_postgres_url: str) -> None:
    """Claims are fenced there, so that no lock is needed."""
    async with Store(empty_postgres_url) as one, Store(empty_postgres_url) as two:
        one.lock()
        two.lock()
