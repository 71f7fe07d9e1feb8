"""Safety copies: one sound SQLite file, whichever database the store is in, and the way back from one.

A copy holds every row as it was at one moment, and notes which moment that was (mark COPIED). It is opened
and checked before it gets its name. Putting one back leaves mark RESTORED with the rows, never after them:
what happened since the copy is then read back from the far sides before anything is written to them.
"""

import asyncio
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from billingd.domain.errors import BillingdError, StoreBusy
from billingd.store import marks, migrate, outbox
from billingd.store.engine import APPLICATION, Store, Tx
from billingd.store.marks import COPIED, RESTORED, RESYNCED
from billingd.store.schema import metadata

BATCH: Final = 2_000
"""Rows that are read and written at a time."""

PAGES: Final = 4_096
"""Pages of a SQLite file that are copied at a time."""

MAGIC: Final = b"SQLite format 3\0"
"""How SQLite's files begin."""

BESIDE: Final = ("-wal", "-shm", "-journal")
"""What SQLite may keep beside its file."""

FAILED: Final = ".before-failed-upgrade"
"""How the copy ends from before the last migration that failed."""

LOCK_WAIT: Final = "5s"
"""How long a restore waits for PostgreSQL's tables; nobody else should be using them."""

LEAVING_SECONDS: Final = 2.0
"""How long PostgreSQL may take to see that a process which has ended is gone."""

SQLITE_TIME: Final = "%Y-%m-%d %H:%M:%S.%f"
"""How SQLAlchemy writes a time into SQLite."""

TIMES: Final = (
    ("outbox", "created_at"),
    ("watermarks", "read_at"),
    ("intents", "last_sent_at"),
    ("usage_records", "recorded_at"),
    ("subscription_links", "linked_at"),
)
"""Where a copy shows how old it is at most, when it does not say."""

Tell = Callable[[str, int], None]
"""Hears how far it got: what is being copied, and how much of it."""


class NotACopy(BillingdError):
    """The file is none of billingd's, or no longer sound."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A safety copy that was opened and checked. `copied_at` is None when nothing in it says when."""

    path: Path
    revision: str
    copied_at: datetime | None
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back, and where the store that was there before is now (None: there was none)."""

    copy: Copy
    set_aside: Path | None


def _silent(what: str, done: int) -> None:
    """Tell nobody."""


# Making a copy.


async def backup(store: Store, to: Path | None, *, now: datetime, tell: Tell = _silent) -> Path:
    """Copy a store while it may be in use, verified by opening the copy; without `to` named after the time.

    On PostgreSQL it is read in one transaction that sees one moment. Raises BillingdError: it exists already,
    or is not sound; StoreBusy: the store is newer than this program.
    """
    if store.sqlite:
        if store.path is not None and store.path.exists():
            await migrate.check_known(store)
        made = backup_file(store, to, now=now, tell=tell)
        if made is None:
            raise BillingdError(f"there is no store at {store.path}")
        return made
    revision = await migrate.current(store)
    if revision is None:
        raise BillingdError("the store is empty: there is nothing to copy")
    await migrate.check_known(store)
    target = to or Path(f"billingd.{now:%Y%m%dT%H%M%SZ}.backup")
    with _in_the_making(target) as path:
        async with (
            Store(f"sqlite+aiosqlite:///{path}") as copy,
            store.snapshot() as source,
            copy.write() as tx,
        ):
            await migrate.upgrade_to(tx, revision)
            tables = await _tables(source)
            counted = await _pour(source, tx, tables, tell)
            await _number_on(tx, tables, await _sequences(source, tables))
        _finish(path, counted, now)
    return target


def before_upgrade(store: Store, *, now: datetime) -> Path | None:
    """Copy a SQLite store that is about to be migrated; None when there is no file, or on PostgreSQL.

    Raises BillingdError, and then nothing may be migrated.
    """
    try:
        return backup_file(store, None, now=now)
    except (sqlite3.Error, OSError) as error:
        raise BillingdError(
            f"the store {store.path} was not migrated, for no copy of it could be made before: {error}; "
            "make room beside it, then start again"
        ) from error


@contextmanager
def one_kept(store: Store, copy: Path | None) -> Iterator[None]:
    """Around a migration after `before_upgrade`: should it fail, its copy takes the place of the last such.

    Else a start that is tried again and again would fill the disk with the same.
    """
    try:
        yield
    except BaseException:
        if copy is not None and store.path is not None:
            copy.replace(store.path.with_name(store.path.name + FAILED))
        raise


def backup_file(store: Store, to: Path | None, *, now: datetime, tell: Tell = _silent) -> Path | None:
    """Copy a SQLite store while it may be in use, verified by opening the copy; None when there is no file.

    Raises BillingdError: it exists already, or is not sound.
    """
    path = store.path
    if path is None or not path.exists():
        return None
    target = to or path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%SZ}.backup")
    with _in_the_making(target) as part:
        with closing(sqlite3.connect(path)) as source:
            source.isolation_level = None
            source.execute("BEGIN")  # rows and pages of the same moment
            counted = _count(source)
            _copy_pages(source, part, tell)
        _finish(part, counted, now)
    return target


@contextmanager
def _in_the_making(target: Path) -> Iterator[Path]:
    """A file beside the target, for nobody else to read, that gets its name when it is whole."""
    if target.exists():
        raise BillingdError(f"{target} exists already; name another file")
    part = target.with_name(target.name + ".part")
    _begin(part)
    try:
        yield part
        part.replace(target)
        _sync(target.parent)
    finally:
        for name in ("", *BESIDE):
            part.with_name(part.name + name).unlink(missing_ok=True)


def _begin(path: Path) -> None:
    """An empty file for nobody else to read."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _copy_pages(source: sqlite3.Connection, to: Path, tell: Tell) -> None:
    def progress(_status: int, left: int, pages: int) -> None:
        tell("pages", pages - left)

    with closing(sqlite3.connect(to)) as copy:
        source.backup(copy, pages=PAGES, progress=progress)


