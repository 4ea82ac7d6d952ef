"""The prompts: chunks in a new order for every request, then a fresh question, exact to the token.

    special tokens · opening · separator chunk · separator chunk · ... · separator question

`context_tokens` counts the chunks with their separators. Opening (as a system prompt, but other words in each) and
question are never the same twice, so that no prefix cache finds anything. Prompts are token ids, which
`/v1/completions` takes: their lengths are what they say, on every server of one model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.bench.console import choice_among

STATES = ("warm", "half", "cold", "none")
"""Which chunks were seen before: all, every second one, none; `none` has no chunks at all, one text of that length.
In the order of measuring: those that need known chunks come before those that fill the store with new ones."""
EVERY_KNOWN = {"warm": 1, "half": 2}
"""One in so many chunks of a prompt is known."""
OPENING_TOKENS = 8
MARGIN_TOKENS = 64
"""More than opening, special tokens and a separator have."""
LEAST_CHUNK_TOKENS = 16
LEAST_VOCABULARY = 64


@dataclass(frozen=True)
class Cell:
    """What one set of rows is about: so many `context_tokens`, that state, `concurrency` requests at once."""

    context_tokens: int
    state: str
    concurrency: int


@dataclass(frozen=True)
class Workload:
    """`repeats` bursts of `concurrency` requests for every cell and variant, each request with `max_new_tokens`."""

    context_tokens: tuple[int, ...] = (512, 1000, 2000, 4000)
    states: tuple[str, ...] = STATES
    concurrency: tuple[int, ...] = (1,)
    chunk_tokens: int = 256
    question_tokens: int = 20
    max_new_tokens: int = 8
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for state in self.states:
            choice_among("state", state, STATES)
        least = {"context-tokens": LEAST_CHUNK_TOKENS, "concurrency": 1}
        for name, values in (("context-tokens", self.context_tokens), ("concurrency", self.concurrency)):
            if not values or min(values) < least[name]:
                raise ValueError(f"--{name} is {values}; it takes numbers from {least[name]}")
        if self.chunk_tokens < LEAST_CHUNK_TOKENS:
            raise ValueError(f"--chunk-tokens is {self.chunk_tokens}; chunks have at least {LEAST_CHUNK_TOKENS}")

    @property
    def cells(self) -> list[Cell]:
        states = [state for state in STATES if state in self.states]
        return [
            Cell(*cell) for cell in ((c, s, n) for c in self.context_tokens for s in states for n in self.concurrency)
        ]

    @property
    def longest_tokens(self) -> int:
        """At most so many have the longest prompt and its answer."""
        return max(self.context_tokens) + MARGIN_TOKENS + self.question_tokens + self.max_new_tokens


@dataclass(frozen=True)
class Vocabulary:
    """Token ids to make prompts of: ordinary words, the separator, and what stands before every prompt."""

    words: Sequence[int]
    separator: Sequence[int]
    special: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Any, separator: str) -> Vocabulary:
        """Words are tokens of letters only. Raises `ValueError` for a tokenizer with next to none."""
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        words = [token for token, text in enumerate(texts) if text.strip().isascii() and text.strip().isalpha()]
        words = sorted(set(words) - set(tokenizer.all_special_ids))
        if len(words) < LEAST_VOCABULARY:
            raise ValueError(f"the tokenizer has {len(words)} tokens that are words; {LEAST_VOCABULARY} are needed")
        alone = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        separator_ids = tokenizer.encode(separator, add_special_tokens=False)
        return cls(words, separator_ids, whole[: whole.index(alone[0])])


class Prompts:
    """The prompts of one context length: the known chunks stay the same, everything else is drawn."""

    def __init__(self, vocabulary: Vocabulary, workload: Workload, context_tokens: int, rng: random.Random) -> None:
        self._vocabulary, self._workload, self._rng = vocabulary, workload, rng
        self.known = [self._chunk(size) for size in chunk_sizes(context_tokens, workload.chunk_tokens)]

    def teach(self) -> list[int]:
        """A prompt that makes the known chunks known."""
        return self._prompt(self.known)

    def draw(self, state: str) -> list[int]:
        chunks = self._rng.sample(self.known, len(self.known))
        if state == "none":
            return self._prompt([self._words(sum(map(len, chunks)))], [self._words(len(self._vocabulary.separator))])
        every = EVERY_KNOWN.get(state)
        is_known = [every is not None and place % every == every - 1 for place in range(len(chunks))]
        return self._prompt([c if known else self._chunk(len(c)) for c, known in zip(chunks, is_known, strict=True)])

    def num_known(self, state: str) -> int:
        """Chunks of each prompt that were seen before."""
        every = EVERY_KNOWN.get(state)
        return len(self.known) // every if every else 0

    def _prompt(self, chunks: Sequence[list[int]], separator: Sequence[Sequence[int]] | None = None) -> list[int]:
        parts = [self._vocabulary.special, self._words(OPENING_TOKENS), *chunks]
        parts += separator or [self._vocabulary.separator]
        return [token for part in (*parts, self._words(self._workload.question_tokens)) for token in part]

    def _chunk(self, num_tokens: int) -> list[int]:
        separator = self._vocabulary.separator
        return [*separator, *self._words(num_tokens - len(separator))]

    def _words(self, num_tokens: int) -> list[int]:
        return self._rng.choices(self._vocabulary.words, k=num_tokens)


def chunk_sizes(context_tokens: int, chunk_tokens: int) -> list[int]:
    """Chunks of `chunk_tokens` and a shorter last one; a rest that is too short for a chunk makes the last one longer.

    >>> chunk_sizes(1000, 256), chunk_sizes(520, 256)
    ([256, 256, 256, 232], [256, 264])
    """
    count, rest = divmod(context_tokens, chunk_tokens)
    if rest >= LEAST_CHUNK_TOKENS or not count:
        return [chunk_tokens] * count + [rest]
    return [chunk_tokens] * (count - 1) + [chunk_tokens + rest]
