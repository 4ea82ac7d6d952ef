"""The served model over vLLM's paged KV cache: `PagedPrompt` is the `PrefilledModel` of one prompt.

Every forward here is the model's own, inside vLLM's `set_forward_context`, with metadata from the attention backend's
own builder, as vLLM's speculative decoder does it. Tokens are forwarded as vLLM's batches are, by rows: a row is a
run of neighbouring tokens of one sequence, and all of the sequence up to the last of them to attend to. Chunks that no
store has are prefilled each as a sequence of its own, side by side, on blocks that are free for now. Which layer uses
which rotation, and how dimensions pair, shows in the keys of one token at two positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp, all_reduce
from torch.utils._pytree import tree_map
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from kvarena.core.devices import wait_for
from kvarena.core.filtered_layer import FilteredLayer, decoder_layers, forward_filtered
from kvarena.core.placement import packed
from kvarena.core.plan import Chunk, TokenIds
from kvarena.core.prefilled_model import (
    EndForward,
    InPieces,
    LayerAttention,
    LayerKV,
    OneRank,
    OnLayer,
    Ranks,
    RotateAndWrite,
    TokenFilter,
)
from kvarena.core.rope import Rerotation, Rotation, rotations_of
from kvarena.engines.vllm.attention import ChosenAttention, ChosenTokens, CPUKernels, GatheredAttention, reading
from kvarena.engines.vllm.supported import attention_layers, refuse_unsupported


class TensorParallelRanks:
    """On the CPU: what ranks agree on is small, and decisions are made there."""

    def __init__(self) -> None:
        self.num_ranks = get_tp_group().world_size
        self._group = get_tp_group().cpu_group

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        total = x.float().cpu().clone()
        all_reduce(total, group=self._group)
        return total

    def all(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.int32)
        if flags:
            all_reduce(found, op=ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in found]


def rank_name() -> str:
    """Tells the KV of one rank's heads from another's; empty where there is one rank."""
    group = get_tp_group()
    return f"-rank{group.rank_in_group}of{group.world_size}" if group.world_size > 1 else ""


class Row(NamedTuple):
    """The tokens `[start, end)` of a sequence."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """`token_ids`, `positions`, and the numbers of the `sequences` that they belong to: int64 `(T,)`, in order, on the
    CPU. `block_ids` `(S, G, N)`, int32, are the blocks of each sequence in each group of layers.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    block_ids: torch.Tensor

    @classmethod
    def of_one(cls, token_ids: torch.Tensor, positions: torch.Tensor, block_ids: torch.Tensor) -> Batch:
        """Tokens of a single sequence, whose blocks are `(G, N)`."""
        return cls(token_ids, positions, torch.zeros_like(positions), block_ids[None])

    @classmethod
    def of_whole(cls, texts: Sequence[torch.Tensor], block_ids: Sequence[torch.Tensor]) -> Batch:
        """Every token of each text, a sequence of its own, whose blocks are `(G, N)` of its own length N."""
        lengths = torch.tensor([len(text) for text in texts])
        blocks = torch.nn.utils.rnn.pad_sequence([own.t() for own in block_ids], batch_first=True)
        return cls(
            token_ids=torch.cat(list(texts)),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            sequences=torch.arange(len(texts)).repeat_interleave(lengths),
            block_ids=blocks.transpose(1, 2),
        )

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, max_tokens: int) -> list[Batch]:
        """In order, for later tokens may attend to earlier ones; cut wherever a part is full."""
        parts = (slice(start, start + max_tokens) for start in range(0, len(self), max_tokens))
        return [
            Batch(self.token_ids[part], self.positions[part], self.sequences[part], self.block_ids) for part in parts
        ]

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """The index of each row's first token, and last the number of all tokens: `(R + 1,)`, int32."""
        is_first = (self.positions.diff() != 1) | (self.sequences.diff() != 0)
        inner = is_first.nonzero().flatten() + 1
        return torch.cat([torch.tensor([0]), inner, torch.tensor([len(self)])]).int()

    @property
    def rows(self) -> list[Row]:
        starts, lengths = self.row_starts[:-1], self.row_lengths
        firsts = self.positions[starts]
        bounds = (self.sequences[starts], firsts, firsts + lengths)
        return [Row(*row) for row in zip(*(of.tolist() for of in bounds), strict=True)]

    @property
    def row_lengths(self) -> torch.Tensor:
        return self.row_starts.diff()

    @property
    def row_ends(self) -> torch.Tensor:
        """Where each row ends in its sequence: int32 `(R,)`."""
        return (self.positions[self.row_starts[1:] - 1] + 1).int()

    def row_blocks(self, group: int) -> torch.Tensor:
        """The blocks `(R, N)` of each row's sequence."""
        return self.block_ids[self.sequences[self.row_starts[:-1]], group]

    def slots(self, block_size: int) -> torch.Tensor:
        """Where the tokens are in each group's cache, `(G, T)`; contiguous, as kernels expect."""
        blocks = self.block_ids.long()[self.sequences, :, self.positions // block_size]
        return blocks.t().contiguous() * block_size + self.positions % block_size


class PagedFilteredLayer(FilteredLayer):
    """Over the layers of a model in vLLM: the forward context changes along with the tokens that are left."""

    def __init__(
        self,
        engine: VllmModel,
        batch_of: Callable[[torch.Tensor], Batch],
        token_filter: TokenFilter,
        before: torch.Tensor | FilteredLayer,
        num_forwards: int,
    ) -> None:
        """`batch_of` has the prompt's tokens at some positions."""
        super().__init__(engine.blocks, token_filter, before, num_forwards)
        self._engine = engine
        self._number = token_filter.layer
        self._batch_of = batch_of

    def fresh_kv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        """From a copy of the inputs: fused norms write into them."""
        found: list[LayerKV] = []

        def stop(_layer: int, _queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
            heads = (len(keys), -1, self._engine.head_size)
            found.append(LayerKV(keys.reshape(heads).clone(), values.reshape(heads).clone()))
            raise EndForward

        copied_args, copied_kwargs = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, (args, kwargs))
        with reading(self._engine.layers, [self._number], stop, before_others=True), suppress(EndForward):
            self.layer(*copied_args, **copied_kwargs)
        return found[0]

    def go_on_with(self, positions: torch.Tensor) -> None:
        context = get_forward_context()
        context.attn_metadata, context.slot_mapping = self._engine.attention_metadata(self._batch_of(positions))

    def token_axis(self, inputs: Sequence[Any], counts: Sequence[int]) -> int | None:
        """Inputs are `(T, ...)`, or `(1, T, ...)` with an axis for a batch of one."""
        if not all(map(torch.is_tensor, inputs)):
            return None
        for axis in (0, 1):
            lengths = [x.shape[axis] if x.dim() > axis else None for x in inputs]
            if lengths == list(counts) and (axis == 0 or all(len(x) == 1 for x in inputs)):
                return axis
        return None


def _empty_kv(engine: VllmModel, num_tokens: int) -> torch.Tensor | None:
    """None without memory, and no error: the other ranks would wait for this one."""
    shape = (2, len(engine.layers), num_tokens, engine.num_kv_heads * engine.head_size)
    with suppress(torch.OutOfMemoryError):
        return torch.empty(shape, dtype=engine.dtype, device=engine.device)
    return None


def _keep(
    pieces: Sequence[torch.Tensor], layer: int, _queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """One layer's keys and values `(T, H_kv * D)` of a batch, into the KV `(2, L, t, H_kv * D)` of each row."""
    sizes = [piece.shape[2] for piece in pieces]
    for piece, own_keys, own_values in zip(pieces, torch.split(keys, sizes), torch.split(values, sizes), strict=True):
        piece[0, layer], piece[1, layer] = own_keys, own_values


def _rotations_in_tables(model: torch.nn.Module) -> list[Rotation]:
    """Those of vLLM's own rotary embeddings, from the table that each computes in fp32; the one that it uses is rounded
    to its dtype. Raises `ValueError` where frequencies are not constant.
    """
    rotations = []
    for rotary in (module for module in model.modules() if isinstance(module, RotaryEmbeddingBase)):
        cos, sin = rotary._compute_cos_sin_cache().float().cpu().chunk(2, dim=-1)
        rotations.append(Rotation.from_cos_sin(cos, sin, is_neox=rotary.is_neox_style))
    return rotations


def with_rows(vllm_config: VllmConfig, num_rows: int) -> VllmConfig:
    """The configuration for our own metadata builders: with room for `num_rows`, since each scattered token is a row,
    and without CUDA graphs, whose buffers have a fixed size.
    """
    scheduler, compilation = copy(vllm_config.scheduler_config), copy(vllm_config.compilation_config)
    scheduler.max_num_seqs = max(scheduler.max_num_seqs, num_rows)
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    config = copy(vllm_config)
    config.scheduler_config, config.compilation_config = scheduler, compilation
    return config


def _attention(layer: Any, max_model_len: int) -> LayerAttention:
    window: int | None = layer.sliding_window
    return LayerAttention(layer.impl.scale, window if window is not None and window < max_model_len else None)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose KV lies in the same blocks, as vLLM groups them; `builder` is their attention backend's."""

    layer_names: Sequence[str]
    builder: Any


class VllmModel:
    """The model of this worker. Raises `ValueError` with the reason where its KV can't be blended."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        refuse_unsupported(model, vllm_config, kv_cache_config)
        self.model = model
        self.vllm_config = vllm_config
        self.layers = attention_layers(model)
        self.blocks = decoder_layers(model, self.layers)
        self.layer_names = [layer.layer_name for layer in self.layers]
        self.num_kv_heads: int = self.layers[0].num_kv_heads
        self.head_size: int = self.layers[0].head_size
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.device = next(model.parameters()).device
        self.ranks: Ranks = TensorParallelRanks() if get_tp_group().world_size > 1 else OneRank()
        self.block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.max_batch_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows_config = with_rows(vllm_config, self.max_batch_tokens)
        self.groups = [self._group(group) for group in kv_cache_config.kv_cache_groups]
        self.attention = [_attention(layer, vllm_config.model_config.max_model_len) for layer in self.layers]
        self.kernels = CPUKernels.for_layers(self.layers) if self.device.type == "cpu" else None
        self.group_of = {name: number for number, group in enumerate(self.groups) for name in group.layer_names}
        self.chosen_attention: ChosenAttention | None = self.kernels
        if self.device.type == "cuda":
            self.chosen_attention = GatheredAttention.where_faster(self.layers, self._attend_by_rows)
        self.rotations: Sequence[Rotation | None] = rotations_of(
            model, self.single_token_keys, vllm_config.model_config.max_model_len, _rotations_in_tables(model)
        )

    def forward(self, batch: Batch, positions: torch.Tensor | None = None) -> None:
        """Run a batch until its KV is complete: nothing is needed after the last layer's keys.

        `positions`: those that the model is told, where they aren't those in the cache.
        """
        metadata, slots = self.attention_metadata(batch)
        told = batch.positions if positions is None else positions
        last = len(self.layers) - 1
        with (
            set_forward_context(
                metadata, self.vllm_config, num_tokens=len(batch), slot_mapping=slots, skip_compiled=True
            ),
            self.chosen_attention.attending() if self.chosen_attention else nullcontext(),
            reading(self.layers, [last], self._write_and_stop),
            suppress(EndForward),
        ):
            self.model(input_ids=batch.token_ids.to(self.device), positions=told.to(self.device))

    @torch.inference_mode()
    def single_token_keys(self, position: int) -> torch.Tensor:
        """The keys `(L, H_kv, D)` of a token at this position that attends to itself only.

        It is written into the first block of the cache, which vLLM gives to no sequence.
        """
        unseen = float("nan")
        keys = torch.full((len(self.layers), self.num_kv_heads, self.head_size), unseen)

        def keep(layer: int, _queries: torch.Tensor, own: torch.Tensor, _values: torch.Tensor) -> None:
            keys[layer] = own.view(self.num_kv_heads, self.head_size)

        token_id = torch.tensor([self.vllm_config.model_config.get_vocab_size() // 2])
        with reading(self.layers, range(len(self.layers)), keep):
            first_block = torch.zeros(len(self.groups), 1, dtype=torch.int32)
            self.forward(Batch.of_one(token_id, torch.tensor([0]), first_block), torch.tensor([position]))
        return keys

    def attention_metadata(self, batch: Batch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What vLLM's forward context holds for a batch: metadata and slots by layer name."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        own_slots = batch.slots(self.block_size).to(self.device)
        for number, group in enumerate(self.groups):
            own: Any
            if self._attends_to_chosen(batch):
                own = ChosenTokens(batch.positions, batch.block_ids[0, number].contiguous().to(self.device))
            else:
                own = group.builder.build(0, self._common_metadata(batch, number, own_slots[number]))
            metadata |= dict.fromkeys(group.layer_names, own)
            slots |= dict.fromkeys(group.layer_names, own_slots[number])
        return metadata, slots

    def _attends_to_chosen(self, batch: Batch) -> bool:
        if self.chosen_attention is None or len(batch.block_ids) > 1:
            return False
        return len(batch) <= self.chosen_attention.max_row_tokens * len(batch.row_lengths)

    def _attend_by_rows(self, layer: Any, queries: torch.Tensor, tokens: ChosenTokens, output: torch.Tensor) -> None:
        """vLLM's own attention in a layer; leaves the cache as it is."""
        group = self.group_of[layer.layer_name]
        blocks = tokens.block_ids.cpu().expand(len(self.groups), -1)
        batch = Batch.of_one(torch.zeros_like(tokens.positions), tokens.positions, blocks)
        slots = batch.slots(self.block_size)[group].to(self.device)
        metadata = self.groups[group].builder.build(0, self._common_metadata(batch, group, slots))
        fresh = queries.new_zeros(len(queries), self.num_kv_heads, self.head_size)
        layer.impl.forward(layer, queries, fresh, fresh, layer.kv_cache, metadata, output)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values `(T, H_kv, D)` to their slots of the paged cache."""
        attention = self.layers[layer]
        attention.impl.do_kv_cache_update(attention, keys, values.contiguous(), attention.kv_cache, slots)

    def _write_and_stop(self, layer: int, _queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = get_forward_context().slot_mapping[self.layer_names[layer]]
        heads = (len(keys), self.num_kv_heads, self.head_size)
        self.write(layer, slots, keys.reshape(heads), values.reshape(heads))
        raise EndForward

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
        with set_current_vllm_config(self._rows_config):
            made = builder(group.kv_cache_spec, group.layer_names, self._rows_config, self.device)
        return LayerGroup(group.layer_names, made)


class PagedPrompt:
    """One prompt in the paged cache: `[0, start)` is filled; the blocks after it are this prompt's alone."""

    def __init__(self, engine: VllmModel, token_ids: TokenIds, block_ids: Sequence[Sequence[int]], start: int) -> None:
        assert start % engine.block_size == 0, f"cached prefix of {start} tokens ends inside a block"
        self.rotations = engine.rotations
        self.attention: Sequence[LayerAttention] = engine.attention
        self.head_size = engine.head_size
        self.device = engine.device
        self.ranks = engine.ranks
        self._engine = engine
        self._token_ids = torch.from_numpy(token_ids).long()
        self._block_ids = torch.tensor(block_ids, dtype=torch.int32)
        self._slots = self._batch(torch.arange(len(token_ids))).slots(engine.block_size).to(engine.device)
        self._scratch = self._block_ids[:, start // engine.block_size :]

    def wait(self) -> None:
        wait_for(self.device)

    def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = self._slots[:, positions.to(self.device, non_blocking=True)].contiguous()
        for layer, name in enumerate(self._engine.layer_names):
            self._engine.write(layer, slots[self._engine.group_of[name]], keys[layer], values[layer])

    @property
    def rotate_and_write(self) -> RotateAndWrite | None:
        return self._rotate_and_write if self._engine.kernels else None

    def _rotate_and_write(
        self, positions: torch.Tensor, parts: Sequence[torch.Tensor], rerotations: Mapping[Rotation, Rerotation]
    ) -> None:
        assert self._engine.kernels is not None
        slots = self._slots[:, positions].contiguous()
        by_layer = [slots[self._engine.group_of[name]] for name in self._engine.layer_names]
        self._engine.kernels.place(parts, by_layer, self.rotations, rerotations)

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        filtered_layer = partial(PagedFilteredLayer, self._engine, self._batch)
        return forward_filtered(positions, self._batches(positions), self._engine.forward, filters, filtered_layer)

    def observe(self, positions: torch.Tensor, on_layer: OnLayer) -> None:
        for batch in self._batches(positions):

            def read(layer: int, *passing: torch.Tensor, own: torch.Tensor = batch.positions) -> None:
                queries, keys, values = (x.reshape(len(own), -1, self.head_size) for x in passing)
                on_layer(layer, own, queries, LayerKV(keys, values))

            with reading(self._engine.layers, range(len(self._engine.layers)), read):
                self._engine.forward(batch)

    def prefill_chunks(self, chunks: Sequence[Chunk], piece_tokens: int) -> InPieces[list[torch.Tensor | None]]:
        """KV is copied out as the layers compute it. None for a chunk that is longer than the free blocks, or that some
        rank has no memory for.
        """
        room = self._scratch.shape[1]
        num_blocks = {chunk: -(-len(chunk.after_sink) // self._engine.block_size) for chunk in chunks}
        fitting = [chunk for chunk in chunks if num_blocks[chunk] <= room]
        computed: dict[Chunk, torch.Tensor] = {}
        for number, group in enumerate(packed(fitting, num_blocks.__getitem__, room)):
            if number:
                yield
            computed |= yield from self._prefill_side_by_side(group, num_blocks, piece_tokens)
        return [computed.get(chunk) for chunk in chunks]

    def _prefill_side_by_side(
        self, chunks: Sequence[Chunk], num_blocks: Mapping[Chunk, int], piece_tokens: int
    ) -> InPieces[dict[Chunk, torch.Tensor]]:
        """Chunks that fit into the free blocks together, each a sequence of its own."""
        engine = self._engine
        memory = [_empty_kv(engine, len(chunk.after_sink)) for chunk in chunks]
        everywhere = engine.ranks.all([kv is not None for kv in memory])
        kv_of = {
            c: kv for c, kv, is_there in zip(chunks, memory, everywhere, strict=True) if is_there and kv is not None
        }
        if not kv_of:
            return {}
        texts, kv = [torch.from_numpy(chunk.after_sink).long() for chunk in kv_of], list(kv_of.values())
        starts = accumulate((num_blocks[chunk] for chunk in kv_of), initial=0)
        blocks = [self._scratch[:, start:end] for start, end in pairwise(starts)]
        batches = Batch.of_whole(texts, blocks).split(min(engine.max_batch_tokens, piece_tokens))
        for number, batch in enumerate(batches):
            if number:
                yield
            pieces = [kv[row.sequence][:, :, row.start : row.end] for row in batch.rows]
            with reading(engine.layers, range(len(engine.layers)), partial(_keep, pieces)):
                engine.forward(batch)
        return {chunk: whole[:, :, len(chunk.sink) :] for chunk, whole in kv_of.items()}

    def _batches(self, positions: torch.Tensor) -> list[Batch]:
        return self._batch(positions).split(self._engine.max_batch_tokens)

    def _batch(self, positions: torch.Tensor) -> Batch:
        return Batch.of_one(self._token_ids[positions], positions, self._block_ids)
