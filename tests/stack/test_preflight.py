"""What stops `up` before anything is started, and with which message."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from kvarena.contenders.servers import GIB
from kvarena.home import Home, StackError
from kvarena.model import Model, find_model
from kvarena.stack import machine, preflight
from kvarena.stack.lmcache_l2 import l2_adapter
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import MemoryNeed
from kvarena.stack.service import Service
from kvarena.stack.settings import SPECS, load_settings


@pytest.fixture
def plan(home: Home, tmp_path: Path) -> Plan:
    return make_plan(load_settings(tmp_path / ".env", profile="cpu", kv_cache_gb=3), home)


def test_a_taken_port_names_its_holder(small_service: Callable[..., Service]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        message = rf"port {port} for blend is taken by .+ \(process {os.getpid()}\); .*--port-base"
        with pytest.raises(StackError, match=message):
            preflight.check_ports([small_service("blend", port=port)])
    preflight.check_ports([small_service("blend", port=port)])


def test_a_port_taken_on_every_interface() -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        assert not preflight.is_free(holder.getsockname()[1])


def test_memory_is_weights_caches_and_processes(plan: Plan) -> None:
    plan = dataclasses.replace(plan, dtype=None)
    need = preflight.estimate_memory(plan)
    weights = (Path(plan.model.name) / "model.safetensors").stat().st_size
    assert preflight.estimate_memory(dataclasses.replace(plan, dtype="float32")).weight_bytes == 4 * weights
    assert need.weight_bytes == 2 * weights
    assert need.kv_cache_bytes == 2 * 3 * GIB
    assert need.store_bytes == plan.lmcache_gb * GIB
    in_memory = dataclasses.replace(plan, blend=dataclasses.replace(plan.blend, store="memory", store_bytes=5))
    assert preflight.estimate_memory(in_memory).store_bytes == 5
    in_process = dataclasses.replace(plan, blend_engine="lmcache")
    assert preflight.estimate_memory(in_process).store_bytes == plan.lmcache_gb * GIB
    both = dataclasses.replace(in_memory, contenders=("blend", "lmcache"))
    assert preflight.estimate_memory(both).store_bytes == plan.lmcache_gb * GIB + 5
    alone = preflight.estimate_memory(dataclasses.replace(plan, contenders=("plain",), page=False))
    assert (alone.weight_bytes, alone.store_bytes) == (weights, 0)
    lmcache = preflight.estimate_memory(dataclasses.replace(plan, contenders=("lmcache",), page=False))
    assert (lmcache.kv_cache_bytes, lmcache.store_bytes) == (3 * GIB, plan.lmcache_gb * GIB)
    with_prefix = preflight.estimate_memory(dataclasses.replace(plan, contenders=("plain", "prefix"), page=False))
    assert (with_prefix.kv_cache_bytes, with_prefix.prefix_bytes) == (
        3 * GIB,
        plan.of_contenders["prefix"].cache_gb * GIB,
    )
    on_gpu = preflight.estimate_memory(dataclasses.replace(plan, profile="gpu"))
    assert (on_gpu.weight_bytes, on_gpu.kv_cache_bytes) == (0, 0)


def test_simllm_needs_a_llama(tmp_path: Path, home: Home) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for config, refused in (
        ('{"model_type": "llama"}', False),
        ('{"model_type": "qwen2"}', True),
        ("{}", False),  # the server says what is wrong with it
    ):
        (folder / "config.json").write_text(config)
        architecture = find_model(str(folder), "cpu").architecture(None)
        with pytest.raises(StackError, match=r"llama; .*model is of type qwen2") if refused else nullcontext():
            preflight.check_model_type(SPECS["simllm"], str(folder), architecture)
        preflight.check_model_type(SPECS["prefix"], str(folder), architecture)
    assert Model("org/nowhere", "nowhere", is_local=False).architecture(tmp_path) == ""


def test_too_little_memory_gives_the_numbers() -> None:
    need = MemoryNeed(
        weight_bytes=2 * GIB, kv_cache_bytes=3 * GIB, prefix_bytes=GIB, store_bytes=GIB, process_bytes=GIB
    )
    preflight.check_memory(need, 8 * GIB)
    message = r"may need 8.0 GiB \(model weights 2.0 GiB, KV caches 4.0 GiB, .*and 7.5 GiB is available; .*KV_CACHE_GB"
    with pytest.raises(StackError, match=message):
        preflight.check_memory(need, 15 * GIB // 2)


def test_too_little_shared_memory(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="LMCACHE_GB lower"):
        preflight.check_shared_memory(1e6, tmp_path)


def test_a_second_tier_in_a_folder_is_made_and_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    preflight.check_lmcache_l2(l2_adapter(str(folder), 1.0, tmp_path))
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place, reason in (("file", "File exists"), ("file/below", "Not a directory"), ("/proc/l2", "No such file")):
        message = f"LMCACHE_L2 is the folder .*{place}, which can't be made or written: {reason}.*name another"
        with pytest.raises(StackError, match=message):
            preflight.check_lmcache_l2(l2_adapter(place, 1.0, tmp_path))
    preflight.check_lmcache_l2(l2_adapter("redis://nowhere", 1.0, tmp_path))
    preflight.check_lmcache_l2(None)


def test_missing_packages(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(StackError, match=r"not installed: vllm, lmcache, streamlit; .*\[cpu,ui\]"):
        preflight.check_packages(plan)


@pytest.mark.parametrize(("runtime", "package"), [(None, "yaml"), ("host", "yaml"), ("onnx", "onnxruntime")])
def test_missing_packages_of_ai100(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, runtime: str | None, package: str
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    chosen = {"ai100": dataclasses.replace(plan.of_contenders["ai100"], runtime=runtime)}
    with pytest.raises(StackError, match=rf"not installed: transformers, {package}; .*\[ai100,cpu\]"):
        preflight.check_packages(dataclasses.replace(plan, contenders=("ai100",), page=False, of_contenders=chosen))


def test_vllm_for_the_other_profile(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_vllm", lambda: "gpu")
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    with pytest.raises(StackError, match=r"not for cpu; run \./run-server\.sh up --profile cpu"):
        preflight.check_packages(plan)


def test_white_space_in_the_path() -> None:
    preflight.check_install_path("/home/me/kvarena/.venv")
    with pytest.raises(StackError, match="white space"):
        preflight.check_install_path("/home/me/my projects/.venv")


def test_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"no data folder at .*nowhere.*--data"):
        preflight.check_data_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["notes/one.txt", "sys_prompt.txt"])
def test_a_data_file_that_is_not_utf_8_stops_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("Über den Fluss", encoding="latin-1")
    preflight.check_data_folder(tmp_path)
