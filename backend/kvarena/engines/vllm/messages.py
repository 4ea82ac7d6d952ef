"""What travels from the scheduler to the workers, back, and on to the API server. All of it pickles.

Jobs and reports of one step; the report of a request (the API's `kvarena` object, docs/http.md); and the
connector's statistics, which vLLM carries to the API server's process with every step. Ours are the request reports
themselves: there they are counted for `/metrics` and kept for `/kvarena/requests/{id}`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvarena.core.blend import BlendTask
from kvarena.core.plan import TokenIds
from kvarena.core.report import BlendReport
from kvarena.engines import store_metrics
from kvarena.engines.base import TOKEN_COUNTS, MissReason, ReportLog, spans_of
from kvarena.policies.params import BlendParams, make_policy


@dataclass(frozen=True)
class BlendJob:
    """Scheduler to worker: fill a part of a prompt in its own blocks, before this step's forward.

    `token_ids` are those up to the task's end; `block_ids` has the blocks of each of vLLM's groups of layers. The
    task's `budget_ms` counts from the beginning of the step's blends. `piece_tokens`: so many tokens are run in this
    step and each of the next, while the request waits; None: all in this one.
    """

    request_id: str
    token_ids: TokenIds
    block_ids: tuple[list[int], ...]
    task: BlendTask
    piece_tokens: int | None = None
    token_scores: bool = False


@dataclass
class BlendJobs(KVConnectorMetadata):
    """The jobs of one step, in the order in which their requests were scheduled.

    `epoch` changes with each reset of vLLM's caches: KV that was stored before it isn't used any more.
    """

    jobs: list[BlendJob] = field(default_factory=list)
    epoch: str = ""


@dataclass
class BlendRefusal(KVConnectorHandshakeMetadata):
    """Worker to scheduler, at start: why this model can't be blended."""

    reason: str


@dataclass
class BlendReports(KVConnectorWorkerMetadata):
    """Worker to scheduler: what the jobs that ended in one step did, by request id."""

    reports: dict[str, BlendReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, BlendReports)
        return BlendReports({**other.reports, **self.reports})


MAX_MISSES = 32
"""So many are listed in a report; all are counted."""


@dataclass(frozen=True, order=True)
class Miss:
    """A chunk of the prompt that wasn't reused."""

    start: int
    end: int
    reason: MissReason


@dataclass
class RequestReport:
    """What a request's prompt was made of; the API's `kvarena` object (docs/http.md).

    `lookup_ms`: finding its chunks. `queue_ms`: from its arrival to its blocks, without that. `in_pieces`: its blend
    took several steps, in the time that vLLM counts as waiting.
    """

    request_id: str
    params: BlendParams
    approximate: bool
    num_prompt_tokens: int
    max_ttft_ms: float | None = None
    num_prefix_tokens: int = 0
    queue_ms: float = 0.0
    lookup_ms: float = 0.0
    in_pieces: bool = False
    blend: BlendReport | None = None
    misses: list[Miss] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        blend = self.blend or BlendReport()
        reused = self.num_prefix_tokens + blend.num_reused_tokens
        chunks = sorted([*((*s, "reused") for s in blend.spans), *((*s, "computed") for s in blend.computed_spans)])
        spans = spans_of([(0, self.num_prefix_tokens, "prefix"), *chunks], self.num_prompt_tokens)
        times = {name: round(value, 3) for name, value in asdict(blend).items() if name.endswith("_ms")}
        known = {"store_entries": blend.store_entries, "store_bytes": blend.store_bytes}
        policy = make_policy(self.params)
        asked_ratio = policy.ratio if policy.goes_by_ratio else None
        ratio = asked_ratio if blend.ratio is None else blend.ratio
        budget = {} if self.max_ttft_ms is None else {"max_ttft_ms": self.max_ttft_ms}
        sizes = {name: size for name, size in known.items() if size is not None}
        return {
            "request_id": self.request_id,
            "contender": "blend",
            "approximate": self.approximate,
            **asdict(self.params),
            "ratio": ratio,
            **budget,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_reused_tokens": reused,
            "num_recomputed_tokens": blend.num_recomputed_tokens,
            "num_computed_tokens": self.num_prompt_tokens - reused - blend.num_recomputed_tokens,
            "num_prefix_tokens": self.num_prefix_tokens,
            "num_seams": blend.num_seams,
            "unscored_chunks": blend.unscored_chunks,
            "store_hits": blend.store_hits,
            "store_misses": blend.store_misses,
            "store_errors": blend.store_errors,
            "store_evictions": blend.store_evictions,
            **sizes,
            "blend_failures": blend.blend_failures,
            "queue_ms": round(self.queue_ms, 3),
            "lookup_ms": round(self.lookup_ms, 3),
            **times,
            "in_pieces": self.in_pieces,
            "misses_by_reason": dict(Counter(miss.reason for miss in self.misses)),
            "misses": [asdict(miss) for miss in sorted(self.misses)[:MAX_MISSES]],
            "spans": [
                span | {"alone": True} if (span["start"], span["end"]) in blend.computed_spans else span
                for span in spans
            ],
            "recomputed_spans": blend.recomputed_spans,
            **({"token_scores": asdict(blend.token_scores)} if blend.token_scores else {}),
            **({"leans_on": asdict(blend.leans_on)} if blend.leans_on else {}),
        }


