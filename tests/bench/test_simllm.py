"""Sim-LLM's benchmark: its stream of tasks, contenders over the same weights, its figures, its commands."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kvarena.bench.plotting import save_picture
from kvarena.bench.quality.questions import EvalQuestion, QuestionSet, load_questions
from kvarena.bench.results import Row, load_results, save_results
from kvarena.bench.simllm import (
    ContenderRun,
    MeasuredAnswer,
    SharedModel,
    SimLLMVariant,
    StreamSettings,
    StreamTask,
    answer_rows,
    make_rows,
    make_stream,
    run_stream,
    show_quality,
    show_speed,
    variants,
)
from kvarena.bench.simllm_demo import cosines, differing_bits
from kvarena.cli import app
from kvarena.engines.base import Report
from kvarena.home import project_root
from kvarena.panels.quality import speed_and_quality
from support.question_folder import write_question_folder
from support.tiny_models import save_tiny_model

NUM_STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two sets of chunks with two questions on each; the second may stand in any order."""
    both, one = ["1-tea", "2-rain"], ["2-rain", "10-road"]
    records = [
        {"question": f"{name} {place}?", "answers": ["tea"], "chunks": chunks, "needs": chunks[:1]}
        for chunks in (both, one)
        for place, name in enumerate(["what", "which"])
    ]
    return write_question_folder(tmp_path / "town", records)


@pytest.fixture
def question_set(questions: Path) -> QuestionSet:
    return load_questions(questions)


def test_contenders_share_weights_and_no_tasks(folder: Path) -> None:
    network = SharedModel.load(str(folder), "tiny")
    asking = StreamSettings("", "", max_cache_size=10, num_hyperplanes=8)
    first, second = (network.contender(SimLLMVariant("top_layer", 0.5), asking) for _ in range(2))
    params = first.engine.simllm.params
    assert (params.max_cache_size, params.num_hyperplanes) == (10, 8)
    places = [[weight.data_ptr() for weight in one.engine.model.module.parameters()] for one in (first, second)]
    assert places[0] == places[1] == [weight.data_ptr() for weight in network.module.parameters()]
    prompt = [9] * 30
    assert [first.answer(prompt, 2).report.details["hit"] for _ in range(2)] == [False, True]
    assert first.task_bytes == 2 * 30 * 2 * 32 * 4, "keys and values of 30 tokens, 2 heads of 32 numbers, 4 bytes each"
    assert second.task_bytes == 0
    assert not second.answer(prompt, 2).report.details["hit"]
    for contender in (first, second):
        contender.engine.close()


