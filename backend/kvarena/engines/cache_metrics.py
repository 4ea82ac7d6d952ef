"""Prometheus figures of an engine's cache, read from it when `/metrics` is asked for.

What was cleared with its counts starts at 0 again, as Prometheus' counters may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class CacheFigures:
    """`num_entries` and `num_bytes` are what is kept now, the others counts so far."""

    num_hits: int
    num_misses: int
    num_evictions: int
    num_entries: int
    num_bytes: int


class CachingEngine(Protocol):
    model_name: str

    def cache_figures(self) -> CacheFigures: ...


class CacheCollector(Collector):
    """`kvarena_cache_*`, with vLLM's labels."""

    def __init__(self, engine: CachingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        figures, labels = self._engine.cache_figures(), [self._engine.model_name, "0"]
        names = ["model_name", "engine"]
        lookups = CounterMetricFamily(
            "kvarena_cache_lookups", "Look-ups of prompts by outcome.", labels=[*names, "outcome"]
        )
        lookups.add_metric([*labels, "hits"], figures.num_hits)
        lookups.add_metric([*labels, "misses"], figures.num_misses)
        yield lookups
        evictions = CounterMetricFamily("kvarena_cache_evictions", "Entries that made room for others.", labels=names)
        evictions.add_metric(labels, figures.num_evictions)
        yield evictions
        entries = GaugeMetricFamily("kvarena_cache_entries", "Prompts that are kept.", labels=names)
        entries.add_metric(labels, figures.num_entries)
        yield entries
        num_bytes = GaugeMetricFamily("kvarena_cache_bytes", "Memory of what is kept.", labels=names)
        num_bytes.add_metric(labels, figures.num_bytes)
        yield num_bytes
