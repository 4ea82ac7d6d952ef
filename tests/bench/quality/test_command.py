"""`kvarena eval` as it is typed: files, plot, table, exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarena.bench.plotting import save_picture
from kvarena.bench.results import load_results, save_results
from kvarena.cli import app
from support.question_folder import write_question_folder
from support.real_server import serving
from support.scripted_engine import ScriptedEngine
from support.tiny_models import save_tiny_model

TEA = {"question": "\nsay tea", "answers": ["tea"], "kind": "single"}


def test_a_server(tmp_path: Path) -> None:
    questions = write_question_folder(tmp_path / "town", [TEA, TEA | {"answers": ["rain"], "kind": "across"}])
    output = tmp_path / "new" / "x.json"
    arguments = ["eval", "--questions", str(questions), "--output", str(output)]
    with serving(ScriptedEngine()) as server:
        result = CliRunner().invoke(app, [*arguments, "--contender", f"scripted={server.url}"])
        assert result.exit_code == 0, result.output
        printed = CliRunner().invoke(app, [*arguments, "--contender", f"scripted={server.url}", "--json"])
    assert "100.0" in result.output
    saved = json.loads(output.read_text())
    assert json.loads(printed.stdout) == saved
    assert saved["settings"]["benchmark"] == "eval"
    assert saved["settings"]["reference"] == "scripted"
    assert {row["kind"]: row["correct"]["mean"] for row in saved["rows"] if row["subset"] == "all"} == {
        "all": 0.5,
        "single": 1,
        "across": 0,
    }
    assert {(row["kind"], row["num_questions"]) for row in saved["rows"] if row["subset"] == "answered"} == {
        ("all", 1),
        ("single", 1),
    }
    assert [one["text"] for one in saved["answers"]] == ["tea", "tea"]
    assert saved["questions"][1]["chunks"] == ["1-tea", "2-rain", "10-road"]
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_failed_answers_are_an_exit_status(tmp_path: Path) -> None:
    questions = write_question_folder(tmp_path, [TEA, TEA | {"question": "\nrefuse"}])
    output = tmp_path / "x.json"
    with serving(ScriptedEngine()) as server:
        arguments = ["--contender", f"scripted={server.url}", "--questions", str(questions), "--output", str(output)]
        result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 1
    assert "1 answers failed, the first: refused before the first token" in result.output
    row = load_results(output)["rows"][0]
    assert (row["num_questions"], row["num_failed"], row["exact_match"]["mean"]) == (2, 1, 1)


def test_answers_that_do_not_end_are_told_at_once_and_scored(tmp_path: Path) -> None:
    records = [TEA | {"question": "\nsay tea and more of it", "needs": ["1-tea"]}] * 2
    questions = write_question_folder(tmp_path, records)
    output = tmp_path / "x.json"
    arguments = ["--questions", str(questions), "--output", str(output), "--max-tokens", "5"]
    arguments += ["--seed", "7", "--num-chunks", "2"]
    with serving(ScriptedEngine()) as server:
        contenders = [f"--contender={name}={server.url}" for name in ("plain", "other")]
        result = CliRunner().invoke(app, ["eval", *arguments, *contenders])
    assert result.exit_code == 0, result.output
    assert result.output.count("The first answer of plain doesn't end within 5 tokens.") == 1
    saved = load_results(output)
    assert (saved["settings"]["seed"], saved["settings"]["num_chunks"]) == (7, 2)
    assert {len(question["chunks"]) for question in saved["questions"]} == {2}
    other = next(row for row in saved["rows"] if row["contender"] == "other")
    assert (other["num_cut"], other["num_failed"]) == (2, 0)
    assert other["correct"]["mean"] == other["agreement"]["mean"] == other["token_agreement"]["mean"] == 1
    assert other["kl_along_answer"]["mean"] == 0
    assert other["kl_method"] == "common_prefix_top20"


@pytest.mark.slow
def test_policies_in_this_process(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    questions = write_question_folder(tmp_path / "town", [{"question": "tea rain?", "answers": ["x"]}] * 2)
    output = tmp_path / "x.json"
    arguments = ["--engine", "hf", "--model", str(model), "--questions", str(questions), "--output", str(output)]
    arguments += ["--policy", "kv_deviation", "--policy", "random", "--ratio", "0,0.5,1", "--max-tokens", "4"]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.output
    rows = {(row["policy"], row["ratio"]): row for row in load_results(output)["rows"]}
    assert set(rows) == {(None, None), *((p, r) for p in ("kv_deviation", "random") for r in (0, 0.5, 1))}
    assert rows["kv_deviation", 0]["recomputed_ratio"] == 0
    assert 0.5 <= rows["random", 0.5]["recomputed_ratio"] < 0.6
    assert {row["kl_method"] for row in rows.values()} == {None, "teacher_forced"}
    for policy in ("kv_deviation", "random"):
        same = rows[policy, 1]
        assert same["agreement"]["mean"] == same["token_agreement"]["mean"] == 1
        assert same["kl_along_answer"]["mean"] < 1e-4
    assert rows["kv_deviation", 0]["kl_along_answer"]["mean"] > rows["kv_deviation", 0.5]["kl_along_answer"]["mean"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "jax"], "engine is 'jax'; it is http or hf"),
        (["--ratio", "a"], "'a' is no list of numbers"),
        (["--engine", "hf", "--ratio", "2"], "ratio must be a number from 0 to 1"),
        (["--engine", "hf", "--policy", "best"], "policy must be one of"),
        (["--num-chunks", "3"], "contexts that --seed draws"),
        (["--model", "x", "--data", "backend/models/town/notes"], "--model goes with --engine hf"),
        (["--questions", "missing.jsonl", "--data", "backend/models/town/notes"], "can't be read"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plot_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "prefix.json"
    save_results(path, {"benchmark": "prefix"}, [{"ttft_ms": {"median": 1}}])
    with pytest.raises(ValueError, match="holds no eval benchmark"):
        save_picture(path, tmp_path / "x.png", "eval")
