"""The list of services: what each is told by every plan, as its own program reads it; ports, order, cores and GPUs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.contenders.servers import WORKER_IN_ENGINE
from kvarena.contenders.spec import LMCACHE_SERVER, contender_specs
from kvarena.home import Home, StackError
from kvarena.splitting import find_splitter
from kvarena.stack import machine
from kvarena.stack.record import Record
from kvarena.stack.services import build_services
from kvarena.stack.settings import CONTENDERS
from support.command_lines import extra_config, listens_on, make, parsed, with_gpus

TOWN = Path(__file__).resolve().parents[2] / "backend" / "models" / "town"


@pytest.mark.usefixtures("two_cores")
def test_the_default_stack(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    assert list(services) == ["lmcache-server", "blend", "plain", "page"]
    assert [service.port for service in services.values()] == [5555, 8000, 8001, 8501]
    assert services["lmcache-server"].other_ports == (8080,)
    assert services["blend"].depends_on == ("lmcache-server",)
    assert services["plain"].depends_on == ()
    for service in services.values():
        assert listens_on(service) == {"127.0.0.1"}
        assert service.address.endswith(f"127.0.0.1:{service.port}")
        assert service.environment["PYTHONHASHSEED"] == "0"
        assert service.environment["LMCACHE_TRACK_USAGE"] == "false"
        assert service.log_path == str(home.path / "logs" / f"{service.name}.log")


@pytest.mark.usefixtures("two_cores")
def test_the_two_vllms_differ_in_the_blend_only(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    blend, plain = parsed(services["blend"]), parsed(services["plain"])
    assert {name for name in plain if blend[name] != plain[name]} == {"port", "kv_transfer_config", "middleware"}
    assert plain["kv_transfer_config"] is None
    assert plain["enable_prefix_caching"]
    assert plain["enable_prompt_tokens_details"]
    different = dict(services["blend"].environment.items() ^ services["plain"].environment.items())
    assert set(different) == {"VLLM_PLUGINS", "KVARENA_CONTENDER"}
    assert plain["middleware"] == ["kvarena.server.vllm_middleware.AccessMiddleware"]
    assert blend["middleware"] == ["kvarena.engines.vllm.middleware.KVArenaMiddleware", *plain["middleware"]]


def test_no_key_stands_in_commands_environments_or_the_record(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_API_KEY", "sesame-open")
    _, services = make(home, tmp_path, contenders=",".join(CONTENDERS))
    home.create()
    Record(tuple(services.values()), "", "data", "town", has_api_key=True).write(home)
    assert "sesame-open" not in str(services) + home.record.read_text()


@pytest.mark.usefixtures("two_cores")
def test_each_vllm_has_its_own_cores(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    assert services["blend"].cpus == (0,)
    assert services["plain"].cpus == (1,)
    for service in (services["blend"], services["plain"]):
        assert service.environment["OMP_NUM_THREADS"] == "1"
        assert service.environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert services["page"].cpus == ()
    _, alone = make(home, tmp_path, contenders="plain")
    assert alone["plain"].cpus == (0, 1)
    assert alone["plain"].environment["OMP_NUM_THREADS"] == "2"


def test_threads_are_bound_where_a_core_is_left_for_the_rest_of_the_server(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: [(cpu,) for cpu in range(6)])
    _, three_each = make(home, tmp_path)
    assert parsed(three_each["plain"])["distributed_executor_backend"] == WORKER_IN_ENGINE
    assert "VLLM_CPU_OMP_THREADS_BIND" not in three_each["plain"].environment
    _, all_six = make(home, tmp_path, contenders="plain")
    assert parsed(all_six["plain"])["distributed_executor_backend"] is None
    assert all_six["plain"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,2,3,4"
    assert all_six["plain"].environment["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("has_bf16", "model_dtype", "wanted", "expected"),
    [
        (False, "bfloat16", "auto", "float32"),
        (True, "bfloat16", "auto", None),
        (False, "float32", "auto", None),
        (False, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_without_bf16_instructions_all_servers_compute_in_float32(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_bf16: bool,
    model_dtype: str,
    wanted: str,
    expected: str | None,
) -> None:
    monkeypatch.setattr(machine, "has_bf16_instructions", lambda: has_bf16)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": model_dtype}))
    made, services = make(home, tmp_path, model=str(tmp_path), contenders="blend,plain,prefix,simllm", dtype=wanted)
    assert made.dtype == expected
    for name in made.contenders:
        assert parsed(services[name])["dtype"] == (expected or "auto")


def test_weights_too_large_for_float32_and_quantised_ones_stay_as_they_are(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 800)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    for num_bytes, extra, expected in ((100, {}, "float32"), (101, {}, None), (1, {"quantization_config": {}}, None)):
        config.write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **extra}))
        weights.write_bytes(bytes(num_bytes))
        assert make(home, tmp_path, model=str(tmp_path))[0].dtype == expected


def test_plain_alone_needs_no_lmcache(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, contenders="plain", ui=False)
    assert list(services) == ["plain"]


@pytest.mark.usefixtures("two_cores")
def test_a_store_in_memory_needs_no_lmcache_and_prefix_caching_can_be_off(home: Home, tmp_path: Path) -> None:
    plan, _ = make(home, tmp_path)
    in_memory = dataclasses.replace(plan.blend, store="memory")
    services = build_services(dataclasses.replace(plan, blend=in_memory, prefix_caching=False), home)
    assert [service.name for service in services] == ["blend", "plain", "page"]
    assert services[0].depends_on == ()
    assert services[-1].environment["KVARENA_SERVICES"] == "[]"
    assert extra_config(services[0])["store"] == "memory"
    assert [parsed(service)["enable_prefix_caching"] for service in services[:2]] == [False, False]


def test_options_go_through(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, load_format="dummy", max_model_len=512, kv_cache_gb=3, lmcache_gb=0.5)
    for name in ("blend", "plain"):
        options = parsed(services[name])
        assert (options["load_format"], options["max_model_len"]) == ("dummy", 512)
        assert services[name].environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert parsed(services["lmcache-server"])["l1_size_gb"] == 0.5


def test_local_and_hub_models(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, services = make(home, tmp_path)
    assert made.model.served_name == "town"
    assert services["plain"].environment["HF_HUB_OFFLINE"] == "1"
    monkeypatch.chdir(tmp_path)
    made, services = make(home, tmp_path, model="org/model", local_hf_home=tmp_path)
    assert parsed(services["plain"])["served_model_name"] == ["org/model"]
    assert services["plain"].environment["HF_HOME"] == str(tmp_path)
    assert "HF_HUB_OFFLINE" not in services["plain"].environment


def test_without_a_compiler_nothing_is_compiled(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (True, False):
        monkeypatch.setattr(machine, "has_compiler", lambda found=found: found)
        _, services = make(home, tmp_path)
        for name in ("blend", "plain"):
            assert parsed(services[name])["enforce_eager"] == (not found)
            assert ("TORCHDYNAMO_DISABLE" in services[name].environment) == (not found)


def test_vllm_caches_in_the_home_unless_the_user_has_a_place_for_it(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, expected in (("", home.cache / "vllm"), ("/caches/vllm", Path("/caches/vllm"))):
        monkeypatch.setenv("VLLM_CACHE_ROOT", place)
        _, services = make(home, tmp_path)
        assert {services[name].environment["VLLM_CACHE_ROOT"] for name in ("blend", "plain")} == {str(expected)}


def test_the_page_knows_its_contenders(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, data_dir=tmp_path, results_dir=tmp_path / "results")
    environment = services["page"].environment
    told = json.loads(environment["KVARENA_CONTENDERS"])
    assert [(entry["name"], entry["title"], entry["url"]) for entry in told] == [
        ("blend", "vLLM with LMCache (CacheBlend)", "http://127.0.0.1:8000"),
        ("plain", "vLLM without LMCache", "http://127.0.0.1:8001"),
    ]
    assert [(entry["approximate"], entry["report"]) for entry in told] == [(True, "blend"), (False, "")]
    assert all(entry["explanation"].endswith(".") for entry in told)
    assert all(entry["public_url"] == entry["url"] for entry in told)
    (lmcache,) = json.loads(environment["KVARENA_SERVICES"])
    assert lmcache == {"name": "lmcache-server", "title": "LMCache server", "url": "http://127.0.0.1:8080"}
    assert environment["KVARENA_DATA_DIR"] == str(tmp_path)
    assert environment["KVARENA_CHUNK_TOKENS"] == "512"
    assert find_splitter(environment["KVARENA_TOKENIZER"]).tokenizer_file == TOWN / "tokenizer.json"
    assert environment["KVARENA_RESULTS_DIR"] == str(tmp_path / "results")
    assert environment["KVARENA_SEPARATOR"] == "<note>", "the model's own"


def test_a_hub_models_tokenizer_is_looked_for_in_its_cache(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, model="org/name", profile="cpu", local_hf_home=tmp_path / "hf")
    assert services["page"].environment["KVARENA_TOKENIZER"] == str(tmp_path / "hf" / "hub" / "models--org--name")


def test_services_are_plain_data(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    for service in services.values():
        json.dumps(dataclasses.asdict(service))


# --- GPUs ---


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
    options, unbounded = parsed(services["plain"]), parsed(make(home, tmp_path)[1]["plain"])
    assert options["kv_cache_memory_bytes"] == 10 << 30
    assert options["gpu_memory_utilization"] == unbounded["gpu_memory_utilization"], "a share would bound it too"


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


# --- What the blend is told: the settings, before the model's profile, before the defaults ---


def test_the_blend_is_set_by_the_models_profile(home: Home, tmp_path: Path) -> None:
    made, services = make(home, tmp_path, contenders="blend")
    profile = json.loads((Path(made.model.name) / "kvarena.json").read_text())
    assert profile.pop("data")
    config = extra_config(services["blend"])
    assert {key: config[key] for key in profile} == profile
    assert config["lmcache_url"] == "tcp://127.0.0.1:5555"
    assert config["lmcache_http_url"] == "http://127.0.0.1:8080"
    assert str(config["index_path"]).startswith(str(home.path))


def test_settings_win_over_the_models_profile(home: Home, tmp_path: Path) -> None:
    _, services = make(
        home, tmp_path, separator="\n\n# ; %", blend_policy="all", blend_ratio=0.5, blend_check_layer=3, port_base=9000
    )
    config = extra_config(services["blend"])
    assert config["separator"] == "\n\n# ; %"
    assert (config["policy"], config["ratio"], config["check_layer"]) == ("all", 0.5, 3)
    assert config["lmcache_url"] == "tcp://127.0.0.1:9502"


def test_what_happens_with_a_model_that_cant_be_blended(home: Home, tmp_path: Path) -> None:
    for chosen, expected in ({}, "refuse"), ({"blend_unsupported": "plain"}, "plain"):
        _, services = make(home, tmp_path, **chosen)
        assert extra_config(services["blend"])["unsupported"] == expected
    with pytest.raises(StackError, match="BLEND_UNSUPPORTED must be one of refuse, plain, not 'ignore'"):
        make(home, tmp_path, blend_unsupported="ignore")


@pytest.mark.parametrize(
    ("config", "keeps_all"),
    [
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"text_config": {"sliding_window": 512, "_sliding_window_pattern": 6}}, True),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "sliding_attention"]}, False),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, False),
        ({"sliding_window": 512}, False),
    ],
)
def test_some_layers_with_a_window_keep_all_kv(
    home: Home, tmp_path: Path, config: dict[str, Any], keeps_all: bool
) -> None:
    """vLLM's own option; for layers that are all alike it does nothing. `plain` stays as vLLM has it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    _, services = make(home, tmp_path, model=str(tmp_path / "m"))
    assert bool(parsed(services["blend"])["disable_hybrid_kv_cache_manager"]) == keeps_all
    assert not parsed(services["plain"])["disable_hybrid_kv_cache_manager"]


