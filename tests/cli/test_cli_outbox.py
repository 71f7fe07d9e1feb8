"""`outbox` and `held`: the same over the daemon and on the store itself."""

import re
from pathlib import Path

import pytest
from cli_bench import DEAD, DONE, TIMED_OUT, WAITING, Bench, document

from billingd import daemon as root
from billingd.domain.kinds import KINDS
from billingd.loops import Clock
from billingd.store.engine import Store

OVER = pytest.mark.parametrize("over", ["unix", "store"])


@pytest.fixture
async def bench(tmp_path: Path, sqlite_template: Path) -> Bench:
    made = Bench(tmp_path)
    await made.fill(sqlite_template)
    return made


@OVER
@pytest.mark.parametrize(
    ("words", "listed"),
    [
        ([], [WAITING, DEAD, TIMED_OUT]),
        (["--state", "dead"], [DEAD, TIMED_OUT]),
        (["--state", "done", "--state", "pending"], [WAITING, DONE]),
        (["--kind", "report_usage", "--limit", "1"], [DEAD]),
        (["--subject", "subject:1"], [WAITING]),
        (["--cause", "timeout"], [TIMED_OUT]),
        (["--cause", "100%", "--dry-run"], []),
    ],
)
async def test_list_filters(over: str, words: list[str], listed: list[int], bench: Bench) -> None:
    async with bench.reached(over):
        actions = document(await bench.ask("outbox", "list", *words, "--json"))["actions"]
    assert [action["id"] for action in actions] == listed


async def test_a_misspelt_kind_is_not_an_empty_list(bench: Bench) -> None:
    for words in (("list",), ("replay", "--dry-run")):
        result = await bench.ask("outbox", *words, "--kind", "report_usge")
        assert result.exit_code == 2
        assert "'report_usge' is no kind of action; there are adopt_subscription, " in result.stderr
    assert "there is none" in (await bench.ask("outbox", "list", "--kind", "resync")).stderr


async def test_every_kind_that_the_daemon_handles_can_be_asked_for(bench: Bench) -> None:
    async with Store(bench.url) as store, root.build(bench.settings(), store, Clock()) as parts:
        assert frozenset(parts.outbox._handlers) == KINDS


async def test_an_id_that_cannot_be_is_refused_alike(bench: Bench) -> None:
    for words in (("outbox", "show"), ("outbox", "retry"), ("held", "release")):
        result = await bench.ask(*words, "9" * 30)
        assert result.exit_code == 2
        assert "is more than any number that is given" in result.stderr


@OVER
async def test_list_for_people_is_a_line_each(over: str, bench: Bench) -> None:
    """In a pipe nothing is folded, coloured or passed through that could steer a terminal."""
    async with bench.reached(over):
        result = await bench.ask("outbox", "list", "--limit", "2")
    assert result.stdout.splitlines()[0].split() == [
        "ID",
        "STATE",
        "KIND",
        "SUBJECT",
        "ATTEMPT",
        "DUE",
        "LAST",
        "ERROR",
    ]
    assert len(result.stdout.splitlines()) == 3
    assert result.stdout.splitlines()[2].startswith(f"{DEAD}   dead")
    assert result.stdout.splitlines()[2].endswith(r"Permanent: quantity: \x1b[31mis too long")
    assert "\x1b" not in result.output
    assert "--limit shows more" in result.stderr


@OVER
async def test_show_tells_everything_of_one_action(over: str, bench: Bench) -> None:
    async with bench.reached(over):
        told = document(await bench.ask("outbox", "show", str(DEAD), "--json"))
        shown = await bench.ask("outbox", "show", str(DEAD))
        missing = await bench.ask("outbox", "show", "99")
    assert (told["id"], told["state"], told["attempt"]) == (DEAD, "dead", 1)
    assert "state       dead" in shown.stdout
    assert missing.exit_code == 1
    assert "there is no action 99" in missing.stderr


@OVER
async def test_retry_and_its_rehearsal(over: str, bench: Bench) -> None:
    async with bench.reached(over):
        rehearsed = await bench.ask("outbox", "retry", str(DEAD), "--dry-run")
        assert (await bench.states())[DEAD] == "dead"
        told = document(await bench.ask("outbox", "retry", str(DEAD), "--json"))
    assert rehearsed.stdout == "would try again: action 2, dead: report_usage of subject:2\n"
    assert told == {"retried": DEAD, "dry_run": False}
    assert (await bench.states())[DEAD] == "pending"


@OVER
@pytest.mark.parametrize("rehearsal", [[], ["--dry-run"]])
@pytest.mark.parametrize("words", [["retry"], ["discard", "--reason", "x"]])
@pytest.mark.parametrize("action_id", [DONE, 99])
async def test_what_is_settled_or_missing_cannot_be_changed(
    over: str, rehearsal: list[str], words: list[str], action_id: int, bench: Bench
) -> None:
    """The rehearsal fails where the act would."""
    before = await bench.states()
    async with bench.reached(over):
        result = await bench.ask("outbox", *words, str(action_id), *rehearsal)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: there is no")
    assert await bench.states() == before


