"""Which policy, check layer and ratio a model needs: the fastest that stays close to full prefill on given documents.

Full prefill's own answers are the gold answers here, so no question needs one: agreement is their token F1.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvarena.bench.quality.asking import Attempt
from kvarena.bench.quality.questions import EvalQuestion, Exam
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row
from kvarena.context import load_chunks, load_system_prompt
from kvarena.reuse.params import BlendParams
from kvarena.vllm_plugin.config import MODEL_PROFILE_NAME, read_model_profile

PROMPTS = (
    "What is this text about?",
    "Who or what is mentioned first, and what is said of it?",
    "What is said at the end?",
    "Name three things that the text mentions.",
    "Sum the text up in one sentence.",
    "Which of these parts belong together, and why?",
)
CHUNKS_PER_PROMPT = 6
FIRST_LAYERS = (1, 2, 3, 4, 6, 8, 12, 16)


def document_exam(folder: Path, num_questions: int, seed: int = 0) -> Exam:
    """Prompts without gold answers, each over chunks of the folder in a random order. Raises `ValueError`."""
    chunks = load_chunks(folder)
    if len(chunks) < 2:
        raise ValueError(f"{folder} has {len(chunks)} chunks; blending needs 2 at least")
    rng = random.Random(seed)
    size = min(CHUNKS_PER_PROMPT, len(chunks))
    questions = [
        EvalQuestion(PROMPTS[number % len(PROMPTS)], ("",), tuple(rng.sample(chunks, size)))
        for number in range(num_questions)
    ]
    return Exam(load_system_prompt(folder), tuple(questions))


def check_layers(num_layers: int | None) -> list[int]:
    """Worth trying: up to half of the model's, for all layers before the check layer are run over everything."""
    return [layer for layer in FIRST_LAYERS if layer == 1 or num_layers is None or layer <= num_layers // 2]


def with_answers_of(exam: Exam, attempts: Sequence[Attempt]) -> Exam:
    """The questions that were answered, these answers as the gold ones. Raises `ValueError` when there are none."""
    answered = {attempt.question: attempt.answer.text for attempt in attempts if attempt.answer}
    questions = tuple(
        replace(question, answers=(text,))
        for number, question in enumerate(exam.questions)
        if (text := answered.get(number, "").strip())
    )
    if not questions:
        reasons = {attempt.reason for attempt in attempts if attempt.reason} or {"all answers are empty"}
        raise ValueError(f"full prefill answered nothing: {'; '.join(sorted(reasons))}")
    return Exam(exam.system, questions)


def as_far_as_they_go(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Answers that were cut off count too: both sides are cut at the same length."""
    return [
        replace(attempt, answer=replace(attempt.answer, is_complete=True)) if attempt.answer else attempt
        for attempt in attempts
    ]


def fastest(rows: Sequence[Row], target: float) -> Row | None:
    """Of the rows whose agreement (F1) reaches `target`, the one with the shortest time to first token.

    A lower ratio of the same policy does a part of the same work: where it was measured slower that was noise, and the
    time of the higher one counts for it.
    """

    def cost(row: Row) -> tuple[float, float]:
        as_much_or_more = [other for other in rows if _does_the_work_of(other, row)]
        return min(float(other["ttft_ms"]["median"]) for other in as_much_or_more), row["ratio"] or 0.0

    good = [row for row in rows if row["f1"] and row["f1"]["mean"] >= target and not row["num_failed"]]
    return min(good, key=cost, default=None)


def _does_the_work_of(row: Row, other: Row) -> bool:
    """Whether a row recomputes what `other` does, and perhaps more."""
    if not row["ttft_ms"]:
        return False
    alike = all(row.get(name) == other.get(name) for name in ("policy", "check_layer", "options"))
    return alike and (row["ratio"] or 0.0) >= (other["ratio"] or 0.0)


def write_profile(folder: Path, row: Row, separator: str) -> Path:
    """Puts the row's setting into the model's profile, which servers read when they start. The rest of it stays."""
    profile: dict[str, Any] = {"separator": separator, **read_model_profile(str(folder))}
    kept = {name: value for name, value in profile.items() if name not in dataclasses.asdict(BlendParams())}
    profile = kept | Setup.of_row(row | {"contender": ""}).choices
    path = folder / MODEL_PROFILE_NAME
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(profile) + "\n")
    part.replace(path)
    return path
