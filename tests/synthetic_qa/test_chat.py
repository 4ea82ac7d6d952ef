from __future__ import annotations

import random

from kvarena.synthetic_qa import questions as chat
from kvarena.synthetic_qa.facts import chunk_text
from kvarena.synthetic_qa.questions import AnsweredQuestion, Quiz
from support.towns import small_town


def test_a_chat_is_what_the_page_sends() -> None:
    assert chat.messages(
        ["Bruno keeps bees.", "Vera drinks tea."], [AnsweredQuestion("What does Vera drink?", "tea")]
    ) == [
        {"role": "system", "content": chat.SYSTEM_PROMPT},
        {"role": "user", "content": "<note>Bruno keeps bees.<note>Vera drinks tea.<note>What does Vera drink?"},
    ]


def test_a_followup_is_a_further_turn() -> None:
    town = small_town(1)
    asked = Quiz(town, random.Random(1)).followups(1)[0]
    messages = chat.messages([chunk_text(chunk) for chunk in town], asked.turns)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1]["content"] == asked.question
    assert messages[2]["content"] == asked.history[0].answer


def test_every_separator_comes_up() -> None:
    rng = random.Random(1)
    assert {chat.random_separator(rng) for _ in range(400)} == set(chat.SEPARATORS)
