"""A chat stays one consistent conversation per contender, whatever happened to its answers."""

from __future__ import annotations

import itertools
import random

import pytest

from chat import Answer, Chat, Context, Turn
from contender_api import Sampling
from figures import Done, Event, Failed, Figures, FirstToken, Text
from kvarena.documents import TextChunk, build_messages
from settings import Contender

BLEND = Contender("blend", "Blend", "http://127.0.0.1:1")
PLAIN = Contender("plain", "Plain", "http://127.0.0.1:2")
CONTEXT = Context("Be brief.", (TextChunk("a", "Ann keeps bees."), TextChunk("b", "Ben keeps owls.")), " # # ")
OTHER = Context("Be brief.", CONTEXT.chunks[::-1], " # # ")
DONE = Done(Figures(first_token_ms=1.0), "stop")


def add_turn(chat: Chat, question: str, context: Context = CONTEXT, **events: list[Event]) -> Turn:
    turn = Turn.ask(question, context, (BLEND, PLAIN), Sampling())
    for name, answer in turn.answers.items():
        answer.start()
        for event in events.get(name, []):
            answer.apply(event)
        answer.interrupt()
    chat.turns.append(turn)
    return turn


def said(text: str) -> list[Event]:
    return [FirstToken(1.0), Text(text), DONE]


def roles(messages: list[dict[str, str]]) -> list[str]:
    return [message["role"] for message in messages]


def test_first_question_is_the_context_of_the_contract() -> None:
    expected = build_messages("Be brief.", CONTEXT.texts, "Who?", " # # ")
    assert Chat().messages("blend", CONTEXT, "Who?") == expected
    assert Chat().messages("plain", CONTEXT, "Who?") == expected


def test_follow_up_carries_each_sides_own_answers_and_no_chunks_again() -> None:
    chat = Chat()
    add_turn(chat, "Who keeps bees?", blend=said(" Ann"), plain=said(" Ben"))
    blend, plain = (chat.messages(name, CONTEXT, "And owls?") for name in ("blend", "plain"))
    assert roles(blend) == roles(plain) == ["system", "user", "assistant", "user"]
    assert (blend[2]["content"], plain[2]["content"]) == ("Ann", "Ben")
    assert blend[1] == plain[1]
    assert blend[1]["content"].endswith("Who keeps bees?")
    assert blend[3] == {"role": "user", "content": "And owls?"}


def test_interrupted_answer_is_part_of_the_conversation() -> None:
    chat = Chat()
    turn = add_turn(chat, "Who?", blend=[FirstToken(1.0), Text("An")], plain=said("Ann"))
    assert turn.answers["blend"].state == "interrupted"
    assert chat.messages("blend", CONTEXT, "Next?")[2]["content"] == "An"


def test_turn_without_an_answer_is_left_out_and_the_chunks_move_on() -> None:
    chat = Chat()
    add_turn(chat, "Who?", blend=[Failed("down")], plain=said("Ann"))
    messages = chat.messages("blend", CONTEXT, "Next?")
    assert messages == build_messages("Be brief.", CONTEXT.texts, "Next?", " # # ")
    assert len(chat.messages("plain", CONTEXT, "Next?")) == 4


def test_another_context_starts_a_conversation_of_its_own() -> None:
    chat = Chat()
    add_turn(chat, "Who?", blend=said("Ann"))
    assert chat.continues(CONTEXT)
    assert not chat.continues(OTHER)
    assert chat.messages("blend", OTHER, "Next?") == build_messages("Be brief.", OTHER.texts, "Next?", " # # ")
    add_turn(chat, "Next?", OTHER, blend=said("Ben"))
    assert [chat.begins_context(index) for index in range(2)] == [True, True]
    assert roles(chat.messages("blend", CONTEXT, "Back?")) == ["system", "user"], "what lies further back is over"


def test_nothing_changes_an_answer_that_is_over() -> None:
    answer = Answer(BLEND)
    answer.apply(Text("An"))
    answer.interrupt()
    for late in (Text("n"), DONE, Failed("broke"), FirstToken(2.0)):
        answer.apply(late)
    assert (answer.text, answer.state, answer.error) == ("An", "interrupted", "")


def test_failure_in_the_middle_keeps_text_and_first_token_time() -> None:
    answer = Answer(BLEND)
    for event in (FirstToken(7.0), Text("An"), Failed("broke off")):
        answer.apply(event)
    assert (answer.text, answer.state, answer.figures.first_token_ms) == ("An", "failed", 7.0)


@pytest.mark.parametrize("seed", range(20))
def test_roles_alternate_and_chunks_stand_once_whatever_happened(seed: int) -> None:
    chance = random.Random(seed)
    outcomes: list[list[Event]] = [said("yes"), [Failed("down")], [], [FirstToken(1.0), Text("par")], [DONE]]
    chat = Chat()
    for number in range(chance.randint(0, 8)):
        context = chance.choice([CONTEXT, CONTEXT, OTHER])
        add_turn(chat, f"q{number}", context, blend=chance.choice(outcomes), plain=chance.choice(outcomes))
        for name in ("blend", "plain"):
            messages = chat.messages(name, CONTEXT, "last")
            found = roles(messages)
            assert found[:2] == ["system", "user"]
            assert all(a != b for a, b in itertools.pairwise(found))
            assert found[-1] == "user"
            assert "".join(message["content"] for message in messages).count("Ann keeps bees.") == 1
            assert "Ann keeps bees." in messages[1]["content"]


def test_a_repeat_has_the_prompt_of_its_turn_and_is_in_no_conversation() -> None:
    chat = Chat()
    add_turn(chat, "First?", plain=said("One."))
    add_turn(chat, "Second?", plain=said("Two."))
    before = chat.messages("plain", CONTEXT, "Third?")
    repeat = add_turn(chat, "Second?", OTHER, plain=said("Other."))
    repeat.repeats, repeat.sampling = 1, Sampling(temperature=0.5)
    assert chat.messages("plain", CONTEXT, "Third?") == before
    assert chat.continues(CONTEXT)
    assert not chat.begins_context(2)
    assert chat.again_text(2) == "Asked again: the chunks in a new order and other settings"
    again = chat.over(chat.origin(2), OTHER).messages("plain", OTHER, "Second?")
    assert roles(again) == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in again[2:]] == ["One.", "Second?"]
    assert again[1]["content"] == build_messages("", OTHER.texts, "First?", " # # ")[0]["content"]
    assert [chat.missed(index)["blend"] for index in range(3)] == [0, 1, 1], "as the turn that is repeated"
    add_turn(chat, "Third?", blend=said("Three."), plain=said("Three."))
    assert chat.missed(3) == {"blend": 2, "plain": 0}, "repeats don't count"
