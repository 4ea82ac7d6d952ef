"""The served model over vLLM's paged KV cache: the `PrefilledModel` of one prompt.

Every forward here is the model's own, inside vLLM's `set_forward_context`, with metadata from the attention backend's
own builder, as vLLM's speculative decoder does it. A stretch of neighbouring tokens is one row of the batch: so many
query tokens, a sequence that ends with the last of them, and the prompt's own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from kvarena.vllm_plugin.layer_hooks import KVKnown, NarrowedLayer, decoder_layers, reading_kv, reading_queries
from kvarena.vllm_plugin.rotations import rotations_of
from kvarena.vllm_plugin.supported import attention_layers, refuse_unsupported
from kvarena.vllm_plugin.tensor_parallel import make_ranks


@dataclass(frozen=True)
class Row:
    """Tokens at `[first, first + T)` of a sequence whose blocks are `block_ids` `(G, N)`, in each group of layers.

    Both tensors are on the CPU, int64 and int32.
    """

    token_ids: torch.Tensor
    first: int
    block_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.first, self.first + len(self))

    def split(self, size: int) -> tuple[Row, Row]:
        rest = Row(self.token_ids[size:], self.first + size, self.block_ids)
        return Row(self.token_ids[:size], self.first, self.block_ids), rest


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

    def forward(self, rows: Sequence[Row], positions: torch.Tensor | None = None) -> None:
        """Run rows in one batch until their KV is complete: behind the last layer's keys nothing is needed.

        `positions`: what the model is told of them, where that isn't where they lie in the cache.
        """
        token_ids = torch.cat([row.token_ids for row in rows]).to(self.device)
        if positions is None:
            positions = torch.cat([row.positions for row in rows])
        metadata, slots = self.attention_metadata(rows)
        last = len(self.layers) - 1
        with (
            set_forward_context(
                metadata, self.vllm_config, num_tokens=len(token_ids), slot_mapping=slots, skip_compiled=True
            ),
            reading_kv(self.layers, [last], self._write_and_stop),
            suppress(KVKnown),
        ):
            self.model(input_ids=token_ids, positions=positions.to(self.device))

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
            self.forward([Row(token_id, 0, first_block)], torch.tensor([position]))
        return keys

    def attention_metadata(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What vLLM's forward context holds for a batch of rows: metadata and slots by layer name."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for number, group in enumerate(self.groups):
            own_slots = torch.cat([self.slots(row)[number] for row in rows]).to(self.device)
            own = group.builder.build(0, self._common_metadata(rows, number, own_slots))
            metadata |= dict.fromkeys(group.layer_names, own)
            slots |= dict.fromkeys(group.layer_names, own_slots)
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

    def slots(self, row: Row) -> torch.Tensor:
        """Where its tokens lie in each group's cache, `(G, T)`."""
        blocks = row.block_ids.long()[:, row.positions // self.block_size]
        return blocks * self.block_size + row.positions % self.block_size

    def _common_metadata(self, rows: Sequence[Row], group: int, slots: torch.Tensor) -> CommonAttentionMetadata:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        query_start = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        seq_lens = torch.tensor([row.first + len(row) for row in rows], dtype=torch.int32)
        blocks = torch.nn.utils.rnn.pad_sequence([row.block_ids[group] for row in rows], batch_first=True)
        return CommonAttentionMetadata(
            query_start_loc=query_start.to(self.device),
            query_start_loc_cpu=query_start,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(rows),
            num_actual_tokens=len(slots),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=blocks.to(self.device),
            slot_mapping=slots,
            causal=True,
            positions=torch.cat([row.positions for row in rows]).to(self.device),
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
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
        self._slots = engine.slots(Row(self._token_ids, 0, self._block_ids)).to(engine.device)
        self._scratch = self._block_ids[:, start // engine.block_size :]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        own_slots = self._slots[self._engine.group_of[self._engine.layer_names[layer]]]
        self._engine.write(layer, own_slots[positions.to(self.device)], keys, values)

    def forward(self, positions: torch.Tensor, narrowings: Sequence[Narrowing] = ()) -> torch.Tensor:
        batches = self._batches(positions)
        num_batches, narrowed = len(batches), None
        with ExitStack() as stack:
            for narrowing in narrowings:
                layer = NarrowedLayer(self._engine, narrowing, narrowed or positions, num_batches, self.rows)
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

    def _batches(self, positions: torch.Tensor) -> list[list[Row]]:
        return list(batches_of(self.rows(positions), self._engine.max_batch_tokens))

    def rows(self, positions: torch.Tensor) -> list[Row]:
        """One row for each run of neighbouring positions."""
        if not len(positions):
            return []
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.tensor_split(breaks)
        return [Row(self._token_ids[run], int(run[0]), self._block_ids) for run in runs]

    def prefill_alone(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        return [kv for batch in self._scratch_batches(texts) for kv in self._prefill_batch(batch)]

    def _prefill_batch(self, rows: Sequence[Row | None]) -> list[torch.Tensor | None]:
        """Forward texts side by side, and read their keys and values off as they pass."""
        fitting = [row for row in rows if row is not None]
        total = sum(map(len, fitting))
        width = self._engine.num_kv_heads * self.head_size
        kv = torch.empty(2, len(self._engine.layers), total, width, dtype=self._engine.dtype, device=self.device)
        filled = [0] * len(self._engine.layers)

        def keep(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            at = filled[layer]
            filled[layer] = at + len(keys)
            kv[0, layer, at : at + len(keys)] = keys
            kv[1, layer, at : at + len(keys)] = values

        if fitting:
            with reading_kv(self._engine.layers, range(len(self._engine.layers)), keep):
                for batch in batches_of(fitting, self._engine.max_batch_tokens):
                    self._engine.forward(batch)
        parts = iter(torch.split(kv, [len(row) for row in fitting], dim=2))
        return [None if row is None else next(parts).clone() for row in rows]

    def _scratch_batches(self, texts: Sequence[TokenIds]) -> Iterator[list[Row | None]]:
        """Texts by turns on the prompt's own fresh blocks; None for one that has no room even alone."""
        batch: list[Row | None] = []
        used, room = 0, self._scratch.shape[1]
        for text in texts:
            needed = -(-len(text) // self._engine.block_size)
            if used + needed > room and batch:
                yield batch
                batch, used = [], 0
            fits = needed <= room
            blocks = self._scratch[:, used : used + needed]
            batch.append(Row(torch.from_numpy(text).long(), 0, blocks) if fits else None)
            used += needed if fits else 0
        if batch:
            yield batch


def batches_of(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows in order, cut where a batch is full: what comes later may attend to what came before."""
    batch: list[Row] = []
    room = max_tokens
    for row in rows:
        while len(row) > room:
            if room:
                head, row = row.split(room)
                batch.append(head)
            yield batch
            batch, room = [], max_tokens
        batch.append(row)
        room -= len(row)
    if batch:
        yield batch
