"""The commands that measure servers run where only the extra `bench` is installed, as beside the page in its image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bare_environment import absent_modules, run_without
from support.question_folder import write_question_folder
from support.small_openai_server import OFFER, REPORT, SmallServer
from support.tiny_models import tiny_tokenizer

COMMAND = "from kvarena.cli import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def absent() -> list[str]:
    found = absent_modules("bench")
    assert {"torch", "torchmetrics", "transformers", "vllm", "lmcache", "fastapi", "streamlit"} <= set(found)
    return found


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    report = REPORT | {"store_hits": 2, "store_misses": 0, "blend_ms": 1.0}
    servers = {"plain": SmallServer(pieces=["Ann"]), "blend": SmallServer(pieces=["Ann"], offer=OFFER, report=report)}
    yield [f"{name}={server.url}" for name, server in servers.items()]
    for server in servers.values():
        server.stop()


@pytest.mark.timeout(200)
def test_eval_over_http(absent: list[str], addresses: list[str], tmp_path: Path) -> None:
    questions = write_question_folder(tmp_path / "data", [{"question": "Who?", "answers": ["Ann", "Bo"]}])
    asked = [word for address in addresses for word in ("--contender", address)]
    output = tmp_path / "x.json"
    run = run_without(absent, COMMAND, "eval", "--questions", str(questions), *asked, "--output", str(output))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {row["contender"] for row in rows} == {"plain", "blend"}
    assert all(row["exact_match"]["mean"] == row["correct"]["mean"] == 1 for row in rows)


@pytest.mark.timeout(200)
def test_ttft_over_http(absent: list[str], addresses: list[str], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    asked = [word for address in addresses for word in ("--target", address)]
    asked += ["--context-tokens", "64", "--state", "warm", "--repeats", "3", "--chunk-tokens", "32"]
    output = tmp_path / "x.json"
    place = ["--tokenizer", str(tmp_path / "model"), "--output", str(output)]
    run = run_without(absent, COMMAND, "bench", "ttft", *asked, *place)
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(row["num_requests"] == 3 and not row["num_failed"] for row in json.loads(output.read_text())["rows"])


def test_doctor(absent: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what can't run and why, before anything is installed for it, and doesn't take seconds to import."""
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path))
    run = run_without(absent, COMMAND, "doctor", "--json")
    assert run.returncode == 1, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert not found["ready"]
    assert all("not installed: " in contender["problem"] for contender in found["contenders"])
