"""What a person does on the page, and reads there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, expect

ANSWER_MS = 120_000
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """The open page. The test fails when anything in it asked for an address beyond loopback."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("websocket", lambda websocket: addresses.append(websocket.url))
    page.goto(url)
    page.get_by_test_id("context").wait_for(timeout=60_000)
    yield page
    page.close()
    assert addresses
    assert not [url for url in addresses if not _is_local(url)]


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about") or parts.hostname in LOOPBACK


def pick_chunks(page: Page, names: list[str]) -> None:
    """The first page of a server that has just started takes its time, and loses a click until it is drawn."""
    settle(page)
    chunks = page.locator(".st-key-chunks")
    chunks.get_by_role("button", name="Clear all").click()
    settle(page)
    for name in names:
        chunks.locator("input").fill(name)
        page.get_by_role("option", name=name, exact=True).click()
        expect(page.get_by_test_id("chunk").last).to_have_attribute("data-chunk", name, timeout=30_000)
    page.keyboard.press("Escape")


def ask(page: Page, question: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled(timeout=ANSWER_MS)
    settle(page)
    box.fill(question)
    expect(box).to_have_value(question)
    box.press("Enter")
    expect(page.get_by_test_id("question").last).to_have_text(question, timeout=30_000)


def settle(page: Page) -> None:
    """Until the page has drawn what the last click led to; the click takes a moment to reach the script."""
    page.wait_for_timeout(500)
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=30_000)


def pane(page: Page, name: str) -> Locator:
    return page.get_by_test_id(f"pane-{name}").last


def expect_states(page: Page, **states: str) -> None:
    for name, state in states.items():
        expect(pane(page, name)).to_have_attribute("data-state", state, timeout=ANSWER_MS)


def answer_text(page: Page, name: str) -> str:
    return page.get_by_test_id(f"answer-{name}").last.inner_text().strip()


def figures(page: Page, name: str) -> dict[str, float | None]:
    found = pane(page, name).locator("[data-figure]").all()
    pairs = [(item.get_attribute("data-figure") or "", item.get_attribute("data-value")) for item in found]
    return {key: float(value) if value else None for key, value in pairs}


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        time.sleep(0.05)
