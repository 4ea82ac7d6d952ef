"""Measure in a real browser: a run over questions and one over context lengths, from the start to the page Quality.

The page, the browser and the measuring commands are real; the servers are small ones that answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.page_steps import (
    ANSWER_MS,
    RUN_MS,
    ask,
    expect_apart,
    expect_states,
    fill,
    fill_own_questions,
    measure_button,
    open_in_quality,
    opened,
    page_over,
    settle,
)
from support.small_openai_server import OFFER, REPORT, SmallServer, report_of
from support.tiny_models import tiny_tokenizer
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

WIDTHS = (1920, 1440, 1280, 390)
NAMES = ("plain", "blend")
SETTING = "blend kv_deviation 15 %"
ONE_PIECE = ["Ann"]


@pytest.fixture
def servers() -> Iterator[tuple[SmallServer, SmallServer]]:
    """Plain and a blend."""
    report = REPORT | {"store_hits": 2, "store_misses": 0, "blend_ms": 1.0}
    found = SmallServer(pieces=ONE_PIECE), SmallServer(pieces=ONE_PIECE, offer=OFFER, report=report)
    yield found
    for server in found:
        server.go_on.set()
        server.stop()


@pytest.fixture
def page(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    servers: tuple[SmallServer, SmallServer],
) -> Iterator[Page]:
    """Measure over two servers, two documents and three questions on them; results go into `results`."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("one", "two"):
        (data / f"{name}.txt").write_text(f"This is {name}. " + f"The {name} of them is a word. " * 20)
    asked = [{"question": f"Who is number {number}?", "answers": ["Ann"]} for number in range(40)]
    (data / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("KVARENA_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("KVARENA_TOKENIZER", str(tmp_path / "model"))
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "home"))
    contenders: list[dict[str, Any]] = [
        {"name": name, "title": name.capitalize(), "url": server.url, "report": report_of(server)}
        for name, server in zip(NAMES, servers, strict=True)
    ]
    with ExitStack() as parts:
        url = parts.enter_context(page_over(contenders, data))
        page = parts.enter_context(opened(browser, url))
        page.get_by_role("link", name="Measure").click()
        expect(measure_button(page)).to_be_enabled(timeout=ANSWER_MS)
        settle(page)
        yield page


def choose_kind(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name).or_(page.get_by_role("button", name=name)).click()
    settle(page)


def choose_lengths(page: Page, lengths: str, num_repeats: int) -> None:
    choose_kind(page, "Context lengths")
    fill(page, "measure-lengths", lengths)
    fill(page, "measure-repeats", str(num_repeats))
    fill(page, "measure-ratios", "0.15")


def stop_amid(page: Page, server: SmallServer, num_asked: Callable[[], int], enough: int) -> None:
    """Once so many were asked of a server, it holds the next answers until the run has been stopped."""
    wait_until(lambda: num_asked() >= enough, timeout_s=RUN_MS / 1000)
    server.hold_after = 1
    wait_until(lambda: server.num_held, timeout_s=RUN_MS / 1000)
    expect(page.get_by_text(re.compile(r"^(asking|measuring): [1-9]\d* of \d+$"))).to_be_visible(timeout=ANSWER_MS)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Open in Quality")).to_be_visible(timeout=RUN_MS)


