"""Safety copies: every row goes over and comes back, on either database; what is not sound is refused."""

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import START

from billingd.domain.errors import BillingdError, StoreBusy
from billingd.store import copies, marks, migrate, schema
from billingd.store.engine import Store

Row = dict[str, Any]
NOW = START + timedelta(days=3)
LATER = START + timedelta(hours=1, microseconds=7)

WORDS: dict[str, list[Row]] = {
    "events": [{"source": "amplify"}, {"source": "recurly"}],
    "outbox": [
        {"state": "leased", "settled_at": None, "error": None},
        {"state": "discarded", "attempt": 2, "fence": 3},
    ],
    "intents": [{"state": "open"}, {"state": "done", "burnt": True}],
    "plan_links": [{"state": "active"}, {"state": "removed"}],
    "add_on_links": [{"tier_type": "flat", "plan_id": "1"}, {"tier_type": "volume", "plan_id": "2"}],
    "subscription_links": [{"state": "created", "plan_id": "1"}, {"state": "ended", "plan_id": "2"}],
    "billing_periods": [{"subscription_id": "1"}, {"subscription_id": "2"}],
    "usage_records": [
        {"state": "recorded", "units": -999_999_999},
        {"state": "reported", "units": 999_999_999},
    ],
    "reconciliations": [{"state": "running"}, {"state": "failed"}],
    "absences": [{"kind": "plan"}, {"kind": "subscription"}],
    "drift": [{"kind": "missing_record"}, {"kind": "price_differs"}],
    "marks": [{"name": marks.RESYNCED}, {"name": "other"}],
    "feed_positions": [
        {"read_from": 1, "mark": 2, "position": 2**40},
        {"read_from": 1, "mark": 1, "position": 1},
    ],
}
"""What the constraints want; the rest is made up."""

PAIRED = {"subscription_id", "quota_id", "reconciliation_id"}


def made_up(table: sa.Table, number: int) -> Row:
    """A row of a table: the first has nothing where nothing may be, the second has everything."""
    row: Row = {}
    for column in table.columns:
        if column.server_default is not None:
            continue
        if column.nullable and number == 1:
            row[column.name] = None
        elif isinstance(column.type, sa.JSON):
            row[column.name] = {"ä": [1, None, "\u2028"]} if number == 1 else sa.JSON.NULL
        elif isinstance(column.type, schema.UtcDateTime):
            late = column.name in {"ends_at", "window_end", "until", "settled_at", "last_sent_at", "at"}
            row[column.name] = LATER if late else START
        elif isinstance(column.type, sa.Boolean):
            row[column.name] = number == 1
        elif isinstance(column.type, sa.Integer):
            row[column.name] = number
        else:
            row[column.name] = str(number) if column.primary_key or column.name in PAIRED else f"é{number}"
    return row | dict(WORDS.get(table.name, [{}, {}])[number - 1])


async def fill(store: Store) -> None:
    """Two rows in each table."""
    async with store.write() as tx:
        for table in schema.metadata.sorted_tables:
            for number in (1, 2):
                await tx.execute(sa.insert(table).values(made_up(table, number)))
        await copies._number_on(
            tx, list(schema.metadata.sorted_tables), dict.fromkeys(schema.metadata.tables, 40)
        )


def names(directory: Path) -> list[str]:
    """What lies in a directory."""
    return [path.name for path in directory.iterdir()]


async def everything(store: Store) -> dict[str, list[Row]]:
    """All rows as text sees them, JSON as it is written."""
    found: dict[str, list[Row]] = {}
    async with store.read() as tx:
        for table in schema.metadata.sorted_tables:
            columns = [
                sa.cast(column, sa.Text).label(column.name) if isinstance(column.type, sa.JSON) else column
                for column in table.columns
            ]
            rows = await tx.execute(sa.select(*columns).order_by(*table.primary_key.columns))
            found[table.name] = [dict(row) for row in rows.mappings()]
    return found


@pytest.fixture
async def full(store_url: str) -> AsyncIterator[Store]:
    async with Store(store_url) as store:
        await fill(store)
        yield store


def test_every_table_is_filled() -> None:
    """What a new table's constraints want belongs into WORDS."""
    for table in schema.metadata.sorted_tables:
        assert all(value is not None for value in made_up(table, 2).values()), table.name


