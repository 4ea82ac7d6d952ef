"""The prompts of `kvarena bench ttft`, `sustained` and `device`: chunks in a new order each time, then a new question.

    special tokens · opening · separator chunk · separator chunk · ... · separator question

`context_tokens` counts the chunks with their separators. No question comes twice. The opening is new each time too,
except where no server has a prefix cache: there all prompts begin alike, as with a system prompt. Prompts are token
ids, which `/v1/completions` takes, so that they have the same exact length on every server of one model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarena.bench.console import choice_among

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STATES = ("warm", "half", "cold", "none")
"""Which chunks were seen before: all, every second one, none; `none` has no chunks but one text of that length.
In the order of measuring: what needs known chunks comes before what fills the store with new ones."""
EVERY_KNOWN = {"warm": 1, "half": 2}
"""One in so many chunks of a prompt is known."""
OPENING_TOKENS = 8
"""Of an opening that never comes again: too few for a chunk."""
FIXED_OPENING_TOKENS = 24
SCORED_CHUNKS = 16
MARGIN_TOKENS = 64
"""Room for the opening, special tokens and a separator."""
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
    has_fixed_opening: bool = False

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
        return [Cell(c, s, n) for c in self.context_tokens for s in states for n in self.concurrency]

    @property
    def longest_tokens(self) -> int:
        """Of a prompt with its answer, at most."""
        return longest_tokens(max(self.context_tokens), self.question_tokens) + self.max_new_tokens


def longest_tokens(context_tokens: int, question_tokens: int) -> int:
    return context_tokens + MARGIN_TOKENS + question_tokens


@dataclass(frozen=True)
class Vocabulary:
    """Token ids to make prompts of: ordinary words, the separator, and what stands before every prompt."""

    words: Sequence[int]
    separator: Sequence[int]
    special: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, separator: str) -> Vocabulary:
        """Words are tokens of letters only. Raises `ValueError` for a tokenizer with next to none."""
        every = [[token] for token in range(tokenizer.get_vocab_size())]
        texts = tokenizer.decode_batch(every, skip_special_tokens=False)
        words = [token for token, text in enumerate(texts) if text.strip().isascii() and text.strip().isalpha()]
        special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        words = sorted(set(words) - special)
        if len(words) < LEAST_VOCABULARY:
            raise ValueError(f"the tokenizer has {len(words)} tokens that are words; {LEAST_VOCABULARY} are needed")
        alone = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a").ids
        separator_ids = tokenizer.encode(separator, add_special_tokens=False).ids
        return cls(words, separator_ids, whole[: whole.index(alone[0])])


class ContextOfChunks:
    """Draws chunks and makes prompts of them. With `fixed_opening` they all begin alike."""

    def __init__(
        self, vocabulary: Vocabulary, question_tokens: int, rng: random.Random, *, fixed_opening: bool = True
    ) -> None:
        self._vocabulary, self._question_tokens, self._rng = vocabulary, question_tokens, rng
        self._opening = self.words(FIXED_OPENING_TOKENS) if fixed_opening else None

    def prompt(self, chunks: Sequence[list[int]], end: Sequence[int] | None = None) -> list[int]:
        """`end`: what stands before the question in place of a separator."""
        opening = self._opening or self.words(OPENING_TOKENS)
        parts = [self._vocabulary.special, opening, *chunks, self._vocabulary.separator if end is None else end]
        return [token for part in (*parts, self.words(self._question_tokens)) for token in part]

    def chunk(self, num_tokens: int, text: Iterator[int] | None = None) -> list[int]:
        """Of random words, or of what comes next in an endless `text`."""
        num_words = num_tokens - len(self._vocabulary.separator)
        words = self.words(num_words) if text is None else itertools.islice(text, num_words)
        return [*self._vocabulary.separator, *words]

    def words(self, num_tokens: int) -> list[int]:
        return self._rng.choices(self._vocabulary.words, k=num_tokens)


class Prompts:
    """The prompts of one context length: the known chunks stay the same, everything else is drawn.

    The known chunks are cut from `text`, over and over where it is short; without one they are random words.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        workload: Workload,
        context_tokens: int,
        rng: random.Random,
        text: Sequence[int] = (),
    ) -> None:
        self._rng, self._num_separator_tokens = rng, len(vocabulary.separator)
        self._context = ContextOfChunks(
            vocabulary, workload.question_tokens, rng, fixed_opening=workload.has_fixed_opening
        )
        words = repeated(text) if text else None
        self.known = [self._context.chunk(size, words) for size in chunk_sizes(context_tokens, workload.chunk_tokens)]

    def teach(self) -> list[int]:
        return self._context.prompt(self.known)

    def teach_scores(self) -> list[list[int]]:
        """Prompts in which each of them stands between others, none too long to be scored."""
        size = min(SCORED_CHUNKS, len(self.known))
        windows = range(0, len(self.known), max(1, size - 2))
        around = [[self.known[(at + place) % len(self.known)] for place in range(size)] for at in windows]
        return [self._context.prompt(chunks) for chunks in around]

    def draw(self, state: str) -> list[int]:
        chunks = self._rng.sample(self.known, len(self.known))
        if state == "none":
            text = self._context.words(sum(map(len, chunks)))
            return self._context.prompt([text], self._context.words(self._num_separator_tokens))
        every = EVERY_KNOWN.get(state)
        is_known = [every is not None and place % every == every - 1 for place in range(len(chunks))]
        return self._context.prompt(
            [c if known else self._context.chunk(len(c)) for c, known in zip(chunks, is_known, strict=True)]
        )

    def num_known(self, state: str) -> int:
        """Chunks of each prompt that were seen before."""
        every = EVERY_KNOWN.get(state)
        return len(self.known) // every if every else 0


def repeated(text: Sequence[int]) -> Iterator[int]:
    """Without end; each round begins one token later, so that chunks cut from it may all differ.

    >>> list(itertools.islice(repeated([1, 2, 3]), 8))
    [1, 2, 3, 2, 3, 3, 1, 2]
    """
    for turn in itertools.count():
        yield from text[turn % len(text) :]


def chunk_sizes(context_tokens: int, chunk_tokens: int) -> list[int]:
    """Chunks of `chunk_tokens` and a shorter last one; a rest too short for a chunk makes the last one longer.

    >>> chunk_sizes(1000, 256), chunk_sizes(520, 256)
    ([256, 256, 256, 232], [256, 264])
    """
    count, rest = divmod(context_tokens, chunk_tokens)
    if rest >= LEAST_CHUNK_TOKENS or not count:
        return [chunk_tokens] * count + [rest]
    return [chunk_tokens] * (count - 1) + [chunk_tokens + rest]
