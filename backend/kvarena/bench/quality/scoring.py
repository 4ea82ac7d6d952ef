"""How good an answer is: SQuAD's exact match and token F1 (Rajpurkar et al., arXiv 1606.05250), and closeness to full
prefill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LEAST_PROBABILITY = 1e-9


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


def first_token_kl(reference: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(reference || other) in nats over the tokens that both list, everything else as one outcome.

    Taking outcomes together can only lower the divergence, so this is a lower bound of that of all tokens.
    """
    shared = sorted(reference.keys() & other.keys())
    p = [math.exp(reference[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    pairs = zip([*p, 1 - sum(p)], [*q, 1 - sum(q)], strict=True)
    floored = [(max(a, _LEAST_PROBABILITY), max(b, _LEAST_PROBABILITY)) for a, b in pairs]
    return max(0.0, sum(a * math.log(a / b) for a, b in floored))
