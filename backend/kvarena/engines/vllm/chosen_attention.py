"""Attention of chosen tokens in the place of vLLM's: what the forms of it have in common, and the one for GPUs.

vLLM attends to a chosen token as to one that it decodes: each is a row of the batch, and reads all KV before it. The
forms here attend for many tokens at a time, each with its own bound. That for CPUs is compiled (`cpu_kernels`). On a
GPU the prompt's KV is gathered from vLLM's blocks, and PyTorch's SDPA runs over it with a mask. Rows of 600 tokens over
4,000 read 315 GB in an 8B model (32 layers of 8 KV heads of 128, bf16), as far as caches don't help; gathered KV is
read once for each `BLOCK_TOKENS` of them. Whether that is faster on this GPU, and gives what vLLM gives, is tried when
the server starts.
"""

from __future__ import annotations

import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvarena.core.placement import seen_by, wait_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenTokens:
    """In the place of vLLM's metadata of a batch: tokens of one sequence at ascending `positions`, int64 `(T,)` on the
    CPU, whose cache lies in `block_ids`, int32 `(N,)` on the model's device.
    """

    positions: torch.Tensor
    block_ids: torch.Tensor

    @cached_property
    def positions_on_device(self) -> torch.Tensor:
        return self.positions.to(self.block_ids.device, non_blocking=True)


class ChosenAttention(ABC):
    """Over the attention layers of a model in vLLM, in order. `max_row_tokens`: vLLM's own attention is better for runs
    of more neighbours than this, on average.
    """

    max_row_tokens: float

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Meanwhile the layers attend by `attend` where the forward context's metadata is `ChosenTokens`."""
        for layer in self._layers:
            layer.impl.forward = partial(self._forward, layer.impl.forward)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.impl.forward

    def _forward(self, of_vllm: Callable[..., torch.Tensor], layer: Any, *args: Any, **named: Any) -> torch.Tensor:
        """In the place of the `forward` of a layer's implementation."""
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
        """Each token over all of its sequence up to itself, or over the last `window` tokens of that; queries and
        `output` are `(T, H, D)`.
        """


@cache
def _signature(kind: Any) -> inspect.Signature:
    """Of an implementation's `forward`. Looked at once: to read one takes as long as a small layer."""
    return inspect.signature(kind.forward)


def window_of(impl: Any) -> int | None:
    """How many tokens a layer's attention sees, the token itself included; None: all. CPUs and GPUs differ in this."""
    window = impl.sliding_window
    if isinstance(window, tuple):
        return window[0] + 1 if window[0] >= 0 else None
    return window if window is not None and window >= 0 else None


BLOCK_TOKENS = 128
"""So many chosen tokens attend together, up to the last one's position."""
TRIAL_TOKENS = 2048
TRIAL_STRIDE = 7
TRIAL_REPEATS = 3
TOLERANCE = 0.02

Rows = Callable[[Any, torch.Tensor, ChosenTokens, torch.Tensor], None]
"""vLLM's own attention: of a layer, queries `(T, H, D)`, their tokens, into `output` `(T, H, D)`."""


class GatheredAttention(ChosenAttention):
    """Over caches `(blocks, H_kv, block_size, 2 * D)`, keys and then values, as vLLM has them on GPUs."""

    max_row_tokens = 16.0

    @classmethod
    @torch.inference_mode()
    def where_faster(cls, layers: Sequence[Any], rows: Rows) -> GatheredAttention | None:
        """None where vLLM's rows are as fast, and where it can't be used. To be called before any request: the trial
        writes into the first layer's cache.
        """
        if not all(map(_is_supported, layers)):
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
        """Milliseconds for one layer's attention of scattered tokens over random KV, ours and vLLM's. Raises
        `ValueError` where they don't give the same.
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


def _is_supported(layer: Any) -> bool:
    """Plain causal attention over KV in the model's own numbers."""
    impl, cache = layer.impl, layer.kv_cache
    return (
        torch.is_tensor(cache)
        and cache.dim() == 4
        and cache.shape[1] == layer.num_kv_heads
        and cache.shape[3] == 2 * layer.head_size
        and cache.shape[0] > 1
        and cache.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not getattr(impl, "logits_soft_cap", None)
        and getattr(impl, "alibi_slopes", None) is None
        and getattr(impl, "sinks", None) is None
    )


def _trial_blocks(layer: Any) -> int:
    """Behind the first block, which is no sequence's."""
    num_blocks, _, block_size, _ = layer.kv_cache.shape
    return int(min(num_blocks - 1, max(1, TRIAL_TOKENS // block_size)))


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of some runs, after one that compiles and chooses what it needs to."""
    times = []
    for _ in range(1 + TRIAL_REPEATS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])
