"""Which servers are measured: those started for it, those of the running stack, and any OpenAI address.

Servers started for a measurement are the stack's, each on all cores and without vLLM's prefix cache, and are stopped
afterwards. They have a folder of their own beside the stack's, and free ports, so a running stack isn't touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from kvarena.bench.console import choice_among, read_target
from kvarena.bench.shapes import model_folder
from kvarena.bench.ttft import Contender
from kvarena.client import connect
from kvarena.contenders.blend import SPEC as BLEND
from kvarena.contenders.plain import SPEC as PLAIN
from kvarena.contenders.prefix.spec import SPEC as BASE_OF_HF
from kvarena.contenders.servers import GIB
from kvarena.engines.vllm.config import STORES
from kvarena.home import Home
from kvarena.stack import machine
from kvarena.stack.lifecycle import bring_up, stop_everything, stop_signals_ignored, stop_signals_raise
from kvarena.stack.machine import CoreShare
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import checks_before_start, is_free, run_all
from kvarena.stack.record import Record, command_options
from kvarena.stack.service import Runner, Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import PORT_OFFSETS, SPECS, load_settings, shown_api_key
from kvarena.stack.supervisord import running_supervisor

HF = "hf"
WHOLE_PROMPT_TOKENS = 1 << 30
PORT_BASES = range(20_000, 60_000, 600)


MEASURED = (*(name for name, spec in SPECS.items() if spec.is_vllm), HF)
OF_THIS_MACHINE = ("command", "--model", "--host", "--port")


@dataclass(frozen=True)
class Servers:
    """Servers started on `model` or `shape`, else those of `targets` (`NAME=URL`), else the running stack's, else
    servers started on the town model.

    The rest is for those that are started, `contender` beside plain. `store_gb` is the blend's memory for chunks,
    `kv_cache_gb` vLLM's for requests, both in GiB; `with_hf` adds Hugging Face with SDPA; `dtype` is what all compute
    in. None: as the stack has it.
    """

    model: str | None = None
    shape: str | None = None
    targets: Sequence[str] = ()
    timeout_s: float = 900.0
    store: str = "lmcache"
    store_gb: float = 4.0
    kv_cache_gb: int | None = None
    with_hf: bool = True
    dtype: str | None = None
    contender: str = BLEND.name

    def __post_init__(self) -> None:
        choice_among("store", self.store, STORES)

    @property
    def starts_servers(self) -> bool:
        return bool(self.model or self.shape) or not (self.targets or _stack_runs())

    @contextmanager
    def found(self, max_model_len: int, console: Console) -> Iterator[list[Contender]]:
        """Connected to; those that were started end with the block, however it ends.

        Raises `ValueError` for an address where nothing answers, a name that is there twice and contexts too long for
        a server, `StackError` for servers that don't start.
        """
        # Servers end before their clients do: what still waits for an answer is told so.
        with ExitStack() as clients, ExitStack() as servers:
            contenders = [self._connect(*read_target(target), is_target=True) for target in self.targets]
            if self.starts_servers:
                contenders += self._of_stack(*servers.enter_context(self._running(max_model_len, console)))
            elif not self.targets:
                contenders += self._of_stack(*running_supervisor(Home.find()))
            for contender in contenders:
                clients.callback(contender.close)
            _check(contenders, max_model_len)
            yield contenders

    def settings(self) -> dict[str, Any]:
        """As they go into the result file. A prefix cache that is None is as the servers have it."""
        if not self.starts_servers:
            return {"has_prefix_caching": None}
        return {
            "model": self.model or self.shape or "town",
            "chunk_store": self.store,
            "store_gb": self.store_gb,
            "has_prefix_caching": False,
            "num_threads": len(_all_cores()[0].omp_cpus),
        }

    @contextmanager
    def _running(self, max_model_len: int, console: Console) -> Iterator[tuple[Record | None, Runner | None]]:
        """Started and healthy; stopped at the end of the block, however it ends."""
        folder = model_folder(self.model, self.shape)
        outer = Home(Home.find().path / "bench")
        home = Home(outer.path / "ttft")
        with outer.lock(), stop_signals_raise():
            stop_everything(home, console)  # what a benchmark that was killed left behind
            plan = self._plan(home, folder, max_model_len)
            record = Record(tuple(own_services(plan, home)), "", str(plan.data_dir), plan.model.served_name)
            try:
                bring_up(
                    record,
                    home,
                    console,
                    check=lambda new: run_all(checks_before_start(plan, new, None)),
                    secrets=load_settings().secrets,
                )
                yield running_supervisor(home)
            finally:
                with stop_signals_ignored():
                    stop_everything(home, console)

    def _plan(self, home: Home, folder: str, max_model_len: int) -> Plan:
        """Requests take turns, so every server may use the whole machine."""
        plan = make_plan(
            load_settings(
                contenders=(self.contender, PLAIN.name, *([BASE_OF_HF.name] if self.with_hf else [])),
                model=folder,
                load_format="dummy" if self.shape else None,
                max_model_len=max_model_len,
                kv_cache_gb=self.kv_cache_gb,
                dtype=self.dtype,
                lmcache_gb=self.store_gb,
                port_base=free_port_base(),
                ui=False,
            ),
            home,
        )
        own = plan.of_contenders
        return replace(
            plan,
            blend=replace(plan.blend, store=self.store, store_bytes=int(self.store_gb * GIB), index_path=""),
            core_shares=tuple(_all_cores() * len(plan.core_shares)),
            prefix_caching=False,
            of_contenders={**own, BASE_OF_HF.name: replace(own[BASE_OF_HF.name], cache_gb=0.0)},
        )

    def _of_stack(self, record: Record | None, supervisor: Runner | None) -> Iterator[Contender]:
        assert record is not None, "the stack runs"
        assert supervisor is not None, "the stack runs"
        processes = supervisor.processes()
        for service in record.services:
            if service.name in MEASURED:
                given = {name: value for name, value in command_options(service).items() if name not in OF_THIS_MACHINE}
                yield self._connect(service.name, service.address, processes[service.name].pid, given)

    def _connect(
        self,
        name: str,
        url: str,
        pid: int | None = None,
        options: Mapping[str, str] | None = None,
        is_target: bool = False,
    ) -> Contender:
        client, server = connect(name, url, shown_api_key(), self.timeout_s)
        return Contender(name, client, server, pid, options, is_target)


def own_services(plan: Plan, home: Home) -> list[Service]:
    """Not bound to cores: bound ones make way for others on the machine."""
    services = [_as_hf(one, home) if one.name == BASE_OF_HF.name else one for one in build_services(plan, home)]
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


def _stack_runs() -> bool:
    record, supervisor = running_supervisor(Home.find())
    return supervisor is not None and record is not None and any(map(record.service, MEASURED))


def _check(contenders: Sequence[Contender], max_model_len: int) -> None:
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"two contenders have one name: {', '.join(names)}")
    for contender in contenders:
        longest = contender.server.max_model_len
        if longest is not None and longest < max_model_len:
            raise ValueError(
                f"{contender.name} takes {longest} tokens; the longest context with its question and answer has up to "
                f"{max_model_len}"
            )
