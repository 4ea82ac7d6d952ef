"""`kvarena eval` against the running stack, and the same questions through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarena.bench.results import load_results
from kvarena.cli import app
from support.running_stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]
LEAST_AGREEMENT = 0.99


@pytest.fixture(scope="module")
def result(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("eval") / "stack.json"
    contenders = ("--contender", "plain", "--contender", "blend")
    run = stack.command("eval", *contenders, "--ratio", "0,1", "--output", str(output), timeout_s=800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert output.with_suffix(".png").is_file()
    return load_results(output)


def rows(result: dict[str, Any], kind: str) -> dict[tuple[str, float | None], Any]:
    return {
        (row["contender"], row["ratio"]): row for row in result["rows"] if (row["kind"], row["subset"]) == (kind, "all")
    }


def test_everything_is_answered_and_ratio_one_answers_as_full_prefill(result: dict[str, Any]) -> None:
    found = rows(result, "all")
    assert set(found) == {("plain", None), ("blend", 0), ("blend", 1)}
    assert all(row["num_failed"] == row["num_cut"] == 0 for row in found.values())
    assert found["blend", 1]["agreement"]["mean"] == 1
    assert found["blend", 1]["recomputed_ratio"] == 1
    assert found["blend", 1]["first_token_kl"]["mean"] < 1e-3
    assert found["blend", 1]["kl_along_answer"]["mean"] < 1e-3
    assert found["blend", 1]["kl_method"] == "common_prefix_top20"
    assert found["blend", 0]["recomputed_ratio"] == 0
    assert found["blend", 0]["reused_ratio"] > 0.8


def test_questions_tell_full_prefill_from_naive_reuse(result: dict[str, Any]) -> None:
    found = rows(result, "across")
    assert found["plain", None]["exact_match"]["mean"] > 0.8
    assert found["blend", 0]["exact_match"]["high"] < found["plain", None]["exact_match"]["low"]


def test_transformers_answers_as_vllm_does(result: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "hf.json"
    run = CliRunner().invoke(app, ["eval", "--engine", "hf", "--contender", "plain", "--output", str(output)])
    assert run.exit_code == 0, run.output
    here = {answer["question"]: answer["text"] for answer in load_results(output)["answers"]}
    there = {a["question"]: a["text"] for a in result["answers"] if a["contender"] == "plain"}
    assert here.keys() == there.keys()
    same = sum(here[question].strip() == there[question].strip() for question in here)
    assert same >= LEAST_AGREEMENT * len(here)
