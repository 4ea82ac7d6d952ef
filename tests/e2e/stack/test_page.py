"""A person at the page, against the real stack: picks, drags, asks, reads, stops; a server dies."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from kvarena.documents import load_chunks
from support.page_steps import (
    ANSWER_MS,
    RUN_MS,
    answer_text,
    ask,
    drag_into_order,
    expect_states,
    figures,
    fill,
    fill_own_questions,
    measure_button,
    open_in_quality,
    opened,
    pane,
    pick_chunks,
    settle,
)
from support.running_stack import Stack
from support.small_eval_result import small_eval_result
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("blend", "plain")
KINDS = ("prefix", "moved", "recomputed", "computed")
LONG_ANSWER_TOKENS = 7000


@pytest.fixture(scope="module", autouse=True)
def filled_store(stack: Stack) -> None:
    """Whatever tests before these did to LMCache, its chunks are there."""
    warmed = stack.command("warm", timeout_s=500)
    assert warmed.returncode == 0, warmed.stdout + warmed.stderr


def across_questions() -> list[dict[str, Any]]:
    """Shipped questions whose answer needs a chunk and the one before it."""
    lines = (ROOT / "backend" / "models" / "town" / "notes" / "questions.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "across"]


def ask_at_length(page: Page, question: str, num_tokens: int) -> None:
    """The town model's answers are a word or two: goes on to `num_tokens`, as the page's switch allows."""
    box = page.locator(".st-key-max-tokens input")
    box.fill(str(num_tokens))
    box.press("Enter")
    switch = page.locator(".st-key-ignore-eos input")
    if not switch.is_checked():
        page.locator(".st-key-ignore-eos label").first.click()
    expect(switch).to_be_checked()
    settle(page)
    ask(page, question)


def test_pick_reorder_ask_and_read_the_figures(page: Page) -> None:
    example = across_questions()[0]
    context = example["chunks"]
    first = min(context.index(example["needs"][0]), len(context) - 4)
    needed = context[first : first + 4]
    assert set(example["needs"]) <= set(needed)
    pick_chunks(page, [needed[1], needed[0], *needed[2:]])
    drag_into_order(page, needed[0], needed[1], needed)
    settle(page)
    ask(page, example["question"])
    expect_states(page, blend="done", plain="done")

    assert {answer_text(page, name) for name in NAMES} == set(example["answers"])
    blend, plain = (figures(page, name) for name in NAMES)
    for side in (blend, plain):
        assert side["num_prompt_tokens"] == sum(side[f"num_{kind}_tokens"] or 0 for kind in KINDS)
        assert (side["first_token_ms"] or 0) > 0
        assert (side["total_ms"] or 0) >= (side["first_token_ms"] or 0)
        assert (side["num_output_tokens"] or 0) >= 1
    assert blend["num_prompt_tokens"] == plain["num_prompt_tokens"]
    assert (blend["num_moved_tokens"] or 0) > 0
    assert (blend["num_recomputed_tokens"] or 0) > 0
    assert plain["num_recomputed_tokens"] == 0
    expect(pane(page, "blend")).to_contain_text("approximate")
    expect(pane(page, "plain")).to_contain_text("exact")
    assert_speed_line_tells_the_truth(page, blend, plain)


def assert_speed_line_tells_the_truth(
    page: Page, blend: dict[str, float | None], plain: dict[str, float | None]
) -> None:
    line = page.get_by_test_id("speed-up").last
    times = {"blend": blend["first_token_ms"] or 0, "plain": plain["first_token_ms"] or 0}
    winner = min(times, key=lambda name: times[name])
    expect(line).to_have_attribute("data-winner", winner)
    factor = max(times.values()) / min(times.values())
    text = line.inner_text()
    if factor >= 1.06:
        said = float(text.split(":")[1].split()[0])
        assert said == pytest.approx(factor, rel=0.06)


def test_context_shows_boundaries_that_add_up(page: Page) -> None:
    names = [chunk.name for chunk in load_chunks(ROOT / "backend" / "models" / "town" / "notes")][:3]
    pick_chunks(page, names)
    settle(page)
    title = page.locator(".st-key-context-view summary, .st-key-context-view button").first.inner_text()
    told = re.search(r"chunks, ([\d,]+) tokens; a blend recomputes about ([\d,]+) of the chunks' ([\d,]+)", title)
    assert told, title
    total, num_recomputed, num_of_chunks = (int(number.replace(",", "")) for number in told.groups())
    spans = [text.inner_text().replace(",", "").split() for text in page.get_by_test_id("chunk-tokens").all()]
    places = [(int(words[0]), int(words[4]), int(words[6])) for words in spans]
    assert all(end - start == count for count, start, end in places)
    assert all(a[2] < b[1] for a, b in itertools.pairwise(places)), "a separator lies between"
    assert places[-1][2] < total
    assert num_of_chunks == places[-1][2] - places[0][1]
    assert 0 < num_recomputed < num_of_chunks


def test_real_servers_end_what_was_stopped(page: Page, stack: Stack) -> None:
    """Again where an answer was through in spite of its length; `test_under_way.py` has those that can't be."""
    for attempt in range(5):
        ask_at_length(page, f"What does everybody drink on day {attempt}?", LONG_ANSWER_TOKENS)
        wait_until(lambda: all(answer_text(page, name) for name in NAMES))
        page.locator(".st-key-stop button").click()
        for name in NAMES:
            expect(pane(page, name)).to_have_attribute("data-state", re.compile("done|interrupted"), timeout=ANSWER_MS)
        wait_until(lambda: all(stack.num_running_requests(name) == 0 for name in NAMES))
        if all(pane(page, name).get_attribute("data-state") == "interrupted" for name in NAMES):
            break
        page.locator(".st-key-new-chat button").click()
        expect(page.get_by_test_id("question")).to_have_count(0)
    expect_states(page, blend="interrupted", plain="interrupted")
    assert all(answer_text(page, name) for name in NAMES)

    ask_at_length(page, "And what does nobody drink?", 8)
    expect_states(page, blend="done", plain="done")