def _finish(path: Path, counted: Mapping[str, int], now: datetime) -> None:
    """Note in the copy when it was made, and see that it is whole; one file without others beside it."""
    with closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")
        found = _count(copy)
        if differing := [name for name in counted if found.get(name) != counted[name]]:
            raise NotACopy(
                f"the copy {path} is not whole: {differing[0]} has {found.get(differing[0])} rows, "
                f"{counted[differing[0]]} were read"
            )
        if "marks" in counted:
            rows = {name: number for name, number in counted.items() if name != "marks"}
            copy.execute(
                "INSERT OR REPLACE INTO marks (name, at, detail) VALUES (?, ?, ?)",
                (COPIED, now.astimezone(UTC).strftime(SQLITE_TIME), json.dumps({"rows": rows})),
            )
            copy.commit()
        _verify(copy, path)
    _sync(path)


def _verify(copy: sqlite3.Connection, path: Path) -> None:
    """Raise NotACopy when SQLite finds a fault in it."""
    try:
        verdicts = [str(row[0]) for row in copy.execute("PRAGMA integrity_check")]
        strays = copy.execute("PRAGMA foreign_key_check").fetchall()
    except sqlite3.DatabaseError as error:
        raise NotACopy(f"{path} is not sound: {error}") from error
    if verdicts != ["ok"]:
        raise NotACopy(f"{path} is not sound: {verdicts[0]}")
    if strays:
        table, row, parent, _ = strays[0]
        raise NotACopy(
            f"{path} is not sound: row {row} of {table} refers to a row of {parent} that is missing"
        )


def _count(connection: sqlite3.Connection) -> dict[str, int]:
    names = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    return {
        name: int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])  # noqa: S608
        for (name,) in names
    }


# Putting one back.


def inspect(file: Path) -> Copy:
    """Open a copy and see that it is one, and sound. Raises NotACopy, and StoreBusy for a newer schema."""
    if not file.is_file():
        raise NotACopy(f"there is no file {file}")
    try:
        with closing(_read_only(file)) as copy:
            return _looked_at(copy, file)
    except sqlite3.DatabaseError as error:
        raise NotACopy(f"{file} is not a copy of a billingd store, or is damaged: {error}") from error


