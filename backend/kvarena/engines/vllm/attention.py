"""vLLM's attention layers during our own forwards: what passes is read, and chosen tokens attend in another way.

Both take the place of a `forward` while such a forward runs; stock traffic is never hooked. A hook may end the forward
that it was put there for, by `EndForward`.

vLLM attends to a chosen token as to one that it decodes: each is a row of the batch, and reads all KV before it. The
two forms of `ChosenAttention` attend for many tokens at a time, each with its own bound.

- `GatheredAttention`, for GPUs: the prompt's KV is gathered from vLLM's blocks, and PyTorch's SDPA runs over it with a
  mask. Rows of 600 tokens over 4,000 read 315 GB in an 8B model (32 layers of 8 KV heads of 128, bf16), as far as
  caches don't help; gathered KV is read once for each `BLOCK_TOKENS` of them. Whether that is faster on this GPU, and
  gives what vLLM gives, is tried when the server starts.
- `CPUKernels`, for processors with AVX-512, in fp32 and where there are products of it in bf16, in the cache's layout
  for vLLM's `vec` kernels: the tokens of a block and the query heads of one KV head are rows of one product. They also
  rotate chunks' KV and write it into the cache in one pass. cpu_kernels.cpp is compiled when a server first needs it,
  which takes seconds. Without a compiler, or elsewhere, vLLM's own kernels do the same.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import math
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvarena.core.attention import seen_by
from kvarena.core.devices import wait_for
from kvarena.core.rope import Rerotation, Rotation
from kvarena.engines.vllm.build_kernels import compiled

logger = logging.getLogger(__name__)

LayerHook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def reading(
    attentions: Sequence[torch.nn.Module], layers: Sequence[int], on_layer: LayerHook, *, before_others: bool = False
) -> Iterator[None]:
    """Call `on_layer(layer, queries, keys, values)` before these layers attend. Tensors are `(T, heads * D)`, queries
    and keys rotated, and valid only during the call.
    """
    hooked = [(_hooked_forward(attentions[layer]), partial(on_layer, layer)) for layer in layers]
    for forward, hook in hooked:
        forward.hooks.insert(0 if before_others else len(forward.hooks), hook)
    try:
        yield
    finally:
        for forward, hook in hooked:
            forward.hooks.remove(hook)
        for layer in layers:
            if not _hooked_forward(attentions[layer]).hooks:
                del attentions[layer].forward


@dataclass
class _HookedForward:
    """An attention layer's `forward` with hooks on what it is given. In its place, and not one of torch's own hooks:
    vLLM calls the layers of models that come from Transformers past those.
    """

    original: Callable[..., torch.Tensor]
    hooks: list[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = [*args, *kwargs.values()][:3]
        for hook in self.hooks:
            hook(query.flatten(1), key.flatten(1), value.flatten(1))
        return self.original(*args, **kwargs)


def _hooked_forward(attention: torch.nn.Module) -> _HookedForward:
    if not isinstance(attention.forward, _HookedForward):
        attention.forward = _HookedForward(attention.forward)
    return attention.forward


@dataclass(frozen=True)
class ChosenTokens:
    """Takes the place of vLLM's metadata for a batch: tokens of one sequence at ascending `positions`, int64 `(T,)` on
    the CPU, whose cache is in `block_ids`, int32 `(N,)` on the model's device.
    """

    positions: torch.Tensor
    block_ids: torch.Tensor

    @cached_property
    def positions_on_device(self) -> torch.Tensor:
        return self.positions.to(self.block_ids.device, non_blocking=True)


class ChosenAttention(ABC):
    """Over a model's attention layers, in order. Where runs of neighbours are longer than `max_row_tokens` on average,
    vLLM's own attention is better.
    """

    max_row_tokens: float

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The layers attend by `attend` where the forward context's metadata is `ChosenTokens`."""
        for layer in self._layers:
            layer.impl.forward = partial(self._forward, layer.impl.forward)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.impl.forward

    def _forward(self, of_vllm: Callable[..., torch.Tensor], layer: Any, *args: Any, **named: Any) -> torch.Tensor:
        """Takes the place of `forward` of a layer's implementation."""
        kind: Any = type(layer.impl)
        given = _signature(kind).bind(layer.impl, layer, *args, **named).arguments
        if not isinstance(given["attn_metadata"], ChosenTokens):
            return of_vllm(layer, *args, **named)
        output: torch.Tensor = given["output"]
        window = window_of(layer.impl)
        self.attend(given["query"], given["kv_cache"], given["attn_metadata"], layer.impl.scale, output, window)
        return output

    @abstractmethod
    def attend(
        self,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        tokens: ChosenTokens,
        scale: float,
        output: torch.Tensor,
        window: int | None = None,
    ) -> None:
        """Each token attends to its sequence up to itself, or to the last `window` tokens of that; queries and `output`
        are `(T, H, D)`.
        """


