"""Figures against values computed by hand, and their way through a file to a plot and a table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvarena.bench.plotting import save_picture
from kvarena.bench.quality.questions import EvalQuestion
from kvarena.bench.results import Row, load_results, save_results
from kvarena.bench.simllm.demo import cosines, differing_bits
from kvarena.bench.simllm.measuring import answer_rows, make_rows, show_quality, show_speed
from kvarena.bench.simllm.running import ContenderRun, MeasuredAnswer, SimLLMVariant, StreamTask
from kvarena.engines.base import Report
from kvarena.panels.quality import speed_and_quality

QUESTION = EvalQuestion("which?", ("tea",), ())
TASKS = [StreamTask(QUESTION, "new"), StreamTask(QUESTION, "new"), StreamTask(QUESTION, "other order", 0)]
REUSE = SimLLMVariant("aligned", 0.9)


def answer(
    text: str, total_ms: float, num_layer_passes: int, *, hit: bool = False, rise: int | None = 5
) -> MeasuredAnswer:
    details = {
        "hit": hit,
        "similarity": 0.95 if hit else None,
        "num_layer_passes": num_layer_passes,
        "num_layer_passes_without_reuse": 400,
    }
    ids = tuple(map(ord, text))
    return MeasuredAnswer(
        ids, text, total_ms / 2, total_ms, total_ms / 4, rise, Report(num_prompt_tokens=100, details=details)
    )


def rows() -> list[Row]:
    full = [answer(text, 1000, 400) for text in ("tea", "The tea.", "rain")]
    reused = [answer("tea", 1000, 400, rise=7), answer("goat", 900, 350), answer("rain", 100, 50, hit=True, rise=None)]
    runs = [ContenderRun(SimLLMVariant(), full, 0), ContenderRun(REUSE, reused, 2**20)]
    return make_rows(TASKS, runs, model="small", has_random_weights=False)


def test_figures() -> None:
    none, reused = rows()
    assert (none["mode"], none["throughput_vs_no_reuse"], none["layer_pass_ratio"], none["num_hits"]) == (None, 1, 1, 0)
    assert (reused["num_tasks"], reused["num_similar"], reused["num_hits"], reused["num_similar_hits"]) == (3, 1, 1, 1)
    assert reused["throughput_per_s"] == 1.5
    assert reused["throughput_vs_no_reuse"] == reused["throughput_vs_no_reuse_by_cpu_time"] == 1.5
    assert reused["layer_pass_ratio"] == round(800 / 1200, 4)
    assert reused["ttft_ms"]["median"] == 450
    assert reused["ttft_ms_by_kind"] == {
        "new": {"median": 475, "p95": pytest.approx(497.5)},
        "other order": {"median": 50, "p95": 50},
    }
    assert (reused["peak_rise_bytes"], reused["task_bytes"]) == (7, 2**20)
    assert none["exact_match"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert reused["exact_match"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert reused["exact_match_vs_no_reuse"]["mean"] == pytest.approx(-1 / 3, abs=1e-4)
    assert reused["similar_exact_match"]["mean"] == 0
    assert reused["agreement"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert reused["first_token_agreement"]["mean"] == pytest.approx(2 / 3, abs=1e-4), "t, g and r beside t, T and r"


def test_file_plot_and_tables(tmp_path: Path) -> None:
    path, image = tmp_path / "x.json", tmp_path / "x.png"
    save_results(path, {"benchmark": "simllm"}, rows())
    save_picture(path, image, "simllm")
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = Console(file=io.StringIO(), width=80)
    saved = load_results(path)["rows"]
    show_speed(saved, shown)
    show_speed([row | {"ttft_ms": {"median": 98765, "p95": 98765}, "task_bytes": 2000 * 2**20} for row in saved], shown)
    show_quality(saved, shown)
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    for figure in ("no reuse", "aligned 0.9", "67%", "1.50", "33.3", "66.7", "3 tasks, 1 similar"):
        assert figure in text
    assert "…" not in text, "it fits into 80 columns"


def test_speed_and_quality_of_two_models_meet(tmp_path: Path) -> None:
    shape = [row | {"model": "180m", "throughput_vs_no_reuse": 2.0} for row in rows()]
    points = speed_and_quality([*shape, *rows()])
    assert [(speed["model"], quality["model"]) for speed, quality in points] == [("180m", "small")] * 2
    save_results(tmp_path / "x.json", {"benchmark": "prefix"}, rows())
    with pytest.raises(ValueError, match="holds no simllm benchmark"):
        save_picture(tmp_path / "x.json", tmp_path / "x.png", "simllm")


def test_single_answers() -> None:
    runs = [ContenderRun(REUSE, [answer("tea", 10, 4, hit=True)] * 3, 0)]
    found: list[dict[str, Any]] = answer_rows(TASKS, runs, model="small")
    assert [(row["task"], row["kind"], row["earlier"]) for row in found] == [
        (0, "new", None),
        (1, "new", None),
        (2, "other order", 0),
    ]
    assert (found[0]["contender"], found[0]["text"], found[0]["gold"]) == ("aligned 0.9", "tea", ["tea"])
    assert (found[0]["is_hit"], found[0]["similarity"]) == (True, 0.95)


def test_cosines_and_differing_bits() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    half = 2**-0.5
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines(embeddings), expected)
    assert differing_bits(["0101", "0110", "1111"]) == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
