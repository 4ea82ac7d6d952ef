"""How the servers share GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.home import Home, StackError
from kvarena.stack import machine
from support.command_lines import parsed
from support.planned_services import make, with_gpus


def test_one_gpu_is_shared(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "0")
    made, services = make(home, tmp_path, profile="auto")
    assert made.profile == "gpu"
    assert made.model.name == "mistralai/Mistral-7B-Instruct-v0.2"
    for name in ("blend", "plain"):
        assert services[name].environment["CUDA_VISIBLE_DEVICES"] == "0"
        assert parsed(services[name])["gpu_memory_utilization"] == 0.45
        assert services[name].cpus == ()
    assert services["plain"].depends_on == ("blend",), "vLLM measures free memory while it starts"


def test_two_gpus_are_divided(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "2", "5", "6")
    _, services = make(home, tmp_path, profile="gpu", kv_cache_gb=10)
    assert services["blend"].environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert services["plain"].environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert services["plain"].depends_on == ()
    assert parsed(services["plain"])["kv_cache_memory_bytes"] == 10 << 30
    assert "--gpu-memory-utilization" not in services["plain"].command, "which would bound it too"


def test_auto_takes_the_cpu_when_vllm_is_built_for_it(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, "0")
    monkeypatch.setattr(machine, "installed_vllm", lambda: "cpu")
    assert make(home, tmp_path, profile="auto")[0].profile == "cpu"


def test_a_gpu_profile_needs_a_gpu(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    with pytest.raises(StackError, match="no GPU on this machine"):
        make(home, tmp_path, profile="gpu")
