"""What a person does on the page, and reads there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, Locator, Page, expect

from support.lmcache_server import free_port
from support.page_forks import FRONTEND, forked_page
from support.waiting import wait_until

ANSWER_MS = 120_000
RUN_MS = 4 * ANSWER_MS
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@contextmanager
def page_over(
    contenders: Sequence[Mapping[str, Any]], data_dir: Path, services: Sequence[Mapping[str, str]] = ()
) -> Iterator[str]:
    """The address of the page, in a process of its own, over these contenders, services behind them and documents."""
    port = free_port()
    settings = {"KVARENA_CONTENDERS": json.dumps(contenders), "KVARENA_DATA_DIR": str(data_dir)}
    settings |= {"KVARENA_SERVICES": json.dumps(services)}
    arguments = ["run", str(FRONTEND / "app.py"), "--server.headless", "true", "--server.address", "127.0.0.1"]
    arguments += ["--server.port", str(port), "--browser.gatherUsageStats", "false"]
    with forked_page(arguments, os.environ | settings):
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/_stcore/health"))
        yield f"http://127.0.0.1:{port}"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5, verify=False).is_success
    except httpx.TransportError:
        return False


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


def shown_order(page: Page) -> list[str | None]:
    return [chunk.get_attribute("data-chunk") for chunk in page.get_by_test_id("chunk").all()]


def drag_chunk(page: Page, name: str, target: str) -> None:
    """With the mouse, as a hand does it: press, move in steps, let go a little past the target's middle."""
    settle(page)
    expect(page.locator(".st-key-chunk-order iframe")).to_have_count(1)  # the list before the last pick has gone
    items = page.frame_locator(".st-key-chunk-order iframe").locator(".sortable-item")
    source, onto = items.filter(has_text=name), items.filter(has_text=target)
    source.scroll_into_view_if_needed()
    a, b = source.bounding_box(), onto.bounding_box()
    assert a is not None
    assert b is not None
    page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    page.mouse.down()
    past = 4 if b["y"] > a["y"] else -4
    page.mouse.move(b["x"] + b["width"] / 2, b["y"] + b["height"] / 2 + past, steps=12)
    page.wait_for_timeout(200)
    page.mouse.up()


def drag_into_order(page: Page, name: str, target: str, order: list[str]) -> None:
    """A hand tries again where the list was drawn anew under it."""
    for timeout_s in (10, 10, 20):
        drag_chunk(page, name, target)
        try:
            wait_until(lambda: shown_order(page) == order, timeout_s=timeout_s)
        except AssertionError:
            continue
        return
    assert shown_order(page) == order


def ask(page: Page, question: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled(timeout=ANSWER_MS)
    settle(page)
    box.fill(question)
    expect(box).to_have_value(question)
    box.press("Enter")
    expect(page.get_by_test_id("question").last).to_have_text(question, timeout=30_000)


def settle(page: Page) -> None:
    """Until the page has drawn what the last click led to; the click takes a moment to reach the script, which may be
    run once more right after.
    """
    for _ in range(2):
        page.wait_for_timeout(250)
        expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=30_000)


def overlapping(elements: Locator) -> list[str]:
    """Texts of which a part lies over another's, or sticks out of its element or of the window. Of a part that scrolls
    what is in sight counts, of a control its whole box.
    """
    found: list[str] = elements.evaluate_all(
        """elements => {
            const seen = (e, box) => {
                let {left, right, top, bottom} = box;
                for (let at = e.parentElement; at; at = at.parentElement) {
                    const style = getComputedStyle(at), clip = at.getBoundingClientRect();
                    if (style.overflowX !== 'visible') {
                        left = Math.max(left, clip.left); right = Math.min(right, clip.right);
                    }
                    if (style.overflowY !== 'visible') {
                        top = Math.max(top, clip.top); bottom = Math.min(bottom, clip.bottom);
                    }
                }
                return {left, right, top, bottom};
            };
            const boxes = elements.filter(e => e.checkVisibility()).map(e => {
                const range = document.createRange(); range.selectNodeContents(e);
                const own = e.getBoundingClientRect();
                const whole = e.dataset.testid === 'stElementContainer' ? own : range.getBoundingClientRect();
                return {e, text: e.innerText || e.className, whole, own, box: seen(e, whole)};
            }).filter(b => b.box.right > b.box.left && b.box.bottom > b.box.top);
            const bad = boxes.filter(b => b.whole.right > b.own.right + 1 || b.box.right > innerWidth + 1);
            for (const [i, a] of boxes.entries()) for (const b of boxes.slice(i + 1)) {
                if (a.box.left < b.box.right - 1 && b.box.left < a.box.right - 1
                    && a.box.top < b.box.bottom - 6 && b.box.top < a.box.bottom - 6
                    && !a.e.contains(b.e) && !b.e.contains(a.e)) bad.push(a, b);
            }
            return bad.map(b => b.text);
        }"""
    )
    return found


def expect_apart(elements: Locator, what: str) -> None:
    """Once the layout has come to rest, none of them lies over another, and the page is no wider than its window."""
    for _ in range(60):
        found, page = overlapping(elements), elements.page
        is_wider = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        if not found and not is_wider:
            return
        page.wait_for_timeout(250)
    raise AssertionError(f"{what}: {found or 'wider than the window'}")


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


def num_reused(figures: Mapping[str, float | None]) -> float:
    return (figures["num_prefix_tokens"] or 0) + (figures["num_moved_tokens"] or 0)


# -- Measure -----------------------------------------------------------------------------------------------------------


def measure_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Start", exact=True)


def fill(page: Page, key: str, value: str) -> None:
    box = page.locator(f".st-key-{key} input")
    box.fill(value)
    box.press("Enter")
    settle(page)
    expect(box).to_have_value(value, timeout=ANSWER_MS)


def fill_own_questions(page: Page, text: str) -> None:
    """One in each line."""
    box = page.locator(".st-key-measure-own-questions textarea")
    box.fill(text)
    box.press("Control+Enter")
    settle(page)
    expect(box).to_have_value(text, timeout=ANSWER_MS)


def open_in_quality(page: Page, name: str = "run-") -> None:
    """The result of the run that has ended; `name` is part of its file's."""
    page.get_by_role("button", name="Open in Quality").click()
    expect(page.get_by_text("what reused KV costs in answers")).to_be_visible(timeout=ANSWER_MS)
    chosen = page.get_by_role("combobox", name="Result file")
    expect(chosen).to_have_value(re.compile(re.escape(name)), timeout=ANSWER_MS)
    expect(page.get_by_test_id("stException")).to_have_count(0, timeout=ANSWER_MS)
