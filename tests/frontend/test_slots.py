"""A turn on KV slots in its pane, the table of slots and its changes, and one conversation with slots and without."""

from __future__ import annotations

import time

import pytest

from ai100.engine import AI100Options
from chat import Answer, Context, Turn
from chat_session import SlotSession
from chat_view import answer_html
from contender_api import Sampling, Server, completion_request
from figures import Figures, SlotTurn, slot_turn_html, with_report
from kvarena.client import ServerInfo
from runs import Run
from settings import Contender
from slots import MAX_TOPIC_CHARS, MODES, Slot, SlotChat, changes, slots_html, topic_name
from support.slot_rows import row, table
from support.small_openai_server import AI100_OFFER, AI100_REPORT, SIMLLM_REPORT, StartServer


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


# -- a conversation with slots and without -----------------------------------------------------------------------------


CONTEXT = Context("Be brief.")
SERVER = Contender("ai100", "Slots", "http://127.0.0.1:8004")
SYSTEM = {"role": "system", "content": "Be brief."}


def add_turn(chat: SlotChat, cached: str, uncached: str, states: tuple[str, str] = ("done", "done")) -> Turn:
    turn = Turn.ask(f"Question {len(chat.turns) + 1}?", CONTEXT, [mode.of(SERVER) for mode in MODES], Sampling())
    for answer, text, state in zip(turn.answers.values(), (cached, uncached), states, strict=True):
        answer.text, answer.state = text, state  # type: ignore[assignment]
    chat.turns.append(turn)
    return turn


def test_both_modes_get_the_same_messages() -> None:
    chat = SlotChat()
    add_turn(chat, " white", " white")
    expected = [
        SYSTEM,
        {"role": "user", "content": "Question 1?"},
        {"role": "assistant", "content": " white"},
        {"role": "user", "content": "And sugar?"},
    ]
    assert all(chat.messages(mode.name, CONTEXT, "And sugar?") == expected for mode in MODES)
    assert chat.messages("cached", Context(), "Hello?") == [{"role": "user", "content": "Hello?"}]


def test_a_whole_answer_goes_before_a_partial_one_and_an_unanswered_turn_is_left_out() -> None:
    chat = SlotChat()
    add_turn(chat, " wh", " white", ("interrupted", "done"))
    add_turn(chat, "", "", ("interrupted", "failed"))
    add_turn(chat, " swe", "", ("interrupted", "interrupted"))
    said = [message["content"] for message in chat.messages("cached", CONTEXT, "So?")]
    assert said == [SYSTEM["content"], "Question 1?", " white", "Question 3?", " swe", "So?"]


def test_a_conversation_without_answers_yet_has_a_name_that_no_turn_had() -> None:
    """The server goes on with a named conversation where a request brings one message alone."""
    chat = SlotChat()
    first = chat.name(CONTEXT)
    add_turn(chat, "", "", ("failed", "interrupted"))
    second = chat.name(CONTEXT)
    add_turn(chat, " white", " white")
    assert first != second
    assert chat.name(CONTEXT) == second
    assert chat.name(Context("Be long.")) not in (first, second)
    assert SlotChat().name(CONTEXT) != first


def test_saved_is_the_sum_of_uncached_minus_cached_over_turns_that_both_answered() -> None:
    chat = SlotChat()
    for times in ((10.0, 100.0), (20.0, 50.0)):
        turn = add_turn(chat, "a", "a")
        for answer, ms, num_tokens in zip(turn.answers.values(), times, (9, 100), strict=True):
            answer.figures = Figures(first_token_ms=ms, num_computed_tokens=num_tokens)
    add_turn(chat, "a", "", ("done", "interrupted")).answers["cached"].figures = Figures(first_token_ms=1.0)
    saved = chat.saved()
    assert (saved.num_turns, saved.first_token_ms, saved.num_tokens) == (2, 90.0 + 30.0, 2 * 91)
    assert saved.uncached_ms == 150.0


@pytest.mark.parametrize(
    ("cached_ms", "tone"),
    [(50.0, "gain"), (90.0, "gain"), (91.0, "tie"), (100.0, "tie"), (109.0, "tie"), (110.0, "loss"), (200.0, "loss")],
)
def test_less_than_a_tenth_saved_or_lost_is_a_tie(cached_ms: float, tone: str) -> None:
    chat = SlotChat()
    turn = add_turn(chat, "a", "a")
    for answer, ms in zip(turn.answers.values(), (cached_ms, 100.0), strict=True):
        answer.figures = Figures(first_token_ms=ms)
    assert chat.saved().tone == tone


def test_the_history_says_which_turn_changed_a_slot() -> None:
    chat = SlotChat()
    chat.note_slots(table(row(0, "a", "theirs"), row(1, "b", "mine")))
    add_turn(chat, "x", "x").answers["cached"].figures = with_report(Figures(), AI100_REPORT | {"slot": 1}, "slots")
    chat.note_slots(table(row(0, "c", "theirs"), row(1, "d", "mine")))
    assert chat.slot_history == [
        "another conversation replaced slot 0: a topic → a topic",
        "turn 1 replaced slot 1: b → d",
    ]
    assert chat.conversations == {"mine"}
    chat.note_slots(table(row(0, "c", "theirs"), row(1)))
    assert chat.slot_history[2:] == ["another conversation emptied slot 1 of d"]


def test_a_turn_without_a_report_still_owns_what_changed() -> None:
    chat = SlotChat()
    chat.note_slots(table(row(0)))
    add_turn(chat, "x", "", ("interrupted", "interrupted"))
    chat.note_slots(table(row(0, "a", "mine")))
    assert chat.slot_history == ["turn 1 filled slot 0: a topic"], "whose it is wasn't said"


def test_a_message_that_is_asked_anew_in_another_topic_is_the_chats_own() -> None:
    chat = SlotChat()
    chat.note_slots(table(row(0)))
    add_turn(chat, "x", "x")
    chat.note_slots(table(row(0, "a", "mine")))
    chat.take_back()
    assert not chat.turns
    add_turn(chat, "x", "x")
    chat.note_slots(table(row(0, "b", "mine")))
    assert chat.slot_history[1].startswith("turn 1 replaced slot 0")


def test_after_an_interrupted_run_the_next_message_follows_what_had_arrived(small_server: StartServer) -> None:
    server = small_server(offer=AI100_OFFER, pieces=["word "] * 50, hold_after=10)
    at = Contender("ai100", "Slots", server.url)
    sessions = {mode.name: SlotSession(mode.of(at), mode.use_cache) for mode in MODES}
    chat = SlotChat()
    run = Run(chat, CONTEXT, "Who?", sessions, Sampling(conversation=chat.name(CONTEXT)), in_sequence=True)
    cached, uncached = run.turn.answers.values()
    deadline_s = time.monotonic() + 20
    while run.advance() and cached.text != "word " * 10:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    run.stop()
    for session in sessions.values():
        session.close()
    assert (cached.state, uncached.state, uncached.text) == ("interrupted", "interrupted", "")
    said = [message["content"] for message in chat.messages("uncached", CONTEXT, "And why?")]
    assert said[1:] == ["Who?", cached.text, "And why?"]
    assert chat.saved().num_turns == 0