def only_result(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    (path,) = (tmp_path / "results").glob("run-*.json")
    return path.name, json.loads(path.read_text())


def test_questions_are_measured_to_the_end_and_opened_in_quality(page: Page, tmp_path: Path) -> None:
    fill(page, "measure-number", "3")
    fill(page, "measure-ratios", "0.15")
    measure_button(page).click()
    expect(page.get_by_role("button", name="Open in Quality")).to_be_visible(timeout=RUN_MS)
    for title in ("Time to first token, every answer", "Agreement (all questions)", "Right answers (all questions)"):
        expect(page.get_by_text(title)).to_be_visible(timeout=ANSWER_MS)
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(3, timeout=ANSWER_MS)
    name, result = only_result(tmp_path)
    assert not result["settings"]["is_interrupted"]
    assert len(result["answers"]) == 2 * 3
    page.get_by_text("The same from a terminal").click()
    expect(page.get_by_text(f".venv/bin/kvarena eval --questions {tmp_path}")).to_be_visible(timeout=ANSWER_MS)
    open_in_quality(page, name)


def test_a_reload_keeps_the_settings_of_every_kind_of_measurement(page: Page) -> None:
    """And the Arena doesn't take them for settings of its own."""
    measured = page.locator(".st-key-measured")
    measured.get_by_role("button", name="Clear all").click()
    settle(page)
    measured.locator("input").fill("Blend")
    page.get_by_role("option", name="Blend", exact=True).click()
    page.keyboard.press("Escape")
    settle(page)
    fill(page, "measure-number", "7")
    fill(page, "measure-max-tokens", "9")
    fill(page, "measure-ratios", "0.3")
    choose_kind(page, "My own questions")
    asked = "Whose is a <b>*lamp*</b>? | Ann's & Ben's\nWho is older?"
    fill_own_questions(page, asked)
    reload_measure(page)
    expect(page.locator(".st-key-measure-own-questions textarea")).to_have_value(asked, timeout=ANSWER_MS)
    for key, value in (("number", "7"), ("max-tokens", "9"), ("ratios", "0.3")):
        expect(page.locator(f".st-key-measure-{key} input")).to_have_value(value, timeout=ANSWER_MS)
    expect(measured).to_contain_text("Blend", timeout=ANSWER_MS)
    expect(measured).not_to_contain_text("Plain", timeout=ANSWER_MS)
    choose_lengths(page, "300", 4)
    reload_measure(page)
    expect(page.locator(".st-key-measure-lengths input")).to_have_value("300", timeout=ANSWER_MS)
    expect(page.locator(".st-key-measure-repeats input")).to_have_value("4", timeout=ANSWER_MS)
    page.get_by_role("link", name="Arena").click()
    page.get_by_test_id("context").wait_for(timeout=ANSWER_MS)
    settle(page)
    expect(page.get_by_text("settings that nothing here takes")).to_have_count(0)


def reload_measure(page: Page) -> None:
    page.reload()
    expect(measure_button(page)).to_be_visible(timeout=ANSWER_MS)
    settle(page)


def test_a_stopped_run_over_questions_keeps_what_was_answered(
    page: Page, servers: tuple[SmallServer, SmallServer], tmp_path: Path
) -> None:
    plain, _ = servers
    fill(page, "measure-number", "40")
    measure_button(page).click()
    stop_amid(page, plain, lambda: len(plain.completions()), enough=3)
    expect(page.get_by_text("Stopped: the figures are of the questions until then.")).to_be_visible(timeout=ANSWER_MS)
    name, result = only_result(tmp_path)
    assert result["settings"]["is_interrupted"]
    assert 3 <= len([one for one in result["answers"] if one["contender"] == "plain"]) < 40
    open_in_quality(page, name)


def test_context_lengths_are_measured_drawn_and_quoted_in_the_arena(
    page: Page, servers: tuple[SmallServer, SmallServer], tmp_path: Path
) -> None:
    choose_lengths(page, "300, 9000", 3)
    expect(page.get_by_text("9,000 tokens are too many for Plain")).to_be_visible(timeout=ANSWER_MS)
    expect(measure_button(page)).to_be_disabled(timeout=ANSWER_MS)
    fill(page, "measure-lengths", "300, 600")
    expect(measure_button(page)).to_be_enabled(timeout=ANSWER_MS)
    measure_button(page).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=ANSWER_MS)
    page.get_by_role("link", name="Arena").click()  # it goes on meanwhile
    page.get_by_test_id("context").wait_for(timeout=ANSWER_MS)
    page.get_by_role("link", name="Measure").click()
    expect(page.get_by_role("button", name="Open in Quality")).to_be_visible(timeout=RUN_MS)
    expect(page.locator(".st-key-measure-lengths input")).to_have_value("300, 600", timeout=ANSWER_MS)
    expect(page.locator(".st-key-measure-repeats input")).to_have_value("3", timeout=ANSWER_MS)
    said = page.get_by_test_id("length-verdict")
    expect(said).to_have_count(1, timeout=ANSWER_MS)
    expect(said).to_contain_text(f"{SETTING}: ", timeout=ANSWER_MS)
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(2, timeout=ANSWER_MS)
    name, result = only_result(tmp_path)
    assert [row["context_tokens"] for row in result["rows"]] == [300, 300, 600, 600]
    assert all((row["num_requests"], row["num_failed"]) == (3, 0) for row in result["rows"])
    plain, blend = servers
    assert min(map(len, plain.prompts())) >= 300
    assert len(blend.prompts()) > len(plain.prompts()), "its chunks were put into the cache before"
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        shown = page.locator(".ka-verdict b, .ka-verdict small, .ka-key, [data-testid=stWidgetLabel] p")
        assert shown.count() > 5
        expect_apart(shown, f"at {width} pixels")
    page.get_by_role("button", name="Open in Quality").scroll_into_view_if_needed()
    open_in_quality(page, name)
    expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible(timeout=ANSWER_MS)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.get_by_role("link", name="Arena").click()
    ask(page, "Who is it?")
    expect_states(page, plain="done", blend="done")
    expect(page.get_by_test_id("verdict")).to_contain_text("Measured over context lengths: ", timeout=ANSWER_MS)


def test_a_stopped_run_over_context_lengths_keeps_the_repetitions_so_far(
    page: Page, servers: tuple[SmallServer, SmallServer], tmp_path: Path
) -> None:
    plain, _ = servers
    choose_lengths(page, "300", 100)
    measure_button(page).click()
    stop_amid(page, plain, lambda: len(plain.prompts()), enough=6)
    expect(page.get_by_text("Stopped: the figures are of the lengths and repetitions until then.")).to_be_visible(
        timeout=ANSWER_MS
    )
    name, result = only_result(tmp_path)
    assert result["settings"]["is_interrupted"]
    assert [row["context_tokens"] for row in result["rows"]] == [300, 300]
    assert {row["num_requests"] for row in result["rows"]} <= set(range(4, 100))
    page.get_by_text("The same from a terminal").click()
    expect(page.get_by_text(".venv/bin/kvarena bench ttft --data")).to_be_visible(timeout=ANSWER_MS)
    open_in_quality(page, name)
