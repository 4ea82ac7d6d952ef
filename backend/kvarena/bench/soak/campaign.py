"""The course of a soak run, and what has to hold after it.

1. `plain` answers every prompt alone: these are the references.
2. The rehearsal: the streams without faults, in which everything that grows with use grows. What processes hold
   afterwards (descriptors, threads, memory) is what they may hold at the end; a service that was killed meanwhile is
   compared with the one before.
3. The streams with faults.
4. Everybody goes home: what is left (also requests and locks) is looked at until it is as it was, for two minutes at
   most; and counters have to add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from kvarena.bench.console import read_target, table_of
from kvarena.bench.results import Row, spread
from kvarena.bench.soak.faults import Faults, Struck, http_of, until
from kvarena.bench.soak.streams import TIE_MARGIN, WRONG, Load, Prompt, PromptMaker, Target, ask_alone
from kvarena.client import AsyncClient, ClientError
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.documents import FALLBACK_SEPARATOR, Documents, load_documents
from kvarena.engines.base import TOKEN_COUNTS
from kvarena.home import Home, StackError
from kvarena.model import TOWN, find_model
from kvarena.panels.panel import REFERENCE
from kvarena.stack.chunk_cache import read_documents
from kvarena.stack.health import probe
from kvarena.stack.processes import processes_of
from kvarena.stack.record import Record
from kvarena.stack.service import Runner, Service
from kvarena.stack.settings import SPECS, shown_api_key
from kvarena.stack.supervisord import running_supervisor

REHEARSAL_RATIO = 0.2
LONGEST_REHEARSAL_S = 60.0
FINDS_AGAIN_S = 60.0


@dataclass(frozen=True)
class SoakServer:
    """A contender to put under load."""

    name: str
    url: str
    api_key: str = ""


@dataclass(frozen=True)
class Stack:
    """What runs on this machine, in processes."""

    home: Home
    record: Record
    runner: Runner


def of_targets(targets: Sequence[str], data: Path | None) -> tuple[list[SoakServer], Documents, None]:
    """Servers elsewhere, given as NAME=URL, and the documents to ask about."""
    servers = [SoakServer(*read_target(target), shown_api_key()) for target in targets]
    return servers, load_documents(data or find_model(TOWN, "cpu").data_dir), None


def of_stack(has_faults: bool, console: Console) -> tuple[list[SoakServer], Documents, Stack | None]:
    """The running stack's vLLM servers. Raises `StackError` where none runs, or its processes can't be struck."""
    home = Home.find()
    record, runner = running_supervisor(home)
    if record is None or runner is None:
        raise StackError("nothing is running; start the stack with ./run-server.sh, or name servers with --target")
    if record.compose and has_faults:
        raise StackError("the stack runs in containers, whose processes can't be stopped from here; use --faults none")
    servers = [
        SoakServer(service.name, service.address, shown_api_key())
        for service in record.services
        if (spec := SPECS.get(service.name)) and spec.is_vllm
    ]
    stack = None if record.compose else Stack(home, record, runner)
    return servers, read_documents(record, console), stack


@dataclass
class Outcome:
    """What a run found. `rows` has an entry for each contender."""

    rows: list[Row]
    checks: list[Check]
    struck: list[Struck] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.is_ok]


@dataclass(frozen=True)
class Soak:
    """`seconds` is the time of the streams with faults. `tie_margin` is in logits. `faults` are kinds of
    `faults.FAULTS`; none without a stack. `timeout_s` is the longest that one request may take.
    """

    servers: Sequence[SoakServer]
    documents: Documents
    stack: Stack | None
    faults: Sequence[str]
    seconds: float
    num_streams: int = 32
    num_prompts: int = 60
    tie_margin: float = TIE_MARGIN
    timeout_s: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        if REFERENCE not in (server.name for server in self.servers):
            raise ValueError(f"answers are compared with those of {REFERENCE}, which is not among the servers")

    @property
    def rehearsal_s(self) -> float:
        return min(LONGEST_REHEARSAL_S, self.seconds * REHEARSAL_RATIO)

    @property
    def num_steps(self) -> int:
        """References, and seconds."""
        return self.num_prompts + int(self.rehearsal_s) + int(self.seconds)

    def settings(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("servers", "documents", "stack")}
        contenders = [server.name for server in self.servers]
        return {"benchmark": "soak", "contenders": contenders, **own, "rehearsal_s": self.rehearsal_s}

    async def run(self, advance: Callable[[], None]) -> Outcome:
        """Raises `ClientError` when a server doesn't answer at the beginning."""
        async with AsyncExitStack() as clients:
            targets = [await self._target(server, clients) for server in self.servers]
            plain = next(target for target in targets if target.name == REFERENCE)
            prompts = self._prompts(targets)
            references = []
            for prompt in prompts:
                references.append(await ask_alone(plain.client, plain.info.model, prompt, self.timeout_s))
                advance()
            load = Load(
                targets,
                prompts,
                references,
                tie_margin=self.tie_margin,
                timeout_s=self.timeout_s,
                seed=self.seed,
            )
            return await self._soak(load, advance)

    async def _target(self, server: SoakServer, clients: AsyncExitStack) -> Target:
        client = AsyncClient(server.url, server.api_key, 2 * self.timeout_s)
        clients.push_async_callback(client.aclose)
        return Target(server.name, client, await client.describe(), server.api_key)

    def _prompts(self, targets: Sequence[Target]) -> list[Prompt]:
        separators = [target.info.separator for target in targets]
        separator = next((one for one in separators if one is not None), FALLBACK_SEPARATOR)
        texts = [chunk.text for chunk in self.documents.chunks]
        longest = max(target.info.max_model_len or 0 for target in targets)
        maker = PromptMaker(texts, self.documents.system, separator, longest, self.seed)
        return maker.prompts(self.num_prompts)

    async def _soak(self, load: Load, advance: Callable[[], None]) -> Outcome:
        home, record = (self.stack.home, self.stack.record) if self.stack else (Home.find(), None)
        async with _ticking(advance, self.rehearsal_s):
            await load.run("rehearsal", self.num_streams, self.rehearsal_s)
        await load.end()
        before = await look(load.targets, home, record)
        struck: list[Struck] = []
        async with _ticking(advance, self.seconds):
            streams = load.run("campaign", self.num_streams, self.seconds)
            if self.stack:
                faults = Faults(home, self.stack.record, self.stack.runner, load, self.faults, self.seed)
                struck = faults.struck
                await asyncio.gather(streams, faults.run(self.seconds))
            else:
                await streams
        await load.end()
        again = [await _finds_again(load, target) for target in load.targets if target.is_blend]
        await load.end()
        found = [check for target in load.targets for check in answered(target)]
        found += [*came_back(struck), *again]
        found += await settle(load.targets, home, record, before)
        for target in load.targets:
            if target.has_reports:
                found += await counted(target, before)
        return Outcome([_row(target) for target in load.targets], found, struck, load.findings)


