"""A real headless Chromium, and what each test demands of it: no error, no violation, no outside."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = os.environ.get("BILLINGD_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SETTINGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NEEDED = f"needs Chromium at {CHROMIUM}: apt-get install chromium (or name another in BILLINGD_CHROMIUM)"
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
  (event) => violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""
WAIT_MS = 60_000
"""Far more than anything here takes."""


def chromium() -> Iterator[Browser]:
    """A browser for a fixture. Skips where there is none, saying how to get one."""
    if not Path(CHROMIUM).exists():
        pytest.skip(NEEDED)
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SETTINGS)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser,
    address: str,
    *,
    script: bool = True,
    may_fail: tuple[str, ...] = (),
) -> Iterator[Page]:
    """The page at that address. Fails at its end for a console message, a violation, a request elsewhere.

    `may_fail` are words of console messages that a test provokes.
    """
    context: BrowserContext = browser.new_context(
        viewport={"width": 1200, "height": 900},
        java_script_enabled=script,
        reduced_motion="reduce",
    )
    context.set_default_timeout(WAIT_MS)
    said: list[str] = []
    page = context.new_page()
    page.add_init_script(VIOLATIONS)
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(address) else said.append(f"asks {request.url}"),
    )
    page.goto(f"{address}/")
    yield page
    violations = page.evaluate("window.violations") if script else []
    context.close()
    assert violations == []
    assert [one for one in said if not any(word in one for word in may_fail)] == []


def shots() -> Path:
    """Where screenshots go: ignored by git, kept by CI."""
    folder = Path(__file__).parent.parent / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
