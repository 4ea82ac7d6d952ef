"""The served model over vLLM's paged KV cache: the `PrefilledModel` of one prompt.

Every forward here is the model's own, inside vLLM's `set_forward_context`, with metadata from the attention backend's
own builder, as vLLM's speculative decoder does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from kvarena.reuse.plan import TokenIds
from kvarena.reuse.prefilled import Narrowing
from kvarena.reuse.rope import Rotation
from kvarena.vllm_plugin.batch import Batch
from kvarena.vllm_plugin.layer_hooks import KVKnown, reading_kv, reading_queries
from kvarena.vllm_plugin.lone_prefill import prefill_alone
from kvarena.vllm_plugin.narrowed_layer import NarrowedLayer
from kvarena.vllm_plugin.rotations import rotations_of
from kvarena.vllm_plugin.supported import attention_layers, decoder_layers, refuse_unsupported
from kvarena.vllm_plugin.tensor_parallel import make_ranks


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose KV lies in the same blocks, as vLLM groups them; `builder` is their attention backend's."""

    layer_names: Sequence[str]
    builder: Any


class VllmModel:
    """The model of this worker. Raises `ValueError` with the reason for one whose KV can't be blended."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        refuse_unsupported(vllm_config, kv_cache_config)
        self.model = model
        self.vllm_config = vllm_config
        self.layers = attention_layers(model)
        self.blocks = decoder_layers(model, self.layers)
        self.layer_names = [layer.layer_name for layer in self.layers]
        self.num_kv_heads: int = self.layers[0].num_kv_heads
        self.head_size: int = self.layers[0].head_size
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.device = next(model.parameters()).device
        self.ranks = make_ranks()
        self.block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.max_batch_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.groups = [self._group(group) for group in kv_cache_config.kv_cache_groups]
        self.group_of = {name: number for number, group in enumerate(self.groups) for name in group.layer_names}
        self.rotations: Sequence[Rotation | None] = rotations_of(self)

    def prompt(self, token_ids: TokenIds, block_ids: Sequence[Sequence[int]], start: int) -> PagedPrompt:
        return PagedPrompt(self, token_ids, block_ids, start)

    def forward(self, batch: Batch, positions: torch.Tensor | None = None) -> None:
        """Run a batch until its KV is complete: behind the last layer's keys nothing is needed.

        `positions`: what the model is told of the tokens, where that isn't where they lie in the cache.
        """
        metadata, slots = self.attention_metadata(batch)
        told = batch.positions if positions is None else positions
        last = len(self.layers) - 1
        with (
            set_forward_context(
                metadata, self.vllm_config, num_tokens=len(batch), slot_mapping=slots, skip_compiled=True
            ),
            reading_kv(self.layers, [last], self._write_and_stop),
            suppress(KVKnown),
        ):
            self.model(input_ids=batch.token_ids.to(self.device), positions=told.to(self.device))

    @torch.inference_mode()
    def lone_keys(self, position: int) -> torch.Tensor:
        """The keys `(L, H_kv, D)` of a token at this position that attends to itself only."""
        unseen = float("nan")
        keys = torch.full((len(self.layers), self.num_kv_heads, self.head_size), unseen)

        def keep(layer: int, own: torch.Tensor, _values: torch.Tensor) -> None:
            keys[layer] = own.view(self.num_kv_heads, self.head_size)

        token_id = torch.tensor([self.vllm_config.model_config.get_vocab_size() // 2])
        with reading_kv(self.layers, range(len(self.layers)), keep):
            first_block = torch.zeros(len(self.groups), 1, dtype=torch.int32)
            self.forward(Batch.of_one(token_id, torch.tensor([0]), first_block), torch.tensor([position]))
        return keys

    def attention_metadata(self, batch: Batch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What vLLM's forward context holds for a batch: metadata and slots by layer name."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        own_slots = batch.slots(self.block_size).to(self.device)
        for number, group in enumerate(self.groups):
            own = group.builder.build(0, self._common_metadata(batch, number, own_slots[number]))
            metadata |= dict.fromkeys(group.layer_names, own)
            slots |= dict.fromkeys(group.layer_names, own_slots[number])
        return metadata, slots

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values `(T, H_kv, D)` to their slots of the paged cache."""
        attention = self.layers[layer]
        attention.impl.do_kv_cache_update(attention, keys, values.contiguous(), attention.kv_cache, slots)

    def _write_and_stop(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = get_forward_context().slot_mapping[self.layer_names[layer]]
        heads = (len(keys), self.num_kv_heads, self.head_size)
        self.write(layer, slots, keys.reshape(heads), values.reshape(heads))
        raise KVKnown

    def _common_metadata(self, batch: Batch, group: int, slots: torch.Tensor) -> CommonAttentionMetadata:
        seq_lens = batch.row_ends
        return CommonAttentionMetadata(
            query_start_loc=batch.row_starts.to(self.device),
            query_start_loc_cpu=batch.row_starts,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(seq_lens),
            num_actual_tokens=len(batch),
            max_query_len=int(batch.row_lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=batch.row_blocks(group).to(self.device),
            slot_mapping=slots,
            causal=True,
            positions=batch.positions.to(self.device),
            is_prefilling=torch.ones(len(seq_lens), dtype=torch.bool),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _group(self, group: KVCacheGroupSpec) -> LayerGroup:
        layer = next(layer for layer in self.layers if layer.layer_name in group.layer_names)
        builder = layer.get_attn_backend().get_builder_cls()
        with set_current_vllm_config(self.vllm_config):
            made = builder(group.kv_cache_spec, group.layer_names, self.vllm_config, self.device)
        return LayerGroup(group.layer_names, made)


class PagedPrompt:
    """One prompt in the paged cache: `[0, start)` is there, the blocks from there on are this prompt's alone."""

    def __init__(self, engine: VllmModel, token_ids: TokenIds, block_ids: Sequence[Sequence[int]], start: int) -> None:
        assert start % engine.block_size == 0, f"cached prefix of {start} tokens ends inside a block"
        self.rotations = engine.rotations
        self.head_size = engine.head_size
        self.device = engine.device
        self.ranks = engine.ranks
        self._engine = engine
        self._token_ids = torch.from_numpy(token_ids).long()
        self._block_ids = torch.tensor(block_ids, dtype=torch.int32)
        self._slots = self._batch(torch.arange(len(token_ids))).slots(engine.block_size).to(engine.device)
        self._scratch = self._block_ids[:, start // engine.block_size :]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        own_slots = self._slots[self._engine.group_of[self._engine.layer_names[layer]]]
        self._engine.write(layer, own_slots[positions.to(self.device)], keys, values)

    def forward(self, positions: torch.Tensor, narrowings: Sequence[Narrowing] = ()) -> torch.Tensor:
        batches = self._batches(positions)
        num_batches, narrowed = len(batches), None
        with ExitStack() as stack:
            for narrowing in narrowings:
                layer = NarrowedLayer(self._engine, narrowing, narrowed or positions, num_batches, self._batch)
                narrowed, num_batches = stack.enter_context(layer), 1
            for batch in batches:
                self._engine.forward(batch)
        return narrowed.kept if narrowed else positions

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def keep(queries: torch.Tensor) -> None:
            found.append(queries.reshape(len(queries), -1, self.head_size).clone())
            raise KVKnown

        with reading_queries(self._engine.layers[layer], keep):
            for batch in self._batches(positions):
                self._engine.forward(batch)
        return torch.cat(found)

    def prefill_alone(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        return prefill_alone(self._engine, texts, self._scratch)

    def _batches(self, positions: torch.Tensor) -> list[Batch]:
        return self._batch(positions).split(self._engine.max_batch_tokens)

    def _batch(self, positions: torch.Tensor) -> Batch:
        return Batch.of_one(self._token_ids[positions], positions, self._block_ids)
