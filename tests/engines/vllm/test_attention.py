"""Attention of chosen tokens equals plain PyTorch, over KV gathered from vLLM's blocks and by our kernels for CPUs.

For GPUs the layers are stand-ins: a cache in vLLM's layout there, and rows that plain PyTorch attends to. That form is
used only where it is the faster one. The kernels also write what vLLM itself writes into its cache.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm._custom_ops import cpu_attn_reshape_and_cache

from kvarena.core.rope import Rotation
from kvarena.engines.vllm import attention
from kvarena.engines.vllm.attention import ChosenTokens, CPUKernels, GatheredAttention, library, window_of
from kvarena.engines.vllm.build_kernels import FOLDER, compiled

BLOCK_SIZE, NUM_BLOCKS = 16, 40


class RowsImpl:
    """As FlashAttention's: the window is a pair."""

    logits_soft_cap = 0
    alibi_slopes = sinks = None

    def __init__(self, scale: float, window: int | None) -> None:
        self.scale = scale
        self.sliding_window = (-1, -1) if window is None else (window - 1, 0)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ChosenTokens,
        output: torch.Tensor,
    ) -> torch.Tensor:
        raise AssertionError("not for chosen tokens")


def make_layer(
    num_heads: int = 8, num_kv_heads: int = 2, head_size: int = 32, window: int | None = None, **changed: Any
) -> Any:
    torch.manual_seed(0)
    impl = RowsImpl(0.7 * head_size**-0.5, window)
    vars(impl).update(changed)
    cache = torch.randn(NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, 2 * head_size)
    return SimpleNamespace(
        impl=impl, kv_cache=cache, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size
    )


