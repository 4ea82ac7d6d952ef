"""Contenders over the same weights, each with tasks of its own; and the commands as they are typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kvarena.bench.quality.questions import QuestionSet, load_questions
from kvarena.bench.simllm.running import SharedModel, SimLLMVariant, StreamSettings, make_stream, run_stream, variants
from kvarena.cli import app
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