@OVER
async def test_discard_keeps_the_reason(over: str, bench: Bench) -> None:
    words = ("outbox", "discard", str(DEAD), "--reason", "billed by hand")
    async with bench.reached(over):
        assert document(await bench.ask(*words, "--dry-run", "--json")) == {
            "discarded": DEAD,
            "dry_run": True,
        }
        assert (await bench.states())[DEAD] == "dead"
        assert (await bench.ask(*words)).exit_code == 0
        told = document(await bench.ask("outbox", "show", str(DEAD), "--json"))
    assert told["state"] == "discarded"
    assert told["error"].startswith("discarded: billed by hand; last error: ")


@OVER
@pytest.mark.parametrize(
    ("words", "replayed"),
    [
        ([], [DEAD, TIMED_OUT]),
        (["--cause", "timeout"], [TIMED_OUT]),
        (["--kind", "report_usage", "--limit", "1"], [DEAD]),
        (["--kind", "provision_plan"], []),
        (["--kind", "provision_plan", "--limit", "5"], []),
        (["--state", "pending"], [WAITING]),
        ([str(TIMED_OUT)], [TIMED_OUT]),
        ([str(TIMED_OUT), str(DEAD), "--limit", "1"], None),
    ],
)
async def test_replay_does_what_its_rehearsal_said(
    over: str, words: list[str], replayed: list[int] | None, bench: Bench
) -> None:
    """Exactly the selection lives again; an empty one is not everything."""
    before = await bench.states()
    async with bench.reached(over):
        rehearsed = await bench.ask("outbox", "replay", *words, "--dry-run", "--json")
        assert await bench.states() == before
        done = await bench.ask("outbox", "replay", *words, "--json")
    if replayed is None:  # one of two named was past the limit: said, and no success
        assert (rehearsed.exit_code, done.exit_code) == (1, 1)
        return
    assert document(rehearsed) == {"replayed": replayed, "dry_run": True}
    assert document(done) == {"replayed": replayed, "dry_run": False}
    assert await bench.states() == before | dict.fromkeys(replayed, "pending")


@OVER
async def test_replay_of_ids_that_are_not_dead_is_1(over: str, bench: Bench) -> None:
    async with bench.reached(over):
        result = await bench.ask("outbox", "replay", str(DONE), str(DEAD), "99")
    assert result.exit_code == 1
    assert result.stdout == "1 action(s) will be tried again\n"
    assert f"{DONE}, 99" in result.stderr


async def test_a_held_store_is_5_when_its_daemon_does_not_answer(bench: Bench) -> None:
    """Reading goes on; nothing is changed behind the back of whoever has the store."""
    before = await bench.states()
    async with Store(bench.url) as store:
        store.lock()
        for words in (
            ("outbox", "retry", str(DEAD)),
            ("outbox", "replay"),
            ("outbox", "discard", str(DEAD), "--reason", "x"),
            ("held", "release", "1"),
        ):
            result = await bench.ask(*words)
            assert result.exit_code == 5
            assert re.search("is held by (another process|process [0-9]+) ", result.stderr)
            assert "see that admin.listen is the daemon's own" in result.stderr
            assert "the daemon does not answer at unix:" in result.stderr
        assert (await bench.ask("outbox", "list")).exit_code == 0
    assert await bench.states() == before


@OVER
async def test_held_items_are_listed_and_released(over: str, bench: Bench) -> None:
    async with bench.reached(over):
        items = document(await bench.ask("held", "list", "--json"))["held"]
        shown = await bench.ask("held", "list")
        released = document(await bench.ask("held", "release", "1", "--json"))
        left = document(await bench.ask("held", "list", "--json"))
        again = await bench.ask("held", "release", "1")
    assert items == [
        {
            "id": 1,
            "kind": "late_usage",
            "subject": "usage:tag",
            "subscription": "sub-1",
            "add_on": "amplify-quota-q",
            "units": 12,
            "amount": "1.20",
            "currency": "USD",
            "reason": "It came late.",
            "since": "2026-03-02T10:00:00Z",
        }
    ]
    assert "It came late." in shown.stdout
    assert released == {"released": 1}
    assert left == {"held": []}
    assert again.exit_code == 1
    assert "there is no held item 1" in again.stderr


async def test_each_takes_a_dry_run_also_what_only_looks(bench: Bench) -> None:
    """The contract's words; a script may put it after whichever it calls."""
    before = await bench.states()
    told = document(await bench.ask("outbox", "show", str(DEAD), "--dry-run", "--json"))
    assert told == document(await bench.ask("outbox", "show", str(DEAD), "--json"))
    for words in (["list"], ["retry", str(DEAD)], ["replay"], ["discard", str(DEAD), "--reason", "why"]):
        assert (await bench.ask("outbox", *words, "--dry-run")).exit_code == 0
    assert await bench.states() == before