def by_rows(layer: Any, queries: torch.Tensor, tokens: ChosenTokens, output: torch.Tensor) -> None:
    """Token by token, over what it sees."""
    window = window_of(layer.impl)
    for row, position in enumerate(tokens.positions.tolist()):
        seen = torch.arange(0 if window is None else max(0, position + 1 - window), position + 1)
        cells = layer.kv_cache[tokens.block_ids[seen // BLOCK_SIZE].long(), :, seen % BLOCK_SIZE]  # (T, H_kv, 2 * D)
        keys, values = cells.transpose(0, 1).split(layer.head_size, dim=-1)
        query = queries[row][:, None]
        output[row] = scaled_dot_product_attention(
            query[None], keys[None], values[None], scale=layer.impl.scale, enable_gqa=True
        )[0, :, 0]


@pytest.mark.parametrize("window", [None, 1, 24, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize("stride", [1, 3, 50])
def test_gathered_kv_gives_what_rows_give(num_heads: int, num_kv_heads: int, stride: int, window: int | None) -> None:
    layer = make_layer(num_heads, num_kv_heads, window=window)
    tokens = ChosenTokens(torch.arange(5, 500, stride), torch.randperm(NUM_BLOCKS)[:32].int())
    queries = torch.randn(len(tokens.positions), num_heads, 32)
    expected, found = torch.empty_like(queries), torch.empty_like(queries)
    by_rows(layer, queries, tokens, expected)
    with GatheredAttention([layer]).attending():
        layer.impl.forward(layer, queries, queries, queries, layer.kv_cache, tokens, output=found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="not for chosen tokens"):
        layer.impl.forward(layer, queries, queries, queries, layer.kv_cache, tokens, output=found)


@pytest.mark.parametrize(("times_ms", "is_used"), [([1.0, 2.0], True), ([2.0, 1.0], False)])
def test_the_faster_one_is_used(times_ms: list[float], is_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are run, whatever the clock says; what the trial wrote is gone."""
    measured = iter(times_ms)

    def milliseconds(work: Any, _device: object) -> float:
        work()
        return next(measured)

    monkeypatch.setattr(attention, "_milliseconds", milliseconds)
    layer = make_layer(window=40)
    untouched = layer.kv_cache[0].clone()
    found = GatheredAttention.where_faster([layer], by_rows)
    assert (found is not None) == is_used
    assert torch.equal(layer.kv_cache[0], untouched), "the first block is no sequence's, and stays as it is"
    assert not layer.kv_cache[1:].any()


@pytest.mark.parametrize("fails", ["differs", "raises"])
def test_what_goes_wrong_leaves_the_rows(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(layer: Any, queries: torch.Tensor, tokens: ChosenTokens, output: torch.Tensor) -> None:
        if fails == "raises":
            raise RuntimeError("no kernel image")
        by_rows(layer, queries, tokens, output)
        output *= 1.1

    assert GatheredAttention.where_faster([make_layer()], wrong) is None
    assert "row by row, as vLLM has it" in caplog.text


@pytest.mark.parametrize(
    "changed", [{"logits_soft_cap": 30.0}, {"alibi_slopes": torch.ones(8)}, {"sinks": torch.ones(8)}]
)
def test_attention_of_another_kind_is_left_alone(changed: dict[str, Any]) -> None:
    assert GatheredAttention.where_faster([make_layer(), make_layer(**changed)], by_rows) is None


def test_a_cache_in_another_layout_is_left_alone() -> None:
    layer = make_layer()
    layer.kv_cache = layer.kv_cache.transpose(1, 2)
    assert GatheredAttention.where_faster([layer], by_rows) is None


@pytest.mark.parametrize(("window", "seen"), [((-1, -1), None), ((23, 0), 24), (-1, None), (24, 24), (None, None)])
def test_windows_of_cpus_and_gpus(window: Any, seen: int | None) -> None:
    assert window_of(SimpleNamespace(sliding_window=window)) == seen


def test_times_are_those_of_the_work(caplog: pytest.LogCaptureFixture) -> None:
    """With the real clock, and both times in the log."""
    with caplog.at_level(logging.INFO):
        GatheredAttention.where_faster([make_layer()], by_rows)
    assert "ms gathered" in caplog.text


needs_kernels = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported() or not shutil.which(os.environ.get("CXX") or "g++"),
    reason="needs a processor with AVX-512, and a compiler",
)
needs_bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs products of bf16")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
NUM_LAYERS = 2
SHAPES = [  # heads, KV heads, head size, block size, tokens of the prompt
    (16, 4, 64, 128, 1000),
    (9, 3, 64, 32, 611),
    (8, 8, 128, 64, 300),
    (14, 2, 96, 128, 257),
    (4, 2, 32, 32, 33),
    (7, 1, 256, 64, 130),
]


class Paged:
    """The cache of a prompt, random blocks of it in random order; what isn't the prompt's is no number."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        _, num_kv_heads, head_size, block_size, num_tokens = shape
        torch.manual_seed(num_tokens)
        num_blocks = -(-num_tokens // block_size)
        self.block_ids = torch.randperm(num_blocks + 3)[:num_blocks].int()
        of_cache = (num_blocks + 3, num_kv_heads, block_size, 2 * head_size)
        positions = torch.arange(num_tokens)
        self.slots = self.block_ids.long()[positions // block_size] * block_size + positions % block_size
        self.layers = [
            SimpleNamespace(kv_cache=torch.full(of_cache, torch.nan, dtype=dtype), head_size=head_size)
            for _ in range(NUM_LAYERS)
        ]
        found = library()
        assert found is not None
        self.kernels = CPUKernels(self.layers, found)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """`(T, H_kv, D)` each, by vLLM."""
        cache = self.layers[layer].kv_cache
        halves = cache.view(*cache.shape[:2], 2 * cache.shape[2], -1).chunk(2, dim=2)
        cpu_attn_reshape_and_cache(keys, values, *halves, self.slots, "vec")


@needs_kernels
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("window", [None, 1, 24, 100])
def test_chosen_tokens_attend_to_all_before_them_in_a_window(
    shape: tuple[int, ...], share: float, window: int | None, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_size, _, num_tokens = shape
    paged = Paged(shape, dtype)
    keys, values = (torch.randn(num_tokens, num_kv_heads, head_size, dtype=dtype) for _ in range(2))
    paged.write(0, keys, values)
    count = max(1, int(share * num_tokens))
    positions = torch.randperm(num_tokens)[:count].sort().values
    packed = torch.randn(count, num_heads + 2 * num_kv_heads, head_size, dtype=dtype) * 3
    queries = packed[:, :num_heads]  # as a model's fused projection leaves them
    output = torch.empty(count, num_heads, head_size, dtype=dtype)
    paged.kernels.attend(
        queries, paged.layers[0].kv_cache, ChosenTokens(positions, paged.block_ids), head_size**-0.5, output, window
    )
    mask = torch.arange(num_tokens) <= positions[:, None]
    if window is not None:
        mask &= torch.arange(num_tokens) > positions[:, None] - window
    q, k, v = (x.float().transpose(0, 1) for x in (queries, keys, values))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
    norm, greatest = (0.005, 0.03) if dtype == torch.bfloat16 else (2e-6, 1e-5)
    assert (output - expected).norm() < norm * expected.norm()
    assert (output - expected).abs().max() < greatest * expected.abs().max()


@needs_kernels
@DTYPES
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_rotated_and_written_as_one_after_the_other(
    shape: tuple[int, ...], is_neox: bool, dtype: torch.dtype
) -> None:
    _, num_kv_heads, head_size, _, num_tokens = shape
    paged, expected = Paged(shape, dtype), Paged(shape, dtype)
    chosen = random.Random(num_tokens)
    positions = torch.arange(3, num_tokens - 2)
    positions = positions[positions != num_tokens // 2]
    kv = torch.randn(2, NUM_LAYERS, len(positions) + 2, num_kv_heads * head_size, dtype=dtype)
    edges = sorted(chosen.sample(range(1, len(positions)), 3))
    parts = [kv[:, :, low + 1 : high + 1] for low, high in zip([0, *edges], [*edges, len(positions)], strict=True)]
    rotation = Rotation(torch.rand(head_size // 4 - 1 if is_neox else head_size // 2), is_neox)
    rerotation = rotation.between(positions, positions + 100)
    rotations = [rotation, None]
    slots = paged.slots[positions]
    tolerance = 0.008 if dtype == torch.bfloat16 else 1e-4
    paged.kernels.place(parts, [slots] * NUM_LAYERS, rotations, {rotation: rerotation})
    for layer, own in enumerate(rotations):
        keys, values = kv[:, layer, 1:-1].unflatten(2, (num_kv_heads, head_size)).unbind()
        moved = keys.clone()
        if own:
            rerotation.apply_(moved)
        expected.slots = slots
        expected.write(layer, moved, values)
        ours, theirs = (where.layers[layer].kv_cache.float() for where in (paged, expected))
        torch.testing.assert_close(ours, theirs, rtol=tolerance if own else 0, atol=1e-6, equal_nan=True)


@needs_kernels
def test_kv_of_another_shape_is_refused() -> None:
    paged = Paged((4, 2, 32, 32, 64), torch.float32)
    slots = [paged.slots] * NUM_LAYERS
    for kv in (torch.zeros(2, NUM_LAYERS, 64, 32), torch.zeros(2, NUM_LAYERS, 64, 64).bfloat16()):
        with pytest.raises(ValueError, match=r"\(2, 2, 64\) in torch.float32"):
            paged.kernels.place([kv], slots, [None] * NUM_LAYERS, {})


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kernels"))
    return tmp_path


@needs_kernels
def test_kernels_are_compiled_once(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled()
    assert [first] == list((own_folder / "kernels").iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled() == first


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_are_no_kernels(
    compiler: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, attention.__name__):
        assert library.__wrapped__() is None
    assert "can't be compiled" in caplog.text
    assert not list(own_folder.glob("kernels/*"))
