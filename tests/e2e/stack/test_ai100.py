"""The contender ai100 alone, which needs no vLLM, for a person at the page Conversations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from support.page_steps import answer_text, ask, expect_states, figures, pane, settle
from support.running_stack import Stack, started
from support.verdicts import check_server

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AI100_NOTES_TOKENS", "600")  # a fact of the town's is one of twenty in its note
        with started(tmp_path_factory.mktemp("ai100"), "--contenders", "ai100", "--model", "town") as stack:
            yield stack


def status(page: Page, name: str) -> str | None:
    return pane(page, name).get_by_test_id("slot-turn").get_attribute("data-status")


def test_follow_ups_prefill_their_own_tokens_and_slots_fill_and_a_topic_is_corrected(page: Page) -> None:
    page.get_by_role("link", name="Conversations").click()
    page.get_by_test_id("slots").wait_for(timeout=60_000)
    expect(page.get_by_text("free for the next topic")).to_have_count(3)
    expect(page.get_by_text("kept for answers without slots")).to_have_count(1)
    statuses, prefilled = [], []
    box = page.get_by_test_id("stChatInputTextArea")
    for question, topic in (
        ("What colour is the door of Thea?", "townspeople"),
        ("When does the Bell open?", "shops"),
        ("What does Thea collect?", "townspeople"),
    ):
        box.fill(question)
        expect(page.get_by_test_id("next-topic")).to_have_attribute("data-topic", topic, timeout=30_000)
        ask(page, question)
        expect_states(page, cached="done", uncached="done")
        assert answer_text(page, "cached") == answer_text(page, "uncached") != ""
        statuses.append((status(page, "cached"), status(page, "uncached")))
        prefilled.append([figures(page, name)["num_prefilled_tokens"] or 0 for name in ("cached", "uncached")])
    assert [with_slots for with_slots, _ in statuses] == ["NEW_TOPIC", "NEW_TOPIC", "INCREMENTAL_PREFILL"]
    assert {without for _, without in statuses} == {"FULL_PREFILL"}
    assert prefilled[0][0] == prefilled[0][1]
    assert prefilled[2][0] < 20 < prefilled[2][1]
    expect(page.get_by_test_id("slot-0")).to_have_attribute("data-topic", "townspeople")
    expect(page.get_by_test_id("slot-1")).to_have_attribute("data-topic", "shops")
    expect(page.get_by_test_id("slot-history")).to_contain_text("turn 2 filled slot 1: shops")
    saved = page.get_by_test_id("saved")
    assert float(saved.get_attribute("data-tokens") or 0) == sum(without - cached for cached, without in prefilled)

    settle(page)
    page.locator('[class*="st-key-topic-"] input').click()
    page.keyboard.type("collections")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("slot-2")).to_have_attribute("data-topic", "collections", timeout=60_000)
    expect_states(page, cached="done", uncached="done")
    assert status(page, "cached") == "NEW_TOPIC"
    expect(page.get_by_test_id("question").last).to_have_text("What does Thea collect?")
    expect(page.get_by_test_id("question")).to_have_count(3)


def test_verdicts_are_those_of_the_table(stack: Stack) -> None:
    with stack.client("ai100") as http:
        check_server(http)
