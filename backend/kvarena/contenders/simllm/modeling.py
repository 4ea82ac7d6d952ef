"""Llama with inter-task KV reuse: Sim-LLM (Luo et al., NeurIPS 2025), as subclasses of the stock classes.

**Miss**: the standard pass; then the last layer's keys and values of the prompt are kept with its embedding.

**Hit**: the prompt skips layers, and the last layer runs over the earlier prompt's KV there. The layers at the ends
that it doesn't skip are `num_end_layers`: none at the beginning and the last one (mode "top_layer"), or more at both
(mode "sandwich"). docs/simllm.md has, as a table, what each token attends to.

The new prompt stands after the earlier one, whose keys need no moving, and attends to all of it however long it is.
The KV of a batch (`TaskKV`) holds, by layer:

| layer | a prompt that missed | a prompt that hit |
|---|---|---|
| between the ends | its tokens and the answer's | the answer's tokens only |
| at the ends | its tokens and the answer's | its tokens and the answer's |
| the last | its tokens and the answer's | the earlier prompt's, then its own tokens, then the answer's |

All rows of a layer are equally long: what a row doesn't have is zeros that its mask leaves out. Nothing that was
computed on a hit is kept for later tasks, for it is approximate. The paper's Algorithm 1 says when a similar task's KV
is reused; positions, and what an answer attends to in layers that have no KV of the prompt, are settled here. Unlike
there, a miss runs the model as it is, so that it gives what the model gives. In the paper's sandwich, which is that of
Layer-Condensed KV (arXiv 2405.10637), the layers between attend to the last one's KV, which a model is trained for.
Here a hit skips them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvarena.contenders.simllm.manager import InterTaskKVManager, TaskMatch, TaskSearch, if_possible
from kvarena.contenders.simllm.params import WARNINGS
from kvarena.contenders.simllm.task import KnownTask, LayerKVShape, TaskOutcome
from kvarena.core.plan import as_token_ids
from kvarena.engines.hf.sequence_kv import grown

logger = logging.getLogger(__name__)

MIN_FREE_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """Differs from `DynamicLayer` in that a token doesn't copy what stands before it: `keys` and `values` are views.

    For sequences that only grow: the rows of a batch stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values `(B, H_kv, T, D)` after what is there; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[3])
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._memory.shape[3]:
            self._memory = grown(self._memory, start, end + MIN_FREE_TOKENS)
        self._memory[0, :, :, start:end] = key_states
        self._memory[1, :, :, start:end] = value_states
        self.keys, self.values = self._memory[:, :, :, :end]
        return self.keys, self.values


