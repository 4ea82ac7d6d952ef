"""The blend over a Hugging Face model: its forwards are the model's own, over the memory of its `SequenceKV`.

In order: the cache of a forward over chosen tokens, which ends where the last of their KV is known (`KVKnown`); a
layer that goes on with fewer tokens; which models can be blended, and how their keys rotate, tried on a token; the
`PrefilledModel` of one prompt; `HFBlender`, which plans, blends up to the last chunk's end and prefills the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from kvarena.core.blend import Blender, BlendReport
from kvarena.core.matching import ChunkIndex, Planner, Segmenter
from kvarena.core.plan import ReusePlan, TokenIds, as_token_ids
from kvarena.core.policy import SelectionPolicy
from kvarena.core.prefilled_model import LayerKV, OneRank, Ranks, TokenFilter
from kvarena.core.rope import Rotation, fitting_rotations, inverse_frequencies, refuse_length_dependent
from kvarena.core.store import ChunkStore
from kvarena.engines.hf import attention
from kvarena.engines.hf.model import HFModel, UnsupportedModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.policies.params import BlendParams, make_policy


class KVKnown(Exception):
    """Ends a forward pass on purpose. `fresh` is the KV of the layer at which it ends."""

    def __init__(self, fresh: LayerKV) -> None:
        super().__init__()
        self.fresh = fresh


class PromptCache(Cache):
    """Over a prompt's memory `(L, 2, H_kv, T, D)`. Differs from `Cache` in where fresh KV is written.

    `positions` `(T_q,)` are those of the tokens under way, ascending; `mask` `(1, 1, T_q, end)` lets each attend to
    everything up to itself, and `end` is behind the last. `ends_with_last_keys`: what lies behind the last layer's keys
    isn't run.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.positions = torch.empty(0, dtype=torch.int64)
        self.mask = torch.empty(1, 1, 0, 0, dtype=torch.bool)
        self.end = 0
        self.ends_with_last_keys = True
        self._is_probing = False

    def go_on_with(self, positions: torch.Tensor) -> None:
        """These tokens are all that comes from now on."""
        self.positions = positions
        self.end = int(positions[-1]) + 1
        self.mask = (torch.arange(self.end, device=positions.device) <= positions[:, None])[None, None]

    def probed_kv(self, layer: Callable[..., object], *args: object, **kwargs: object) -> LayerKV:
        """Runs a layer until its fresh KV is known, and writes nothing."""
        self._is_probing = True
        try:
            layer(*args, **kwargs)
        except KVKnown as known:
            return known.fresh
        finally:
            self._is_probing = False
        raise AssertionError("a layer without KV")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's `(1, H_kv, T_q, D)`; returns that layer's of all tokens up to the last one under way."""
        fresh = LayerKV(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if self._is_probing:
            raise KVKnown(fresh)
        own = self.memory[layer_idx]  # (2, H_kv, T, D)
        own[0, :, self.positions] = key_states[0]
        own[1, :, self.positions] = value_states[0]
        if self.ends_with_last_keys and layer_idx == len(self.memory) - 1:
            raise KVKnown(fresh)
        return own[0:1, :, : self.end], own[1:2, :, : self.end]


LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class FilteredLayer:
    """A context in which a layer goes on with chosen tokens only. `kept` are their positions, once it has run.

    The layer is run up to its KV to let `choose` see them, and is then called with the rows of its inputs that were
    chosen; so are the layers behind it, which the model hands the same masks, angles and positions. Where a prompt
    takes several pieces, the first ones end at this layer and leave their inputs, and the last one goes on with what
    was chosen of all. Inputs that only later layers use are narrowed where there is one piece.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], narrowing: TokenFilter, cache: PromptCache, num_pieces: int
    ) -> None:
        self.kept = torch.empty(0, dtype=torch.int64)
        self._layer, *self._later_layers = layers[narrowing.layer :]
        self._choose = narrowing.choose
        self._cache = cache
        self._num_pieces = num_pieces
        self._calls: list[LayerCall] = []
        self._positions: list[torch.Tensor] = []
        self._kv: list[LayerKV] = []
        self._narrowed_inputs: dict[int, torch.Tensor] = {}
        self._chosen = torch.empty(0, dtype=torch.int64)

    def __enter__(self) -> FilteredLayer:
        self._handles = [self._layer.register_forward_pre_hook(self._hook, with_kwargs=True)]
        self._handles += [
            layer.register_forward_pre_hook(self._later_hook, with_kwargs=True) for layer in self._later_layers
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        self._calls.append((args, kwargs))
        self._positions.append(self._cache.positions)
        self._kv.append(self._cache.probed_kv(module.forward, *args, **kwargs))
        if len(self._calls) < self._num_pieces:
            raise KVKnown(self._kv[-1])
        return self._narrowed()

    def _later_hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        call: LayerCall = tree_map(self._narrowed_later, (args, kwargs))
        return call

    def _narrowed_later(self, x: Any) -> Any:
        """A later layer's input: as narrowed here, or now, where only that layer uses it (angles of another base)."""
        num_before = len(self._positions[0])
        is_new = self._num_pieces == 1 and len(self.kept) < num_before and id(x) not in self._narrowed_inputs
        if is_new and _has_rows(x, num_before):
            self._narrowed_inputs[id(x)] = x[:, self._chosen]
        return self._narrowed_inputs.get(id(x), x)

    def _narrowed(self) -> LayerCall:
        """One call with the chosen rows of every piece's inputs; what has no row per token is the last piece's."""
        positions = torch.cat(self._positions)
        fresh = LayerKV(*map(torch.cat, zip(*self._kv, strict=True)))
        chosen = self._choose(positions.cpu(), fresh).to(positions.device)
        self.kept = positions[chosen].cpu()
        self._chosen = chosen
        mask_of_all = self._cache.mask
        self._cache.go_on_with(positions[chosen])
        self._narrowed_inputs[id(mask_of_all)] = self._cache.mask
        counts = [len(piece) for piece in self._positions]

        def join(*inputs: Any) -> Any:
            known = self._narrowed_inputs.get(id(inputs[-1]))
            if known is None and all(_has_rows(x, n) for x, n in zip(inputs, counts, strict=True)):
                known = self._narrowed_inputs[id(inputs[-1])] = torch.cat(inputs, dim=1)[:, chosen]
            return inputs[-1] if known is None else known

        joined: LayerCall = tree_map(join, *self._calls)
        return joined


def _has_rows(x: Any, num_tokens: int) -> bool:
    return torch.is_tensor(x) and x.dim() > 1 and x.shape[1] == num_tokens


_FAR_POSITION = 1000


class BlendableModel:
    """A model, its decoder layers, first to last, and their rotations.

    Raises `UnsupportedModel` with the reason for one whose KV can't be blended.
    """

    def __init__(self, model: HFModel) -> None:
        self.model = model
        try:
            _refuse_attention(model)
            self.layers = _decoder_layers(model.module, model.kv_shape.num_layers)
            self.rotations: Sequence[Rotation | None] = model.run(_rotations, model)
        except ValueError as error:
            raise UnsupportedModel(f"{type(model.module).__name__} can't be blended: {error}") from error

    @property
    def has_several_rotations(self) -> bool:
        """Whether layers turn keys differently, so that the model hands them different angles."""
        return len(set(self.rotations) - {None}) > 1


def _refuse_attention(model: HFModel) -> None:
    config = model.module.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", attention.NAME):
        raise ValueError(f"its attention is {implementation!r}; the blend's masks are for sdpa and {attention.NAME}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention", "sliding_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers of {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and window < model.max_model_len:
        raise ValueError(
            f"its sliding window of {window} tokens is shorter than the context of {model.max_model_len} tokens"
        )


def _decoder_layers(module: torch.nn.Module, num_layers: int) -> list[torch.nn.Module]:
    lists = (found for found in module.modules() if isinstance(found, torch.nn.ModuleList))
    layers = next((found for found in lists if len(found) == num_layers), None)
    if layers is None:
        raise ValueError(f"it has no list of {num_layers} layers, one for each layer of its KV")
    return list(layers)


def _rotations(model: HFModel) -> list[Rotation | None]:
    """Each layer's rotation; None for a layer whose keys don't turn.

    Which of them a layer uses, and whether dimensions pair by halves or side by side, shows in its keys.
    """
    refuse_length_dependent(_rope_types(model.module))
    frequencies = inverse_frequencies(model.module)
    if not frequencies:
        raise ValueError("without rotary embeddings its keys can't be moved")
    candidates = [Rotation(inv_freq, is_neox) for inv_freq in frequencies for is_neox in (True, False)]
    distance = min(_FAR_POSITION, model.max_model_len - 1)
    return fitting_rotations(candidates, _keys_at(model, 0), _keys_at(model, distance), distance)


def _rope_types(module: torch.nn.Module) -> set[str]:
    """Of all rotary embeddings; one that serves several kinds of layers has a type for each."""
    found = [getattr(m, "rope_type", "default") for m in module.modules()]
    return {str(kind) for own in found for kind in (own.values() if isinstance(own, dict) else [own])}


def _keys_at(model: HFModel, position: int) -> torch.Tensor:
    """The keys `(L, H_kv, D)` of a token by itself: it attends to nothing else, so only its position shows."""
    kv = model.new_kv(1)
    position_ids = torch.tensor([[position]], device=model.kv_shape.device)
    model.forward([model.vocab_size // 2], position_ids=position_ids, past_key_values=kv, use_cache=True)
    return kv.filled(0, 1)[:, 0, :, 0].float()


class QueriesKnown(Exception):
    """Ends a forward pass on purpose."""


class HFPrefilledModel:
    """Implements `kvarena.core.prefilled_model.PrefilledModel`. To be used in the model's thread.

    From the start `kv` counts as filled up to `len(token_ids)`; what it didn't hold is for the caller to fill.
    """

    def __init__(self, engine: BlendableModel, token_ids: TokenIds, kv: SequenceKV) -> None:
        kv.extend(len(token_ids) - kv.length)
        shape = engine.model.kv_shape
        self.rotations = engine.rotations
        self.head_size = shape.head_size
        self.device = shape.device
        self.ranks: Ranks = OneRank()
        self._engine = engine
        self._token_ids = token_ids
        self._cache = PromptCache(kv.filled(0, len(token_ids)))

    def prefill_alone(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        return [self._prefill_one_alone(text) for text in texts]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        where = positions.to(self.device)
        own = self._cache.memory[layer]  # (2, H_kv, T, D)
        own[0].index_copy_(1, where, keys.transpose(0, 1))
        own[1].index_copy_(1, where, values.transpose(0, 1))

    def forward(self, positions: torch.Tensor, narrowings: Sequence[TokenFilter] = ()) -> torch.Tensor:
        pieces = self._pieces(positions)
        if narrowings and self._engine.has_several_rotations:
            pieces = [positions]
        num_pieces, kept = len(pieces), positions
        with ExitStack() as stack:
            narrowed = []
            for narrowing in narrowings:
                layer = FilteredLayer(self._engine.layers, narrowing, self._cache, num_pieces)
                narrowed.append(stack.enter_context(layer))
                num_pieces = 1
            for piece in pieces:
                self._run(piece)
            if narrowed:
                kept = narrowed[-1].kept
        return kept

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def keep(number: int, queries: torch.Tensor) -> None:
            if number == layer:
                found.append(queries[0].transpose(0, 1))
                raise QueriesKnown

        self._cache.ends_with_last_keys = False
        try:
            with attention.reading_queries(self._engine.model.module, keep):
                for piece in self._pieces(positions):
                    with suppress(QueriesKnown):
                        self._run(piece)
        finally:
            self._cache.ends_with_last_keys = True
        return torch.cat(found)

    def _pieces(self, positions: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(positions, self._engine.model.piece_tokens)

    def _prefill_one_alone(self, text: TokenIds) -> torch.Tensor:
        kv = SequenceKV(self._engine.model.kv_shape, len(text))
        HFPrefilledModel(self._engine, text, kv).forward(torch.arange(len(text)))
        return kv.filled(0, len(text)).permute(1, 0, 3, 2, 4).flatten(3)  # (2, L, T, H_kv * D)

    def _run(self, positions: torch.Tensor) -> None:
        """Runs these tokens until their KV is complete: behind the last layer's keys nothing is needed."""
        self._cache.go_on_with(positions.to(self.device))
        with suppress(KVKnown):
            self._engine.model.forward(
                self._token_ids[positions.numpy()].tolist(),
                position_ids=self._cache.positions[None],
                attention_mask=self._cache.mask,
                past_key_values=self._cache,
                use_cache=True,
            )


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
        report = self._model.run(self._blend, as_token_ids(token_ids), make_policy(params), kv, budget_ms)
        rest = token_ids[kv.length :]
        report.num_computed_tokens += len(rest)
        return BlendedPrefill(kv, self._model.prefill(kv, rest, is_cancelled=lambda: False), report)

    def _blend(
        self, token_ids: TokenIds, policy: SelectionPolicy, kv: SequenceKV, budget_ms: float | None
    ) -> BlendReport:
        """Fills `kv` as far as there is something to reuse."""
        plan = self._plan(token_ids)
        end = self._planner.blend_end(plan, 0, len(token_ids) - 1)
        if not end:
            return BlendReport()
        prompt = HFPrefilledModel(self._blendable, token_ids[:end], kv)
        return self._blender.blend(prompt, plan.clipped(0, end), 0, end, policy, budget_ms=budget_ms)

    def _plan(self, token_ids: TokenIds) -> ReusePlan:
        """In the model's thread, to which the index belongs."""
        plan = self._planner.plan(token_ids, self._segmenter.segments(token_ids))
        for span in plan:
            if span.is_whole_chunk:
                self._index.add(span.chunk)
        return plan
