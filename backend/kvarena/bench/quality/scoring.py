"""From answers to scores, to a result file's rows, to a table in a terminal.

Scores: SQuAD's exact match and token F1 (Rajpurkar et al., arXiv 1606.05250), and whether the answer contains a gold
answer, as Lost in the Middle (arXiv 2307.03172) and RULER (arXiv 2404.06654) count right answers of models that
answer in sentences. Means come with 95 % bootstrap intervals (percentile method) over questions. There is a row for
each variant, kind of question and subset: all questions, and those that full prefill answers right, for a weak
model's answers to the others say little about a method of reuse.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from kvarena.bench.console import new_table, percent, percent_range
from kvarena.bench.quality.asking import Attempt, GreedyAnswer, Reuse
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.results import ALL_KINDS, DIGITS, Row, spread
from kvarena.bench.variants import Variant

NUM_RESAMPLES = 2_000


def mean_interval(values: Sequence[float], seed: int = 0, *, is_share: bool = False) -> dict[str, float] | None:
    """None without values. Values that are all equal have an interval of no width; not a share of none or of all, which
    has Wilson's: no resampling shows what few questions leave open.
    """
    from scipy.stats import binomtest, bootstrap

    if not values:
        return None
    mean = low = high = float(np.mean(values))
    if len(set(values)) > 1:
        resampled = bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = map(float, resampled.confidence_interval)
    elif is_share and mean in (0, 1):
        low, high = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"mean": round(mean, DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}


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
    """Of two without words 1, and 0 where only one has none."""
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


KL_DIGITS = 6
Subset = Literal["all", "answered"]
SUBSETS: tuple[Subset, ...] = ("all", "answered")


@dataclass(frozen=True)
class Scored:
    """An answer with its scores, None where no gold answer is known. `correct`: 1 when it contains one, else 0."""

    answer: GreedyAnswer
    score: Score | None
    correct: float | None


class ScoreSheet:
    """The attempts with their scores. What failed is counted, and scored nowhere."""

    def __init__(self, question_set: QuestionSet, attempts: Sequence[Attempt], reference: Variant | None) -> None:
        self._exam, self._attempts, self._reference = question_set, attempts, reference
        self._scored = {
            (one.variant, one.question): self._score(one.answer, self._gold(one)) for one in attempts if one.answer
        }
        self._answered = {
            question for (variant, question), one in self._scored.items() if variant == reference and one.correct
        }

    def rows(self) -> list[Row]:
        """Those without any question are left out."""
        kinds = [ALL_KINDS, *self._exam.kinds] if len(self._exam.kinds) > 1 else [ALL_KINDS]
        variants = dict.fromkeys(attempt.variant for attempt in self._attempts)
        rows = [self._row(variant, kind, subset) for variant in variants for kind in kinds for subset in SUBSETS]
        return [row for row in rows if row["num_questions"]]

    def answers(self) -> list[dict[str, Any]]:
        """Every single outcome, for whoever wants to read them."""
        return [self._answer(attempt) for attempt in self._attempts]

    def _row(self, variant: Variant, kind: str, subset: Subset) -> Row:
        attempts = [
            attempt
            for attempt in self._attempts
            if attempt.variant == variant
            and kind in (ALL_KINDS, self._kind(attempt))
            and (subset == "all" or attempt.question in self._answered)
        ]
        answers = [attempt.answer for attempt in attempts if attempt.answer]
        scored = [found for attempt in attempts if (found := self._scored.get((variant, attempt.question)))]
        return {
            **variant.to_json(),
            "kind": kind,
            "subset": subset,
            "num_questions": len(attempts),
            "num_failed": sum(attempt.outcome == "failed" for attempt in attempts),
            "num_cut": sum(not answer.is_complete for answer in answers),
            "num_cached": sum(bool(answer.reuse and answer.reuse.is_mostly_cached) for answer in answers),
            "correct": mean_interval([one.correct for one in scored if one.correct is not None], is_share=True),
            "exact_match": mean_interval([one.score.exact_match for one in scored if one.score], is_share=True),
            "f1": mean_interval([one.score.f1 for one in scored if one.score]),
            **self._against_reference(variant, attempts),
            "ttft_ms": spread([answer.ttft_ms for answer in answers]) if answers else None,
            **token_shares(answer.reuse for answer in answers),
        }

    def _against_reference(self, variant: Variant, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Question by question, over those that both could answer. None where there is nothing to compare with."""
        is_other = self._reference is not None and variant != self._reference
        pairs = [
            (mine, full)
            for attempt in attempts
            if is_other and self._reference
            if (mine := self._scored.get((variant, attempt.question)))
            if (full := self._scored.get((self._reference, attempt.question)))
        ]
        correct = [(m.correct, f.correct) for m, f in pairs if m.correct is not None and f.correct is not None]
        scores = [(mine.score, full.score) for mine, full in pairs if mine.score and full.score]
        return {
            "correct_vs_reference": mean_interval([mine - full for mine, full in correct]),
            "exact_match_vs_reference": mean_interval([m.exact_match - f.exact_match for m, f in scores]),
            "agreement": mean_interval([_agree(mine.answer, full.answer) for mine, full in pairs], is_share=True),
            **closeness_figures(attempts if is_other else ()),
        }

    @staticmethod
    def _score(answer: GreedyAnswer, gold: Sequence[str]) -> Scored:
        if not gold:
            return Scored(answer, None, None)
        return Scored(answer, squad_score(answer.text, gold), contains_answer(answer.text, gold))

    def _answer(self, attempt: Attempt) -> dict[str, Any]:
        scored, close = self._scored.get((attempt.variant, attempt.question)), attempt.closeness
        return {
            **attempt.variant.to_json(),
            "question": attempt.question,
            "outcome": attempt.outcome,
            "text": attempt.answer.text if attempt.answer else None,
            "is_complete": attempt.answer.is_complete if attempt.answer else None,
            "correct": scored.correct if scored else None,
            "exact_match": scored.score.exact_match if scored and scored.score else None,
            "f1": round(scored.score.f1, DIGITS) if scored and scored.score else None,
            "token_agreement": round(close.token_agreement, DIGITS) if close else None,
            "kl_along_answer": round(close.kl, KL_DIGITS) if close else None,
            "ttft_ms": round(attempt.answer.ttft_ms, 2) if attempt.answer else None,
            "detail": attempt.reason,
        }

    def _gold(self, attempt: Attempt) -> Sequence[str]:
        return self._exam.questions[attempt.question].answers

    def _kind(self, attempt: Attempt) -> str:
        return self._exam.questions[attempt.question].kind