class TaskKV(DynamicCache):
    """Differs from `DynamicCache` in that layers have different lengths, grow without copies, and in a prefill that
    runs some rows only.

    `task_ids` name the prompts, one for each row; those that hit leave out the layers `skipped`. An earlier task is
    used when its salt is the same, and when its prompt, the new one and `max_new_tokens` have room in the context.
    `similarity_threshold` None is the manager's. The prefill searches where `searches` are not
    there yet; after it there are `outcomes`, and `checks`: by row, an earlier task and the prompt `(T,)` for which its
    reuse is still to be compared with full prefill.
    """

    def __init__(
        self,
        config: Any,
        task_ids: Sequence[str],
        *,
        max_new_tokens: int = 0,
        salt: str = "",
        similarity_threshold: float | None = None,
        num_end_layers: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(config=config)
        self.layers: list[GrowingLayer] = [GrowingLayer() for _ in range(config.num_hidden_layers)]
        self.task_ids = tuple(task_ids)
        self.salt = salt
        self.similarity_threshold = similarity_threshold
        self.searches: Sequence[TaskSearch] = ()
        self.outcomes: list[TaskOutcome] = []
        self.checks: dict[int, tuple[TaskMatch, torch.Tensor]] = {}
        self.num_end_layers = num_end_layers
        num_layers, (num_first, num_last) = len(self.layers), num_end_layers
        self.skipped = range(min(num_first, num_layers - 1), max(min(num_first, num_layers - 1), num_layers - num_last))
        self._max_tokens = config.max_position_embeddings - max_new_tokens
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
    def num_layers_of_a_hit(self) -> int:
        return len(self.layers) - len(self.skipped)

    @property
    def num_columns(self) -> int:
        """How many tokens every row was given so far, padding included."""
        num_tokens: int = self.get_seq_length(self.top)
        return num_tokens - self._earlier_mask.shape[1]

    @property
    def running(self) -> torch.Tensor:
        """The rows `(B_run,)` that go through the layers `skipped`: in the prefill those that missed."""
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

    def mask_skipped(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which of the tokens in the layers `skipped` are there, `(B_run, T_kv)`."""
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
        """As `DynamicCache`; in the layers `skipped` a prefill's keys and values are those of the running rows."""
        if not self._is_prefilling or layer_idx not in self.skipped or self._missed.all():
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx)
            return updated
        for_all_rows = key_states.new_zeros(2, len(self.task_ids), *key_states.shape[1:])
        for_all_rows[0, self.running] = key_states
        for_all_rows[1, self.running] = value_states
        super().update(for_all_rows[0], for_all_rows[1], layer_idx)
        return key_states, value_states


class LlamaModelWithKVReuse(LlamaModel):
    """Differs from `LlamaModel` when it is given a `TaskKV`: its first forward searches, skips layers and keeps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kv_manager: InterTaskKVManager | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Stock, unless `past_key_values` is a `TaskKV`; then `position_ids` follow from `attention_mask` `(B, T)`."""
        if not isinstance(past_key_values, TaskKV):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        assert input_ids is not None, "tasks are told apart by their tokens"
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past_key_values.num_columns + input_ids.shape[1])
        if past_key_values.has_begun:
            hidden = self._forward_tasks(self.embed_tokens(input_ids), attention_mask, past_key_values)
        else:
            hidden = self._prefill_tasks(input_ids, attention_mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def task_embedding(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The mean of a prompt's input embeddings, `(E,)` in fp32. `input_ids` `(T,)` are without padding."""
        embedding: torch.Tensor = self.embed_tokens(input_ids).float().mean(dim=0)
        return embedding

    def search_task(self, input_ids: torch.Tensor, kv: TaskKV) -> TaskSearch:
        """The earlier task that a prompt `(T,)` without padding can start from. Raises `ValueError` for an empty one.

        Without one to reuse, the prompt's task is to be kept.
        """
        if not len(input_ids):
            raise ValueError("a prompt is empty; it needs at least one token")
        embedding = self.task_embedding(input_ids)
        can_use = partial(kv.can_use, num_tokens=len(input_ids))
        return self.manager.search_or_check(embedding, can_use, kv.similarity_threshold)

    @property
    def manager(self) -> InterTaskKVManager:
        """Raises `ValueError` when there is none yet."""
        if self.kv_manager is None:
            raise ValueError("there is no KV manager; set_kv_manager gives the model one")
        return self.kv_manager

    def _prefill_tasks(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, kv: TaskKV) -> torch.Tensor:
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        assert len(prompts) == len(kv.task_ids), f"{len(prompts)} prompts, {len(kv.task_ids)} task ids"

        # 1. Search.
        searches = kv.searches or [self.search_task(prompt, kv) for prompt in prompts]

        # 2. The prompts that missed go through all layers, those that hit through those at the ends.
        embeddings = self.embed_tokens(input_ids)
        kv.begin([search.match for search in searches], embeddings, input_ids.shape[1])
        hidden = self._forward_tasks(embeddings, attention_mask, kv)
        kv.end_prefill()

        # 3. Keep what was computed in full, and note what reuse is to be compared with it.
        for row, (task_id, prompt, search) in enumerate(zip(kv.task_ids, prompts, searches, strict=True)):
            kv.outcomes.append(self._outcome(task_id, len(prompt), search.match, kv))
            if search.match is None:
                top_layer_kv, token_ids = kv.prompt_top_layer_kv(row, len(prompt)), as_token_ids(prompt.tolist())
                with if_possible(task_id):
                    self.manager.add_task(task_id, search.embedding, top_layer_kv, salt=kv.salt, token_ids=token_ids)
            if search.check is not None:
                kv.checks[row] = (search.check, prompt)
        return hidden

    def last_hidden_over(self, match: TaskMatch, prompt: torch.Tensor, num_end_layers: tuple[int, int]) -> torch.Tensor:
        """What a hit would give after the last token of a prompt `(T,)`: `(E,)`."""
        kv = TaskKV(self.config, [match.entry.task_id], num_end_layers=num_end_layers)
        embeddings = self.embed_tokens(prompt[None])
        kv.begin([match], embeddings, len(prompt))
        return self._forward_tasks(embeddings, torch.ones_like(prompt[None]), kv)[0, -1]

    def _forward_tasks(self, embeddings: torch.Tensor, attention_mask: torch.Tensor, kv: TaskKV) -> torch.Tensor:
        """All rows through all layers, but for those that hit, which leave some out in the prefill: `(B, T, E)`."""
        num_tokens = embeddings.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:] + kv.offsets
        hidden, rows, skipped, top = embeddings, kv.running, kv.skipped, kv.top
        hidden = self._run_layers(range(skipped.start), hidden, attention_mask, positions, kv)
        if len(rows) and skipped:
            running = self._run_layers(skipped, hidden[rows], kv.mask_skipped(attention_mask), positions[rows], kv)
            hidden = hidden.index_copy(0, rows, running)
        hidden = self._run_layers(range(skipped.stop, top), hidden, attention_mask, positions, kv)
        hidden = self._run_layers(range(top, top + 1), hidden, kv.mask_top(attention_mask), positions, kv)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def _run_layers(
        self, numbers: range, hidden: torch.Tensor, present: torch.Tensor, positions: torch.Tensor, kv: TaskKV
    ) -> torch.Tensor:
        """Layers of which the same tokens `present` `(B, T_kv)` are there."""
        if not numbers:
            return hidden
        mask = create_causal_mask(self.config, hidden, present, kv, layer_idx=numbers.start)
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers[numbers.start : numbers.stop]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=kv,
                use_cache=True,
                position_embeddings=rotary,
            )
        return hidden

    def _outcome(self, task_id: str, num_tokens: int, match: TaskMatch | None, kv: TaskKV) -> TaskOutcome:
        if match is None:
            return TaskOutcome(task_id, num_tokens, num_layer_passes=num_tokens * len(self.layers))
        return TaskOutcome(
            task_id,
            num_tokens,
            num_layer_passes=num_tokens * kv.num_layers_of_a_hit,
            matched_task_id=match.entry.task_id,
            similarity=match.similarity,
            is_approximate=True,
            num_reused_tokens=num_tokens,
            spans=((0, num_tokens),),
            matched_token_ids=match.entry.token_ids,
        )


