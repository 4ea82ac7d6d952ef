"""The contender simllm alone, which needs no vLLM: over HTTP, and for a person at the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from kvarena.documents import build_messages, load_chunks, load_system_prompt
from support.page_steps import answer_text, ask, expect_states, figures, pane, pick_chunks, settle
from support.running_stack import Stack, started
from support.verdicts import check_server

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

DATA = Path(__file__).parents[3] / "backend" / "models" / "town" / "notes"
CHUNKS = load_chunks(DATA)
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with started(tmp_path_factory.mktemp("simllm"), "--contenders", "simllm") as stack:
        yield stack


def report_of(http: httpx.Client, texts: list[str], question: str, **options: Any) -> dict[str, Any]:
    messages = build_messages(load_system_prompt(DATA), texts, question, "<note>")
    body = {"model": "town", "messages": messages, "temperature": 0, "max_tokens": 8}
    answer = http.post("/v1/chat/completions", json=body | {"kv_transfer_params": {"kvarena": options}})
    report: dict[str, Any] = answer.raise_for_status().json()["kv_transfer_params"]["kvarena"]
    return report


def test_verdicts_are_those_of_the_table(stack: Stack) -> None:
    with stack.client("simllm") as http:
        check_server(http)


def test_prompts_over_the_same_chunks_are_similar_and_others_are_not(stack: Stack) -> None:
    texts, others = [chunk.text for chunk in CHUNKS[:4]], [chunk.text for chunk in CHUNKS[4:8]]
    with stack.client("simllm") as http:
        first = report_of(http, texts, "What does Mara keep?")
        other_order = report_of(http, texts[::-1], "What does Mara keep?")
        other_texts = report_of(http, others, "What does Mara keep?")
        top_layer = report_of(http, texts, "What does Hugo drink?", mode="top_layer")
    assert [report["hit"] for report in (first, other_order, other_texts, top_layer)] == [False, True, False, True]
    assert "What does Mara keep?" in other_order["matched_prompt"]
    assert other_order["approximate"]
    assert other_order["num_layer_passes"] < NUM_LAYERS * other_order["num_prompt_tokens"]
    assert (top_layer["approximate"], top_layer["num_layer_passes"]) == (True, top_layer["num_prompt_tokens"])


def test_the_page_shows_the_earlier_prompt_its_similarity_and_what_was_skipped(page: Page, stack: Stack) -> None:
    with stack.client("simllm") as http:
        http.post("/tasks/clear").raise_for_status()
    names = [chunk.name for chunk in CHUNKS[:3]]
    pick_chunks(page, names)
    settle(page)
    ask(page, "What does Hilde keep?")
    expect_states(page, simllm="done")
    expect(pane(page, "simllm").get_by_test_id("similar-task")).to_have_attribute("data-hit", "false")
    expect(pane(page, "simllm")).to_contain_text("exact")

    page.locator(".st-key-new-chat button").click()
    pick_chunks(page, [*names[1:], names[0]])
    settle(page)
    ask(page, "What does Hilde keep?")
    expect_states(page, simllm="done")
    seen = figures(page, "simllm")
    assert 0.998 <= (seen["similarity"] or 0) <= 1
    assert 0 < (seen["num_skipped_passes"] or 0) < NUM_LAYERS * (seen["num_prompt_tokens"] or 0)
    earlier = pane(page, "simllm").get_by_test_id("matched-prompt")
    expect(earlier).to_be_hidden()
    pane(page, "simllm").locator("summary").click()
    expect(earlier).to_be_visible()
    expect(earlier).to_contain_text("What does Hilde keep?")
    expect(pane(page, "simllm")).to_contain_text("approximate · aligned")
    assert answer_text(page, "simllm")


def test_the_threshold_of_the_page_counts(page: Page) -> None:
    threshold = page.locator(".st-key-similarity-threshold input")
    expect(threshold).to_have_value("0.9980")
    threshold.fill("1.0000")
    threshold.press("Enter")
    settle(page)
    ask(page, "Who is a baker?")
    expect_states(page, simllm="done")
    expect(pane(page, "simllm").get_by_test_id("similar-task")).to_contain_text("a cosine of 1 or more")
