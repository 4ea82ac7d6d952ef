"""Reuse of all layers where a new prompt's tokens are a similar earlier prompt's: further than Sim-LLM goes.

The earlier prompt is a `Chunk`. The longest runs of tokens that both prompts share are spans of it, wherever they
stand; `Blender` moves their keys by rotation, and computes the rest and the share of reused tokens that deviates most,
by the model's own forward. A prompt that repeats the earlier one, or its beginning, is reused exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from kvarena.contenders.simllm.manager import InterTaskKVManager, TaskMatch, if_possible
from kvarena.contenders.simllm.params import AlignedParams
from kvarena.contenders.simllm.task import KnownTask, LayerKVShape, TaskOutcome, WholeKV
from kvarena.core.blend import Blender, BlendTask
from kvarena.core.matching import ChunkIndex
from kvarena.core.plan import Chunk, ReusePlan, TokenIds, as_token_ids
from kvarena.engines.hf.blend import BlendableModel, HFPrefilledModel
from kvarena.engines.hf.model import HFModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.policies.params import make_policy
from kvarena.stores.memory import MemoryStore


@dataclass(frozen=True)
class AlignedTask:
    """A prompt on its way: `kv` holds all but its last token, which has to give the logits.

    `is_worth_keeping`: its KV is exact, and not all of it is in the earlier task's. `tried`: the similarity and the
    first token of a reuse that is to be compared with full prefill.
    """

    token_ids: TokenIds
    embedding: torch.Tensor
    outcome: TaskOutcome
    kv: SequenceKV | None
    is_worth_keeping: bool
    tried: tuple[float, int] | None = None


class AlignedReuse:
    """Over one model and one manager. Call it in the model's thread, but for making it.

    Raises `UnsupportedModel` for a model whose keys can't be moved, `ValueError` for a manager of another model or a
    check layer that the model doesn't have.
    """

    def __init__(self, model: HFModel, manager: InterTaskKVManager, params: AlignedParams) -> None:
        shape = model.kv_shape
        params.blend.check_for(shape.num_layers)
        self._model = model
        self._embed = model.module.get_input_embeddings()
        self._blendable = BlendableModel(model)
        self._manager = manager
        self._params = params
        # Once for each earlier prompt, whether it is kept here or shared.
        self._index_of = lru_cache(manager.max_cache_size)(partial(_indexed, max(1, params.min_run_tokens // 2)))
        manager.expect(self._embed.embedding_dim, LayerKVShape(shape.num_kv_heads, shape.head_size), model.module)

    def begin(
        self,
        token_ids: Sequence[int],
        task_id: str,
        capacity: int,
        salt: str = "",
        similarity_threshold: float | None = None,
    ) -> AlignedTask:
        """Search, and on a hit all of the prompt but its last token; on a miss `kv` is None, for the caller to fill."""
        if not token_ids:
            raise ValueError("a prompt is empty; it needs at least one token")
        ids = as_token_ids(token_ids)
        embedding = self._embed(torch.from_numpy(ids).to(self._model.kv_shape.device, torch.int64)).float().mean(dim=0)
        plans: dict[Chunk, ReusePlan] = {}

        def covers_enough(task: KnownTask) -> bool:
            if task.salt != salt or task.chunk is None:
                return False
            plan = plans[task.chunk] = self._plan(task.chunk, ids)
            return plan.num_reused_tokens >= max(1, self._params.min_reused_ratio * (len(ids) - 1))

        search = self._manager.search_or_check(embedding, covers_enough, similarity_threshold)
        found = search.match or search.check
        plan = plans[found.entry.chunk] if found and found.entry.chunk else ReusePlan()
        if search.match:
            return self._reuse(ids, embedding, task_id, search.match, plan, capacity)
        passes = len(ids) * self._model.kv_shape.num_layers
        missed = AlignedTask(ids, embedding, TaskOutcome(task_id, len(ids), passes), None, True)
        return self._try_beside(missed, search.check, plan) if search.check else missed

    def outcome_of(self, task: AlignedTask, logits: torch.Tensor) -> TaskOutcome:
        """The outcome, given the logits `(V,)` after the prompt; where reuse was tried it is compared with them."""
        if task.tried is None:
            return task.outcome
        similarity, first_token = task.tried
        check = self._manager.record_check(similarity, first_token == int(logits.argmax()))
        return replace(task.outcome, check=check)

    def keep(self, task: AlignedTask, kv: torch.Tensor, salt: str = "") -> None:
        """Keeps a prompt's KV `(L, 2, H_kv, T, D)`, if it is worth it."""
        if not task.is_worth_keeping:
            return
        keys, values = kv[-1][:, None]  # (1, H_kv, T, D) each
        whole_kv = WholeKV(Chunk(task.token_ids), kv.permute(1, 0, 3, 2, 4).flatten(3))
        with if_possible(task_id := task.outcome.task_id):
            self._manager.add_task(task_id, task.embedding, (keys, values), whole_kv, salt, task.token_ids)

    def _try_beside(self, missed: AlignedTask, match: TaskMatch, plan: ReusePlan) -> AlignedTask:
        ids, outcome = missed.token_ids, missed.outcome
        reused = self._reuse(ids, missed.embedding, outcome.task_id, match, plan, len(ids))
        logits = self._model.forward(ids[-1:].tolist(), past_key_values=reused.kv, use_cache=True).logits[0, -1]
        num_passes = outcome.num_layer_passes + reused.outcome.num_layer_passes
        return replace(
            missed,
            outcome=replace(outcome, num_layer_passes=num_passes),
            tried=(match.similarity, int(logits.argmax())),
        )

    def _plan(self, chunk: Chunk, ids: TokenIds) -> ReusePlan:
        """What of the prompt the earlier one covers, its last token left out. A common beginning may be short."""
        num_tokens = self._params.min_run_tokens
        found = self._index_of(chunk).match(ids, chunk.salt, min_tokens=num_tokens)
        plan = ReusePlan(tuple(found)).clipped(0, len(ids) - 1)
        return ReusePlan(tuple(span for span in plan if len(span) >= num_tokens or span.start == span.offset == 0))

    def _reuse(
        self, ids: TokenIds, embedding: torch.Tensor, task_id: str, match: TaskMatch, plan: ReusePlan, capacity: int
    ) -> AlignedTask:
        whole_kv, blend = match.entry.whole_kv, self._params.blend
        assert whole_kv is not None, "a task without it has no plan"
        store = MemoryStore(whole_kv.kv.nbytes)
        store.put(whole_kv.chunk, whole_kv.kv)
        kv = self._model.new_kv(max(capacity, len(ids)))
        with _counted_layer_passes(self._blendable.layers) as passes:
            prompt = HFPrefilledModel(self._blendable, ids[:-1], kv)
            task = BlendTask(plan, 0, len(ids) - 1, make_policy(blend), store_new=False)
            with closing(Blender(store)) as blender:
                report = blender.blend(prompt, task)
        num_passes = sum(passes) + self._model.kv_shape.num_layers
        is_exact = plan.is_prefix or blend.recomputes_all
        outcome = TaskOutcome(
            task_id,
            len(ids),
            num_layer_passes=num_passes,
            matched_task_id=match.entry.task_id,
            similarity=match.similarity,
            is_approximate=not is_exact,
            num_reused_tokens=report.num_reused_tokens,
            num_recomputed_tokens=report.num_recomputed_tokens,
            spans=tuple(report.spans),
            matched_token_ids=match.entry.token_ids,
        )
        is_news = plan.end < len(ids) - 1 or len(ids) > match.entry.num_tokens
        return AlignedTask(ids, embedding, outcome, kv, is_exact and is_news)


def _indexed(window: int, chunk: Chunk) -> ChunkIndex:
    index = ChunkIndex(window=window)
    index.add(chunk)
    return index


@contextmanager
def _counted_layer_passes(layers: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """How many tokens each attention of these layers was run over; the look at a check layer's keys counts too."""
    passes: list[int] = []

    def count(_attention: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        passes.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handles = [layer.get_submodule("self_attn").register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