@cache
def _signature(kind: Any) -> inspect.Signature:
    """Of an implementation's `forward`; cached, for reading one takes as long as a small layer."""
    return inspect.signature(kind.forward)


def window_of(impl: Any) -> int | None:
    """How many tokens a layer's attention sees, the token itself included; None: all. vLLM says it in one way for CPUs
    and in another for GPUs.
    """
    window = impl.sliding_window
    if isinstance(window, tuple):
        return window[0] + 1 if window[0] >= 0 else None
    return window if window is not None and window >= 0 else None


BLOCK_TOKENS = 128
"""So many chosen tokens attend together, over the KV up to the last one's position."""
TRIAL_TOKENS = 2048
TRIAL_STRIDE = 7
TRIAL_REPEATS = 3
TOLERANCE = 0.02

Rows = Callable[[Any, torch.Tensor, ChosenTokens, torch.Tensor], None]
"""vLLM's own attention: of a layer, queries `(T, H, D)`, their tokens, into `output` `(T, H, D)`."""


class GatheredAttention(ChosenAttention):
    """For vLLM's caches on GPUs, `(blocks, H_kv, block_size, 2 * D)`, keys and then values."""

    max_row_tokens = 16.0

    @classmethod
    @torch.inference_mode()
    def where_faster(cls, layers: Sequence[Any], rows: Rows) -> GatheredAttention | None:
        """None where it can't be used, or is no faster than vLLM's rows. To be called before any request: the trial
        writes into the first layer's cache.
        """
        if not all(map(_is_gatherable, layers)):
            return None
        gathered, layer = cls(layers), layers[0]
        try:
            took_ms, rows_ms = gathered._trial(layer, rows)
        except Exception as error:  # of whatever kernel; nothing but speed depends on it
            logger.warning("chosen tokens attend row by row, as vLLM has it; gathering their KV failed: %s", error)
            return None
        finally:
            layer.kv_cache[1 : 1 + _trial_blocks(layer)].zero_()
        logger.info("attention of scattered tokens, a layer: %.2f ms gathered, %.2f ms row by row", took_ms, rows_ms)
        return gathered if took_ms < rows_ms else None

    def attend(
        self,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        tokens: ChosenTokens,
        scale: float,
        output: torch.Tensor,
        window: int | None = None,
    ) -> None:
        num_tokens, num_heads, head_size = queries.shape
        _, num_kv_heads, block_size, _ = kv_cache.shape
        needed = tokens.block_ids[: int(tokens.positions[-1]) // block_size + 1]
        kv = kv_cache[needed].transpose(0, 1).flatten(1, 2)  # (H_kv, T, 2 * D)
        grouped = (num_kv_heads, num_heads // num_kv_heads)
        for start in range(0, num_tokens, BLOCK_TOKENS):
            own = slice(start, min(start + BLOCK_TOKENS, num_tokens))
            first, end = int(tokens.positions[own.start]), int(tokens.positions[own.stop - 1]) + 1
            begin = 0 if window is None else max(0, first + 1 - window)
            mask = seen_by(tokens.positions_on_device[own], end, window)[:, begin:]
            keys, values = kv[None, :, begin:end].split(head_size, dim=-1)
            # The query heads of a KV head are rows of one product.
            packed = queries[own].unflatten(1, grouped).permute(1, 2, 0, 3).flatten(1, 2)[None]
            attended = scaled_dot_product_attention(
                packed, keys, values, attn_mask=mask.repeat(grouped[1], 1), scale=scale
            )
            by_head = attended[0].unflatten(1, (grouped[1], -1)).permute(2, 0, 1, 3)  # (t, H_kv, G, D)
            output[own].copy_(by_head.reshape(-1, num_heads, head_size))

    def _trial(self, layer: Any, rows: Rows) -> tuple[float, float]:
        """Milliseconds of a layer's attention of scattered tokens over random KV, ours and vLLM's. Raises `ValueError`
        where the results differ.
        """
        cache, num_blocks = layer.kv_cache, _trial_blocks(layer)
        block_ids = torch.arange(1, 1 + num_blocks, dtype=torch.int32, device=cache.device)
        cache[1 : 1 + num_blocks].normal_()
        positions = torch.arange(0, num_blocks * cache.shape[2], TRIAL_STRIDE)
        tokens = ChosenTokens(positions, block_ids)
        shape = (len(positions), layer.num_heads, layer.head_size)
        queries = torch.randn(shape, dtype=cache.dtype, device=cache.device)
        ours, theirs = torch.zeros_like(queries), torch.zeros_like(queries)
        impl = layer.impl
        took_ms = _milliseconds(
            lambda: self.attend(queries, cache, tokens, impl.scale, ours, window_of(impl)), cache.device
        )
        rows_ms = _milliseconds(lambda: rows(layer, queries, tokens, theirs), cache.device)
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error < TOLERANCE:
            raise ValueError(f"it differs from vLLM's by {error:.3f}")
        return took_ms, rows_ms


def _is_gatherable(layer: Any) -> bool:
    """Plain causal attention over KV that isn't quantised."""
    impl, cache = layer.impl, layer.kv_cache
    return (
        torch.is_tensor(cache)
        and cache.dim() == 4
        and cache.shape[1] == layer.num_kv_heads
        and cache.shape[3] == 2 * layer.head_size
        and cache.shape[0] > 1
        and cache.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and _is_plain(impl)
    )


def _is_plain(impl: Any) -> bool:
    """Whether it takes nothing but scaled products of queries and keys."""
    has_bias = any(getattr(impl, name, None) is not None for name in ("alibi_slopes", "sinks"))
    return not has_bias and not getattr(impl, "logits_soft_cap", None)


def _trial_blocks(layer: Any) -> int:
    """How many blocks after the first, which is no sequence's, the trial uses."""
    num_blocks, _, block_size, _ = layer.kv_cache.shape
    return int(min(num_blocks - 1, max(1, TRIAL_TOKENS // block_size)))


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of some runs, after one to warm up."""
    times = []
    for _ in range(1 + TRIAL_REPEATS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


MAX_BLOCK_TOKENS = 64
"""So many chosen tokens attend together: packing the cache for them then costs next to nothing."""
_ALL = 1 << 62


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason logged, where there are none."""
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        details = getattr(error, "stderr", "") or str(error)
        logger.warning("blending without kernels of its own, and slower; they can't be compiled: %s", details.strip())
        return None


class CPUKernels(ChosenAttention):
    """Also for long runs of neighbours: they take no longer than by vLLM's own attention."""

    max_row_tokens = math.inf

    def __init__(self, layers: Sequence[Any], library: ctypes.CDLL) -> None:
        super().__init__(layers)
        self._library = library
        _, self._num_kv_heads, self._block_size, _ = layers[0].kv_cache.shape
        self._head_size: int = layers[0].head_size
        self._dtype: torch.dtype = layers[0].kv_cache.dtype
        self._is_bf16 = ctypes.c_int64(self._dtype == torch.bfloat16)

    @classmethod
    def for_layers(cls, layers: Sequence[Any]) -> CPUKernels | None:
        """None where vLLM's own kernels have to do."""
        if not all(map(_has_kernels, layers)) or (found := library()) is None:
            return None
        return cls(layers, found)

    def attend(
        self,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        tokens: ChosenTokens,
        scale: float,
        output: torch.Tensor,
        window: int | None = None,
    ) -> None:
        num_tokens, num_heads, head_size = queries.shape
        assert queries.stride()[1:] == output.stride()[1:] == (head_size, 1), "heads that aren't contiguous"
        shared = num_heads // self._num_kv_heads
        # Some blocks for every thread, and at least rows for whole products.
        for_threads = min(num_tokens * self._num_kv_heads // (4 * torch.get_num_threads()), MAX_BLOCK_TOKENS)
        given = _Attention(
            *(x.data_ptr() for x in (queries, kv_cache, tokens.block_ids, tokens.positions, output)),
            query_stride=queries.stride(0),
            output_stride=output.stride(0),
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads,
            head_size=head_size,
            block_size=self._block_size,
            block_tokens=max(for_threads, -(-12 // shared)),
            window=window or _ALL,
            scale=scale,
        )
        self._library.attend(ctypes.byref(given), self._is_bf16)

    def place(
        self,
        parts: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor],
        rotations: Sequence[Rotation | None],
        rerotations: Mapping[Rotation, Rerotation],
    ) -> None:
        """Write parts of KV `(2, L, t, H_kv * D)` in the cache's dtype into the cache, from wherever they are.

        `slots` has for each layer those of all parts' tokens, int64 `(T,)`; keys are rotated by their layer's
        rerotation, if there is one. Raises `ValueError` for KV of another model.
        """
        expected = (2, len(self._layers), self._num_kv_heads * self._head_size)
        for kv in parts:
            if (*kv.shape[:2], *kv.shape[3:]) != expected or kv.dtype != self._dtype or kv.stride(3) != 1:
                raise ValueError(f"KV {tuple(kv.shape)} in {kv.dtype} for {expected} in {self._dtype}")
        tables = {rotation: (by.cos.flatten(1), by.sin.flatten(1)) for rotation, by in rerotations.items()}
        layers = (_Layer * len(self._layers))()
        for layer, own, attention, rotation in zip(layers, slots, self._layers, rotations, strict=True):
            layer.kv, layer.slots = attention.kv_cache.data_ptr(), own.data_ptr()
            if rotation and rotation in tables:
                cos, sin = tables[rotation]
                layer.cos, layer.sin, layer.num_pairs = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
                layer.is_neox = rotation.is_neox
        given = (_Part * len(parts))()
        for part, kv in zip(given, parts, strict=True):
            part.kv, part.num_tokens = kv.data_ptr(), kv.shape[2]
            part.kv_stride, part.layer_stride, part.token_stride, _ = kv.stride()
        sizes = (self._num_kv_heads, self._head_size, self._block_size)
        self._library.place(
            *(layers, ctypes.c_int64(len(layers)), given, ctypes.c_int64(len(given))),
            *map(ctypes.c_int64, sizes),
            self._is_bf16,
        )


def _has_kernels(layer: Any) -> bool:
    """Plain causal attention over a cache and on a processor that our kernels are for."""
    impl, kv_cache = layer.impl, layer.kv_cache
    return (
        type(impl) is CPUAttentionBackendImpl
        and getattr(layer, "isa", None) == "vec"
        and kv_cache.dtype in _supported_dtypes()
        and kv_cache.is_contiguous()
        and kv_cache.shape[2] % 32 == 0
        and layer.head_size % 32 == 0
        and _is_plain(impl)
    )


def _supported_dtypes() -> list[torch.dtype]:
    if not torch.cpu._is_avx512_supported():
        return []
    return [torch.float32, *([torch.bfloat16] if torch.cpu._is_avx512_bf16_supported() else [])]


class _Attention(ctypes.Structure):
    """`Attention` of cpu_kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "kv", "table", "positions", "output")),
        *((name, ctypes.c_int64) for name in ("query_stride", "output_stride", "num_tokens", "num_heads")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "head_size", "block_size", "block_tokens", "window")),
        ("scale", ctypes.c_double),
    )


class _Layer(ctypes.Structure):
    """`Layer` of cpu_kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kv", "slots", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_pairs", "is_neox")),
    )


class _Part(ctypes.Structure):
    """`Part` of cpu_kernels.cpp."""

    _fields_ = (
        ("kv", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_tokens", "kv_stride", "layer_stride", "token_stride")),
    )
