"""Prometheus metrics of a server: vLLM's names where vLLM has the metric, and the origin of the prompts' tokens.

Each server has a registry of its own. An engine that has more to tell registers its collectors there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvarena.engines.base import TOKEN_COUNTS
from kvarena.server.log import Outcome

_LABELS = ("model_name", "engine")
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


MEMORY_AGE_S = 2.0


def memory_bytes() -> int:
    """Main memory of this process and all those below it: what each has alone, and once what they share."""
    own = shared = 0
    this = psutil.Process()
    children: list[psutil.Process] = []
    with suppress(psutil.Error):
        children = this.children(recursive=True)
    for process in (this, *children):
        with suppress(psutil.Error):  # it has ended meanwhile
            memory = process.memory_info()
            own += memory.rss - memory.shared
            shared = max(shared, memory.shared)
    return own + shared


class ServerMemory(Collector):
    """`kvarena_server_memory_bytes`. `process_resident_memory_bytes` is the API's process alone: vLLM has others below
    it, for the engine and its workers. Looked up every `MEMORY_AGE_S` at most: the machine's processes are all read.
    """

    def __init__(self) -> None:
        self._value, self._read_s = 0, -math.inf

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if time.monotonic() > self._read_s + MEMORY_AGE_S:
            self._value, self._read_s = memory_bytes(), time.monotonic()
        yield GaugeMetricFamily(
            "kvarena_server_memory_bytes", "Main memory of all of the server's processes.", value=self._value
        )


class Metrics:
    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self._values = (model_name, "0")
        ProcessCollector(registry=self.registry)
        self.registry.register(ServerMemory())
        self._running = self._gauge("vllm:num_requests_running", "Requests that are being generated.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for their turn.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens whose KV was reused.")
        self._generated_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._origins = Counter(
            "kvarena_prompt_tokens", "Prompt tokens by origin.", (*_LABELS, "origin"), registry=self.registry
        )
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests by the reason of their end.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._first_token_s = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_S
        )
        self._per_token_s = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", _PER_TOKEN_S
        )
        self._request_s = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", _REQUEST_S)
        self._queue_s = self._histogram("vllm:request_queue_time_seconds", "Arrival to start.", _REQUEST_S)
        sizes = _sizes(max_model_len)
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._request_generated = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", sizes
        )
        self._show_zeros()

    @contextmanager
    def running(self) -> Iterator[None]:
        with _counted(self._running):
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        with _counted(self._waiting):
            yield

    def observe(self, outcome: Outcome, arrived_at: float) -> None:
        """A generation that has ended, however it ended."""
        report = outcome.report
        self._prompt_tokens.inc(report.num_prompt_tokens)
        self._cached_tokens.inc(report.num_reused_tokens)
        self._generated_tokens.inc(outcome.num_tokens)
        for name in TOKEN_COUNTS:
            self._origins.labels(*self._values, name.split("_")[1]).inc(getattr(report, name))
        self._finished.labels(*self._values, outcome.finish).inc()
        if outcome.refused:
            return
        self._request_s.observe(outcome.ended_at - arrived_at)
        self._queue_s.observe(outcome.started_at - arrived_at)
        self._request_prompt.observe(report.num_prompt_tokens)
        self._request_generated.observe(outcome.num_tokens)
        if outcome.first_token_at is not None and outcome.last_token_at is not None:
            self._first_token_s.observe(outcome.first_token_at - arrived_at)
            if outcome.num_tokens > 1:
                decode_s = outcome.last_token_at - outcome.first_token_at
                self._per_token_s.observe(decode_s / (outcome.num_tokens - 1))

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _show_zeros(self) -> None:
        """Series are there from the start, at 0, as rates need."""
        for name in TOKEN_COUNTS:
            self._origins.labels(*self._values, name.split("_")[1])
        for reason in ("stop", "length", "abort", "refused", "error"):
            self._finished.labels(*self._values, reason)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self.registry).labels(*self._values)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(*self._values)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self.registry, buckets=buckets).labels(*self._values)


@contextmanager
def _counted(gauge: Gauge) -> Iterator[None]:
    gauge.inc()
    try:
        yield
    finally:
        gauge.dec()


def _sizes(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the model's context, as vLLM has them."""
    steps = (mantissa * 10**exponent for exponent in range(12) for mantissa in (1, 2, 5))
    return tuple(float(step) for step in steps if step <= max(largest, 1))
