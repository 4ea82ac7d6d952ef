"""Conversations in a real browser, over the ai100 contender's host runtime on a tiny model, in this process."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from ai100.server import router
from support.ai100_engine import AI100, make_ai100
from support.page_steps import ask, expect_apart, expect_states, opened, page_over, pane, settle
from support.real_server import serving
from support.tiny_models import save_tiny_model
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

WIDTHS = (1920, 1440, 1280, 390)
HEIGHT = 844
MOST_OF_HEIGHT = 0.35
OpenPage = Callable[[], Page]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ai100") / "llama")


@pytest.fixture
def ai100(folder: Path) -> AI100:
    return make_ai100(folder)


@pytest.fixture
def url(ai100: AI100, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the page over this server; chats are kept in a folder of the test's own."""
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "home"))
    with serving(ai100.engine, routers=[router]) as server:
        contender = {"name": "ai100", "title": "Slots", "url": server.url, "report": "slots"}
        with page_over([contender], tmp_path) as url:
            yield url


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[OpenPage]:
    with ExitStack() as pages:

        def open_one() -> Page:
            page = pages.enter_context(opened(browser, url))
            page.get_by_role("link", name="Conversations").click()
            page.get_by_test_id("slots").wait_for(timeout=60_000)
            settle(page)
            return page

        yield open_one


def box(page: Page) -> Locator:
    return page.get_by_test_id("stChatInputTextArea")


def type_question(page: Page, text: str) -> None:
    box(page).click()
    box(page).fill("")
    page.keyboard.type(text)


def expect_topic(page: Page, topic: str, told: str) -> None:
    chip = page.get_by_test_id("next-topic")
    expect(chip).to_have_attribute("data-topic", topic, timeout=30_000)
    expect(chip).to_have_text(told, timeout=30_000)


def choose_topic(page: Page, topic: str) -> None:
    chosen = page.locator(".st-key-next-topic input")
    chosen.click()
    page.keyboard.type(topic)
    page.keyboard.press("Enter")


def ask_and_wait(page: Page, question: str) -> None:
    ask(page, question)
    expect_states(page, cached="done", uncached="done")
    settle(page)


def test_the_topic_shows_while_a_question_is_typed_and_can_be_changed(open_page: OpenPage, ai100: AI100) -> None:
    page = open_page()
    expect_topic(page, "", "Its topic shows as you type")
    type_question(page, "river")
    expect_topic(page, "water", "Begins the topic water")
    expect(box(page)).to_be_focused()
    expect(box(page)).to_have_value("river")
    page.keyboard.type(" bread bread bread tea")
    expect_topic(page, "food", "Begins the topic food")
    assert not ai100.runtime.prefills, "nothing was computed"
    expect(page.get_by_test_id("slot-0")).to_have_attribute("data-topic", "")
    page.keyboard.press("Enter")
    expect_states(page, cached="done", uncached="done")
    expect(pane(page, "cached").get_by_test_id("slot-turn")).to_contain_text("food", timeout=30_000)
    settle(page)
    expect_topic(page, "", "Its topic shows as you type")

    type_question(page, "And why?")
    expect_topic(page, "food", "Goes to food")
    choose_topic(page, "<b>*mine*</b>")
    expect_topic(page, "<b>*mine*</b>", "Begins the topic <b>*mine*</b>, as you chose")
    expect(box(page)).to_have_value("And why?")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": HEIGHT})
        settle(page)
        parts = [page.get_by_test_id("next-topic"), page.locator(".st-key-next-topic input"), box(page)]
        wait_until(partial(are_apart, page, parts, width), f"they overlap at {width}")
    box(page).press("Enter")
    expect(pane(page, "cached").get_by_test_id("slot-turn")).to_contain_text("<b>*mine*</b>", timeout=60_000)
    expect_states(page, cached="done", uncached="done")
    expect(page.locator(".st-key-next-topic input")).to_have_value("The server finds it")


