"""What is in sight in a real browser, over small servers: the newest turn, the verdict, a token's bubble."""

from __future__ import annotations

import time
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from support.page_steps import ask, expect_states, pane, pick_chunks, settle
from support.small_openai_server import REPORT
from support.small_page import ANSWER, NAMES, OpenPage, small_servers
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

SIZES = ((1440, 900), (1280, 720), (720, 450), (390, 844))
CLEAR_OF_VERDICT = """element => {
    const bar = document.querySelector(".st-key-verdict")?.parentElement ?? document.querySelector(".stAppHeader");
    const box = element.getBoundingClientRect(), below = document.querySelector(".stBottom").getBoundingClientRect();
    return box.top >= bar.getBoundingClientRect().bottom - 1 && box.bottom <= below.top + 1;
}"""
ROOM_BELOW_WORDS = """() => {
    const words = document.querySelector(".ka-answer").getBoundingClientRect();
    return [document.querySelector(".stBottom").getBoundingClientRect().top - words.bottom, words.height];
}"""
BUBBLE = """token => {
    const box = token.closest(".ka-tokens"), range = document.createRange(), style = getComputedStyle(token, "::after");
    const seen = box.getBoundingClientRect(), own = token.getBoundingClientRect();
    const edges = style.boxSizing === "border-box" ? 0 : 2 * parseFloat(style.paddingTop) + 2;
    const height = parseFloat(style.height) + edges;
    const shift = style.transform === "none" ? 0 : new DOMMatrix(style.transform).f;
    const top = seen.top - box.scrollTop + parseFloat(style.top) + parseFloat(style.marginTop) + shift;
    const room = {top: seen.top, bottom: seen.bottom, tokenTop: own.top, tokenBottom: own.bottom};
    return {position: getComputedStyle(box).position, bubbleTop: top, bubbleBottom: top + height, ...room};
}"""


def scroll_up(page: Page) -> None:
    """As a reader does, with the wheel."""
    page.mouse.move(800, 300)
    page.mouse.wheel(0, -20_000)
    wait_until(lambda: page.locator(".stMain").evaluate("main => main.scrollTop") == 0)


def expect_in_sight(question: Locator) -> None:
    """Below the verdict, and there it stays."""
    wait_until(lambda: bool(question.evaluate(CLEAR_OF_VERDICT)))
    settle(question.page)
    assert question.evaluate(CLEAR_OF_VERDICT)


