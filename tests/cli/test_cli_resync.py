"""`resync`: what it prints, how it exits, over the daemon, and without one against the sandbox itself."""

import asyncio
import shutil
from pathlib import Path

import pytest
from cli_bench import Bench, document, resync_document
from click.testing import Result
from rig import a_rig

from billingd.cli.resync import lines
from billingd.domain.errors import Retryable
from billingd.sandbox.server import API_KEY
from billingd.store import marks, outbox
from billingd.store.engine import Store


@pytest.mark.parametrize("over", ["tcp", "unix"])
async def test_the_daemon_compares(over: str, tmp_path: Path, sqlite_template: Path) -> None:
    """A dry run that found something is 3, a real run 0; the document is the daemon's."""
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    async with bench.reached(over):
        told = await bench.ask("resync", "--dry-run", "--json")
        shown = await bench.ask("resync", "--dry-run")
        done = await bench.ask("resync")
    assert told.exit_code == 3
    assert document(told) == resync_document(dry_run=True)
    assert shown.exit_code == 3
    assert shown.stdout == (
        "  + subscription  T0 (id0)  so\n"
        "  ~ plan          T1 (id1)  so\n"
        "  - subscription  T2 (id2)  so\n"
        "  ! Much is missing.\n"
        "\n"
        "Plan: 1 to create, 1 to change, 1 to end.\n"
    )
    assert done.exit_code == 0
    assert "3 action(s) enqueued" in done.stdout


async def test_a_far_side_that_is_away_is_4(tmp_path: Path, sqlite_template: Path) -> None:
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    bench.poller.fault = Retryable("Amplify did not answer")
    async with bench.reached("unix"):
        result = await bench.ask("resync")
    assert (result.exit_code, result.stderr) == (4, "Error: Amplify did not answer\n")
    nobody = 'central_url = "http://127.0.0.1:9"\nlogin_url = "http://127.0.0.1:9/auth"\n'
    bench.configure(f"unix:{bench.socket}", nobody)
    result = await bench.ask("resync")
    assert result.exit_code == 4
    assert "Traceback" not in result.stderr


def test_what_is_withheld_is_something_to_look_at() -> None:
    """Nothing to do, and yet not all is well."""
    found = resync_document(dry_run=False) | {"steps": [], "enqueued": 0, "withheld": [{}] * 4}
    assert list(lines(found))[-2:] == [
        "Nothing to do. 1 plan(s) and 2 subscription(s) at Amplify were compared.",
        "4 step(s) are withheld; `billingd held list` shows why after a run.",
    ]


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
async def test_a_dead_letter_that_is_in_the_way_is_3(
    flag: list[str], tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be done before a person has settled it, and that is not nothing to do."""
    left = {"plans": 1, "subscriptions": 2, "dead_letters": 1}
    note = "plan Metered (p1): active and not linked, but action 7 is a dead letter: boom"
    found = {"steps": [], "enqueued": 0, "warnings": [], "notes": [note], "counts": left}
    bench = Bench(tmp_path)
    await bench.fill(sqlite_template)
    monkeypatch.setattr("cli_bench.resync_document", lambda **flags: resync_document(**flags) | found)
    async with bench.reached("unix"):
        told = await bench.ask("resync", *flag)
    assert told.exit_code == 3
    assert told.stdout == (
        f"  ! {note}\n\n"
        "Nothing that can be done as it is. 1 plan(s) and 2 subscription(s) at Amplify were compared.\n"
        "1 step(s) wait until a dead letter is replayed or discarded; `billingd outbox list --state dead` "
        "shows them.\n"
    )


async def test_without_a_daemon_it_compares_and_asks_by_itself(tmp_path: Path, sqlite_template: Path) -> None:
    """On the store itself, against both far sides: dry run, run, then nothing to do."""
    store = tmp_path / "rig.db"
    shutil.copy(sqlite_template, store)
    async with a_rig(f"sqlite+aiosqlite:///{store}") as rig:
        await rig.product()
        await rig.plan(title="Metered \x1b[31m")
        bench = Bench(tmp_path)
        shutil.copy(sqlite_template, bench.path)
        base = f"http://127.0.0.1:{rig.front.port}"
        tokens = rig.world.tenant.tokens
        bench.config.write_text(
            f'[store]\nurl = "{bench.url}"\n[admin]\nlisten = "unix:{bench.socket}"\n'
            f'[amplify]\norganization_id = "{rig.world.tenant.organization_id}"\n'
            f'client_id = "{tokens.client_id}"\ncentral_url = "{base}"\nlogin_url = "{base}/auth"\n'
            f'platform_url = "{base}"\n[recurly]\nbase_url = "{base}"\n',
            encoding="utf-8",
        )
        secrets: dict[str, str | None] = {
            "BILLINGD_AMPLIFY__CLIENT_SECRET": tokens.client_secret,
            "BILLINGD_RECURLY__API_KEY": API_KEY,
        }

        async def ask(*words: str) -> Result:
            return await asyncio.to_thread(lambda: bench.run(*words, env=secrets))

        dry = await ask("resync", "--dry-run")
        assert (dry.exit_code, dry.stderr) == (3, "the daemon does not answer; done on the store itself\n")
        [first, _, last] = dry.stdout.splitlines()
        assert first.startswith("  + plan  Metered \\x1b[31m (")
        assert last == "Plan: 1 to create, 0 to change, 0 to end."
        async with Store(bench.url) as opened, opened.read() as tx:
            assert await outbox.select(tx) == []
        run = document(await ask("resync", "--json"))
        assert (run["dry_run"], run["enqueued"], len(run["steps"])) == (False, 1, 1)
        async with Store(bench.url) as opened, opened.read() as tx:
            assert [row["kind"] for row in await outbox.select(tx)] == ["provision_plan"]
            assert await marks.find(tx, marks.RESYNCED) is not None
        secrets["BILLINGD_AMPLIFY__CLIENT_SECRET"] = "another one"
        refused = await ask("resync")
        assert (refused.exit_code, "not reach" in refused.stderr) == (1, False), "it is there, and says no"
        secrets["BILLINGD_AMPLIFY__CLIENT_SECRET"] = tokens.client_secret
        again = await ask("resync", "--dry-run")
        assert again.exit_code == 0
        assert again.stdout == "Nothing to do. 1 plan(s) and 0 subscription(s) at Amplify were compared.\n"
