"""Which notes of a folder a topic is answered from: those nearest to its first message, within a budget of tokens.

A note is a paragraph of a file, under the file's title. The choice depends only on what was asked, never on what is in
a slot, so a prompt is the same with slots and without. A topic's notes are chosen for its first message, and stand in
the system message; a later message gets those it needs besides, in half the budget, before its question.

Files of a series (`kohli-1-...`, `kohli-2-...`) are about one subject. How near a note is to a message is told by
BM25 (Robertson and Zaragoza 2009), or by the cosine of sentence vectors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ai100.words import MAX_REMEMBERED_CHARACTERS, content_words, telling_stems, words
from kvarena.documents import join_chunks, load_chunks, load_system_prompt, without_special_tokens
from kvarena.engines.base import Tokenizer
from kvarena.splitting import special_tokens

NOTES_TOKENS = 200
CONTEXT_SHARE = 3
"""The notes of a topic take at most this part of a slot: a third."""
MAX_TITLE_CHARACTERS = 100
MAX_NOTE_CHARACTERS = 700
MAX_MARK_CHARACTERS = 64
_MARK_PIECE = re.compile(r"\s{1,64}|[<\[({][^\w\s]{0,3}[\w-]{1,32}[^\w\s]{0,3}[>\])}]|([^\w\s])\1{0,63}")
EARLIER_WEIGHT = 0.3
"""Of the topic's earlier messages, beside 1 for the new one."""

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to unit vectors `(len(texts), D)`; zeros for a text that says nothing."""


@dataclass(frozen=True)
class Note:
    """`name` is its file's, without suffix."""

    name: str
    text: str
    num_tokens: int

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def series(self) -> str:
        """`kohli` for `kohli-1-early-life`, the whole name where it has no number, nothing where it begins with one."""
        return " ".join(re.findall(r"[^\W_]+", re.split(r"\d", self.name, maxsplit=1)[0]))


class BM25Similarity:
    """How near notes are to a message: by the words that they share, the rarer the more. A note's title counts twice.

    `least`: what a note must have to be shown to the model at all; `kept`: what share of the best one's score the
    others need.
    """

    least = 0.3
    kept = 0.5
    _saturation, _length = 1.2, 0.75
    """BM25's k1 and b."""

    def __init__(self, notes: Sequence[Note]) -> None:
        self._counts = [Counter(telling_stems(f"{note.title} {note.text}")) for note in notes]
        self._num_with = Counter(word for counts in self._counts for word in counts)
        lengths = np.array([counts.total() for counts in self._counts], np.float32)
        mean = max(1.0, float(lengths.sum()) / max(1, len(notes)))
        self._norms = self._saturation * (1 - self._length + self._length * lengths / mean)

    def rarity(self, word: str) -> float:
        """Of a stem: BM25's inverse document frequency, largest for one that stands in no note."""
        num_with = self._num_with[word]
        return math.log(1 + (len(self._counts) - num_with + 0.5) / (num_with + 0.5))

    def own(self, message: str) -> Vectors:
        """`(N,)`, from 0 to 1: how much of the message each note covers."""
        said = content_words(message)
        return np.array(
            [sum(word in counts for word in said) / max(1, len(said)) for counts in self._counts], np.float32
        )

    def ranked(self, message: str, earlier: Sequence[str]) -> Vectors:
        """`(N,)`, to compare notes by; the topic's earlier messages say what a follow-up is about."""
        weights = {word: EARLIER_WEIGHT for text in earlier for word in content_words(text)}
        weights |= dict.fromkeys(content_words(message), 1.0)
        scores = np.zeros(len(self._counts), np.float32)
        for word, weight in weights.items():
            counts = np.array([counts[word] for counts in self._counts], np.float32)
            scores += weight * self.rarity(word) * counts * (self._saturation + 1) / (counts + self._norms)
        return scores


class CosineSimilarity:
    """The same by the cosine of sentence vectors."""

    least = 0.3
    kept = 0.6

    def __init__(self, notes: Sequence[Note], embed: Embed) -> None:
        self._embed = embed
        self._vectors = embed([note.text for note in notes])

    def own(self, message: str) -> Vectors:
        near: Vectors = self._vectors @ self._embed([message])[0]
        return near

    def ranked(self, message: str, earlier: Sequence[str]) -> Vectors:
        scores = self.own(message)
        return scores + EARLIER_WEIGHT * self.own(" ".join(earlier)) if earlier else scores


