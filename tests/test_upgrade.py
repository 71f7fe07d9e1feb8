"""A store of each released schema, with work in flight: upgraded, then finished to the unit."""

import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import START
from rig import HOUR, DyingStore, Rig, a_rig

from billingd import daemon as root
from billingd.admin import operations
from billingd.domain.attempts import Action
from billingd.domain.errors import BillingdError
from billingd.domain.events import RESYNC
from billingd.store import copies, held, migrate, schema
from billingd.store.engine import Store
from billingd.store.held import Hold

Row = dict[str, Any]

FIRST_KINDS = {
    *("provision_plan", "provision_subscription", "end_subscription", "report_usage"),
    *("notify_provider", "notify_subscriber"),
}
SECOND_KINDS = FIRST_KINDS | {"refresh_subscription", "audit_usage"}
THIRD_KINDS = SECOND_KINDS | {
    *("provision_product", "attach_add_ons", "repair_usage", "adopt_subscription", RESYNC)
}
RELEASED = {"0001": FIRST_KINDS, "0002": SECOND_KINDS, "0003": THIRD_KINDS, "0004": THIRD_KINDS}
"""Each released schema with the kinds of action that its program knew."""


@pytest.fixture
async def rig(sqlite_template: Path, tmp_path: Path) -> AsyncIterator[Rig]:
    """A store with something of everything under way, as a killed daemon leaves it."""
    shutil.copy(sqlite_template, tmp_path / "source.db")
    async with a_rig(f"sqlite+aiosqlite:///{tmp_path / 'source.db'}") as made:
        await in_flight(made)
        yield made


async def in_flight(rig: Rig) -> None:
    """Usage that is reported, recorded, sent without an answer, leased, dead, held; and more to come."""
    await rig.product()
    await rig.plan()
    await rig.work()
    names = ("reported", "unknown", "leased", "dead", "refused")
    for name in names:
        await rig.subscribe(name)
    await rig.work()
    await rig.traffic("reported", 40)
    await rig.report()
    for units, name in enumerate(names, 3):
        await rig.traffic(name, units)
    await rig.subscribe("no-account", account=False)
    await rig.work()
    rig.pass_(2 * HOUR)
    await rig.poll()
    now = rig.clock.now()
    for name in names:
        action, record = await report_of(rig, name)
        changes: Row = {"due_at": now + HOUR}
        if name == "unknown":
            continue
        if name == "leased":
            changes = {"state": "leased", "due_at": now + HOUR, "attempt": 1, "fence": 1}
        if name == "dead":
            changes = {"state": "dead", "settled_at": now, "error": "Unknown: no answer"}
        if name == "refused":
            changes = {"state": "done", "settled_at": now}
            again = Action("report_usage", action["subject"], "", action["args"])
            what = f"usage:{record['merchant_tag']}"
            item = Hold("usage_refused", what, "No.", again, record["subscription_id"], units=record["units"])
            async with rig.store.write() as tx:
                await held.add(tx, item, now=now)
                ours = schema.usage_records.c.id == record["id"]
                await tx.execute(sa.update(schema.usage_records).where(ours).values(state="held"))
        async with rig.store.write() as tx:
            ours = schema.outbox.c.id == action["id"]
            await tx.execute(sa.update(schema.outbox).where(ours).values(**changes))
    rig.fault("key_expired", "POST", "**/usage", times=1)  # carried out; no answer, and nothing to replay
    await rig.drain()
    assert rig.units() == 40 + 4
    await rig.move("leased", "cancel")  # its webhook is yet to come


async def report_of(rig: Rig, title: str) -> tuple[Row, Row]:
    """The report of a subscription that waits, and its record."""
    records = {row["id"]: row for row in await rig.rows(schema.usage_records)}
    titles = {row["subscription_id"]: row["title"] for row in await rig.rows(schema.subscription_links)}
    [action] = [
        row
        for row in await rig.rows(schema.outbox)
        if row["kind"] == "report_usage"
        and row["state"] == "pending"
        and titles[records[row["args"]["record"]]["subscription_id"]] == title
    ]
    return action, records[action["args"]["record"]]


async def as_of(rig: Rig, revision: str, url: str) -> dict[str, int]:
    """Write the rig's rows into a store of an old schema, as its program had them; how many of each table."""
    kinds = RELEASED[revision]
    written: dict[str, int] = {}
    async with Store(url) as old, old.write() as tx:
        await migrate.upgrade_to(tx, revision)
        for table in await copies._tables(tx):
            rows = [
                {name: value for name, value in row.items() if name in table.c}
                for row in await rig.rows(schema.metadata.tables[table.name])
                if table.name != "outbox" or row["kind"] in kinds
            ]
            for row in rows:
                if row.get("kind") == "notify_provider":  # as notices were until now
                    row["subject"] = f"notice:{row['key']}"
                    row["args"] = {"title": row["args"]["title"], "body": row["args"]["body"]}
                await tx.execute(sa.insert(table).values(row))
            written[table.name] = len(rows)
            if not old.sqlite and rows and table.name in {"outbox", "usage_records", "held", "history"}:
                sequence = f"pg_get_serial_sequence('{table.name}', 'id')"
                await tx.execute(sa.text(f"SELECT setval({sequence}, (SELECT max(id) FROM {table.name}))"))
    return written


