"""What this run of the stack will be: the settings, with everything that they leave to the machine decided.

`make_plan` picks the profile and its model, takes what nobody set from the model's own settings, and divides cores or
GPUs between the servers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvarena.contenders.servers import Launch, Shared
from kvarena.contenders.spec import LMCACHE_SERVER, ContenderSpec
from kvarena.engines.vllm.config import BlendConfig
from kvarena.home import Home, StackError, project_root
from kvarena.model import DEFAULT_CARD_MODEL, FALLBACK_NOTICE, TOWN, Model, find_model, hub_folder
from kvarena.policies.params import read_blend_profile
from kvarena.stack import machine
from kvarena.stack.lmcache_l2 import NO_L2, folder_adapter, l2_adapter
from kvarena.stack.machine import CoreShare
from kvarena.stack.service import LOOPBACK, Network
from kvarena.stack.settings import SPECS, Settings

DEFAULT_CPU_KV_CACHE_GB = 1
HALF_PRECISION = ("bfloat16", "float16")
FLOAT32_MEMORY_RATIO = 0.5
"""Unasked, weights are served in float32 where they take at most this share of the free memory."""


@dataclass(frozen=True, kw_only=True)
class Plan(Shared):
    """`core_shares` has one entry per contender on a CPU and none on a GPU; `gpus` the other way round (fewer when
    they share); one on a card is in neither. `notice` is what a user should know of it, empty where there is nothing.
    """

    contenders: tuple[str, ...]
    page: bool
    model: Model
    ports: Mapping[str, int]
    data_dir: Path
    chunk_tokens: int
    results_dir: Path
    lmcache_l2: dict[str, Any] | None
    of_contenders: Mapping[str, Any]
    notice: str
    core_shares: tuple[CoreShare, ...]
    gpus: tuple[str, ...]
    network: Network = LOOPBACK

    @property
    def specs(self) -> tuple[ContenderSpec, ...]:
        """Of the contenders, in their order."""
        return tuple(SPECS[name] for name in self.contenders)

    @property
    def needs_lmcache(self) -> bool:
        """Whether the LMCache server is started."""
        return any(LMCACHE_SERVER in spec.needs(self.launch(spec.name)) for spec in self.specs)

    @property
    def weight_bytes(self) -> int:
        """Of one server's weights; 0 if unknown."""
        is_widened = self.dtype == "float32" and self.model.dtype(self.hf_home) in HALF_PRECISION
        return self.model.weight_bytes(self.hf_home) * (2 if is_widened else 1)

    @property
    def tokenizer_place(self) -> str:
        """The folder that has the model's `tokenizer.json`, or where the hub's cache will have it."""
        return self.model.name if self.model.is_local else str(hub_folder(self.model.name, self.hf_home))

    @property
    def sharing(self) -> tuple[str, ...]:
        """The contenders that divide the cores or the GPUs."""
        return tuple(spec.name for spec in self.specs if not spec.on_card(self.launch(spec.name)))

    def cpus(self, name: str) -> tuple[int, ...]:
        """The logical CPUs that a contender stays on; none: any."""
        return self.core_shares[self.sharing.index(name)].cpus if self.core_shares and name in self.sharing else ()

    def before_on_a_gpu(self, name: str) -> tuple[str, ...]:
        """The contenders that start before one with which it shares a GPU: vLLM measures free memory as it starts."""
        index = self.sharing.index(name) if name in self.sharing else 0
        return self.sharing[:index] if self.gpus and index >= len(self.gpus) else ()

    def launch(self, name: str) -> Launch:
        """What a contender is told of the plan, but for its share of the machine."""
        return Launch(
            **{own.name: getattr(self, own.name) for own in dataclasses.fields(Shared)},
            name=name,
            settings=self.of_contenders[name],
            host=self.network.listen,
            port=self.ports[name],
            model=self.model.name,
            served_model_name=self.model.served_name,
            is_local=self.model.is_local,
            has_some_windows=self.model.has_some_windows(self.hf_home),
            data_dir=self.data_dir if self.data_dir.is_dir() else None,
        )

    def launch_on_its_share(self, name: str) -> Launch:
        """The same with the cores or the GPU that the contender has."""
        if name not in self.sharing:
            return self.launch(name)
        index = self.sharing.index(name)
        if self.profile == "gpu":
            gpu, servers_per_gpu = self.gpus[index % len(self.gpus)], -(-len(self.sharing) // len(self.gpus))
            return dataclasses.replace(self.launch(name), gpu=gpu, servers_per_gpu=servers_per_gpu)
        share = self.core_shares[index]
        return dataclasses.replace(self.launch(name), omp_cpus=share.omp_cpus, binds_threads=share.spares_core)


def make_plan(settings: Settings, home: Home, network: Network = LOOPBACK) -> Plan:
    """Raises `StackError` for a model that isn't there, a bad model profile, and a GPU profile without a GPU."""
    profile, gpus = pick_profile(settings.profile)
    on_cpu = profile == "cpu"
    model = find_model(settings.model or _model_of_the_card(settings, profile), profile)
    num_servers = len(settings.contenders) - uses_card(settings)
    shares = machine.share_cores(machine.physical_cores(), num_servers) if on_cpu and num_servers else []
    return Plan(
        contenders=settings.contenders,
        page=settings.ui,
        profile=profile,
        model=model,
        blend=_blend_config(settings, model, home, network),
        blend_engine=_blend_engine(settings, on_cpu),
        ports=settings.ports,
        data_dir=_data_dir(settings, model),
        chunk_tokens=settings.chunk_tokens,
        results_dir=settings.results_dir,
        hf_home=settings.local_hf_home,
        cache_dir=home.cache,
        vllm_cache_dir=Path(os.environ.get("VLLM_CACHE_ROOT") or home.cache / "vllm"),
        lmcache_gb=settings.lmcache_gb,
        lmcache_l2=_second_tier(settings, home),
        of_contenders={name: _own_settings(settings, name) for name in SPECS},
        kv_cache_gb=settings.kv_cache_gb or (DEFAULT_CPU_KV_CACHE_GB if on_cpu else None),
        max_model_len=settings.max_model_len,
        load_format=settings.load_format,
        dtype=_dtype(settings, model, on_cpu),
        compile=not on_cpu or machine.has_compiler(),
        notice=FALLBACK_NOTICE if settings.model is None and on_cpu and model.served_name == TOWN else "",
        core_shares=tuple(shares),
        gpus=tuple(gpus[: 1 if settings.gpu_share else num_servers]),
        network=network,
    )


def pick_profile(wanted: str) -> tuple[str, list[str]]:
    """`auto` takes the GPU when there is one and this environment's vLLM can use it. ai100 is of containers only."""
    if wanted == "ai100":
        raise StackError("PROFILE is ai100, which is for containers; take cpu, and AI100_RUNTIME=qaic for the card")
    gpus = machine.visible_gpus() if wanted != "cpu" else []
    if wanted == "auto":
        wanted = "gpu" if gpus and machine.installed_vllm() == "gpu" else "cpu"
    if wanted == "gpu" and not gpus:
        raise StackError("PROFILE is gpu, and nvidia-smi shows no GPU on this machine; use --profile cpu")
    return wanted, gpus if wanted == "gpu" else []


def uses_card(settings: Settings) -> bool:
    """Whether `ai100` runs on a Cloud AI 100 card: it was told to, or may and finds one with what drives it."""
    runtime = settings.of_contender("ai100").runtime
    found = runtime in (None, "auto") and machine.cards() and find_spec("QEfficient") is not None
    return "ai100" in settings.contenders and (runtime == "qaic" or bool(found))


def _own_settings(settings: Settings, name: str) -> Any:
    own = settings.of_contender(name)
    return dataclasses.replace(own, runtime="qaic") if name == "ai100" and uses_card(settings) else own


def _model_of_the_card(settings: Settings, profile: str) -> str | None:
    """For servers on GPUs beside it, those decide."""
    is_alone = settings.contenders == ("ai100",)
    return DEFAULT_CARD_MODEL if uses_card(settings) and (profile == "cpu" or is_alone) else None


def _dtype(settings: Settings, model: Model, on_cpu: bool) -> str | None:
    """What all servers compute in, None for the model's own.

    A processor without bf16 instructions emulates them: its linear layers are several times faster in float32
    (docs/performance.md), so that is taken where the weights have room.
    """
    if settings.dtype != "auto":
        return settings.dtype
    if not on_cpu or machine.has_bf16_instructions() or model.dtype(settings.local_hf_home) not in HALF_PRECISION:
        return None
    float32_bytes = 2 * model.weight_bytes(settings.local_hf_home) * len(settings.contenders)
    return "float32" if float32_bytes <= FLOAT32_MEMORY_RATIO * machine.available_memory_bytes() else None


def _second_tier(settings: Settings, home: Home) -> dict[str, Any] | None:
    if settings.lmcache_l2 is None:
        return folder_adapter(home.chunks, settings.lmcache_l2_gb)
    if settings.lmcache_l2 == NO_L2:
        return None
    return l2_adapter(settings.lmcache_l2, settings.lmcache_l2_gb, project_root())


def _data_dir(settings: Settings, model: Model) -> Path:
    try:
        return settings.data_dir or model.data_dir
    except ValueError as error:
        raise StackError(str(error)) from error


def _blend_engine(settings: Settings, on_cpu: bool) -> str:
    if settings.blend_engine == "lmcache" and on_cpu and "blend" in settings.contenders:
        raise StackError("BLEND_ENGINE is lmcache, and LMCache's own blender needs a GPU; on a CPU it must be kvarena")
    return settings.blend_engine


def _blend_config(settings: Settings, model: Model, home: Home, network: Network) -> BlendConfig:
    try:
        profile = read_blend_profile(model.name) if model.is_local else {}
        own = {
            "separator": settings.separator,
            "sink_tokens": settings.sink_tokens,
            "seams": settings.blend_seams,
        }
        given = profile | settings.policy | {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(
            BlendConfig(**given),
            lmcache_url=f"tcp://{network.host(LMCACHE_SERVER)}:{settings.ports['lmcache_server']}",
            lmcache_http_url=f"http://{network.host(LMCACHE_SERVER)}:{settings.ports['lmcache_http']}",
            lmcache_timeout_s=settings.lmcache_timeout_s,
            index_path=str(home.chunk_index(model.name)),
            max_ttft_ms=settings.blend_max_ttft_ms,
            unsupported=settings.blend_unsupported,
        )
    except (TypeError, ValueError) as error:
        raise StackError(f"the blend's settings are wrong: {error}") from error
