"""Which topic a message belongs to. A topic has a name; messages of one name share a slot.

Both kinds follow one rule, and differ in how near a message is to a topic:

| the message | its topic |
|---|---|
| refers back ("What is his highest score?") | the nearest of this conversation's, else the most recent |
| is near one of this conversation's, or of the file | the nearest; of equals the most recent |
| anything else | a new one, named by its first few words |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from ai100.words import content_words, is_follow_up, stem, words

TOPICS_FILE = Path(__file__).with_name("topics.yaml")
THRESHOLD = 0.3
NUM_NAMING_WORDS = 3

Spoken = tuple[str, str]
"""A topic's name, and a user's message in it."""

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to unit vectors `(len(texts), D)`; zeros for a text that says nothing."""


class Topics(Protocol):
    def topic_of(self, message: str, earlier: Sequence[Spoken]) -> str:
        """The topic's name; `earlier` are the conversation's messages, oldest first. Thread-safe, without memory."""
        ...


class KeywordTopics:
    """Nearness: the share of a message's content words that a topic knows, from its list or its messages."""

    def __init__(self, lists: Mapping[str, Iterable[str]], threshold: float = THRESHOLD) -> None:
        self._threshold = _checked(threshold)
        self._lists = {name: _stems(entries) for name, entries in lists.items()}

    def topic_of(self, message: str, earlier: Sequence[Spoken]) -> str:
        said = frozenset(content_words(message))

        def nearness(name: str) -> float:
            known = self._lists.get(name, frozenset()).union(*(content_words(text) for text in _texts(name, earlier)))
            return len(said & known) / max(1, len(said))

        return _choose(message, earlier, self._lists, nearness, self._threshold)


class EmbeddingTopics:
    """Nearness: the cosine of a message to the mean of what a topic has, its list and its messages."""

    def __init__(self, embed: Embed, lists: Mapping[str, Iterable[str]], threshold: float = THRESHOLD) -> None:
        self._threshold = _checked(threshold)
        self._embed = embed
        self._lists = {name: " ".join(entries) for name, entries in lists.items()}

    def topic_of(self, message: str, earlier: Sequence[Spoken]) -> str:
        vector = self._embed([message])[0]

        def nearness(name: str) -> float:
            listed = [self._lists[name]] if name in self._lists else []
            mean = self._embed([*listed, *_texts(name, earlier)]).mean(axis=0)
            return float(vector @ mean / max(float(np.linalg.norm(mean)), 1e-12))

        return _choose(message, earlier, self._lists, nearness, self._threshold)


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
    earlier: Sequence[Spoken],
    lists: Iterable[str],
    nearness: Callable[[str], float],
    threshold: float,
) -> str:
    open_topics = list(dict.fromkeys(name for name, _ in reversed(earlier)))  # The most recent first.
    follows = bool(open_topics) and is_follow_up(message)
    candidates = open_topics if follows else list(dict.fromkeys([*open_topics, *lists]))
    near = {name: nearness(name) for name in candidates}
    nearest = max(candidates, key=near.__getitem__, default=None)
    if nearest is not None and near[nearest] >= threshold:
        return nearest
    return open_topics[0] if follows else _new_name(message)


def _new_name(message: str) -> str:
    telling = [word for word in words(message) if content_words(word)] or words(message) or ["talk"]
    return " ".join(telling[:NUM_NAMING_WORDS])


def _texts(name: str, earlier: Sequence[Spoken]) -> list[str]:
    return [text for topic, text in earlier if topic == name]


def _stems(entries: Iterable[str]) -> frozenset[str]:
    return frozenset(stem(word) for entry in entries for word in words(entry))


def _checked(threshold: float) -> float:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")
    return threshold


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path} has a topic named {name!r}; names are texts")
    return name.strip()


def _entries(path: Path, name: str, entries: object) -> tuple[str, ...]:
    """Numbers are words too: a list may hold a year."""
    if not isinstance(entries, list) or not all(isinstance(entry, str | int) for entry in entries):
        raise ValueError(f"{path}: the words of topic {name!r} must be a list of words, not {entries!r}")
    return tuple(str(entry) for entry in entries)
