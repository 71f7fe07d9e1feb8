"""`db`: upgrade with a copy first, check, backup, restore."""

import asyncio
import json
import sqlite3
from datetime import datetime
from pathlib import Path

from cli_bench import Bench, document

from billingd.store import marks, migrate
from billingd.store.engine import Store


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_upgrade_makes_a_store_that_is_missing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    made = document(bench.run("db", "upgrade", "--json"))
    assert made == {"before": None, "after": migrate.newest(), "backup": None}
    again = bench.run("db", "upgrade")
    assert again.stdout == f"schema: {migrate.newest()} -> {migrate.newest()}\n"
    assert document(bench.run("db", "check", "--json")) == {"sound": True, "problems": []}


def test_upgrade_copies_a_store_that_is_behind(tmp_path: Path) -> None:
    """The copy holds what was there before."""
    bench = Bench(tmp_path)
    sql(bench.path, "CREATE TABLE precious (it TEXT)", "INSERT INTO precious VALUES ('kept')")
    done = document(bench.run("db", "upgrade", "--json"))
    copy = sqlite3.connect(done["backup"])
    assert copy.execute("SELECT it FROM precious").fetchall() == [("kept",)]
    assert copy.execute("SELECT count(*) FROM sqlite_master WHERE name = 'outbox'").fetchone() == (0,)
    copy.close()