Place = tuple[float, float, float, float]


def place(part: Locator) -> Place:
    """Left, top, right and bottom."""
    found = part.bounding_box()
    assert found is not None
    return found["x"], found["y"], found["x"] + found["width"], found["y"] + found["height"]


def are_apart(page: Page, parts: Sequence[Locator], width: int) -> bool:
    places = [place(part) for part in parts]
    is_within = all(left >= 0 and right <= width for left, _, right, _ in places)
    is_clear = not any(overlap(a, b) for a, b in itertools.combinations(places, 2))
    return is_within and is_clear and bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def overlap(a: Place, b: Place) -> bool:
    return a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 1 and b[1] < a[3] - 1


def test_the_slots_leave_most_of_the_window_to_the_chat(open_page: OpenPage) -> None:
    page = open_page()
    for question in ("river", "bread", "hill", "goat"):
        ask_and_wait(page, question)
    expect(page.get_by_test_id("slot-history")).to_contain_text("replaced slot", timeout=30_000)
    expect(page.get_by_test_id("saved")).to_have_attribute("data-tone", re.compile("gain|tie|loss"))
    texts = page.locator(".ka-slot-head > *, .ka-slot small, [data-testid=slot-history], [data-testid=saved]")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": HEIGHT})
        settle(page)
        _, top, _, bottom = place(page.locator(":has(> .st-key-slots)"))
        assert bottom - top <= MOST_OF_HEIGHT * HEIGHT, f"at {width} pixels"
        expect_apart(texts, f"at {width} pixels")


def test_two_tabs_on_a_conversation_see_where_the_next_message_goes(
    open_page: OpenPage, browser: Browser, ai100: AI100
) -> None:
    """What was typed stays where the other tab goes on, and is then told anew."""
    page = open_page()
    other = browser.new_page()
    other.goto(page.url)
    other.get_by_test_id("slots").wait_for(timeout=60_000)
    settle(other)
    type_question(other, "And why?")
    expect(other.get_by_test_id("next-topic")).to_contain_text("Begins the topic", timeout=30_000)
    ask_and_wait(page, "bread **tea** <i>tea</i>")
    expect(other.get_by_test_id("question")).to_have_text(["bread **tea** <i>tea</i>"], timeout=60_000)
    expect(box(other)).to_have_value("And why?")
    expect_topic(other, "food", "Goes to food")
    other.reload()
    expect(other.get_by_test_id("question")).to_have_count(1, timeout=60_000)
    other.close()


def test_enter_before_the_topic_is_told_and_twice_asks_once(open_page: OpenPage) -> None:
    page = open_page()
    type_question(page, "goat")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect_states(page, cached="done", uncached="done")
    settle(page)
    expect(page.get_by_test_id("question")).to_have_text(["goat"])
    expect(box(page)).to_be_focused()
    expect_topic(page, "", "Its topic shows as you type")


def test_a_reload_keeps_the_settings_before_and_after_a_question(open_page: OpenPage) -> None:
    page = open_page()
    prompt = page.locator(".st-key-conversation-system textarea")
    tokens = page.locator(".st-key-conversation-max-tokens input")
    prompt.fill("Be <b>*old*</b>.")
    prompt.press("Control+Enter")
    settle(page)
    tokens.fill("5")
    tokens.press("Enter")
    settle(page)
    page.locator(".st-key-modes").get_by_text("With slots").click()
    settle(page)
    for _ in range(2):
        page.reload()
        page.get_by_test_id("slots").wait_for(timeout=60_000)
        settle(page)
        expect(prompt).to_have_value("Be <b>*old*</b>.", timeout=30_000)
        expect(tokens).to_have_value("5", timeout=30_000)
        ask(page, "river")
        expect_states(page, cached="done")
        expect(page.get_by_test_id("pane-uncached")).to_have_count(0)
        settle(page)
