"""One benchmark: the same contenders and the same kind of stream on a shape, for speed, and on a trained model.

Answers become a result file's rows, one for each contender and model, and rows two tables in a terminal, of speed
and of quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from kvarena.bench.console import new_table, percent, percent_range
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.quality.scoring import is_same_answer, mean_interval, squad_score
from kvarena.bench.results import DIGITS, Row, spread
from kvarena.bench.shapes import model_folder
from kvarena.bench.simllm.running import (
    ContenderRun,
    SharedModel,
    SimLLMVariant,
    StreamSettings,
    StreamTask,
    best_dtype,
    make_stream,
    run_stream,
)
from kvarena.engines.vllm.config import BlendConfig
from kvarena.policies.params import read_blend_profile


def make_rows(tasks: Sequence[StreamTask], runs: Sequence[ContenderRun], **model: Any) -> list[Row]:
    """The first run is the one without reuse: what the others are compared with."""
    reference = runs[0]
    assert reference.variant.mode is None, "the first run is without reuse"
    return [
        {
            **model,
            "mode": run.variant.mode,
            "similarity_threshold": run.variant.similarity_threshold,
            "num_tasks": len(tasks),
            "num_similar": sum(task.earlier is not None for task in tasks),
            **_reuse(tasks, run),
            **_speed(tasks, run, reference),
            **_quality(tasks, run, reference),
        }
        for run in runs
    ]


def answer_rows(tasks: Sequence[StreamTask], runs: Sequence[ContenderRun], **model: Any) -> list[Row]:
    """Every single answer, for whoever wants to read them."""
    return [
        {
            **model,
            "contender": run.variant.label,
            "task": number,
            "kind": task.kind,
            "earlier": task.earlier,
            "question": task.question.question,
            "text": answer.text,
            "gold": list(task.question.answers),
            "is_hit": answer.report.details["hit"],
            "similarity": answer.report.details["similarity"],
            "num_prompt_tokens": answer.report.num_prompt_tokens,
            "num_layer_passes": answer.report.details["num_layer_passes"],
            "ttft_ms": round(answer.first_token_ms, 2),
            "total_ms": round(answer.total_ms, 2),
        }
        for run in runs
        for number, (task, answer) in enumerate(zip(tasks, run.answers, strict=True))
    ]


def _reuse(tasks: Sequence[StreamTask], run: ContenderRun) -> Row:
    """`layer_pass_ratio`: layer passes over prompt tokens, of those without reuse. Hits of new tasks count as well."""
    details = [answer.report.details for answer in run.answers]
    pairs = zip(tasks, details, strict=True)
    passes = sum(detail["num_layer_passes"] for detail in details)
    return {
        "num_hits": sum(detail["hit"] for detail in details),
        "num_similar_hits": sum(detail["hit"] for task, detail in pairs if task.earlier is not None),
        "layer_pass_ratio": round(passes / sum(detail["num_layer_passes_without_reuse"] for detail in details), DIGITS),
        "task_bytes": run.task_bytes,
    }


def _speed(tasks: Sequence[StreamTask], run: ContenderRun, reference: ContenderRun) -> Row:
    """Requests come one after the other, so throughput is their number by the sum of their times."""
    total_s, reference_s = (sum(answer.total_ms for answer in one.answers) / 1000 for one in (run, reference))
    cpu_s, reference_cpu_s = (sum(answer.cpu_ms for answer in one.answers) / 1000 for one in (run, reference))
    by_kind = {
        kind: [answer.first_token_ms for task, answer in zip(tasks, run.answers, strict=True) if task.kind == kind]
        for kind in dict.fromkeys(task.kind for task in tasks)
    }
    rises = [answer.peak_rise_bytes for answer in run.answers if answer.peak_rise_bytes is not None]
    return {
        "throughput_per_s": round(len(tasks) / total_s, DIGITS),
        "throughput_vs_no_reuse": round(reference_s / total_s, DIGITS),
        "throughput_vs_no_reuse_by_cpu_time": round(reference_cpu_s / cpu_s, DIGITS),
        "ttft_ms": spread([answer.first_token_ms for answer in run.answers]),
        "ttft_ms_by_kind": {kind: spread(times_ms) for kind, times_ms in by_kind.items()},
        "peak_rise_bytes": max(rises, default=None),
    }


def _quality(tasks: Sequence[StreamTask], run: ContenderRun, reference: ContenderRun) -> Row:
    """Interval of each figure from 0 to 1. Answers of random weights match nothing, but can agree."""
    exact, full = ([_exact_match(task, answer.text) for task, answer in _pairs(tasks, one)] for one in (run, reference))
    pairs = list(zip(run.answers, reference.answers, strict=True))
    similar = [score for task, score in zip(tasks, exact, strict=True) if task.earlier is not None]
    return {
        "exact_match": mean_interval(exact),
        "similar_exact_match": mean_interval(similar),
        "exact_match_vs_no_reuse": mean_interval([mine - theirs for mine, theirs in zip(exact, full, strict=True)]),
        "agreement": mean_interval([is_same_answer(mine.text, theirs.text) for mine, theirs in pairs]),
        "first_token_agreement": mean_interval(
            [float(mine.token_ids[:1] == theirs.token_ids[:1]) for mine, theirs in pairs]
        ),
    }


def _pairs(tasks: Sequence[StreamTask], run: ContenderRun) -> list[tuple[StreamTask, Any]]:
    return list(zip(tasks, run.answers, strict=True))


def _exact_match(task: StreamTask, text: str) -> float:
    return squad_score(text, task.question.answers).exact_match


MEBI = 2**20


def show_speed(rows: Sequence[Row], console: Console) -> None:
    """Times are in milliseconds, memory in MiB."""
    figures = ("hits", "passes", "req/s", "times", "CPU", "TTFT", "p95", "rise", "kept")
    table = new_table(f"Speed on {_what(rows)}", "contender", figures=figures)
    for row in rows:
        rise = row["peak_rise_bytes"]
        table.add_row(
            _label(row),
            str(row["num_hits"]),
            f"{row['layer_pass_ratio']:.0%}",
            f"{row['throughput_per_s']:.2f}",
            f"{row['throughput_vs_no_reuse']:.2f}",
            f"{row['throughput_vs_no_reuse_by_cpu_time']:.2f}",
            f"{row['ttft_ms']['median']:.0f}",
            f"{row['ttft_ms']['p95']:.0f}",
            "-" if rise is None else f"{rise / MEBI:.0f}",
            f"{row['task_bytes'] / MEBI:.0f}",
        )
    console.print(table)
    console.print(
        "passes: layer passes over prompt tokens, of no reuse's; times: requests per second, by no reuse's; CPU: the "
        "same by CPU time; TTFT, p95: ms; rise: the most that a request made memory rise, kept: KV of tasks, MiB",
        style="dim",
    )


def show_quality(rows: Sequence[Row], console: Console) -> None:
    """All figures are percentages; differences to no reuse are in points."""
    figures = ("hits", "exact", "interval", "lost", "similar", "same", "first")
    table = new_table(f"Quality on {_what(rows)}", "contender", figures=figures)
    for row in rows:
        exact = row["exact_match"]
        table.add_row(
            _label(row),
            str(row["num_hits"]),
            percent(exact),
            percent_range(exact),
            f"{-100 * row['exact_match_vs_no_reuse']['mean'] + 0.0:.1f}",
            percent(row["similar_exact_match"]),
            percent(row["agreement"]),
            percent(row["first_token_agreement"]),
        )
    console.print(table)
    console.print(
        "exact: exact match; lost: of no reuse's, points; similar: exact match of the similar tasks; same, first: "
        "answers and first tokens that are no reuse's",
        style="dim",
    )


def _what(rows: Sequence[Row]) -> str:
    row = rows[0]
    weights = " (random weights)" if row["has_random_weights"] else ""
    return f"{row['model']}{weights}: {row['num_tasks']} tasks, {row['num_similar']} similar"


def _label(row: Row) -> str:
    return SimLLMVariant(row["mode"], row["similarity_threshold"]).label


@dataclass(frozen=True)
class Measured:
    """Rows of the contenders, and of their single answers."""

    rows: list[Row]
    answers: list[Row]


@dataclass(frozen=True)
class Bench:
    """`max_new_tokens` are generated for every answer. `dtype` None is the machine's best."""

    question_set: QuestionSet
    variants: Sequence[SimLLMVariant]
    similar_ratio: float
    max_new_tokens: int = 8
    max_cache_size: int = 100
    dtype: str | None = None
    seed: int = 0
    num_hyperplanes: int = 16
    device: str = "auto"

    def speed(self, shape: str, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On random weights. Raises `ValueError` for an unknown shape."""
        torch.manual_seed(self.seed)
        network = SharedModel.load(model_folder(None, shape), shape, dtype=self.dtype or best_dtype(), random=True)
        separator = BlendConfig(**read_blend_profile(model_folder(None, None))).separator
        return self._measure(network, num_tasks, separator, on_step)

    def quality(self, model: str | None, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On a trained model, by default the town model."""
        network = SharedModel.find(model, device=self.device, dtype=self.dtype)
        return self._measure(network, num_tasks, network.config.separator, on_step)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "similar_ratio": self.similar_ratio,
            "max_new_tokens": self.max_new_tokens,
            "max_cache_size": self.max_cache_size,
            "dtype": self.dtype or best_dtype(),
            "num_threads": torch.get_num_threads(),
            "seed": self.seed,
        }

    def _measure(self, network: SharedModel, num_tasks: int, separator: str, on_step: Callable[[], None]) -> Measured:
        tasks = make_stream(self.question_set, num_tasks, self.similar_ratio, self.seed)
        kept = (self.max_new_tokens, self.max_cache_size, self.num_hyperplanes)
        asking = StreamSettings(self.question_set.system, separator, *kept)
        runs = run_stream(network, tasks, self.variants, asking, on_step)
        model = {"model": network.name, "has_random_weights": network.has_random_weights}
        return Measured(make_rows(tasks, runs, **model), answer_rows(tasks, runs, **model))
