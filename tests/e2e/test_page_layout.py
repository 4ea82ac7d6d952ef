"""How the page looks in a real browser, over small servers: nothing overlaps or is cut, at any width."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FloatRect, Page, expect

from support.contrast import faint_texts
from support.page_steps import (
    ask,
    expect_apart,
    expect_states,
    pane,
    settle,
)
from support.small_openai_server import OFFER, SmallServer
from support.small_page import ANSWER, NAMES, OpenPage, choose, small_servers
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

WIDTHS = (1920, 1440, 1280, 390)
TURN = ", ".join(
    (
        ".ka-question, .ka-one-sample, [class*=st-key-again-] button p, [data-testid=stCheckbox] p",
        ".ka-pane-head b, .ka-badge, .ka-answer, .ka-same, .ka-differs, .ka-legend .ka-key",
        ".ka-figure span, .ka-figure b",
        ".ka-waterfall > b, .ka-lane > b, .ka-lane > span, .ka-lane small, .ka-ticks span",
        ".ka-watched > b, .ka-watched small, .ka-log dt, .ka-log dd",
    )
)


SIDEBAR = "[data-testid=stSidebar] [data-testid=stElementContainer]"


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_nothing_overlaps_at_any_width(open_page: OpenPage, count: int) -> None:
    """Of a turn whose first answer differs from the exact ones, with probabilities."""
    servers = small_servers(count)
    servers[0].pieces = [*ANSWER[:3], " Ben", *ANSWER[4:]]
    times = {"fetch_ms": 0.3, "move_ms": 0.4, "select_ms": 0.2, "recompute_ms": 0.5, "blend_ms": 1.4}
    servers[0].report |= times | {"in_pieces": False}
    for server in servers:
        server.timings = {"queue_time_ms": 0.2, "time_to_first_token_ms": 1.6}
    page = open_page(*servers)
    page.locator(".st-key-probabilities label").first.click()
    settle(page)
    ask(page, "Who is the mayor?")
    expect_states(page, **dict.fromkeys(NAMES[:count], "done"))
    expect(page.locator(".ka-p").first).to_be_visible()
    expect(page.locator(".ka-differs")).to_have_count(min(count - 1, 1))
    expect(page.locator("[data-decode]")).to_have_count(count)
    page.get_by_text("See the servers").click()
    for name in NAMES[:count]:
        expect(page.get_by_test_id(f"watched-{name}").get_by_test_id("log-line")).to_be_visible()
    main, verdict = page.get_by_test_id("stMainBlockContainer"), page.get_by_test_id("verdict")
    expect(verdict).to_have_count(count - 1)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        assert main.locator(TURN).count() >= 30 * count
        assert page.locator(SIDEBAR).count() >= 20
        for what, elements in (
            ("turn", main.locator(TURN)),
            ("verdict", verdict.locator("b, small")),
            ("sidebar", page.locator(SIDEBAR)),
        ):
            expect_apart(elements, f"{what} at {width} pixels")


def test_more_than_three_contenders_are_rows_and_a_phone_has_bars_above_panes_to_swipe(open_page: OpenPage) -> None:
    page = open_page(*small_servers(4))
    ask(page, "Who is the mayor?")
    expect_states(page, **dict.fromkeys(NAMES[:4], "done"))
    boxes = [pane(page, name).bounding_box() for name in NAMES[:4]]
    assert len({box["x"] for box in boxes if box}) == 1, "one under the other"
    page.locator(".st-key-run-third label").first.click()
    page.locator(".st-key-run-fourth label").first.click()
    ask(page, "And what does she keep?")
    expect_states(page, blend="done", plain="done")
    page.set_viewport_size({"width": 390, "height": 844})
    settle(page)
    page.get_by_test_id("question").last.scroll_into_view_if_needed()
    bars, box = page.get_by_test_id("waterfall").last, page.get_by_test_id("stChatInput")
    parts = bars, pane(page, "blend"), pane(page, "plain"), page.get_by_test_id("answer-blend").last, box
    wait_until(lambda: are_swiped(*(found.bounding_box() for found in parts)))


def are_swiped(*boxes: FloatRect | None) -> bool:
    """Bars, below them two panes side by side, of which the second sticks out of a phone but begins well inside, and
    the beginning of an answer in sight above the question box.
    """
    if not all(boxes):
        return False
    bars, first, second, answer, box = (box for box in boxes if box)
    is_below = bars["y"] + bars["height"] <= first["y"] == second["y"] and 0 < answer["y"] + 24 < box["y"]
    return is_below and first["x"] + first["width"] < second["x"] <= 310 and second["x"] + second["width"] > 390


def test_results_of_other_kinds_are_drawn_and_two_are_compared(open_page: OpenPage) -> None:
    page = open_page(*small_servers(1))
    page.get_by_role("link", name="Quality").click()
    charts, keys = page.get_by_test_id("stVegaLiteChart"), page.locator(".ka-key, .ka-bars b, .ka-bars .ka-lane > span")
    for name, num_charts in (("calibrate-smollm2", 4), ("ttft-180m-native-cold", 0)):
        choose(page, "Result file", f"{name}.json")
        expect(charts).to_have_count(num_charts)
        assert keys.count() >= 2
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            expect_apart(keys, f"{name} at {width} pixels")
    page.set_viewport_size({"width": 1440, "height": 900})
    choose(page, "Result file", "eval-smollm2.json")
    choose(page, "Compare with", "eval-smollm2-seed7.json")
    expect(charts).to_have_count(3)
    expect(page.get_by_text("Right answers: the second file less the first, over 24 questions in both")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_is(open_page: OpenPage, scheme: Any) -> None:
    page = open_page(*small_servers(2))
    page.emulate_media(color_scheme=scheme)
    page.reload()
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    for place in (".stApp", ".ka-question", ".ka-chunk"):
        assert (brightness(page, place, "backgroundColor") < 0.5) == (scheme == "dark"), place
        assert (brightness(page, place, "color") > 0.5) == (scheme == "dark"), place


def brightness(page: Page, place: str, of: str) -> float:
    """From 0, black, to 1, white."""
    colour = page.locator(place).first.evaluate(f"element => getComputedStyle(element).{of}")
    return sum(int(value) for value in re.findall(r"\d+", colour)[:3]) / 3 / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(open_page: OpenPage, scheme: Any) -> None:
    page = open_page(SmallServer(pieces=[*ANSWER[:3], " Ben", *ANSWER[4:]], offer=OFFER), SmallServer(pieces=ANSWER))
    page.emulate_media(color_scheme=scheme)
    page.reload()
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    page.get_by_text("See the servers").click()
    page.get_by_text("What was reused, token by token").click()
    expect(page.get_by_test_id("prompt-tokens")).to_have_count(2)
    settle(page)
    wait_until(lambda: not faint_texts(page), timeout_s=5)
    for name in ("Measure", "Conversations", "Quality"):
        page.get_by_role("link", name=name).click()
        expect(page.locator(".ka-title")).to_contain_text(name)
        settle(page)
        assert not faint_texts(page), name


def test_an_example_is_read_whole_and_the_box_is_as_wide_as_the_content(open_page: OpenPage, tmp_path: Path) -> None:
    question = "Who is the mayor of the town between the rivers, and what does she keep in the garden behind her hall?"
    entry = {"question": question, "answers": ["Ann"], "chunks": ["one"], "example": True}
    (tmp_path / "questions.jsonl").write_text(json.dumps(entry))
    page = open_page(*small_servers(2))
    example = page.locator(".st-key-example-0 button p")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        expect(example).to_be_visible()
        wait_until(lambda: example.evaluate("p => p.scrollWidth <= p.closest('button').clientWidth"), timeout_s=5)
        places = page.get_by_test_id("stChatInput"), page.locator(".st-key-context-view")
        edges = [place.bounding_box() for place in places]
        assert len({(box["x"], box["width"]) for box in edges if box}) == 1, f"{edges} at {width} pixels"


def test_a_big_screen_has_large_type_also_after_a_reload(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    settle(page)
    before = sizes(page)
    page.get_by_test_id("stChatInputTextArea").fill("Who")
    big = page.locator(".st-key-big-screen label").first
    big.click()
    page.wait_for_function("getComputedStyle(document.documentElement).fontSize === '24px'")
    expect(page).to_have_url(re.compile("big-screen=true"))
    expect(page.get_by_test_id("stChatInputTextArea")).to_have_value("Who")
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    settle(page)
    switched = sizes(page)
    page.reload()
    page.wait_for_function("getComputedStyle(document.documentElement).fontSize === '24px'")
    expect(page.get_by_test_id("pane-plain")).to_be_visible(timeout=30_000)
    settle(page)
    assert sizes(page) == switched
    page.get_by_text("See the servers").click()
    expect(page.get_by_test_id("watched-plain").get_by_test_id("log-line")).to_be_visible()
    for width, height in ((1920, 1080), (1280, 720)):
        page.set_viewport_size({"width": width, "height": height})
        settle(page)
        expect_apart(page.get_by_test_id("stMainBlockContainer").locator(TURN), f"on a big screen of {width} pixels")
    assert page.locator(f"{TURN}, .ka-chunk-head, .ka-server small").evaluate_all(SMALL, 22) == []
    verdict = page.get_by_test_id("verdict").locator("b")
    assert verdict.evaluate_all(SMALL, 24) == []
    page.set_viewport_size({"width": 720, "height": 400})
    expect(page.locator("html")).to_have_attribute("data-verdict", re.compile("compact"))
    expect(verdict.locator(".ka-short")).to_be_visible()
    assert verdict.evaluate_all(SMALL, 24) == [], "shortened, too"
    page.set_viewport_size({"width": 1280, "height": 720})
    settle(page)
    big.click()
    page.wait_for_function("getComputedStyle(document.documentElement).fontSize === '15px'")
    settle(page)
    assert sizes(page) == before


SMALL = """(elements, least) => elements.filter((e) => parseFloat(getComputedStyle(e).fontSize) < least && e.className)
    .map((e) => e.outerHTML.slice(0, 100))"""


def sizes(page: Page) -> tuple[float, float]:
    """Of a help icon and of the empty question box."""
    places = page.locator("[data-testid=stTooltipIcon] svg").first, page.get_by_test_id("stChatInput")
    icon, box = (place.evaluate("element => element.getBoundingClientRect().height") for place in places)
    return icon, box
