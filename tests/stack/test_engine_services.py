"""The PyTorch engines and ai100 among the services: what the plan tells them, and that they understand it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ai100.settings import EngineSettings
from kvarena.contenders.ai100 import AI100Settings
from kvarena.contenders.spec import ContenderSpec
from kvarena.home import Home, project_root
from kvarena.model import DEFAULT_CARD_MODEL, DEFAULT_GPU_MODEL
from kvarena.stack import machine
from kvarena.stack.preflight import estimate_memory
from support.command_lines import ENGINES, command_of, extra_config, make, parsed, with_gpus

AI100_CHOICES: dict[str, object] = {
    "runtime": "onnx",
    "full_batch_size": 3,
    "kv_cache_batch_size": 5,
    "prefill_seq_len": 16,
    "gen_len": 9,
    "max_context": 99,
    "topics": "embedding",
    "topics_file": project_root() / "ai100" / "topics.yaml",
    "threshold": 0.5,
}


def default_of(name: str, option: str) -> object:
    """What the server takes when it isn't told."""
    (spec,) = (spec for spec in ENGINES if spec.name == name)
    return next(own.default for own in command_of(spec).params if own.name == option)


@pytest.mark.usefixtures("two_cores")
def test_prefix_is_a_pytorch_server_on_its_own_port(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, contenders="prefix,plain", max_model_len=512, prefix_cache_gb=0.5)
    assert list(services) == ["plain", "prefix", "page"]
    prefix = services["prefix"]
    assert (prefix.port, prefix.cpus, prefix.environment["OMP_NUM_THREADS"]) == (8002, (1,), "1")
    options = parsed(prefix)
    assert (options["cache_gb"], options["max_model_len"]) == (0.5, 512)
    assert [options["served_model_name"]] == parsed(services["plain"])["served_model_name"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in prefix.environment
    shown = json.loads(services["page"].environment["KVARENA_CONTENDERS"])
    assert [contender["name"] for contender in shown] == ["plain", "prefix"]


@pytest.mark.usefixtures("two_cores")
def test_simllm_is_a_pytorch_server_that_blends_as_blend_does(home: Home, tmp_path: Path) -> None:
    chosen = {"simllm_mode": "top_layer", "simllm_similarity_threshold": 0.9, "simllm_max_cache_size": 7}
    _, services = make(home, tmp_path, contenders="simllm,blend", blend_ratio=0.5, load_format="dummy", **chosen)
    assert list(services) == ["lmcache-server", "blend", "simllm", "page"]
    simllm = services["simllm"]
    assert (simllm.port, simllm.cpus, simllm.environment["OMP_NUM_THREADS"]) == (8003, (1,), "1")
    options = parsed(simllm)
    assert (options["mode"], options["similarity_threshold"], options["max_cache_size"]) == ("top_layer", 0.9, 7)
    assert options["load_format"] == "dummy"
    assert [options["served_model_name"]] == parsed(services["blend"])["served_model_name"]
    blend = extra_config(services["blend"])
    said = (options["policy"], options["ratio"], options["check_layer"])
    assert said == (blend["policy"], blend["ratio"], blend["check_layer"]) == ("kv_deviation", 0.5, 2)
    assert options["num_hyperplanes"] == default_of("simllm", "num_hyperplanes")


@pytest.mark.usefixtures("two_cores")
def test_what_runs_on_a_card_leaves_cores_and_memory_to_the_others(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"contenders": "ai100,plain", "model": "town"}
    plan, services = make(home, tmp_path, ai100_runtime="qaic", **chosen)
    assert services["plain"].cpus == (0, 1)
    assert services["ai100"].cpus == ()
    assert "OMP_NUM_THREADS" not in services["ai100"].environment
    on_the_host, _ = make(home, tmp_path, ai100_runtime="host", **chosen)
    assert estimate_memory(on_the_host).weight_bytes == 2 * estimate_memory(plan).weight_bytes
    with_gpus(monkeypatch, "0")
    _, services = make(home, tmp_path, profile="gpu", ai100_runtime="qaic", **chosen)
    assert parsed(services["plain"])["gpu_memory_utilization"] == 0.9
    assert services["ai100"].depends_on == ()


def test_a_card_has_its_own_default_model(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked for, and where there is one and QEfficient, which drives it."""
    assert make(home, tmp_path, contenders="ai100", ai100_runtime="qaic")[0].model.name == DEFAULT_CARD_MODEL
    assert EngineSettings(AI100Settings("qaic")).found.name == DEFAULT_CARD_MODEL
    monkeypatch.setattr(machine, "cards", lambda: [Path("/dev/accel/accel0")])
    assert make(home, tmp_path, contenders="ai100")[0].model.served_name == "town", "QEfficient isn't there"
    monkeypatch.setattr("kvarena.stack.plan.find_spec", lambda name: object())
    found, services = make(home, tmp_path, contenders="ai100")
    assert found.model.name == DEFAULT_CARD_MODEL
    assert parsed(services["ai100"])["runtime"] == "qaic"
    assert make(home, tmp_path, contenders="ai100", model="town")[0].model.served_name == "town"
    assert make(home, tmp_path, contenders="ai100", ai100_runtime="host")[0].model.served_name == "town"
    with_gpus(monkeypatch, "0")
    beside = make(home, tmp_path, profile="gpu", contenders="blend,ai100")[0]
    assert beside.model.name == DEFAULT_GPU_MODEL, "one model for all"


@pytest.mark.usefixtures("two_cores")
def test_ai100_serves_the_stacks_model_in_slots_as_long_as_its_context(home: Home, tmp_path: Path) -> None:
    chosen = {"ai100_runtime": "host", "ai100_kv_cache_batch_size": 3, "ai100_topics_file": "topics.yaml"}
    _, services = make(home, tmp_path, contenders="ai100,plain", max_model_len=512, load_format="dummy", **chosen)
    assert list(services) == ["plain", "ai100", "page"]
    ai100 = services["ai100"]
    assert (ai100.port, ai100.cpus, ai100.environment["OMP_NUM_THREADS"]) == (8004, (1,), "1")
    options = parsed(ai100)
    assert (options["runtime"], options["kv_cache_batch_size"], options["ctx_len"]) == ("host", 3, 512)
    assert options["topics_file"] == project_root() / "topics.yaml"
    assert options["data"] == Path(services["page"].environment["KVARENA_DATA_DIR"])
    assert options["load_format"] == "dummy"
    assert [options["served_model_name"]] == parsed(services["plain"])["served_model_name"]
    assert options["full_batch_size"] == default_of("ai100", "full_batch_size")
    _, services = make(home, tmp_path, contenders="ai100", max_model_len=512, ai100_ctx_len=256)
    assert parsed(services["ai100"])["ctx_len"] == 256, "its own key wins"
    _, services = make(home, tmp_path, contenders="ai100")
    assert parsed(services["ai100"])["ctx_len"] == default_of("ai100", "ctx_len")


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("prefix", None), ("simllm", 0.5), ("simllm", "auto"), ("ai100", None)],
)
def test_engines_take_what_the_stack_gives_them(home: Home, tmp_path: Path, name: str, threshold: object) -> None:
    """Every option of the command line is one that the server knows, with a value that it accepts."""
    chosen = {"simllm_mode": "aligned", "simllm_similarity_threshold": threshold, "simllm_max_cache_size": 3}
    chosen |= {f"ai100_{key}": value for key, value in AI100_CHOICES.items()}
    _, services = make(home, tmp_path, contenders=name, max_model_len=512, simllm_num_hyperplanes=8, **chosen)
    options = parsed(services[name])
    assert options["port"] == services[name].port
    assert options["ctx_len" if name == "ai100" else "max_model_len"] == 512
    if name == "ai100":
        assert {key: options[key] for key in AI100_CHOICES} == AI100_CHOICES
    if name == "simllm":
        assert {f"simllm_{key}": options[key] for key in ("mode", "similarity_threshold")} == {
            key: chosen[key] for key in ("simllm_mode", "simllm_similarity_threshold")
        }


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_every_engine_takes_all_of_its_settings(home: Home, tmp_path: Path, spec: ContenderSpec) -> None:
    """And the longest context, also where its spec gives no options of its own."""
    chosen = {own.key: own.shown for own in spec.own_settings()}
    _, services = make(home, tmp_path, contenders=spec.name, max_model_len=512, **chosen)
    options = parsed(services[spec.name])
    assert options.get("max_model_len", 512) == 512
    for own in spec.own_settings():
        expected = project_root() / str(own.shown) if own.annotation == Path | None else own.shown
        assert options[own.name] == expected, own.key
