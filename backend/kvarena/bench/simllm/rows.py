"""From the answers to a result file's rows, one for each contender and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarena.bench.quality.intervals import mean_interval
from kvarena.bench.quality.scoring import is_same_answer, squad_score
from kvarena.bench.results import Row, spread
from kvarena.bench.simllm.running import ContenderRun
from kvarena.bench.simllm.stream import StreamTask

DIGITS = 4


def make_rows(tasks: Sequence[StreamTask], runs: Sequence[ContenderRun], **model: Any) -> list[Row]:
    """The first run is the one without reuse: what the others are compared with."""
    reference = runs[0]
    assert reference.setup.mode is None, "the first run is without reuse"
    return [
        {
            **model,
            "mode": run.setup.mode,
            "similarity_threshold": run.setup.similarity_threshold,
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
            "contender": run.setup.label,
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
