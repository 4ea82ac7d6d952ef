"""The prefix benchmark on a tiny model, in this process and over HTTP: the rows, the file, the plot, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarena.bench import prefix as prefix_bench
from kvarena.bench.command import app
from kvarena.bench.plotting import save_picture
from kvarena.bench.prefix import LEVELS, SCENARIOS, InProcess, PrefixWorkload, ServerTarget
from kvarena.bench.results import load_results, save_results
from kvarena.bench.shapes import SHAPES, write_shape
from kvarena.contenders.prefix.http import router
from support.prefix_engine import make_prefix
from support.real_server import serving
from support.tiny_models import save_tiny_model

WORKLOAD = PrefixWorkload(context_tokens=(60, 200), num_requests=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_rows_are_what_the_scenarios_say(folder: Path) -> None:
    engine = make_prefix(folder).engine
    steps: list[None] = []
    rows = prefix_bench.run(InProcess(engine), WORKLOAD, lambda: steps.append(None))
    engine.close()
    assert len(steps) == WORKLOAD.num_steps
    assert [(row["level"], row["scenario"]) for row in rows] == [(lv, sc) for lv in LEVELS for sc in SCENARIOS] * 2
    for row in rows:
        assert row["ttft_ms"]["median"] > 0
        assert row["num_requests"] == 2
        reused = row["reused_ratio"]
        if row["level"] != "prefix cache" or row["scenario"] == "cold":
            assert reused == 0
        elif row["scenario"] == "repeat":
            assert reused == 1
        else:
            assert 0.5 < reused < 1
    by_size = [row["context_tokens"] for row in rows if row["level"] == "KV cache" and row["scenario"] == "cold"]
    assert by_size[0] < by_size[1]


def test_over_http_file_plot_and_table(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "prefix.json"
    with serving(make_prefix(folder).engine, routers=[router]) as server:
        arguments = ["prefix", "--url", server.url, "--context-tokens", "60", "--num-requests", "1"]
        result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3", "--output", str(output)])
        assert result.exit_code == 0, result.output
        assert "prefix cache" in result.output
        assert ServerTarget(server.url).count("tea rain") > 0
    saved = json.loads(output.read_text())
    assert saved["settings"]["context_tokens"] == [60]
    assert saved["settings"]["benchmark"] == "prefix"
    assert saved["machine"]["num_cores"] > 0
    assert "torch" in saved["versions"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--url", "http://127.0.0.1:9"], "no OpenAI server answers"),
        (["--url", "http://127.0.0.1:9", "--model", "x"], "--url"),
        (["--shape", "7b"], "180m"),
        (["--levels", "magic"], "prefix cache"),
        (["--context-tokens", "many"], "many"),
    ],
)
def test_bad_command_lines(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prefix", *arguments, "--output", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    assert says in result.output
    assert not list(tmp_path.iterdir())


def test_results_are_read_back_and_other_files_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save_results(path, {"a": 1}, [{"b": 2}])
    assert load_results(path)["rows"] == [{"b": 2}]
    with pytest.raises(ValueError, match="no prefix benchmark"):
        save_picture(path, tmp_path / "x.png", "prefix")
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"r\.json"):
        load_results(path)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_size(name: str, tmp_path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write_shape(name, tmp_path, folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {"180m": 180e6, "500m": 500e6, "1b": 1e9, "8b": 8e9}[name]
    assert model.num_parameters() == pytest.approx(wanted, rel=0.12)
