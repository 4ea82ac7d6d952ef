"""What a soak run leaves behind: descriptors, threads, memory, locks, requests, and counters that have to add up.

Processes are compared with what they were after a rehearsal, in which everything that grows with use has grown. A
service that was killed meanwhile is compared with the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvarena.bench.soak.faults import Struck, http_of
from kvarena.bench.soak.streams import WRONG, Target
from kvarena.client import ClientError
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.engines.base import TOKEN_COUNTS
from kvarena.home import Home
from kvarena.stack.health import probe
from kvarena.stack.processes import processes_of
from kvarena.stack.record import Record
from kvarena.stack.service import Service

METRICS_TIMEOUT_S = 30.0
SETTLE_S = 120.0
LOCKS_S = 360.0
"""LMCache gives a lock up after 300 s (`read_ttl_seconds`). Until then it has those of servers that were killed, and
those of its own connector for vLLM, which asks for no release while LMCache doesn't answer (docs/upstream.md).
"""
POLL_S = 2.0
MORE_DESCRIPTORS, MORE_THREADS = 8, 4
MORE_MEMORY_BYTES, MORE_MEMORY_RATIO = 128 << 20, 0.1
LARGE_MAPPING_BYTES = 96 << 20
"""Mappings from here on are KV caches, whose pages become resident as they are first used; but the heap is none."""
STORE_COUNTS = {
    "store_hits": ("kvarena_store_lookups_total", "hits"),
    "store_misses": ("kvarena_store_lookups_total", "misses"),
    "store_errors": ("kvarena_store_errors_total", ""),
}
COUNTED = {name: ("kvarena_prompt_tokens_total", name.split("_")[1]) for name in TOKEN_COUNTS} | STORE_COUNTS
"""Counts of a report, and the metric and its label that have their sum."""


@dataclass(frozen=True)
class Check:
    """`of` is a service. `expected` says in words what `found` has to be."""

    what: str
    of: str
    found: float
    expected: str
    is_ok: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def at_most(what: str, of: str, found: float, limit: float) -> Check:
    return Check(what, of, found, f"at most {limit:,.0f}" if limit else "0", found <= limit)


def at_least(what: str, of: str, found: float, limit: float) -> Check:
    return Check(what, of, found, f"at least {limit:,.0f}", found >= limit)


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
    """What nobody else has, without large mappings."""
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
    """The checks of what is left, once they are all right, or after `SETTLE_S`; those of locks after `LOCKS_S`."""

    async def all_but_locks() -> list[Check]:
        found = [check for target in targets for check in await _requests_left(target)]
        return found + (await _services_left(home, record, before) if record else [])

    async def locks() -> list[Check]:
        lmcache = record.service(LMCACHE_SERVER) if record else None
        return await _locks_left(lmcache) if lmcache else []

    start_s = time.monotonic()
    found = await _once_right(all_but_locks, start_s + SETTLE_S)
    return found + await _once_right(locks, start_s + LOCKS_S)


async def _once_right(look: Callable[[], Awaitable[list[Check]]], deadline_s: float) -> list[Check]:
    while True:
        found = await look()
        if all(check.is_ok for check in found) or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(POLL_S)


async def _requests_left(target: Target) -> list[Check]:
    """Those that a server still has, and KV cache that nobody has any more."""
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
    """No answer is another than the reference's, and none failed or is still awaited."""
    wrong = [at_most(f"answers {outcome}", target.name, target.outcomes[outcome], 0) for outcome in WRONG]
    return [*wrong, at_least("tokens compared", target.name, target.num_compared_tokens, 1)]


def came_back(struck: Sequence[Struck]) -> list[Check]:
    """Every service after every fault."""
    return [equal(f"back after {fault.kind}", fault.service, False, True) for fault in struck if fault.back_s is None]