async def restore(store: Store, file: Path, *, now: datetime, tell: Tell = _silent) -> Restored:
    """Put a copy in the store's place, after setting aside what is there; all of it or nothing.

    The store must be locked and nothing connected to it. An older schema is brought up to date on the way.
    Raises StoreBusy (in use, or a newer schema), NotACopy.
    """
    path = store.path
    if path is not None:
        _not_itself(file, path)
        ready = path.with_name(path.name + ".restoring")
        try:
            copy = await _prepared(file, ready, now, tell)
            set_aside = _put_in_place(ready, path, now)
        finally:
            for name in ("", *BESIDE):
                ready.with_name(ready.name + name).unlink(missing_ok=True)
        return Restored(copy, set_aside)
    with tempfile.TemporaryDirectory(prefix="billingd-") as directory:
        ready = Path(directory) / "ready.db"
        copy = await _prepared(file, ready, now, tell)
        return Restored(copy, await _load(store, ready, file, now, tell))


def _not_itself(file: Path, path: Path) -> None:
    if path.exists() and file.exists() and path.samefile(file):
        raise BillingdError(f"{file} is the store itself; name a copy of it")


async def _prepared(file: Path, ready: Path, now: datetime, tell: Tell) -> Copy:
    """The copy at `ready`, as the store shall be: of today's schema, nobody's leases, marked as restored."""
    _begin(ready)
    copy = _taken(file, ready, tell)
    async with Store(f"sqlite+aiosqlite:///{ready}") as store:
        await migrate.upgrade(store)
        async with store.write() as tx:
            await outbox.take_back_leases(tx, now=now)
            earlier = await marks.find(tx, RESTORED)
            copied_at = copy.copied_at
            if earlier is not None and (said := earlier.detail.get("copied_at")) is not None:
                # a copy of a store that had not been read back yet: what it lacks began earlier
                before = datetime.fromisoformat(said)
                copied_at = before if copied_at is None else min(before, copied_at)
            detail = {"copied_at": None if copied_at is None else copied_at.isoformat(), "file": file.name}
            await marks.note(tx, RESTORED, at=now, detail=detail)
            await marks.clear(tx, RESYNCED)
            await marks.clear(tx, COPIED)
    with closing(sqlite3.connect(ready)) as made:
        made.execute("PRAGMA journal_mode=DELETE")
        _verify(made, ready)
    _sync(ready)
    return copy


def _taken(file: Path, to: Path, tell: Tell) -> Copy:
    """Copy a copy, and see that what came out is one."""
    if not file.is_file():
        raise NotACopy(f"there is no file {file}")
    try:
        with closing(_read_only(file)) as source:
            _copy_pages(source, to, tell)
        with closing(sqlite3.connect(to)) as copy:
            return _looked_at(copy, file)
    except sqlite3.DatabaseError as error:
        raise NotACopy(f"{file} is not a copy of a billingd store, or is damaged: {error}") from error


def _looked_at(copy: sqlite3.Connection, file: Path) -> Copy:
    _verify(copy, file)
    rows = _count(copy)
    if rows.get("alembic_version") != 1:
        raise NotACopy(f"{file} is not a copy of a billingd store")
    revision = str(copy.execute("SELECT version_num FROM alembic_version").fetchone()[0])
    migrate.known(revision, f"the copy {file}")
    return Copy(file, revision, _copied_at(copy, rows, file), rows)


def _read_only(file: Path) -> sqlite3.Connection:
    """A file that may lie where nothing can be written; what a WAL beside it holds is read too."""
    uri = file.absolute().as_uri()
    source = sqlite3.connect(f"{uri}?mode=ro", uri=True)
    try:
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        source.close()
        if file.with_name(file.name + "-wal").exists():
            raise
        source = sqlite3.connect(f"{uri}?immutable=1", uri=True)
    return source


def _copied_at(copy: sqlite3.Connection, rows: Mapping[str, int], file: Path) -> datetime | None:
    """When it was made: as it says, else the newest time in it, which is not later."""
    if "marks" in rows:
        said = copy.execute("SELECT at, detail FROM marks WHERE name = ?", (COPIED,)).fetchone()
        if said is not None:
            for name, number in json.loads(said[1]).get("rows", {}).items():
                if rows.get(name) != number:
                    raise NotACopy(
                        f"{file} is not sound: {name} has {rows.get(name)} rows, {number} were copied"
                    )
            return datetime.strptime(said[0], SQLITE_TIME).replace(tzinfo=UTC)
    times = [
        copy.execute(f"SELECT max({column}) FROM {table}").fetchone()[0]  # noqa: S608
        for table, column in TIMES
        if table in rows
    ]
    newest = max((time for time in times if time is not None), default=None)
    return None if newest is None else datetime.fromisoformat(newest).replace(tzinfo=UTC)


