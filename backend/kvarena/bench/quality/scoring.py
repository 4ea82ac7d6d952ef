"""From answers to scores, to a result file's rows, to tables in a terminal.

Scores: SQuAD's exact match and token F1 (Rajpurkar et al., arXiv 1606.05250), and whether the answer contains a gold
answer, as Lost in the Middle (arXiv 2307.03172) and RULER (arXiv 2404.06654) count right answers of models that
answer in sentences. Means have 95 % intervals over questions. There is a row for each variant, kind of question and
subset: all questions, and those that full prefill answers right, since a weak model's other answers say little about a
method of reuse.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kvarena.bench.console import Column, percent, percent_range, table_of
from kvarena.bench.measure import Reuse
from kvarena.bench.quality.asking import Attempt
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.results import DIGITS, Row, mean_interval, spread
from kvarena.bench.variants import Variant
from kvarena.panels.panel import ALL_KINDS, variant_label

_WITHIN_NUMBERS = re.compile(r"(?<=\d)[.,](?=\d)")
_BETWEEN_WORDS = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Score:
    """Both from 0 to 1, the best over all gold answers."""

    exact_match: float
    f1: float


def squad_score(text: str, answers: Sequence[str]) -> Score:
    """Case, punctuation, articles and white space don't count. torchmetrics has the same, and needs torch for it."""
    given = _squad_text(text).split()
    gold = [_squad_text(answer).split() for answer in answers]
    return Score(float(given in gold), max(_token_f1(given, words) for words in gold))


def _token_f1(given: Sequence[str], gold: Sequence[str]) -> float:
    """1 for two texts without words, 0 where only one has none."""
    if not given or not gold:
        return float(given == gold)
    num_same = (Counter(given) & Counter(gold)).total()
    return 2 * num_same / (len(given) + len(gold))


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
    """1 when two answers are the same after SQuAD's normalisation; a cut one is compared as far as it goes."""
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


KL_DIGITS = 6
TITLES = {"all": "All {} questions", "answered": "The {} that full prefill answers right"}
"""The subsets of questions that have rows."""


def scores(text: str, gold: Sequence[str]) -> dict[str, float]:
    """Each from 0 to 1; none where no gold answer is known. `correct`: 1 when the text contains one, else 0."""
    if not gold:
        return {}
    squad = squad_score(text, gold)
    return {"correct": contains_answer(text, gold), "exact_match": squad.exact_match, "f1": squad.f1}


