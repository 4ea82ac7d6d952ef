"""How a contender's server is started: what the stack decided (`Launch`), and the kinds of servers there are.

`VLLMServer` is vLLM with more options, `EngineServer` a server over `kvarena.server`. A server of another kind is one
more class with the methods of `Server`. Imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from kvarena.engines.vllm.config import CONTENDER_VARIABLE, BlendConfig

GIB = 1 << 30
Options = Mapping[str, object]
"""Of a command line; those whose value is `None` are left out."""
GPU_MEMORY_RATIO = 0.9
WORKER_IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its whole name: on a CPU vLLM takes its short one, `uni`, for `mp`."""
COMMON_ENVIRONMENT: Mapping[str, str] = {
    "PYTHONHASHSEED": "0",  # LMCache's keys agree only between processes with the same seed
    "PYTHONUNBUFFERED": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "SPT_NOENV": "1",  # a process that renames itself keeps its environment readable, and with it our marker
}


@dataclass(frozen=True)
class Shared:
    """What the stack decided for all contenders.

    `profile` is cpu or gpu. `blend` also says where the LMCache server is; `blend_engine` is kvarena, or lmcache for
    LMCache's own blender; `prefix_caching` is vLLM's. What is `None` is left to the server. Sizes are in GiB.
    """

    profile: str = "cpu"
    max_model_len: int | None = None
    load_format: str | None = None
    dtype: str | None = None
    compile: bool = True
    hf_home: Path | None = None
    cache_dir: Path = Path()
    vllm_cache_dir: Path = Path()
    blend: BlendConfig = field(default_factory=BlendConfig)
    blend_engine: str = "kvarena"
    lmcache_gb: float = 1.0
    kv_cache_gb: int | None = None
    prefix_caching: bool = True


@dataclass(frozen=True)
class Launch(Shared):
    """What the stack decided for one contender.

    `settings` are the contender's own. `model` is a folder (`is_local`) or a name on the hub; `has_some_windows` is
    `Model.has_some_windows`. `gpu` is the GPU it has with the profile gpu. With the other it has an OpenMP thread for
    each of `omp_cpus`, and vLLM binds each to its own (`binds_threads`).
    """

    name: str = ""
    settings: Any = None
    host: str = "127.0.0.1"
    port: int = 0
    model: str = ""
    served_model_name: str = ""
    is_local: bool = True
    has_some_windows: bool = False
    data_dir: Path | None = None
    gpu: str = ""
    servers_per_gpu: int = 1
    omp_cpus: tuple[int, ...] = ()
    binds_threads: bool = False


class Server(Protocol):
    """A kind of server. Its methods look at nothing but the launch."""

    def command(self, launch: Launch) -> list[str]:
        """The words of the command line."""

    def environment(self, launch: Launch) -> dict[str, str]:
        """Its variables, with those that give it its cores or its GPU."""

    def packages(self, launch: Launch) -> dict[str, str]:
        """What must be installed: the extra of pyproject.toml that has it, by the name it is imported by."""

    def kv_cache_gb(self, launch: Launch) -> float:
        """Main memory for the KV of running requests that is taken whether it is needed or not."""

    def gpu_bytes(self, launch: Launch, weight_bytes: int, total_bytes: int) -> int:
        """What it takes of a GPU with so much memory as it starts, the weights included."""


