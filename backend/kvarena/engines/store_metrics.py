"""Prometheus metrics of what an engine keeps for later requests, read when `/metrics` is asked for.

The blend inside vLLM uses the same names (`kvarena.engines.vllm.messages`). Cleared counts start at 0 again, as
Prometheus' counters may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LOOKUPS = "kvarena_store_lookups"
ERRORS = "kvarena_store_errors"
EVICTIONS = "kvarena_store_evictions"
ENTRIES = "kvarena_store_entries"
BYTES = "kvarena_store_bytes"


@dataclass(frozen=True)
class StoreFigures:
    """`num_entries` and `num_bytes` are what is kept now (None: a fixed memory, whatever is in it), the others counts
    so far.
    """

    num_hits: int
    num_misses: int
    num_evictions: int
    num_entries: int
    num_bytes: int | None = None
    num_errors: int = 0


class EngineWithStore(Protocol):
    model_name: str

    def store_figures(self) -> StoreFigures: ...


class StoreCollector(Collector):
    """`kvarena_store_*`, with vLLM's labels."""

    def __init__(self, engine: EngineWithStore) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        figures, labels = self._engine.store_figures(), [self._engine.model_name, "0"]
        names = ["model_name", "engine"]
        lookups = CounterMetricFamily(LOOKUPS, "Look-ups by outcome.", labels=[*names, "outcome"])
        lookups.add_metric([*labels, "hits"], figures.num_hits)
        lookups.add_metric([*labels, "misses"], figures.num_misses)
        yield lookups
        for name, said, count in (
            (EVICTIONS, "Entries that made room for others.", figures.num_evictions),
            (ERRORS, "Failures to look up or to keep.", figures.num_errors),
        ):
            counter = CounterMetricFamily(name, said, labels=names)
            counter.add_metric(labels, count)
            yield counter
        for name, said, value in (
            (ENTRIES, "What is kept.", figures.num_entries),
            (BYTES, "Memory of what is kept.", figures.num_bytes),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, said, labels=names)
                gauge.add_metric(labels, value)
                yield gauge
