"""What must be true before anything is started, checked in an order that puts the cheapest cause first.

Each check raises `StackError` with one message: what is wrong, the numbers, and what to do.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvarena.client import Client, ClientError, Refused
from kvarena.contenders.servers import GIB
from kvarena.contenders.spec import LMCACHE_SERVER, ContenderSpec
from kvarena.home import StackError
from kvarena.model import check_hub_access
from kvarena.stack import machine
from kvarena.stack.lmcache_l2 import folder_of
from kvarena.stack.plan import Plan
from kvarena.stack.processes import SHARED_MEMORY, listener_of
from kvarena.stack.service import HOST, Service
from kvarena.stack.settings import CONTENDERS, SPECS

REQUEST_TIMEOUT_S = 5.0
SERVER_OVERHEAD_BYTES = 3 * GIB // 2
LMCACHE_OVERHEAD_BYTES = GIB // 2
PAGE_BYTES = GIB // 4


Check = tuple[str, Callable[[], None]]
"""What is looked at, in words, and the function that does it."""


def checks_before_start(plan: Plan, services: Iterable[Service], token: str | None) -> Iterator[Check]:
    """Every check for the services that are about to be started."""
    services = list(services)
    yield "path", partial(check_install_path, sys.prefix)
    yield "packages", partial(check_packages, plan)
    yield "documents", partial(check_data_folder, plan.data_dir)
    yield "ports", partial(check_ports, services)
    yield "model", partial(check_model, plan, services, token)
    if any(service.name in plan.contenders for service in services):
        yield "memory", lambda: check_memory(estimate_memory(plan), machine.available_memory_bytes())
    yield "GPU memory", partial(check_gpu_memory, plan, services)
    if any(service.name == LMCACHE_SERVER for service in services):
        yield "shared memory", partial(check_shared_memory, plan.lmcache_gb)
        yield "second tier", partial(check_lmcache_l2, plan.lmcache_l2)


def run_all(checks: Iterable[Check]) -> None:
    for _, check in checks:
        check()


def check_model(plan: Plan, services: Iterable[Service], token: str | None) -> None:
    """It suits the contenders among the services, and it is here or the hub gives it to us."""
    names = {service.name for service in services}
    starting = [spec for spec in plan.specs if spec.name in names]
    for spec in starting:
        check_model_type(spec, plan.model.name, plan.model.architecture(plan.hf_home))
    if starting and plan.model.is_on_hub:
        check_hub_access(plan.model.name, token, plan.hf_home)


def check_packages(plan: Plan) -> None:
    launches = [(spec, plan.launch(spec.name)) for spec in plan.specs]
    needed: dict[str, str] = {}
    for spec, launch in launches:
        needed |= spec.server.packages(launch)
    for spec, launch in launches:
        needed |= spec.packages(launch)
    if plan.page:
        needed["streamlit"] = "ui"
    if missing := [package for package in needed if find_spec(package) is None]:
        extras = ",".join(sorted({needed[package] for package in missing}))
        raise StackError(
            f"not installed: {', '.join(missing)}; run ./run-server.sh, which sets everything up, or "
            f"pip install -e '.[{extras}]'"
        )
    if machine.installed_vllm() not in (plan.profile, None):
        raise StackError(
            f"this environment has vLLM for the other profile, not for {plan.profile}; "
            f"run ./run-server.sh up --profile {plan.profile}"
        )


def check_install_path(prefix: str) -> None:
    """The loader and PyTorch's compiler cut paths at white space."""
    if any(character.isspace() for character in prefix):
        raise StackError(
            f"vLLM can't run from {prefix!r}, because of the white space in it; move the project elsewhere"
        )


def check_api_key(running: Iterable[Service], api_key: str) -> None:
    """What runs keeps the key that it was started with; a service that doesn't answer hasn't refused this one."""
    for service in running:
        if service.name not in CONTENDERS:
            continue
        try:
            with Client(service.address, api_key, REQUEST_TIMEOUT_S) as client:
                client.get("/v1/models")
        except ClientError as error:
            if isinstance(error, Refused) and error.status == HTTPStatus.UNAUTHORIZED:
                raise StackError(
                    f"{service.name} is running with another KVARENA_API_KEY: set the one that it was started with, or "
                    "stop the stack first (./run-server.sh stop, or kvarena down) and start it with the new one"
                ) from error


def check_data_folder(folder: Path) -> None:
    """It is there. Files in it that can't be used are shown when the chunk cache is filled, and on the page."""
    if not folder.is_dir():
        raise StackError(f"there is no data folder at {folder}; make it, or name another with --data")


