"""Which topic a message belongs to. A topic has a name; messages of one name share a slot.

Both kinds follow one rule (`Topics.topic_of`, as a table in docs/ai100.md), and differ in how near a message is to a
topic. What a topic is known by: its words in the file, the messages in it, the notes about it; and, for a message that
refers back, the answers in it and the notes it was answered from. Notes are about the topic whose words their titles
have, else about one that has the name of their series.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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


class Topics(ABC):
    """The rule; a kind of topics says how near a message is. `lists` are the file's. Thread-safe, without memory."""

    def __init__(
        self, lists: Mapping[str, Iterable[str]], threshold: float = THRESHOLD, notes: Notes = NO_NOTES
    ) -> None:
        """Raises `ValueError` for a threshold that isn't above 0 and at most 1."""
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")
        self.lists = lists
        self.threshold = threshold
        self.notes = notes

    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        """The topic's name; `earlier` are the conversation's turns, oldest first."""
        open_topics = list(dict.fromkeys(turn.topic for turn in reversed(earlier)))  # the most recent first
        follows = bool(open_topics) and is_follow_up(message)
        candidates = open_topics if follows else list(dict.fromkeys([*open_topics, *self.lists, *self._subjects]))
        nearness, turns = self._nearness(message), defaultdict[str, list[PastTurn]](list)
        for turn in earlier:
            turns[turn.topic].append(turn)
        near = {name: nearness(name, self._texts(turns[name], with_answers=follows)) for name in candidates}
        nearest = max(candidates, key=near.__getitem__, default=None)
        if nearest is not None and near[nearest] >= self.threshold:
            return nearest
        names_nothing = len(content_words(message)) <= MAX_SHORT_WORDS and not has_name(message)
        return open_topics[0] if follows or (open_topics and names_nothing) else _new_name(message)

    @abstractmethod
    def _nearness(self, message: str) -> Callable[[str, list[str]], float]:
        """Of this message to a topic, given by its name and the texts of its turns."""

    @cached_property
    def _stems(self) -> dict[str, frozenset[str]]:
        """Of each list of the file."""
        return {
            name: frozenset(stem(word) for entry in entries for word in words(entry))
            for name, entries in self.lists.items()
        }

    @cached_property
    def _subjects(self) -> dict[str, tuple[Note, ...]]:
        """The notes about each topic."""
        found: dict[str, tuple[Note, ...]] = {}
        for series, about in self.notes.subjects().items():
            titles = [set(content_words(title)) for title in {note.title for note in about}]
            shares = {
                name: sum(len(title & listed) / max(1, len(title)) for title in titles) / len(titles)
                for name, listed in self._stems.items()
            }
            name = max(shares, key=shares.__getitem__, default=series)
            topic = name if shares.get(name, 0.0) >= self.threshold else series
            found[topic] = found.get(topic, ()) + about
        return found

    def _texts(self, turns: Sequence[PastTurn], *, with_answers: bool) -> list[str]:
        """What was said in a topic's turns; with the answers, also the notes that it began with."""
        said = [turn.message for turn in turns]
        if with_answers and turns:
            said += [turn.answer for turn in turns if turn.answer]
            said += [note.text for note in self.notes.of_topic(turns[0].message)]
        return said


class KeywordTopics(Topics):
    """Nearness: the share of a message's content words that a topic knows. A word counts the more, the fewer notes have
    it; those of the file count in full.
    """

    def _nearness(self, message: str) -> Callable[[str, list[str]], float]:
        listed: frozenset[str] = frozenset().union(*self._stems.values())
        rarity = self.notes.words.rarity
        weights = {word: rarity("" if word in listed else word) for word in content_words(message)}

        def nearness(name: str, texts: list[str]) -> float:
            told = [*texts, *(note.text for note in self._subjects.get(name, ()))]
            known = self._stems.get(name, frozenset()).union(*map(content_words, told))
            return sum(weight for word, weight in weights.items() if word in known) / max(sum(weights.values()), 1e-9)

        return nearness


class EmbeddingTopics(Topics):
    """Nearness: the cosine of a message to the mean of a topic's words and messages, or to the nearest of its notes."""

    def __init__(
        self, embed: Embed, lists: Mapping[str, Iterable[str]], threshold: float = THRESHOLD, notes: Notes = NO_NOTES
    ) -> None:
        super().__init__(lists, threshold, notes)
        self.embed = embed

    def _nearness(self, message: str) -> Callable[[str, list[str]], float]:
        vector = self.embed([message])[0]

        def nearness(name: str, texts: list[str]) -> float:
            listed = [" ".join(self.lists[name])] if name in self.lists else []
            said, told = [*listed, *texts], [note.text for note in self._subjects.get(name, ())]
            to_mean = _cosine_to_mean(vector, self.embed(said)) if said else -1.0
            return max(to_mean, float((self.embed(told) @ vector).max()) if told else -1.0)

        return nearness


def load_topics(path: Path = TOPICS_FILE) -> dict[str, tuple[str, ...]]:
    """A file of `topic: [word, ...]`. Raises `ValueError` that names the file and what is wrong in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as a file of topics: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map topics to lists of words, not be {content!r}")
    return {_name(path, name): _entries(path, name, entries) for name, entries in content.items()}


def _new_name(message: str) -> str:
    telling = [word for word in words(message) if content_words(word)] or words(message) or ["talk"]
    return " ".join(telling[:NUM_NAMING_WORDS])


def _cosine_to_mean(vector: Vectors, others: Vectors) -> float:
    mean = others.mean(axis=0)
    return float(vector @ mean / max(float(np.linalg.norm(mean)), 1e-12))


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path} has a topic named {name!r}; names are texts")
    return name.strip()


def _entries(path: Path, name: str, entries: object) -> tuple[str, ...]:
    """Numbers are words too: a list may hold a year."""
    if not isinstance(entries, list) or not all(isinstance(entry, str | int) for entry in entries):
        raise ValueError(f"{path}: the words of topic {name!r} must be a list of words, not {entries!r}")
    return tuple(str(entry) for entry in entries)
