"""A turn on KV slots as its pane says it, the table of slots, and what changed in it."""

from __future__ import annotations

from ai100.engine import AI100Options
from chat import Answer
from contender_api import Sampling, Server, completion_request
from figures import Figures, SlotTurn, slot_turn_html, with_report
from kvarena.client import ServerInfo
from settings import Contender
from slots import MAX_TOPIC_CHARS, Slot, changes, topic_name
from slots_view import slots_html
from support.slot_rows import row, table
from support.small_openai_server import AI100_OFFER, AI100_REPORT, SIMLLM_REPORT
from turns_view import answer_html


def test_a_pane_says_topic_slot_turn_status_tokens_and_times() -> None:
    answer = Answer(Contender("ai100", "Slots", "http://127.0.0.1:8004"), text="Salt.", state="done")
    answer.figures = with_report(Figures(first_token_ms=13.0), AI100_REPORT, "slots")
    html = answer_html(answer)
    assert 'data-status="INCREMENTAL_PREFILL"' in html
    assert "incremental prefill</span>" in html
    assert "<b>&lt;i&gt;cooking&lt;/i&gt;</b> in slot 1, turn 2" in html, "letter for letter"
    assert 'data-figure="num_prefilled_tokens" data-value="9"' in html
    assert [f'data-figure="{name}_ms"' in html for name in ("prefill", "decode", "total")] == [True] * 3
    assert '"ka-badge ka-badge-exact">exact</span>' in html


def test_only_reports_of_ai100_have_a_slot_turn() -> None:
    assert with_report(Figures(), SIMLLM_REPORT, "similar_task").slot_turn is None
    assert with_report(Figures(), AI100_REPORT, "slots").slot_turn == SlotTurn.read(AI100_REPORT)


def test_a_reset_says_why_and_a_turn_without_a_slot_says_so() -> None:
    reset = SlotTurn.read(AI100_REPORT | {"status": "RESET_TOPIC", "reason": "900 tokens > 800", "slot": None})
    html = slot_turn_html(reset)
    assert "900 tokens &gt; 800" in html
    assert "in no slot" in html


def test_the_mode_and_the_conversation_go_into_the_request() -> None:
    server = Server.read(ServerInfo("town", offer=AI100_OFFER), "slots")
    body = completion_request(server, [], Sampling(use_cache=False, conversation="a"))
    assert (body["kv_transfer_params"], body["session_id"]) == ({"kvarena": {"use_cache": False, "notes": False}}, "a")
    arena = completion_request(server, [], Sampling())
    assert arena["kv_transfer_params"] == {"kvarena": {"notes": False}}, "the arena brings the context itself"
    assert "user" not in completion_request(server, [], Sampling())
    other = Server.read(ServerInfo("town"), "slots")
    assert "kv_transfer_params" not in completion_request(other, [], Sampling(use_cache=False))


def test_a_topics_name_is_as_the_server_takes_it() -> None:
    assert topic_name("  my   own\n") == "my own"
    assert topic_name(" \t") == ""
    assert len(topic_name("x" * 200)) == MAX_TOPIC_CHARS
    AI100Options(topic=topic_name("a" * 79 + " b" * 20))


def test_changes_are_what_another_topic_or_conversation_holds_now() -> None:
    before = table(row(0, "a", "c1"), row(1), row(2, "b", "c1"), row(3, "a", "c2", position=5))
    after = table(row(0, "b", "c1"), row(1, "a", "c1"), row(2), row(3, "a", "c2", position=9))
    assert [change.text() for change in changes(before, after, {"c1"})] == [
        "replaced slot 0: a → b",
        "filled slot 1: a",
        "emptied slot 2 of b",
    ]
    assert changes(before, before, {"c1"}) == []
    assert changes(table(row(0)), before, {"c1"}) == [], "another server"


def test_what_others_talk_about_is_not_told() -> None:
    before, after = table(row(0, "mine", "c1"), row(1)), table(row(0, "secret", "c2"), row(1, "secret", "c3"))
    assert [change.text() for change in changes(before, after, {"c1"})] == [
        "replaced slot 0: mine → a topic",
        "filled slot 1: a topic",
    ]
    assert "secret" not in slots_html(after, {"c1"})


def test_last_use_is_the_order_of_those_that_hold_something() -> None:
    found = table(row(0, "a", "c", last_used=3), row(1), row(2, "b", "c", last_used=7)).by_last_use()
    assert [slot.index for slot in found] == [2, 0]
    assert all(isinstance(slot, Slot) for slot in found)


def test_the_picture_shows_fill_owner_and_last_use() -> None:
    own = row(0, "<b>", "mine", position=50, has_pending_token=True, last_used=2)
    other = row(1, "a", "theirs", position=200, last_used=1)
    html = slots_html(table(own, other, row(2)), {"mine"})
    assert 'data-testid="slot-0" data-topic="&lt;b&gt;" data-tokens="50"' in html
    assert "width:25.00%" in html
    assert "50 of 200 tokens and the pending one<br>this chat, used last" in html
    assert "200 of 200 tokens<br>another conversation, used longest ago" in html
    assert "free for the next topic" in html
    assert "kept for answers without slots" in slots_html(table(row(0, is_aside=True)), set())
