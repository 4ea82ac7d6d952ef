"""A prompt's KV and logits with known chunks blended in: plan, blend up to the last chunk's end, prefill the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvarena.engines.blend.blendable import BlendableModel
from kvarena.engines.blend.prefilled import HFPrefilledModel
from kvarena.engines.hf_model import HFModel
from kvarena.engines.sequence_kv import SequenceKV
from kvarena.reuse.blender import Blender
from kvarena.reuse.matcher import ChunkIndex
from kvarena.reuse.params import BlendParams
from kvarena.reuse.plan import ReusePlan, TokenIds, as_token_ids
from kvarena.reuse.planner import Planner
from kvarena.reuse.report import BlendReport
from kvarena.reuse.segmenter import Segmenter
from kvarena.reuse.store import ChunkStore


@dataclass(frozen=True)
class BlendedPrefill:
    """`kv` is filled with the whole prompt, and `HFModel.decode` goes on from it; `logits` `(V,)` are behind the
    prompt's last token; the counts of `report` add up to the prompt's tokens.
    """

    kv: SequenceKV
    logits: torch.Tensor
    report: BlendReport


class HFBlender:
    """Blends prompts over one model and one store, and gets to know every chunk that a separator marks.

    Raises `UnsupportedModel` for a model that can't be blended.
    """

    def __init__(self, model: HFModel, store: ChunkStore, *, separator: str, min_chunk_tokens: int = 16) -> None:
        self._model = model
        self._blendable = BlendableModel(model)
        self._blender = Blender(store)
        self._index = ChunkIndex()
        self._planner = Planner(self._index, min_chunk_tokens=min_chunk_tokens)
        self._segmenter = Segmenter(model.tokenizer, separator)

    def prefill(
        self, token_ids: Sequence[int], params: BlendParams, capacity: int, *, budget_ms: float | None = None
    ) -> BlendedPrefill:
        """`capacity`: tokens that the KV has room for from the start; it grows. `budget_ms`: as of `Blender.blend`.

        Raises `ValueError` for a check layer that the model doesn't have, `Cancelled` when the model was closed.
        """
        params.check_for(self._model.kv_shape.num_layers)
        kv = self._model.new_kv(capacity)
        report = self._model.run(self._blend, as_token_ids(token_ids), params, kv, budget_ms)
        rest = token_ids[kv.length :]
        report.num_computed_tokens += len(rest)
        return BlendedPrefill(kv, self._model.prefill(kv, rest, is_cancelled=lambda: False), report)

    def _blend(self, token_ids: TokenIds, params: BlendParams, kv: SequenceKV, budget_ms: float | None) -> BlendReport:
        """Fills `kv` as far as there is something to reuse."""
        plan = self._plan(token_ids)
        end = self._planner.blend_end(plan, 0, len(token_ids) - 1)
        if not end:
            return BlendReport()
        prompt = HFPrefilledModel(self._blendable, token_ids[:end], kv)
        return self._blender.blend(prompt, plan.clipped(0, end), 0, end, params, budget_ms=budget_ms)

    def _plan(self, token_ids: TokenIds) -> ReusePlan:
        """In the model's thread, to which the index belongs."""
        plan = self._planner.plan(token_ids, self._segmenter.segments(token_ids))
        for span in plan:
            if span.is_whole_chunk:
                self._index.add(span.chunk)
        return plan