def test_an_answer_of_a_real_server_goes_on_over_a_reload(page: Page) -> None:
    ask_at_length(page, "What does everybody sow?", 2000)
    wait_until(lambda: all(answer_text(page, name) for name in NAMES))
    page.reload()
    for name in NAMES:
        expect(pane(page, name)).to_have_attribute("data-state", "done", timeout=2 * ANSWER_MS)
        assert figures(page, name)["num_output_tokens"] == 2000


def test_quality_of_a_result_file_and_back_to_the_chat(page: Page, tmp_path: Path) -> None:
    ask(page, "What does everybody play?")
    expect_states(page, blend="done", plain="done")
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(small_eval_result()))
    page.get_by_role("link", name="Quality").click()
    page.get_by_role("button", name="Open a file").click()
    page.locator(".st-key-upload input[type=file]").set_input_files(path)
    expect(page.get_by_role("combobox", name="Result file")).to_have_value("measured.json")
    page.keyboard.press("Escape")
    settle(page)
    charts = page.get_by_test_id("stVegaLiteChart")
    expect(charts).to_have_count(2)
    for chart in charts.all():
        expect(chart.locator("canvas, svg").first).to_be_visible()
    expect(page.get_by_test_id("stDataFrame").first).to_be_visible()
    metrics = page.get_by_role("radiogroup", name="Metric")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        is_whole = partial(metrics.evaluate, "row => row.scrollWidth <= row.clientWidth")
        wait_until(is_whole, f"cut at {width} pixels", timeout_s=15)
    page.set_viewport_size({"width": 1440, "height": 900})

    page.get_by_role("link", name="Arena").click()
    expect(page.get_by_test_id("question")).to_have_text(["What does everybody play?"])