def copies_in(directory: Path) -> list[Path]:
    return list(directory.glob("old.db.*.backup"))


def released() -> list[str]:
    return [step.revision for step in migrate.steps_from(None)]


def test_every_released_schema_is_upgraded_from_here() -> None:
    """Whoever adds a revision adds what its predecessor's program knew."""
    assert list(RELEASED) == released()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'old.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.mark.parametrize("revision", RELEASED)
async def test_work_in_flight_is_finished_to_the_unit_after_an_upgrade(
    url: str, rig: Rig, revision: str, tmp_path: Path
) -> None:
    """Whatever schema it was under way in: nothing is lost, nothing is billed twice, nothing is left."""
    written = await as_of(rig, revision, url)
    assert min(written[name] for name in ("outbox", "intents", "usage_records", "held", "events")) > 0
    async with DyingStore(url, rig.steps) as store:
        await root._migrate(store, rig.clock.now())
        assert await migrate.current(store) == migrate.newest()
        assert await migrate.differences(store) == []
        backups = copies_in(tmp_path)
        assert len(backups) == (store.sqlite and revision != migrate.newest())
        if backups:
            assert copies.inspect(backups[0]).revision == revision
        before = rig.store
        rig.store = store
        try:
            await rig.restart()
            await finish(rig)
        finally:
            await rig.engine.drain(at_most=timedelta(seconds=5))
            rig.store = before


async def finish(rig: Rig) -> None:
    """The daemon works, and a person mends what waits for one."""
    states = {row["state"] for row in await rig.rows(schema.outbox)}
    assert {"pending", "leased", "dead"} <= states
    assert {row["state"] for row in await rig.rows(schema.intents)} >= {"open", "done"}
    now = rig.clock.now()
    await operations.replay(rig.store, operations.Selection(), now=now)
    async with rig.store.read() as tx:
        [item] = await held.standing(tx, kind="usage_refused")
    assert await operations.release(rig.store, item["id"], now=now)
    waiting = rig.world.tenant.resources.find("Subscription", "no-account")
    assert waiting is not None
    rig.account(waiting.body)
    rig.pass_(2 * HOUR)
    await rig.settled()
    await rig.catch_up()
    await rig.report()
    await rig.settled()
    assert (await rig.dead(), await rig.unfinished(), await rig.held()) == ([], [], {})
    assert set(rig.tags().values()) == {1}
    totals = rig.ledger()["totals"]
    assert totals["served_units"] == totals["reported_units"] == rig.units() == 40 + 3 + 4 + 5 + 6 + 7
    link = next(row for row in await rig.rows(schema.subscription_links) if row["title"] == "leased")
    assert link["state"] == "ended"


async def test_nothing_is_migrated_when_no_copy_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: the store stays as it is, and the error names the way on."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'old.db'}"
    async with Store(url) as store:
        async with store.write() as tx:
            await migrate.upgrade_to(tx, "0002")

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(copies, "_copy_pages", full)
        with pytest.raises(BillingdError, match=r"was not migrated.*No space left.*make room"):
            await root._migrate(store, START)
        assert await migrate.current(store) == "0002"


async def test_a_migration_that_fails_at_each_start_leaves_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest, which can be restored; one that goes well keeps its own."""
    path = tmp_path / "old.db"
    url = f"sqlite+aiosqlite:///{path}"
    upgrade = migrate.upgrade

    async def broken(_store: Store) -> None:
        raise BillingdError("a bug")

    async with Store(url) as store:
        async with store.write() as tx:
            await migrate.upgrade_to(tx, "0003")
        monkeypatch.setattr(migrate, "upgrade", broken)
        for hours in range(3):
            with pytest.raises(BillingdError, match="a bug"):
                await root._migrate(store, START + hours * HOUR)
        failed = path.with_name("old.db.before-failed-upgrade")
        assert (copies_in(tmp_path), copies.inspect(failed).revision) == ([], "0003")
        assert copies.inspect(failed).copied_at == START + 2 * HOUR
        monkeypatch.setattr(migrate, "upgrade", upgrade)
        await root._migrate(store, START + 3 * HOUR)
        assert len(copies_in(tmp_path)) == 1
        assert await migrate.current(store) == migrate.newest()