class Notes:
    """The notes of a folder and the rule that chooses among them. Thread-safe.

    `budget` bounds the tokens of a topic's notes and of a turn's; 0 chooses none. `system` is the folder's own prompt.
    """

    def __init__(
        self,
        notes: Sequence[Note] = (),
        budget: int = NOTES_TOKENS,
        *,
        system: str = "",
        separator: str = "\n\n",
        embed: Embed | None = None,
    ) -> None:
        if budget < 0:
            raise ValueError(f"notes_tokens must be at least 0, not {budget}")
        self.notes = tuple(notes) if budget else ()
        self.budget = budget
        self.system = system if budget else ""
        self.separator = separator
        self.words = BM25Similarity(self.notes)
        self._nearness: BM25Similarity | CosineSimilarity = self.words
        if embed and self.notes:
            self._nearness = CosineSimilarity(self.notes, embed)
        self._remembered_ranks = lru_cache(maxsize=1024)(self._rank)

    def of_topic(self, message: str) -> tuple[Note, ...]:
        """For a topic that begins with this message, the nearest first."""
        return self._choose(message, (), (), self.budget)

    def of_turns(self, of_topic: Sequence[Note], first: str, messages: Sequence[str]) -> Iterator[tuple[Note, ...]]:
        """For each of a topic's turns since it began or was reset. `first` is the topic's first message."""
        known, said = list(of_topic), [first]
        for message in messages:
            new = self._choose(message, tuple(said), known, self.budget // 2) if message != first else ()
            known += new
            said.append(message)
            yield new

    def subjects(self) -> Mapping[str, tuple[Note, ...]]:
        """The notes of each series."""
        names = dict.fromkeys(note.series for note in self.notes if note.series)
        return {name: tuple(note for note in self.notes if note.series == name) for name in names}

    def question_in(self, message: str) -> str:
        """What a message asks, where it brings chunks of its own before that."""
        separator = self._separator_of(message)
        return (separator and message.rpartition(separator)[2].strip()) or message

    def is_context(self, message: str) -> bool:
        """Whether a message brings chunks, as `kvarena.documents.join_chunks` writes them."""
        return self._separator_of(message) is not None

    def _separator_of(self, message: str) -> str | None:
        """The server's own, else what looks like one of the client's; None for a message without chunks."""
        if message.startswith(self.separator) and message.count(self.separator) > 1:
            return self.separator
        return clients_separator(message)

    def joined(self, notes: Sequence[Note]) -> str:
        return join_chunks([note.text for note in notes], self.separator)

    def _choose(self, message: str, earlier: tuple[str, ...], known: Collection[Note], room: int) -> tuple[Note, ...]:
        chosen: list[Note] = []
        is_short = len(message) + sum(map(len, earlier)) <= MAX_REMEMBERED_CHARACTERS
        for note in (self._remembered_ranks if is_short else self._rank)(message, earlier):
            fits = note.num_tokens <= (room if chosen else self.budget)
            if note not in known and fits:
                chosen.append(note)
                room -= note.num_tokens
        return tuple(chosen)

    def _rank(self, message: str, earlier: tuple[str, ...]) -> tuple[Note, ...]:
        """Those near enough, the nearest first; of equals the first of the folder."""
        if not self.notes or not content_words(message):
            return ()
        scores = self._nearness.ranked(message, earlier)
        fits = (self._nearness.own(message) >= self._nearness.least) & (scores >= self._nearness.kept * scores.max())
        return tuple(self.notes[at] for at in np.argsort(-scores, kind="stable") if fits[at])


def clients_separator(message: str) -> str | None:
    r"""A separator of the client's own: a mark that a message begins with and has again before its question.

    A mark is a tag (`[SEP]`), three symbols or more (`\n---\n`), two with white space after them (` # # `), or nothing
    but white space with two line breaks. Where several would do, it is one with symbols, the nearest to the question.
    """
    ends, end = [], 0
    while end < MAX_MARK_CHARACTERS and (piece := _MARK_PIECE.match(message, end)):
        ends.append(end := piece.end())
    marks = filter(_is_mark, (message[:end] for end in ends))
    again = [mark for mark in marks if message.count(mark) > 1 and words(message.rpartition(mark)[2])]
    return max(again, key=lambda mark: (not mark.isspace(), message.rfind(mark) + len(mark)), default=None)


def _is_mark(text: str) -> bool:
    num_symbols = len("".join(text.split()))
    if num_symbols == 0:
        return text.count("\n") > 1
    return num_symbols > 2 or (num_symbols == 2 and text[-1].isspace())


def passages(text: str) -> list[str]:
    """A document's paragraphs, each under the document's title if it has one: a short first paragraph.

    One of more than `MAX_NOTE_CHARACTERS` is cut between sentences.
    """
    title, *paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()] or [""]
    if not paragraphs or len(title) > MAX_TITLE_CHARACTERS:
        title, paragraphs = "", [title, *paragraphs]
    return [f"{title}\n{piece}".strip() for paragraph in paragraphs for piece in _pieces(paragraph)]


def _pieces(paragraph: str) -> list[str]:
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
        longer = f"{pieces[-1]} {sentence}".strip()
        if pieces[-1] and len(longer) > MAX_NOTE_CHARACTERS:
            pieces.append(sentence)
        else:
            pieces[-1] = longer
    return pieces


def load_notes(folder: Path, tokenizer: Tokenizer, budget: int, separator: str, embed: Embed | None = None) -> Notes:
    """Raises `ValueError` as `load_chunks` does."""
    special = special_tokens(tokenizer.backend_tokenizer)
    notes = [
        Note(chunk.name, text, len(tokenizer.encode(text, add_special_tokens=False)))
        for chunk in load_chunks(folder)
        for text in passages(without_special_tokens(chunk.text, special))
    ]
    return Notes(notes, budget, system=load_system_prompt(folder), separator=separator, embed=embed)


NO_NOTES = Notes(budget=0)
