"""The PyTorch engines and ai100 among the services: what the plan tells them, and that they understand it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvarena.contenders.spec import ContenderSpec
from kvarena.stack.home import Home, project_root
from kvarena.stack.settings import SPECS
from support.engine_commands import ENGINES, command_of
from support.planned_services import extra_config, make, option

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


@pytest.mark.usefixtures("two_cores")
def test_prefix_is_a_pytorch_server_on_its_own_port(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, contenders="prefix,plain", max_model_len=512, prefix_cache_gb=0.5)
    assert list(services) == ["plain", "prefix", "page"]
    prefix = services["prefix"]
    assert (prefix.port, prefix.cpus, prefix.environment["OMP_NUM_THREADS"]) == (8002, (1,), "1")
    assert option(prefix, "--cache-gb") == "0.5"
    assert option(prefix, "--max-model-len") == "512"
    assert option(prefix, "--served-model-name") == option(services["plain"], "--served-model-name")
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
    assert simllm.command[1:3] == ("-m", "kvarena.contenders.simllm")
    assert option(simllm, "--mode") == "top_layer"
    assert option(simllm, "--similarity-threshold") == "0.9"
    assert option(simllm, "--max-cache-size") == "7"
    assert option(simllm, "--load-format") == "dummy"
    assert option(simllm, "--served-model-name") == option(services["blend"], "--served-model-name")
    blend = extra_config(services["blend"])
    said = (option(simllm, "--policy"), float(option(simllm, "--ratio")), int(option(simllm, "--check-layer")))
    assert said == (blend["policy"], blend["ratio"], blend["check_layer"]) == ("kv_deviation", 0.5, 2)
    assert "--num-hyperplanes" not in simllm.command, "the server's own default"


@pytest.mark.usefixtures("two_cores")
def test_ai100_serves_the_stacks_model_in_slots_as_long_as_its_context(home: Home, tmp_path: Path) -> None:
    chosen = {"ai100_runtime": "host", "ai100_kv_cache_batch_size": 3, "ai100_topics_file": "topics.yaml"}
    _, services = make(home, tmp_path, contenders="ai100,plain", max_model_len=512, load_format="dummy", **chosen)
    assert list(services) == ["plain", "ai100", "page"]
    ai100 = services["ai100"]
    assert (ai100.port, ai100.cpus, ai100.environment["OMP_NUM_THREADS"]) == (8004, (1,), "1")
    assert ai100.command[1:3] == ("-m", "ai100.server")
    assert option(ai100, "--runtime") == "host"
    assert option(ai100, "--kv-cache-batch-size") == "3"
    assert option(ai100, "--topics-file") == str(project_root() / "topics.yaml")
    assert option(ai100, "--ctx-len") == "512"
    assert option(ai100, "--data") == services["page"].environment["KVARENA_DATA_DIR"]
    assert option(ai100, "--load-format") == "dummy"
    assert option(ai100, "--served-model-name") == option(services["plain"], "--served-model-name")
    assert "--full-batch-size" not in ai100.command, "the server's own default"
    _, services = make(home, tmp_path, contenders="ai100", max_model_len=512, ai100_ctx_len=256)
    assert option(services["ai100"], "--ctx-len") == "256", "its own key wins"
    _, services = make(home, tmp_path, contenders="ai100")
    assert "--ctx-len" not in services["ai100"].command


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("prefix", None), ("simllm", 0.5), ("simllm", "auto"), ("ai100", None)],
)
def test_engines_take_what_the_stack_gives_them(home: Home, tmp_path: Path, name: str, threshold: object) -> None:
    """Every option of the command line is one that the server knows, with a value that it accepts."""
    chosen = {"simllm_mode": "aligned", "simllm_similarity_threshold": threshold, "simllm_max_cache_size": 3}
    chosen |= {f"ai100_{key}": value for key, value in AI100_CHOICES.items()}
    _, services = make(home, tmp_path, contenders=name, max_model_len=512, simllm_num_hyperplanes=8, **chosen)
    parsed = command_of(SPECS[name]).make_context(name, list(services[name].command[3:]))
    assert parsed.params["port"] == services[name].port
    assert parsed.params["ctx_len" if name == "ai100" else "max_model_len"] == 512
    if name == "ai100":
        assert {key: parsed.params[key] for key in AI100_CHOICES} == AI100_CHOICES
    if name == "simllm":
        assert {f"simllm_{key}": parsed.params[key] for key in ("mode", "similarity_threshold")} == {
            key: chosen[key] for key in ("simllm_mode", "simllm_similarity_threshold")
        }


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_every_engine_takes_all_of_its_settings(home: Home, tmp_path: Path, spec: ContenderSpec) -> None:
    chosen = {own.key: own.shown for own in spec.own_settings()}
    _, services = make(home, tmp_path, contenders=spec.name, **chosen)
    parsed = command_of(spec).make_context(spec.name, list(services[spec.name].command[3:]))
    for own in spec.own_settings():
        expected = project_root() / str(own.shown) if own.annotation == Path | None else own.shown
        assert parsed.params[own.name] == expected, own.key
