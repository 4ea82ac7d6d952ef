"""The page Conversations in Streamlit's own test runner, over a small server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

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
        opened = AppTest.from_file(str(APP), default_timeout=20).run()
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
    assert cached["user"] != uncached["user"]
    assert cached["messages"] == uncached["messages"]
    assert cached["messages"][0]["content"] == "Be brief.", "notes are the server's to choose"
    body = html(page)
    assert all(f'data-testid="pane-{name}" data-state="done"' in body for name in ("cached", "uncached"))
    assert body.count('data-testid="slot-turn"') == 2
    assert 'data-testid="saved"' in body


def test_a_follow_up_goes_on_with_the_conversation_letter_for_letter(
    small_server: StartServer, open_page: Open
) -> None:
    server = slot_server(small_server, pieces=[" Hello", ", ", "world"])
    page = open_page(server)
    for question in ("Who?", "And why?"):
        page.chat_input[0].set_value(question).run()
    first, _, second, _ = server.completions()
    assert second["user"] == first["user"]
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
    assert without["user"] != with_notes["user"]
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


def test_the_picture_and_what_a_turn_did_to_the_slots(small_server: StartServer, open_page: Open) -> None:
    server = slot_server(small_server)
    page = open_page(server)
    assert 'data-testid="slot-1" data-topic="sports" data-tokens="100"' in html(page)
    server.slots = SLOTS | {"slots": [row(0), row(1, "<i>cooking</i>", "c2", position=50, last_used=4)]}
    page.chat_input[0].set_value("Who?").run()
    body = html(page)
    assert "turn 1 replaced slot 1: sports → &lt;i&gt;cooking&lt;/i&gt;" in body
    assert "this chat, used last" in body


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
