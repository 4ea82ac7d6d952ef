"""What topics see of a message: its words, and whether it refers to something said before."""

from __future__ import annotations

import re
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_STOP_WORDS = """
a about after all also am an and any are as at be been before best but by can come could did do does doing done down
each else ever every for from get give go good got had has have how i if in into is just know let like many may me
mean might more most much must my need no not now of off ok on once only or other our out over please really say see
shall should show since so some take tell than thank thanks the time to too under until up us use very want was way we
well were what when where which while who whom whose why will with would yes you your
"""
_REFERENCES = """
he him his she her hers it its they them their theirs this that these those there then such same one ones another
instead again
"""
_CONTINUATIONS = (
    *("and ", "but ", "or ", "so ", "then ", "also "),
    *("why", "how about ", "what about ", "what else", "tell me more"),
)
_STOPS, _REFERRING = frozenset(_STOP_WORDS.split()), frozenset(_REFERENCES.split())


def words(text: str) -> list[str]:
    """In order, in lower case; a possessive ending is no part of a word."""
    return [re.sub(r"['’]s?$", "", word.lower()) for word in _WORD.findall(text)]


MAX_REMEMBERED_CHARACTERS = 8192
"""What is known of longer texts is found out anew, so that a client's can't fill the memory."""


def content_words(text: str) -> tuple[str, ...]:
    """The stems of words that say what a text is about, in order, each once."""
    return _remembered_words(text) if len(text) <= MAX_REMEMBERED_CHARACTERS else _content_words(text)


def _content_words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(telling_stems(text)))


_remembered_words = lru_cache(maxsize=4096)(_content_words)


def telling_stems(text: str) -> list[str]:
    """As `content_words`, each as often as it stands there."""
    return [stem(word) for word in words(text) if word not in _STOPS and word not in _REFERRING]


def stem(word: str) -> str:
    """Without the endings of English plurals and verbs: `batting`, `bats` and `bat` are one word."""
    for ending in ("ing", "ies", "ied", "es", "ed", "s"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 3 and not (ending == "s" and rest.endswith("s")):
            return _short(rest + "y" if ending in ("ies", "ied") else rest)
    return _short(word)


def is_follow_up(text: str) -> bool:
    """Whether a message can't be understood alone: it refers to something, continues, or says nothing of its own."""
    said = text.strip().lower()
    return said.startswith(_CONTINUATIONS) or not content_words(text) or not _REFERRING.isdisjoint(words(text))


def has_name(text: str) -> bool:
    """Whether a word inside a sentence is written large, as names are in English."""
    return any(
        word[0].isupper() and word.lower() not in _STOPS
        for sentence in re.split(r"[.!?:]\s+", text.strip())
        for word in _WORD.findall(sentence)[1:]
    )


def _short(stemmed: str) -> str:
    """One letter of a doubled end, and no silent e: `batt` is `bat`, and `bake` is what is left of `baking`."""
    if len(stemmed) > 3 and stemmed[-1] == stemmed[-2]:
        return stemmed[:-1]
    return stemmed[:-1] if len(stemmed) > 3 and stemmed.endswith("e") else stemmed
