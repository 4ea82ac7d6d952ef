"""The whole of `kvarena bench device`, on this machine's CPU and at a toy size."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from kvarena.bench import device as device_bench
from kvarena.bench import shapes
from kvarena.bench.command import app
from kvarena.bench.device import DeviceWorkload
from kvarena.engines.hf.model import HFModel, load_module
from kvarena.home import project_root
from kvarena.model import SHIPPED_MODELS, TOWN
from kvarena.policies.params import POLICIES, BlendParams

TOY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def toy_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "toy", TOY)


def measured(output: Path, *options: str) -> Any:
    arguments = ["device", "--shapes", "toy", "--context-tokens", "300", "--chunk-tokens", "100", "--num-repeats", "2"]
    return CliRunner().invoke(app, [*arguments, "--device", "cpu", "--output", str(output), *options])


def test_all_policies_beside_full_prefill(tmp_path: Path) -> None:
    output = tmp_path / "device.json"
    done = measured(output)
    assert done.exit_code == 0, done.output
    assert "logits at ratio 1 are off by" in done.stdout
    found = json.loads(output.read_text())
    assert (found["settings"]["benchmark"], found["settings"]["device_name"]) == ("device", "CPU")
    checks, rows = found["rows"][:2], found["rows"][2:]
    assert {check["family"] for check in checks} == {"llama", "qwen3"}
    assert all(check["num_recomputed_tokens"] > 900 for check in checks)
    full, _flash, *blends = rows
    choosing = [name for name in POLICIES if BlendParams(name).goes_by_ratio]
    assert {row["policy"] for row in blends} == {"none", *choosing}
    for row in blends:
        assert row["failure"] is None
        assert row["num_reused_tokens"] + row["num_recomputed_tokens"] > 300
        assert (row["num_recomputed_tokens"] > 0) == (row["policy"] != "none")
        assert 0 < row["floor_ms"] < full["floor_ms"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "double8"), "it takes one of PyTorch's, such as bfloat16"),
        (("--context-tokens", "50"), "contexts of a chunk or more"),
        (("--shapes", "9b"), "no shape '9b'"),
        (("--policy", "best"), ", ".join(POLICIES)),
    ],
)
def test_bad_options_say_so(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = measured(tmp_path / "device.json", *options)
    assert done.exit_code == 1
    assert said in done.output.replace("\n", " ")


def test_the_last_model_is_gone_before_the_next_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them may not have room on a device."""
    models: list[weakref.ref[Any]] = []
    load = HFModel.load

    def noted(*args: Any, **options: Any) -> Any:
        assert not any(model() for model in models)
        model = load(*args, **options)
        models.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(HFModel, "load", noted)
    workload = DeviceWorkload(("toy",), (300,), (), chunk_tokens=100, num_repeats=1, dtype="float32", device="cpu")
    assert list(device_bench.run(workload, tmp_path, project_root() / SHIPPED_MODELS[TOWN], lambda: None))
    assert len(models) == 3


def test_random_weights_are_made_on_the_device(tmp_path: Path) -> None:
    LlamaConfig(**TOY, vocab_size=32).save_pretrained(tmp_path)
    places: list[torch.device] = []

    class Network:
        @staticmethod
        def _from_config(*_: object, **__: object) -> torch.nn.Module:
            places.append(torch.empty(1).device)
            return torch.nn.Linear(1, 1)

    load_module(str(tmp_path), device="meta", random=True, kind=Network)
    assert places == [torch.device("meta")]
