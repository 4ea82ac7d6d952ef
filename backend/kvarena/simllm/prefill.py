"""One prompt's prefill with inter-task KV reuse, for who draws the answer's tokens itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvarena.engines.hf_model import HFModel
from kvarena.reuse.plan import as_token_ids
from kvarena.simllm.aligned import AlignedReuse
from kvarena.simllm.manager import TaskMatch, TaskSearch
from kvarena.simllm.outcome import TaskOutcome
from kvarena.simllm.task_kv import TaskKV

FIRST_CAPACITY_TOKENS = 256


@dataclass(frozen=True)
class TaskPrefill:
    """`kv` is filled with the whole prompt, and `HFModel.decode` goes on from it; `logits` `(V,)` are behind the
    prompt's last token. `num_positions` are taken in the context: in mode "top_layer" the earlier prompt's are too.
    """

    kv: Any
    logits: torch.Tensor
    outcome: TaskOutcome
    num_positions: int


@dataclass(frozen=True)
class TaskPrefiller:
    """Over a `LlamaForCausalLMWithKVReuse` that has its manager. `aligned` None is mode "top_layer".

    What is computed goes in pieces, so that other requests' tokens go in between.
    """

    model: HFModel
    aligned: AlignedReuse | None

    def prefill(
        self,
        token_ids: Sequence[int],
        task_id: str,
        max_new_tokens: int,
        *,
        salt: str = "",
        similarity_threshold: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> TaskPrefill:
        """Searches, reuses, and keeps what is exact. A task is used that leaves room for `max_new_tokens`.

        `similarity_threshold` None is the manager's own. Raises `Cancelled` when it was given up or the model closed.
        """
        if self.aligned is not None:
            return self._aligned(self.aligned, token_ids, task_id, salt, similarity_threshold, is_cancelled)
        kv = self.model.module.new_task_kv(
            [task_id], max_new_tokens=max_new_tokens, salt=salt, similarity_threshold=similarity_threshold
        )
        search = self.model.run(self._search, token_ids, kv)
        if search.match is not None:
            output = self.model.run(self.model.forward, token_ids, past_key_values=kv, use_cache=True)
            return TaskPrefill(kv, output.logits[0, -1], kv.outcomes[0], int(kv.offsets) + len(token_ids))
        computed = self.prefill_without_reuse(token_ids, task_id, is_cancelled)
        self.model.run(self._keep, token_ids, search.embedding, computed, salt)
        return self.model.run(self._checked, token_ids, search.check, computed) if search.check else computed

    def prefill_without_reuse(
        self, token_ids: Sequence[int], task_id: str, is_cancelled: Callable[[], bool] = lambda: False
    ) -> TaskPrefill:
        kv = self.model.new_kv(len(token_ids) + FIRST_CAPACITY_TOKENS)
        logits = self.model.prefill(kv, token_ids, is_cancelled)
        num_passes = len(token_ids) * self.model.kv_shape.num_layers
        return TaskPrefill(kv, logits, TaskOutcome(task_id, len(token_ids), num_passes), len(token_ids))

    def _search(self, token_ids: Sequence[int], kv: TaskKV) -> TaskSearch:
        (search,) = kv.searches = [self.model.module.model.search_task(self._tensor(token_ids), kv)]
        return search

    def _keep(self, token_ids: Sequence[int], embedding: torch.Tensor, computed: TaskPrefill, salt: str) -> None:
        outcome = computed.outcome
        keys, values = computed.kv.filled(0, outcome.num_prompt_tokens)[-1][:, None]  # (1, H_kv, T, D) each
        self.model.module.model.keep_task(outcome.task_id, as_token_ids(token_ids), embedding, (keys, values), salt)

    def _checked(self, token_ids: Sequence[int], match: TaskMatch, computed: TaskPrefill) -> TaskPrefill:
        ids, logits = self._tensor(token_ids), computed.logits
        return replace(computed, outcome=self.model.module.checked(computed.outcome, match, ids, logits))

    def _tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.model.kv_shape.device)

    def _aligned(
        self,
        aligned: AlignedReuse,
        token_ids: Sequence[int],
        task_id: str,
        salt: str,
        similarity_threshold: float | None,
        is_cancelled: Callable[[], bool],
    ) -> TaskPrefill:
        capacity = len(token_ids) + FIRST_CAPACITY_TOKENS
        task = self.model.run(aligned.begin, token_ids, task_id, capacity, salt, similarity_threshold)
        kv = task.kv or self.model.new_kv(capacity)
        logits = self.model.prefill(kv, token_ids[kv.length :], is_cancelled)
        outcome = self.model.run(aligned.outcome_of, task, logits)
        self.model.run(aligned.keep, task, kv.filled(0, len(token_ids)), salt)
        return TaskPrefill(kv, logits, outcome, len(token_ids))
