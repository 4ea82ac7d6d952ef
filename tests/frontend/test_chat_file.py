"""What of a chat is kept, what of it comes back, how much is kept, and what a file that fails costs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from chat import Chat, Context, Turn
from chat_file import ChatFile
from contender_api import Sampling
from figures import Done, Figures, FirstToken, Sent, Text, with_report
from kvarena.documents import TextChunk
from runs import ChatStore
from settings import Contender
from slots import SlotChat
from support.small_openai_server import AI100_REPORT, SIMLLM_REPORT
from tokens import AnswerToken, Span

CONTENDERS = [Contender(name, name.title(), "http://127.0.0.1:1") for name in ("blend", "plain")]
CONTEXT = Context("Be brief.", (TextChunk("pasted", "Ann keeps <b>bees</b>.\n\tÜ 🐝"),), " # # ")


def asked(chat: Chat, question: str = "Who?", context: Context = CONTEXT, is_over: bool = True) -> Turn:
    sampling = Sampling(0.5, 9, recomputing={"policy": "kv_deviation", "ratio": 0.4, "max_ttft_ms": 250.0})
    turn = Turn.ask(question, context, CONTENDERS, sampling)
    for answer in turn.answers.values():
        answer.start()
        figures = Figures(spans=(Span(0, 9, "reused"),), tokens=(AnswerToken("Ann", 0.5, (("Ben", 0.25),)),))
        figures = with_report(figures, SIMLLM_REPORT, "similar_task")
        for event in (Sent({"model": "m"}), FirstToken(1.5), Text("Ann."), Done(figures, "stop")):
            if is_over or not isinstance(event, Done):
                answer.apply(event)
    chat.turns.append(turn)
    return turn


@pytest.fixture
def file(tmp_path: Path) -> ChatFile:
    return ChatFile(tmp_path / "home" / "chats.db")


def test_a_chat_comes_back_as_it_was_with_a_restarted_page(file: ChatFile) -> None:
    store = ChatStore(file=file)
    opened = store.new()
    asked(opened.chat)
    asked(opened.chat, "And then?").repeats = 0
    opened.keep(opened.chat)
    restarted = ChatStore(file=ChatFile(file._path))
    again = restarted.get(opened.chat.key)
    assert again
    assert again.chat == opened.chat
    assert again is restarted.get(opened.chat.key)
    assert again.chat.asked(1, "blend") == opened.chat.asked(1, "blend")
    assert not file.problem


def test_a_conversation_on_slots_comes_back_and_is_no_chat_of_the_arena(file: ChatFile) -> None:
    chat = SlotChat(slot_history=["turn 1 filled slot 0: tea"], conversations={"a"})
    turn = asked(chat, context=Context("Be brief.", notes=True))
    for answer in turn.answers.values():
        answer.figures = with_report(Figures(), AI100_REPORT, "slots")
    file.keep(chat)
    assert file.load(chat.key, SlotChat) == chat
    assert file.load(chat.key, Chat) is None


def test_what_was_under_way_when_the_page_ended_is_interrupted(file: ChatFile) -> None:
    chat = Chat()
    asked(chat, is_over=False)
    file.keep(chat)
    loaded = file.load(chat.key, Chat)
    assert loaded
    assert [(a.state, a.text) for a in loaded.turns[0].answers.values()] == [("interrupted", "Ann.")] * 2


def test_no_chat_is_found_without_its_key(file: ChatFile) -> None:
    chats = [Chat() for _ in range(50)]
    for chat in chats:
        asked(chat)
        file.keep(chat)
    assert len({chat.key for chat in chats}) == 50
    assert all(len(chat.key) == 32 for chat in chats), "128 bits, of which 122 are random"
    for key in ("", "%", "*", chats[0].key[:-1], chats[0].key.upper() + " ", "' OR 1=1 --"):
        assert file.load(key, Chat) is None
    assert file._path.stat().st_mode & 0o077 == 0


def test_the_chats_that_were_not_written_for_the_longest_time_go(tmp_path: Path) -> None:
    def left(file: ChatFile, chats: list[Chat]) -> list[int]:
        for chat in [*chats, chats[1]]:
            asked(chat)
            file.keep(chat)
        return [number for number, chat in enumerate(chats) if file.load(chat.key, Chat)]

    chats = [Chat() for _ in range(5)]
    assert left(ChatFile(tmp_path / "count.db", max_chats=3), chats) == [1, 3, 4]
    assert left(ChatFile(tmp_path / "bytes.db", max_bytes=1), chats) == [1], "the last one is kept, whatever its size"


@pytest.mark.parametrize("damage", ["below_a_file", "garbage", "locked"])
def test_a_file_that_fails_costs_lasting_and_nothing_else(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chat_file.BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "chats.db"
    other = None
    if damage == "below_a_file":
        path.write_text("")
        path = path / "chats.db"
    elif damage == "garbage":
        path.write_bytes(b"no database " * 1000)
    else:
        ChatFile(path)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
    file = ChatFile(path)
    opened = ChatStore(file=file).new()
    asked(opened.chat)
    opened.keep(opened.chat)
    assert str(path) in file.problem
    assert ChatStore(file=file).get("gone") is None
    if other:
        other.rollback()
        other.close()
        opened.keep(opened.chat)
        assert not file.problem, "it lasts again"
        assert file.load(opened.chat.key, Chat) == opened.chat


def test_a_damaged_chat_is_not_known_and_the_others_are(file: ChatFile) -> None:
    chats = [Chat(), Chat()]
    for chat in chats:
        asked(chat)
        file.keep(chat)
    with sqlite3.connect(file._path) as rows:
        rows.execute("UPDATE chats SET document = ? WHERE key = ?", (b"damaged", chats[0].key))
    assert file.load(chats[0].key, Chat) is None
    assert file.load(chats[1].key, Chat) == chats[1]


def test_the_name_that_servers_log_of_a_conversation_does_not_open_it() -> None:
    chat = SlotChat()
    assert chat.key not in chat.name(CONTEXT)