def test_random_weights_are_a_seeds(folder: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        module = SharedModel.load(str(folder), "tiny", random=True).module
        weights.append(module.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def generated(folder: Path, prompt: Sequence[int]) -> tuple[int, ...]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_STEPS)
    answer: list[int] = output[0, ids.shape[1] :].tolist()
    return tuple(answer[: answer.index(1)] if 1 in answer else answer)


def test_every_task_is_put_to_every_contender(folder: Path, question_set: QuestionSet) -> None:
    network = SharedModel.load(str(folder), "tiny")
    tasks = make_stream(question_set, 8, 0.5)
    asking = StreamSettings("Read.", "\n", NUM_STEPS)
    chosen = variants(["aligned", "top_layer"], [0.9999])
    steps: list[None] = []
    none, aligned, top_layer = run_stream(network, tasks, chosen, asking, lambda: steps.append(None))
    assert len(steps) == 8 * 3
    prompts = [network.token_ids(task.question.messages("Read.", "\n")) for task in tasks]
    answers = zip(none.answers, aligned.answers, top_layer.answers, strict=True)
    for prompt, (full, whole, top) in zip(prompts, answers, strict=True):
        assert full.token_ids == generated(folder, prompt), "no reuse is Hugging Face's generate"
        assert full.report.details["num_layer_passes"] == 4 * len(prompt)
        assert not full.report.details["hit"]
        assert full.first_token_ms <= full.total_ms
        if top.report.details["hit"]:
            assert top.report.details["num_layer_passes"] == len(prompt)
        else:
            assert top.token_ids == full.token_ids
        if not whole.report.approximate:
            assert whole.token_ids == full.token_ids
    assert none.task_bytes == 0 < top_layer.task_bytes
    assert top_layer.task_bytes == 2 * 2 * 32 * 4 * sum(
        len(prompt)
        for prompt, answer in zip(prompts, top_layer.answers, strict=True)
        if not answer.report.details["hit"]
    )


@pytest.mark.parametrize(("modes", "thresholds", "message"), [(["best"], [0.9], "best"), (["aligned"], [2.0], "2.0")])
def test_bad_setups_are_named(modes: list[str], thresholds: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants(modes, thresholds)


def test_another_family_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simllm", "demo", "--model-path", str(save_tiny_model(tmp_path, "qwen2"))])
    assert result.exit_code == 1
    assert "needs a model of type llama" in result.output


@pytest.mark.slow
def test_the_benchmark_as_it_is_typed(folder: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "x.json"
    arguments = ["bench", "simllm", "--model", str(folder), "--questions", str(questions), "--output", str(output)]
    arguments += ["--num-tasks", "4", "--num-quality-tasks", "8", "--thresholds", "0.5,1", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    saved: dict[str, Any] = json.loads(output.read_text())
    assert json.loads(result.stdout) == saved
    assert saved["settings"]["similar_ratio"] == 0.5
    rows = {(row["model"], row["mode"], row["similarity_threshold"]): row for row in saved["rows"]}
    assert len(rows) == 2 * 5
    shape, small = (sorted({row["model"] for row in saved["rows"]}, key=lambda name: name != "180m"))[:2]
    for model, num_tasks in ((shape, 4), (small, 8)):
        none, loose = rows[model, None, None], rows[model, "top_layer", 0.5]
        assert (none["num_tasks"], none["num_similar"], none["num_hits"]) == (num_tasks, num_tasks // 2, 0)
        assert none["layer_pass_ratio"] == none["throughput_vs_no_reuse"] == 1
        assert loose["num_hits"] == num_tasks - 1, "a town's chunks are alike: all but the first hit"
        assert loose["layer_pass_ratio"] < 0.6
        assert rows[model, "top_layer", 1.0]["num_hits"] <= num_tasks // 2
    assert len(saved["answers"]) == (4 + 8) * 5
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["Mode top_layer", "Mode aligned", "the same again", "notes reordered", "'grey'"]),
        (
            ["--mode", "similarity", "--similarity_threshold", "0.999", "--num_hyperplanes", "24", "--device", "cpu"],
            ["At a threshold of 0.999", "of 15 pairs hit", "24 "],
        ),
        (["--mode", "benchmark", "--max_cache_size", "20"], ["12 tasks, 6 similar", "Quality on town", "aligned 0.8"]),
    ],
)
def test_the_demonstrations_as_they_are_typed(arguments: list[str], said: list[str]) -> None:
    result = CliRunner().invoke(app, ["simllm", "demo", *arguments])
    assert result.exit_code == 0, result.output
    for text in said:
        assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "simllm", "--shape", "7b"], "180m"),
        (["bench", "simllm", "--modes", "best"], "aligned, top_layer, sandwich, not 'best'"),
        (["bench", "simllm", "--thresholds", "2"], "from -1 to 1, not 2"),
        (["bench", "simllm", "--thresholds", "many"], "'many' is no list of numbers"),
        (["bench", "simllm", "--questions", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_command_lines(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def shipped() -> QuestionSet:
    return load_questions(project_root() / "backend/models/town/notes" / "questions.jsonl")


def names(question: EvalQuestion) -> list[str]:
    return [chunk.name for chunk in question.chunks]


def similar(stream: list[StreamTask]) -> list[StreamTask]:
    return [task for task in stream if task.earlier is not None]


def test_half_of_the_tasks_are_the_shipped_questions_each_once(shipped: QuestionSet) -> None:
    stream = make_stream(shipped, 2 * len(shipped.questions), 0.5)
    assert len(similar(stream)) == len(shipped.questions)
    assert {task.question for task in similar(stream)} == set(shipped.questions)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_similar_task_has_an_earlier_new_ones_chunks(shipped: QuestionSet, ratio: float) -> None:
    stream = make_stream(shipped, 40, ratio, seed=3)
    assert len(stream) == 40
    assert len(similar(stream)) == min(round(40 * ratio), 39)
    for place, task in enumerate(stream):
        if task.earlier is None:
            assert task.kind == "new"
            continue
        source = stream[task.earlier]
        assert task.earlier < place
        assert source.kind == "new"
        assert source.question != task.question
        assert (names(source.question) == names(task.question)) == (task.kind == "same context")
        assert sorted(names(source.question)) == sorted(names(task.question))
    if 0 < ratio < 1:
        assert {task.kind for task in stream} == {"new", "same context", "other order"}


def test_new_tasks_share_no_set_of_chunks(shipped: QuestionSet) -> None:
    contexts = [frozenset(task.question.chunks) for task in make_stream(shipped, 60, 0.5) if task.earlier is None]
    assert len(set(contexts)) == len(contexts) == 30


def test_gold_answers_hold(shipped: QuestionSet) -> None:
    """What a question needs, and what stood in between, stands in the task's context as in the exam."""
    as_shipped = {(question.question, question.answers): question for question in shipped.questions}
    for task in make_stream(shipped, 240, 0.5) + make_stream(shipped, 100, 0.9, seed=1):
        original = as_shipped[task.question.question, task.question.answers]
        own = names(original)
        needed = [own.index(name) for name in original.needs] or [0, len(own) - 1]
        stretch = "|".join(own[min(needed) : max(needed) + 1])
        assert stretch in "|".join(names(task.question))


def test_equal_seeds_make_equal_streams(shipped: QuestionSet) -> None:
    assert make_stream(shipped, 30, 0.5, seed=1) == make_stream(shipped, 30, 0.5, seed=1)
    for one, other in pairwise(make_stream(shipped, 30, 0.5, seed=seed) for seed in range(3)):
        assert one != other


def test_an_exam_of_a_single_question(tmp_path: Path) -> None:
    question_set = load_questions(write_question_folder(tmp_path, [{"question": "tea?", "answers": ["tea"]}]))
    assert [task.question for task in make_stream(question_set, 4, 0.5)] == list(question_set.questions) * 4


@pytest.mark.parametrize(("num_tasks", "ratio", "message"), [(0, 0.5, "not 0"), (4, 1.5, "from 0 to 1, not 1.5")])
def test_what_is_no_stream(shipped: QuestionSet, num_tasks: int, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(shipped, num_tasks, ratio)


def test_needs_are_read_and_checked(tmp_path: Path) -> None:
    record = {"question": "tea?", "answers": ["tea"], "chunks": ["1-tea", "10-road"]}
    assert load_questions(write_question_folder(tmp_path, [record | {"needs": ["1-tea"]}])).questions[0].needs == (
        "1-tea",
    )
    with pytest.raises(ValueError, match=r"line 1: needs has '2-rain', which is not among its chunks: 1-tea, 10-road"):
        load_questions(write_question_folder(tmp_path, [record | {"needs": ["2-rain"]}]))


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