async def _finds_again(load: Load, target: Target) -> Check:
    """The chunk cache works; after a fault of LMCache the blend may take some seconds to connect again."""
    hits = await until(lambda: load.finds_again(target), bool, FINDS_AGAIN_S, POLL_S)
    return Check("chunks found again", target.name, hits, "at least 1", hits > 0)


@asynccontextmanager
async def _ticking(advance: Callable[[], None], seconds: float) -> AsyncIterator[None]:
    """Advances once a second, and so many times in all."""

    async def tick() -> None:
        for _ in range(int(seconds)):
            await asyncio.sleep(1)
            advance()

    ticks = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticks.cancel()


def _row(target: Target) -> Row:
    outcomes = {f"num_{name.replace(' ', '_')}": count for name, count in sorted(target.outcomes.items())}
    return {
        "contender": target.name,
        "num_requests": target.outcomes.total() - target.outcomes["without report"],
        **outcomes,
        "num_compared_tokens": target.num_compared_tokens,
        "largest_logprob_shift": round(target.largest_shift, 6),
        "largest_tie": round(target.largest_tie, 6),
        "ttft_ms": spread(target.ttft_ms),
    }


METRICS_TIMEOUT_S = 30.0
SETTLE_S = 120.0
LOCKS_S = 360.0
"""LMCache gives a lock up after 300 s (`read_ttl_seconds`). Until then it has those of servers that were killed, and of
its own connector for vLLM, which asks for no release while LMCache doesn't answer (docs/upstream.md).
"""
POLL_S = 2.0
MORE_DESCRIPTORS, MORE_THREADS = 8, 4
MORE_MEMORY_BYTES, MORE_MEMORY_RATIO = 128 << 20, 0.1
LARGE_MAPPING_BYTES = 96 << 20
"""Larger mappings are KV caches, whose pages become resident with their first use; the heap is not one of them."""
STORE_COUNTS = {
    "store_hits": ("kvarena_store_lookups_total", "hits"),
    "store_misses": ("kvarena_store_lookups_total", "misses"),
    "store_errors": ("kvarena_store_errors_total", ""),
}
COUNTED = {name: ("kvarena_prompt_tokens_total", name.split("_")[1]) for name in TOKEN_COUNTS} | STORE_COUNTS
"""Counts of a report, and the metric and label with their sum."""


