"""The KV of a batch of prompts of which some start from an earlier task's last layer.

| layer | a prompt that missed | a prompt that hit |
|---|---|---|
| below the last | its tokens and the answer's | the answer's tokens only |
| the last | its tokens and the answer's | the earlier prompt's, then its own tokens, then the answer's |

All rows of a layer are equally long: what a row doesn't have is zeros that its mask leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvarena.simllm.entry import KnownTask
from kvarena.simllm.growing_layer import GrowingLayer
from kvarena.simllm.manager import TaskMatch, TaskSearch
from kvarena.simllm.outcome import TaskOutcome


class TaskKV(DynamicCache):
    """Differs from `DynamicCache` in that layers have different lengths, grow without copies, and in a prefill that
    runs some rows only.

    `task_ids` name the prompts, one for each row. An earlier task is used when its salt is the same, and when its
    prompt, the new one and `max_new_tokens` have room in `max_positions`. `similarity_threshold` None is the manager's.
    The prefill searches where `searches` are not there yet; after it there are `outcomes`, and `checks`: by row, an
    earlier task and the prompt `(T,)` for which its reuse is still to be compared with full prefill.
    """

    def __init__(
        self,
        config: Any,
        task_ids: Sequence[str],
        *,
        max_positions: int,
        max_new_tokens: int = 0,
        salt: str = "",
        similarity_threshold: float | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layers: list[GrowingLayer] = [GrowingLayer() for _ in range(config.num_hidden_layers)]
        self.task_ids = tuple(task_ids)
        self.salt = salt
        self.similarity_threshold = similarity_threshold
        self.searches: Sequence[TaskSearch] = ()
        self.outcomes: list[TaskOutcome] = []
        self.checks: dict[int, tuple[TaskMatch, torch.Tensor]] = {}
        self._max_tokens = max_positions - max_new_tokens
        self._missed = torch.ones(len(task_ids), dtype=torch.bool)
        self._earlier_mask = torch.zeros(len(task_ids), 0, dtype=torch.bool)
        self._num_prompt_columns = 0
        self._is_prefilling = False

    @property
    def has_begun(self) -> bool:
        return self._num_prompt_columns > 0

    @property
    def top(self) -> int:
        """The number of the last layer."""
        return len(self.layers) - 1

    @property
    def num_columns(self) -> int:
        """How many tokens every row was given so far, padding included."""
        num_tokens: int = self.get_seq_length(self.top)
        return num_tokens - self._earlier_mask.shape[1]

    @property
    def running(self) -> torch.Tensor:
        """The rows `(B_run,)` that go through the layers below the last: in the prefill those that missed."""
        rows = torch.arange(len(self.task_ids), device=self._missed.device)
        return rows[self._missed] if self._is_prefilling else rows

    @property
    def offsets(self) -> torch.Tensor:
        """`(B, 1)`: how far a row's positions are moved, by the length of the earlier prompt before it."""
        return self._earlier_mask.sum(-1, keepdim=True)

    def can_use(self, task: KnownTask, num_tokens: int) -> bool:
        return task.salt == self.salt and task.num_tokens + num_tokens <= self._max_tokens

    def begin(self, matches: Sequence[TaskMatch | None], like: torch.Tensor, num_prompt_columns: int) -> None:
        """Put the earlier tasks' KV before the prompts, at its right end. `like`: of the model's type and device."""
        longest = max((match.entry.num_tokens for match in matches if match), default=0)
        self._is_prefilling = True
        self._num_prompt_columns = num_prompt_columns
        self._missed = torch.tensor([match is None for match in matches], device=like.device)
        self._earlier_mask = torch.zeros(len(matches), longest, dtype=torch.bool, device=like.device)
        if not longest:
            return
        _, num_heads, _, head_size = next(match.entry.top_layer_kv[0].shape for match in matches if match)
        earlier = like.new_zeros(2, len(matches), num_heads, longest, head_size)
        for row, match in enumerate(matches):
            if match is None:
                continue
            start = longest - match.entry.num_tokens
            self._earlier_mask[row, start:] = True
            for part, tensor in zip(earlier, match.entry.top_layer_kv, strict=True):
                part[row, :, start:] = tensor[0].to(like)
        super().update(earlier[0], earlier[1], self.top)

    def end_prefill(self) -> None:
        self._is_prefilling = False

    def mask_below(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which of the tokens in the layers below the last are there, `(B_run, T_kv)`."""
        prompt, answer = attention_mask.tensor_split([self._num_prompt_columns], dim=1)
        if self._missed.any():
            return torch.cat([prompt * self._missed[:, None], answer], dim=1)[self.running]
        return answer

    def mask_top(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which of the tokens in the last layer are there, `(B, T_kv)`."""
        return torch.cat([self._earlier_mask.to(attention_mask), attention_mask], dim=1)

    def prompt_top_layer_kv(self, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's own prompt in the last layer, keys and values `(1, H_kv, T, D)`. To be asked after the prefill."""
        layer: Any = self.layers[self.top]
        end = self._earlier_mask.shape[1] + self._num_prompt_columns
        own = slice(end - num_tokens, end)
        return layer.keys[row : row + 1, :, own], layer.values[row : row + 1, :, own]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicCache`; below the last layer a prefill's keys and values are those of the running rows."""
        if not self._is_prefilling or layer_idx == self.top or self._missed.all():
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx)
            return updated
        for_all_rows = key_states.new_zeros(2, len(self.task_ids), *key_states.shape[1:])
        for_all_rows[0, self.running] = key_states
        for_all_rows[1, self.running] = value_states
        super().update(for_all_rows[0], for_all_rows[1], layer_idx)
        return key_states, value_states
