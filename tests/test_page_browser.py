"""The page in a real Chromium: how it looks, on a phone too, and that it says no more than it should."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page_bench as bench
import pytest
from browsing import chromium, opened, shots
from page_bench import NOW, Behind
from playwright.sync_api import Browser, expect

from billingd.domain.attempts import Action
from billingd.domain.errors import Retryable

WIDE, PHONE = 1200, 360


async def empty(_: Behind) -> None:
    """A store just made."""


FILLS: dict[str, Callable[[Behind], Any]] = {
    "empty": empty,
    "busy": lambda behind: bench.busy(behind.store),
    "trouble": lambda behind: bench.trouble(behind.store, behind.sides),
    "hostile": lambda behind: bench.hostile(behind.store),
}


@pytest.fixture(scope="module")
def browser(sqlite_template: Path) -> Iterator[Browser]:
    assert sqlite_template.exists()  # made before: while a browser is open, its loop is this thread's
    yield from chromium()


@pytest.fixture
def url(tmp_path: Path, sqlite_template: Path) -> str:
    shutil.copy(sqlite_template, tmp_path / "billingd.db")
    return f"sqlite+aiosqlite:///{tmp_path / 'billingd.db'}"


CONTRAST = """
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => top.slice(0, 3).map((c, i) => (c * top[3] + below[i] * (255 - top[3])) / 255);
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!own || !node.checkVisibility() || node.closest("svg, .hidden, .skip, dialog, script")) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(node).color)), luminance(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${node.outerHTML.slice(0, 80)} ${ratio.toFixed(2)}`);
  }
  return poor;
}
"""
NAMELESS = """
() => [...document.querySelectorAll("button, a, input, textarea, svg[role=img], section:not([hidden])")]
  .filter((node) => !node.closest("dialog") && node.checkVisibility())
  .filter((node) => {
    const label = node.getAttribute("aria-label") || "";
    const by = node.getAttribute("aria-labelledby");
    return !(label.trim() || (by && document.getElementById(by)) || node.textContent.trim());
  }).map((node) => node.outerHTML.slice(0, 100))
"""


@pytest.mark.parametrize("state", FILLS)
def test_it_is_readable_on_a_phone_and_in_the_dark(browser: Browser, url: str, state: str) -> None:
    """Nothing sticks out at 360 px, all text has contrast, everything has a name; with pictures of it."""
    with bench.in_thread(url, FILLS[state]) as (address, _), opened(browser, address) as page:
        grounds = set()
        tables = page.get_by_role("table")
        assert tables.count() == page.locator("table:has([role=columnheader])").count()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for width, name in ((WIDE, ""), (PHONE, "-phone")):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") == width
                page.screenshot(path=shots() / f"{state}-{scheme}{name}.png", full_page=True)
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate(NAMELESS) == []
        assert len(grounds) == 2


def test_a_hostile_title_is_text(browser: Browser, url: str) -> None:
    """Neither on the page nor after it has updated itself, nor in the question a button asks."""
    with bench.in_thread(url, FILLS["hostile"]) as (address, _), opened(browser, address) as page:
        updated(page)
        expect(page.get_by_text(bench.HOSTILE, exact=True).first).to_be_visible()
        assert page.locator("main img, main script, dialog img").count() == 0
        page.get_by_role("button", name="Discard").first.click()
        expect(page.get_by_role("dialog")).to_contain_text("Discard: ")


def updated(page: Any) -> None:
    """Let it ask again now, as it does by itself."""
    page.get_by_role("button", name="Pause updates").click()
    with page.expect_response(lambda answer: answer.request.resource_type == "fetch"):
        page.get_by_role("button", name="Go on updating").click()


def test_it_updates_itself_and_leaves_alone_what_did_not_change(browser: Browser, url: str) -> None:
    """Focus and selection stay; what is new is there; a daemon that is away is told of, and its return."""
    with (
        bench.in_thread(url, FILLS["trouble"]) as (address, behind),
        opened(browser, address, may_fail=("Failed to load resource",)) as page,
    ):
        page.clock.install()
        page.reload()
        retry = page.get_by_role("button", name="Retry: provision_plan #9")
        retry.focus()
        page.evaluate("document.querySelector('[data-key=action-9]').mine = true")
        behind.sides["Recurly"].last_error = "<i>another</i> error"
        page.clock.fast_forward(5_500)
        expect(page.locator(".verdict")).to_contain_text("<i>another</i> error")
        expect(retry).to_be_focused()
        assert page.evaluate("document.querySelector('[data-key=action-9]').mine") is True
        page.route("**/", lambda route: route.abort())
        page.clock.fast_forward(5_500)
        expect(page.get_by_role("alert")).to_contain_text("billingd does not answer")
        assert page.title() == "No answer · billingd"
        page.unroute("**/")
        page.clock.fast_forward(5_500)
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page).to_have_title("Money is not flowing as it should · billingd")
        with page.expect_request("**/"):  # taken, and never answered: it hangs, or the tunnel does
            page.route("**/", lambda route: None)
            page.clock.fast_forward(5_500)
        page.clock.fast_forward(10_500)
        expect(page.get_by_role("alert")).to_contain_text("does not answer (nothing came for 10 s)")
        page.unroute("**/")
        page.clock.fast_forward(5_500)
        expect(page.get_by_role("alert")).to_be_hidden()


def test_without_script_it_tells_the_commands_instead(browser: Browser, url: str) -> None:
    """No button that would do nothing; the browser itself loads it anew."""
    with (
        bench.in_thread(url, FILLS["trouble"]) as (address, _),
        opened(browser, address, script=False) as page,
    ):
        expect(page.get_by_text("Money is not flowing")).to_be_visible()
        assert page.locator("button:visible").count() == 0
        expect(page.get_by_text("billingd outbox retry 9", exact=True)).to_be_visible()
        assert page.locator("noscript meta[http-equiv=refresh]").count() == 1


def test_a_refusal_is_told_and_nothing_is_sent_without_a_reason(browser: Browser, url: str) -> None:
    """The keyboard alone is enough: Enter opens, Escape leaves, and the focus returns."""

    async def one(behind: Behind) -> None:
        await bench.dead(behind.store, Action("report_usage", "usage:s1", "d"), error="boom", at=NOW)
        behind.asked.fault = Retryable("Amplify is away")

    with (
        bench.in_thread(url, one) as (address, _),
        opened(browser, address, may_fail=("503 (Service Unavailable)",)) as page,
    ):
        discard = page.get_by_role("button", name="Discard")
        discard.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_label("Why is it given up?")).to_be_focused()
        page.keyboard.type("   ")
        page.get_by_role("dialog").get_by_role("button", name="Discard").click()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(discard).to_be_focused()
        page.get_by_role("button", name="Poll now").click()
        expect(page.locator("#said")).to_have_text("Poll now: traffic, refused: Amplify is away")
        expect(page.get_by_role("button", name="Poll now")).to_be_enabled()


def test_another_page_can_neither_frame_it_nor_send_to_it(browser: Browser, url: str) -> None:
    """A page of another origin on this machine, with all that a script can try."""

    async def one(behind: Behind) -> None:
        await bench.dead(behind.store, Action("report_usage", "usage:s1", "d"), error="boom", at=NOW)

    with bench.in_thread(url, one) as (address, _):
        page = browser.new_page()
        elsewhere = "http://attacker.localhost:9/"
        page.route(elsewhere, lambda route: route.fulfill(body="<body></body>", content_type="text/html"))
        page.goto(elsewhere)
        tried = page.evaluate(
            """async (address) => {
              const sent = { method: "POST", body: "{}", mode: "cors",
                headers: { "Content-Type": "application/json", "X-Billingd": "1" } };
              const simple = { method: "POST", body: "{}", mode: "no-cors" };
              const told = (promise) => promise.then((answer) => answer.type, (error) => error.name);
              return [
                await told(fetch(`${address}/outbox/replay`, sent)),
                await told(fetch(`${address}/outbox/replay`, simple)),
                await told(fetch(`${address}/status`, { mode: "cors" })),
              ];
            }""",
            address,
        )
        assert tried[0] == tried[2] == "TypeError"
        page.evaluate(
            "(address) => { const frame = document.createElement('iframe'); frame.src = address;"
            " document.body.append(frame); return new Promise((done) => { frame.onload = done; }); }",
            f"{address}/",
        )
        assert all("Dead letters" not in frame.content() for frame in page.frames[1:])
        page.close()
        with opened(browser, address) as own:
            expect(own.locator("[data-key=action-1]")).to_be_visible()