@pytest.mark.parametrize("width", [1440, 390])
def test_a_tokens_bubble_stands_beside_it_and_leaves_the_page_where_it_is(open_page: OpenPage, width: int) -> None:
    servers = small_servers(2)
    servers[0].report = REPORT | {"recomputed_spans": [[0, 2], [60, 62], [9999, 10_000]]}
    page = open_page(*servers)
    pick_chunks(page, ["one", "two", "three"])
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    page.get_by_text("What was reused, token by token").click()
    tokens, main = page.get_by_test_id("prompt-tokens").first, page.locator(".stMain")
    expect(tokens).to_be_visible()
    page.set_viewport_size({"width": width, "height": 844})
    settle(page)
    count = tokens.locator("u").count()
    assert tokens.evaluate("box => box.scrollHeight > 1.2 * box.clientHeight")
    tokens.scroll_into_view_if_needed()
    settle(page)
    for index in (count - 1, count - 8, count // 2, 0):
        token = tokens.locator("u").nth(index)
        token.evaluate("token => token.scrollIntoView({block: 'nearest'})")
        page.wait_for_timeout(300)
        state = "main => [main.scrollTop, main.scrollHeight, main.scrollWidth]"
        before = main.evaluate(state), tokens.evaluate("box => [box.scrollTop, box.scrollHeight, box.scrollWidth]")
        token.click()
        page.wait_for_timeout(500)
        after = main.evaluate(state), tokens.evaluate("box => [box.scrollTop, box.scrollHeight, box.scrollWidth]")
        assert before == after, index
        found: dict[str, Any] = token.evaluate(BUBBLE)
        assert found["position"] == "relative"
        assert found["top"] <= found["bubbleTop"], (index, found)
        assert found["bubbleBottom"] <= found["bottom"], (index, found)
        gap = max(found["bubbleTop"] - found["tokenBottom"], found["tokenTop"] - found["bubbleBottom"])
        assert -4 < gap < 12, (index, found)


def test_what_is_asked_after_scrolling_up_comes_into_sight(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    page.set_viewport_size({"width": 1280, "height": 720})
    for number, question in enumerate(("Who is the mayor?", "And what does she keep?"), start=1):
        ask(page, question)
        expect(page.get_by_test_id("question")).to_have_count(number)
        expect_states(page, blend="done", plain="done")
        expect_in_sight(page.get_by_test_id("question").last)
    scroll_up(page)
    ask(page, "Who else is there?")
    expect(page.get_by_test_id("question")).to_have_count(3)
    expect_states(page, blend="done", plain="done")
    expect_in_sight(page.get_by_test_id("question").last)
    for number, name in enumerate(("Ask again", "In a new order", "With the settings on the left"), start=4):
        page.get_by_role("button", name=name).first.scroll_into_view_if_needed()
        settle(page)
        page.get_by_role("button", name=name).first.click()
        expect(page.get_by_test_id("question")).to_have_count(number)
        expect_states(page, blend="done", plain="done")
        expect_in_sight(page.get_by_test_id("question").last)
    page.reload()
    expect(page.get_by_test_id("question")).to_have_count(6, timeout=30_000)
    expect_in_sight(page.get_by_test_id("question").last)


def test_the_newest_words_stay_in_sight_until_the_reader_scrolls_up(open_page: OpenPage) -> None:
    servers = small_servers(2)
    for server in servers:
        server.pieces = [" a rather long word"] * 600
        server.delay_s = 0.02
    page = open_page(*servers)
    page.set_viewport_size({"width": 1280, "height": 720})
    ask(page, "Who is the mayor?")
    main = page.locator(".stMain")
    wait_until(lambda: bool(page.get_by_test_id("question").evaluate(CLEAR_OF_VERDICT)))
    wait_until(lambda: page.evaluate(ROOM_BELOW_WORDS)[1] > 700, timeout_s=60)
    for _ in range(4):
        page.wait_for_timeout(400)
        assert -40 < page.evaluate(ROOM_BELOW_WORDS)[0] < 60
    page.mouse.move(800, 300)
    for _ in range(3):
        page.mouse.wheel(0, -100)
        page.wait_for_timeout(60)
    page.wait_for_timeout(300)
    place = main.evaluate("main => main.scrollTop")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert abs(main.evaluate("main => main.scrollTop") - place) < 2
    assert pane(page, "blend").get_attribute("data-state") == "streaming"


@pytest.mark.parametrize("count", [2, 5])
def test_the_verdict_takes_a_quarter_of_the_window_at_most_and_cuts_nothing(open_page: OpenPage, count: int) -> None:
    page = open_page(*small_servers(count))
    page.locator(".st-key-big-screen label").first.click()
    ask(page, "Who is the mayor?")
    expect_states(page, **dict.fromkeys(NAMES[:count], "done"))
    page.get_by_role("button", name="Ask again").first.click()
    expect(page.get_by_test_id("question")).to_have_count(2)
    expect_states(page, **dict.fromkeys(NAMES[:count], "done"))
    expect(page.get_by_test_id("verdict")).to_have_count(count - 1)
    bar = page.locator(":has(> .st-key-verdict)")
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        settle(page)
        page.get_by_test_id("answer-blend").last.evaluate("answer => answer.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(300)
        box = bar.bounding_box()
        assert box
        assert box["height"] <= height / 4 + 1, (width, height)
        is_cut = bar.evaluate("bar => bar.scrollHeight > bar.clientHeight + 1")
        sign = bar.evaluate("bar => getComputedStyle(bar, '::after').content")
        assert is_cut == (sign not in ("none", "normal")), (width, height, sign)
        top = page.get_by_test_id("answer-blend").last.bounding_box()
        assert top
        assert top["y"] >= box["y"] + box["height"], "scrolled to, it stands below the verdict"
    assert "".join(ANSWER) in page.get_by_test_id("answer-blend").last.inner_text()
