"""Which topic a message belongs to. A topic has a name; messages of one name share a slot.

Both kinds follow one rule, and differ in how near a message is to a topic:

| the message | its topic |
|---|---|
| refers back ("What is his highest score?") | the nearest of this conversation's, else the most recent |
| is near one of this conversation's, of the file or of the notes | the nearest; of equals the most recent |
| is short and names nothing ("When was the wedding?") | the most recent of this conversation's |
| anything else | a new one, named by its first few words |

What a topic is known by: its words in the file, the messages in it, the notes about it; and, for a message that
refers back, the answers in it and the notes it was answered from. Notes are about the topic whose words their titles
have, else about one that has the name of their series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from ai100.notes import NO_NOTES, Embed, Note, Notes, Vectors
from ai100.words import content_words, has_name, is_follow_up, stem, words

TOPICS_FILE = Path(__file__).with_name("topics.yaml")
THRESHOLD = 0.3
NUM_NAMING_WORDS = 3

MAX_SHORT_WORDS = 2


@dataclass(frozen=True)
class PastTurn:
    """A turn of a conversation: its topic's name, what the user said, and the answer, if there is one yet."""

    topic: str
    message: str
    answer: str = ""


class Topics(Protocol):
    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        """The topic's name; `earlier` are the conversation's turns, oldest first. Thread-safe, without memory."""
        ...


@dataclass(frozen=True)
class KeywordTopics:
    """Nearness: the share of a message's content words that a topic knows. A word counts the more, the fewer notes have
    it; those of the file count in full.
    """

    lists: Mapping[str, Iterable[str]]
    threshold: float = THRESHOLD
    notes: Notes = NO_NOTES

    def __post_init__(self) -> None:
        _check(self.threshold)

    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        weights = {word: self._weight(word) for word in content_words(message)}

        by_topic = _by_name(earlier)

        def nearness(name: str, follows: bool) -> float:
            known = self._stems.get(name, frozenset()).union(
                *map(content_words, _texts(by_topic.get(name, ()), self.notes, with_answers=follows)),
                *(content_words(note.text) for note in self._subjects.get(name, ())),
            )
            return sum(weight for word, weight in weights.items() if word in known) / max(sum(weights.values()), 1e-9)

        return _choose(message, earlier, [*self.lists, *self._subjects], nearness, self.threshold)

    def _weight(self, word: str) -> float:
        return self.notes.words.rarity("" if word in self._listed else word)

    @cached_property
    def _stems(self) -> dict[str, frozenset[str]]:
        return {name: _stems(entries) for name, entries in self.lists.items()}

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset().union(*self._stems.values())

    @cached_property
    def _subjects(self) -> dict[str, tuple[Note, ...]]:
        return _by_topic(self.notes, self._stems, self.threshold)


@dataclass(frozen=True)
class EmbeddingTopics:
    """Nearness: the cosine of a message to the mean of a topic's words and messages, or to the nearest of its notes."""

    embed: Embed
    lists: Mapping[str, Iterable[str]]
    threshold: float = THRESHOLD
    notes: Notes = NO_NOTES

    def __post_init__(self) -> None:
        _check(self.threshold)

    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        vector, by_topic = self.embed([message])[0], _by_name(earlier)

        def nearness(name: str, follows: bool) -> float:
            listed = [" ".join(self.lists[name])] if name in self.lists else []
            said = [*listed, *_texts(by_topic.get(name, ()), self.notes, with_answers=follows)]
            told = [note.text for note in self._subjects.get(name, ())]
            return max(_cosine(vector, self.embed(said)) if said else -1.0, _nearest(vector, told, self.embed))

        return _choose(message, earlier, [*self.lists, *self._subjects], nearness, self.threshold)

    @cached_property
    def _subjects(self) -> dict[str, tuple[Note, ...]]:
        stems = {name: _stems(entries) for name, entries in self.lists.items()}
        return _by_topic(self.notes, stems, self.threshold)


def load_topics(path: Path = TOPICS_FILE) -> dict[str, tuple[str, ...]]:
    """A file of `topic: [word, ...]`. Raises `ValueError` that names the file and what is wrong in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as a file of topics: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map topics to lists of words, not be {content!r}")
    return {_name(path, name): _entries(path, name, entries) for name, entries in content.items()}


def _choose(
    message: str,
    earlier: Sequence[PastTurn],
    known: Iterable[str],
    nearness: Callable[[str, bool], float],
    threshold: float,
) -> str:
    """`nearness` of a topic by its name, for a message that refers back or not."""
    open_topics = list(dict.fromkeys(turn.topic for turn in reversed(earlier)))  # The most recent first.
    follows = bool(open_topics) and is_follow_up(message)
    candidates = open_topics if follows else list(dict.fromkeys([*open_topics, *known]))
    near = {name: nearness(name, follows) for name in candidates}
    nearest = max(candidates, key=near.__getitem__, default=None)
    if nearest is not None and near[nearest] >= threshold:
        return nearest
    names_nothing = len(content_words(message)) <= MAX_SHORT_WORDS and not has_name(message)
    return open_topics[0] if follows or (open_topics and names_nothing) else _new_name(message)


def _new_name(message: str) -> str:
    telling = [word for word in words(message) if content_words(word)] or words(message) or ["talk"]
    return " ".join(telling[:NUM_NAMING_WORDS])


def _by_name(turns: Iterable[PastTurn]) -> dict[str, list[PastTurn]]:
    found: dict[str, list[PastTurn]] = {}
    for turn in turns:
        found.setdefault(turn.topic, []).append(turn)
    return found


def _texts(turns: Sequence[PastTurn], notes: Notes, *, with_answers: bool) -> list[str]:
    """What was said in a topic's turns; with the answers, also the notes that it began with."""
    said = [turn.message for turn in turns]
    if with_answers and turns:
        said += [turn.answer for turn in turns if turn.answer]
        said += [note.text for note in notes.of_topic(turns[0].message)]
    return said


def _by_topic(notes: Notes, stems: Mapping[str, frozenset[str]], threshold: float) -> dict[str, tuple[Note, ...]]:
    """The notes about each topic."""
    found: dict[str, tuple[Note, ...]] = {}
    for series, about in notes.subjects().items():
        titles = [set(content_words(title)) for title in {note.title for note in about}]
        shares = {
            name: sum(len(title & listed) / max(1, len(title)) for title in titles) / len(titles)
            for name, listed in stems.items()
        }
        name = max(shares, key=shares.__getitem__, default=series)
        topic = name if shares.get(name, 0.0) >= threshold else series
        found[topic] = found.get(topic, ()) + about
    return found


def _cosine(vector: Vectors, others: Vectors) -> float:
    """To the mean of the others."""
    mean = others.mean(axis=0)
    return float(vector @ mean / max(float(np.linalg.norm(mean)), 1e-12))


def _nearest(vector: Vectors, texts: Sequence[str], embed: Embed) -> float:
    return float((embed(texts) @ vector).max()) if texts else -1.0


def _stems(entries: Iterable[str]) -> frozenset[str]:
    return frozenset(stem(word) for entry in entries for word in words(entry))


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path} has a topic named {name!r}; names are texts")
    return name.strip()


def _entries(path: Path, name: str, entries: object) -> tuple[str, ...]:
    """Numbers are words too: a list may hold a year."""
    if not isinstance(entries, list) or not all(isinstance(entry, str | int) for entry in entries):
        raise ValueError(f"{path}: the words of topic {name!r} must be a list of words, not {entries!r}")
    return tuple(str(entry) for entry in entries)