@dataclass(frozen=True)
class Check:
    """`of` is a service. `expected` says in words what `found` has to be."""

    what: str
    of: str
    found: float
    expected: str
    is_ok: bool


def at_most(what: str, of: str, found: float, limit: float) -> Check:
    return Check(what, of, found, f"at most {limit:,.0f}" if limit else "0", found <= limit)


def equal(what: str, of: str, found: float, expected: float) -> Check:
    return Check(what, of, found, f"{expected:,.0f}", found == expected)


@dataclass(frozen=True)
class Resources:
    """Of all processes of a service together."""

    num_processes: int = 0
    num_descriptors: int = 0
    num_threads: int = 0
    memory_bytes: int = 0

    @classmethod
    def of(cls, home: Home, service: str) -> Resources:
        processes = processes_of(home, service)
        descriptors = threads = memory = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                descriptors += process.num_fds()
                threads += process.num_threads()
                memory += _private_bytes(process)
        return cls(len(processes), descriptors, threads, memory)

    def checks(self, service: str, before: Resources) -> list[Check]:
        memory_limit = before.memory_bytes * (1 + MORE_MEMORY_RATIO) + MORE_MEMORY_BYTES
        return [
            equal("processes", service, self.num_processes, before.num_processes),
            at_most("descriptors", service, self.num_descriptors, before.num_descriptors + MORE_DESCRIPTORS),
            at_most("threads", service, self.num_threads, before.num_threads + MORE_THREADS),
            at_most("memory MiB", service, self.memory_bytes >> 20, int(memory_limit) >> 20),
        ]


def _private_bytes(process: psutil.Process) -> int:
    """Memory that is the process's own, without large mappings."""
    mappings = process.memory_maps(grouped=False)
    return sum(
        mapping.private_clean + mapping.private_dirty
        for mapping in mappings
        if mapping.size < LARGE_MAPPING_BYTES or mapping.path == "[heap]"
    )


Metrics = Mapping[tuple[str, str], float]
"""Sums over engines and models, by name and by the label that tells series apart, if there is one."""


async def read_metrics(url: str) -> Metrics:
    async with httpx.AsyncClient(trust_env=False, timeout=METRICS_TIMEOUT_S) as http:
        text = (await http.get(f"{url}/metrics")).raise_for_status().text
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("origin") or sample.labels.get("outcome") or "")
            sums[key] = sums.get(key, 0.0) + sample.value
    return sums


@dataclass(frozen=True)
class Before:
    """How things were after the rehearsal, at the time `at_s`."""

    at_s: float
    resources: Mapping[str, Resources]
    metrics: Mapping[str, Metrics]


async def look(targets: Sequence[Target], home: Home, record: Record | None) -> Before:
    services = record.services if record else ()
    return Before(
        time.monotonic(),
        {service.name: await asyncio.to_thread(Resources.of, home, service.name) for service in services},
        {target.name: await read_metrics(target.client.url) for target in targets},
    )


async def settle(targets: Sequence[Target], home: Home, record: Record | None, before: Before) -> list[Check]:
    """The checks of what is left, as soon as all hold, or after `SETTLE_S`; those of locks after `LOCKS_S`."""

    async def all_but_locks() -> list[Check]:
        found = [check for target in targets for check in await _requests_left(target)]
        return found + (await _services_left(home, record, before) if record else [])

    async def locks() -> list[Check]:
        lmcache = record.service(LMCACHE_SERVER) if record else None
        return await _locks_left(lmcache) if lmcache else []

    locks_until_s = time.monotonic() + LOCKS_S
    found = await until(all_but_locks, _all_hold, SETTLE_S, POLL_S)
    return found + await until(locks, _all_hold, locks_until_s - time.monotonic(), POLL_S)


def _all_hold(found: Sequence[Check]) -> bool:
    return all(check.is_ok for check in found)