def check_ports(services: Iterable[Service]) -> None:
    for service in services:
        for port in (service.port, *service.other_ports):
            if not is_free(port):
                holder = listener_of(port)
                raise StackError(
                    f"port {port} for {service.name} is taken{f' by {holder}' if holder else ''}; "
                    "stop that, or choose other ports with --port-base or in .env"
                )


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def check_model_type(spec: ContenderSpec, model: str, architecture: str) -> None:
    """What isn't on this machine yet is for the server itself to refuse."""
    if spec.model_types and architecture not in (*spec.model_types, ""):
        raise StackError(
            f"the contender {spec.name} needs a model of type {' or '.join(spec.model_types)}; {model} is of type "
            f"{architecture}. Take another --model, or leave {spec.name} out of --contenders"
        )


@dataclass(frozen=True)
class MemoryNeed:
    """What the stack may take when everything is full."""

    weight_bytes: int
    kv_cache_bytes: int
    prefix_bytes: int
    store_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.prefix_bytes + self.store_bytes + self.process_bytes


def estimate_memory(plan: Plan) -> MemoryNeed:
    """Main memory only: on a GPU and a card the weights and the KV cache are not in it."""
    num_servers = len(plan.contenders)
    num_with_weights = len(plan.sharing) if plan.profile == "cpu" else 0
    launches = [(spec, plan.launch(spec.name)) for spec in plan.specs]
    return MemoryNeed(
        weight_bytes=num_with_weights * plan.weight_bytes,
        kv_cache_bytes=int(sum(spec.server.kv_cache_gb(launch) for spec, launch in launches) * GIB),
        prefix_bytes=int(sum(spec.cache_gb(launch) for spec, launch in launches) * GIB),
        store_bytes=int((plan.lmcache_gb if plan.needs_lmcache else 0) * GIB)
        + int(sum(spec.chunk_store_gb(launch) for spec, launch in launches) * GIB),
        process_bytes=num_servers * SERVER_OVERHEAD_BYTES
        + (LMCACHE_OVERHEAD_BYTES if plan.needs_lmcache else 0)
        + (PAGE_BYTES if plan.page else 0),
    )


def check_memory(need: MemoryNeed, available_bytes: int) -> None:
    if need.total_bytes <= available_bytes:
        return
    raise StackError(
        f"too little memory: the stack may need {_gib(need.total_bytes)} "
        f"(model weights {_gib(need.weight_bytes)}, KV caches {_gib(need.kv_cache_bytes + need.prefix_bytes)}, "
        f"the chunk store {_gib(need.store_bytes)}, the processes {_gib(need.process_bytes)}) and "
        f"{_gib(available_bytes)} is available; set KV_CACHE_GB, PREFIX_CACHE_GB or LMCACHE_GB lower, start fewer "
        "--contenders, or take a smaller --model"
    )


def check_gpu_memory(plan: Plan, services: Iterable[Service]) -> None:
    """Of each GPU, for the services that are about to be started; one whose free memory nobody tells is passed over."""
    names = {service.name for service in services}
    starting = [name for name in plan.sharing if name in names] if plan.gpus else []
    gpus = {str(gpu.index): gpu for gpu in machine.gpus()}
    launches = [plan.launch_on_its_share(name) for name in starting]
    for index, gpu in gpus.items():
        here = [launch for launch in launches if launch.gpu == index]
        if not here or gpu.free_mib is None or gpu.total_mib is None:
            continue
        total_bytes, free_bytes = gpu.total_mib << 20, gpu.free_mib << 20
        shares = [SPECS[launch.name].server.gpu_bytes(launch, plan.weight_bytes, total_bytes) for launch in here]
        told = f"GPU {index} ({gpu.name}) has {_gib(free_bytes)} of {_gib(total_bytes)} free"
        if plan.weight_bytes > min(shares):
            raise StackError(
                f"{told}, and a server's share is {_gib(min(shares))}: less than the model's weights of "
                f"{_gib(plan.weight_bytes)}. Take a smaller --model, fewer --contenders, or a GPU for each"
            )
        if sum(shares) > free_bytes:
            raise StackError(
                f"{told}, and {' and '.join(launch.name for launch in here)} would take {_gib(sum(shares))} "
                f"(weights {_gib(plan.weight_bytes)} each). End what else runs there, set KV_CACHE_GB to bound the KV "
                "cache, or take a smaller --model"
            )


def check_shared_memory(lmcache_gb: float, folder: Path = SHARED_MEMORY) -> None:
    free = shutil.disk_usage(folder).free
    if free < lmcache_gb * GIB:
        raise StackError(
            f"LMCache keeps its {lmcache_gb:g} GiB in {folder}, where {_gib(free)} is free; "
            "set LMCACHE_GB lower, or make that file system larger"
        )


def check_lmcache_l2(adapter: Mapping[str, Any] | None) -> None:
    """A folder is made where there is none, and written to; other second tiers are for LMCache to reach."""
    folder = folder_of(adapter)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StackError(
            f"LMCACHE_L2 is the folder {folder}, which can't be made or written: {error.strerror}; "
            "name another, or let the user write there who starts the stack"
        ) from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