class LlamaForCausalLMWithKVReuse(LlamaForCausalLM):
    """Differs from `LlamaForCausalLM` in its `LlamaModelWithKVReuse`, and in comparing reuse with full prefill where
    the manager asks for it; `generate` itself is stock and reuses nothing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModelWithKVReuse(config)
        self._has_warned = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Stock; after the prefill of a `TaskKV` its checks are compared. `generate` reads this signature."""
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if isinstance(past_key_values, TaskKV):
            kv, logits = past_key_values, output.logits[:, -1]
            for row, (match, prompt) in kv.checks.items():
                kv.outcomes[row] = self.checked(kv, kv.outcomes[row], match, prompt, logits[row])
            kv.checks = {}
        return output

    def checked(
        self, kv: TaskKV, outcome: TaskOutcome, match: TaskMatch, prompt: torch.Tensor, logits: torch.Tensor
    ) -> TaskOutcome:
        """Tries reuse for a prompt `(T,)` that was prefilled in full, and records whether the first token is the same.

        `logits` `(V,)` are those of the full prefill, `kv` the cache that reuse was tried for.
        """
        first_token = self.lm_head(self.model.last_hidden_over(match, prompt, kv.num_end_layers)).argmax()
        check = self.model.manager.record_check(match.similarity, bool(first_token == logits.argmax()))
        num_passes = outcome.num_layer_passes + outcome.num_prompt_tokens * kv.num_layers_of_a_hit
        return replace(outcome, num_layer_passes=num_passes, check=check)

    def set_kv_manager(self, manager: InterTaskKVManager) -> None:
        """Tasks are kept and searched there. Raises `ValueError` for one that was made for another model."""
        shape = LayerKVShape(self.config.num_key_value_heads, self.config.head_dim)
        manager.expect(self.config.hidden_size, shape, self)
        self.model.kv_manager = manager

    def generate_with_kv_reuse(self, input_ids: torch.Tensor, task_id: str | Sequence[str], **kwargs: Any) -> Any:
        """`generate` for prompts `(B, T)`, padded on the left, each of which may hit or miss; the same result.

        The mode is "top_layer", as the log says once: other models than those trained for it lose their answers.
        `task_id`: one for each prompt; `kwargs` are `generate`'s. Raises `ValueError` for an empty prompt, and for
        ways of generating that run a prompt more than once or in pieces.
        """
        task_ids = [task_id] if isinstance(task_id, str) else list(task_id)
        if input_ids.dim() != 2 or len(task_ids) != len(input_ids) or not input_ids.shape[1]:
            raise ValueError(
                f"input_ids must be ({len(task_ids)}, T), a row for each task id and T from 1, "
                f"not {tuple(input_ids.shape)}"
            )
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s", WARNINGS["top_layer"])
        config = kwargs.get("generation_config") or self.generation_config
        refuse_repeated_prefill(kwargs, config)
        num_new_tokens = kwargs.get("max_new_tokens") or config.max_new_tokens or 0
        kv = TaskKV(self.config, task_ids, max_new_tokens=num_new_tokens)
        return self.generate(input_ids, past_key_values=kv, **kwargs)


def llama_config(model_path: str) -> LlamaConfig:
    """Of a local folder or a hub name. Raises `OSError` when there is none, `ValueError` when it isn't a Llama's."""
    config = AutoConfig.from_pretrained(model_path)
    if config.model_type != "llama":
        raise ValueError(f"Sim-LLM needs a model of type llama; {model_path} is of type {config.model_type}")
    return config


def refuse_repeated_prefill(settings: dict[str, Any], config: Any) -> None:
    """Raises `ValueError` where `generate` would run a prompt more than once, in pieces, or without a cache."""
    required = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "prefill_chunk_size": None}
    for name, only in required.items():
        value = settings.get(name, getattr(config, name, None))
        if value not in (None, only):
            raise ValueError(f"{name} must be {only} with KV reuse, not {value!r}")
