"""`kvarena ai100 chat` and `python -m ai100.server` on the town model, as a user starts them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from kvarena.cli import app
from support.lmcache_server import free_port

SMALL = ["--model", "town", "--ctx-len", "2048", "--full-batch-size", "1", "--kv-cache-batch-size", "2"]
SMALL += ["--gen-len", "20", "--prefill-seq-len", "256", "--notes-tokens", "600"]
QUESTIONS = ["What colour is the door of Thea?", "And what does she collect?"]
LINE = re.compile(r"\[(NEW|INCR|RESET|FULL)\] Slot (\d) \| Turn (\d) \| Prefilled (\d+) tokens \| First token")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small town's options, for what isn't about the notes that ship."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "sys_prompt.txt").write_text("You answer questions about the town. Use only the notes below.")
    (folder / "01.txt").write_text("The door of Thea is grey. Thea collects shells. Igor keeps bees.")
    return ["--data", str(folder)]


def run(*arguments: str, typed: str = "") -> str:
    result = CliRunner().invoke(app, ["ai100", "chat", "--runtime", "host", *SMALL, *arguments], input=typed)
    assert result.exit_code == 0, result.output
    return result.output


def lines_of(output: str) -> list[tuple[str, ...]]:
    return [found.groups() for found in LINE.finditer(output)]


def test_batch_on_the_town_model() -> None:
    output = run("--batch", *QUESTIONS, "--verbose")
    (first, second) = lines_of(output)
    assert "grey" in output
    assert "shells" in output
    assert first[:3] == ("NEW", "0", "1")
    assert second[:3] == ("INCR", "0", "2")
    assert int(second[3]) < 30 < 400 < int(first[3]) < 700, "its own notes are prefilled, and once"
    assert "topic 'townspeople'" in output
    assert "[Townspeople]" not in output


def test_interactive_with_stats_and_help(notes: list[str]) -> None:
    output = run(*notes, typed=f"{QUESTIONS[0]}\n\n?\nstats\n{QUESTIONS[1]}\nQ\n")
    assert [line[0] for line in lines_of(output)] == ["NEW", "INCR"]
    assert output.count("[Townspeople] ") == 2, "before each answer"
    assert "quit, exit, q" in output
    assert "Turns: 1 (1 NEW)" in output
    assert "townspeople" in output


def test_end_of_input_ends_the_chat(notes: list[str]) -> None:
    assert lines_of(run(*notes, typed="")) == []


def test_compare_shows_both_and_the_same_answers(notes: list[str]) -> None:
    output = run(*notes, "--compare", "--batch", *QUESTIONS)
    assert output.count("the same answer") == 2
    assert "prefilled tokens" in output
    assert "saved" in output


def test_json_without_the_cache(notes: list[str]) -> None:
    arguments = ["ai100", "chat", *SMALL, *notes, "--no-cache", "--json", "--batch", *QUESTIONS]
    ((first, second),) = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (first["status"], second["status"]) == ("FULL_PREFILL", "FULL_PREFILL")
    assert (first["answer"].strip(), second["answer"].strip()) == ("grey", "shells")
    assert second["num_prefilled_tokens"] == second["num_prompt_tokens"] > first["num_prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hello"], "--batch"),
        (["--batch"], "--batch"),
        (["--json"], "--batch"),
        (["--compare", "--no-cache"], "--compare"),
        (["--runtime", "qaic"], "qaic"),
        (["--topics-file", "/nothing.yaml"], "/nothing.yaml"),
        (["--full-batch-size", "9"], "full_batch_size 9"),
        (["--model", "/nothing"], "/nothing"),
        (["--data", "/nothing"], "/nothing"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(arguments: Sequence[str], says: str) -> None:
    result = CliRunner().invoke(app, ["ai100", "chat", *arguments])
    assert result.exit_code == 1
    assert says in result.output.replace("\n", "")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--runtime", "tpu", "'auto', 'qaic', 'host' or 'onnx'"),
        ("--topics", "magic", "'keyword' or 'embedding'"),
        ("--threshold", "7", "less than or equal to 1"),
        ("--max-context", "0", "greater than or equal to 1"),
        ("--notes-tokens", "-1", "greater than or equal to 0"),
        ("-f", "many", "a valid integer"),
    ],
)
def test_settings_have_the_bounds_of_the_spec(option: str, value: str, says: str) -> None:
    result = CliRunner().invoke(app, ["ai100", "chat", option, value])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_what_cannot_be_answered_fails_and_the_rest_is_asked(notes: list[str]) -> None:
    result = CliRunner().invoke(app, ["ai100", "chat", *SMALL, *notes, "--batch", "word " * 3000, QUESTIONS[0]])
    assert result.exit_code == 1
    assert "2048" in result.output
    assert "grey" in result.output


@pytest.mark.slow
def test_the_server_as_a_process(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ai100.server", "--port", str(port), "--served-model-name", "town"]
    command += ["--model", "town", "--runtime", "host", "--topics", "embedding"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
                for _ in range(240):
                    try:
                        client.get("/health").raise_for_status()
                        break
                    except httpx.TransportError:
                        time.sleep(0.5)
                body = {"messages": [{"role": "user", "content": "Who is Igor?"}], "max_tokens": 4, "session_id": "me"}
                answers = [client.post("/v1/chat/completions", json=body).json() for _ in range(2)]
                assert client.get("/kvarena").json()["topics"] == "EmbeddingTopics"
            assert answers[1]["kv_transfer_params"]["kvarena"]["status"] == "INCREMENTAL_PREFILL"
        finally:
            process.terminate()
            assert process.wait(60) == -signal.SIGTERM, "as uvicorn ends, when all is closed"
