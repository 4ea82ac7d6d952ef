"""The page Conversations in Streamlit's own test runner, over a small server."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import state
from runs import Run
from slots import SlotChat
from support.slot_rows import row
from support.small_openai_server import AI100_OFFER, AI100_REPORT, SmallServer, StartServer

APP = Path(__file__).resolve().parents[2] / "frontend" / "app.py"
SLOTS = {"slots": [row(0), row(1, "sports", "c1", position=100, last_used=3)], "ctx_len": 200, "num_evictions": 0}
Open = Callable[..., AppTest]


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Open:
    """The page over one server of this name, and a folder with a system prompt."""
    (tmp_path / "sys_prompt.txt").write_text("Be brief.")

    def page(server: SmallServer, name: str = "ai100") -> AppTest:
        entry = {"name": name, "title": "Slots", "url": server.url, "report": "slots" if name == "ai100" else ""}
        monkeypatch.setenv("KVARENA_CONTENDERS", json.dumps([entry]))
        monkeypatch.setenv("KVARENA_DATA_DIR", str(tmp_path))
        st.cache_resource.clear()
        st.cache_data.clear()
        opened = AppTest.from_file(str(APP), default_timeout=60).run()
        return opened.switch_page("views/conversations.py").run()

    return page


def html(page: AppTest) -> str:
    assert not page.exception, page.exception
    return "\n".join(element.proto.body for element in page.get("html"))


def slot_server(small_server: StartServer, **behaviour: object) -> SmallServer:
    return small_server(offer=AI100_OFFER, report=AI100_REPORT, slots=SLOTS, **behaviour)


def test_a_message_goes_to_both_modes_with_the_same_messages(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.chat_input[0].set_value("Who?").run()
    cached, uncached = server.completions()
    assert cached["kv_transfer_params"]["kvarena"] == {"use_cache": True, "notes": True}
    assert uncached["kv_transfer_params"]["kvarena"] == {"use_cache": False, "notes": True}
    assert cached["session_id"] != uncached["session_id"]
    assert cached["messages"] == uncached["messages"]
    assert cached["messages"][0]["content"] == "Be brief.", "notes are the server's to choose"
    body = html(page)
    assert all(f'data-testid="pane-{name}" data-state="done"' in body for name in ("cached", "uncached"))
    assert body.count('data-testid="slot-turn"') == 2
    assert 'data-testid="saved"' in body


@pytest.mark.parametrize(
    ("cached_ms", "tone", "told"),
    [
        (500.0, "gain", "Slots saved 0.50 s until the first tokens of 1 turn, and saved the prefill of "),
        (950.0, "tie", "Slots made no difference to the first tokens of 1 turn, and saved the prefill of "),
        (1500.0, "loss", "Slots cost 0.50 s until the first tokens of 1 turn, and saved the prefill of "),
    ],
)
def test_what_the_slots_saved_is_a_gain_a_tie_or_a_loss(
    small_server: StartServer, open_page: Open, cached_ms: float, tone: str, told: str
) -> None:
    page = open_page(slot_server(small_server))
    page.chat_input[0].set_value("Who?").run()
    link = page.query_params["conversation"]
    opened = state.chat_store("conversation").get(link if isinstance(link, str) else link[0])
    assert opened is not None
    for answer, ms in zip(opened.chat.turns[0].answers.values(), (cached_ms, 1000.0), strict=True):
        answer.figures = dataclasses.replace(answer.figures, first_token_ms=ms)
    body = html(page.run())
    assert f'class="ka-speed ka-tone-{tone}" data-testid="saved"' in body
    assert f'data-tone="{tone}">{told}' in body


def test_a_follow_up_goes_on_with_the_conversation_letter_for_letter(
    small_server: StartServer, open_page: Open
) -> None:
    server = slot_server(small_server, pieces=[" Hello", ", ", "world"])
    page = open_page(server)
    for question in ("Who?", "And why?"):
        page.chat_input[0].set_value(question).run()
    first, _, second, _ = server.completions()
    assert second["session_id"] == first["session_id"]
    assert [message["content"] for message in second["messages"][1:]] == ["Who?", " Hello, world", "And why?"]


def test_without_notes_a_new_conversation_begins(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.segmented_control(key="modes").set_value("With slots").run()
    page.chat_input[0].set_value("Who?").run()
    page.toggle(key="conversation-notes").set_value(False).run()
    page.chat_input[0].set_value("And why?").run()
    with_notes, without = server.completions()
    assert without["kv_transfer_params"]["kvarena"]["notes"] is False
    assert without["session_id"] != with_notes["session_id"]
    assert len(without["messages"]) == 2, "the system prompt and the question"


@pytest.mark.parametrize(("choice", "use_cache"), [("With slots", True), ("Without", False)])
def test_one_mode_alone(small_server: StartServer, open_page: Open, choice: str, use_cache: bool) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.segmented_control(key="modes").set_value(choice).run()
    page.chat_input[0].set_value("Who?").run()
    (asked,) = server.completions()
    assert asked["kv_transfer_params"]["kvarena"] == {"use_cache": use_cache, "notes": True}
    assert 'data-testid="saved"' not in html(page), "nothing to compare with"


def test_at_the_same_time_both_are_asked_too(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.toggle(key="conversation-in-sequence").set_value(False).run()
    page.chat_input[0].set_value("Who?").run()
    assert {body["kv_transfer_params"]["kvarena"]["use_cache"] for body in server.completions()} == {True, False}


def test_a_link_restores_a_conversation_and_its_settings_after_a_restart(
    small_server: StartServer, open_page: Open
) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.text_area(key="conversation-system").set_value("Be long.").run()
    page.toggle(key="conversation-notes").set_value(False).run()
    page.slider(key="conversation-temperature").set_value(0.5).run()
    page.segmented_control(key="modes").set_value("With slots").run()
    page.chat_input[0].set_value("Who?").run()
    assert [button.label for button in page.download_button] == ["JSON", "Markdown", "curl commands"]
    st.cache_resource.clear()
    again = AppTest.from_file(str(APP), default_timeout=60).run().switch_page("views/conversations.py")
    again.query_params["conversation"] = page.query_params["conversation"]
    again.run()
    assert "Who?" in html(again)
    assert again.text_area(key="conversation-system").value == "Be long."
    assert not again.toggle(key="conversation-notes").value
    assert again.slider(key="conversation-temperature").value == 0.5
    again.chat_input[0].set_value("And then?").run()
    first, second = server.completions()
    assert first["session_id"] == second["session_id"]
    assert len(second["messages"]) == len(first["messages"]) + 2


def test_a_reload_keeps_what_was_set_before_anything_was_asked(small_server: StartServer, open_page: Open) -> None:
    page = open_page(slot_server(small_server))
    page.text_area(key="conversation-system").set_value("Be *long*.").run()
    page.toggle(key="conversation-notes").set_value(False).run()
    page.slider(key="conversation-temperature").set_value(0.5).run()
    page.number_input(key="conversation-max-tokens").set_value(9).run()
    page.toggle(key="conversation-in-sequence").set_value(False).run()
    page.segmented_control(key="modes").set_value("Without").run()
    for is_restarted in (False, True):
        if is_restarted:
            st.cache_resource.clear()
        again = AppTest.from_file(str(APP), default_timeout=60).run().switch_page("views/conversations.py")
        again.query_params["conversation"] = page.query_params["conversation"]
        again.run()
        assert not again.warning
        assert again.text_area(key="conversation-system").value == "Be *long*."
        assert not again.toggle(key="conversation-notes").value
        assert again.slider(key="conversation-temperature").value == 0.5
        assert again.number_input(key="conversation-max-tokens").value == 9
        assert not again.toggle(key="conversation-in-sequence").value
        assert again.segmented_control(key="modes").value == "Without"


def test_the_picture_and_what_a_turn_did_to_the_slots(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    assert 'data-testid="slot-1" data-topic="a topic" data-tokens="100"' in html(page)
    server.slots = SLOTS | {"slots": [row(0), row(1, "<i>cooking</i>", "c2", position=50, last_used=4)]}
    page.chat_input[0].set_value("Who?").run()
    body = html(page)
    assert "turn 1 replaced slot 1: a topic → &lt;i&gt;cooking&lt;/i&gt;" in body
    assert "this chat, used last" in body


def test_a_messages_topic_is_chosen_before_and_corrected_after(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    page.chat_input[0].set_value("Who?").run()
    next_topic = next(box for box in page.selectbox if box.label.startswith("The next"))
    assert next_topic.options == ["The server finds it", "<i>cooking</i>"]
    next_topic.set_value("<i>cooking</i>").run()
    server.report = AI100_REPORT | {"topic": "sports"}
    page.chat_input[0].set_value("And then?").run()
    chosen = [body["kv_transfer_params"]["kvarena"].get("topic") for body in server.completions()]
    assert chosen == [None, None, "<i>cooking</i>", "<i>cooking</i>"]

    topic = next(box for box in page.selectbox if box.label == "Topic")
    assert (topic.value, topic.options) == ("sports", ["sports", "<i>cooking</i>"])
    topic.set_value("<i>cooking</i>").run()
    again = server.completions()[4:]
    assert {body["kv_transfer_params"]["kvarena"]["topic"] for body in again} == {"<i>cooking</i>"}
    said = [message["content"] for message in again[0]["messages"]]
    assert said == ["Be brief.", "Who?", "Hello, world", "And then?"]
    assert html(page).count('data-testid="question"') == 2


def next_topic(page: AppTest) -> Any:
    return next(box for box in page.selectbox if box.label.startswith("The next"))


def type_text(page: AppTest, text: str) -> None:
    """As `typed.js` does it."""
    key = next_topic(page).key.replace("next-topic", "typed")
    page.session_state[key] = {"text": text}
    page.run()


def test_the_topic_shows_before_a_message_is_sent(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server, topics=("<i>cooking</i>",))
    page = open_page(server)
    assert "Its topic shows as you type" in html(page)
    type_text(page, "Who?")
    assert 'aria-live="polite" data-testid="next-topic" data-topic="Who?">Begins the topic <b>Who?</b>' in html(page)
    assert not server.completions(), "nothing was sent"
    page.chat_input[0].set_value("Who?").run()
    assert "Its topic shows as you type" in html(page), "of the next message nothing is typed yet"
    type_text(page, "How long is <i>cooking</i>?")
    assert "Goes to <b>&lt;i&gt;cooking&lt;/i&gt;</b>" in html(page)
    asked = [body for path, body, _ in server.requests if path == "/topic"][-1]
    assert asked["session_id"] == server.completions()[0]["session_id"]
    assert [message["content"] for message in asked["messages"]][1:] == [
        "Who?",
        "Hello, world",
        "How long is <i>cooking</i>?",
    ]


def test_typing_does_not_wait_for_a_slow_server(
    small_server: StartServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = slot_server(small_server, hold_topics=True)
    page = open_page(server)
    monkeypatch.setattr("state.FORETELL_WAIT_S", 0.1)
    type_text(page, "Whose is it?")
    assert "Its topic shows as you type" in html(page)
    server.go_on.set()
    deadline_s = time.monotonic() + 60
    while "Begins the topic <b>Whose is it?</b>" not in html(page):
        assert time.monotonic() < deadline_s
        page.run()
    assert len([path for path, _, _ in server.requests if path == "/topic"]) == 1


def test_a_chosen_topic_outlasts_another_tabs_turn(small_server: StartServer, open_page: Open) -> None:
    """Whether this tab has drawn that turn when its own message is sent, or not yet."""
    server = slot_server(small_server)
    page = open_page(server)
    page.chat_input[0].set_value("Who?").run()
    other = AppTest.from_file(str(APP), default_timeout=60).run().switch_page("views/conversations.py")
    other.query_params["conversation"] = page.query_params["conversation"]
    other.run()

    next_topic(page).set_value("<i>cooking</i>").run()
    other.chat_input[0].set_value("And then?").run()
    page.chat_input[0].set_value("Mine?").run()
    next_topic(page).set_value("<i>cooking</i>").run()
    other.chat_input[0].set_value("And after that?").run()
    page.run()
    assert "Goes to <b>&lt;i&gt;cooking&lt;/i&gt;</b>, as you chose" in html(page)
    page.chat_input[0].set_value("Mine too?").run()
    forced = {
        body["messages"][-1]["content"]: body["kv_transfer_params"]["kvarena"].get("topic")
        for body in server.completions()
    }
    assert forced == {
        "Who?": None,
        "And then?": None,
        "Mine?": "<i>cooking</i>",
        "And after that?": None,
        "Mine too?": "<i>cooking</i>",
    }
    assert next_topic(page).value == "The server finds it"


def test_a_chosen_topic_goes_before_the_foretold_one(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server, topics=("sports",))
    page = open_page(server)
    page.chat_input[0].set_value("Who?").run()
    type_text(page, "sports")
    assert "Goes to <b>sports</b>" in html(page)
    next_topic(page).set_value("<i>cooking</i>").run()
    assert "Goes to <b>&lt;i&gt;cooking&lt;/i&gt;</b>, as you chose" in html(page)
    page.chat_input[0].set_value("sports").run()
    assert server.completions()[-1]["kv_transfer_params"]["kvarena"]["topic"] == "<i>cooking</i>"
    assert next_topic(page).value == "The server finds it", "the choice was for one message"
    page.chat_input[0].set_value("And then?").run()
    assert "topic" not in server.completions()[-1]["kv_transfer_params"]["kvarena"]


def test_a_correction_takes_no_turn_that_another_tab_has_under_way(small_server: StartServer, open_page: Open) -> None:
    page = open_page(slot_server(small_server))
    page.chat_input[0].set_value("Who?").run()
    link = page.query_params["conversation"]
    opened = state.chat_store("conversation").get(link if isinstance(link, str) else link[0])
    assert opened is not None
    chat = opened.chat
    assert isinstance(chat, SlotChat)
    taken = chat.take_back()
    assert opened.begin(lambda: Run(chat, taken.context, "Who?", {}, taken.sampling))
    next(box for box in page.selectbox if box.label == "Topic").set_value("<i>cooking</i>")
    page.session_state[f"topic-{chat.key}-0-<i>cooking</i>"] = "mine"
    page.run()
    assert len(chat.turns) == 1
    assert "forced-topic" not in page.session_state


def test_a_server_that_cannot_foretell_topics_says_so(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    server.error = (404, "Not <b>Found</b>")
    type_text(page, "Who?")
    assert "Its topic is known once it is asked." in html(page)
    assert "HTTP 404: Not &lt;b&gt;Found&lt;/b&gt;" in html(page)


def test_new_conversation_and_the_arena_keep_chats_of_their_own(small_server: StartServer, open_page: Open) -> None:
    page = open_page(slot_server(small_server))
    page.chat_input[0].set_value("Who?").run()
    page.switch_page("views/arena.py").run()
    assert "Who?" not in html(page)
    page.query_params.clear()
    page.switch_page("views/conversations.py").run()
    assert "Who?" in html(page)
    page.button(key="new-chat").click().run()
    assert "Who?" not in html(page)


def test_without_the_contender_the_page_says_how_to_start_it(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(), name="plain")
    assert page.code[0].value == "./run-server.sh --contenders ai100"
    assert page.chat_input[0].disabled
    stopped = slot_server(small_server)
    stopped.stop()
    page = open_page(stopped)
    assert "isn't running" in page.info[0].value
    assert page.chat_input[0].disabled
    assert 'data-testid="server-cached" data-state="down"' in html(page)
