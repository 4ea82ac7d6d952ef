"""What `kvarena soak` says before it asks anybody."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarena.cli import app
from kvarena.home import StackError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--faults", "flood"), "--faults is 'flood'; it is none, all, or some of kill-server"),
        (("--target", "here"), "--target is 'here'; it is NAME=URL"),
        (("--target", "blend=127.0.0.1:1"), "answers are compared with those of plain"),
        (("--target", "plain=127.0.0.1:1"), "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["soak", "--output", str(tmp_path / "soak.json"), *arguments])
    assert result.exit_code == 1
    assert said in result.stderr.replace("\n", " ")


def test_without_a_stack_and_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, ["soak", "--output", str(tmp_path / "soak.json")])
    assert isinstance(result.exception, StackError)
    assert "nothing is running" in str(result.exception)