REPORT_WAIT_S = 1.0
_POLL_S = 0.02

report_log = ReportLog()


async def wait_for_report(request_id: str) -> dict[str, Any] | None:
    """The report of an answer that was just given, within a step of the engine; None where none comes."""
    deadline = asyncio.get_running_loop().time() + REPORT_WAIT_S
    while (report := report_log.get(request_id)) is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL_S)
    return report


LOOKUP_COUNTS = ("store_hits", "store_misses")
COUNTERS = {
    "store_errors": (store_metrics.ERRORS, "Failures to look up or to keep."),
    "store_evictions": (
        store_metrics.EVICTIONS,
        "Entries that made room for others; LMCache counts its own.",
    ),
    "blend_failures": ("kvarena_blend_failures", "Blends that failed: their prompts were computed."),
}
"""Counters without a label of their own, by their count in a report."""
GAUGES = {
    "store_entries": (store_metrics.ENTRIES, "What a store in this process keeps."),
    "store_bytes": (store_metrics.BYTES, "Memory of what a store in this process keeps."),
}
STAGES = ("fetch", "prefill_chunks", "move", "write", "select", "recompute")


@dataclass
class BlendStats(KVConnectorStats):
    """`data["requests"]`: the reports (`RequestReport.as_dict`) of the requests that finished in this interval."""

    @classmethod
    def of(cls, reports: list[dict[str, Any]]) -> BlendStats:
        return cls({"requests": reports})

    @property
    def requests(self) -> list[dict[str, Any]]:
        return list(self.data.get("requests", ()))

    def reset(self) -> None:
        self.data: dict[str, Any] = {"requests": []}

    def is_empty(self) -> bool:
        return not self.requests

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return BlendStats.of(self.requests + list(other.data.get("requests", ())))

    def reduce(self) -> dict[str, int | float]:
        """Sums over the interval, for vLLM's periodic log line."""
        counts: dict[str, int | float] = {"num_requests": len(self.requests)}
        for name in (*TOKEN_COUNTS, *LOOKUP_COUNTS, *COUNTERS):
            counts[name] = sum(report[name] for report in self.requests)
        return counts


class BlendPromMetrics(KVConnectorPromMetrics):
    """`kvarena_*` on the server's `/metrics`, with vLLM's own labels (model, engine)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = self._counter("kvarena_prompt_tokens", "Prompt tokens by origin.", "origin")
        self._lookups = self._counter(store_metrics.LOOKUPS, "Chunk look-ups by outcome.", "outcome")
        self._misses = self._counter("kvarena_chunk_misses", "Chunks of prompts that weren't reused.", "reason")
        self._counters = {count: self._counter(*named) for count, named in COUNTERS.items()}
        self._gauges = {
            size: self._gauge_cls(name=name, documentation=said, labelnames=self._labelnames)
            for size, (name, said) in GAUGES.items()
        }
        self._seconds = self._histogram_cls(
            name="kvarena_blend_stage_seconds",
            documentation="Time of a request's blend by stage.",
            labelnames=[*self._labelnames, "stage"],
            buckets=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
        )
        for labels in self.per_engine_labelvalues.values():
            self._count(labels, dict.fromkeys((*TOKEN_COUNTS, *LOOKUP_COUNTS, *COUNTERS), 0))
            for reason in get_args(MissReason):
                self._misses.labels(*labels, reason).inc(0)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for report in transfer_stats_data.get("requests", ()):
            report_log.add(report)
            self._count(labels, report)
            for reason, count in report["misses_by_reason"].items():
                self._misses.labels(*labels, reason).inc(count)
            for size, gauge in self._gauges.items():
                if size in report:
                    gauge.labels(*labels).set(report[size])
            if report["blend_ms"]:
                for stage in STAGES:
                    self._seconds.labels(*labels, stage).observe(report[f"{stage}_ms"] / 1e3)

    def _count(self, labels: list[object], counts: dict[str, Any]) -> None:
        """Zeros too: for rates a series has to be there before it counts anything."""
        for name in TOKEN_COUNTS:
            self._tokens.labels(*labels, name.split("_")[1]).inc(counts[name])
        for name in LOOKUP_COUNTS:
            self._lookups.labels(*labels, name.split("_")[1]).inc(counts[name])
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(counts[name])

    def _counter(self, name: str, documentation: str, *labels: str) -> Any:
        return self._counter_cls(name=name, documentation=documentation, labelnames=[*self._labelnames, *labels])
