"""How a question on chunks becomes a chat, the same for training, evaluation and the files of a town."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from kvarena.context import build_messages
from kvarena.worlds.questions import Question, Turn

SYSTEM_PROMPT = "You answer questions about the town. Use only the notes below."
OTHER_SYSTEM_PROMPTS = (
    "You answer questions about a town from notes.",
    "Answer in one word from the notes. If they do not say it, say so.",
    "You are a helpful assistant.",
    "",
)
NOTE = "<note>"
SEPARATORS = (NOTE, "\n\n", " # # ", " ", "\n", "")
_SEPARATOR_WEIGHTS = (60, 14, 10, 8, 4, 4)


def messages(
    texts: Sequence[str], turns: Sequence[Turn], separator: str = NOTE, system: str = SYSTEM_PROMPT
) -> list[dict[str, str]]:
    """The chat up to the last turn's question; the answers before it are the gold ones."""
    chat = build_messages(system, texts, turns[0].question, separator)
    for before, turn in itertools.pairwise(turns):
        chat += [{"role": "assistant", "content": before.answer}, {"role": "user", "content": turn.question}]
    return chat


def question_messages(texts: Sequence[str], question: Question, separator: str = NOTE) -> list[dict[str, str]]:
    return messages(texts, question.turns, separator)


def random_separator(rng: random.Random) -> str:
    return rng.choices(SEPARATORS, _SEPARATOR_WEIGHTS)[0]


def random_system_prompt(rng: random.Random) -> str:
    return SYSTEM_PROMPT if rng.random() < 0.8 else rng.choice(OTHER_SYSTEM_PROMPTS)
