"""What an operator clicks on the page, against the real daemon and a sandbox, and what comes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsing import chromium, opened, shots
from playwright.sync_api import Browser, Page, expect
from processes import Daemon, Sandbox, call, open_shop, rehearsal, subscribe, until

AS_NEEDED = {
    "BILLINGD_OUTBOX__ATTEMPTS_MAX": "1",
    "BILLINGD_OUTBOX__BACKOFF_MAX": "1h",  # nothing held is looked at again by itself
    "BILLINGD_TRAFFIC__SCHEDULE": "1h",  # nor traffic read
    "BILLINGD_CATCH_UP__WATCH_TOPIC": "",
}


@pytest.fixture(scope="module")
def browser(sqlite_template: Path) -> Iterator[Browser]:
    assert sqlite_template.exists()  # made before: while a browser is open, its loop is this thread's
    yield from chromium()


def approved(sandbox: Sandbox) -> list[str]:
    return sorted(one["name"] for one in sandbox.ledger()["subscriptions"] if one["approval"] == "approved")


def dead(daemon: Daemon, kind: str) -> dict[str, int]:
    """Numbers of the dead letters of a kind, by subject."""
    rows = call(f"{daemon.admin}/outbox?state=dead&kind={kind}")["actions"]
    return {row["subject"]: row["id"] for row in rows}


def refused(sandbox: Sandbox, daemon: Daemon, *names: str) -> dict[str, int]:
    """Subscribe while Amplify fails: their dead letters by name."""
    sandbox.do("faults", side="amplify", method="GET", path="**/subscriptions/*", kind="500", times=None)
    before = set(dead(daemon, "provision_subscription").values())
    ids = {name: subscribe(sandbox, name) for name in names}
    wanted = len(names)
    until(
        "they are dead letters",
        lambda: len(set(dead(daemon, "provision_subscription").values()) - before) == wanted,
        said=lambda: call(f"{daemon.admin}/outbox"),
    )
    call(f"{sandbox.base}/control/faults", method="DELETE")
    found = dead(daemon, "provision_subscription")
    return {name: found[f"subscription:{of}"] for name, of in ids.items()}


def ask(page: Page, button: str, *, reason: str | None = None) -> None:
    """Click a button and answer what it asks."""
    page.get_by_role("button", name=button).click()
    dialog = page.get_by_role("dialog")
    if reason is not None:
        dialog.get_by_role("textbox").fill(reason)
    dialog.locator("[type=submit]").click()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_an_operator_mends_everything_from_the_page(
    browser: Browser, tmp_path: Path, store_url: str, free_port: Callable[[], int]
) -> None:
    """Retry, discard, replay all, release, poll now, write off: each does what it says."""
    with rehearsal(tmp_path, free_port, store_url) as (sandbox, daemon):
        open_shop(sandbox)
        daemon.start(**AS_NEEDED)
        daemon.ready()
        until("the plan is linked", lambda: daemon.status()["links"]["plans"] == 1)
        letters = refused(sandbox, daemon, "ada", "bob", "cyd")
        with opened(browser, daemon.admin) as page:
            expect(page.get_by_role("heading", name="something waits for you")).to_be_visible()
            assert page.locator("[data-part=dead] tbody tr").count() == 3

            page.get_by_role("button", name=f"Retry: provision_subscription #{letters['ada']}").click()
            expect(page.locator(f"[data-part=dead] [data-key=action-{letters['ada']}]")).to_have_count(0)
            until("the retried one is provisioned", lambda: approved(sandbox) == ["ada"])

            ask(page, f"Discard: provision_subscription #{letters['bob']}", reason="bob <b>left</b>")
            expect(page.locator(f"[data-part=dead] [data-key=action-{letters['bob']}]")).to_have_count(0)
            given_up = call(f"{daemon.admin}/outbox/{letters['bob']}")
            assert given_up["state"] == "discarded"
            assert given_up["error"].startswith("discarded: bob <b>left</b>; ")
            expect(page.locator("[data-part=happened]")).to_contain_text("by an operator: bob <b>left</b>")

            refused(sandbox, daemon, "dan")
            page.reload()
            ask(page, "Replay all: 2 dead letters")
            expect(page.locator("[data-part=dead]")).to_contain_text("None.")
            until("both are provisioned", lambda: approved(sandbox) == ["ada", "cyd", "dan"])

            made = sandbox.do("subscribe", plan="metered", name="eve", team="team eve")
            until("one is held", lambda: daemon.status()["held"]["subscriptions"] == 1)
            page.reload()
            expect(page.locator("[data-part=held]")).to_contain_text("account_missing")
            page.screenshot(path=shots() / "journey-held.png", full_page=True)
            team = made["marketplace"]["resource"]["owner"]["id"]
            sandbox.do("accounts", code=f"amplify-team-{team}")
            page.get_by_role("button", name="Release: account_missing").click()
            expect(page.locator("[data-part=held]")).to_contain_text("Nothing.")
            until("it is provisioned", lambda: "eve" in approved(sandbox))

            sandbox.do("faults", side="recurly", method="POST", path="**/usage", kind="422", times=None)
            sandbox.do("traffic", subscription="ada", units=7)

            def polled() -> bool:
                page.get_by_role("button", name="Poll now").click()
                expect(page.locator("#said")).to_have_text("Poll now: traffic, done")
                return int(daemon.status()["traffic"]["recorded_units"]) == 7

            until("what was served is recorded", polled)
            until("its report is dead", lambda: len(dead(daemon, "report_usage")) == 1)
            [number] = dead(daemon, "report_usage").values()
            ask(page, f"Discard: report_usage #{number}", reason="billed by hand")
            expect(page.locator("[data-part=held]")).to_contain_text("usage_discarded")
            ask(page, "Write off: usage_discarded", reason="seven units")
            expect(page.locator("[data-part=held]")).to_contain_text("Nothing.")
            assert daemon.status()["traffic"]["written_off_units"] == 7

            call(f"{sandbox.base}/control/faults", method="DELETE")
            sandbox.do("traffic", subscription="cyd", units=5)
            until("the next is reported", lambda: not polled() and reported(daemon) == 5)
            page.reload()
            subscribed = page.locator("[data-part=subscriptions]").get_by_role("row")
            expect(subscribed.filter(has_text="cyd")).to_contain_text("5 5 5 0")
            page.screenshot(path=shots() / "journey.png", full_page=True)
        assert daemon.terminate() == 0


def reported(daemon: Daemon) -> int:
    return int(daemon.status()["traffic"]["reported_units"])