def _put_in_place(ready: Path, path: Path, now: datetime) -> Path | None:
    """Give the prepared file the store's name at once; what had it keeps another, with all that it held.

    A crash before the last step leaves the old store as it was, one after it the new one with its mark.
    """
    there = path.exists()
    _owned_like(ready, path if there else path.parent)
    aside = _aside(path, now)
    if there:
        if aside.exists():
            raise BillingdError(f"{aside} exists already; try again")
        _let_go(path)
        for name in (*BESIDE, ""):  # there is something beside it only when it is damaged
            if (part := path.with_name(path.name + name)).exists():
                _keep(part, aside.with_name(aside.name + name))
        _sync(path.parent)
    for name in BESIDE:  # they are the old file's: SQLite would play them into the new one
        path.with_name(path.name + name).unlink(missing_ok=True)
    _sync(path.parent)
    ready.replace(path)
    _sync(path.parent)
    return aside if there else None


def _aside(path: Path, now: datetime) -> Path:
    return path.absolute().with_name(f"{path.name}.{now:%Y%m%dT%H%M%SZ}.before-restore")


def _let_go(path: Path) -> None:
    """Bring all into the one file, and see that nobody has it open. A damaged one is left as it is."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:  # opening it would make SQLite remove its log
            return
    try:
        with closing(sqlite3.connect(path, timeout=2)) as store:
            store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            store.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise StoreBusy(f"the store {path} is in use by another process; stop that first") from error


def _keep(part: Path, aside: Path) -> None:
    """The same file under another name too; a copy of it where the file system knows no such thing."""
    try:
        os.link(part, aside)
    except OSError:
        shutil.copy2(part, aside)
        _sync(aside)


def _owned_like(made: Path, model: Path) -> None:
    """What root puts back must be the daemon's to open."""
    if os.geteuid() == 0:
        owner = model.stat()
        os.chown(made, owner.st_uid, owner.st_gid)


def _sync(path: Path) -> None:
    """See that a file, or a directory's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# PostgreSQL.


async def _load(store: Store, ready: Path, file: Path, now: datetime, tell: Tell) -> Path | None:
    """Fill PostgreSQL's tables from the prepared file in one transaction; the copy of what was there."""
    async with store.read() as tx:
        await _alone(tx)
    set_aside = None
    if await migrate.current(store) is not None:
        await migrate.check_known(store)
        set_aside = await backup(store, _aside(file, now), now=now, tell=tell)
    async with Store(f"sqlite+aiosqlite:///{ready}") as copy, copy.read() as source, store.write() as tx:
        await tx.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'"))
        await migrate.upgrade_to(tx, "head")
        tables = list(metadata.sorted_tables)
        names = ", ".join(table.name for table in tables)
        await tx.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY"))
        poured = await _pour(source, tx, tables, tell)
        await _number_on(tx, tables, await _sequences(source, tables))
        for table in tables:
            found = (await tx.execute(sa.select(sa.func.count()).select_from(table))).scalar_one()
            if found != poured[table.name]:
                raise BillingdError(
                    f"{table.name} has {found} rows where {poured[table.name]} were put; nothing was restored"
                )
        await _alone(tx)
    return set_aside


async def _alone(tx: Tx) -> None:
    """Raise StoreBusy while another billingd is connected to this database."""
    statement = sa.text(
        "SELECT pid, coalesce(host(client_addr), 'this host') FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = :ours AND pid <> pg_backend_pid() LIMIT 1"
    )
    deadline = time.monotonic() + LEAVING_SECONDS
    while True:
        await tx.execute(sa.text("SELECT pg_stat_clear_snapshot()"))
        other = (await tx.execute(statement, {"ours": APPLICATION})).one_or_none()
        if other is None:
            return
        if time.monotonic() > deadline:
            raise StoreBusy(
                f"another billingd has the store open (PostgreSQL's process {other[0]}, from {other[1]}); "
                "stop the daemon first"
            )
        await asyncio.sleep(0.05)


