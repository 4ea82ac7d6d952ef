"""The AI 100 benchmark on a tiny model: the rows, the file, the plot, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ai100.runtimes.runtime import StaticShapes
from ai100.topics import KeywordTopics, load_topics
from kvarena.bench import ai100 as ai100_bench
from kvarena.bench.ai100 import AI100Workload
from kvarena.bench.command import app
from kvarena.bench.measure import TimedTokens
from kvarena.bench.plotting import save_picture
from kvarena.bench.results import save_results
from support.ai100_engine import AI100, make_ai100
from support.tiny_models import save_tiny_model

WORKLOAD = AI100Workload(
    history_tokens=120,
    num_turns=3,
    num_repeats=2,
    num_conversations=2,
    max_new_tokens=3,
    throughput_tokens=6,
    num_rounds=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def ai100(folder: Path) -> Iterator[AI100]:
    shapes = StaticShapes(64, 1024, 2, 3)
    made = make_ai100(folder, shapes, KeywordTopics(load_topics()))
    yield made
    made.engine.close()


def test_rows_are_what_was_run(ai100: AI100) -> None:
    steps: list[None] = []
    rows = ai100_bench.run(ai100.engine, WORKLOAD, lambda: steps.append(None))
    assert len(steps) == WORKLOAD.num_steps
    turns, modes = rows[:3], rows[3:]
    assert [row["turn"] for row in turns] == [1, 2, 3]
    assert turns[0]["slots_prefilled_tokens"] == turns[0]["no_cache_prefilled_tokens"] > 120
    for row in turns[1:]:
        assert row["slots_prefilled_tokens"] < 120 < row["no_cache_prefilled_tokens"]
        assert row["slots_ttft_ms"]["median"] > 0
    assert [row["mode"] for row in modes] == ["at once", "one after the other"]
    assert modes[1]["times"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert max(len(batch) for batch in ai100.runtime.decodes) == 2, "they did decode together"


def test_another_answer_without_the_cache_is_an_error(ai100: AI100, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ai100_bench.BenchConversation.ask

    def wrong(talk: ai100_bench.BenchConversation, question: str, max_tokens: int) -> TimedTokens:
        return ask(talk, question if talk.use_cache else question + " tea", max_tokens)

    monkeypatch.setattr(ai100_bench.BenchConversation, "ask", wrong)
    with pytest.raises(ValueError, match="turn 1"):
        ai100_bench.run(ai100.engine, WORKLOAD)


def test_the_command_writes_file_plot_and_tables(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "ai100.json"
    sizes = ["--history-tokens", "60", "--num-turns", "2", "--num-repeats", "1", "--num-rounds", "1"]
    tokens = ["--num-conversations", "2", "--max-new-tokens", "2", "--throughput-tokens", "4"]
    arguments = ["ai100", "--model", str(folder), "--runtime", "host", *sizes, *tokens, "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Speedup of follow-ups" in result.output
    assert "2 one after the other" in result.output
    saved = json.loads(output.read_text())
    assert (saved["settings"]["benchmark"], saved["settings"]["runtime"]) == ("ai100", "host")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--shape", "7b"], "180m"), (["--shape", "180m", "--model", "x"], "exclude"), (["--runtime", "tpu"], "host")],
)
def test_bad_command_lines(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ai100", *arguments, "--output", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    assert says in result.output


def test_bad_workloads_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_turns must be at least 2, not 1"):
        AI100Workload(num_turns=1)
    with pytest.raises(ValueError, match="num_rounds"):
        AI100Workload(num_rounds=0)
    save_results(tmp_path / "r.json", {"benchmark": "prefix"}, [{"a": 1}])
    with pytest.raises(ValueError, match="no ai100 benchmark"):
        save_picture(tmp_path / "r.json", tmp_path / "x.png", "ai100")
