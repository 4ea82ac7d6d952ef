"""How good an answer's text is: SQuAD's exact match and token F1 (Rajpurkar et al., arXiv 1606.05250), and whether it
contains a gold answer, as Lost in the Middle (arXiv 2307.03172) and RULER (arXiv 2404.06654) count right answers of
models that answer in sentences.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_WITHIN_NUMBERS = re.compile(r"(?<=\d)[.,](?=\d)")
_BETWEEN_WORDS = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Score:
    """Both from 0 to 1, the best over all gold answers."""

    exact_match: float
    f1: float


def squad_score(text: str, answers: Sequence[str]) -> Score:
    """Case, punctuation, articles and white space don't count."""
    from torchmetrics.functional.text import squad

    gold = {"answers": {"text": list(answers), "answer_start": [0] * len(answers)}, "id": ""}
    score = squad([{"prediction_text": text, "id": ""}], [gold])
    return Score(float(score["exact_match"]) / 100, float(score["f1"]) / 100)


def is_same_answer(text: str, other: str) -> float:
    return squad_score(text, [other]).exact_match


def contains_answer(text: str, answers: Sequence[str]) -> float:
    """1 when one of the gold answers occurs in the text as whole words, else 0.

    Case, punctuation and articles don't count, as in SQuAD. Punctuation separates words here, so that "Kohli's" names
    Kohli and "J. K. Rowling" is "J.K. Rowling"; within a number it doesn't: "254.5" is not 254, and "1,000" is 1000.
    """
    words = f" {_words(text)} "
    return float(any(f" {gold} " in words for answer in answers if (gold := _words(answer))))


def agrees(text: str, is_complete: bool, other: str, other_is_complete: bool) -> float:
    """1 when two answers are the same after SQuAD's normalisation, as far as the shorter one goes where it is cut."""
    (short, is_whole), (long, _) = sorted(
        ((_squad_text(text), is_complete), (_squad_text(other), other_is_complete)), key=lambda one: len(one[0])
    )
    return float(short == long or (not is_whole and bool(short) and long.startswith(short)))


def _words(text: str) -> str:
    """The words that count, with a space between them. An answer of articles alone, such as "A", keeps them."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = _BETWEEN_WORDS.sub(" ", _WITHIN_NUMBERS.sub("", plain))
    return " ".join((_ARTICLES.sub(" ", words).strip() or words).split())


def _squad_text(text: str) -> str:
    without_punctuation = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())
