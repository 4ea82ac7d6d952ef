"""The blend: a prompt's KV from the KV of its chunks, by the model's own unchanged forward pass.

Fill the cache with the moved chunk KV of all layers, then give the model the selected tokens only, at their true
positions: in every layer their fresh keys and values replace the old ones and attend, causally, to everything before
them. That is CacheBlend (Yao et al., arXiv 2405.16444) layer by layer, with the engine's own kernels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kvarena.reuse.evidence import BlendEvidence
from kvarena.reuse.moving import moved_kv
from kvarena.reuse.params import BlendParams
from kvarena.reuse.plan import Chunk, ReusePlan
from kvarena.reuse.prefilled import PrefilledModel
from kvarena.reuse.selection import make_policy
from kvarena.reuse.store import ChunkStore

logger = logging.getLogger(__name__)


@dataclass
class BlendReport:
    """What one blend did: tokens by origin, store look-ups by outcome, milliseconds by stage."""

    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    store_hits: int = 0
    store_misses: int = 0
    store_errors: int = 0
    fetch_ms: float = 0.0
    prefill_chunks_ms: float = 0.0
    write_ms: float = 0.0
    recompute_ms: float = 0.0
    blend_ms: float = 0.0
    spans: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + 1e3 * (time.perf_counter() - start))


@dataclass(frozen=True)
class Blender:
    """Blends prompts over one store."""

    store: ChunkStore

    @torch.inference_mode()
    def blend(
        self,
        model: PrefilledModel,
        plan: ReusePlan,
        start: int,
        end: int,
        params: BlendParams,
        *,
        store_new: bool = True,
    ) -> BlendReport:
        """Fill the cache of `[start, end)`; what stands before `start` is there already.

        Whatever the store loses or the model has no room for is computed as part of the prompt. After an unexpected
        failure the whole range is computed, so the answer is right in every case. `store_new`: whether KV that is
        computed here is put into the store.
        """
        report = BlendReport()
        with report.timed("blend_ms"):
            try:
                self._blend(model, plan.clipped(start, end), start, end, params, store_new, report)
            except Exception:
                logger.exception("blend failed; computing all of the prompt's tokens %d to %d", start, end)
                report.store_errors += 1
                _count(report, ReusePlan(), start, end, num_recomputed=0)
                model.forward(torch.arange(start, end))
        return report

    def _blend(
        self,
        model: PrefilledModel,
        wanted: ReusePlan,
        start: int,
        end: int,
        params: BlendParams,
        store_new: bool,
        report: BlendReport,
    ) -> None:
        kv = self._fetch(wanted, report)
        self._prefill_missing(model, wanted, kv, store_new, report)
        plan = ReusePlan(tuple(span for span in wanted if span.chunk in kv))
        pieces = [kv[span.chunk][:, :, span.offset : span.offset + len(span)] for span in plan]
        with report.timed("write_ms"):
            _write(model, plan, pieces)
        with report.timed("recompute_ms"):
            first = start if params.recomputes_all else _exact_end(plan, start)
            inexact = plan.clipped(first, end)
            pieces = pieces[len(plan.spans) - len(inexact.spans) :]
            evidence = BlendEvidence(model, inexact, pieces, first, end)
            selection = make_policy(params).select(inexact, evidence)
            gaps = [torch.arange(low, high) for low, high in plan.gaps(first, end)]
            positions = torch.cat([selection.positions, *gaps]).sort().values
            computed = model.forward(positions, selection.narrowings) if len(positions) else positions
        _count(report, plan, start, end, num_recomputed=len(computed) - sum(map(len, gaps)))

    def _fetch(self, plan: ReusePlan, report: BlendReport) -> dict[Chunk, torch.Tensor]:
        chunks = list(dict.fromkeys(span.chunk for span in plan))
        errors = self.store.stats.errors
        with report.timed("fetch_ms"):
            found = self.store.get_many(chunks)
        kv = {chunk: tensor for chunk, tensor in zip(chunks, found, strict=True) if tensor is not None}
        report.store_hits += len(kv)
        report.store_misses += len(chunks) - len(kv)
        report.store_errors += self.store.stats.errors - errors
        return kv

    def _prefill_missing(
        self,
        model: PrefilledModel,
        plan: ReusePlan,
        kv: dict[Chunk, torch.Tensor],
        store_new: bool,
        report: BlendReport,
    ) -> None:
        """Compute missing chunks that stand whole in the prompt, each alone, and keep them."""
        missing = list(dict.fromkeys(s.chunk for s in plan if s.chunk not in kv and s.is_whole_chunk))
        if not missing:
            return
        with report.timed("prefill_chunks_ms"):
            computed = model.prefill_alone([chunk.token_ids for chunk in missing])
        for chunk, tensor in zip(missing, computed, strict=True):
            if tensor is None:
                continue
            kv[chunk] = tensor
            if store_new:
                with report.timed("fetch_ms"):
                    self.store.put(chunk, tensor)


def _write(model: PrefilledModel, plan: ReusePlan, pieces: Sequence[torch.Tensor]) -> None:
    """Move every span's KV `(2, L, T, H_kv * D)` to its place in the prompt, and write it into the cache."""
    for span, piece in zip(plan, pieces, strict=True):
        keys, values = moved_kv(model, span, piece)
        for layer in range(len(model.rotations)):
            model.write(layer, span.start, keys[layer], values[layer])


def _exact_end(plan: ReusePlan, start: int) -> int:
    """Where the tokens end that are reused in their own place behind their own context: nothing there deviates."""
    begins_prompt = start == 0 and plan.spans and plan.spans[0].start == plan.spans[0].offset == 0
    return plan.spans[0].end if begins_prompt else start


def _count(report: BlendReport, plan: ReusePlan, start: int, end: int, *, num_recomputed: int) -> None:
    report.num_recomputed_tokens = num_recomputed
    report.num_reused_tokens = plan.num_reused_tokens - num_recomputed
    report.num_computed_tokens = end - start - plan.num_reused_tokens
    report.spans = [(span.start, span.end) for span in plan]