async def test_a_copy_holds_every_row_and_is_one_file(full: Store, tmp_path: Path) -> None:
    """As SQLite sees them, with the moment noted; nothing lies beside it, nobody else may read it."""
    target = tmp_path / "copies" / "copy.db"
    target.parent.mkdir()
    assert await copies.backup(full, target, now=NOW) == target
    assert names(target.parent) == ["copy.db"]
    assert target.stat().st_mode & 0o777 == 0o600
    copy = copies.inspect(target)
    assert (copy.revision, copy.copied_at) == (migrate.newest(), NOW)
    assert copy.rows["marks"] == 3
    there = await everything(full)
    async with Store(f"sqlite+aiosqlite:///{target}") as opened:
        kept = await everything(opened)
    noted = [row for row in kept["marks"] if row["name"] == marks.COPIED]
    kept["marks"] = [row for row in kept["marks"] if row not in noted]
    assert kept == there
    with pytest.raises(BillingdError, match="exists already"):
        await copies.backup(full, target, now=NOW)


async def test_what_is_restored_is_what_was_copied(full: Store, tmp_path: Path) -> None:
    """All that came since is gone, numbers go on, leases are nobody's, and the mark is there."""
    before = await everything(full)
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    async with full.write() as tx:
        await tx.execute(sa.update(schema.held).values(reason="changed since"))
        await tx.execute(sa.delete(schema.drift))
    await full.close()
    done = await copies.restore(full, target, now=NOW + timedelta(hours=1))
    after = await everything(full)
    async with full.write() as tx:
        mark = await marks.find(tx, marks.RESTORED)
        row = {name: value for name, value in made_up(schema.held, 2).items() if name != "id"}
        row |= {"subject": "new"}
        made = await tx.execute(sa.insert(schema.held).values(row).returning(schema.held.c.id))
        assert made.scalar_one() == 41
    assert mark is not None
    assert mark.at == NOW + timedelta(hours=1)
    assert mark.detail == {"copied_at": NOW.isoformat(), "file": "copy.db"}
    assert {row["name"] for row in after["marks"]} == {marks.RESTORED, "other"}
    leased = after["outbox"][0]
    assert (leased["state"], leased["due_at"]) == ("leased", NOW + timedelta(hours=1))
    leased["due_at"] = before["outbox"][0]["due_at"]
    assert {**after, "marks": []} == {**before, "marks": []}
    assert await migrate.differences(full) == []
    # what was there before it is kept, and can be put back in turn
    assert done.set_aside is not None
    aside = copies.inspect(done.set_aside)
    assert aside.rows["drift"] == 0
    await full.close()
    await copies.restore(full, done.set_aside, now=NOW + timedelta(hours=2))
    assert (await everything(full))["held"][0]["reason"] == "changed since"


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
async def test_a_copy_goes_from_one_database_to_the_other(full: Store, tmp_path: Path) -> None:
    """PostgreSQL's rows in a SQLite store, and back into PostgreSQL."""
    before = await everything(full)
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    async with Store(f"sqlite+aiosqlite:///{tmp_path / 'store.db'}") as other:
        assert (await copies.restore(other, target, now=NOW)).set_aside is None
        back = await copies.backup(other, tmp_path / "back.db", now=NOW)
    await full.close()
    await copies.restore(full, back, now=NOW)
    after = await everything(full)
    leased = {"due_at": before["outbox"][0]["due_at"]}
    after["outbox"][0] |= leased
    assert {**after, "marks": []} == {**before, "marks": []}


async def test_an_older_copy_is_brought_up_to_date(store_url: str, tmp_path: Path) -> None:
    """A copy of schema 0001, which says nowhere when it was made, but in its rows."""
    target = tmp_path / "old.db"
    async with Store(f"sqlite+aiosqlite:///{target}") as old, old.write() as tx:
        await migrate.upgrade_to(tx, "0001")
        row = made_up(schema.outbox, 2) | {"created_at": LATER, "args": {}}
        await tx.execute(sa.insert(schema.outbox).values(row))
    async with Store(store_url) as store:
        await copies.restore(store, target, now=NOW)
        await migrate.check(store)
        assert await migrate.differences(store) == []
        async with store.read() as tx:
            mark = await marks.find(tx, marks.RESTORED)
        assert mark is not None
        assert mark.detail["copied_at"] == LATER.isoformat()


