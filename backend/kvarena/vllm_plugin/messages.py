"""What travels between the two halves of the connector, and from there to the API server. All of it pickles."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvarena.reuse.params import BlendParams
from kvarena.reuse.plan import ReusePlan, TokenIds
from kvarena.reuse.report import BlendReport


@dataclass(frozen=True)
class BlendJob:
    """Scheduler to worker: fill `[start, end)` of a prompt in its own blocks, before this step's forward.

    `block_ids` has the blocks of each of vLLM's groups of layers. `budget_ms`, from the beginning of the step's blends:
    the time that decides on the ratio.
    """

    request_id: str
    token_ids: TokenIds
    block_ids: tuple[list[int], ...]
    start: int
    end: int
    plan: ReusePlan
    params: BlendParams
    store_new: bool
    budget_ms: float | None = None


@dataclass
class BlendJobs(KVConnectorMetadata):
    """The jobs of one step, in the order in which their requests were scheduled."""

    jobs: list[BlendJob] = field(default_factory=list)


@dataclass
class BlendRefusal(KVConnectorHandshakeMetadata):
    """Worker to scheduler, at start: why this model can't be blended."""

    reason: str


@dataclass
class BlendReports(KVConnectorWorkerMetadata):
    """Worker to scheduler: what the jobs of one step did, by request id."""

    reports: dict[str, BlendReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, BlendReports)
        return BlendReports({**other.reports, **self.reports})


@dataclass
class RequestReport:
    """What a request's prompt was made of; the API's `kvarena` object (docs/http.md)."""

    request_id: str
    params: BlendParams
    approximate: bool
    num_prompt_tokens: int
    max_ttft_ms: float | None = None
    num_prefix_tokens: int = 0
    blend: BlendReport | None = None

    def as_dict(self) -> dict[str, Any]:
        blend = self.blend or BlendReport()
        reused = self.num_prefix_tokens + blend.num_reused_tokens
        times = {name: round(value, 3) for name, value in asdict(blend).items() if name.endswith("_ms")}
        known = {"store_entries": blend.store_entries, "store_bytes": blend.store_bytes}
        ratio = self.params.ratio if blend.ratio is None else blend.ratio
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
            "store_hits": blend.store_hits,
            "store_misses": blend.store_misses,
            "store_errors": blend.store_errors,
            "store_evictions": blend.store_evictions,
            **sizes,
            "blend_failures": blend.blend_failures,
            **times,
            "spans": self._spans(blend),
        }

    def _spans(self, blend: BlendReport) -> list[dict[str, Any]]:
        reused = [(0, self.num_prefix_tokens, "prefix"), *((start, end, "reused") for start, end in blend.spans)]
        spans: list[tuple[int, int, str]] = []
        position = 0
        for start, end, source in [*reused, (self.num_prompt_tokens, self.num_prompt_tokens, "")]:
            spans += [(position, start, "computed"), (start, end, source)]
            position = end
        return [{"start": start, "end": end, "source": source} for start, end, source in spans if start < end]