async def _requests_left(target: Target) -> list[Check]:
    """Requests that a server still has, and KV cache that belongs to none."""
    try:
        metrics = await read_metrics(target.client.url)
    except httpx.HTTPError as error:
        return [Check("metrics", target.name, 0, f"an answer ({type(error).__name__})", False)]
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return [at_most(name, target.name, metrics.get((name, ""), 0.0), 0) for name in names]


async def _services_left(home: Home, record: Record, before: Before) -> list[Check]:
    found = []
    for service in record.services:
        is_healthy = await asyncio.to_thread(probe, service) == "healthy"
        found.append(equal("healthy", service.name, is_healthy, True))
        now = await asyncio.to_thread(Resources.of, home, service.name)
        found += now.checks(service.name, before.resources[service.name])
    return found


async def _locks_left(service: Service) -> list[Check]:
    """Chunks that LMCache can't evict."""
    try:
        async with http_of(service) as client:
            status = await client.lmcache_memory()
    except ClientError as error:
        return [Check("status", service.name, 0, f"an answer ({error})", False)]
    return [
        at_most(name, service.name, status[name], 0)
        for name in ("read_locked_count", "write_locked_count", "staging_object_count")
    ]


async def counted(target: Target, before: Before) -> list[Check]:
    """The parts of each report against its prompt, and the sums of reports against `/metrics`: of requests since the
    server's present process runs, or since the rehearsal. What a server's reports don't tell isn't compared.
    """
    is_new = target.alive_since > before.at_s
    since_s = target.alive_since if is_new else before.at_s
    reports = [report for sent_s, report in target.reports if sent_s >= since_s]
    odd = [report for _, report in target.reports if not _adds_up(report)]
    found = [at_most("reports whose parts aren't their prompt", target.name, len(odd), 0)]
    now, then = await read_metrics(target.client.url), {} if is_new else before.metrics[target.name]
    for name, key in COUNTED.items():
        told = [report[name] for report in reports if name in report]
        if told:
            in_metrics = now.get(key, 0.0) - then.get(key, 0.0)
            found.append(equal(f"{name} in /metrics", target.name, in_metrics, sum(told)))
    return found


def _adds_up(report: Mapping[str, Any]) -> bool:
    parts = [int(report[name]) for name in TOKEN_COUNTS]
    return min(parts) >= 0 and sum(parts) == int(report["num_prompt_tokens"])


def answered(target: Target) -> list[Check]:
    """No answer differs from the reference's, failed, or is still awaited."""
    wrong = [at_most(f"answers {outcome}", target.name, target.outcomes[outcome], 0) for outcome in WRONG]
    return [*wrong, Check("tokens compared", target.name, (num := target.num_compared_tokens), "at least 1", num > 0)]


def came_back(struck: Sequence[Struck]) -> list[Check]:
    """Every service, after every fault."""
    return [equal(f"back after {fault.kind}", fault.service, False, True) for fault in struck if fault.back_s is None]


def show_outcome(outcome: Outcome, console: Console) -> None:
    names = dict.fromkeys(name for row in outcome.rows for name in row if name.startswith("num_"))
    rows = [dict.fromkeys(names, 0) | row for row in outcome.rows]
    figures = {name.removeprefix("num_").replace("_", " "): f"{{{name}:,}}" for name in names}
    figures["TTFT ms"] = "{ttft_ms[median]:,.0f}"
    console.print(table_of("Answers", rows, {"contender": "{contender}"}, figures))
    if outcome.struck:
        struck = [vars(fault) | {"away_s": fault.back_s and fault.back_s - fault.at_s} for fault in outcome.struck]
        figures = {"after s": "{at_s:.0f}", "healthy after s": "{away_s:.1f}"}
        console.print(table_of("Faults", struck, {"service": "{service}", "fault": "{kind}"}, figures))
    if outcome.failed:
        failed = [vars(check) for check in outcome.failed]
        texts = {"service": "{of}", "what": "{what}", "expected": "{expected}"}
        console.print(table_of("What doesn't hold", failed, texts, {"found": "{found:,.0f}"}))
    for finding in outcome.findings:
        console.print(finding, markup=False, highlight=False, soft_wrap=True)
    num_ok = len(outcome.checks) - len(outcome.failed)
    console.print(f"{num_ok} of {len(outcome.checks)} checks hold.", highlight=False)
