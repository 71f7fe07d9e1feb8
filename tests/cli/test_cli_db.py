"""`db`: upgrade with a copy first, check, backup."""

import sqlite3
from pathlib import Path

from cli_bench import Bench, document

from billingd.store import migrate
from billingd.store.engine import Store


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


async def test_upgrade_of_a_held_store_is_5(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with Store(bench.url) as store:
        store.lock()
        assert (await bench.ask("db", "upgrade")).exit_code == 5
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
    assert nowhere.stderr.startswith(f"Error: cannot copy {bench.path} to ")


def test_a_store_that_is_missing_is_not_made_by_looking(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for command in ("current", "check", "backup"):
        result = bench.run("db", command)
        assert result.exit_code == 1
        assert result.stderr == f"Error: there is no store at {bench.path}\n"
    assert not bench.path.exists()


def test_postgres_has_its_own_tools_for_copies(empty_postgres_url: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    env = {"BILLINGD_STORE__URL": empty_postgres_url}
    assert bench.run("db", "check", env=env).exit_code == 1
    done = document(bench.run("db", "upgrade", "--json", env=env))
    assert done == {"before": None, "after": migrate.newest(), "backup": None}
    assert bench.run("db", "check", env=env).stdout == "the store is sound\n"
    backup = bench.run("db", "backup", env=env)
    assert backup.exit_code == 1
    assert "pg_dump" in backup.stderr
