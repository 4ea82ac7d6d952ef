"""Our kernels over vLLM's CPU cache: attention of chosen tokens, and chunks' KV rotated and written in one pass.

For processors with AVX-512, in fp32 and where there are products of it in bf16, in the cache's layout for vLLM's `vec`
kernels. vLLM attends to a chosen token as to a decoded one, row by row with fp32 products; here the tokens of a block
and the query heads of one KV head are rows of one product. cpu_kernels.cpp is compiled when a server first needs it,
which takes seconds. Without a compiler, or elsewhere, vLLM's own kernels do the same.
"""

from __future__ import annotations

import ctypes
import logging
import math
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvarena.core.rope import Rerotation, Rotation
from kvarena.engines.vllm.build_kernels import compiled
from kvarena.engines.vllm.chosen_attention import ChosenAttention, ChosenTokens

logger = logging.getLogger(__name__)

MAX_BLOCK_TOKENS = 64
"""So many chosen tokens attend together: packing the cache for them is then next to nothing."""
_ALL = 1 << 62


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason in the log, where there are none."""
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        details = getattr(error, "stderr", "") or str(error)
        logger.warning("blending without kernels of its own, and slower; they can't be compiled: %s", details.strip())
        return None


class CPUKernels(ChosenAttention):
    """Runs of neighbours and whole prompts take no longer than by vLLM's own attention."""

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
        """None where vLLM's own have to do."""
        if not all(map(_is_supported, layers)) or (found := library()) is None:
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
        """KV `(2, L, t, H_kv * D)` in the cache's dtype into the cache, straight from where each part lies.

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


def _is_supported(layer: Any) -> bool:
    """Plain causal attention over a cache that our kernels read, on a processor that they are for."""
    impl, kv_cache = layer.impl, layer.kv_cache
    return (
        type(impl) is CPUAttentionBackendImpl
        and getattr(layer, "isa", None) == "vec"
        and kv_cache.dtype in _supported_dtypes()
        and kv_cache.is_contiguous()
        and kv_cache.shape[2] % 32 == 0
        and layer.head_size % 32 == 0
        and not impl.logits_soft_cap
        and impl.alibi_slopes is None
        and impl.sinks is None
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