def test_what_the_servers_tell_is_shown_and_a_turn_is_repeated_voted_on_and_found_again(
    page: Page, browser: Browser, stack: Stack
) -> None:
    """What `test_page_view.py` and `test_under_way.py` see over small servers, once over the real ones, in two tabs and
    after a restart of the page.
    """
    page.locator(".st-key-probabilities label").first.click()
    settle(page)
    ask(page, "What does everybody play?")
    expect_states(page, blend="done", plain="done")
    settle(page)
    expect(page.get_by_test_id("answer-plain").locator("u").first).to_have_attribute("title", re.compile("%"))
    expect(page.get_by_text("Where the time to the first token goes")).to_be_visible()
    expect(page.get_by_test_id("difference-blend")).to_have_count(1)
    page.get_by_text("What was reused, token by token").click()
    prompts = page.get_by_test_id("prompt-tokens")
    expect(prompts).to_have_count(2, timeout=30_000)
    for name, prompt in zip(NAMES, prompts.all(), strict=True):
        assert prompt.locator("u").count() == figures(page, name)["num_prompt_tokens"]
    page.get_by_text("See the servers").click()
    for name in NAMES:
        line = page.get_by_test_id(f"watched-{name}").get_by_test_id("log-line").first
        expect(line).to_contain_text("request_id", timeout=30_000)
    page.get_by_label("Only figures with").fill("ttft")
    page.get_by_label("Only figures with").press("Enter")
    for name in NAMES:
        line = page.get_by_test_id(f"watched-{name}").get_by_test_id("log-line").first
        expect(line.locator("dt")).to_have_text(["ttft_ms"], timeout=30_000)
    page.get_by_text("See the servers").click()  # it is drawn anew all the time

    page.locator(".st-key-blind label").first.click()
    settle(page)
    with opened(browser, page.url) as other:
        page.get_by_role("button", name="In a new order").click()
        for tab in (page, other):
            expect(tab.get_by_test_id("again")).to_have_text("Asked again: the chunks in a new order", timeout=30_000)
            expect_states(tab, A="done", B="done")
        assert [answer_text(other, side) for side in "AB"] == [answer_text(page, side) for side in "AB"]
    page.get_by_role("button", name="B is best").click(timeout=ANSWER_MS)
    expect_states(page, blend="done", plain="done")
    expect(page.get_by_test_id("verdict")).to_contain_text("prompt")
    expect(page.get_by_text("Your vote: B, ")).to_be_visible()
    kept = [answer_text(page, name) for name in NAMES]
    restarted = stack.command("restart", "page")
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    page.reload()
    expect_states(page, blend="done", plain="done")
    assert [answer_text(page, name) for name in NAMES] == kept
    settle(page)

    page.locator(".st-key-share button").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON", exact=True).click()
    told = json.loads(download.value.path().read_text())
    assert [turn["answers"]["blend"]["text"].strip() for turn in told["turns"]][-1] == kept[0]
    assert [one["num_timed"] + len(one["agrees"]) > 0 for one in told["verdicts"]] == [True]
    assert told["votes"]