async def test_a_copy_of_what_was_not_read_back_yet_is_as_old_as_its_own_copy(
    full: Store, tmp_path: Path
) -> None:
    """Restored, copied before it was read back, restored again: what to read begins at the first copy."""
    first = await copies.backup(full, tmp_path / "1", now=NOW)
    await full.close()
    await copies.restore(full, first, now=NOW + timedelta(hours=1))
    second = await copies.backup(full, tmp_path / "2", now=NOW + timedelta(hours=2))
    await full.close()
    await copies.restore(full, second, now=NOW + timedelta(hours=3))
    async with full.read() as tx:
        mark = await marks.find(tx, marks.RESTORED)
    assert mark is not None
    assert mark.detail["copied_at"] == NOW.isoformat()


@pytest.mark.parametrize("harm", ["page", "rows", "cut", "text"])
async def test_a_damaged_copy_is_refused_and_nothing_is_touched(
    full: Store, tmp_path: Path, harm: str
) -> None:
    """A page overwritten, rows taken away, its end cut off, or no database at all."""
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    whole = bytearray(_bytes(target))
    match harm:
        case "page":
            whole[4096 * 3 : 4096 * 20] = b"\xa5" * 4096 * 17
        case "cut":
            del whole[len(whole) // 2 :]
        case "text":
            whole[:] = b"-- PostgreSQL database dump\n" * 1000
    _put(target, bytes(whole))
    if harm == "rows":
        connection = sqlite3.connect(target)
        connection.execute("DELETE FROM history")
        connection.commit()
        connection.close()
    before = await everything(full)
    await full.close()
    with pytest.raises(copies.NotACopy):
        copies.inspect(target)
    with pytest.raises(copies.NotACopy):
        await copies.restore(full, target, now=NOW)
    assert await everything(full) == before


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_copy_of_what_is_not_sound_is_none(full: Store, tmp_path: Path) -> None:
    """As many rows as were read are not enough: it is opened and checked."""
    assert full.path is not None
    with closing(sqlite3.connect(full.path)) as store:
        store.execute("UPDATE usage_records SET quota_id = 'nowhere' WHERE id = 1")
        store.commit()
    with pytest.raises(copies.NotACopy, match="row 1 of usage_records refers to a row of add_on_links"):
        await copies.backup(full, tmp_path / "copy.db", now=NOW)
    assert not [name for name in names(tmp_path) if name.startswith("copy")]


async def test_a_failed_copy_leaves_nothing(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that lacks a row that was read is none."""
    real = copies._finish

    def finish(path: Path, *args: Any) -> None:
        connection = sqlite3.connect(path)
        connection.execute("DELETE FROM held WHERE id = 1")
        connection.commit()
        connection.close()
        real(path, *args)

    monkeypatch.setattr(copies, "_finish", finish)
    with pytest.raises(copies.NotACopy, match="held has 1 rows, 2 were read"):
        await copies.backup(full, tmp_path / "copy.db", now=NOW)
    assert not [name for name in names(tmp_path) if name.startswith("copy")]


class Died(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_restore_that_dies_anywhere_leaves_the_old_store_or_the_marked_new_one(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that touches the disk is a step; dying just before or after it, then a new restore."""
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    async with full.write() as tx:
        await tx.execute(sa.update(schema.held).values(reason="changed since"))
    await full.close()
    assert full.path is not None
    saved = _bytes(full.path)
    died_at = 0
    outcomes = set()
    while True:
        died_at += 1
        with monkeypatch.context() as patched:
            taken = _dying(patched, died_at)
            try:
                await copies.restore(full, target, now=NOW + timedelta(minutes=died_at))
            except Died:
                died = True
            else:
                died = False
        async with full.read() as tx:
            mark = await marks.find(tx, marks.RESTORED)
            [reason, _] = (
                (await tx.execute(sa.select(schema.held.c.reason).order_by(schema.held.c.id))).scalars().all()
            )
        assert (mark is not None) == (reason != "changed since"), taken
        outcomes.add(mark is not None)
        await full.close()
        if not died:
            break
        _tidy(tmp_path)
        _put(full.path, saved)
    assert died_at > 12
    assert outcomes == {False, True}


def _tidy(directory: Path) -> None:
    """Nothing is left of a store but what a restore was making."""
    for path in directory.glob("billingd.db*"):
        if not path.name.endswith(".restoring"):
            path.unlink()


def _dying(patched: pytest.MonkeyPatch, at: int) -> list[str]:
    """Counts the steps that touch the disk, and dies at one of them; what cleans up dies with it."""
    taken: list[str] = []

    def step(name: str) -> None:
        taken.append(name)
        if len(taken) >= at:
            raise Died(name)

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            step(f"before {name}")
            result = real(*args, **kwargs)
            step(f"after {name}")
            return result

        patched.setattr(owner, name, stepped)

    for name in ("_begin", "_taken", "_let_go", "_keep", "_sync", "_verify"):
        around(copies, name)
    around(Path, "replace")
    around(Path, "unlink")
    return taken


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
async def test_a_restore_that_fails_on_postgres_changes_nothing(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one transaction, numbers included."""
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    async with full.write() as tx:
        await tx.execute(sa.delete(schema.drift))
    before = await everything(full)
    await full.close()
    for number, name in enumerate(("_pour", "_number_on", "_sequences")):
        with monkeypatch.context() as patched:
            real = getattr(copies, name)
            calls: list[int] = []

            async def failing(source: Any, *args: Any, real: Any = real, calls: Any = calls) -> Any:
                result = await real(source, *args)
                calls.append(1)
                if len(calls) == 2:  # the first is the copy of what is there
                    raise Died
                return result

            patched.setattr(copies, name, failing)
            with pytest.raises(Died):
                await copies.restore(full, target, now=NOW + timedelta(hours=number))
        assert await everything(full) == before
        async with full.read() as tx:
            given = await copies._sequences(tx, list(schema.metadata.sorted_tables))
        assert set(given.values()) == {40}
        await full.close()


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
async def test_a_daemon_that_is_connected_keeps_its_store(
    full: Store, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL knows of every billingd that has the database open."""
    monkeypatch.setattr(copies, "LEAVING_SECONDS", 0.0)
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    async with Store(store_url) as daemon:
        await migrate.current(daemon)
        await full.close()
        with pytest.raises(StoreBusy, match="stop the daemon"):
            await copies.restore(full, target, now=NOW)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_store_that_somebody_reads_is_not_replaced(full: Store, tmp_path: Path) -> None:
    """SQLite's log beside the old file would be played into the new one."""
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    await full.close()
    async with Store(str(full.url)) as reader, reader.read() as tx:
        await tx.execute(sa.select(schema.held))
        with pytest.raises(StoreBusy, match="in use"):
            await copies.restore(full, target, now=NOW)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_damaged_store_is_set_aside_with_its_log(full: Store, tmp_path: Path) -> None:
    """What cannot be opened is kept all the same, and the new one does not get its log."""
    target = await copies.backup(full, tmp_path / "copy.db", now=NOW)
    before = await everything(full)
    await full.close()
    assert full.path is not None
    _put(full.path, b"this is no database" * 1000)
    _put(full.path.with_name("billingd.db-wal"), b"and no log")
    done = await copies.restore(full, target, now=NOW)
    assert done.set_aside is not None
    assert _bytes(done.set_aside).startswith(b"this is no database")
    assert _bytes(done.set_aside.with_name(done.set_aside.name + "-wal")) == b"and no log"
    assert (await everything(full))["held"] == before["held"]


async def test_a_plain_copy_of_a_sqlite_file_is_a_copy_too(
    sqlite_template: Path, store_url: str, tmp_path: Path
) -> None:
    """Made by `cp` with the daemon stopped: it says nothing of when, and has no rows to tell."""
    shutil.copy(sqlite_template, tmp_path / "plain.db")
    async with Store(store_url) as store:
        done = await copies.restore(store, tmp_path / "plain.db", now=NOW)
        assert done.copy.copied_at is None
        async with store.read() as tx:
            mark = await marks.find(tx, marks.RESTORED)
    assert mark is not None
    assert mark.detail["copied_at"] is None
