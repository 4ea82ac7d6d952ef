"""The services of the stack, as data: what each is, how it is started, and how its health is asked.

`build_services` is the one list. It starts nothing and looks at nothing but its arguments, so that whatever runs the
services, a supervisor of processes or containers, takes them from it. First in the file: which KV connector the vLLM of
a contender gets, as options of vLLM's command line: ours, LMCache's own, or none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict

from kvarena.engines.vllm.config import CONTENDER_VARIABLE, kv_transfer_config
from kvarena.engines.vllm.lmcache_config import lmcache_blend_options
from kvarena.policies.params import PARAMETERS
from kvarena.stack.home import Home
from kvarena.stack.lmcache_l2 import L2_OPTION
from kvarena.stack.plan import VLLM_CONTENDERS, Plan
from kvarena.stack.service import HOST, LMCACHE_SERVER, Service, StackError

LMCACHE_CHUNK_TOKENS = 32
"""The pieces in which the LMCache server keeps KV."""
LMCACHE_TIMEOUT_S = 10.0
LMCACHE_HEARTBEAT_S = 2.0


def vllm_connector(name: str, plan: Plan) -> list[str]:
    """What the contenders differ in; whether vLLM keeps a prefix cache itself goes with it."""
    if name == "blend" and plan.blend_engine == "lmcache":
        return _lmcache_blend(plan)
    prefix_caching = ["--enable-prefix-caching" if plan.prefix_caching else "--no-enable-prefix-caching"]
    if name == "blend":
        middleware = ["--middleware", "kvarena.engines.vllm.middleware.KVArenaMiddleware"]
        return [*prefix_caching, "--kv-transfer-config", kv_transfer_config(plan.blend), *middleware]
    return [*prefix_caching, *(_lmcache_connector(plan) if name == "lmcache" else [])]


def _lmcache_blend(plan: Plan) -> list[str]:
    try:
        return lmcache_blend_options(plan.blend, plan.lmcache_gb)
    except ValueError as error:
        raise StackError(f"BLEND_ENGINE is lmcache, and {error}") from error


def _lmcache_connector(plan: Plan) -> list[str]:
    """LMCache's own connector, failing safe, on the server that has the blend's chunks.

    The server's pieces must be whole blocks of vLLM's, and those have 128 tokens on a CPU where nobody says otherwise.
    A server that is gone or hangs is missed within a heartbeat or two, or when something asked of it times out.
    """
    settings = {
        "lmcache.mp.host": f"tcp://{plan.network.host(LMCACHE_SERVER)}",
        "lmcache.mp.port": plan.ports.lmcache_server,
        "lmcache.mp.mq_timeout": LMCACHE_TIMEOUT_S,
        "lmcache.mp.heartbeat_interval": LMCACHE_HEARTBEAT_S,
    }
    connector = {
        "kv_connector": "FailSafeLMCacheConnector",
        "kv_connector_module_path": "kvarena.engines.vllm.lmcache_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    blocks = ["--block-size", str(LMCACHE_CHUNK_TOKENS)] if plan.profile == "cpu" else []
    return [*blocks, "--kv-transfer-config", json.dumps(connector)]


GPU_MEMORY_SHARE = 0.9

Options = Mapping[str, object]
"""Of a command line; those whose value is `None` are left out."""

TITLES = {
    LMCACHE_SERVER: "LMCache server",
    "blend": "vLLM with LMCache",
    "plain": "vLLM without LMCache",
    "prefix": "PyTorch with prefix cache",
    "simllm": "PyTorch with Sim-LLM",
    "ai100": "KV slots per topic",
    "lmcache": "vLLM with LMCache's own connector",
    "page": "the page",
}

COMMON_ENVIRONMENT: Mapping[str, str] = {
    "PYTHONHASHSEED": "0",  # LMCache's keys agree only between processes with the same seed
    "PYTHONUNBUFFERED": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "SPT_NOENV": "1",  # a process that renames itself keeps its environment readable, and with it our marker
}


def build_services(plan: Plan, home: Home) -> list[Service]:
    """Every service of this plan, each after those it depends on."""
    services = []
    if plan.needs_lmcache:
        services.append(_lmcache_server(plan, home))
    services += [(_vllm if name in VLLM_CONTENDERS else _engine)(name, plan, home) for name in plan.contenders]
    if plan.page:
        services.append(_page(plan, home))
    return services


def _lmcache_server(plan: Plan, home: Home) -> Service:
    ports = plan.ports
    command = [sys.executable, "-m", "lmcache.cli.main", "server"]
    command += ["--host", plan.network.listen, "--port", str(ports.lmcache_server)]
    command += ["--http-host", plan.network.listen, "--http-port", str(ports.lmcache_http)]
    command += ["--l1-size-gb", f"{plan.lmcache_gb:g}", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(LMCACHE_CHUNK_TOKENS), "--supported-transfer-mode", "auto"]
    command += ["--shm-name", home.shm_name]
    if plan.lmcache_l2 is not None:
        command += [L2_OPTION, json.dumps(plan.lmcache_l2), "--l2-prefetch-policy", "retain"]  # chunks come again
    return Service(
        name=LMCACHE_SERVER,
        title=TITLES[LMCACHE_SERVER],
        command=tuple(command),
        port=ports.lmcache_server,
        other_ports=(ports.lmcache_http,),
        address=f"tcp://{plan.network.host(LMCACHE_SERVER)}:{ports.lmcache_server}",
        health_url=f"http://{HOST}:{ports.lmcache_http}/healthcheck",
        log_path=str(home.log(LMCACHE_SERVER)),
        environment=COMMON_ENVIRONMENT,
        directory=str(home.path),
        start_timeout_s=120.0,
    )


def _vllm(name: str, plan: Plan, home: Home) -> Service:
    port = getattr(plan.ports, name)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", plan.model.name, "--served-model-name", plan.model.served_name]
    command += ["--host", plan.network.listen, "--port", str(port)]
    command += ["--enable-prompt-tokens-details"]
    command += ["--disable-uvicorn-access-log"]  # requests have their line from the edge
    if plan.max_model_len is not None:
        command += ["--max-model-len", str(plan.max_model_len)]
    if plan.load_format is not None:
        command += ["--load-format", plan.load_format]
    if plan.dtype is not None:
        command += ["--dtype", plan.dtype]
    if not plan.compile:
        command += ["--enforce-eager"]
    command += _gpu_memory(plan)
    command += vllm_connector(name, plan)
    environment = _vllm_environment(plan, home)
    if name != "blend":
        environment["VLLM_PLUGINS"] = ""  # stock vLLM, without our plugin
    command += ["--middleware", "kvarena.server.vllm_middleware.AccessMiddleware"]  # the last is the outermost
    environment[CONTENDER_VARIABLE] = name
    asks_lmcache = name == "lmcache" or (name == "blend" and plan.blend_needs_lmcache)
    return _contender(name, plan, home, command, environment, (LMCACHE_SERVER,) if asks_lmcache else ())


def _engine(name: str, plan: Plan, home: Home) -> Service:
    """A server over `kvarena.server`: a PyTorch engine, or ai100."""
    command = [sys.executable, "-m", ENGINE_MODULES[name]]
    command += ["--model", plan.model.name, "--served-model-name", plan.model.served_name]
    command += ["--host", plan.network.listen, "--port", str(getattr(plan.ports, name))]
    command += ["--device", "cuda" if plan.profile == "gpu" else "cpu"]
    options = {**ENGINE_OPTIONS[name](plan), "--load-format": plan.load_format, "--dtype": plan.dtype}
    command += [word for option, value in options.items() if value is not None for word in (option, str(value))]
    return _contender(name, plan, home, command, {**COMMON_ENVIRONMENT, **_hub_environment(plan)}, ())


def _prefix_options(plan: Plan) -> Options:
    return {
        "--cache-gb": f"{plan.prefix_cache_gb:g}",
        "--storage": plan.prefix_storage,
        "--max-model-len": plan.max_model_len,
    }


def _simllm_options(plan: Plan) -> Options:
    """Mode aligned blends as the contender blend does."""
    return {
        "--mode": plan.simllm.mode,
        "--similarity-threshold": plan.simllm.similarity_threshold,
        "--max-cache-size": plan.simllm.max_cache_size,
        "--num-hyperplanes": plan.simllm.num_hyperplanes,
        **{f"--{name.replace('_', '-')}": getattr(plan.blend, name) for name in PARAMETERS},
        "--max-model-len": plan.max_model_len,
    }


def _ai100_options(plan: Plan) -> Options:
    """Every slot has the length of the context; notes are those of the page."""
    chosen = {f"--{key.replace('_', '-')}": value for key, value in asdict(plan.ai100).items()}
    data = plan.data_dir if plan.data_dir.is_dir() else None
    return {
        **chosen,
        "--ctx-len": plan.ai100.ctx_len or plan.max_model_len,
        "--data": data,
        "--separator": plan.blend.separator,
    }


ENGINE_MODULES = {
    "prefix": "kvarena.contenders.prefix",
    "simllm": "kvarena.contenders.simllm",
    "ai100": "ai100.server",
}
ENGINE_OPTIONS: Mapping[str, Callable[[Plan], Options]] = {
    "prefix": _prefix_options,
    "simllm": _simllm_options,
    "ai100": _ai100_options,
}


def _contender(
    name: str,
    plan: Plan,
    home: Home,
    command: list[str],
    environment: Mapping[str, str],
    depends_on: tuple[str, ...],
) -> Service:
    """A server of the arena, on its share of the machine."""
    index, port = plan.contenders.index(name), getattr(plan.ports, name)
    if plan.shares_a_gpu(index):  # vLLM measures free memory while it starts: one after the other
        depends_on += plan.contenders[:index]
    return Service(
        name=name,
        title=TITLES[name],
        command=tuple(command),
        port=port,
        address=f"http://{plan.network.host(name)}:{port}",
        health_url=f"http://{HOST}:{port}/health",
        log_path=str(home.log(name)),
        environment={**environment, **plan.device_environment(index)},
        depends_on=depends_on,
        cpus=plan.core_shares[index].cpus if plan.core_shares else (),
        directory=str(home.path),
        start_timeout_s=600.0 if plan.model.is_local else 7200.0,  # the first start of a hub model downloads it
        stop_timeout_s=20.0,
    )


def _gpu_memory(plan: Plan) -> list[str]:
    if plan.profile == "cpu":
        return []
    if plan.kv_cache_gb is not None:
        return ["--kv-cache-memory-bytes", str(plan.kv_cache_gb << 30)]
    return ["--gpu-memory-utilization", f"{GPU_MEMORY_SHARE / plan.servers_per_gpu:.2f}"]


def _vllm_environment(plan: Plan, home: Home) -> dict[str, str]:
    environment = {
        **COMMON_ENVIRONMENT,
        "VLLM_CACHE_ROOT": str(home.cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(home.cache / "inductor"),
        **_hub_environment(plan),
    }
    if plan.profile == "cpu":
        # vLLM 0.32 saves what it compiles ahead of time for a CPU and can't load it again, so that each start compiles
        # anew; without that, Inductor's own cache is found again.
        environment["VLLM_USE_AOT_COMPILE"] = "0"
    if not plan.compile:  # --enforce-eager is for the model; samplers would be compiled at their first request
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _hub_environment(plan: Plan) -> dict[str, str]:
    environment = {}
    if plan.hf_home is not None:
        environment["HF_HOME"] = str(plan.hf_home)
    if plan.model.is_local:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _page(plan: Plan, home: Home) -> Service:
    contenders = [
        {"name": name, "title": TITLES[name], "url": f"http://{plan.network.host(name)}:{getattr(plan.ports, name)}"}
        | ({"approximate": True} if name == "blend" and plan.blend_engine == "lmcache" else {})
        for name in plan.contenders
    ]
    script = plan.root / "frontend" / "app.py"
    command = [sys.executable, "-m", "streamlit", "run", str(script)]
    command += ["--server.address", plan.network.listen, "--server.port", str(plan.ports.page)]
    command += ["--server.headless", "true", "--browser.gatherUsageStats", "false"]
    return Service(
        name="page",
        title=TITLES["page"],
        command=tuple(command),
        port=plan.ports.page,
        address=f"http://{plan.network.host('page')}:{plan.ports.page}",
        health_url=f"http://{HOST}:{plan.ports.page}/_stcore/health",
        log_path=str(home.log("page")),
        environment={
            **COMMON_ENVIRONMENT,
            "KVARENA_CONTENDERS": json.dumps(contenders),
            "KVARENA_DATA_DIR": str(plan.data_dir),
            "KVARENA_CHUNK_TOKENS": str(plan.chunk_tokens),
            "KVARENA_TOKENIZER": plan.tokenizer_place,
            "KVARENA_RESULTS_DIR": str(plan.results_dir),
            "KVARENA_SEPARATOR": plan.blend.separator,
            **({"KVARENA_NOTICE": plan.notice} if plan.notice else {}),
        },
        directory=str(script.parent),
    )