class ScoreSheet:
    """The attempts with their scores. Failed ones are counted and not scored."""

    def __init__(self, question_set: QuestionSet, attempts: Sequence[Attempt], reference: Variant | None) -> None:
        self._exam, self._attempts, self._reference = question_set, attempts, reference
        self._answers = {(one.variant, one.question): one.answer for one in attempts if one.answer}
        self._scores = {
            (variant, question): scores(answer.text, question_set.questions[question].answers)
            for (variant, question), answer in self._answers.items()
        }
        self._answered = {
            question for (variant, question), one in self._scores.items() if variant == reference and one.get("correct")
        }

    def rows(self) -> list[Row]:
        """Rows without a question are left out."""
        kinds = [ALL_KINDS, *self._exam.kinds] if len(self._exam.kinds) > 1 else [ALL_KINDS]
        variants = dict.fromkeys(attempt.variant for attempt in self._attempts)
        rows = [self._row(variant, kind, subset) for variant in variants for kind in kinds for subset in TITLES]
        return [row for row in rows if row["num_questions"]]

    def _row(self, variant: Variant, kind: str, subset: str) -> Row:
        attempts = [
            attempt
            for attempt in self._attempts
            if attempt.variant == variant
            and kind in (ALL_KINDS, self._exam.questions[attempt.question].kind)
            and (subset == "all" or attempt.question in self._answered)
        ]
        answers = [attempt.answer for attempt in attempts if attempt.answer]
        scored = [found for one in attempts if (found := self._scores.get((variant, one.question)))]
        return {
            **variant.to_json(),
            "kind": kind,
            "subset": subset,
            "num_questions": len(attempts),
            "num_failed": len(attempts) - len(answers),
            "num_cut": sum(not answer.is_complete for answer in answers),
            "num_cached": sum(bool(answer.reuse and answer.reuse.is_mostly_cached) for answer in answers),
            "correct": mean_interval([one["correct"] for one in scored], is_share=True),
            "exact_match": mean_interval([one["exact_match"] for one in scored], is_share=True),
            "f1": mean_interval([one["f1"] for one in scored]),
            **self._against_reference(variant, attempts),
            "ttft_ms": spread([answer.ttft_ms for answer in answers]),
            **token_shares(answer.reuse for answer in answers),
        }

    def _against_reference(self, variant: Variant, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Question by question, over those that both could answer. None where there is nothing to compare with."""
        reference = self._reference or variant
        compared = attempts if variant != reference else ()
        keys = [
            ((variant, one.question), (reference, one.question))
            for one in compared
            if one.answer and (reference, one.question) in self._answers
        ]
        pairs = [(self._answers[mine], self._answers[full]) for mine, full in keys]
        scored = [(self._scores[mine], self._scores[full]) for mine, full in keys if self._scores[full]]
        return {
            "correct_vs_reference": mean_interval([mine["correct"] - full["correct"] for mine, full in scored]),
            "exact_match_vs_reference": mean_interval(
                [mine["exact_match"] - full["exact_match"] for mine, full in scored]
            ),
            "agreement": mean_interval(
                [agrees(mine.text, mine.is_complete, full.text, full.is_complete) for mine, full in pairs],
                is_share=True,
            ),
            **closeness_figures(compared),
        }

    def answers(self) -> list[dict[str, Any]]:
        """Every single outcome, for readers."""
        return [self._outcome(attempt) for attempt in self._attempts]

    def _outcome(self, attempt: Attempt) -> dict[str, Any]:
        answer, close = attempt.answer, attempt.closeness
        found = self._scores.get((attempt.variant, attempt.question), {})
        return {
            **attempt.variant.to_json(),
            "question": attempt.question,
            "outcome": attempt.outcome,
            "text": answer.text if answer else None,
            "is_complete": answer.is_complete if answer else None,
            "correct": found.get("correct"),
            "exact_match": found.get("exact_match"),
            "f1": round(found["f1"], DIGITS) if found else None,
            "token_agreement": round(close.token_agreement, DIGITS) if close else None,
            "kl_along_answer": round(close.kl, KL_DIGITS) if close else None,
            "ttft_ms": round(answer.ttft_ms, 2) if answer else None,
            "detail": attempt.reason,
        }


def closeness_figures(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Of the distributions along full prefill's answers; None where they weren't compared."""
    found = [attempt.closeness for attempt in attempts if attempt.closeness]
    return {
        "token_agreement": mean_interval([one.token_agreement for one in found]),
        "kl_along_answer": mean_interval([one.kl for one in found]),
        "kl_method": found[0].method if found else None,
        "first_token_kl": mean_interval([one.first_kl for one in found]),
    }


def token_shares(reuses: Iterable[Reuse | None]) -> dict[str, float | None]:
    """The share of all prompt tokens reused as they were, and of the tokens from chunks recomputed."""
    known = [reuse for reuse in reuses if reuse]
    prompt = sum(reuse.num_prompt_tokens for reuse in known)
    reused = sum(reuse.num_reused_tokens for reuse in known)
    recomputed = sum(reuse.num_recomputed_tokens for reuse in known)
    chunks = reused + recomputed - sum(reuse.num_prefix_tokens for reuse in known)
    return {
        "reused_ratio": round(reused / prompt, DIGITS) if prompt else None,
        "recomputed_ratio": round(recomputed / chunks, DIGITS) if chunks else None,
    }


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Narrow tables: right answers by kind; then all figures, over all questions and over those answered right."""

    def show(title: str, shown: Sequence[Row], figures: Mapping[str, Column]) -> None:
        console.print(table_of(title, shown, {"contender": variant_label}, figures, min_width=14))

    by_kind = {(variant_label(row), row["kind"]): row for row in rows if row["subset"] == "all"}

    def right_of(kind: str) -> Column:
        return lambda row: percent(by_kind.get((variant_label(row), kind), {}).get("correct"))

    of_all = [row for row in rows if row["kind"] == ALL_KINDS]
    figures: dict[str, Column] = {"recomputed": "{recomputed_ratio:.0%}"} if any(map(_says_no_share, of_all)) else {}
    figures |= {"all": lambda row: percent(row["correct"]), "interval": lambda row: percent_range(row["correct"])}
    figures |= {kind: right_of(kind) for kind in dict.fromkeys(row["kind"] for row in rows) if kind != ALL_KINDS}
    show("Right answers (%), 95 % intervals", [row for row in of_all if row["subset"] == "all"], figures)
    for subset, title in TITLES.items():
        if found := [row for row in of_all if row["subset"] == subset]:
            figures = {
                "right": lambda row: percent(row["correct"]),
                "EM": lambda row: percent(row["exact_match"]),
                "F1": lambda row: percent(row["f1"]),
                "same": lambda row: percent(row["agreement"]),
                "tokens": lambda row: percent(row["token_agreement"]),
                "KL": "{kl_along_answer[mean]:.3f}",
                "TTFT ms": "{ttft_ms[median]:,.0f}",
            }
            troubles = [name for name in ("cut", "failed", "cached") if any(row[f"num_{name}"] for row in found)]
            figures |= {name: f"{{num_{name}}}" for name in troubles}
            show(title.format(max(row["num_questions"] for row in found)), found, figures)


def _says_no_share(row: Row) -> bool:
    """Whether the row's label leaves open how much was recomputed, as with a number of tokens or a time."""
    return row["ratio"] is None and row["policy"] not in (None, "none", "all")
