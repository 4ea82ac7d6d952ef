"""Servers for one measurement: those of the stack on all cores each, without vLLM's prefix cache, and gone afterwards.

They run in a folder of their own beside the stack's, on free ports, so that a running stack isn't touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from kvarena.bench.console import choice_among
from kvarena.stack import machine
from kvarena.stack.home import Home
from kvarena.stack.interrupts import stop_signals_ignored, stop_signals_raise
from kvarena.stack.lifecycle import bring_up
from kvarena.stack.machine import CoreShare
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import check_before_start, is_free
from kvarena.stack.record import Record
from kvarena.stack.runner import Runner
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import PORT_OFFSETS, load_settings
from kvarena.stack.supervision import running_supervisor
from kvarena.stack.teardown import stop_everything
from kvarena.vllm_plugin.config import STORES

HF = "hf"
WHOLE_PROMPT_TOKENS = 1 << 30
PORT_BASES = range(20_000, 60_000, 600)


@dataclass(frozen=True)
class OwnServers:
    """How servers are started. `store_gb` is the blend's memory for chunks, `kv_cache_gb` vLLM's for requests (None:
    as the stack has it), both in GiB; `with_hf` adds Hugging Face with SDPA; `dtype` is what all compute in (None: as
    the stack chooses).
    """

    store: str = "lmcache"
    store_gb: float = 4.0
    kv_cache_gb: int | None = None
    with_hf: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        choice_among("store", self.store, STORES)

    @contextmanager
    def running(
        self, folder: str, has_random_weights: bool, max_model_len: int, console: Console
    ) -> Iterator[tuple[Record, Runner]]:
        """Started on a model's folder and healthy; stopped at the end of the block, however it ends.

        Raises `StackError` with the reason when one doesn't start.
        """
        outer = Home(Home.find().path / "bench")
        home = Home(outer.path / "ttft")
        with outer.lock(), stop_signals_raise():
            stop_everything(home, console)  # what a benchmark that was killed left behind
            plan = self.plan(home, folder, has_random_weights, max_model_len)
            record = Record(tuple(own_services(plan, home)), "", str(plan.data_dir), plan.model.served_name)
            try:
                bring_up(
                    record,
                    home,
                    console,
                    check=lambda new: check_before_start(plan, new, None),
                    secrets=load_settings().secrets,
                )
                started, supervisor = running_supervisor(home)
                assert started is not None, "it was started just now"
                assert supervisor is not None, "it was started just now"
                yield started, supervisor
            finally:
                with stop_signals_ignored():
                    stop_everything(home, console)

    def plan(self, home: Home, folder: str, has_random_weights: bool, max_model_len: int) -> Plan:
        """Requests take turns, so every server may use the whole machine."""
        plan = make_plan(
            load_settings(
                contenders=("blend", "plain", *(["prefix"] if self.with_hf else [])),
                model=folder,
                load_format="dummy" if has_random_weights else None,
                max_model_len=max_model_len,
                kv_cache_gb=self.kv_cache_gb,
                dtype=self.dtype,
                lmcache_gb=self.store_gb,
                port_base=free_port_base(),
                ui=False,
            ),
            home,
        )
        blend = replace(plan.blend, store=self.store, store_bytes=int(self.store_gb * 2**30), index_path="")
        return replace(
            plan,
            blend=blend,
            core_shares=tuple(_all_cores() * len(plan.core_shares)),
            prefix_caching=False,
            prefix_cache_gb=0.0,
        )

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "chunk_store": self.store,
            "store_gb": self.store_gb,
            "has_prefix_caching": False,
            "num_threads": len(_all_cores()[0].omp_cpus),
        }


def own_services(plan: Plan, home: Home) -> list[Service]:
    """Bound to no share of the cores: those that are make way for others on the machine."""
    services = [_as_hf(one, home) if one.name == "prefix" else one for one in build_services(plan, home)]
    return [replace(service, cpus=()) for service in services]


def _all_cores() -> list[CoreShare]:
    return machine.share_cores(machine.physical_cores(), 1)


def _as_hf(prefix: Service, home: Home) -> Service:
    """The PyTorch server without its cache: Hugging Face's own forward, over a whole prompt at once."""
    command = (*prefix.command, "--piece-tokens", str(WHOLE_PROMPT_TOKENS))
    return replace(prefix, name=HF, title="Hugging Face with SDPA", command=command, log_path=str(home.log(HF)))


def free_port_base() -> int:
    """Raises `ValueError` when there is none."""
    for base in PORT_BASES:
        if all(is_free(base + offset) for offset in PORT_OFFSETS.values()):
            return base
    raise ValueError(f"no free ports from {PORT_BASES.start} to {PORT_BASES.stop}")
