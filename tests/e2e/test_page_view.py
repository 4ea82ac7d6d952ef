"""What the page does in a real browser, over small servers: what was chosen stays, and keys and tokens tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import FilePayload, Page, expect

from support.page_steps import (
    ask,
    drag_into_order,
    expect_apart,
    expect_states,
    pick_chunks,
    settle,
    shown_order,
)
from support.small_openai_server import OFFER, REPORT, SmallServer, prompt_text
from support.small_page import ANSWER, NAMES, OpenPage, choose, small_servers
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_contender_that_comes_later_says_that_its_prompt_is_another(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    page.locator(".st-key-run-plain label").first.click()
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done")
    page.locator(".st-key-run-plain label").first.click()
    ask(page, "And what does she keep?")
    expect_states(page, blend="done", plain="done")
    note = page.get_by_test_id("pane-plain").get_by_test_id("prompt-note")
    expect(note).to_have_text("Another prompt than the others': 1 earlier turn of this conversation is not in it.")
    expect(page.get_by_test_id("prompt-note")).to_have_count(1)


def test_a_reload_keeps_the_settings_and_a_lost_link_is_named(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    page.locator(".st-key-max-tokens input").fill("9")
    page.locator(".st-key-max-tokens input").press("Enter")
    page.locator(".st-key-run-plain label").first.click()
    expect(page).to_have_url(re.compile("run-plain=false"))
    page.reload()
    expect(page.locator(".st-key-max-tokens input")).to_have_value("9")
    expect(page.locator(".st-key-run-plain input")).not_to_be_checked()
    expect(page.get_by_text("The chat of this link isn't known here")).to_have_count(0)
    page.goto(page.url.split("?")[0] + "?chat=gone")
    expect(page.get_by_text("The chat of this link isn't known here")).to_be_visible()
    ask(page, "Who is the mayor?")
    expect(page.get_by_text("The chat of this link isn't known here")).to_have_count(0)


def test_a_reload_keeps_the_chunks_their_order_and_the_system_prompt(open_page: OpenPage) -> None:
    """Before anything was asked, and then again what was changed after."""
    servers = small_servers(2)
    page = open_page(*servers)
    pick_chunks(page, ["one", "three"])
    drag_into_order(page, "three", "one", ["three", "one"])
    prompt = page.locator(".st-key-system-prompt textarea")
    prompt.fill("Be <b>*brief*</b>.")
    prompt.press("Control+Enter")
    expect(page.get_by_test_id("context")).to_contain_text("Be <b>*brief*</b>.")
    settle(page)
    for number in (1, 2):
        page.reload()
        expect(page.get_by_test_id("chunk")).to_have_count(2, timeout=30_000)
        settle(page)
        assert shown_order(page) == ["three", "one"]
        expect(prompt).to_have_value("Be <b>*brief*</b>.", timeout=30_000)
        expect(page.get_by_test_id("context")).to_contain_text("Be <b>*brief*</b>.")
        if number == 1:
            ask(page, "Who is the mayor?")
            expect_states(page, blend="done", plain="done")
    pick_chunks(page, ["two"])
    settle(page)
    page.reload()
    expect(page.get_by_test_id("question")).to_have_count(1, timeout=30_000)
    settle(page)
    assert shown_order(page) == ["two"]
    page.goto(page.url.replace("/?", "/measure?"))
    expect(page.get_by_text("Questions over the chunk of the arena")).to_be_visible(timeout=30_000)


def test_the_picked_chunks_stand_in_the_order_that_was_dragged_or_typed(open_page: OpenPage) -> None:
    page = open_page(*small_servers(1))
    pick_chunks(page, ["one", "two", "three"])
    drag_into_order(page, "three", "one", ["three", "one", "two"])
    tags = page.locator(".st-key-chunks :not(template) > [data-rac] [data-tag]")
    expect(tags).to_have_text(["three", "one", "two"])
    items = page.frame_locator(".st-key-chunk-order iframe").locator(".sortable-item")
    items.filter(has_text="two").focus()
    for key in ("Space", "ArrowUp", "Space"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    wait_until(lambda: shown_order(page) == ["three", "two", "one"])
    expect(tags).to_have_text(["three", "two", "one"])
    pick_chunks(page, ["two", "one"])
    assert shown_order(page) == ["two", "one"]
    page.get_by_role("link", name="Quality").click()
    expect(page.get_by_test_id("context")).to_have_count(0)
    page.get_by_role("link", name="Arena").click()
    expect(page.get_by_test_id("chunk")).to_have_count(2)
    assert shown_order(page) == ["two", "one"]


def test_all_documents_are_used_and_the_way_out_of_too_many_is_beside_the_question(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    for _ in range(2):
        ask(page, "Who is the mayor?")
        expect_states(page, blend="done", plain="done")
    settle(page)
    long = "\n\n".join("The lamp in the hall is green. " * 20 for _ in range(80)).encode()
    files: list[FilePayload] = [
        {"name": f"{name} of a document with a long name.txt", "mimeType": "text/plain", "buffer": data}
        for name, data in (("the lamp", long), ("the hall", b"The hall is long."))
    ]
    page.locator('[data-testid="stFileUploader"] input[type="file"]').set_input_files(files)
    expect(page.locator('[data-testid="upload"][data-state="filled"]')).to_have_count(2, timeout=60_000)
    settle(page)
    page.get_by_role("button", name="Use all my documents").click()
    expect(page.get_by_test_id("chunk").last).to_have_attribute("data-chunk", re.compile("the hall"), timeout=30_000)
    drop = page.get_by_role("button", name=re.compile("^Drop the last"))
    expect(drop).to_be_in_viewport(timeout=30_000)
    box, warning = page.get_by_test_id("stChatInput").bounding_box(), page.get_by_test_id("stAlert").bounding_box()
    assert box
    assert warning
    assert 0 < box["y"] - warning["y"] < 250
    page.set_viewport_size({"width": 390, "height": 844})
    settle(page)
    expect_apart(page.locator("[data-testid=stSidebar] [data-testid=stElementContainer]"), "sidebar")
    expect(drop).to_be_in_viewport()
    page.set_viewport_size({"width": 1440, "height": 900})
    settle(page)
    drop.click()
    expect(drop).to_have_count(0, timeout=30_000)


def test_a_document_that_is_dropped_again_after_a_reload_is_there_once(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(*small_servers(1))
    document = tmp_path / "lamp.txt"
    document.write_bytes(b"The lamp in the hall is green.\r\n")  # not what its chunk has
    uploads = page.locator('[class*="st-key-remove-"] button:visible')
    for _ in range(2):
        page.locator('[data-testid="stFileUploader"] input[type="file"]').set_input_files([document])
        expect(page.get_by_text("lamp.txt").first).to_be_visible(timeout=30_000)
        settle(page)
        expect(uploads).to_have_count(1)
        expect(page).to_have_url(re.compile("chat="))
        page.reload()
        expect(uploads).to_have_count(1, timeout=30_000)
        settle(page)


def test_settings_of_the_address_that_are_none_are_named(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    page.goto(page.url.split("?")[0] + "?max-tokens=many&more=%3Cb%3E*1*&temperature=0.5")
    told = page.get_by_text("The page's address has settings that nothing here takes: max-tokens = many, more = <b>*1*")
    expect(told).to_be_visible(timeout=30_000)
    expect(page.locator(".st-key-max-tokens input")).to_have_value("128", timeout=30_000)
    ask(page, "Who is the mayor?")
    expect(told).to_have_count(0)


def test_a_reload_of_quality_keeps_its_files_and_a_link_to_a_file_that_is_gone_says_so(open_page: OpenPage) -> None:
    page = open_page(*small_servers(1))
    page.get_by_role("link", name="Quality").click()
    choose(page, "Result file", "eval-smollm2.json")
    choose(page, "Compare with", "eval-smollm2-seed7.json")
    page.locator(".st-key-kind").get_by_role("radio").nth(1).click()
    settle(page)
    kind = page.locator('.st-key-kind [aria-checked="true"]').inner_text()
    page.reload()
    expect(page.get_by_text("Compared with eval-smollm2-seed7.json")).to_be_visible(timeout=60_000)
    file = page.get_by_role("combobox", name="Result file")
    expect(file).to_have_value(re.compile("^eval-smollm2.json"), timeout=30_000)
    expect(page.locator('.st-key-kind [aria-checked="true"]')).to_have_text(kind, timeout=30_000)
    page.goto(page.url.split("?")[0] + "?result-file=gone.json")
    told = page.get_by_text("Result file: the page's address names gone.json, which isn't here.")
    expect(told).to_be_visible(timeout=60_000)


def test_the_context_is_coloured_by_token_and_answers_are_compared_with_the_exact_one(open_page: OpenPage) -> None:
    report = REPORT | {
        "spans": [{"start": 0, "end": 300, "source": "reused"}],
        "recomputed_spans": [[7, 9], [20, 21]],
        "token_scores": {"what": "share of attention", "tokens": [[7, 0.25, 8], [8, 0.125], [20, 0.5]]},
        "leans_on": {"what": "share of its attention, layer 1", "tokens": [[20, 10, 12, 0.75]]},
    }
    offer = OFFER | {"token_scores": True}
    blend = SmallServer(pieces=[*ANSWER[:3], " Ben", *ANSWER[4:]], offer=offer, report=report)
    plain = SmallServer(pieces=ANSWER)
    page = open_page(blend, plain)
    page.locator(".st-key-probabilities label").first.click()
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    assert blend.completions()[0]["kv_transfer_params"]["kvarena"]["token_scores"] is True
    assert "kv_transfer_params" not in plain.completions()[0]
    difference = page.get_by_test_id("difference-blend")
    expect(difference).to_contain_text("from word 4, token 4 on")
    expect(difference.locator("del")).to_have_text(["Ann,"])
    expect(difference.locator("ins")).to_have_text(["Ben,"])
    expect(page.get_by_test_id("difference-plain")).to_have_count(0)
    tokens = page.get_by_test_id("answer-plain").locator("u")
    expect(tokens).to_have_text(ANSWER)
    expect(tokens.nth(3)).to_have_attribute("title", "77.9%\n77.9% 'Ann'\n13.5% '<other>'")
    assert page.get_by_test_id("answer-plain").inner_text() == "".join(ANSWER)

    page.get_by_text("What was reused, token by token").click()
    prompt = page.get_by_test_id("prompt-tokens").first
    expect(prompt.locator('[data-kind="recomputed"] u')).to_have_count(3)
    words = prompt_text(plain.completions()[0]["messages"]).split()
    assert prompt.locator("u").all_inner_texts() == [f" {word}" for word in words]
    position = words.index("three.")
    expect(prompt.locator("u").nth(position)).to_have_attribute("title", f"token {position}: reused, three")
    first = prompt.locator('[data-kind="recomputed"] u').first
    expect(first).to_have_attribute("title", re.compile(f"share of attention: 0.25, most from “{words[8]}”$"))
    last = prompt.locator('[data-kind="recomputed"] u').last
    expect(last).to_have_attribute("title", re.compile("leans on .+: 75.0%, share of its attention, layer 1$"))
    first.click()
    assert "0.25" in first.evaluate("token => getComputedStyle(token, '::after').content")
    expect(page.get_by_test_id("prompt-tokens")).to_have_count(2)


def test_the_verdict_is_over_all_turns_and_a_repeat_follows_on_from_nothing(open_page: OpenPage) -> None:
    servers = small_servers(3)
    page = open_page(*servers)
    ask(page, "Who is the mayor?")
    expect_states(page, **dict.fromkeys(NAMES[:3], "done"))
    verdicts = page.get_by_test_id("verdict")
    expect(verdicts).to_have_count(2)
    expect(verdicts.first).to_contain_text("one prompt only")
    page.get_by_role("button", name="In a new order").click()
    expect(page.get_by_test_id("again")).to_have_text("Asked again: the chunks in a new order")
    expect(verdicts.first).to_contain_text("median of 2 prompts")
    expect(verdicts.first).to_contain_text("both answers agree")
    first, shuffled = (asked["messages"] for asked in servers[0].completions())
    assert len(shuffled) == len(first)
    assert shuffled != first
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        expect_apart(verdicts.locator("b, small"), f"at {width} pixels")
        page.get_by_test_id("question").last.scroll_into_view_if_needed()
        expect(verdicts.first, "it stays in sight").to_be_in_viewport()


def test_a_slash_goes_to_the_box_which_keeps_the_focus(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_visible(timeout=30_000)
    settle(page)
    page.keyboard.press("/")
    expect(box).to_be_focused()
    page.keyboard.type("a / b?")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("question")).to_have_text("a / b?")
    expect_states(page, blend="done", plain="done")
    expect(box).to_be_focused()


FOCUSED = """() => {
    const at = document.activeElement, box = at.getBoundingClientRect();
    const seen = box.right > 0 && box.left < innerWidth && at.checkVisibility({checkVisibilityCSS: true});
    const name = at.ariaLabel || at.innerText?.trim() || at.tagName;
    return [at.dataset.testid === "stChatInputTextArea" ? "box" : name, seen];
}"""


def tab_to_box(page: Page) -> list[tuple[str, bool]]:
    """The names of what has the focus on the way to the question box, and whether one sees them."""
    page.evaluate("document.activeElement.blur()")
    stops: list[tuple[str, bool]] = []
    while not stops or stops[-1][0] != "box":
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUSED)
        stops.append((name, seen))
        assert len(stops) < 60, stops
    return stops


def test_the_question_box_is_two_keys_away_and_no_stop_is_out_of_sight(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    expect(page.get_by_test_id("stSkipToContent")).to_have_text("Skip to the question", timeout=30_000)
    settle(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_focused()

    stops = tab_to_box(page)
    assert [name for name, _ in stops if name.startswith("Help for")] == []
    assert [name for name, seen in stops if not seen] == []
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    expect(page.get_by_test_id("stSidebar")).to_have_attribute("data-collapsed", "true", timeout=30_000)
    expect(box).to_be_visible(timeout=30_000)
    settle(page)
    on_phone = tab_to_box(page)
    assert [name for name, seen in on_phone if not seen] == []
    assert len(on_phone) <= 8 < len(stops), "nothing of the closed sidebar"
    page.get_by_test_id("stExpandSidebarButton").click()
    expect(page.get_by_test_id("stSidebar")).to_have_attribute("data-collapsed", "false")
    page.locator(".st-key-in-sequence input").focus()
    expect(page.locator(".st-key-in-sequence input")).to_be_focused()


def test_f1_shows_the_help_of_the_control_that_has_the_focus(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    settle(page)
    page.locator(".st-key-in-sequence input").focus()
    expect(page.locator(".st-key-in-sequence input")).to_have_attribute("aria-keyshortcuts", "F1")
    assert page.locator(".st-key-question textarea").get_attribute("aria-keyshortcuts") is None, "it has no help"
    page.keyboard.press("F1")
    expect(page.get_by_role("tooltip").first).to_contain_text("all answer at the same time")
    page.keyboard.press("Tab")
    expect(page.locator(".st-key-blind input")).to_be_focused()


def test_who_tabs_on_after_asking_is_not_sent_back_to_the_box(open_page: OpenPage) -> None:
    page = open_page(*small_servers(2))
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    settle(page)
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_focused()
    for _ in range(12):
        page.keyboard.press("Tab")
    name, _ = page.evaluate(FOCUSED)
    page.evaluate("document.activeElement.blur()")
    page.locator(".st-key-blind label").first.evaluate("label => label.click()")  # draws the page anew
    settle(page)
    assert name != "box"
    expect(page.get_by_test_id("stChatInputTextArea")).not_to_be_focused()


def test_the_servers_logs_of_a_request_are_shown_by_its_id(open_page: OpenPage) -> None:
    servers = small_servers(2)
    page = open_page(*servers)
    ask(page, "Who is the mayor?")
    expect_states(page, blend="done", plain="done")
    page.get_by_text("See the servers").click()
    sent = next(headers["x-request-id"] for path, _, headers in servers[1].requests if path == "/v1/chat/completions")
    for name in NAMES[:2]:
        watched = page.get_by_test_id(f"watched-{name}")
        expect(watched.get_by_test_id("log-line")).to_contain_text(f"request_id{sent}")
        expect(watched).to_contain_text("0 running, 0 waiting · 1.0 MiB of memory in its main process")
    page.get_by_label("Only figures with").fill("_ms")
    page.get_by_label("Only figures with").press("Enter")
    line = page.get_by_test_id("watched-plain").get_by_test_id("log-line")
    expect(line.locator("dt")).to_have_text(["total_ms", "fetch_ms"])
    servers[1].stop()
    expect(page.get_by_test_id("watched-plain")).to_contain_text("Nothing answers at")


def test_a_new_file_appears_by_itself_and_a_pasted_text_is_edited_in_place(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(*small_servers(2))
    settle(page)
    (tmp_path / "late.txt").write_text("Carl keeps goats.")
    chunks = page.locator(".st-key-chunks")
    chunks.locator("input").click()
    expect(page.get_by_role("option", name="late", exact=True)).to_be_visible(timeout=30_000)
    page.keyboard.press("Escape")
    page.get_by_text("Paste a text").click()
    settle(page)
    page.locator(".st-key-paste-text textarea").fill("Ann keeps bees.")
    page.keyboard.press("Control+Enter")  # the page has the text before the button is pressed
    settle(page)
    page.get_by_role("button", name="Add", exact=True).click()
    uploaded = page.locator('[data-testid="upload"][data-document="pasted.txt"]')
    expect(uploaded).to_have_attribute("data-state", "filled", timeout=30_000)
    settle(page)
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator('[class*="st-key-text-"] textarea').fill("Ann keeps owls.")
    page.keyboard.press("Control+Enter")
    settle(page)
    page.get_by_role("button", name="Keep", exact=True).click()
    settle(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Only this", exact=True).click()
    expect(page.get_by_test_id("chunk")).to_contain_text(["Ann keeps owls."])
