"""The blend over a Hugging Face model: the model's own forwards, over the memory of its `SequenceKV`.

In order: the cache of a forward over chosen tokens, which ends when all their KV is known; a layer that goes on with
fewer tokens; which models can be blended, and how their keys rotate, tried on a token; the `PrefilledModel` of one
prompt; `HFBlender`, which plans, blends up to the last chunk's end and prefills the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvarena.core.attention import seen_by
from kvarena.core.blend import Blender, BlendTask
from kvarena.core.devices import wait_for
from kvarena.core.filtered_layer import FilteredLayer, decoder_layers, forward_filtered
from kvarena.core.matching import DEFAULT_SINK_TOKENS, ChunkIndex, Planner, Segmenter, prompt_beginning
from kvarena.core.plan import Chunk, ReusePlan, TokenIds, as_token_ids
from kvarena.core.policy import SelectionPolicy
from kvarena.core.prefilled_model import (
    EndForward,
    InPieces,
    LayerAttention,
    LayerKV,
    OneRank,
    OnLayer,
    Ranks,
    TokenFilter,
)
from kvarena.core.report import BlendReport
from kvarena.core.rope import Rotation, refuse_length_dependent, rotations_of
from kvarena.core.store import ScoredStore
from kvarena.engines.hf import attention
from kvarena.engines.hf.model import HFModel, UnsupportedModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.policies.params import BlendParams, make_policy

FULL, SLIDING = "full_attention", "sliding_attention"
"""What Hugging Face calls kinds of layers."""


class PromptCache(Cache):
    """Over a prompt's memory `(L, 2, H_kv, T, D)`. Differs from `Cache` in where fresh KV is written.

    `positions` `(T_q,)` are those of the tokens under way, ascending, and `end` is after the last. `masks` has one
    `(1, 1, T_q, end)` for each window: what a token attends to. `windows` are those of the kinds of layers.
    `ends_with_last_keys`: what comes after the last layer's keys isn't run.
    """

    def __init__(self, memory: torch.Tensor, windows: Mapping[str, int | None]) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.positions = torch.empty(0, dtype=torch.int64)
        self.masks: dict[int | None, torch.Tensor] = {}
        self._windows = windows
        self.end = 0
        self.ends_with_last_keys = True
        self._probed: list[LayerKV] | None = None

    def go_on_with(self, positions: torch.Tensor) -> None:
        """These tokens are all that comes from now on."""
        self.positions = positions
        self.end = int(positions[-1]) + 1
        self.masks = {window: seen_by(positions, self.end, window)[None, None] for window in self._windows.values()}

    @property
    def attention_mask(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """As models take it: one mask for all layers, or one for each kind."""
        if len(self.masks) == 1:
            return next(iter(self.masks.values()))
        return {kind: self.masks[window] for kind, window in self._windows.items()}

    def probed_kv(self, layer: Callable[..., object], *args: object, **kwargs: object) -> LayerKV:
        """Run a layer until its fresh KV is known, and write nothing."""
        found: list[LayerKV] = []
        self._probed = found
        try:
            with suppress(EndForward):
                layer(*args, **kwargs)
        finally:
            self._probed = None
        return found[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's `(1, H_kv, T_q, D)`; return the layer's KV up to the last token under way."""
        fresh = LayerKV(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if self._probed is not None:
            self._probed.append(fresh)
            raise EndForward
        own = self.memory[layer_idx]  # (2, H_kv, T, D)
        own[0, :, self.positions] = key_states[0]
        own[1, :, self.positions] = value_states[0]
        if self.ends_with_last_keys and layer_idx == len(self.memory) - 1:
            raise EndForward
        return own[0:1, :, : self.end], own[1:2, :, : self.end]


class HFFilteredLayer(FilteredLayer):
    """Over the layers of a Hugging Face model, whose inputs have a mask and angles for the tokens under way.

    Where there is one forward, inputs that only later layers use (angles of another base) are filtered as well.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        cache: PromptCache,
        token_filter: TokenFilter,
        before: torch.Tensor | FilteredLayer,
        num_forwards: int,
    ) -> None:
        super().__init__(layers, token_filter, before, num_forwards)
        self._cache = cache

    def fresh_kv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        return self._cache.probed_kv(self.layer.forward, *args, **kwargs)

    def go_on_with(self, positions: torch.Tensor) -> None:
        masks_of_all = self._cache.masks
        self._cache.go_on_with(positions.to(self._cache.memory.device))
        for window, mask in self._cache.masks.items():
            self.filtered_inputs[id(masks_of_all[window])] = mask

    def token_axis(self, inputs: Sequence[Any], counts: Sequence[int]) -> int | None:
        return 1 if all(_has_rows(x, count) for x, count in zip(inputs, counts, strict=True)) else None

    def later_input(self, x: Any) -> Any:
        num_before = len(self.positions)
        is_new = self.num_forwards == 1 and len(self.kept) < num_before and id(x) not in self.filtered_inputs
        if is_new and _has_rows(x, num_before):
            self.filtered_inputs[id(x)] = x[:, torch.isin(self.positions, self.kept).to(x.device)]
        return super().later_input(x)


def _has_rows(x: Any, num_tokens: int) -> bool:
    return torch.is_tensor(x) and x.dim() > 1 and x.shape[1] == num_tokens


class BlendableModel:
    """A model, its decoder layers in order, and their rotations. Raises `UnsupportedModel` with the reason where its KV
    can't be blended.
    """

    def __init__(self, model: HFModel) -> None:
        self.model = model
        try:
            kinds = _kinds_of_layers(model)
            self.window_of = _window_of(kinds, model)
            parts = _numbered_parts(model.module, model.kv_shape.num_layers)
            self.layers = decoder_layers(model.module, [part[0] for part in parts])
            self.attention = [
                LayerAttention(_scale(part, model.kv_shape.head_size), self.window_of[kind])
                for part, kind in zip(parts, kinds, strict=True)
            ]
            refuse_length_dependent(model.module.config.get_text_config(), model.module)
            self.rotations: Sequence[Rotation | None] = model.run(
                rotations_of, model.module, partial(_keys_at, model), model.max_model_len
            )
        except ValueError as error:
            raise UnsupportedModel(f"{type(model.module).__name__} can't be blended: {error}") from error

    @property
    def has_several_rotations(self) -> bool:
        """Whether layers rotate keys differently, so that the model hands them different angles."""
        return len(set(self.rotations) - {None}) > 1


def _kinds_of_layers(model: HFModel) -> Sequence[str]:
    """`FULL` or `SLIDING` for each layer. Raises `ValueError` for attention that can't take our masks."""
    config = model.module.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", attention.NAME):
        raise ValueError(f"its attention is {implementation!r}; the blend's masks are for sdpa and {attention.NAME}")
    in_general = SLIDING if getattr(config, "sliding_window", None) else FULL
    kinds: Sequence[str] = getattr(config, "layer_types", None) or [in_general] * model.kv_shape.num_layers
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise ValueError(f"it has layers of {', '.join(sorted(unknown))}")
    return kinds


def _window_of(kinds: Sequence[str], model: HFModel) -> dict[str, int | None]:
    """The window of each kind of layer, None where it sees the whole context. Raises `ValueError` for a model that has
    layers with different windows and takes only one mask.
    """
    window = getattr(model.module.config.get_text_config(), "sliding_window", None)
    is_short = window is not None and window < model.max_model_len
    window_of = {kind: window if kind == SLIDING and is_short else None for kind in dict.fromkeys(kinds)}
    if len(set(window_of.values())) > 1:
        masks = {kind: torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.kv_shape.device) for kind in window_of}
        try:
            model.run(partial(model.forward, [0], attention_mask=masks))
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError("it takes no masks by kind of layer, and its layers' windows differ") from error
    return window_of


