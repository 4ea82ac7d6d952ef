"""From what became of the questions to a result file: a row for each setup and kind of question, and every answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.bench.quality.answers import Answer, Reuse
from kvarena.bench.quality.asking import Attempt
from kvarena.bench.quality.intervals import DIGITS, mean_interval
from kvarena.bench.quality.questions import Exam
from kvarena.bench.quality.scoring import Score, first_token_kl, is_same_answer, squad_score
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, spread

ALL_KINDS = "all"


@dataclass(frozen=True)
class Scored:
    """An answer that could be read, with its score."""

    answer: Answer
    score: Score


class Sheet:
    """The attempts with their scores. What failed or couldn't be read is counted, and scored nowhere."""

    def __init__(self, exam: Exam, attempts: Sequence[Attempt], reference: Setup | None) -> None:
        self._exam, self._attempts, self._reference = exam, attempts, reference
        self._scored = {
            (one.setup, one.question): Scored(one.answer, squad_score(one.answer.text, self._gold(one)))
            for one in attempts
            if one.answer and one.outcome == "answered"
        }

    def rows(self) -> list[Row]:
        kinds = [ALL_KINDS, *self._exam.kinds] if len(self._exam.kinds) > 1 else [ALL_KINDS]
        setups = dict.fromkeys(attempt.setup for attempt in self._attempts)
        return [self._row(setup, kind) for setup in setups for kind in kinds]

    def answers(self) -> list[dict[str, Any]]:
        """Every single outcome, for whoever wants to read them."""
        return [self._answer(attempt) for attempt in self._attempts]

    def _row(self, setup: Setup, kind: str) -> Row:
        of_setup = [attempt for attempt in self._attempts if attempt.setup == setup]
        attempts = [attempt for attempt in of_setup if kind in (ALL_KINDS, self._kind(attempt))]
        answers = [attempt.answer for attempt in attempts if attempt.answer]
        scored = [found for attempt in attempts if (found := self._scored.get((setup, attempt.question)))]
        return {
            **setup.to_json(),
            "kind": kind,
            "num_questions": len(attempts),
            "num_failed": sum(attempt.outcome == "failed" for attempt in attempts),
            "num_unparsed": sum(attempt.outcome == "unparsed" for attempt in attempts),
            "exact_match": mean_interval([one.score.exact_match for one in scored]),
            "f1": mean_interval([one.score.f1 for one in scored]),
            **self._against_reference(setup, attempts),
            "ttft_ms": spread([answer.ttft_ms for answer in answers]) if answers else None,
            **_token_shares(answer.reuse for answer in answers),
        }

    def _against_reference(self, setup: Setup, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Question by question, over those that both could answer. None where there is nothing to compare with."""
        pairs = [
            (mine, full)
            for attempt in attempts
            if self._reference and setup != self._reference
            if (mine := self._scored.get((setup, attempt.question)))
            if (full := self._scored.get((self._reference, attempt.question)))
        ]
        logprobs = [(mine.answer.first_logprobs, full.answer.first_logprobs) for mine, full in pairs]
        return {
            "exact_match_vs_reference": mean_interval([m.score.exact_match - f.score.exact_match for m, f in pairs]),
            "agreement": mean_interval([is_same_answer(m.answer.text, f.answer.text) for m, f in pairs]),
            "first_token_kl": mean_interval([first_token_kl(full, mine) for mine, full in logprobs if mine and full]),
        }

    def _answer(self, attempt: Attempt) -> dict[str, Any]:
        scored = self._scored.get((attempt.setup, attempt.question))
        return {
            **attempt.setup.to_json(),
            "question": attempt.question,
            "outcome": attempt.outcome,
            "text": attempt.answer.text if attempt.answer else None,
            "exact_match": scored.score.exact_match if scored else None,
            "f1": round(scored.score.f1, DIGITS) if scored else None,
            "ttft_ms": round(attempt.answer.ttft_ms, 2) if attempt.answer else None,
            "detail": attempt.reason,
        }

    def _gold(self, attempt: Attempt) -> Sequence[str]:
        return self._exam.questions[attempt.question].answers

    def _kind(self, attempt: Attempt) -> str:
        return self._exam.questions[attempt.question].kind


def _token_shares(reuses: Iterable[Reuse | None]) -> dict[str, float | None]:
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
