"""The prompts of a soak run. The same seed makes the same ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.documents import build_messages

SHORT_TOKENS, LONG_TOKENS = 12, 96
SPECIAL_TEXTS = ("<|im_start|>system\n", "</s>", "<s>", "<|endoftext|>", "[INST]", "<bos>")


@dataclass(frozen=True)
class Prompt:
    """`ignores_end`: the answer goes on to its `max_tokens`, so that there is time to abort it."""

    kind: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    ignores_end: bool

    def body(self, model: str) -> dict[str, Any]:
        """Of a chat, with what its answer is compared by."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignores_end,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 5,
        }


class PromptMaker:
    """Makes prompts out of the texts of documents. Raises `ValueError` where there are none."""

    def __init__(self, texts: Sequence[str], system: str, separator: str, max_model_len: int, seed: int) -> None:
        if not texts:
            raise ValueError("there are no documents to make prompts of")
        self._texts, self._system, self._separator = list(texts), system, separator
        self._words = sorted({word for text in texts for word in text.split()})
        self._max_model_len = max_model_len
        self._rng = random.Random(f"prompts {seed}")

    def prompts(self, num: int) -> list[Prompt]:
        """Of every kind in turn; one in three has a long answer."""
        kinds = list(KINDS)
        return [self._prompt(kinds[index % len(kinds)]) for index in range(num)]

    def _prompt(self, kind: str) -> Prompt:
        texts, question = KINDS[kind](self), self.some_words(6) + "?"
        messages = build_messages(self._system, texts, question, self._separator)
        is_long = self._rng.random() < 1 / 3
        return Prompt(kind, tuple(messages), LONG_TOKENS if is_long else SHORT_TOKENS, is_long)

    def some_words(self, num: int) -> str:
        return " ".join(self._rng.choices(self._words, k=num))

    def documents(self) -> list[str]:
        """Chunks of the data folder, which the stack has stored, in a new order."""
        return self._rng.sample(self._texts, min(len(self._texts), self._rng.randint(2, 6)))

    def made_up(self) -> list[str]:
        """Chunks that nobody has stored, between known ones."""
        new = [self.some_words(self._rng.randint(20, 120)) for _ in range(3)]
        return [new[0], self._rng.choice(self._texts), *new[1:]]

    def records(self) -> list[str]:
        """Lines that differ in little, as in JSON or logs: hard on whoever looks for known text."""
        lines = [
            json.dumps({"level": "info", "service": "store", "id": self._rng.randrange(10**9), "took_ms": number})
            for number in range(12)
        ]
        return ["\n".join(lines), "\n".join(reversed(lines))]

    def repetition(self) -> list[str]:
        chunk = self._rng.choice(self._texts)
        return [f"{self._rng.choice(self._words)} " * 150, chunk, chunk, chunk]

    def oddities(self) -> list[str]:
        """Empty and short texts, separators and special tokens within, other scripts."""
        known = self._rng.choice(self._texts)
        odd = [
            "",
            " ",
            "a",
            self._separator * 3,
            "日本語 🦜 Ünïcödé " * 8,
            *SPECIAL_TEXTS,
            known + self._separator + known,
        ]
        return self._rng.sample(odd, len(odd))

    def bare(self) -> list[str]:
        return []

    def too_long(self) -> list[str]:
        """More tokens than the model takes: a word is one at least."""
        return [self.some_words(self._max_model_len)]


KINDS: dict[str, Callable[[PromptMaker], list[str]]] = {
    "documents": PromptMaker.documents,
    "made up": PromptMaker.made_up,
    "records": PromptMaker.records,
    "repetition": PromptMaker.repetition,
    "odd": PromptMaker.oddities,
    "bare": PromptMaker.bare,
    "too long": PromptMaker.too_long,
}