@dataclass(frozen=True)
class VLLMServer:
    """vLLM. `options` come after those that every vLLM here has; `has_plugin`: our plugin is loaded.

    On a CPU, vLLM runs its worker in a process of its own, only to bind OpenMP's threads by its environment. Where they
    aren't bound, the engine's process runs the worker, as on one GPU: that saves a third of the start, and 700 MiB.
    """

    options: Callable[[Launch], Sequence[str]]
    has_plugin: bool = False

    def command(self, launch: Launch) -> list[str]:
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", launch.model, "--served-model-name", launch.served_model_name]
        words += ["--host", launch.host, "--port", str(launch.port)]
        words += ["--enable-prompt-tokens-details", "--enable-per-request-metrics"]
        words += ["--disable-uvicorn-access-log"]  # the middleware logs each request
        words += option_words(
            {
                "--max-model-len": launch.max_model_len,
                "--load-format": launch.load_format,
                "--dtype": launch.dtype,
            }
        )
        if not launch.compile:
            words += ["--enforce-eager"]
        if launch.profile == "cpu" and not launch.binds_threads:
            words += ["--distributed-executor-backend", WORKER_IN_ENGINE]
        words += _gpu_memory(launch)
        words += self.options(launch)
        return [*words, "--middleware", "kvarena.server.vllm_middleware.AccessMiddleware"]  # the last is the outermost

    def environment(self, launch: Launch) -> dict[str, str]:
        environment = {
            **COMMON_ENVIRONMENT,
            "VLLM_CACHE_ROOT": str(launch.vllm_cache_dir),
            "TORCHINDUCTOR_CACHE_DIR": str(launch.cache_dir / "inductor"),
            **_hub_environment(launch),
            CONTENDER_VARIABLE: launch.name,
        }
        if launch.profile == "cpu":
            # vLLM 0.32 saves what it compiles ahead of time for a CPU and can't load it again, so that each start
            # compiles anew; without that, Inductor's own cache is found again.
            environment["VLLM_USE_AOT_COMPILE"] = "0"
        if not launch.compile:  # --enforce-eager is for the model; samplers would be compiled at their first request
            environment["TORCHDYNAMO_DISABLE"] = "1"
        if not self.has_plugin:
            environment["VLLM_PLUGINS"] = ""
        if launch.profile == "gpu":
            return environment | {"CUDA_VISIBLE_DEVICES": launch.gpu}
        if launch.binds_threads:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, launch.omp_cpus))
        return environment | _cpu_environment(launch) | {"VLLM_CPU_KVCACHE_SPACE": str(launch.kv_cache_gb)}

    def packages(self, launch: Launch) -> dict[str, str]:
        return {"vllm": launch.profile}

    def kv_cache_gb(self, launch: Launch) -> float:
        return launch.kv_cache_gb or 0 if launch.profile == "cpu" else 0

    def gpu_bytes(self, launch: Launch, weight_bytes: int, total_bytes: int) -> int:
        if launch.kv_cache_gb is not None:
            return weight_bytes + (launch.kv_cache_gb << 30)
        return int(GPU_MEMORY_RATIO / launch.servers_per_gpu * total_bytes)


def option_of(name: str) -> str:
    """`cache_gb` is `--cache-gb`."""
    return f"--{name.replace('_', '-')}"


def own_options(launch: Launch) -> Options:
    """The contender's own settings as options."""
    if not is_dataclass(launch.settings):
        return {}
    return {option_of(key.name): getattr(launch.settings, key.name) for key in fields(launch.settings)}


@dataclass(frozen=True)
class EngineServer:
    """A server over `kvarena.server`, started as `python -m MODULE`. `options` are its own, after the common ones; one
    of these that it hasn't is None there.
    """

    module: str
    options: Callable[[Launch], Options] = own_options

    def command(self, launch: Launch) -> list[str]:
        words = [sys.executable, "-m", self.module]
        words += ["--model", launch.model, "--served-model-name", launch.served_model_name]
        words += ["--host", launch.host, "--port", str(launch.port)]
        words += ["--device", "cuda" if launch.profile == "gpu" else "cpu"]
        common = {"--max-model-len": launch.max_model_len, "--load-format": launch.load_format, "--dtype": launch.dtype}
        return words + option_words({**common, **self.options(launch)})

    def environment(self, launch: Launch) -> dict[str, str]:
        share = {"CUDA_VISIBLE_DEVICES": launch.gpu} if launch.profile == "gpu" else _cpu_environment(launch)
        return {**COMMON_ENVIRONMENT, **_hub_environment(launch), **share}

    def packages(self, launch: Launch) -> dict[str, str]:
        return {"transformers": launch.profile}

    def kv_cache_gb(self, launch: Launch) -> float:
        return 0

    def gpu_bytes(self, launch: Launch, weight_bytes: int, total_bytes: int) -> int:
        return weight_bytes


def option_words(options: Options) -> list[str]:
    return [word for option, value in options.items() if value is not None for word in (option, str(value))]


def _gpu_memory(launch: Launch) -> list[str]:
    if launch.profile == "cpu":
        return []
    if launch.kv_cache_gb is not None:
        return ["--kv-cache-memory-bytes", str(launch.kv_cache_gb * GIB)]
    return ["--gpu-memory-utilization", f"{GPU_MEMORY_RATIO / launch.servers_per_gpu:.2f}"]


def _cpu_environment(launch: Launch) -> dict[str, str]:
    """A server shares its cores: with processes of its own, and with other servers. OpenMP's threads that wait for work
    awake take them from whoever has some.
    """
    if not launch.omp_cpus:
        return {}
    wait_policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {"OMP_NUM_THREADS": str(len(launch.omp_cpus)), "OMP_WAIT_POLICY": wait_policy}


def _hub_environment(launch: Launch) -> dict[str, str]:
    environment = {}
    if launch.hf_home is not None:
        environment["HF_HOME"] = str(launch.hf_home)
    if launch.is_local:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment
