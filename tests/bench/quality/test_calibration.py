"""`kvarena calibrate`: the choice among rows, the profile, and the whole command on a tiny model in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarena.bench.quality.asking import Attempt, Closeness, GreedyAnswer
from kvarena.bench.quality.calibration import (
    calibration_rows,
    check_layers,
    document_questions,
    fastest,
    sink_rows,
    still_in_the_race,
    write_profile,
)
from kvarena.bench.quality.command import one_sink_note, sample_note
from kvarena.bench.results import load_results
from kvarena.bench.variants import Variant
from kvarena.cli import app
from kvarena.policies.params import read_model_profile
from support.real_server import serving
from support.scripted_engine import ScriptedEngine
from support.tiny_models import random_text, save_tiny_model

FULL = Variant("blend", "all")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(4):
        (folder / f"{number}.md").write_text(random_text(rng, 80))
    return folder


def row(agreement: float, ttft_ms: float, *, low: float = 0.0, high: float = 1.0, **more: Any) -> dict[str, Any]:
    setting = {"contender": "blend", "policy": "kv_deviation", "ratio": 0.1, "check_layer": 1, "num_failed": 0}
    found = {"mean": agreement, "low": low, "high": high}
    return setting | {"token_agreement": found, "ttft_ms": {"median": ttft_ms}} | more


def test_the_fastest_that_agrees_enough() -> None:
    agreeing = [row(0.99, 300, check_layer=3), row(0.97, 200, check_layer=2)]
    rows = [*agreeing, row(0.96, 100), row(1.0, 150, num_failed=1), row(0, 1) | {"token_agreement": None}]
    assert fastest(rows, 0.97) is rows[1]
    assert fastest(rows, 0.98) is rows[0]
    assert fastest(rows, 0.995) is None


def test_of_two_ratios_that_agree_the_lower_one_is_faster_whatever_was_measured() -> None:
    rows = [row(1.0, 140, ratio=0.05), row(1.0, 90), row(1.0, 100, ratio=0.0, policy="chunk_head")]
    assert fastest(rows, 0.97) is rows[0]
    assert fastest([rows[0] | {"token_agreement": {"mean": 0.9}}, *rows[1:]], 0.97) is rows[1]
    assert fastest([rows[0], rows[1] | {"check_layer": 2}], 0.97) is not rows[0], "another layer is other work"


def test_who_may_still_be_chosen() -> None:
    def ratios_left(*rows: dict[str, Any]) -> list[float | None]:
        return [variant.ratio for variant in still_in_the_race(rows, 0.9)]

    hopeless, unsure = row(0.5, 10, high=0.8, ratio=0.0), row(0.8, 20, low=0.7, high=0.95, ratio=0.05)
    sure, more = row(0.95, 30, low=0.92), row(0.97, 29, low=0.94, ratio=0.2)
    assert ratios_left(hopeless, unsure, sure, more) == [0.05, 0.1]
    elsewhere = row(0.97, 35, low=0.94, ratio=0.3, check_layer=2)
    assert ratios_left(sure, elsewhere) == [0.1, 0.3], "not much slower"
    assert ratios_left(sure, elsewhere | {"ttft_ms": {"median": 40}}) == [0.1]
    assert ratios_left(sure, row(0.97, 20, low=0.94, ratio=0.2)) == [0.1], "not both out when the times are noise"
    assert ratios_left(sure | {"num_failed": 1}, more | {"token_agreement": None}) == []


def test_of_two_sinks_at_which_the_same_work_agrees_the_closer_one() -> None:
    def at(sink_tokens: int, agreement: float, ttft_ms: float, kl: float) -> dict[str, Any]:
        return row(agreement, ttft_ms, sink_tokens=sink_tokens, kl_along_answer={"mean": kl})

    alone, after = at(0, 0.95, 100, 0.2), at(1, 0.95, 110, 0.1)
    assert fastest([alone, after], 0.9) is after, "a sink takes no time, so the difference was noise"
    assert fastest([alone, after | {"token_agreement": {"mean": 0.8}}], 0.9) is alone
    less = alone | {"ratio": 0.05}
    assert fastest([less, after], 0.9) is less, "time comes first"


def test_sinks_are_compared_over_the_same_settings_and_questions() -> None:
    def attempt(sink_tokens: int, question: int, kl: float, **setting: Any) -> Attempt:
        variant = Variant("blend", "chunk_head", setting.get("ratio", 0.1), sink_tokens=sink_tokens)
        close = Closeness(kl, kl, 1 - kl, 4, "teacher_forced")
        return Attempt(variant, question, GreedyAnswer("", False, 10.0), closeness=close)

    alone = [attempt(0, 0, 0.2), attempt(0, 1, 0.4), attempt(0, 1, 0.6, ratio=0.2), attempt(0, 2, 0.9)]
    after = [attempt(1, 0, 0.1), attempt(1, 1, 0.2), attempt(1, 1, 0.4, ratio=0.2), attempt(1, 0, 0.0, ratio=1)]
    without, with_one = sink_rows([*alone, *after])
    assert (without["sink_tokens"], with_one["sink_tokens"]) == (0, 1)
    assert (without["num_settings"], without["num_questions"]) == (2, 2)
    assert without["kl_along_answer"]["mean"] == pytest.approx((0.2 + (0.4 + 0.6) / 2) / 2)
    assert with_one["kl_along_answer"]["mean"] == pytest.approx((0.1 + (0.2 + 0.4) / 2) / 2)
    assert with_one["token_agreement"]["mean"] == pytest.approx(0.8)
    assert sink_rows(alone) == []


def test_layers_up_to_a_quarter_of_the_model() -> None:
    assert check_layers(1) == check_layers(3) == [1]
    assert check_layers(6) == [1, 2, 3]
    assert check_layers(30) == [1, 2, 3, 4, 6]
    assert check_layers(32) == [1, 2, 3, 4, 6, 8]
    assert check_layers(80) == check_layers(None) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_rows_are_how_answers_agree_token_by_token() -> None:
    def attempt(number: int, agreement: float, kl: float) -> Attempt:
        close = Closeness(kl, kl, agreement, 4, "teacher_forced")
        return Attempt(FULL, number, GreedyAnswer("", False, 10.0 + number), closeness=close)

    attempts = [attempt(0, 1.0, 0.0), attempt(1, 0.5, 0.2), Attempt(FULL, 2, None, "time-out")]
    (found,) = calibration_rows(attempts)
    assert (found["num_questions"], found["num_failed"]) == (3, 1)
    assert found["token_agreement"]["mean"] == 0.75
    assert found["same_answer"]["mean"] == 0.5
    assert found["kl_along_answer"]["mean"] == pytest.approx(0.1)
    assert found["ttft_ms"]["median"] == 10.5


def test_documents_alone_are_enough_to_ask(documents: Path) -> None:
    question_set = document_questions(documents, 7)
    assert len(question_set.questions) == 7
    assert question_set == document_questions(documents, 7) != document_questions(documents, 7, seed=1)
    (documents / "3.md").unlink()
    (documents / "2.md").unlink()
    (documents / "1.md").unlink()
    with pytest.raises(ValueError, match="1 chunks; blending needs 2"):
        document_questions(documents, 7)


def test_the_finding_says_what_it_rests_on() -> None:
    assert sample_note(30) == "This rests on 30 questions."
    assert sample_note(29).startswith("This rests on 29 questions only: ")
    assert sample_note(1).startswith("This rests on 1 question only: ")


@pytest.mark.slow
def test_those_that_cannot_be_chosen_are_asked_no_further(documents: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "kvarena.json").write_text('{"data": "notes", "separator": " # ", "ratio": 0.5}')
    output = tmp_path / "calibration.json"
    arguments = ["--engine", "hf", "--model", str(model), "--data", str(documents), "--max-tokens", "4"]
    arguments += ["--num-questions", "8", "--policy", "random", "--ratio", "0,0.9,1", "--agreement", "0.95"]
    result = CliRunner().invoke(app, ["calibrate", *arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    asked = {one["ratio"]: one["num_questions"] for one in load_results(output)["rows"]}
    assert asked[0] == 6, "naive reuse fails this random model"
    assert asked[1] == 8
    profile = json.loads((model / "kvarena.json").read_text())
    assert (profile["data"], profile["separator"], profile["policy"]) == ("notes", " # ", "random")
    assert "This rests on 8 questions only" in result.output


@pytest.mark.slow
def test_where_nothing_was_reused_nothing_is_chosen(documents: Path, tmp_path: Path) -> None:
    """All settings agree with full prefill then, for that is what they are."""
    model = save_tiny_model(tmp_path / "model")
    arguments = ["--engine", "hf", "--model", str(model), "--data", str(documents), "--max-tokens", "4"]
    arguments += ["--separator", "", "--output", str(tmp_path / "x.json"), "--num-questions", "2", "--ratio", "0"]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 1
    assert "nothing was reused and nothing compared: the separator ''" in result.stderr
    assert not (model / "kvarena.json").exists()


def test_the_profile_keeps_what_it_is_not_about(tmp_path: Path) -> None:
    path = write_profile(tmp_path, row(1, 1), "<note>")
    assert json.loads(path.read_text()) == {
        "separator": "<note>", "policy": "kv_deviation", "ratio": 0.1, "check_layer": 1
    }  # fmt: skip
    write_profile(tmp_path, row(1, 1, options={"deviation": "values"}), "<note>")
    assert read_model_profile(str(tmp_path))["deviation"] == "values"
    write_profile(tmp_path, {"policy": "random", "ratio": 0.3, "check_layer": None, "sink_tokens": 0}, "#")
    found = {"separator": "<note>", "sink_tokens": 0, "policy": "random", "ratio": 0.3}
    assert read_model_profile(str(tmp_path)) == found
    write_profile(tmp_path, {"policy": "none", "ratio": None, "check_layer": None}, "#")
    assert read_model_profile(str(tmp_path))["sink_tokens"] == 0, "nothing was found about it"


@pytest.mark.slow
def test_the_command_on_a_tiny_model(documents: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    output = tmp_path / "calibration.json"
    arguments = ["calibrate", "--engine", "hf", "--model", str(model), "--data", str(documents), "--max-tokens", "4"]
    arguments += ["--num-questions", "4", "--output", str(output), "--separator", " # "]
    result = CliRunner().invoke(app, [*arguments, "--ratio", "0,0.5,1", "--agreement", "1"])
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output
    assert "This rests on 4 questions only: with fewer than 30, others" in result.output
    profile = json.loads((model / "kvarena.json").read_text())
    saved = load_results(output)
    assert saved["settings"]["chosen"]["policy"] == profile["policy"]
    rows = {Variant.of_row(one): one["token_agreement"]["mean"] for one in saved["rows"]}
    assert len(rows) == 2 * 3 * (3 * 2 + 3), "sinks, ratios, policies with layers to choose and without"
    assert all(agreement == 1 for variant, agreement in rows.items() if variant.ratio == 1)
    assert saved["settings"]["chosen"]["sink_tokens"] == profile["sink_tokens"]
    assert [one["sink_tokens"] for one in saved["settings"]["sinks"]] == [0, 1]
    assert "Sink of 0: " in result.output
    assert not any(one["num_unscored"] for one in saved["rows"]), "every chunk got its scores first"
    assert {one["policy"] for one in saved["rows"]} >= {"stored_deviation"}

    (model / "kvarena.json").unlink()
    result = CliRunner().invoke(app, [*arguments, "--policy", "random", "--ratio", "0.05", "--agreement", "1"])
    assert result.exit_code == 1
    assert "This rests on 4 questions only" in result.output
    assert "No setting reaches 100 % agreement" in result.output
    assert not (model / "kvarena.json").exists()


@pytest.mark.slow
def test_answers_that_had_to_do_without_scores_are_counted(documents: Path, tmp_path: Path) -> None:
    """Two chunks have no third one to stand between."""
    (documents / "3.md").unlink()
    (documents / "2.md").unlink()
    output = tmp_path / "calibration.json"
    arguments = ["--engine", "hf", "--model", str(save_tiny_model(tmp_path / "model")), "--data", str(documents)]
    arguments += ["--max-tokens", "4", "--num-questions", "2", "--separator", " # ", "--policy", "stored_deviation"]
    result = CliRunner().invoke(app, ["calibrate", *arguments, "--ratio", "0.5", "--output", str(output)])
    assert {one["num_unscored"] for one in load_results(output)["rows"]} == {2}
    assert "4 of 4 answers had a chunk without scores" in result.output


def test_a_server_has_one_sink(documents: Path) -> None:
    arguments = ["--contender", "x=http://127.0.0.1:9", "--data", str(documents), "--sink-tokens", "0"]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 1
    assert "other ones go with --engine hf" in result.stderr
    assert "with sink_tokens 1. A server has the one it was started with (SINK_TOKENS)" in one_sink_note([1])
    assert not one_sink_note([0, 1])
    assert not one_sink_note([])


def test_a_server_that_does_not_blend(documents: Path) -> None:
    with serving(ScriptedEngine()) as server:
        arguments = ["--contender", f"other={server.url}", "--data", str(documents)]
        result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 1
    assert "other doesn't blend" in result.stderr
