"""The list of services: commands, environments, ports and order, for every kind of plan."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import typer

from kvarena.stack import machine
from kvarena.stack.errors import StackError
from kvarena.stack.home import Home, project_root
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.record import Record, differences, read_record
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import CONTENDERS, load_settings

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


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: [(0,), (1,)])
    monkeypatch.setattr(machine, "has_compiler", lambda: True)


def make(home: Home, tmp_path: Path, **command_line: object) -> tuple[Plan, dict[str, Service]]:
    made = make_plan(load_settings(tmp_path / ".env", **({"profile": "cpu"} | command_line)), home)
    return made, {service.name: service for service in build_services(made, home)}


def option(service: Service, name: str) -> str:
    return service.command[service.command.index(name) + 1]


def extra_config(service: Service) -> dict[str, object]:
    extra: dict[str, object] = json.loads(option(service, "--kv-transfer-config"))["kv_connector_extra_config"]
    return extra


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
        command = services[name].command
        assert ("--dtype" in command) == (expected is not None)
        assert expected is None or option(services[name], "--dtype") == expected


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


@pytest.mark.usefixtures("two_cores")
def test_the_default_stack(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    assert list(services) == ["lmcache-server", "blend", "plain", "page"]
    assert [service.port for service in services.values()] == [5555, 8000, 8001, 8501]
    assert services["lmcache-server"].other_ports == (8080,)
    assert services["blend"].depends_on == ("lmcache-server",)
    assert services["plain"].depends_on == ()
    for service in services.values():
        assert "127.0.0.1" in service.command
        assert service.address.endswith(f"127.0.0.1:{service.port}")
        assert service.environment["PYTHONHASHSEED"] == "0"
        assert service.environment["LMCACHE_TRACK_USAGE"] == "false"
        assert service.log_path == str(home.path / "logs" / f"{service.name}.log")


@pytest.mark.usefixtures("two_cores")
def test_the_two_vllms_differ_in_the_blend_only(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    blend, plain = list(services["blend"].command), list(services["plain"].command)
    for name in ("--kv-transfer-config", "--middleware"):
        at = blend.index(name)
        del blend[at : at + 2]
    blend[blend.index("8000")] = "8001"
    assert blend == plain
    assert "--enable-prefix-caching" in plain
    assert "--enable-prompt-tokens-details" in plain
    different = dict(services["blend"].environment.items() ^ services["plain"].environment.items())
    assert set(different) == {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_PLUGINS", "KVARENA_CONTENDER"}
    assert plain[plain.index("--middleware") + 1] == "kvarena.vllm_plugin.edge.Edge"


def test_no_key_stands_in_commands_environments_or_the_record(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_API_KEY", "sesame-open")
    _, services = make(home, tmp_path, contenders=",".join(CONTENDERS))
    home.create()
    Record(tuple(services.values()), "", "data", "demo", has_api_key=True).write(home)
    assert "sesame-open" not in str(services) + home.record.read_text()


def test_a_stack_without_a_key_is_not_the_one_that_asks_for_it(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    running = Record(tuple(services.values()), "", "data", "demo")
    assert differences(running, dataclasses.replace(running, has_api_key=True)) == [
        "KVARENA_API_KEY is not set for what runs"
    ]


@pytest.mark.usefixtures("two_cores")
def test_each_vllm_has_its_own_cores(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    assert services["blend"].cpus == (0,)
    assert services["plain"].cpus == (1,)
    assert services["blend"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert services["plain"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert services["page"].cpus == ()
    _, alone = make(home, tmp_path, contenders="plain")
    assert alone["plain"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"


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
    assert simllm.command[1:3] == ("-m", "kvarena.engines.simllm")
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
    assert option(ai100, "--load-format") == "dummy"
    assert option(ai100, "--served-model-name") == option(services["plain"], "--served-model-name")
    assert "--full-batch-size" not in ai100.command, "the server's own default"
    _, services = make(home, tmp_path, contenders="ai100", max_model_len=512, ai100_ctx_len=256)
    assert option(services["ai100"], "--ctx-len") == "256", "its own key wins"
    _, services = make(home, tmp_path, contenders="ai100")
    assert "--ctx-len" not in services["ai100"].command


@pytest.mark.parametrize(
    ("name", "module", "threshold"),
    [
        ("prefix", "kvarena.engines.prefix.__main__", None),
        ("simllm", "kvarena.engines.simllm.__main__", 0.5),
        ("simllm", "kvarena.engines.simllm.__main__", "auto"),
        ("ai100", "ai100.server", None),
    ],
)
def test_engines_take_what_the_stack_gives_them(
    home: Home, tmp_path: Path, name: str, module: str, threshold: object
) -> None:
    """Every option of the command line is one that the server knows, with a value that it accepts."""
    chosen = {"simllm_mode": "aligned", "simllm_similarity_threshold": threshold, "simllm_max_cache_size": 3}
    chosen |= {f"ai100_{key}": value for key, value in AI100_CHOICES.items()}
    _, services = make(home, tmp_path, contenders=name, max_model_len=512, simllm_num_hyperplanes=8, **chosen)
    main = importlib.import_module(module).main
    app = typer.Typer()
    app.command()(main)
    parsed = typer.main.get_command(app).make_context(name, list(services[name].command[3:]))
    assert parsed.params["port"] == services[name].port
    assert parsed.params["ctx_len" if name == "ai100" else "max_model_len"] == 512
    if name == "ai100":
        assert {key: parsed.params[key] for key in AI100_CHOICES} == AI100_CHOICES
    if name == "simllm":
        assert {f"simllm_{key}": parsed.params[key] for key in ("mode", "similarity_threshold")} == {
            key: chosen[key] for key in ("simllm_mode", "simllm_similarity_threshold")
        }


@pytest.mark.usefixtures("two_cores")
def test_lmcaches_own_connector_is_stock_vllm_on_the_same_server(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, contenders="lmcache,plain", port_base=9000)
    assert list(services) == ["lmcache-server", "plain", "lmcache", "page"]
    lmcache, plain, server = services["lmcache"], services["plain"], services["lmcache-server"]
    assert (lmcache.port, server.port, lmcache.depends_on) == (9005, 9502, ("lmcache-server",))
    assert lmcache.environment["VLLM_PLUGINS"] == ""
    connector = json.loads(option(lmcache, "--kv-transfer-config"))
    assert connector["kv_connector"] == "LMCacheMPConnector"
    settings = connector["kv_connector_extra_config"]
    assert f"{settings['lmcache.mp.host']}:{settings['lmcache.mp.port']}" == server.address
    assert int(option(server, "--chunk-size")) % int(option(lmcache, "--block-size")) == 0
    stock = list(lmcache.command)
    for name in ("--kv-transfer-config", "--block-size"):
        at = stock.index(name)
        del stock[at : at + 2]
    stock[stock.index("9005")] = "9001"
    assert stock == list(plain.command)


def test_on_a_gpu_lmcaches_connector_takes_vllms_own_blocks(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_gpus(monkeypatch, "0")
    _, services = make(home, tmp_path, profile="gpu", contenders="lmcache")
    assert "--block-size" not in services["lmcache"].command


def test_a_blend_in_memory_doesnt_wait_for_the_server_of_another(home: Home, tmp_path: Path) -> None:
    plan, _ = make(home, tmp_path, contenders="blend,lmcache")
    services = build_services(dataclasses.replace(plan, blend=dataclasses.replace(plan.blend, store="memory")), home)
    assert {service.name: service.depends_on for service in services[:3]} == {
        "lmcache-server": (),
        "blend": (),
        "lmcache": ("lmcache-server",),
    }


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
    assert extra_config(services[0])["store"] == "memory"
    assert all("--no-enable-prefix-caching" in service.command for service in services[:2])


def test_the_blend_is_set_by_the_models_profile(home: Home, tmp_path: Path) -> None:
    made, services = make(home, tmp_path, contenders="blend")
    profile = json.loads((Path(made.model.name) / "kvarena.json").read_text())
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


def test_a_policy_that_is_none(home: Home, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"policy must be one of kv_deviation, .*, not 'magic'"):
        make(home, tmp_path, blend_policy="magic")


def test_a_broken_model_profile(home: Home, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "kvarena.json").write_text('{"sparator": "x"}')
    with pytest.raises(StackError, match="sparator"):
        make(home, tmp_path, model=str(tmp_path / "m"))


def test_options_go_through(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, load_format="dummy", max_model_len=512, kv_cache_gb=3, lmcache_gb=0.5)
    for name in ("blend", "plain"):
        assert option(services[name], "--load-format") == "dummy"
        assert option(services[name], "--max-model-len") == "512"
        assert services[name].environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert option(services["lmcache-server"], "--l1-size-gb") == "0.5"


@pytest.mark.parametrize(
    ("place", "adapter"),
    [
        ("redis://cache:6380", {"type": "resp", "host": "cache", "port": 6380}),
        ("valkey://me@cache", {"type": "resp", "host": "cache", "port": 6379, "username": "me"}),
        ('{"type": "s3", "s3_region": "r"}', {"type": "s3", "s3_region": "r"}),
        (
            "kept",
            {
                "type": "fs_native",
                "base_path": str(project_root() / "kept"),
                "max_capacity_gb": 3.0,
                "eviction": {"eviction_policy": "LRU"},
            },
        ),
    ],
)
def test_lmcaches_second_tier(home: Home, tmp_path: Path, place: str, adapter: dict[str, object]) -> None:
    _, services = make(home, tmp_path, lmcache_l2=place, lmcache_l2_gb=3)
    assert json.loads(option(services["lmcache-server"], "--l2-adapter")) == adapter
    assert option(services["lmcache-server"], "--l2-prefetch-policy") == "retain"
    assert "--l2-adapter" not in make(home, tmp_path)[1]["lmcache-server"].command


def test_local_and_hub_models(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, services = make(home, tmp_path)
    assert made.model.served_name == "demo"
    assert services["plain"].environment["HF_HUB_OFFLINE"] == "1"
    monkeypatch.chdir(tmp_path)
    made, services = make(home, tmp_path, model="org/model", local_hf_home=tmp_path)
    assert option(services["plain"], "--served-model-name") == "org/model"
    assert services["plain"].environment["HF_HOME"] == str(tmp_path)
    assert "HF_HUB_OFFLINE" not in services["plain"].environment


def test_without_a_compiler_nothing_is_compiled(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (True, False):
        monkeypatch.setattr(machine, "has_compiler", lambda found=found: found)
        _, services = make(home, tmp_path)
        for name in ("blend", "plain"):
            assert ("--enforce-eager" in services[name].command) == (not found)
            assert ("TORCHDYNAMO_DISABLE" in services[name].environment) == (not found)


def test_the_page_knows_its_contenders(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, data_dir=tmp_path, results_dir=tmp_path / "results")
    environment = services["page"].environment
    assert json.loads(environment["KVARENA_CONTENDERS"]) == [
        {"name": "blend", "title": "vLLM with LMCache", "url": "http://127.0.0.1:8000"},
        {"name": "plain", "title": "vLLM without LMCache", "url": "http://127.0.0.1:8001"},
    ]
    assert environment["KVARENA_DATA_DIR"] == str(tmp_path)
    assert environment["KVARENA_RESULTS_DIR"] == str(tmp_path / "results")
    assert environment["KVARENA_SEPARATOR"] == "<note>", "the model's own"


def _with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: list(gpus))
    monkeypatch.setattr(machine, "installed_vllm", lambda: "gpu")


def test_one_gpu_is_shared(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, "0")
    made, services = make(home, tmp_path, profile="auto")
    assert made.profile == "gpu"
    assert made.model.name == "mistralai/Mistral-7B-Instruct-v0.2"
    for name in ("blend", "plain"):
        assert services[name].environment["CUDA_VISIBLE_DEVICES"] == "0"
        assert option(services[name], "--gpu-memory-utilization") == "0.45"
        assert services[name].cpus == ()
    assert services["plain"].depends_on == ("blend",), "vLLM measures free memory while it starts"


def test_lmcaches_own_blender_is_a_form_of_blend(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, "0", "1")
    chosen = {
        "profile": "gpu",
        "blend_engine": "lmcache",
        "separator": "@@",
        "blend_ratio": 0.3,
        "blend_check_layer": 2,
    }
    _, services = make(home, tmp_path, **chosen)
    assert list(services) == ["blend", "plain", "page"], "its chunks lie in its own process"
    blend = services["blend"]
    assert "VLLM_PLUGINS" not in blend.environment, "our plugin registers the model"
    assert "--no-enable-prefix-caching" in blend.command
    assert "--enable-prefix-caching" not in blend.command
    assert "kvarena.vllm_plugin.middleware.KVArenaMiddleware" not in blend.command
    extra = extra_config(blend)
    assert (extra["lmcache.blend_special_str"], extra["lmcache.blend_recompute_ratios"]) == ("@@", [0.3])
    assert (extra["lmcache.blend_check_layers"], extra["lmcache.max_local_cpu_size"]) == ([2], 1.0)
    shown = json.loads(services["page"].environment["KVARENA_CONTENDERS"])
    assert [contender.get("approximate", False) for contender in shown] == [True, False]


def test_what_lmcaches_own_blender_cant_do_is_refused_before_anything_starts(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StackError, match=r"BLEND_ENGINE is lmcache, .* needs a GPU; on a CPU it must be kvarena"):
        make(home, tmp_path, blend_engine="lmcache")
    _with_gpus(monkeypatch, "0")
    with pytest.raises(StackError, match=r"BLEND_ENGINE is lmcache, and .* policy 'kv_deviation' only, not 'all'"):
        make(home, tmp_path, profile="gpu", blend_engine="lmcache", blend_policy="all")
    with pytest.raises(StackError, match="BLEND_ENGINE must be one of kvarena, lmcache, not 'both'"):
        make(home, tmp_path, blend_engine="both")


def test_two_gpus_are_divided(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, "2", "5", "6")
    _, services = make(home, tmp_path, profile="gpu", kv_cache_gb=10)
    assert services["blend"].environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert services["plain"].environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert services["plain"].depends_on == ()
    assert option(services["plain"], "--kv-cache-memory-bytes") == str(10 << 30)
    assert "--gpu-memory-utilization" not in services["plain"].command


def test_auto_takes_the_cpu_when_vllm_is_built_for_it(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_gpus(monkeypatch, "0")
    monkeypatch.setattr(machine, "installed_vllm", lambda: "cpu")
    assert make(home, tmp_path, profile="auto")[0].profile == "cpu"


def test_a_gpu_profile_needs_a_gpu(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch)
    with pytest.raises(StackError, match="no GPU on this machine"):
        make(home, tmp_path, profile="gpu")


def test_the_record_reads_back(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    record = Record(tuple(services.values()), "/tmp/s", "data", "demo")
    home.create()
    record.write(home)
    assert read_record(home) == record
    assert differences(record, record) == []
    home.record.write_text("{}")
    assert read_record(home) is None


def test_differences_are_told_in_words(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, ui=False)
    _, others = make(home, tmp_path, max_model_len=512, contenders="plain", data_dir=tmp_path / "notes")
    running = Record(tuple(services.values()), "", "data", "demo")
    wanted = Record(tuple(others.values()), "", "notes", "demo")
    lines = differences(running, wanted)
    assert "blend is running and was not asked for" in lines
    assert "page is not running" in lines
    assert "plain: --max-model-len is not set, not 512" in lines
    assert "data folder data, not notes" in lines


def test_services_are_plain_data(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    for service in services.values():
        json.dumps(dataclasses.asdict(service))
