"""Logs: one grep follows an event, and no secret or address is in any line."""

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from processes import call, rehearsal, until

from billingd import logs
from billingd.domain.attempts import describe
from billingd.domain.privacy import forms, without_addresses

MAIL = "planted.person@mail.example.org"
URL = "https://x/?q=planted.person%40mail.example.org&n=1"
SECRET = "pl4nted/secret word"


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged within; the process's own set-up is put back."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handlers, logging.root.handlers[:] = logging.root.handlers[:], []
    try:
        yield stream
    finally:
        logging.root.handlers[:] = handlers
        structlog.reset_defaults()


def test_secrets_and_addresses_are_blotted_out_of_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also out of lists, exceptions, other libraries' lines, and in the forms in which they are sent."""
    with logged(monkeypatch) as stream:
        logs.configure(json=True, blotter=logs.Blotter([SECRET]))
        log = structlog.get_logger().new()
        log.warning("one", text=f"it said {SECRET} to {MAIL}", about=[MAIL, {"deep": SECRET}], number=7)
        log.warning("two", text=" ".join(forms([SECRET])), url=URL)
        try:
            raise ValueError(f"{MAIL} {SECRET}")
        except ValueError:
            log.exception("three", error=ValueError(MAIL))
        logging.getLogger("some.library").warning("%s of %s", SECRET, MAIL)
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [one["event"] for one in said] == ["one", "two", "three", "[hidden] of [hidden]"]
    assert said[1]["url"] == "https://x/?q=[hidden]&n=1"
    assert said[0]["number"] == 7
    assert said[0]["text"] == "it said [hidden] to [hidden]"
    text = json.dumps(said)
    for form in [MAIL, "planted.person", "pl4nted", *forms([SECRET])]:
        assert form not in text, form


def test_a_secret_that_is_taken_over_later_is_hidden_by_loggers_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the one that it took the place of still is."""
    monkeypatch.setattr(logs, "CACHED", True)
    with logged(monkeypatch) as stream:
        blotter = logs.Blotter([SECRET])
        logs.configure(json=True, blotter=blotter)
        log = structlog.get_logger()
        log.warning("before", text=SECRET)
        blotter.learn(["brand-new-secret another-one"])
        log.warning("after", text=f"{SECRET} brand-new-secret")
        logging.getLogger("some.library").warning("another-one")
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [one.get("text") or one["event"] for one in said] == ["[hidden]", "[hidden] [hidden]", "[hidden]"]


def test_an_error_that_is_kept_has_no_address_in_it() -> None:
    assert describe(ValueError(f"Recurly answered 422: email {MAIL} is taken")) == (
        "ValueError: Recurly answered 422: email [hidden] is taken"
    )
    unharmed = "sqlite+aiosqlite:////var/x, amplify-user-1, postgresql+asyncpg://b:***@/db, user@host, 5 @ 3"
    assert without_addresses(unharmed) == unharmed


def test_journald_is_told_the_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when it is journald that reads standard error, as systemd names it."""
    with (tmp_path / "journal").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not logs.to_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        logs.configure(json=True)
        log = structlog.get_logger().new()
        log.error("bad")
        log.info("good")
        structlog.reset_defaults()
        stream.seek(0)
        bad, good = stream.read().splitlines()
    assert bad.startswith('<3>{"')
    assert json.loads(good.removeprefix("<6>"))["event"] == "good"


def test_one_grep_follows_an_event_to_recurlys_request_id(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """The real process: webhook, action, every write with its request id, the notices; and nothing personal.

    One write gets no clear answer at first, so that it is seen in each of its attempts.
    """
    with rehearsal(tmp_path, free_port, f"sqlite+aiosqlite:///{tmp_path}/billingd.db") as (sandbox, daemon):
        mailbox = sandbox.base.replace("http://", "json://", 1) + "/control/mailbox"
        daemon.start(
            BILLINGD_LOG_LEVEL="debug",
            BILLINGD_NOTIFICATIONS__PROVIDER=json.dumps([mailbox]),
            BILLINGD_NOTIFICATIONS__SUBSCRIBER=f"{mailbox}?+to={{email}}",
            BILLINGD_ACCOUNTS__MISSING="create",
        )
        daemon.ready()
        sandbox.do("products", name="weather", attributes={"billingSystem": "recurly"})
        sandbox.do("plans", name="metered", product="weather", quotas=[{"name": "calls"}])
        until("the plan is linked", lambda: daemon.status()["links"]["plans"] == 1)
        sandbox.do("faults", side="recurly", method="POST", path="**/subscriptions", kind="500", times=1)
        made = sandbox.do("subscribe", plan="metered", name="acme", user="Planted Person", email=MAIL)
        until("it is approved", lambda: sandbox.ledger()["subscriptions"][0]["approval"] == "approved")
        sandbox.do("traffic", subscription=made["metadata"]["id"], units=3)
        until("it is reported", lambda: daemon.status()["traffic"]["reported_units"] == 3)
        until("both are told", lambda: len(call(f"{sandbox.base}/control/mailbox")["letters"]) >= 3)
        daemon.terminate()
        secrets = sandbox.secrets().values()
    text = (tmp_path / "billingd.log").read_text()
    for hidden in [MAIL, "planted.person", "Planted Person", *forms(secrets)]:
        assert hidden not in text, hidden
    said = [json.loads(line) for line in text.splitlines()]
    creations = [
        one
        for one in said
        if one["event"] == "recurly.call" and one["operation"].startswith("create subscription")
    ]
    assert [one["outcome"] for one in creations][-1] == "ok"
    assert len(creations) > 1
    assert all(len(one["request"]) == 32 for one in creations)
    [correlation] = {one["correlation"] for one in creations}
    grepped = [json.loads(line) for line in text.splitlines() if correlation in line]
    events = [one["event"] for one in grepped]
    assert events[0] in {"webhook.accepted", "event.caught_up"}
    assert {"recurly.call", "amplify.call", "action.settled", "notice.sent"} <= set(events)
    assert {one["kind"] for one in grepped if one["event"] == "action.settled"} >= {
        "provision_subscription",
        "notify_subscriber",
    }
