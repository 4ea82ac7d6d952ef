"""What a person does on the page, and reads there."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

ANSWER_MS = 120_000


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