def test_a_turn_is_asked_with_other_settings_explained_token_by_token_and_exported(
    page: Page, stack: Stack, tmp_path: Path
) -> None:
    ask(page, "What does everybody play?")
    expect_states(page, blend="done", plain="done")
    settle(page)
    page.get_by_role("button", name="Ask again").click()
    again = page.get_by_test_id("again")
    expect(again).to_have_text(["Asked again: the same prompt and settings"], timeout=30_000)
    expect_states(page, blend="done", plain="done")
    expect(page.get_by_role("combobox", name="Policy")).to_have_value("kv_deviation")
    page.locator(".st-key-probabilities label").first.click()
    settle(page)
    page.get_by_role("button", name="With the settings on the left").last.click()
    expect(again).to_have_count(2, timeout=30_000)
    expect_states(page, blend="done", plain="done")
    settle(page)
    expect(again.last).to_have_text("Asked again: other settings")
    page.get_by_role("button", name="In a new order").last.click()  # with the same settings, and out of no prefix cache
    expect(again).to_have_count(3, timeout=30_000)
    expect_states(page, blend="done", plain="done")
    settle(page)
    expect(page.get_by_test_id("verdict").last).to_have_attribute("data-tone", re.compile("^(gain|tie|loss)$"))
    for name in NAMES:
        lane = page.get_by_test_id(f"lane-{name}").last
        assert float(lane.get_attribute("data-ms") or 0) == pytest.approx(figures(page, name)["first_token_ms"], 1e-4)
        expect(lane.locator("[data-decode]")).to_have_count(1)
        bars = lane.locator("[data-stage]").evaluate_all("bars => bars.map(bar => Object.entries(bar.dataset))")
        stages = {dict(bar)["stage"]: float(dict(bar)["ms"]) for bar in bars}
        assert {"blend": {"http", "move", "recompute", "question"}, "plain": {"http", "prefill"}}[name] <= stages.keys()
        assert sum(stages.values()) == pytest.approx(figures(page, name)["first_token_ms"], abs=0.1)

    page.get_by_text("What was reused, token by token").last.click()
    recomputed = page.get_by_test_id("prompt-tokens").first.locator('[data-kind="recomputed"] u')
    assert figures(page, "blend")["num_recomputed_tokens"]
    expect(recomputed).to_have_count(int(figures(page, "blend")["num_recomputed_tokens"] or 0), timeout=30_000)
    told = [str(title) for title in recomputed.evaluate_all("tokens => tokens.map(token => token.title)")]
    assert all(re.search(r"\n.+: [\d.e+-]+", title) for title in told), "by what score each was chosen"
    leaning = next(at for at, title in enumerate(told) if re.search(r"\nleans on .+: [\d.]+%", title))
    recomputed.nth(leaning).click()
    assert "leans on" in recomputed.nth(leaning).evaluate("token => getComputedStyle(token, '::after').content")

    page.locator(".st-key-share button").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown", exact=True).click()
    markdown = download.value.path().read_text()
    assert all(text in markdown for text in ("# KV Arena: a chat", "What does everybody play?", "kv_deviation"))
    with page.expect_download() as download:
        page.get_by_role("button", name="curl commands").click()
    script = tmp_path / "chat.sh"
    script.write_text(download.value.path().read_text())
    environment = os.environ | {"KVARENA_API_KEY": stack.api_key, "NO_PROXY": "*"}
    ran = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("[DONE]") == 4 * len(NAMES)


