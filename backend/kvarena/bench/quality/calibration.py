"""`kvarena calibrate`: the policy, check layer, ratio and sink with which a blend is fastest and still close to full
prefill, on given documents.

The next tokens along full prefill's own answers are compared, so no question needs a gold answer, and a model that
answers badly can be calibrated too. Settings that can no longer win are not asked on (a race: Maron and Moore,
Hoeffding Races, 1993).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from kvarena.bench.console import Column, percent, percent_range, table_of
from kvarena.bench.quality.asking import Attempt, Closeness
from kvarena.bench.quality.questions import EvalQuestion, QuestionSet, stack_splitter
from kvarena.bench.quality.scoring import closeness_figures, token_shares
from kvarena.bench.results import Row, mean_interval, spread, write_whole
from kvarena.bench.variants import Variant
from kvarena.documents import load_documents
from kvarena.panels.panel import policy_label, variant_label
from kvarena.policies.params import MODEL_PROFILE_NAME, BlendParams, read_model_profile

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
NUM_FIRST_LAYERS = 3
MUCH_SLOWER = 1.2


def document_questions(folder: Path, num_questions: int, seed: int = 0, num_chunks: int | None = None) -> QuestionSet:
    """Prompts without gold answers, each over chunks of the folder in a random order. Raises `ValueError`."""
    documents = load_documents(folder, stack_splitter())
    chunks = documents.chunks
    if len(chunks) < 2:
        raise ValueError(f"{folder} has {len(chunks)} chunks; blending needs 2 at least")
    rng = random.Random(seed)
    size = min(num_chunks or CHUNKS_PER_PROMPT, len(chunks))
    questions = [
        EvalQuestion(PROMPTS[number % len(PROMPTS)], ("",), tuple(rng.sample(chunks, size)))
        for number in range(num_questions)
    ]
    return QuestionSet(documents.system, tuple(questions), documents.problems)


def check_layers(num_layers: int | None) -> list[int]:
    """Worth trying: all layers before the check layer are run over everything, which a quarter of them makes too much.

    Small models' first three are tried up to half of all.
    """
    if num_layers is None:
        return list(FIRST_LAYERS)
    most = max(num_layers // 4, min(NUM_FIRST_LAYERS, num_layers // 2), 1)
    return [layer for layer in FIRST_LAYERS if layer <= most]


def calibration_rows(attempts: Sequence[Attempt]) -> list[Row]:
    """A row for each variant: how it agrees with full prefill along its answers, and how soon it is.

    `same_answer` is the share of answers that are full prefill's from the first token to the last. `num_unscored` are
    those with a chunk without scores, where the policy goes by them.
    """
    by_variant: dict[Variant, list[Attempt]] = {}
    for attempt in attempts:
        by_variant.setdefault(attempt.variant, []).append(attempt)
    rows = []
    for variant, own in by_variant.items():
        answers = [attempt.answer for attempt in own if attempt.answer]
        found = [attempt.closeness for attempt in own if attempt.closeness]
        reuses = [answer.reuse for answer in answers]
        rows.append(
            {
                **variant.to_json(),
                "num_questions": len(own),
                "num_failed": len(own) - len(answers),
                "num_unscored": sum(reuse.unscored_chunks > 0 for reuse in reuses if reuse),
                **closeness_figures(own),
                "same_answer": mean_interval([float(one.token_agreement == 1) for one in found]),
                "ttft_ms": spread([answer.ttft_ms for answer in answers]),
                **token_shares(reuses),
            }
        )
    return rows


def sink_rows(attempts: Sequence[Attempt]) -> list[Row]:
    """How close blends come with each sink: means over the questions, of the same settings for every sink.

    None where there is only one. Questions of later rounds count for the settings that were still asked, with every
    sink. Intervals are over questions, for answers to one question are alike.
    """
    by_sink: dict[int, dict[tuple[Variant, int], Closeness]] = {}
    for one in attempts:
        sink, is_reuse = one.variant.sink_tokens, not one.variant.recomputes_all
        if sink is not None and is_reuse and one.closeness:
            of_sink = by_sink.setdefault(sink, {})
            of_sink[dataclasses.replace(one.variant.work, sink_tokens=None), one.question] = one.closeness
    shared = [key for key in next(iter(by_sink.values()), {}) if all(key in own for own in by_sink.values())]
    if len(by_sink) < 2 or not shared:
        return []

    def over_questions(of_sink: Mapping[tuple[Variant, int], Closeness], figure: str) -> dict[str, float] | None:
        found: dict[int, list[float]] = {}
        for variant, question in shared:
            found.setdefault(question, []).append(getattr(of_sink[variant, question], figure))
        return mean_interval([fmean(values) for values in found.values()])

    return [
        {
            "sink_tokens": sink,
            "num_settings": len({variant for variant, _ in shared}),
            "num_questions": len({question for _, question in shared}),
            "token_agreement": over_questions(by_sink[sink], "token_agreement"),
            "kl_along_answer": over_questions(by_sink[sink], "kl"),
        }
        for sink in sorted(by_sink)
    ]


def still_in_the_race(rows: Sequence[Row], target: float) -> list[Variant]:
    """Those that may still be chosen.

    Out are those whose interval lies below the target, and those that can't be the fastest: there is one whose interval
    lies above the target which does a part of their work, or takes far less time.
    """
    hopeful = [row for row in rows if _agreement(row, "high") >= target and not row["num_failed"]]
    sure = [row for row in hopeful if _agreement(row, "low") >= target]

    def is_beaten(row: Row) -> bool:
        return any(
            one is not row
            and (
                (_does_the_work_of(row, one) and row["ratio"] != one["ratio"])
                or _time_ms(row, rows) > MUCH_SLOWER * _time_ms(one, rows)
            )
            for one in sure
        )

    return [Variant.of_row(row) for row in hopeful if not is_beaten(row)]


def fastest(rows: Sequence[Row], target: float) -> Row | None:
    """Of the rows whose token agreement reaches `target`, the one with the shortest time to first token.

    Of those that do the same work, which differ in the sink alone, the one with the lowest KL.
    """

    def cost(row: Row) -> tuple[float, float, float]:
        kl = row.get("kl_along_answer")
        return _time_ms(row, rows), row["ratio"] or 0.0, kl["mean"] if kl else 0.0

    good = [row for row in rows if _agreement(row, "mean") >= target and not row["num_failed"]]
    return min(good, key=cost, default=None)


def closest(rows: Sequence[Row]) -> Row | None:
    return max((row for row in rows if row["token_agreement"]), key=lambda row: _agreement(row, "mean"), default=None)


def _agreement(row: Row, end: str) -> float:
    """-1 where nothing was compared."""
    return float(row["token_agreement"][end]) if row["token_agreement"] else -1.0


def _time_ms(row: Row, rows: Sequence[Row]) -> float:
    """A row's time to first token.

    A lower ratio of the same policy does a part of the same work: where it was measured slower that was noise, and the
    time of the higher one counts for it. A sink costs a request nothing.
    """
    as_much_or_more = [other for other in rows if _does_the_work_of(other, row)]
    return min(float(other["ttft_ms"]["median"]) for other in as_much_or_more)


def _does_the_work_of(row: Row, other: Row) -> bool:
    """Whether a row recomputes what `other` does, and perhaps more."""
    if not row["ttft_ms"]:
        return False
    alike = all(row.get(name) == other.get(name) for name in ("policy", "check_layer", "options"))
    return alike and (row["ratio"] or 0.0) >= (other["ratio"] or 0.0)


def write_profile(folder: Path, row: Row, separator: str) -> Path:
    """Puts the row's setting into the model's profile, which servers read when they start; the rest of it stays."""
    profile: dict[str, Any] = {"separator": separator, **read_model_profile(str(folder))}
    kept = {name: value for name, value in profile.items() if name not in dataclasses.asdict(BlendParams())}
    profile = kept | Variant.of_row(row | {"contender": ""}).profile
    path = folder / MODEL_PROFILE_NAME
    write_whole(path, json.dumps(profile) + "\n")
    return path


def show_rows(rows: Sequence[Row], sinks: Sequence[Row], chosen: Row | None, console: Console) -> None:
    figures: dict[str, Column] = {
        "layer": "{check_layer:d}",
        "ratio": lambda row: "-" if row["ratio"] is None else f"{100 * row['ratio']:g} %",
        "sink": lambda row: str(row.get("sink_tokens", "-")),
        "tokens": lambda row: percent(row["token_agreement"]),
        "interval": lambda row: percent_range(row["token_agreement"]),
        "KL": "{kl_along_answer[mean]:.3f}",
        "same": lambda row: percent(row["same_answer"]),
        "TTFT ms": "{ttft_ms[median]:,.0f}",
        "asked": lambda row: (
            "{num_questions} ({num_failed} failed)".format_map(row) if row["num_failed"] else str(row["num_questions"])
        ),
        "": lambda row: "<" if row is chosen else "",
    }
    title = "Agreement with full prefill (%), along its answers"
    layout: dict[str, Any] = {"min_width": 17, "padding": 0, "pad_edge": False}  # 80 columns are enough
    console.print(table_of(title, rows, {"policy": policy_label}, figures, **layout))
    for row in sinks:
        console.print(
            f"Sink of {row['sink_tokens']}: {percent(row['token_agreement'])} % of the tokens agree, KL "
            f"{row['kl_along_answer']['mean']:.3f} ({row['num_settings']} settings, {row['num_questions']} questions, "
            "the same for each sink)",
            highlight=False,
            soft_wrap=True,
        )
    if chosen:
        console.print(f"<: chosen, {variant_label(chosen)}", highlight=False, soft_wrap=True)
