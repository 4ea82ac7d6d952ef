"""`kvarena calibrate`: the choice among rows, the profile, and the whole command on a tiny model in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarena.bench.quality.answers import Answer
from kvarena.bench.quality.asking import Attempt
from kvarena.bench.quality.calibrate_command import sample_note
from kvarena.bench.quality.calibration import check_layers, document_exam, fastest, with_answers_of, write_profile
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import load_results
from kvarena.cli import app
from kvarena.vllm_plugin.config import read_model_profile
from real_server import serving
from scripted_engine import ScriptedEngine
from tiny_models import random_text, save_tiny_model

FULL = Setup("blend", "all")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(4):
        (folder / f"{number}.md").write_text(random_text(rng, 40))
    return folder


def row(f1: float, ttft_ms: float, **more: Any) -> dict[str, Any]:
    setting = {"policy": "kv_deviation", "ratio": 0.1, "check_layer": 1, "num_failed": 0}
    return setting | {"f1": {"mean": f1}, "ttft_ms": {"median": ttft_ms}} | more


def test_the_fastest_that_agrees_enough() -> None:
    agreeing = [row(0.99, 300, check_layer=3), row(0.97, 200, check_layer=2)]
    rows = [*agreeing, row(0.96, 100), row(1.0, 150, num_failed=1), row(0, 1) | {"f1": None}]
    assert fastest(rows, 0.97) is rows[1]
    assert fastest(rows, 0.98) is rows[0]
    assert fastest(rows, 0.995) is None


def test_of_two_ratios_that_agree_the_lower_one_is_faster_whatever_was_measured() -> None:
    rows = [row(1.0, 140, ratio=0.05), row(1.0, 90), row(1.0, 100, ratio=0.0, policy="chunk_head")]
    assert fastest(rows, 0.97) is rows[0]
    assert fastest([rows[0] | {"f1": {"mean": 0.9}}, *rows[1:]], 0.97) is rows[1]
    assert fastest([rows[0], rows[1] | {"check_layer": 2}], 0.97) is not rows[0], "another layer is other work"


def test_layers_up_to_half_of_the_model() -> None:
    assert check_layers(1) == check_layers(3) == [1]
    assert check_layers(6) == [1, 2, 3]
    assert check_layers(32) == check_layers(None) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_documents_alone_are_enough_to_ask(documents: Path) -> None:
    exam = document_exam(documents, 7)
    assert len(exam.questions) == 7
    assert exam == document_exam(documents, 7) != document_exam(documents, 7, seed=1)
    answered = [Attempt(FULL, number, Answer(f"tea {number}", True, 1.0)) for number in range(3)]
    known = with_answers_of(exam, [*answered, Attempt(FULL, 3, None, "time-out")])
    assert [question.answers for question in known.questions] == [("tea 0",), ("tea 1",), ("tea 2",)]
    with pytest.raises(ValueError, match="full prefill answered nothing: time-out"):
        with_answers_of(exam, [Attempt(FULL, 0, None, "time-out")])
    (documents / "3.md").unlink()
    (documents / "2.md").unlink()
    (documents / "1.md").unlink()
    with pytest.raises(ValueError, match="1 chunks; blending needs 2"):
        document_exam(documents, 7)


def test_the_finding_says_what_it_rests_on() -> None:
    assert sample_note(30) == "This rests on 30 questions."
    assert sample_note(29).startswith("This rests on 29 questions only: ")
    assert sample_note(1).startswith("This rests on 1 question only: ")


def test_the_profile_keeps_what_it_is_not_about(tmp_path: Path) -> None:
    path = write_profile(tmp_path, row(1, 1), "<note>")
    assert json.loads(path.read_text()) == {
        "separator": "<note>", "policy": "kv_deviation", "ratio": 0.1, "check_layer": 1
    }  # fmt: skip
    write_profile(tmp_path, row(1, 1, options={"deviation": "values"}), "<note>")
    assert read_model_profile(str(tmp_path))["deviation"] == "values"
    write_profile(tmp_path, {"policy": "random", "ratio": 0.3, "check_layer": None}, "#")
    assert read_model_profile(str(tmp_path)) == {"separator": "<note>", "policy": "random", "ratio": 0.3}


@pytest.mark.slow
def test_the_command_on_a_tiny_model(documents: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    output = tmp_path / "calibration.json"
    arguments = ["calibrate", "--engine", "hf", "--model", str(model), "--data", str(documents), "--max-tokens", "4"]
    arguments += ["--num-questions", "4", "--output", str(output), "--separator", " # "]
    result = CliRunner().invoke(app, [*arguments, "--ratio", "0,0.5,1", "--target", "1"])
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output
    assert "This rests on 4 questions only: with fewer than 30, others" in result.output
    profile = json.loads((model / "kvarena.json").read_text())
    saved = load_results(output)
    assert saved["settings"]["chosen"]["policy"] == profile["policy"]
    rows = {Setup.of_row(one): one["f1"]["mean"] for one in saved["rows"]}
    assert len(rows) == 3 * (3 * 2 + 1), "ratios, policies with layers and without"
    assert all(agreement == 1 for setup, agreement in rows.items() if setup.ratio == 1)

    (model / "kvarena.json").unlink()
    result = CliRunner().invoke(app, [*arguments, "--policy", "random", "--ratio", "0.05", "--target", "1"])
    assert result.exit_code == 1
    assert "This rests on 4 questions only" in result.output
    assert "No setting reaches 100 % agreement" in result.output
    assert not (model / "kvarena.json").exists()


def test_a_server_that_does_not_blend(documents: Path) -> None:
    with serving(ScriptedEngine()) as server:
        arguments = ["--contender", f"other={server.url}", "--data", str(documents)]
        result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 1
    assert "other doesn't blend" in result.stderr