def test_a_text_is_pasted_edited_and_asked_about_and_what_is_too_much_dropped(page: Page) -> None:
    page.get_by_text("Paste a text").click()
    paste(page, "Thea keeps bees in the old mill. " * 6)
    uploaded = page.locator('[data-testid="upload"][data-document="pasted.txt"]')
    expect(uploaded).to_have_attribute("data-state", "filled", timeout=60_000)
    settle(page)
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator('[class*="st-key-text-"] textarea').fill("Thea keeps owls in the old mill. " * 6)
    page.keyboard.press("Control+Enter")
    settle(page)
    page.get_by_role("button", name="Keep", exact=True).click()
    settle(page)
    page.keyboard.press("Escape")
    expect(uploaded).to_have_attribute("data-state", "filled", timeout=60_000)
    page.get_by_role("button", name="Only this", exact=True).click()
    expect(page.get_by_test_id("chunk")).to_have_count(1, timeout=30_000)
    expect(page.get_by_test_id("chunk")).to_contain_text("Thea keeps owls")
    ask(page, "What does Thea keep?")
    expect_states(page, blend="done", plain="done")

    settle(page)
    page.locator('[class*="st-key-remove-"] button:visible').click()
    settle(page)
    page.locator(".st-key-fill-at-once label").first.click()  # it would take a while, and nobody asks about it
    settle(page)
    limit = re.search(r"context of ([\d,]+) tokens", page.get_by_test_id("server-blend").inner_text())
    assert limit
    paste(page, "The lamp in the hall is green. " * (int(limit.group(1).replace(",", "")) // 5))
    expect(uploaded).to_contain_text("cold: KV not filled", timeout=30_000)
    settle(page)
    page.get_by_role("button", name="Only this", exact=True).click()
    drop = page.get_by_role("button", name=re.compile("^Drop the last"))
    expect(drop).to_be_in_viewport(timeout=60_000)
    num_chunks = page.get_by_test_id("chunk").count()
    drop.click()
    expect(drop).to_have_count(0, timeout=60_000)
    assert 0 < page.get_by_test_id("chunk").count() < num_chunks


def paste(page: Page, text: str) -> None:
    page.locator(".st-key-paste-text textarea").fill(text)
    page.keyboard.press("Control+Enter")  # the page has the text before the button is pressed
    settle(page)
    page.locator(".st-key-paste-add button").click()


@pytest.mark.parametrize("over", ["Questions of the folder", "My own questions", "Context lengths"])
def test_real_servers_are_measured_and_the_result_is_opened(page: Page, over: str) -> None:
    """What `test_measure.py` sees over small servers, once over the real ones; the shuffles are stopped."""
    is_stopped = over == "My own questions"
    page.get_by_role("link", name="Measure").click()
    expect(measure_button(page)).to_be_enabled(timeout=ANSWER_MS)
    settle(page)
    if over != "Questions of the folder":
        page.get_by_role("radio", name=over).or_(page.get_by_role("button", name=over)).click()
        settle(page)
    if over == "Context lengths":
        fill(page, "measure-lengths", "300, 900")
        fill(page, "measure-repeats", "3")
    else:
        fill(page, "measure-number", "200" if is_stopped else "3")
    if is_stopped:
        fill_own_questions(page, "What does everybody play?")
    fill(page, "measure-ratios", "0.15")
    measure_button(page).click()
    if is_stopped:
        expect(page.get_by_text(re.compile(r"^asking: [1-9]\d* of \d+"))).to_be_visible(timeout=RUN_MS)
        page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Open in Quality")).to_be_visible(timeout=RUN_MS)
    told = page.get_by_test_id("length-verdict") if over == "Context lengths" else page.get_by_text("every answer")
    expect(told.first).to_be_visible(timeout=ANSWER_MS)
    expect(page.get_by_text("Stopped: the figures are of the questions until then.")).to_have_count(int(is_stopped))
    open_in_quality(page)
    expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible(timeout=ANSWER_MS)


def test_a_new_chat_begins_with_an_example(page: Page) -> None:
    ask(page, "What does everybody play?")
    expect_states(page, blend="done", plain="done")
    page.locator(".st-key-new-chat button").click()
    expect(page.get_by_test_id("question")).to_have_count(0)
    page.locator(".st-key-example-2 button").click()
    expect_states(page, blend="done", plain="done")
    expect(page.get_by_test_id("speed-up")).to_be_visible()


def test_a_killed_server_has_its_error_in_its_own_pane_and_comes_back(page: Page, stack: Stack) -> None:
    os.kill(stack.service("plain")["pid"], signal.SIGKILL)
    ask(page, across_questions()[0]["question"])
    expect_states(page, blend="done", plain="failed")
    expect(pane(page, "plain").get_by_test_id("error")).to_contain_text(stack.address("plain"))
    assert answer_text(page, "blend")
    expect(page.get_by_test_id("server-plain")).to_have_attribute("data-state", "down", timeout=30_000)
    expect(page.get_by_test_id("server-plain")).to_have_attribute("data-state", "up", timeout=300_000)
    ask(page, "And now?")
    expect_states(page, blend="done", plain="done")
