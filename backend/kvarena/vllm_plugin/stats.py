"""Figures of the blend on their way to the API server: one report per finished request, and Prometheus counters.

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

from kvarena.api.report_log import TOKEN_COUNTS
from kvarena.vllm_plugin.reports import report_log

STORE_COUNTS = ("store_hits", "store_misses", "store_errors")
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
        for name in (*TOKEN_COUNTS, *STORE_COUNTS):
            counts[name] = sum(report[name] for report in self.requests)
        return counts


class BlendPromMetrics(KVConnectorPromMetrics):
    """`kvarena_*` on the server's `/metrics`, with vLLM's own labels (model, engine)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = self._counter("kvarena_prompt_tokens", "Prompt tokens by origin.", "origin")
        self._store = self._counter("kvarena_store_lookups", "Chunk look-ups by outcome.", "outcome")
        self._seconds = self._histogram_cls(
            name="kvarena_blend_stage_seconds",
            documentation="Time of a request's blend by stage.",
            labelnames=[*self._labelnames, "stage"],
            buckets=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
        )

    def _counter(self, name: str, documentation: str, label: str) -> Any:
        return self._counter_cls(name=name, documentation=documentation, labelnames=[*self._labelnames, label])

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for report in transfer_stats_data.get("requests", ()):
            report_log.add(report)
            for name in TOKEN_COUNTS:
                self._tokens.labels(*labels, name.split("_")[1]).inc(report[name])
            for name in STORE_COUNTS:
                self._store.labels(*labels, name.split("_")[1]).inc(report[name])
            if report["blend_ms"]:
                for stage in STAGES:
                    self._seconds.labels(*labels, stage).observe(report[f"{stage}_ms"] / 1e3)
