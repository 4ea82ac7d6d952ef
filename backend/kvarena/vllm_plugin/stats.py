"""Figures of the blend on their way to the API server: one report per finished request, and Prometheus figures.

vLLM carries a connector's statistics from the engine's process to the API server's with every step. Ours are the
request reports themselves: there they are counted for `/metrics` and kept for `/kvarena/requests/{id}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvarena.api import store_metrics
from kvarena.api.report_log import TOKEN_COUNTS
from kvarena.vllm_plugin.reports import report_log

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

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for report in transfer_stats_data.get("requests", ()):
            report_log.add(report)
            self._count(labels, report)
            for size, gauge in self._gauges.items():
                if size in report:
                    gauge.labels(*labels).set(report[size])
            if report["blend_ms"]:
                for stage in STAGES:
                    self._seconds.labels(*labels, stage).observe(report[f"{stage}_ms"] / 1e3)

    def _count(self, labels: list[object], counts: dict[str, Any]) -> None:
        """Zeros too: a series that has not counted yet is there all the same, as rates need."""
        for name in TOKEN_COUNTS:
            self._tokens.labels(*labels, name.split("_")[1]).inc(counts[name])
        for name in LOOKUP_COUNTS:
            self._lookups.labels(*labels, name.split("_")[1]).inc(counts[name])
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(counts[name])

    def _counter(self, name: str, documentation: str, *labels: str) -> Any:
        return self._counter_cls(name=name, documentation=documentation, labelnames=[*self._labelnames, *labels])
