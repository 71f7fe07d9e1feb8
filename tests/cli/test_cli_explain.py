"""`explain`: the same over the daemon and on the store itself."""

from pathlib import Path

import pytest
from cli_bench import Bench, document

from billingd.store import schema
from billingd.store.engine import Store

OVER = pytest.mark.parametrize("over", ["tcp", "unix", "store"])


@pytest.fixture
async def bench(tmp_path: Path, sqlite_template: Path) -> Bench:
    made = Bench(tmp_path)
    await made.fill(sqlite_template)
    return made


async def first_tag(bench: Bench) -> tuple[str, str]:
    async with Store(bench.url) as store, store.read() as tx:
        row = (await tx.execute(schema.usage_records.select().limit(1))).one()
    return row.merchant_tag, row.subscription_id


@OVER
async def test_a_record_and_its_subscription_are_explained(over: str, bench: Bench) -> None:
    tag, subscription = await first_tag(bench)
    async with bench.reached(over):
        record = document(await bench.ask("explain", tag, "--json"))
        whole = document(await bench.ask("explain", subscription, "--json"))
        few = document(await bench.ask("explain", subscription, "--records", "1", "--json"))
        said = await bench.ask("explain", tag)
        said_of_all = await bench.ask("explain", subscription)
    assert record["tag"] == tag
    assert record["subscription"]["id"] == whole["subscription"]["id"] == subscription
    assert tag in {row["tag"] for row in whole["records"]}
    assert len(few["records"]) == 1
    assert said.exit_code == said_of_all.exit_code == 0
    assert f"units         {record['units']}, at {record['usage_timestamp']}" in said.stdout
    assert "<- this record" in said.stdout
    assert tag in said_of_all.stdout
    assert "next invoice" in said_of_all.stdout


@OVER
async def test_what_nobody_knows_is_a_clear_failure(over: str, bench: Bench) -> None:
    async with bench.reached(over):
        nobody = await bench.ask("explain", "nobody")
        no_tag = await bench.ask("explain", "bd1:nothing")
    assert (nobody.exit_code, nobody.stdout) == (1, "")
    assert "`billingd status --subscriptions` lists them" in nobody.stderr
    assert (no_tag.exit_code, no_tag.stdout) == (1, "")
    assert "`billingd reconcile` says more" in no_tag.stderr
