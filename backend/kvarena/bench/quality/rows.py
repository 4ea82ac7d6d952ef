"""From what became of the questions to a result file: rows, and every answer.

There is a row for each setup, kind of question and subset: all questions, and those that full prefill answers right,
for a weak model's answers to the others say little about a way of reuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvarena.bench.quality.answers import Answer, Reuse
from kvarena.bench.quality.asking import Attempt
from kvarena.bench.quality.intervals import DIGITS, mean_interval
from kvarena.bench.quality.questions import Exam
from kvarena.bench.quality.scoring import Score, agrees, contains_answer, squad_score
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, spread

ALL_KINDS = "all"
KL_DIGITS = 6
Subset = Literal["all", "answered"]
SUBSETS: tuple[Subset, ...] = ("all", "answered")


@dataclass(frozen=True)
class Scored:
    """An answer with its scores. `correct`: 1 when it contains a gold answer, else 0."""

    answer: Answer
    score: Score
    correct: float


class Sheet:
    """The attempts with their scores. What failed is counted, and scored nowhere."""

    def __init__(self, exam: Exam, attempts: Sequence[Attempt], reference: Setup | None) -> None:
        self._exam, self._attempts, self._reference = exam, attempts, reference
        self._scored = {
            (one.setup, one.question): self._score(one.answer, self._gold(one)) for one in attempts if one.answer
        }
        self._answered = {
            question for (setup, question), one in self._scored.items() if setup == reference and one.correct
        }

    def rows(self) -> list[Row]:
        """Those without any question are left out."""
        kinds = [ALL_KINDS, *self._exam.kinds] if len(self._exam.kinds) > 1 else [ALL_KINDS]
        setups = dict.fromkeys(attempt.setup for attempt in self._attempts)
        rows = [self._row(setup, kind, subset) for setup in setups for kind in kinds for subset in SUBSETS]
        return [row for row in rows if row["num_questions"]]

    def answers(self) -> list[dict[str, Any]]:
        """Every single outcome, for whoever wants to read them."""
        return [self._answer(attempt) for attempt in self._attempts]

    def _row(self, setup: Setup, kind: str, subset: Subset) -> Row:
        attempts = [
            attempt
            for attempt in self._attempts
            if attempt.setup == setup
            and kind in (ALL_KINDS, self._kind(attempt))
            and (subset == "all" or attempt.question in self._answered)
        ]
        answers = [attempt.answer for attempt in attempts if attempt.answer]
        scored = [found for attempt in attempts if (found := self._scored.get((setup, attempt.question)))]
        return {
            **setup.to_json(),
            "kind": kind,
            "subset": subset,
            "num_questions": len(attempts),
            "num_failed": sum(attempt.outcome == "failed" for attempt in attempts),
            "num_cut": sum(not answer.is_complete for answer in answers),
            "correct": mean_interval([one.correct for one in scored]),
            "exact_match": mean_interval([one.score.exact_match for one in scored]),
            "f1": mean_interval([one.score.f1 for one in scored]),
            **self._against_reference(setup, attempts),
            "ttft_ms": spread([answer.ttft_ms for answer in answers]) if answers else None,
            **token_shares(answer.reuse for answer in answers),
        }

    def _against_reference(self, setup: Setup, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Question by question, over those that both could answer. None where there is nothing to compare with."""
        is_other = self._reference is not None and setup != self._reference
        pairs = [
            (mine, full)
            for attempt in attempts
            if is_other and self._reference
            if (mine := self._scored.get((setup, attempt.question)))
            if (full := self._scored.get((self._reference, attempt.question)))
        ]
        return {
            "correct_vs_reference": mean_interval([mine.correct - full.correct for mine, full in pairs]),
            "exact_match_vs_reference": mean_interval([m.score.exact_match - f.score.exact_match for m, f in pairs]),
            "agreement": mean_interval([_agree(mine.answer, full.answer) for mine, full in pairs]),
            **closeness_figures(attempts if is_other else ()),
        }

    @staticmethod
    def _score(answer: Answer, gold: Sequence[str]) -> Scored:
        return Scored(answer, squad_score(answer.text, gold), contains_answer(answer.text, gold))

    def _answer(self, attempt: Attempt) -> dict[str, Any]:
        scored, close = self._scored.get((attempt.setup, attempt.question)), attempt.closeness
        return {
            **attempt.setup.to_json(),
            "question": attempt.question,
            "outcome": attempt.outcome,
            "text": attempt.answer.text if attempt.answer else None,
            "is_complete": attempt.answer.is_complete if attempt.answer else None,
            "correct": scored.correct if scored else None,
            "exact_match": scored.score.exact_match if scored else None,
            "f1": round(scored.score.f1, DIGITS) if scored else None,
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


def _agree(mine: Answer, full: Answer) -> float:
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
