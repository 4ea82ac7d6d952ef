"""A short form of `kvarena soak` over the running stack: LMCache dies, hangs and is emptied under what vLLM answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.running_stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


def test_answers_stay_right_and_nothing_is_left(stack: Stack, tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    options = ("--minutes", "0.75", "--streams", "8", "--prompts", "14", "--faults", "freeze,kill,clear")
    done = stack.command("soak", *options, "--output", str(output), timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert {row["contender"] for row in found["rows"]} == {"blend", "plain"}
    assert all(row["num_equal"] > 0 for row in found["rows"])
    assert found["faults"]
    assert all(check["is_ok"] for check in found["checks"])