def closeness_figures(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Of the distributions along full prefill's answers; None where they weren't compared."""
    found = [attempt.closeness for attempt in attempts if attempt.closeness]
    return {
        "token_agreement": mean_interval([one.token_agreement for one in found]),
        "kl_along_answer": mean_interval([one.kl for one in found]),
        "kl_method": found[0].method if found else None,
        "first_token_kl": mean_interval([one.first_kl for one in found]),
    }


def _agree(mine: GreedyAnswer, full: GreedyAnswer) -> float:
    return agrees(mine.text, mine.is_complete, full.text, full.is_complete)


def token_shares(reuses: Iterable[Reuse | None]) -> dict[str, float | None]:
    """Of all prompts' tokens those reused as they were; of the tokens that came from chunks those recomputed."""
    known = [reuse for reuse in reuses if reuse]
    prompt = sum(reuse.num_prompt_tokens for reuse in known)
    reused = sum(reuse.num_reused_tokens for reuse in known)
    recomputed = sum(reuse.num_recomputed_tokens for reuse in known)
    chunks = reused + recomputed - sum(reuse.num_prefix_tokens for reuse in known)
    return {
        "reused_ratio": round(reused / prompt, DIGITS) if prompt else None,
        "recomputed_ratio": round(recomputed / chunks, DIGITS) if chunks else None,
    }


CONTENDER = Column("contender", min_width=14)
TITLES = {"all": "All {} questions", "answered": "The {} that full prefill answers right"}


def show_rows(rows: Sequence[Row], kinds: Sequence[str], console: Console) -> None:
    """Narrow tables: right answers by kind; then all figures, over all questions and over those answered right."""
    shown = kinds if len(kinds) > 1 else []
    of_all = [row for row in rows if row["kind"] == ALL_KINDS]
    extra = ["recomputed"] if any(_says_no_share(row) for row in of_all) else []
    figures = (*extra, "all", "interval", *shown)
    right = new_table("Right answers (%), 95 % intervals", CONTENDER, figures=figures)
    for row in of_all:
        if row["subset"] == "all":
            by_kind = {one["kind"]: one for one in rows if _label(one) == _label(row) and one["subset"] == "all"}
            right.add_row(
                _label(row),
                *("-" if row["recomputed_ratio"] is None else f"{row['recomputed_ratio']:.0%}" for _ in extra),
                percent(row["correct"]),
                percent_range(row["correct"]),
                *(percent(by_kind[kind]["correct"]) if kind in by_kind else "-" for kind in shown),
            )
    console.print(right)
    for subset, title in TITLES.items():
        if found := [row for row in of_all if row["subset"] == subset]:
            console.print(_figures(found, title.format(max(row["num_questions"] for row in found))))


def _figures(rows: Sequence[Row], title: str) -> Table:
    troubles = [name for name in ("cut", "failed", "cached") if any(row[f"num_{name}"] for row in rows)]
    figures = ("right", "EM", "F1", "same", "tokens", "KL", "TTFT ms", *troubles)
    table = new_table(title, CONTENDER, figures=figures)
    for row in rows:
        kl, ttft = row["kl_along_answer"], row["ttft_ms"]
        table.add_row(
            _label(row),
            *(percent(row[name]) for name in ("correct", "exact_match", "f1", "agreement", "token_agreement")),
            f"{kl['mean']:.3f}" if kl else "-",
            f"{ttft['median']:,.0f}" if ttft else "-",
            *(str(row[f"num_{name}"]) for name in troubles),
        )
    return table


def _says_no_share(row: Row) -> bool:
    """Whether the row's label leaves open how much was recomputed, as with a number of tokens or a time."""
    return row["ratio"] is None and row["policy"] not in (None, "none", "all")


def _label(row: Row) -> str:
    return Variant.of_row(row).label