def _numbered_parts(module: torch.nn.Module, num_layers: int) -> list[list[torch.nn.Module]]:
    """For each layer the modules that have its number in the cache: the decoder layer, its attention, or both."""
    numbered: dict[int, list[torch.nn.Module]] = {}
    for part in module.modules():
        number = getattr(part, "layer_idx", None)
        if number is not None:
            numbered.setdefault(number, []).append(part)
    if missing := sorted(set(range(num_layers)) - set(numbered)):
        raise ValueError(f"none of its layers has the number {missing[0]}")
    return [numbered[number] for number in range(num_layers)]


def _scale(parts: Sequence[torch.nn.Module], head_size: int) -> float:
    """The scale of a layer's attention: its own, or else the usual one."""
    known = (float(scale) for part in parts if (scale := getattr(part, "scaling", None)) is not None)
    return next(known, head_size**-0.5)


def _keys_at(model: HFModel, position: int) -> torch.Tensor:
    """The keys `(L, H_kv, D)` of a single token: it attends to nothing else, so they depend on its position alone."""
    kv = model.new_kv(1)
    position_ids = torch.tensor([[position]], device=model.kv_shape.device)
    model.forward([model.vocab_size // 2], position_ids=position_ids, past_key_values=kv, use_cache=True)
    return kv.filled(0, 1)[:, 0, :, 0].float()


class HFPrefilledModel:
    """Implements `kvarena.core.prefilled_model.PrefilledModel`. To be used in the model's thread.

    `kv` counts as filled up to `len(token_ids)` at once; the caller fills what it didn't hold.
    """

    rotate_and_write = None

    def __init__(self, engine: BlendableModel, token_ids: TokenIds, kv: SequenceKV) -> None:
        kv.extend(len(token_ids) - kv.length)
        shape = engine.model.kv_shape
        self.rotations = engine.rotations
        self.attention: Sequence[LayerAttention] = engine.attention
        self.head_size = shape.head_size
        self.device = shape.device
        self.ranks: Ranks = OneRank()
        self._engine = engine
        self._token_ids = token_ids
        self._cache = PromptCache(kv.filled(0, len(token_ids)), engine.window_of)

    def wait(self) -> None:
        wait_for(self.device)

    def prefill_chunks(self, chunks: Sequence[Chunk], piece_tokens: int) -> InPieces[list[torch.Tensor | None]]:
        computed: list[torch.Tensor | None] = []
        for chunk in chunks:
            if computed:
                yield
            computed.append((yield from self._prefill_chunk(chunk, piece_tokens)))
        return computed

    def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        where = positions.to(self.device)
        for number, own in enumerate((keys, values)):
            self._cache.memory[:, number].index_copy_(2, where, own.transpose(1, 2))  # (L, H_kv, T, D)

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        pieces = [positions] if filters and self._engine.has_several_rotations else self._pieces(positions)
        filtered_layer = partial(HFFilteredLayer, self._engine.layers, self._cache)
        return forward_filtered(positions, pieces, self._run, filters, filtered_layer)

    def observe(self, positions: torch.Tensor, on_layer: OnLayer) -> None:
        def read(layer: int, queries: torch.Tensor) -> None:
            under_way = self._cache.positions
            keys, values = self._cache.memory[layer][:, :, under_way].transpose(1, 2)
            on_layer(layer, under_way.cpu(), queries[0].transpose(0, 1), LayerKV(keys, values))

        self._cache.ends_with_last_keys = False
        try:
            with attention.reading_queries(self._engine.model.module, read):
                for piece in self._pieces(positions):
                    self._run(piece)
        finally:
            self._cache.ends_with_last_keys = True

    def _pieces(self, positions: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(positions, self._engine.model.piece_tokens)

    def _prefill_chunk(self, chunk: Chunk, piece_tokens: int) -> InPieces[torch.Tensor]:
        text = chunk.after_sink
        kv = SequenceKV(self._engine.model.kv_shape, len(text))
        alone = HFPrefilledModel(self._engine, text, kv)
        for number, piece in enumerate(torch.arange(len(text)).split(piece_tokens)):
            if number:
                yield
            alone.forward(piece)
        return kv.filled(len(chunk.sink), len(text)).permute(1, 0, 3, 2, 4).flatten(3)  # (2, L, T, H_kv * D)

    def _run(self, positions: torch.Tensor) -> None:
        """Run these tokens until their KV is complete: nothing is needed after the last layer's keys."""
        self._cache.go_on_with(positions.to(self.device))
        with suppress(EndForward):
            self._engine.model.forward(
                self._token_ids[positions.numpy()].tolist(),
                position_ids=self._cache.positions[None],
                attention_mask=self._cache.attention_mask,
                past_key_values=self._cache,
                use_cache=True,
            )


@dataclass(frozen=True)
class BlendedPrefill:
    """`kv` has the whole prompt, for `HFModel.decode` to go on from; `logits` `(V,)` are those after its last token;
    the counts of `report` add up to its tokens.
    """

    kv: SequenceKV
    logits: torch.Tensor
    report: BlendReport


class HFBlender:
    """Blends prompts over one model and one store, and remembers every chunk that a separator marks. `seams`: chunks
    are reused as computed after the chunk before them, where `make_seams` has seen both in this order.

    Raises `UnsupportedModel` for a model that can't be blended.
    """

    def __init__(
        self,
        model: HFModel,
        store: ScoredStore,
        *,
        separator: str,
        min_chunk_tokens: int = 16,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        seams: bool = False,
    ) -> None:
        self._model = model
        self._blendable = BlendableModel(model)
        self._blender = Blender(store, model.kv_shape.device)
        self._index = ChunkIndex()
        self.sink = prompt_beginning(model.tokenizer, sink_tokens)
        self._planner = Planner(self._index, min_chunk_tokens=min_chunk_tokens, sink=self.sink)
        self._segmenter = Segmenter(model.tokenizer, separator)
        self._has_seams = seams

    def prefill(
        self, token_ids: Sequence[int], params: BlendParams, capacity: int, *, budget_ms: float | None = None
    ) -> BlendedPrefill:
        """`capacity`: tokens that the KV has room for from the start; it grows. `budget_ms`: as of `Blender.blend`.

        Raises `ValueError` for a check layer that the model doesn't have, `Cancelled` when the model was closed.
        """
        params.check_for(self._model.kv_shape.num_layers)
        kv = self._model.new_kv(capacity)
        report = self._model.run(self._blend, as_token_ids(token_ids), make_policy(params), kv, budget_ms)
        rest = token_ids[kv.length :]
        report.num_computed_tokens += len(rest)
        return BlendedPrefill(kv, self._model.prefill(kv, rest, is_cancelled=lambda: False), report)

    def make_seams(self, token_ids: Sequence[int]) -> BlendReport:
        """Compute each chunk of a prompt after the chunk before it, for `seams` to find."""
        return self._model.run(self._make_seams, as_token_ids(token_ids))

    def score(self, token_ids: Sequence[int]) -> BlendReport:
        """Compute a prompt of several chunks whole, up to its last token, for the scores that it shows of them."""
        return self._model.run(self._score, as_token_ids(token_ids))

    def _make_seams(self, token_ids: TokenIds) -> BlendReport:
        plan = self._plan(token_ids)
        prompt = HFPrefilledModel(self._blendable, token_ids[: plan.end], self._model.new_kv(plan.end))
        seams = self._planner.seams(plan, token_ids)
        return self._blender.blend(
            prompt, BlendTask(plan, 0, plan.end, make_policy(BlendParams("none")), seams=seams, makes_seams=True)
        )

    def _score(self, token_ids: TokenIds) -> BlendReport:
        prompt = HFPrefilledModel(self._blendable, token_ids, self._model.new_kv(len(token_ids)))
        everything = make_policy(BlendParams("all"))
        task = BlendTask(self._plan(token_ids), 0, len(token_ids) - 1, everything, scores=True)
        return self._blender.blend(prompt, task)

    def _blend(
        self, token_ids: TokenIds, policy: SelectionPolicy, kv: SequenceKV, budget_ms: float | None
    ) -> BlendReport:
        """Fill `kv` as far as there is something to reuse."""
        plan = self._plan(token_ids)
        end = self._planner.blend_end(plan, 0, len(token_ids) - 1, recomputes_none=policy.recomputes_none)
        if not end:
            return BlendReport()
        prompt = HFPrefilledModel(self._blendable, token_ids[:end], kv)
        seams = self._planner.seams(plan, token_ids) if self._has_seams else {}
        return self._blender.blend(prompt, BlendTask(plan, 0, end, policy, budget_ms=budget_ms, seams=seams))

    def _plan(self, token_ids: TokenIds) -> ReusePlan:
        """In the model's thread, to which the index belongs."""
        plan = self._planner.plan(token_ids, self._segmenter.segments(token_ids))
        for span in plan:
            if span.is_whole_chunk:
                self._index.add(span.chunk)
        return plan
