"""The served model over vLLM's paged KV cache: the `PrefilledModel` of one prompt.

Every forward here is the model's own, inside vLLM's `set_forward_context`, with metadata from the attention backend's
own builder, as vLLM's speculative decoder does it. A stretch of neighbouring tokens is one row of the batch: so many
query tokens, a sequence that ends with the last of them, and the prompt's own blocks. Hooks are on the attention
layers only while such a forward runs; stock traffic is never hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvarena.reuse.plan import TokenIds
from kvarena.reuse.rope import Rotation
from kvarena.vllm_plugin.supported import attention_layers, refuse_unsupported, rotations_of

KeysHook = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Row:
    """Tokens at `[first, first + T)` of a sequence that lies in `block_ids`; both tensors are int64 / int32 on CPU."""

    token_ids: torch.Tensor
    first: int
    block_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def split(self, size: int) -> tuple[Row, Row]:
        rest = Row(self.token_ids[size:], self.first + size, self.block_ids)
        return Row(self.token_ids[:size], self.first, self.block_ids), rest


class _KeysKnown(Exception):
    """Ends a forward pass on purpose: the keys that it was run for are known."""


class VllmModel:
    """The model of this worker. Raises `ValueError` for one whose KV can't be blended."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        refuse_unsupported(vllm_config, kv_cache_config)
        self.model = model
        self.vllm_config = vllm_config
        self.layers = attention_layers(model)
        self.rotations: Sequence[Rotation | None] = rotations_of(model, self.layers)
        self.layer_names = [layer.layer_name for layer in self.layers]
        self.num_kv_heads: int = self.layers[0].num_kv_heads
        self.head_size: int = self.layers[0].head_size
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.device = next(model.parameters()).device
        self.block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.max_batch_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._builder = self._metadata_builder(kv_cache_config)

    def prompt(self, token_ids: TokenIds, block_ids: Sequence[int], start: int) -> PagedPrompt:
        return PagedPrompt(self, token_ids, block_ids, start)

    def forward(self, rows: Sequence[Row]) -> None:
        """Run the model over rows, in order, as many at once as vLLM would run. Logits are not computed."""
        for batch in _batches(rows, self.max_batch_tokens):
            self._forward(batch)

    @contextmanager
    def capturing(self, on_keys: KeysHook, layers: Sequence[int]) -> Iterator[None]:
        """Call `on_keys(layer, keys, values)` (each `(T, H_kv * D)`, valid only during the call) in our forwards."""

        def hook_of(layer: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
                _, key, value = [*args, *kwargs.values()][:3]
                on_keys(layer, key.flatten(1), value.flatten(1))

            return hook

        handles = [self.layers[i].register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def slots(self, row: Row) -> torch.Tensor:
        positions = torch.arange(row.first, row.first + len(row))
        return row.block_ids.long()[positions // self.block_size] * self.block_size + positions % self.block_size

    def _forward(self, rows: Sequence[Row]) -> None:
        token_ids = torch.cat([row.token_ids for row in rows]).to(self.device)
        positions = torch.cat([torch.arange(row.first, row.first + len(row)) for row in rows]).to(self.device)
        slots = torch.cat([self.slots(row) for row in rows]).to(self.device)
        metadata = self._builder.build(0, self._common_metadata(rows, positions, slots))
        with set_forward_context(
            dict.fromkeys(self.layer_names, metadata),
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=dict.fromkeys(self.layer_names, slots),
            skip_compiled=True,
        ):
            self.model(input_ids=token_ids, positions=positions)

    def _common_metadata(
        self, rows: Sequence[Row], positions: torch.Tensor, slots: torch.Tensor
    ) -> CommonAttentionMetadata:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        query_start = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        seq_lens = torch.tensor([row.first + len(row) for row in rows], dtype=torch.int32)
        blocks = torch.nn.utils.rnn.pad_sequence([row.block_ids for row in rows], batch_first=True)
        return CommonAttentionMetadata(
            query_start_loc=query_start.to(self.device),
            query_start_loc_cpu=query_start,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(rows),
            num_actual_tokens=len(positions),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=blocks.to(self.device),
            slot_mapping=slots,
            causal=True,
            positions=positions,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _metadata_builder(self, kv_cache_config: KVCacheConfig) -> Any:
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        builder = self.layers[0].get_attn_backend().get_builder_cls()
        with set_current_vllm_config(self.vllm_config):
            return builder(spec, self.layer_names, self.vllm_config, self.device)


class PagedPrompt:
    """One prompt in the paged cache: `[0, start)` is there, the blocks from there on are this prompt's alone."""

    def __init__(self, engine: VllmModel, token_ids: TokenIds, block_ids: Sequence[int], start: int) -> None:
        self.rotations = engine.rotations
        self.head_size = engine.head_size
        self.device = engine.device
        self._engine = engine
        self._token_ids = torch.from_numpy(token_ids).long()
        self._block_ids = torch.tensor(block_ids, dtype=torch.int32)
        self._slots = engine.slots(Row(self._token_ids, 0, self._block_ids)).to(engine.device)
        self._scratch = self._block_ids[start // engine.block_size :]
        assert start % engine.block_size == 0, f"cached prefix of {start} tokens ends inside a block"

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        attention = self._engine.layers[layer]
        slots = self._slots[start : start + len(keys)]
        attention.impl.do_kv_cache_update(attention, keys, values.contiguous(), attention.kv_cache, slots)

    def forward(self, positions: torch.Tensor) -> None:
        self._engine.forward(self._rows(positions))

    def keys_at(self, layer: int, start: int, end: int) -> torch.Tensor:
        if layer >= len(self._engine.layers):
            layer = len(self._engine.layers) - 1
        pieces: list[torch.Tensor] = []

        def stop(_layer: int, keys: torch.Tensor, _values: torch.Tensor) -> None:
            pieces.append(keys.clone())
            raise _KeysKnown

        with self._engine.capturing(stop, [layer]):
            for batch in _batches(self._rows(torch.arange(start, end)), self._engine.max_batch_tokens):
                try:
                    self._engine.forward(batch)
                except _KeysKnown:
                    continue
        return torch.cat(pieces).view(end - start, -1, self.head_size)

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
            with self._engine.capturing(keep, range(len(self._engine.layers))):
                self._engine.forward(fitting)
        parts = iter(torch.split(kv, [len(row) for row in fitting], dim=2))
        return [None if row is None else next(parts).clone() for row in rows]

    def _scratch_batches(self, texts: Sequence[TokenIds]) -> Iterator[list[Row | None]]:
        """Texts by turns on the prompt's own fresh blocks; None for one that has no room even alone."""
        batch: list[Row | None] = []
        used = 0
        for text in texts:
            needed = -(-len(text) // self._engine.block_size)
            if used + needed > len(self._scratch) and batch:
                yield batch
                batch, used = [], 0
            fits = needed <= len(self._scratch)
            blocks = self._scratch[used : used + needed]
            batch.append(Row(torch.from_numpy(text).long(), 0, blocks) if fits else None)
            used += needed if fits else 0
        if batch:
            yield batch

    def _rows(self, positions: torch.Tensor) -> list[Row]:
        """One row for each run of neighbouring positions."""
        if not len(positions):
            return []
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.tensor_split(breaks)
        return [Row(self._token_ids[run], int(run[0]), self._block_ids) for run in runs]


def _batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
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