async def _tables(tx: Tx) -> list[sa.Table]:
    """Those of our tables that the store has (an older schema has fewer, each with fewer columns)."""

    def look(connection: sa.Connection) -> list[sa.Table]:
        there = sa.inspect(connection)
        names = set(there.get_table_names())
        found = []
        for table in metadata.sorted_tables:
            if table.name in names:
                columns = {column["name"] for column in there.get_columns(table.name)}
                kept = [column for column in table.columns if column.name in columns]
                found.append(sa.Table(table.name, sa.MetaData(), *(_bare(column) for column in kept)))
        return found

    return await tx.run_sync(look)


def _bare(column: sa.Column[Any]) -> sa.Column[Any]:
    return sa.Column(
        column.name,
        column.type,
        primary_key=column.primary_key,
        autoincrement=column.autoincrement,
        nullable=column.nullable,
    )


async def _pour(source: Tx, into: Tx, tables: list[sa.Table], tell: Tell) -> dict[str, int]:
    """Every row of every table, from one database into the other; return how many of each.

    JSON goes over as it is written: SQL's NULL and JSON's null stay what they are.
    """
    poured: dict[str, int] = {}
    for table in tables:
        text = {column.name for column in table.columns if isinstance(column.type, sa.JSON)}
        read = sa.select(
            *(
                sa.cast(column, sa.Text).label(column.name)
                if column.name in text and source.dialect.name == "postgresql"
                else sa.type_coerce(column, sa.Text).label(column.name)
                if column.name in text
                else column
                for column in table.columns
            )
        ).order_by(*table.primary_key.columns)
        write = sa.insert(table).values({column.name: _given(column, into) for column in table.columns})
        poured[table.name] = 0
        rows = await source.stream(read)
        async for batch in rows.mappings().partitions(BATCH):
            await into.execute(write, [{f"p_{name}": row[name] for name in row} for row in batch])
            poured[table.name] += len(batch)
            tell(table.name, poured[table.name])
    return poured


def _given(column: sa.Column[Any], into: Tx) -> Any:
    if not isinstance(column.type, sa.JSON):
        return sa.bindparam(f"p_{column.name}", type_=column.type)
    text = sa.bindparam(f"p_{column.name}", type_=sa.Text())
    return sa.cast(text, sa.JSON) if into.dialect.name == "postgresql" else sa.type_coerce(text, sa.Text)


def _numbered(tables: list[sa.Table]) -> list[sa.Table]:
    """The tables that number their rows themselves, in `id`."""
    return [table for table in tables if "id" in table.columns and isinstance(table.c.id.type, sa.Integer)]


async def _sequences(tx: Tx, tables: list[sa.Table]) -> dict[str, int]:
    """The highest number that each table ever gave to a row."""
    found: dict[str, int] = {}
    for table in _numbered(tables):
        top = (await tx.execute(sa.select(sa.func.max(table.c.id)))).scalar_one() or 0
        if tx.dialect.name == "sqlite":
            last: sa.Select[Any] = sa.select(sa.column("seq")).select_from(sa.table("sqlite_sequence"))
            last = last.where(sa.column("name") == table.name)
        else:
            given_last: sa.ColumnElement[int] = sa.literal_column(
                "last_value - CASE WHEN is_called THEN 0 ELSE 1 END"
            )
            last = sa.select(given_last).select_from(sa.text(await _sequence(tx, table)))
        given = (await tx.execute(last)).scalar_one_or_none()
        found[table.name] = max(top, given or 0)
    return found


async def _number_on(tx: Tx, tables: list[sa.Table], given: Mapping[str, int]) -> None:
    """Let each table go on after the highest number it ever gave."""
    for table in _numbered(tables):
        number = given[table.name]
        if tx.dialect.name == "sqlite":
            values = {"name": table.name, "seq": number}
            await tx.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = :name"), values)
            await tx.execute(sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"), values)
            continue
        # no setval: this is undone if the transaction fails
        await tx.execute(sa.text(f"ALTER SEQUENCE {await _sequence(tx, table)} RESTART WITH {number + 1}"))


async def _sequence(tx: Tx, table: sa.Table) -> str:
    """PostgreSQL's name of what numbers a table's rows."""
    return str((await tx.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, "id")))).scalar_one())