def test_a_policy_that_is_none(home: Home, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"BLEND_POLICY must be one of kv_deviation, .*, not 'magic'"):
        make(home, tmp_path, blend_policy="magic")


def test_a_broken_model_profile(home: Home, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "kvarena.json").write_text('{"sparator": "x"}')
    with pytest.raises(StackError, match="sparator"):
        make(home, tmp_path, model=str(tmp_path / "m"))


# --- vLLM's and LMCache's own parsers take every flag, for every contender and profile ---


VLLM_CONTENDERS = [name for name, spec in contender_specs().items() if spec.is_vllm]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "cpu", "max_model_len": 512, "load_format": "dummy", "dtype": "float32"},
        {"profile": "gpu"},
        {"profile": "gpu", "kv_cache_gb": 8, "blend_engine": "lmcache", "model": "org/model"},
    ],
    ids=["cpu", "gpu", "LMCache's own blender"],
)
def test_vllm_takes_its_command_lines(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    with_gpus(monkeypatch, "0", "1")
    _, built = make(home, tmp_path, contenders=",".join(VLLM_CONTENDERS), blend_deviation="keys", **settings)
    for name in VLLM_CONTENDERS:
        options = parsed(built[name])
        validate_parsed_serve_args(argparse.Namespace(**options))
        assert options["port"] == built[name].port
        transfer = options["kv_transfer_config"]
        assert (transfer is None) == (name == "plain")
        if name == "blend":
            expected = "LMCacheConnectorV1" if "blend_engine" in settings else "KVArenaConnector"
            assert transfer.kv_connector == expected
            assert options["enable_prefix_caching"] == ("blend_engine" not in settings)


@pytest.mark.slow
def test_lmcache_takes_its_command_line(home: Home, tmp_path: Path) -> None:
    server = make(home, tmp_path)[1][LMCACHE_SERVER]
    options = parsed(server)
    assert (options["port"], options["http_port"]) == (server.port, server.other_ports[0])
    assert options["chunk_size"] == 32
