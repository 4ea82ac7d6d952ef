"""Attention over KV gathered from vLLM's blocks equals plain PyTorch, and is used only where it is the faster one.

The layers are stand-ins for those on a GPU: a cache in vLLM's layout there, and rows that plain PyTorch attends to.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvarena.engines.vllm import attention
from kvarena.engines.vllm.attention import ChosenTokens, GatheredAttention, window_of

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