def test_a_dry_run_says_what_would_be_run_and_changes_nothing(tmp_path: Path) -> None:
    """On a store that is missing (and stays so), one that is behind, one that is up to date."""
    bench = Bench(tmp_path)
    planned = document(bench.run("db", "upgrade", "--dry-run", "--json"))
    assert (planned["before"], planned["after"], planned["backup"]) == (None, migrate.newest(), False)
    assert [step["revision"] for step in planned["revisions"]][:3] == ["0001", "0002", "0003"]
    assert all(step["about"] for step in planned["revisions"])
    assert not bench.path.exists()
    asyncio.run(_at(bench.url, "0002"))
    before, there = bench.path.read_bytes(), sorted(names(tmp_path))
    result = bench.run("db", "upgrade", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"schema: 0002 -> {migrate.newest()}"
    assert lines[1] == "first: a verified copy of the store beside it"
    assert lines[2].startswith("  0003: The feed's position")
    assert (bench.path.read_bytes(), sorted(names(tmp_path))) == (before, there)
    done = document(bench.run("db", "upgrade", "--json"))
    assert Path(done["backup"]).exists()
    assert "nothing to do" in bench.run("db", "upgrade", "--dry-run").stdout


def test_a_dry_run_on_postgres_says_that_no_copy_is_made(empty_postgres_url: str, tmp_path: Path) -> None:
    asyncio.run(_at(empty_postgres_url, "0001"))
    env = {"BILLINGD_STORE__URL": empty_postgres_url}
    result = Bench(tmp_path).run("db", "upgrade", "--dry-run", env=env)
    assert "no copy is made on PostgreSQL" in result.stdout
    assert document(Bench(tmp_path).run("db", "current", "--json", env=env))["current"] == "0001"


async def _at(url: str, revision: str) -> None:
    """A store with a schema as it once was."""
    async with Store(url) as store, store.write() as tx:
        await migrate.upgrade_to(tx, revision)


def test_a_newer_store_is_5_and_the_way_back_is_one_that_works(tmp_path: Path) -> None:
    """Every command that opens it, `run` as well; only a copy that can be restored is named."""
    bench = Bench(tmp_path)
    asyncio.run(_at(bench.url, "0002"))
    copy = Path(document(bench.run("db", "upgrade", "--json"))["backup"])
    newer = tmp_path / "billingd.db.99990101T000000Z.backup"
    assert bench.run("db", "backup", str(newer)).exit_code == 0
    for path in (bench.path, newer):
        sql(path, "UPDATE alembic_version SET version_num = '9999'")
    (tmp_path / "billingd.db.99990102T000000Z.backup").write_text("no copy at all")
    backup = ("db", "backup", str(tmp_path / "no.db"))
    for words in (("db", "upgrade"), ("db", "upgrade", "--dry-run"), ("db", "check"), backup, ("run",)):
        refused = bench.run(*words)
        assert refused.exit_code == 5, words
        assert f"go back to schema 0002: billingd db restore {copy}" in refused.stderr
    told = document(bench.run("db", "current", "--json"))
    assert told == {"current": "9999", "newest": migrate.newest()}, "which is what it is for"
    assert not (tmp_path / "no.db").exists()
    assert bench.run("db", "restore", str(copy), "--yes").exit_code == 0
    assert bench.run("db", "upgrade").exit_code == 0
    assert bench.run("db", "check").exit_code == 0


async def test_upgrade_of_a_held_store_is_5(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with Store(bench.url) as store:
        store.lock()
        held = await bench.ask("db", "upgrade")
        assert held.exit_code == 5
        assert "`systemctl stop billingd.socket billingd`" in held.stderr
        assert (await bench.ask("db", "check")).exit_code == 0
        assert (await bench.ask("db", "backup")).exit_code == 0


def test_upgrade_into_no_directory_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run(
        "db", "upgrade", env={"BILLINGD_STORE__URL": f"sqlite+aiosqlite:///{tmp_path}/no/b.db"}
    )
    assert result.exit_code == 1
    assert result.stderr == f"Error: there is no directory {tmp_path}/no; make it first\n"


async def test_current_tells_both_revisions(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    sql(bench.path, "CREATE TABLE precious (it TEXT)")
    assert document(await bench.ask("db", "current", "--json")) == {
        "current": None,
        "newest": migrate.newest(),
    }
    await bench.fill(sqlite_template)
    assert (
        await bench.ask("db", "current")
    ).stdout == f"store:   {migrate.newest()}\nprogram: {migrate.newest()}\n"


async def test_check_names_every_difference_and_is_3(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    sql(
        bench.path,
        "DROP INDEX ix_outbox_due",
        "DELETE FROM add_on_links",
        "ALTER TABLE held ADD COLUMN stray INTEGER",
    )
    result = await bench.ask("db", "check", "--json")
    assert result.exit_code == 3
    assert '"sound": false' in result.stdout
    for word in ("ix_outbox_due", "stray", "add_on_links that is missing"):
        assert word in result.stdout


def test_check_of_a_damaged_store_and_of_an_older_one_is_3(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    bench.path.write_bytes(b"This is no database at all. " * 200)
    damaged = bench.run("db", "check", "--json")
    assert (damaged.exit_code, json.loads(damaged.stdout)["sound"]) == (3, False)
    assert "`billingd db restore FILE`" in damaged.stdout
    bench.path.unlink()
    sql(bench.path, "CREATE TABLE alembic_version (version_num VARCHAR)")
    sql(bench.path, "INSERT INTO alembic_version VALUES ('0001')")
    older = bench.run("db", "check")
    assert older.exit_code == 3
    assert "db upgrade" in older.stdout


async def test_backup_goes_where_it_is_told_and_overwrites_nothing(
    tmp_path: Path, sqlite_template: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    target = tmp_path / "copy.db"
    assert document(await bench.ask("db", "backup", str(target), "--json")) == {"backup": str(target)}
    again = await bench.ask("db", "backup", str(target))
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    nowhere = await bench.ask("db", "backup", str(tmp_path / "no" / "copy.db"))
    assert nowhere.exit_code == 1
    assert nowhere.stderr == f"Error: there is no directory {tmp_path}/no; make it first\n"


def test_a_store_that_is_missing_is_not_made_by_looking(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for command in ("current", "check", "backup"):
        result = bench.run("db", command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: there is no store at {bench.path} (`billingd run` ")
    assert not bench.path.exists()


def test_a_copy_of_postgres_is_restored_into_either(empty_postgres_url: str, tmp_path: Path) -> None:
    """The same file fills PostgreSQL again, and a SQLite store."""
    bench = Bench(tmp_path)
    env = {"BILLINGD_STORE__URL": empty_postgres_url}
    assert bench.run("db", "check", env=env).exit_code == 3
    done = document(bench.run("db", "upgrade", "--json", env=env))
    assert done == {"before": None, "after": migrate.newest(), "backup": None}
    assert bench.run("db", "check", env=env).stdout == "the store is sound\n"
    copy = tmp_path / "copy.db"
    assert document(bench.run("db", "backup", str(copy), "--json", env=env)) == {"backup": str(copy)}
    for target in (env, {}):
        restored = document(bench.run("db", "restore", str(copy), "--yes", "--json", env=target))
        assert restored["restored"] == str(copy)
        assert restored["schema"] == migrate.newest()
        assert restored["rows"]["outbox"] == 0
        assert (restored["set_aside"] is None) == (target == {})
        assert bench.run("db", "check", env=target).stdout == "the store is sound\n"


async def test_restore_puts_back_what_was_copied(tmp_path: Path, sqlite_template: Path) -> None:
    """The copy takes the store's place; the store that was there is kept, with what came since."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    copy = tmp_path / "copy.db"
    assert (await bench.ask("db", "backup", str(copy))).exit_code == 0
    sql(bench.path, "DELETE FROM outbox")
    unsure = await bench.ask("db", "restore", str(copy))
    assert unsure.exit_code == 2
    assert "--yes" in unsure.stderr
    done = document(await bench.ask("db", "restore", str(copy), "--yes", "--json"))
    assert done["rows"]["outbox"] == len(await bench.states()) == 4
    aside = sqlite3.connect(done["set_aside"])
    assert aside.execute("SELECT count(*) FROM outbox").fetchone() == (0,)
    aside.close()
    async with Store(bench.url) as store, store.read() as tx:
        mark = await marks.find(tx, marks.RESTORED)
        assert mark is not None
        assert mark.detail["file"] == "copy.db"
        assert datetime.fromisoformat(mark.detail["copied_at"]) == datetime.fromisoformat(done["copied_at"])


async def test_restore_refuses_what_it_may_not_do(tmp_path: Path, sqlite_template: Path) -> None:
    """A held store and a newer copy are 5, a file that is no copy is 1; nothing changes."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    copy, newer, other = tmp_path / "copy.db", tmp_path / "newer.db", tmp_path / "other.db"
    for each in (copy, newer):
        assert (await bench.ask("db", "backup", str(each))).exit_code == 0
    sql(newer, "UPDATE alembic_version SET version_num = '9999'")
    sql(other, "CREATE TABLE precious (it TEXT)")
    async with Store(bench.url) as store:
        store.lock()
        assert (await bench.ask("db", "restore", str(copy), "--yes")).exit_code == 5
    refused = await bench.ask("db", "restore", str(newer), "--yes")
    assert refused.exit_code == 5
    assert "newer than this program" in refused.stderr
    for file, words in ((other, "not a copy of a billingd store"), (tmp_path / "no.db", "there is no file")):
        result = await bench.ask("db", "restore", str(file), "--yes")
        assert result.exit_code == 1
        assert words in result.stderr
    itself = await bench.ask("db", "restore", str(bench.path), "--yes")
    assert itself.exit_code == 1
    assert "is the store itself" in itself.stderr
    assert len(await bench.states()) == 4
    assert not [name for name in names(tmp_path) if "restor" in name]
